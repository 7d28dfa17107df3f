"""Photos into a batch, and masks into photos, on the GPU: by the compiled kernels, with the results of the CPU."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import numpy as np

from maskrcnn.imaging.preprocess import Preprocessing
from maskrcnn.plugins.native import Kernels
from maskrcnn.runtime.gpu.arrays import DeviceArray
from maskrcnn.runtime.gpu.memory import Cuda, Room, Staging

_ALIGNMENT = 256  # bytes, where an image begins
_MOST_BITS = 64 << 20  # bytes of pasted masks that are on the GPU at a time
_WORD = 32  # pixels of a mask in a word


def resizes(preprocessing: Preprocessing) -> bool:
    """Whether there is a kernel for this way of resizing; Pillow's smoothing is left to Pillow."""
    return preprocessing.resize == "torchvision"


class ImageLoader:
    """Resizes and pads photos into the detector's input, for one thread at a time.

    Args:
        kernels: for the GPU.
        cuda: the GPU.
        preprocessing: the model's; `resizes` it.
    """

    def __init__(self, kernels: Kernels, cuda: Cuda, preprocessing: Preprocessing) -> None:
        self.kernels, self.cuda, self.preprocessing = kernels, cuda, preprocessing
        self._staging, self._raw = Staging(cuda), Room(cuda)

    def fill(self, images: Sequence[np.ndarray], sizes: Sequence[tuple[int, int]], batch: DeviceArray) -> None:
        """Starts writing photos into a batch, on the stream of the batch; does not wait for it.

        Args:
            images: uint8 `[H, W, 3]` RGB, as `preprocess.batch_sizes` has checked them.
            sizes: height and width of each after resizing.
            batch: float32 `[N, 3, H, W]`, N at least the number of photos; further images of it become zeros.
        """
        starts, end = [], 0
        for image in images:
            starts.append(end)
            end += -(-image.size // _ALIGNMENT) * _ALIGNMENT
        staged = self._staging.room(end)
        raw = self._raw.at_least(end)
        plane = batch.nbytes // len(batch)
        for place, (start, image, size) in enumerate(zip(starts, images, sizes, strict=True)):
            staged.array(image.shape, np.uint8, start)[...] = image
            self._staging.send(batch.stream, raw.address + start, image.size, start)
            self.kernels.resize_pad(
                raw.address + start,
                image.shape[:2],
                batch.address + place * plane,
                resized_hw=size,
                padded_hw=batch.shape[2:],
                swap_channels=self.preprocessing.channel_order == "BGR",
                stream=batch.stream.address,
            )
        if len(images) < len(batch):
            batch.stream.clear(batch.address + len(images) * plane, (len(batch) - len(images)) * plane)

    def close(self) -> None:
        """Gives its memory back."""
        self._staging.close()
        self._raw.close()


class MaskPaster:
    """Pastes masks into photos; any number of threads may call it.

    Args:
        kernels: for the GPU.
        cuda: the GPU.
    """

    def __init__(self, kernels: Kernels, cuda: Cuda) -> None:
        self.kernels, self.cuda = kernels, cuda
        self.stream = cuda.stream()
        self._lock = threading.Lock()
        self._up, self._down = Staging(cuda), Staging(cuda)
        self._given, self._found = Room(cuda), Room(cuda)

    def __call__(
        self, masks: np.ndarray, boxes_xyxy_px: np.ndarray, size_hw: tuple[int, int], threshold: float
    ) -> np.ndarray:
        """Masks in the whole image, as `Detections.full_masks` gives them.

        Args:
            masks: `[D, S, S]` probabilities in the frames of the boxes.
            boxes_xyxy_px: `[D, 4]` in pixels of the image.
            size_hw: height and width of the image.
            threshold: a pixel is set where the probability is greater.

        Returns:
            bool `[D, H, W]`.
        """
        with self._lock, self.cuda.active():
            return paste_by_portions(
                lambda masks, boxes: self._bits(masks, boxes, size_hw, threshold), masks, boxes_xyxy_px, size_hw
            )

    def _bits(self, masks: np.ndarray, boxes: np.ndarray, size_hw: tuple[int, int], threshold: float) -> np.ndarray:
        """uint32 `[D, H, ceil(W / 32)]` in pinned memory, overwritten by the next call."""
        shape = (len(masks), size_hw[0], _words(size_hw))
        room = 4 * masks.size + 4 * boxes.size
        staged = self._up.room(room)
        staged.array(masks.shape, np.float32)[...] = masks
        staged.array(boxes.shape, np.float32, 4 * masks.size)[...] = boxes
        nbytes = 4 * int(np.prod(shape))
        given, found = self._given.at_least(room), self._found.at_least(nbytes)
        self._up.send(self.stream, given.address, room)
        self.kernels.paste_masks(
            given.address,
            given.address + 4 * masks.size,
            found.address,
            num_masks=len(masks),
            mask_size=masks.shape[-1],
            dtype="float32",
            size_hw=size_hw,
            threshold=threshold,
            stream=self.stream.address,
        )
        returned = self._down.room(nbytes)
        self.stream.copy(returned.address, found.address, nbytes, "DeviceToHost")
        self.stream.synchronize()
        return returned.array(shape, np.uint32)

    def close(self) -> None:
        """Gives its memory back."""
        for each in (self._up, self._down, self._given, self._found, self.stream):
            each.close()


def paste_by_portions(
    bits_of: Callable[[np.ndarray, np.ndarray], np.ndarray],
    masks: np.ndarray,
    boxes_xyxy_px: np.ndarray,
    size_hw: tuple[int, int],
) -> np.ndarray:
    """Masks in the whole image from what the kernel writes, so many at a time that memory allows it.

    Args:
        bits_of: of some masks and their boxes, what `Kernels.paste_masks` writes row by row: uint32
            `[D, H, ceil(W / 32)]`.
        masks: `[D, S, S]`.
        boxes_xyxy_px: `[D, 4]`.
        size_hw: H and W of the image.

    Returns:
        bool `[D, H, W]`.
    """
    height, width = size_hw
    full = np.empty((len(masks), height, width), bool)
    portion = max(_MOST_BITS // (height * _words(size_hw) * 4), 1)
    for start in range(0, len(masks), portion):
        part = slice(start, start + portion)
        bits = bits_of(masks[part], boxes_xyxy_px[part])
        full[part] = np.unpackbits(bits.view(np.uint8), axis=-1, count=width, bitorder="little").view(bool)
    return full


def _words(size_hw: tuple[int, int]) -> int:
    """Words of a line of bits."""
    return -(-size_hw[1] // _WORD)

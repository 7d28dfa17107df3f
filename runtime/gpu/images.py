"""Image resizing and mask pasting on the GPU by the compiled kernels, with the same results as on the CPU."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np

from maskrcnn.imaging.preprocess import Preprocessing
from maskrcnn.plugins.native import Kernels
from maskrcnn.runtime.gpu.arrays import DeviceArray
from maskrcnn.runtime.gpu.memory import Cuda, GrowableBuffer, StagingBuffer

MAX_BITS_BYTES = 64 << 20  # of pasted masks on the GPU at a time; one bit per pixel
_ALIGNMENT = 256  # bytes, of each image's start
_WORD_BITS = 32  # pixels of a mask per word


def resizes_on_gpu(preprocessing: Preprocessing) -> bool:
    """Whether the kernels can resize a model's images: three channels, and not Pillow's resizing."""
    return preprocessing.resize == "torchvision" and preprocessing.channels == 3


def are_bytes(images: Sequence[np.ndarray]) -> bool:
    """Whether all images are uint8, which `ImageLoader` requires; images of more bits are resized elsewhere."""
    return all(image.dtype == np.uint8 for image in images)


class ImageLoader:
    """Uploads, resizes and pads images into the detector's input; for one thread at a time.

    Args:
        kernels: compiled for the GPU.
        cuda: the GPU.
        preprocessing: preprocessing of the model, for which `resizes_on_gpu` is true.
    """

    def __init__(self, kernels: Kernels, cuda: Cuda, preprocessing: Preprocessing) -> None:
        self.kernels, self.preprocessing = kernels, preprocessing
        self._staging, self._raw = StagingBuffer(cuda), GrowableBuffer(cuda)

    def fill(self, images: Sequence[np.ndarray], sizes: Sequence[tuple[int, int]], batch: DeviceArray) -> None:
        """Starts writing images into a batch on the batch's stream, without waiting for it.

        Args:
            images: uint8 `[H, W, 3]` RGB, checked by `preprocess.batch_sizes`.
            sizes: height and width of each after resizing.
            batch: float32 `[N, 3, H, W]`, contiguous. N is at least the number of images; the rest is zeroed.
        """
        starts, end = [], 0
        for image in images:
            starts.append(end)
            end += -(-image.size // _ALIGNMENT) * _ALIGNMENT
        staged = self._staging.reserve(end)
        raw = self._raw.reserve(end)
        image_bytes = batch.nbytes // len(batch)
        for place, (start, image, size) in enumerate(zip(starts, images, sizes, strict=True)):
            staged.array(image.shape, np.uint8, start)[...] = image
            self._staging.send(batch.stream, raw.address + start, image.size, start)
            self.kernels.resize_pad(
                raw.address + start,
                (image.shape[0], image.shape[1]),
                batch.address + place * image_bytes,
                resized_hw=size,
                padded_hw=(batch.shape[2], batch.shape[3]),
                swap_channels=self.preprocessing.channel_order == "BGR",
                stream=batch.stream.address,
            )
        if len(images) < len(batch):
            rest = len(batch) - len(images)
            batch.stream.clear(batch.address + len(images) * image_bytes, rest * image_bytes)

    def close(self) -> None:
        """Frees its memory."""
        self._staging.close()
        self._raw.close()


class MaskPaster:
    """Pastes masks into images. Any number of threads may call it.

    Args:
        kernels: compiled for the GPU.
        cuda: the GPU.
    """

    def __init__(self, kernels: Kernels, cuda: Cuda) -> None:
        self.kernels, self.cuda = kernels, cuda
        self.stream = cuda.stream()
        self._lock = threading.Lock()
        self._upload, self._download = StagingBuffer(cuda), StagingBuffer(cuda)
        self._inputs, self._bits = GrowableBuffer(cuda), GrowableBuffer(cuda)

    def __call__(
        self, masks: np.ndarray, boxes_xyxy_px: np.ndarray, size_hw: tuple[int, int], threshold: float
    ) -> np.ndarray:
        """Pastes masks into the whole image, as `Detections.full_masks` does.

        Args:
            masks: `[D, S, S]` probabilities in the frames of the boxes.
            boxes_xyxy_px: `[D, 4]` in pixels of the image.
            size_hw: height and width of the image.
            threshold: a pixel is set if its probability is greater.

        Returns:
            bool `[D, H, W]`.
        """
        height, width = size_hw
        full = np.empty((len(masks), height, width), bool)
        words = -(-width // _WORD_BITS)
        portion = max(MAX_BITS_BYTES // (height * words * 4), 1)
        with self._lock, self.cuda.active():
            for start in range(0, len(masks), portion):
                part = slice(start, start + portion)
                bits = self._paste_bits(masks[part], boxes_xyxy_px[part], size_hw, threshold, words)
                full[part] = np.unpackbits(bits.view(np.uint8), axis=-1, count=width, bitorder="little").view(bool)
        return full

    def _paste_bits(
        self, masks: np.ndarray, boxes: np.ndarray, size_hw: tuple[int, int], threshold: float, words: int
    ) -> np.ndarray:
        """uint32 `[D, H, words]` in pinned memory, overwritten by the next call."""
        shape = (len(masks), size_hw[0], words)
        input_bytes, bits_bytes = 4 * masks.size + 4 * boxes.size, 4 * int(np.prod(shape))
        staged = self._upload.reserve(input_bytes)
        staged.array(masks.shape, np.float32)[...] = masks
        staged.array(boxes.shape, np.float32, 4 * masks.size)[...] = boxes
        inputs, bits = self._inputs.reserve(input_bytes), self._bits.reserve(bits_bytes)
        self._upload.send(self.stream, inputs.address, input_bytes)
        self.kernels.paste_masks(
            inputs.address,
            inputs.address + 4 * masks.size,
            bits.address,
            num_masks=len(masks),
            mask_size=masks.shape[-1],
            dtype="float32",
            size_hw=size_hw,
            threshold=threshold,
            stream=self.stream.address,
        )
        downloaded = self._download.reserve(bits_bytes)
        self.stream.copy(downloaded.address, bits.address, bits_bytes, "DeviceToHost")
        self.stream.synchronize()
        return downloaded.array(shape, np.uint32)

    def close(self) -> None:
        """Frees its memory."""
        for each in (self._upload, self._download, self._inputs, self._bits, self.stream):
            each.close()

"""What every backend is: a description of its tensors and a function from arrays to arrays."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from maskrcnn.errors import UserError
from maskrcnn.imaging.postprocess import Paste
from maskrcnn.imaging.preprocess import batch_images
from maskrcnn.metadata import ModelMetadata
from maskrcnn.runtime.gpu.arrays import is_on_device


@dataclass(frozen=True)
class TensorSpec:
    """A named tensor; `None` in the shape is any length."""

    dtype: str  # a NumPy name
    shape: tuple[int | None, ...]


def detector_specs(metadata: ModelMetadata) -> tuple[dict[str, TensorSpec], dict[str, TensorSpec]]:
    """Inputs and outputs of the detector contract (docs/architecture.md)."""
    rows = metadata.detections
    inputs = {
        "images": TensorSpec("float32", (None, 3, None, None)),
        "image_sizes": TensorSpec("int64", (None, 2)),
    }
    outputs = {
        "num_detections": TensorSpec("int32", (None,)),
        "boxes": TensorSpec("float32", (None, rows, 4)),
        "scores": TensorSpec("float32", (None, rows)),
        "labels": TensorSpec("int64", (None, rows)),
    }
    if metadata.has_masks:
        outputs["masks"] = TensorSpec("float32", (None, rows, 28, 28))
    if metadata.has_keypoints:
        outputs["keypoints"] = TensorSpec("float32", (None, rows, len(metadata.keypoint_names), 3))
    return inputs, outputs


class Backend(ABC):
    """A loaded model. Subclasses give `describe` and `infer`, and `stages` where they can; callers call the object.

    Those that run on a GPU may also take arrays that lie there, of any library that `runtime/gpu/arrays.py` names;
    where `images` is one, the outputs are arrays on the GPU too.
    """

    name: str  # of the software that runs it, as tables show it
    precision: str  # of the arithmetic, as tables show it
    metadata: ModelMetadata
    takes_gpu_arrays = False  # whether inputs may lie on a GPU
    paste: Paste | None = None  # what pastes masks into images faster than the CPU, if anything does

    @abstractmethod
    def describe(self) -> tuple[dict[str, TensorSpec], dict[str, TensorSpec]]:
        """Inputs and outputs by name."""

    @abstractmethod
    def infer(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Outputs by name for inputs that have been checked."""

    def run_images(self, images: Sequence[np.ndarray]) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """Outputs for images of any sizes, and their sizes after resizing.

        Args:
            images: uint8 `[H, W, 3]` RGB.

        Returns:
            the outputs by name, in pixels of the resized images, and `image_sizes` int64 `[N, 2]`.

        Raises:
            UserError: for an empty list, an image of another type or shape, or one that the model cannot take.
        """
        pixels, sizes = batch_images(images, self.metadata.preprocessing)
        return self({"images": pixels, "image_sizes": sizes}), sizes

    def stages(self, feeds: dict[str, np.ndarray], names: Sequence[str]) -> dict[str, np.ndarray]:
        """Tensors on the way from images to detections, from a second, instrumented copy of the model.

        Asking for a tensor keeps a runtime from fusing it away, and may change the precision around it. So what a
        model detects is what the call says, not what is found here.

        Args:
            feeds: as for a call, checked.
            names: of `maskrcnn.stages`; outputs may be among them.

        Returns:
            those that the model has under these names; files written before stages had names have the outputs only.

        Raises:
            UserError: for a backend that cannot show them.
        """
        raise UserError(
            f"a model in {self.name}",
            "a backend that shows the tensors on the way",
            "verify the ONNX file or the checkpoint that this one was made from",
        )

    def remarks(self) -> list[str]:
        """What a user may want to know of how the model runs here, a line each; most have nothing to say."""
        return []

    def __call__(self, feeds: dict[str, Any]) -> dict[str, Any]:
        """Checks names, types and shapes, then infers.

        Raises:
            UserError: for feeds that do not fit `describe`.
        """
        inputs, _ = self.describe()
        if set(feeds) != set(inputs):
            raise _bad_feed(f"inputs {sorted(feeds)}", f"{sorted(inputs)}")
        for name, spec in inputs.items():
            value = feeds[name]
            dtype = str(value.dtype).rpartition(".")[2]  # torch says torch.float32
            if dtype != spec.dtype or not _fits(tuple(value.shape), spec.shape):
                raise _bad_feed(f"{name} {dtype} {list(value.shape)}", f"{name} {spec.dtype} {list(spec.shape)}")
        images, sizes = feeds["images"], feeds["image_sizes"]
        if not self.takes_gpu_arrays and any(is_on_device(value) for value in feeds.values()):
            came, expected = "arrays on a GPU", f"arrays of the host: {self.name} does not run there, or not with them"
            raise UserError(
                came, expected, "copy them to the host first, or load the model on the GPU; see docs/gpu.md"
            )
        divisor = self.metadata.preprocessing.divisor
        if len(images) == 0 or len(images) != len(sizes):
            raise _bad_feed(f"{len(images)} images with {len(sizes)} sizes", "as many of both, at least one")
        if images.shape[2] % divisor or images.shape[3] % divisor or 0 in images.shape[2:]:
            raise _bad_feed(f"images of {images.shape[2]}×{images.shape[3]}", f"multiples of {divisor}")
        return self.infer(feeds)


def _fits(shape: tuple[int, ...], wanted: tuple[int | None, ...]) -> bool:
    return len(shape) == len(wanted) and all(w is None or s == w for s, w in zip(shape, wanted, strict=True))


def _bad_feed(came: str, expected: str) -> UserError:
    return UserError(came, expected, "prepare images with maskrcnn.imaging.preprocess.batch_images")

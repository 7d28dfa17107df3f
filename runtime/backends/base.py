"""Interface of a backend: `describe`, `infer`, and protocols for optional features."""

from __future__ import annotations

import ctypes
import os
import weakref
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np

from maskrcnn.errors import UserError
from maskrcnn.imaging.postprocess import Paste
from maskrcnn.imaging.preprocess import batch_images
from maskrcnn.metadata import ModelMetadata
from maskrcnn.runtime.gpu.arrays import is_on_device


@dataclass(frozen=True)
class TensorSpec:
    """Type and shape of a named tensor."""

    dtype: str  # NumPy name
    shape: tuple[int | None, ...]  # None: dynamic


Specs = dict[str, TensorSpec]
_loaded: weakref.WeakSet[Backend] = weakref.WeakSet()  # models of this process and of the processes it was forked from


def keep_for_ever(thing: Any) -> None:
    """Prevents an object from being freed, by an additional reference that is never released."""
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(thing))


def _keep_models_of_parent() -> None:
    """Runs in a forked process, where freeing a model would wait for threads that exist only in the parent."""
    for backend in _loaded:
        keep_for_ever(backend)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_keep_models_of_parent)


def detector_specs(metadata: ModelMetadata) -> tuple[Specs, Specs]:
    """Inputs and outputs of the detector contract (docs/contracts.md)."""
    rows = metadata.detections
    inputs = {
        "images": TensorSpec("float32", (None, metadata.preprocessing.channels, None, None)),
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
    """A loaded model. Subclasses implement `describe` and `infer`; to infer, call the object, which checks the inputs.

    The protocols of this module declare optional features. A model belongs to the process that loaded it: a forked
    process lacks the runtimes' threads, and inference would wait for them for ever.
    """

    name: str  # name of the software, for tables
    precision: str  # precision of the arithmetic, for tables
    metadata: ModelMetadata
    _process: int  # process that loaded the model

    def __new__(cls, *arguments: Any, **options: Any) -> Backend:
        backend = super().__new__(cls)
        backend._process = os.getpid()
        _loaded.add(backend)
        return backend

    def check_process(self) -> None:
        """Checks that this process loaded the model.

        Raises:
            UserError: if this process was forked from the one that loaded the model.
        """
        if self._process != os.getpid():
            raise UserError(
                f"a model loaded in process {self._process} and used in process {os.getpid()}, forked from it",
                "a model loaded by the process that uses it; the threads of runtimes do not survive a fork",
                'load it after the fork (gunicorn: without --preload), or start processes with "spawn"',
            )

    @abstractmethod
    def describe(self) -> tuple[Specs, Specs]:
        """Returns inputs and outputs by name."""

    @abstractmethod
    def infer(self, feeds: dict[str, Any]) -> dict[str, Any]:
        """Returns outputs by name for checked inputs."""

    def run_images(self, images: Sequence[np.ndarray]) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """Preprocesses and infers images of any sizes.

        Args:
            images: `[H, W, C]`, uint8 or float32, as in `batch_images`.

        Returns:
            Outputs by name, in pixels of the resized images, and `image_sizes` int64 `[N, 2]`.

        Raises:
            UserError: if the list is empty, or an image has another type or shape or does not fit the model.
        """
        pixels, sizes = batch_images(images, self.metadata.preprocessing)
        return self({"images": pixels, "image_sizes": sizes}), sizes

    def __call__(self, feeds: dict[str, Any]) -> dict[str, Any]:
        """Checks names, types and shapes of the inputs, then infers.

        Raises:
            UserError: if the feeds do not match `describe`.
        """
        self.check_process()
        inputs, _ = self.describe()
        if set(feeds) != set(inputs):
            raise _bad_feed(f"inputs {sorted(feeds)}", f"{sorted(inputs)}")
        for name, spec in inputs.items():
            value = feeds[name]
            dtype = str(value.dtype).rpartition(".")[2]  # torch's is "torch.float32"
            if dtype != spec.dtype or not _matches(tuple(value.shape), spec.shape):
                raise _bad_feed(f"{name} {dtype} {list(value.shape)}", f"{name} {spec.dtype} {list(spec.shape)}")
        images, sizes = feeds["images"], feeds["image_sizes"]
        accepts_gpu = isinstance(self, GpuInputs) and self.takes_gpu_arrays
        if not accepts_gpu and any(is_on_device(value) for value in feeds.values()):
            raise UserError(
                "arrays on a GPU",
                f"arrays in host memory: {self.name} does not run on the GPU here, or cannot read its arrays",
                "copy them to the host first, or load the model on the GPU; see docs/gpu.md",
            )
        divisor = self.metadata.preprocessing.divisor
        if len(images) == 0 or len(images) != len(sizes):
            raise _bad_feed(f"{len(images)} images with {len(sizes)} sizes", "the same number of both, at least one")
        if images.shape[2] % divisor or images.shape[3] % divisor or 0 in images.shape[2:]:
            raise _bad_feed(f"images of {images.shape[2]}×{images.shape[3]}", f"multiples of {divisor}")
        return self.infer(feeds)


@runtime_checkable
class GpuInputs(Protocol):
    """A backend that accepts GPU arrays as inputs, of any library that `runtime/gpu/arrays.py` supports.

    If `images` is a GPU array, the outputs are GPU arrays too.
    """

    takes_gpu_arrays: bool


@runtime_checkable
class GpuPasting(Protocol):
    """A backend that can paste masks into images on the GPU."""

    paste: Paste | None


@runtime_checkable
class IntermediateStages(Protocol):
    """A backend that returns intermediate tensors, from a second, instrumented copy of the model.

    A requested tensor cannot be fused away, and the precision around it may change. Take detections from a call
    instead.
    """

    def stages(self, feeds: dict[str, Any], names: Sequence[str]) -> dict[str, np.ndarray]:
        """Returns intermediate tensors by name.

        Args:
            feeds: as for a call, checked.
            names: names from `maskrcnn.stages`; outputs are allowed too.

        Returns:
            The tensors with these names that the model has; files older than the names have the outputs only.
        """


@runtime_checkable
class TimedInference(Protocol):
    """A backend that measures the parts of a call on the GPU."""

    def infer_timed(self, feeds: dict[str, np.ndarray]) -> tuple[dict[str, np.ndarray], dict[str, float]]:
        """Returns outputs on the host, and the milliseconds of `copy in`, `engine` and `copy out` (empty on a CPU)."""


@runtime_checkable
class Remarks(Protocol):
    """A backend that reports how the model runs here."""

    def remarks(self) -> list[str]:
        """Returns lines for the user, for example about nodes that run on the CPU instead of the GPU."""


def stages_of(backend: Backend, feeds: dict[str, Any], names: Sequence[str]) -> dict[str, np.ndarray]:
    """Returns intermediate tensors by name; see `IntermediateStages`.

    Raises:
        UserError: if the backend cannot return them.
    """
    backend.check_process()
    if not isinstance(backend, IntermediateStages):
        raise UserError(
            f"a model in {backend.name}",
            "a backend that returns intermediate tensors",
            "verify the ONNX file or the checkpoint that this file was made from",
        )
    return backend.stages(feeds, names)


def _matches(shape: tuple[int, ...], spec: tuple[int | None, ...]) -> bool:
    return len(shape) == len(spec) and all(w is None or s == w for s, w in zip(shape, spec, strict=True))


def _bad_feed(found: str, expected: str) -> UserError:
    return UserError(found, expected, "prepare images with maskrcnn.imaging.preprocess.batch_images")

"""`Detector`: computes detections in images with any model file."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from maskrcnn.errors import UserError
from maskrcnn.files import kind_of
from maskrcnn.imaging.postprocess import Detections, unpack
from maskrcnn.metadata import ModelMetadata
from maskrcnn.runtime.backends.base import Backend, GpuPasting, Remarks

if TYPE_CHECKING:
    from maskrcnn.data.images import ImageNotes

# Suffixes of model files and the backends that run them; the first is the default.
BACKENDS = {
    ".safetensors": ("torch",),
    ".onnx": ("onnxruntime", "openvino"),
    ".xml": ("openvino",),
    ".engine": ("tensorrt",),
}


class Detector:
    """Runs a model file on images, with the same preprocessing and postprocessing for every backend.

    Args:
        backend: the loaded model.
        pixel_range: (low, high) of samples with more than 8 bits in image files, mapped to 0 and 255 (default: the
            model's; see `data/images.py`).
    """

    def __init__(self, backend: Backend, *, pixel_range: Sequence[float] | None = None) -> None:
        self.backend = backend
        self.preprocessing = backend.metadata.preprocessing
        if pixel_range is not None:
            self.preprocessing = replace(self.preprocessing, pixel_range=tuple(pixel_range))

    @classmethod
    def load(
        cls,
        path: str | Path,
        backend: str | None = None,
        *,
        pixel_range: Sequence[float] | None = None,
        **options: Any,
    ) -> Detector:
        """Loads a checkpoint, an ONNX file or an engine.

        Args:
            path: `.safetensors`, `.onnx`, `.xml` or `.engine`.
            backend: "torch", "onnxruntime", "openvino" or "tensorrt", if the kind of file has several. A suffix
                selects a provider of ONNX Runtime ("onnxruntime:cuda") or a precision of PyTorch ("torch:fp16").
            pixel_range: see the class.
            options: backend options such as `threads`, `precision` or `graphs`.

        Raises:
            UserError: if the file cannot be used or the backend's library is missing.
        """
        return cls(load_backend(Path(path), backend, **options), pixel_range=pixel_range)

    @property
    def metadata(self) -> ModelMetadata:
        """Class names, preprocessing and provenance of the model."""
        return self.backend.metadata

    @cached_property
    def notes(self) -> ImageNotes:
        """Losses while reading image files."""
        from maskrcnn.data.images import ImageNotes  # needs Pillow, which is not required for arrays

        return ImageNotes()

    def remarks(self) -> list[str]:
        """Returns lines about how the model runs here; see `backends.base.Remarks`."""
        return self.backend.remarks() if isinstance(self.backend, Remarks) else []

    def read(self, path: str | Path) -> np.ndarray:
        """Reads an image file for `detect`: upright, in the model's bands and pixel range, `[H, W, C]`.

        Losses are counted in `notes`.

        Raises:
            UserError: see `maskrcnn.data.images.read_image`.
        """
        from maskrcnn.data.images import read_image

        return read_image(path, self.preprocessing, notes=self.notes)

    def detect(self, images: Sequence[np.ndarray | str | Path]) -> list[Detections]:
        """Returns the detections of a batch of images, in pixels of each original image.

        Args:
            images: files or arrays of any size: uint8 `[H, W, 3]` RGB (or the model's own channels; or float32 from 0
                to 255). The batch is padded to the largest image.
        """
        self.backend.check_process()
        if isinstance(images, (str, Path)) or getattr(images, "ndim", 4) < 4:
            raise UserError("a single image", "a sequence of images", "put it into a list: detect([image])")
        arrays = [self.read(image) if isinstance(image, (str, Path)) else image for image in images]
        outputs, sizes = self.backend.run_images(arrays)
        paste = self.backend.paste if isinstance(self.backend, GpuPasting) else None
        found = unpack(outputs, sizes, [(image.shape[0], image.shape[1]) for image in arrays], paste=paste)
        metadata = self.metadata
        return [
            replace(
                detections,
                class_names=metadata.class_names,
                category_ids=metadata.category_ids,
                keypoint_skeleton=metadata.keypoint_skeleton,
            )
            for detections in found
        ]


def load_backend(path: Path, backend: str | None = None, **options: Any) -> Backend:
    """Loads a model file in a backend; see `Detector.load`."""
    kinds = BACKENDS.get(path.suffix)
    if kinds is None:
        raise UserError(
            f"{path}: {kind_of(path)}",
            f"one of {', '.join(BACKENDS)}",
            "pass a checkpoint, an exported model or an engine; "
            "for torchvision weights: `maskrcnn export --weights FILE --model NAME --onnx`",
        )
    chosen, _, variant = (backend or kinds[0]).partition(":")
    if variant:
        options["precision" if chosen == "torch" else "provider"] = variant
    if chosen not in kinds:
        if chosen == "torch" and "precision" in options:
            raise _precision_is_fixed(options["precision"], path)
        raise UserError(f"backend {chosen!r} for {path}", " or ".join(kinds), "choose one of these")
    if "provider" in options and chosen != "onnxruntime":
        raise UserError(
            f"a provider for {path} in {chosen}",
            "ONNX Runtime, the only backend with providers",
            "omit it, or pass an ONNX file with --backend onnxruntime",
        )
    kind = _backend(chosen)
    parameters = inspect.signature(kind).parameters.values()
    known = [each.name for each in parameters if each.kind is each.KEYWORD_ONLY and each.name != "source"]
    if unknown := [name for name in options if name not in known]:
        raise UserError(
            f"option {', '.join(unknown)} for {path} in {chosen}",
            f"options of this backend: {', '.join(known)}",
            "ONNX Runtime chooses the device by its provider, such as backend='onnxruntime:cuda'"
            if chosen == "onnxruntime" and "device" in unknown
            else "leave it out, or use one of these",
        )
    loaded: Backend = kind.load(path, **options) if chosen == "torch" else kind(path, **options)
    return loaded


def _backend(backend: str) -> Any:
    """Imports a backend; each needs its own library."""
    if backend == "torch":
        from maskrcnn.runtime.backends.torch import TorchBackend

        return TorchBackend
    if backend == "onnxruntime":
        from maskrcnn.runtime.backends.onnxruntime import OnnxRuntimeBackend

        return OnnxRuntimeBackend
    if backend == "tensorrt":
        from maskrcnn.runtime.backends.tensorrt import TensorRtBackend

        return TensorRtBackend
    from maskrcnn.runtime.backends.openvino import OpenVinoBackend

    return OpenVinoBackend


def backend_spec(backend: str | None, provider: str | None, precision: str | None) -> str | None:
    """Returns the backend name with its provider or precision, in the form that `load_backend` expects.

    Args:
        backend: backend name, or None for the file's default.
        provider: ONNX Runtime provider, or None for the best that works.
        precision: PyTorch precision, or None for float32.

    Raises:
        UserError: for a precision with a backend other than PyTorch or with a provider.
    """
    if precision is None:
        return f"{backend or 'onnxruntime'}:{provider}" if provider else backend
    if provider or backend not in (None, "torch"):
        raise _precision_is_fixed(precision, provider or backend or "")
    return f"torch:{precision}"


def _precision_is_fixed(precision: str, what: str | Path) -> UserError:
    return UserError(
        f"precision {precision} for {what}",
        "a checkpoint in PyTorch; other files have a fixed precision",
        "omit it, or make such a file with `maskrcnn export --precision` or `maskrcnn build-engine`",
    )

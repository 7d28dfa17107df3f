"""The one class that a user needs: images in, detections in the original images out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from maskrcnn.errors import UserError
from maskrcnn.imaging.postprocess import Detections, unpack
from maskrcnn.metadata import ModelMetadata
from maskrcnn.runtime.backends.base import Backend

# Kinds of model file, and the backends that run them; the first is the default.
BACKENDS = {
    ".safetensors": ("torch",),
    ".onnx": ("onnxruntime", "openvino"),
    ".xml": ("openvino",),
    ".engine": ("tensorrt",),
}


class Detector:
    """Runs any model file on images, with one preprocessing and one postprocessing for all.

    Args:
        backend: the loaded model.
    """

    def __init__(self, backend: Backend) -> None:
        self.backend = backend

    @classmethod
    def load(cls, path: str | Path, backend: str | None = None, **options: Any) -> Detector:
        """The detector for a checkpoint, an ONNX file or an engine.

        Args:
            path: `.safetensors`, `.onnx`, `.xml` or `.engine`.
            backend: "torch", "onnxruntime", "openvino" or "tensorrt", where a kind of file has several; with one of
                ONNX Runtime's providers as "onnxruntime:cuda", with PyTorch's precision as "torch:fp16".
            options: for the backend, such as `threads`, `precision` or `graphs`.

        Raises:
            UserError: when the file cannot be used or the backend's library is missing.
        """
        return cls(load_backend(Path(path), backend, **options))

    @property
    def metadata(self) -> ModelMetadata:
        """Class names, preprocessing and provenance of the model."""
        return self.backend.metadata

    def detect(self, images: list[np.ndarray]) -> list[Detections]:
        """Detections of a batch of images, in pixels of each original image.

        Args:
            images: uint8 `[H, W, 3]` RGB, of any sizes; the batch is padded to the largest.
        """
        outputs, sizes = self.backend.run_images(images)
        return unpack(outputs, sizes, [image.shape[:2] for image in images], paste=self.backend.paste)


def load_backend(path: Path, backend: str | None = None, **options: Any) -> Backend:
    """The backend for a model file; see `Detector.load`."""
    kinds = BACKENDS.get(path.suffix)
    if kinds is None:
        raise UserError(
            f"{path}: a file of kind {path.suffix!r}",
            f"one of {', '.join(BACKENDS)}",
            "name a checkpoint, an exported model or an engine; "
            "for torchvision weights: `maskrcnn export --weights FILE --model NAME --onnx`",
        )
    chosen, _, variant = (backend or kinds[0]).partition(":")
    if variant:
        options["precision" if chosen == "torch" else "provider"] = variant
    if chosen not in kinds and "precision" in options and chosen == "torch":
        raise _has_its_own_precision(options["precision"], path)
    if chosen not in kinds:
        raise UserError(f"backend {chosen!r} for {path}", " or ".join(kinds), "choose one of these")
    if "provider" in options and chosen != "onnxruntime":
        came, do = f"a provider for {path} in {chosen}", "leave it out, or name an ONNX file and --backend onnxruntime"
        raise UserError(came, "ONNX Runtime, whose providers they are", do)
    if chosen == "torch":
        from maskrcnn.runtime.backends.torch import TorchBackend

        return TorchBackend.load(path, **options)
    if chosen == "onnxruntime":
        from maskrcnn.runtime.backends.onnxruntime import OnnxRuntimeBackend

        return OnnxRuntimeBackend(path, **options)
    if chosen == "tensorrt":
        from maskrcnn.runtime.backends.tensorrt import TensorRtBackend

        return TensorRtBackend(path, **options)
    from maskrcnn.runtime.backends.openvino import OpenVinoBackend

    return OpenVinoBackend(path, **options)


def backend_spec(backend: str | None, provider: str | None, precision: str | None) -> str | None:
    """A backend's name with one of ONNX Runtime's providers or a precision of PyTorch's, as `load_backend` takes it.

    Args:
        backend: as a user names it, or None.
        provider: as a user names it, or None for the best that works.
        precision: as a user names it, or None for single precision.

    Raises:
        UserError: for a precision of another backend, and for both.
    """
    if precision is None:
        return f"{backend or 'onnxruntime'}:{provider}" if provider else backend
    if provider or backend not in (None, "torch"):
        raise _has_its_own_precision(precision, provider or backend)
    return f"torch:{precision}"


def _has_its_own_precision(precision: str, what: str | Path) -> UserError:
    return UserError(
        f"precision {precision} for {what}",
        "a checkpoint in PyTorch, where it can be chosen; other files have theirs",
        "leave it out, or make such a file with `maskrcnn export --precision` or `maskrcnn build-engine`",
    )

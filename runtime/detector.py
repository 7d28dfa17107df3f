"""The one class that a user needs: images in, detections in the original images out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from maskrcnn.errors import UserError
from maskrcnn.metadata import ModelMetadata
from maskrcnn.postprocess import Detections, unpack
from maskrcnn.preprocess import batch_images
from maskrcnn.runtime.backend import Backend

# Kinds of model file, and the backends that run them; the first is the default.
BACKENDS = {
    ".safetensors": ("torch",),
    ".onnx": ("onnxruntime", "openvino"),
    ".xml": ("openvino",),
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
            path: `.safetensors`, `.onnx` or `.xml`.
            backend: "torch", "onnxruntime" or "openvino", where a kind of file has several.
            options: for the backend, such as `threads` or `precision`.

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
        pixels, sizes = batch_images(images, self.metadata.preprocessing)
        outputs = self.backend({"images": pixels, "image_sizes": sizes})
        return unpack(outputs, sizes, [image.shape[:2] for image in images])


def load_backend(path: Path, backend: str | None = None, **options: Any) -> Backend:
    """The backend for a model file; see `Detector.load`."""
    if path.suffix == ".engine":
        raise UserError(
            f"{path}: a TensorRT engine",
            "a checkpoint, an ONNX file or an OpenVINO engine",
            "run the ONNX file it was built from; this version does not run TensorRT engines yet",
        )
    kinds = BACKENDS.get(path.suffix)
    if kinds is None:
        raise UserError(
            f"{path}: a file of kind {path.suffix!r}",
            f"one of {', '.join(BACKENDS)}",
            "name a checkpoint, an exported model or an engine; "
            "for torchvision weights: `maskrcnn export --weights FILE --model NAME --onnx`",
        )
    chosen = backend or kinds[0]
    if chosen not in kinds:
        raise UserError(f"backend {chosen!r} for {path}", " or ".join(kinds), "choose one of these")
    if chosen == "torch":
        from maskrcnn.runtime.torch_backend import TorchBackend

        return TorchBackend.load(path, **options)
    if chosen == "onnxruntime":
        from maskrcnn.runtime.onnxruntime_backend import OnnxRuntimeBackend

        return OnnxRuntimeBackend(path, **options)
    from maskrcnn.runtime.openvino_backend import OpenVinoBackend

    return OpenVinoBackend(path, **options)

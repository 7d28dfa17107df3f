"""PyTorch as a backend. The only module of `maskrcnn.runtime` that imports torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from maskrcnn.checkpoint import load_checkpoint, metadata_of
from maskrcnn.errors import UserError
from maskrcnn.model.detector import MaskRCNN
from maskrcnn.runtime.backend import Backend, TensorSpec, detector_specs

PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class TorchBackend(Backend):
    """A model in eager PyTorch, on the GPU where there is one.

    Args:
        model: the model; it is put into evaluation mode and channels-last layout.
        source: the file it came from, for its hash.
        precision: "fp32", or "bf16" or "fp16" by autocast.
        device: "cpu", "cuda", or by default CUDA where available.
    """

    name = "PyTorch"

    def __init__(
        self,
        model: MaskRCNN,
        *,
        source: Path | None = None,
        precision: str = "fp32",
        device: str | None = None,
    ) -> None:
        if precision not in PRECISIONS:
            raise UserError(f"precision {precision!r}", " or ".join(PRECISIONS), "choose one of these")
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.model = model.eval().to(self.device, memory_format=torch.channels_last)
        self.metadata = metadata_of(model.config, source)
        self.precision = precision

    @classmethod
    def load(cls, path: Path, **options) -> TorchBackend:
        """The backend for a checkpoint."""
        return cls(load_checkpoint(path), source=path, **options)

    def describe(self) -> tuple[dict[str, TensorSpec], dict[str, TensorSpec]]:
        return detector_specs(self.metadata)

    def infer(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return self._run(feeds, None)

    def stages(self, feeds: dict[str, np.ndarray], names: Sequence[str]) -> dict[str, np.ndarray]:
        found: dict[str, torch.Tensor] = {}
        self._run(feeds, found)
        return {name: _array(found[name]) for name in names if name in found}

    def _run(self, feeds: dict[str, np.ndarray], stages: dict[str, torch.Tensor] | None) -> dict[str, np.ndarray]:
        kind = PRECISIONS[self.precision]
        images, sizes = (torch.from_numpy(feeds[name]).to(self.device) for name in ("images", "image_sizes"))
        images = images.contiguous(memory_format=torch.channels_last)
        with torch.inference_mode(), torch.autocast(self.device.type, dtype=kind, enabled=kind is not None):
            outputs = self.model(images, sizes, stages)
        return {name: _array(value) for name, value in outputs.items()}


def _array(value: torch.Tensor) -> np.ndarray:
    """A tensor in NumPy, which has no bfloat16."""
    return (value.float() if value.dtype == torch.bfloat16 else value).cpu().numpy()

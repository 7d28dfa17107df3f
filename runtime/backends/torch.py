"""PyTorch as a backend. The only module of `maskrcnn.runtime` that imports torch."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from maskrcnn.errors import UserError
from maskrcnn.imaging.preprocess import batch_sizes
from maskrcnn.model import cuda_ops
from maskrcnn.model.detector import MaskRCNN
from maskrcnn.model.inference import GraphedModel, inference_copy
from maskrcnn.runtime.backends.base import Backend, TensorSpec, detector_specs
from maskrcnn.runtime.gpu.arrays import is_on_device
from maskrcnn.runtime.gpu.images import paste_by_portions, resizes
from maskrcnn.weights.checkpoint import load_checkpoint, metadata_of

COMPILER = "inductor"  # of `torch.compile`
_PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class TorchBackend(Backend):
    """A model in PyTorch, on the GPU where there is one; any number of threads may call it, one at a time runs.

    Args:
        model: the model. As it is by default, in evaluation mode and channels-last layout; in half precision, compiled
            or captured it is a copy whose norms are folded into its convolutions.
        source: the file it came from, for its hash.
        precision: "fp32", or "bf16" or "fp16", in which convolutions and matrix products then are, weights included;
            coordinates and scores stay in single precision.
        device: "cpu", "cuda", "cuda:1" …, or by default CUDA where available. Calls work there, whatever GPU is the
            thread's current one, which it stays.
        compile: let `torch.compile` make kernels of its own, which takes a minute at the first call, and at the second
            if its images have another size.
        graphs: run each batch and image size as a CUDA graph from its second call on.

    Raises:
        UserError: for an unknown precision, and for graphs without a GPU.
    """

    name = "PyTorch"

    def __init__(
        self,
        model: MaskRCNN,
        *,
        source: Path | None = None,
        precision: str = "fp32",
        device: str | None = None,
        compile: bool = False,
        graphs: bool = False,
    ) -> None:
        if precision not in _PRECISIONS:
            raise UserError(f"precision {precision!r}", " or ".join(_PRECISIONS), "choose one of these")
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        on_gpu = self.takes_gpu_arrays = self.device.type == "cuda"
        if graphs and not on_gpu:
            raise UserError(f"CUDA graphs on {self.device.type}", "a GPU", "leave graphs out, or use device cuda")
        if precision != "fp32" or compile or graphs:
            model = inference_copy(model, _PRECISIONS[precision])
        self.model = model.eval().to(self.device, memory_format=torch.channels_last)
        self.device = next(self.model.parameters()).device  # "cuda" alone is another GPU wherever another is current
        self.metadata = metadata_of(model.config, source)
        self.precision = precision
        self._run = torch.compile(self.model, backend=COMPILER) if compile else self.model
        if graphs:
            self._run = GraphedModel(self._run)
        ways = [way for way, is_used in (("compiled", compile), ("CUDA graphs", graphs)) if is_used]
        self.name = ", ".join(["PyTorch", *ways])
        self._lock = threading.Lock()
        self._kernels = cuda_ops.kernels_for(self.device) if on_gpu else None
        if self._kernels is not None and self.metadata.has_masks:
            self.paste = self._paste

    @classmethod
    def load(cls, path: Path, **options) -> TorchBackend:
        """The backend for a checkpoint."""
        return cls(load_checkpoint(path), source=path, **options)

    def describe(self) -> tuple[dict[str, TensorSpec], dict[str, TensorSpec]]:
        return detector_specs(self.metadata)

    def infer(self, feeds: dict[str, Any]) -> dict[str, Any]:
        """Outputs by name: of NumPy, or, where `images` lies on a GPU, tensors there."""
        with self._lock, torch.inference_mode(), self._on_device():
            outputs = self._run(*self._inputs(feeds))
            return dict(outputs) if is_on_device(feeds["images"]) else _on_host(outputs)

    def infer_timed(self, feeds: dict[str, Any]) -> tuple[dict[str, np.ndarray], dict[str, float]]:
        """Outputs, and on a GPU the milliseconds of `copy in`, `engine` and `copy out` there; elsewhere none."""
        if self.device.type != "cuda":
            return self.infer(feeds), {}
        with self._lock, torch.inference_mode(), self._on_device():
            marks = [torch.cuda.Event(enable_timing=True) for _ in range(4)]
            marks[0].record()
            given = self._inputs(feeds)
            marks[1].record()
            outputs = self._run(*given)
            marks[2].record()
            found = _on_host(outputs)
            marks[3].record()
            marks[3].synchronize()
        parts = ("copy in", "engine", "copy out")
        return found, {part: a.elapsed_time(b) for part, (a, b) in zip(parts, pairwise(marks), strict=True)}

    def run_images(self, images: Sequence[np.ndarray]) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """As `Backend.run_images`; on a GPU the photos are resized and padded there."""
        if self.device.type != "cuda" or not resizes(self.metadata.preprocessing):
            return super().run_images(images)
        sizes, padded_hw = batch_sizes(images, self.metadata.preprocessing)
        image_sizes = np.array(sizes, np.int64)
        with self._lock, torch.inference_mode(), self._on_device():
            batch = self._batch(images, sizes, padded_hw)
            outputs = self._run(batch, _to_device(image_sizes, self.device))
            return _on_host(outputs), image_sizes

    def stages(self, feeds: dict[str, Any], names: Sequence[str]) -> dict[str, np.ndarray]:
        found: dict[str, torch.Tensor] = {}
        with self._lock, torch.inference_mode(), self._on_device():
            self.model(*self._inputs(feeds), found)  # neither a graph nor compiled code shows them
            return _on_host({name: found[name] for name in names if name in found})

    def _on_device(self) -> AbstractContextManager:
        """Within it the model's GPU is the thread's, on which streams, events and Triton's kernels come to be."""
        return torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()

    def _inputs(self, feeds: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        images, sizes = (_to_device(feeds[name], self.device) for name in ("images", "image_sizes"))
        return images.contiguous(memory_format=torch.channels_last), sizes

    def _batch(
        self, images: Sequence[np.ndarray], sizes: Sequence[tuple[int, int]], padded_hw: tuple[int, int]
    ) -> torch.Tensor:
        """Photos resized and padded on the device, as `preprocess.batch_images` does it."""
        swap = self.metadata.preprocessing.channel_order == "BGR"
        batch = torch.zeros(len(images), 3, *padded_hw, device=self.device)
        for slot, image, size in zip(batch, images, sizes, strict=True):
            raw = _to_device(np.ascontiguousarray(image), self.device)
            if self._kernels is not None:
                cuda_ops.resize_pad(self._kernels, raw, slot, size, swap_channels=swap)
                continue
            planes = (raw.flip(2) if swap else raw).permute(2, 0, 1)[None].float()
            resized = F.interpolate(planes, size, mode="bilinear", align_corners=False)
            slot[:, : size[0], : size[1]] = resized[0]
        return batch.contiguous(memory_format=torch.channels_last)

    def _paste(
        self, masks: np.ndarray, boxes_xyxy_px: np.ndarray, size_hw: tuple[int, int], threshold: float
    ) -> np.ndarray:
        def bits_of(masks: np.ndarray, boxes: np.ndarray) -> np.ndarray:
            given = (_to_device(np.ascontiguousarray(each, np.float32), self.device) for each in (masks, boxes))
            bits = cuda_ops.paste_masks(self._kernels, *given, size_hw, threshold=threshold)
            return bits.cpu().numpy().view(np.uint32)

        with self._on_device():
            return paste_by_portions(bits_of, masks, boxes_xyxy_px, size_hw)


def _to_device(value: Any, device: torch.device) -> torch.Tensor:
    """An array of any library as a tensor, without a copy where it lies there already."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if is_on_device(value):
        taken = torch.from_dlpack(value) if hasattr(value, "__dlpack__") else torch.as_tensor(value, device=device)
        return taken.to(device)
    tensor = torch.from_numpy(np.ascontiguousarray(value))
    if device.type != "cuda":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)  # pinned memory is kept until it has been read


def _on_host(values: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """Tensors in NumPy, which has no bfloat16; waits once for all of them."""
    values = {name: value.float() if value.dtype == torch.bfloat16 else value for name, value in values.items()}
    on_gpu = next((value.device for value in values.values() if value.is_cuda), None)
    if on_gpu is None:
        return {name: value.numpy() for name, value in values.items()}
    copied = {name: value.to("cpu", non_blocking=True) for name, value in values.items()}
    torch.cuda.current_stream(on_gpu).synchronize()
    return {name: value.numpy() for name, value in copied.items()}

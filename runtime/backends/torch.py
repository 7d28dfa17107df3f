"""PyTorch backend. The only module of `maskrcnn.runtime` that imports torch."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from maskrcnn.errors import UserError
from maskrcnn.imaging.postprocess import Paste
from maskrcnn.imaging.preprocess import Preprocessing, batch_sizes
from maskrcnn.model import cuda_ops
from maskrcnn.model.detector import MaskRCNN
from maskrcnn.model.inference import GraphedModel, inference_copy, respect_cpu_quota
from maskrcnn.runtime.backends.base import Backend, Specs, detector_specs
from maskrcnn.runtime.gpu.arrays import as_device_array, is_on_device
from maskrcnn.runtime.gpu.images import ImageLoader, MaskPaster, are_bytes, resizes_on_gpu
from maskrcnn.runtime.gpu.memory import Cuda
from maskrcnn.weights.checkpoint import load_checkpoint, metadata_of

COMPILER = "inductor"  # backend of `torch.compile`
_first_process = 0  # first process that loaded a checkpoint
_PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class TorchBackend(Backend):
    """A model in PyTorch, on the GPU if there is one. Any number of threads may call it; calls run one at a time.

    Args:
        model: the model, which is set to evaluation mode and channels-last layout. In half precision, compiled or with
            graphs, the backend uses a copy with norms folded into the convolutions.
        source: file that it was loaded from, for the hash.
        precision: precision of convolutions and matrix products and their weights: "fp32", "bf16" or "fp16".
            Coordinates and scores stay in float32.
        device: "cpu", "cuda", "cuda:1", "mps" … (default: CUDA if available). The calling thread's current GPU is
            preserved.
        compile: use `torch.compile`. Compilation takes a minute at the first call, and at the second if its images
            have another size.
        graphs: run each batch and image size as a CUDA graph from the second call on.

    Raises:
        UserError: for an unknown precision, or for graphs without a GPU.
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
        respect_cpu_quota()
        on_gpu = self.takes_gpu_arrays = self.device.type == "cuda"
        if graphs and not on_gpu:
            raise UserError(f"CUDA graphs on {self.device.type}", "a GPU", "leave graphs out, or use device cuda")
        if precision != "fp32" or compile or graphs:
            model = inference_copy(model, _PRECISIONS[precision])
        self.model = model.eval().to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.device = next(self.model.parameters()).device  # with an index: "cuda" alone means the current GPU
        self.metadata = metadata_of(model.config, source)
        self.precision = precision
        self._run: Callable[..., Any] = torch.compile(self.model, backend=COMPILER) if compile else self.model
        if graphs:
            self._run = GraphedModel(self._run)
        modes = [mode for mode, is_used in (("compiled", compile), ("CUDA graphs", graphs)) if is_used]
        self.name = ", ".join(["PyTorch", *modes])
        self.paste: Paste | None = None
        self._loader: _BatchLoader | None = None
        self._lock = threading.Lock()
        if on_gpu and (kernels := cuda_ops.kernels_for(self.device)) is not None and (cuda := _cuda(self.device)):
            self.paste = MaskPaster(kernels, cuda) if self.metadata.has_masks else None
            self._loader = _BatchLoader(ImageLoader(kernels, cuda, self.metadata.preprocessing), cuda)

    @classmethod
    def load(cls, path: Path, **options: Any) -> TorchBackend:
        """Loads a checkpoint.

        Raises:
            UserError: for a file that is not a checkpoint, or in a process forked from one that loaded a model: PyTorch
                would wait for threads of that process for ever.
        """
        global _first_process
        first = _first_process or os.getpid()
        if first != os.getpid() and torch.get_num_threads() > 1:
            raise UserError(
                f"a checkpoint to load in process {os.getpid()}, forked from process {first}, which loaded one before",
                "a process without a fork since PyTorch started its threads, which do not survive it",
                'start processes with "spawn", load the first model after the fork, or set OMP_NUM_THREADS=1',
            )
        _first_process = first
        return cls(load_checkpoint(path), source=path, **options)

    def describe(self) -> tuple[Specs, Specs]:
        return detector_specs(self.metadata)

    def infer(self, feeds: dict[str, Any]) -> dict[str, Any]:
        """Returns outputs as NumPy arrays, or as tensors on the GPU if `images` is on a GPU."""
        with self._lock, torch.inference_mode(), self._on_device():
            outputs = self._run(*self._inputs(feeds))
            return dict(outputs) if is_on_device(feeds["images"]) else _on_host(outputs)

    def infer_timed(self, feeds: dict[str, np.ndarray]) -> tuple[dict[str, np.ndarray], dict[str, float]]:
        """Returns outputs, and the milliseconds of `copy in`, `engine` and `copy out` (empty on a CPU)."""
        if self.device.type != "cuda":
            return self.infer(feeds), {}
        with self._lock, torch.inference_mode(), self._on_device():
            marks = [torch.cuda.Event(enable_timing=True) for _ in range(4)]  # type: ignore[no-untyped-call]
            marks[0].record()
            inputs = self._inputs(feeds)
            marks[1].record()
            outputs = self._run(*inputs)
            marks[2].record()
            found = _on_host(outputs)
            marks[3].record()
            marks[3].synchronize()
        parts = ("copy in", "engine", "copy out")
        return found, {part: a.elapsed_time(b) for part, (a, b) in zip(parts, pairwise(marks), strict=True)}

    def run_images(self, images: Sequence[np.ndarray]) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """Does the same as `Backend.run_images`; resizes and pads on the GPU if the model is there."""
        preprocessing = self.metadata.preprocessing
        if self.device.type != "cuda" or not resizes_on_gpu(preprocessing):
            return super().run_images(images)
        sizes, padded_hw = batch_sizes(images, preprocessing)
        image_sizes = np.array(sizes, np.int64)
        with self._lock, torch.inference_mode(), self._on_device():
            if self._loader is not None and are_bytes(images):
                batch = self._loader.load(images, sizes, padded_hw, self.device)
            else:
                batch = resize_batch(images, sizes, padded_hw, preprocessing, self.device)
            outputs = self._run(
                batch.contiguous(memory_format=torch.channels_last), _to_device(image_sizes, self.device)
            )
            return _on_host(outputs), image_sizes

    def stages(self, feeds: dict[str, Any], names: Sequence[str]) -> dict[str, np.ndarray]:
        found: dict[str, torch.Tensor] = {}
        with self._lock, torch.inference_mode(), self._on_device():
            self.model(*self._inputs(feeds), found)  # CUDA graphs and compiled code do not return stages
            return _on_host({name: found[name] for name in names if name in found})

    def _on_device(self) -> AbstractContextManager[Any]:
        """Makes the model's GPU current: streams, events and Triton kernels are created on the current GPU."""
        return torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()

    def _inputs(self, feeds: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        images, sizes = (_to_device(feeds[name], self.device) for name in ("images", "image_sizes"))
        return images.contiguous(memory_format=torch.channels_last), sizes


class _BatchLoader:
    """`ImageLoader` on its own stream, synchronised with PyTorch's current stream."""

    def __init__(self, loader: ImageLoader, cuda: Cuda) -> None:
        self._loader, self._cuda, self._stream = loader, cuda, cuda.stream()

    def load(
        self,
        images: Sequence[np.ndarray],
        sizes: Sequence[tuple[int, int]],
        padded_hw: tuple[int, int],
        device: torch.device,
    ) -> torch.Tensor:
        batch = torch.empty(len(images), 3, *padded_hw, device=device)
        self._loader.fill(images, sizes, as_device_array(batch, self._cuda, self._stream))
        self._stream.hold_up_stream(torch.cuda.current_stream(device).cuda_stream)
        return batch


def _cuda(device: torch.device) -> Cuda | None:
    """Returns the GPU, or None without cuda-bindings."""
    try:
        return Cuda(device.index)
    except UserError:
        return None


def resize_batch(
    images: Sequence[np.ndarray],
    sizes: Sequence[tuple[int, int]],
    padded_hw: tuple[int, int],
    preprocessing: Preprocessing,
    device: torch.device,
) -> torch.Tensor:
    """Resizes and pads images in PyTorch, as `preprocess.batch_images` does.

    Args:
        images: `[H, W, 3]` RGB, uint8 or float32.
        sizes: height and width of each after resizing.
        padded_hw: height and width of the batch.
        preprocessing: preprocessing of the model, for which `resizes_on_gpu` is true.
        device: device that resizes them.

    Returns:
        float32 `[N, 3, H, W]` on the device.
    """
    batch = torch.zeros(len(images), 3, *padded_hw, device=device)
    for slot, image, size in zip(batch, images, sizes, strict=True):
        raw = _to_device(image, device)
        channels = raw.flip(2) if preprocessing.channel_order == "BGR" else raw
        planes = channels.permute(2, 0, 1)[None].float()
        slot[:, : size[0], : size[1]] = F.interpolate(planes, size, mode="bilinear", align_corners=False)[0]
    return batch


def _to_device(value: Any, device: torch.device) -> torch.Tensor:
    """Converts an array of any library to a tensor, without a copy if it is on the device."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if is_on_device(value):
        if hasattr(value, "__dlpack__"):
            return torch.from_dlpack(value).to(device)
        return torch.as_tensor(value, device=device)
    tensor = torch.from_numpy(np.ascontiguousarray(value))
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)  # PyTorch keeps pinned memory until it has been read


def _on_host(values: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """Converts tensors to NumPy arrays, bfloat16 to float32; synchronises once for all of them."""
    values = {name: value.float() if value.dtype == torch.bfloat16 else value for name, value in values.items()}
    on_gpu = next((value.device for value in values.values() if value.is_cuda), None)
    if on_gpu is None:
        return {name: value.cpu().numpy() for name, value in values.items()}
    copied = {name: value.to("cpu", non_blocking=True) for name, value in values.items()}
    torch.cuda.current_stream(on_gpu).synchronize()
    return {name: value.numpy() for name, value in copied.items()}

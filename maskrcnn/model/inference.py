"""Model for inference: folded batch norm, half precision by a fixed rule, CUDA graphs.

The rule is the same as for exported graphs (`maskrcnn.export.passes.precision`): convolutions and matrix products, and
operations that only pass on their results, run in half precision; pixels, anchors, box coordinates, scores and NMS in
single precision. Here this is implemented by modules with half-precision weights, and a cast of their input features.
"""

from __future__ import annotations

import copy
import os
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from maskrcnn.machine import available_cpus, is_quota_bound
from maskrcnn.model.backbone import FoldedBatchNorm2d, FoldedConv2d, conv_norm_pairs
from maskrcnn.model.detector import MaskRCNN


def respect_cpu_quota() -> None:
    """Limits PyTorch's threads to the CPU quota; without OMP_NUM_THREADS, PyTorch respects only the affinity."""
    if is_quota_bound() and "OMP_NUM_THREADS" not in os.environ and torch.get_num_threads() > available_cpus():
        torch.set_num_threads(available_cpus())


def inference_copy(model: MaskRCNN, dtype: torch.dtype = torch.float32) -> MaskRCNN:
    """Faster copy of a model in evaluation mode, with the same results; it cannot be trained or saved.

    Args:
        model: left unchanged.
        dtype: type of convolutions and matrix products; the types of inputs and outputs do not change.
    """
    copied = copy.deepcopy(model).eval().requires_grad_(False)
    _fold_all_norms(copied)
    if dtype != torch.float32:
        # The modules with convolutions and matrix products; they map features to features or logits.
        for module in (copied.backbone, copied.rpn.head, *copied.roi_heads.children()):
            _lower(module, dtype)
    return copied


def _fold_all_norms(model: nn.Module) -> None:
    """Fold every batch norm into the convolution before it, in single precision, in evaluation mode."""
    with torch.no_grad():
        for module in list(model.modules()):
            if isinstance(module, FoldedConv2d):
                _unfreeze(module)
            for convolution, norm in conv_norm_pairs(module):
                if type(getattr(module, norm)) is nn.BatchNorm2d:
                    fused = fuse_conv_bn_eval(getattr(module, convolution), getattr(module, norm))
                    setattr(module, convolution, fused)
                    setattr(module, norm, nn.Identity())


def _unfreeze(module: FoldedConv2d) -> None:
    """Turn a `FoldedConv2d`, which multiplies its norm into the weights at each call, into an ordinary convolution."""
    scale, shift = module.norm.constants()
    if module.bias is not None:
        shift = shift + module.bias * scale
    module.weight = nn.Parameter(module.weight * scale[:, None, None, None], requires_grad=False)
    module.bias = nn.Parameter(shift, requires_grad=False)
    del module.__dict__["norm"]
    # The norm after it, FoldedBatchNorm2d, is an identity.
    module.__class__ = nn.Conv2d  # type: ignore[assignment]


def _lower(module: nn.Module, dtype: torch.dtype) -> None:
    """Convert the weights of a module to half precision and cast its inputs."""
    module.to(dtype)
    for norm in module.modules():
        if isinstance(norm, (nn.BatchNorm2d, FoldedBatchNorm2d)):
            norm.float()  # statistics may exceed the range of half precision; inputs may have any type
    module.register_forward_pre_hook(lambda module, arguments: _cast(arguments, dtype))


def _cast(value: Any, dtype: torch.dtype) -> Any:
    """Convert the floating-point tensors of a nested value."""
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, (list, tuple)):
        return type(value)(_cast(each, dtype) for each in value)
    return value


_Outputs = dict[str, Tensor]
_Run = Callable[[Tensor, Tensor], _Outputs]
_WARM_UPS = 2  # calls before the capture, in which libraries select their kernels


class GraphedModel:
    """Runs a model as CUDA graphs, one per input shape, captured at the second call with that shape.

    This is possible because the model never synchronises and no shape depends on a value. It is faster if launching
    several thousand kernels takes longer than running them: small batches, half precision. May be called on any stream,
    also on different ones, if calls do not overlap.

    Args:
        run: the model, possibly compiled by `torch.compile`; its tensors are on one GPU.
        shapes: maximum number of graphs; the least recently used one is discarded.
    """

    def __init__(self, run: _Run, *, shapes: int = 8) -> None:
        self.run, self.shapes = run, shapes
        self._calls: OrderedDict[tuple, _Run | None] = OrderedDict()  # by shape, most recent last; None: called once
        self._pool: Any = None  # shared memory pool: one graph runs at a time and its results are copied
        # The stream of all captures: graphs captured on different streams do not share memory.
        self._side: torch.cuda.Stream | None = None
        self._done: torch.cuda.Event | None = None  # last use of the graphs' memory on any stream

    def __call__(self, images: Tensor, image_sizes: Tensor) -> _Outputs:
        """Outputs in newly allocated memory.

        Args:
            images: `[N, 3, H, W]` on the GPU.
            image_sizes: `[N, 2]` on the GPU.
        """
        key = tuple(images.shape), images.dtype
        if key not in self._calls:
            self._evict()
            self._calls[key] = None
            return self.run(images, image_sizes)
        self._calls.move_to_end(key)
        with self._in_turn(images.device):
            replay = self._calls[key]
            if replay is None:
                replay = self._calls[key] = self._capture(images, image_sizes)
            return {name: value.clone() for name, value in replay(images, image_sizes).items()}

    @property
    def captured(self) -> int:
        """Number of shapes that have a graph."""
        return sum(replay is not None for replay in self._calls.values())

    def _evict(self) -> None:
        while len(self._calls) >= self.shapes:
            if self._done is not None:
                self._done.synchronize()  # the graph may be running; discarding it frees its inputs
            self._calls.popitem(last=False)

    @contextmanager
    def _in_turn(self, device: torch.device) -> Iterator[None]:
        """Order work launched in this context after work launched in earlier contexts, on any stream."""
        stream = torch.cuda.current_stream(device)
        if self._done is None:
            self._done = torch.cuda.Event()
        else:
            stream.wait_event(self._done)
        try:
            yield
        finally:
            self._done.record(stream)

    def _capture(self, images: Tensor, image_sizes: Tensor) -> _Run:
        """Capture a graph; returns a function that copies its arguments to the graph's inputs and replays it."""
        given = images.clone(memory_format=torch.preserve_format), image_sizes.clone()
        self._side = self._side or torch.cuda.Stream(images.device)
        self._side.wait_stream(torch.cuda.current_stream(images.device))
        with torch.cuda.stream(self._side):
            for _ in range(_WARM_UPS):
                self.run(*given)
        torch.cuda.current_stream(images.device).wait_stream(self._side)
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        # The default capture stream is on the GPU of the process's first capture. Other threads may allocate memory.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._side, capture_error_mode="thread_local"):
            outputs = self.run(*given)

        def replay(images: Tensor, image_sizes: Tensor) -> _Outputs:
            given[0].copy_(images)
            given[1].copy_(image_sizes)
            graph.replay()
            return outputs

        return replay

"""A model as it is run, not trained: norms inside their convolutions, and weights in half precision by a rule.

The rule is that of exported graphs (`maskrcnn.export.passes.precision`): convolutions and matrix products are in half
precision, with what only passes their results on; pixels, anchors, box coordinates, scores and NMS stay in single
precision. Here that is a matter of which modules have half-precision weights, and of a cast where features enter them.
"""

from __future__ import annotations

import copy
import itertools
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from maskrcnn.model.backbone import Body, FoldedBatchNorm2d, FoldedConv2d
from maskrcnn.model.detector import MaskRCNN


def inference_copy(model: MaskRCNN, dtype: torch.dtype = torch.float32) -> MaskRCNN:
    """A copy in evaluation mode that computes the same faster; it cannot be trained or saved.

    Args:
        model: stays as it is.
        dtype: of convolutions and matrix products; inputs and outputs are in the types that they always have.
    """
    made = copy.deepcopy(model).eval().requires_grad_(False)
    _fold_all_norms(made)
    if dtype != torch.float32:
        for module in _computing(made):
            _lower(module, dtype)
    return made


def _fold_all_norms(model: nn.Module) -> None:
    """Puts every batch norm that follows a convolution into it, in single precision, in evaluation mode."""
    with torch.no_grad():
        for module in list(model.modules()):
            if isinstance(module, FoldedConv2d):
                _unfreeze(module)
            for convolution, norm in _pairs(module):
                fused = fuse_conv_bn_eval(getattr(module, convolution), getattr(module, norm))
                setattr(module, convolution, fused)
                setattr(module, norm, nn.Identity())


def _unfreeze(module: FoldedConv2d) -> None:
    """Makes a convolution that multiplies the constants of its norm into its weights each time an ordinary one."""
    scale, shift = module.norm.constants()
    if module.bias is not None:
        shift = shift + module.bias * scale
    module.weight = nn.Parameter(module.weight * scale[:, None, None, None], requires_grad=False)
    module.bias = nn.Parameter(shift, requires_grad=False)
    del module.__dict__["norm"]
    module.__class__ = nn.Conv2d  # the norm itself, FoldedBatchNorm2d, passes on what it gets


def _pairs(module: nn.Module) -> Iterator[tuple[str, str]]:
    """Names of a module's convolutions with those of the batch norms after them.

    A ResNet names conv1 and bn1 alike; where layers run one after another, the two follow each other.
    """
    children = dict(module.named_children())
    named = [(name, f"bn{name[4:]}") for name in children if name.startswith("conv")]
    following = list(itertools.pairwise(children)) if isinstance(module, (nn.Sequential, Body)) else []
    for convolution, norm in dict.fromkeys((*named, *following)):
        if type(children[convolution]) is nn.Conv2d and type(children.get(norm)) is nn.BatchNorm2d:
            yield convolution, norm


def _computing(model: MaskRCNN) -> list[nn.Module]:
    """The modules with convolutions and matrix products, each of which gets features and gives features or logits."""
    return [model.backbone, model.rpn.head, *model.roi_heads.children()]


def _lower(module: nn.Module, dtype: torch.dtype) -> None:
    module.to(dtype)
    for norm in module.modules():
        if isinstance(norm, (nn.BatchNorm2d, FoldedBatchNorm2d)):
            norm.float()  # statistics may lie beyond half precision's range, and it takes features of any type
    module.register_forward_pre_hook(lambda module, arguments: _cast(arguments, dtype))


def _cast(value, dtype: torch.dtype):
    """Floating-point tensors of a nested value in another type."""
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, (list, tuple)):
        return type(value)(_cast(each, dtype) for each in value)
    return value


# A model on a GPU as CUDA graphs, one for each input shape: the whole model is started at once.
#
# That is possible because nothing in the model waits for the GPU and no shape depends on a value. It pays where
# starting some thousand kernels takes the host longer than running them takes the GPU: small batches, half precision.

_Outputs = dict[str, Tensor]
_Run = Callable[[Tensor, Tensor], _Outputs]
_WARM_UPS = 2  # runs on a side stream before the capture, in which libraries choose their kernels


class GraphedModel:
    """A function of images and their sizes, captured at the second call with a shape.

    It may be called on any stream, also on several, as long as one call follows the other.

    Args:
        run: the model, or what `torch.compile` made of it; its tensors are on one GPU.
        shapes: how many graphs to keep; the one not used for longest goes.
    """

    def __init__(self, run: _Run, *, shapes: int = 8) -> None:
        self.run, self.shapes = run, shapes
        self._calls: OrderedDict[tuple, _Run | None] = OrderedDict()  # by shape, the newest last; None: seen once
        self._pool: tuple | None = None  # memory that the graphs share, as only one runs and its results are copied
        self._side: torch.cuda.Stream | None = None  # where all are captured; on others they would not share memory
        self._done: torch.cuda.Event | None = None  # behind the newest use of the graphs' memory, on whatever stream

    def __call__(self, images: Tensor, image_sizes: Tensor) -> _Outputs:
        """The outputs, in memory of their own.

        Args:
            images: `[N, 3, H, W]` on the GPU.
            image_sizes: `[N, 2]` on the GPU.
        """
        key = tuple(images.shape), images.dtype
        if key not in self._calls:
            self._make_room()
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
        """How many shapes have a graph."""
        return sum(replay is not None for replay in self._calls.values())

    def _make_room(self) -> None:
        while len(self._calls) >= self.shapes:
            if self._done is not None:
                self._done.synchronize()  # it may be running, and its inputs are freed with it
            self._calls.popitem(last=False)

    @contextmanager
    def _in_turn(self, device: torch.device) -> Iterator[None]:
        """What is started within begins after what was started in here before, though it be on another stream."""
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
        """What copies its arguments to where the graph reads them, and starts it."""
        given = images.clone(memory_format=torch.preserve_format), image_sizes.clone()
        self._side = self._side or torch.cuda.Stream(images.device)
        self._side.wait_stream(torch.cuda.current_stream(images.device))
        with torch.cuda.stream(self._side):
            for _ in range(_WARM_UPS):
                self.run(*given)
        torch.cuda.current_stream(images.device).wait_stream(self._side)
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        # PyTorch's own stream for it is on whatever GPU was the first to capture. Other threads may allocate meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._side, capture_error_mode="thread_local"):
            found = self.run(*given)

        def replay(images: Tensor, image_sizes: Tensor) -> _Outputs:
            given[0].copy_(images)
            given[1].copy_(image_sizes)
            graph.replay()
            return found

        return replay

"""Backbones (torchvision's classifiers, maps C2 … C5) and necks (maps P2 … P6 of equal width).

Tensors are named as in torchvision's detectors, `backbone.body.…` and `backbone.fpn.…`, for every backbone and neck:
the layers of a classifier keep their names, without the `features.` prefix of classifiers other than ResNets. Maps have
torchvision's names: "0" … "3" are C2 … C5 and P2 … P5, "pool" is P6.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.convnext import LayerNorm2d
from torchvision.models.resnet import Bottleneck, ResNet
from torchvision.models.vgg import cfgs, make_layers
from torchvision.ops import Conv2dNormActivation, FeaturePyramidNetwork, FrozenBatchNorm2d
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from maskrcnn.config import ModelConfig

_Norm = Callable[[int], nn.Module] | None
_FUSION_EPSILON = 1e-4  # Tan et al. 2020, section 3.3


def make_neck(kind: str, in_channels: Sequence[int], channels: int, *, norm: _Norm, repeats: int) -> nn.Module:
    """Create a neck with random weights.

    Args:
        kind: one of `maskrcnn.config.NECKS`.
        in_channels: channels of C2 … C5.
        channels: channels of P2 … P6.
        norm: constructor of the norm after the convolutions of "fpn" and "panet", given the channels (None: no norm).
        repeats: passes of "bifpn", whose convolutions always have batch norm.
    """
    if kind == "bifpn":
        return BiFpn(in_channels, channels, repeats)
    if kind == "panet":
        return PathAggregation(in_channels, channels, norm)
    return FeaturePyramidNetwork(list(in_channels), channels, extra_blocks=LastLevelMaxPool(), norm_layer=norm)


class PathAggregation(FeaturePyramidNetwork):
    """FPN with a second, bottom-up path.

    N2 is P2. N(i+1) is a convolution of P(i+1) plus a stride-2 convolution of Ni, both 3 × 3 and followed by ReLU. P6
    is N5 subsampled by 2, as in FPN.

    Source: Liu et al. 2018, "Path Aggregation Network for Instance Segmentation", section 3.1.
    """

    def __init__(self, in_channels: Sequence[int], channels: int, norm: _Norm) -> None:
        super().__init__(list(in_channels), channels, norm_layer=norm)
        blocks = {"in_channels": channels, "out_channels": channels, "kernel_size": 3, "norm_layer": norm}
        steps = range(len(in_channels) - 1)
        self.down_blocks = nn.ModuleList(Conv2dNormActivation(**blocks, stride=2) for _ in steps)
        self.fuse_blocks = nn.ModuleList(Conv2dNormActivation(**blocks) for _ in steps)
        for block in (*self.down_blocks, *self.fuse_blocks):  # as torchvision initialises FPN
            for module in block.modules():
                if isinstance(module, nn.Conv2d):
                    nn.init.kaiming_uniform_(module.weight, a=1)
                    if module.bias is not None:
                        nn.init.zeros_(module.bias)

    def forward(self, x: dict[str, Tensor]) -> dict[str, Tensor]:
        """P2 … P6 from C2 … C5."""
        pyramid = super().forward(x)
        path = list(pyramid.values())[:1]
        for feature, down, fuse in zip(list(pyramid.values())[1:], self.down_blocks, self.fuse_blocks, strict=True):
            path.append(fuse(feature + down(path[-1])))
        return _named(pyramid, path, F.max_pool2d(path[-1], kernel_size=1, stride=2))


class BiFpn(nn.Module):
    """Bidirectional passes over P2 … P6 that fuse maps with learnt weights.

    1 × 1 convolutions give C2 … C5 equal width; P6 is another convolution of C5, max-pooled 3 × 3 with stride 2.

    Source: Tan et al. 2020, "EfficientDet: Scalable and Efficient Object Detection", section 3 (there P3 … P7); the
    convolution before P6 follows its published code.
    """

    def __init__(self, in_channels: Sequence[int], channels: int, repeats: int) -> None:
        super().__init__()
        widths = [*in_channels, in_channels[-1]]
        self.lateral_blocks = nn.ModuleList(
            Conv2dNormActivation(width, channels, kernel_size=1, activation_layer=None) for width in widths
        )
        self.passes = nn.ModuleList(BiFpnPass(channels, len(widths)) for _ in range(repeats))

    def forward(self, x: dict[str, Tensor]) -> dict[str, Tensor]:
        """P2 … P6 from C2 … C5."""
        *finer, last = self.lateral_blocks
        maps = [block(feature) for block, feature in zip(finer, x.values(), strict=True)]
        maps.append(_halved(last(list(x.values())[-1])))
        for each in self.passes:
            maps = each(maps)
        return _named(x, maps[:-1], maps[-1])


class BiFpnPass(nn.Module):
    """One top-down and one bottom-up pass (figure 2 d of the paper)."""

    def __init__(self, channels: int, levels: int) -> None:
        super().__init__()
        self.down_blocks = nn.ModuleList(Fusion(channels, 2) for _ in range(levels - 1))
        # Bottom-up, every level but the coarsest has three inputs.
        self.up_blocks = nn.ModuleList(Fusion(channels, 3 if k < levels - 1 else 2) for k in range(1, levels))

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        """Maps of the same shapes, finest first."""
        down = [maps[-1]]
        for block, feature in zip(self.down_blocks, reversed(maps[:-1]), strict=True):
            down.insert(0, block([feature, F.interpolate(down[0], size=feature.shape[-2:], mode="nearest")]))
        up = down[:1]
        for block, feature, between in zip(self.up_blocks, maps[1:], down[1:], strict=True):
            own = [feature] if between is feature else [feature, between]
            up.append(block([*own, _halved(up[-1])]))
        return up


class Fusion(nn.Module):
    """Fast normalised fusion: weighted sum with non-negative weights that sum to about 1, then a convolution.

    Swish, a separable convolution (3 × 3, then 1 × 1) and batch norm.

    Source: Tan et al. 2020, section 3.3.
    """

    def __init__(self, channels: int, inputs: int) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.ones(inputs))
        self.convolution = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False),
            nn.Conv2d(channels, channels, 1, bias=False),
            nn.BatchNorm2d(channels),
        )

    def forward(self, maps: list[Tensor]) -> Tensor:
        """Fuse maps of one shape into one."""
        weights = F.relu(self.weights)
        shares = (weights / (weights.sum() + _FUSION_EPSILON)).to(maps[0].dtype).unbind()
        merged = maps[0] * shares[0]
        for share, other in zip(shares[1:], maps[1:], strict=True):
            merged = merged + other * share
        return self.convolution(F.silu(merged))


def _halved(feature: Tensor) -> Tensor:
    """Max pool to half the height and width, rounded up, so that P6 of an odd map includes the extra row."""
    return F.max_pool2d(feature, kernel_size=3, stride=2, padding=1)


def _named(like: dict[str, Tensor], maps: list[Tensor], last: Tensor) -> dict[str, Tensor]:
    return OrderedDict([*zip(like, maps, strict=True), ("pool", last)])


class FoldedBatchNorm2d(FrozenBatchNorm2d):
    """Frozen batch norm computed by the preceding `FoldedConv2d`; names and values are torchvision's.

    A frozen norm is a constant scale and shift per channel. As a separate operation, it reads and writes every feature
    map again, and under autocast converts it to float32; folded into the convolution's weights, it costs nothing.
    """

    def constants(self) -> tuple[Tensor, Tensor]:
        """Scale and shift of each channel, `[C]`."""
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        return scale, self.bias - self.running_mean * scale

    def forward(self, x: Tensor) -> Tensor:
        """Identity; during export the norm itself, which keeps the graph readable and is folded by runtimes."""
        return super().forward(x) if torch.compiler.is_exporting() else x


class FoldedConv2d(nn.Conv2d):
    """Convolution that also applies the norm after it."""

    norm: FoldedBatchNorm2d

    def forward(self, x: Tensor) -> Tensor:
        """Convolution followed by the norm."""
        if torch.compiler.is_exporting():
            return super().forward(x)
        scale, shift = self.norm.constants()
        if self.bias is not None:  # VGG's
            shift = shift + self.bias * scale
        weight = self.weight * scale[:, None, None, None]
        return F.conv2d(x, weight, shift, self.stride, self.padding, self.dilation, self.groups)


def fold_norms(body: nn.Module) -> nn.Module:
    """Turn every convolution before a `FoldedBatchNorm2d` into a `FoldedConv2d`, in place; returns the body."""
    for module in list(body.modules()):
        for convolution, norm in conv_norm_pairs(module):
            if isinstance(getattr(module, norm), FoldedBatchNorm2d):
                folded = getattr(module, convolution)
                folded.__class__ = FoldedConv2d
                # Bypasses registration as a submodule: the norm already is a submodule of the body.
                object.__setattr__(folded, "norm", getattr(module, norm))
    return body


def conv_norm_pairs(module: nn.Module) -> Iterator[tuple[str, str]]:
    """Names of a module's convolutions and of the batch norms after them.

    In ResNet blocks they are named conv1 and bn1; in a sequence of layers they are adjacent.
    """
    children = dict(module.named_children())
    named = [(name, f"bn{name[4:]}") for name in children if name.startswith("conv")]
    adjacent = itertools.pairwise(children) if isinstance(module, (nn.Sequential, Body)) else ()
    for convolution, norm in dict.fromkeys((*named, *adjacent)):
        if isinstance(children[convolution], nn.Conv2d) and norm in children:
            yield convolution, norm


@dataclass(frozen=True)
class Layout:
    """Layers of a classifier that produce the maps."""

    stages: tuple[tuple[str, ...], ...]  # layers of the five stages; the last layers of stages 2 to 5 give C2 … C5
    channels: tuple[int, ...]  # channels of C2 … C5


def _numbered(ends: Sequence[int]) -> tuple[tuple[str, ...], ...]:
    """Stages of numbered layers, given the last layer of each."""
    starts = [0, *(end + 1 for end in ends[:-1])]
    return tuple(tuple(map(str, range(start, end + 1))) for start, end in zip(starts, ends, strict=True))


RESNET_STAGES = (("conv1", "bn1"), ("layer1",), ("layer2",), ("layer3",), ("layer4",))
# Maps: VGG's after pooling (torchvision has no such detector); MobileNet's last map of each stride; ConvNeXt's stages
# begin with the downsampling convolution.
_LAYOUTS = {
    "vgg16": Layout(_numbered((4, 9, 16, 23, 30)), (128, 256, 512, 512)),
    "vgg16_bn": Layout(_numbered((6, 13, 23, 33, 43)), (128, 256, 512, 512)),
    "mobilenet_v3_large": Layout(_numbered((1, 3, 6, 12, 16)), (24, 40, 112, 960)),
    "convnext_tiny": Layout(_numbered((0, 1, 3, 5, 7)), (96, 192, 384, 768)),
}


class Backbone(nn.Module):
    """Classifier without its head, followed by a neck."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        body, layout = _body(config)
        if config.channels != 3:
            _take_channels(body, config.channels)
        self.stages = layout.stages
        self.body = Body(body, layout)
        if config.backbone.startswith("convnext"):
            # Its residual stream is not normalised; detectors add a norm after each map (Liu et al. 2022).
            self.norms = nn.ModuleList(LayerNorm2d(width, eps=1e-6) for width in layout.channels)
        self.fpn = make_neck(
            config.neck,
            layout.channels,
            config.fpn_channels,
            norm=nn.BatchNorm2d if config.head_batch_norm else None,
            repeats=config.bifpn_repeats,
        )
        self.out_channels = config.fpn_channels  # read by torchvision's detectors

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """P2 … P6 under torchvision's names, from normalised images `[N, C, H, W]`."""
        maps = self.body(images)
        if hasattr(self, "norms"):
            maps = OrderedDict((k, norm(x)) for (k, x), norm in zip(maps.items(), self.norms, strict=True))
        return self.fpn(maps)


class Body(nn.ModuleDict):
    """Layers of a classifier up to C5.

    Args:
        classifier: runs its layers in sequence.
        layout: its stages.
    """

    def __init__(self, classifier: nn.Module, layout: Layout) -> None:
        ends = [stage[-1] for stage in layout.stages[1:]]
        names = [name for name, _ in classifier.named_children()]
        kept = names[: names.index(ends[-1]) + 1]
        super().__init__({name: layer for name, layer in classifier.named_children() if name in kept})
        self.names = {end: str(k) for k, end in enumerate(ends)}  # torchvision's names of the maps

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """C2 … C5 under the names "0" … "3"."""
        maps = OrderedDict()
        for name, layer in self.items():
            x = layer(x)
            if name in self.names:
                maps[self.names[name]] = x
        return maps


def _body(config: ModelConfig) -> tuple[nn.Module, Layout]:
    """Layers of a backbone with random weights, with frozen norms if configured."""
    name = config.backbone
    kind = FoldedBatchNorm2d if config.frozen_batch_norm else nn.BatchNorm2d
    norm = partial(kind, eps=config.batch_norm_epsilon)
    if name.startswith("vgg"):
        body = _vgg(norm if name.endswith("_bn") else None)
    elif name.startswith("convnext"):
        # With stochastic depth, a sample would depend on more than seed, epoch and image.
        body = torchvision.models.get_model(name, weights=None, stochastic_depth_prob=0.0).features
    elif name.startswith("mobilenet"):
        body = torchvision.models.get_model(name, weights=None, norm_layer=norm).features
    else:
        body = torchvision.models.get_model(name, weights=None, norm_layer=norm)
        if config.stride_in_1x1:
            _stride_first(body)
        first = body.inplanes // 8  # channels of C2; they double at each stage
        return fold_norms(body), Layout(RESNET_STAGES, tuple(first * 2**stage for stage in range(4)))
    return fold_norms(body), _LAYOUTS[name]


def _take_channels(body: nn.Module, channels: int) -> None:
    """Give the first convolution another number of input channels, with random weights of the same variance."""
    first = next(module for module in body.modules() if isinstance(module, nn.Conv2d))
    shape = (first.out_channels, channels, *first.kernel_size)
    weight = torch.empty(shape).normal_(0, float(first.weight.detach().std()))
    first.in_channels, first.weight = channels, nn.Parameter(weight)


def inflated(weight: Tensor, channels: int) -> Tensor:
    """RGB weights of the first convolution `[O, 3, k, k]` for another number of input channels.

    More channels: the weights of R, G and B and their mean for each further channel; fewer: their mean for each. All
    are scaled by 3 / channels, so that an image with equal channels has the same response as a grey RGB image.
    """
    mean = weight.mean(dim=1, keepdim=True)
    kept = weight if channels > 3 else weight[:, :0]
    return torch.cat([kept, mean.expand(-1, channels - kept.shape[1], -1, -1)], dim=1) * (3 / channels)


def _vgg(norm: Callable[[int], nn.Module] | None) -> nn.Sequential:
    """Convolutions of VGG-16, initialised as in torchvision, without building the classifier (nine times as large)."""
    layers = make_layers(cfgs["D"], batch_norm=norm is not None)
    for index, layer in enumerate(layers):
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            assert layer.bias is not None
            nn.init.zeros_(layer.bias)
        elif isinstance(layer, nn.BatchNorm2d) and norm is not None:
            layers[index] = norm(layer.num_features)
    return layers


def _stride_first(body: ResNet) -> None:
    """Move the stride of bottlenecks from the second to the first convolution, as in He et al. 2015."""
    for block in body.modules():
        if isinstance(block, Bottleneck):  # basic blocks stride in their first convolution anyway
            block.conv1.stride, block.conv2.stride = block.conv2.stride, block.conv1.stride

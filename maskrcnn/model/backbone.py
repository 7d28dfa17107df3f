"""Torchvision's classifiers as backbones: their maps C2 … C5, and a neck that makes P2 … P6 of them.

Tensors are named as in torchvision's detectors, `backbone.body.…` and `backbone.fpn.…`, whatever backbone and neck:
a classifier's layers keep the names that they have in it, less the `features.` of those that are not ResNets.
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

# What makes the maps P2 … P6, all of one width, of a backbone's C2 … C5.
#
# Each neck takes and gives maps by name, as torchvision's detectors have them: "0" … "3" are C2 … C5 and become P2 …
# P5, "pool" is P6.

_Norm = Callable[[int], nn.Module] | None
_FUSION_EPSILON = 1e-4  # Tan et al. 2020, section 3.3


def make_neck(kind: str, in_channels: Sequence[int], channels: int, *, norm: _Norm, repeats: int) -> nn.Module:
    """A neck with random weights.

    Args:
        kind: one of `maskrcnn.config.NECKS`.
        in_channels: of C2 … C5.
        channels: of P2 … P6.
        norm: after the convolutions of "fpn" and "panet", with a number of channels; None for none.
        repeats: of "bifpn", whose convolutions always have batch norm.
    """
    if kind == "bifpn":
        return BiFpn(in_channels, channels, repeats)
    if kind == "panet":
        return PathAggregation(in_channels, channels, norm)
    return FeaturePyramidNetwork(list(in_channels), channels, extra_blocks=LastLevelMaxPool(), norm_layer=norm)


class PathAggregation(FeaturePyramidNetwork):
    """FPN with a second path from the finest map to the coarsest.

    N2 is P2. Then N(i+1) is a convolution of P(i+1) plus a convolution of Ni with stride 2, each 3 × 3 and followed by
    ReLU. P6 is every other pixel of N5, as in FPN.

    Source: Liu et al. 2018, "Path Aggregation Network for Instance Segmentation", section 3.1.
    """

    def __init__(self, in_channels: Sequence[int], channels: int, norm: _Norm) -> None:
        super().__init__(list(in_channels), channels, norm_layer=norm)
        blocks = {"in_channels": channels, "out_channels": channels, "kernel_size": 3, "norm_layer": norm}
        steps = range(len(in_channels) - 1)
        self.down_blocks = nn.ModuleList(Conv2dNormActivation(**blocks, stride=2) for _ in steps)
        self.fuse_blocks = nn.ModuleList(Conv2dNormActivation(**blocks) for _ in steps)
        for block in (*self.down_blocks, *self.fuse_blocks):
            _initialise(block)

    def forward(self, x: dict[str, Tensor]) -> dict[str, Tensor]:
        """P2 … P6 of C2 … C5."""
        pyramid = super().forward(x)
        path = list(pyramid.values())[:1]
        for feature, down, fuse in zip(list(pyramid.values())[1:], self.down_blocks, self.fuse_blocks, strict=True):
            path.append(fuse(feature + down(path[-1])))
        return _named(pyramid, path, F.max_pool2d(path[-1], kernel_size=1, stride=2))


class BiFpn(nn.Module):
    """Passes down and up over P2 … P6, which merge maps with learnt weights.

    C2 … C5 get one width by a 1 × 1 convolution, and so does C5 for P6, which is pooled 3 × 3 with stride 2.

    Source: Tan et al. 2020, "EfficientDet: Scalable and Efficient Object Detection", section 3, where the levels are
    P3 … P7; its published code adds the convolution before P6.
    """

    def __init__(self, in_channels: Sequence[int], channels: int, repeats: int) -> None:
        super().__init__()
        widths = [*in_channels, in_channels[-1]]
        self.lateral_blocks = nn.ModuleList(
            Conv2dNormActivation(width, channels, kernel_size=1, activation_layer=None) for width in widths
        )
        self.passes = nn.ModuleList(BiFpnPass(channels, len(widths)) for _ in range(repeats))

    def forward(self, x: dict[str, Tensor]) -> dict[str, Tensor]:
        """P2 … P6 of C2 … C5."""
        *finer, last = self.lateral_blocks
        maps = [block(feature) for block, feature in zip(finer, x.values(), strict=True)]
        maps.append(_halved(last(list(x.values())[-1])))
        for each in self.passes:
            maps = each(maps)
        return _named(x, maps[:-1], maps[-1])


class BiFpnPass(nn.Module):
    """One pass from the coarsest map to the finest, and one back (figure 2 d of the paper)."""

    def __init__(self, channels: int, levels: int) -> None:
        super().__init__()
        self.down_blocks = nn.ModuleList(Fusion(channels, 2) for _ in range(levels - 1))
        # On the way back every level but the last, which was not on the way down, has three inputs.
        self.up_blocks = nn.ModuleList(Fusion(channels, 3 if k < levels - 1 else 2) for k in range(1, levels))

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        """Maps of the same shapes, the finest first."""
        down = [maps[-1]]
        for block, feature in zip(self.down_blocks, reversed(maps[:-1]), strict=True):
            down.insert(0, block([feature, F.interpolate(down[0], size=feature.shape[-2:], mode="nearest")]))
        up = down[:1]
        for block, feature, between in zip(self.up_blocks, maps[1:], down[1:], strict=True):
            own = [feature] if between is feature else [feature, between]
            up.append(block([*own, _halved(up[-1])]))
        return up


class Fusion(nn.Module):
    """Fast normalised fusion: a sum with weights that are not negative and add up to nearly 1, then a convolution.

    The convolution is separable, 3 × 3 and then 1 × 1, with batch norm after it and swish before it.

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
        """One map of the shape that all have."""
        weights = F.relu(self.weights)
        shares = (weights / (weights.sum() + _FUSION_EPSILON)).to(maps[0].dtype).unbind()
        merged = maps[0] * shares[0]
        for share, other in zip(shares[1:], maps[1:], strict=True):
            merged = merged + other * share
        return self.convolution(F.silu(merged))


def _halved(feature: Tensor) -> Tensor:
    """A map of half the height and width, rounded up: of an odd one P6 too has one row more than half."""
    return F.max_pool2d(feature, kernel_size=3, stride=2, padding=1)


def _named(like: dict[str, Tensor], maps: list[Tensor], last: Tensor) -> dict[str, Tensor]:
    return OrderedDict([*zip(like, maps, strict=True), ("pool", last)])


def _initialise(block: nn.Module) -> None:
    """As torchvision initialises FPN's convolutions."""
    for module in block.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_uniform_(module.weight, a=1)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


# Frozen batch norm that costs nothing: it is computed in the convolution before it.
#
# A frozen norm multiplies each channel by a constant and adds one. Done on its own that reads and writes every feature
# map twice more, and under autocast turns it to float32. Here the constants go into the convolution's weights.


class FoldedBatchNorm2d(FrozenBatchNorm2d):
    """A frozen norm whose arithmetic a `FoldedConv2d` has done; names and values are torchvision's."""

    def constants(self) -> tuple[Tensor, Tensor]:
        """Scale and shift of each channel, `[C]`."""
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        return scale, self.bias - self.running_mean * scale

    def forward(self, x: Tensor) -> Tensor:
        """The input; in an exported graph the norm itself, which runtimes fold without loss of readability."""
        return super().forward(x) if torch.compiler.is_exporting() else x


class FoldedConv2d(nn.Conv2d):
    """A convolution that applies the norm after it."""

    norm: FoldedBatchNorm2d

    def forward(self, x: Tensor) -> Tensor:
        """What convolution and norm give together."""
        if torch.compiler.is_exporting():
            return super().forward(x)
        scale, shift = self.norm.constants()
        if self.bias is not None:  # VGG's
            shift = shift + self.bias * scale
        weight = self.weight * scale[:, None, None, None]
        return F.conv2d(x, weight, shift, self.stride, self.padding, self.dilation, self.groups)


def fold_norms(body: nn.Module) -> nn.Module:
    """Makes every convolution that a `FoldedBatchNorm2d` follows a `FoldedConv2d`; returns the body."""
    for module in list(body.modules()):
        for convolution, norm in _pairs(module):
            if isinstance(norm, FoldedBatchNorm2d):
                convolution.__class__ = FoldedConv2d
                # Not as a submodule: the norm has its place, and its name, in the body.
                object.__setattr__(convolution, "norm", norm)
    return body


def _pairs(module: nn.Module) -> Iterator[tuple[nn.Module, nn.Module]]:
    """A ResNet names conv1 and bn1 alike; elsewhere, as in its shortcuts, the two follow each other in a sequence."""
    children = dict(module.named_children())
    for name, child in children.items():
        if name.startswith("conv") and f"bn{name[4:]}" in children:
            yield child, children[f"bn{name[4:]}"]
    if isinstance(module, nn.Sequential):
        yield from ((one, other) for one, other in itertools.pairwise(module) if isinstance(one, nn.Conv2d))


@dataclass(frozen=True)
class Layout:
    """Where in a classifier the maps are made."""

    stages: tuple[tuple[str, ...], ...]  # five, each the names of its layers; the last layers of four make C2 … C5
    channels: tuple[int, ...]  # of C2 … C5


def _numbered(ends: Sequence[int]) -> tuple[tuple[str, ...], ...]:
    """Stages of layers that are numbered, from the last layer of each."""
    starts = [0, *(end + 1 for end in ends[:-1])]
    return tuple(tuple(map(str, range(start, end + 1))) for start, end in zip(starts, ends, strict=True))


RESNET_STAGES = (("conv1", "bn1"), ("layer1",), ("layer2",), ("layer3",), ("layer4",))
# VGG's maps are those after pooling, as torchvision has no detector that says otherwise; MobileNet's the last of each
# stride; ConvNeXt's stages begin with the convolution that halves the map.
_LAYOUTS = {
    "vgg16": Layout(_numbered((4, 9, 16, 23, 30)), (128, 256, 512, 512)),
    "vgg16_bn": Layout(_numbered((6, 13, 23, 33, 43)), (128, 256, 512, 512)),
    "mobilenet_v3_large": Layout(_numbered((1, 3, 6, 12, 16)), (24, 40, 112, 960)),
    "convnext_tiny": Layout(_numbered((0, 1, 3, 5, 7)), (96, 192, 384, 768)),
}


class Backbone(nn.Module):
    """A classifier without its head, and a neck.

    Args:
        config: of the model.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        body, layout = _body(config)
        self.stages = layout.stages
        self.body = Body(body, layout)
        if config.backbone.startswith("convnext"):
            # Its blocks add to what they get without a norm; detectors have one after each map (Liu et al. 2022).
            self.norms = nn.ModuleList(LayerNorm2d(width, eps=1e-6) for width in layout.channels)
        self.fpn = make_neck(
            config.neck,
            layout.channels,
            config.fpn_channels,
            norm=nn.BatchNorm2d if config.head_batch_norm else None,
            repeats=config.bifpn_repeats,
        )
        self.out_channels = config.fpn_channels  # torchvision's detectors ask for it

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """P2 … P6 by torchvision's names of them, for normalised images `[N, 3, H, W]`."""
        maps = self.body(images)
        if hasattr(self, "norms"):
            maps = OrderedDict((k, norm(x)) for (k, x), norm in zip(maps.items(), self.norms, strict=True))
        return self.fpn(maps)


class Body(nn.ModuleDict):
    """A classifier's layers up to the one that makes C5.

    Args:
        classifier: whose layers run one after another.
        layout: of its layers.
    """

    def __init__(self, classifier: nn.Module, layout: Layout) -> None:
        ends = [stage[-1] for stage in layout.stages[1:]]
        names = [name for name, _ in classifier.named_children()]
        kept = names[: names.index(ends[-1]) + 1]
        super().__init__({name: layer for name, layer in classifier.named_children() if name in kept})
        self.names = {end: str(k) for k, end in enumerate(ends)}  # torchvision's, of the maps

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """C2 … C5, under the names "0" … "3"."""
        maps = OrderedDict()
        for name, layer in self.items():
            x = layer(x)
            if name in self.names:
                maps[self.names[name]] = x
        return maps


def _body(config: ModelConfig) -> tuple[nn.Module, Layout]:
    """The layers of a backbone with random weights, norms frozen where the configuration wants that."""
    name = config.backbone
    kind = FoldedBatchNorm2d if config.frozen_batch_norm else nn.BatchNorm2d
    norm = partial(kind, eps=config.batch_norm_epsilon)
    if name.startswith("vgg"):
        body = _vgg(norm if name.endswith("_bn") else None)
    elif name.startswith("convnext"):
        # Layers that are left out at random would make a run depend on more than its seed, epoch and image.
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


def _vgg(norm) -> nn.Sequential:
    """VGG-16's convolutions, initialised as torchvision's; its classifier, nine times as large, is not made."""
    layers = make_layers(cfgs["D"], batch_norm=norm is not None)
    for index, layer in enumerate(layers):
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            nn.init.zeros_(layer.bias)
        elif isinstance(layer, nn.BatchNorm2d):
            layers[index] = norm(layer.num_features)
    return layers


def _stride_first(body: ResNet) -> None:
    """Lets the first convolution of a bottleneck halve the map, as in He et al. 2015, instead of its second."""
    for block in body.modules():
        if isinstance(block, Bottleneck):  # a block of two 3 × 3 convolutions strides in its first anyway
            block.conv1.stride, block.conv2.stride = block.conv2.stride, block.conv1.stride

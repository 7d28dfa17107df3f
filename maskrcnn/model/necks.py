"""What makes the maps P2 … P6, all of one width, of a backbone's C2 … C5.

Each neck takes and gives maps by name, as torchvision's detectors have them: "0" … "3" are C2 … C5 and become P2 … P5,
"pool" is P6.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import Conv2dNormActivation, FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

Norm = Callable[[int], nn.Module] | None
_FUSION_EPSILON = 1e-4  # Tan et al. 2020, section 3.3


def make_neck(kind: str, in_channels: Sequence[int], channels: int, *, norm: Norm, repeats: int) -> nn.Module:
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

    def __init__(self, in_channels: Sequence[int], channels: int, norm: Norm) -> None:
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

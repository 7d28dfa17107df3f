"""Frozen batch norm that costs nothing: it is computed in the convolution before it.

A frozen norm multiplies each channel by a constant and adds one. Done on its own that reads and writes every feature
map twice more, and under autocast turns it to float32. Here the constants go into the convolution's weights.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import FrozenBatchNorm2d


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

"""Torchvision's classifiers as backbones: their maps C2 … C5, and a neck that makes P2 … P6 of them.

Tensors are named as in torchvision's detectors, `backbone.body.…` and `backbone.fpn.…`, whatever backbone and neck:
a classifier's layers keep the names that they have in it, less the `features.` of those that are not ResNets.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torchvision
from torch import Tensor, nn
from torchvision.models.convnext import LayerNorm2d
from torchvision.models.resnet import Bottleneck, ResNet
from torchvision.models.vgg import cfgs, make_layers

from maskrcnn.config import ModelConfig
from maskrcnn.model.frozen_norm import FoldedBatchNorm2d, fold_norms
from maskrcnn.model.necks import make_neck


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

"""A model as it is run, not trained: norms inside their convolutions, and weights in half precision by a rule.

The rule is that of exported graphs (`maskrcnn.export.precision`): convolutions and matrix products are in half
precision, with what only passes their results on; pixels, anchors, box coordinates, scores and NMS stay in single
precision. Here that is a matter of which modules have half-precision weights, and of a cast where features enter them.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from maskrcnn.model.backbones import Body
from maskrcnn.model.detector import MaskRCNN
from maskrcnn.model.frozen_norm import FoldedBatchNorm2d, FoldedConv2d


def inference_copy(model: MaskRCNN, dtype: torch.dtype = torch.float32) -> MaskRCNN:
    """A copy in evaluation mode that computes the same faster; it cannot be trained or saved.

    Args:
        model: stays as it is.
        dtype: of convolutions and matrix products; inputs and outputs are in the types that they always have.
    """
    made = copy.deepcopy(model).eval().requires_grad_(False)
    fold_all_norms(made)
    if dtype != torch.float32:
        for module in _computing(made):
            _lower(module, dtype)
    return made


def fold_all_norms(model: nn.Module) -> None:
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

"""Frozen batch norm inside the convolution gives what it gives after it."""

import copy

import pytest
import torch
import torchvision
from tiny import tiny_config
from torchvision.ops import FrozenBatchNorm2d

from maskrcnn.model.backbone import FoldedBatchNorm2d, FoldedConv2d, fold_norms
from maskrcnn.model.detector import MaskRCNN


def pair(name: str):
    """torchvision's ResNet with frozen norms, and ours with the same weights."""
    torch.manual_seed(0)
    theirs = torchvision.models.get_model(name, weights=None, norm_layer=FrozenBatchNorm2d)
    for module in theirs.modules():
        if isinstance(module, FrozenBatchNorm2d):
            module.weight.uniform_(0.5, 1.5)
            module.bias.normal_()
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 2.0)
    ours = fold_norms(torchvision.models.get_model(name, weights=None, norm_layer=FoldedBatchNorm2d))
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_outputs_and_gradients_equal_torchvisions(name):
    found = []
    for model in pair(name):
        # In double precision: a rounding that moves one value over a ReLU's edge would show in the gradients.
        rng = torch.Generator().manual_seed(1)
        images = torch.rand(2, 3, 64, 96, generator=rng, dtype=torch.float64, requires_grad=True)
        output = model.double()(images)
        output.square().mean().backward()
        found.append([output.detach(), images.grad, *(p.grad for p in model.parameters())])
    for a, b in zip(*found, strict=True):
        assert (a - b).norm() <= 1e-9 * a.norm()


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_every_norm_has_its_convolution(name):
    _, ours = pair(name)
    norms = [m for m in ours.modules() if isinstance(m, FoldedBatchNorm2d)]
    owners = [m.norm for m in ours.modules() if isinstance(m, FoldedConv2d)]
    assert len(norms) > 15
    assert {id(norm) for norm in norms} == {id(norm) for norm in owners}


def test_a_copy_has_norms_of_its_own():
    model = MaskRCNN(tiny_config(frozen_batch_norm=True))
    other = copy.deepcopy(model)
    conv, norm = other.backbone.body.conv1, other.backbone.body.bn1
    assert conv.norm is norm
    assert norm is not model.backbone.body.bn1

"""PANet and BiFPN against their definitions, and the necks' common frame."""

import pytest
import torch
from tiny import tiny_config
from torch import nn
from torch.nn import functional as F

from maskrcnn.config import NECKS
from maskrcnn.errors import UserError
from maskrcnn.model.backbone import BiFpn, BiFpnPass, Fusion, PathAggregation, make_neck
from maskrcnn.model.detector import MaskRCNN
from maskrcnn.weights.checkpoint import load_weights
from maskrcnn.weights.finetuning import finetuning_tensors
from maskrcnn.weights.torchvision import StartingWeights

WIDTHS = (8, 12, 16, 20)


def maps_for(image_hw=(96, 160), batch: int = 2) -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    return {
        str(k): torch.randn(batch, width, image_hw[0] >> (k + 2), image_hw[1] >> (k + 2), generator=rng)
        for k, width in enumerate(WIDTHS)
    }


@pytest.mark.parametrize("kind", NECKS)
@pytest.mark.parametrize("image_hw", [(96, 160), (64, 64), (32, 1344)])  # odd sides at P5, and one of a single pixel
def test_every_neck_gives_five_maps_of_one_width(kind, image_hw):
    torch.manual_seed(0)
    neck = make_neck(kind, WIDTHS, 6, norm=None, repeats=2).eval()
    fpn = make_neck("fpn", WIDTHS, 6, norm=None, repeats=1)
    found = neck(maps_for(image_hw))
    assert {k: v.shape for k, v in found.items()} == {k: v.shape for k, v in fpn(maps_for(image_hw)).items()}
    assert list(found) == ["0", "1", "2", "3", "pool"]


@pytest.mark.parametrize("norm", [None, nn.BatchNorm2d])
def test_the_second_path_of_panet(norm):
    torch.manual_seed(1)
    neck = make_neck("panet", WIDTHS, 6, norm=norm, repeats=1).eval()
    assert isinstance(neck, PathAggregation)
    fpn = make_neck("fpn", WIDTHS, 6, norm=norm, repeats=1).eval()
    fpn.load_state_dict({k: v for k, v in neck.state_dict().items() if k.startswith(("inner_", "layer_"))})
    weights = neck.state_dict()
    (p2, p3, p4, p5, _), maps = fpn(maps_for()).values(), neck(maps_for())

    def convolution(x, name, stride):
        made = F.conv2d(x, weights[f"{name}.0.weight"], weights.get(f"{name}.0.bias"), stride, padding=1)
        return F.relu(made / (1 + 1e-5) ** 0.5 if norm else made)  # as made, a norm divides by nearly 1 and no more

    expected = [p2]
    for k, feature in enumerate((p3, p4, p5)):
        lower = convolution(expected[-1], f"down_blocks.{k}", 2)
        expected.append(convolution(feature + lower, f"fuse_blocks.{k}", 1))
    expected.append(expected[-1][:, :, ::2, ::2])
    for found, wanted in zip(maps.values(), expected, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)


def test_fusion_weighs_by_shares_that_are_not_negative():
    torch.manual_seed(2)
    fusion = Fusion(3, 3).eval()
    a, b, c = (torch.randn(1, 3, 4, 5) for _ in range(3))
    with torch.no_grad():
        fusion.weights.copy_(torch.tensor([2.0, -1.0, 6.0]))
        merged = (2 * a + 6 * c) / 8.0001
        expected = fusion.convolution(merged * torch.sigmoid(merged))
        torch.testing.assert_close(fusion([a, b, c]), expected)
    depthwise, pointwise, _ = fusion.convolution
    assert depthwise.weight.shape == (3, 1, 3, 3) and pointwise.weight.shape == (3, 3, 1, 1)


class _Sum(nn.Module):
    """Stands for a fusion, whose connections are to be seen: how often each map has gone in."""

    def forward(self, maps):
        assert len({x.shape for x in maps}) == 1
        return sum(maps)


def test_a_pass_of_bifpn_connects_what_the_paper_connects():
    found = BiFpnPass(1, 5)
    assert [block.weights.numel() for block in found.down_blocks] == [2, 2, 2, 2]
    assert [block.weights.numel() for block in found.up_blocks] == [3, 3, 3, 2]
    found.down_blocks = nn.ModuleList(_Sum() for _ in range(4))
    found.up_blocks = nn.ModuleList(_Sum() for _ in range(4))
    # Maps whose values are the digits of a number: that of level k counts how often it went in.
    maps = [torch.full((1, 1, 32 >> k, 32 >> k), float(10**k)) for k in range(5)]
    up = [int(x.max()) for x in found(maps)]
    # Down: 10000, 11000, 11100, 11110, 11111. Up: the own map, that of the way down, and what came out below.
    assert up == [11111, 10 + 11110 + 11111, 100 + 11100 + 22231, 1000 + 11000 + 33431, 10000 + 45431]


def test_bifpn_halves_and_repeats():
    torch.manual_seed(3)
    neck = BiFpn(WIDTHS, 6, repeats=2).eval()
    seen = []
    for each in neck.passes:
        each.register_forward_hook(lambda _, inputs, output: seen.append((inputs[0], output)))
    x = maps_for()
    found = neck(x)
    assert len(seen) == 2 and seen[1][0] is seen[0][1]
    assert all(a is b for a, b in zip(found.values(), seen[1][1], strict=True))
    last = neck.lateral_blocks[4](x["3"])
    assert torch.equal(seen[0][0][4], F.max_pool2d(last, 3, 2, 1))
    assert torch.equal(seen[0][0][0], neck.lateral_blocks[0](x["0"]))
    sum(v.square().sum() for v in neck(x).values()).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in neck.parameters())


# Weights of a model with another neck


def weights_of(neck: str) -> StartingWeights:
    torch.manual_seed(4)
    config = tiny_config(neck=neck)
    return StartingWeights(tensors=MaskRCNN(config).state_dict(), source="weights", path=None, config=config)


@pytest.mark.parametrize(("before", "now"), [("fpn", "panet"), ("panet", "fpn"), ("fpn", "bifpn"), ("bifpn", "panet")])
def test_what_both_necks_have_is_kept_and_the_rest_starts_anew(before, now):
    weights, model = weights_of(before), MaskRCNN(tiny_config(neck=now))
    tensors, taken = finetuning_tensors(model, weights)
    load_weights(model, tensors, "weights")
    ours, theirs = (
        {k for k in names if k.startswith("backbone.fpn.")} for names in (model.state_dict(), weights.tensors)
    )
    assert set(taken.added) == ours - theirs and set(taken.dropped) == theirs - ours
    for name in ours & theirs | {"rpn.head.cls_logits.weight", "backbone.body.conv1.weight"}:
        assert torch.equal(model.state_dict()[name], weights.tensors[name])


def test_weights_without_any_neck_are_incomplete():
    weights, model = weights_of("fpn"), MaskRCNN(tiny_config(neck="panet"))
    tensors = {k: v for k, v in weights.tensors.items() if not k.startswith("backbone.fpn.")}
    tensors, _ = finetuning_tensors(
        model, StartingWeights(tensors=tensors, source="w", path=None, config=weights.config)
    )
    with pytest.raises(UserError, match=r"28 missing \(first: backbone\.fpn\."):
        load_weights(model, tensors, "w")

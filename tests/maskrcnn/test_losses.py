"""Losses: against torchvision's on the same samples, and on what must not matter."""

from dataclasses import replace

import pytest
import torch
import torchvision
from tiny import lively_model, tiny_config
from torch.nn import functional as F

from maskrcnn.config import BOX_LOSSES, LossConfig
from maskrcnn.model.losses import focal, identity, iou_loss, rpn_losses

TAKE_ALL = LossConfig(rpn_samples=100_000, box_samples=100_000, box_positive_fraction=1.0)


def truth(objects: int = 3, padding: int = 0) -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(7)
    corners = torch.rand(2, objects, 2, generator=rng) * 50
    boxes = torch.cat([corners, corners + 12 + 25 * torch.rand(2, objects, 2, generator=rng)], dim=2)
    labels = torch.randint(1, 4, (2, objects), generator=rng)
    masks = (torch.rand(2, objects, 112, 112, generator=rng) > 0.3).to(torch.uint8) * 255
    pad = (0, 0, 0, padding)
    return {
        "boxes": F.pad(boxes, pad),
        "labels": F.pad(labels, (0, padding)),
        "valid": F.pad(torch.ones(2, objects, dtype=torch.bool), (0, padding)),
        "masks": F.pad(masks, (0, 0, 0, 0, 0, padding)),
        "mask_frames": F.pad(boxes, pad),
        "seeds": torch.tensor([11, 12]),
    }


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(8)
    return torch.rand(2, 3, 96, 128, generator=rng) * 255, torch.tensor([[96, 128], [90, 100]])


def test_all_losses_are_finite_and_reach_every_parameter():
    torch.manual_seed(0)
    model = lively_model(tiny_config()).train()
    losses = model.losses(*batch(), truth(), LossConfig(rpn_samples=64, box_samples=32))
    assert set(losses) == {"objectness", "rpn_box", "classification", "box", "mask"}
    sum(losses.values()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().sum() > 0, name


def test_padding_of_the_ground_truth_changes_nothing():
    values = []
    for padding in (0, 5):
        model = lively_model(tiny_config()).eval()  # evaluation mode: batch norm without side effects
        torch.manual_seed(1)
        losses = model.losses(*batch(), truth(padding=padding), TAKE_ALL)
        values.append({name: float(value.detach()) for name, value in losses.items()})
    assert values[0] == pytest.approx(values[1], rel=1e-4)


def test_an_object_without_a_mask_counts_in_all_other_losses():
    """Its mask has no pixel; the mask loss is that of the other objects."""
    model = lively_model(tiny_config()).eval()
    whole, partial, turned = truth(), truth(), truth()
    partial["masks"][:, 0] = 0
    turned["masks"][:, 0] = 255 - whole["masks"][:, 0]
    losses = [
        {name: float(value.detach()) for name, value in model.losses(*batch(), each, TAKE_ALL).items()}
        for each in (whole, partial, turned)
    ]
    others = [{name: value for name, value in each.items() if name != "mask"} for each in losses]
    assert others[0] == pytest.approx(others[1], rel=1e-5)
    # The mask losses of an object and of its negative differ; without a mask neither counts.
    assert losses[0]["mask"] != pytest.approx(losses[2]["mask"], rel=1e-3)
    without = {
        name: torch.cat([value[:, 1:], value[:, :1]], 1) if value.dim() > 1 else value
        for name, value in partial.items()
    }
    assert float(model.losses(*batch(), without, TAKE_ALL)["mask"]) == pytest.approx(losses[1]["mask"], rel=1e-4)
    none = {**whole, "masks": torch.zeros_like(whole["masks"])}
    assert float(model.losses(*batch(), none, TAKE_ALL)["mask"]) == 0


def test_an_image_without_objects_trains_the_background_only():
    model = lively_model(tiny_config()).eval()
    empty = {name: torch.zeros_like(value) for name, value in truth().items()}
    losses = model.losses(*batch(), empty, LossConfig(rpn_samples=64, box_samples=32))
    assert losses["objectness"] > 0
    assert losses["classification"] > 0
    assert float(losses["rpn_box"]) == float(losses["box"]) == float(losses["mask"]) == 0
    sum(losses.values()).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("objects", [0, 3])
def test_weights_that_overflow_give_losses_that_are_no_numbers(objects):
    """Which a training step can leave out; an index made of them would end the process."""
    model = lively_model(tiny_config()).train()
    with torch.no_grad():
        model.backbone.body.conv1.weight.view(-1)[0] = 3e38
    given = {name: torch.zeros_like(value) for name, value in truth().items()} if objects == 0 else truth()
    losses = model.losses(*batch(), given, LossConfig(rpn_samples=64, box_samples=32))
    assert not all(loss.isfinite() for loss in losses.values())


def pairs(count: int = 200) -> tuple[torch.Tensor, torch.Tensor]:
    """Boxes and targets that overlap, touch, contain one another or lie apart."""
    rng = torch.Generator().manual_seed(4)
    first, second = (torch.rand(count, 2, generator=rng) * 30 for _ in range(2))
    sides = 1 + 30 * torch.rand(2, count, 2, generator=rng)
    first, second = torch.cat([first, first + sides[0]], dim=1), torch.cat([second, second + sides[1]], dim=1)
    second[:10] = first[:10]
    second[10:20] = first[10:20] + 100
    return first, second


@pytest.mark.parametrize("kind", ["giou", "diou", "ciou"])
def test_iou_losses_equal_torchvisions(kind):
    theirs = {
        "giou": torchvision.ops.generalized_box_iou_loss,
        "diou": torchvision.ops.distance_box_iou_loss,
        "ciou": torchvision.ops.complete_box_iou_loss,
    }[kind]
    values, gradients = [], []
    for function in (theirs, lambda boxes, target: iou_loss(boxes, target, kind)):
        boxes, target = pairs()
        boxes.requires_grad_()
        loss = function(boxes, target)
        loss.sum().backward()
        values.append(loss.detach())
        gradients.append(boxes.grad)
    torch.testing.assert_close(*values, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-5)


def test_iou_loss_by_hand():
    boxes = torch.tensor([[0, 0, 10, 10.0], [0, 0, 10, 10], [0, 0, 10, 10]])
    target = torch.tensor([[0, 0, 10, 10.0], [5, 0, 15, 10], [20, 0, 30, 10]])
    torch.testing.assert_close(iou_loss(boxes, target, "iou"), torch.tensor([0.0, 2 / 3, 1.0]))


@pytest.mark.parametrize("kind", BOX_LOSSES)
def test_a_detector_trains_with_every_box_loss(kind):
    model = lively_model(tiny_config()).train()
    loss = LossConfig(rpn_samples=64, box_samples=32, rpn_box_loss=kind, box_loss=kind, box_loss_weight=2.0)
    sum(model.losses(*batch(), truth(), loss).values()).backward()
    for name in ("rpn.head.bbox_pred.weight", "roi_heads.box_predictor.bbox_pred.weight"):
        gradient = model.get_parameter(name).grad
        assert gradient.isfinite().all() and gradient.abs().sum() > 0


def test_only_the_seeds_decide_the_sample():
    model, target = lively_model(tiny_config()).eval(), truth()
    few = LossConfig(rpn_samples=16, box_samples=8)
    found = []
    for seeds in ([1, 2], [1, 2], [3, 4]):
        torch.manual_seed(len(found))
        losses = model.losses(*batch(), {**target, "seeds": torch.tensor(seeds)}, few)
        found.append(float(sum(losses.values()).detach()))
    assert found[0] == found[1]
    assert found[0] != found[2]


@pytest.mark.parametrize("convolutions", [1, 2, 3])
def test_the_head_says_the_same_of_single_anchors_as_of_the_whole_map(convolutions):
    model = lively_model(tiny_config(rpn_convolutions=convolutions)).eval()
    images, sizes = batch()
    whole, single = [], []
    for found in (whole, single):
        features = [feature.detach().requires_grad_() for feature in model.features(images, sizes)]
        model.zero_grad()
        output = model.rpn(features, images)
        count = sum(len(anchors) for anchors in output.anchors)
        index = torch.arange(count).expand(2, count)  # every anchor: all corners and edges of all levels
        if found is whole:
            logits, deltas = torch.cat(output.logits, 1), torch.cat(output.deltas, 1)
        else:
            logits, deltas = model.rpn.at_anchors(features, index)
        rng = torch.Generator().manual_seed(2)
        weights = torch.randn(count, generator=rng)
        ((logits * weights).sum() + (deltas.sin() * weights[:, None]).sum()).backward()
        gradients = [p.grad for p in model.rpn.parameters()] + [f.grad for f in features]
        found += [logits.detach(), deltas.detach(), *gradients]
    for a, b in zip(whole, single, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-3, atol=1e-4 * float(a.abs().max()))


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_focal_loss_equals_torchvisions(gamma):
    """Of two classes with logits 0 and x, the softmax is the sigmoid of x."""
    values, gradients = [], []
    target = torch.arange(40) % 2
    for kind in ("torchvision", "sigmoid", "softmax"):
        logits = torch.linspace(-12, 12, 40, requires_grad=True)
        if kind == "torchvision":
            loss = torchvision.ops.sigmoid_focal_loss(logits, target.float(), alpha=-1, gamma=gamma)
        elif kind == "sigmoid":
            loss = focal(F.binary_cross_entropy_with_logits(logits, target.float(), reduction="none"), gamma)
        else:
            pair = torch.stack([torch.zeros(40), logits], dim=1)
            loss = focal(F.cross_entropy(pair, target, reduction="none"), gamma)
        loss.sum().backward()
        values.append(loss.detach())
        gradients.append(logits.grad)
    for k in (1, 2):
        torch.testing.assert_close(values[k], values[0], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(gradients[k], gradients[0], rtol=1e-3, atol=1e-5)
    sure = torch.zeros(3, requires_grad=True)  # where torchvision's gradient is not a number for gamma below 1
    focal(sure, gamma).sum().backward()
    assert sure.grad.isfinite().all()


def test_focal_losses_of_a_detector_equal_torchvisions_on_all_anchors():
    model = lively_model(tiny_config()).eval()
    images, sizes = batch()
    target = truth()
    features = model.features(images, sizes)
    output = model.rpn(features, images)
    loss = replace(TAKE_ALL, objectness_loss="focal", focal_gamma=1.5, focal_alpha=0.3)
    ours = rpn_losses(model.rpn, features, output.anchors, target, loss, identity)["objectness"]
    from torchvision.models.detection._utils import Matcher
    from torchvision.ops import box_iou

    anchors, logits = torch.cat(output.anchors), torch.cat(output.logits, 1)
    total, count = 0.0, 0
    for n in range(2):
        found = Matcher(0.7, 0.3, allow_low_quality_matches=True)(box_iou(target["boxes"][n], anchors))
        sampled = found != -2  # between the thresholds
        goal = (found >= 0).float()[sampled]
        total += float(torchvision.ops.sigmoid_focal_loss(logits[n][sampled], goal, 0.3, 1.5, "sum"))
        count += int(sampled.sum())
    assert float(ours) == pytest.approx(total / count, rel=1e-4)


def test_class_weights_multiply_the_loss_of_their_class():
    """Weighted by w, the loss is the sum over the classes of w times what it is with all other weights 0."""
    model = lively_model(tiny_config()).eval()

    def classification(loss: LossConfig) -> float:
        return float(model.losses(*batch(), truth(), loss)["classification"].detach())

    names = ("circle", "rectangle", "triangle")
    for base in (TAKE_ALL, replace(TAKE_ALL, classification_loss="focal")):
        none = classification(replace(base, class_weights=dict.fromkeys(names, 0.0)))  # background alone
        own = [
            classification(replace(base, class_weights={name: float(name == each) for name in names})) - none
            for each in names
        ]
        assert min(own) > 0
        assert classification(base) == pytest.approx(none + sum(own), rel=1e-4)
        weights = dict(zip(names, (0.5, 2.0, 7.0), strict=True))
        expected = none + 0.5 * own[0] + 2 * own[1] + 7 * own[2]
        assert classification(replace(base, class_weights=weights)) == pytest.approx(expected, rel=1e-4)

"""Losses: against torchvision's on the same samples, and on what must not matter."""

import pytest
import torch
from tiny import lively_model, tiny_config
from torch.nn import functional as F

from maskrcnn.config import LossConfig
from maskrcnn.model.roi_heads import mask_targets

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


def test_an_image_without_objects_trains_the_background_only():
    model = lively_model(tiny_config()).eval()
    empty = {name: torch.zeros_like(value) for name, value in truth().items()}
    losses = model.losses(*batch(), empty, LossConfig(rpn_samples=64, box_samples=32))
    assert losses["objectness"] > 0
    assert losses["classification"] > 0
    assert float(losses["rpn_box"]) == float(losses["box"]) == float(losses["mask"]) == 0
    sum(losses.values()).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_rpn_losses_equal_torchvisions_formula_on_all_anchors():
    model = lively_model(tiny_config()).eval()
    images, sizes = batch()
    target = truth()
    output = model.rpn(model.features(images, sizes), images)
    ours = model.rpn.losses(output, target["boxes"], target["valid"], TAKE_ALL)

    from torchvision.models.detection._utils import BoxCoder, Matcher
    from torchvision.ops import box_iou

    anchors = torch.cat(output.anchors)
    logits, deltas = torch.cat(output.logits, 1), torch.cat(output.deltas, 1)
    objectness, box, count = 0.0, 0.0, 0
    for n in range(2):
        found = Matcher(0.7, 0.3, allow_low_quality_matches=True)(box_iou(target["boxes"][n], anchors))
        positive, negative = found >= 0, found == -1
        sampled = positive | negative
        count += int(sampled.sum())
        objectness += F.binary_cross_entropy_with_logits(logits[n][sampled], positive[sampled].float(), reduction="sum")
        goal = BoxCoder((1.0, 1.0, 1.0, 1.0)).encode_single(target["boxes"][n][found[positive]], anchors[positive])
        box += F.smooth_l1_loss(deltas[n][positive], goal, beta=1 / 9, reduction="sum")
    assert float(ours[0]) == pytest.approx(float(objectness / count), rel=1e-5)
    assert float(ours[1]) == pytest.approx(float(box / count), rel=1e-4)


def test_mask_targets_by_hand():
    # A mask whose left half is set, in a box 100 wide; the RoI is shifted right by half a width.
    masks = torch.zeros(1, 2, 112, 112, dtype=torch.uint8)
    masks[0, 1, :, :56] = 255
    boxes = torch.tensor([[[0, 0, 1, 1.0], [100, 100, 200, 200.0]]])
    rois = torch.tensor([[[100, 100, 200, 200.0], [50, 100, 150, 200.0], [125, 150, 225, 250.0]]])
    owner = torch.tensor([[1, 1, 1]])
    same, left, low = mask_targets(masks, boxes, rois, owner, 4)[0]
    assert same.tolist() == [[1, 1, 0, 0]] * 4
    assert left.tolist() == [[0, 0, 1, 1]] * 4  # outside the box there is nothing
    assert low.tolist() == [[1, 0, 0, 0]] * 2 + [[0, 0, 0, 0]] * 2

"""The losses of the proposal network and of the heads, on fixed shapes.

Every loss is a sum over sampled rows divided by a count of them. Counts go through `share`, which makes them means
over all processes where training is distributed: gradients that are averaged over processes are then those of one
process with the whole batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from maskrcnn.config import LossConfig
from maskrcnn.model.boxes import decode_boxes, encode_boxes, pairwise_iou, take_rows
from maskrcnn.model.roi_heads import cells_from_keypoints
from maskrcnn.model.targets import mask_targets, match_anchors, sample_balanced

if TYPE_CHECKING:
    from maskrcnn.model.roi_heads import RoiHeads
    from maskrcnn.model.rpn import RegionProposalNetwork

Truth = dict[str, Tensor]
Share = Callable[[Tensor], Tensor]
Weights = tuple[float, float, float, float]
_SMALLEST_COUNT = 1e-3  # of no rows at all, whose sum is zero; one row on one of many processes counts more


def own_count(count: Tensor) -> Tensor:
    """The count of a single process, for which there is nothing to share."""
    return count


def iou_loss(boxes: Tensor, target: Tensor, kind: str) -> Tensor:
    """1 - IoU of pairs of boxes, with the penalty of the kind.

    Args:
        boxes: `[…, 4]` xyxy with sides of at least zero.
        target: `[…, 4]` with sides above zero.
        kind: "iou"; "giou" (Rezatofighi et al. 2019); "diou" or "ciou" (Zheng et al. 2020).

    Returns:
        `[…]`. Equal to torchvision's losses of these names, but without indexing by masks.
    """
    epsilon = 1e-7
    size, target_size = boxes[..., 2:] - boxes[..., :2], target[..., 2:] - target[..., :2]
    overlap = torch.minimum(boxes[..., 2:], target[..., 2:]) - torch.maximum(boxes[..., :2], target[..., :2])
    overlap = overlap.clamp(min=0).prod(-1)
    union = size.prod(-1) + target_size.prod(-1) - overlap
    iou = overlap / (union + epsilon)
    if kind == "iou":
        return 1 - iou
    hull = torch.maximum(boxes[..., 2:], target[..., 2:]) - torch.minimum(boxes[..., :2], target[..., :2])
    if kind == "giou":
        area = hull.prod(-1)
        return 1 - iou + (area - union) / (area + epsilon)
    shift = (boxes[..., :2] + boxes[..., 2:] - target[..., :2] - target[..., 2:]) / 2
    distance = 1 - iou + shift.square().sum(-1) / (hull.square().sum(-1) + epsilon)
    if kind == "diou":
        return distance
    angle = torch.atan(target_size[..., 0] / target_size[..., 1]) - torch.atan(
        size[..., 0] / size[..., 1].clamp(min=epsilon)
    )
    shape = 4 / math.pi**2 * angle.square()
    with torch.no_grad():
        weight = shape / (1 - iou + shape + epsilon)
    return distance + weight * shape


def box_loss(
    kind: str, deltas: Tensor, target: Tensor, references: Tensor, weights: Weights, smooth_l1_beta: float
) -> Tensor:
    """The regression loss `[…]` of each row.

    Args:
        kind: one of `maskrcnn.config.BOX_LOSSES`; smooth L1 compares deltas, the others decoded boxes.
        deltas: `[…, 4]` predicted, relative to `references`.
        target: `[…, 4]` xyxy boxes, and `references` `[…, 4]`, both with sides above zero.
        weights: of the deltas.
        smooth_l1_beta: where the loss turns from quadratic to linear.
    """
    if kind == "smooth_l1":
        goal = encode_boxes(target, references, weights)
        return F.smooth_l1_loss(deltas, goal, beta=smooth_l1_beta, reduction="none").sum(-1)
    return iou_loss(decode_boxes(deltas, references, weights), target, kind)


def rpn_losses(
    rpn: RegionProposalNetwork,
    features: list[Tensor],
    anchors: list[Tensor],
    truth: Truth,
    loss: LossConfig,
    weights: Weights,
    share: Share = own_count,
) -> dict[str, Tensor]:
    """Objectness and box loss of sampled anchors: scalars `objectness` and `rpn_box`.

    Args:
        rpn: says what it makes of the sampled anchors.
        features: P2 … P6.
        anchors: of each level, `[A_l, 4]`.
        truth: see `MaskRCNN.losses`.
        loss: matching and sampling constants.
        weights: of the deltas.
        share: see the module.
    """
    with torch.no_grad():
        all_anchors = torch.cat(anchors)
        # One image at a time: anchors × objects is the largest array of the step.
        picks = [
            _sample_anchors(all_anchors, boxes, valid, seed, loss)
            for boxes, valid, seed in zip(truth["boxes"], truth["valid"], truth["seeds"], strict=True)
        ]
        index, positive, sampled, target = (torch.stack(x) for x in zip(*picks, strict=True))
    total = share(sampled.sum().float()).clamp(min=_SMALLEST_COUNT)
    logits, deltas = rpn.at_anchors(features, index)
    objectness = F.binary_cross_entropy_with_logits(logits, positive.float(), reduction="none")
    box = box_loss(loss.rpn_box_loss, deltas, target, all_anchors[index], weights, loss.smooth_l1_beta)
    return {
        "objectness": (objectness * sampled).sum() / total,
        "rpn_box": loss.rpn_box_loss_weight * (box * positive).sum() / total,
    }


def _sample_anchors(anchors: Tensor, boxes: Tensor, valid: Tensor, seed: Tensor, loss: LossConfig):
    """Index `[S]` of an image's sampled anchors, whether positive, whether sampled, and their target boxes."""
    iou = pairwise_iou(anchors, boxes).masked_fill(~valid, -1.0)
    matched, positive, negative = match_anchors(
        iou, valid, foreground=loss.rpn_foreground_iou, background=loss.rpn_background_iou
    )
    index, is_positive, is_sampled = sample_balanced(
        positive, negative, seed, count=loss.rpn_samples, positive_fraction=loss.rpn_positive_fraction
    )
    # Slots that are no positives regress to themselves; their weight is zero.
    return index, is_positive, is_sampled, torch.where(is_positive[:, None], boxes[matched[index]], anchors[index])


def roi_losses(
    heads: RoiHeads,
    features: list[Tensor],
    proposals: Tensor,
    used: Tensor,
    truth: Truth,
    loss: LossConfig,
    weights: Weights,
    share: Share = own_count,
) -> dict[str, Tensor]:
    """Losses of sampled proposals: scalars `classification`, `box` and, with such heads, `mask` and `keypoint`.

    Args:
        heads: classify and segment.
        features: P2 … P6.
        proposals: `[N, R, 4]`.
        used: bool `[N, R]`, whether a proposal is one.
        truth: see `MaskRCNN.losses`.
        loss: matching and sampling constants.
        weights: of the deltas.
        share: see the module.
    """
    with torch.no_grad():
        rois, labels, positive, sampled, owner = _sample_rois(proposals, used, truth, loss)
        rois = _repeated(rois, sampled)
        # Unsampled slots, which may be empty boxes, get a box that does no harm; their weight is zero.
        corner = torch.arange(4, device=rois.device) >= 2
        target = torch.where(positive[..., None], take_rows(truth["boxes"], owner), rois)
        target = torch.where(sampled[..., None], target, corner.to(rois.dtype))
        reference = torch.where(sampled[..., None], rois, corner.to(rois.dtype))
    logits, deltas = heads.classify(features, rois)
    total = share(sampled.sum().float()).clamp(min=_SMALLEST_COUNT)
    classification = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
    own = deltas.gather(2, labels[..., None, None].expand(-1, -1, 1, 4)).squeeze(2)
    box = box_loss(loss.box_loss, own, target, reference, weights, loss.smooth_l1_beta)
    losses = {
        "classification": (classification * sampled.flatten()).sum() / total,
        "box": loss.box_loss_weight * (box * positive).sum() / total,
    }
    if heads.has_masks or heads.has_keypoints:
        first = _positive_rows(positive, int(loss.box_samples * loss.box_positive_fraction))
        rois, labels, positive, owner = (x[:, :first] for x in (rois, labels, positive, owner))
    if heads.has_masks:
        losses["mask"] = _mask_loss(heads, features, rois, labels, positive, owner, truth, loss, share)
    if heads.has_keypoints:
        losses["keypoint"] = _keypoint_loss(heads, features, rois, positive, owner, truth, share)
    return losses


def _positive_rows(positive: Tensor, most: int) -> int:
    """How many of the first slots, which the positives fill, the heads of masks and keypoints have to look at.

    On a CPU in eager mode as many as the image with the most positives has. Elsewhere all that may be positive:
    reading the count would make a GPU wait, and is no part of a compiled graph.
    """
    if positive.device.type != "cpu" or torch.compiler.is_compiling():
        return most
    return min(max(int(positive.sum(dim=1).max()), 1), most)


def _mask_loss(heads, features, rois, labels, positive, owner, truth: Truth, loss: LossConfig, share: Share) -> Tensor:
    rois = _repeated(rois, positive)
    logits = heads.mask_logits(features, rois, labels)
    with torch.no_grad():
        target = mask_targets(
            truth["masks"],
            truth["mask_frames"],
            rois,
            owner,
            truth["image_sizes"],
            logits.shape[-1],
            aligned=loss.mask_target_aligned,
        )
    mask = F.binary_cross_entropy_with_logits(logits, target, reduction="none").mean(dim=(-1, -2))
    return (mask * positive).sum() / share(positive.sum().float()).clamp(min=_SMALLEST_COUNT)


def _keypoint_loss(heads, features, rois, positive, owner, truth: Truth, share: Share) -> Tensor:
    """Cross-entropy over the cells of a heat map: each labelled keypoint inside its RoI is in one (He et al. 2017)."""
    rois = _repeated(rois, positive)
    logits = heads.keypoint_logits(features, rois)
    with torch.no_grad():
        image = torch.arange(rois.shape[0], device=rois.device)[:, None]
        cell, found = cells_from_keypoints(truth["keypoints"][image, owner], rois, logits.shape[-1])
        found = found & positive[..., None]
    keypoint = F.cross_entropy(logits.flatten(-2).flatten(0, 2), cell.flatten(), reduction="none")
    return (keypoint * found.flatten()).sum() / share(found.sum().float()).clamp(min=_SMALLEST_COUNT)


def _repeated(rois: Tensor, used: Tensor) -> Tensor:
    """RoIs `[N, S, 4]` whose unused slots, which are the last, repeat the used ones.

    Their losses have no weight, but batch norm in a head takes its statistics from all rows.
    """
    slots = torch.arange(rois.shape[1], device=rois.device)
    return take_rows(rois, slots % used.sum(dim=1, keepdim=True).clamp(min=1))


def _sample_rois(proposals: Tensor, used: Tensor, truth: Truth, loss: LossConfig):
    """RoIs `[N, S, 4]`, their labels, whether positive, whether sampled, and their object's index."""
    # The objects themselves are proposals too (torchvision's add_gt_proposals).
    proposals = torch.cat([proposals, truth["boxes"]], dim=1)
    used = torch.cat([used, truth["valid"]], dim=1)
    picks = []
    for boxes, is_used, truth_boxes, valid, labels, seed in zip(
        proposals,
        used,
        truth["boxes"],
        truth["valid"],
        truth["labels"],
        truth["seeds"],
        strict=True,
    ):
        iou = pairwise_iou(boxes, truth_boxes).masked_fill(~valid, -1.0)
        matched, positive, negative = match_anchors(
            iou,
            valid,
            foreground=loss.box_foreground_iou,
            background=loss.box_foreground_iou,
            keep_best=False,
        )
        index, is_positive, is_sampled = sample_balanced(
            positive & is_used,
            negative & is_used,
            seed + 1,  # another stream than the anchors'
            count=loss.box_samples,
            positive_fraction=loss.box_positive_fraction,
        )
        owner = matched[index]
        label = torch.where(is_positive, labels[owner], torch.zeros_like(owner))
        picks.append((boxes[index], label, is_positive, is_sampled, owner))
    return tuple(torch.stack(x) for x in zip(*picks, strict=True))

"""Losses of the region proposal network and the RoI heads, with fixed shapes.

Every loss is a sum over sampled rows divided by their count. In distributed training, `mean_count` averages each count
over all processes, so that the averaged gradients equal those of one process with the whole batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from maskrcnn.config import LossConfig
from maskrcnn.model import roi_heads, rpn
from maskrcnn.model.boxes import decode_boxes, encode_boxes, take_rows
from maskrcnn.model.targets import mask_targets, match_anchors, sample_balanced

Truth = dict[str, Tensor]
CountMean = Callable[[Tensor], Tensor]
_MIN_COUNT = 1e-3  # avoids 0 / 0 without rows; below the mean count of one row on one of many processes


def identity(count: Tensor) -> Tensor:
    """Return the count unchanged: the mean over a single process."""
    return count


def iou_loss(boxes: Tensor, target: Tensor, kind: str) -> Tensor:
    """1 - IoU of paired boxes, plus the penalty term of `kind`.

    Equal to torchvision's losses of these names, but without boolean indexing.

    Args:
        boxes: `[…, 4]` xyxy with sides of at least zero.
        target: `[…, 4]` with positive sides.
        kind: "iou"; "giou" (Rezatofighi et al. 2019); "diou" or "ciou" (Zheng et al. 2020).

    Returns:
        `[…]`.
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
    kind: str,
    deltas: Tensor,
    target: Tensor,
    references: Tensor,
    weights: tuple[float, float, float, float],
    smooth_l1_beta: float,
) -> Tensor:
    """Regression loss `[…]` of each row.

    Args:
        kind: one of `maskrcnn.config.BOX_LOSSES`; smooth L1 compares deltas, the others decoded boxes.
        deltas: `[…, 4]` predicted, relative to `references`.
        target: `[…, 4]` xyxy with positive sides.
        references: `[…, 4]` xyxy with positive sides.
        weights: factors of the deltas.
        smooth_l1_beta: transition of the loss from quadratic to linear.
    """
    if kind == "smooth_l1":
        goal = encode_boxes(target, references, weights)
        return F.smooth_l1_loss(deltas, goal, beta=smooth_l1_beta, reduction="none").sum(-1)
    return iou_loss(decode_boxes(deltas, references, weights), target, kind)


def focal(cross_entropy: Tensor, gamma: float) -> Tensor:
    """Focal loss (1 - p)^gamma · cross-entropy `[…]`, where p = exp(-cross-entropy) (Lin et al. 2017, equation 4).

    For a sigmoid, this is torchvision's `sigmoid_focal_loss` without alpha.
    """
    # Not below the resolution of p near 1: the gradient of x^gamma at 0 is infinite for gamma below 1.
    miss = (-torch.expm1(-cross_entropy)).clamp(min=torch.finfo(cross_entropy.dtype).tiny)
    return miss**gamma * cross_entropy


def _label_weights(loss: LossConfig, like: Tensor) -> Tensor:
    """Weight of each label, `[1 + classes]`; 1 for background."""
    if isinstance(loss.class_weights, str):
        raise ValueError(f"class weights {loss.class_weights!r}, which training_config replaces by numbers")
    return torch.tensor([1.0, *loss.class_weights.values()], device=like.device)


def rpn_losses(
    network: rpn.RegionProposalNetwork,
    features: list[Tensor],
    anchors: list[Tensor],
    truth: Truth,
    loss: LossConfig,
    mean_count: CountMean,
) -> dict[str, Tensor]:
    """Objectness and box loss of sampled anchors: scalars `objectness` and `rpn_box`.

    Args:
        network: region proposal network.
        features: P2 … P6.
        anchors: `[A_l, 4]` per level.
        truth: see `MaskRCNN.losses`.
        loss: matching and sampling constants.
        mean_count: see the module.
    """
    with torch.no_grad():
        all_anchors = torch.cat(anchors)
        picks = [
            _sample_anchors(all_anchors, boxes, valid, seed, loss)
            for boxes, valid, seed in zip(truth["boxes"], truth["valid"], truth["seeds"], strict=True)
        ]
        index, positive, sampled, target = (torch.stack(x) for x in zip(*picks, strict=True))
    total = mean_count(sampled.sum().float()).clamp(min=_MIN_COUNT)
    logits, deltas = network.at_anchors(features, index)
    objectness = F.binary_cross_entropy_with_logits(logits, positive.float(), reduction="none")
    if loss.objectness_loss == "focal":
        alpha = torch.where(positive, loss.focal_alpha, 1 - loss.focal_alpha)
        objectness = alpha * focal(objectness, loss.focal_gamma)
    box = box_loss(loss.rpn_box_loss, deltas, target, all_anchors[index], rpn.BOX_WEIGHTS, loss.smooth_l1_beta)
    return {
        "objectness": (objectness * sampled).sum() / total,
        "rpn_box": loss.rpn_box_loss_weight * (box * positive).sum() / total,
    }


def _sample_anchors(
    anchors: Tensor, boxes: Tensor, valid: Tensor, seed: Tensor, loss: LossConfig
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sampled anchors of an image: index `[S]`, is positive, is sampled, and target boxes `[S, 4]`."""
    matched, positive, negative = match_anchors(
        anchors, boxes, valid, foreground=loss.rpn_foreground_iou, background=loss.rpn_background_iou
    )
    index, is_positive, is_sampled = sample_balanced(
        positive, negative, seed, count=loss.rpn_samples, positive_fraction=loss.rpn_positive_fraction
    )
    # The box loss of other slots has zero weight; their target only has to be finite.
    return index, is_positive, is_sampled, torch.where(is_positive[:, None], boxes[matched[index]], anchors[index])


def roi_losses(
    heads: roi_heads.RoiHeads,
    features: list[Tensor],
    proposals: Tensor,
    used: Tensor,
    truth: Truth,
    loss: LossConfig,
    mean_count: CountMean,
) -> dict[str, Tensor]:
    """Losses of sampled proposals: scalars `classification`, `box` and, with such heads, `mask` and `keypoint`.

    Args:
        heads: RoI heads.
        features: P2 … P6.
        proposals: `[N, R, 4]`.
        used: bool `[N, R]` mask of used rows.
        truth: see `MaskRCNN.losses`.
        loss: matching and sampling constants.
        mean_count: see the module.
    """
    with torch.no_grad():
        rois, labels, positive, sampled, owner = _sample_rois(proposals, used, truth, loss)
        rois = _fill_unused(rois, sampled)
        # Unsampled slots have zero weight but may contain empty boxes: a unit box keeps their loss finite.
        corner = torch.arange(4, device=rois.device) >= 2
        target = torch.where(positive[..., None], take_rows(truth["boxes"], owner), rois)
        target = torch.where(sampled[..., None], target, corner.to(rois.dtype))
        reference = torch.where(sampled[..., None], rois, corner.to(rois.dtype))
    logits, deltas = heads.classify(features, rois)
    total = mean_count(sampled.sum().float()).clamp(min=_MIN_COUNT)
    classification = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
    if loss.classification_loss == "focal":
        classification = focal(classification, loss.focal_gamma)
    if loss.class_weights != "none":
        # Divided by the number of rows below, not by the sum of weights: a weight keeps its meaning in every batch.
        classification = classification * _label_weights(loss, logits)[labels.flatten()]
    own = deltas.gather(2, labels[..., None, None].expand(-1, -1, 1, 4)).squeeze(2)
    box = box_loss(loss.box_loss, own, target, reference, roi_heads.BOX_WEIGHTS, loss.smooth_l1_beta)
    losses = {
        "classification": (classification * sampled.flatten()).sum() / total,
        "box": loss.box_loss_weight * (box * positive).sum() / total,
    }
    if heads.has_masks or heads.has_keypoints:
        slots = _positive_slots(positive, int(loss.box_samples * loss.box_positive_fraction))
        rois, labels, positive, owner = (x[:, :slots] for x in (rois, labels, positive, owner))
    if heads.has_masks:
        losses["mask"] = _mask_loss(heads, features, rois, labels, positive, owner, truth, loss, mean_count)
    if heads.has_keypoints:
        losses["keypoint"] = _keypoint_loss(heads, features, rois, positive, owner, truth, mean_count)
    return losses


def _positive_slots(positive: Tensor, max_positives: int) -> int:
    """Number of leading slots, which contain the positives, that the mask and keypoint heads process.

    On a CPU in eager mode: the maximum number of positives of an image. Otherwise the fixed maximum, because reading
    the count would synchronise with the GPU or break the compiled graph.
    """
    if positive.device.type != "cpu" or torch.compiler.is_compiling():
        return max_positives
    return min(max(int(positive.sum(dim=1).max()), 1), max_positives)


def _mask_loss(
    heads: roi_heads.RoiHeads,
    features: list[Tensor],
    rois: Tensor,
    labels: Tensor,
    positive: Tensor,
    owner: Tensor,
    truth: Truth,
    loss: LossConfig,
    mean_count: CountMean,
) -> Tensor:
    """Binary cross-entropy of the mask of the RoI's own class (He et al. 2017, section 3)."""
    rois = _fill_unused(rois, positive)
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
        # An all-zero mask means an object without a mask: its RoIs count only in the other losses.
        has_mask = (truth["masks"] != 0).flatten(2).any(dim=-1)
        positive = positive & has_mask.gather(1, owner)
    mask = F.binary_cross_entropy_with_logits(logits, target, reduction="none").mean(dim=(-1, -2))
    return (mask * positive).sum() / mean_count(positive.sum().float()).clamp(min=_MIN_COUNT)


def _keypoint_loss(
    heads: roi_heads.RoiHeads,
    features: list[Tensor],
    rois: Tensor,
    positive: Tensor,
    owner: Tensor,
    truth: Truth,
    mean_count: CountMean,
) -> Tensor:
    """Cross-entropy over the heat map cells of labelled keypoints inside their RoI (He et al. 2017, section 5)."""
    rois = _fill_unused(rois, positive)
    logits = heads.keypoint_logits(features, rois)
    with torch.no_grad():
        image = torch.arange(rois.shape[0], device=rois.device)[:, None]
        cell, found = roi_heads.cells_from_keypoints(truth["keypoints"][image, owner], rois, logits.shape[-1])
        found = found & positive[..., None]
    keypoint = F.cross_entropy(logits.flatten(-2).flatten(0, 2), cell.flatten(), reduction="none")
    return (keypoint * found.flatten()).sum() / mean_count(found.sum().float()).clamp(min=_MIN_COUNT)


def _fill_unused(rois: Tensor, used: Tensor) -> Tensor:
    """RoIs `[N, S, 4]` with the unused trailing slots replaced by repeated used ones.

    Their loss has zero weight, but batch norm in a head computes its statistics over all rows.
    """
    slots = torch.arange(rois.shape[1], device=rois.device)
    return take_rows(rois, slots % used.sum(dim=1, keepdim=True).clamp(min=1))


def _sample_rois(proposals: Tensor, used: Tensor, truth: Truth, loss: LossConfig) -> tuple[Tensor, ...]:
    """RoIs `[N, S, 4]`, their labels, is positive, is sampled, and the index of their object."""
    # The ground-truth boxes are also proposals (torchvision's add_gt_proposals).
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
        matched, positive, negative = match_anchors(
            boxes,
            truth_boxes,
            valid,
            foreground=loss.box_foreground_iou,
            background=loss.box_foreground_iou,
            keep_best=False,
        )
        index, is_positive, is_sampled = sample_balanced(
            positive & is_used,
            negative & is_used,
            seed + 1,  # a random stream separate from the anchors'
            count=loss.box_samples,
            positive_fraction=loss.box_positive_fraction,
        )
        owner = matched[index]
        label = torch.where(is_positive, labels[owner], torch.zeros_like(owner))
        picks.append((boxes[index], label, is_positive, is_sampled, owner))
    return tuple(torch.stack(x) for x in zip(*picks, strict=True))

"""Box and mask heads over a fixed number of RoIs per image."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor

from maskrcnn.config import LossConfig, ModelConfig
from maskrcnn.model.boxes import clip_boxes, decode_boxes, encode_boxes, is_at_least, pairwise_iou, take_rows
from maskrcnn.model.ops import batched_nms, multilevel_roi_align
from maskrcnn.model.sampling import match_anchors, sample_balanced

BOX_WEIGHTS = (10.0, 10.0, 5.0, 5.0)
MIN_SIDE_PX = 1e-2  # torchvision's roi_heads: smaller detections are dropped


class RoiHeads(nn.Module):
    """Classifies and refines proposals, then segments the detections (He et al. 2017, section 3)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        channels, classes = config.fpn_channels, config.num_classes + 1
        self.box_head = TwoMLPHead(channels * config.box_pool_size**2, config.box_head_channels)
        self.box_predictor = FastRCNNPredictor(config.box_head_channels, classes)
        self.mask_head = MaskRCNNHeads(channels, list(config.mask_head_channels), dilation=1)
        last = config.mask_head_channels[-1]
        self.mask_predictor = MaskRCNNPredictor(last, last, classes)

    def _pool(self, features: list[Tensor], rois: Tensor, size: int) -> Tensor:
        """`[N · R, C, size, size]` from the levels P2 … P5 and RoIs `[N, R, 4]`."""
        config = self.config
        pooled = multilevel_roi_align(
            features[: len(config.strides_px)],
            rois,
            output_size=size,
            sampling_ratio=config.pool_sampling_ratio,
            aligned=config.pool_aligned,
        )
        return pooled.flatten(0, 1)

    def classify(self, features: list[Tensor], proposals: Tensor) -> tuple[Tensor, Tensor]:
        """Class logits `[N, R, 1 + C]` and box deltas `[N, R, 1 + C, 4]` of proposals `[N, R, 4]`."""
        batch, count = proposals.shape[:2]
        logits, deltas = self.box_predictor(self.box_head(self._pool(features, proposals, self.config.box_pool_size)))
        classes = self.config.num_classes + 1
        return (
            logits.float().view(batch, count, classes),
            deltas.float().view(batch, count, classes, 4),
        )

    def mask_logits(self, features: list[Tensor], boxes: Tensor, labels: Tensor) -> Tensor:
        """Mask logits `[N, D, 28, 28]` of each box's own class, for boxes `[N, D, 4]`, labels `[N, D]`."""
        pooled = self._pool(features, boxes, self.config.mask_pool_size)
        logits = self.mask_predictor(self.mask_head(pooled)).float()  # [N·D, 1 + C, 28, 28]
        index = labels.reshape(-1, 1, 1, 1).expand(-1, 1, logits.shape[2], logits.shape[3])
        return logits.gather(1, index).squeeze(1).unflatten(0, (labels.shape[0], labels.shape[1]))

    def forward(
        self, features: list[Tensor], proposals: Tensor, used: Tensor, image_sizes: Tensor
    ) -> dict[str, Tensor]:
        """Detections as the contract in docs/architecture.md names them.

        Args:
            features: P2 … P6.
            proposals: `[N, R, 4]`.
            used: bool `[N, R]`, whether a proposal is one.
            image_sizes: int64 `[N, 2]`.
        """
        boxes, scores, labels, count = self._detect(features, proposals, used, image_sizes)
        live = torch.arange(boxes.shape[1], device=boxes.device)[None, :] < count[:, None]
        masks = torch.sigmoid(self._masks_of_live(features, boxes, labels, count)) * live[..., None, None]
        return {
            "num_detections": count,
            "boxes": boxes,
            "scores": scores,
            "labels": labels,
            "masks": masks,
        }

    def _masks_of_live(self, features: list[Tensor], boxes: Tensor, labels: Tensor, count: Tensor) -> Tensor:
        """Mask logits `[N, D, 28, 28]`; on a CPU in eager mode unused rows are not computed but zero.

        Elsewhere all D rows are: reading the count would make a GPU wait, and is no part of an exported graph.
        """
        if boxes.device.type != "cpu" or torch.compiler.is_compiling():
            return self.mask_logits(features, boxes, labels)
        most, rows = int(count.max()), boxes.shape[1]
        logits = self.mask_logits(features, boxes[:, :most], labels[:, :most])
        return F.pad(logits, (0, 0, 0, 0, 0, rows - most))

    def _detect(self, features: list[Tensor], proposals: Tensor, used: Tensor, image_sizes: Tensor):
        config = self.config
        classes, rois = config.num_classes, proposals.shape[1]
        logits, deltas = self.classify(features, proposals)
        scores = F.softmax(logits, dim=-1)[..., 1:]
        scores = scores.masked_fill(~used[..., None] | (scores <= config.score_threshold), -1.0)
        # The best (proposal, class) pairs, decoded, without the degenerate, in order of score.
        candidates = min(config.candidates, rois * classes)
        scores, pair = scores.flatten(1).topk(candidates)
        roi = torch.div(pair, classes, rounding_mode="floor")
        label = pair - roi * classes + 1
        boxes = decode_boxes(
            take_rows(deltas.flatten(1, 2), roi * (classes + 1) + label),
            take_rows(proposals, roi),
            BOX_WEIGHTS,
        )
        boxes = clip_boxes(boxes, image_sizes)
        scores, order = scores.masked_fill(~is_at_least(boxes, MIN_SIDE_PX), -1.0).topk(candidates)
        boxes, label = take_rows(boxes, order), take_rows(label, order)
        kept, count = batched_nms(
            boxes,
            label.to(torch.int32),
            (scores > 0).sum(dim=1).to(torch.int32),
            iou_threshold=config.nms_iou,
            max_output=config.detections,
        )
        kept = kept.to(torch.int64)
        live = torch.arange(config.detections, device=kept.device)[None, :] < count[:, None]
        return (
            take_rows(boxes, kept) * live[..., None],
            take_rows(scores, kept) * live,
            take_rows(label, kept) * live,
            count,
        )

    def losses(self, features: list[Tensor], proposals: Tensor, used: Tensor, truth: dict, loss: LossConfig):
        """Classification, box and mask losses on sampled proposals.

        Args:
            truth: `boxes` `[N, G, 4]`, `labels` int64 `[N, G]`, `valid` bool `[N, G]`, and `masks` uint8
                `[N, G, M, M]`, each object's mask in the frame of its own box.

        Returns:
            scalars (classification, box, mask).
        """
        with torch.no_grad():
            sample = _sample_rois(proposals, used, truth, loss)
        rois, labels, positive, sampled, owner = sample
        logits, deltas = self.classify(features, rois)
        total = sampled.sum().clamp(min=1)
        classification = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
        classification = (classification * sampled.flatten()).sum() / total

        truth_boxes = take_rows(truth["boxes"], owner)
        target_box = torch.where(positive[..., None], truth_boxes, rois)
        target_box = torch.where(sampled[..., None], target_box, target_box.new_tensor([0.0, 0.0, 1.0, 1.0]))
        reference = torch.where(sampled[..., None], rois, rois.new_tensor([0.0, 0.0, 1.0, 1.0]))
        target = encode_boxes(target_box, reference, BOX_WEIGHTS)
        own = deltas.gather(2, labels[..., None, None].expand(-1, -1, 1, 4)).squeeze(2)
        box = F.smooth_l1_loss(own, target, beta=loss.smooth_l1_beta, reduction="none").sum(-1)
        box = (box * positive).sum() / total

        first = int(loss.box_samples * loss.box_positive_fraction)  # positives fill the first slots
        rois, labels, positive, owner = (x[:, :first] for x in (rois, labels, positive, owner))
        logits = self.mask_logits(features, rois, labels)
        with torch.no_grad():
            target = mask_targets(truth["masks"], truth["boxes"], rois, owner, logits.shape[-1])
        mask = F.binary_cross_entropy_with_logits(logits, target, reduction="none").mean(dim=(-1, -2))
        return classification, box, (mask * positive).sum() / positive.sum().clamp(min=1)


def _sample_rois(proposals: Tensor, used: Tensor, truth: dict, loss: LossConfig):
    """RoIs `[N, S, 4]`, their labels, whether positive, whether sampled, and their object's index."""
    # The objects themselves are proposals too (torchvision's add_gt_proposals).
    proposals = torch.cat([proposals, truth["boxes"]], dim=1)
    used = torch.cat([used, truth["valid"]], dim=1)
    picks = []
    for boxes, is_used, truth_boxes, valid, labels in zip(
        proposals, used, truth["boxes"], truth["valid"], truth["labels"], strict=True
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
            count=loss.box_samples,
            positive_fraction=loss.box_positive_fraction,
        )
        owner = matched[index]
        label = torch.where(is_positive, labels[owner], torch.zeros_like(owner))
        picks.append((boxes[index], label, is_positive, is_sampled, owner))
    return tuple(torch.stack(x) for x in zip(*picks, strict=True))


def mask_targets(masks: Tensor, boxes: Tensor, rois: Tensor, owner: Tensor, size: int) -> Tensor:
    """Each RoI's view of its object's mask, float32 `[N, P, size, size]` in [0, 1].

    Args:
        masks: uint8 `[N, G, M, M]`, 0 or 255, each object's mask stretched over its own box.
        boxes: `[N, G, 4]` the objects' boxes.
        rois: `[N, P, 4]`.
        owner: int64 `[N, P]`, each RoI's object.
    """
    batch, side = masks.shape[0], masks.shape[2]
    own = take_rows(boxes, owner)
    frame = (own[..., 2:] - own[..., :2]).clamp(min=1e-3)
    relative = (rois - own[..., :2].repeat(1, 1, 2)) / frame.repeat(1, 1, 2)  # own box = [0, 1]²
    bins = (torch.arange(size, device=rois.device) + 0.5) / size
    x = relative[..., 0, None] + bins * (relative[..., 2] - relative[..., 0])[..., None]
    y = relative[..., 1, None] + bins * (relative[..., 3] - relative[..., 1])[..., None]
    columns, rows = (x * side).floor(), (y * side).floor()  # nearest pixel of the stored mask
    inside = ((rows >= 0) & (rows < side))[..., :, None] & ((columns >= 0) & (columns < side))[..., None, :]
    rows, columns = rows.clamp(0, side - 1).long(), columns.clamp(0, side - 1).long()
    image = torch.arange(batch, device=rois.device)[:, None, None, None]
    sampled = masks[image, owner[..., None, None], rows[..., :, None], columns[..., None, :]]
    return sampled.float() / 255 * inside

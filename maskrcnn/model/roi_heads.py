"""Box and mask heads over a fixed number of RoIs per image."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor

from maskrcnn.config import ModelConfig
from maskrcnn.model.boxes import clip_boxes, decode_boxes, is_at_least, take_rows
from maskrcnn.model.ops import batched_nms, multilevel_roi_align

BOX_WEIGHTS = (10.0, 10.0, 5.0, 5.0)
MIN_SIDE_PX = 1e-2  # torchvision's roi_heads: smaller detections are dropped


class RoiHeads(nn.Module):
    """Classifies and refines proposals, then segments the detections (He et al. 2017, section 3).

    Without a mask head it is the second half of a Faster R-CNN (Ren et al. 2015).
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.has_masks = config.has_masks
        channels, classes = config.fpn_channels, config.num_classes + 1
        self.box_head = _box_head(config)
        self.box_predictor = FastRCNNPredictor(config.box_head_channels, classes)
        if config.has_masks:
            norm = nn.BatchNorm2d if config.head_batch_norm else None
            self.mask_head = MaskRCNNHeads(channels, list(config.mask_head_channels), dilation=1, norm_layer=norm)
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
        found = {"num_detections": count, "boxes": boxes, "scores": scores, "labels": labels}
        if not self.has_masks:
            return found
        live = torch.arange(boxes.shape[1], device=boxes.device)[None, :] < count[:, None]
        masks = torch.sigmoid(self._masks_of_live(features, boxes, labels, count)) * live[..., None, None]
        return found | {"masks": masks}

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


def _box_head(config: ModelConfig) -> nn.Module:
    """What turns pooled features `[R, C, S, S]` into one vector `[R, box_head_channels]` each."""
    channels, side = config.fpn_channels, config.box_pool_size
    if not config.box_head_convolutions:
        return TwoMLPHead(channels * side**2, config.box_head_channels)
    return FastRCNNConvFCHead(
        (channels, side, side),
        list(config.box_head_convolutions),
        [config.box_head_channels],
        norm_layer=nn.BatchNorm2d,
    )

"""Box, mask and keypoint heads over a fixed number of RoIs per image.

Keypoint heat maps divide a RoI into S × S cells (S = 56). A keypoint at (x, y) is in column floor((x - x1) · S / w);
column i is decoded to its centre x1 + (i + 0.5) · w / S (Heckbert 1990; He et al. 2017, section 5).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.keypoint_rcnn import KeypointRCNNHeads, KeypointRCNNPredictor
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor

from maskrcnn.config import ModelConfig
from maskrcnn.errors import UserError
from maskrcnn.model.boxes import clip_boxes, decode_boxes, has_min_side, take_rows
from maskrcnn.model.ops import batched_nms, live_rows
from maskrcnn.model.pooling import multilevel_pool
from maskrcnn.stages import record

BOX_WEIGHTS = (10.0, 10.0, 5.0, 5.0)

# Pixels per axis around the best cell at which a heat map is evaluated: the whole RoI up to 64 px, and at least one
# cell on either side in larger ones.
WINDOW = 64
_CUBIC = -0.75  # coefficient of cubic convolution (Keys 1981) in PyTorch's bicubic interpolation
_MARGIN = 2  # cells on each side of a map that repeat its border


def keypoints_from_heatmaps(logits: Tensor, rois: Tensor) -> Tensor:
    """Most likely pixel of each keypoint, and its score.

    Torchvision upsamples each heat map bicubically to the whole pixels of its RoI and takes the maximum. This function
    finds the best cell first and evaluates the same surface at the same pixels in a fixed window around it, so no shape
    depends on a value. The result differs only if the maximum is outside the window, that is in maps with two peaks of
    nearly equal height, and in RoIs longer than 1764 px, where the window skips pixels.

    Args:
        logits: float32 `[N, D, K, S, S]`.
        rois: `[N, D, 4]` xyxy in pixels; sides shorter than a pixel count as one.

    Returns:
        float32 `[N, D, K, 3]`: x and y of the pixel's centre, and the value of the surface there.

    Source: `torchvision.models.detection.roi_heads.heatmaps_to_keypoints`.
    """
    side = logits.shape[-1]
    sizes = (rois[..., 2:] - rois[..., :2]).clamp(min=1.0)[:, :, None]  # [N, D, 1, 2]: width, height
    pixels = sizes.ceil()
    highest, best = logits.flatten(-2).max(dim=-1)
    row = torch.div(best, side, rounding_mode="floor")
    cell = torch.stack([best - row * side, row], dim=-1).to(rois.dtype)  # [N, D, K, 2]
    window = _window(cell, pixels, side)  # [N, D, K, 2, WINDOW]
    weights = _weights(window, pixels, side).flatten(0, 2)
    # Relative to the best cell, so that reduced-precision products round small differences only.
    below = (logits - highest[..., None, None]).flatten(0, 1)
    padded = F.pad(below, (_MARGIN,) * 4, mode="replicate").flatten(0, 1)
    # In float32: neighbouring pixels would tie in autocast's half precision.
    with torch.autocast(logits.device.type, enabled=False):
        surface = weights[:, 1] @ padded @ weights[:, 0].transpose(-1, -2)  # [N · D · K, WINDOW, WINDOW]
    score, at = surface.flatten(1).max(dim=1)
    row = torch.div(at, WINDOW, rounding_mode="floor")
    index = torch.stack([at - row * WINDOW, row], dim=-1).view(cell.shape)
    pixel = window.gather(-1, index[..., None])[..., 0]
    xy = (pixel + 0.5) * (sizes / pixels) + rois[:, :, None, :2]
    return torch.cat([xy, (highest + score.view(highest.shape))[..., None]], dim=-1)


def _window(cell: Tensor, pixels: Tensor, side: int) -> Tensor:
    """Ascending pixels `[…, WINDOW]` of a RoI around a cell; the last pixel is repeated if the RoI has fewer.

    Args:
        cell: `[…]` index along an axis.
        pixels: `[…]` length of the RoI along that axis.
        side: cells of the map.
    """
    step = (pixels * (2 / side) / (WINDOW - 1)).ceil()  # 1, unless two cells are longer than the window
    reach = step * (WINDOW - 1)
    first = ((cell + 0.5) * (pixels / side) - 0.5 - reach / 2).round()
    first = torch.minimum(first, pixels - 1 - reach).clamp(min=0.0)
    every = torch.arange(WINDOW, device=cell.device, dtype=cell.dtype)
    return torch.minimum(first[..., None] + step[..., None] * every, pixels[..., None] - 1)


def _weights(at: Tensor, pixels: Tensor, side: int) -> Tensor:
    """Bicubic weight of each cell, margins included, at each pixel: `[…, WINDOW, side + 2 · _MARGIN]`.

    Args:
        at: `[…, WINDOW]` pixels of a RoI along an axis.
        pixels: `[…]` length of the RoI.
        side: cells of the map, which spans the RoI.
    """
    position = (at + 0.5) * (side / pixels[..., None]) - 0.5  # cell i lies at i
    cells = torch.arange(-_MARGIN, side + _MARGIN, device=at.device, dtype=at.dtype)
    distance = (position[..., None] - cells).abs()
    # Each of the two pieces of the kernel is zero on the interval of the other.
    near, far = distance.clamp(max=1.0), distance.clamp(min=1.0, max=2.0)
    inner = (1 - near) * (1 + near - (_CUBIC + 2) * near * near)
    return inner + _CUBIC * (far - 1) * (far - 2) * (far - 2)


def cells_from_keypoints(keypoints: Tensor, rois: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """Heat map cell of each keypoint.

    Args:
        keypoints: `[…, K, 3]`: x, y in pixels, and visibility; 0 is unlabelled.
        rois: `[…, 4]` xyxy in pixels, right and bottom edge inclusive.
        side: S, cells of the map along an axis.

    Returns:
        int64 `[…, K]` row · S + column, 0 without a cell; and bool `[…, K]`, labelled and inside the RoI.

    Source: `torchvision.models.detection.roi_heads.keypoints_to_heatmap`.
    """
    rois = rois[..., None, :]
    size = rois[..., 2:] - rois[..., :2]
    cell = ((keypoints[..., :2] - rois[..., :2]) * (side / size)).floor()
    cell = torch.where(keypoints[..., :2] == rois[..., 2:], float(side - 1), cell)
    found = ((cell >= 0) & (cell < side)).all(dim=-1) & (keypoints[..., 2] > 0)
    index = torch.where(found, cell[..., 1] * side + cell[..., 0], 0.0)
    return index.to(torch.int64), found


class RoiHeads(nn.Module):
    """Classifies and refines proposals, then predicts masks and keypoints of the detections (He et al. 2017).

    Without masks and keypoints, the second stage of Faster R-CNN (Ren et al. 2015).

    Raises:
        UserError: for a keypoint head without keypoint names.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.has_masks, self.has_keypoints = config.has_masks, config.has_keypoints
        channels, classes = config.fpn_channels, config.num_classes + 1
        self.box_head = _box_head(config)
        self.box_predictor = FastRCNNPredictor(config.box_head_channels, classes)
        if config.has_masks:
            norm = nn.BatchNorm2d if config.head_batch_norm else None
            self.mask_head = MaskRCNNHeads(channels, list(config.mask_head_channels), dilation=1, norm_layer=norm)
            last = config.mask_head_channels[-1]
            self.mask_predictor = MaskRCNNPredictor(last, last, classes)
        if config.has_keypoints:
            if not config.keypoint_names:
                raise UserError(
                    "model.has_keypoints=true without keypoint names",
                    "one entry of model.keypoint_names per keypoint (training takes them from the dataset)",
                    "set model.keypoint_names, or model.has_keypoints=false",
                )
            self.keypoint_head = KeypointRCNNHeads(channels, config.keypoint_head_channels)
            self.keypoint_predictor = KeypointRCNNPredictor(
                config.keypoint_head_channels[-1], len(config.keypoint_names)
            )

    def _pool(self, features: list[Tensor], rois: Tensor, size: int) -> Tensor:
        """Pool RoIs `[N, R, 4]` from the levels P2 … P5: `[N, R, C, size, size]`."""
        config = self.config
        return multilevel_pool(
            features[: len(config.strides_px)],
            rois,
            method=config.pool_method,
            output_size=size,
            sampling_ratio=config.pool_sampling_ratio,
            aligned=config.pool_aligned,
        )

    def classify(
        self, features: list[Tensor], proposals: Tensor, stages: dict[str, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Class logits `[N, R, 1 + C]` and box deltas `[N, R, 1 + C, 4]` of proposals `[N, R, 4]`."""
        batch, count = proposals.shape[:2]
        pooled = self._pool(features, proposals, self.config.box_pool_size)
        logits, deltas = self.box_predictor(self.box_head(pooled.flatten(0, 1)))
        classes = self.config.num_classes + 1
        logits, deltas = logits.float().view(batch, count, classes), deltas.float().view(batch, count, classes, 4)
        record(stages, box_features=pooled, class_logits=logits, box_deltas=deltas)
        return logits, deltas

    def mask_logits(
        self, features: list[Tensor], boxes: Tensor, labels: Tensor, stages: dict[str, Tensor] | None = None
    ) -> Tensor:
        """Mask logits `[N, D, 28, 28]` of the class `labels` `[N, D]` of each box `[N, D, 4]`."""
        pooled = self._pool(features, boxes, self.config.mask_pool_size)
        logits = self.mask_predictor(self.mask_head(pooled.flatten(0, 1))).float()  # [N·D, 1 + C, 28, 28]
        index = labels.reshape(-1, 1, 1, 1).expand(-1, 1, logits.shape[2], logits.shape[3])
        logits = logits.gather(1, index).squeeze(1).unflatten(0, (labels.shape[0], labels.shape[1]))
        record(stages, mask_features=pooled, mask_logits=logits)
        return logits

    def keypoint_logits(self, features: list[Tensor], boxes: Tensor, stages: dict[str, Tensor] | None = None) -> Tensor:
        """Heat map logits `[N, D, K, 56, 56]` of boxes `[N, D, 4]`, shared by all classes."""
        pooled = self._pool(features, boxes, self.config.keypoint_pool_size)
        logits = self.keypoint_predictor(self.keypoint_head(pooled.flatten(0, 1))).float()
        logits = logits.unflatten(0, (boxes.shape[0], boxes.shape[1]))
        record(stages, keypoint_features=pooled, keypoint_logits=logits)
        return logits

    def forward(
        self,
        features: list[Tensor],
        proposals: Tensor,
        used: Tensor,
        image_sizes: Tensor,
        stages: dict[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """Detect objects among proposals; returns the tensors that `MaskRCNN.forward` describes.

        Args:
            features: P2 … P6.
            proposals: `[N, R, 4]`.
            used: bool `[N, R]` mask of used rows.
            image_sizes: int64 `[N, 2]`.
            stages: see `MaskRCNN.forward`.
        """
        logits, deltas = self.classify(features, proposals, stages)
        boxes, scores, labels, count = self._detect(logits, deltas, proposals, used, image_sizes)
        found = {"num_detections": count, "boxes": boxes, "scores": scores, "labels": labels}
        record(stages, **found)
        if self.has_masks or self.has_keypoints:
            rois, own = live_rows(boxes, labels, count)
        if self.has_masks:
            logits = self.mask_logits(features, rois, own, stages)
            found["masks"] = _all_rows(torch.sigmoid(logits), found)
            record(stages, masks=found["masks"])
        if self.has_keypoints:
            logits = self.keypoint_logits(features, rois, stages)
            found["keypoints"] = _all_rows(keypoints_from_heatmaps(logits, rois), found)
            record(stages, keypoints=found["keypoints"])
        return found

    def _detect(
        self, logits: Tensor, deltas: Tensor, proposals: Tensor, used: Tensor, image_sizes: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Boxes `[N, D, 4]`, scores and labels `[N, D]`, and their count `[N]`, after per-class NMS."""
        config = self.config
        classes, rois = config.num_classes, proposals.shape[1]
        scores = F.softmax(logits, dim=-1)[..., 1:]
        scores = scores.masked_fill(~(used[..., None] & (scores > config.score_threshold)), -1.0)
        # Select the best (proposal, class) pairs, decode them, drop degenerate boxes and sort by score.
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
        scores, order = scores.masked_fill(~has_min_side(boxes, config.detection_min_side_px), -1.0).topk(candidates)
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
            take_rows(boxes, kept).masked_fill(~live[..., None], 0.0),
            take_rows(scores, kept).masked_fill(~live, 0.0),
            take_rows(label, kept) * live,
            count,
        )


def _all_rows(values: Tensor, found: dict[str, Tensor]) -> Tensor:
    """Pad values `[N, L, a, b]` of the first L rows to `[N, D, a, b]`; rows past the detections are zero."""
    rows = found["boxes"].shape[1]
    live = torch.arange(rows, device=values.device)[None, :] < found["num_detections"][:, None]
    values = F.pad(values, (0, 0, 0, 0, 0, rows - values.shape[1]))
    return values.masked_fill(~live[..., None, None], 0.0)


def _box_head(config: ModelConfig) -> nn.Module:
    """Layers from pooled features `[R, C, S, S]` to vectors `[R, box_head_channels]`."""
    channels, side = config.fpn_channels, config.box_pool_size
    if not config.box_head_convolutions:
        return TwoMLPHead(channels * side**2, config.box_head_channels)
    return FastRCNNConvFCHead(
        (channels, side, side),
        list(config.box_head_convolutions),
        [config.box_head_channels],
        norm_layer=nn.BatchNorm2d,
    )

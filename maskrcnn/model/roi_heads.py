"""Box, mask and keypoint heads over a fixed number of RoIs per image."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.keypoint_rcnn import KeypointRCNNHeads, KeypointRCNNPredictor
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor

from maskrcnn.config import ModelConfig
from maskrcnn.errors import UserError
from maskrcnn.model.boxes import clip_boxes, decode_boxes, is_at_least, take_rows
from maskrcnn.model.ops import batched_nms, live_rows
from maskrcnn.model.pooling import multilevel_pool
from maskrcnn.stages import record

# Keypoints and heat maps: where a map says that a keypoint is, and which cell a keypoint is in.
#
# A RoI is divided into S × S cells (S = 56). A keypoint at (x, y) lies in column floor((x - x1) · S / w), and what is
# found in column i lies at x1 + (i + 0.5) · w / S, its middle (Heckbert 1990; He et al. 2017, section 5).

# Pixels along an axis, around its best cell, at which a map is evaluated: all of a RoI of up to 64 px, so every one
# that has fewer pixels than the map has cells, and in larger ones at least one cell to either side.
WINDOW = 64
_CUBIC = -0.75  # of the kernel of cubic convolution (Keys 1981), as PyTorch's bicubic interpolation has it
_MARGIN = 2  # cells on each side of a map that repeat its border


def keypoints_from_heatmaps(logits: Tensor, rois: Tensor) -> Tensor:
    """The most likely pixel of each keypoint, and its score.

    Torchvision stretches each map bicubically over the whole pixels of its RoI and takes the best of them. Here the
    best cell is found first, and the same surface is then evaluated at the same pixels in a window around that cell:
    no shape depends on a value. Another pixel comes out where the pixel that beats all others is farther from the
    best cell than the window reaches, thus only where a map has two peaks of about the same height; and in RoIs of
    more than 1764 px, where not every pixel is looked at.

    Args:
        logits: float32 `[N, D, K, S, S]`.
        rois: `[N, D, 4]` xyxy in pixels; a side of less than a pixel counts as one.

    Returns:
        float32 `[N, D, K, 3]`: x and y of the pixel's middle, and the surface's value there.

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
    # Relative to the best cell, so that a device that rounds products errs by a share of small differences.
    below = (logits - highest[..., None, None]).flatten(0, 1)
    padded = F.pad(below, (_MARGIN,) * 4, mode="replicate").flatten(0, 1)
    # Autocast would do these in half precision, in which neighbouring pixels tie.
    with torch.autocast(logits.device.type, enabled=False):
        surface = weights[:, 1] @ padded @ weights[:, 0].transpose(-1, -2)  # [N · D · K, WINDOW, WINDOW]
    score, at = surface.flatten(1).max(dim=1)
    row = torch.div(at, WINDOW, rounding_mode="floor")
    index = torch.stack([at - row * WINDOW, row], dim=-1).view(cell.shape)
    pixel = window.gather(-1, index[..., None])[..., 0]
    xy = (pixel + 0.5) * (sizes / pixels) + rois[:, :, None, :2]
    return torch.cat([xy, (highest + score.view(highest.shape))[..., None]], dim=-1)


def _window(cell: Tensor, pixels: Tensor, side: int) -> Tensor:
    """Pixels `[…, WINDOW]` of a RoI around a cell, in ascending order, and the last one again where it has fewer.

    Args:
        cell: `[…]` along an axis, from 0.
        pixels: `[…]` of the RoI along that axis.
        side: cells of the map.
    """
    step = (pixels * (2 / side) / (WINDOW - 1)).ceil()  # 1, unless two cells are longer than the window
    reach = step * (WINDOW - 1)
    first = ((cell + 0.5) * (pixels / side) - 0.5 - reach / 2).round()
    first = torch.minimum(first, pixels - 1 - reach).clamp(min=0.0)
    every = torch.arange(WINDOW, device=cell.device, dtype=cell.dtype)
    return torch.minimum(first[..., None] + step[..., None] * every, pixels[..., None] - 1)


def _weights(at: Tensor, pixels: Tensor, side: int) -> Tensor:
    """The weight of each cell of a map with margins in the value at a pixel, `[…, WINDOW, side + 2 margins]`.

    Args:
        at: `[…, WINDOW]` pixels of a RoI along an axis.
        pixels: `[…]` of the RoI.
        side: cells of the map, which the pixels cover as well.
    """
    position = (at + 0.5) * (side / pixels[..., None]) - 0.5  # cell i lies at i
    cells = torch.arange(-_MARGIN, side + _MARGIN, device=at.device, dtype=at.dtype)
    distance = (position[..., None] - cells).abs()
    # Each of the kernel's two pieces is zero where the other one begins or ends.
    near, far = distance.clamp(max=1.0), distance.clamp(min=1.0, max=2.0)
    inner = (1 - near) * (1 + near - (_CUBIC + 2) * near * near)
    return inner + _CUBIC * (far - 1) * (far - 2) * (far - 2)


def cells_from_keypoints(keypoints: Tensor, rois: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """The cell of each keypoint in the heat map of its RoI.

    Args:
        keypoints: `[…, K, 3]`: x, y in pixels, and visibility; 0 is unlabelled.
        rois: `[…, 4]` xyxy in pixels. Right and bottom edge are part of it.
        side: S, cells of the map along an axis.

    Returns:
        int64 `[…, K]` row · S + column, 0 for what has none; bool `[…, K]`, whether it is labelled and in the RoI.

    Source: `torchvision.models.detection.roi_heads.keypoints_to_heatmap`.
    """
    rois = rois[..., None, :]
    size = rois[..., 2:] - rois[..., :2]
    cell = ((keypoints[..., :2] - rois[..., :2]) * (side / size)).floor()
    cell = torch.where(keypoints[..., :2] == rois[..., 2:], float(side - 1), cell)
    found = ((cell >= 0) & (cell < side)).all(dim=-1) & (keypoints[..., 2] > 0)
    index = torch.where(found, cell[..., 1] * side + cell[..., 0], 0.0)
    return index.to(torch.int64), found


BOX_WEIGHTS = (10.0, 10.0, 5.0, 5.0)


class RoiHeads(nn.Module):
    """Classifies and refines proposals, then segments the detections and finds keypoints (He et al. 2017).

    Without masks and keypoints it is the second half of a Faster R-CNN (Ren et al. 2015).

    Raises:
        UserError: for a keypoint head without names of keypoints.
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
            count = _keypoint_count(config)
            self.keypoint_head = KeypointRCNNHeads(channels, config.keypoint_head_channels)
            self.keypoint_predictor = KeypointRCNNPredictor(config.keypoint_head_channels[-1], count)

    def _pool(self, features: list[Tensor], rois: Tensor, size: int) -> Tensor:
        """`[N, R, C, size, size]` from the levels P2 … P5 and RoIs `[N, R, 4]`."""
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
        """Mask logits `[N, D, 28, 28]` of each box's own class, for boxes `[N, D, 4]`, labels `[N, D]`."""
        pooled = self._pool(features, boxes, self.config.mask_pool_size)
        logits = self.mask_predictor(self.mask_head(pooled.flatten(0, 1))).float()  # [N·D, 1 + C, 28, 28]
        index = labels.reshape(-1, 1, 1, 1).expand(-1, 1, logits.shape[2], logits.shape[3])
        logits = logits.gather(1, index).squeeze(1).unflatten(0, (labels.shape[0], labels.shape[1]))
        record(stages, mask_features=pooled, mask_logits=logits)
        return logits

    def keypoint_logits(self, features: list[Tensor], boxes: Tensor, stages: dict[str, Tensor] | None = None) -> Tensor:
        """Heat maps `[N, D, K, 56, 56]`, logits of each keypoint's cell, for boxes `[N, D, 4]` of any class."""
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
        """Detections as the contract in docs/architecture.md names them.

        Args:
            features: P2 … P6.
            proposals: `[N, R, 4]`.
            used: bool `[N, R]`, whether a proposal is one.
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

    def _detect(self, logits: Tensor, deltas: Tensor, proposals: Tensor, used: Tensor, image_sizes: Tensor):
        config = self.config
        classes, rois = config.num_classes, proposals.shape[1]
        scores = F.softmax(logits, dim=-1)[..., 1:]
        scores = scores.masked_fill(~(used[..., None] & (scores > config.score_threshold)), -1.0)
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
        scores, order = scores.masked_fill(~is_at_least(boxes, config.detection_min_side_px), -1.0).topk(candidates)
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
    """Values `[N, L, a, b]` of live rows as `[N, D, a, b]`, zero in the rows of an image that are no detections."""
    rows = found["boxes"].shape[1]
    live = torch.arange(rows, device=values.device)[None, :] < found["num_detections"][:, None]
    values = F.pad(values, (0, 0, 0, 0, 0, rows - values.shape[1]))
    return values.masked_fill(~live[..., None, None], 0.0)


def _keypoint_count(config: ModelConfig) -> int:
    if not config.keypoint_names:
        raise UserError(
            "model.has_keypoints=true without names of keypoints",
            "as many model.keypoint_names as there are keypoints; training takes them from the data",
            "set model.keypoint_names, or model.has_keypoints=false",
        )
    return len(config.keypoint_names)


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

"""Region proposal network: a fixed number of proposals per image from feature maps."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection.rpn import RPNHead

from maskrcnn.config import ModelConfig
from maskrcnn.model.boxes import clip_boxes, decode_boxes, has_min_side, take_rows
from maskrcnn.model.ops import batched_nms
from maskrcnn.stages import LEVELS

BOX_WEIGHTS = (1.0, 1.0, 1.0, 1.0)
# Logit of padding: the lowest number in half precision. TopK of several GPU libraries returns wrong indices if the K-th
# value is infinite (onnxruntime#9843).
_PADDING = -65504.0


def cell_anchors(size_px: float, aspect_ratios: tuple[float, ...], *, rounded: bool = True) -> Tensor:
    """Anchors `[A, 4]` centred at the origin with area size_px², one per aspect ratio (height / width).

    Corners are rounded to whole pixels as in torchvision's `AnchorGenerator`, or not (`rounded=False`) as in
    Detectron2.
    """
    root = torch.sqrt(torch.tensor(aspect_ratios, dtype=torch.float32))
    width, height = size_px / root, size_px * root
    corners = torch.stack([-width, -height, width, height], dim=1) / 2
    return corners.round() if rounded else corners


def grid_anchors(cells: Tensor, feature: Tensor, images: Tensor, stride_px: int | None = None) -> Tensor:
    """Anchors `[H_l · W_l · A, 4]` of one level in row-major order, the A anchors of a cell innermost.

    Args:
        cells: `[A, 4]` from `cell_anchors`.
        feature: `[N, C, H_l, W_l]`, read for its shape.
        images: `[N, 3, H, W]`, read for its shape.
        stride_px: distance between cells (default: H // H_l and W // W_l as in torchvision, which is not a power of
            two at P6 if the padded image is not a multiple of 64).
    """
    rows, columns = feature.shape[-2], feature.shape[-1]
    y = torch.arange(rows, device=feature.device) * (stride_px or images.shape[-2] // rows)
    x = torch.arange(columns, device=feature.device) * (stride_px or images.shape[-1] // columns)
    y, x = y[:, None].expand(rows, columns), x[None, :].expand(rows, columns)
    shifts = torch.stack([x, y, x, y], dim=-1).to(torch.float32)
    return (shifts[:, :, None, :] + cells.to(feature.device)).reshape(-1, 4)


class _RpnOutput(NamedTuple):
    """Anchors of all levels and the outputs of the head for them."""

    anchors: list[Tensor]  # per level [A_l, 4]
    logits: list[Tensor]  # per level [N, A_l]
    deltas: list[Tensor]  # per level [N, A_l, 4]

    def stages(self) -> dict[str, Tensor]:
        """The outputs of the head under the names of `maskrcnn.stages`."""
        named = {"objectness": self.logits, "anchor_deltas": self.deltas}
        return {
            f"{name}_{level}": value
            for name, values in named.items()
            for level, value in zip(LEVELS, values, strict=True)
        }


class RegionProposalNetwork(nn.Module):
    """Scores anchors and selects the best ones by NMS (Ren et al. 2015)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        ratios = config.anchor_aspect_ratios
        self.head = RPNHead(config.fpn_channels, len(ratios), conv_depth=config.rpn_convolutions)
        for level, size in enumerate(config.anchor_sizes_px):
            cells = cell_anchors(size, ratios, rounded=config.anchors_rounded)
            self.register_buffer(f"cells_{level}", cells, persistent=False)

    def forward(self, features: list[Tensor], images: Tensor) -> _RpnOutput:
        """Anchors and head outputs for `features`, per level `[N, C, H_l, W_l]`."""
        logits, deltas = self.head(features)
        return _RpnOutput(
            self.anchors(features, images),
            [x.permute(0, 2, 3, 1).flatten(1).float() for x in logits],
            # [N, A·4, H, W] → [N, H·W·A, 4]
            [x.permute(0, 2, 3, 1).flatten(1).unflatten(1, (-1, 4)).float() for x in deltas],
        )

    def anchors(self, features: list[Tensor], images: Tensor) -> list[Tensor]:
        """Anchors `[A_l, 4]` of each level; only the shapes of features and images are read."""
        strides = self.config.anchor_strides_px or (None,) * len(features)
        return [
            grid_anchors(getattr(self, f"cells_{level}"), feature, images, stride_px)
            for level, (feature, stride_px) in enumerate(zip(features, strides, strict=True))
        ]

    def at_anchors(self, features: list[Tensor], index: Tensor) -> tuple[Tensor, Tensor]:
        """Head outputs at selected anchors: logits `[N, S]` and deltas `[N, S, 4]`.

        Equal to `forward`, but the head runs only on the receptive fields of these anchors, so that gradients of a loss
        on a few hundred anchors are cheap.

        Args:
            features: P2 … P6.
            index: int64 `[N, S]` into the concatenated anchors of all levels.
        """
        convolutions = [block[0] for block in self.head.conv]
        per_cell = len(self.config.anchor_aspect_ratios)
        values, inside = _neighbourhoods(features, torch.div(index, per_cell, rounding_mode="floor"), len(convolutions))
        for convolution in convolutions:
            # Zero everything outside the map before every convolution, as its padding does.
            values = F.relu(F.conv2d(values * inside, convolution.weight, convolution.bias))
            inside = inside[:, :, 1:-1, 1:-1]
        anchor = (index % per_cell).flatten()[:, None]
        logits = self.head.cls_logits(values).flatten(1).float().gather(1, anchor)
        deltas = self.head.bbox_pred(values).flatten(1).float().unflatten(1, (per_cell, 4))
        deltas = deltas.gather(1, anchor[..., None].expand(-1, 1, 4))
        return logits.view(index.shape), deltas.view(*index.shape, 4)

    def proposals(self, output: _RpnOutput, image_sizes: Tensor) -> tuple[Tensor, Tensor]:
        """Select the proposals of each image.

        Returns:
            boxes `[N, R, 4]` by descending objectness, clipped to the image, zero in unused rows; and a bool mask
            `[N, R]` of used rows.
        """
        config = self.config
        candidates = config.rpn_candidates_per_level
        num_proposals = config.proposals
        if self.training:
            candidates, num_proposals = config.rpn_candidates_per_level_training, config.proposals_training
        levels = [_best(*level, candidates) for level in zip(*output, strict=True)]
        anchors, logits, deltas = (torch.stack(values, dim=1) for values in zip(*levels, strict=True))
        batch, depth = logits.shape[:2]  # [N, L, K]
        boxes = clip_boxes(decode_boxes(deltas, anchors, BOX_WEIGHTS).flatten(1, 2), image_sizes)
        boxes = boxes.unflatten(1, (depth, candidates))
        # Padding and degenerate boxes form a separate group, so they suppress nothing; they are dropped afterwards.
        usable = has_min_side(boxes, config.proposal_min_side_px) & (logits > _PADDING)
        scores = torch.sigmoid(logits).masked_fill(~usable, -1.0)
        boxes, usable = boxes.flatten(0, 1), usable.flatten(0, 1)
        kept, kept_counts = batched_nms(
            boxes,
            (~usable).to(torch.int32),
            torch.full_like(boxes[:, 0, 0], candidates).to(torch.int32),
            iou_threshold=config.rpn_nms_iou,
            max_output=candidates,
        )
        kept = kept.to(torch.int64)
        past_end = torch.arange(candidates, device=kept.device)[None, :] >= kept_counts[:, None]
        scores = take_rows(scores.flatten(0, 1), kept).masked_fill(past_end, -1.0)
        boxes = take_rows(boxes, kept).unflatten(0, (batch, depth)).flatten(1, 2)
        scores, order = scores.unflatten(0, (batch, depth)).flatten(1).topk(min(num_proposals, depth * candidates))
        used = scores >= 0
        return take_rows(boxes, order).masked_fill(~used[..., None], 0.0), used


def _best(anchors: Tensor, logits: Tensor, deltas: Tensor, candidates: int) -> tuple[Tensor, Tensor, Tensor]:
    """Anchors `[N, K, 4]`, logits `[N, K]` and deltas `[N, K, 4]` of the best anchors of a level.

    A level may have fewer than K anchors: padding keeps K constant for every image size.
    """
    logits, index = F.pad(logits, (0, candidates), value=_PADDING).topk(candidates)
    index = index.clamp(0, anchors.shape[0] - 1)
    return anchors[index], logits, take_rows(deltas, index)


def _neighbourhoods(features: list[Tensor], cells: Tensor, radius: int) -> tuple[Tensor, Tensor]:
    """Square neighbourhoods of feature map cells, as seen by a padded convolution.

    Args:
        features: levels `[N, C, H_l, W_l]`.
        cells: int64 `[N, S]` into the concatenated cells of all levels, in row-major order.
        radius: r, cells on each side.

    Returns:
        values `[N · S, C, 2r + 1, 2r + 1]`, arbitrary but finite outside the map; and a bool mask of the cells inside
        the map, `[N · S, 1, 2r + 1, 2r + 1]`.
    """
    offsets = torch.arange(-radius, radius + 1, device=cells.device)
    image = torch.arange(cells.shape[0], device=cells.device)[:, None, None, None]
    values = features[0].new_zeros(())
    inside = torch.zeros((), dtype=torch.bool, device=cells.device)
    first = 0
    for feature in features:
        height, width = feature.shape[2:]
        cell = cells - first
        in_level = ((cell >= 0) & (cell < height * width))[..., None, None]
        cell = cell.clamp(0, height * width - 1)
        row = (torch.div(cell, width, rounding_mode="floor")[..., None] + offsets)[..., None]
        column = (cell % width)[..., None, None] + offsets
        within = (row >= 0) & (row < height) & (column >= 0) & (column < width) & in_level
        index = (image * height + row.clamp(0, height - 1)) * width + column.clamp(0, width - 1)
        table = feature.permute(0, 2, 3, 1).reshape(-1, feature.shape[1])
        values = values + F.embedding(index, table) * within[..., None]  # non-zero for one level only
        inside = inside | within
        first += height * width
    return values.flatten(0, 1).permute(0, 3, 1, 2), inside.flatten(0, 1)[:, None]

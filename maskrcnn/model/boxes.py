"""Box arithmetic. Boxes are float32 xyxy in pixels unless stated otherwise."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_MAX_LOG_SCALE = math.log(1000.0 / 16)  # a decoded side is at most 62.5 times the reference's (torchvision)


def decode_boxes(deltas: Tensor, references: Tensor, weights: tuple[float, float, float, float]) -> Tensor:
    """Apply regression deltas to reference boxes (Girshick et al. 2014, appendix C).

    Args:
        deltas: `[…, 4]` (dx, dy, dw, dh), scaled by `weights`.
        references: `[…, 4]` anchors or proposals.
        weights: factors that `encode_boxes` applied.
    """
    width, height = references[..., 2] - references[..., 0], references[..., 3] - references[..., 1]
    centre_x, centre_y = references[..., 0] + 0.5 * width, references[..., 1] + 0.5 * height
    dx, dy = deltas[..., 0] / weights[0], deltas[..., 1] / weights[1]
    dw = (deltas[..., 2] / weights[2]).clamp(max=_MAX_LOG_SCALE)
    dh = (deltas[..., 3] / weights[3]).clamp(max=_MAX_LOG_SCALE)
    centre_x, centre_y = dx * width + centre_x, dy * height + centre_y
    half_width, half_height = 0.5 * torch.exp(dw) * width, 0.5 * torch.exp(dh) * height
    return torch.stack(
        [centre_x - half_width, centre_y - half_height, centre_x + half_width, centre_y + half_height], dim=-1
    )


def encode_boxes(boxes: Tensor, references: Tensor, weights: tuple[float, float, float, float]) -> Tensor:
    """Deltas `[…, 4]` from `references` to `boxes`, the inverse of `decode_boxes`. Sides must be positive."""
    reference_size = references[..., 2:] - references[..., :2]
    size = boxes[..., 2:] - boxes[..., :2]
    shift = (boxes[..., :2] + boxes[..., 2:] - references[..., :2] - references[..., 2:]) * 0.5 / reference_size
    scale = torch.log(size / reference_size)
    deltas = torch.cat([shift, scale], dim=-1).unbind(-1)
    return torch.stack([delta * weight for delta, weight in zip(deltas, weights, strict=True)], dim=-1)


def clip_boxes(boxes: Tensor, image_sizes: Tensor) -> Tensor:
    """Clip boxes `[N, K, 4]` to their images; `image_sizes` is `[N, 2]` (height, width)."""
    height, width = image_sizes[:, 0, None].to(boxes.dtype), image_sizes[:, 1, None].to(boxes.dtype)
    limit = torch.stack([width, height, width, height], dim=-1)
    return torch.minimum(boxes.clamp(min=0.0), limit)


def has_min_side(boxes: Tensor, min_side_px: float) -> Tensor:
    """Whether both sides of each box `[…, 4]` are at least `min_side_px` long; 0 requires a positive area."""
    width, height = boxes[..., 2] - boxes[..., 0], boxes[..., 3] - boxes[..., 1]
    if min_side_px == 0:
        return (width > 0) & (height > 0)
    return (width >= min_side_px) & (height >= min_side_px)


def pairwise_iou(first: Tensor, second: Tensor) -> Tensor:
    """IoU `[…, A, B]` of boxes `[…, A, 4]` and `[…, B, 4]`; zero where both areas are zero. Not differentiable."""
    overlap = _axis_overlap(first, second, 0).mul_(_axis_overlap(first, second, 1))  # no `[…, A, B, 2]` temporaries
    first_area = (first[..., 2:] - first[..., :2]).prod(dim=-1)
    second_area = (second[..., 2:] - second[..., :2]).prod(dim=-1)
    union = (first_area[..., :, None] + second_area[..., None, :]).sub_(overlap)
    return overlap.div_(union.clamp_(min=1e-9))


def _axis_overlap(first: Tensor, second: Tensor, axis: int) -> Tensor:
    """Length `[…, A, B]` of the overlaps along an axis, 0 where there is none."""
    start = torch.maximum(first[..., :, None, axis], second[..., None, :, axis])
    return torch.minimum(first[..., :, None, axis + 2], second[..., None, :, axis + 2]).sub_(start).clamp_(min=0)


def take_rows(values: Tensor, index: Tensor) -> Tensor:
    """`values[n, index[n, k]]` for `values` `[N, K]` or `[N, K, d]` and `index` int64 `[N, k]`."""
    if values.dim() == 2:
        return values.gather(1, index)
    return values.gather(1, index[..., None].expand(-1, -1, values.shape[2]))

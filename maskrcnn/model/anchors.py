"""Anchor boxes, computed from the shapes of the feature maps."""

from __future__ import annotations

import torch
from torch import Tensor


def cell_anchors(size_px: float, aspect_ratios: tuple[float, ...], *, rounded: bool = True) -> Tensor:
    """Anchors `[A, 4]` around the origin, one per aspect ratio (height / width), all of area size_px².

    Corners are rounded to whole pixels as torchvision's `AnchorGenerator` does; without `rounded` they stay where
    they are, as Detectron2's do.
    """
    root = torch.sqrt(torch.tensor(aspect_ratios, dtype=torch.float32))
    width, height = size_px / root, size_px * root
    corners = torch.stack([-width, -height, width, height], dim=1) / 2
    return corners.round() if rounded else corners


def grid_anchors(cells: Tensor, feature: Tensor, images: Tensor, stride_px: int | None = None) -> Tensor:
    """Anchors `[H_l · W_l · A, 4]` of one level in row-major order, the cell's A anchors innermost.

    Args:
        cells: `[A, 4]` from `cell_anchors`.
        feature: `[N, C, H_l, W_l]`, read for its shape.
        images: `[N, 3, H, W]`, read for its shape.
        stride_px: distance between cells; by default H // H_l and W // W_l as in torchvision, which differs from a
            power of two at P6 when the padded image is not a multiple of 64.
    """
    rows, columns = feature.shape[-2], feature.shape[-1]
    y = torch.arange(rows, device=feature.device) * (stride_px or images.shape[-2] // rows)
    x = torch.arange(columns, device=feature.device) * (stride_px or images.shape[-1] // columns)
    y, x = y[:, None].expand(rows, columns), x[None, :].expand(rows, columns)
    shifts = torch.stack([x, y, x, y], dim=-1).to(torch.float32)
    return (shifts[:, :, None, :] + cells.to(feature.device)).reshape(-1, 4)

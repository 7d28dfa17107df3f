"""Keypoints and heat maps: where a map says that a keypoint is, and which cell a keypoint is in.

A RoI is divided into S × S cells (S = 56). A keypoint at (x, y) lies in column floor((x - x1) · S / w), and what is
found in column i lies at x1 + (i + 0.5) · w / S, its middle (Heckbert 1990; He et al. 2017, section 5).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

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

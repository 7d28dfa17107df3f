"""RoI pooling methods, each at the RoI's own pyramid level, for all images and RoIs at once.

`align` is RoIAlign (`ops.multilevel_roi_align`); `pool` is RoIPool, whose bins are whole pixels; `crop` is RoICrop,
which samples a grid of points and max-pools 2 × 2 of them. RoIs are xyxy in pixels of the network's input.
"""

from __future__ import annotations

from typing import cast

import torch
import torchvision
from torch import Tensor
from torch.nn import functional as F

from maskrcnn.model.ops import assign_levels, multilevel_roi_align

_CROP_SAMPLES = 2  # per bin and axis of RoICrop


def multilevel_pool(
    features: list[Tensor],
    rois: Tensor,
    *,
    method: str,
    output_size: int,
    sampling_ratio: int,
    aligned: bool,
    min_level: int = 2,
) -> Tensor:
    """Pool RoI features with the given method.

    Args:
        features: levels P_min_level, P_min_level+1, …, each `[N, C, H_l, W_l]`; level l has stride 2^l pixels.
        rois: `[N, R, 4]` xyxy in pixels of the network's input. R may be zero.
        method: one of `maskrcnn.config.POOL_METHODS`.
        output_size: S, bins per axis.
        sampling_ratio: points per bin and axis; "align" only.
        aligned: pixel centres at half-integers; not for "pool".
        min_level: exponent of the first level's stride.

    Returns:
        float32 `[N, R, C, S, S]`.
    """
    if method == "pool":
        return multilevel_roi_pool(features, rois, output_size=output_size, min_level=min_level)
    if method == "crop":
        return multilevel_roi_crop(features, rois, output_size=output_size, aligned=aligned, min_level=min_level)
    return multilevel_roi_align(
        features, rois, output_size=output_size, sampling_ratio=sampling_ratio, aligned=aligned, min_level=min_level
    )


def multilevel_roi_pool(features: list[Tensor], rois: Tensor, *, output_size: int, min_level: int = 2) -> Tensor:
    """RoIPool: the maximum in each of S × S bins of each RoI, at the RoI's own pyramid level.

    A RoI is rounded to whole pixels of its level (halves away from zero, both ends inclusive, at least one pixel).
    Bin k covers pixels floor(k · side / S) to ceil((k + 1) · side / S), so adjacent bins may overlap; pixels outside
    the map are ignored and empty bins are zero. The gradient goes to the first maximum of each bin.

    Args:
        features: levels P_min_level, P_min_level+1, …, each `[N, C, H_l, W_l]`.
        rois: `[N, R, 4]`. R may be zero.
        output_size: S, bins per axis.
        min_level: exponent of the first level's stride.

    Returns:
        float32 `[N, R, C, S, S]`.

    Source: Girshick 2015, section 2.1; rounding as in torchvision's `roi_pool`.
    """
    pool = _multilevel_roi_pool if torch.compiler.is_exporting() else _pool_by_levels
    return pool(features, rois, output_size, min_level)


def _pool_by_levels(features: list[Tensor], rois: Tensor, output_size: int, min_level: int) -> Tensor:
    """Torchvision's kernel on every level for all RoIs: fixed shapes, no synchronisation.

    RoIs of other levels are reduced to one pixel, which costs the kernel almost nothing.
    """
    batch, count = rois.shape[:2]
    rois = rois.to(torch.float32).flatten(0, 1)
    level = assign_levels(rois, min_level=min_level, num_levels=len(features))
    image = torch.arange(batch * count, device=rois.device) // count if count else level
    boxes = torch.cat([image[:, None].to(torch.float32), rois], dim=1)
    pooled = rois.new_zeros(batch * count, features[0].shape[1], output_size, output_size)
    for index, feature in enumerate(features):
        in_level = level == index
        one_pixel = torch.cat([boxes[:, :1], boxes[:, 1:].masked_fill(~in_level[:, None], 0.0)], dim=1)
        level_pooled = torchvision.ops.roi_pool(
            feature.to(torch.float32), one_pixel, output_size, spatial_scale=0.5 ** (min_level + index)
        )
        pooled = torch.where(in_level[:, None, None, None], level_pooled, pooled)
    return pooled.unflatten(0, (batch, count))


@torch.library.custom_op("maskrcnn::multilevel_roi_pool", mutates_args=())
def _multilevel_roi_pool(features: list[Tensor], rois: Tensor, output_size: int, min_level: int) -> Tensor:
    return _pool_by_levels(features, rois, output_size, min_level).contiguous()


@_multilevel_roi_pool.register_fake
def _(features, rois, output_size, min_level):
    shape = (rois.shape[0], rois.shape[1], features[0].shape[1], output_size, output_size)
    return rois.new_empty(shape, dtype=torch.float32)


def multilevel_roi_crop(
    features: list[Tensor], rois: Tensor, *, output_size: int, aligned: bool, min_level: int = 2
) -> Tensor:
    """RoICrop: bilinear samples at 2S × 2S grid points of each RoI, then 2 × 2 max pooling.

    The grid maps the unit square affinely onto the RoI with its outermost points on the edges: point k of an axis is
    at start + k · (end - start) / (2S - 1), in pixels of the level. Features outside the map are zero, with a linear
    transition over one pixel. RoIs get no gradient.

    Args:
        features: levels P_min_level, P_min_level+1, …, each `[N, C, H_l, W_l]`.
        rois: `[N, R, 4]`. R may be zero.
        output_size: S, bins per axis.
        aligned: pixel centres at half-integers (the original implementations have them at integers).
        min_level: exponent of the first level's stride.

    Returns:
        float32 `[N, R, C, S, S]`.

    Source: crop pooling of Chen and Gupta 2017, "An Implementation of Faster RCNN with Study for Region Sampling",
    written as `affine_grid` and `grid_sample` with `align_corners=True` in PyTorch implementations of Faster R-CNN.
    """
    batch, count = rois.shape[:2]
    rois, points = rois.detach().to(torch.float32), _CROP_SAMPLES * output_size
    level = assign_levels(rois, min_level=min_level, num_levels=len(features))
    atlas, tops = _atlas(features)
    in_level = [(level == k).to(torch.int64) for k in range(len(features))]
    # Properties of each RoI's level, as sums of products: an indexed table would have to be copied to the device.
    scale, top, height, width = (
        cast(Tensor, sum(is_level * value for is_level, value in zip(in_level, values, strict=True)))[..., None]
        for values in (
            [0.5 ** (min_level + k) for k in range(len(features))],
            tops,
            [feature.shape[2] for feature in features],
            [feature.shape[3] for feature in features],
        )
    )
    x1, y1, x2, y2 = (rois * scale - (0.5 if aligned else 0.0)).unbind(-1)
    fraction = torch.arange(points, device=rois.device, dtype=torch.float32) / (points - 1)
    columns, rows = (start[..., None] + (end - start)[..., None] * fraction for start, end in ((x1, x2), (y1, y2)))
    # Clamped to one pixel around the map, where the atlas is zero; both are [N, R, 2S].
    columns = torch.minimum(columns.clamp(min=-1.0), width) + 1
    rows = torch.minimum(rows.clamp(min=-1.0), height) + top
    x, y = (2 * at / (side - 1) - 1 for at, side in ((columns, atlas.shape[3]), (rows, atlas.shape[2])))
    shape = (batch, count, points, points)
    grid = torch.stack([x[:, :, None, :].expand(shape), y[:, :, :, None].expand(shape)], dim=-1)
    samples = F.grid_sample(atlas, grid.flatten(1, 2), mode="bilinear", padding_mode="zeros", align_corners=True)
    if count == 0:  # max_pool2d rejects empty inputs
        return samples.view(batch, 0, atlas.shape[1], output_size, output_size)
    pooled = F.max_pool2d(samples, _CROP_SAMPLES)  # [N, C, R · S, S]: no window spans two RoIs
    return pooled.unflatten(2, (count, output_size)).transpose(1, 2)


def _atlas(features: list[Tensor]) -> tuple[Tensor, list[int]]:
    """All levels stacked vertically in one map with zeros around each, and the first row of each level.

    A single `grid_sample` then reads every RoI at its own level. Channels last, which is three times as fast on a CPU.
    """
    parts: list[Tensor] = []
    tops: list[int] = []
    width, row = features[0].shape[3], 1
    for feature in features:
        first = not parts
        parts.append(F.pad(feature.to(torch.float32), (1, 1 + width - feature.shape[3], int(first), 1)))
        tops.append(row)
        row = row + feature.shape[2] + 1
    return torch.cat(parts, dim=2).contiguous(memory_format=torch.channels_last), tops

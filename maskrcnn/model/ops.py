"""The custom operators of the detector, in PyTorch.

`export/` turns `multilevel_roi_align` and `batched_nms` into the ONNX nodes `maskrcnn::MultilevelRoiAlign` and
`maskrcnn::BatchedNms`. During export each is one opaque operator; otherwise they run as ordinary PyTorch code or, on a
GPU, as compiled kernels (`cuda_ops.py`).

Pixel model: a box (x1, y1, x2, y2) covers the continuous region [x1, x2] × [y1, y2]; the centre of pixel (i, j) of a
feature map is at (j + 0.5, i + 0.5) if `aligned`, else at (j, i).
"""

from __future__ import annotations

import torch
import torchvision
from torch import Tensor
from torch.nn import functional as F

from maskrcnn.model import cuda_ops

CANONICAL_LEVEL, CANONICAL_SIZE_PX = 4, 224.0  # FPN equation 1: a 224 px box is pooled at P4
LEVEL_EPSILON = 1e-6  # torchvision adds this to the logarithm, so that exact powers of two round up


def assign_levels(rois: Tensor, *, min_level: int, num_levels: int) -> Tensor:
    """Index of the pyramid level that pools each RoI (Lin et al. 2017, equation 1).

    Args:
        rois: `[…, 4]` xyxy in pixels of the network's input; RoIs that are empty or NaN get the first level.
        min_level: exponent of the first level's stride (2 for P2).
        num_levels: number of levels.

    Returns:
        int64 `[…]` in `[0, num_levels)`; index 0 is `min_level`.
    """
    width, height = rois[..., 2] - rois[..., 0], rois[..., 3] - rois[..., 1]
    area = width * height
    level = torch.floor(CANONICAL_LEVEL + torch.log2(torch.sqrt(area) / CANONICAL_SIZE_PX) + LEVEL_EPSILON)
    level = torch.where(area > 0, level, float(min_level))
    return level.clamp(min_level, min_level + num_levels - 1).to(torch.int64) - min_level


def _axis_taps(
    start: Tensor, length: Tensor, size: Tensor, bins: int, ratio: int, *, aligned: bool
) -> tuple[Tensor, Tensor]:
    """Grid indices and weights `[P, bins, 2 · ratio]` of bilinear sampling along one axis.

    Args:
        start: `[P]` in grid units.
        length: `[P]` in grid units.
        size: `[P]`, length of the grid.
        bins: bins of the axis.
        ratio: samples per bin.
        aligned: if false, lengths are at least 1.
    """
    if not aligned:
        length = length.clamp(min=1.0)
    positions = torch.arange(bins * ratio, device=start.device, dtype=start.dtype)
    position = start[:, None] + (positions + 0.5) * (length / (bins * ratio))[:, None]
    limit = size[:, None].to(position.dtype)
    inside = (position >= -1.0) & (position <= limit)
    position = position.masked_fill(~inside, 0.0)  # NaN would not be a valid index
    position = torch.minimum(position.clamp(min=0.0), limit - 1)
    low = position.floor()
    high = torch.minimum(low + 1, limit - 1)
    fraction = position - low
    index = torch.stack([low, high], dim=-1).to(torch.int64)
    weight = torch.stack([1 - fraction, fraction], dim=-1) * inside[..., None]
    return index.unflatten(1, (bins, ratio)).flatten(2), weight.unflatten(1, (bins, ratio)).flatten(2)


def _numbers(values: list[int], device: torch.device) -> Tensor:
    """int64 tensor on a device; `torch.tensor` would synchronise with a GPU."""
    return torch.cat([torch.full((1,), value, dtype=torch.int64, device=device) for value in values])


def _pool_by_table(
    features: list[Tensor],
    rois: Tensor,
    output_size: int,
    sampling_ratio: int,
    aligned: bool,
    min_level: int,
) -> Tensor:
    """RoIAlign as one weighted table look-up over all levels and images.

    Each pixel of each level is a row of the table; an output bin is a weighted sum of (2 · sampling_ratio)² rows.
    Shapes depend only on shapes, every RoI reads only its own level, and sums run over contiguous channels: fast on a
    CPU, without synchronisation on a GPU.
    """
    batch, count = rois.shape[:2]
    channels = features[0].shape[1]
    rois = rois.to(torch.float32)
    heights, widths = (_numbers([f.shape[axis] for f in features], rois.device) for axis in (2, 3))
    sizes = batch * heights * widths
    table = torch.cat([f.permute(0, 2, 3, 1).reshape(-1, channels) for f in features]).to(torch.float32)

    level = assign_levels(rois, min_level=min_level, num_levels=len(features)).flatten()
    image = torch.arange(batch * count, device=rois.device) // count if count else level
    height, width = heights[level], widths[level]
    base = (sizes.cumsum(0) - sizes)[level] + image * height * width

    scale = torch.exp2(-(level + min_level).to(torch.float32))[:, None]
    x1, y1, x2, y2 = (rois.flatten(0, 1) * scale - (0.5 if aligned else 0.0)).unbind(1)
    rows, row_weights = _axis_taps(y1, y2 - y1, height, output_size, sampling_ratio, aligned=aligned)
    columns, column_weights = _axis_taps(x1, x2 - x1, width, output_size, sampling_ratio, aligned=aligned)
    rows = base[:, None, None] + rows * width[:, None, None]
    index = rows[:, :, None, :, None] + columns[:, None, :, None, :]
    weight = row_weights[:, :, None, :, None] * column_weights[:, None, :, None, :] / sampling_ratio**2
    pooled = F.embedding_bag(
        index.flatten(0, 2).flatten(1),
        table,
        per_sample_weights=weight.flatten(0, 2).flatten(1),
        mode="sum",
    )
    return pooled.view(batch, count, output_size, output_size, channels).permute(0, 1, 4, 2, 3)


def _pool_adaptively(features: list[Tensor], rois: Tensor, output_size: int, aligned: bool, min_level: int) -> Tensor:
    """RoIAlign with a sampling ratio that depends on the RoI's size: torchvision's kernel, level by level.

    RoIs of other levels are made empty, which costs the kernel almost nothing.
    """
    batch, count = rois.shape[:2]
    rois = rois.to(torch.float32).flatten(0, 1)
    level = assign_levels(rois, min_level=min_level, num_levels=len(features))
    image = torch.arange(batch * count, device=rois.device) // count if count else level
    is_finite = rois.isfinite().all(dim=1)
    rois = rois.masked_fill(~is_finite[:, None], 0.0)
    boxes = torch.cat([image[:, None].to(torch.float32), rois], dim=1)
    pooled = rois.new_zeros(batch * count, features[0].shape[1], output_size, output_size)
    for index, feature in enumerate(features):
        in_level = (level == index) & is_finite
        level_pooled = torchvision.ops.roi_align(
            feature.to(torch.float32),
            boxes * in_level[:, None],
            output_size,
            spatial_scale=0.5 ** (min_level + index),
            sampling_ratio=0,
            aligned=aligned,
        )
        pooled = torch.where(in_level[:, None, None, None], level_pooled, pooled)
    return pooled.unflatten(0, (batch, count))


def _pool(
    features: list[Tensor],
    rois: Tensor,
    output_size: int,
    sampling_ratio: int,
    aligned: bool,
    min_level: int,
) -> Tensor:
    """Table look-up, or torchvision's kernel for `sampling_ratio=0`, where the number of samples has no fixed shape."""
    if sampling_ratio == 0:
        return _pool_adaptively(features, rois, output_size, aligned, min_level)
    return _pool_by_table(features, rois, output_size, sampling_ratio, aligned, min_level)


@torch.library.custom_op("maskrcnn::multilevel_roi_align", mutates_args=())
def _multilevel_roi_align(
    features: list[Tensor],
    rois: Tensor,
    output_size: int,
    sampling_ratio: int,
    aligned: bool,
    min_level: int,
) -> Tensor:
    pooled = _pool(features, rois, output_size, sampling_ratio, aligned, min_level)
    return pooled.to(features[0].dtype).contiguous()


@_multilevel_roi_align.register_kernel("cuda")
def _(features, rois, output_size, sampling_ratio, aligned, min_level):
    kernels = cuda_ops.kernels_for(rois.device)
    if kernels is None:
        pooled = _pool(features, rois, output_size, sampling_ratio, aligned, min_level)
        return pooled.to(features[0].dtype).contiguous()
    return cuda_ops.multilevel_roi_align(
        kernels,
        features,
        rois,
        output_size=output_size,
        sampling_ratio=sampling_ratio,
        aligned=aligned,
        min_level=min_level,
        dtype=features[0].dtype,  # the head converts to it anyway; half the memory
    )


@_multilevel_roi_align.register_fake
def _(features, rois, output_size, sampling_ratio, aligned, min_level):
    shape = (rois.shape[0], rois.shape[1], features[0].shape[1], output_size, output_size)
    return rois.new_empty(shape, dtype=features[0].dtype)


def multilevel_roi_align(
    features: list[Tensor],
    rois: Tensor,
    *,
    output_size: int,
    sampling_ratio: int,
    aligned: bool,
    min_level: int = 2,
) -> Tensor:
    """RoIAlign: mean of bilinear samples in each of S × S bins of each RoI, at the RoI's own pyramid level.

    Args:
        features: levels P_min_level, P_min_level+1, …, each `[N, C, H_l, W_l]`; level l has stride 2^l pixels.
        rois: `[N, R, 4]` xyxy in pixels of the network's input; NaN and infinite RoIs give zeros. R may be zero.
        output_size: S, bins per axis.
        sampling_ratio: samples per bin and axis; 0: ceil(side / S) with the side in pixels of the level, and zeros for
            an empty RoI (torchvision's -1, ONNX's and Detectron2's 0).
        aligned: pixel centres at half-integers (see the module).
        min_level: exponent of the first level's stride.

    Returns:
        `[N, R, C, S, S]`, accumulated in float32; of the features' type during export and on a GPU without gradients,
        float32 otherwise.

    Raises:
        ValueError: if `sampling_ratio` is negative.

    Source: He et al. 2017, section 3; torchvision's `MultiScaleRoIAlign`.
    """
    if sampling_ratio < 0:
        raise ValueError(
            f"found: sampling_ratio {sampling_ratio}; expected: 0 or more; fix: pass 0 for an adaptive ratio"
        )
    # The operator has no gradient, unlike the PyTorch code.
    needs_gradient = torch.is_grad_enabled() and any(t.requires_grad for t in (*features, rois))
    is_op = torch.compiler.is_exporting() or (rois.is_cuda and not needs_gradient)
    if rois.is_cuda and needs_gradient:
        attributes = {"output_size": output_size, "sampling_ratio": sampling_ratio, "aligned": aligned}
        pooled = _pool_by_kernels(features, rois, min_level=min_level, **attributes)
        if pooled is not None:
            return pooled
    pool = _multilevel_roi_align if is_op else _pool
    return pool(features, rois, output_size, sampling_ratio, aligned, min_level)


def _pool_by_kernels(features: list[Tensor], rois: Tensor, **attributes: int) -> Tensor | None:
    """RoIAlign with a gradient, by the GPU's kernels; None if they cannot compute it.

    Their sums have no fixed order, which `torch.use_deterministic_algorithms` forbids.
    """
    is_plain = not torch.compiler.is_compiling() and not torch.are_deterministic_algorithms_enabled()
    is_known = all(feature.dtype in cuda_ops.DTYPES for feature in features) and not rois.requires_grad
    if not (is_plain and is_known) or (kernels := cuda_ops.kernels_for(rois.device)) is None:
        return None
    pooled: Tensor = cuda_ops.TrainedRoiAlign.apply(kernels, rois, attributes, *features)
    return pooled


@torch.library.custom_op("maskrcnn::batched_nms", mutates_args=())
def _batched_nms(
    boxes: Tensor, groups: Tensor, counts: Tensor, iou_threshold: float, max_output: int
) -> tuple[Tensor, Tensor]:
    return _nms_by_torchvision(boxes, groups, counts, iou_threshold, max_output)


@_batched_nms.register_kernel("cuda")
def _(boxes, groups, counts, iou_threshold, max_output):
    kernels = cuda_ops.kernels_for(boxes.device)
    if kernels is not None:
        return cuda_ops.batched_nms(kernels, boxes, groups, counts, iou_threshold, max_output)
    return _nms_by_torchvision(boxes, groups, counts, iou_threshold, max_output)


def _nms_by_torchvision(
    boxes: Tensor, groups: Tensor, counts: Tensor, iou_threshold: float, max_output: int
) -> tuple[Tensor, Tensor]:
    """One group at a time; synchronises with the device for each."""
    indices = torch.zeros(boxes.shape[0], max_output, dtype=torch.int32, device=boxes.device)
    kept_counts = torch.zeros(boxes.shape[0], dtype=torch.int32, device=boxes.device)
    # Descending scores that keep the given order.
    order_keys = torch.arange(boxes.shape[1], 0, -1, dtype=torch.float32, device=boxes.device)
    # Rounded to float32 as in the exported graph and the kernels: torchvision's CPU kernel compares with a double.
    threshold = torch.tensor(iou_threshold, dtype=torch.float32).item()
    for image, count in enumerate(counts.tolist()):
        by_group, members = groups[image, :count].sort(stable=True)
        sizes = by_group.unique_consecutive(return_counts=True)[1].tolist()
        parts = zip(members.split(sizes), boxes[image, members].split(sizes), strict=True)
        kept = [rows[torchvision.ops.nms(part, order_keys[: len(rows)], threshold)] for rows, part in parts]
        if kept:
            rows = torch.cat(kept).sort().values[:max_output]
            indices[image, : len(rows)] = rows.to(torch.int32)
            kept_counts[image] = len(rows)
    return indices, kept_counts


@_batched_nms.register_fake
def _(boxes, groups, counts, iou_threshold, max_output):
    return (
        boxes.new_empty((boxes.shape[0], max_output), dtype=torch.int32),
        boxes.new_empty((boxes.shape[0],), dtype=torch.int32),
    )


def batched_nms(
    boxes: Tensor, groups: Tensor, counts: Tensor, *, iou_threshold: float, max_output: int
) -> tuple[Tensor, Tensor]:
    """Greedy non-maximum suppression within each group of each image.

    Args:
        boxes: float32 `[N, K, 4]` xyxy, sorted by descending score.
        groups: int32 `[N, K]`, ≥ 0; only boxes of the same group suppress each other.
        counts: int32 `[N]`; rows from `counts[n]` on are padding.
        iou_threshold: a box is suppressed if its IoU with a kept one is greater.
        max_output: M, rows of the result.

    Returns:
        indices int32 `[N, M]` of the kept rows, ascending (by descending score) and zero past the end, and their count
        int32 `[N]`.

    Source: `torchvision.ops.batched_nms`, computed per group rather than with shifted coordinates.
    """
    return _batched_nms(boxes, groups, counts, iou_threshold, max_output)


@torch.library.custom_op("maskrcnn::live_rows", mutates_args=())
def _live_rows(boxes: Tensor, labels: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    rows = max(int(counts.max()), 1) if len(counts) else 1
    return boxes[:, :rows].clone(), labels[:, :rows].clone()


@_live_rows.register_fake
def _(boxes, labels, counts):
    rows = torch.library.get_ctx().new_dynamic_size(min=1, max=boxes.shape[1])
    return boxes.new_empty((boxes.shape[0], rows, 4)), labels.new_empty((labels.shape[0], rows))


def live_rows(boxes: Tensor, labels: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Truncate to the first L rows, where L is the maximum count of the batch (at least 1).

    On a CPU only; on other devices all D rows are returned, since reading the counts would synchronise.

    Args:
        boxes: `[N, D, 4]`.
        labels: `[N, D]`.
        counts: int32 `[N]`, number of detections.

    Returns:
        boxes `[N, L, 4]` and labels `[N, L]`.
    """
    if torch.compiler.is_exporting():
        return _live_rows(boxes, labels, counts)
    if boxes.device.type != "cpu" or torch.compiler.is_compiling():
        return boxes, labels
    rows = max(int(counts.max()), 1)
    return boxes[:, :rows], labels[:, :rows]

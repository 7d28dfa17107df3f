"""The custom operators on a GPU, using the kernels of the TensorRT plugins (`plugins.native.kernels_for`).

Nothing here synchronises with the GPU or bypasses PyTorch's allocator, so all of it can be captured in a CUDA graph.
Shapes and semantics as in `maskrcnn.model.ops`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from maskrcnn.plugins import native
from maskrcnn.plugins.native import Kernels, Pyramid

DTYPES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}


def kernels_for(device: torch.device) -> Kernels | None:
    """Compiled kernels for a GPU, or None; see `plugins.native.kernels_for`."""
    major, minor = torch.cuda.get_device_capability(device)
    return native.kernels_for(major * 10 + minor)


def _stream_of(device: torch.device) -> int:
    """Address of PyTorch's current stream, 0 on a CPU."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def multilevel_roi_align(
    kernels: Kernels,
    features: Sequence[Tensor],
    rois: Tensor,
    *,
    output_size: int,
    sampling_ratio: int,
    aligned: bool,
    min_level: int,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """`maskrcnn.model.ops.multilevel_roi_align` with the kernels; `dtype` is float32 or the features' type.

    Fastest if all feature maps are channels last, as they are then read without a copy.
    """
    batch, channels = features[0].shape[:2]
    is_last = all(f.is_contiguous(memory_format=torch.channels_last) and f.stride(1) == 1 for f in features)
    if not is_last:
        features = [f.contiguous() for f in features]
    rois = rois.to(torch.float32).contiguous()
    pooled = rois.new_empty((batch, rois.shape[1], channels, output_size, output_size), dtype=dtype)
    pyramid = Pyramid(
        addresses=[f.data_ptr() for f in features],
        heights=[f.shape[2] for f in features],
        widths=[f.shape[3] for f in features],
        batch=batch,
        channels=channels,
        dtype=DTYPES[features[0].dtype],
        layout="NHWC" if is_last else "NCHW",
    )
    with torch.cuda.device_of(rois):
        kernels.multilevel_roi_align(
            pyramid,
            rois.data_ptr(),
            rois.shape[1],
            pooled.data_ptr(),
            output_dtype=DTYPES[dtype],
            output_size=output_size,
            sampling_ratio=sampling_ratio,
            aligned=aligned,
            min_level=min_level,
            stream=_stream_of(rois.device),
        )
    return pooled


def multilevel_roi_align_gradient(
    kernels: Kernels,
    pooled: Tensor,
    rois: Tensor,
    sizes_hw: Sequence[tuple[int, int]],
    *,
    output_size: int,
    sampling_ratio: int,
    aligned: bool,
    min_level: int,
) -> list[Tensor]:
    """Gradient of the features of `multilevel_roi_align`, summed in no fixed order.

    Args:
        kernels: kernels of the tensors' GPU.
        pooled: gradient of the result, `[N, R, C, S, S]`.
        rois: `[N, R, 4]` xyxy px.
        sizes_hw: height and width of each feature map.
        output_size, sampling_ratio, aligned, min_level: as in `multilevel_roi_align`.

    Returns:
        float32 `[N, C, H_l, W_l]`, channels last, one for each feature map.
    """
    batch, channels = pooled.shape[0], pooled.shape[2]
    rois, pooled = rois.to(torch.float32).contiguous(), pooled.contiguous()
    parts = [batch * height * width * channels for height, width in sizes_hw]
    gradients = rois.new_zeros(sum(parts)).split(parts)
    pyramid = Pyramid(
        addresses=[each.data_ptr() for each in gradients],
        heights=[height for height, _ in sizes_hw],
        widths=[width for _, width in sizes_hw],
        batch=batch,
        channels=channels,
        dtype="float32",
        layout="NHWC",
    )
    with torch.cuda.device_of(rois):
        kernels.multilevel_roi_align_gradient(
            pyramid,
            rois.data_ptr(),
            rois.shape[1],
            pooled.data_ptr(),
            pooled_dtype=DTYPES[pooled.dtype],
            output_size=output_size,
            sampling_ratio=sampling_ratio,
            aligned=aligned,
            min_level=min_level,
            stream=_stream_of(rois.device),
        )
    return [
        each.view(batch, *size_hw, channels).permute(0, 3, 1, 2)
        for each, size_hw in zip(gradients, sizes_hw, strict=True)
    ]


class TrainedRoiAlign(torch.autograd.Function):
    """`multilevel_roi_align` with a gradient for the features, float32 `[N, R, C, S, S]`; the RoIs have none."""

    @staticmethod
    def forward(ctx, kernels, rois, attributes, *features):
        ctx.save_for_backward(rois)
        ctx.kernels, ctx.attributes = kernels, attributes
        ctx.shapes = [(feature.shape[2:], feature.dtype) for feature in features]
        return multilevel_roi_align(kernels, features, rois, **attributes)

    @staticmethod
    @once_differentiable
    def backward(ctx, pooled):
        (rois,) = ctx.saved_tensors
        sizes_hw = [tuple(size) for size, _ in ctx.shapes]
        gradients = multilevel_roi_align_gradient(ctx.kernels, pooled, rois, sizes_hw, **ctx.attributes)
        of_type = [each.to(dtype) for each, (_, dtype) in zip(gradients, ctx.shapes, strict=True)]
        return None, None, None, *of_type


def batched_nms(
    kernels: Kernels, boxes: Tensor, groups: Tensor, counts: Tensor, iou_threshold: float, max_output: int
) -> tuple[Tensor, Tensor]:
    """`maskrcnn.model.ops.batched_nms` with the kernels."""
    boxes, groups, counts = boxes.to(torch.float32).contiguous(), groups.contiguous(), counts.contiguous()
    batch, num_boxes = boxes.shape[:2]
    indices = groups.new_empty((batch, max_output))
    num = groups.new_empty((batch,))
    workspace = torch.empty(kernels.batched_nms_workspace(batch, num_boxes), dtype=torch.uint8, device=boxes.device)
    with torch.cuda.device_of(boxes):
        kernels.batched_nms(
            boxes.data_ptr(),
            groups.data_ptr(),
            counts.data_ptr(),
            batch=batch,
            num_boxes=num_boxes,
            iou_threshold=iou_threshold,
            max_output=max_output,
            workspace=workspace.data_ptr(),
            indices=indices.data_ptr(),
            num=num.data_ptr(),
            stream=_stream_of(boxes.device),
        )
    return indices, num


def paste_masks(
    kernels: Kernels,
    masks: Tensor,
    boxes: Tensor,
    size_hw: tuple[int, int],
    *,
    threshold: float = 0.5,
    by_columns: bool = False,
) -> Tensor:
    """Paste masks `[D, S, S]` at boxes `[D, 4]` xyxy px of an image of `size_hw`, one bit per pixel.

    Returns:
        int32 `[D, H, ceil(W / 32)]`, or with `by_columns` `[D, W, ceil(H / 32)]`; bit b of a word is pixel
        32 · word + b, set if the probability exceeds `threshold`.
    """
    masks, boxes = masks.contiguous(), boxes.to(torch.float32).contiguous()
    lines, length = size_hw[::-1] if by_columns else size_hw
    bits = torch.empty((len(masks), lines, -(-length // 32)), dtype=torch.int32, device=masks.device)
    with torch.cuda.device_of(masks):
        kernels.paste_masks(
            masks.data_ptr(),
            boxes.data_ptr(),
            bits.data_ptr(),
            num_masks=len(masks),
            mask_size=masks.shape[-1],
            dtype=DTYPES[masks.dtype],
            size_hw=size_hw,
            threshold=threshold,
            by_columns=by_columns,
            stream=_stream_of(masks.device),
        )
    return bits

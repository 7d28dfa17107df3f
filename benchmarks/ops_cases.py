"""The cases of `benchmarks/ops.py`: inputs, contenders, the check that they agree, and the bytes that must be moved."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torchvision
from torch import Tensor
from torchvision.models.detection.roi_heads import paste_masks_in_image

from maskrcnn.model import cuda_ops
from maskrcnn.model.ops import assign_levels, batched_nms, multilevel_roi_align
from maskrcnn.plugins.native import Kernels

SIZE_HW = (800, 1088)
PASTE_HW = (800, 1333)
STRIDES = (4, 8, 16, 32)
CHANNELS = 256
LEAST_SHARED = 0.995  # of the boxes that NMS keeps: torchvision shifts coordinates by group, which rounds them
REFERENCE = "torchvision"


@dataclass(frozen=True)
class Contender:
    """One way of computing a case."""

    call: Callable[[], Any]
    capturable: bool = False  # in a CUDA graph: it neither waits for the GPU nor reads from it


@dataclass(frozen=True)
class Case:
    """One set of inputs; the contender `torchvision` is what the others are divided by."""

    name: str
    contenders: dict[str, Contender]
    least_bytes: int | None = None  # read or written by any implementation


def random_boxes(count: int, device: str, seed: int, size_hw: tuple[int, int]) -> Tensor:
    """Boxes `[count, 4]` of all sizes, 8 to 600 px, inside the image."""
    rng = torch.Generator().manual_seed(seed)
    limit = torch.tensor([size_hw[1], size_hw[0]])
    sides = 8 * torch.exp(torch.rand(count, 2, generator=rng) * 4.3)
    corners = torch.rand(count, 2, generator=rng) * (limit - sides).clamp(min=0)
    return torch.cat([corners, torch.minimum(corners + sides, limit)], dim=1).to(device)


def roi_align_case(
    images: int,
    count: int,
    bins: int,
    device: str,
    *,
    dtype: torch.dtype = torch.float32,
    kernels: Kernels | None = None,
) -> Case:
    """RoIAlign of `count` RoIs of each image, `bins` × `bins`; with compiled kernels, these in both layouts too.

    Raises:
        AssertionError: when two contenders differ.
    """
    rng = torch.Generator().manual_seed(1)
    maps = [torch.randn(images, CHANNELS, SIZE_HW[0] // s, SIZE_HW[1] // s, generator=rng) for s in STRIDES]
    maps = [m.to(device, dtype) for m in maps]
    rois = torch.stack([random_boxes(count, device, seed, SIZE_HW) for seed in range(images)])
    given = {"output_size": bins, "sampling_ratio": 2, "aligned": False}
    contenders = {
        REFERENCE: Contender(_torchvision_pooling(maps, rois, bins)),
        "torchvision, kernels alone": Contender(_torchvision_kernels(maps, rois, bins), device == "cuda"),
        "maskrcnn": Contender(lambda: multilevel_roi_align(maps, rois, **given), device == "cuda"),
    }
    if kernels is not None:
        last = [m.contiguous(memory_format=torch.channels_last) for m in maps]
        for name, laid in (("kernel, planes", maps), ("kernel, channels last", last)):
            contenders[name] = Contender(
                lambda laid=laid: cuda_ops.multilevel_roi_align(kernels, laid, rois, dtype=dtype, min_level=2, **given),
                device == "cuda",
            )
    truth = _torchvision_pooling([m.float() for m in maps], rois, bins)()
    # Torchvision rounds RoIs to the features' type, so single precision is the measure.
    tolerance = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}[dtype]
    for name, contender in contenders.items():
        if dtype is torch.float32 or not name.startswith(REFERENCE):
            found = contender.call().reshape(truth.shape).float()
            torch.testing.assert_close(found, truth, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")
    kind = str(dtype).removeprefix("torch.")
    least = _touched_pixels(rois) * CHANNELS * maps[0].element_size() + truth.numel() * maps[0].element_size()
    return Case(f"RoIAlign {images} × {count} RoIs {bins}×{bins} {kind}", contenders, least)


def _torchvision_pooling(maps: list[Tensor], rois: Tensor, bins: int) -> Callable[[], Tensor]:
    pool = torchvision.ops.MultiScaleRoIAlign([str(i) for i in range(len(maps))], bins, 2)
    named, boxes = {str(i): m for i, m in enumerate(maps)}, list(rois.to(maps[0].dtype))
    return lambda: pool(named, boxes, [SIZE_HW] * len(boxes))


def _torchvision_kernels(maps: list[Tensor], rois: Tensor, bins: int) -> Callable[[], Tensor]:
    """torchvision's kernel of each level, with the RoIs sorted by level beforehand and not put back in order."""
    levels = assign_levels(rois, min_level=2, num_levels=len(maps))
    parts = [[r[level == i].to(maps[0].dtype) for r, level in zip(rois, levels, strict=True)] for i in range(len(maps))]
    order = torch.argsort(torch.cat([torch.nonzero(levels.flatten() == i).flatten() for i in range(len(maps))]))

    def pool() -> Tensor:
        return torch.cat(
            [
                torchvision.ops.roi_align(m, part, bins, spatial_scale=1 / s, sampling_ratio=2)
                for m, part, s in zip(maps, boxes_of_levels, STRIDES, strict=True)
            ]
        )

    # roi_align turns a list of boxes into one tensor with small operations of its own; that is not the kernel.
    boxes_of_levels = [torchvision.ops._utils.convert_boxes_to_roi_format(part) for part in parts]
    return lambda: pool()[order]


def _touched_pixels(rois: Tensor) -> int:
    """How many pixels of all levels and images some RoI reads."""
    levels, total = assign_levels(rois, min_level=2, num_levels=len(STRIDES)).cpu().numpy(), 0
    for boxes, level_of in zip(rois.cpu().numpy(), levels, strict=True):
        for level, stride in enumerate(STRIDES):
            touched = np.zeros((SIZE_HW[0] // stride, SIZE_HW[1] // stride), bool)
            for x1, y1, x2, y2 in boxes[level_of == level] / stride:
                touched[int(y1) : int(y2) + 2, int(x1) : int(x2) + 2] = True
            total += int(touched.sum())
    return total


def nms_case(groups: int, per_group: int, device: str, iou: float, kernels: Kernels | None = None) -> Case:
    """NMS of `groups` groups of about `per_group` boxes each, all survivors wanted.

    Raises:
        AssertionError: when two contenders keep different boxes, but for a few at the very threshold.
    """
    count = groups * per_group
    boxes = random_boxes(count, device, 2, SIZE_HW)
    owner = torch.randint(0, groups, (count,), generator=torch.Generator().manual_seed(3)).to(device)
    scores = torch.linspace(1, 0, count, device=device)
    counts = torch.tensor([count], dtype=torch.int32, device=device)
    group_of = owner[None].to(torch.int32)

    def ours() -> tuple[Tensor, Tensor]:
        return batched_nms(boxes[None], group_of, counts, iou_threshold=iou, max_output=count)

    contenders = {
        REFERENCE: Contender(lambda: torchvision.ops.batched_nms(boxes, scores, owner, iou)),
        "maskrcnn": Contender(ours, device == "cuda"),
    }
    if kernels is not None:
        contenders["kernel"] = Contender(
            lambda: cuda_ops.batched_nms(kernels, boxes[None], group_of, counts, iou, count), device == "cuda"
        )
    wanted = set(contenders[REFERENCE].call().tolist())
    for name, contender in contenders.items():
        if name != REFERENCE:
            kept, number = contender.call()
            found = set(kept[0, : int(number)].tolist())
            same = len(found & wanted) / max(len(found | wanted), 1)
            assert same >= LEAST_SHARED, f"{name}: {same:.2%} of the kept boxes are torchvision's too"
    return Case(f"NMS {groups} groups of {per_group}", contenders)


def paste_case(count: int, device: str, kernels: Kernels | None = None) -> Case:
    """Masks of `count` detections pasted into an image of 800 × 1333 pixels, as torchvision's bool masks or as bits.

    Raises:
        AssertionError: when more than one pixel in 10 000 differs.
    """
    masks = torch.rand(count, 28, 28, generator=torch.Generator().manual_seed(4)).to(device)
    boxes = random_boxes(count, device, 5, PASTE_HW)
    contenders = {REFERENCE: Contender(lambda: paste_masks_in_image(masks[:, None], boxes, PASTE_HW)[:, 0] > 0.5)}
    if kernels is not None:
        for name, by_columns in (("kernel, rows", False), ("kernel, columns", True)):
            contenders[name] = Contender(
                lambda by_columns=by_columns: cuda_ops.paste_masks(
                    kernels, masks, boxes, PASTE_HW, by_columns=by_columns
                ),
                device == "cuda",
            )
    wanted = contenders[REFERENCE].call().cpu().numpy()
    for name, contender in contenders.items():
        if name != REFERENCE:
            found = np.unpackbits(contender.call().cpu().numpy().view(np.uint8), axis=-1, bitorder="little")
            found = found.transpose(0, 2, 1) if name.endswith("columns") else found
            different = (found[:, : PASTE_HW[0], : PASTE_HW[1]].astype(bool) != wanted).mean()
            assert different <= 1e-4, f"{name}: {different:.2%} of the pixels differ from torchvision's"
    least = count * PASTE_HW[0] * -(-PASTE_HW[1] // 32) * 4
    return Case(f"paste {count} masks into {PASTE_HW[0]}×{PASTE_HW[1]}", contenders, least)

"""The custom ops beside torchvision's, in one run.

    python benchmarks/ops.py [--device cuda] [--json FILE]

Sizes are those of Mask R-CNN ResNet-50 FPN: 1000 RoIs pooled 7×7 and 100 pooled 14×14 from four levels of 256
channels (images of 800×1088), NMS over five levels and over 80 classes of 1000 boxes each, and 100 masks pasted into
an image of 800×1333. Values are compared before anything is timed.

On a GPU also 8 images at once, half precision, and the kernels that `maskrcnn build-plugins` has compiled, in both
layouts. What can be captured is measured as a CUDA graph of many calls, the kernel's own time; the rest as calls one
after the other, waiting included, as a user sees it. "of copy" is the share of the bandwidth of a copy on the same GPU
in the same run that the bytes which any implementation must move would need in that time.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from timing import Samples, environment, time_in_turns
from torch import Tensor
from torchvision.models.detection.roi_heads import paste_masks_in_image

from maskrcnn.files import write_json
from maskrcnn.model import cuda_ops
from maskrcnn.model.ops import assign_levels, batched_nms, multilevel_roi_align
from maskrcnn.plugins.native import Kernels

# The cases of `benchmarks/ops.py`: inputs, contenders, the check that they agree, and the bytes that must be moved.

SIZE_HW = (800, 1088)
PASTE_HW = (800, 1333)
_STRIDES = (4, 8, 16, 32)
CHANNELS = 256
_LEAST_SHARED = 0.995  # of the boxes that NMS keeps: torchvision shifts coordinates by group, which rounds them
_REFERENCE = "torchvision"


@dataclass(frozen=True)
class Contender:
    """One way of computing a case."""

    call: Callable[[], Any]
    capturable: bool = False  # in a CUDA graph: it neither waits for the GPU nor reads from it


@dataclass(frozen=True)
class _Case:
    """One set of inputs; the contender `torchvision` is what the others are divided by."""

    name: str
    contenders: dict[str, Contender]
    least_bytes: int | None = None  # read or written by any implementation


def _random_boxes(count: int, device: str, seed: int, size_hw: tuple[int, int]) -> Tensor:
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
) -> _Case:
    """RoIAlign of `count` RoIs of each image, `bins` × `bins`; with compiled kernels, these in both layouts too.

    Raises:
        AssertionError: when two contenders differ.
    """
    rng = torch.Generator().manual_seed(1)
    maps = [torch.randn(images, CHANNELS, SIZE_HW[0] // s, SIZE_HW[1] // s, generator=rng) for s in _STRIDES]
    maps = [m.to(device, dtype) for m in maps]
    rois = torch.stack([_random_boxes(count, device, seed, SIZE_HW) for seed in range(images)])
    given = {"output_size": bins, "sampling_ratio": 2, "aligned": False}
    contenders = {
        _REFERENCE: Contender(_torchvision_pooling(maps, rois, bins)),
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
        if dtype is torch.float32 or not name.startswith(_REFERENCE):
            found = contender.call().reshape(truth.shape).float()
            torch.testing.assert_close(found, truth, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")
    kind = str(dtype).removeprefix("torch.")
    least = _touched_pixels(rois) * CHANNELS * maps[0].element_size() + truth.numel() * maps[0].element_size()
    return _Case(f"RoIAlign {images} × {count} RoIs {bins}×{bins} {kind}", contenders, least)


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
                for m, part, s in zip(maps, boxes_of_levels, _STRIDES, strict=True)
            ]
        )

    # roi_align turns a list of boxes into one tensor with small operations of its own; that is not the kernel.
    boxes_of_levels = [torchvision.ops._utils.convert_boxes_to_roi_format(part) for part in parts]
    return lambda: pool()[order]


def _touched_pixels(rois: Tensor) -> int:
    """How many pixels of all levels and images some RoI reads."""
    levels, total = assign_levels(rois, min_level=2, num_levels=len(_STRIDES)).cpu().numpy(), 0
    for boxes, level_of in zip(rois.cpu().numpy(), levels, strict=True):
        for level, stride in enumerate(_STRIDES):
            touched = np.zeros((SIZE_HW[0] // stride, SIZE_HW[1] // stride), bool)
            for x1, y1, x2, y2 in boxes[level_of == level] / stride:
                touched[int(y1) : int(y2) + 2, int(x1) : int(x2) + 2] = True
            total += int(touched.sum())
    return total


def nms_case(groups: int, per_group: int, device: str, iou: float, kernels: Kernels | None = None) -> _Case:
    """NMS of `groups` groups of about `per_group` boxes each, all survivors wanted.

    Raises:
        AssertionError: when two contenders keep different boxes, but for a few at the very threshold.
    """
    count = groups * per_group
    boxes = _random_boxes(count, device, 2, SIZE_HW)
    owner = torch.randint(0, groups, (count,), generator=torch.Generator().manual_seed(3)).to(device)
    scores = torch.linspace(1, 0, count, device=device)
    counts = torch.tensor([count], dtype=torch.int32, device=device)
    group_of = owner[None].to(torch.int32)

    def ours() -> tuple[Tensor, Tensor]:
        return batched_nms(boxes[None], group_of, counts, iou_threshold=iou, max_output=count)

    contenders = {
        _REFERENCE: Contender(lambda: torchvision.ops.batched_nms(boxes, scores, owner, iou)),
        "maskrcnn": Contender(ours, device == "cuda"),
    }
    if kernels is not None:
        contenders["kernel"] = Contender(
            lambda: cuda_ops.batched_nms(kernels, boxes[None], group_of, counts, iou, count), device == "cuda"
        )
    wanted = set(contenders[_REFERENCE].call().tolist())
    for name, contender in contenders.items():
        if name != _REFERENCE:
            kept, number = contender.call()
            found = set(kept[0, : int(number)].tolist())
            same = len(found & wanted) / max(len(found | wanted), 1)
            assert same >= _LEAST_SHARED, f"{name}: {same:.2%} of the kept boxes are torchvision's too"
    return _Case(f"NMS {groups} groups of {per_group}", contenders)


def paste_case(count: int, device: str, kernels: Kernels | None = None) -> _Case:
    """Masks of `count` detections pasted into an image of 800 × 1333 pixels, as torchvision's bool masks or as bits.

    Raises:
        AssertionError: when more than one pixel in 10 000 differs.
    """
    masks = torch.rand(count, 28, 28, generator=torch.Generator().manual_seed(4)).to(device)
    boxes = _random_boxes(count, device, 5, PASTE_HW)
    contenders = {_REFERENCE: Contender(lambda: paste_masks_in_image(masks[:, None], boxes, PASTE_HW)[:, 0] > 0.5)}
    if kernels is not None:
        for name, by_columns in (("kernel, rows", False), ("kernel, columns", True)):
            contenders[name] = Contender(
                lambda by_columns=by_columns: cuda_ops.paste_masks(
                    kernels, masks, boxes, PASTE_HW, by_columns=by_columns
                ),
                device == "cuda",
            )
    wanted = contenders[_REFERENCE].call().cpu().numpy()
    for name, contender in contenders.items():
        if name != _REFERENCE:
            found = np.unpackbits(contender.call().cpu().numpy().view(np.uint8), axis=-1, bitorder="little")
            found = found.transpose(0, 2, 1) if name.endswith("columns") else found
            different = (found[:, : PASTE_HW[0], : PASTE_HW[1]].astype(bool) != wanted).mean()
            assert different <= 1e-4, f"{name}: {different:.2%} of the pixels differ from torchvision's"
    least = count * PASTE_HW[0] * -(-PASTE_HW[1] // 32) * 4
    return _Case(f"paste {count} masks into {PASTE_HW[0]}×{PASTE_HW[1]}", contenders, least)


CALLS = 20  # on a GPU, of one sample
_COPY_BYTES = 1 << 30


def _cases(device: str, kernels: Kernels | None) -> Iterator[_Case]:
    """What is measured on a device, made when its turn comes, for the sake of memory."""
    on_gpu = device == "cuda"
    for dtype in (torch.float32, torch.float16) if on_gpu else (torch.float32,):
        for images in (1, 8) if on_gpu else (1,):
            for count, bins in ((1000, 7), (100, 14)):
                yield roi_align_case(images, count, bins, device, dtype=dtype, kernels=kernels)
    yield nms_case(5, 1000, device, 0.7, kernels)
    yield nms_case(80, 1000 if on_gpu else 12, device, 0.5, kernels)
    yield paste_case(100, device, kernels)


def measure(case: _Case, device: str, *, repeat: int, copy_gb_per_s: float | None) -> list[dict[str, Any]]:
    """One row per contender: microseconds a call, the ratio to torchvision, and the share of a copy's bandwidth."""
    prepared = {name: _prepared(contender, device) for name, contender in case.contenders.items()}
    calls = CALLS if device == "cuda" else 1
    samples = time_in_turns(prepared, repeat=repeat, warmup=3, rest_s=0.0 if device == "cuda" else 0.03)
    for name, sample in samples.items():
        if sample.error is not None:
            raise RuntimeError(f"{case.name}, {name}: {sample.error}") from sample.error
    reference = samples[_REFERENCE].percentile_ms(50)
    rows = []
    for name, contender in case.contenders.items():
        us = _percentiles_us(samples[name], calls)
        share = None
        if copy_gb_per_s and case.least_bytes:
            share = case.least_bytes / (us["p50_us"] * 1e-6) / (copy_gb_per_s * 1e9)
        rows.append(
            {
                "case": case.name,
                "contender": name,
                "how": "graph" if device == "cuda" and contender.capturable else "calls",
                **us,
                "speedup": reference / samples[name].percentile_ms(50),
                "of_copy_bandwidth": share,
            }
        )
    return rows


def _percentiles_us(samples: Samples, calls: int) -> dict[str, float]:
    return {f"p{percent}_us": 1000 * samples.percentile_ms(percent) / calls for percent in (10, 50, 90)}


def _prepared(contender: Contender, device: str) -> Callable[[int], Any]:
    """A call that `time_in_turns` can measure; on a GPU `CALLS` calls and the wait for their end."""
    if device != "cuda":
        return lambda turn: contender.call()
    if not contender.capturable:

        def one_by_one(turn: int) -> None:
            for _ in range(CALLS):
                contender.call()
            torch.cuda.synchronize()

        return one_by_one
    graph = captured(contender.call, CALLS)

    def replayed(turn: int) -> None:
        graph.replay()
        torch.cuda.synchronize()

    return replayed


def captured(call: Callable[[], Any], times: int) -> torch.cuda.CUDAGraph:
    """A CUDA graph of `times` calls."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(times):
            call()
    return graph


def _copy_bandwidth_gb_per_s() -> float:
    """Bytes read and written per second by a copy of a gigabyte inside the GPU's memory; the best of ten."""
    source = torch.empty(_COPY_BYTES, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    best = 0.0
    for _ in range(10):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        target.copy_(source)
        end.record()
        torch.cuda.synchronize()
        best = max(best, 2 * _COPY_BYTES / (begin.elapsed_time(end) * 1e-3) / 1e9)
    return best


def main() -> None:
    """Prints a table and the machine, and writes both as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--repeat", type=int, default=20)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    kernels = cuda_ops.kernels_for(torch.device("cuda", 0)) if given.device == "cuda" else None
    copy = _copy_bandwidth_gb_per_s() if given.device == "cuda" else None
    if given.device == "cuda":
        print(f"copy: {copy:.0f} GB/s; kernels: {kernels.path if kernels else 'none; run `maskrcnn build-plugins`'}")
    print(f"{'':72}{'how':>7}{'p50 µs':>11}{'speedup':>9}{'of copy':>9}")
    found = []
    with torch.inference_mode():
        for case in _cases(given.device, kernels):
            rows = measure(case, given.device, repeat=given.repeat, copy_gb_per_s=copy)
            found += rows
            for row in rows:
                print(_line(row), flush=True)
    machine = environment()
    print(json.dumps(machine))
    if given.json:
        write_json(given.json, {"environment": machine, "copy_gb_per_s": copy, "rows": found})


def _line(row: dict[str, Any]) -> str:
    share = row["of_copy_bandwidth"]
    name = f"{row['case']}: {row['contender']}"
    shown = f"{share:9.0%}" if share is not None else f"{'':9}"
    return f"{name:72}{row['how']:>7}{row['p50_us']:11.1f}{row['speedup']:9.2f}{shown}"


if __name__ == "__main__":
    main()

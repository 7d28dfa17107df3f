"""The custom ops compared with torchvision's, in one run.

    python benchmarks/ops.py [--device cuda] [--json FILE]

The sizes are those of Mask R-CNN ResNet-50 FPN: 1000 RoIs pooled to 7×7 and 100 to 14×14 from four levels of 256
channels (images of 800×1088), the gradient of 512 RoIs of two images, NMS over five levels and over 80 classes of 1000
boxes each, and 100 masks pasted into an image of 800×1333. Values are compared before anything is timed.

On a GPU also batches of 8 images, half precision, and the plugins' kernels, in both layouts.
Implementations that can be captured are measured as a CUDA graph of many calls, which is the kernels' own time; the
others as consecutive calls with synchronisation. "of copy" is the bandwidth of the bytes that any implementation must
move, relative to a copy on the same GPU in the same run.
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

SIZE_HW = (800, 1088)
PASTE_HW = (800, 1333)
_STRIDES = (4, 8, 16, 32)
CHANNELS = 256
_MIN_SHARED = 0.995  # of the boxes kept by NMS: torchvision offsets coordinates by group, which rounds them
_REFERENCE = "torchvision"


@dataclass(frozen=True)
class _Contender:
    """An implementation of a case."""

    call: Callable[[], Any]
    capturable: bool = False  # in a CUDA graph: it does not synchronise with the host


@dataclass(frozen=True)
class _Case:
    """A set of inputs and the implementations; the speed of "torchvision" is the denominator of the others'."""

    name: str
    contenders: dict[str, _Contender]
    min_bytes: int | None = None  # that any implementation must read and write


def _random_boxes(count: int, device: str, seed: int, size_hw: tuple[int, int]) -> Tensor:
    """Boxes xyxy `[count, 4]` inside the image, with sides of 8 to 600 px."""
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
    """RoIAlign of `count` RoIs per image to `bins` × `bins`; compiled kernels are measured in both layouts.

    Raises:
        AssertionError: if two implementations differ.
    """
    rng = torch.Generator().manual_seed(1)
    maps = [torch.randn(images, CHANNELS, SIZE_HW[0] // s, SIZE_HW[1] // s, generator=rng) for s in _STRIDES]
    maps = [m.to(device, dtype) for m in maps]
    rois = torch.stack([_random_boxes(count, device, seed, SIZE_HW) for seed in range(images)])
    given = {"output_size": bins, "sampling_ratio": 2, "aligned": False}
    contenders = {
        _REFERENCE: _Contender(_torchvision_pooling(maps, rois, bins)),
        "torchvision, kernels alone": _Contender(_torchvision_kernels(maps, rois, bins), device == "cuda"),
        "maskrcnn": _Contender(lambda: multilevel_roi_align(maps, rois, **given), device == "cuda"),
    }
    if kernels is not None:
        last = [m.contiguous(memory_format=torch.channels_last) for m in maps]
        for name, laid in (("kernel, planes", maps), ("kernel, channels last", last)):
            contenders[name] = _Contender(
                lambda laid=laid: cuda_ops.multilevel_roi_align(kernels, laid, rois, dtype=dtype, min_level=2, **given),
                device == "cuda",
            )
    truth = _torchvision_pooling([m.float() for m in maps], rois, bins)()
    # torchvision rounds RoIs to the features' dtype, so its float32 result is the reference.
    tolerance = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}[dtype]
    for name, contender in contenders.items():
        if dtype is torch.float32 or not name.startswith(_REFERENCE):
            found = contender.call().reshape(truth.shape).float()
            torch.testing.assert_close(found, truth, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")
    kind = str(dtype).removeprefix("torch.")
    least = _touched_pixels(rois) * CHANNELS * maps[0].element_size() + truth.numel() * maps[0].element_size()
    return _Case(f"RoIAlign {images} × {count} RoIs {bins}×{bins} {kind}", contenders, least)


def gradient_case(images: int, count: int, device: str, kernels: Kernels | None = None) -> _Case:
    """RoIAlign of `count` RoIs per image to 7 × 7 and the gradient of the feature maps, as in a training step.

    "maskrcnn" uses the kernels if `kernels_for` has them, otherwise a table look-up.

    Raises:
        AssertionError: if two implementations differ.
    """
    given = {"output_size": 7, "sampling_ratio": 2, "aligned": False, "min_level": 2}
    with torch.inference_mode(False):
        rng = torch.Generator().manual_seed(1)
        maps = [torch.randn(images, CHANNELS, SIZE_HW[0] // s, SIZE_HW[1] // s, generator=rng) for s in _STRIDES]
        maps = [m.to(device, memory_format=torch.channels_last).requires_grad_() for m in maps]
        rois = torch.stack([_random_boxes(count, device, seed, SIZE_HW) for seed in range(images)])
        pooled = torch.randn(images, count, CHANNELS, 7, 7, generator=rng).to(device)

    def gradient(pool: Callable[[], Tensor]) -> Callable[[], tuple[Tensor, ...]]:
        def call() -> tuple[Tensor, ...]:
            with torch.inference_mode(False), torch.enable_grad():
                return torch.autograd.grad(pool().reshape(pooled.shape), maps, pooled)

        return call

    contenders = {
        _REFERENCE: _Contender(gradient(_torchvision_pooling(maps, rois, 7))),
        "maskrcnn": _Contender(gradient(lambda: multilevel_roi_align(maps, rois, **given))),
    }
    if kernels is not None:
        roi_align = cuda_ops.TrainedRoiAlign.apply
        contenders["kernel"] = _Contender(gradient(lambda: roi_align(kernels, rois, given, *maps)))
    wanted = contenders[_REFERENCE].call()
    for name, contender in contenders.items():
        for found, of_level in zip(contender.call(), wanted, strict=True):
            torch.testing.assert_close(found, of_level, rtol=1e-3, atol=1e-3, msg=lambda m, n=name: f"{n}: {m}")
    return _Case(f"RoIAlign {images} × {count} RoIs 7×7 and its gradient", contenders)


def _torchvision_pooling(maps: list[Tensor], rois: Tensor, bins: int) -> Callable[[], Tensor]:
    pool = torchvision.ops.MultiScaleRoIAlign([str(i) for i in range(len(maps))], bins, 2)
    named, boxes = {str(i): m for i, m in enumerate(maps)}, list(rois.to(maps[0].dtype))
    return lambda: pool(named, boxes, [SIZE_HW] * len(boxes))


def _torchvision_kernels(maps: list[Tensor], rois: Tensor, bins: int) -> Callable[[], Tensor]:
    """torchvision's kernel per level, with the RoIs assigned to levels beforehand."""
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

    # roi_align converts a list of boxes into a tensor with small operations, which are not part of the kernel.
    boxes_of_levels = [torchvision.ops._utils.convert_boxes_to_roi_format(part) for part in parts]
    return lambda: pool()[order]


def _touched_pixels(rois: Tensor) -> int:
    """Number of pixels of all levels and images that are read by at least one RoI."""
    levels, total = assign_levels(rois, min_level=2, num_levels=len(_STRIDES)).cpu().numpy(), 0
    for boxes, level_of in zip(rois.cpu().numpy(), levels, strict=True):
        for level, stride in enumerate(_STRIDES):
            touched = np.zeros((SIZE_HW[0] // stride, SIZE_HW[1] // stride), bool)
            for x1, y1, x2, y2 in boxes[level_of == level] / stride:
                touched[int(y1) : int(y2) + 2, int(x1) : int(x2) + 2] = True
            total += int(touched.sum())
    return total


def nms_case(groups: int, per_group: int, device: str, iou: float, kernels: Kernels | None = None) -> _Case:
    """NMS of `groups` groups of about `per_group` boxes each, without a limit of the output.

    Raises:
        AssertionError: if two implementations keep different boxes, except for a few at the threshold.
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
        _REFERENCE: _Contender(lambda: torchvision.ops.batched_nms(boxes, scores, owner, iou)),
        "maskrcnn": _Contender(ours, device == "cuda"),
    }
    if kernels is not None:
        contenders["kernel"] = _Contender(
            lambda: cuda_ops.batched_nms(kernels, boxes[None], group_of, counts, iou, count), device == "cuda"
        )
    expected = set(contenders[_REFERENCE].call().tolist())
    for name, contender in contenders.items():
        if name != _REFERENCE:
            kept, number = contender.call()
            found = set(kept[0, : int(number)].tolist())
            same = len(found & expected) / max(len(found | expected), 1)
            assert same >= _MIN_SHARED, f"{name}: {same:.2%} of the kept boxes are also torchvision's"
    return _Case(f"NMS {groups} groups of {per_group}", contenders)


def paste_case(count: int, device: str, kernels: Kernels | None = None) -> _Case:
    """Paste `count` masks into an image of 800 × 1333 pixels, as torchvision's boolean masks or as bits.

    Raises:
        AssertionError: if more than one pixel in 10 000 differs.
    """
    masks = torch.rand(count, 28, 28, generator=torch.Generator().manual_seed(4)).to(device)
    boxes = _random_boxes(count, device, 5, PASTE_HW)
    contenders = {_REFERENCE: _Contender(lambda: paste_masks_in_image(masks[:, None], boxes, PASTE_HW)[:, 0] > 0.5)}
    if kernels is not None:
        for name, by_columns in (("kernel, rows", False), ("kernel, columns", True)):
            contenders[name] = _Contender(
                lambda by_columns=by_columns: cuda_ops.paste_masks(
                    kernels, masks, boxes, PASTE_HW, by_columns=by_columns
                ),
                device == "cuda",
            )
    expected = contenders[_REFERENCE].call().cpu().numpy()
    for name, contender in contenders.items():
        if name != _REFERENCE:
            found = np.unpackbits(contender.call().cpu().numpy().view(np.uint8), axis=-1, bitorder="little")
            found = found.transpose(0, 2, 1) if name.endswith("columns") else found
            different = (found[:, : PASTE_HW[0], : PASTE_HW[1]].astype(bool) != expected).mean()
            assert different <= 1e-4, f"{name}: {different:.2%} of the pixels differ from torchvision's"
    least = count * PASTE_HW[0] * -(-PASTE_HW[1] // 32) * 4
    return _Case(f"paste {count} masks into {PASTE_HW[0]}×{PASTE_HW[1]}", contenders, least)


_CALLS = 20  # per sample on a GPU
_COPY_BYTES = 1 << 30


def _cases(device: str, kernels: Kernels | None) -> Iterator[_Case]:
    """The cases of a device, each made when it is measured to save memory."""
    on_gpu = device == "cuda"
    for dtype in (torch.float32, torch.float16) if on_gpu else (torch.float32,):
        for images in (1, 8) if on_gpu else (1,):
            for count, bins in ((1000, 7), (100, 14)):
                yield roi_align_case(images, count, bins, device, dtype=dtype, kernels=kernels)
    yield gradient_case(2, 512, device, kernels)
    yield nms_case(5, 1000, device, 0.7, kernels)
    yield nms_case(80, 1000 if on_gpu else 12, device, 0.5, kernels)
    yield paste_case(100, device, kernels)


def measure(case: _Case, device: str, *, repeat: int, copy_gb_per_s: float | None) -> list[dict[str, Any]]:
    """Return a row per implementation: µs per call, and speed relative to torchvision and to a copy's bandwidth."""
    prepared = {name: _prepared(contender, device) for name, contender in case.contenders.items()}
    calls = _CALLS if device == "cuda" else 1
    samples = time_in_turns(prepared, repeat=repeat, warmup=3, rest_s=0.0 if device == "cuda" else 0.03)
    for name, sample in samples.items():
        if sample.error is not None:
            raise RuntimeError(f"{case.name}, {name}: {sample.error}") from sample.error
    reference = samples[_REFERENCE].percentile_ms(50)
    rows = []
    for name, contender in case.contenders.items():
        us = _percentiles_us(samples[name], calls)
        share = None
        if copy_gb_per_s and case.min_bytes:
            share = case.min_bytes / (us["p50_us"] * 1e-6) / (copy_gb_per_s * 1e9)
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


def _prepared(contender: _Contender, device: str) -> Callable[[int], Any]:
    """A function for `time_in_turns`; on a GPU it makes `_CALLS` calls and synchronises."""
    if device != "cuda":
        return lambda turn: contender.call()
    if not contender.capturable:

        def one_by_one(turn: int) -> None:
            for _ in range(_CALLS):
                contender.call()
            torch.cuda.synchronize()

        return one_by_one
    graph = _captured(contender.call, _CALLS)

    def replayed(turn: int) -> None:
        graph.replay()
        torch.cuda.synchronize()

    return replayed


def _captured(call: Callable[[], Any], times: int) -> torch.cuda.CUDAGraph:
    """Capture a CUDA graph of `times` calls."""
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
    """GB read and written per second by a copy of a gigabyte in GPU memory; the maximum of ten copies."""
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
    """Measure, print a table and the machine, and write both as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--device",
        default="cuda" if torch.cuda.is_available() else "cpu",
        choices=("cpu", "cuda"),
        help="default: cuda if available",
    )
    parser.add_argument("--repeat", type=int, default=20, help="samples per implementation; default: 20")
    parser.add_argument("--json", type=Path, help="JSON file for the results")
    given = parser.parse_args()
    kernels = cuda_ops.kernels_for(torch.device("cuda", 0)) if given.device == "cuda" else None
    copy = _copy_bandwidth_gb_per_s() if given.device == "cuda" else None
    if given.device == "cuda":
        print(f"copy: {copy:.0f} GB/s; kernels: {kernels.origin if kernels else 'none, see `maskrcnn doctor`'}")
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

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
from pathlib import Path
from typing import Any

import torch
from ops_cases import REFERENCE, Case, Contender, nms_case, paste_case, roi_align_case
from timing import Samples, environment, time_in_turns

from maskrcnn.files import write_json
from maskrcnn.model import cuda_ops
from maskrcnn.plugins.native import Kernels

CALLS = 20  # on a GPU, of one sample
COPY_BYTES = 1 << 30


def cases(device: str, kernels: Kernels | None) -> Iterator[Case]:
    """What is measured on a device, made when its turn comes, for the sake of memory."""
    on_gpu = device == "cuda"
    for dtype in (torch.float32, torch.float16) if on_gpu else (torch.float32,):
        for images in (1, 8) if on_gpu else (1,):
            for count, bins in ((1000, 7), (100, 14)):
                yield roi_align_case(images, count, bins, device, dtype=dtype, kernels=kernels)
    yield nms_case(5, 1000, device, 0.7, kernels)
    yield nms_case(80, 1000 if on_gpu else 12, device, 0.5, kernels)
    yield paste_case(100, device, kernels)


def measure(case: Case, device: str, *, repeat: int, copy_gb_per_s: float | None) -> list[dict[str, Any]]:
    """One row per contender: microseconds a call, the ratio to torchvision, and the share of a copy's bandwidth."""
    prepared = {name: _prepared(contender, device) for name, contender in case.contenders.items()}
    calls = CALLS if device == "cuda" else 1
    samples = time_in_turns(prepared, repeat=repeat, warmup=3, rest_s=0.0 if device == "cuda" else 0.03)
    for name, sample in samples.items():
        if sample.error is not None:
            raise RuntimeError(f"{case.name}, {name}: {sample.error}") from sample.error
    reference = samples[REFERENCE].percentile_ms(50)
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


def copy_bandwidth_gb_per_s() -> float:
    """Bytes read and written per second by a copy of a gigabyte inside the GPU's memory; the best of ten."""
    source = torch.empty(COPY_BYTES, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    best = 0.0
    for _ in range(10):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        target.copy_(source)
        end.record()
        torch.cuda.synchronize()
        best = max(best, 2 * COPY_BYTES / (begin.elapsed_time(end) * 1e-3) / 1e9)
    return best


def main() -> None:
    """Prints a table and the machine, and writes both as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--repeat", type=int, default=20)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    kernels = cuda_ops.kernels_for(torch.device("cuda", 0)) if given.device == "cuda" else None
    copy = copy_bandwidth_gb_per_s() if given.device == "cuda" else None
    if given.device == "cuda":
        print(f"copy: {copy:.0f} GB/s; kernels: {kernels.path if kernels else 'none; run `maskrcnn build-plugins`'}")
    print(f"{'':72}{'how':>7}{'p50 µs':>11}{'speedup':>9}{'of copy':>9}")
    found = []
    with torch.inference_mode():
        for case in cases(given.device, kernels):
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

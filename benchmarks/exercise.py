"""Every kernel on inputs of awkward sizes, compared with the NumPy reference; alone or under one of NVIDIA's tools.

    python benchmarks/exercise.py [--under memcheck|racecheck|initcheck|synccheck|counters --output FILE]

The process has no PyTorch, whose allocator would hide an access beyond an array: each array is an allocation of exactly
its size. `--under` runs the same under a tool of compute-sanitizer. `--under counters` runs RoIAlign and NMS at the
sizes of Mask R-CNN ResNet-50 at 800×1344 under Nsight Compute (ncu), which reads the hardware counters of each kernel.
The exit code is 1 if a tool reports an error or a result is wrong, and 77 without kernels or without the tool.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from maskrcnn.files import atomic_path
from maskrcnn.imaging.postprocess import Detections
from maskrcnn.plugins import reference
from maskrcnn.plugins.build import find_library
from maskrcnn.plugins.native import Kernels, Pyramid

NOT_RUN = 77  # exit code, as of automake's skipped tests
_SANITIZER_TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
_COUNTERS = "counters"
_TOOL_FOUND_ERRORS = 9  # exit code
_SIZE_HW, _CHANNELS = (800, 1344), 256  # of the feature maps
# Sections of Nsight Compute; the clocks are left alone, which some machines do not permit to change.
_NCU = ("--clock-control", "none", "--csv", "--page", "details", "--section", "SpeedOfLight", "--section", "Occupancy",
        "--section", "LaunchStats", "--section", "WarpStateStats", "--section", "ComputeWorkloadAnalysis",
        "--section", "MemoryWorkloadAnalysis")  # fmt: skip


class GpuMemory:
    """Memory of the first GPU, through the CUDA runtime."""

    def __init__(self) -> None:
        from cuda.bindings import runtime

        self._cuda = runtime

    def allocate(self, size: int) -> int:
        """Allocate uninitialised bytes and return their address."""
        return int(self._checked(self._cuda.cudaMalloc(size)))

    def upload(self, values: np.ndarray) -> int:
        """Copy an array to new memory and return its address."""
        values, kind = np.ascontiguousarray(values), self._cuda.cudaMemcpyKind.cudaMemcpyHostToDevice
        address = self.allocate(values.nbytes)
        self._checked(self._cuda.cudaMemcpy(address, values.ctypes.data, values.nbytes, kind))
        return address

    def download(self, address: int, shape: tuple[int, ...], dtype: type) -> np.ndarray:
        """Copy an array from an address, after all kernels have run."""
        values, kind = np.empty(shape, dtype), self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._checked(self._cuda.cudaDeviceSynchronize())
        self._checked(self._cuda.cudaMemcpy(values.ctypes.data, address, values.nbytes, kind))
        return values

    def _checked(self, answer: tuple[Any, ...]) -> Any:
        if int(answer[0]) != 0:
            raise RuntimeError(f"CUDA: {answer[0]!s}")
        return answer[1] if len(answer) > 1 else None


def exercise_kernels(kernels: Kernels, memory: GpuMemory, say: Callable[[str], None] = print) -> None:
    """Call every kernel and compare its results with the reference.

    Raises:
        AssertionError: for a wrong result.
    """
    rng = np.random.default_rng(0)
    for channels, size, ratio, layout in ((5, 7, 2, "NCHW"), (65, 9, 2, "NCHW"), (3, 3, 3, "NCHW"), (4, 7, 0, "NCHW"),
                                          (8, 7, 2, "NHWC"), (132, 14, 2, "NHWC"), (5, 2, 0, "NHWC")):  # fmt: skip
        for dtype in (np.float32, np.float16):
            _check_roi_align(kernels, memory, rng, channels, size, ratio, layout, dtype)
            say(f"RoIAlign {channels} channels, {size}×{size}, ratio {ratio}, {layout}, {np.dtype(dtype).name}: right")
    for channels, size in ((5, 7), (70, 9)):
        _check_roi_align_gradient(kernels, memory, rng, channels, size)
        say(f"RoIAlign's gradient, {channels} channels, {size}×{size}: right")
    for boxes, groups, max_output in ((1, 1, 1), (63, 2, 20), (700, 3, 700), (1500, 90, 100), (5000, 1, 2000)):
        _check_nms(kernels, memory, rng, boxes, groups, max_output)
        say(f"NMS {boxes} boxes in {groups} groups: right")
    for count, size_hw in ((1, (1, 1)), (5, (97, 133)), (3, (64, 1100))):
        _check_paste(kernels, memory, rng, count, size_hw)
        say(f"paste {count} masks into {size_hw[0]}×{size_hw[1]}: right")


def _check_roi_align(
    kernels: Kernels,
    memory: GpuMemory,
    rng: np.random.Generator,
    channels: int,
    size: int,
    ratio: int,
    layout: str,
    dtype: type,
) -> None:
    shapes = [(33, 47), (17, 23), (8, 11), (1, 1)]
    maps = [rng.standard_normal((2, channels, h, w)).astype(dtype) for h, w in shapes]
    corners = rng.uniform(-30, 180, (2, 5, 2))
    rois = np.concatenate([corners, corners + np.exp(rng.uniform(0, 6.5, (2, 5, 2)))], axis=-1).astype(np.float32)
    laid_out = [m.transpose(0, 2, 3, 1) if layout == "NHWC" else m for m in maps]
    pyramid = Pyramid([memory.upload(m) for m in laid_out], [h for h, _ in shapes], [w for _, w in shapes], 2,
                      channels, np.dtype(dtype).name, layout)  # fmt: skip
    shape = (2, 5, channels, size, size)
    pooled = memory.allocate(int(np.prod(shape)) * 4)
    options = {"output_size": size, "sampling_ratio": ratio, "aligned": True}
    kernels.multilevel_roi_align(pyramid, memory.upload(rois), 5, pooled, output_dtype="float32", **options)
    expected = reference.multilevel_roi_align(maps, rois, **options)
    np.testing.assert_allclose(memory.download(pooled, shape, np.float32), expected, atol=1e-4)


def _check_roi_align_gradient(
    kernels: Kernels, memory: GpuMemory, rng: np.random.Generator, channels: int, size: int
) -> None:
    """RoIAlign is linear: its gradient g of p satisfies <g, f> = <p, RoIAlign(f)> for any features f."""
    shapes = [(33, 47), (17, 23)]
    maps = [rng.standard_normal((2, channels, h, w)).astype(np.float32) for h, w in shapes]
    corners = rng.uniform(-30, 180, (2, 5, 2))
    rois = np.concatenate([corners, corners + np.exp(rng.uniform(0, 5, (2, 5, 2)))], axis=-1).astype(np.float32)
    pooled = rng.standard_normal((2, 5, channels, size, size)).astype(np.float32)
    pyramid = Pyramid([memory.upload(np.zeros_like(m)) for m in maps], [h for h, _ in shapes], [w for _, w in shapes],
                      2, channels, "float32", "NHWC")  # fmt: skip
    options = {"output_size": size, "sampling_ratio": 2, "aligned": True}
    address = memory.upload(pooled)
    kernels.multilevel_roi_align_gradient(pyramid, memory.upload(rois), 5, address, pooled_dtype="float32", **options)
    found = [
        memory.download(each, (2, h, w, channels), np.float32).transpose(0, 3, 1, 2)
        for each, (h, w) in zip(pyramid.addresses, shapes, strict=True)
    ]
    expected = float((pooled * reference.multilevel_roi_align(maps, rois, **options)).sum())
    total = sum(float((gradient * feature).sum()) for gradient, feature in zip(found, maps, strict=True))
    np.testing.assert_allclose(total, expected, rtol=1e-3, atol=1e-2)


def _check_nms(
    kernels: Kernels, memory: GpuMemory, rng: np.random.Generator, count: int, groups: int, max_output: int
) -> None:
    corners = rng.uniform(0, 400, (2, count, 2))
    boxes = np.concatenate([corners, corners + rng.uniform(5, 80, (2, count, 2))], axis=-1).astype(np.float32)
    group_of = rng.integers(0, groups, (2, count)).astype(np.int32)
    counts = np.array([count, count // 2], np.int32)
    indices, num = memory.allocate(2 * max_output * 4), memory.allocate(2 * 4)
    kernels.batched_nms(
        memory.upload(boxes), memory.upload(group_of), memory.upload(counts), batch=2, num_boxes=count,
        iou_threshold=0.5, max_output=max_output, workspace=memory.allocate(kernels.batched_nms_workspace(2, count)),
        indices=indices, num=num,
    )  # fmt: skip
    expected = reference.batched_nms(boxes, group_of, counts, iou_threshold=0.5, max_output=max_output)
    np.testing.assert_array_equal(memory.download(num, (2,), np.int32), expected[1])
    np.testing.assert_array_equal(memory.download(indices, (2, max_output), np.int32), expected[0])


def _check_paste(
    kernels: Kernels, memory: GpuMemory, rng: np.random.Generator, count: int, size_hw: tuple[int, int]
) -> None:
    masks = np.round(rng.random((count, 28, 28))).astype(np.float32)
    corners = rng.uniform(-20, 100, (count, 2))
    boxes = np.concatenate([corners, corners + rng.uniform(1, 150, (count, 2))], axis=-1).astype(np.float32)
    shape = (count, size_hw[0], -(-size_hw[1] // 32))
    bits = memory.allocate(int(np.prod(shape)) * 4)
    kernels.paste_masks(
        memory.upload(masks), memory.upload(boxes), bits, num_masks=count, mask_size=28, dtype="float32",
        size_hw=size_hw,
    )  # fmt: skip
    pasted = np.unpackbits(memory.download(bits, shape, np.uint32).view(np.uint8), axis=-1, bitorder="little")
    zeros = np.zeros(count, np.int64)
    expected = Detections(boxes, zeros.astype(np.float32), zeros, masks, size_hw).full_masks()
    different = (pasted[..., : size_hw[1]].astype(bool) != expected).mean()
    assert different < 1e-3, f"{different:.2%} of the pixels differ"


def launch_at_full_size(kernels: Kernels, memory: GpuMemory) -> None:
    """Launch RoIAlign and NMS at the sizes of Mask R-CNN ResNet-50, for a profiler; results are not compared."""
    rng, channels = np.random.default_rng(0), _CHANNELS
    shapes = [(_SIZE_HW[0] // stride, _SIZE_HW[1] // stride) for stride in (4, 8, 16, 32)]
    maps = [rng.standard_normal((1, channels, h, w), np.float32) for h, w in shapes]
    for layout, dtype in (("NHWC", np.float16), ("NHWC", np.float32), ("NCHW", np.float16)):
        addresses = [memory.upload(m.astype(dtype)) for m in maps]  # random: any layout
        pyramid = Pyramid(addresses, [h for h, _ in shapes], [w for _, w in shapes], 1, channels,
                          np.dtype(dtype).name, layout)  # fmt: skip
        for count, size in ((1000, 7), (100, 14)):
            pooled = memory.allocate(count * channels * size * size * np.dtype(dtype).itemsize)
            kernels.multilevel_roi_align(
                pyramid, memory.upload(_boxes(rng, 1, count)), count, pooled, output_size=size, sampling_ratio=2,
                aligned=False, output_dtype=np.dtype(dtype).name,
            )  # fmt: skip
    for batch, groups, iou in ((5, 1, 0.7), (1, 80, 0.5)):
        owner = rng.integers(0, groups, (batch, 1000)).astype(np.int32)
        kernels.batched_nms(
            memory.upload(_boxes(rng, batch, 1000)), memory.upload(owner),
            memory.upload(np.full(batch, 1000, np.int32)), batch=batch, num_boxes=1000, iou_threshold=iou,
            max_output=1000, workspace=memory.allocate(kernels.batched_nms_workspace(batch, 1000)),
            indices=memory.allocate(batch * 1000 * 4), num=memory.allocate(batch * 4),
        )  # fmt: skip
    memory.download(memory.allocate(4), (1,), np.int32)  # waits for the kernels


def _boxes(rng: np.random.Generator, batch: int, count: int) -> np.ndarray:
    """Boxes xyxy float32 `[batch, count, 4]` in pixels, with sides of 8 to 600 px."""
    corners = rng.uniform(0, 700, (batch, count, 2))
    return np.concatenate([corners, corners + 8 * np.exp(rng.uniform(0, 4.3, (batch, count, 2)))], -1, dtype=np.float32)


def run_under(tool: str, output: Path) -> int:
    """Run this program under a tool, write the tool's output to a file, and return the exit code."""
    if tool == _COUNTERS:
        name, options = "ncu", _NCU
    else:
        name, options = "compute-sanitizer", ("--tool", tool, "--error-exitcode", str(_TOOL_FOUND_ERRORS))
    program = shutil.which(name) or shutil.which(name, path="/usr/local/cuda/bin")
    if program is None:
        print(f"no {name}, which is part of the CUDA toolkit")
        return NOT_RUN
    command = [program, *options, sys.executable, __file__, *(["--full-size"] if tool == _COUNTERS else [])]
    with atomic_path(output) as draft, open(draft, "w", encoding="utf-8") as file:
        code = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT).returncode
    print(f"{tool}: {'clean' if code == 0 else f'exit code {code}, see {output.name}'}")
    return int(code != 0)


def main(arguments: Sequence[str] | None = None) -> int:
    """Call the kernels, here or under a tool, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--under", choices=(*_SANITIZER_TOOLS, _COUNTERS), help="tool that the kernels run under")
    parser.add_argument("--output", type=Path, help="file for the tool's output; default: TOOL.txt")
    parser.add_argument("--full-size", action="store_true", help="call the kernels at the sizes of a ResNet-50 model")
    given = parser.parse_args(arguments)
    library = find_library("kernels")
    if library is None:
        print("no compiled kernels; run `maskrcnn build-plugins`")
        return NOT_RUN
    if given.under:
        return run_under(given.under, given.output or Path(f"{given.under}.txt"))
    (launch_at_full_size if given.full_size else exercise_kernels)(Kernels(library), GpuMemory())
    return 0


if __name__ == "__main__":
    sys.exit(main())

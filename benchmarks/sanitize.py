"""The compiled kernels under NVIDIA's compute-sanitizer: out of bounds, races in shared memory, uninitialised reads.

    python benchmarks/sanitize.py OUT [--tools memcheck racecheck initcheck synccheck]

runs `python benchmarks/sanitize.py --exercise` once under each tool, in a process without PyTorch, whose allocator
would hide a step beyond an array, and writes what the tool says to OUT/sanitizer-TOOL.txt. The exercise calls every
kernel on inputs of awkward sizes, each in an allocation of exactly its size, and compares the results with the NumPy
reference. Exit code 1 if a tool finds something or a result is wrong.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import numpy as np

from maskrcnn.files import make_folder
from maskrcnn.imaging.postprocess import Detections
from maskrcnn.plugins import reference
from maskrcnn.plugins.build import find_library
from maskrcnn.plugins.native import Kernels, Pyramid

_TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
_FOUND = 9  # exit code of a tool that found something


class Memory(Protocol):
    """Where the kernels read and write."""

    def put(self, values: np.ndarray) -> int:
        """The address of a copy of an array."""

    def room(self, size: int) -> int:
        """The address of so many bytes, uninitialised."""

    def take(self, address: int, shape: tuple[int, ...], dtype: type) -> np.ndarray:
        """A copy of what lies at an address, after all kernels have run."""


class GpuMemory:
    """Memory of the first GPU, through CUDA's runtime."""

    def __init__(self) -> None:
        from cuda.bindings import runtime

        self._cuda = runtime

    def room(self, size: int) -> int:
        return int(self._checked(self._cuda.cudaMalloc(size)))

    def put(self, values: np.ndarray) -> int:
        values, kind = np.ascontiguousarray(values), self._cuda.cudaMemcpyKind.cudaMemcpyHostToDevice
        address = self.room(values.nbytes)
        self._checked(self._cuda.cudaMemcpy(address, values.ctypes.data, values.nbytes, kind))
        return address

    def take(self, address: int, shape: tuple[int, ...], dtype: type) -> np.ndarray:
        values, kind = np.empty(shape, dtype), self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._checked(self._cuda.cudaDeviceSynchronize())
        self._checked(self._cuda.cudaMemcpy(values.ctypes.data, address, values.nbytes, kind))
        return values

    def _checked(self, answer: tuple) -> object:
        if int(answer[0]) != 0:
            raise RuntimeError(f"CUDA: {answer[0]!s}")
        return answer[1] if len(answer) > 1 else None


def exercise(kernels: Kernels, memory: Memory, say: Callable[[str], None] = print) -> None:
    """Calls every kernel and compares with the reference.

    Raises:
        AssertionError: for a wrong result.
    """
    rng = np.random.default_rng(0)
    for channels, size, ratio, layout in ((5, 7, 2, "NCHW"), (65, 9, 2, "NCHW"), (3, 3, 3, "NCHW"), (4, 7, 0, "NCHW"),
                                          (8, 7, 2, "NHWC"), (132, 14, 2, "NHWC"), (5, 2, 0, "NHWC")):  # fmt: skip
        for dtype in (np.float32, np.float16):
            _roi_align(kernels, memory, rng, channels, size, ratio, layout, dtype)
            say(f"RoIAlign {channels} channels, {size}×{size}, ratio {ratio}, {layout}, {np.dtype(dtype).name}: right")
    for boxes, groups, most in ((1, 1, 1), (63, 2, 20), (700, 3, 700), (1500, 90, 100), (5000, 1, 2000)):
        _nms(kernels, memory, rng, boxes, groups, most)
        say(f"NMS {boxes} boxes in {groups} groups: right")
    for count, size_hw in ((1, (1, 1)), (5, (97, 133)), (3, (64, 1100))):
        _paste(kernels, memory, rng, count, size_hw)
        say(f"paste {count} masks into {size_hw[0]}×{size_hw[1]}: right")


def _roi_align(
    kernels: Kernels,
    memory: Memory,
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
    laid = [m.transpose(0, 2, 3, 1) if layout == "NHWC" else m for m in maps]
    pyramid = Pyramid([memory.put(m) for m in laid], [h for h, _ in shapes], [w for _, w in shapes], 2, channels,
                      np.dtype(dtype).name, layout)  # fmt: skip
    shape = (2, 5, channels, size, size)
    pooled = memory.room(int(np.prod(shape)) * 4)
    given = {"output_size": size, "sampling_ratio": ratio, "aligned": True}
    kernels.multilevel_roi_align(pyramid, memory.put(rois), 5, pooled, output_dtype="float32", **given)
    wanted = reference.multilevel_roi_align(maps, rois, **given)
    np.testing.assert_allclose(memory.take(pooled, shape, np.float32), wanted, atol=1e-4)


def _nms(kernels: Kernels, memory: Memory, rng: np.random.Generator, count: int, groups: int, most: int) -> None:
    corners = rng.uniform(0, 400, (2, count, 2))
    boxes = np.concatenate([corners, corners + rng.uniform(5, 80, (2, count, 2))], axis=-1).astype(np.float32)
    group_of = rng.integers(0, groups, (2, count)).astype(np.int32)
    counts = np.array([count, count // 2], np.int32)
    indices, num = memory.room(2 * most * 4), memory.room(2 * 4)
    kernels.batched_nms(
        memory.put(boxes), memory.put(group_of), memory.put(counts), batch=2, num_boxes=count, iou_threshold=0.5,
        max_output=most, workspace=memory.room(kernels.batched_nms_workspace(2, count)), indices=indices, num=num,
    )  # fmt: skip
    wanted = reference.batched_nms(boxes, group_of, counts, iou_threshold=0.5, max_output=most)
    np.testing.assert_array_equal(memory.take(num, (2,), np.int32), wanted[1])
    np.testing.assert_array_equal(memory.take(indices, (2, most), np.int32), wanted[0])


def _paste(kernels: Kernels, memory: Memory, rng: np.random.Generator, count: int, size_hw: tuple[int, int]) -> None:
    masks = np.round(rng.random((count, 28, 28))).astype(np.float32)
    corners = rng.uniform(-20, 100, (count, 2))
    boxes = np.concatenate([corners, corners + rng.uniform(1, 150, (count, 2))], axis=-1).astype(np.float32)
    shape = (count, size_hw[0], -(-size_hw[1] // 32))
    bits = memory.room(int(np.prod(shape)) * 4)
    kernels.paste_masks(
        memory.put(masks), memory.put(boxes), bits, num_masks=count, mask_size=28, dtype="float32", size_hw=size_hw
    )
    found = np.unpackbits(memory.take(bits, shape, np.uint32).view(np.uint8), axis=-1, bitorder="little")
    blank = np.zeros(count, np.int64)
    wanted = Detections(boxes, blank.astype(np.float32), blank, masks, size_hw).full_masks()
    different = (found[..., : size_hw[1]].astype(bool) != wanted).mean()
    assert different < 1e-3, f"{different:.2%} of the pixels differ"


def sanitize(tool: str, out: Path, sanitizer: str) -> bool:
    """Runs the exercise under a tool; whether it found nothing and all results were right."""
    command = [sanitizer, "--tool", tool, "--error-exitcode", str(_FOUND), sys.executable, __file__, "--exercise"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=540)
    (out / f"sanitizer-{tool}.txt").write_text(done.stdout + done.stderr, encoding="utf-8")
    return done.returncode == 0


def main() -> int:
    """Prints a line for each tool and returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, nargs="?", default=Path("sanitizer"))
    parser.add_argument("--tools", nargs="+", choices=_TOOLS, default=list(_TOOLS))
    parser.add_argument("--exercise", action="store_true", help="call the kernels, here and now")
    given = parser.parse_args()
    library = find_library("kernels")
    if library is None:
        print("left out: no compiled kernels; run `maskrcnn build-plugins`")
        return 0
    if given.exercise:
        exercise(Kernels(library), GpuMemory())
        return 0
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if sanitizer is None:
        print("left out: no compute-sanitizer; it comes with the CUDA toolkit")
        return 0
    make_folder(given.out)
    clean = True
    for tool in given.tools:
        is_clean = sanitize(tool, given.out, sanitizer)
        clean = clean and is_clean
        print(f"{tool}: {'clean' if is_clean else 'see'} {given.out / f'sanitizer-{tool}.txt'}", flush=True)
    return 0 if clean else 1


if __name__ == "__main__":
    sys.exit(main())

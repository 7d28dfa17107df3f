"""All checks and benchmarks that need a GPU, in one command.

    python benchmarks/gpu.py OUT
    python benchmarks/gpu.py OUT --sanitize [--tools memcheck racecheck initcheck synccheck]

The first command compiles the kernels and runs the tests that need a GPU or TensorRT, the kernels under NVIDIA's
compute-sanitizer and against torchvision's ops, the training benchmark, and the latency tables (ResNet-50 at 800×1344,
one check per batch size). Each check runs in its own process; its output and JSON are written to the folder OUT, and
its outcome is printed: passed, failed, or left out with the reason. The exit code is 1 if a check failed.

Every check ends within ten minutes, and stopping one does not affect the results of the others: `--only` and
`--budget-s` split the whole into parts for machines with a time limit.

The second command is the sanitizer check alone: `python benchmarks/gpu.py --exercise` under each tool, in a process
without PyTorch, whose allocator would hide an access beyond an array; the tool's output goes to OUT/sanitizer-TOOL.txt.
The exercise calls every kernel on inputs of awkward sizes, each in an allocation of exactly its size, and compares the
results with the NumPy reference. The exit code is 1 if a tool reports an error or a result is wrong.
"""

from __future__ import annotations

import argparse
import importlib.util
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from timing import environment

from maskrcnn.files import make_folder, write_json
from maskrcnn.imaging.postprocess import Detections
from maskrcnn.plugins import reference
from maskrcnn.plugins.build import find_library
from maskrcnn.plugins.native import Kernels, Pyramid

_ROOT = Path(__file__).resolve().parents[1]
MIN_S = 20  # a check is not started with less time left
_MAX_S = 580
_LATENCY_BATCHES = (1, 8, 16)
_TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
_TOOL_FOUND_ERRORS = 9  # exit code


@dataclass(frozen=True)
class Check:
    """A command and the Python packages it requires; `{out}` in the command is the output folder."""

    name: str
    command: tuple[str, ...]
    packages: tuple[str, ...] = ()
    limit_s: float = 240


def checks() -> list[Check]:
    """All checks, the quickest first."""
    train = ("benchmarks/train.py", "--device", "cuda", "--markdown", "--precision", "fp32,bf16")
    shapes = ("-m", "maskrcnn", "train", "--device", "cuda", "--epochs", "3", "--output", "{out}/run")
    return [
        Check("build-plugins", ("-m", "maskrcnn", "build-plugins"), limit_s=400),
        Check("tests", ("-m", "pytest", "-q", "-rs", "-k", "gpu or cuda", "tests"), ("pytest", "hypothesis")),
        Check("ops", ("benchmarks/ops.py", "--device", "cuda", "--json", "{out}/ops.json")),
        Check("sanitizer", ("benchmarks/gpu.py", "{out}", "--sanitize"), limit_s=400),
        Check("train-small", (*train, "--model", "maskrcnn_resnet18_fpn_small", "--batch", "8,32",
                              "--steps", "30", "--json", "{out}/train-small.json")),
        Check("train-resnet50", (*train, "--model", "maskrcnn_resnet50_fpn", "--batch", "2,8", "--steps", "20",
                                 "--json", "{out}/train-resnet50.json")),
        Check("shapes", shapes, ("pycocotools", "onnx")),
        Check("tensorrt", ("-m", "pytest", "-q", "-rs", "-m", "tensorrt", "tests"),
              ("pytest", "hypothesis", "tensorrt"), limit_s=_MAX_S),
        *(_latency_check(batch) for batch in _LATENCY_BATCHES),
    ]  # fmt: skip


def _latency_check(batch: int) -> Check:
    """The latency table of one batch size, for which an engine with one profile is built: three would take too long."""
    options = ("--gpu-only", "--size", "800x1344", "--batch", str(batch), "--repeat", "20")
    output = ("--output", f"{{out}}/latency-{batch}")
    command = ("benchmarks/run.py", "--workload", "resnet50", *options, *output)
    return Check(f"latency-{batch}", command, ("pycocotools", "onnx", "onnxruntime"), limit_s=_MAX_S)


def run_check(check: Check, out: Path, left_s: float = float("inf")) -> dict[str, object]:
    """Run a check for at most `left_s` and return its outcome; its output is written to `OUT/NAME.txt`."""
    missing = [name for name in check.packages if importlib.util.find_spec(name) is None]
    if missing:
        return {"name": check.name, "outcome": "left out", "why": f"no package {', '.join(missing)}"}
    command = [sys.executable, *(part.format(out=out) for part in check.command)]
    start, log, limit_s = time.perf_counter(), out / f"{check.name}.txt", min(check.limit_s, left_s)
    with open(log, "w", encoding="utf-8") as file:
        try:
            code = subprocess.run(command, cwd=_ROOT, stdout=file, stderr=file, timeout=limit_s).returncode
            outcome = "passed" if code == 0 else "failed"
        except subprocess.TimeoutExpired:
            is_slow = limit_s == check.limit_s
            outcome = "failed" if is_slow else "left out"
            file.write(f"\nstopped after {limit_s:.0f} s{'' if is_slow else ', when the time budget was spent'}\n")
    if outcome == "passed" and "pytest" in check.command and "passed" not in _last_line(log):
        outcome = "left out"  # all tests were skipped
    seconds = round(time.perf_counter() - start, 1)
    found = {"name": check.name, "outcome": outcome, "seconds": seconds, "command": command[1:]}
    return found | ({} if outcome == "passed" else {"why": _last_line(log)})


def _last_line(log: Path) -> str:
    lines = [line for line in log.read_text(encoding="utf-8").splitlines() if line.strip()]
    return lines[-1] if lines else "no output"


def _run_checks(given: argparse.Namespace) -> int:
    import torch  # not at the top: the sanitizer's process must not load it

    if not torch.cuda.is_available():
        print("left out: no CUDA GPU that torch can use; see `maskrcnn doctor`")
        return 0
    out = given.out.resolve()
    make_folder(out)
    found: list[dict[str, object]] = []
    start = time.perf_counter()
    for check in checks():
        if check.name in given.skip or check.name not in given.only:
            continue
        left_s = given.budget_s - (time.perf_counter() - start)
        late = {"name": check.name, "outcome": "left out", "why": "the time budget is spent"}
        found.append(run_check(check, out, left_s) if left_s > MIN_S else late)
        print("  ".join(str(found[-1].get(key, "")) for key in ("name", "outcome", "seconds", "why")), flush=True)
        write_json(out / "gpu.json", {"environment": environment(), "checks": found})
    return int(any(each["outcome"] == "failed" for each in found))


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


def sanitize(tool: str, out: Path, sanitizer: str) -> bool:
    """Run the exercise under a tool; return True if there were no errors and all results were right."""
    command = [sanitizer, "--tool", tool, "--error-exitcode", str(_TOOL_FOUND_ERRORS)]
    command += [sys.executable, __file__, "--exercise"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=540)
    (out / f"sanitizer-{tool}.txt").write_text(done.stdout + done.stderr, encoding="utf-8")
    return done.returncode == 0


def _sanitize_or_exercise(given: argparse.Namespace) -> int:
    library = find_library("kernels")
    if library is None:
        print("left out: no compiled kernels; run `maskrcnn build-plugins`")
        return 0
    if given.exercise:
        exercise_kernels(Kernels(library), GpuMemory())
        return 0
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if sanitizer is None:
        print("left out: no compute-sanitizer, which is part of the CUDA toolkit")
        return 0
    make_folder(given.out)
    clean = True
    for tool in given.tools:
        is_clean = sanitize(tool, given.out, sanitizer)
        clean = clean and is_clean
        print(f"{tool}: {'clean' if is_clean else 'see'} {given.out / f'sanitizer-{tool}.txt'}", flush=True)
    return 0 if clean else 1


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the checks, or the sanitizer alone, and return the exit code."""
    names = [check.name for check in checks()]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("out", type=Path, nargs="?", default=Path("gpu"), help="folder for output and results; default: gpu")
    add("--only", nargs="+", help="checks to run", choices=names, metavar="CHECK", default=names)
    add("--skip", nargs="+", help="checks to leave out", choices=names, metavar="CHECK", default=[])
    add("--budget-s", type=float, default=float("inf"), help="time limit for all checks together, seconds")
    add("--sanitize", action="store_true", help="run only the kernels under compute-sanitizer, in this process")
    add("--tools", nargs="+", choices=_TOOLS, default=list(_TOOLS), help="compute-sanitizer tools; default: all")
    add("--exercise", action="store_true", help="call the kernels once in this process, without compute-sanitizer")
    given = parser.parse_args(arguments)
    return _sanitize_or_exercise(given) if given.sanitize or given.exercise else _run_checks(given)


if __name__ == "__main__":
    sys.exit(main())

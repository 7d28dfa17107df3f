"""Everything of this project that only a GPU can tell, in one command.

    python benchmarks/gpu.py OUT

compiles the kernels, runs the tests that need a GPU or TensorRT, the kernels under compute-sanitizer and beside
torchvision's ops, the training benchmark and the latency tables (ResNet-50 at 800×1344, a check for each batch size),
each in a process of its own, writes what they print and their JSON to the folder OUT, and says of each whether it
passed, failed, or was left out and for want of what. Exit code 1 if one failed.

Every check ends within ten minutes, and one that is stopped costs no other its results: `--only` and `--budget-s` make
pieces of the whole, for machines that are lent for so long.
"""

from __future__ import annotations

import argparse
import importlib.util
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from timing import environment

from maskrcnn.files import make_folder, write_json

ROOT = Path(__file__).resolve().parents[1]
LEAST_S = 20  # a check that has less is not begun
_MOST_S = 580  # of any check
_LATENCY_BATCHES = (1, 8, 16)


@dataclass(frozen=True)
class Check:
    """One command, and the Python packages without which it cannot run; `{out}` is the output folder."""

    name: str
    command: tuple[str, ...]
    packages: tuple[str, ...] = ()
    limit_s: float = 240


def checks(precisions: str = "fp32,bf16") -> list[Check]:
    """What is run, the quickest first."""
    train = ("benchmarks/train.py", "--device", "cuda", "--markdown", "--precision", precisions)
    shapes = ("-m", "maskrcnn", "train", "--device", "cuda", "--epochs", "3", "--output", "{out}/run")
    return [
        Check("build-plugins", ("-m", "maskrcnn", "build-plugins"), limit_s=400),
        Check("tests", ("-m", "pytest", "-q", "-rs", "-k", "gpu or cuda", "tests"), ("pytest", "hypothesis")),
        Check("ops", ("benchmarks/ops.py", "--device", "cuda", "--json", "{out}/ops.json")),
        Check("sanitizer", ("benchmarks/sanitize.py", "{out}"), limit_s=400),
        Check("train-small", (*train, "--model", "maskrcnn_resnet18_fpn_small", "--batch", "8,32",
                              "--steps", "30", "--json", "{out}/train-small.json")),
        Check("train-resnet50", (*train, "--model", "maskrcnn_resnet50_fpn", "--batch", "2,8", "--steps", "20",
                                 "--json", "{out}/train-resnet50.json")),
        Check("shapes", shapes, ("pycocotools", "onnx")),
        Check("tensorrt", ("-m", "pytest", "-q", "-rs", "-m", "tensorrt", "tests"),
              ("pytest", "hypothesis", "tensorrt"), limit_s=_MOST_S),
        *(_latency(batch) for batch in _LATENCY_BATCHES),
    ]  # fmt: skip


def _latency(batch: int) -> Check:
    """The table of one batch size. An engine with one profile is built for it: three would take three times as long."""
    options = ("--gpu-only", "--size", "800x1344", "--batch", str(batch), "--repeat", "20")
    output = ("--output", f"{{out}}/latency-{batch}")
    command = ("benchmarks/run.py", "--workload", "resnet50", *options, *output)
    return Check(f"latency-{batch}", command, ("pycocotools", "onnx", "onnxruntime"), limit_s=_MOST_S)


def run(check: Check, out: Path, left_s: float = float("inf")) -> dict[str, object]:
    """The outcome of a check, which may take `left_s` at most; its output is in `OUT/NAME.txt`."""
    missing = [name for name in check.packages if importlib.util.find_spec(name) is None]
    if missing:
        return {"name": check.name, "outcome": "left out", "why": f"no package {', '.join(missing)}"}
    command = [sys.executable, *(part.format(out=out) for part in check.command)]
    began, log, limit_s = time.perf_counter(), out / f"{check.name}.txt", min(check.limit_s, left_s)
    with open(log, "w", encoding="utf-8") as file:
        try:
            code = subprocess.run(command, cwd=ROOT, stdout=file, stderr=file, timeout=limit_s).returncode
            outcome = "passed" if code == 0 else "failed"
        except subprocess.TimeoutExpired:
            is_slow = limit_s == check.limit_s
            outcome = "failed" if is_slow else "left out"
            file.write(f"\nstopped after {limit_s:.0f} s{'' if is_slow else ', when the time budget was spent'}\n")
    if outcome == "passed" and "pytest" in check.command and "passed" not in _last_line(log):
        outcome = "left out"  # all tests were skipped
    seconds = round(time.perf_counter() - began, 1)
    found = {"name": check.name, "outcome": outcome, "seconds": seconds, "command": command[1:]}
    return found | ({} if outcome == "passed" else {"why": _last_line(log)})


def _too_late(check: Check) -> dict[str, object]:
    return {"name": check.name, "outcome": "left out", "why": "the time budget is spent"}


def _last_line(log: Path) -> str:
    lines = [line for line in log.read_text(encoding="utf-8").splitlines() if line.strip()]
    return lines[-1] if lines else "no output"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the checks and returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="folder for what the checks print and measure")
    names = [check.name for check in checks()]
    parser.add_argument("--only", nargs="+", help="checks to run", choices=names, metavar="CHECK", default=names)
    parser.add_argument("--skip", nargs="+", help="checks to leave out", choices=names, metavar="CHECK", default=[])
    parser.add_argument(
        "--budget-s", type=float, default=float("inf"), help="no check runs for longer than is left of it"
    )
    given = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("left out: no CUDA GPU that torch can use; see `maskrcnn doctor`")
        return 0
    out = given.out.resolve()
    make_folder(out)
    found, began = [], time.perf_counter()
    for check in checks():
        if check.name in given.skip or check.name not in given.only:
            continue
        left_s = given.budget_s - (time.perf_counter() - began)
        found.append(run(check, out, left_s) if left_s > LEAST_S else _too_late(check))
        print("  ".join(str(found[-1].get(key, "")) for key in ("name", "outcome", "seconds", "why")), flush=True)
        write_json(out / "gpu.json", {"environment": environment(), "checks": found})
    return int(any(each["outcome"] == "failed" for each in found))


if __name__ == "__main__":
    sys.exit(main())

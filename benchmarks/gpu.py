"""All checks and benchmarks that need a GPU, in one command.

    python benchmarks/gpu.py OUT                # everything; hours
    python benchmarks/gpu.py OUT --call 1       # nine minutes: environment, kernels, tests, latency, training step
    python benchmarks/gpu.py OUT --call 2       # nine minutes: memory and race checks, hardware counters
    python benchmarks/gpu.py OUT --dry-run      # without a GPU: what the two calls would do, and what they need

Each check runs in its own process with its own time limit; its output and JSON are written to the folder OUT, and
everything of at most 8 MB to one archive, which is replaced after every check. The summary is printed last. The exit
code is 1 if a check failed.

The package need not be installed: without it, the checkout is used. Missing pure or binary wheels, such as pycocotools,
are taken from `--wheels`, so nothing is downloaded or installed. The dry run starts every check with `--help`, or
collects its tests, under the real time limits and without the packages named by `--without`. It fails if the limits
exceed the time of a call or if the archive is not complete.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from timing import environment

_ROOT = Path(__file__).resolve().parents[1]
MIN_S = 20  # a check is not started with less time left
CALL_S = 540.0  # time of one call, of the ten minutes that borrowed machines commonly allow
_MAX_S = 580
_MAX_CARRIED_MB = 64
_MAX_ARCHIVED_BYTES = 8 << 20
_LATENCY_BATCHES = (1, 8, 16)
_SHOWN_LINES = 40
_LEFT_OUT = 77  # exit code of a check that cannot run here
_PACKAGE_FOLDERS = ("benchmarks", "configs", "export", "plugins", "runtime")
_ABSENT = ("openvino", "tensorrt")  # on a machine with PyTorch and CUDA's compiler only


@dataclass(frozen=True)
class Check:
    """A command, the Python packages it requires, and the calls it is part of; `{out}` is the output folder."""

    name: str
    command: tuple[str, ...]
    packages: tuple[str, ...] = ()
    limit_s: float = 240
    calls: tuple[int, ...] = ()
    is_shown: bool = False  # print the last lines of its output with the summary


def checks() -> list[Check]:
    """All checks in order, those of the calls first."""
    train = ("benchmarks/train.py", "--device", "cuda", "--markdown", "--precision", "fp32,bf16")
    resnet50 = ("--model", "maskrcnn_resnet50_fpn")
    latency = ("benchmarks/run.py", "--workload", "resnet50", "--gpu-only", "--size", "800x1344", "--repeat", "20")
    shapes = ("-m", "maskrcnn", "train", "--device", "cuda", "--epochs", "3", "--output", "{out}/run")
    return [
        Check("environment", ("benchmarks/gpu.py", "{out}", "--describe"), limit_s=20, calls=(1, 2)),
        Check("build-plugins", ("-m", "maskrcnn", "build-plugins"), limit_s=110, calls=(1, 2)),
        Check("ops", ("benchmarks/ops.py", "--device", "cuda", "--json", "{out}/ops.json"), limit_s=80, calls=(1,),
              is_shown=True),
        *(_tests(folder, limit_s) for folder, limit_s in (("plugins", 80), ("maskrcnn", 60), ("runtime", 50))),
        Check("pytorch", (*latency, "--checkpoint-only", "--batch", "1,8", "--output", "{out}/pytorch"),
              ("pycocotools",), limit_s=85, calls=(1,), is_shown=True),
        Check("train-step", (*train, *resnet50, "--batch", "2", "--steps", "8", "--warmup", "4", "--no-memory",
                             "--json", "{out}/train-step.json"),
              ("pycocotools",), limit_s=55, calls=(1,), is_shown=True),
        _exercise("memcheck", 130, calls=(2,)),
        _exercise("racecheck", 150, calls=(2,)),
        _exercise("counters", 120, calls=(2,)),
        _exercise("initcheck", 150),
        _exercise("synccheck", 150),
        Check("train-small", (*train, "--model", "maskrcnn_resnet18_fpn_small", "--batch", "8,32",
                              "--steps", "30", "--json", "{out}/train-small.json"), ("pycocotools",)),
        Check("train-resnet50", (*train, *resnet50, "--batch", "2,8", "--steps", "20",
                                 "--json", "{out}/train-resnet50.json"), ("pycocotools",)),
        Check("shapes", shapes, ("pycocotools", "onnx")),
        Check("tensorrt", ("-m", "pytest", "-q", "-rs", "-m", "tensorrt", "tests"),
              ("pytest", "hypothesis", "tensorrt"), limit_s=_MAX_S),
        # One check per batch size: an engine with three profiles would take too long to build.
        *(Check(f"latency-{batch}", (*latency, "--batch", str(batch), "--output", f"{{out}}/latency-{batch}"),
                ("pycocotools", "onnx", "onnxruntime"), limit_s=_MAX_S) for batch in _LATENCY_BATCHES),
    ]  # fmt: skip


def _tests(folder: str, limit_s: float) -> Check:
    """The tests of a folder that need a GPU; files that cannot be imported here do not stop the others."""
    options = ("-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", "--continue-on-collection-errors")
    command = (*options, "-k", "gpu or cuda", f"tests/{folder}")
    return Check(f"tests-{folder}", command, ("pytest", "hypothesis"), limit_s, calls=(1,))


def _exercise(tool: str, limit_s: float, calls: tuple[int, ...] = ()) -> Check:
    command = ("benchmarks/exercise.py", "--under", tool, "--output", f"{{out}}/{tool}-report.txt")
    return Check(tool, command, limit_s=limit_s, calls=calls)


def run_check(
    check: Check,
    out: Path,
    left_s: float = float("inf"),
    *,
    extra: Sequence[str] = (),
    variables: dict[str, str] | None = None,
) -> dict[str, object]:
    """Run a check for at most `left_s` and return its outcome; its output is written to `OUT/NAME.txt`.

    Args:
        check: the check.
        out: output folder.
        left_s: seconds of the time budget that are left.
        extra: arguments added to the command.
        variables: environment of the process; None: this process's.
    """
    missing = [name for name in check.packages if importlib.util.find_spec(name) is None]
    if missing:
        return {"name": check.name, "outcome": "left out", "why": f"no package {', '.join(missing)}"}
    command = [sys.executable, *(part.format(out=out) for part in check.command), *extra]
    start, log, limit_s = time.perf_counter(), out / f"{check.name}.txt", min(check.limit_s, left_s)
    with open(log, "w", encoding="utf-8") as file:
        try:
            code = subprocess.run(
                command, cwd=_ROOT, stdout=file, stderr=file, timeout=limit_s, env=variables
            ).returncode
            outcome = {0: "passed", _LEFT_OUT: "left out"}.get(code, "failed")
        except subprocess.TimeoutExpired:
            is_slow = limit_s == check.limit_s
            outcome = "failed" if is_slow else "left out"
            file.write(f"\nstopped after {limit_s:.0f} s{'' if is_slow else ', when the time budget was spent'}\n")
    last = _last_lines(log, 1)
    is_tolerated = "--continue-on-collection-errors" in check.command and _has_only_collection_errors(log)
    if outcome == "failed" and is_tolerated:
        outcome = "passed"
    if outcome == "passed" and "pytest" in check.command and not re.search(r"\d+ (passed|.*tests? collected)", last):
        outcome = "left out"  # all tests were skipped
    seconds = round(time.perf_counter() - start, 1)
    found = {"name": check.name, "outcome": outcome, "seconds": seconds, "command": command[1:]}
    return found | ({} if outcome == "passed" and not is_tolerated else {"why": last})


def _has_only_collection_errors(log: Path) -> bool:
    """Whether pytest's only errors are files that could not be imported."""
    text, last = log.read_text(encoding="utf-8"), _last_lines(log, 1)
    is_clean = "failed" not in last and not re.search(r"^_* ?ERROR at ", text, re.MULTILINE)
    return is_clean and re.search(r"\d+ errors?", last) is not None


def _last_lines(log: Path, count: int) -> str:
    lines = [line for line in log.read_text(encoding="utf-8").splitlines() if line.strip()]
    return "\n".join(lines[-count:]) if lines else "no output"


def use_checkout(folder: Path, wheels: Path, hidden: Sequence[str] = ()) -> dict[str, str]:
    """Make the package and carried wheels importable, here and in processes with the environment that is returned.

    Args:
        folder: empty folder for links to the checkout and for the content of the wheels.
        wheels: folder of .whl files, which need not exist.
        hidden: packages that processes with the environment cannot import.
    """
    if importlib.util.find_spec("maskrcnn") is None or importlib.util.find_spec("maskrcnn.runtime") is None:
        package = folder / "maskrcnn"
        package.mkdir()
        for path in (*(_ROOT / "maskrcnn").iterdir(), *(_ROOT / name for name in _PACKAGE_FOLDERS)):
            (package / path.name).symlink_to(path)
        for name in [name for name in sys.modules if name.partition(".")[0] == "maskrcnn"]:
            del sys.modules[name]  # the folder of the checkout, which is only a part of the package
    for wheel in sorted(wheels.glob("*.whl")):
        if importlib.util.find_spec(wheel.name.partition("-")[0]) is not None:
            continue  # what is installed fits this Python
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder)
    if hidden:
        (folder / "sitecustomize.py").write_text(f"import sys\nsys.modules.update(dict.fromkeys({list(hidden)!r}))\n")
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    paths = [str(folder), str(_ROOT / "benchmarks"), os.environ.get("PYTHONPATH", "")]
    # A safe path: with the checkout as working folder, `import maskrcnn` would find a part of the package.
    variables = {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONSAFEPATH": "1"}
    return os.environ | variables | ({"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"} if hidden else {})


def archive(out: Path, path: Path) -> list[str]:
    """Write the files of OUT, except large ones, to a .tar.gz; return the names of those left out."""
    from maskrcnn.files import atomic_path

    files = sorted(each for each in out.rglob("*") if each.is_file() and each != path)
    large = [each for each in files if each.stat().st_size > _MAX_ARCHIVED_BYTES]
    with atomic_path(path) as draft, tarfile.open(draft, "w:gz") as content:
        for each in files:
            if each not in large:
                content.add(each, each.relative_to(out))
    return [str(each.relative_to(out)) for each in large]


def describe(out: Path) -> None:
    """Write what the machine has: driver, GPU, tools, TensorRT libraries, and Python packages."""
    from maskrcnn.files import write_json

    def output_of(*command: str) -> str:
        program = shutil.which(command[0]) or shutil.which(command[0], path="/usr/local/cuda/bin")
        if program is None:
            return "not found"
        try:
            done = subprocess.run([program, *command[1:]], capture_output=True, text=True, timeout=15)
        except subprocess.TimeoutExpired:
            return "no answer within 15 s"
        return (done.stdout + done.stderr).strip()

    roots = [Path(root) for root in ("/usr/lib", "/usr/local", "/opt", *sys.path[1:]) if root and Path(root).is_dir()]
    libraries = {str(path) for root in roots for path in root.glob("*/libnvinfer*.so*")}
    libraries |= {line.split("=> ")[-1] for line in output_of("ldconfig", "-p").splitlines() if "nvinfer" in line}
    gpu = output_of("nvidia-smi", "--query-gpu=name,driver_version,memory.total,clocks.max.sm,clocks.max.mem",
                    "--format=csv")  # fmt: skip
    found = {
        "environment": environment(),
        "gpu": gpu,
        "libnvinfer": sorted(libraries),
        "tools": {name: shutil.which(name) or shutil.which(name, path="/usr/local/cuda/bin")
                  for name in ("nvcc", "ncu", "compute-sanitizer", "cuobjdump", "trtexec", "c++", "cmake")},
        "nvcc": output_of("nvcc", "--version"),
        "packages": {each.metadata["Name"]: each.version for each in importlib.metadata.distributions()},
    }  # fmt: skip
    write_json(out / "environment.json", found)
    print(f"{gpu}\nlibnvinfer: {', '.join(sorted(libraries)) or 'not found'}")


def _run_checks(given: argparse.Namespace, variables: dict[str, str]) -> list[dict[str, object]]:
    """Run the selected checks within the time budget; print outcomes as they come and the summary last."""
    from maskrcnn.files import make_folder, write_json

    out = given.out.resolve()
    make_folder(out)
    found: list[dict[str, object]] = []
    start = time.perf_counter()
    for check in given.checks:
        left_s = given.budget_s - (time.perf_counter() - start)
        late = {"name": check.name, "outcome": "left out", "why": "the time budget is spent"}
        extra = _rehearsal(check) if given.dry_run else ()
        found.append(run_check(check, out, left_s, extra=extra, variables=variables) if left_s > MIN_S else late)
        print(_line(found[-1]), flush=True)
        write_json(out / "gpu.json", {"environment": environment(), "checks": found})
        large = archive(out, given.archive)
    for check in given.checks:
        log = out / f"{check.name}.txt"
        if check.is_shown and not given.dry_run and log.is_file():
            print(f"\n== {check.name}\n{_last_lines(log, _SHOWN_LINES)}")
    print("\n== summary", *map(_line, found), sep="\n")
    left = f"; too large for it: {', '.join(large)}" if large else ""
    print(f"{given.archive}: {given.archive.stat().st_size / 1e6:.1f} MB{left}")
    return found


def _line(outcome: dict[str, object]) -> str:
    return "  ".join(str(outcome.get(key, "")) for key in ("name", "outcome", "seconds", "why"))


def _rehearsal(check: Check) -> tuple[str, ...]:
    """Arguments with which a check starts and parses its options, or collects its tests, and ends."""
    if "--describe" in check.command:
        return ()
    return ("--collect-only",) if "pytest" in check.command else ("--help",)


def _rehearse(given: argparse.Namespace, variables: dict[str, str]) -> int:
    """Print the plan and what must be carried, start every check, and return 1 if something would not work."""
    faults = []
    for call in sorted({call for check in given.checks for call in check.calls}):
        print(f"call {call}, {CALL_S:.0f} s:")
        begin = 0.0
        for check in (each for each in given.checks if call in each.calls):
            print(f"  from {begin:3.0f} s, at most {check.limit_s:3.0f} s: {check.name}: {' '.join(check.command)}")
            begin += check.limit_s
        if begin > CALL_S:
            faults.append(f"call {call}: the limits sum to {begin:.0f} s, more than {CALL_S:.0f} s")
    listing = subprocess.run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=_ROOT,
                             capture_output=True, text=True)  # fmt: skip
    files = [_ROOT / name for name in listing.stdout.split("\0") if name] + sorted(given.wheels.glob("*.whl"))
    size_mb = sum(path.stat().st_size for path in files if path.is_file()) / 1e6
    print(f"to carry: this checkout and the wheels in {given.wheels}, {size_mb:.1f} of at most {_MAX_CARRIED_MB} MB")
    if size_mb > _MAX_CARRIED_MB:
        faults.append(f"{size_mb:.0f} MB to carry, more than {_MAX_CARRIED_MB} MB")
    if not any(given.wheels.glob("pycocotools-*.whl")):
        print(
            "  on a machine without pycocotools, put its wheel there first: pip download --no-deps --only-binary :all: "
            f"--python-version 3.12 --platform manylinux2014_x86_64 -d {given.wheels} pycocotools"
        )
    outcomes = _run_checks(given, variables)
    faults += [_line(each) for each in outcomes if each["outcome"] != "passed"]
    with tarfile.open(given.archive) as content:
        lacking = {"gpu.json", *(f"{each['name']}.txt" for each in outcomes)} - set(content.getnames())
    faults += [f"{given.archive}: no {name}" for name in sorted(lacking)]
    print("\n".join(["would not work:", *faults] if faults else ["every check starts"]))
    return int(bool(faults))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run or rehearse the checks and return the exit code."""
    names = [check.name for check in checks()]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("out", type=Path, nargs="?", default=Path("gpu"), help="folder for output and results; default: gpu")
    add("--call", type=int, choices=(1, 2), help="run the checks of one nine-minute call; default: all checks")
    add("--only", nargs="+", help="checks to run", choices=names, metavar="CHECK", default=names)
    add("--skip", nargs="+", help="checks to leave out", choices=names, metavar="CHECK", default=[])
    add("--budget-s", type=float, help=f"time limit of all checks together, seconds; default: {CALL_S:.0f} with --call")
    add("--archive", type=Path, help=".tar.gz file of the results, which is replaced; default: OUT.tar.gz")
    add("--wheels", type=Path, default=_ROOT / "wheels", help="folder of .whl files to use; default: wheels")
    add("--dry-run", action="store_true", help="start the checks of both calls without running them, without a GPU")
    add("--without", nargs="*", default=_ABSENT, metavar="PACKAGE", help="packages hidden from the dry run's checks")
    add("--describe", action="store_true", help="write OUT/environment.json and run nothing")
    given = parser.parse_args(arguments)
    given.archive = (given.archive or given.out.with_name(f"{given.out.name}.tar.gz")).resolve()
    calls = {given.call} if given.call else {1, 2} if given.dry_run else set()
    given.checks = [
        check
        for check in checks()
        if check.name in given.only and check.name not in given.skip and (not calls or calls & {*check.calls})
    ]
    if given.budget_s is None:
        given.budget_s = len(calls) * CALL_S or float("inf")
    with tempfile.TemporaryDirectory(prefix="maskrcnn-gpu-") as folder:
        variables = use_checkout(Path(folder), given.wheels, given.without if given.dry_run else ())
        if given.describe:
            describe(given.out)
            return 0
        if given.dry_run:
            return _rehearse(given, variables)
        import torch

        if not torch.cuda.is_available():
            print("left out: no CUDA GPU that torch can use; see `maskrcnn doctor`")
            return 0
        return int(any(each["outcome"] == "failed" for each in _run_checks(given, variables)))


if __name__ == "__main__":
    sys.exit(main())

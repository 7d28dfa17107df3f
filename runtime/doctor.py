"""What this machine has, and what each missing thing would enable.

Every library is tried in a Python process of its own: what is broken enough to crash, hang or print nonsense
then costs a line in the report and nothing else.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.metadata
import inspect
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from maskrcnn import errors

TIMEOUT_S = 120.0  # for one library; importing torch from a cold disk takes tens of seconds

_Facts = dict[str, Any]

# Names in /proc/cpuinfo (x86, then Arm) of what fast kernels are chosen by.
_CPU_FEATURES = (
    "sse4_2 avx avx2 fma f16c avx512f avx512_vnni avx_vnni avx512_bf16 avx512_fp16 amx_tile amx_bf16 "
    "amx_int8 amx_fp16 asimd asimdhp asimddp sve sve2 bf16 i8mm sme"
)
_OLDEST_TENSORRT = "10.9"  # the first with ahead-of-time plugins that its ONNX parser finds
_NO_GPU = "an NVIDIA GPU and its driver: https://www.nvidia.com/drivers"


@dataclass(frozen=True)
class Finding:
    """One component of the machine."""

    component: str
    found: str | None  # version and what it can do; None: missing or unusable
    enables: str  # what maskrcnn does with it
    remedy: str  # how to get it
    is_enough: bool = True  # whether what was found does; if not, what it would enable and the remedy are shown too


def diagnose(more: Sequence[Callable[[], list[Finding]]] = ()) -> list[Finding]:
    """Looks at everything maskrcnn can use, in about the time of importing it. Never raises.

    Args:
        more: further groups of findings, of what this module may not know; one that raises becomes a finding too.
    """
    with ThreadPoolExecutor(max_workers=2) as pool:  # the processes mostly wait for the disk
        facts = dict(zip(_PROBES, pool.map(_facts_of, _PROBES), strict=True))
    driver = _first_line(
        "nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader", lines=16
    )
    groups: list[Callable[[], list[Finding]]] = [
        _machine,
        lambda: _torch(facts["torch"], facts["torchvision"], driver),
        lambda: _onnx(facts, driver),
        lambda: [_openvino(facts["openvino"])],
        lambda: _tensorrt(facts, driver),
        _compilers,
        lambda: [_library("pycocotools", facts["pycocotools"], "COCO data and AP", "pip install pycocotools")],
        *more,
    ]
    return [finding for group in groups for finding in _without_raising(group)]


def report(findings: list[Finding]) -> str:
    """The findings as a plain text table; below each that is missing or not enough stands what for, and the remedy."""
    width = max((len(finding.component) for finding in findings), default=0)
    lines = []
    for finding in findings:
        lines.append(f"{finding.component:<{width}}  {finding.found or 'missing'}")
        if finding.found is None or not finding.is_enough:
            what_for, how = ("would enable", "to get it") if finding.found is None else ("needed for", "what to do")
            lines.append(f"{'':<{width}}    {what_for}: {finding.enables}")
            lines.append(f"{'':<{width}}    {how}: {finding.remedy}")
    return "\n".join(lines)


def _without_raising(group: Callable[[], list[Finding]]) -> list[Finding]:
    """The group's findings; an error of ours becomes a finding, so that the rest of the report appears."""
    try:
        return group()
    except Exception as error:
        found = f"a check failed ({type(error).__name__}: {error})"
        return [Finding("doctor", found, "a complete report", "report this as a bug")]


# The machine itself


def _machine() -> list[Finding]:
    python = f"{platform.python_version()} ({platform.python_implementation()}) at {sys.executable}"
    return [
        Finding("Python", python, "everything", "https://www.python.org/downloads"),
        Finding("platform", platform.platform(), "everything", "nothing to install"),
        Finding("CPU", _cpu(), "inference on the CPU", "nothing to install"),
    ]


def _cpu(path: str = "/proc/cpuinfo") -> str:
    """Model, number of cores and vector features of the processor."""
    try:
        text = Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:  # not Linux
        text = ""
    fields = dict(re.findall(r"^([^\t:\n]+?)\s*:[ \t]*(.*)$", text, flags=re.MULTILINE))
    name = fields.get("model name") or platform.processor() or platform.machine()
    flags = set((fields.get("flags") or fields.get("Features") or "").split())
    features = [feature for feature in _CPU_FEATURES.split() if feature in flags]
    described = f": {' '.join(features)}" if features else ""
    return f"{name}, {os.cpu_count()} logical cores{described}"


# Libraries: what the probes said, as findings


def _torch(torch: _Facts, torchvision: _Facts, driver: str | None) -> list[Finding]:
    version = torch.get("version") and f"{torch['version']} (CUDA {torch.get('cuda') or 'not built in'})"
    gpus = "; ".join(torch.get("gpus", []))
    if driver is None or "version" not in torch:
        remedy = _NO_GPU if driver is None else "install torch first"
    else:
        remedy = "a torch built for the driver's CUDA version: https://pytorch.org/get-started/locally"
    enables = "training, export, checkpoints"
    return [
        _library("torch", torch, enables, "pip install 'torch>=2.10'", version),
        _library("torchvision", torchvision, enables, "pip install 'torchvision>=0.25'"),
        Finding("CUDA GPU (torch)", gpus or None, "training and inference on the GPU", remedy),
        Finding("NVIDIA driver", driver, "everything on a GPU", _NO_GPU),
    ]


def _onnx(facts: dict[str, _Facts], driver: str | None) -> list[Finding]:
    runtime = facts["onnxruntime"]
    has_gpu_wheel = (  # as in pyproject.toml
        platform.machine() in ("x86_64", "AMD64") and sys.platform in ("linux", "win32") and sys.version_info >= (3, 11)
    )
    install = f"pip install 'onnxruntime{'-gpu' if has_gpu_wheel else ''}>=1.23'"
    findings = [
        _library("onnx", facts["onnx"], "export, CPU engines", "pip install 'onnx>=1.19'"),
        _library("onnxscript", facts["onnxscript"], "export", "pip install 'onnxscript>=0.5.6'"),
        _library("ONNX Runtime", runtime, "running exported models anywhere", install),
    ]
    for name, what in (("CUDA", "CUDA"), ("Tensorrt", "TensorRT")):
        found, remedy = None, "pip install 'onnxruntime-gpu[cuda,cudnn]>=1.23'"
        state = runtime.get("providers", {}).get(f"{name}ExecutionProvider")
        if state == "":
            found = "can be created"
        elif state is not None:
            why = "there is no NVIDIA driver" if driver is None else runtime.get("lacks", state)
            remedy = f"{_NO_GPU if driver is None else remedy} (the provider is listed but unusable: {why})"
        findings.append(Finding(f"ONNX Runtime on {what}", found, "exported models on the GPU", remedy))
    return findings


def _openvino(facts: _Facts) -> Finding:
    devices = "; ".join(facts.get("devices", [])) or "no device could be asked"
    found = f"{facts.get('version')}: {devices}"
    return _library("OpenVINO", facts, "the fastest engines on CPUs", "pip install 'openvino>=2025.3'", found)


def _tensorrt(facts: dict[str, _Facts], driver: str | None) -> list[Finding]:
    install = f"pip install -U 'tensorrt>={_OLDEST_TENSORRT}' (downloads from pypi.nvidia.com)"
    tensorrt = _library("TensorRT (Python)", facts["tensorrt"], "TensorRT engines on NVIDIA GPUs", install)
    if tensorrt.found and _numbers(tensorrt.found)[:2] < _numbers(_OLDEST_TENSORRT):
        tensorrt = dataclasses.replace(tensorrt, found=f"{tensorrt.found}, which is too old", is_enough=False)
    elif tensorrt.found and not facts["tensorrt"].get("builder"):
        why = "there is no NVIDIA driver" if driver is None else _failure(facts["tensorrt"])
        tensorrt = dataclasses.replace(tensorrt, found=f"{tensorrt.found}, cannot build here: {why}")
    driver_api = "TensorRT engines (GPU memory, streams, graphs), compiling kernels without nvcc"
    return [
        tensorrt,
        _library("cuda-python", facts["cuda-python"], driver_api, "pip install 'cuda-python>=12.6'"),
        _library("PyCUDA", facts["pycuda"], "its GPU arrays as inputs of engines", "pip install pycuda (needs nvcc)"),
    ]


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version))


def _library(component: str, facts: _Facts, enables: str, install: str, found: str | None = None) -> Finding:
    """The finding for a library; one that is installed but broken counts as missing and says its error."""
    if "version" in facts:
        return Finding(component, found or facts["version"], enables, install)
    if not facts.get("missing"):
        install = f"{install} (installed but unusable: {_failure(facts)})"
    return Finding(component, None, enables, install)


def _failure(facts: _Facts) -> str:
    return facts.get("error", "no reason given")


# Compilers


def _compilers() -> list[Finding]:
    compiler = next((name for name in ("c++", "g++", "clang++") if shutil.which(name)), "c++")
    return [
        _program(compiler, "compiling the plugins, with nvcc; their kernels for tests on the CPU", "`apt install g++`"),
        _program("cc", "compiling extensions of other packages", "`apt install gcc`"),
        _program("cmake", "building the plugin libraries in a project of your own", "pip install cmake"),
    ]


def _program(name: str, enables: str, remedy: str) -> Finding:
    """The finding for a program: the first line of what `--version` says."""
    path = shutil.which(name)
    version = _first_line(path, "--version") if path else None
    return Finding(name, version and f"{version} at {path}", enables, remedy)


def _first_line(*command: str, lines: int = 1) -> str | None:
    """The first lines of a command's output, or None when the command fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    found = [line.strip() for line in done.stdout.splitlines() if line.strip()]
    return "; ".join(found[:lines]) if done.returncode == 0 and found else None


# Probes: each runs in a process of its own and yields what it learns as it learns it, so that facts survive
# a crash later on.


def _version_of(module: str) -> Callable[[], Iterator[_Facts]]:
    def probe() -> Iterator[_Facts]:
        found = getattr(importlib.import_module(module), "__version__", None)
        yield {"version": found or importlib.metadata.version(module)}

    return probe


def _probe_torch() -> Iterator[_Facts]:
    import torch

    yield {"version": torch.__version__, "cuda": torch.version.cuda}
    if torch.cuda.is_available():
        properties = [torch.cuda.get_device_properties(k) for k in range(torch.cuda.device_count())]
        yield {"gpus": [f"{p.name}, sm_{p.major}{p.minor}, {p.total_memory >> 20} MiB" for p in properties]}


def _probe_onnxruntime() -> Iterator[_Facts]:
    import onnxruntime

    yield {"version": onnxruntime.__version__}
    if hasattr(onnxruntime, "preload_dlls"):
        onnxruntime.preload_dlls()  # CUDA's libraries as pip installs them
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors, which name the libraries that a provider lacks
    states: dict[str, str] = {}
    for provider in onnxruntime.get_available_providers():
        try:
            session = onnxruntime.InferenceSession(_tiny_model(), options, providers=[provider])
            created = provider in session.get_providers()
            states[provider] = "" if created else "ONNX Runtime fell back to the CPU"
        except Exception as error:
            states[provider] = str(error).splitlines()[0][:200]
        yield {"providers": dict(states)}


def _tiny_model() -> bytes:
    """An ONNX model y = Identity(x) of one float, in protobuf's wire format, so that no library is needed."""

    def part(number: int, content: bytes | str) -> bytes:  # a field that holds text or another message
        content = content.encode() if isinstance(content, str) else content
        return bytes([number << 3 | 2, len(content)]) + content

    def value(name: str) -> bytes:  # ValueInfoProto of a float tensor [1]
        shape = part(2, part(1, b"\x08\x01"))
        return part(1, name) + part(2, part(1, b"\x08\x01" + shape))

    node = part(1, "x") + part(2, "y") + part(4, "Identity")
    graph = part(1, node) + part(2, "tiny") + part(11, value("x")) + part(12, value("y"))
    return b"\x08\x08" + part(7, graph) + part(8, b"\x10\x11")  # IR version 8, opset 17


def _probe_openvino() -> Iterator[_Facts]:
    import openvino

    yield {"version": openvino.__version__.partition("-")[0]}
    core, devices = openvino.Core(), []
    for device in core.available_devices:
        name = core.get_property(device, "FULL_DEVICE_NAME")
        abilities = core.get_property(device, "OPTIMIZATION_CAPABILITIES")
        devices.append(f"{device} {name} ({' '.join(sorted(abilities))})")
        yield {"devices": list(devices)}


def _probe_tensorrt() -> Iterator[_Facts]:
    import tensorrt

    yield {"version": tensorrt.__version__}
    tensorrt.Builder(tensorrt.Logger(tensorrt.Logger.ERROR))  # crashes or raises without a driver
    yield {"builder": True}


def _probe_cuda_python() -> Iterator[_Facts]:
    import cuda.bindings.driver  # noqa: F401

    yield {"version": importlib.metadata.version("cuda-bindings") + " (cuda-bindings)"}


_PROBES: dict[str, Callable[[], Iterator[_Facts]]] = {
    "torch": _probe_torch,
    "torchvision": _version_of("torchvision"),
    "onnx": _version_of("onnx"),
    "onnxscript": _version_of("onnxscript"),
    "onnxruntime": _probe_onnxruntime,
    "openvino": _probe_openvino,
    "tensorrt": _probe_tensorrt,
    "cuda-python": _probe_cuda_python,
    "pycuda": _version_of("pycuda"),
    "pycocotools": _version_of("pycocotools"),
}
_MARK = "maskrcnn-doctor:"  # begins a line of facts among whatever else a library prints


def _answer(name: str) -> None:
    """Runs a probe and prints what it yields; the whole work of a probe's process."""

    def tell(facts: _Facts) -> None:
        print(f"\n{_MARK}{json.dumps(facts)}", flush=True)

    try:
        for facts in _PROBES[name]():
            tell(facts)
    except ModuleNotFoundError as error:
        # Missing only if the library itself is: a library that lacks another one is broken.
        absent = (error.name or "").partition(".")[0]
        tell({"error": str(error), "missing": absent == ("cuda" if name == "cuda-python" else name)})
    except Exception as error:
        tell({"error": f"{type(error).__name__}: {error}"[:300]})


def library_facts(name: str) -> _Facts:
    """What there is to know of one library: `version`, and for OpenVINO `devices`; empty where it is missing."""
    return {key: value for key, value in _facts_of(name).items() if key not in ("error", "missing")}


def _facts_of(name: str) -> _Facts:
    """What a probe learnt before it ended, crashed or ran out of time."""
    # The current folder is taken off the path: a folder `onnx` or `torch` in it would pass for the library.
    package_parent = str(Path(inspect.getfile(errors)).resolve().parents[1])
    code = (
        f"import sys; sys.path = [p for p in sys.path if p] + [{package_parent!r}]; "
        f"from maskrcnn.runtime.doctor import _answer; _answer({name!r})"
    )
    command = [sys.executable, "-c", code]
    complaints = b""
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=TIMEOUT_S)
        printed, complaints, ending = done.stdout, done.stderr, done.returncode
    except subprocess.TimeoutExpired as error:
        printed, ending = error.stdout or b"", f"no answer within {TIMEOUT_S:.0f} s"
    except Exception as error:
        printed, ending = b"", f"Python cannot be started: {error}"
    facts: _Facts = {}
    for line in printed.decode("utf-8", errors="replace").splitlines():
        if line.startswith(_MARK):
            try:
                facts.update(json.loads(line.removeprefix(_MARK)))
            except ValueError:
                continue  # cut off by a crash
    if lacks := re.search(rb"lib\S+: cannot open shared object file", complaints):
        facts["lacks"] = lacks.group().decode("utf-8", errors="replace")
    if ending != 0:
        facts.setdefault("error", f"its process ended with {ending}" if isinstance(ending, int) else ending)
    return facts

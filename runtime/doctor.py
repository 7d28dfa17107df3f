"""Inspection of the machine: libraries, compilers, GPUs, plugins and engines, and what missing components enable.

Every library is imported in a subprocess, so that a library that crashes, hangs or prints affects only its own line of
the report.
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
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from maskrcnn import errors
from maskrcnn.errors import UserError, reason_of
from maskrcnn.files import cache_folder
from maskrcnn.machine import available_cpus, shared_memory_mb
from maskrcnn.plugins import build
from maskrcnn.plugins import toolchain as tools
from maskrcnn.plugins.build import Library
from maskrcnn.runtime.backends.tensorrt_library import OLDEST, Gpu, check_stamp, find_gpus
from maskrcnn.runtime.engine_files import read_metadata

TIMEOUT_S = 120.0  # per library; importing torch from a cold disk takes tens of seconds

Facts = dict[str, Any]  # facts about one library: `version`, `error`, `missing` and more

# Names in /proc/cpuinfo (x86, then Arm) of the features that fast kernels depend on.
_CPU_FEATURES = (
    "sse4_2 avx avx2 fma f16c avx512f avx512_vnni avx_vnni avx512_bf16 avx512_fp16 amx_tile amx_bf16 "
    "amx_int8 amx_fp16 asimd asimdhp asimddp sve sve2 bf16 i8mm sme"
)
_OLDEST_TENSORRT = ".".join(map(str, OLDEST))
_CUDA_OF_TENSORRT = {10: 12, 11: 13}  # oldest CUDA major version by TensorRT major version
_DRIVERS = "https://www.nvidia.com/drivers"
_NO_GPU = f"an NVIDIA GPU and its driver: {_DRIVERS}"
_SHARED_MEMORY_MB = 1000  # a batch of eight images of 800×1344 takes 103 MB, and each process prefetches several
_REJECTED = ".rejected"  # suffix of an engine whose comparison with its ONNX file failed


@dataclass(frozen=True)
class Finding:
    """A component of the machine."""

    component: str
    found: str | None  # version and capabilities; None: missing or unusable
    enables: str  # its use in maskrcnn
    remedy: str  # how to get it
    is_enough: bool = True  # False: found but unsuitable; `enables` and `remedy` are reported too


def diagnose(engines: Sequence[Path] = ()) -> list[Finding]:
    """Inspects everything maskrcnn can use; takes about as long as importing it. Never raises.

    Args:
        engines: engine files to check against this machine.
    """
    with ThreadPoolExecutor(max_workers=2) as pool:  # the subprocesses mostly wait for the disk
        facts = dict(zip(_PROBES, pool.map(probe, _PROBES), strict=True))
    driver = _first_line(
        "nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader", lines=16
    )
    gpus = find_gpus()
    return [
        *_guarded(_machine),
        *library_findings(facts, driver),
        *_guarded(_compilers),
        *_guarded(_toolchain),
        *_guarded(lambda: plugin_findings(gpus)),
        *_guarded(lambda: [cuda_finding(facts)]),
        *_guarded(lambda: [engine_finding(path, facts, gpus) for path in engines]),
    ]


def report(findings: list[Finding]) -> str:
    """Formats findings as a plain text table, with purpose and remedy of missing or unsuitable components."""
    width = max((len(finding.component) for finding in findings), default=0)
    lines = []
    for finding in findings:
        lines.append(f"{finding.component:<{width}}  {finding.found or 'missing'}")
        if finding.found is None or not finding.is_enough:
            purpose, fix = ("would enable", "to get it") if finding.found is None else ("needed for", "what to do")
            lines.append(f"{'':<{width}}    {purpose}: {finding.enables}")
            lines.append(f"{'':<{width}}    {fix}: {finding.remedy}")
    return "\n".join(lines)


def _guarded(group: Callable[[], list[Finding]]) -> list[Finding]:
    """Returns the group's findings; an exception becomes a finding, so that the report continues."""
    try:
        return group()
    except Exception as error:
        found = f"a check failed ({type(error).__name__}: {error})"
        return [Finding("doctor", found, "a complete report", "report this as a bug")]


def _machine() -> list[Finding]:
    python = f"{platform.python_version()} ({platform.python_implementation()}) at {sys.executable}"
    return [
        Finding("Python", python, "everything", "https://www.python.org/downloads"),
        Finding("platform", platform.platform(), "everything", "nothing to install"),
        Finding("CPU", cpu_description(), "inference on the CPU", "nothing to install"),
        *([shared_memory_finding(shared_memory_mb())] if sys.platform == "linux" else []),
        _cache(),
    ]


def cpu_description(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """Describes the CPU by model, number of cores and vector features."""
    try:
        text = cpuinfo.read_text(encoding="utf-8", errors="replace")
    except OSError:  # not Linux
        text = ""
    fields = dict(re.findall(r"^([^\t:\n]+?)\s*:[ \t]*(.*)$", text, flags=re.MULTILINE))
    name = fields.get("model name") or platform.processor() or platform.machine()
    flags = set((fields.get("flags") or fields.get("Features") or "").split())
    features = [feature for feature in _CPU_FEATURES.split() if feature in flags]
    cores = f"{os.cpu_count()} logical cores"
    if available_cpus() != os.cpu_count():
        cores += f", {available_cpus()} of them available to this process"
    return f"{name}, {cores}{': ' if features else ''}{' '.join(features)}"


def shared_memory_finding(sizes_mb: tuple[int, int] | None) -> Finding:
    """Returns the finding for /dev/shm.

    Args:
        sizes_mb: total and free size; None: /dev/shm does not exist.
    """
    found = sizes_mb and f"{sizes_mb[0]} MB, {sizes_mb[1]} MB free"
    remedy = "Docker: `--shm-size=2g`; Kubernetes: an emptyDir of medium Memory mounted at /dev/shm"
    is_enough = sizes_mb is not None and sizes_mb[1] >= _SHARED_MEMORY_MB
    return Finding("shared memory", found or None, "fast data loading by several processes; Triton", remedy, is_enough)


def _cache() -> Finding:
    folder = cache_folder()
    found = f"{folder}{' (temporary: the home folder cannot be written)' if _is_temporary(folder) else ''}"
    return Finding("cache", found, "compiled plugins and kernels", "set MASKRCNN_CACHE to a writable folder")


def _is_temporary(folder: Path) -> bool:
    return folder.parent == Path(tempfile.gettempdir()) and "MASKRCNN_CACHE" not in os.environ


# Libraries


def library_findings(facts: dict[str, Facts], driver: str | None) -> list[Finding]:
    """Returns the findings for Python libraries.

    Args:
        facts: facts by library, as `probe` returns them; a library without facts counts as missing.
        driver: description of the NVIDIA driver; None if there is no driver.
    """
    known = {name: facts.get(name, {"missing": True}) for name in _PROBES}
    groups = (_torch, _onnx, _openvino, _tensorrt, _pycocotools)
    return [finding for group in groups for finding in _guarded(partial(group, known, driver))]


def _torch(facts: dict[str, Facts], driver: str | None) -> list[Finding]:
    torch = facts["torch"]
    version = torch.get("version") and f"{torch['version']} (CUDA {torch.get('cuda') or 'not built in'})"
    if driver is None or "version" not in torch:
        remedy = _NO_GPU if driver is None else "install torch first"
    else:
        remedy = "a torch built for the driver's CUDA version: https://pytorch.org/get-started/locally"
    gpus, enables = "; ".join(torch.get("gpus", [])), "training, export, checkpoints"
    return [
        _library("torch", torch, enables, "pip install 'torch>=2.10'", version),
        _library("torchvision", facts["torchvision"], enables, "pip install 'torchvision>=0.25'"),
        Finding("CUDA GPU (torch)", gpus or None, "training and inference on the GPU", remedy),
        Finding("NVIDIA driver", driver, "everything on a GPU", _NO_GPU),
    ]


def _onnx(facts: dict[str, Facts], driver: str | None) -> list[Finding]:
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
    for name, title in (("CUDA", "CUDA"), ("Tensorrt", "TensorRT")):
        found, remedy = None, "pip install 'onnxruntime-gpu[cuda,cudnn]>=1.23'"
        state = runtime.get("providers", {}).get(f"{name}ExecutionProvider")
        if state == "":
            found = "can be created"
        elif state is not None:
            why = "there is no NVIDIA driver" if driver is None else runtime.get("lacks", state)
            remedy = f"{_NO_GPU if driver is None else remedy} (the provider is listed but unusable: {why})"
        findings.append(Finding(f"ONNX Runtime on {title}", found, "exported models on the GPU", remedy))
    return findings


def _openvino(facts: dict[str, Facts], driver: str | None) -> list[Finding]:
    openvino = facts["openvino"]
    found = f"{openvino.get('version')}: {'; '.join(openvino.get('devices', [])) or 'no device found'}"
    return [_library("OpenVINO", openvino, "the fastest engines on CPUs", "pip install 'openvino>=2025.3'", found)]


def _tensorrt(facts: dict[str, Facts], driver: str | None) -> list[Finding]:
    install = f"pip install -U 'tensorrt>={_OLDEST_TENSORRT}' (downloads from pypi.nvidia.com)"
    tensorrt = _library("TensorRT (Python)", facts["tensorrt"], "TensorRT engines on NVIDIA GPUs", install)
    if tensorrt.found and tuple(int(number) for number in re.findall(r"\d+", tensorrt.found))[:2] < OLDEST:
        tensorrt = dataclasses.replace(tensorrt, found=f"{tensorrt.found}, which is too old", is_enough=False)
    elif tensorrt.found and not facts["tensorrt"].get("builder"):
        why = "there is no NVIDIA driver" if driver is None else _error_in(facts["tensorrt"])
        tensorrt = dataclasses.replace(tensorrt, found=f"{tensorrt.found}, cannot build here: {why}")
    driver_api = "TensorRT engines (GPU memory, streams, graphs), compiling kernels without nvcc"
    return [
        tensorrt,
        _library("cuda-python", facts["cuda-python"], driver_api, "pip install 'cuda-python>=12.6'"),
        _library("PyCUDA", facts["pycuda"], "its GPU arrays as inputs of engines", "pip install pycuda (needs nvcc)"),
    ]


def _pycocotools(facts: dict[str, Facts], driver: str | None) -> list[Finding]:
    return [_library("pycocotools", facts["pycocotools"], "COCO data and AP", "pip install pycocotools")]


def _library(component: str, facts: Facts, enables: str, install: str, found: str | None = None) -> Finding:
    """Returns the finding for a library; an installed but broken library counts as missing, with its error."""
    if "version" in facts:
        return Finding(component, found or facts["version"], enables, install)
    if not facts.get("missing"):
        install = f"{install} (installed but unusable: {_error_in(facts)})"
    return Finding(component, None, enables, install)


def _error_in(facts: Facts) -> str:
    return str(facts.get("error", "no reason given"))


def cuda_finding(facts: dict[str, Facts]) -> Finding:
    """Returns the newest CUDA version that the driver supports, and whether the installed TensorRT runs with it."""
    supported = tools.find_driver_cuda()
    remedy, enables = f"a newer NVIDIA driver: {_DRIVERS}", "TensorRT 11 from CUDA 13 on, TensorRT 10 from CUDA 12 on"
    if supported is None:
        return Finding("CUDA of the driver", None, enables, remedy)
    version = str(facts.get("tensorrt", {}).get("version", ""))
    major = int(version.partition(".")[0]) if version[:1].isdigit() else 0
    found, oldest = ".".join(map(str, supported)), _CUDA_OF_TENSORRT.get(major, 0)
    if supported[0] >= oldest:
        return Finding("CUDA of the driver", found, enables, remedy)
    found += f", too old for TensorRT {version}, which needs CUDA {oldest}"
    remedy += f", or an older TensorRT: pip install 'tensorrt<{major}'"
    return Finding("CUDA of the driver", found, f"engines of TensorRT {version}", remedy, is_enough=False)


# Compilers and plugins


def _compilers() -> list[Finding]:
    compiler = next((name for name in ("c++", "g++", "clang++") if shutil.which(name)), "c++")
    return [
        _program(compiler, "compiling the plugins, with nvcc; their kernels for tests on the CPU", "`apt install g++`"),
        _program("cc", "compiling extensions of other packages", "`apt install gcc`"),
        _program("cmake", "building the plugin libraries in another project", "pip install cmake"),
    ]


def _program(name: str, enables: str, remedy: str) -> Finding:
    """The finding for a program, with the first line of `--version`."""
    path = shutil.which(name)
    version = _first_line(path, "--version") if path else None
    return Finding(name, version and f"{version} at {path}", enables, remedy)


def _first_line(*command: str, lines: int = 1) -> str | None:
    """The first lines of a command's output, or None if the command fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    found = [line.strip() for line in done.stdout.splitlines() if line.strip()]
    return "; ".join(found[:lines]) if done.returncode == 0 and found else None


def _toolchain() -> list[Finding]:
    """Returns findings for the plugin toolchain and for the compiled libraries that the first GPU can run."""
    toolchain = tools.find_toolchain()
    nvcc, nvrtc, headers = toolchain.nvcc, toolchain.nvrtc, toolchain.tensorrt
    arch = toolchain.gpus[0] if toolchain.gpus else None
    compiled = [str(path) for kind in Library if (path := build.find_library(kind, arch))]
    enables = "TensorRT engines by trtexec, Triton and C++, and the GPU's kernels without NVRTC"
    found = {
        tools.NVCC: nvcc and f"{nvcc.version} at {nvcc.path}",
        tools.NVRTC: nvrtc and nvrtc.version,
        tools.TENSORRT_HEADERS: headers and f"{headers.version} in {headers.folder}",
    }
    return [
        *(Finding(each.what, text or None, each.enables, each.remedy) for each, text in found.items()),
        Finding("compiled plugins", "; ".join(compiled) or None, enables, "`maskrcnn build-plugins`"),
    ]


def plugin_findings(gpus: Sequence[Gpu]) -> list[Finding]:
    """Returns findings for the cached plugin libraries: their target architectures, and whether the GPUs run them."""
    findings, outdated = [], 0
    for folder, record in build.records():
        kind = next((each for each in Library if each.value == record.get("library")), None)
        if kind is None or not (folder / kind.file_name).is_file():
            continue  # kernels of ahead-of-time plugins, compiled separately for each engine
        if record.get("sources") != build.sources_hash(build.source_files(kind)):
            outdated += 1
            continue
        architectures = record.get("architectures") or [0]
        headers = f", TensorRT {record['tensorrt']}" if "tensorrt" in record else ""
        found = f"for {' '.join(f'sm_{arch}' for arch in architectures)}{headers} at {folder / kind.file_name}"
        unsupported = [gpu for gpu in gpus if not build.runs_on(architectures, gpu.arch)]
        if unsupported:
            found = f"{found}; does not run on {', '.join(gpu.name for gpu in unsupported)}"
        remedy = f"`maskrcnn build-plugins --arch {','.join(str(gpu.arch) for gpu in unsupported)}`"
        findings.append(Finding(kind.file_name, found, "the kernels on these GPUs", remedy, not unsupported))
    if outdated:
        found = f"{outdated} compiled from other sources, which no new engine uses"
        remedy = f"remove {build.folder()} to free the space, once no engine calls them"
        findings.append(Finding("older plugins", found, "engines that were built with them", remedy))
    return findings


# Engines


def engine_finding(path: Path, facts: dict[str, Facts], gpus: Sequence[Gpu]) -> Finding:
    """Returns a finding that says, based on the engine's stamp, whether this machine runs the engine.

    Args:
        path: engine file, `.engine` or `.xml`.
        facts: facts about `tensorrt` and `openvino`, as `probe` returns them.
        gpus: GPUs of this machine.
    """
    description, remark = "cannot be used", ""
    try:
        metadata = read_metadata(path)
        stamp = metadata.stamp
        description = metadata.precision
        if _REJECTED in path.suffixes:
            found = f"rejected when it was built ({stamp.get('compared', 'it differs from its ONNX file')})"
            raise UserError(found, "an engine that agrees", "see `maskrcnn verify`")
        if path.suffix == ".xml":
            description = f"OpenVINO {metadata.precision}, executed in {stamp.get('execution', 'fp32')}"
            remark = _check_openvino(path, stamp, facts.get("openvino", {}))
        else:
            description = f"TensorRT {metadata.precision}"
            version = facts.get("tensorrt", {}).get("version")
            if version is None:
                built = stamp.get("tensorrt", "unknown")
                fix = f"`pip install tensorrt=={built}`, or run the ONNX file it was built from"
                raise UserError(f"an engine for TensorRT {built}, and no TensorRT here", f"TensorRT {built}", fix)
            if not gpus:
                fix = "run the ONNX file it was built from"
                raise UserError("an engine for an NVIDIA GPU, and none here", "a GPU", fix)
            trt = SimpleNamespace(__version__=version)
            errors = [
                check_stamp(metadata, trt=trt, gpu=gpu.name, compute_capability=gpu.compute_capability) for gpu in gpus
            ]
            if all(errors) and errors[0] is not None:  # one GPU that runs it is enough
                raise errors[0]
    except UserError as error:
        enables = f"running it, which requires {error.expected}"
        return Finding(f"engine {path}", f"{description}: {error.found}", enables, error.fix, is_enough=False)
    return Finding(f"engine {path}", f"{description}: fits this machine{remark}", "inference", "nothing to do")


def _check_openvino(path: Path, stamp: dict[str, Any], openvino: Facts) -> str:
    """Raises unless this machine runs an OpenVINO engine; returns a remark if it was built on another CPU."""
    weights = path.with_suffix(".bin")
    if not weights.is_file():
        raise UserError(f"no {weights.name} next to it", "both files of an OpenVINO engine", "copy both")
    if "version" not in openvino:
        raise UserError("no OpenVINO here", "OpenVINO", "`pip install 'openvino>=2025.3'`")
    device = next((each for each in openvino.get("devices", []) if each.startswith("CPU ")), "")
    cpu = re.fullmatch(r"CPU (.*) \((.*)\)", device)  # name and capabilities
    if stamp.get("execution") == "bf16" and not (cpu and "BF16" in cpu[2].split()):
        raise UserError(
            "built for bfloat16, which this CPU does not have",
            "a CPU with AVX512-BF16 or AMX",
            "rebuild it here: `maskrcnn build-engine --fp16 --target openvino`",
        )
    built_on = stamp.get("cpu", "")
    return f" (built and compared on {built_on})" if built_on and built_on != (cpu[1] if cpu else "") else ""


# Probes: each runs in a subprocess and yields facts one by one, so that they survive a later crash.


def _version_of(module: str) -> Callable[[], Iterator[Facts]]:
    def probe() -> Iterator[Facts]:
        found = getattr(importlib.import_module(module), "__version__", None)
        yield {"version": found or importlib.metadata.version(module)}

    return probe


def _probe_torch() -> Iterator[Facts]:
    import torch

    yield {"version": torch.__version__, "cuda": torch.version.cuda}
    if torch.cuda.is_available():
        properties = [torch.cuda.get_device_properties(k) for k in range(torch.cuda.device_count())]
        yield {"gpus": [f"{p.name}, sm_{p.major}{p.minor}, {p.total_memory >> 20} MiB" for p in properties]}


def _probe_onnxruntime() -> Iterator[Facts]:
    import onnxruntime

    yield {"version": onnxruntime.__version__}
    if hasattr(onnxruntime, "preload_dlls"):
        onnxruntime.preload_dlls()  # the CUDA libraries that pip installed
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors only; they name the libraries that a provider lacks
    states: dict[str, str] = {}
    for provider in onnxruntime.get_available_providers():
        try:
            session = onnxruntime.InferenceSession(tiny_model(), options, providers=[provider])
            created = provider in session.get_providers()
            states[provider] = "" if created else "ONNX Runtime fell back to the CPU"
        except Exception as error:
            states[provider] = reason_of(error)
        yield {"providers": dict(states)}


def tiny_model() -> bytes:
    """An ONNX model y = Identity(x) of one float, encoded in protobuf's wire format without a library."""

    def part(number: int, content: bytes | str) -> bytes:  # a field with text or another message
        content = content.encode() if isinstance(content, str) else content
        return bytes([number << 3 | 2, len(content)]) + content

    def value(name: str) -> bytes:  # ValueInfoProto of a float tensor [1]
        shape = part(2, part(1, b"\x08\x01"))
        return part(1, name) + part(2, part(1, b"\x08\x01" + shape))

    node = part(1, "x") + part(2, "y") + part(4, "Identity")
    graph = part(1, node) + part(2, "tiny") + part(11, value("x")) + part(12, value("y"))
    return b"\x08\x08" + part(7, graph) + part(8, b"\x10\x11")  # IR version 8, opset 17


def _probe_openvino() -> Iterator[Facts]:
    import openvino

    yield {"version": openvino.__version__.partition("-")[0]}
    core, devices = openvino.Core(), []
    for device in core.available_devices:
        name = core.get_property(device, "FULL_DEVICE_NAME")
        abilities = core.get_property(device, "OPTIMIZATION_CAPABILITIES")
        devices.append(f"{device} {name} ({' '.join(sorted(abilities))})")
        yield {"devices": list(devices)}


def _probe_tensorrt() -> Iterator[Facts]:
    import tensorrt

    yield {"version": tensorrt.__version__}
    tensorrt.Builder(tensorrt.Logger(tensorrt.Logger.ERROR))  # crashes or raises without a driver
    yield {"builder": True}


def _probe_cuda_python() -> Iterator[Facts]:
    import cuda.bindings.driver  # noqa: F401

    yield {"version": importlib.metadata.version("cuda-bindings") + " (cuda-bindings)"}


_PROBES: dict[str, Callable[[], Iterator[Facts]]] = {
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
_MARK = "maskrcnn-doctor:"  # prefix of a line of facts, to distinguish it from library output


def print_facts(name: str) -> None:
    """Runs a probe and prints its facts; each subprocess runs this function."""

    def emit(facts: Facts) -> None:
        print(f"\n{_MARK}{json.dumps(facts)}", flush=True)

    try:
        for facts in _PROBES[name]():
            emit(facts)
    except ModuleNotFoundError as error:
        # Missing only if the library itself is missing; a library that lacks a dependency is broken.
        absent = (error.name or "").partition(".")[0]
        emit({"error": str(error), "missing": absent == ("cuda" if name == "cuda-python" else name)})
    except Exception as error:
        emit({"error": f"{type(error).__name__}: {reason_of(error)}"})


def probe(name: str) -> Facts:
    """Returns facts about a library: `version` and more, and `error` and `missing` if it cannot be used."""
    # Without the working directory: a folder `onnx` or `torch` there would be imported instead of the library.
    package_parent = str(Path(inspect.getfile(errors)).resolve().parents[1])
    code = (
        f"import sys; sys.path = [p for p in sys.path if p] + [{package_parent!r}]; "
        f"from maskrcnn.runtime.doctor import print_facts; print_facts({name!r})"
    )
    command = [sys.executable, "-c", code]
    ending: int | str
    messages = b""
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=TIMEOUT_S)
        printed, messages, ending = done.stdout, done.stderr, done.returncode
    except subprocess.TimeoutExpired as error:
        printed, ending = error.stdout or b"", f"no answer within {TIMEOUT_S:.0f} s"
    except Exception as error:
        printed, ending = b"", f"Python cannot be started: {error}"
    facts: Facts = {}
    for line in printed.decode("utf-8", errors="replace").splitlines():
        if line.startswith(_MARK):
            try:
                facts.update(json.loads(line.removeprefix(_MARK)))
            except ValueError:
                continue  # cut off by a crash
    if lacks := re.search(rb"lib\S+: cannot open shared object file", messages):
        facts["lacks"] = lacks.group().decode("utf-8", errors="replace")
    if ending != 0:
        facts.setdefault("error", f"its process ended with {ending}" if isinstance(ending, int) else ending)
    return facts

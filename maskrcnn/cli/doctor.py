"""The work of `maskrcnn doctor`: what `doctor.py` finds on the machine, and what needs the rest of the package.

That is compiled plugins and the GPUs they run on, and engine files and whether they fit.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from maskrcnn import runs
from maskrcnn.cli.build_plugins import plugin_findings
from maskrcnn.errors import UserError
from maskrcnn.plugins import build
from maskrcnn.plugins import build as cache
from maskrcnn.plugins.build import Library
from maskrcnn.plugins.toolchain import find_driver_cuda
from maskrcnn.runtime import doctor
from maskrcnn.runtime.backends.tensorrt_library import Gpu, find_gpu
from maskrcnn.runtime.doctor import Finding, library_facts
from maskrcnn.runtime.engine_files import Fit, Machine, find_engines, fit

_DRIVERS = "a newer NVIDIA driver: https://www.nvidia.com/drivers"
_CUDA_OF_TENSORRT = {10: 12, 11: 13}  # the oldest CUDA that a major version of TensorRT runs with


def run_doctor(console: Console, places: Sequence[Path]) -> None:
    """Prints what this machine has, and what each missing thing would enable.

    Args:
        console: to print to.
        places: engine files, and folders to look for them in besides `runs`.

    Raises:
        UserError: for places that do not exist.
    """
    engines = find_engines([*places, *([runs.FOLDER] if runs.FOLDER.is_dir() else [])])
    groups = [plugin_findings, library_findings, cuda_findings, lambda: engine_findings(engines)]
    with console.status("looking"):
        findings = doctor.diagnose(groups)
    console.print(doctor.report(findings), markup=False)


# CUDA


def cuda_findings() -> list[Finding]:
    """What CUDA the driver knows, and whether that is enough for the TensorRT that is installed."""
    known = find_driver_cuda()
    enables = "TensorRT 11 from CUDA 13 on, TensorRT 10 from CUDA 12 on"
    if known is None:
        return [Finding("CUDA of the driver", None, enables, _DRIVERS)]
    version = library_facts("tensorrt").get("version", "")
    major = int(version.partition(".")[0]) if version[:1].isdigit() else 0
    found, oldest = ".".join(map(str, known)), _CUDA_OF_TENSORRT.get(major, 0)
    if known[0] >= oldest:
        return [Finding("CUDA of the driver", found, enables, _DRIVERS)]
    found += f", too old for TensorRT {version}, which needs CUDA {oldest}"
    remedy = f"{_DRIVERS}, or an older TensorRT: pip install 'tensorrt<{major}'"
    return [Finding("CUDA of the driver", found, f"engines of TensorRT {version}", remedy, is_enough=False)]


# Plugins


def library_findings() -> list[Finding]:
    """Each plugin library in the cache: what it was compiled from and for, and whether this machine's GPUs run it."""
    gpus = find_gpus()
    findings, outdated = [], 0
    for folder, record in cache.records():
        kind = next((each for each in Library if each.value == record.get("library")), None)
        if kind is None or not (folder / kind.file_name).is_file():
            continue  # kernels of ahead-of-time plugins, which each engine compiles for itself
        if record.get("sources") != cache.sources_hash(build.source_files(kind)):
            outdated += 1
            continue
        findings.append(_library(folder / kind.file_name, record, gpus))
    if outdated:
        found = f"{outdated} compiled from other sources, which no new engine uses"
        remedy = f"remove {cache.folder()} to free the space, once no engine calls them"
        findings.append(Finding("older plugins", found, "engines that were built with them", remedy))
    return findings


def _library(path: Path, record: dict, gpus: Sequence[Gpu]) -> Finding:
    compiled_for = record.get("architectures") or [0]
    headers = f", TensorRT {record['tensorrt']}" if "tensorrt" in record else ""
    found = f"for {' '.join(f'sm_{arch}' for arch in compiled_for)}{headers} at {path}"
    lacking = [gpu for gpu in gpus if not build.runs_on(compiled_for, gpu.arch)]
    if lacking:
        found = f"{found}; does not run on {', '.join(gpu.name for gpu in lacking)}"
    remedy = f"`maskrcnn build-plugins --arch {','.join(str(gpu.arch) for gpu in lacking)}`"
    return Finding(path.name, found, "the kernels on these GPUs", remedy, is_enough=not lacking)


def find_gpus() -> tuple[Gpu, ...]:
    """The NVIDIA GPUs of this machine, none without a driver."""
    found: list[Gpu] = []
    try:
        while True:
            found.append(find_gpu(len(found)))
    except UserError:
        return tuple(found)


# Engines


def engine_findings(engines: Sequence[Path]) -> list[Finding]:
    """For each engine file, whether this machine runs it, and what to do where it does not."""
    if not engines:
        return []
    machine = _machine()
    return [_engine(fit(path, machine)) for path in engines]


def _engine(found: Fit) -> Finding:
    component = f"engine {found.path}"
    if found.error is None:
        remark = f" ({found.remark})" if found.remark else ""
        return Finding(component, f"{found.described}: fits this machine{remark}", "inference", "nothing to do")
    enables, remedy = f"running it, which takes {found.error.expected}", found.error.fix
    return Finding(component, f"{found.described}: {found.error.found}", enables, remedy, is_enough=False)


def _machine() -> Machine:
    """What engines depend on, as the libraries say it in processes of their own."""
    openvino = library_facts("openvino")
    cpu = next((device for device in openvino.get("devices", []) if device.startswith("CPU ")), "")
    named = re.fullmatch(r"CPU (.*) \((.*)\)", cpu)
    return Machine(
        gpus=find_gpus(),
        tensorrt=library_facts("tensorrt").get("version"),
        openvino=openvino.get("version"),
        cpu=named[1] if named else "",
        has_bfloat16=bool(named) and "BF16" in named[2].split(),
    )

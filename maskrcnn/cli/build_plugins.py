"""The work of `maskrcnn build-plugins`, apart from parsing its options, and what `maskrcnn doctor` says of plugins."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from rich.console import Console

from maskrcnn.errors import UserError
from maskrcnn.plugins import aot_kernels, build, nvrtc
from maskrcnn.plugins import toolchain as tools
from maskrcnn.plugins.build import Library
from maskrcnn.plugins.toolchain import Toolchain, find_toolchain
from maskrcnn.runtime.doctor import Finding

_EVERYWHERE = "compiling for the common architectures, as there is no GPU here"


class Form(str, Enum):
    """What to build."""

    KERNELS = "kernels"  # for PyTorch
    LIBRARY = "library"  # the kernels, and TensorRT plugins in C++
    AOT = "aot"  # TensorRT plugins that become part of the engine
    ALL = "all"  # whatever can be built here


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    name: str
    outcome: str
    is_made: bool
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.name:<24}{self.outcome:<24}{self.detail}".rstrip()


def run_build_plugins(
    console: Console, *, form: Form, arch: str | None, out: Path | None, tensorrt_include: Path | None, force: bool
) -> None:
    """Builds what is asked and prints what became of it.

    Args:
        console: to print to.
        form: what to build; all of it must work, but for `Form.ALL`, of which anything may be missing.
        arch: `native`, or numbers as 80,90; by default native, and without a GPU the common ones.
        out: a folder to copy the libraries to.
        tensorrt_include: the folder of TensorRT's headers.
        force: compile even what the cache has.

    Raises:
        UserError: where what is asked cannot be built, after everything that can be.
    """
    toolchain = find_toolchain(tensorrt_include=tensorrt_include)
    wanted = _architectures(arch, toolchain)
    console.print(_described(toolchain, wanted), markup=False)
    rows, obstacles = [], []
    for kind in _libraries(form):
        missing = build.obstacle(kind, toolchain)
        with console.status(f"compiling {kind.file_name}"):
            rows.append(
                _left_out(kind.file_name, missing) if missing else _library(kind, wanted, toolchain, out, force)
            )
        obstacles += [missing] if missing else []
        console.print(str(rows[-1]), markup=False)
    if form in (Form.AOT, Form.ALL):
        missing = None if toolchain.nvrtc or toolchain.nvcc else tools.NVRTC
        with console.status("compiling kernels of ahead-of-time plugins"):
            rows.append(_left_out("ahead-of-time kernels", missing) if missing else _kernels(wanted, toolchain, force))
        obstacles += [missing] if missing else []
        console.print(str(rows[-1]), markup=False)
    if obstacles and (form is not Form.ALL or not any(row.is_made for row in rows)):
        came = "; ".join(dict.fromkeys(f"no {absence.what}" for absence in obstacles))
        needed = "; ".join(dict.fromkeys(f"{absence.what}, for {absence.enables}" for absence in obstacles))
        raise UserError(came, needed, "; ".join(dict.fromkeys(absence.remedy for absence in obstacles)))


def _libraries(form: Form) -> tuple[Library, ...]:
    chosen = {Form.KERNELS: (Library.KERNELS,), Form.AOT: ()}
    return chosen.get(form, (Library.KERNELS, Library.PLUGINS))


def _architectures(text: str | None, toolchain: Toolchain) -> tuple[int, ...]:
    """What --arch says; empty for this machine's own choice."""
    if text == "native" and not toolchain.gpus:
        raise UserError("--arch native without a GPU", "an NVIDIA GPU that the driver shows", "name one: --arch 80,90")
    if text in (None, "native"):
        return ()
    words = [word.strip() for word in text.split(",")]
    if not all(re.fullmatch(r"\d{2,3}", word) for word in words):
        raise UserError(f"--arch {text}", "native, or numbers with commas between", "for example --arch 80,90")
    return tuple(int(word) for word in words)


def _described(toolchain: Toolchain, wanted: tuple[int, ...]) -> str:
    """What there is to build with, and for what."""
    found = []
    if toolchain.nvcc:
        found.append(f"nvcc {toolchain.nvcc.version} at {toolchain.nvcc.path}")
    if toolchain.nvrtc:
        found.append(f"NVRTC {toolchain.nvrtc.version}")
    if toolchain.tensorrt:
        found.append(f"TensorRT headers {toolchain.tensorrt.version} in {toolchain.tensorrt.folder}")
    gpus = f"GPU: {_names(toolchain.gpus)}" if toolchain.gpus else _EVERYWHERE
    return "; ".join([*found, f"for {_names(wanted)}" if wanted else gpus])


def _names(arch: tuple[int, ...]) -> str:
    return " ".join(f"sm_{number}" for number in arch)


def _left_out(name: str, absence: tools.Absence) -> Row:
    return Row(name, "left out", False, f"no {absence.what}; to get it: {absence.remedy}")


def _library(kind: Library, wanted: tuple[int, ...], toolchain: Toolchain, out: Path | None, force: bool) -> Row:
    arch = build.architectures(toolchain, wanted)
    is_cached = not force and build.cached_library(kind, arch=arch, toolchain=toolchain) is not None
    begin = time.perf_counter()
    path = build.build_library(kind, arch=arch, toolchain=toolchain, out=out, force=force)
    outcome = "from the cache" if is_cached else f"built in {time.perf_counter() - begin:.1f} s"
    return Row(kind.file_name, outcome, True, f"{path.stat().st_size / 1e6:.1f} MB  {_names(arch)}  {path}")


def _kernels(wanted: tuple[int, ...], toolchain: Toolchain, force: bool) -> Row:
    """Compiles the kernels that engines usually get; each engine compiles its own when it is built."""
    known = (toolchain.nvrtc or toolchain.nvcc).architectures
    common = tuple(arch for arch in build.COMMON_ARCHITECTURES if arch in known)
    arches = tuple(nvrtc.architecture(toolchain, arch) for arch in wanted)
    if not arches:
        arches = (nvrtc.architecture(toolchain),) if toolchain.gpus else common
    kernels, image = aot_kernels.usual_kernels(), nvrtc.image_for(toolchain)
    cached, begin = 0, time.perf_counter()
    for arch in arches:
        for kernel in kernels:
            options = {"arch": arch, "toolchain": toolchain, "image": image}
            cached += not force and nvrtc.is_cached(kernel, **options)
            nvrtc.compile_kernel(kernel, force=force, **options)
    seconds, count = time.perf_counter() - begin, len(arches) * len(kernels)
    outcome = "from the cache" if cached == count else f"compiled in {seconds:.1f} s"
    detail = f"{count} as {image.value} by {nvrtc.compiler_name(toolchain)}  {_names(arches)}"
    return Row("ahead-of-time kernels", outcome, True, detail)


# For the doctor


def plugin_findings() -> list[Finding]:
    """What there is to compile the plugins with, and which are compiled."""
    toolchain = find_toolchain()
    nvcc, compiled_by_nvrtc, headers = toolchain.nvcc, toolchain.nvrtc, toolchain.tensorrt
    return [
        _finding(tools.NVCC, nvcc and f"{nvcc.version} at {nvcc.path}"),
        _finding(tools.NVRTC, compiled_by_nvrtc and compiled_by_nvrtc.version),
        _finding(tools.TENSORRT_HEADERS, headers and f"{headers.version} in {headers.folder}"),
        Finding(
            "compiled plugins",
            "; ".join(_compiled(toolchain)) or None,
            "the kernels in PyTorch on a GPU, TensorRT engines by trtexec, Triton and C++",
            "`maskrcnn build-plugins`",
        ),
    ]


def _finding(absence: tools.Absence, found: str | None) -> Finding:
    return Finding(absence.what, found, absence.enables, absence.remedy)


def _compiled(toolchain: Toolchain) -> list[str]:
    """The libraries of the cache that run on this machine's first GPU; without one, any."""
    arch = toolchain.gpus[0] if toolchain.gpus else None
    return [str(path) for kind in Library if (path := build.find_library(kind, arch))]

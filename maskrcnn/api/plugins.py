"""`maskrcnn.build_plugins(...)`: compiles the CUDA kernels and TensorRT plugins for the GPUs of a machine."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from maskrcnn.api.progress import Progress
from maskrcnn.api.results import Result
from maskrcnn.errors import UserError
from maskrcnn.files import check_output_folder

if TYPE_CHECKING:
    from maskrcnn.plugins.build import Library
    from maskrcnn.plugins.toolchain import Absence, Toolchain


class Form(str, Enum):
    """Parts to compile."""

    KERNELS = "kernels"  # library of the kernels, for PyTorch
    LIBRARY = "library"  # the same, and the library of the TensorRT plugins
    AOT = "aot"  # kernels of the ahead-of-time plugins, which become part of an engine
    ALL = "all"  # everything that can be compiled here


@dataclass(frozen=True, repr=False)
class PluginBuild(Result):
    """The compiled parts, and the compilers used."""

    compilers: str
    built: dict[str, str]  # library or kernels: time or "from the cache", size, architectures, path
    left_out: dict[str, str]  # parts not compiled: what is missing, and how to install it


def build_plugins(
    form: Form | str = Form.ALL,
    *,
    arch: str | None = None,
    output: str | Path | None = None,
    tensorrt_include: str | Path | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> PluginBuild:
    """Compiles the CUDA kernels and TensorRT plugins into the cache; cached parts are not compiled again.

    Args:
        form: "kernels", "library", "aot" or "all". With "all", parts that cannot be compiled are left out; otherwise
            they are an error.
        arch: "native", or compute capabilities such as "80,90". Default: native, and without a GPU common ones.
        output: folder to copy the libraries to.
        tensorrt_include: folder of TensorRT's C++ headers. Default: the usual folders.
        force: compile again what is already cached.
        progress: receives one message per library.

    Raises:
        UserError: if something cannot be compiled, after everything else was compiled.
    """
    from maskrcnn.plugins import build
    from maskrcnn.plugins.build import Library
    from maskrcnn.plugins.toolchain import NVRTC, find_toolchain

    progress = progress or Progress()
    form = _form(form)
    if output is not None:
        check_output_folder("--output", Path(output), [tensorrt_include], (), overwrite=True)
    toolchain = find_toolchain(tensorrt_include=None if tensorrt_include is None else Path(tensorrt_include))
    wanted = _architectures(arch, toolchain)
    compilers = _described(toolchain, wanted)
    progress.message(compilers)
    built: dict[str, str] = {}
    left_out: dict[str, str] = {}
    obstacles: list[Absence] = []

    def report(name: str, outcome: str, detail: str) -> None:
        progress.message(f"{name:<24}{outcome:<24}{detail}".rstrip())

    def leave_out(name: str, missing: Absence) -> None:
        obstacles.append(missing)
        left_out[name] = f"no {missing.what}; to get it: {missing.remedy}"
        report(name, "left out", left_out[name])

    libraries = {Form.KERNELS: (Library.KERNELS,), Form.AOT: ()}.get(form, (Library.KERNELS, Library.PLUGINS))
    for kind in libraries:
        if missing := build.obstacle(kind, toolchain):
            leave_out(kind.file_name, missing)
            continue
        with progress.task(f"compiling {kind.file_name}"):
            outcome, detail = _build_library(kind, wanted, toolchain, None if output is None else Path(output), force)
        built[kind.file_name] = f"{outcome}, {detail}"
        report(kind.file_name, outcome, detail)
    if form in (Form.AOT, Form.ALL):
        name = "ahead-of-time kernels"
        if toolchain.nvrtc or toolchain.nvcc:
            with progress.task("compiling the kernels of the ahead-of-time plugins"):
                outcome, detail = _compile_kernels(wanted, toolchain, force)
            built[name] = f"{outcome}, {detail}"
            report(name, outcome, detail)
        else:
            leave_out(name, NVRTC)
    if obstacles and (form is not Form.ALL or not built):
        parts = (
            (f"no {each.what}" for each in obstacles),
            (f"{each.what}, for {each.enables}" for each in obstacles),
            (each.remedy for each in obstacles),
        )
        raise UserError(*("; ".join(dict.fromkeys(part)) for part in parts))
    return PluginBuild(compilers, built, left_out)


def _form(value: Form | str) -> Form:
    try:
        return Form(value)
    except ValueError as error:
        known = ", ".join(form.value for form in Form)
        raise UserError(f"--form {value}", f"one of {known}", "drop it to compile everything possible") from error


def _architectures(text: str | None, toolchain: Toolchain) -> tuple[int, ...]:
    """The architectures of --arch; empty for the default of this machine."""
    if text == "native" and not toolchain.gpus:
        raise UserError(
            "--arch native without a GPU", "an NVIDIA GPU and its driver", "specify some, such as --arch 80,90"
        )
    if text is None or text == "native":
        return ()
    words = [word.strip() for word in text.split(",")]
    if not all(re.fullmatch(r"\d{2,3}", word) for word in words):
        raise UserError(f"--arch {text}", "native, or numbers separated by commas", "for example --arch 80,90")
    return tuple(int(word) for word in words)


def _described(toolchain: Toolchain, wanted: tuple[int, ...]) -> str:
    """Compilers, headers and architectures."""
    parts = []
    if toolchain.nvcc:
        parts.append(f"nvcc {toolchain.nvcc.version} at {toolchain.nvcc.path}")
    if toolchain.nvrtc:
        parts.append(f"NVRTC {toolchain.nvrtc.version}")
    if toolchain.tensorrt:
        parts.append(f"TensorRT headers {toolchain.tensorrt.version} in {toolchain.tensorrt.folder}")
    if wanted:
        parts.append(f"for {_names(wanted)}")
    elif toolchain.gpus:
        parts.append(f"GPU: {_names(toolchain.gpus)}")
    else:
        parts.append("compiling for the common architectures, as there is no GPU here")
    return "; ".join(parts)


def _names(arch: tuple[int, ...]) -> str:
    return " ".join(f"sm_{number}" for number in arch)


def _build_library(
    kind: Library, wanted: tuple[int, ...], toolchain: Toolchain, output: Path | None, force: bool
) -> tuple[str, str]:
    """Returns (time or "from the cache", details)."""
    from maskrcnn.plugins import build

    arch = build.architectures(toolchain, wanted)
    is_cached = not force and build.cached_library(kind, arch=arch, toolchain=toolchain) is not None
    start = time.perf_counter()
    path = build.build_library(kind, arch=arch, toolchain=toolchain, out=output, force=force)
    outcome = "from the cache" if is_cached else f"built in {time.perf_counter() - start:.1f} s"
    return outcome, f"{path.stat().st_size / 1e6:.1f} MB  {_names(arch)}  {path}"


def _compile_kernels(wanted: tuple[int, ...], toolchain: Toolchain, force: bool) -> tuple[str, str]:
    """Compiles the kernels of usual models; engines of other models compile theirs when they are built."""
    from maskrcnn.plugins import aot_kernels, build

    if wanted or toolchain.gpus:
        arches = tuple(aot_kernels.architecture(toolchain, arch) for arch in (wanted or (None,)))
    else:
        compiler = toolchain.nvrtc or toolchain.nvcc
        assert compiler is not None, "checked by the caller"
        arches = tuple(arch for arch in build.COMMON_ARCHITECTURES if arch in compiler.architectures)
    kernels, image = aot_kernels.usual_kernels(), aot_kernels.image_for(toolchain)
    cached, start = 0, time.perf_counter()
    for arch in arches:
        options: dict[str, Any] = {"arch": arch, "toolchain": toolchain, "image": image}
        for kernel in kernels:
            cached += not force and aot_kernels.is_cached(kernel, **options)
            aot_kernels.compile_kernel(kernel, force=force, **options)
    seconds, count = time.perf_counter() - start, len(arches) * len(kernels)
    outcome = "from the cache" if cached == count else f"compiled in {seconds:.1f} s"
    return outcome, f"{count} as {image.value} by {aot_kernels.compiler_name(toolchain)}  {_names(arches)}"

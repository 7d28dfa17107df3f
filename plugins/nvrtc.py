"""Kernels of ahead-of-time plugins, compiled by NVRTC, or by nvcc where there is no NVRTC, and kept in the cache."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import Any

from maskrcnn.errors import UserError
from maskrcnn.plugins import build
from maskrcnn.plugins.aot_kernels import Kernel
from maskrcnn.plugins.toolchain import NVRTC, Toolchain

_SHOWN_LINES = 25  # of a failing compiler's output


class Image(str, Enum):
    """What a kernel is compiled to."""

    PTX = "ptx"  # text, which the driver of any GPU from the architecture on compiles
    CUBIN = "cubin"  # machine code of one generation


def architecture(toolchain: Toolchain, wanted: int | None = None, image: Image = Image.PTX) -> int:
    """The compute capability to compile for, 90 for 9.0: what is wanted, else what every GPU of this machine runs.

    A GPU that is newer than the compiler gets the newest that the compiler knows.

    Raises:
        UserError: without a compiler, for an architecture that it does not know, and where nothing is wanted and there
            is no GPU, or GPUs that have no machine code in common.
    """
    known = _compiler(toolchain).architectures
    if wanted is not None and wanted not in known:
        came, expected = f"architecture {wanted}", f"one of {', '.join(map(str, known))}"
        raise UserError(came, expected, f"choose among these, or get a newer one than {compiler_name(toolchain)}")
    if wanted is not None:
        return wanted
    if not toolchain.gpus:
        came = "no GPU on this machine, and no architecture named"
        raise UserError(came, f"one of {', '.join(map(str, known))}", "name the GPU's: 90 for compute capability 9.0")
    chosen = max((arch for arch in known if arch <= min(toolchain.gpus)), default=min(known))
    if image is Image.CUBIN and any(gpu // 10 != chosen // 10 for gpu in toolchain.gpus):
        came = f"machine code for GPUs of the capabilities {', '.join(map(str, toolchain.gpus))}"
        raise UserError(came, f"one generation, as {chosen // 10}.x", "name the GPU's, or update the driver to use PTX")
    return chosen


def image_for(toolchain: Toolchain) -> Image:
    """PTX, where the driver is as new as the compiler: an older driver reads newer machine code, but not newer PTX.

    TensorRT's documentation of `aot_impl` speaks of PTX alone; its sources take either.
    """
    driver, compiler = toolchain.driver_cuda, _compiler(toolchain).version
    is_older = driver is not None and driver < tuple(int(part) for part in compiler.split(".")[:2])
    return Image.CUBIN if is_older else Image.PTX


def compile_kernel(kernel: Kernel, *, arch: int, toolchain: Toolchain, image: Image, force: bool = False) -> bytes:
    """The compiled kernel, from the cache where it is there.

    Args:
        kernel: as `aot_kernels` describes it.
        arch: compute capability, 90 for 9.0, as `architecture` gives it.
        toolchain: what to compile with.
        image: what to compile to.
        force: compile even if the cache has it.

    Raises:
        UserError: without a compiler, and when it fails.
    """
    compile_to = _by_nvrtc if toolchain.nvrtc else _by_nvcc
    path = build.store(
        _record(kernel, arch, toolchain, image),
        _file_name(kernel, image),
        lambda draft: compile_to(kernel, arch, toolchain, image, draft),
        force=force,
    )
    return path.read_bytes()


def is_cached(kernel: Kernel, *, arch: int, toolchain: Toolchain, image: Image) -> bool:
    """Whether `compile_kernel` would have nothing to do."""
    return build.find(_record(kernel, arch, toolchain, image), _file_name(kernel, image)) is not None


def compiler_name(toolchain: Toolchain) -> str:
    """What compiles the kernels, with its version.

    Raises:
        UserError: without a compiler.
    """
    version = _compiler(toolchain).version
    return f"{'NVRTC' if toolchain.nvrtc else 'nvcc'} {version}"


def _record(kernel: Kernel, arch: int, toolchain: Toolchain, image: Image) -> dict[str, Any]:
    """Everything the code depends on."""
    return {
        "kernel": kernel.name,
        "defines": dict(kernel.defines),
        "architecture": arch,
        "image": image.value,
        "sources": build.sources_hash([kernel.source]),
        "compiler": compiler_name(toolchain),
    }


def _file_name(kernel: Kernel, image: Image) -> str:
    return f"{kernel.name}.{image.value}"


def _compiler(toolchain: Toolchain):
    """NVRTC, else nvcc."""
    found = toolchain.nvrtc or toolchain.nvcc
    if found is None:
        raise UserError("neither NVRTC nor nvcc on this machine", f"one, for {NVRTC.enables}", NVRTC.remedy)
    return found


def _target(arch: int, image: Image) -> str:
    return f"{'compute' if image is Image.PTX else 'sm'}_{arch}"


def _options(kernel: Kernel) -> list[str]:
    defines = [f"-D{name}={value}" for name, value in kernel.defines.items()]
    return ["--std=c++17", f"-I{kernel.source.parent}", *defines]


def _by_nvrtc(kernel: Kernel, arch: int, toolchain: Toolchain, image: Image, output: Path) -> None:
    from cuda.bindings import nvrtc

    source = kernel.source.read_bytes()
    (program,) = _answer(nvrtc.nvrtcCreateProgram(source, str(kernel.source).encode(), 0, [], []))
    try:
        options = [f"--gpu-architecture={_target(arch, image)}", *_options(kernel)]
        (status,) = nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])
        if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            log = _text(program, nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog)
            raise _failure(kernel, f"NVRTC ({status.name})", log.decode(errors="replace"))
        if image is Image.PTX:
            code = _text(program, nvrtc.nvrtcGetPTXSize, nvrtc.nvrtcGetPTX)
        else:
            code = _bytes(program, nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN)
    finally:
        nvrtc.nvrtcDestroyProgram(program)
    output.write_bytes(code)


def _answer(returned: Sequence[Any]) -> Sequence[Any]:
    """What a function of NVRTC returned behind its status."""
    if int(returned[0]) != 0:
        came = f"NVRTC answers {returned[0]!r}"
        raise UserError(came, "a working NVRTC", "reinstall nvidia-cuda-nvrtc and cuda-bindings in matching versions")
    return returned[1:]


def _bytes(program: Any, size_of: Any, read: Any) -> bytes:
    (size,) = _answer(size_of(program))
    buffer = bytes(size)  # the bindings write into it, which they want as bytes
    _answer(read(program, buffer))
    return buffer


def _text(program: Any, size_of: Any, read: Any) -> bytes:
    return _bytes(program, size_of, read).rstrip(b"\0")


def _by_nvcc(kernel: Kernel, arch: int, toolchain: Toolchain, image: Image, output: Path) -> None:
    command = [str(toolchain.nvcc.path), f"-{image.value}", f"-arch={_target(arch, image)}", *_options(kernel)]
    host = ["-ccbin", str(toolchain.host_compiler)] if toolchain.host_compiler else []
    command += [*host, "-o", str(output), str(kernel.source)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    if done.returncode != 0 or not output.is_file():
        raise _failure(kernel, f"nvcc (code {done.returncode})", done.stdout)


def _failure(kernel: Kernel, compiler: str, log: str) -> UserError:
    shown = "\n".join(log.splitlines()[-_SHOWN_LINES:])
    return UserError(
        f"{compiler} failed on {kernel.name}:\n{shown}",
        "sources that it compiles",
        "try another version of CUDA; if that does not help, report this with the output",
    )

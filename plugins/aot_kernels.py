"""Kernels of the ahead-of-time plugins: source file, macros and grid of each. NVRTC or else nvcc compiles them.

An engine contains each kernel compiled for one node: attributes, feature type and memory layout are constants, lengths
are arguments. The sources are csrc/*/aot.cu. Compiled kernels are kept in the cache of `plugins.build`.
"""

from __future__ import annotations

import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np

from maskrcnn.errors import UserError
from maskrcnn.plugins import build, contract
from maskrcnn.plugins.toolchain import NVRTC, Nvcc, Nvrtc, Toolchain

# Types and memory layouts of RoIAlign's features. Layouts have TensorRT's names: LINEAR is `[N, C, H, W]`, the others
# are `[N, H, W, P]` with P the channels rounded up to a multiple of `_PITCH_UNITS`.
FEATURE_FORMATS = (
    ("float32", "LINEAR"),
    ("float16", "LINEAR"),
    ("bfloat16", "LINEAR"),
    ("float32", "HWC"),
    ("float16", "HWC8"),
    ("bfloat16", "HWC8"),
)
_PITCH_UNITS = {"LINEAR": 0, "HWC": 1, "HWC8": 8}
_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
_FEATURES = {"float32": "float", "float16": "maskrcnn::Half", "bfloat16": "maskrcnn::BFloat16"}
_MAX_LEVELS = 16  # MASKRCNN_MAX_LEVELS of csrc/kernels.h
# Sizes of the kernels, checked by csrc/*/aot.cu: threads per block, and for channels last the bins per block and the
# bytes per lane.
_PLANES_THREADS, _CHANNELS_LAST_THREADS, _NMS_THREADS, _WARP, _BINS_OF_TILE, _LANE_BYTES = 256, 224, 1024, 32, 49, 16
_PLANES_OF_BLOCK = 64  # kPlanesOfBlock of csrc/multilevel_roi_align/launch.cu
# Range of each attribute; csrc/kernels.h documents the same for its arguments.
_LIMITS = {
    "output_size": (1, 32767),
    "sampling_ratio": (0, 32767),
    "aligned": (0, 1),
    "min_level": (-64, 64),
    "canonical_level": (-64, 64),
    "canonical_size": (2.0**-126, 2.0**127),
    "level_epsilon": (-1.0, 1.0),
    "iou_threshold": (-(2.0**127), 2.0**127),
    "max_output": (0, 2**31 - 1),
}


@dataclass(frozen=True)
class Kernel:
    """A kernel for one node."""

    source: Path
    name: str
    defines: Mapping[str, str]
    threads: int  # per block
    expression: str = ""  # C++ name with template arguments, if the symbol is not `name`; NVRTC only


@dataclass(frozen=True)
class _Pooling:
    """The kernel of MultilevelRoiAlign and the parameters of its grid."""

    kernel: Kernel
    parts: int  # blocks along x per RoI
    channels_of_block: int  # channels per block along y


def roi_align(
    attributes: Mapping[str, Any], *, num_levels: int, dtype: str, layout: str, channels: int | None
) -> _Pooling:
    """Returns the kernel of a MultilevelRoiAlign node.

    Args:
        attributes: attributes of the contract.
        num_levels: number of feature maps, 1 to 16.
        dtype, layout: type and memory layout of the features, a pair of `FEATURE_FORMATS`; the result has the type.
        channels: C, or None if it is known only at run time.

    Raises:
        UserError: if a value is outside the contract.
    """
    op = contract.MULTILEVEL_ROI_ALIGN
    values = checked(op, attributes)
    if not 1 <= num_levels <= _MAX_LEVELS:
        raise UserError(
            f"{op.name} with {num_levels} feature maps", f"1 to {_MAX_LEVELS}", "change the model's pyramid"
        )
    bins, pitch_unit = values["output_size"], _PITCH_UNITS[layout]
    is_channels_last = pitch_unit > 0
    lane = _LANE_BYTES // _BYTES[dtype]  # channels
    is_wide = is_channels_last and (pitch_unit % lane == 0 or (channels is not None and channels % lane == 0))
    channels_of_block = _WARP * (lane if is_wide else 1) if is_channels_last else _PLANES_OF_BLOCK
    threads = _CHANNELS_LAST_THREADS if is_channels_last else _PLANES_THREADS
    parts = -(-bins * bins // _BINS_OF_TILE) if is_channels_last else 1
    defines = {
        "MASKRCNN_THREADS": str(threads),
        "MASKRCNN_LEVELS": str(num_levels),
        "MASKRCNN_FEATURE": _FEATURES[dtype],
        "MASKRCNN_CHANNELS_LAST": str(int(is_channels_last)),
        "MASKRCNN_PITCH_UNIT": str(pitch_unit),
        "MASKRCNN_CHANNELS_OF_BLOCK": str(channels_of_block),
        "MASKRCNN_PARTS": str(parts),
        "MASKRCNN_BINS": str(bins),
        "MASKRCNN_RATIO": str(values["sampling_ratio"]),
        "MASKRCNN_ALIGNED": str(values["aligned"]),
        "MASKRCNN_MIN_LEVEL": f"({values['min_level']})",
        "MASKRCNN_CANONICAL_LEVEL": f"({values['canonical_level']})",
        "MASKRCNN_CANONICAL_SIZE": _float(values["canonical_size"]),
        "MASKRCNN_LEVEL_EPSILON": _float(values["level_epsilon"]),
    }
    source = build.SOURCES / "multilevel_roi_align" / "aot.cu"
    kernel = Kernel(source, "maskrcnn_multilevel_roi_align_aot", defines, threads)
    return _Pooling(kernel, parts, channels_of_block)


def nms_keep(attributes: Mapping[str, Any]) -> Kernel:
    """Returns the kernel of a BatchedNmsKeep node with these attributes; raises as `roi_align`."""
    values = checked(contract.BATCHED_NMS_KEEP, attributes)
    return _nms(
        "keep",
        MASKRCNN_KEEP="1",
        MASKRCNN_IOU_THRESHOLD=_float(values["iou_threshold"]),
        MASKRCNN_MAX_OUTPUT=str(values["max_output"]),
    )


def nms_compact(attributes: Mapping[str, Any]) -> Kernel:
    """Returns the kernel of a BatchedNmsCompact node with these attributes; raises as `roi_align`."""
    values = checked(contract.BATCHED_NMS_COMPACT, attributes)
    return _nms("compact", MASKRCNN_KEEP="0", MASKRCNN_MAX_OUTPUT=str(values["max_output"]))


def _nms(name: str, **defines: str) -> Kernel:
    defines = {"MASKRCNN_THREADS": str(_NMS_THREADS), **defines}
    return Kernel(build.SOURCES / "batched_nms" / "aot.cu", f"maskrcnn_batched_nms_{name}_aot", defines, _NMS_THREADS)


def usual_kernels() -> list[Kernel]:
    """Returns the kernels for the default model: RoIAlign in each type and layout, and NMS."""
    pooling = {
        **{"output_size": 7, "sampling_ratio": 2, "aligned": 0, "min_level": 2},
        **{"canonical_level": 4, "canonical_size": 224.0, "level_epsilon": 1e-6},
    }
    kernels = [
        roi_align(pooling, num_levels=4, dtype=dtype, layout=layout, channels=256).kernel
        for dtype, layout in FEATURE_FORMATS
    ]
    return [*kernels, nms_keep({"iou_threshold": 0.7, "max_output": 1000}), nms_compact({"max_output": 1000})]


def checked(op: contract.Op, attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Converts attributes to the types of the contract.

    Args:
        op: an op of `contract.AOT_OPS`.
        attributes: numbers or arrays of one element.

    Raises:
        UserError: if an attribute is missing, unknown or out of range.
    """
    if attributes.keys() != op.attributes.keys():
        found = f"{op.name} with the attributes {', '.join(attributes) or 'none'}"
        raise UserError(found, ", ".join(op.attributes), "make the file with `maskrcnn export --tensorrt --aot`")
    values = {name: kind(np.asarray(attributes[name]).item()) for name, kind in op.attributes.items()}
    for name, value in values.items():
        minimum, maximum = _LIMITS[name]
        if not minimum <= value <= maximum:  # also rejects NaN
            raise UserError(f"{op.name} with {name} = {value}", f"{minimum} to {maximum}", "export the model again")
    return values


def _float(value: float) -> str:
    """An exact float32 literal."""
    return f"{float(np.float32(value)).hex()}f"


# Compiling

_SHOWN_LINES = 25  # shown of the compiler's output on failure
_SYMBOL = ".symbol"  # suffix of the file with the symbol of a kernel with an expression


class Image(str, Enum):
    """Format of a compiled kernel."""

    PTX = "ptx"  # assembly, which the driver compiles for this or any newer architecture
    CUBIN = "cubin"  # machine code of one generation


def architecture(toolchain: Toolchain, wanted: int | None = None, image: Image = Image.PTX) -> int:
    """Returns the compute capability to compile for, 90 for 9.0.

    A GPU newer than the compiler gets the newest architecture of the compiler.

    Args:
        toolchain: provides the compiler and the GPUs.
        wanted: architecture to use (default: the newest that every GPU of this machine runs).
        image: format of the kernels.

    Raises:
        UserError: without a compiler; if the compiler does not support `wanted`; without `wanted`, if there is no GPU
            or the GPUs have no machine code in common.
    """
    known: tuple[int, ...] = _compiler(toolchain).architectures
    listed = ", ".join(map(str, known))
    if wanted is not None:
        if wanted not in known:
            raise UserError(
                f"architecture {wanted}",
                f"one of {listed}",
                f"choose one of these, or install a newer compiler than {compiler_name(toolchain)}",
            )
        return wanted
    if not toolchain.gpus:
        raise UserError(
            "no GPU on this machine, and no architecture given",
            f"one of {listed}",
            "pass the GPU's architecture: 90 for compute capability 9.0",
        )
    chosen = max((arch for arch in known if arch <= min(toolchain.gpus)), default=min(known))
    if image is Image.CUBIN and any(gpu // 10 != chosen // 10 for gpu in toolchain.gpus):
        raise UserError(
            f"machine code for GPUs of compute capabilities {', '.join(map(str, toolchain.gpus))}",
            f"one generation, for example {chosen // 10}.x",
            "pass the GPU's architecture, or update the driver to use PTX",
        )
    return chosen


def image_for(toolchain: Toolchain) -> Image:
    """Returns PTX, or CUBIN if the driver is older than the compiler and cannot read its PTX.

    TensorRT's documentation of `aot_impl` mentions PTX only; its sources accept both.
    """
    driver, compiler = toolchain.driver_cuda, _compiler(toolchain).version
    is_older = driver is not None and driver < tuple(int(part) for part in compiler.split(".")[:2])
    return Image.CUBIN if is_older else Image.PTX


def compile_kernel(kernel: Kernel, *, arch: int, toolchain: Toolchain, image: Image, force: bool = False) -> bytes:
    """Compiles a kernel, or reads it from the cache.

    Args:
        kernel: source and macros.
        arch: compute capability from `architecture`, 90 for 9.0.
        toolchain: provides the compiler.
        image: format of the result.
        force: compile even if the kernel is cached.

    Raises:
        UserError: if there is no compiler, or if it fails.
    """
    compile_to = _compile_with_nvrtc if toolchain.nvrtc else _compile_with_nvcc
    path: Path = build.store(
        _record(kernel, arch, toolchain, image),
        _file_name(kernel, image),
        lambda draft: compile_to(kernel, arch, toolchain, image, draft),
        force=force,
    )
    return path.read_bytes()


def compile_expression(kernel: Kernel, *, arch: int, toolchain: Toolchain, image: Image) -> tuple[bytes, str]:
    """Does the same as `compile_kernel` for a kernel with an `expression`; returns its code and symbol."""
    code = compile_kernel(kernel, arch=arch, toolchain=toolchain, image=image)
    path = build.find(_record(kernel, arch, toolchain, image), _file_name(kernel, image))
    assert path is not None  # compiled above
    return code, path.with_suffix(_SYMBOL).read_text(encoding="ascii")


def is_cached(kernel: Kernel, *, arch: int, toolchain: Toolchain, image: Image) -> bool:
    """Returns whether `compile_kernel` would read the kernel from the cache."""
    return build.find(_record(kernel, arch, toolchain, image), _file_name(kernel, image)) is not None


def compiler_name(toolchain: Toolchain) -> str:
    """Returns the name and version of the compiler.

    Raises:
        UserError: if there is no compiler.
    """
    version = _compiler(toolchain).version
    return f"{'NVRTC' if toolchain.nvrtc else 'nvcc'} {version}"


def _record(kernel: Kernel, arch: int, toolchain: Toolchain, image: Image) -> dict[str, Any]:
    """Everything that the compiled code depends on."""
    return {
        "kernel": kernel.name,
        "defines": dict(kernel.defines),
        "expression": kernel.expression,
        "architecture": arch,
        "image": image.value,
        "sources": build.sources_hash([kernel.source]),
        "compiler": compiler_name(toolchain),
    }


def _file_name(kernel: Kernel, image: Image) -> str:
    return f"{kernel.name}.{image.value}"


def _compiler(toolchain: Toolchain) -> Nvrtc | Nvcc:
    found = toolchain.nvrtc or toolchain.nvcc
    if found is None:
        raise UserError("neither NVRTC nor nvcc on this machine", f"NVRTC or nvcc, for {NVRTC.enables}", NVRTC.remedy)
    return found


def _target(arch: int, image: Image) -> str:
    return f"{'compute' if image is Image.PTX else 'sm'}_{arch}"


def _options(kernel: Kernel) -> list[str]:
    defines = [f"-D{name}={value}" for name, value in kernel.defines.items()]
    return ["--std=c++17", f"-I{kernel.source.parent}", *defines]


def _compile_with_nvrtc(kernel: Kernel, arch: int, toolchain: Toolchain, image: Image, output: Path) -> None:
    from cuda.bindings import nvrtc

    source = kernel.source.read_bytes()
    (program,) = _result(nvrtc.nvrtcCreateProgram(source, str(kernel.source).encode(), 0, [], []))
    try:
        if kernel.expression:
            _result(nvrtc.nvrtcAddNameExpression(program, kernel.expression.encode()))
        options = [f"--gpu-architecture={_target(arch, image)}", *_options(kernel)]
        (status,) = nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])
        if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            log = _read(program, nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog).rstrip(b"\0")
            raise _failure(kernel, f"NVRTC ({status.name})", log.decode(errors="replace"))
        if image is Image.PTX:
            code = _read(program, nvrtc.nvrtcGetPTXSize, nvrtc.nvrtcGetPTX).rstrip(b"\0")
        else:
            code = _read(program, nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN)
        if kernel.expression:
            (symbol,) = _result(nvrtc.nvrtcGetLoweredName(program, kernel.expression.encode()))
            output.with_suffix(_SYMBOL).write_bytes(symbol)
    finally:
        nvrtc.nvrtcDestroyProgram(program)
    output.write_bytes(code)


def _result(returned: Sequence[Any]) -> Sequence[Any]:
    """The values that an NVRTC function returned after its status."""
    if int(returned[0]) != 0:
        raise UserError(
            f"NVRTC returned {returned[0]!r}",
            "a working NVRTC",
            "reinstall nvidia-cuda-nvrtc and cuda-bindings in matching versions",
        )
    return returned[1:]


def _read(program: Any, size_of: Any, read: Any) -> bytes:
    (size,) = _result(size_of(program))
    buffer = bytes(size)  # the bindings require bytes and write into them
    _result(read(program, buffer))
    return buffer


def _compile_with_nvcc(kernel: Kernel, arch: int, toolchain: Toolchain, image: Image, output: Path) -> None:
    assert toolchain.nvcc is not None  # or `compiler_name` would have raised
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
        "sources that compile",
        "try another CUDA version; if that does not help, report this with the output",
    )

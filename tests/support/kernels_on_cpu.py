"""The kernels compiled for the CPU with the emulated GPU of `cuda_on_cpu.h`; `kernel_calls` calls them."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
SOURCES = (
    "multilevel_roi_align/launch.cu",
    "batched_nms/launch.cu",
    "mask_paste/launch.cu",
    "resize_pad/launch.cu",
    "errors.cu",
)
CSRC = ROOT / "plugins" / "csrc"
HEADERS = Path(__file__).parent / "cuda_on_cpu"
BFLOAT16 = np.dtype([("bfloat16", np.uint16)])  # not a NumPy type
ORDERS = ("forward", "backward", "shuffled")  # of threads between two barriers
_ORDER = "CUDA_ON_CPU_ORDER"


def compiler() -> str | None:
    """Finds a C++ compiler."""
    return next((found for name in ("c++", "g++", "clang++") if (found := shutil.which(name))), None)


def build(
    folder: Path,
    *,
    csrc: Path = CSRC,
    sources: Sequence[str] = SOURCES,
    beside: Path | None = None,
    optimise: int = 2,
    **macros: int,
) -> Path:
    """Compiles `libmaskrcnn_kernels.so` for the CPU.

    Args:
        folder: folder of the library.
        csrc: sources of the kernels, or a modified copy.
        sources: files to compile.
        beside: a library with the other functions, if `sources` are not all files.
        optimise: optimisation level (-O).
        macros: preprocessor macros.
    """
    library = folder / "libmaskrcnn_kernels.so"
    includes = ["-I", str(HEADERS), "-x", "c++"]
    code = [
        *(f"-D{name}={value}" for name, value in macros.items()),
        *includes,
        *(str(csrc / name) for name in sources),
    ]
    rest = ["-x", "none", "-Wl,--no-as-needed", str(beside)] if beside else []
    return compile_library(library, [f"-O{optimise}", *code, *rest])


def compile_library(library: Path, words: Sequence[str]) -> Path:
    """Compiles with the flags of the kernels on the CPU; undefined behaviour ends the process."""
    # Hidden symbols: otherwise two builds in one process would share their shared memory.
    flags = ["-std=c++17", "-fPIC", "-shared", "-fvisibility=hidden", "-ffp-contract=off"]
    # The header uses setjmp between stacks, which a fortified C library rejects.
    defines = ["-Wall", "-Werror", "-Wno-unknown-pragmas", "-U_FORTIFY_SOURCE", "-DMASKRCNN_ON_CPU"]
    # A GPU faults on misaligned addresses, and its compiler may assume that the rest does not occur.
    checked = "alignment,bounds,shift,signed-integer-overflow,float-cast-overflow"
    checks = [f"-fsanitize={checked}", "-fsanitize-undefined-trap-on-error"]
    command = [str(compiler()), *flags, *defines, *checks, *words, "-o", str(library)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return library


@contextmanager
def thread_order(order: str) -> Iterator[None]:
    """Sets the order of threads, one of ORDERS."""
    before = os.environ.get(_ORDER, ORDERS[0])
    os.environ[_ORDER] = order
    try:
        yield
    finally:
        os.environ[_ORDER] = before


def bfloat16(values: np.ndarray) -> np.ndarray:
    """Converts float32 to bfloat16, rounding to nearest even."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16).view(BFLOAT16)


def single(values: np.ndarray) -> np.ndarray:
    """Converts any of the three types to float32."""
    if values.dtype == BFLOAT16:
        return (values.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float32)


def name_of(values: np.ndarray) -> str:
    """The name of an array's type in the kernels' interface."""
    return "bfloat16" if values.dtype == BFLOAT16 else values.dtype.name


def guarded(shape: Sequence[int], dtype: np.dtype | type) -> tuple[np.ndarray, np.ndarray]:
    """An uninitialised array, and the memory around it, filled with 0xA5."""
    memory = np.full(int(np.prod(shape)) * np.dtype(dtype).itemsize + 128, 0xA5, np.uint8)
    return memory[64:-64].view(dtype).reshape(shape), memory


def check_guards(memory: np.ndarray) -> None:
    """Asserts that nothing was written before or after the array."""
    assert (memory[:64] == 0xA5).all(), "written before the result"
    assert (memory[-64:] == 0xA5).all(), "written after the result"


def channels_last(feature: np.ndarray, pitch: int) -> np.ndarray:
    """Converts `[N, C, H, W]` to `[N, H, W, pitch]`; the padding channels are 99, so that their use is detected."""
    n, c, h, w = feature.shape
    memory = np.full((n, h, w, pitch), 99, np.float32)
    laid = bfloat16(memory) if feature.dtype == BFLOAT16 else memory.astype(feature.dtype)
    laid = laid.reshape(n, h, w, pitch)
    laid[..., :c] = feature.transpose(0, 2, 3, 1)
    return laid

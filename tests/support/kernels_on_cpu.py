"""The kernels' sources compiled for the CPU, where `cuda_on_cpu.h` plays the GPU; `kernel_calls` calls them."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from maskrcnn.plugins.native import Kernels

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
BFLOAT16 = np.dtype([("bfloat16", np.uint16)])  # NumPy has no such type
ORDERS = ("forward", "backward", "shuffled")  # of threads between two barriers
_ORDER = "CUDA_ON_CPU_ORDER"


def compiler() -> str | None:
    """A C++ compiler of this machine."""
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
        folder: for the library.
        csrc: the kernels' sources, or a changed copy of them.
        sources: what to compile of them.
        beside: a library that has the rest, where `sources` are not all.
        optimise: the compiler's -O.
        macros: defined as given.
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
    """Compiles what `words` say as the kernels are compiled for the CPU; what is undefined in C++ ends the process."""
    # Hidden, as in the real library: the shared memory of two builds in one process would be merged otherwise.
    flags = ["-std=c++17", "-fPIC", "-shared", "-fvisibility=hidden", "-ffp-contract=off"]
    # setjmp between stacks is what the header lives on, and what a fortified C library refuses.
    defines = ["-Wall", "-Werror", "-Wno-unknown-pragmas", "-U_FORTIFY_SOURCE", "-DMASKRCNN_ON_CPU"]
    # A GPU reads no misaligned address, and a compiler for it may assume of the rest that it does not happen.
    checked = "alignment,bounds,shift,signed-integer-overflow,float-cast-overflow"
    checks = [f"-fsanitize={checked}", "-fsanitize-undefined-trap-on-error"]
    command = [str(compiler()), *flags, *defines, *checks, *words, "-o", str(library)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return library


@contextmanager
def thread_order(order: str) -> Iterator[None]:
    """Threads run in one of ORDERS."""
    before = os.environ.get(_ORDER, ORDERS[0])
    os.environ[_ORDER] = order
    try:
        yield
    finally:
        os.environ[_ORDER] = before


def bfloat16(values: np.ndarray) -> np.ndarray:
    """float32 as bfloat16, rounded to nearest even."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16).view(BFLOAT16)


def single(values: np.ndarray) -> np.ndarray:
    """Values of any of the three types as float32."""
    if values.dtype == BFLOAT16:
        return (values.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float32)


def name_of(values: np.ndarray) -> str:
    """The name of an array's type as the kernels know it."""
    return "bfloat16" if values.dtype == BFLOAT16 else values.dtype.name


def guarded(shape: Sequence[int], dtype: np.dtype | type) -> tuple[np.ndarray, np.ndarray]:
    """An array to be filled, and the memory around it, whose bytes are all 0xA5."""
    memory = np.full(int(np.prod(shape)) * np.dtype(dtype).itemsize + 128, 0xA5, np.uint8)
    return memory[64:-64].view(dtype).reshape(shape), memory


def check_guards(memory: np.ndarray) -> None:
    """Nothing was written before or behind the array."""
    assert (memory[:64] == 0xA5).all(), "written before the result"
    assert (memory[-64:] == 0xA5).all(), "written behind the result"


def channels_last(feature: np.ndarray, pitch: int) -> np.ndarray:
    """`[N, C, H, W]` as `[N, H, W, pitch]`; the channels beyond C are 99, so that using them shows."""
    n, c, h, w = feature.shape
    memory = np.full((n, h, w, pitch), 99, np.float32)
    laid = bfloat16(memory) if feature.dtype == BFLOAT16 else memory.astype(feature.dtype)
    laid = laid.reshape(n, h, w, pitch)
    laid[..., :c] = feature.transpose(0, 2, 3, 1)
    return laid


def resize_pad(
    kernels: Kernels,
    image: np.ndarray,
    resized_hw: tuple[int, int],
    padded_hw: tuple[int, int],
    *,
    swap_channels: bool = False,
) -> np.ndarray:
    """An image uint8 `[H, W, 3]` resized and padded: float32 `[3, padded height, padded width]`."""
    image = np.ascontiguousarray(image)
    padded, memory = guarded((3, *padded_hw), np.float32)
    kernels.resize_pad(
        image.ctypes.data,
        image.shape[:2],
        padded.ctypes.data,
        resized_hw=resized_hw,
        padded_hw=padded_hw,
        swap_channels=swap_channels,
    )
    check_guards(memory)
    return padded

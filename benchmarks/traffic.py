"""What RoIAlign's kernels ask of memory, counted without a GPU.

    python benchmarks/traffic.py [--rois 40]

compiles the kernels' own source for the CPU with element types that note every address, runs them on RoIs of all sizes,
each at its level, and prints for each way of sharing out the work: warp requests per output element, active lanes per
request, and how many 32-byte sectors and 128-byte lines a request touches. A GPU serves a request line by line, so the
last two columns, lines of loads and of stores for 1000 outputs, rank the ways. Nothing here is a time.

The way "a thread per bin" is that of torchvision's kernel.
"""

from __future__ import annotations

import argparse
import ctypes
import math
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "tests" / "support"))

from kernels_on_cpu import HEADERS, compiler  # noqa: E402

from maskrcnn.plugins.reference import level_of  # noqa: E402

_WAYS = ("a thread per bin", "quads", "channels last")
SIZE_HW = (800, 1088)
CHANNELS = 128


def build(folder: Path) -> ctypes.CDLL:
    """The tracing library."""
    library = folder / "traffic.so"
    flags = ["-std=c++17", "-O2", "-fPIC", "-shared", "-U_FORTIFY_SOURCE", "-DMASKRCNN_ON_CPU", "-I", str(HEADERS)]
    subprocess.run([str(compiler()), *flags, str(HEADERS / "traffic.cpp"), "-o", str(library)], check=True)
    loaded = ctypes.CDLL(str(library))
    address, number = ctypes.c_void_p, ctypes.c_int
    loaded.trace.argtypes = [
        number, number, address, number, number, ctypes.c_float, address, number, number, address, address,
    ]  # fmt: skip
    return loaded


def trace(library: ctypes.CDLL, way: int, element_bytes: int, rois: np.ndarray, bins: int) -> np.ndarray:
    """Requests, lanes, sectors and lines of loads and stores `[2, 4]`, all RoIs `[R, 4]` together."""
    totals = np.zeros((2, 4))
    for roi in rois:
        level = level_of(roi, 4, 2, 4, 224.0, 1e-6)
        stride = 4 << level
        height, width = SIZE_HW[0] // stride, SIZE_HW[1] // stride
        data = _aligned(CHANNELS * height * width * element_bytes)
        out = _aligned(CHANNELS * bins * bins * element_bytes)
        library.trace(
            way, element_bytes, data.ctypes.data, height, width, 1 / stride, roi.ctypes.data, CHANNELS, bins,
            out.ctypes.data, totals.ctypes.data,
        )  # fmt: skip
    return totals


def _aligned(size: int) -> np.ndarray:
    """Zeroed bytes at a multiple of 256, as CUDA allocates."""
    memory = np.zeros(size + 256, np.uint8)
    return memory[-memory.ctypes.data % 256 :]


def random_rois(count: int) -> np.ndarray:
    """Boxes `[count, 4]` of all sizes, 8 to 600 px, inside the image, as in benchmarks/ops.py."""
    rng, limit = np.random.default_rng(0), np.array([SIZE_HW[1], SIZE_HW[0]])
    sides = 8 * np.exp(rng.random((count, 2)) * 4.3)
    corners = rng.random((count, 2)) * np.maximum(limit - sides, 0)
    return np.concatenate([corners, np.minimum(corners + sides, limit)], axis=1).astype(np.float32)


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rois", type=int, default=40)
    rois = random_rois(parser.parse_args().rois)
    titles = ("loads/output", "lanes", "sectors", "lines", "lines loaded", "lines stored")
    print(f"{'':38}" + "".join(f"{title:>14}" for title in titles))
    with tempfile.TemporaryDirectory() as folder:
        library = build(Path(folder))
        for bins in (7, 14):
            for element_bytes in (4, 2):
                for way, name in enumerate(_WAYS):
                    loads, stores = trace(library, way, element_bytes, rois, bins)
                    outputs = len(rois) * CHANNELS * bins * bins
                    row = (
                        32 * loads[0] / outputs,
                        *(loads[1:] / loads[0]),
                        *(1000 * x[3] / outputs for x in (loads, stores)),
                    )
                    title = f"{bins}×{bins} float{8 * element_bytes}, {name}"
                    assert math.isclose(stores[1], outputs), "each output is written once"
                    print(f"{title:38}" + "".join(f"{value:14.2f}" for value in row))


if __name__ == "__main__":
    main()

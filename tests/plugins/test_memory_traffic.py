"""Memory requests of the RoIAlign kernels, counted without a GPU.

The kernels' own source is compiled for the CPU with element types that record every address. A GPU serves a request of
a warp line by line (128 bytes), so lines per output rank the kernel variants; they are not times. "A thread per bin" is
the variant of torchvision's kernel. The table in plugins/csrc/multilevel_roi_align/README.md is printed by

    python -m pytest -m slow -s tests/plugins/test_memory_traffic.py
"""

import ctypes
import subprocess

import numpy as np
import pytest
from kernels_on_cpu import HEADERS, compiler

from maskrcnn.plugins.reference import level_of

VARIANTS = ("a thread per bin", "quads", "channels last")
SIZE_HW = (800, 1088)
CHANNELS = 256


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    if compiler() is None:
        pytest.skip("no C++ compiler")
    path = tmp_path_factory.mktemp("traffic") / "traffic.so"
    flags = ["-std=c++17", "-O2", "-fPIC", "-shared", "-U_FORTIFY_SOURCE", "-DMASKRCNN_ON_CPU", "-I", str(HEADERS)]
    subprocess.run([str(compiler()), *flags, str(HEADERS / "traffic.cpp"), "-o", str(path)], check=True)
    loaded = ctypes.CDLL(str(path))
    address, number = ctypes.c_void_p, ctypes.c_int
    loaded.trace.argtypes = [
        number, number, address, number, number, ctypes.c_float, address, number, number, address, address,
    ]  # fmt: skip
    return loaded


def trace(library, variant, element_bytes, rois, bins):
    """Requests, lanes, sectors and lines of loads and stores `[2, 4]`, summed over RoIs `[R, 4]`."""
    totals = np.zeros((2, 4))
    for roi in rois:
        level = level_of(roi, 4, 2, 4, 224.0, 1e-6)
        stride = 4 << level
        height, width = SIZE_HW[0] // stride, SIZE_HW[1] // stride
        data = aligned(CHANNELS * height * width * element_bytes)
        out = aligned(CHANNELS * bins * bins * element_bytes)
        library.trace(
            variant, element_bytes, data.ctypes.data, height, width, 1 / stride, roi.ctypes.data, CHANNELS, bins,
            out.ctypes.data, totals.ctypes.data,
        )  # fmt: skip
    return totals


def aligned(size):
    """Zeroed bytes at a multiple of 256, as CUDA allocates."""
    memory = np.zeros(size + 256, np.uint8)
    return memory[-memory.ctypes.data % 256 :]


def random_rois(count):
    """Boxes `[count, 4]` inside the image with sides of 8 to 600 px, as in benchmarks/ops.py."""
    rng, limit = np.random.default_rng(0), np.array([SIZE_HW[1], SIZE_HW[0]])
    sides = 8 * np.exp(rng.random((count, 2)) * 4.3)
    corners = rng.random((count, 2)) * np.maximum(limit - sides, 0)
    return np.concatenate([corners, np.minimum(corners + sides, limit)], axis=1).astype(np.float32)


@pytest.mark.parametrize("element_bytes", [4, 2])
def test_every_variant_reads_sixteen_pixels_and_writes_once_per_output(library, element_bytes):
    rois = random_rois(3)
    outputs = len(rois) * CHANNELS * 7 * 7
    loads, stores = trace(library, 0, element_bytes, rois, 7)
    assert (loads[1], stores[1]) == (16 * outputs, outputs)
    loads, stores = trace(library, 1, element_bytes, rois, 7)
    assert (loads[1], stores[1]) == (16 * outputs * 32 / 28, outputs)  # four of 32 lanes have no bin
    loads, stores = trace(library, 2, element_bytes, rois, 7)
    assert (loads[1], stores[1]) == (16 * outputs * element_bytes / 16, outputs)  # 16 bytes at once


def test_lines_and_sectors_of_a_warp_that_reads_contiguously(library):
    # Channels last: 32 lanes of 16 bytes are 512 bytes, at a multiple of 512.
    loads, _ = trace(library, 2, 4, np.array([[100, 100, 300, 300]], np.float32), 7)
    assert loads[2] / loads[0] == 16
    assert loads[3] / loads[0] == 4


@pytest.mark.slow
def test_table_of_all_variants(library):
    rois = random_rois(40)
    titles = ("loads/output", "lanes", "sectors", "lines", "lines loaded", "lines stored")
    print(f"\n{'':38}" + "".join(f"{title:>14}" for title in titles))
    for bins in (7, 14):
        for element_bytes in (4, 2):
            loaded = []
            for variant, name in enumerate(VARIANTS):
                loads, stores = trace(library, variant, element_bytes, rois, bins)
                outputs = len(rois) * CHANNELS * bins * bins
                assert stores[1] == outputs  # each output is written once
                loaded.append(1000 * loads[3] / outputs)
                row = (32 * loads[0] / outputs, *(loads[1:] / loads[0]), loaded[-1], 1000 * stores[3] / outputs)
                title = f"{bins}×{bins} float{8 * element_bytes}, {name}"
                print(f"{title:38}" + "".join(f"{value:14.2f}" for value in row))
            assert loaded == sorted(loaded, reverse=True)  # each variant loads fewer lines than the one before

"""The kernels of csrc/*/launch.cu compiled for the CPU, and started by name as in `plugins.nvrtc.Gpu`."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import kernels_on_cpu

# Every kind of kernel, and every type in some of them.
KERNELS = {
    "batched_nms": ["keep_kernel", "compact_kernel"],
    "mask_paste": ["paste_kernel<float>", "paste_kernel<maskrcnn::Half>"],
    "resize_pad": ["resize_kernel"],
    "multilevel_roi_align": [
        "planes_kernel<float, float, true>",
        "planes_kernel<maskrcnn::BFloat16, float, false>",
        "channels_last_kernel<float, float, 1, 0>",
        "channels_last_kernel<float, float, 4, 2>",
        "channels_last_kernel<maskrcnn::BFloat16, maskrcnn::BFloat16, 8, 0>",
        "channels_last_kernel<maskrcnn::Half, maskrcnn::Half, 8, 2>",
        "channels_last_kernel<maskrcnn::Half, float, 8, 0>",
        "gradient_kernel<float>",
        "gradient_kernel<maskrcnn::Half>",
    ],
}
_SOURCE = """
#include "%s/launch.cu"

template <class... A, size_t... I>
int call(void (*kernel)(A...), dim3 grid, int threads, void **values, std::index_sequence<I...>) {
    return cuda_on_cpu::launch(grid, threads, [&] { kernel(*static_cast<A *>(values[I])...); });
}
template <class... A>
int call(void (*kernel)(A...), dim3 grid, int threads, void **values) {
    return call(kernel, grid, threads, values, std::index_sequence_for<A...>());
}

extern "C" MASKRCNN_EXPORT int launch_by_name(const char *name, int x, int y, int z, int threads, void **values) {
    std::string wanted = name;
    %s
    return 98;  // invalid device function
}
"""


class Launcher:
    """Starts the emulated kernels, and records their names.

    Args:
        folder: folder for the compiled libraries, reused if they exist.
    """

    def __init__(self, folder: Path) -> None:
        self.started: set[str] = set()
        self._libraries = {}
        for op, names in KERNELS.items():
            path = folder / f"{op}.so"
            if not path.exists():
                calls = [
                    f'if (wanted == "{n}") return call(maskrcnn::{n}, dim3(x, y, z), threads, values);' for n in names
                ]
                source = folder / f"{op}.cpp"
                source.write_text(_SOURCE % (op, "\n    ".join(calls)))
                words = ["-O1", "-I", str(kernels_on_cpu.HEADERS), "-I", str(kernels_on_cpu.CSRC), str(source)]
                kernels_on_cpu.compile_library(path, words)
            self._libraries[op] = ctypes.CDLL(str(path))

    def launch(
        self, op: str, name: str, grid: Sequence[int], threads: int, arguments: Sequence[Any], stream: int
    ) -> int:
        self.started.add(name)
        addresses = (ctypes.c_void_p * len(arguments))(*map(ctypes.addressof, arguments))
        return int(self._libraries[op].launch_by_name(name.encode(), *grid, threads, addresses))

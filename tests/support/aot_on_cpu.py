"""Kernels of ahead-of-time plugins, compiled for the emulated GPU of `cuda_on_cpu.h` and launched like CUDA kernels.

Arguments are positional in TensorRT's order: inputs, 32-bit integers, outputs.
"""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Sequence
from pathlib import Path

import kernels_on_cpu
import numpy as np

from maskrcnn.plugins.aot_kernels import Kernel

# Arguments as for cuLaunchKernel: an array of the addresses of their values.
_HARNESS = """\
#include "{source}"
#include <utility>

template <class... A, size_t... I>
void call(void (*kernel)(A...), void **arguments, std::index_sequence<I...>) {{
    kernel(*static_cast<A *>(arguments[I])...);
}}

template <class... A>
int start(void (*kernel)(A...), unsigned x, unsigned y, unsigned threads, void **arguments, int count) {{
    if (count != int(sizeof...(A))) return int(sizeof...(A));
    cuda_on_cpu::launch(dim3(x, y), threads,
                        [=] {{ call(kernel, arguments, std::make_index_sequence<sizeof...(A)>()); }});
    return 0;
}}

extern "C" int start(unsigned x, unsigned y, unsigned threads, void **arguments, int count) {{
    return start({name}, x, y, threads, arguments, count);
}}
"""


def build(kernel: Kernel, folder: Path) -> ctypes.CDLL:
    """Compiles one kernel."""
    stem = f"{kernel.name}-{len(list(folder.iterdir()))}"
    source, library = folder / f"{stem}.cpp", folder / f"{stem}.so"
    source.write_text(_HARNESS.format(source=kernel.source, name=kernel.name))
    flags = ["-std=c++17", "-O1", "-fPIC", "-shared", "-ffp-contract=off", "-Wall", "-Werror", "-Wno-unknown-pragmas"]
    flags += ["-U_FORTIFY_SOURCE", "-DMASKRCNN_ON_CPU", "-I", str(kernels_on_cpu.HEADERS)]
    defines = [f"-D{name}={value}" for name, value in kernel.defines.items()]
    command = [str(kernels_on_cpu.compiler()), *flags, *defines, str(source), "-o", str(library)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return ctypes.CDLL(str(library))


def run(
    library: ctypes.CDLL,
    kernel: Kernel,
    grid: Sequence[int],
    inputs: Sequence[np.ndarray],
    integers: Sequence[int],
    outputs: Sequence[np.ndarray],
) -> None:
    """Launches a kernel, which writes the outputs in place."""
    values = [ctypes.c_void_p(array.ctypes.data) for array in inputs]
    values += [ctypes.c_int32(number) for number in integers]
    values += [ctypes.c_void_p(array.ctypes.data) for array in outputs]
    addresses = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
    wanted = library.start(*grid, kernel.threads, addresses, len(values))
    assert wanted == 0, f"the kernel has {wanted} arguments, not {len(values)}"

"""Registers, shared memory, occupancy and instructions of the TensorRT plugins' kernels, compiled without a GPU.

    python benchmarks/machine_code.py [--arch 80,90,120]

Each kernel of `aot_kernels.usual_kernels` is compiled to machine code and disassembled. "loop" is the number of
instructions of the loop with the most loads and stores: for RoIAlign the work of one warp for one bin. "warps" is the
share of a multiprocessor's warps that fit beside each other, bounded by registers and shared memory.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from session import aligned, numbers

from maskrcnn.errors import UserError, report_errors
from maskrcnn.plugins import aot_kernels
from maskrcnn.plugins.aot_kernels import Image, Kernel
from maskrcnn.plugins.toolchain import Toolchain, find_toolchain

# Of a multiprocessor (CUDA C++ Programming Guide, technical specifications per compute capability): warps, KB of shared
# memory of all blocks together, of which each block takes 1 KB more than it asks for.
_MULTIPROCESSORS = {80: (64, 164), 86: (48, 100), 89: (48, 100), 90: (64, 228), 100: (64, 228), 120: (48, 100)}
_REGISTERS, _UNIT = 65536, 256  # of a multiprocessor; registers are given to a warp in units of this many
_INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@\S+\s+)?([A-Z][A-Z0-9._]*)(.*)")


def disassembler() -> str:
    """The path of cuobjdump: of the CUDA toolkit, or of the package `triton`.

    Raises:
        UserError: if there is none.
    """
    found = shutil.which("cuobjdump")
    if found is None:
        try:
            import triton

            found = shutil.which("cuobjdump", path=Path(triton.__file__).parent / "backends" / "nvidia" / "bin")
        except ImportError:
            pass
    if found is None:
        raise UserError(
            "no cuobjdump", "the CUDA toolkit's disassembler", "install the CUDA toolkit, or: pip install triton"
        )
    return found


def longest_loop(assembly: str) -> int:
    """The number of instructions of the loop that has the most loads and stores, without loops around it."""
    code = [(int(m[1], 16), m[2], m[3]) for m in map(_INSTRUCTION.match, assembly.splitlines()) if m]
    places = {address: index for index, (address, _, _) in enumerate(code)}
    loops = []
    for index, (address, name, operands) in enumerate(code):
        target = re.search(r"0x([0-9a-f]+)", operands) if name.startswith("BRA") else None
        if target and int(target[1], 16) < address and int(target[1], 16) in places:
            loops.append((places[int(target[1], 16)], index))
    inner = [(a, b) for a, b in loops if not any(a <= c and d <= b and (a, b) != (c, d) for c, d in loops)]
    moved = {(a, b): sum(name.startswith(("LD", "ST")) for _, name, _ in code[a : b + 1]) for a, b in inner}
    begin, end = max(inner, key=lambda loop: moved[loop], default=(0, -1))
    return end - begin + 1


def row_of(kernel: Kernel, arch: int, toolchain: Toolchain, folder: Path) -> list[str]:
    """The columns of a kernel's machine code for one architecture."""
    title = kernel.name.removeprefix("maskrcnn_").removesuffix("_aot")
    if "MASKRCNN_FEATURE" in kernel.defines:
        layout = "channels last" if kernel.defines["MASKRCNN_CHANNELS_LAST"] == "1" else "planes"
        title += f", {kernel.defines['MASKRCNN_FEATURE'].removeprefix('maskrcnn::')}, {layout}"
    path = folder / "kernel.cubin"
    path.write_bytes(aot_kernels.compile_kernel(kernel, arch=arch, toolchain=toolchain, image=Image.CUBIN))
    usage = _output("--dump-resource-usage", path)
    registers, shared = int(re.search(r"REG:(\d+)", usage)[1]), int(re.search(r"SHARED:(\d+)", usage)[1])
    warps = kernel.threads // 32
    columns = [title, str(arch), str(kernel.threads), str(registers), f"{shared / 1024:.1f}"]
    if arch in _MULTIPROCESSORS:
        most, memory_kb = _MULTIPROCESSORS[arch]
        of_warp = -(-32 * registers // _UNIT) * _UNIT
        blocks = min(most // warps, _REGISTERS // (of_warp * warps), int(memory_kb / (shared / 1024 + 1)))
        columns.append(f"{blocks * warps} of {most}")
    else:
        columns.append("")
    return [*columns, str(longest_loop(_output("-sass", path)))]


def _output(option: str, path: Path) -> str:
    return subprocess.run([disassembler(), option, str(path)], check=True, capture_output=True, text=True).stdout


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the table; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", type=numbers, default=(80, 90, 120), help="compute capabilities; default: 80,90,120")
    given = parser.parse_args(arguments)
    rows, toolchain = [], find_toolchain()
    with tempfile.TemporaryDirectory() as folder:
        for kernel in aot_kernels.usual_kernels():
            rows += [row_of(kernel, arch, toolchain, Path(folder)) for arch in given.arch]
    print(aligned(["kernel", "sm", "threads", "registers", "shared KB", "warps", "loop"], rows))
    return 0


if __name__ == "__main__":
    with report_errors():
        sys.exit(main())

"""A machine without compilers, headers and GPUs; tests add the parts that they need."""

from __future__ import annotations

import stat
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

from maskrcnn.plugins import toolchain

_VARIABLES = "CUDA_HOME CUDA_PATH NVCC_CCBIN CUDAHOSTCXX CXX TensorRT_ROOT TENSORRT_ROOT"


def strip(monkeypatch, folder: Path) -> Path:
    """Hides everything that `find_toolchain` finds; returns the only folder on PATH."""
    programs = folder / "programs"
    programs.mkdir()
    monkeypatch.setenv("PATH", str(programs))
    for name in _VARIABLES.split():
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(toolchain, "_CUDA_FOLDERS", ())
    monkeypatch.setattr(toolchain, "_HEADER_FOLDERS", ())
    nvidia = ModuleType("nvidia")  # package of the CUDA wheels; tests append to its search locations
    nvidia.__spec__ = ModuleSpec("nvidia", None, is_package=True)
    monkeypatch.setitem(sys.modules, "nvidia", nvidia)
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    return programs


def add_program(path: Path, body: str) -> Path:
    """Writes a shell script."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def add_nvcc(path: Path, version: str = "13.0.88", architectures: str = "80 90 120", body: str = "exit 1") -> Path:
    """Writes an nvcc that prints its version and architectures, and runs `body` to compile."""
    listed = "\\n".join(f"compute_{number}" for number in architectures.split())
    return add_program(
        path,
        f'case "$1" in\n--version) echo "Cuda compilation tools, release {version[:4]}, V{version}";;\n'
        f'--list-gpu-arch) printf "{listed}\\n";;\n*) {body};;\nesac',
    )


# Body of a compiler that writes its arguments to the output file, and a line per run to the file `calls` in its folder.
WRITE_ARGUMENTS = """out=; last=
for word in "$@"; do [ "$last" = -o ] && out=$word; last=$word; done
echo call >> "${0%/*}/calls"
for word in "$@"; do echo "$word"; done > "$out" """

"""A machine without compilers, headers and GPUs, to which a test adds what it is about."""

from __future__ import annotations

import stat
import sys
from pathlib import Path

from maskrcnn.plugins import toolchain

_VARIABLES = "CUDA_HOME CUDA_PATH NVCC_CCBIN CUDAHOSTCXX CXX TensorRT_ROOT TENSORRT_ROOT"


def strip(monkeypatch, folder: Path) -> Path:
    """Takes everything away that `find_toolchain` looks for; returns a folder that is all of PATH."""
    programs = folder / "programs"
    programs.mkdir()
    monkeypatch.setenv("PATH", str(programs))
    for name in _VARIABLES.split():
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(toolchain, "_CUDA_FOLDERS", ())
    monkeypatch.setattr(toolchain, "_HEADER_FOLDERS", ())
    monkeypatch.setattr(toolchain, "_wheel_folders", lambda: [])
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    return programs


def add_program(path: Path, body: str) -> Path:
    """A program written in the shell."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def add_nvcc(path: Path, version: str = "13.0.88", architectures: str = "80 90 120", body: str = "exit 1") -> Path:
    """An nvcc that says its version and architectures; asked to compile, it runs `body`."""
    listed = "\\n".join(f"compute_{number}" for number in architectures.split())
    return add_program(
        path,
        f'case "$1" in\n--version) echo "Cuda compilation tools, release {version[:4]}, V{version}";;\n'
        f'--list-gpu-arch) printf "{listed}\\n";;\n*) {body};;\nesac',
    )


# Compiles by writing down its arguments where -o says, and counts in the file `calls` beside itself.
WRITE_ARGUMENTS = """out=; last=
for word in "$@"; do [ "$last" = -o ] && out=$word; last=$word; done
echo call >> "${0%/*}/calls"
for word in "$@"; do echo "$word"; done > "$out" """

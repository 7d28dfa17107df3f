"""TensorRT's own Python bindings and plugin registry on a machine without a GPU.

The bindings need three libraries that are only in NVIDIA's index: builder, built-in plugins and ONNX parser. They are
replaced by stubs without functions. The plugin registry and the runtime are real, from TensorRT's lean library, so
names, enumerations, plugin creators and `tensorrt.plugin` behave as usual.

Code runs in a separate Python process, because a `Runtime` without a driver may crash it.
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
BINDINGS, LEAN = "tensorrt_bindings", "tensorrt_lean_libs"
STUBS = ("nvinfer", "nvinfer_plugin", "nvonnxparser")
_MARK = "tensorrt-rig:"
# `import tensorrt` imports the bindings, whose modules use that name. None for `tensorrt_libs` prevents the bindings
# from loading the libraries of an installed TensorRT.
_ALIAS = f"""\
import sys

sys.modules["tensorrt_libs"] = None

import {BINDINGS}

sys.modules[__name__] = {BINDINGS}
"""
_BEFORE = f"""\
def tell(value):
    import json
    print("\\n{_MARK}" + json.dumps(value), flush=True)
"""
# Without a driver TensorRT may crash at exit, after all values have been printed.
_AFTER = """
import os, sys
sys.stdout.flush(), sys.stderr.flush()
os._exit(0)
"""


@dataclass(frozen=True)
class Answer:
    """Output of a process: the values passed to `tell`, in order, and everything printed, including errors."""

    told: list[Any]
    printed: str
    returncode: int


def obstacle(bindings: Path | None = None) -> str | None:
    """Returns the reason why the rig is not available, or None. `bindings` as for `prepare`."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return "TensorRT's bindings and lean library are wheels for Linux on x86-64"
    if bindings is None and any(importlib.util.find_spec(name) is None for name in (BINDINGS, LEAN)):
        return "TensorRT's bindings or lean library are missing: pip install '.[rig]'"
    if bindings is not None and not all((bindings / name).is_dir() for name in (BINDINGS, LEAN)):
        return f"{bindings} holds no {BINDINGS} and {LEAN}"
    return None if shutil.which("cc") else "no C compiler: `apt install gcc`"


def prepare(folder: Path, bindings: Path | None = None) -> dict[str, str]:
    """Compiles the stubs and returns the environment in which a Python process can `import tensorrt`.

    Args:
        folder: output folder, kept as long as the environment is used.
        bindings: folder with the unpacked wheels of another version (default: the installed ones).
    """
    lean = _lean_library(bindings)
    version = lean.name.rpartition(".")[2]
    for name in STUBS:
        stub = f"lib{name}.so.{version}"
        # The bindings find the symbols of the lean library through the stubs, so the linker must not drop it.
        linked = [f"-Wl,-soname,{stub}", "-Wl,--no-as-needed", str(lean), f"-Wl,-rpath,{lean.parent}"]
        command = ["cc", "-shared", "-fPIC", "-o", str(folder / stub), str(HERE / f"{name}.c"), *linked]
        subprocess.run(command, check=True, timeout=120)
    (folder / "tensorrt.py").write_text(_ALIAS)
    searched = {"LD_LIBRARY_PATH": [folder], "PYTHONPATH": [folder, *([bindings] if bindings else [])]}
    return {
        name: os.pathsep.join([*map(str, folders), *filter(None, [os.environ.get(name)])])
        for name, folders in searched.items()
    }


def run(code: str, *, env: dict[str, str], timeout: float = 120.0) -> Answer:
    """Runs Python code in the environment of `prepare`; it returns values by calling `tell` with a JSON value.

    Raises:
        subprocess.TimeoutExpired: after `timeout` seconds.
    """
    done = subprocess.run(
        [sys.executable, "-c", f"{_BEFORE}\n{code}\n{_AFTER}"],
        env={**os.environ, **env},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        timeout=timeout,
    )
    lines = done.stdout.splitlines()
    told = [json.loads(line.removeprefix(_MARK)) for line in lines if line.startswith(_MARK)]
    printed = "\n".join(line for line in lines if not line.startswith(_MARK))
    return Answer(told, printed, done.returncode)


def ask(code: str, *, env: dict[str, str], timeout: float = 120.0) -> Any:
    """Runs code that must succeed, and returns the only value passed to `tell`."""
    answer = run(code, env=env, timeout=timeout)
    assert answer.returncode == 0, f"the process ended with {answer.returncode}\n{answer.printed}"
    (value,) = answer.told
    return value


def _lean_library(bindings: Path | None) -> Path:
    """`libnvinfer_lean.so.<major version>`."""
    if bindings is None:
        spec = importlib.util.find_spec(LEAN)
        assert spec is not None and spec.origin is not None
        folder = Path(spec.origin).parent
    else:
        folder = bindings / LEAN
    (library,) = folder.glob("libnvinfer_lean.so.*")
    return library

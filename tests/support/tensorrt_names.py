"""All names of TensorRT's Python interface that the sources use, read from their syntax trees.

`python tests/support/tensorrt_names.py` looks them up in the installed bindings, and counts them.
"""

from __future__ import annotations

import ast
import json
import os
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
MODULES = {"trt": "tensorrt", "trtp": "tensorrt.plugin"}  # names of TensorRT's modules in the sources
# Files in which `tensorrt` is the module; in others the name is something else.
BY_FULL_NAME = ("plugins/aot.py", "runtime/doctor.py", "runtime/backends/tensorrt_library.py")
# Variables and attributes in the sources that are objects of TensorRT's classes.
OBJECTS = {
    "plugins/aot.py": {"registry": "IPluginRegistry"},
    "runtime/build/network.py": {
        "builder": "Builder",
        "network": "INetworkDefinition",
        "config": "IBuilderConfig",
        "parser": "OnnxParser",
        "tensor": "ITensor",
        "timing": "ITimingCache",
        "others": "ITimingCache",
        "added": "IOptimizationProfile",
    },
    "runtime/backends/tensorrt_library.py": {"registry": "IPluginRegistry"},
    "runtime/build/messages.py": {"parser": "OnnxParser", "error": "ParserError"},
    "runtime/backends/tensorrt_engine.py": {
        "runtime": "Runtime",
        "engine": "ICudaEngine",
        "context": "IExecutionContext",
    },
    "runtime/build/refit.py": {
        "runtime": "Runtime",
        "engine": "ICudaEngine",
        "refitter": "Refitter",
        "parser": "OnnxParserRefitter",
        "config": "ISerializationConfig",
    },
}
RETURNED = {"get_plugin_registry": "IPluginRegistry"}  # results on which a method is called directly
BY_TEXT = {"_call_context": "IExecutionContext"}  # own functions with a method name as the first argument
OURS = {
    "tensorrt.found",  # an attribute of a variable in doctor.py
    *(f"tensorrt.ICudaEngine.{name}" for name in ("is_file", "read_bytes", "suffix")),  # of a path in refit.py
}


def names_used(root: Path = ROOT) -> dict[str, set[str]]:
    """Files by dotted name, such as `tensorrt.BuilderFlag.TF32` or `tensorrt.IBuilderConfig.set_flag`."""
    found: dict[str, set[str]] = {}
    for folder in ("maskrcnn", "plugins", "export", "runtime", "benchmarks"):
        for path in sorted((root / folder).rglob("*.py")):
            file = path.relative_to(root).as_posix()
            for name in names_in(path.read_text(encoding="utf-8"), file):
                found.setdefault(name, set()).add(file)
    return found


def names_in(source: str, file: str) -> set[str]:
    """Names used in one file."""
    found, inner = set(), set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and id(node) not in inner:
            name = _name(node, file)
            if name is not None and name not in OURS:
                found.add(name)
                inner |= {id(part) for part in ast.walk(node) if part is not node}
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in BY_TEXT:
            first = node.args[0]
            if isinstance(first, ast.Constant):
                found.add(f"tensorrt.{BY_TEXT[node.func.attr]}.{first.value}")
    return found


def _name(node: ast.Attribute, file: str) -> str | None:
    """The dotted name of an attribute of TensorRT, or None."""
    base = _object(node.value, file)
    if base is None and isinstance(node.value, ast.Attribute):
        base = _name(node.value, file)
    return None if base is None else f"{base}.{node.attr}"


def _object(node: ast.expr, file: str) -> str | None:
    """The TensorRT module or class of a variable or an attribute, or None."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in RETURNED:
        return f"tensorrt.{RETURNED[node.func.attr]}"
    called = node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else None
    if called in MODULES:
        return MODULES[called]
    if called == "tensorrt" and isinstance(node, ast.Name) and file in BY_FULL_NAME:
        return called
    kind = OBJECTS.get(file, {}).get(called or "")
    return f"tensorrt.{kind}" if kind else None


LOOKUP = """
import importlib, json
import tensorrt
import tensorrt.plugin

def is_there(name):
    module = "tensorrt.plugin" if name.startswith("tensorrt.plugin.") else "tensorrt"
    found = importlib.import_module(module)
    for part in name[len(module) + 1:].split("."):
        if not hasattr(found, part):
            return False
        found = getattr(found, part)
        # What a property gives is not known to its class.
        if isinstance(found, property):
            return True
    return True

tell({"version": tensorrt.__version__, "missing": [name for name in json.loads(NAMES) if not is_there(name)]})
"""


def lookup(names: list[str]) -> str:
    """Code for the rig that reports the version and the names that TensorRT lacks."""
    return f"NAMES = {json.dumps(json.dumps(names))}\n{LOOKUP}"


def main() -> None:
    """Prints the number of names, and the missing names, for each version of the bindings."""
    from tensorrt_rig import rig

    used = names_used()
    folders = [Path(folder) for folder in os.environ.get("TENSORRT_BINDINGS", "").split(os.pathsep) if folder]
    for bindings in (None, *folders):
        if reason := rig.obstacle(bindings):
            print(reason)
            continue
        with tempfile.TemporaryDirectory() as folder:
            said = rig.ask(lookup(sorted(used)), env=rig.prepare(Path(folder), bindings))
        files = {file for each in used.values() for file in each}
        print(f"TensorRT {said['version']}: {len(used)} names in {len(files)} files, {len(said['missing'])} missing")
        for name in said["missing"]:
            print(f"  {name}: {', '.join(sorted(used[name]))}")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    main()

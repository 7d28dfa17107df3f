"""The direction of imports: who may know whom (docs/architecture.md), read from the syntax trees."""

import ast
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

FOLDERS = {  # folder in the repository: package it installs as
    "maskrcnn": "maskrcnn",
    "plugins": "maskrcnn.plugins",
    "export": "maskrcnn.export",
    "runtime": "maskrcnn.runtime",
}
# These may import everything.
TOP_MODULES = (
    "maskrcnn.cli",
    "maskrcnn.cli_evaluate",
    "maskrcnn.cli_evaluate_model",
    "maskrcnn.cli_build",
    "maskrcnn.cli_data",
    "maskrcnn.cli_doctor",
    "maskrcnn.cli_engine",
    "maskrcnn.cli_export",
    "maskrcnn.cli_graph",
    "maskrcnn.cli_plugins",
    "maskrcnn.cli_predict",
    "maskrcnn.cli_serve",
    "maskrcnn.cli_train",
    "maskrcnn.cli_verify",
    "maskrcnn.__main__",
)
TORCH_BACKEND = "maskrcnn.runtime.torch_backend"
CUDA_OPS = "maskrcnn.model.cuda_ops"  # the kernels of the plugins as torch ops
# What the runtime may use of the package: modules that need no torch.
LIGHT_MODULES = tuple(
    f"maskrcnn.{name}"
    for name in (
        "errors",
        "files",
        "keypoints",
        "metadata",
        "preprocess",
        "postprocess",
        "pasting",
        "run_lengths",
        "data.coco",
        "data.coco_file",  # what a COCO file holds
        "data.coco_keypoints",
        "data.drawn",  # what the generated datasets have in common
        "data.figures",
        "data.images",
        "data.segmentation",  # the masks of data.coco
        "data.shapes",
        "draw",
        "stages",
    )
)
TORCH = ("torch", "torchvision")
# Modules of the plugins that compile: they have something to say to the user, and files to write.
TOOL_MODULES = tuple(
    f"maskrcnn.plugins.{name}" for name in ("toolchain", "cache", "build", "nvrtc", "aot_kernels", "aot")
)
FOR_TOOLS = ("maskrcnn.errors", "maskrcnn.files")


@dataclass(frozen=True)
class Import:
    """One imported name: `import a.b` and `from a import b` are both a.b."""

    module: str
    name: str
    line: int
    is_lazy: bool  # inside a function, or for type checking only


def imports_of(source: str, module: str, *, is_package: bool = False) -> list[Import]:
    """All imports of a module's source, wherever they stand, relative ones resolved."""
    found: list[Import] = []

    def visit(node: ast.AST, is_lazy: bool) -> None:
        if isinstance(node, ast.Import):
            found.extend(Import(module, alias.name, node.lineno, is_lazy) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = module.split(".")
                kept = parents[: len(parents) - node.level + is_package]
                base = ".".join([*kept, *([node.module] if node.module else [])])
            found.extend(Import(module, f"{base}.{a.name}", node.lineno, is_lazy) for a in node.names)
        typing_only = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        is_function = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for child in ast.iter_child_nodes(node):
            visit(child, is_lazy or typing_only or is_function)

    visit(ast.parse(source), False)
    return found


def within(name: str, *packages: str) -> bool:
    """Whether `name` is one of the packages or lies in one."""
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def objection(found: Import) -> str | None:
    """Why an import is against the directions, or None."""
    module, name = found.module, found.name
    if module in TOP_MODULES:
        return None
    if within(module, "maskrcnn.plugins"):
        return _objection_in_plugins(found)
    if within(module, "maskrcnn.runtime"):
        return _objection_in_runtime(found)
    if within(module, "maskrcnn.export"):
        return "only the command line imports it" if within(name, *TOP_MODULES) else None
    if module == CUDA_OPS and within(name, "maskrcnn.plugins"):
        return None
    if within(name, "maskrcnn.export", "maskrcnn.plugins", "maskrcnn.runtime", *TOP_MODULES):
        return "the core of the package knows none of the folders built on it"
    if module in LIGHT_MODULES and within(name, *TORCH):
        return "the runtime uses this module, so it may not need torch"
    if module in LIGHT_MODULES and within(name, "maskrcnn") and not within(name, *LIGHT_MODULES):
        return "the runtime uses this module, so it may use only modules without torch"
    return None


def _objection_in_plugins(found: Import) -> str | None:
    if found.name.partition(".")[0] in sys.stdlib_module_names or within(found.name, "numpy", "maskrcnn.plugins"):
        return None
    if within(found.name, "tensorrt", "cuda"):
        return None if found.is_lazy else "TensorRT and CUDA are imported inside the functions that need them"
    if found.module in TOOL_MODULES and within(found.name, *FOR_TOOLS):
        return None
    return "the plugins need NumPy alone"


def _objection_in_runtime(found: Import) -> str | None:
    if within(found.name, "maskrcnn.export", *TOP_MODULES):
        return "the runtime never knows the export: only files pass between them"
    if found.module == TORCH_BACKEND:
        return None
    if within(found.name, *TORCH):
        return f"torch is imported in {TORCH_BACKEND} alone"
    ours = within(found.name, "maskrcnn") and found.name != "maskrcnn.__version__"
    if ours and not within(found.name, "maskrcnn.runtime", "maskrcnn.plugins", *LIGHT_MODULES):
        return "the runtime uses only modules without torch"
    if within(found.name, TORCH_BACKEND) and not found.is_lazy:
        return "the torch backend is imported inside the function that needs it"
    return None


def module_files(root: Path) -> dict[str, Path]:
    """Every module of the package with its file."""
    files = {}
    for folder, package in FOLDERS.items():
        for path in sorted((root / folder).rglob("*.py")):
            parts = path.relative_to(root / folder).with_suffix("").parts
            files[".".join([package, *(part for part in parts if part != "__init__")])] = path
    return files


def objections(source: str, module: str, *, is_package: bool = False) -> list[str]:
    """The imports of a source that are against the directions, each with its reason."""
    return [
        f"{module}:{found.line} imports {found.name}: {reason}"
        for found in imports_of(source, module, is_package=is_package)
        if (reason := objection(found))
    ]


def test_every_import_keeps_its_direction(root):
    files = module_files(root)
    assert {"maskrcnn", "maskrcnn.plugins", "maskrcnn.export", "maskrcnn.runtime"} <= files.keys()
    found = []
    for module, path in files.items():
        source = path.read_text(encoding="utf-8")
        found += objections(source, module, is_package=path.name == "__init__.py")
    assert not found, "\n".join(found)


def test_the_modules_named_here_exist(root):
    named = {*LIGHT_MODULES, *TOOL_MODULES, *FOR_TOOLS, TORCH_BACKEND, CUDA_OPS, *TOP_MODULES}
    missing = named - module_files(root).keys()
    assert not missing, f"moved or renamed: {sorted(missing)}"


@pytest.mark.parametrize(
    ("module", "source", "reason"),
    [
        ("maskrcnn.config", "import maskrcnn.export.exporter", "knows none of the folders"),
        ("maskrcnn.model.ops", "def f():\n    from maskrcnn.plugins import contract", "knows none"),
        ("maskrcnn.model.ops", "from .. import runtime", "knows none of the folders"),
        ("maskrcnn.model.cuda_ops", "from maskrcnn import runtime", "knows none of the folders"),
        ("maskrcnn.training.trainer", "from maskrcnn.cli import main", "knows none of the folders"),
        ("maskrcnn.preprocess", "def f():\n    import torch.nn", "it may not need torch"),
        ("maskrcnn.data.coco", "from maskrcnn.model import boxes", "only modules without torch"),
        ("maskrcnn.plugins.reference", "import torch", "NumPy alone"),
        ("maskrcnn.plugins.reference", "from maskrcnn.errors import UserError", "NumPy alone"),
        ("maskrcnn.plugins.tensorrt_ops", "import tensorrt.plugin", "inside the functions"),
        ("maskrcnn.plugins.nvrtc", "from cuda.bindings import nvrtc", "inside the functions"),
        ("maskrcnn.plugins.build", "from maskrcnn import config", "NumPy alone"),
        ("maskrcnn.runtime.detector", "import torch", "torch_backend alone"),
        ("maskrcnn.runtime.detector", "def f():\n    from torch import nn", "torch_backend alone"),
        ("maskrcnn.runtime.detector", "from . import torch_backend", "inside the function that needs it"),
        (
            "maskrcnn.runtime.detector",
            "from maskrcnn.config import ModelConfig",
            "only modules without torch",
        ),
        ("maskrcnn.runtime.detector", "from maskrcnn import checkpoint", "only modules without torch"),
        ("maskrcnn.runtime.torch_backend", "from maskrcnn import export", "never knows the export"),
        ("maskrcnn.export.exporter", "import maskrcnn.cli", "only the command line"),
    ],
)
def test_the_check_objects(module, source, reason):
    (found,) = objections(source, module)
    assert reason in found


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("maskrcnn.cli", "from maskrcnn.runtime import Detector"),
        ("maskrcnn.config", "import torch\nfrom maskrcnn.model import boxes"),
        ("maskrcnn.postprocess", "import numpy as np\nfrom maskrcnn.preprocess import linear_taps"),
        ("maskrcnn.plugins.reference", "import math, numpy.linalg\nfrom maskrcnn.plugins import contract"),
        ("maskrcnn.model.cuda_ops", "from maskrcnn.plugins.native import Kernels"),
        ("maskrcnn.plugins.tensorrt_ops", "def f():\n    import tensorrt"),
        ("maskrcnn.plugins.toolchain", "def f():\n    from cuda.bindings import driver"),
        ("maskrcnn.plugins.build", "from maskrcnn.errors import UserError\nfrom maskrcnn.plugins import cache"),
        ("maskrcnn.plugins.tensorrt_ops", "if typing.TYPE_CHECKING:\n    import tensorrt"),
        ("maskrcnn.runtime.torch_backend", "import torch\nfrom maskrcnn.model.detector import MaskRCNN"),
        ("maskrcnn.runtime.detector", "def f():\n    from .torch_backend import TorchBackend"),
        ("maskrcnn.runtime.engine", "import openvino\nfrom maskrcnn import __version__, metadata"),
        ("maskrcnn.export.exporter", "import torch\nfrom maskrcnn import model, plugins, runtime"),
    ],
)
def test_the_check_passes_what_is_allowed(module, source):
    assert objections(source, module) == []


def test_relative_imports_are_resolved():
    source = "from . import a\nfrom .b import c\nfrom ..d import e"
    assert [i.name for i in imports_of(source, "m.n.o")] == ["m.n.a", "m.n.b.c", "m.d.e"]
    assert [i.name for i in imports_of(source, "m.n", is_package=True)] == ["m.n.a", "m.n.b.c", "m.d.e"]

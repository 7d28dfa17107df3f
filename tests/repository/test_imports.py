"""Import directions, by folder, read from the syntax trees (docs/architecture.md)."""

import ast
import sys
from pathlib import Path

import pytest

FOLDERS = {
    "maskrcnn": "maskrcnn",
    "plugins": "maskrcnn.plugins",
    "export": "maskrcnn.export",
    "runtime": "maskrcnn.runtime",
}
TOP = ("maskrcnn.api", "maskrcnn.cli", "maskrcnn.__main__")
TORCH = ("torch", "torchvision")
WITH_TORCH = ("maskrcnn.model", "maskrcnn.training", "maskrcnn.weights")
UPPER = ("maskrcnn.export", "maskrcnn.plugins", "maskrcnn.runtime")


def within(name: str, *packages: str) -> bool:
    """Whether `name` is one of the packages or lies in one."""
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def imports_of(source: str, *, with_annotations: bool = True) -> list[tuple[int, str]]:
    """(line, dotted name) of every import, those inside functions included; `from a import b` is a.b.

    Args:
        source: Python code.
        with_annotations: include imports below `if TYPE_CHECKING`, which never run.
    """
    found: list[tuple[int, str]] = []

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.Import):
            found.extend((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            found.extend((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test) and not with_annotations:
            return
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(source))
    return found


def is_allowed(module: str, name: str) -> bool:
    """Whether `module` may import `name`, by the table of docs/architecture.md."""
    if within(module, *TOP) or module == "maskrcnn":  # `maskrcnn` names the API's functions, and loads them lazily
        return True
    if within(name, *TOP):
        return False
    if within(module, "maskrcnn.plugins"):
        standard = name.partition(".")[0] in sys.stdlib_module_names
        return standard or within(
            name, "numpy", "tensorrt", "cuda", "maskrcnn.plugins", "maskrcnn.errors", "maskrcnn.files"
        )
    if within(module, "maskrcnn.export"):
        return True
    if within(module, "maskrcnn.runtime"):
        if module == "maskrcnn.runtime.doctor" and within(name, *TORCH):
            return True  # looks for it in a process of its own
        if module == "maskrcnn.runtime.backends.torch":
            return not within(name, "maskrcnn.export")
        return not within(name, "maskrcnn.export", *WITH_TORCH, *TORCH)
    if module == "maskrcnn.model.cuda_ops" and within(name, "maskrcnn.plugins"):
        return True  # the kernels of the plugins as torch ops
    if within(name, *UPPER):
        return False
    return within(module, *WITH_TORCH) or not within(name, *WITH_TORCH, *TORCH)


def modules(root: Path) -> dict[str, str]:
    """Every module of the package with its source."""
    found = {}
    for folder, package in FOLDERS.items():
        for path in sorted((root / folder).rglob("*.py")):
            parts = path.relative_to(root / folder).with_suffix("").parts
            found[".".join([package, *(part for part in parts if part != "__init__")])] = path.read_text("utf-8")
    return found


def test_every_import_keeps_its_direction(root):
    wrong = [
        f"{module}:{line} imports {name}"
        for module, source in modules(root).items()
        for line, name in imports_of(source)
        if not is_allowed(module, name)
    ]
    assert not wrong, "\n".join(wrong)


def test_no_import_cycle(root):
    sources = modules(root)
    edges = {}
    for module, source in sources.items():
        names = [name for _, name in imports_of(source, with_annotations=False)]
        edges[module] = {target for name in names for target in (name, name.rpartition(".")[0]) if target in sources}
    # `from package import module` reads the package's own names nowhere: only the module counts.
    for targets in edges.values():
        targets -= {name.rpartition(".")[0] for name in targets if name.rpartition(".")[0] in targets}
    done: set[str] = set()

    def visit(module: str, way: tuple[str, ...]) -> None:
        assert module not in way, " → ".join((*way[way.index(module) :], module))
        if module not in done:
            for target in sorted(edges[module] - {module}):
                visit(target, (*way, module))
            done.add(module)

    for module in sources:
        visit(module, ())


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("maskrcnn.config", "maskrcnn.export.exporter"),
        ("maskrcnn.imaging.preprocess", "torch.nn"),
        ("maskrcnn.data.coco", "maskrcnn.model.boxes"),
        ("maskrcnn.model.ops", "maskrcnn.plugins.contract"),
        ("maskrcnn.training.trainer", "maskrcnn.cli.main"),
        ("maskrcnn.plugins.reference", "torch"),
        ("maskrcnn.plugins.build", "maskrcnn.config"),
        ("maskrcnn.runtime.detector", "torch"),
        ("maskrcnn.runtime.detector", "maskrcnn.weights.checkpoint"),
        ("maskrcnn.runtime.backends.torch", "maskrcnn.export"),
        ("maskrcnn.export.exporter", "maskrcnn.cli"),
    ],
)
def test_the_rules_object(module, name):
    assert not is_allowed(module, name)

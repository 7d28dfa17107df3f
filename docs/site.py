"""Hooks of mkdocs: reference pages generated from the code, and links out of docs/ as paths."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import io
import re
import shutil
import tokenize
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File
from typer.cli import get_docs_for_click
from typer.main import get_command
from typer.models import Context

import maskrcnn
from maskrcnn import config as settings
from maskrcnn.cli import app
from maskrcnn.imaging.preprocess import Preprocessing

_ROOT = Path(__file__).resolve().parents[1]
_SECTIONS = (
    (settings.TrainConfig, "", "Settings of a run; `--set NAME=VALUE`, or the same names in YAML"),
    (settings.ModelConfig, "model", "Section `model`: the detector"),
    (Preprocessing, "model.preprocessing", "Section `model.preprocessing`: from image file to tensor"),
    (settings.AugmentConfig, "augment", "Section `augment`: random changes of training samples"),
    (settings.LossConfig, "loss", "Section `loss`: matching, sampling and losses"),
)


def on_startup(**_: Any) -> None:
    """Copy the folders below one name, as they are installed, for mkdocstrings, which looks for them in `on_config`."""
    package = _ROOT / "build" / "site" / "maskrcnn"
    shutil.rmtree(package, ignore_errors=True)
    shutil.copytree(_ROOT / "maskrcnn", package)
    for name in ("export", "plugins", "runtime"):
        shutil.copytree(_ROOT / name, package / name)


def on_files(files: Any, config: Any) -> Any:
    """Add the generated pages."""
    pages = {"command-line": command_line(), "configuration": configuration(), "python": python_api()}
    for name, text in pages.items():
        files.append(File.generated(config, f"reference/{name}.md", content=text))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Turn links to files outside docs/ into the paths of these files in the repository."""
    folder = (_ROOT / "docs" / page.file.src_uri).parent

    def path_of(link: re.Match[str]) -> str:
        target = (folder / link[2].partition("#")[0]).resolve()
        if target.is_relative_to(_ROOT / "docs"):
            return link[0]
        path = target.relative_to(_ROOT).as_posix()
        return link[1] if link[1].strip("`") == path else f"{link[1]} (`{path}`)"

    return re.sub(r"\[([^\]]+)\]\((\.\./[^):]+)\)", path_of, markdown)


def command_line() -> str:
    """Every command with its arguments and options."""
    command = get_command(app)
    return get_docs_for_click(obj=command, ctx=Context(command), name="maskrcnn", title="Command line")


def configuration() -> str:
    """Every setting with its type, default and meaning, which are in the source as help texts and comments."""
    parts = ["# Configuration", "`maskrcnn train --config FILE --set NAME=VALUE`; lengths are pixels (`_px`)."]
    for kind, prefix, title in _SECTIONS:
        comments = _comments(kind)
        lines = ["| setting | type | default | meaning |", "|---|---|---|---|"]
        for field in dataclasses.fields(kind):
            if dataclasses.is_dataclass(_default(field)) or _default(field) is dataclasses.MISSING:
                continue
            meaning = field.metadata.get("help") or comments.get(field.name, "")
            if field.metadata.get("choices"):
                meaning += f" One of {', '.join(field.metadata['choices'])}."
            name = f"{prefix}.{field.name}" if prefix else field.name
            cells = (f"`{name}`", f"`{field.type}`", f"`{_default(field)!r}`", meaning)
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        parts += [f"## {title}", "\n".join(lines)]
    parts += ["## Models", "Values of `--model`: " + ", ".join(f"`{name}`" for name in settings.MODELS) + "."]
    return "\n\n".join(parts) + "\n"


def _default(field: Any) -> Any:
    made = field.default_factory
    return field.default if made is dataclasses.MISSING else made()


def _comments(kind: type) -> dict[str, str]:
    """The comment at the end of each field's last line."""
    source = inspect.getsource(kind)
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    by_line = {token.start[0]: token.string.lstrip("# ") for token in tokens if token.type == tokenize.COMMENT}
    (tree,) = ast.parse(source).body
    fields = [node for node in getattr(tree, "body", ()) if isinstance(node, ast.AnnAssign)]
    return {node.target.id: by_line.get(node.end_lineno, "") for node in fields if isinstance(node.target, ast.Name)}


def python_api() -> str:
    """Directives of mkdocstrings for every public name."""
    modules = {**maskrcnn._LAZY, "export": "maskrcnn.api.export"}  # maskrcnn.export is also a package
    names = [f"{module}.{name}" for name, module in modules.items()]
    names += ["maskrcnn.imaging.postprocess.Detections", "maskrcnn.api.progress.Progress"]
    return "\n\n".join(["# Python API", *(f"::: {name}" for name in names)]) + "\n"

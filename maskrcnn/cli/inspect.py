"""`maskrcnn inspect` and `maskrcnn lint`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from maskrcnn.cli.console import ConsoleProgress, show
from maskrcnn.cli.options import Overwrite
from maskrcnn.errors import UserError


def inspect(
    file: Annotated[Path, typer.Argument(help="ONNX file, engine (.xml, .engine) or checkpoint (.safetensors).")],
    size: Annotated[
        str | None, typer.Option(help="Input size to count operations at, HEIGHTxWIDTH in px (default: the model's).")
    ] = None,
    json: Annotated[Path | None, typer.Option(help="JSON file to write the description to.")] = None,
    overwrite: Overwrite = False,
) -> None:
    """Describe a model file: tensors, precision, size, operations, provenance, and where its nodes would run."""
    from maskrcnn.api.inspect import inspect as run

    with ConsoleProgress().task(f"inspecting {file}"):
        found = run(file, size_hw=None if size is None else _size_hw(size), json=json, overwrite=overwrite)
    show(found.text())


def lint(
    file: Annotated[Path, typer.Argument(help="ONNX file, exported by maskrcnn or any other tool.")],
    json: Annotated[Path | None, typer.Option(help="JSON file to write the findings to.")] = None,
    overwrite: Overwrite = False,
) -> None:
    """List the nodes of an ONNX file that TensorRT would reject or run poorly; does not need TensorRT.

    Exit code 1 if there are errors.
    """
    from maskrcnn.api.inspect import lint_file

    report, is_ours = lint_file(file, json=json, overwrite=overwrite)
    checked = "its TensorRT flavour, with plugins" if is_ours else "as it is"
    show(f"{file}, {checked}: {report.text()}")
    if report.errors:
        raise typer.Exit(1)


def _size_hw(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)[x×](\d+)", text)
    if match is None:
        raise UserError(f"--size {text}", "HEIGHTxWIDTH in pixels", "for example --size 800x1088")
    return int(match[1]), int(match[2])

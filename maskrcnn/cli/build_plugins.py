"""`maskrcnn build-plugins`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from maskrcnn.api.plugins import Form
from maskrcnn.cli.console import ConsoleProgress

_COMPILER = "Compiler"


def build_plugins(
    form: Annotated[
        Form,
        typer.Option(
            help="Part to compile: kernels (library for PyTorch), library (also the TensorRT plugins), aot (kernels "
            "to embed in engines), or all (everything that can be compiled here)."
        ),
    ] = Form.ALL,
    output: Annotated[
        Path | None, typer.Option("--output", "--out", metavar="DIR", help="Folder to copy the libraries to.")
    ] = None,
    arch: Annotated[
        str | None,
        typer.Option(
            help="Compute capabilities to compile for, such as 80,90, or native (default: native; without a GPU, "
            "common ones).",
            rich_help_panel=_COMPILER,
        ),
    ] = None,
    tensorrt_include: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Folder of TensorRT's C++ headers.", rich_help_panel=_COMPILER),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Compile again what is already cached.", rich_help_panel=_COMPILER)
    ] = False,
) -> None:
    """Compile the CUDA kernels and TensorRT plugins."""
    from maskrcnn.api.plugins import build_plugins as run

    run(form, arch=arch, output=output, tensorrt_include=tensorrt_include, force=force, progress=ConsoleProgress())

"""`maskrcnn build-plugins` and `maskrcnn doctor`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from maskrcnn.cli.console import console
from maskrcnn.errors import UserError


def build_plugins(
    form: Annotated[
        str, typer.Option(help="kernels (PyTorch), library (and TensorRT plugins in C++), aot, or all.")
    ] = "all",
    arch: Annotated[
        str | None, typer.Option(help="GPUs to compile for, as 80,90; default native, without a GPU the common ones.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "--out", metavar="DIR", help="Copy the libraries there.")
    ] = None,
    tensorrt_include: Annotated[Path | None, typer.Option(metavar="DIR", help="TensorRT's C++ headers.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Compile even what the cache has.")] = False,
) -> None:
    """Compiles the CUDA kernels and the TensorRT plugins: the libraries, and the kernels that engines get built in."""
    from maskrcnn.cli.build_plugins import Form, run_build_plugins

    forms = [known.value for known in Form]
    if form not in forms:
        raise UserError(f"--form {form}", f"one of {', '.join(forms)}", "leave it out for everything that can be built")
    run_build_plugins(console, form=Form(form), arch=arch, out=output, tensorrt_include=tensorrt_include, force=force)


def doctor(
    places: Annotated[list[Path] | None, typer.Argument(help="Engines, or folders with some, besides runs/.")] = None,
) -> None:
    """Versions, devices, compilers, plugins and engines of this machine, and what each missing one would enable."""
    from maskrcnn.cli.doctor import run_doctor

    run_doctor(console, places or ())

"""`maskrcnn web`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from maskrcnn.cli.console import ConsoleProgress, show


def web(
    model: Annotated[Path, typer.Argument(help="ONNX file written by `maskrcnn export --onnx`.")],
    out: Annotated[Path, typer.Argument(help="Folder for the page: new, or that of an earlier page.")],
    onnxruntime_web: Annotated[
        Path | None,
        typer.Option(help="Folder or .tgz of the npm package onnxruntime-web (default: downloaded with npm)."),
    ] = None,
    image: Annotated[
        Path | None,
        typer.Option(
            help="Photo with objects of the model's classes, for the page's check of a browser (default: drawn shapes)."
        ),
    ] = None,
) -> None:
    """Write a static web page that detects objects in photos and camera images in the browser, without uploads."""
    from maskrcnn.api.serving import web as run

    result = run(model, out, onnxruntime_web=onnxruntime_web, image=image, progress=ConsoleProgress())
    show("\n".join(result.lines()))

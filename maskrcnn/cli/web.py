"""`maskrcnn web`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from maskrcnn.cli.console import ConsoleProgress, show


def web(
    model: Annotated[Path, typer.Argument(help="ONNX file of `maskrcnn export --onnx`.")],
    out: Annotated[Path, typer.Argument(help="Folder for the page: a new one, or that of an earlier page.")],
    onnxruntime_web: Annotated[
        Path | None,
        typer.Option(help="Package onnxruntime-web, a folder or .tgz of npm (default: fetched by npm)."),
    ] = None,
    image: Annotated[
        Path | None,
        typer.Option(help="Photo of the model's classes, by which the page checks a browser (default: drawn shapes)."),
    ] = None,
) -> None:
    """Write a web page that detects on photos and the camera in the browser: static files, nothing is uploaded."""
    from maskrcnn.api.serving import web as run

    result = run(model, out, onnxruntime_web=onnxruntime_web, image=image, progress=ConsoleProgress())
    show("\n".join(result.lines()))

"""`maskrcnn verify`."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from maskrcnn.cli.console import ConsoleProgress, show, verbosity
from maskrcnn.cli.options import Overwrite


class Tolerance(str, Enum):
    """Limits of the differences between two models, by precision."""

    EXACT = "exact"
    HALF = "half"
    INT8 = "int8"


def verify(
    reference: Annotated[Path, typer.Argument(metavar="A", help="Reference: checkpoint, ONNX file or engine.")],
    other: Annotated[Path, typer.Argument(metavar="B", help="Model to compare with the reference.")],
    images: Annotated[
        list[Path] | None, typer.Option(help="Image or folder to compare on; repeatable (default: drawn shapes).")
    ] = None,
    max_images: Annotated[int, typer.Option(min=1, help="Maximum number of images.")] = 16,
    size: Annotated[
        int | None, typer.Option(min=1, help="Shorter side of the resized images, px (default: the model's).")
    ] = None,
    tolerance: Annotated[
        Tolerance | None, typer.Option(help="Limits of each stage (default: those of the lower of the two precisions).")
    ] = None,
    json: Annotated[
        Path | None, typer.Option(help="JSON file to write the report to.", rich_help_panel="Output")
    ] = None,
    report: Annotated[
        Path | None, typer.Option(help="HTML file to write, or a folder for report.html.", rich_help_panel="Output")
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Compare two models stage by stage, and name the first stage that differs.

    Prints one line if they agree; `maskrcnn --verbose verify` prints the table of stages. Exit code 1 if a stage
    differs by more than its tolerance.
    """
    from maskrcnn.api.verify import verify as run

    result = run(
        reference,
        other,
        images=images or (),
        max_images=max_images,
        size=size,
        tolerance=None if tolerance is None else tolerance.value,
        json=json,
        report=report,
        overwrite=overwrite,
        progress=ConsoleProgress(),
    )
    assert result.details is not None
    if verbosity["verbose"] or not result.ok:
        show(result.details.table())
    elif result.details.notes:
        show("\n".join(result.details.notes))
    show(result.conclusion)
    if result.report is not None:
        show(f"report → {result.report}")
    if not result.ok:
        raise typer.Exit(1)

"""`maskrcnn predict`."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from maskrcnn.cli.console import ConsoleProgress, show
from maskrcnn.cli.options import BackendName, Overwrite, PixelRange, PrecisionName, ProviderName, range_from_text
from maskrcnn.errors import UserError


class ImageFormat(str, Enum):
    """File format of overlays."""

    PNG = "png"
    JPEG = "jpg"


def predict(
    images: Annotated[list[Path], typer.Argument(help="Image files, and folders of images.")],
    model: Annotated[
        Path | None,
        typer.Option(help="Checkpoint, ONNX file or engine (default: best checkpoint of the newest run)."),
    ] = None,
    backend: BackendName = None,
    provider: ProviderName = None,
    precision: PrecisionName = None,
    pixel_range: PixelRange = None,
    output: Annotated[
        Path, typer.Option(help="Folder to write overlays and results.json to.", rich_help_panel="Output")
    ] = Path("predictions"),
    format: Annotated[
        ImageFormat, typer.Option(help="File format of the overlays.", rich_help_panel="Output")
    ] = ImageFormat.PNG,
    annotations: Annotated[
        Path | None,
        typer.Option(
            help="COCO annotation file of these images, whose image ids the results get (default: the one of their "
            "dataset, if the images are in one; else they are counted).",
            rich_help_panel="Output",
        ),
    ] = None,
    threshold: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=1,
            help="Lowest score of a detection to draw (default: recommended by training, else 0.5).",
            rich_help_panel="Output",
        ),
    ] = None,
    keypoint_threshold: Annotated[
        float, typer.Option(help="Lowest score (heat map logit) of a keypoint to draw.", rich_help_panel="Output")
    ] = 2.0,
    strict: Annotated[bool, typer.Option("--strict", help="Stop at the first image that cannot be used.")] = False,
    overwrite: Overwrite = False,
) -> None:
    """Detect objects in images: an overlay of each image, and all results in COCO format.

    Images that cannot be used are named and left out, with exit code 1 at the end.
    """
    from maskrcnn.api.predict import IMAGES
    from maskrcnn.api.predict import predict as run

    result = run(
        images,
        model=model,
        backend=backend,
        provider=provider,
        precision=precision,
        pixel_range=range_from_text(pixel_range),
        output=output,
        format=format.value,
        annotations=annotations,
        threshold=threshold,
        keypoint_threshold=keypoint_threshold,
        strict=strict,
        overwrite=overwrite,
        progress=ConsoleProgress(),
    )
    show(f"{sum(result.counts)} results → {result.results} (image ids in {IMAGES})")
    if result.failed:
        total = len(result.failed) + len(result.images)
        reasons = "".join(f"\n  {reason}" for reason in result.failed.values())
        raise UserError(
            f"{len(result.failed)} of {total} images cannot be used:{reasons}",
            "image files; the results of the others are complete",
            "restore these files, or leave them out",
        )

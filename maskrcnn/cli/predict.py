"""`maskrcnn predict`."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from maskrcnn.cli.console import ConsoleProgress, show
from maskrcnn.cli.options import (
    BackendName,
    Overwrite,
    PixelRange,
    PrecisionName,
    ProviderName,
    TileOverlap,
    TileSize,
    range_from_text,
)
from maskrcnn.errors import UserError

_CLUSTER = "Cluster"
_NAMED = 20  # maximum number of images that an error lists


class ImageFormat(str, Enum):
    """File format of overlays."""

    PNG = "png"
    JPEG = "jpg"


def predict(
    images: Annotated[
        list[str],
        typer.Argument(
            help="Image files, folders, patterns, lists (.txt, .json, .parquet), COCO annotation files, videos, "
            "cameras (camera:0, rtsp://…), and URLs of them.",
        ),
    ],
    model: Annotated[
        Path | None,
        typer.Option(help="Checkpoint, ONNX file or engine (default: best checkpoint of the newest run)."),
    ] = None,
    backend: BackendName = None,
    provider: ProviderName = None,
    precision: PrecisionName = None,
    pixel_range: PixelRange = None,
    batch_size: Annotated[
        int, typer.Option(min=1, help="Maximum number of images of one size, or of tiles, per batch.")
    ] = 1,
    tile: TileSize = None,
    overlap: TileOverlap = 0.2,
    workers: Annotated[
        int | None,
        typer.Option(min=1, help="Number of images to process concurrently (default: available CPUs, at most 8)."),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Maximum number of images or video frames to process (default: all).")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the interrupted run in the output folder.")
    ] = False,
    ray: Annotated[
        str | None,
        typer.Option(
            help="Run on a Ray cluster: local, auto or ray://HOST:10001; writes Parquet to a folder or URL.",
            rich_help_panel=_CLUSTER,
        ),
    ] = None,
    actors: Annotated[
        str | None,
        typer.Option(
            help="Number of actors (copies of the model) on the cluster: N, or MIN-MAX (default: as many as fit).",
            rich_help_panel=_CLUSTER,
        ),
    ] = None,
    actor_cpus: Annotated[
        float, typer.Option(min=0, help="CPUs per actor; also its number of threads.", rich_help_panel=_CLUSTER)
    ] = 1,
    actor_gpus: Annotated[float, typer.Option(min=0, help="GPUs per actor.", rich_help_panel=_CLUSTER)] = 0,
    output: Annotated[
        str, typer.Option(help="Folder to write to; with --ray also a URL.", rich_help_panel="Output")
    ] = "predictions",
    save: Annotated[
        list[str] | None,
        typer.Option(
            help="Output to write: overlays, video (annotated), results (COCO), parquet; labels for annotation tools: "
            "coco, labelme, yolo; repeatable (default: overlays or video, and results).",
            rich_help_panel="Output",
        ),
    ] = None,
    format: Annotated[
        ImageFormat, typer.Option(help="File format of the overlays.", rich_help_panel="Output")
    ] = ImageFormat.PNG,
    annotations: Annotated[
        Path | None,
        typer.Option(
            help="COCO annotation file with the image ids for the results (default: that of the dataset that contains "
            "the images; else images are numbered).",
            rich_help_panel="Output",
        ),
    ] = None,
    threshold: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=1,
            help="Minimum score of a detection in overlays and labels (default: recommended by training, else 0.5).",
            rich_help_panel="Output",
        ),
    ] = None,
    keypoint_threshold: Annotated[
        float, typer.Option(help="Minimum score (heat map logit) of a keypoint to draw.", rich_help_panel="Output")
    ] = 2.0,
    tolerance: Annotated[
        float,
        typer.Option(
            min=0,
            help="Maximum distance of a label's simplified outline from the mask's, px.",
            rich_help_panel="Output",
        ),
    ] = 0.5,
    strict: Annotated[bool, typer.Option("--strict", help="Stop at the first image that cannot be used.")] = False,
    overwrite: Overwrite = False,
) -> None:
    """Detect objects in images and videos; write an overlay of each, and all results in COCO format.

    Images that cannot be used are skipped and listed at the end, with exit code 1. The detections of an image are
    written to detections.jsonl as soon as it is done; --resume continues after the last image in that file.
    """
    from maskrcnn.api.predict import predict as run
    from maskrcnn.api.predict_output import FAILED

    result = run(
        images,
        model=model,
        backend=backend,
        provider=provider,
        precision=precision,
        pixel_range=range_from_text(pixel_range),
        output=output,
        save=save,
        batch_size=batch_size,
        tile=tile,
        overlap=overlap,
        workers=workers,
        limit=limit,
        resume=resume,
        ray=ray,
        actors=_actors(actors),
        actor_cpus=actor_cpus,
        actor_gpus=actor_gpus,
        tolerance=tolerance,
        format=format.value,
        annotations=annotations,
        threshold=threshold,
        keypoint_threshold=keypoint_threshold,
        strict=strict,
        overwrite=overwrite,
        progress=ConsoleProgress(),
    )
    show(f"{result.total} results of {len(result.images)} images → {result.results}")
    if result.failed:
        total = len(result.failed) + len(result.images)
        again = "" if ray else f", and name {Path(output, FAILED)} with another --output"
        reasons = "".join(f"\n  {reason}" for reason in list(result.failed.values())[:_NAMED])
        place = f"rows of {result.results} with `error`" if ray else Path(output, FAILED)
        reasons += "" if len(result.failed) <= _NAMED else f"\n  … all in {place}"
        raise UserError(
            f"{len(result.failed)} of {total} images cannot be used:{reasons}",
            "image files; the results of the others are complete",
            f"restore these files{again}; or leave them out",
        )


def _actors(text: str | None) -> int | tuple[int, int] | None:
    """Parses `N` or `MIN-MAX`."""
    if text is None:
        return None
    try:
        least, _, most = text.partition("-")
        return (int(least), int(most)) if most else int(least)
    except ValueError as error:
        raise UserError(f"--actors {text}", "N, or MIN-MAX", "for example --actors 2-8") from error

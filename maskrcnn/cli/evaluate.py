"""`maskrcnn evaluate`."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from maskrcnn.cli.console import ConsoleProgress, show
from maskrcnn.cli.options import (
    BackendName,
    ExifRule,
    Overwrite,
    PixelRange,
    PrecisionName,
    ProviderName,
    TileOverlap,
    TileSize,
    range_from_text,
)
from maskrcnn.errors import UserError

_RESULTS, _METRICS, _OUTPUT = "Results of any detector", "Metrics and comparison", "Output"


class Kind(str, Enum):
    """Kind of overlap to score, as named by pycocotools."""

    BBOX = "bbox"
    SEGM = "segm"
    KEYPOINTS = "keypoints"


def evaluate(
    model: Annotated[
        Path | None,
        typer.Argument(help="Checkpoint, ONNX file or engine (default: best checkpoint of the newest run)."),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(help="Folder of a dataset, or its annotation file (default: validation data of the model's run)."),
    ] = None,
    split: Annotated[str, typer.Option(help="Split to evaluate on.")] = "val",
    batch_size: Annotated[int, typer.Option(min=1, help="Batch size in images (with --tile: in tiles).")] = 1,
    tile: TileSize = None,
    overlap: TileOverlap = 0.2,
    processes: Annotated[
        int, typer.Option(min=1, help="Number of worker processes (or launch with torchrun and --resume).")
    ] = 1,
    resume: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="File to save the detections of each image to, and to resume from."),
    ] = None,
    backend: BackendName = None,
    provider: ProviderName = None,
    precision: PrecisionName = None,
    exif: ExifRule = "auto",
    pixel_range: PixelRange = None,
    results: Annotated[
        Path | None,
        typer.Option(help="Results file in COCO format to score instead of a model.", rich_help_panel=_RESULTS),
    ] = None,
    annotations: Annotated[Path | None, typer.Option(help="Annotation file in COCO format, instead of --data.")] = None,
    images: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Folder of the images (default: searched for near the annotations)."),
    ] = None,
    iou_type: Annotated[
        list[Kind] | None,
        typer.Option(
            help="Kind of overlap to score; repeatable (default: all kinds in the results).", rich_help_panel=_METRICS
        ),
    ] = None,
    max_detections: Annotated[
        str | None,
        typer.Option(
            metavar="N,…",
            help="Maximum detections per image and class; limits other than COCO's are labelled (default: 1,10,100).",
            rich_help_panel=_METRICS,
        ),
    ] = None,
    voc: Annotated[
        bool,
        typer.Option(
            "--voc", help="Also print Pascal VOC's box AP, by the 11-point and the area rule.", rich_help_panel=_METRICS
        ),
    ] = False,
    compare: Annotated[
        Path | None,
        typer.Option(help="Results file or model to compare AP with.", rich_help_panel=_METRICS),
    ] = None,
    resamples: Annotated[
        int, typer.Option(min=1, help="Number of bootstrap resamples for AP intervals.", rich_help_panel=_METRICS)
    ] = 1000,
    seed: Annotated[int, typer.Option(min=0, help="Random seed of the resamples.", rich_help_panel=_METRICS)] = 0,
    threshold: Annotated[
        float,
        typer.Option(
            min=0, max=1, help="Minimum score in comparisons, confusions and images.", rich_help_panel=_METRICS
        ),
    ] = 0.5,
    per_class: Annotated[
        bool, typer.Option("--per-class", help="Print the metrics of each class.", rich_help_panel=_OUTPUT)
    ] = False,
    save_results: Annotated[
        Path | None,
        typer.Option(help="Results file to write, in the format of COCO's evaluation server.", rich_help_panel=_OUTPUT),
    ] = None,
    json: Annotated[
        Path | None, typer.Option(help="JSON file to write metrics and results to.", rich_help_panel=_OUTPUT)
    ] = None,
    report: Annotated[
        Path | None, typer.Option(help="HTML file to write, or a folder for report.html.", rich_help_panel=_OUTPUT)
    ] = None,
    worst: Annotated[
        int, typer.Option(min=0, help="Maximum number of images in the report.", rich_help_panel=_OUTPUT)
    ] = 12,
    strict: Annotated[
        bool, typer.Option("--strict", help="Refuse annotation files with skipped or repaired entries.")
    ] = False,
    overwrite: Overwrite = False,
    scorer: Annotated[str | None, typer.Option(help="Ignored.", hidden=True)] = None,
) -> None:
    """Compute COCO box, mask and keypoint metrics of a model on a dataset, or of a results file."""
    from maskrcnn.api.evaluate import evaluate as run

    if scorer is not None:
        show("--scorer is ignored: there is one scorer, whose metrics equal pycocotools'")
    result = run(
        model,
        data=data,
        split=split,
        backend=backend,
        provider=provider,
        precision=precision,
        exif=exif,
        pixel_range=range_from_text(pixel_range),
        batch_size=batch_size,
        tile=tile,
        overlap=overlap,
        processes=processes,
        resume=resume,
        results=results,
        annotations=annotations,
        images=images,
        iou_type=[kind.value for kind in iou_type or ()],
        max_detections=_limits(max_detections),
        voc=voc,
        compare=compare,
        resamples=resamples,
        seed=seed,
        threshold=threshold,
        save_results=save_results,
        json=json,
        report=report,
        worst=worst,
        strict=strict,
        overwrite=overwrite,
        progress=ConsoleProgress(),
    )
    if result is None or result.evaluation is None:
        return  # the first process of torchrun prints
    show(result.table())
    if per_class:
        for kind, scored in result.evaluation.scored.items():
            show(_class_table(kind, scored.by_class()))
    if result.voc:
        from maskrcnn.runtime.evaluation.voc import voc_table

        show(voc_table(result.voc))
    show(result.evaluation.seconds.line())
    if results is None:
        rate = result.images / max(result.evaluation.seconds.detect, 1e-9)
        show(f"{rate:.2f} images/s per process, from file to pasted masks")
    for path in result.files:
        show(f"→ {path}")


def _limits(text: str | None) -> tuple[int, ...]:
    """The numbers of `--max-detections`."""
    try:
        return tuple(int(part) for part in text.split(",")) if text else ()
    except ValueError as error:
        found = f"--max-detections {text}"
        raise UserError(found, "whole numbers, separated by commas", "for example --max-detections 1,10,500") from error


def _class_table(kind: str, by_class: dict[str, dict[str, float]]) -> str:
    """One line per class; values below 0 (no objects) are left blank."""
    first = next(iter(by_class.values()), {})
    names = [name for name in ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large") if name in first]
    width = max([len(name) for name in by_class] + [len(kind)])
    lines = [f"{kind:{width}}{'objects':>9}" + "".join(f"{name:>11}" for name in names)]
    for name, metrics in by_class.items():
        cells = (f"{metrics[key]:11.4f}" if metrics[key] >= 0 else f"{'':11}" for key in names)
        lines.append(f"{name:{width}}{metrics['objects']:9}" + "".join(cells))
    return "\n".join(lines)

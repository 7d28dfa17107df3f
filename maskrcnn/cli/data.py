"""`maskrcnn data`: draw, convert and check datasets."""

from __future__ import annotations

import functools
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from maskrcnn.cli.console import ConsoleProgress, show
from maskrcnn.cli.options import ExifRule, Overwrite
from maskrcnn.errors import UserError

data_app = typer.Typer(no_args_is_help=True, help="Draw, convert and check datasets in COCO format.")

_OUTPUT, _SPLITS, _CLASSES, _FORMAT = "Output", "Splits", "Classes", "Options of single formats"


class Difficult(str, Enum):
    """Conversion of VOC's difficult objects."""

    CROWD = "crowd"
    KEEP = "keep"
    DROP = "drop"


def _option(panel: str, *names: str, **options: Any) -> Any:
    return typer.Option(*names, rich_help_panel=panel, **options)


@data_app.command("convert")
def data_convert(
    kind: Annotated[
        str,
        typer.Argument(
            help="Format of the source: coco (any layout that training reads), yolo, voc, visual-genome, penn-fudan, "
            "synthia, cityscapes, id-masks, mask-files, labelme, via, or datumaro:FORMAT (needs the library Datumaro)."
        ),
    ],
    source: Annotated[Path, typer.Argument(help="Folder of the dataset, or its annotation file (coco, yolo, via).")],
    out: Annotated[Path, typer.Argument(help="Folder to write; must be new or empty.")],
    keep_going: Annotated[
        bool, typer.Option("--keep-going", help="Skip and count entries that cannot be converted instead of stopping.")
    ] = False,
    copy: Annotated[bool, _option(_OUTPUT, "--copy", help="Copy images instead of hard-linking them.")] = False,
    json: Annotated[Path | None, _option(_OUTPUT, help="JSON file to write the counts to.")] = None,
    overwrite: Overwrite = False,
    split: Annotated[
        list[str] | None,
        _option(
            _SPLITS,
            metavar="NAME=LIST|SHARE",
            help="Split, given by a file of image names or ids, or by its share (0 to 1); repeatable.",
        ),
    ] = None,
    rest: Annotated[str | None, _option(_SPLITS, metavar="NAME", help="Split for all other images.")] = None,
    val_fraction: Annotated[
        float | None,
        _option(_SPLITS, help="Share of validation images (default: 0.1 if the source has no splits)."),
    ] = None,
    seed: Annotated[int, _option(_SPLITS, min=0, help="Random seed for splits given by shares.")] = 0,
    sets: Annotated[
        str | None, _option(_SPLITS, help="Splits of the source to convert, comma-separated (coco, voc, cityscapes).")
    ] = None,
    classes: Annotated[
        str | None,
        _option(
            _CLASSES,
            metavar="FILE|N",
            help="File with one class per line (`name` or `id: name`), or number of most frequent classes.",
        ),
    ] = None,
    alias: Annotated[
        Path | None,
        _option(
            _CLASSES, metavar="FILE", help="File of synonyms: on each line, all names of one class, comma-separated."
        ),
    ] = None,
    class_name: Annotated[
        str | None, _option(_CLASSES, "--class", metavar="NAME", help="Class to give to all objects.")
    ] = None,
    class_attribute: Annotated[str | None, _option(_CLASSES, help="Attribute that holds the class (via).")] = None,
    with_masks: Annotated[
        bool, _option(_FORMAT, "--with-masks", help="Use the masks of the segmentation lists (voc).")
    ] = False,
    difficult: Annotated[Difficult, _option(_FORMAT, help="Treatment of difficult objects (voc).")] = Difficult.CROWD,
    zero_based: Annotated[
        bool, _option(_FORMAT, "--zero-based", help="Read box coordinates as zero-based (voc).")
    ] = False,
    images: Annotated[
        str | None,
        _option(
            _FORMAT,
            "--images",
            "--image-folder",
            metavar="DIR",
            help="Folder of the images (coco); relative to SOURCE (id-masks, default: images; via, default: SOURCE).",
        ),
    ] = None,
    mask_folder: Annotated[
        str | None, _option(_FORMAT, help="Folder of the masks below SOURCE (id-masks; default: masks).")
    ] = None,
    mask_suffix: Annotated[
        str | None, _option(_FORMAT, help="Suffix that mask names add to image names, such as _mask (id-masks).")
    ] = None,
    divisor: Annotated[
        int | None, _option(_FORMAT, help="Divisor of pixel values: class · divisor + instance (id-masks).")
    ] = None,
    void: Annotated[
        int | None, _option(_FORMAT, help="Pixel value, besides 0, that marks no object (id-masks).")
    ] = None,
    crowd: Annotated[
        bool, _option(_FORMAT, "--crowd/--no-crowd", help="Keep crowd regions, or convert them to objects (coco).")
    ] = True,
) -> None:
    """Convert a dataset to COCO format, for `maskrcnn train --data OUT`."""
    from maskrcnn.api.data import convert

    result = convert(
        kind,
        source,
        out,
        keep_going=keep_going,
        copy=copy,
        split=split or (),
        rest=rest,
        val_fraction=val_fraction,
        seed=seed,
        sets=tuple(name for name in (sets or "").split(",") if name),
        classes=classes,
        alias=alias,
        class_name=class_name,
        class_attribute=class_attribute,
        with_masks=with_masks,
        difficult=difficult.value,
        zero_based=zero_based,
        images=images,
        mask_folder=mask_folder,
        mask_suffix=mask_suffix,
        divisor=divisor,
        void=void,
        crowd=crowd,
        json=json,
        overwrite=overwrite,
        progress=ConsoleProgress(),
    )
    show("\n".join(result.lines()))
    show(f"to check it: maskrcnn data check {out}")


_Out = Annotated[Path, typer.Argument(help="Folder to write.")]
_TrainImages = Annotated[int, typer.Option(min=1, help="Number of training images.")]
_ValImages = Annotated[int, typer.Option(min=1, help="Number of validation images.")]
_Side = Annotated[int, typer.Option(min=32, help="Side of the images, px.")]
_Seed = Annotated[int, typer.Option(min=0, help="Random seed.")]


@data_app.command("shapes")
def data_shapes(
    out: _Out,
    train_images: _TrainImages = 600,
    val_images: _ValImages = 100,
    size: _Side = 128,
    seed: _Seed = 0,
    class_shares: Annotated[
        str | None,
        typer.Option(metavar="C,R,T", help="Relative frequencies of the classes, such as 100,10,1 (default: equal)."),
    ] = None,
) -> None:
    """Draw a dataset of circles, rectangles and triangles in COCO format."""
    from maskrcnn.data.shapes import generate_shapes

    try:
        shares = [float(part) for part in class_shares.split(",")] if class_shares else []
    except ValueError as error:
        found = f"--class-shares {class_shares}"
        raise UserError(found, "numbers, separated by commas", "for example --class-shares 100,10,1") from error
    generate = functools.partial(generate_shapes, class_shares=shares)
    _draw(generate, out, train_images=train_images, val_images=val_images, size_px=size, seed=seed)


@data_app.command("poses")
def data_poses(
    out: _Out, train_images: _TrainImages = 600, val_images: _ValImages = 100, size: _Side = 128, seed: _Seed = 0
) -> None:
    """Draw a dataset of stick figures with masks and keypoints in COCO format."""
    from maskrcnn.data.poses import generate_poses

    _draw(generate_poses, out, train_images=train_images, val_images=val_images, size_px=size, seed=seed)


data_app.command("figures", hidden=True)(data_poses)  # the name before 0.2


def _draw(generate: Callable[..., Path], out: Path, **options: int) -> None:
    path = generate(out, **options)
    show(f"{options['train_images']} + {options['val_images']} images in {path}")


@data_app.command("check")
def data_check(
    data: Annotated[Path, typer.Argument(help="Folder of a dataset, or its annotation file.")],
    images: Annotated[
        Path | None,
        typer.Option(
            "--images", "--image-folder", help="Folder of the images (default: searched for near the annotations)."
        ),
    ] = None,
    split: Annotated[list[str] | None, typer.Option(help="Split to check; repeatable (default: all).")] = None,
    exif: ExifRule = "auto",
    output: Annotated[Path | None, _option(_OUTPUT, help="Folder for images of the findings and of samples.")] = None,
    pictures: Annotated[int, _option(_OUTPUT, min=0, help="Maximum number of images to draw per finding.")] = 16,
    json: Annotated[Path | None, _option(_OUTPUT, help="JSON file to write the report to.")] = None,
    overwrite: Overwrite = False,
    strict: Annotated[bool, typer.Option("--strict", help="Exit with code 1 for remarks too.")] = False,
) -> None:
    """Check a dataset for faults that stop training, are skipped by it, or mislead it.

    Exit code 1 for errors, which stop training; 0 for remarks, unless --strict.
    """
    from maskrcnn.api.data import check_data

    report = check_data(
        data,
        images=images,
        split=split or (),
        exif=exif,
        output=output,
        pictures=pictures,
        json=json,
        overwrite=overwrite,
        progress=ConsoleProgress(),
    )
    show(report.text())
    if report.by_problem(is_error=True) or (strict and report.findings):
        raise typer.Exit(1)

"""`maskrcnn data`: draws, converts and checks datasets."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

data_app = typer.Typer(no_args_is_help=True, help="Datasets in COCO format: drawn, converted, checked.")

_SPLITS, _CLASSES, _FORMAT = "Splits", "Classes", "Of some kinds only"


class Kind(str, Enum):
    """A format that can be converted."""

    COCO = "coco"
    VOC = "voc"
    VISUAL_GENOME = "visual-genome"
    PENN_FUDAN = "penn-fudan"
    SYNTHIA = "synthia"
    CITYSCAPES = "cityscapes"
    ID_MASKS = "id-masks"
    MASK_FILES = "mask-files"
    LABELME = "labelme"
    VIA = "via"


class _Difficult(str, Enum):
    """What becomes of VOC's difficult objects."""

    CROWD = "crowd"
    KEEP = "keep"
    DROP = "drop"


def _of_splits(*names: str, **options: Any) -> Any:
    return typer.Option(*names, rich_help_panel=_SPLITS, **options)


def _of_classes(*names: str, **options: Any) -> Any:
    return typer.Option(*names, rich_help_panel=_CLASSES, **options)


def _of_format(*names: str, **options: Any) -> Any:
    return typer.Option(*names, rich_help_panel=_FORMAT, **options)


@data_app.command("convert")
def data_convert(
    kind: Annotated[Kind, typer.Argument(help="The format it has.")],
    source: Annotated[Path, typer.Argument(help="Folder of the dataset; for via also its JSON file.")],
    out: Annotated[Path, typer.Argument(help="Folder to write, missing or empty.")],
    keep_going: Annotated[
        bool, typer.Option("--keep-going", help="Leave out and count what cannot be converted, instead of stopping.")
    ] = False,
    copy: Annotated[bool, typer.Option("--copy", help="Copy images; by default they are linked.")] = False,
    json: Annotated[Path | None, typer.Option(help="Write counts there.")] = None,
    split: Annotated[
        list[str] | None,
        _of_splits(metavar="NAME=LIST|SHARE", help="A split: a file of names or ids, or a share; repeatable."),
    ] = None,
    rest: Annotated[str | None, _of_splits(metavar="NAME", help="The split of all other images.")] = None,
    val_fraction: Annotated[
        float | None,
        _of_splits(help="Short for --split val=SHARE --rest train; 0.1 where there are no splits."),
    ] = None,
    seed: Annotated[int, _of_splits(min=0, help="Of shares.")] = 0,
    sets: Annotated[
        str | None, _of_splits(help="The dataset's own splits or lists to take, with commas; coco, voc, cityscapes.")
    ] = None,
    classes: Annotated[
        str | None, _of_classes(metavar="FILE|N", help="One class a line, `name` or `id: name`; N: the most frequent.")
    ] = None,
    alias: Annotated[Path | None, _of_classes(metavar="FILE", help="Names of one class a line, with commas.")] = None,
    class_name: Annotated[str | None, _of_classes("--class", metavar="NAME", help="Of all objects.")] = None,
    class_attribute: Annotated[str | None, _of_classes(help="via: the attribute that is the class.")] = None,
    with_masks: Annotated[
        bool, _of_format("--with-masks", help="voc: the masks of its segmentation lists, not the boxes.")
    ] = False,
    difficult: Annotated[_Difficult, _of_format(help="voc: what difficult objects become.")] = _Difficult.CROWD,
    zero_based: Annotated[bool, _of_format("--zero-based", help="voc: boxes are counted from 0.")] = False,
    image_folder: Annotated[str | None, _of_format(help="id-masks, via: below SOURCE; default images, itself.")] = None,
    mask_folder: Annotated[str | None, _of_format(help="id-masks: below SOURCE; default masks.")] = None,
    mask_suffix: Annotated[str | None, _of_format(help="id-masks: a mask's name after the image's, as _mask.")] = None,
    divisor: Annotated[int | None, _of_format(help="id-masks: pixels are class · divisor + instance.")] = None,
    void: Annotated[int | None, _of_format(help="id-masks: value of pixels that are no object, besides 0.")] = None,
) -> None:
    """Converts a dataset to COCO format, for `train --data OUT`."""
    from maskrcnn.cli.console import console
    from maskrcnn.data.convert.conversion import convert
    from maskrcnn.data.convert.source import Options
    from maskrcnn.data.convert.splits import split_plan
    from maskrcnn.files import write_json

    options = Options(
        classes=classes,
        alias=alias,
        class_name=class_name,
        sets=tuple(name for name in (sets or "").split(",") if name),
        with_masks=with_masks,
        difficult=difficult.value,
        zero_based=zero_based,
        class_attribute=class_attribute,
        image_folder=image_folder,
        mask_folder=mask_folder,
        mask_suffix=mask_suffix,
        divisor=divisor,
        void=void,
    )
    plan = split_plan(split or (), rest=rest, val_fraction=val_fraction, seed=seed)
    with _progress(console, "converting") as progress:
        report = convert(
            kind.value, source, out, options=options, plan=plan, keep_going=keep_going, copies=copy, progress=progress
        )
    console.print("\n".join(report.lines()), markup=False)
    console.print(f"look at it: maskrcnn data check {out}", markup=False)
    if json is not None:
        write_json(json, report.to_dict())


_Out = Annotated[Path, typer.Argument(help="Folder to write.")]
_Images = Annotated[int, typer.Option(min=1)]
_Side = Annotated[int, typer.Option(min=32, help="Side of the pictures, px.")]
_Seed = Annotated[int, typer.Option(min=0)]


@data_app.command("shapes")
def data_shapes(
    out: _Out, train_images: _Images = 600, val_images: _Images = 100, size: _Side = 128, seed: _Seed = 0
) -> None:
    """Draws a dataset of circles, rectangles and triangles in COCO format."""
    from maskrcnn.data.shapes import generate_shapes

    _draw(generate_shapes, out, train_images=train_images, val_images=val_images, size_px=size, seed=seed)


@data_app.command("figures")
def data_figures(
    out: _Out, train_images: _Images = 600, val_images: _Images = 100, size: _Side = 128, seed: _Seed = 0
) -> None:
    """Draws a dataset of stick figures with masks and keypoints in COCO format."""
    from maskrcnn.data.poses import generate_figures

    _draw(generate_figures, out, train_images=train_images, val_images=val_images, size_px=size, seed=seed)


def _draw(generate: Callable[..., Path], out: Path, **wanted: int) -> None:
    from maskrcnn.cli.console import console

    path = generate(out, **wanted)
    console.print(f"{wanted['train_images']} + {wanted['val_images']} pictures in {path}")


@data_app.command("check")
def data_check(
    data: Annotated[Path, typer.Argument(help="COCO-format folder.")],
    split: Annotated[list[str] | None, typer.Option(help="Split to check, repeatable; default all.")] = None,
    output: Annotated[Path | None, typer.Option(help="Folder for pictures of what is odd, and of samples.")] = None,
    pictures: Annotated[int, typer.Option(min=0, help="Most pictures of each problem.")] = 16,
    json: Annotated[Path | None, typer.Option(help="Write the whole report there.")] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Fail on remarks too.")] = False,
) -> None:
    """Looks for what training would refuse, leave out, or learn wrongly from.

    Exit code 1 for errors, at which training stops; 0 where there are only remarks, unless --strict.
    """
    from maskrcnn.cli.console import console
    from maskrcnn.data.check import check_dataset
    from maskrcnn.data.check_report import write_pictures
    from maskrcnn.files import write_json

    with _progress(console, "checking") as progress:
        report = check_dataset(data, split or (), progress=progress)
    console.print(report.text(), markup=False)
    if output is not None:
        console.print(f"{write_pictures(report, output, per_problem=pictures)} pictures → {output}")
    if json is not None:
        write_json(json, report.to_dict())
    if report.by_problem(is_error=True) or (strict and report.findings):
        raise typer.Exit(1)


@contextmanager
def _progress(console: Console, title: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on a terminal; gives what moves it to (done, total)."""
    from rich.progress import Progress

    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)

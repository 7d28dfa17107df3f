"""`maskrcnn train`."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from maskrcnn.cli.console import ConsoleProgress, show
from maskrcnn.config import TrainConfig
from maskrcnn.errors import UserError

_DATA, _MODEL, _RUN = "Data", "Model", "Run"


def _with_config_options(command: Callable[..., None]) -> Callable[..., None]:
    """Adds an option for each field of `TrainConfig` that has a help text; the command receives them as `options`."""
    own = [p for name, p in inspect.signature(command, eval_str=True).parameters.items() if name != "options"]
    types = typing.get_type_hints(TrainConfig)
    fields = [field for field in dataclasses.fields(TrainConfig) if "help" in field.metadata]
    added = [_parameter(field, types[field.name]) for field in fields]

    @functools.wraps(command)
    def wrapper(**values: Any) -> None:
        options = {field.name: values.pop(field.name) for field in fields}
        command(**values, options={name: value for name, value in options.items() if value is not None})

    wrapper.__signature__ = inspect.Signature(own + added)  # type: ignore[attr-defined]
    wrapper.__annotations__ = {parameter.name: parameter.annotation for parameter in own + added}
    return wrapper


def _parameter(field: dataclasses.Field[Any], kind: Any) -> inspect.Parameter:
    choices = field.metadata["choices"]
    text = field.metadata["help"].rstrip(".")
    if choices:
        text += f": {', '.join(choices)}"
    if field.default not in ("", ()):
        text += f" (default: {field.default})"
    option = typer.Option(help=f"{text}.", show_default=False, rich_help_panel=field.metadata.get("panel", "Training"))
    shown = kind if kind in (int, float, bool) else str
    return inspect.Parameter(
        field.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[shown | None, option]
    )


@_with_config_options
def train(
    data: Annotated[
        Path | None,
        typer.Option(
            help="Folder of a dataset, its annotation file, or a drawn one: shapes, poses (default: shapes).",
            rich_help_panel=_DATA,
        ),
    ] = None,
    annotations: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Annotation file in COCO format, instead of --data.", rich_help_panel=_DATA),
    ] = None,
    images: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Folder of the images (default: searched for near the annotations).",
            rich_help_panel=_DATA,
        ),
    ] = None,
    split: Annotated[
        str | None, typer.Option(help="Split to train on (default: train…).", rich_help_panel=_DATA)
    ] = None,
    val_split: Annotated[
        str | None,
        typer.Option(
            help="Split to evaluate on (default: val…; without one, a tenth of the training images).",
            rich_help_panel=_DATA,
        ),
    ] = None,
    val_annotations: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Annotation file to evaluate on.", rich_help_panel=_DATA),
    ] = None,
    val_images: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Folder of the images of --val-annotations.", rich_help_panel=_DATA),
    ] = None,
    strict: Annotated[
        bool,
        typer.Option(
            "--strict", help="Refuse annotation files with skipped or repaired entries.", rich_help_panel=_DATA
        ),
    ] = False,
    min_size: Annotated[
        int | None, typer.Option(help="Shorter side of the resized images, px.", rich_help_panel=_DATA)
    ] = None,
    max_size: Annotated[
        int | None, typer.Option(help="Maximum longer side of the resized images, px.", rich_help_panel=_DATA)
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="Architecture (default: maskrcnn_resnet18_fpn_small).", rich_help_panel=_MODEL),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Folder of the run (default: runs/train-N).", rich_help_panel=_RUN)
    ] = None,
    resume: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Folder of a run to continue; auto: the newest unfinished run with the same settings, else a new one.",
            rich_help_panel=_RUN,
        ),
    ] = None,
    find_learning_rate: Annotated[
        bool,
        typer.Option(
            "--find-learning-rate",
            help="Suggest a learning rate instead of training (100 steps; writes nothing).",
            rich_help_panel=_RUN,
        ),
    ] = False,
    config: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE|NAME",
            help="YAML file of settings, or name of a recipe, such as finetune; options override it.",
            rich_help_panel=_RUN,
        ),
    ] = None,
    assign: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="NAME=VALUE",
            help="Setting, such as model.detections=300 or augment.mosaic_probability=0.5; repeatable.",
            rich_help_panel=_RUN,
        ),
    ] = None,
    *,
    options: dict[str, Any],
) -> None:
    """Train a detector; without options, a small one on drawn shapes.

    On several GPUs or machines: torchrun --nproc-per-node N -m maskrcnn train …
    """
    from maskrcnn.api import train as api

    arguments: dict[str, Any] = {
        "annotations": annotations,
        "images": images,
        "split": split,
        "val_split": val_split,
        "val_annotations": val_annotations,
        "val_images": val_images,
        "strict": strict,
        "model": model,
        "config": config,
        "settings": assign or (),
        "min_size": min_size,
        "max_size": max_size,
        "progress": ConsoleProgress(),
        **options,
    }
    if not find_learning_rate:
        api.train(data, output=output, resume=resume, **arguments)
        return
    if output is not None or resume is not None:
        raise UserError(
            "--find-learning-rate with --output or --resume", "a test, which writes nothing", "omit these options"
        )
    show(api.find_learning_rate(data, **arguments))

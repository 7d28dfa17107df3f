"""`maskrcnn export`."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from maskrcnn.cli.console import ConsoleProgress, show
from maskrcnn.cli.options import Overwrite

_OUTPUT, _INT8, _TENSORRT = "Output", "8-bit integers", "TensorRT"
_WEIGHTS, _MODEL = "Weights of other libraries", "Model"


class Precision(str, Enum):
    """Arithmetic of an exported graph."""

    FP32 = "fp32"
    FP16 = "fp16"
    BF16 = "bf16"
    INT8 = "int8"


def export(
    checkpoint: Annotated[
        Path | None,
        typer.Argument(help="Checkpoint, or ONNX file to convert with --precision (default: best of the newest run)."),
    ] = None,
    onnx: Annotated[bool, typer.Option("--onnx", help="Write an ONNX file, the only format (default).")] = True,
    output: Annotated[
        Path | None,
        typer.Option(help="ONNX file to write (default: model.onnx next to the checkpoint).", rich_help_panel=_OUTPUT),
    ] = None,
    precision: Annotated[
        Precision, typer.Option(help="Precision of the graph.", rich_help_panel=_OUTPUT)
    ] = Precision.FP32,
    overwrite: Overwrite = False,
    simulate: Annotated[
        bool,
        typer.Option(
            "--simulate",
            help="Write a float32 graph that rounds like fp16, bf16, or TensorRT's int8.",
            rich_help_panel=_OUTPUT,
        ),
    ] = False,
    opset: Annotated[
        int | None, typer.Option(help="ONNX opset version (default: 20).", rich_help_panel=_OUTPUT)
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(
            help="Folder of images to calibrate int8 scales with, and to check the range of fp16 on.",
            rich_help_panel=_INT8,
        ),
    ] = None,
    calibration_images: Annotated[
        int, typer.Option(min=1, help="Maximum number of calibration images.", rich_help_panel=_INT8)
    ] = 64,
    keep: Annotated[
        list[str] | None,
        typer.Option(
            help="Layers to leave unquantized: first, last, heads, backbone, fpn, or layer names; repeatable "
            "(default: last).",
            rich_help_panel=_INT8,
        ),
    ] = None,
    tensorrt: Annotated[
        bool, typer.Option("--tensorrt", help="Write the graph for TensorRT's parser.", rich_help_panel=_TENSORRT)
    ] = False,
    aot: Annotated[
        bool,
        typer.Option(
            "--aot", help="Use plugins compiled into the engine (with --tensorrt).", rich_help_panel=_TENSORRT
        ),
    ] = False,
    weights: Annotated[
        str | None,
        typer.Option(
            help="Export these weights instead of a checkpoint: a torchvision, Detectron2 or mmdetection file, or a "
            "torchvision name (COCO_V1, DEFAULT).",
            rich_help_panel=_WEIGHTS,
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="Architecture of torchvision weights (default: inferred from their tensors).", rich_help_panel=_WEIGHTS
        ),
    ] = None,
    batch_norm_epsilon: Annotated[
        float | None,
        typer.Option(
            help="Batch norm epsilon of the weights (default: 0 for COCO_V1, 1e-5 for others).",
            rich_help_panel=_WEIGHTS,
        ),
    ] = None,
    detectron2_config: Annotated[
        Path | None,
        typer.Option(
            help="YAML configuration of Detectron2 weights (default: config.yaml in their folder).",
            rich_help_panel=_WEIGHTS,
        ),
    ] = None,
    anchor_sizes: Annotated[
        str | None,
        typer.Option(
            help="Anchor size of each level P2 to P6, px, such as 8,16,32,64,128 (default: the model's).",
            rich_help_panel=_MODEL,
        ),
    ] = None,
    min_size: Annotated[
        int | None,
        typer.Option(help="Shorter side of the resized images, px (default: the model's).", rich_help_panel=_MODEL),
    ] = None,
    max_size: Annotated[
        int | None,
        typer.Option(
            help="Maximum longer side of the resized images, px (default: the model's).", rich_help_panel=_MODEL
        ),
    ] = None,
    class_names: Annotated[
        str | None,
        typer.Option(
            help="Class names separated by commas, or a text file with a name on each line (default: the model's).",
            rich_help_panel=_MODEL,
        ),
    ] = None,
    assign: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="NAME=VALUE",
            help="Setting of the model, such as model.nms_iou=0.6; repeatable.",
            rich_help_panel=_MODEL,
        ),
    ] = None,
    max_unmatched: Annotated[
        float,
        typer.Option(
            help="Maximum share of unmatched detections in the comparison, 0 to 1, for models in which boxes tie.",
            rich_help_panel=_OUTPUT,
        ),
    ] = 0.0,
) -> None:
    """Export a model to one ONNX file, and compare it with its source before keeping it."""
    from maskrcnn.api.export import export as run

    result = run(
        checkpoint,
        output=output,
        precision=precision.value,
        calibration=calibration,
        calibration_images=calibration_images,
        keep=keep or (),
        simulate=simulate,
        tensorrt=tensorrt,
        aot=aot,
        opset=opset,
        weights=weights,
        model=model,
        batch_norm_epsilon=batch_norm_epsilon,
        detectron2_config=detectron2_config,
        anchor_sizes=anchor_sizes,
        min_size=min_size,
        max_size=max_size,
        class_names=class_names,
        settings=assign or (),
        max_unmatched=max_unmatched,
        overwrite=overwrite,
        progress=ConsoleProgress(),
    )
    show(f"{result.path} ({result.size_mb} MB, from {result.source})")

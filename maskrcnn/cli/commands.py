"""The command line: a table of plain functions over the package.

Heavy libraries are imported inside the commands, so that `maskrcnn --help` answers at once.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from maskrcnn import __version__, runs
from maskrcnn.cli.build_engine import build_engine, refit_engine
from maskrcnn.cli.console import console
from maskrcnn.cli.data import data_app
from maskrcnn.cli.evaluate import evaluate
from maskrcnn.cli.triton import triton
from maskrcnn.config import TrainConfig
from maskrcnn.errors import UserError, told_to_the_user
from maskrcnn.settings import (
    assignments,
    merged,
    read_settings,
    require_changes_of_a_run,
    typed,
    with_sections,
    with_settings,
)

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Mask R-CNN from training data to FP16 engines.",
)
app.add_typer(data_app, name="data")


def main() -> None:
    """Runs the command line; an error that a user can mend becomes three lines and exit code 1."""
    with told_to_the_user():
        app()


@app.callback(invoke_without_command=True)
def _version(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        print(__version__)
        raise typer.Exit()


@app.command()
@with_settings(TrainConfig)
def train(
    data: Annotated[
        Path | None, typer.Option(help="COCO-format folder; without it, drawn shapes; figures: drawn poses.")
    ] = None,
    split: Annotated[str | None, typer.Option(help="Split to train on; default train….")] = None,
    val_split: Annotated[str | None, typer.Option(help="Split to evaluate on; default val….")] = None,
    model: Annotated[str | None, typer.Option(help="Architecture; default a small one.")] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file of settings; options override it.")] = None,
    assign: Annotated[
        list[str] | None,
        typer.Option("--set", help="Any setting, as model.detections=300 or augment.mosaic_probability=0.5."),
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Folder of the run; default runs/train-N.")] = None,
    resume: Annotated[Path | None, typer.Option(help="Continue the run in this folder.")] = None,
    min_size: Annotated[int | None, typer.Option(help="Shorter side of the resized image, px.")] = None,
    max_size: Annotated[int | None, typer.Option(help="Longest side of the resized image, px.")] = None,
    *,
    settings: dict[str, Any],
) -> None:
    """Trains a detector. With no argument: a small one on generated shapes.

    With several GPUs or machines: torchrun --nproc-per-node N -m maskrcnn train …
    """
    if resume is not None and (split or val_split or model or output or config):
        came = "--resume with --split, --val-split, --model, --config or --output"
        raise UserError(came, "the run as it began", "leave those out; other options change the run from here on")
    named = {"data": data and str(data), "train_split": split, "val_split": val_split, "model": model}
    sizes = {"min_size_px": min_size, "max_size_px": max_size}
    chosen = with_sections(read_settings(config)) if config else {}
    for layer in (
        assignments(assign or []),
        {name: value for name, value in named.items() if value is not None and name != "model"},
        {"model": {"name": model}} if model else {},
        {"model": {"preprocessing": {k: v for k, v in sizes.items() if v is not None}}} if any(sizes.values()) else {},
        settings,
    ):
        chosen = merged(chosen, layer)
    chosen = typed(TrainConfig, chosen)
    if resume is not None:
        require_changes_of_a_run(chosen)

    from maskrcnn.api.train import run_training

    run_training(console, output=output, resume=resume, settings=chosen)


@app.command()
def export(
    checkpoint: Annotated[
        Path | None, typer.Argument(help="Or an ONNX file, with --precision. Default: the newest run's best.")
    ] = None,
    onnx: Annotated[bool, typer.Option("--onnx", help="Write an ONNX file.")] = False,
    output: Annotated[
        Path | None, typer.Option(help="Default: model.onnx beside the file; MODEL.onnx for a name.")
    ] = None,
    precision: Annotated[str, typer.Option(help="Of the graph: fp32, fp16, bf16 or int8.")] = "fp32",
    calibration: Annotated[
        Path | None, typer.Option(help="Folder of images: for int8's scales; for fp16's range too.")
    ] = None,
    calibration_images: Annotated[int, typer.Option(min=1, help="Most images to take from it.")] = 64,
    keep: Annotated[
        list[str] | None,
        typer.Option(help="With int8: layers to leave out; first, last, heads, backbone, fpn or names. Default last."),
    ] = None,
    simulate: Annotated[
        bool, typer.Option("--simulate", help="With fp16, bf16: single precision, rounded as half precision rounds.")
    ] = False,
    tensorrt: Annotated[bool, typer.Option("--tensorrt", help="A file for TensorRT's parser and our plugins.")] = False,
    aot: Annotated[bool, typer.Option("--aot", help="With --tensorrt: plugins compiled into the engine.")] = False,
    opset: Annotated[int | None, typer.Option(help="Of ONNX's operators; default 20.")] = None,
    weights: Annotated[
        str | None,
        typer.Option(help="Instead: a torchvision file or name (COCO_V1, DEFAULT), a Detectron2 file, a checkpoint."),
    ] = None,
    model: Annotated[str | None, typer.Option(help="With torchvision's --weights: their architecture.")] = None,
    batch_norm_epsilon: Annotated[
        float | None, typer.Option(help="With --weights: default 0 for COCO_V1's frozen 90 classes, else 1e-5.")
    ] = None,
) -> None:
    """Exports a model to one ONNX file, checked against what it was made from."""
    from maskrcnn.api.export import Int8Options, Source, run_export

    if not onnx:
        raise UserError("no format", "--onnx", "run `maskrcnn export --onnx`")
    run_export(
        console,
        Source(path=checkpoint, weights=weights, model=model, batch_norm_epsilon=batch_norm_epsilon),
        output=output,
        precision=precision,
        int8=Int8Options(calibration=calibration, keep=tuple(keep or ()), images=calibration_images),
        opset=opset,
        simulate=simulate,
        tensorrt=tensorrt,
        aot=aot,
    )


app.command("build-engine")(build_engine)
app.command("refit-engine")(refit_engine)


@app.command()
def predict(
    images: Annotated[list[Path], typer.Argument(help="Images, and folders of images.")],
    model: Annotated[
        Path | None, typer.Option(help="Checkpoint, ONNX file or engine; default: the newest run's best checkpoint.")
    ] = None,
    backend: Annotated[str | None, typer.Option(help="torch, onnxruntime, openvino or tensorrt.")] = None,
    provider: Annotated[str | None, typer.Option(help="Of onnxruntime: cpu, cuda or tensorrt.")] = None,
    precision: Annotated[str | None, typer.Option(help="Of torch: fp32, bf16 or fp16.")] = None,
    output: Annotated[Path, typer.Option(help="Folder for pictures and results.json.")] = Path("predictions"),
    threshold: Annotated[float, typer.Option(min=0, max=1, help="Lowest score drawn.")] = 0.5,
    keypoint_threshold: Annotated[float, typer.Option(help="Lowest score of a keypoint drawn, a logit.")] = 2.0,
) -> None:
    """Detects objects: an overlay picture for each image, and all results in COCO's format."""
    from maskrcnn.api.predict import run_predict
    from maskrcnn.runtime.detector import backend_spec

    run_predict(
        console,
        images,
        model=model or runs.newest_checkpoint(),
        backend=backend_spec(backend, provider, precision),
        output=output,
        threshold=threshold,
        keypoint_threshold=keypoint_threshold,
    )


app.command()(evaluate)


@app.command()
def verify(
    reference: Annotated[Path, typer.Argument(metavar="A", help="Checkpoint, ONNX file or engine.")],
    other: Annotated[Path, typer.Argument(metavar="B", help="Another, measured by the first.")],
    images: Annotated[list[Path] | None, typer.Option(help="Image or folder, repeatable; default drawn.")] = None,
    max_images: Annotated[int, typer.Option(min=1, help="Compare at most so many.")] = 16,
    size: Annotated[int | None, typer.Option(min=1, help="Shorter side of the resized images, px.")] = None,
    tolerance: Annotated[str | None, typer.Option(help="exact, half or int8; default by precision.")] = None,
    json: Annotated[Path | None, typer.Option(help="Write the report there as JSON.")] = None,
    report: Annotated[Path | None, typer.Option(help="Write an HTML page there: a file, or a folder.")] = None,
) -> None:
    """Compares two models stage by stage, and says which stage departs first.

    Exit code 1 when one does.
    """
    from maskrcnn.api.verify import run_verify

    options = {"size_px": size, "tolerance": tolerance, "json": json, "report": report}
    if not run_verify(console, reference, other, images=images or (), max_images=max_images, **options):
        raise typer.Exit(1)


@app.command()
def inspect(
    file: Annotated[Path, typer.Argument(help="ONNX file, engine (.xml, .engine) or checkpoint (.safetensors).")],
    size: Annotated[str | None, typer.Option(help="HEIGHTxWIDTH to count operations at, px.")] = None,
    json: Annotated[Path | None, typer.Option(help="Write everything there.")] = None,
) -> None:
    """What a model file is: tensors, precision, size, operations, origin, and where its nodes would run."""
    from maskrcnn.cli.inspect import run_inspect

    run_inspect(console, file, size=size, json=json)


@app.command()
def lint(
    file: Annotated[Path, typer.Argument(help="ONNX file, ours or any other.")],
    json: Annotated[Path | None, typer.Option(help="Write all findings there.")] = None,
) -> None:
    """What TensorRT's ONNX parser would reject or run badly, without TensorRT. Exit code 1 for errors."""
    from maskrcnn.cli.inspect import run_lint

    if run_lint(console, file, json=json):
        raise typer.Exit(1)


@app.command("build-plugins")
def build_plugins(
    form: Annotated[
        str, typer.Option(help="kernels (PyTorch), library (and TensorRT plugins in C++), aot, or all.")
    ] = "all",
    arch: Annotated[
        str | None, typer.Option(help="GPUs to compile for, as 80,90; default native, without a GPU the common ones.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "--out", metavar="DIR", help="Copy the libraries there.")
    ] = None,
    tensorrt_include: Annotated[Path | None, typer.Option(metavar="DIR", help="TensorRT's C++ headers.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Compile even what the cache has.")] = False,
) -> None:
    """Compiles the CUDA kernels and the TensorRT plugins: the libraries, and the kernels that engines get built in."""
    from maskrcnn.cli.build_plugins import Form, run_build_plugins

    forms = [known.value for known in Form]
    if form not in forms:
        raise UserError(f"--form {form}", f"one of {', '.join(forms)}", "leave it out for everything that can be built")
    run_build_plugins(console, form=Form(form), arch=arch, out=output, tensorrt_include=tensorrt_include, force=force)


app.command()(triton)


@app.command()
def doctor(
    places: Annotated[list[Path] | None, typer.Argument(help="Engines, or folders with some, besides runs/.")] = None,
) -> None:
    """Versions, devices, compilers, plugins and engines of this machine, and what each missing one would enable."""
    from maskrcnn.cli.doctor import run_doctor

    run_doctor(console, places or ())

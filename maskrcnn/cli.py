"""The command line: a table of plain functions over the package.

Heavy libraries are imported inside the commands, so that `maskrcnn --help` answers at once.
"""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from maskrcnn import __version__, runs
from maskrcnn.config import TrainConfig
from maskrcnn.errors import UserError, told_to_the_user
from maskrcnn.options import assignments, merged, read_settings, with_settings

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Mask R-CNN from training data to FP16 engines.",
)
data_app = typer.Typer(no_args_is_help=True, help="Datasets in COCO format.")
app.add_typer(data_app, name="data")
console = Console(highlight=False, soft_wrap=True)


class Target(str, Enum):
    """What an engine is built for."""

    AUTO = "auto"
    TENSORRT = "tensorrt"
    OPENVINO = "openvino"


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
    data: Annotated[Path | None, typer.Option(help="COCO-format folder; without it, drawn shapes.")] = None,
    split: Annotated[str | None, typer.Option(help="Split to train on; default train….")] = None,
    val_split: Annotated[str | None, typer.Option(help="Split to evaluate on; default val….")] = None,
    model: Annotated[str | None, typer.Option(help="Architecture; default a small one.")] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file of settings; options go before it.")] = None,
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
    if resume is not None and (data or split or val_split or model or output or config):
        came = "--resume with --data, --split, --val-split, --model, --config or --output"
        raise UserError(came, "the run as it began", "leave those out; other options change the run from here on")
    named = {"data": data and str(data), "train_split": split, "val_split": val_split, "model": model}
    sizes = {"min_size_px": min_size, "max_size_px": max_size}
    chosen = read_settings(config) if config else {}
    if isinstance(chosen.get("model"), str):
        chosen["model"] = {"name": chosen["model"]}
    for layer in (
        assignments(assign or []),
        {name: value for name, value in named.items() if value is not None and name != "model"},
        {"model": {"name": model}} if model else {},
        {"model": {"preprocessing": {k: v for k, v in sizes.items() if v is not None}}} if any(sizes.values()) else {},
        settings,
    ):
        chosen = merged(chosen, layer)

    from maskrcnn.cli_train import run_training

    run_training(console, output=output, resume=resume, settings=chosen)


@app.command()
def export(
    checkpoint: Annotated[Path | None, typer.Argument(help="Default: the newest run's best.")] = None,
    onnx: Annotated[bool, typer.Option("--onnx", help="Write an ONNX file.")] = False,
    output: Annotated[
        Path | None, typer.Option(help="Default: model.onnx beside the file; MODEL.onnx for a name.")
    ] = None,
    weights: Annotated[
        str | None, typer.Option(help="Instead: a torchvision file or name (COCO_V1, DEFAULT), or a checkpoint.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="With --weights: its architecture.")] = None,
    batch_norm_epsilon: Annotated[
        float | None, typer.Option(help="With --weights: default 0 for COCO_V1's frozen 90 classes, else 1e-5.")
    ] = None,
) -> None:
    """Exports a checkpoint or torchvision's weights to one ONNX file, checked against PyTorch."""
    from maskrcnn.checkpoint import load_checkpoint
    from maskrcnn.pretrained import load_detector

    if not onnx:
        raise UserError("no format", "--onnx", "run `maskrcnn export --onnx`")
    if weights is not None and checkpoint is not None:
        raise UserError(f"{checkpoint} and --weights {weights}", "one of the two", "drop one of them")
    if weights is not None:
        loaded, source = load_detector(weights, model, batch_norm_epsilon=batch_norm_epsilon)
        config = loaded.config
        console.print(f"{config.num_classes} classes, batch norm epsilon {config.batch_norm_epsilon:g}")
    else:
        source = checkpoint or runs.newest_checkpoint()
        loaded = load_checkpoint(source)
    named = weights is not None and source != Path(weights)
    target = output or (Path(f"{loaded.config.name}.onnx") if named else source.with_name(runs.ONNX))

    from maskrcnn.export.exporter import export_onnx

    with console.status(f"exporting {source}"):
        difference = export_onnx(loaded, target, source=source)
    console.print(f"compared with PyTorch: {difference}")
    console.print(f"{target} ({target.stat().st_size / 1e6:.1f} MB, from {source})")


@app.command("build-engine")
def build_engine(
    model: Annotated[Path | None, typer.Argument(help="ONNX file; default: the newest export.")] = None,
    fp16: Annotated[bool, typer.Option("--fp16", help="Half precision.")] = False,
    fp32: Annotated[bool, typer.Option("--fp32", help="Single precision.")] = False,
    target: Annotated[Target, typer.Option(help="auto: TensorRT where it can be, else OpenVINO.")] = Target.AUTO,
    output: Annotated[Path | None, typer.Option(help="Default: beside the ONNX file.")] = None,
) -> None:
    """Builds the fastest engine for this machine and compares it with the ONNX file."""
    from maskrcnn.runtime.engine import build_openvino_engine, tensorrt_obstacle

    if fp16 == fp32:
        raise UserError("both --fp16 and --fp32" if fp16 else "no precision", "one of them", "add --fp16")
    source = model or runs.newest_onnx()
    obstacle = tensorrt_obstacle()
    if target is Target.TENSORRT:
        raise obstacle
    if target is Target.AUTO:
        console.print(f"TensorRT: {obstacle.came}; building the CPU engine with OpenVINO")
    path = output or source.with_suffix(".fp16.xml" if fp16 else ".fp32.xml")
    if path.suffix != ".xml":
        raise UserError(f"--output {path}", "a name that ends in .xml", f"use --output {path.with_suffix('.xml')}")
    with console.status(f"building from {source}"):
        metadata, difference = build_openvino_engine(source, path, half=fp16)
    stamp = metadata.stamp
    console.print(f"weights {stamp['weights']}, execution {stamp['execution']} on {stamp['cpu']}")
    console.print(f"compared with ONNX Runtime: {difference}")
    console.print(f"{path} and {path.with_suffix('.bin').name}, from {source}")


@app.command()
def predict(
    images: Annotated[list[Path], typer.Argument(help="Pictures.")],
    model: Annotated[Path | None, typer.Option(help="Checkpoint, ONNX file or engine; default: newest.")] = None,
    backend: Annotated[str | None, typer.Option(help="torch, onnxruntime or openvino.")] = None,
    output: Annotated[Path, typer.Option(help="Folder for pictures and results.json.")] = Path("predictions"),
    threshold: Annotated[float, typer.Option(min=0, max=1, help="Lowest score drawn.")] = 0.5,
) -> None:
    """Detects objects: an overlay picture for each image, and all results in COCO's format."""
    from maskrcnn.data.images import read_image
    from maskrcnn.draw import overlay
    from maskrcnn.files import atomic_path, write_json
    from maskrcnn.postprocess import coco_results
    from maskrcnn.runtime import Detector

    pixels = [read_image(path) for path in images]  # all are read before anything is written
    names = [_picture_name(path, images) for path in images]
    detector = Detector.load(model or runs.newest_checkpoint(), backend)
    metadata = detector.metadata
    output.mkdir(parents=True, exist_ok=True)
    results = []
    for number, (path, image, name) in enumerate(zip(images, pixels, names, strict=True), start=1):
        found = detector.detect([image])[0]
        results += coco_results(found, number, metadata.category_ids, with_masks=metadata.has_masks)
        confident = found.above(threshold)
        with atomic_path(output / name) as draft:
            overlay(image, confident, metadata.class_names).save(draft, format="PNG")
        console.print(f"{path}: {len(confident)} of {len(found)} detections drawn → {output / name}")
    write_json(output / "results.json", results)
    write_json(output / "images.json", {str(n): str(path) for n, path in enumerate(images, start=1)})
    console.print(f"{len(results)} results → {output / 'results.json'} (image ids in images.json)")


def _picture_name(path: Path, images: list[Path]) -> str:
    """The overlay's file name; pictures of the same name in several folders get their number."""
    twins = [other for other in images if other.stem == path.stem]
    suffix = f"-{images.index(path) + 1}" if len(twins) > 1 else ""
    return f"{path.stem}{suffix}.png"


@app.command()
def evaluate(
    model: Annotated[Path, typer.Argument(help="Checkpoint, ONNX file or engine.")],
    data: Annotated[Path, typer.Option(help="COCO-format folder.")],
    split: Annotated[str, typer.Option(help="Split to evaluate on.")] = "val",
    backend: Annotated[str | None, typer.Option(help="torch, onnxruntime or openvino.")] = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 1,
    json: Annotated[Path | None, typer.Option(help="Write metrics and results there.")] = None,
) -> None:
    """The 12 COCO metrics for boxes and for masks, by pycocotools."""
    from rich.progress import Progress

    from maskrcnn.data.coco import CocoDataset, find_split
    from maskrcnn.files import write_json
    from maskrcnn.runtime import Detector
    from maskrcnn.runtime.evaluate import evaluate as run

    dataset = CocoDataset.load(data, find_split(data, split))
    for line in dataset.skipped_lines():
        console.print(line)
    detector = Detector.load(model, backend)
    with Progress(console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("evaluating", total=len(dataset.images))
        found = run(detector, dataset, batch_size=batch_size, progress=lambda n: bar.advance(task, n))
    name = f"{detector.backend.name} {detector.backend.precision}"
    console.print(f"{model} in {name} on {found.images} images of {dataset.annotation_path}")
    console.print(found.table())
    console.print(f"{found.images / found.detect_seconds:.2f} images/s, from file to pasted masks")
    if json is not None:
        write_json(json, {"model": str(model), "box": found.box, "mask": found.mask, "results": found.results})


@app.command()
def doctor() -> None:
    """Versions, devices and compilers of this machine, and what each missing one would enable."""
    from maskrcnn.doctor import diagnose, report

    console.print(report(diagnose()), markup=False)


@data_app.command("shapes")
def data_shapes(
    out: Annotated[Path, typer.Argument(help="Folder to write.")],
    train_images: Annotated[int, typer.Option(min=1)] = 600,
    val_images: Annotated[int, typer.Option(min=1)] = 100,
    size: Annotated[int, typer.Option(min=32, help="Side of the pictures, px.")] = 128,
    seed: Annotated[int, typer.Option(min=0)] = 0,
) -> None:
    """Draws a dataset of circles, rectangles and triangles in COCO format."""
    from maskrcnn.data.shapes import generate_shapes

    path = generate_shapes(out, train_images=train_images, val_images=val_images, size_px=size, seed=seed)
    console.print(f"{train_images} + {val_images} pictures in {path}")


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
    from rich.progress import Progress

    from maskrcnn.data.check import check_dataset
    from maskrcnn.data.check_pictures import write_pictures
    from maskrcnn.files import write_json

    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("checking", total=None)
        report = check_dataset(
            data, split or (), progress=lambda done, total: bar.update(task, completed=done, total=total)
        )
    console.print(report.text(), markup=False)
    if output is not None:
        console.print(f"{write_pictures(report, output, per_problem=pictures)} pictures → {output}")
    if json is not None:
        write_json(json, report.to_dict())
    if report.by_problem(is_error=True) or (strict and report.findings):
        raise typer.Exit(1)

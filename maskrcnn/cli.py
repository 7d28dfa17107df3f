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
from maskrcnn.errors import UserError, told_to_the_user

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Mask R-CNN from training data to FP16 engines.",
)
data_app = typer.Typer(no_args_is_help=True, help="Datasets in COCO format.")
app.add_typer(data_app, name="data")
console = Console(highlight=False, soft_wrap=True)

SHAPES = runs.FOLDER / "shapes"  # where the generated dataset lies when no data is named


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
def train(
    data: Annotated[Path | None, typer.Option(help="COCO-format folder; without it, drawn shapes.")] = None,
    split: Annotated[str, typer.Option(help="Split to train on.")] = "train",
    val_split: Annotated[str, typer.Option(help="Split to evaluate on.")] = "val",
    model: Annotated[str | None, typer.Option(help="Architecture; default a small one.")] = None,
    output: Annotated[Path | None, typer.Option(help="Folder of the run; default runs/train-N.")] = None,
    resume: Annotated[Path | None, typer.Option(help="Continue the run in this folder.")] = None,
    weights: Annotated[Path | None, typer.Option(help="Checkpoint to start from.")] = None,
    epochs: Annotated[int | None, typer.Option(min=1)] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Images per step.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Peak learning rate.")] = None,
    schedule: Annotated[str | None, typer.Option(help="cosine or step.")] = None,
    step_epochs: Annotated[str | None, typer.Option(help="With step: epochs of decay, as 8,11.")] = None,
    precision: Annotated[str | None, typer.Option(help="auto, fp32 or bf16.")] = None,
    min_size: Annotated[int | None, typer.Option(help="Shorter side of the resized image, px.")] = None,
    max_size: Annotated[int | None, typer.Option(help="Longest side of the resized image, px.")] = None,
    workers: Annotated[int | None, typer.Option(min=0, help="Data loading processes.")] = None,
    evaluate_every: Annotated[int | None, typer.Option(min=1, help="Epochs between evaluations.")] = None,
    seed: Annotated[int | None, typer.Option(help="Decides weights, order and augmentation.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu or cuda.")] = None,
) -> None:
    """Trains a detector. With no argument: a small one on generated shapes."""
    from maskrcnn.checkpoint import read_tensors
    from maskrcnn.recipes import training_config
    from maskrcnn.training.trainer import Trainer, read_run

    if resume is not None:
        config = read_run(resume)
        trainset, valset = _datasets(Path(config.data), config.train_split, config.val_split)
        trainer = Trainer(config, resume, trainset)
        trainer.load_state()
        console.print(f"continuing {resume} after epoch {trainer.epoch} of {config.epochs}")
    else:
        trainset, valset = _datasets(_data_or_shapes(data), split, val_split)
        steps = tuple(int(epoch) for epoch in step_epochs.split(",")) if step_epochs else None
        config = training_config(
            trainset,
            valset,
            model=model,
            epochs=epochs,
            batch_size=batch_size,
            learning_rate=learning_rate,
            schedule=schedule,
            step_epochs=steps,
            precision=precision,
            min_size_px=min_size,
            max_size_px=max_size,
            workers=workers,
            evaluate_every=evaluate_every,
            seed=seed,
            device=device,
        )
        trainer = Trainer(config, _run_folder(output), trainset)
        if weights is not None:
            trainer.load_weights(read_tensors(weights)[0], weights)
        trainer.begin()
    console.print(
        f"{config.model.name} on {trainer.device} in {trainer.precision}: {len(trainset.images)} images of "
        f"{trainset.root}, {config.epochs} epochs → {trainer.run}"
    )
    trainer.fit(_evaluation_during_training(valset, config.batch_size))
    console.print(f"best mask AP {trainer.best_ap:.4f}: {trainer.run / runs.BEST}")


def _run_folder(output: Path | None) -> Path:
    if output is None:
        return runs.next_run()
    if (output / runs.CONFIG).exists():
        raise UserError(f"{output}, which holds a run", "a new folder", f"continue it with --resume {output}")
    return output


def _data_or_shapes(data: Path | None) -> Path:
    from maskrcnn.data.shapes import generate_shapes

    return data if data is not None else generate_shapes(SHAPES)


def _load_split(root: Path, kind: str) -> Any:
    """A split of a dataset; what was skipped is printed."""
    from maskrcnn.data.coco import CocoDataset, find_split

    dataset = CocoDataset.load(root, find_split(root, kind))
    for reason, count in dataset.skipped.items():
        console.print(
            f"{dataset.annotation_path}: skipped {count} annotation(s): {reason}, "
            f"first: {dataset.skipped_examples[reason]}"
        )
    return dataset


def _datasets(root: Path, split: str, val_split: str) -> tuple[Any, Any]:
    """The training and the validation split, checked to have the same classes."""
    trainset, valset = _load_split(root, split), _load_split(root, val_split)
    if trainset.category_ids != valset.category_ids:
        raise UserError(
            f"{root}: categories {trainset.category_ids[:9]} to train on, {valset.category_ids[:9]} to validate",
            "the same categories in both splits",
            "write one category list into both JSON files",
        )
    return trainset, valset


def _evaluation_during_training(valset: Any, batch_size: int) -> Any:
    from maskrcnn.runtime import Detector
    from maskrcnn.runtime.evaluate import evaluate
    from maskrcnn.runtime.torch_backend import TorchBackend

    def run(model: Any) -> dict[str, float]:
        backend = TorchBackend(model, device=str(next(model.parameters()).device))
        return evaluate(Detector(backend), valset, batch_size=batch_size).summary()

    return run


@app.command()
def export(
    checkpoint: Annotated[Path | None, typer.Argument(help="Default: the newest run's best.")] = None,
    onnx: Annotated[bool, typer.Option("--onnx", help="Write an ONNX file.")] = False,
    output: Annotated[Path | None, typer.Option(help="Default: model.onnx beside the checkpoint.")] = None,
    weights: Annotated[Path | None, typer.Option(help="A torchvision state dict instead.")] = None,
    model: Annotated[str | None, typer.Option(help="With --weights: its architecture.")] = None,
    batch_norm_epsilon: Annotated[
        float | None, typer.Option(help="With --weights: default 0 for COCO_V1's frozen 90 classes, else 1e-5.")
    ] = None,
) -> None:
    """Exports a checkpoint or a torchvision state dict to one ONNX file, checked against PyTorch."""
    from maskrcnn.checkpoint import load_checkpoint, load_torchvision

    if not onnx:
        raise UserError("no format", "--onnx", "run `maskrcnn export --onnx`")
    if weights is not None and checkpoint is not None:
        raise UserError(f"{checkpoint} and --weights {weights}", "one of the two", "drop one of them")
    if weights is not None and model is None:
        raise UserError("--weights without --model", "the architecture of the weights", "add --model NAME")
    source = weights or checkpoint or runs.newest_checkpoint()
    if weights is not None:
        loaded = load_torchvision(source, model, batch_norm_epsilon=batch_norm_epsilon)
        config = loaded.config
        console.print(f"{config.num_classes} classes, batch norm epsilon {config.batch_norm_epsilon:g}")
    else:
        loaded = load_checkpoint(source)
    target = output or source.with_name(runs.ONNX)

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
    output.mkdir(parents=True, exist_ok=True)
    results = []
    for number, (path, image, name) in enumerate(zip(images, pixels, names, strict=True), start=1):
        found = detector.detect([image])[0]
        results += coco_results(found, number, detector.metadata.category_ids, with_masks=True)
        confident = found.above(threshold)
        with atomic_path(output / name) as draft:
            overlay(image, confident, detector.metadata.class_names).save(draft, format="PNG")
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

    from maskrcnn.files import write_json
    from maskrcnn.runtime import Detector
    from maskrcnn.runtime.evaluate import evaluate as run

    dataset = _load_split(data, split)
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

"""`maskrcnn.train(...)`: prepares the data, the model and the run, and trains."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from maskrcnn import runs
from maskrcnn.api.progress import Progress
from maskrcnn.api.results import Result
from maskrcnn.config import TrainConfig, from_dict, to_dict
from maskrcnn.data.coco import CocoDataset, crowded_line, find_split
from maskrcnn.data.images import read_image
from maskrcnn.data.poses import generate_poses
from maskrcnn.data.shapes import generate_shapes
from maskrcnn.errors import UserError
from maskrcnn.files import write_json
from maskrcnn.imaging.draw import overlay
from maskrcnn.model.detector import MaskRCNN
from maskrcnn.runtime import Detector
from maskrcnn.runtime.backends.torch import TorchBackend
from maskrcnn.runtime.evaluation.evaluate import check_classes, detect_records, kinds_found, score_kinds
from maskrcnn.settings import (
    assignments,
    merged,
    read_settings,
    require_changes_of_a_run,
    typed,
    with_sections,
)
from maskrcnn.training.distributed import Processes, joined
from maskrcnn.training.logbook import NamedImage
from maskrcnn.training.optimizer import without_effect
from maskrcnn.training.recipe import require_fitting, training_config
from maskrcnn.training.state import settings_of_run
from maskrcnn.training.trainer import Trainer
from maskrcnn.weights import torchvision
from maskrcnn.weights.checkpoint import SUFFIX
from maskrcnn.weights.finetuning import finetuning_tensors

# Datasets that are drawn if `data` is their name and no such folder exists.
GENERATED = {"shapes": generate_shapes, "poses": generate_poses, "figures": generate_poses}  # "figures": former name
_DRAWN_SCORE = 0.5  # lowest score of a detection in the images of the log


@dataclass(frozen=True, repr=False)
class TrainResult(Result):
    """A finished run."""

    run: Path  # folder
    checkpoint: Path  # the best checkpoint
    best_ap: float
    best_by: str  # metric of the best checkpoint: "mask", "box", "keypoint", or "mask and keypoint" AP
    epochs: int
    metrics: dict[str, Any]  # of the last epoch


def train(
    data: str | Path | None = None,
    *,
    split: str | None = None,
    val_split: str | None = None,
    model: str | None = None,
    config: str | Path | None = None,
    settings: Sequence[str] | dict[str, Any] = (),
    output: str | Path | None = None,
    resume: str | Path | None = None,
    min_size: int | None = None,
    max_size: int | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> TrainResult:
    """Trains a detector, or continues an interrupted run.

    Args:
        data: folder of a dataset in COCO format; "shapes" or "poses" for a drawn one. Default: shapes.
        split: split to train on. Default: the one whose name begins with "train".
        val_split: split to evaluate on. Default: the one whose name begins with "val".
        model: architecture, such as "maskrcnn_resnet50_fpn". Default: a small one.
        config: YAML file of settings; arguments override it.
        settings: any settings, as `["model.detections=300"]` or nested dictionaries.
        output: folder of the run. Default: runs/train-N.
        resume: folder of the run to continue; other arguments change it from here on.
        min_size: shorter side of the resized images, px.
        max_size: maximum longer side of the resized images, px.
        progress: receives messages and the progress of the training.
        options: fields of `maskrcnn.config.TrainConfig`, such as `epochs`, `batch_size`, `weights`.

    Raises:
        UserError: for settings, data and weights that cannot be used, and if the loss is not finite.
    """
    if resume is not None and (split or val_split or model or output or config):
        found = "--resume with --split, --val-split, --model, --config or --output"
        raise UserError(found, "the run as it began", "drop these; other options change the run from here on")
    named = {"data": data and str(data), "train_split": split, "val_split": val_split}
    sizes = {name: size for name, size in (("min_size_px", min_size), ("max_size_px", max_size)) if size is not None}
    layers = [
        with_sections(read_settings(Path(config))) if config else {},
        settings if isinstance(settings, dict) else assignments(list(settings)),
        {name: value for name, value in named.items() if value is not None},
        {"model": {"name": model}} if model else {},
        {"model": {"preprocessing": sizes}} if sizes else {},
        {name: value for name, value in options.items() if value is not None},
    ]
    chosen: dict[str, Any] = {}
    for layer in layers:
        chosen = merged(chosen, layer)
    chosen = typed(TrainConfig, chosen)
    if resume is not None:
        require_changes_of_a_run(chosen)
    return run_training(chosen, output=output, resume=resume, progress=progress)


def run_training(
    settings: dict[str, Any],
    *,
    output: str | Path | None = None,
    resume: str | Path | None = None,
    progress: Progress | None = None,
) -> TrainResult:
    """Trains with settings that `maskrcnn.settings.typed` has checked; other arguments as `train`."""
    folder = resume if resume is not None else output
    begin = _continued if resume is not None else _begun
    with joined(settings.get("device", "auto")) as processes:
        shown = progress if progress is not None and processes.is_first else Progress()
        return _train(begin, processes, None if folder is None else Path(folder), settings, shown)


def _train(
    begin: Callable[..., tuple[Trainer, CocoDataset]],
    processes: Processes,
    folder: Path | None,
    settings: dict[str, Any],
    progress: Progress,
) -> TrainResult:
    """A function of its own, so that the trainer is freed before `joined` ends the process group."""
    trainer, valset = begin(progress, processes, folder, settings)
    config = trainer.config
    progress.message(
        f"{config.model.name} on {trainer.device} in {trainer.precision}"
        + (f", {processes.world_size} processes" if processes.world_size > 1 else "")
        + f": {len(trainer.samples)} images of {config.data}, {config.epochs} epochs → {trainer.run}"
    )
    for line in without_effect(config):
        progress.message(line)
    with progress.training() as display:
        metrics = trainer.fit(_evaluation(valset, config, processes), _drawing(valset, config), display)
    result = TrainResult(
        trainer.run,
        trainer.run / runs.BEST,
        trainer.progress.best_ap,
        _best_by(config),
        trainer.progress.epoch,
        metrics,
    )
    progress.message(f"best {result.best_by} AP {result.best_ap:.4f}: {result.checkpoint}")
    return result


def _begun(
    progress: Progress, processes: Processes, output: Path | None, settings: dict[str, Any]
) -> tuple[Trainer, CocoDataset]:
    settings = dict(settings)
    splits = settings.pop("train_split", "train"), settings.pop("val_split", "val")
    root = _root(settings.pop("data", ""), processes)
    trainset, valset = _datasets(progress, root, *splits)
    config, weights = _configured(trainset, valset, settings)
    _say_crowded(progress, config, trainset, valset)
    run = Path(processes.from_first(str(_new_folder(output)) if processes.is_first else None))
    try:
        trainer = Trainer(config, run, trainset, processes)
        if weights is not None:
            tensors, changes = finetuning_tensors(trainer.model, weights)
            trainer.load_weights(tensors, weights.source)
            for line in changes.lines():
                progress.message(line)
        trainer.begin()
    except BaseException:
        with contextlib.suppress(OSError):  # the folder does not exist, or is not empty
            run.rmdir()
            if output is None:
                runs.FOLDER.rmdir()
        raise
    return trainer, valset


def _configured(
    trainset: CocoDataset, valset: CocoDataset, settings: dict[str, Any]
) -> tuple[TrainConfig, torchvision.StartingWeights | None]:
    """The configuration, adapted to the weights to start from, and these weights."""
    spec = settings.get("weights")
    if not spec:
        return training_config(trainset, valset, settings), None
    weights = torchvision.starting_weights(spec) if Path(spec).is_file() or Path(spec).suffix == SUFFIX else None
    if weights is not None and weights.config is not None and "model" not in settings:
        # Classes and keypoints are the dataset's.
        kept = ("class_names", "category_ids", "keypoint_names", "keypoint_skeleton", "keypoint_sigmas")
        settings = settings | {"model": {k: v for k, v in to_dict(weights.config).items() if k not in kept}}
    config = training_config(trainset, valset, settings)
    weights = weights or torchvision.starting_weights(spec, config.model)
    changes = torchvision.model_changes(weights, config.model)
    if "batch_norm" in settings:  # an explicit setting wins
        changes["frozen_batch_norm"] = config.model.frozen_batch_norm
    batch_norm = "frozen" if changes["frozen_batch_norm"] else config.batch_norm
    return replace(config, batch_norm=batch_norm, model=replace(config.model, **changes)), weights


def _say_crowded(progress: Progress, config: TrainConfig, *datasets: CocoDataset) -> None:
    for dataset in datasets:
        if line := crowded_line(dataset, config.model.detections):
            progress.message(line)


def _continued(
    progress: Progress, processes: Processes, run: Path, settings: dict[str, Any]
) -> tuple[Trainer, CocoDataset]:
    before = settings_of_run(run)
    if "data" in settings:
        settings = settings | {"data": str(_root(settings["data"], processes).resolve())}
    config = from_dict(TrainConfig, merged(before, settings))
    for line in _changes(before, to_dict(config)):
        progress.message(line)
    trainset, valset = _datasets(progress, Path(config.data), config.train_split, config.val_split)
    require_fitting(config.model, trainset, valset)
    _say_crowded(progress, config, trainset, valset)
    config = replace(config, data=str(trainset.root.resolve()))
    trainer = Trainer(config, run, trainset, processes)
    trainer.load_state()
    if processes.is_first:  # the next --resume continues with the same settings
        write_json(run / runs.CONFIG, to_dict(config))
    done = trainer.progress
    progress.message(f"continuing {run} after epoch {done.epoch} of {config.epochs} and {done.step} more steps")
    return trainer, valset


def _changes(before: dict[str, Any], now: dict[str, Any], section: str = "") -> list[str]:
    """One line per changed setting; settings that an older version did not write are left out."""
    lines = []
    for name, value in now.items():
        if isinstance(value, dict):
            lines += _changes(before.get(name, {}), value, f"{section}{name}.")
        elif name in before and value != before[name]:
            lines.append(f"{section}{name}: {value} instead of {before[name]}")
    return lines


def _new_folder(output: Path | None) -> Path:
    if output is None:
        return runs.claim_next()
    if (output / runs.CONFIG).exists():
        raise UserError(f"{output}, which holds a run", "a new folder", f"continue it with --resume {output}")
    return output


def _root(data: str, processes: Processes) -> Path:
    """The folder of the dataset; a drawn one is generated first. Default: shapes."""
    name = data or "shapes"
    if name not in GENERATED or (data and Path(data).exists()):
        return Path(data)
    root = runs.FOLDER / name
    if processes.is_first:
        GENERATED[name](root)
    processes.wait()
    return root


def _best_by(config: TrainConfig) -> str:
    """The metric that selects the best checkpoint, see `score_of`."""
    kinds = [kind for kind, has in (("mask", config.model.has_masks), ("keypoint", config.model.has_keypoints)) if has]
    return " and ".join(kinds) or "box"


def _datasets(progress: Progress, root: Path, split: str, val_split: str) -> tuple[CocoDataset, CocoDataset]:
    """The training and the validation split, checked to have the same classes."""
    trainset, valset = (CocoDataset.load(root, find_split(root, kind)) for kind in (split, val_split))
    for line in (*trainset.skipped_lines(), *valset.skipped_lines()):
        progress.message(line)
    for dataset in (trainset, valset):
        if dataset.keypoint_fault is not None:
            progress.message(f"keypoints that cannot be trained on: {dataset.keypoint_fault.found}")
    if trainset.category_ids != valset.category_ids:
        raise UserError(
            f"{root}: categories {trainset.category_ids[:9]} to train on, {valset.category_ids[:9]} to validate",
            "the same categories in both splits",
            "write one category list into both JSON files",
        )
    return trainset, valset


def _detector(model: MaskRCNN) -> Detector:
    return Detector(TorchBackend(model, device=str(next(model.parameters()).device)))


def _evaluation(
    valset: CocoDataset, config: TrainConfig, processes: Processes
) -> Callable[[MaskRCNN], dict[str, float]]:
    """COCO evaluation over all processes: each detects on its images, the first scores, all return the metrics."""

    def run(model: MaskRCNN) -> dict[str, float]:
        detector = _detector(model)
        check_classes(detector, valset)
        records = valset.images[processes.rank :: processes.world_size]
        detected, seconds = detect_records(
            detector, records, batch_size=max(1, config.batch_size // processes.world_size)
        )
        gathered = processes.gather(detected)
        metrics = None
        if processes.is_first:
            results = [result for part in gathered for result in part]
            kinds = kinds_found(with_masks=config.model.has_masks, with_keypoints=config.model.has_keypoints)
            scores = score_kinds(valset, results, kinds, sigmas=detector.metadata.keypoint_sigmas, seconds=seconds)
            metrics = scores.summary()
        shared: dict[str, float] = processes.from_first(metrics)
        return shared

    return run


def _drawing(valset: CocoDataset, config: TrainConfig) -> Callable[[MaskRCNN], list[NamedImage]]:
    """Predictions on the first images of the validation split."""

    def draw(model: MaskRCNN) -> list[NamedImage]:
        detector = _detector(model)
        images = []
        for number, record in enumerate(valset.images[: config.pictures]):
            image = read_image(record.path)
            found = detector.detect([image])[0].above(_DRAWN_SCORE)
            drawn = overlay(image, found, config.model.class_names, config.model.keypoint_skeleton)
            images.append((f"prediction-{number}", np.asarray(drawn)))
        return images

    return draw

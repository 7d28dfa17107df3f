"""`maskrcnn train`: joins the processes, prepares the run, and gives the trainer its evaluation."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from maskrcnn import runs
from maskrcnn.cli.progress import EpochProgress
from maskrcnn.config import TrainConfig, from_dict, to_dict
from maskrcnn.data.coco import CocoDataset, find_split
from maskrcnn.data.images import read_image
from maskrcnn.data.poses import generate_poses
from maskrcnn.data.shapes import generate_shapes
from maskrcnn.errors import UserError
from maskrcnn.files import write_json
from maskrcnn.imaging.draw import overlay
from maskrcnn.model.detector import MaskRCNN
from maskrcnn.runtime import Detector
from maskrcnn.runtime.backends.torch import TorchBackend
from maskrcnn.runtime.evaluation.evaluate import check_classes, detect_records, score_results
from maskrcnn.settings import merged
from maskrcnn.training.distributed import Processes, joined
from maskrcnn.training.logbook import Picture
from maskrcnn.training.optimizer import without_effect
from maskrcnn.training.recipe import require_fitting, training_config
from maskrcnn.training.state import settings_of_run
from maskrcnn.training.trainer import Trainer
from maskrcnn.weights import torchvision
from maskrcnn.weights.checkpoint import SUFFIX
from maskrcnn.weights.finetuning import finetuning_tensors

# Datasets that are generated where their name is given for a folder that does not exist.
GENERATED = {"shapes": generate_shapes, "poses": generate_poses, "figures": generate_poses}  # "figures": former name
_DRAWN_SCORE = 0.5  # lowest score of a detection in the pictures


def run_training(console: Console, *, output: Path | None, resume: Path | None, settings: dict[str, Any]) -> None:
    """Trains a new run, or the rest of an interrupted one.

    Args:
        console: where the first process prints; the others are silent.
        output: folder of a new run.
        resume: folder of the run to continue, with `settings` changed.
        settings: see `training_config`; typed.
    """
    with joined(settings.get("device", "auto")) as processes:
        begin = _continued if resume is not None else _begun
        _train(console if processes.is_first else Console(quiet=True), processes, begin, resume or output, settings)


def _train(console: Console, processes: Processes, begin: Callable, folder: Path | None, settings: dict) -> None:
    """All of it, in a function of its own: `joined` wants the trainer gone."""
    trainer, valset = begin(console, processes, folder, settings)
    config = trainer.config
    console.print(
        f"{config.model.name} on {trainer.device} in {trainer.precision}"
        + (f", {processes.world_size} processes" if processes.world_size > 1 else "")
        + f": {len(trainer.samples)} images of {config.data}, {config.epochs} epochs → {trainer.run}",
        markup=False,
    )
    for line in without_effect(config):
        console.print(line, markup=False)
    with EpochProgress(quiet=not processes.is_first) as progress:
        trainer.fit(_evaluation(valset, config, processes), _drawing(valset, config), progress)
    console.print(f"best {_best_by(config)} AP {trainer.progress.best_ap:.4f}: {trainer.run / runs.BEST}")


def _begun(
    console: Console, processes: Processes, output: Path | None, settings: dict[str, Any]
) -> tuple[Trainer, CocoDataset]:
    settings = dict(settings)
    splits = settings.pop("train_split", "train"), settings.pop("val_split", "val")
    root = _root(settings.pop("data", ""), processes)
    trainset, valset = _datasets(console, root, *splits)
    config, weights = _configured(trainset, valset, settings)
    run = Path(processes.from_first(str(_new_folder(output)) if processes.is_first else None))
    try:
        trainer = Trainer(config, run, trainset, processes)
        if weights is not None:
            tensors, told = finetuning_tensors(trainer.model, weights)
            trainer.load_weights(tensors, weights.source)
            for line in told.lines():
                console.print(line)
        trainer.begin()
    except BaseException:
        with contextlib.suppress(OSError):  # is not there, or not empty
            run.rmdir()
            if output is None:
                runs.FOLDER.rmdir()
        raise
    return trainer, valset


def _configured(
    trainset: CocoDataset, valset: CocoDataset, settings: dict[str, Any]
) -> tuple[TrainConfig, torchvision.StartingWeights | None]:
    """The configuration, changed as the weights to start from want it, and those weights."""
    spec = settings.get("weights")
    if not spec:
        return training_config(trainset, valset, settings), None
    weights = torchvision.starting_weights(spec) if Path(spec).is_file() or Path(spec).suffix == SUFFIX else None
    if weights is not None and weights.config is not None and "model" not in settings:
        # Those are the dataset's.
        kept = ("class_names", "category_ids", "keypoint_names", "keypoint_skeleton", "keypoint_sigmas")
        settings = settings | {"model": {k: v for k, v in to_dict(weights.config).items() if k not in kept}}
    config = training_config(trainset, valset, settings)
    weights = weights or torchvision.starting_weights(spec, config.model)
    changes = torchvision.model_changes(weights, config.model)
    if "batch_norm" in settings:  # what was asked for counts
        changes["frozen_batch_norm"] = config.model.frozen_batch_norm
    batch_norm = "frozen" if changes["frozen_batch_norm"] else config.batch_norm
    return replace(config, batch_norm=batch_norm, model=replace(config.model, **changes)), weights


def _continued(
    console: Console, processes: Processes, run: Path, settings: dict[str, Any]
) -> tuple[Trainer, CocoDataset]:
    before = settings_of_run(run)
    if "data" in settings:
        settings = settings | {"data": str(_root(settings["data"], processes).resolve())}
    config = from_dict(TrainConfig, merged(before, settings))
    for line in _changes(before, to_dict(config)):
        console.print(line, markup=False)
    trainset, valset = _datasets(console, Path(config.data), config.train_split, config.val_split)
    require_fitting(config.model, trainset, valset)
    config = replace(config, data=str(trainset.root.resolve()))
    trainer = Trainer(config, run, trainset, processes)
    trainer.load_state()
    if processes.is_first:  # so that the next --resume goes on with the same settings
        write_json(run / runs.CONFIG, to_dict(config))
    done = trainer.progress
    console.print(
        f"continuing {run} after epoch {done.epoch} of {config.epochs} and {done.step} more steps", markup=False
    )
    return trainer, valset


def _changes(before: dict[str, Any], now: dict[str, Any], section: str = "") -> list[str]:
    """A line for each setting that has another value now; a version without a setting has not written it."""
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
    """The folder of the data, once it is generated where it is to be: without a name, shapes."""
    name = data or "shapes"
    if name not in GENERATED or (data and Path(data).exists()):
        return Path(data)
    root = runs.FOLDER / name
    if processes.is_first:
        GENERATED[name](root)
    processes.wait()
    return root


def _best_by(config: TrainConfig) -> str:
    """What the best checkpoint is the best by, see `score_of`."""
    kinds = [kind for kind, has in (("mask", config.model.has_masks), ("keypoint", config.model.has_keypoints)) if has]
    return " and ".join(kinds) or "box"


def _datasets(console: Console, root: Path, split: str, val_split: str) -> tuple[CocoDataset, CocoDataset]:
    """The training and the validation split, checked to have the same classes."""
    trainset, valset = (CocoDataset.load(root, find_split(root, kind)) for kind in (split, val_split))
    for line in (*trainset.skipped_lines(), *valset.skipped_lines()):
        console.print(line)
    for dataset in (trainset, valset):
        if dataset.keypoint_fault is not None:
            console.print(f"keypoints that cannot be learnt: {dataset.keypoint_fault.found}", markup=False)
    if trainset.category_ids != valset.category_ids:
        raise UserError(
            f"{root}: categories {trainset.category_ids[:9]} to train on, {valset.category_ids[:9]} to validate",
            "the same categories in both splits",
            "write one category list into both JSON files",
        )
    return trainset, valset


def _detector(model: MaskRCNN) -> Detector:
    return Detector(TorchBackend(model, device=str(next(model.parameters()).device)))


def _evaluation(valset: CocoDataset, config: TrainConfig, processes: Processes) -> Callable:
    """COCO evaluation over all processes: each detects on its images, the first scores, all get the figures."""

    def run(model: MaskRCNN) -> dict[str, float]:
        detector = _detector(model)
        check_classes(detector, valset)
        records = valset.images[processes.rank :: processes.world_size]
        found, seconds = detect_records(detector, records, batch_size=max(1, config.batch_size // processes.world_size))
        gathered = processes.gather(found)
        figures = None
        if processes.is_first:
            results = [result for part in gathered for result in part]
            scores = score_results(
                valset,
                results,
                with_masks=config.model.has_masks,
                with_keypoints=config.model.has_keypoints,
                sigmas=detector.metadata.keypoint_sigmas,
                seconds=seconds,
            )
            figures = scores.summary()
        return processes.from_first(figures)

    return run


def _drawing(valset: CocoDataset, config: TrainConfig) -> Callable:
    """Predictions on the first images of the validation split."""

    def draw(model: MaskRCNN) -> list[Picture]:
        detector = _detector(model)
        pictures = []
        for number, record in enumerate(valset.images[: config.pictures]):
            image = read_image(record.path)
            found = detector.detect([image])[0].above(_DRAWN_SCORE)
            drawn = overlay(image, found, config.model.class_names, config.model.keypoint_skeleton)
            pictures.append((f"prediction-{number}", np.asarray(drawn)))
        return pictures

    return draw

"""`maskrcnn.train(...)`: prepares the data, the model and the run, and trains."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from maskrcnn import runs
from maskrcnn.api.progress import Progress
from maskrcnn.api.results import Result
from maskrcnn.config import AugmentConfig, TrainConfig, check_ranges, from_dict, to_dict
from maskrcnn.data.coco import CocoDataset, crowded_line, instance_mask
from maskrcnn.data.layouts import training_splits
from maskrcnn.data.poses import generate_poses
from maskrcnn.data.records import ImageRecord
from maskrcnn.data.shapes import generate_shapes
from maskrcnn.data.survey import ImageSurvey, measured_range, read_record, survey_images, unreadable_images, with_exif
from maskrcnn.errors import UserError
from maskrcnn.files import check_output_folder, locked, make_folder, write_json
from maskrcnn.imaging.draw import Mark, colour_of, draw_marks, overlay, stacked, with_pose
from maskrcnn.imaging.preprocess import PRESETS
from maskrcnn.model.detector import MaskRCNN
from maskrcnn.runtime import Detector
from maskrcnn.runtime.backends.torch import TorchBackend
from maskrcnn.runtime.evaluation.evaluate import Evaluation, check_classes, detect_records, kinds_found, score_kinds
from maskrcnn.runtime.evaluation.protocol import KIND_NAMES
from maskrcnn.runtime.evaluation.scoring import f1_curve
from maskrcnn.settings import (
    assignments,
    merged,
    read_settings,
    require_changes_of_a_run,
    typed,
    with_sections,
)
from maskrcnn.training.distributed import Processes, choose_workers, joined
from maskrcnn.training.logbook import NamedImage
from maskrcnn.training.optimizer import peak_learning_rate, without_effect
from maskrcnn.training.recipe import MIN_STEPS, class_weights, require_fitting, training_config
from maskrcnn.training.samples import TrainingSamples
from maskrcnn.training.state import read_progress, read_run, require_changeable, settings_of_run
from maskrcnn.training.step import validation_losses
from maskrcnn.training.trainer import Trainer, best_by, require_measurable
from maskrcnn.weights import torchvision
from maskrcnn.weights.checkpoint import SUFFIX, config_of, read_tensors
from maskrcnn.weights.finetuning import finetuning_tensors

_Begin = Callable[..., tuple[Trainer, CocoDataset]]

# Datasets that are drawn if `data` is one of these names and no such folder exists.
GENERATED = {"shapes": generate_shapes, "poses": generate_poses, "figures": generate_poses}  # "figures": former name
_PLACE = {"data": "", "images": "", "train_split": "train", "val_split": "val", "val_data": "", "val_images": ""}
# Arguments of `train` that locate the data, and the corresponding fields of `TrainConfig`.
_PLACE_FIELDS = {
    "images": "images",
    "split": "train_split",
    "val_split": "val_split",
    "val_annotations": "val_data",
    "val_images": "val_images",
}
AUTO = "auto"  # value of `resume` that selects the run
_RATES, _RATE_STEPS = (1e-6, 1.0), 100  # learning rates and steps of a range test
_CHOSEN = ("exif", "empty_images", "crowd_objects")  # settings of what is trained on, and how images are read
_DRAWN_SCORE, _DRAWN_PX = 0.5, 1024  # minimum score of detections in the images of the log; their longest side


@dataclass(frozen=True, repr=False)
class TrainResult(Result):
    """A finished run."""

    run: Path  # folder of the run
    checkpoint: Path  # the best checkpoint
    best_by: str  # metric of the best checkpoint: "mask AP", "validation_loss" …
    best_score: float | None  # its value; None if it could not be measured
    epochs: int
    metrics: dict[str, Any]  # metrics of the last epoch
    recommended_threshold: float | None = None  # score with the best F1 on the validation split


@dataclass(frozen=True, repr=False)
class LearningRates(Result):
    """A learning rate range test."""

    suggestion: float  # a tenth of the rate with the lowest loss
    batch_size: int  # images per step
    losses: list[tuple[float, float]]  # every fifth learning rate, with the smoothed training loss

    def __str__(self) -> str:
        rows = [f"{rate:13.2e}  {loss:9.4f}" for rate, loss in self.losses]
        return "\n".join(
            [
                "learning rate       loss",
                *rows,
                f"suggestion: --learning-rate {self.suggestion:.1g} with --batch-size {self.batch_size}",
            ]
        )


def train(
    data: str | Path | None = None,
    *,
    annotations: str | Path | None = None,
    images: str | Path | None = None,
    split: str | None = None,
    val_split: str | None = None,
    val_annotations: str | Path | None = None,
    val_images: str | Path | None = None,
    strict: bool = False,
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
        data: folder of a dataset (see docs/formats.md for the layouts), or its annotation file; "shapes" or "poses" for
            a drawn dataset. Default: shapes.
        annotations: annotation file, instead of `data`.
        images: folder of the images. Default: searched for near the annotations.
        split: split to train on. Default: the one whose name begins with "train".
        val_split: split to evaluate on. Default: the one whose name begins with "val"; without one, a tenth of the
            training images, divided class by class.
        val_annotations: annotation file to evaluate on, if it is not in `data`.
        val_images: folder of the images of `val_annotations`. Default: searched for near it.
        strict: refuse annotation files with entries that are skipped or repaired.
        model: architecture, such as "maskrcnn_resnet50_fpn". Default: a small one.
        config: YAML file of settings, or the name of a recipe; arguments override it.
        settings: any settings, as `["model.detections=300"]` or nested dictionaries.
        output: folder of the run. Default: runs/train-N.
        resume: folder of the run to continue; other arguments change it from here on. "auto": the newest unfinished
            run with the same settings next to `output` (default: in runs/), or a new run if none exists.
        min_size: shorter side of the resized images, px.
        max_size: maximum longer side of the resized images, px.
        progress: receives messages and the progress of the training.
        options: fields of `maskrcnn.config.TrainConfig`, such as `epochs`, `batch_size`, `weights`.

    Raises:
        UserError: for settings, data and weights that cannot be used, and if the loss is not finite.
    """
    if _is_folder(resume) and (split or val_split or model or output or config):
        found = "--resume with --split, --val-split, --model, --config or --output"
        raise UserError(found, "the run as it began", "drop these; other options change the run from here on")
    chosen = _chosen(
        data,
        annotations=annotations,
        images=images,
        split=split,
        val_split=val_split,
        val_annotations=val_annotations,
        val_images=val_images,
        model=model,
        config=config,
        settings=settings,
        min_size=min_size,
        max_size=max_size,
        **options,
    )
    if _is_folder(resume):
        require_changes_of_a_run(chosen)
    return run_training(chosen, output=output, resume=resume, strict=strict, progress=progress)


def find_learning_rate(
    data: str | Path | None = None, *, strict: bool = False, progress: Progress | None = None, **arguments: Any
) -> LearningRates:
    """Suggests a learning rate with a range test of a hundred steps (Smith 2017). Writes no run.

    Args:
        data: as in `train`.
        strict: as in `train`.
        progress: receives messages.
        arguments: those of `train` except `output` and `resume`. `learning_rate`, schedule and epochs have no effect.

    Raises:
        UserError: as in `train`, and if the loss is not finite at the lowest rate.
    """
    settings = _chosen(data, **arguments) | {"base_batch_size": 0}
    with joined(settings.get("device", "auto")) as processes:
        shown = progress if progress is not None and processes.is_first else Progress()
        return _rates(shown, processes, settings, strict=strict)


def _rates(progress: Progress, processes: Processes, settings: dict[str, Any], *, strict: bool) -> LearningRates:
    """A function of its own, so that the trainer is freed before `joined` ends the process group."""
    config, weights, trainset, _, _ = _prepared(progress, processes, settings, strict=strict)
    trainer = Trainer(config, runs.FOLDER, trainset, processes)
    _load(progress, trainer, weights)
    with progress.task(f"{_RATE_STEPS} steps with rising learning rates"):
        found = trainer.losses_by_rate(*_RATES, _RATE_STEPS)
    if not found:
        raise UserError(
            f"a loss that is not finite at learning rate {_RATES[0]:g}",
            "a finite loss at such a low rate",
            "check the data with `maskrcnn data check`, or use --precision fp32",
        )
    suggestion = min(found, key=lambda pair: pair[1])[0] / 10
    return LearningRates(suggestion, config.batch_size, found[:: _RATE_STEPS // 20])


def _chosen(data: str | Path | None, **arguments: Any) -> dict[str, Any]:
    """The settings given by the arguments of `train`, with the types of `TrainConfig`."""
    given = {name: value for name, value in arguments.items() if value is not None}
    annotations = given.pop("annotations", None)
    if annotations is not None and data is not None:
        raise UserError("--data with --annotations", "only one of them", "drop --data: the annotation file is enough")
    named = {"data": annotations or data} | {field: given.pop(name, None) for name, field in _PLACE_FIELDS.items()}
    sizes = {f"{name}_px": given.pop(name) for name in ("min_size", "max_size") if name in given}
    config, settings, model = given.pop("config", None), given.pop("settings", ()), given.pop("model", None)
    layers = [
        with_sections(read_settings(Path(config))) if config else {},
        settings if isinstance(settings, dict) else assignments(list(settings)),
        {name: str(value) for name, value in named.items() if value is not None},
        {"model": {"name": model}} if model else {},
        {"model": {"preprocessing": sizes}} if sizes else {},
        given,
    ]
    chosen: dict[str, Any] = {}
    for layer in layers:
        chosen = merged(chosen, layer)
    chosen = typed(TrainConfig, chosen)
    check_ranges(chosen)
    return chosen


def run_training(
    settings: dict[str, Any],
    *,
    output: str | Path | None = None,
    resume: str | Path | None = None,
    strict: bool = False,
    progress: Progress | None = None,
) -> TrainResult:
    """Trains with settings that `maskrcnn.settings.typed` has checked; other arguments as in `train`."""
    begin: _Begin
    if _is_folder(resume):
        begin = partial(_continued, run=Path(resume or ""))
    else:
        begin = partial(_begun, output=None if output is None else Path(output), continues=resume is not None)
    with joined(settings.get("device", "auto")) as processes, contextlib.ExitStack() as held:
        shown = progress if progress is not None and processes.is_first else Progress()
        return _train(partial(begin, held=held, strict=strict), processes, settings, shown)


def _is_folder(resume: str | Path | None) -> bool:
    """Whether `resume` is the folder of a run, rather than None or "auto"."""
    return resume is not None and str(resume) != AUTO


def _train(begin: _Begin, processes: Processes, settings: dict[str, Any], progress: Progress) -> TrainResult:
    """A function of its own, so that the trainer is freed before `joined` ends the process group."""
    trainer, valset = begin(progress, processes, settings)
    config = trainer.config
    progress.message(
        f"{config.model.name} on {trainer.device} in {trainer.precision}"
        + (f", {processes.world_size} processes" if processes.world_size > 1 else "")
        + f": {len(trainer.samples)} images of {config.data} → {trainer.run}"
    )
    _say_length(progress, config, trainer.sampler.steps)
    for line in without_effect(config):
        progress.message(line)
    with progress.training() as display:
        metrics = trainer.fit(_evaluation(valset, config, processes), _drawing(valset, config), display)
    score = trainer.progress.best_score
    threshold, best_file = None, trainer.run / runs.BEST
    if best_file.exists():
        threshold = config_of(read_tensors(best_file)[1], best_file).recommended_threshold or None
    result = TrainResult(
        run=trainer.run,
        checkpoint=best_file,
        best_by=best_by(config),
        best_score=None if score is None else abs(score),
        epochs=trainer.progress.epoch,
        metrics=metrics,
        recommended_threshold=threshold,
    )
    best = (
        f"last epoch, {result.best_by} not measured"
        if result.best_score is None
        else f"best {result.best_by} {result.best_score:.4f}"
    )
    progress.message(f"{best}: {result.checkpoint}")
    if threshold is not None:
        progress.message(
            f"recommended score threshold: {threshold:g} (best F1 on the validation split), the default of predict"
        )
    return result


def _say_length(progress: Progress, config: TrainConfig, steps: int) -> None:
    """Reports the number of steps, and warns if it is too small."""
    total = config.epochs * steps
    progress.message(f"{total} steps: {config.epochs} epochs of {steps}, with {config.batch_size} images per step")
    if total < MIN_STEPS:
        progress.message(
            f"warning: {total} steps rarely suffice, also for fine-tuning; --epochs {-(-MIN_STEPS // steps)} gives "
            f"{MIN_STEPS}"
        )


def _begun(
    progress: Progress,
    processes: Processes,
    settings: dict[str, Any],
    *,
    output: Path | None,
    continues: bool,
    held: contextlib.ExitStack,
    strict: bool,
) -> tuple[Trainer, CocoDataset]:
    """A new run, or, if it `continues`, the newest unfinished one of the same configuration."""
    config, weights, trainset, valset, root = _prepared(progress, processes, settings, strict=strict)
    if continues:
        found = processes.from_first(_unfinished(config, output, held, progress) if processes.is_first else None)
        if found is not None:
            return _restored(progress, processes, Path(found), config, trainset), valset
    run = Path(processes.from_first(str(_new_folder(progress, output, root, held)) if processes.is_first else None))
    trainer = Trainer(config, run, trainset, processes)
    _load(progress, trainer, weights)
    trainer.begin()
    return trainer, valset


def _prepared(
    progress: Progress, processes: Processes, settings: dict[str, Any], *, strict: bool
) -> tuple[TrainConfig, torchvision.StartingWeights | None, CocoDataset, CocoDataset, Path]:
    """Configuration, weights, training and validation split, and folder of the data of a new run; all checked."""
    settings = dict(settings)
    place = {name: settings.pop(name, default) for name, default in _PLACE.items() if name.endswith(("data", "split"))}
    place |= {name: settings.get(name, "") for name in ("images", "val_images")}
    root = _root(place.pop("data"), processes)
    chosen = {name: settings.get(name, getattr(TrainConfig, name)) for name in _CHOSEN}
    trainset, valset = _datasets(progress, root, **place, **chosen, strict=strict)
    if place["val_data"]:
        settings["val_data"] = place["val_data"]
    config, weights = _configured(progress, trainset, valset, settings)
    config = _with_pixel_range(progress, config, _surveyed(progress, config, trainset, valset))
    _check(progress, config, trainset, valset, processes)
    return config, weights, trainset, valset, root


def _load(progress: Progress, trainer: Trainer, weights: torchvision.StartingWeights | None) -> None:
    if weights is not None:
        tensors, changes = finetuning_tensors(trainer.model, weights)
        trainer.load_weights(tensors, weights.source)
        for line in changes.lines():
            progress.message(line)


def _unfinished(config: TrainConfig, output: Path | None, held: contextlib.ExitStack, progress: Progress) -> str | None:
    """The newest run of this configuration that has epochs left and is not being trained, now locked."""
    folders = sorted(runs.FOLDER.glob("train-*")) if output is None else [output]
    found = [run for run in folders if (run / runs.CONFIG).is_file() and (run / runs.STATE).is_file()]
    for run in sorted(found, key=lambda run: (run / runs.STATE).stat().st_mtime, reverse=True):
        with contextlib.suppress(UserError):  # from another version, damaged, or locked
            if read_run(run) == config and not read_progress(run).is_finished(config):
                _lock(progress, run, held)
                return str(run)
    where = f"{runs.FOLDER}/" if output is None else output
    progress.message(f"no unfinished run of these settings in {where}: beginning a new one")
    return None


def _lock(progress: Progress, run: Path, held: contextlib.ExitStack) -> None:
    """Locks a run for as long as it is trained here.

    Raises:
        UserError: if another process trains it.
    """
    is_locked = held.enter_context(
        locked(
            run / runs.LOCK,
            found=f"{run}, which another process is training",
            expected="a run trained by one command at a time",
            fix="wait until it ends, or stop it; for a new run, choose another --output",
        )
    )
    if not is_locked:
        progress.message(f"the file system of {run} has no locks: do not train this run twice at the same time")


def _configured(
    progress: Progress, trainset: CocoDataset, valset: CocoDataset, settings: dict[str, Any]
) -> tuple[TrainConfig, torchvision.StartingWeights | None]:
    """The configuration, adapted to the initial weights, and these weights."""
    spec = settings.get("weights")
    if not spec:
        return training_config(trainset, valset, settings), None
    weights = torchvision.starting_weights(spec) if Path(spec).exists() or Path(spec).suffix == SUFFIX else None
    given = settings.get("model", {})
    if weights is not None and weights.config is not None:
        saved = weights.config
        fields = torchvision.continued_model(saved, given)
        if "batch_norm" in settings:  # an explicit setting wins
            fields["frozen_batch_norm"] = settings["batch_norm"] == "frozen"
        settings = settings | {"model": fields}
        if given.get("name", saved.name) != saved.name:
            progress.message(f"{spec} is a {saved.name}; {given['name']} replaces the fields in which the two differ")
    config = training_config(trainset, valset, settings)
    weights = weights or torchvision.starting_weights(spec, config.model)
    for line in weights.notes:
        progress.message(line)
    fixed = set(given)
    if not given.get("preprocessing", {}).keys() & PRESETS["imagenet"].keys():
        fixed.discard("preprocessing")  # sizes only, which do not depend on the weights
    changes = {k: v for k, v in torchvision.model_changes(weights, config.model).items() if k not in fixed}
    if "batch_norm" in settings:
        changes["frozen_batch_norm"] = config.model.frozen_batch_norm
    model = replace(config.model, **changes)
    return replace(config, batch_norm="frozen" if model.frozen_batch_norm else config.batch_norm, model=model), weights


def _check(
    progress: Progress, config: TrainConfig, trainset: CocoDataset, valset: CocoDataset, processes: Processes
) -> None:
    """Checks the data as far as possible before the first step, and reports what may be unexpected."""
    require_measurable(config, valset)
    for dataset in (trainset, valset):
        if line := crowded_line(dataset, config.model.detections, config.model.candidates, config.model.proposals):
            progress.message(line)
    if config.base_batch_size:
        progress.message(
            f"learning rate {peak_learning_rate(config):g}: {config.learning_rate:g} for batches of "
            f"{config.base_batch_size}, scaled to {config.batch_size}"
        )
    _check_readable(progress, valset, config, processes)


def _continued(
    progress: Progress,
    processes: Processes,
    settings: dict[str, Any],
    *,
    run: Path,
    held: contextlib.ExitStack,
    strict: bool,
) -> tuple[Trainer, CocoDataset]:
    settings_of_run(run)  # before the lock creates a file: the folder may not be a run
    if processes.is_first:
        _lock(progress, run, held)
    before = settings_of_run(run)
    if "data" in settings:
        settings = settings | {"data": str(_root(settings["data"], processes).resolve())}
    if "batch_norm" in settings and "frozen_batch_norm" not in settings.get("model", {}):
        settings = merged(settings, {"model": {"frozen_batch_norm": settings["batch_norm"] == "frozen"}})
    config = from_dict(TrainConfig, merged(before, settings))
    require_changeable(before, to_dict(config))
    for line in _changes(before, to_dict(config)):
        progress.message(line)
    place = {name: getattr(config, name) for name in _PLACE if name != "data"}
    chosen = {name: getattr(config, name) for name in _CHOSEN}
    trainset, valset = _datasets(progress, Path(config.data), **place, **chosen, strict=strict)
    require_fitting(config.model, trainset, valset)
    config = replace(config, loss=replace(config.loss, class_weights=class_weights(config.loss, trainset)))
    _surveyed(progress, config, trainset, valset)
    _check(progress, config, trainset, valset, processes)
    config = replace(config, data=str(trainset.root.resolve()))
    return _restored(progress, processes, run, config, trainset), valset


def _restored(
    progress: Progress, processes: Processes, run: Path, config: TrainConfig, trainset: CocoDataset
) -> Trainer:
    """The trainer of a run, in its last saved state."""
    trainer = Trainer(config, run, trainset, processes)
    trainer.load_state()
    if processes.is_first:  # the next --resume continues with the same settings
        write_json(run / runs.CONFIG, to_dict(config))
    done = trainer.progress
    progress.message(f"continuing {run} after epoch {done.epoch} of {config.epochs} and {done.step} more steps")
    return trainer


def _changes(before: dict[str, Any], now: dict[str, Any], section: str = "") -> list[str]:
    """One line per changed setting, without settings that an older version did not write."""
    lines = []
    for name, value in now.items():
        if isinstance(value, dict):
            lines += _changes(before.get(name, {}), value, f"{section}{name}.")
        elif name in before and value != before[name]:
            lines.append(f"{section}{name}: {value} instead of {before[name]}")
    return lines


def _new_folder(progress: Progress, output: Path | None, data: Path, held: contextlib.ExitStack) -> Path:
    """The folder of a new run, locked; at the end it is removed if nothing is in it."""
    run = runs.claim_next() if output is None else output
    for folder in (runs.FOLDER, run) if output is None else (run,):
        held.callback(_remove_empty, folder)
    if output is not None:
        _check_new(output)
        check_output_folder("--output", output, [data], (), overwrite=True)
        make_folder(output)
    _lock(progress, run, held)
    _check_new(run)  # again: a run may have begun and ended since
    return run


def _check_new(run: Path) -> None:
    names = (runs.CONFIG, runs.STATE, runs.BEST, runs.LAST, runs.LOG)
    if present := [name for name in names if (run / name).exists()]:
        expected = "a new folder, or one without the files of a run"
        raise UserError(
            f"{run}, which holds {present[0]}",
            expected,
            f"continue it with --resume {run}, or choose another folder",
        )


def _remove_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):  # missing, or not empty
        folder.rmdir()


def _root(data: str, processes: Processes) -> Path:
    """The folder of the dataset; a drawn dataset is generated first. Default: shapes."""
    name = data or "shapes"
    if name not in GENERATED or (data and Path(data).exists()):
        return Path(data)
    root = runs.FOLDER / name
    if processes.is_first:
        GENERATED[name](root)
    processes.wait()
    return root


def _surveyed(progress: Progress, config: TrainConfig, trainset: CocoDataset, valset: CocoDataset) -> ImageSurvey:
    """Reads the headers of all images and reports how they will be read; returns the survey of the training images."""
    surveys = [survey_images(dataset, config.model.preprocessing) for dataset in (trainset, valset)]
    for survey in surveys:
        for line in survey.lines():
            progress.message(line)
    return surveys[0]


def _with_pixel_range(progress: Progress, config: TrainConfig, survey: ImageSurvey) -> TrainConfig:
    """The configuration with the sample range of the training images, if these have more than 8 bits."""
    preprocessing = config.model.preprocessing
    if preprocessing.pixel_range:
        return config
    value_range, line = measured_range(survey, preprocessing)
    if value_range is None:
        return config
    progress.message(line)
    return replace(config, model=replace(config.model, preprocessing=replace(preprocessing, pixel_range=value_range)))


def _datasets(
    progress: Progress,
    root: Path,
    *,
    images: str,
    train_split: str,
    val_split: str,
    val_data: str,
    val_images: str,
    exif: str,
    empty_images: bool,
    crowd_objects: bool,
    strict: bool,
) -> tuple[CocoDataset, CocoDataset]:
    """The training and the validation split, checked to have objects and the same classes."""
    places = {"images": images or None, "val_data": val_data or None, "val_images": val_images or None}
    names = training_splits(root, train_split, val_split, **places)
    val_root, val_folder = (Path(val_data), val_images) if val_data else (root, images)
    for drop_roots in (True, False):
        trainset = CocoDataset.load(root, names[0], images=images or None, drop_roots=drop_roots)
        valset = CocoDataset.load(val_root, names[1], images=val_folder or None, drop_roots=drop_roots)
        trainset, valset = with_exif(trainset, exif), with_exif(valset, exif)
        trainset = trainset.for_training(empty_images=empty_images, crowd_objects=crowd_objects)
        if trainset.category_ids == valset.category_ids:
            break  # otherwise a super-category has objects in one split only
    for line in dict.fromkeys((*trainset.note_lines(), *valset.note_lines())):
        progress.message(line)
    for dataset in (trainset, valset):
        if strict:
            dataset.require_unchanged()
    trainset.require_objects("learn")
    if not valset.objects:
        progress.message(
            f"{valset.annotation_path}: no object in {len(valset.images)} image(s): AP cannot be measured, "
            "the last epoch is kept as the best"
        )
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


def _check_readable(progress: Progress, valset: CocoDataset, config: TrainConfig, processes: Processes) -> None:
    """Decodes this process's validation images, to report a damaged one now rather than after the first epoch."""
    records = valset.images[processes.rank :: processes.world_size]
    workers = choose_workers(-1, processes.local_size) + 1
    with progress.task(f"reading {len(valset.images)} validation images"):
        errors = unreadable_images(records, config.model.preprocessing, workers=workers)
    if len(errors) == 1:
        raise errors[0]
    if errors:
        found = "".join(f"\n  {error.found}" for error in errors)
        raise UserError(
            f"{len(errors)} validation images that cannot be used:{found}", errors[0].expected, errors[0].fix
        )


def _detector(model: MaskRCNN) -> Detector:
    return Detector(TorchBackend(model, device=str(next(model.parameters()).device)))


def _evaluation(
    valset: CocoDataset, config: TrainConfig, processes: Processes
) -> Callable[[MaskRCNN], dict[str, float]]:
    """COCO evaluation over all processes: each detects on its images, the first scores, all return the metrics."""
    batch_size = max(1, config.batch_size // processes.world_size)
    samples = None
    if config.validation_loss:
        none = AugmentConfig(flip_probability=0.0)
        samples = TrainingSamples(valset, config.model.preprocessing, augment=none, seed=config.seed)

    def run(model: MaskRCNN) -> dict[str, float]:
        detector = _detector(model)
        check_classes(detector, valset)
        own = range(processes.rank, len(valset.images), processes.world_size)
        detected, seconds = detect_records(detector, valset.images.take(own), batch_size=batch_size)
        losses = (
            {} if samples is None else validation_losses(model, samples, own, batch_size=batch_size, loss=config.loss)
        )
        gathered = processes.gather((detected, losses))
        metrics = None
        if processes.is_first:
            results = [result for part, _ in gathered for result in part]
            kinds = kinds_found(with_masks=config.model.has_masks, with_keypoints=config.model.has_keypoints)
            scores = score_kinds(valset, results, kinds, sigmas=detector.metadata.keypoint_sigmas, seconds=seconds)
            metrics = _metrics_of(scores)
            # A process without images has no losses.
            means = {
                name: sum(part.get(name, 0.0) for _, part in gathered) / len(valset.images) for name in gathered[0][1]
            }
            if means:
                metrics["validation_loss"] = sum(means.values())
            metrics |= {f"validation_loss/{name}": value for name, value in means.items()}
        shared: dict[str, float] = processes.from_first(metrics)
        return shared

    return run


def _metrics_of(scores: Evaluation) -> dict[str, float]:
    """AP and AP50 of each kind (`box_ap`, `mask_ap50` …) and the AP of each class (`mask_ap/CLASS`)."""
    kinds = {KIND_NAMES[kind]: scored for kind, scored in scores.scored.items()}
    found = {f"{kind}_{name.lower()}": kinds[kind].metrics[name] for name in ("AP", "AP50") for kind in kinds}
    for kind, scored in kinds.items():
        found |= {f"{kind}_ap/{name}": own["AP"] for name, own in scored.by_class().items()}
    best = f1_curve((kinds.get("mask") or kinds["box"]).records).best()
    return found | ({} if best is None else {"recommended_threshold": best[0]})


def _annotated(record: ImageRecord, names: Sequence[str], skeleton: Sequence[tuple[int, int]]) -> list[Mark]:
    """The annotated objects of an image, to draw."""
    marks = []
    for number, each in enumerate(record.instances):
        name = f"{names[each.label - 1]}, crowd" if each.is_crowd else names[each.label - 1]
        mask = instance_mask(record, each) if each.has_mask else None
        marks.append(Mark(each.box_xyxy_px, name, colour_of(number), mask))
        if each.keypoints is not None:
            marks[-1] = with_pose(marks[-1], each.keypoints, each.keypoints[:, 2] > 0, skeleton)
    return marks


def _drawing(valset: CocoDataset, config: TrainConfig) -> Callable[[MaskRCNN], list[NamedImage]]:
    """Draws the first images of the validation split, with annotations and predictions side by side."""
    names, skeleton = config.model.class_names, config.model.keypoint_skeleton

    def draw(model: MaskRCNN) -> list[NamedImage]:
        detector = _detector(model)
        images = []
        for number, record in enumerate(valset.images[: config.pictures]):
            image = read_record(record, config.model.preprocessing)
            found = detector.detect([image])[0].above(_DRAWN_SCORE)
            sides = [draw_marks(image, _annotated(record, names, skeleton)), overlay(image, found, names, skeleton)]
            for side in sides:
                side.thumbnail((_DRAWN_PX, _DRAWN_PX))
            images.append((f"prediction-{number}", np.asarray(stacked(sides))))
        return images

    return draw

"""Resumable state of a run in one file that is replaced atomically."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from maskrcnn import runs
from maskrcnn.config import TrainConfig, from_dict, to_dict
from maskrcnn.errors import UserError
from maskrcnn.files import read_json
from maskrcnn.settings import typed
from maskrcnn.training.step import Step
from maskrcnn.weights.checkpoint import load_weights, read_tensors, write_tensors


@dataclass
class Progress:
    """Position of a run."""

    epoch: int = 0  # finished epochs
    step: int = 0  # finished optimizer steps of the current epoch
    best_score: float | None = None  # score of the best checkpoint; larger is better; None: nothing measured so far
    stale: int = 0  # evaluations since the best one
    skipped: int = 0  # consecutive non-finite steps
    totals: dict[str, float] = field(default_factory=dict)  # sums of the metrics over the steps of the current epoch

    def is_finished(self, config: TrainConfig) -> bool:
        """Whether all epochs are done, or the best metric has not improved for too long."""
        return self.epoch >= config.epochs or 0 < config.patience <= self.stale


def save_state(path: Path, step: Step, config: TrainConfig, progress: Progress) -> None:
    """Write weights, averaged weights, the state of optimizer and gradient scaler, and the progress."""
    tensors = {f"model.{name}": value for name, value in step.model.state_dict().items()}
    for name, parameter in step.model.named_parameters():
        for key, value in step.optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer.{name}.{key}"] = value
    header: dict[str, Any] = {"config": to_dict(config), "progress": dataclasses.asdict(progress)}
    if step.averaged is not None:
        tensors |= {f"averaged.{name}": value for name, value in step.averaged.model.state_dict().items()}
        header["averaged_steps"] = float(step.averaged.steps)
    if step.scaler.is_enabled():
        header["scaler"] = step.scaler.state_dict()
    write_tensors(path, tensors, header)


def load_state(path: Path, step: Step) -> Progress:
    """Load the state written by `save_state` into a step whose optimizer is new.

    The optimizer's state is matched by parameter name; a parameter that was frozen before starts without state.
    If the batch size has changed within an epoch, the progress is converted to steps of the new size.

    Raises:
        UserError: if the file is not a state, or belongs to another model.
    """
    tensors, header = _read(path)
    load_weights(step.model, _part(tensors, "model."), path)
    parameters = {name: each for name, each in step.model.named_parameters() if each.requires_grad}
    for place, value in _part(tensors, "optimizer.").items():
        name, _, key = place.rpartition(".")
        if name in parameters:  # the others are frozen from here on
            step.optimizer.state[parameters[name]][key] = _like(value, parameters[name])
    if step.averaged is not None:
        load_weights(step.averaged.model, _part(tensors, "averaged.") or _part(tensors, "model."), path)
        step.averaged.steps.fill_(header.get("averaged_steps", 0))
    if step.scaler.is_enabled() and "scaler" in header:
        step.scaler.load_state_dict(header["scaler"])
    progress = _progress_of(header, path)
    progress.step = progress.step * header["config"]["batch_size"] // step.config.batch_size
    return progress


def read_progress(run: Path) -> Progress:
    """Progress of a run when its state was last saved.

    Raises:
        UserError: if the file is not a state of this version.
    """
    path = run / runs.STATE
    return _progress_of(_read(path)[1], path)


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Reads the state of a run; the error for a damaged state suggests the run's last checkpoint."""
    try:
        return read_tensors(path)
    except UserError as error:
        last = path.with_name(runs.LAST)
        if not path.is_file() or not last.is_file():
            raise
        fix = f"restore it, or start a new run from the last epoch's weights: `maskrcnn train --weights {last}`"
        raise UserError(error.found, error.expected, fix) from error


def _progress_of(header: dict[str, Any], path: Path) -> Progress:
    try:
        return Progress(**header["progress"])
    except (KeyError, TypeError) as error:
        raise UserError(
            f"{path} without a run's progress ({error})",
            f"the {runs.STATE} of a run of this version",
            "start a new run: `maskrcnn train`, with --weights to initialise it from this one",
        ) from error


# Fields of a model that may change during training: they change neither its tensors nor their meaning.
_CHANGEABLE = {
    "rpn_candidates_per_level",
    "rpn_candidates_per_level_training",
    "proposals",
    "proposals_training",
    "rpn_nms_iou",
    "proposal_min_side_px",
    "frozen_batch_norm",
    "keypoint_skeleton",
    "keypoint_sigmas",
    "score_threshold",
    "nms_iou",
    "detection_min_side_px",
    "candidates",
    "detections",
    "preprocessing",
}


def require_changeable(before: dict[str, Any], now: dict[str, Any]) -> None:
    """Raises a UserError with the first changed setting that cannot be changed once a run has begun.

    Args:
        before: settings of the run, without those that its version did not have.
        now: all settings.
    """
    model = before.get("model", {})
    pairs = [("optimizer", before.get("optimizer", now["optimizer"]), now["optimizer"])]
    pairs += [(f"model.{k}", model[k], v) for k, v in now["model"].items() if k in model and k not in _CHANGEABLE]
    for name, first, second in pairs:
        if first != second:
            raise UserError(
                f"--resume with {name} {second} instead of {first}",
                f"{name} as the run began",
                "omit it, or start a new run with --weights and a checkpoint of this one",
            )


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name[len(prefix) :]: value for name, value in tensors.items() if name.startswith(prefix)}


def _like(value: Tensor, parameter: Tensor) -> Tensor:
    """Move an optimizer tensor to the device and memory layout of its parameter."""
    value = value.to(parameter.device)
    if value.dim() == 4 and parameter.is_contiguous(memory_format=torch.channels_last):
        return value.contiguous(memory_format=torch.channels_last)
    return value


def read_run(run: Path) -> TrainConfig:
    """Configuration of an interrupted run.

    Raises:
        UserError: as in `settings_of_run`, and if this version rejects the settings.
    """
    return from_dict(TrainConfig, settings_of_run(run))


def settings_of_run(run: Path) -> dict[str, Any]:
    """Settings of an interrupted run, without those that its version did not have.

    Raises:
        UserError: if the folder is not a run or has no state.
    """
    for name in (runs.CONFIG, runs.STATE):
        if not (run / name).is_file():
            fix = f"give its folder: {run.parent}" if run.is_file() else "start a new run: `maskrcnn train`"
            raise UserError(f"{run} without {name}", "the folder of a run", fix)
    return typed(TrainConfig, read_json(run / runs.CONFIG, "the settings of a run"))

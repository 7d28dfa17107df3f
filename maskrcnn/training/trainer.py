"""The training loop. Reads top to bottom."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from maskrcnn import runs
from maskrcnn.config import TrainConfig, to_dict
from maskrcnn.data.coco import CocoDataset
from maskrcnn.errors import UserError
from maskrcnn.files import make_folder, write_json
from maskrcnn.model.detector import MaskRCNN
from maskrcnn.training import state
from maskrcnn.training.distributed import Processes, choose_device, choose_precision, choose_workers
from maskrcnn.training.loader import Batch, TrainingSamples, training_loader
from maskrcnn.training.logbook import Logbook, Picture, Readout, pictures_of_samples
from maskrcnn.training.optimizer import AveragedWeights, freeze_stages, learning_rate, make_optimizer
from maskrcnn.training.step import Step
from maskrcnn.weights.checkpoint import load_weights, save_checkpoint

# Evaluates a model and returns at least "box_ap", for one with masks "mask_ap", and for one with keypoints
# "keypoint_ap", in [0, 1]; the same in every process.
_Evaluate = Callable[[MaskRCNN], dict[str, float]]
# Draws a model's predictions.
Draw = Callable[[MaskRCNN], list[Picture]]

SECONDS_BETWEEN_STATES = 600.0  # of an epoch that takes longer than that; the end of an epoch is always saved
_MOST_SKIPPED = 100  # steps in a row without a finite gradient: nothing is being learnt


class TrainingProgress(Protocol):
    """Receives the progress of `Trainer.fit`."""

    def start(self, total_images: int, done_images: int) -> None:
        """Begins a run of `total_images` over all epochs, `done_images` of which an earlier process trained on."""

    def step(self, images: int, *, epoch: int, loss: float) -> None:
        """Records an optimizer step over `images` images; epochs count from 1."""

    def epoch(self, metrics: dict[str, Any]) -> None:
        """Records the metrics of a finished epoch."""

    def message(self, text: str) -> None:
        """Receives a line for the user, such as a skipped step."""


class _Silent(TrainingProgress):
    """Ignores the progress."""


class Trainer:
    """One run: a configuration, a folder, and the state that a kill must not lose.

    Args:
        config: what to train and how.
        run: the folder.
        dataset: what to train on.
        processes: those that train together; by default this one alone.
    """

    def __init__(
        self, config: TrainConfig, run: Path, dataset: CocoDataset, processes: Processes | None = None
    ) -> None:
        self.config, self.run = config, run
        self.processes = processes or Processes()
        self.device = choose_device(config.device, self.processes.local_rank)
        self.precision = choose_precision(config.precision, self.device)
        self.samples = TrainingSamples(dataset, config.model.preprocessing, augment=config.augment, seed=config.seed)
        torch.manual_seed(config.seed)
        self.model = MaskRCNN(config.model).to(self.device, memory_format=torch.channels_last)
        if config.batch_norm == "sync":
            self.model = _synchronised(self.model, self.device)
        self.frozen = freeze_stages(self.model, config.trainable_stages)
        self.averaged = AveragedWeights(self.model, config.ema_decay) if config.ema_decay else None
        self.optimizer = make_optimizer(self.model, config)
        self._to_training()
        self.step = Step(self.model, self.optimizer, config, self.device, self.precision, self.processes, self.averaged)
        self.progress = state.Progress()
        self.readout = Readout()

    def begin(self) -> None:
        """Makes the folder of a new run and writes its configuration and first state there."""
        if self.processes.is_first:
            make_folder(self.run)
            write_json(self.run / runs.CONFIG, to_dict(self.config))
            self._save_state()
        self.processes.wait()

    def load_weights(self, tensors: dict[str, Tensor], source: Path | str) -> None:
        """Starts from given weights instead of random ones."""
        load_weights(self.model, tensors, source)
        if self.averaged is not None:
            self.averaged.model.load_state_dict(self.model.state_dict())

    def load_state(self) -> None:
        """Continues from the last state that was saved, with any number of processes."""
        self.progress = state.load_state(self.run / runs.STATE, self.step)

    def fit(
        self, evaluate: _Evaluate, draw: Draw | None = None, display: TrainingProgress | None = None
    ) -> dict[str, Any]:
        """Trains to the last epoch and returns the metrics of the last one.

        Args:
            evaluate: scores the model after an epoch.
            draw: draws the model's predictions after an evaluation (default: no images).
            display: receives the progress (default: silent).

        Raises:
            UserError: when a file cannot be used, when memory runs out, or when the loss is not finite.
        """
        config, progress = self.config, self.progress
        self.loader, sampler = training_loader(
            self.samples,
            batch_size=config.batch_size,
            workers=choose_workers(config.workers, self.processes.local_size),
            pin_memory=self.device.type == "cuda",
            rank=self.processes.rank,
            world_size=self.processes.world_size,
            accumulate=config.accumulate,
            group_by_aspect_ratio=config.group_by_aspect_ratio,
        )
        self.steps_per_epoch = len(self.loader) // config.accumulate
        images = len(self.samples)
        done = progress.epoch * images + progress.step * config.batch_size
        figures: dict[str, Any] = {}
        self.logbook = self._open_logbook()
        self.display = display or _Silent()
        self.display.start(config.epochs * images, done)
        while progress.epoch < config.epochs:
            # The epoch and the index decide all randomness, so a resumed run repeats what an unbroken one does.
            sampler.epoch, sampler.start = progress.epoch, progress.step * config.accumulate
            began, before = time.perf_counter(), progress.step
            self._train_epoch()
            rate = (self.steps_per_epoch - before) * config.batch_size / (time.perf_counter() - began)
            figures = self._end_epoch(evaluate, draw) | {"images_per_s": rate}
            if self.logbook is not None:
                self.logbook.epoch(progress.epoch * self.steps_per_epoch, figures)
            self.display.epoch(figures)
        if self.logbook is not None:
            self.logbook.close()
        return figures

    def _open_logbook(self) -> Logbook | None:
        """The first process keeps the log."""
        if not self.processes.is_first:
            return None
        first = self.progress.epoch * self.steps_per_epoch + self.progress.step
        return Logbook(self.run, tensorboard=self.config.tensorboard, first_step=first)

    def _train_epoch(self) -> None:
        """Takes the steps of an epoch that are left, saving the state now and then."""
        config, progress = self.config, self.progress
        saved = time.monotonic()
        for parts in _grouped(self.loader, config.accumulate):
            number = progress.epoch * self.steps_per_epoch + progress.step
            if number == 0 and self.logbook is not None:
                self.logbook.pictures(0, pictures_of_samples(parts[0], config.model, config.pictures))
            rate = learning_rate(config, number, self.steps_per_epoch)
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            images = [image for part in parts for image in part.image_ids]
            with _memory_explained(parts):
                self.readout.push((number, rate, images), self.step.run(parts))
            progress.step += 1
            self._read(wait=False)
            if self.processes.is_first and time.monotonic() - saved > SECONDS_BETWEEN_STATES:
                self._read(wait=True)
                self._save_state()
                saved = time.monotonic()
        self._read(wait=True)

    def _read(self, *, wait: bool) -> None:
        """Takes in the figures of the steps that the device has finished."""
        progress = self.progress
        for (number, rate, images), figures in self.readout.pop(wait=wait):
            finite = self._check(number, images, figures)
            for name, value in figures.items() if finite else ():
                progress.totals[name] = progress.totals.get(name, 0.0) + value
            if self.logbook is not None:
                self.logbook.step(number, {**figures, "learning_rate": rate})
            epoch = number // self.steps_per_epoch + 1
            self.display.step(self.config.batch_size, epoch=epoch, loss=figures["loss"])

    def _check(self, number: int, images: list[int], figures: dict[str, float]) -> bool:
        """Whether a step was taken; stops, or says that it was skipped.

        Raises:
            UserError: where the run is to stop at a step that is not finite, or nearly all steps are such.
        """
        if figures["finite"]:
            self.progress.skipped = 0
            return True
        if self.precision == "fp16" and math.isfinite(figures["loss"]):
            return False  # the scaler tries how far it can go; this is no fault
        self.progress.skipped += 1
        self.progress.totals["nonfinite_steps"] = self.progress.totals.get("nonfinite_steps", 0.0) + 1
        came = f"loss {figures['loss']}, gradient norm {figures['gradient_norm']} at step {number}, images {images}"
        if self.config.on_nonfinite == "stop" or self.progress.skipped > _MOST_SKIPPED:
            raise UserError(
                came,
                "a finite loss and gradient",
                f"look at these images, lower --learning-rate, or skip such steps with --on-nonfinite skip; "
                f"continue the last good state with --resume {self.run}",
            )
        self.display.message(f"skipped: {came}")
        return False

    def _end_epoch(self, evaluate: _Evaluate, draw: Draw | None) -> dict[str, Any]:
        """Evaluates, saves checkpoints and state, and returns the figures of the epoch."""
        config, progress = self.config, self.progress
        taken = max(progress.totals.pop("finite", 0.0), 1.0)
        figures: dict[str, Any] = {"epoch": progress.epoch + 1}
        figures |= {k: v if k == "nonfinite_steps" else v / taken for k, v in progress.totals.items()}
        progress.epoch, progress.step, progress.totals = progress.epoch + 1, 0, {}
        model = self.evaluated_model()
        if progress.epoch % config.evaluate_every == 0 or progress.epoch == config.epochs:
            figures |= evaluate(model.eval())
            better = score_of(figures) > progress.best_ap
            progress.best_ap = max(score_of(figures), progress.best_ap)
            if self.processes.is_first and better:
                save_checkpoint(self.run / runs.BEST, model, figures=figures)
            if self.logbook is not None and draw is not None and config.pictures:
                self.logbook.pictures(progress.epoch * self.steps_per_epoch, draw(model))
        if self.processes.is_first:
            save_checkpoint(self.run / runs.LAST, model, figures=figures)
            self._save_state()
        self.processes.wait()
        self._to_training()
        return figures

    def evaluated_model(self) -> MaskRCNN:
        """The model that is evaluated and saved: the averaged weights where there are such."""
        return self.model if self.averaged is None else self.averaged.model

    def _to_training(self) -> None:
        self.model.train()
        for module in self.frozen:
            module.eval()  # their batch-norm statistics stay as they are

    def _save_state(self) -> None:
        state.save_state(self.run / runs.STATE, self.step, self.config, self.progress)


def score_of(figures: dict[str, float]) -> float:
    """What the best checkpoint is the best by: mask and keypoint AP, as a mean; box AP for a model of boxes alone."""
    found = [figures[name] for name in ("mask_ap", "keypoint_ap") if name in figures] or [figures["box_ap"]]
    return sum(found) / len(found)


def _synchronised(model: MaskRCNN, device: torch.device) -> MaskRCNN:
    if device.type != "cuda":
        raise UserError(
            f"--batch-norm sync on {device.type}",
            "GPUs, the only device on which PyTorch synchronises batch norm",
            "use --batch-norm frozen, or train",
        )
    return nn.SyncBatchNorm.convert_sync_batchnorm(model)


def _grouped(loader, count: int) -> Iterator[list[Batch]]:
    """The loader's batches, `count` at a time; an error that a worker met is raised here."""
    parts: list[Batch] = []
    for batch in loader:
        if isinstance(batch, UserError):
            raise batch
        parts.append(batch)
        if len(parts) == count:
            yield parts
            parts = []


@contextmanager
def _memory_explained(parts: list[Batch]) -> Iterator[None]:
    """Turns running out of memory into an error that says what to lower."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:  # the CPU's allocator raises a plain RuntimeError
        text = str(error)
        if not isinstance(error, (torch.OutOfMemoryError, MemoryError)) and "can't allocate memory" not in text:
            raise
        shapes = ", ".join("×".join(map(str, part.images.shape)) for part in parts)
        objects = max(part.boxes.shape[1] for part in parts)
        raise UserError(
            f"out of memory with images of {shapes} and up to {objects} objects each ({text.splitlines()[:1]})",
            "a batch that fits",
            "raise --accumulate (nearly the same result, less memory), use --precision bf16, or lower --batch-size, "
            "--min-size and --max-size; --resume continues with the new values",
        ) from error

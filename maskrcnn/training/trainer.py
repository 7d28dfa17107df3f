"""The training loop."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from maskrcnn import runs
from maskrcnn.config import TrainConfig, to_dict
from maskrcnn.data.coco import CocoDataset
from maskrcnn.errors import UserError, is_out_of_memory, reason_of
from maskrcnn.files import make_folder, write_json
from maskrcnn.machine import shared_memory_mb
from maskrcnn.model.detector import MaskRCNN
from maskrcnn.model.inference import respect_cpu_quota
from maskrcnn.training import state
from maskrcnn.training.distributed import Processes, choose_device, choose_precision, choose_workers
from maskrcnn.training.loader import Batch, PipedBatch, TrainingSamples, repeat_factors, training_loader
from maskrcnn.training.logbook import Logbook, NamedImage, sample_images
from maskrcnn.training.optimizer import AveragedWeights, freeze_stages, learning_rate, make_optimizer
from maskrcnn.training.step import PendingMetrics, Step
from maskrcnn.weights.checkpoint import load_weights, save_checkpoint

# Returns at least "box_ap", "mask_ap" (with masks) and "keypoint_ap" (with keypoints), in [0, 1] or -1 without objects,
# and the metric that selects the best checkpoint; equal in every process.
Evaluate = Callable[[MaskRCNN], dict[str, float]]
Draw = Callable[[MaskRCNN], list[NamedImage]]

SECONDS_BETWEEN_STATES = 600.0  # interval within an epoch; the state is always saved at its end
_MAX_SKIPPED = 100  # maximum consecutive steps without a finite gradient: beyond it, the model is not learning


class TrainingProgress(Protocol):
    """Receives the progress of `Trainer.fit`."""

    def start(self, total_images: int, done_images: int) -> None:
        """Begins a run of `total_images` over all epochs, `done_images` of which an earlier process trained on."""

    def step(self, images: int, *, epoch: int, loss: float) -> None:
        """Records an optimizer step with `images` images; epochs count from 1."""

    def epoch(self, metrics: dict[str, Any]) -> None:
        """Records the metrics of a finished epoch."""

    def message(self, text: str) -> None:
        """Receives a line for the user, such as a skipped step."""


class _Silent:
    """Ignores the progress."""

    def start(self, total_images: int, done_images: int) -> None: ...
    def step(self, images: int, *, epoch: int, loss: float) -> None: ...
    def epoch(self, metrics: dict[str, Any]) -> None: ...
    def message(self, text: str) -> None: ...


class Trainer:
    """One training run: a configuration, a folder and the resumable state.

    Args:
        config: model, data and hyperparameters.
        run: folder of the run.
        dataset: training split.
        processes: processes that train together (default: only this one).
    """

    def __init__(
        self, config: TrainConfig, run: Path, dataset: CocoDataset, processes: Processes | None = None
    ) -> None:
        self.config, self.run = config, run
        self.processes = processes or Processes()
        self.device = choose_device(config.device, self.processes.local_rank)
        self.precision = choose_precision(config.precision, self.device)
        respect_cpu_quota()
        if config.cuda_graphs:
            _require_graphable(config, self.device, self.precision, self.processes)
        self.samples = TrainingSamples(dataset, config.model.preprocessing, augment=config.augment, seed=config.seed)
        self.loader, self.sampler = training_loader(
            self.samples,
            batch_size=config.batch_size,
            workers=choose_workers(config.workers, self.processes.local_size),
            pin_memory=self.device.type == "cuda",
            rank=self.processes.rank,
            world_size=self.processes.world_size,
            accumulate=config.accumulate,
            aspect_ratio_groups=config.aspect_ratio_groups if config.group_by_aspect_ratio else 1,
            repeats=repeat_factors(dataset.labels_of_images(), config.repeat_threshold)
            if config.repeat_threshold
            else None,
        )
        torch.manual_seed(config.seed)
        self.model = MaskRCNN(config.model).to(self.device).to(memory_format=torch.channels_last)
        if config.batch_norm == "sync":
            self.model = _synchronised(self.model, self.device)
        self.frozen = freeze_stages(self.model, config.trainable_stages)
        self.averaged = AveragedWeights(self.model, config.ema_decay) if config.ema_decay else None
        self.optimizer = make_optimizer(self.model, config)
        self._set_training_mode()
        self.step = Step(self.model, self.optimizer, config, self.device, self.precision, self.processes, self.averaged)
        self.progress = state.Progress()
        self._pending = PendingMetrics()
        self._is_new = False  # whether the run was started by this object
        self._piped = False  # whether batches did not fit into shared memory
        self._logbook: Logbook | None = None  # only in the first process, during `fit`
        self._display: TrainingProgress = _Silent()

    def begin(self) -> None:
        """Create the folder of a new run with its configuration and initial state."""
        self._is_new = True
        if self.processes.is_first:
            make_folder(self.run)
            with self._discarded_if_refused():
                write_json(self.run / runs.CONFIG, to_dict(self.config))
                self._save_state()
        self.processes.wait()

    def load_weights(self, tensors: dict[str, Tensor], source: Path | str) -> None:
        """Replace the random initial weights."""
        load_weights(self.model, tensors, source)
        if self.averaged is not None:
            self.averaged.model.load_state_dict(self.model.state_dict())

    def load_state(self) -> None:
        """Continue from the last saved state, with any number of processes."""
        self.progress = state.load_state(self.run / runs.STATE, self.step)

    def fit(
        self, evaluate: Evaluate, draw: Draw | None = None, display: TrainingProgress | None = None
    ) -> dict[str, Any]:
        """Train to the last epoch, or until patience is exhausted, and return the metrics of the last epoch.

        A new run that fails before its first step is removed.

        Args:
            evaluate: scores the model after an epoch.
            draw: draws the model's predictions after an evaluation (default: no images).
            display: receives the progress (default: silent).

        Raises:
            UserError: if a file cannot be used, memory runs out, or the loss is not finite.
        """
        with self._discarded_if_refused():
            return self._fit(evaluate, draw, display or _Silent())

    def _fit(self, evaluate: Evaluate, draw: Draw | None, display: TrainingProgress) -> dict[str, Any]:
        config, progress = self.config, self.progress
        if self.processes.is_first:
            self._logbook = Logbook(
                self.run,
                tensorboard=config.tensorboard,
                log_every=config.log_every,
                first_step=self._step_number(),
                first_epoch=progress.epoch + 1,
            )
        done_images = progress.epoch * self.sampler.length + progress.step * config.batch_size
        self._display = display
        self._display.start(config.epochs * self.sampler.length, done_images)
        metrics: dict[str, Any] = {}
        while not progress.is_finished(config):
            began, before = time.perf_counter(), progress.step
            with self._explain_workers():
                self._train_epoch()
                rate = (self.sampler.steps - before) * config.batch_size / (time.perf_counter() - began)
                metrics = self._end_epoch(evaluate, draw, rate)
            self._display.epoch({name: value for name, value in metrics.items() if "/" not in name})
        if progress.epoch < config.epochs:
            self._display.message(
                f"stopped after epoch {progress.epoch} of {config.epochs}: no better {best_by(config)} in "
                f"{progress.stale} evaluations"
            )
        if self._logbook is not None:
            self._logbook.close()
        return metrics

    @property
    def _is_untouched(self) -> bool:
        """Whether the run was started by this object and has not taken a step."""
        return self._is_new and self.progress.epoch == self.progress.step == 0

    @contextmanager
    def _discarded_if_refused(self) -> Iterator[None]:
        """Removes only the files of the run if it fails before its first step."""
        try:
            yield
        except BaseException:
            if self._is_untouched and self.processes.is_first:
                if self._logbook is not None:
                    self._logbook.close()
                files = [self.run / name for name in (runs.CONFIG, runs.STATE, runs.LOG)]
                folders = [self.run / runs.PICTURES, self.run / runs.EVENTS]
                files += [*folders[0].glob("sample-*.png"), *folders[1].glob("events.out.tfevents.*")]
                for path in files:
                    with suppress(OSError):
                        path.unlink(missing_ok=True)
                for folder in (*folders, self.run):
                    with suppress(OSError):  # missing, or contains other files
                        folder.rmdir()
            raise

    @property
    def _again(self) -> str:
        """How to continue after an error; to be followed by options."""
        return "start again with" if self._is_untouched else f"continue with --resume {self.run}"

    def losses_by_rate(self, lowest: float, highest: float, steps: int) -> list[tuple[float, float]]:
        """Train with learning rates that rise by a constant factor per step (Smith 2017, section 3.3).

        Writes nothing; the weights change. Ends early once the loss is four times its minimum, or not finite.

        Args:
            lowest: first learning rate.
            highest: learning rate of the last step.
            steps: number of optimizer steps, at least 2.

        Returns:
            learning rate and loss of each step, the loss smoothed exponentially over about twenty steps.
        """
        self._is_new = True  # for errors: there is nothing to continue
        found: list[tuple[float, float]] = []
        mean = 0.0
        for number in range(steps):
            if number % self.sampler.steps == 0:
                self.sampler.epoch = number // self.sampler.steps
                batches = self._step_batches()
            rate = lowest * (highest / lowest) ** (number / (steps - 1))
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            parts = next(batches)
            with _explained(self._shown(parts), self._memory_advice(parts)):
                mean = 0.95 * mean + 0.05 * float(self.step.run(parts)["loss"])
            loss = mean / (1 - 0.95 ** (number + 1))
            if not loss < 4 * min((each for _, each in found), default=math.inf):
                break
            found.append((rate, loss))
        return found

    def _step_number(self) -> int:
        """Number of optimizer steps of the whole run so far."""
        return self.progress.epoch * self.sampler.steps + self.progress.step

    def _train_epoch(self) -> None:
        """Take the remaining steps of an epoch, saving the state periodically."""
        config, progress, sampler = self.config, self.progress, self.sampler
        # Epoch and index determine all randomness, so a resumed run is the same as an uninterrupted one.
        sampler.epoch, sampler.start = progress.epoch, progress.step * config.accumulate
        saved = time.monotonic()
        for parts in self._step_batches():
            number = self._step_number()
            if number == 0 and self._logbook is not None:
                self._logbook.images(0, sample_images(parts[0], config.model, config.pictures))
            rate = learning_rate(config, number, sampler.steps)
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            with _explained(self._shown(parts), self._memory_advice(parts)):
                self._pending.push((number, rate), self.step.run(parts))
            progress.step += 1
            self._record_steps(wait=False)
            if self.processes.is_first and time.monotonic() - saved > SECONDS_BETWEEN_STATES:
                self._record_steps(wait=True)
                self._save_state()
                saved = time.monotonic()
        self._record_steps(wait=True)

    def _step_batches(self) -> Iterator[list[Batch]]:
        """The loader's batches, `accumulate` at a time; raises errors of its workers."""
        parts: list[Batch] = []
        try:
            batches = iter(self.loader)
        except OSError as error:
            found = f"data loading processes that cannot be started ({error.strerror})"
            raise UserError(found, "memory, open files and processes for them", self._fewer_workers()) from error
        for batch in batches:
            if isinstance(batch, UserError):  # --resume continues from here once the file is corrected
                self._record_steps(wait=True)
                if self.processes.is_first and not self._is_untouched:
                    self._save_state()
                raise batch
            if isinstance(batch, PipedBatch) and not self._piped:
                self._piped = True
                self._display.message(_no_shared_memory(batch))
            parts.append(batch)
            if len(parts) == self.config.accumulate:
                yield parts
                parts = []

    @contextmanager
    def _explain_workers(self) -> Iterator[None]:
        """Turns the death of a data loading process, reported at any time by a signal, into a `UserError`."""
        try:
            yield
        except RuntimeError as error:
            if is_out_of_memory(error):
                found = f"out of memory while batches were loaded ({reason_of(error)})"
                raise UserError(found, "memory for a few batches", self._fewer_workers()) from error
            if not str(error).startswith("DataLoader worker"):
                raise
            raise UserError(
                f"a data loading process that ended unexpectedly ({' '.join(str(error).split())})",
                "processes that run to the end; the system kills them if memory runs out (see `dmesg`)",
                self._fewer_workers(),
            ) from error

    def _fewer_workers(self) -> str:
        workers = self.loader.num_workers
        return f"use fewer than {workers} workers: {self._again} --workers {workers // 2}"

    def _shown(self, parts: list[Batch]) -> str:
        shapes = ", ".join("×".join(map(str, part.images.shape)) for part in parts)
        objects = max(part.boxes.shape[1] for part in parts)
        return f"images of {shapes} and up to {objects} objects each"

    def _memory_advice(self, parts: list[Batch]) -> str:
        """Ways to reduce the memory of such a step, the change with the smallest effect first."""
        config, images = self.config, len(parts[0].images)
        preprocessing = config.model.preprocessing
        advice = []
        if images > 1:
            advice.append(f"--accumulate {config.accumulate * images} (the same step, one image at a time)")
        if self.precision == "fp32":
            advice.append("--precision bf16")
        advice.append(f"--max-size below {preprocessing.max_size_px} and --min-size below {preprocessing.min_size_px}")
        if self.device.type == "cpu" and self.loader.num_workers:
            advice.append(f"fewer --workers than {self.loader.num_workers}")
        return f"{self._again} {', '.join(advice[:-1])}{' or ' if advice[1:] else ''}{advice[-1]}"

    def _record_steps(self, *, wait: bool) -> None:
        """Record the metrics of the steps that the device has finished."""
        totals = self.progress.totals
        for (number, rate), metrics in self._pending.pop(wait=wait):
            finite = self._check_finite(number, int(metrics.pop("nonfinite_part")), metrics)
            for name, value in metrics.items() if finite else ():
                totals[name] = totals.get(name, 0.0) + value
            epoch = number // self.sampler.steps + 1
            if self._logbook is not None:
                self._logbook.step(number, epoch, {**metrics, "learning_rate": rate})
            self._display.step(self.config.batch_size, epoch=epoch, loss=metrics["loss"])

    def _images_of(self, number: int, part: int) -> list[int]:
        """Ids of the images of a part of a step, see `Step.run`; if the part is -1, of the whole step."""
        batch = self.sampler.global_batches()[number % self.sampler.steps] % self.sampler.images
        if part >= 0:
            batch = batch.reshape(self.processes.world_size * self.config.accumulate, -1)[part]
        return [self.samples.records[index].id for index in batch.tolist()]

    def _check_finite(self, number: int, part: int, metrics: dict[str, float]) -> bool:
        """Whether a step was finite and therefore taken.

        Raises:
            UserError: for a non-finite step if the run stops at such, or after too many of them.
        """
        progress = self.progress
        if metrics["finite"]:
            progress.skipped = 0
            return True
        if self.precision == "fp16" and math.isfinite(metrics["loss"]):
            return False  # the gradient scaler probes for the largest scale; not an error
        progress.skipped += 1
        progress.totals["nonfinite_steps"] = progress.totals.get("nonfinite_steps", 0.0) + 1
        found = (
            f"loss {metrics['loss']}, gradient norm {metrics['gradient_norm']} at step {number}, "
            f"images {self._images_of(number, part)}"
        )
        if self.config.on_nonfinite == "stop" or progress.skipped > _MAX_SKIPPED:
            raise UserError(
                found,
                "a finite loss and gradient",
                f"inspect these images; continue from the last good state with --resume {self.run} and a lower "
                "--learning-rate, or skip such steps with --on-nonfinite skip",
            )
        self._display.message(f"skipped: {found}")
        return False

    def _end_epoch(self, evaluate: Evaluate, draw: Draw | None, images_per_s: float) -> dict[str, Any]:
        """Evaluate, record, save checkpoints and state, and return the metrics of the epoch."""
        config, progress = self.config, self.progress
        is_evaluated = (progress.epoch + 1) % config.evaluate_every == 0 or progress.epoch + 1 == config.epochs
        if is_evaluated and self.processes.is_first:
            self._save_state()  # all steps are done: if the evaluation fails, --resume repeats only the evaluation
        last = self._step_number() - 1
        taken = max(progress.totals.pop("finite", 0.0), 1.0)
        metrics: dict[str, Any] = {"epoch": progress.epoch + 1}
        metrics |= {k: v if k == "nonfinite_steps" else v / taken for k, v in progress.totals.items()}
        metrics |= {"learning_rate": learning_rate(config, last, self.sampler.steps), "images_per_s": images_per_s}
        model = self.model if self.averaged is None else self.averaged.model
        is_best = False
        if is_evaluated:
            size = max(1, config.batch_size // self.processes.world_size)
            smaller = "a lower --batch-size" if size > 1 else "lower --max-size and --min-size"
            with _explained(f"validation batches of {size} image(s)", f"{self._again} and {smaller}"):
                metrics |= evaluate(model.eval())
                # Belongs to these weights: the checkpoint stores it.
                model.config = replace(model.config, recommended_threshold=metrics.get("recommended_threshold", 0.0))
                if self._logbook is not None and draw is not None and config.pictures:
                    self._logbook.images(last, draw(model))
            score = score_of(metrics, config.best_metric)
            is_best = progress.best_score is None or (score is not None and score > progress.best_score)
        progress.epoch, progress.step, progress.totals = progress.epoch + 1, 0, {}
        if is_evaluated:
            progress.stale = 0 if is_best else progress.stale + 1
            progress.best_score = score if is_best else progress.best_score
        if self.processes.is_first:
            if is_best:
                save_checkpoint(self.run / runs.BEST, model, metrics=metrics, transform=config.augment.transform)
            save_checkpoint(self.run / runs.LAST, model, metrics=metrics, transform=config.augment.transform)
            if self._logbook is not None:
                self._logbook.epoch(last, metrics)
            self._save_state()
        self.processes.wait()
        self._set_training_mode()
        return metrics

    def _set_training_mode(self) -> None:
        self.model.train()
        for module in self.frozen:
            module.eval()  # keeps their batch norm statistics

    def _save_state(self) -> None:
        state.save_state(self.run / runs.STATE, self.step, self.config, self.progress)


def _kinds(config: TrainConfig) -> list[str]:
    """The kinds of results of the model, as in the names of metrics."""
    model = config.model
    return ["box", *(["mask"] if model.has_masks else []), *(["keypoint"] if model.has_keypoints else [])]


def logged_metrics(config: TrainConfig) -> list[str]:
    """Names of the metrics of an evaluated epoch that can select the best checkpoint."""
    kinds = _kinds(config)
    names = [f"{kind}_{metric}" for metric in ("ap", "ap50") for kind in kinds]
    losses = ["objectness", "rpn_box", "classification", *kinds]
    names += ["loss", *losses]
    if config.validation_loss:
        names += ["validation_loss", *(f"validation_loss/{name}" for name in losses)]
    return names + [f"{kind}_ap/{name}" for kind in kinds for name in config.model.class_names]


def require_measurable(config: TrainConfig, validation: CocoDataset) -> None:
    """Check that the metric of the best checkpoint is logged and, if the run waits for its improvement, defined.

    Raises:
        UserError: otherwise.
    """
    name = config.best_metric
    if name and name not in (names := logged_metrics(config)):
        shown = ", ".join([each for each in names if "_ap/" not in each] + [f"{_kinds(config)[-1]}_ap/CLASS"])
        raise UserError(f"best_metric {name!r}", f"one of {shown}", "set --best-metric to one of these")
    if config.patience and (not name or "_ap" in name):
        label = config.model.class_names.index(name.partition("/")[2]) + 1 if "/" in name else None
        labels = validation.images.objects("label")[~validation.images.objects("is_crowd")]
        if not (labels.size if label is None else (labels == label).any()):
            raise UserError(
                f"patience {config.patience} with {best_by(config)}, for which {validation.annotation_path} has no "
                "object",
                "a metric that the validation split can measure",
                "validate on a split with objects, add --validation-loss --best-metric validation_loss, or omit "
                "--patience",
            )


def best_by(config: TrainConfig) -> str:
    """The metric that selects the best checkpoint, for messages, see `score_of`."""
    return config.best_metric or f"{' and '.join(_kinds(config)[1:]) or 'box'} AP"


def score_of(metrics: dict[str, float], name: str = "") -> float | None:
    """Score that selects the best checkpoint, the larger the better; None if it could not be measured.

    Args:
        metrics: metrics of an evaluated epoch.
        name: the metric; losses are negated. Default: the mean of mask and keypoint AP, or the box AP for a model
            with neither.
    """
    names: list[str] = (
        [name] if name else [each for each in metrics if each in ("mask_ap", "keypoint_ap")] or ["box_ap"]
    )
    score = sum(metrics[each] for each in names) / len(names)
    if "_ap" not in names[0]:
        return -score
    return score if score >= 0 else None  # COCO's -1: no objects


def _synchronised(model: MaskRCNN, device: torch.device) -> MaskRCNN:
    """The model with batch norm statistics synchronised across processes."""
    if device.type != "cuda":
        raise UserError(
            f"--batch-norm sync on {device.type}",
            "GPUs, the only devices on which PyTorch synchronises batch norm",
            "use --batch-norm frozen, or train",
        )
    return nn.SyncBatchNorm.convert_sync_batchnorm(model)


def _require_graphable(config: TrainConfig, device: torch.device, precision: str, processes: Processes) -> None:
    """Raises a UserError if the step cannot be captured as a CUDA graph."""
    obstacles = {
        f"device {device.type}": device.type != "cuda",
        f"{processes.world_size} processes": processes.world_size > 1,
        f"accumulate {config.accumulate}": config.accumulate > 1,
        "precision fp16, whose gradient scale is adapted on the host": precision == "fp16",
    }
    if found := [name for name, is_met in obstacles.items() if is_met]:
        expected = "one process on a GPU, without gradient accumulation, in bf16 or fp32"
        raise UserError(f"cuda_graphs with {' and '.join(found)}", expected, "omit --cuda-graphs, or change these")


def _no_shared_memory(batch: Batch) -> str:
    sizes = shared_memory_mb()
    bytes_each = sum(value.nbytes for value in vars(batch).values() if isinstance(value, Tensor))
    room = f"/dev/shm ({sizes[1]} of {sizes[0]} MB free)" if sizes else "shared memory"
    return (
        f"a batch of {bytes_each / 1e6:.0f} MB does not fit into {room}: such batches are copied between processes, "
        "which is slower; in Docker raise --shm-size, or use fewer --workers"
    )


@contextmanager
def _explained(what: str, fix: str) -> Iterator[None]:
    """Turns an out-of-memory error, or batch norm of a single value, into a `UserError`."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:  # the CPU allocator raises a plain RuntimeError
        if not is_out_of_memory(error):
            raise
        raise UserError(f"out of memory with {what} ({reason_of(error)})", "memory for one step", fix) from error
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        expected = "at least two values per channel: larger images, or more images per batch"
        fix = "raise --batch-size or --min-size, or keep the statistics of the weights with --batch-norm frozen"
        raise UserError(f"{what}, for which batch norm has a single value per channel", expected, fix) from error

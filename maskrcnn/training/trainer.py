"""The training loop. Reads top to bottom."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from maskrcnn import runs
from maskrcnn.checkpoint import load_weights, read_tensors, save_checkpoint, write_tensors
from maskrcnn.config import TrainConfig, from_dict, to_dict
from maskrcnn.data.coco import CocoDataset
from maskrcnn.data.loader import TrainingSamples, training_loader
from maskrcnn.errors import UserError
from maskrcnn.files import make_folder, write_json
from maskrcnn.model.detector import MaskRCNN
from maskrcnn.training.progress import epoch_progress, table_line
from maskrcnn.training.schedule import learning_rate

# Evaluates a model and returns at least "box_ap" and "mask_ap" in [0, 1].
Evaluate = Callable[[MaskRCNN], dict[str, float]]


def choose_device(name: str) -> torch.device:
    """The device for "auto", "cpu" or "cuda".

    Raises:
        UserError: when CUDA is asked for and there is none.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda", "a CUDA GPU that torch can use", "see `maskrcnn doctor`, or use cpu")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def choose_precision(name: str, device: torch.device) -> str:
    """ "fp32" or "bf16" for "auto", "fp32" or "bf16": bfloat16 where the processor multiplies in it."""
    if name not in ("auto", "fp32", "bf16"):
        raise UserError(f"precision {name!r}", "auto, fp32 or bf16", "set --precision to one of them")
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported() else "fp32"
    features = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return "bf16" if features.get("amx_bf16") or features.get("avx512_bf16") else "fp32"


def parameter_groups(model: MaskRCNN, weight_decay: float) -> list[dict[str, Any]]:
    """Convolution and linear weights decay; biases and normalisation do not."""
    decayed, free = [], []
    for parameter in model.parameters():
        if parameter.requires_grad:
            (decayed if parameter.dim() > 1 else free).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": free, "weight_decay": 0.0}]


class Trainer:
    """One run: a configuration, a folder, and the state that a kill must not lose."""

    def __init__(self, config: TrainConfig, run: Path, dataset: CocoDataset) -> None:
        self.config, self.run = config, run
        self.device = choose_device(config.device)
        self.precision = choose_precision(config.precision, self.device)
        self.samples = TrainingSamples(
            dataset, config.model.preprocessing, flip_probability=config.flip_probability, seed=config.seed
        )
        torch.manual_seed(config.seed)
        self.model = MaskRCNN(config.model).to(self.device, memory_format=torch.channels_last)
        self.optimizer = torch.optim.SGD(
            parameter_groups(self.model, config.weight_decay),
            lr=config.learning_rate,
            momentum=config.momentum,
        )
        self.epoch, self.best_ap = 0, -1.0  # epochs done; best mask AP so far

    def begin(self) -> None:
        """Makes the folder of a new run and writes its configuration there."""
        make_folder(self.run)
        write_json(self.run / runs.CONFIG, to_dict(self.config))

    def load_weights(self, tensors: dict[str, Tensor], source: Path) -> None:
        """Starts from given weights instead of random ones."""
        load_weights(self.model, tensors, source)

    def save_state(self) -> None:
        """Everything that continuing needs, in one file that is replaced whole."""
        tensors = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        for index, parameter in enumerate(self._parameters()):
            momentum = self.optimizer.state[parameter].get("momentum_buffer")
            if momentum is not None:
                tensors[f"momentum.{index}"] = momentum
        header = {"config": to_dict(self.config), "epoch": self.epoch, "best_ap": self.best_ap}
        write_tensors(self.run / runs.STATE, tensors, header)

    def load_state(self) -> None:
        """Continues from the state that `save_state` wrote."""
        path = self.run / runs.STATE
        tensors, header = read_tensors(path)
        load_weights(self.model, {k[6:]: v for k, v in tensors.items() if k.startswith("model.")}, path)
        for index, parameter in enumerate(self._parameters()):
            momentum = tensors.get(f"momentum.{index}")
            if momentum is not None:
                momentum = momentum.to(parameter.device).contiguous(memory_format=_format_of(parameter))
                self.optimizer.state[parameter]["momentum_buffer"] = momentum
        self.epoch, self.best_ap = header["epoch"], header["best_ap"]

    def _parameters(self) -> list[torch.nn.Parameter]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def fit(self, evaluate: Evaluate) -> dict[str, Any]:
        """Trains to the last epoch and returns the figures of the last evaluation."""
        config = self.config
        loader, sampler = training_loader(
            self.samples,
            batch_size=config.batch_size,
            workers=config.workers,
            pin_memory=self.device.type == "cuda",
        )
        images = len(self.samples)
        figures: dict[str, Any] = {}
        with epoch_progress(config.epochs * images, self.epoch * images) as progress:
            while self.epoch < config.epochs:
                sampler.epoch = self.epoch
                # The epoch decides all randomness, so a resumed run repeats what an unbroken one does.
                torch.manual_seed(config.seed * 1_000_003 + self.epoch)
                began = time.perf_counter()
                losses = self._train_epoch(loader, progress)
                seconds = time.perf_counter() - began
                self.epoch += 1
                figures = {"epoch": self.epoch, **losses, "images_per_s": images / seconds}
                if self.epoch % config.evaluate_every == 0 or self.epoch == config.epochs:
                    figures |= evaluate(self.model.eval())
                    if figures["mask_ap"] > self.best_ap:
                        self.best_ap = figures["mask_ap"]
                        save_checkpoint(self.run / runs.BEST, self.model, figures=figures)
                save_checkpoint(self.run / runs.LAST, self.model, figures=figures)
                self.save_state()
                with open(self.run / runs.LOG, "a", encoding="utf-8") as log:
                    log.write(json.dumps(figures) + "\n")
                progress.say(table_line(figures))
        return figures

    def _train_epoch(self, loader, progress) -> dict[str, float]:
        self.model.train()
        totals: dict[str, float] = {}
        steps = len(loader)
        for number, batch in enumerate(loader):
            if isinstance(batch, UserError):
                raise batch
            step = self.epoch * steps + number
            rate = learning_rate(self.config, step, steps)
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            losses = self._step(batch.to(self.device), step)
            for name, value in losses.items():
                totals[name] = totals.get(name, 0.0) + value / steps
            progress.advance(len(batch.image_ids), epoch=self.epoch + 1, loss=losses["loss"])
        return totals

    def _step(self, batch, step: int) -> dict[str, float]:
        config = self.config
        images = batch.images.contiguous(memory_format=torch.channels_last)
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.precision == "bf16"):
            losses = self.model.losses(images, batch.image_sizes, batch.truth(), config.loss)
        loss = torch.stack(list(losses.values())).sum()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if config.clip_gradient_norm:
            torch.nn.utils.clip_grad_norm_(self._parameters(), config.clip_gradient_norm)
        values = {"loss": float(loss.detach()), **{k: float(v.detach()) for k, v in losses.items()}}
        if not math.isfinite(values["loss"]):
            raise UserError(
                f"loss {values['loss']} at step {step}, images {batch.image_ids}",
                "a finite loss",
                f"lower --learning-rate, look at these images; {self.run / runs.STATE} is the last good state",
            )
        self.optimizer.step()
        return values


def _format_of(parameter: Tensor) -> torch.memory_format:
    channels_last = parameter.dim() == 4 and parameter.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if channels_last else torch.contiguous_format


def read_run(run: Path) -> TrainConfig:
    """The configuration of an interrupted run.

    Raises:
        UserError: when the folder is no run or has no state to continue from.
    """
    for name in (runs.CONFIG, runs.STATE):
        if not (run / name).is_file():
            raise UserError(
                f"{run} without {name}",
                "the folder of a run that finished at least one epoch",
                "start anew: `maskrcnn train`",
            )
    return from_dict(TrainConfig, json.loads((run / runs.CONFIG).read_text(encoding="utf-8")))

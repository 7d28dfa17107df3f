"""The trainers that are compared, each with one method `run` for an optimizer step, from the same weights."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import torch
from peers import torchvision_from_config
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from train_workload import Work

from maskrcnn.config import TrainConfig
from maskrcnn.model.detector import MaskRCNN
from maskrcnn.training.optimizer import freeze_stages, make_optimizer, parameter_groups
from maskrcnn.training.step import AUTOCAST, Step

OURS, THEIRS = "maskrcnn", "torchvision"
LOSS_TOLERANCE = 0.2  # of the sum: both sample anchors and proposals at random
_THEIR_NAMES = {
    "objectness": "loss_objectness",
    "rpn_box": "loss_rpn_box_reg",
    "classification": "loss_classifier",
    "box": "loss_box_reg",
    "mask": "loss_mask",
}


def write_weights(config: TrainConfig, work: Work, device: torch.device, path: Path) -> None:
    """Writes random weights whose batch-norm statistics are those of a batch, so that features keep their size."""
    torch.manual_seed(config.seed)
    model = MaskRCNN(replace(config.model, frozen_batch_norm=False)).to(device).train()
    for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.momentum = None  # a plain average instead of a moving one
    with torch.no_grad():
        model.features(work.batch.images.to(device), work.batch.image_sizes.to(device))
    save_file({name: value.cpu().contiguous() for name, value in model.state_dict().items()}, path)


class OurTrainer:
    """The step of `maskrcnn train`: channels last, fused optimizer, no synchronisation."""

    def __init__(self, config: TrainConfig, weights: Path, device: torch.device, precision: str) -> None:
        self.config, self.device = config, device
        self.model = MaskRCNN(config.model)
        self.model.load_state_dict(load_file(weights))
        self.model.to(device, memory_format=torch.channels_last)
        _to_training(self.model, config)
        self.optimizer = make_optimizer(self.model, config)
        self.step = Step(self.model, self.optimizer, config, device, precision)
        self.figures: dict[str, Tensor] = {}

    def run(self, work: Work) -> None:
        """One optimizer step, from a batch in the host's memory as the data loader leaves it."""
        self.figures = self.step.run([work.batch])

    def check(self) -> None:
        """Raises FloatingPointError where the last step was not taken."""
        if not bool(self.figures["finite"]):
            raise FloatingPointError(f"loss {float(self.figures['loss'])}, the step was not taken")

    def losses(self, work: Work) -> dict[str, float]:
        """The losses of a batch in FP32, as things stand."""
        batch = work.batch.to(self.device)
        images = batch.images.contiguous(memory_format=torch.channels_last)
        with torch.no_grad(), _FixedBatchNorm(self.model):
            found = self.model.losses(images, batch.image_sizes, batch.truth(), self.config.loss)
        return {name: float(value) for name, value in found.items()}


class TorchvisionTrainer:
    """The step of torchvision's references/detection/engine.py, `train_one_epoch`.

    Contiguous memory, masks of the images' size, `torch.optim.SGD` as it comes. Learning rate, momentum, decay and
    frozen stages are those of our trainer, and there is no clipping. For bfloat16, which the reference does not have,
    its autocast region is bfloat16's and there is no scaler.
    """

    def __init__(self, config: TrainConfig, weights: Path, device: torch.device, precision: str) -> None:
        self.config, self.device, self.kind = config, device, AUTOCAST[precision]
        self.model = torchvision_from_config(config.model, config.loss)
        self.model.load_state_dict(load_file(weights))
        self.model.to(device)
        _to_training(self.model, config)
        groups = parameter_groups(self.model, config.weight_decay)
        self.optimizer = torch.optim.SGD(groups, lr=config.learning_rate, momentum=config.momentum)
        self.scaler = torch.amp.GradScaler(device.type) if precision == "fp16" else None

    def run(self, work: Work) -> None:
        """One optimizer step; like the reference it reads the loss and stops where it is not finite."""
        loss = sum(self._losses(work).values())
        if not math.isfinite(loss.item()):
            raise FloatingPointError(f"loss {loss.item()}")
        self.optimizer.zero_grad()
        if self.scaler is None:
            loss.backward()
            self.optimizer.step()
        else:
            self.scaler.scale(loss).backward()
            self.scaler.step(self.optimizer)
            self.scaler.update()

    def check(self) -> None:
        """Nothing: `run` has raised."""

    def losses(self, work: Work) -> dict[str, float]:
        """The losses of a batch in FP32, as things stand, under our names."""
        kind, self.kind = self.kind, None
        with torch.no_grad(), _FixedBatchNorm(self.model):
            found = self._losses(work)
        self.kind = kind
        return {ours: float(found[theirs]) for ours, theirs in _THEIR_NAMES.items() if theirs in found}

    def _losses(self, work: Work) -> dict[str, Tensor]:
        images = [image.to(self.device) for image in work.images]
        targets = [{name: value.to(self.device) for name, value in target.items()} for target in work.targets]
        with torch.autocast(self.device.type, dtype=self.kind, enabled=self.kind is not None):
            return self.model(images, targets)


Trainer = OurTrainer | TorchvisionTrainer
TRAINERS: dict[str, type] = {OURS: OurTrainer, THEIRS: TorchvisionTrainer}


def compared_losses(ours: OurTrainer, theirs: TorchvisionTrainer, work: Work) -> dict[str, dict[str, float]]:
    """Both trainers' losses of a batch with fixed batch-norm statistics, and their sums.

    Raises:
        ValueError: where the sums differ by more than `LOSS_TOLERANCE`, or a loss is missing on one side.
    """
    found = {OURS: ours.losses(work), THEIRS: theirs.losses(work)}
    for losses in found.values():
        losses["sum"] = sum(losses.values())
    first, second = found[OURS], found[THEIRS]
    text = ", ".join(f"{name} {value:.4g} and {second.get(name, math.nan):.4g}" for name, value in first.items())
    if first.keys() != second.keys() or not abs(first["sum"] - second["sum"]) <= LOSS_TOLERANCE * abs(second["sum"]):
        raise ValueError(f"losses that differ by more than {LOSS_TOLERANCE:.0%}: {text}")
    return found


def _to_training(model: nn.Module, config: TrainConfig) -> None:
    """Training mode, the first stages of the backbone frozen as `maskrcnn train` freezes them."""
    frozen = freeze_stages(model, config.trainable_stages)
    model.train()
    for module in frozen:
        module.eval()


class _FixedBatchNorm:
    """Batch norm uses its stored statistics and leaves them alone for the time of the context."""

    def __init__(self, model: nn.Module) -> None:
        self.norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d) and m.training]

    def __enter__(self) -> None:
        for norm in self.norms:
            norm.eval()

    def __exit__(self, *_: object) -> None:
        for norm in self.norms:
            norm.train()

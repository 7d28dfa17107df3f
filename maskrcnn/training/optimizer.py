"""Trainable parameters, optimizer, averaged weights and learning-rate schedule."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from maskrcnn.config import TrainConfig
from maskrcnn.model.detector import MaskRCNN


def freeze_stages(model: MaskRCNN, trainable: int) -> list[nn.Module]:
    """Freeze all but the last `trainable` of the five backbone stages; returns the frozen modules.

    Stages are counted as in torchvision's `trainable_backbone_layers`; neck and heads always train. The caller must
    keep the frozen modules in evaluation mode, which also freezes their batch norm statistics.
    """
    stages = model.backbone.stages[::-1]
    frozen = [model.backbone.body[name] for stage in stages[trainable:] for name in stage]
    for module in frozen:
        module.requires_grad_(False)
    return frozen


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups with weight decay (convolution and linear weights) and without (all others)."""
    decayed: list[nn.Parameter] = []
    free: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_weight = parameter.dim() > 1 and not name.endswith("layer_scale")
            (decayed if is_weight else free).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": free, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """Create the fused optimizer of a run, which can skip a step without synchronisation."""
    groups = parameter_groups(model, config.weight_decay)
    if config.optimizer in ("adam", "adamw"):
        kind = torch.optim.Adam if config.optimizer == "adam" else torch.optim.AdamW
        return kind(groups, lr=config.learning_rate, fused=True)
    optimizer = torch.optim.SGD(groups, lr=config.learning_rate, momentum=config.momentum, fused=True)
    if config.momentum:
        # The fused kernel leaves new momentum uninitialised if it skips the first step; zeros are equivalent.
        for parameter in (p for group in groups for p in group["params"]):
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


class AveragedWeights:
    """Exponential moving average of a model's weights and batch norm statistics.

    The decay rises with step n as (1 + n) / (10 + n) up to its final value, so that random initial weights are
    forgotten quickly (as in TensorFlow's `ExponentialMovingAverage` with `num_updates`). Skipped steps do not count.
    PyTorch's `AveragedModel` copies its counter to the device at every step, which synchronises.

    Args:
        model: source of the weights.
        decay: in [0, 1); 0.999 averages over about a thousand steps.
    """

    def __init__(self, model: MaskRCNN, decay: float) -> None:
        self.source, self.decay = model, decay
        self.steps = torch.zeros((), device=next(model.parameters()).device)  # updates so far
        self.model = copy.deepcopy(model).requires_grad_(False)

    @torch.no_grad()
    def update(self, taken: Tensor) -> None:
        """Update the average with the current weights of the source if `taken`, a bool on the device."""
        decay = ((1 + self.steps) / (10 + self.steps)).clamp(max=self.decay)
        weight = torch.where(taken, 1 - decay, 0.0)
        pairs = list(zip(_values(self.model), _values(self.source), strict=True))
        means, values = zip(*(pair for pair in pairs if pair[0].is_floating_point()), strict=True)
        torch._foreach_lerp_(means, values, [weight] * len(means))
        for mean, value in pairs:
            if not mean.is_floating_point():
                mean.copy_(value)
        self.steps += taken


def _values(model: nn.Module) -> list[Tensor]:
    return [value.detach() for value in itertools.chain(model.parameters(), model.buffers())]


def learning_rate(config: TrainConfig, step: int, steps_per_epoch: int) -> float:
    """Learning rate of an optimizer step.

    Args:
        config: peak, warm-up and schedule.
        step: finished steps, over all epochs.
        steps_per_epoch: optimizer steps of one epoch.
    """
    peak = peak_learning_rate(config)
    total = config.epochs * steps_per_epoch
    warmup = min(config.warmup_steps, total // 2)
    if step < warmup:  # as torch.optim.lr_scheduler.LinearLR(start_factor=1e-3)
        return peak * (1e-3 + (1 - 1e-3) * step / warmup)
    if config.schedule == "cosine":
        done = (step - warmup) / max(total - warmup, 1)
        above_end = (1 - config.cosine_end) * 0.5 * (1 + math.cos(math.pi * done))
        return peak * (config.cosine_end + above_end)
    epochs = config.step_epochs if config.schedule == "step" else ()
    passed = sum(step >= epoch * steps_per_epoch for epoch in epochs)
    return peak * config.step_factor**passed


def peak_learning_rate(config: TrainConfig) -> float:
    """The learning rate, scaled linearly to the batch size if given for another one (Goyal et al. 2017)."""
    return config.learning_rate * (config.batch_size / config.base_batch_size if config.base_batch_size else 1)


def without_effect(config: TrainConfig) -> list[str]:
    """Schedule settings that have no effect in this run, one line each.

    Not an error: a recipe may be tried with another schedule or fewer epochs.
    """
    if config.step_epochs and config.schedule != "step":
        return [f"schedule {config.schedule}: step_epochs {_listed(config.step_epochs)} change nothing"]
    late = [epoch for epoch in config.step_epochs if epoch >= config.epochs]
    if not late:
        return []
    return [f"the learning rate will not decay after epoch {_listed(late)}: the run ends after epoch {config.epochs}"]


def _listed(epochs: Iterable[int]) -> str:
    return ", ".join(map(str, epochs))

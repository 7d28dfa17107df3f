"""What of the model trains, the optimizer that trains it, and averaged weights."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from maskrcnn.config import TrainConfig
from maskrcnn.model.detector import MaskRCNN


def freeze_stages(model: MaskRCNN, trainable: int) -> list[nn.Module]:
    """Stops the gradients of all but the last `trainable` stages of the backbone; returns the frozen modules.

    There are five, as torchvision's `trainable_backbone_layers` counts them in a ResNet; neck and heads always train.
    The caller keeps those in evaluation mode, so that their batch-norm statistics stay as well.
    """
    stages = model.backbone.stages[::-1]  # from the last
    frozen = [model.backbone.body[name] for stage in stages[trainable:] for name in stage]
    for module in frozen:
        module.requires_grad_(False)
    return frozen


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Convolution and linear weights decay; biases, normalisation and ConvNeXt's scales of layers do not."""
    decayed, free = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_weight = parameter.dim() > 1 and not name.endswith("layer_scale")
            (decayed if is_weight else free).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": free, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """The optimizer of a run, in its fused form: one that can skip a step without the host knowing."""
    groups = parameter_groups(model, config.weight_decay)
    if config.optimizer in ("adam", "adamw"):
        kind = torch.optim.Adam if config.optimizer == "adam" else torch.optim.AdamW
        return kind(groups, lr=config.learning_rate, fused=True)
    optimizer = torch.optim.SGD(groups, lr=config.learning_rate, momentum=config.momentum, fused=True)
    if config.momentum:
        # The fused kernel leaves new momentum uninitialised when it skips the first step; zeros are the same start.
        for parameter in (p for group in groups for p in group["params"]):
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


class AveragedWeights:
    """An exponential moving average of a model's weights and batch-norm statistics.

    The decay rises to its value as (1 + n) / (10 + n) over the first n steps, so that random initial weights are
    forgotten quickly (as TensorFlow's `ExponentialMovingAverage` does with `num_updates`). PyTorch's own
    `AveragedModel` copies its counter to the device at every step, which makes the host wait.

    Args:
        model: followed by `update`.
        decay: in [0, 1); 0.999 remembers about a thousand steps.
    """

    def __init__(self, model: MaskRCNN, decay: float) -> None:
        self.source, self.decay, self.steps = model, decay, 0
        self.model = copy.deepcopy(model).requires_grad_(False)

    def update(self) -> None:
        """Takes the source's weights into the average."""
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        pairs = list(zip(_values(self.model), _values(self.source), strict=True))
        floats = [(mean, value) for mean, value in pairs if mean.is_floating_point()]
        get_ema_multi_avg_fn(decay)(*(list(side) for side in zip(*floats, strict=True)), None)
        for mean, value in pairs:
            if not mean.is_floating_point():
                mean.copy_(value)
        self.steps += 1


def _values(model: nn.Module) -> list[Tensor]:
    return [value.detach() for value in itertools.chain(model.parameters(), model.buffers())]


# Learning-rate schedules as functions of the optimizer step.


def learning_rate(config: TrainConfig, step: int, steps_per_epoch: int) -> float:
    """The learning rate of an optimizer step.

    Args:
        config: gives the peak, the warm-up and the schedule.
        step: steps done before this one, over all epochs.
        steps_per_epoch: optimizer steps of one epoch.
    """
    total = config.epochs * steps_per_epoch
    warmup = min(config.warmup_steps, total // 2)
    if step < warmup:
        return config.learning_rate * max((step + 1) / warmup, 1e-3)
    if config.schedule == "cosine":
        done = (step - warmup) / max(total - warmup, 1)
        above_end = (1 - config.cosine_end) * 0.5 * (1 + math.cos(math.pi * done))
        return config.learning_rate * (config.cosine_end + above_end)
    epochs = config.step_epochs if config.schedule == "step" else ()
    passed = sum(step >= epoch * steps_per_epoch for epoch in epochs)
    return config.learning_rate * config.step_factor**passed


def without_effect(config: TrainConfig) -> list[str]:
    """What the run will not do of the schedule that its settings name, a line for each.

    No errors: a recipe is run with another schedule, or for fewer epochs, to try something out.
    """
    if config.step_epochs and config.schedule != "step":
        return [f"schedule {config.schedule}: step_epochs {_listed(config.step_epochs)} change nothing"]
    late = [epoch for epoch in config.step_epochs if epoch >= config.epochs]
    if not late:
        return []
    return [f"the learning rate will not decay after epoch {_listed(late)}: the run ends after epoch {config.epochs}"]


def _listed(epochs: Iterable[int]) -> str:
    return ", ".join(map(str, epochs))

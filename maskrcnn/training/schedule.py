"""Learning-rate schedules as functions of the optimizer step."""

from __future__ import annotations

import math
from collections.abc import Iterable

from maskrcnn.config import TrainConfig


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

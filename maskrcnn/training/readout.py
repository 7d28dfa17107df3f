"""Figures of a step, read without making the device wait."""

from __future__ import annotations

from collections import deque
from typing import Any

import torch
from torch import Tensor

MOST_PENDING = 8  # steps that may be under way on the device before the host waits for the oldest


class Readout:
    """Hands out the figures of earlier steps once the device has computed them.

    On a GPU a step's figures are copied to the host asynchronously, and come out some steps later. On a CPU they
    come out at once.
    """

    def __init__(self) -> None:
        self._pending: deque[tuple[Any, list[str], Tensor, torch.cuda.Event | None]] = deque()

    def push(self, tag: Any, figures: dict[str, Tensor]) -> None:
        """Takes the scalars of a step; `tag` comes back with their values."""
        values = torch.stack([value.detach().float() for value in figures.values()])
        event = None
        if values.device.type == "cuda":
            host = torch.empty(values.shape, pin_memory=True)
            host.copy_(values, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
            values = host
        self._pending.append((tag, list(figures), values, event))

    def pop(self, *, wait: bool = False) -> list[tuple[Any, dict[str, float]]]:
        """Tags and figures of the steps that are done, in order; with `wait` of all steps pushed."""
        done = []
        while self._pending:
            tag, names, values, event = self._pending[0]
            if event is not None and not event.query():
                if not wait and len(self._pending) <= MOST_PENDING:
                    break
                event.synchronize()
            self._pending.popleft()
            done.append((tag, dict(zip(names, values.tolist(), strict=True))))
        return done

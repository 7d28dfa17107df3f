"""Progress of `maskrcnn train`."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

_SECONDS_BETWEEN_LINES = 20.0  # if the output is not a terminal


class EpochProgress:
    """Training progress on standard error: a bar on a terminal, plain lines elsewhere.

    Implements `maskrcnn.training.trainer.TrainingProgress`.

    Args:
        quiet: print nothing.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        self._console = Console(file=sys.stderr, highlight=False, markup=False, emoji=False, quiet=quiet)
        self._bar: Progress | None = None

    def __enter__(self) -> EpochProgress:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()

    def start(self, total_images: int, done_images: int) -> None:
        """Shows the bar and starts the clock."""
        self._total, self._done = total_images, done_images
        self._started, self._at_start = time.perf_counter(), done_images
        self._last_line = self._started
        if self._console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[numbers]}", markup=False),
                TimeRemainingColumn(),
                console=self._console,
            )
            self._task = self._bar.add_task("training", total=total_images, completed=done_images, numbers="")
            self._bar.start()

    def step(self, images: int, *, epoch: int, loss: float) -> None:
        """Shows epoch, loss, images/s and the remaining time."""
        self._done += images
        rate = (self._done - self._at_start) / max(time.perf_counter() - self._started, 1e-9)
        numbers = f"epoch {epoch}  loss {loss:.3f}  {rate:.1f} images/s"
        shown = min(self._done, self._total)  # the last batch of an epoch may be filled up with images of the first
        if self._bar is not None:
            self._bar.update(self._task, completed=shown, numbers=numbers)
        elif time.perf_counter() - self._last_line > _SECONDS_BETWEEN_LINES:
            self._last_line = time.perf_counter()
            left = (self._total - shown) / max(rate, 1e-9)
            self.message(f"{numbers}  {shown}/{self._total} images  {left:.0f} s left")

    def epoch(self, metrics: dict[str, Any]) -> None:
        """Prints the metrics on one line."""
        self.message("  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in metrics.items()))

    def message(self, text: str) -> None:
        """Prints a permanent line."""
        self._console.print(text, soft_wrap=True)

"""The phases of TensorRT's builder as nested bars."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


class EngineProgress:
    """Bars for the phases that are under way, below a line that says what is being done.

    TensorRT calls from threads of its own. Where the console is no terminal, each new line is printed once.
    """

    def __init__(self, console: Console) -> None:
        columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        self._bars = Progress(
            *columns, TimeElapsedColumn(), console=console, transient=True, disable=not console.is_terminal
        )
        self._console = console
        self._lock = threading.Lock()
        self._phases: dict[str, tuple[TaskID, int]] = {}  # their tasks, and how deep they are
        self._line = self._bars.add_task("", total=None, visible=False)

    def __enter__(self) -> EngineProgress:
        self._bars.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._bars.stop()

    def tell(self, what: str) -> None:
        """What is being done."""
        self._bars.update(self._line, description=what, visible=True)
        if not self._console.is_terminal:
            self._console.print(what, markup=False)

    def started(self, phase: str, parent: str | None, steps: int) -> None:
        """A phase of so many steps begins."""
        with self._lock:
            depth = self._phases[parent][1] + 1 if parent in self._phases else 0
            self._phases[phase] = self._bars.add_task(f"{'  ' * depth}{phase}", total=steps), depth

    def completed(self, phase: str, step: int) -> None:
        """A step is done, counted from 0."""
        with self._lock:
            if phase in self._phases:
                self._bars.update(self._phases[phase][0], completed=step + 1)

    def finished(self, phase: str) -> None:
        """A phase ends."""
        with self._lock:
            if phase in self._phases:
                self._bars.remove_task(self._phases.pop(phase)[0])


# What a user sees while training: a progress bar on a terminal, plain lines elsewhere.

_SECONDS_BETWEEN_LINES = 20.0  # where there is no terminal


class _EpochProgress:
    """Counts images of the whole run and shows loss, images/s and the time that is left."""

    def __init__(self, total_images: int, done_images: int, console: Console) -> None:
        self.console = console
        self.total, self.done = total_images, done_images
        self.started, self.at_start = time.perf_counter(), done_images
        self.last_line = self.started
        self.bar: Progress | None = None
        if console.is_terminal:
            self.bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[numbers]}"),
                TimeRemainingColumn(),
                console=console,
            )
            self.task = self.bar.add_task("training", total=total_images, completed=done_images, numbers="")

    def rate(self) -> float:
        """Images per second since this process began training."""
        return (self.done - self.at_start) / max(time.perf_counter() - self.started, 1e-9)

    def advance(self, images: int, *, epoch: int, loss: float) -> None:
        """Records a batch."""
        self.done += images
        numbers = f"epoch {epoch}  loss {loss:.3f}  {self.rate():.1f} images/s"
        if self.bar is not None:
            self.bar.update(self.task, completed=self.done, numbers=numbers)
        elif time.perf_counter() - self.last_line > _SECONDS_BETWEEN_LINES:
            self.last_line = time.perf_counter()
            left = (self.total - self.done) / max(self.rate(), 1e-9)
            self.console.print(f"{numbers}  {self.done}/{self.total} images  {left:.0f} s left", soft_wrap=True)

    def say(self, text: str) -> None:
        """Prints a line that stays."""
        self.console.print(text, soft_wrap=True)


@contextmanager
def epoch_progress(total_images: int, done_images: int, *, shown: bool = True) -> Iterator[_EpochProgress]:
    """A progress display for the time of the context; one that is not shown says nothing."""
    console = Console(file=sys.stderr, highlight=False, quiet=not shown)
    progress = _EpochProgress(total_images, done_images, console)
    if progress.bar is None:
        yield progress
        return
    with progress.bar:
        yield progress


def table_line(values: dict[str, Any]) -> str:
    """Figures of an epoch on one line."""
    return "  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in values.items())

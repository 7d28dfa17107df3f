"""The console of the command line, and its progress display."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console

from maskrcnn.api.progress import Progress

if TYPE_CHECKING:
    from rich.progress import Progress as Bars

    from maskrcnn.training.trainer import TrainingProgress

# Rich reads NO_COLOR itself. `maskrcnn --quiet` sets `console.quiet`. Brackets and colons in names are not markup.
console = Console(highlight=False, soft_wrap=True, markup=False, emoji=False)
verbosity = {"verbose": False}  # set by `maskrcnn --verbose`


def show(text: object) -> None:
    """Prints plain text."""
    console.print(str(text))


class ConsoleProgress(Progress):
    """Prints messages; on a terminal, shows a progress bar for each open task."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # TensorRT's builder reports from its own threads
        self._bars: Bars | None = None
        self._open = 0

    def message(self, text: str) -> None:
        show(text)

    def detail(self, text: str) -> None:
        if verbosity["verbose"]:
            show(text)

    @contextmanager
    def task(self, title: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
        bars = self._acquire()
        task, left = bars.add_task(title, total=total), math.inf if total is None else total

        def advance(steps: int) -> None:
            nonlocal left
            steps = int(min(steps, left))  # beyond 100 %, the bar would show a negative time
            left -= steps
            bars.advance(task, steps)

        try:
            yield advance
        finally:
            bars.remove_task(task)
            self._release()

    def _acquire(self) -> Bars:
        """Returns the progress display that all open tasks share: a terminal can have only one."""
        from rich.progress import (
            BarColumn,
            ProgressColumn,
            SpinnerColumn,
            Task,
            TaskProgressColumn,
            TextColumn,
            TimeRemainingColumn,
        )
        from rich.progress import Progress as Bars
        from rich.text import Text

        class Rate(ProgressColumn):
            """Steps per second."""

            def render(self, task: Task) -> Text:
                return Text(f"{task.speed:.1f}/s" if task.speed else "")

        with self._lock:
            if self._bars is None:
                rate = Rate()
                title = TextColumn("{task.description}", markup=False)
                columns = (SpinnerColumn(), title, BarColumn(), TaskProgressColumn(), rate)
                is_hidden = not console.is_terminal
                self._bars = Bars(*columns, TimeRemainingColumn(), console=console, transient=True, disable=is_hidden)
                self._bars.start()
            self._open += 1
            return self._bars

    def _release(self) -> None:
        with self._lock:
            self._open -= 1
            if self._open == 0 and self._bars is not None:
                self._bars.stop()
                self._bars = None

    @contextmanager
    def training(self) -> Iterator[TrainingProgress | None]:
        from maskrcnn.cli.progress import EpochProgress

        with EpochProgress(quiet=console.quiet) as epochs:
            yield epochs

"""The phases of TensorRT's builder as nested bars."""

from __future__ import annotations

import threading
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn


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

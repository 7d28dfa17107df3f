"""The console of the command line, and the progress that it shows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console

from maskrcnn.api.progress import Progress

if TYPE_CHECKING:
    from maskrcnn.training.trainer import TrainingProgress

# Rich reads NO_COLOR itself. `maskrcnn --quiet` sets `console.quiet`.
console = Console(highlight=False, soft_wrap=True)


def show(text: object) -> None:
    """Prints plain text: brackets in file names are no markup."""
    console.print(str(text), markup=False)


class ConsoleProgress(Progress):
    """Prints messages; shows a bar, or a spinner if the number of steps is unknown, on a terminal."""

    def message(self, text: str) -> None:
        show(text)

    @contextmanager
    def task(self, title: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
        from rich.markup import escape
        from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bars

        columns = [SpinnerColumn(), TextColumn("{task.description}")]
        if total is not None:
            columns += [BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()]
        with Bars(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
            task = bars.add_task(escape(title), total=total)
            yield lambda steps: bars.advance(task, steps)

    @contextmanager
    def training(self) -> Iterator[TrainingProgress | None]:
        from maskrcnn.cli.progress import EpochProgress

        with EpochProgress(quiet=console.quiet) as epochs:
            yield epochs

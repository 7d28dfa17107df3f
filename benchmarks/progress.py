"""Progress of a long command: a live line on a terminal, plain lines elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar


class Progress:
    """Says what is being done.

    Args:
        console: where to.
    """

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(highlight=False, soft_wrap=True)

    def say(self, text: str) -> None:
        """One lasting line."""
        self.console.print(text, markup=False)

    @contextmanager
    def steps(self, title: str, total: int) -> Iterator[Stepper]:
        """A bar of `total` steps on a terminal, one line elsewhere."""
        if not self.console.is_terminal:
            self.say(title)
            yield Stepper(None)
            return
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Bar(*columns, console=self.console, transient=True) as bar:
            bar.add_task(title, total=total)
            yield Stepper(bar)


class Stepper:
    """What the body of `Progress.steps` advances."""

    def __init__(self, bar: Bar | None) -> None:
        self._bar = bar

    def advance(self, count: int = 1) -> None:
        """So many steps are done."""
        if self._bar is not None:
            self._bar.advance(self._bar.task_ids[0], count)

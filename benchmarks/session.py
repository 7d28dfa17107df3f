"""Kinds of values on the benchmarks' command lines."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar

from maskrcnn.files import write_json


def count(text: str) -> int:
    """A number of things, 1 or more."""
    found = int(text)
    if found < 1:
        raise argparse.ArgumentTypeError(f"{text}: 1 or more")
    return found


def numbers(text: str) -> tuple[int, ...]:
    """Batch sizes, as 1,4."""
    found = tuple(int(part) for part in text.split(","))
    if min(found) < 1:
        raise argparse.ArgumentTypeError(f"{text}: batch sizes are 1 or more")
    return found


def size_hw(text: str) -> tuple[int, int]:
    """Height and width of images, as 800x1088."""
    height, width = (int(part) for part in text.lower().replace("×", "x").split("x"))
    if height % 32 or width % 32 or min(height, width) < 64:
        raise argparse.ArgumentTypeError(f"{text}: sides are multiples of 32, at least 64")
    return height, width


def sizes_hw(text: str) -> list[tuple[int, int]]:
    """Several sizes, as 800x1088,800x1344."""
    return [size_hw(part) for part in text.split(",")]


# Progress of a long command: a live line on a terminal, plain lines elsewhere.


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
    def steps(self, title: str, total: int) -> Iterator[_Stepper]:
        """A bar of `total` steps on a terminal, one line elsewhere."""
        if not self.console.is_terminal:
            self.say(title)
            yield _Stepper(None)
            return
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Bar(*columns, console=self.console, transient=True) as bar:
            bar.add_task(title, total=total)
            yield _Stepper(bar)


class _Stepper:
    """What the body of `Progress.steps` advances."""

    def __init__(self, bar: Bar | None) -> None:
        self._bar = bar

    def advance(self, count: int = 1) -> None:
        """So many steps are done."""
        if self._bar is not None:
            self._bar.advance(self._bar.task_ids[0], count)


# What a benchmark has measured so far, kept on disk until it is finished: a broken run goes on where it stopped.

FILE = "unfinished.json"


class Unfinished:
    """Results by section and name.

    Args:
        path: the file; None keeps nothing.
        key: everything that the results depend on. What was kept for another key is of no use and is dropped.
    """

    def __init__(self, path: Path | None, key: dict[str, Any]) -> None:
        self._path = path
        self._key = json.loads(json.dumps(key))
        self._sections: dict[str, dict[str, Any]] = {}
        self.found = 0  # results of the broken run
        if path is not None and path.is_file():
            self._take(path)

    def _take(self, path: Path) -> None:
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            fits = content["key"] == self._key
        except (ValueError, KeyError, TypeError):  # not written by this class: a file of another version
            fits = False
        if fits:
            self._sections = content["sections"]
            self.found = sum(len(section) for section in self._sections.values())

    def get(self, section: str, name: str, make: Callable[[], Any]) -> Any:
        """What was kept under a name, or what `make` gives, which is kept then; it must be JSON's kind of value.

        An exception of `make` passes, and nothing is kept.
        """
        kept = self._sections.setdefault(section, {})
        if name not in kept:
            kept[name] = make()
            if self._path is not None:
                write_json(self._path, {"key": self._key, "sections": self._sections})
        return kept[name]

    def finish(self) -> None:
        """All is measured: removes the file."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)

"""Parts of the benchmarks' command lines: option types, progress, tables, and results kept of an interrupted run."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar

from maskrcnn.errors import UserError, reason_of
from maskrcnn.files import write_json


def count(text: str) -> int:
    """A positive integer."""
    found = int(text)
    if found < 1:
        raise argparse.ArgumentTypeError(f"{text}: expected at least 1")
    return found


def numbers(text: str) -> tuple[int, ...]:
    """Positive integers, such as 1,4."""
    found = tuple(int(part) for part in text.split(","))
    if min(found) < 1:
        raise argparse.ArgumentTypeError(f"{text}: expected integers of at least 1")
    return found


def size_hw(text: str) -> tuple[int, int]:
    """Height and width of images in pixels, such as 800x1088."""
    height, width = (int(part) for part in text.lower().replace("×", "x").split("x"))
    if height % 32 or width % 32 or min(height, width) < 64:
        raise argparse.ArgumentTypeError(f"{text}: expected multiples of 32, at least 64")
    return height, width


def sizes_hw(text: str) -> list[tuple[int, int]]:
    """Several sizes, such as 800x1088,800x1344."""
    return [size_hw(part) for part in text.split(",")]


def one_line(error: Exception | str) -> str:
    """Format an error in one line; of a `UserError` what was found and how to fix it."""
    if isinstance(error, UserError):
        return " ".join(f"{error.found}; {error.fix}".split())
    name = "" if isinstance(error, str) else f"{type(error).__name__}: "
    return name + reason_of(error)


def aligned(head: list[str], rows: Sequence[list[str]]) -> str:
    """Format a Markdown table with aligned columns; the last, whose texts are long, is not padded."""
    widths = [max(len(line[k]) for line in (head, *rows)) for k in range(len(head))]
    widths[-1] = len(head[-1])
    lines = [head, ["-" * width for width in widths], *rows]
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    )


def number(name: str, form: str) -> Callable[[Any], str]:
    """Return a formatter of a row's field; None becomes an empty cell."""

    def show(row: Any) -> str:
        value = getattr(row, name)
        return "" if value is None else format(value, form)

    return show


class Progress:
    """Progress of a long command: a progress bar on a terminal, plain lines elsewhere."""

    def __init__(self) -> None:
        self.console = Console(highlight=False, soft_wrap=True, markup=False, emoji=False)

    def say(self, text: str) -> None:
        """Print a line."""
        self.console.print(text)

    @contextmanager
    def steps(self, title: str, total: int) -> Iterator[_Stepper]:
        """Show a bar of `total` steps on a terminal, or print the title."""
        if not self.console.is_terminal:
            self.say(title)
            yield _Stepper(None)
            return
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
        )
        with Bar(*columns, console=self.console, transient=True) as bar:
            bar.add_task(title, total=total)
            yield _Stepper(bar)


class _Stepper:
    """The bar of `Progress.steps`; None without a terminal."""

    def __init__(self, bar: Bar | None) -> None:
        self._bar = bar

    def advance(self, count: int = 1) -> None:
        """Count finished steps."""
        if self._bar is not None:
            self._bar.advance(self._bar.task_ids[0], count)


class Unfinished:
    """Results by section and name, kept in a file until the benchmark has finished, so that it can be resumed.

    Args:
        path: JSON file; None keeps the results in memory only.
        key: everything the results depend on. Results kept under another key are discarded.
    """

    def __init__(self, path: Path | None, key: dict[str, Any]) -> None:
        self._path = path
        self._key = json.loads(json.dumps(key))
        self._sections: dict[str, dict[str, Any]] = {}
        self.found = 0  # results of the interrupted run
        if path is None or not path.is_file():
            return
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content["key"] == self._key:
                self._sections = content["sections"]
                self.found = sum(len(section) for section in self._sections.values())
        except (ValueError, KeyError, TypeError):  # written by another version
            return

    def get(self, section: str, name: str, make: Callable[[], Any]) -> Any:
        """Return the kept value, or the JSON-compatible value of `make`, which is then kept unless it raises."""
        kept = self._sections.setdefault(section, {})
        if name not in kept:
            kept[name] = make()
            if self._path is not None:
                write_json(self._path, {"key": self._key, "sections": self._sections})
        return kept[name]

    def finish(self) -> None:
        """Remove the file."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)

"""Faults of single entries: the first stops a conversion, or all are counted and their entries left out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from maskrcnn.errors import UserError

Item = TypeVar("Item")
Made = TypeVar("Made")


class BadEntry(UserError):
    """One image or object that cannot be converted.

    Args:
        reason: the same for all of its kind.
        came: what was found, naming the file and the line or object.
        expected: what would have been right.
        do: what the user can do about it.
    """

    def __init__(self, reason: str, came: str, expected: str, do: str) -> None:
        self.reason = reason
        super().__init__(came, expected, do)

    def __reduce__(self) -> tuple:
        return type(self), (self.reason, self.came, self.expected, self.do)


class Faults:
    """What a conversion met that it could not, or was not meant to, convert.

    Args:
        keep_going: count faults and go on; otherwise the first one is raised.
    """

    def __init__(self, *, keep_going: bool = False) -> None:
        self.keep_going = keep_going
        self.skipped: Counter[str] = Counter()
        self.left_out: Counter[str] = Counter()
        self._examples: dict[str, str] = {}

    def meet(self, fault: BadEntry) -> None:
        """Raises the fault, or counts it."""
        if not self.keep_going:
            raise fault
        self.skipped[fault.reason] += 1
        self._examples.setdefault(fault.reason, fault.came)

    def leave_out(self, reason: str, example: str) -> None:
        """Counts what the format or an option says is not to be converted; that is no fault."""
        self.left_out[reason] += 1
        self._examples.setdefault(reason, example)

    def usable(self, items: Iterable[Item], make: Callable[[int, Item], Made | None]) -> Iterator[Made]:
        """`make(index, item)` of each item, without those that are None or at fault."""
        for index, item in enumerate(items):
            try:
                made = make(index, item)
            except BadEntry as fault:
                self.meet(fault)
                continue
            if made is not None:
                yield made

    def lines(self) -> list[str]:
        """A line for each reason, with the first example."""
        counted = (("skipped", self.skipped), ("left out", self.left_out))
        return [
            f"{verb} {count}: {reason}, first: {self._examples[reason]}"
            for verb, counts in counted
            for reason, count in sorted(counts.items())
        ]

"""The one error that a user is meant to read."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager


class UserError(Exception):
    """Something outside the program is not as it must be: a file, a flag, a missing library.

    Args:
        came: what was found, naming the file, line or object.
        expected: what would have been right.
        do: what the user can do about it, a command where there is one.
    """

    def __init__(self, came: str, expected: str, do: str) -> None:
        self.came, self.expected, self.do = came, expected, do
        super().__init__(f"came: {came}\nexpected: {expected}\ndo: {do}")

    def __reduce__(self) -> tuple:
        """So that it survives the way between processes."""
        return type(self), (self.came, self.expected, self.do)


def missing_library(name: str, enables: str, install: str) -> UserError:
    """The error for a backend whose library is not installed."""
    return UserError(f"no Python package {name}", f"{name}, to {enables}", f"`{install}`; see `maskrcnn doctor`")


@contextmanager
def told_to_the_user() -> Iterator[None]:
    """A `UserError` inside this context ends the program: its text on standard error, exit code 1."""
    try:
        yield
    except UserError as error:
        print(f"error\n{error}", file=sys.stderr)
        sys.exit(1)

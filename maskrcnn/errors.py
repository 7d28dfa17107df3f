"""The one error that a user is meant to read."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class UserError(Exception):
    """Something outside the program is not as it must be: a file, a flag, a missing library.

    Args:
        found: what was found, naming the file, line or object.
        expected: what would have been right.
        fix: what the user can do about it, a command where there is one.
    """

    def __init__(self, found: str, expected: str, fix: str) -> None:
        self.found, self.expected, self.fix = found, expected, fix
        super().__init__(f"{found}\n  expected: {expected}\n  fix:      {fix}")

    def __reduce__(self) -> tuple:
        """So that it survives the way between processes."""
        return type(self), (self.found, self.expected, self.fix)


def missing_library(name: str, enables: str, install: str) -> UserError:
    """The error for a backend whose library is not installed."""
    return UserError(f"no Python package {name}", f"{name}, to {enables}", f"`{install}`; see `maskrcnn doctor`")


@contextmanager
def exit_on_user_error(before_exit: Callable[[], None] = lambda: None) -> Iterator[None]:
    """A `UserError` inside this context is printed to standard error, and ends the program with exit code 1.

    Args:
        before_exit: called before the error is printed, while it is handled.
    """
    try:
        yield
    except UserError as error:
        before_exit()
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(1)

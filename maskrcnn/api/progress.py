"""Progress of a long call, reported to its caller."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from maskrcnn.training.trainer import TrainingProgress


class Progress:
    """Receives the messages and the progress of a function of `maskrcnn.api`; this base class ignores them.

    Subclass it to display them: the command line prints messages and draws bars, a notebook may collect them.
    """

    def message(self, text: str) -> None:
        """Receives one line of plain text for the user."""

    def detail(self, text: str) -> None:
        """Receives details for diagnosis, which the command line prints with --verbose."""

    @contextmanager
    def task(self, title: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
        """Context of a long-running task.

        Args:
            title: description, such as "exporting model.safetensors".
            total: number of steps; None if unknown.

        Yields:
            a function that is called with the number of steps completed since the last call.
        """
        yield lambda steps: None

    @contextmanager
    def training(self) -> Iterator[TrainingProgress | None]:
        """Context of a training; yields the receiver of its steps and epochs, or None."""
        yield None

"""What a benchmark has measured so far, kept on disk until it is finished: a broken run goes on where it stopped."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from maskrcnn.files import write_json

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

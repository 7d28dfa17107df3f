"""A file of detections that grows image by image, so that an evaluation can be interrupted and shared.

The first line says what was detected with and on; each further line holds one image. A line counts once it is whole,
so whatever an interruption leaves of the last one is dropped. Several processes each write a part of their own beside
the file, `name.1.jsonl`, `name.2.jsonl` …; what counts is what all parts hold together.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import Any

from maskrcnn.errors import UserError
from maskrcnn.files import make_folder
from maskrcnn.runtime.evaluation.detecting import Seconds

_KEY, _VERSION = "maskrcnn_detections", 1


@dataclass(frozen=True)
class Origin:
    """What detections were made with and on: two that differ in any field are not mixed."""

    model: str  # SHA-256 of the file
    backend: str
    annotations: str  # SHA-256 of the file
    batch_size: int  # images of mixed sizes are padded to the largest of a batch, which changes them a little


@dataclass(frozen=True)
class ImageDetections:
    """What a log holds of one image."""

    results: list[dict[str, Any]]  # COCO's format
    seconds: Seconds


class DetectionsLog:
    """A log with all its parts.

    Args:
        path: of the first process's part; the others lie beside it.
        origin: of the detections.
        names: of the origin's files, for messages.
    """

    def __init__(self, path: Path, origin: Origin, names: Mapping[str, str] | None = None) -> None:
        self.path, self.origin, self.names = path, origin, dict(names or {})
        self._counted: dict[Path, tuple[int, int]] = {}  # bytes and lines of each part

    def read(self) -> dict[int, ImageDetections]:
        """What all parts hold, by image id.

        Raises:
            UserError: for detections of another origin, and for a file that is something else.
        """
        found: dict[int, ImageDetections] = {}
        for part in self.parts():
            found |= self._read_part(part)[0]
        return found

    def parts(self) -> list[Path]:
        """The files there are: of the first process and of the others."""
        others = self.path.parent.glob(f"{_escaped(self.path.stem)}.*{_escaped(self.path.suffix)}")
        numbered = [path for path in others if path.name[len(self.path.stem) + 1 :].partition(".")[0].isdigit()]
        return [*([self.path] if self.path.exists() else []), *sorted(numbered)]

    def part(self, rank: int) -> Path:
        """The file of a process."""
        return self.path.with_name(f"{self.path.stem}.{rank}{self.path.suffix}") if rank else self.path

    def images(self) -> int:
        """About how many images there are: lines, counted from where the last count ended."""
        parts = self.parts()
        for part in parts:
            size, lines = self._counted.get(part, (0, -1))  # the first line is no image
            if part.stat().st_size < size:
                size, lines = 0, -1
            with open(part, "rb") as file:
                file.seek(size)
                added = file.read()
            self._counted[part] = size + len(added), lines + added.count(b"\n")
        return sum(max(0, self._counted[part][1]) for part in parts)

    def facts(self) -> dict[str, Any]:
        """What the writers said of the model; nothing before any has begun."""
        for part in self.parts():
            with open(part, "rb") as file:
                header = _entry(file.readline())
            if header is not None:
                return header["facts"]
        return {}

    def writer(self, rank: int = 0, facts: Mapping[str, Any] | None = None) -> LogWriter:
        """Goes on with the part of a process, behind its last whole line.

        Args:
            rank: of the process.
            facts: about the model, for `facts`; they may differ.

        Raises:
            UserError: see `read`.
        """
        part = self.part(rank)
        make_folder(part.parent)
        end = self._read_part(part)[1] if part.exists() else 0
        header = {_KEY: _VERSION, "origin": asdict(self.origin), "names": self.names, "facts": dict(facts or {})}
        return LogWriter(part, end, header)

    def _read_part(self, part: Path) -> tuple[dict[int, ImageDetections], int]:
        """The images of a part, and where its last whole line ends."""
        found: dict[int, ImageDetections] = {}
        end = 0
        for number, line in enumerate(part.read_bytes().splitlines(keepends=True)):
            entry = _entry(line)
            if number == 0 and not _is_torn_header(line):
                self._check_header(part, entry)
            if entry is None:
                break
            if number:
                try:
                    found[entry["image_id"]] = ImageDetections(entry["results"], Seconds(*entry["seconds"]))
                except (KeyError, TypeError) as error:
                    raise _no_log(part, f"line {number + 1} is no image with its results") from error
            end += len(line)
        return found, end

    def _check_header(self, part: Path, header: Any) -> None:
        if not isinstance(header, dict) or header.get(_KEY) != _VERSION:
            raise _no_log(part, "not a log of detections")
        for field, mine in asdict(self.origin).items():
            theirs = header["origin"].get(field)
            if theirs != mine:
                word = field.replace("_", " ")
                raise UserError(
                    f"{part}: detections of another {word}: {_named(header['names'].get(field), theirs)}",
                    f"{word} {_named(self.names.get(field), mine)}",
                    "name another file for --resume, or delete this one to begin anew",
                )


class LogWriter:
    """Adds images to one part of a log; see `DetectionsLog.writer`."""

    def __init__(self, path: Path, end: int, header: dict[str, Any]) -> None:
        self.path = path
        with open(path, "ab") as file:
            file.truncate(end)
            if end == 0:
                file.write(_line(header))

    def add(self, image_ids: Sequence[int], results: Sequence[list[dict[str, Any]]], seconds: Seconds) -> None:
        """The results of the images of one batch, and the time that the batch took."""
        share = astuple(seconds.shared(len(image_ids)))
        lines = [
            _line({"image_id": image_id, "results": own, "seconds": share})
            for image_id, own in zip(image_ids, results, strict=True)
        ]
        with open(self.path, "ab") as file:
            file.write(b"".join(lines))
            file.flush()
            os.fsync(file.fileno())


def _no_log(part: Path, what: str) -> UserError:
    return UserError(f"{part}: {what}", "a file that --resume wrote, or a new name", "name another file for --resume")


def _is_torn_header(line: bytes) -> bool:
    """Whether this first line is ours, interrupted while it was written."""
    begin = _line({_KEY: _VERSION})[:-2]  # without the closing brace and the line's end
    return not line.endswith(b"\n") and (line.startswith(begin) or begin.startswith(line))


def _line(value: Any) -> bytes:
    return json.dumps(value).encode() + b"\n"


def _entry(line: bytes) -> Any:
    """The content of a line, None where it is not whole."""
    if not line.endswith(b"\n"):
        return None
    try:
        return json.loads(line)
    except ValueError:
        return None


def _named(name: str | None, value: Any) -> str:
    """A file by its name and the beginning of its hash, anything else as it is."""
    return f"{name} (sha256 {str(value)[:12]}…)" if name else str(value)


def _escaped(text: str) -> str:
    """Text that a glob pattern takes literally."""
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in text)

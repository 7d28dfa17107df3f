"""Files that appear whole or not at all."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from maskrcnn.errors import UserError


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """A temporary path beside `path`, which takes its place when the block ends without an exception.

    The temporary name is hidden and keeps the suffix, because some writers choose the format by it. Missing
    parent folders are made. On any exception the temporary file is removed and `path` stays as it was.

    Raises:
        UserError: where the folder cannot be made.
        RuntimeError: where the block ended without writing the temporary file.
    """
    path = Path(path)
    make_folder(path.parent)
    temporary = path.with_name(f".{path.stem}.{secrets.token_hex(4)}{path.suffix}")
    try:
        yield temporary
        if not temporary.is_file():
            raise RuntimeError(f"nothing was written to {temporary}, which was to become {path}")
        _flush(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    if os.name == "posix":  # the new name is durable only once its folder is; Windows cannot open folders
        _flush(path.parent)


def write_json(path: str | Path, obj: Any, *, indent: int | None = 2) -> None:
    """Writes `obj` to `path` as JSON in UTF-8, whole or not at all; the same object gives the same bytes.

    Raises:
        ValueError: for NaN and infinity, which JSON does not have.
        TypeError: for objects that JSON cannot hold.
    """
    text = json.dumps(obj, indent=indent, ensure_ascii=False, allow_nan=False)
    with atomic_path(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8", newline="\n")


def make_folder(path: Path) -> None:
    """Makes a folder and its parents where they do not exist.

    Raises:
        UserError: where that is not possible.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"folder {path} cannot be made ({error.strerror or error})",
            "a folder that can be written",
            "name another output folder, or change the permissions of this one",
        ) from error


def _flush(path: Path) -> None:
    """Waits until the file or folder is on the disk."""
    # Windows flushes only descriptors that may write.
    descriptor = os.open(path, os.O_RDWR if path.is_file() else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

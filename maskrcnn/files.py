"""JSON files, and files that are written whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import secrets
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from maskrcnn.errors import UserError

_OF_THE_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG}  # whichever file was written


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """A temporary path beside `path`, which takes its place when the block ends without an exception.

    The temporary name is hidden and keeps the suffix, because some writers choose the format by it. Missing
    parent folders are made. On any exception the temporary file is removed and `path` stays as it was.

    Raises:
        UserError: where no file of that name can be written: a folder has it, the disk is full or not ours.
        RuntimeError: where the block ended without writing the temporary file.
    """
    path = Path(path)
    check_target(path)
    temporary = path.with_name(f".{path.stem}.{secrets.token_hex(4)}{path.suffix}")
    with _disk_errors(path, temporary):
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


@contextmanager
def folder_beside(path: str | Path, *, prefix: str) -> Iterator[Path]:
    """An empty folder next to `path`, on the same disk, which is gone when the block ends.

    Raises:
        UserError: where no file named `path` could be written, see `check_target`, and when the disk is full.
    """
    path = Path(path)
    check_target(path)
    with _disk_errors(path), tempfile.TemporaryDirectory(dir=path.parent, prefix=prefix) as name:
        yield Path(name)


def check_target(path: str | Path) -> None:
    """That a file of this name can be written, before the work that makes it. Missing parent folders are made.

    Raises:
        UserError: where it is a folder, or its folder cannot be made or written.
    """
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{path}: a folder", "the name of a file", f"name a file, such as {path / 'NAME'}")
    make_folder(path.parent)
    if not os.access(path.parent, os.W_OK):
        raise UserError(
            f"folder {path.parent} cannot be written",
            "a folder that can be written",
            "name another output, or change the permissions of this one",
        )


def write_json(path: str | Path, obj: Any, *, indent: int | None = 2) -> None:
    """Writes `obj` to `path` as JSON in UTF-8, whole or not at all; the same object gives the same bytes.

    Raises:
        ValueError: for NaN and infinity, which JSON does not have.
        TypeError: for objects that JSON cannot hold.
    """
    text = json.dumps(obj, indent=indent, ensure_ascii=False, allow_nan=False)
    with atomic_path(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8", newline="\n")


def read_json(path: str | Path, what: str) -> Any:
    """Reads a JSON file in UTF-8, with or without a byte order mark.

    Args:
        path: file to read.
        what: what the file should be ("an annotation file in COCO's format"), for the error text.

    Raises:
        UserError: where the file cannot be read or is not JSON; names the file, and the line of a syntax error.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error})", what, "check the path") from error
    return parse_json(data, str(path), what)


def parse_json(data: bytes, name: str, what: str) -> Any:
    """Parses JSON text in UTF-8; `name` stands for the file in errors, see `read_json`."""
    fix = "restore the file, or name another one"
    try:
        return json.loads(data)
    except json.JSONDecodeError as error:
        found = f"{name}, line {error.lineno}, column {error.colno}: not JSON ({error.msg})"
        raise UserError(found, what, fix) from error
    except (ValueError, RecursionError) as error:  # wrong encoding; nested too deeply
        raise UserError(f"{name}: not JSON ({error})", what, fix) from error


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


def report_path(path: Path) -> Path:
    """Where an HTML page goes: a file, or `report.html` in what does not end like one."""
    return path if path.suffix.lower() in (".html", ".htm") else path / "report.html"


@contextmanager
def _disk_errors(*paths: Path) -> Iterator[None]:
    """What the system says of writing to `paths`, of which the first is named, in words."""
    try:
        yield
    except OSError as error:
        if error.errno not in _OF_THE_DISK and error.filename not in map(str, paths):
            raise  # of another file
        raise UserError(
            f"{paths[0]} cannot be written ({error.strerror or error})",
            "room and permission to write there",
            "make room, or name another output",
        ) from error


def _flush(path: Path) -> None:
    """Waits until the file or folder is on the disk."""
    # Windows flushes only descriptors that may write.
    descriptor = os.open(path, os.O_RDWR if path.is_file() else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

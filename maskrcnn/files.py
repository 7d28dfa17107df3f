"""JSON files, atomic writing of files, and the cache folder."""

from __future__ import annotations

import errno
import json
import os
import secrets
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from maskrcnn.errors import UserError

_OF_THE_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG}  # of any file


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Temporary path beside `path` that replaces it if the block ends without an exception.

    The temporary name is hidden and keeps the suffix, by which some writers choose the format. Missing parent folders
    are created. On an exception the temporary file is removed and `path` is unchanged.

    Raises:
        UserError: if the file cannot be written: it is a folder, the disk is full or read-only.
        RuntimeError: if the block did not write the temporary file.
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
        if os.name == "posix":  # makes the rename durable; Windows cannot open folders
            _flush(path.parent)


@contextmanager
def folder_beside(path: str | Path, *, prefix: str) -> Iterator[Path]:
    """Empty temporary folder beside `path`, on the same disk.

    Raises:
        UserError: if no file `path` could be written (see `check_target`), or the disk is full.
    """
    path = Path(path)
    check_target(path)
    with _disk_errors(path), tempfile.TemporaryDirectory(dir=path.parent, prefix=prefix) as name:
        yield Path(name)


def check_target(path: str | Path) -> None:
    """Check that a file can be written before the work that produces it; creates missing parent folders.

    Raises:
        UserError: if it is a folder, or its folder cannot be created or written.
    """
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{path}: a folder", "the name of a file", f"name a file, such as {path / 'NAME'}")
    make_folder(path.parent)
    if not os.access(path.parent, os.W_OK):
        raise UserError(
            f"folder {path.parent} cannot be written",
            "a writable folder",
            "name another output, or change the permissions of this one",
        )


def write_json(path: str | Path, obj: Any, *, indent: int | None = 2) -> None:
    """Write `obj` to `path` as JSON in UTF-8, atomically; the same object gives the same bytes.

    Raises:
        ValueError: for NaN and infinity.
        TypeError: for objects that are not JSON-serialisable.
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
    """Create a folder and its parents if missing.

    Raises:
        UserError: if that fails.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"folder {path} cannot be created ({error.strerror or error})",
            "a writable folder",
            "name another output folder, or change the permissions of this one",
        ) from error


def cache_folder() -> Path:
    """Returns the folder of files that can be made again; it may not exist yet.

    It is $MASKRCNN_CACHE, else ~/.cache/maskrcnn, else, for a user whose home folder is missing or cannot be written,
    `maskrcnn-<user id>` in the temporary folder, which only this user may access.

    Raises:
        UserError: if that folder belongs to somebody else.
    """
    if root := os.environ.get("MASKRCNN_CACHE"):
        return Path(root)
    try:
        folder = Path.home() / ".cache" / "maskrcnn"
    except RuntimeError:  # neither HOME nor an entry in the user database
        return _private_temporary_folder()
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    return folder if os.access(existing, os.W_OK) else _private_temporary_folder()


def _private_temporary_folder() -> Path:
    user = os.getuid() if hasattr(os, "getuid") else 0
    folder = Path(tempfile.gettempdir()) / f"maskrcnn-{user}"
    with suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    state = folder.lstat()
    if not stat.S_ISDIR(state.st_mode) or state.st_uid != user or (os.name == "posix" and state.st_mode & 0o077):
        raise UserError(
            f"{folder}, which others may write, instead of a home folder",
            "a writable home folder, or MASKRCNN_CACHE",
            "set MASKRCNN_CACHE to a private folder of this user",
        )
    return folder


def report_path(path: Path) -> Path:
    """Path of an HTML report: the file itself, or `report.html` in a folder."""
    return path if path.suffix.lower() in (".html", ".htm") else path / "report.html"


@contextmanager
def _disk_errors(*paths: Path) -> Iterator[None]:
    """Turns operating system errors about `paths` into a UserError that names the first."""
    try:
        yield
    except OSError as error:
        if error.errno not in _OF_THE_DISK and error.filename not in map(str, paths):
            raise  # about another file
        raise UserError(
            f"{paths[0]} cannot be written ({error.strerror or error})",
            "room and permission to write there",
            "make room, or name another output",
        ) from error


def _flush(path: Path) -> None:
    """Flush a file or folder to the disk."""
    # Windows flushes writable descriptors only.
    descriptor = os.open(path, os.O_RDWR if path.is_file() else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

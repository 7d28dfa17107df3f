"""JSON files, atomic writing of files, rules for overwriting, and the cache folder."""

from __future__ import annotations

import errno
import json
import os
import platform
import re
import secrets
import shutil
import stat
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from maskrcnn.errors import UserError

_HEAD_BYTES = 1024  # bytes at the start of a file that show its kind
_OF_THE_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG}  # of any file


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Temporary path next to `path` that replaces it if the block ends without an exception.

    The temporary name is hidden and keeps the suffix, from which some writers choose the format. Missing parent folders
    are created. On an exception the temporary file is removed and `path` is unchanged.

    A device or pipe, such as /dev/stdout, is written to directly.

    Raises:
        UserError: if the file cannot be written: it is a folder, the disk is full or read-only.
        RuntimeError: if the block did not write the temporary file.
    """
    path = Path(path)
    check_target(path)
    make_folder(path.parent)
    if _is_device(path):
        with tempfile.TemporaryDirectory() as folder, disk_errors(path):
            draft = Path(folder) / f"draft{path.suffix}"
            yield draft
            with open(draft, "rb") as source, open(path, "wb") as target:
                shutil.copyfileobj(source, target)
        return
    temporary = path.with_name(f".{path.stem}.{secrets.token_hex(4)}{path.suffix}")
    with disk_errors(path, temporary):
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
def locked(path: Path, *, found: str, expected: str, fix: str) -> Iterator[bool]:
    """Holds a lock on a file until the block or this process ends; the file exists as long as the lock.

    Args:
        path: created if missing, in an existing folder; contains the process id and the machine.
        found: first part of the error, to which these two are appended.
        expected: second part of the error.
        fix: third part of the error.

    Yields:
        False if the file system has no locks, so that nothing is held.

    Raises:
        UserError: if another process holds the lock, or the file cannot be written.
    """
    while True:
        with disk_errors(path):
            file = open(path, "a+", encoding="utf-8")  # noqa: SIM115 (closed at the end, or here)
        try:
            is_held = _lock(file.fileno())
            if not is_held or os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                break
        except FileNotFoundError:  # the previous holder has just removed it: lock a new file
            pass
        except OSError as error:
            file.seek(0)
            with suppress(OSError):
                found += f" ({file.read().strip()})"
            file.close()
            raise UserError(found, expected, fix) from error
        file.close()
    try:
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}\n")
        file.flush()
        yield is_held
    finally:
        with suppress(OSError):
            path.unlink(missing_ok=True)
        file.close()


def _lock(descriptor: int) -> bool:
    """Locks an open file; False if its file system has no locks.

    Raises:
        OSError: if another process has locked it.
    """
    try:
        if sys.platform == "win32":
            import msvcrt

            os.lseek(descriptor, 1 << 30, os.SEEK_SET)  # a locked byte cannot be read
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # unlike with flock, forked processes do not hold it
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN, errno.EDEADLK):
            raise
        return False
    return True


@contextmanager
def folder_beside(path: str | Path, *, prefix: str) -> Iterator[Path]:
    """Empty temporary folder next to `path`, on the same disk.

    Raises:
        UserError: if `path` could not be written (see `check_target`), or the disk is full.
    """
    path = Path(path)
    check_target(path)
    make_folder(path.parent)
    with disk_errors(path), tempfile.TemporaryDirectory(dir=path.parent, prefix=prefix) as name:
        yield Path(name)


def check_target(path: str | Path) -> None:
    """Check that a file can be written before the work that produces it; creates nothing, as that work may fail.

    Raises:
        UserError: if it is a folder, or its folder cannot be created or written.
    """
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{path}: a folder", "the name of a file", f"add a file name, such as {path / 'NAME'}")
    folder = next(each for each in path.absolute().parents if os.path.lexists(each))
    if not folder.is_dir():
        raise UserError(
            f"folder {path.parent} cannot be created ({folder} is no folder)",
            "a writable folder",
            "choose another output folder",
        )
    if not _is_device(path) and not os.access(folder, os.W_OK):
        raise UserError(
            f"folder {folder} cannot be written",
            "a writable folder",
            "choose another output, or change the permissions of this one",
        )


def write_json(path: str | Path, obj: Any, *, indent: int | None = 2) -> None:
    """Write `obj` to `path` as JSON in UTF-8, atomically; the same object gives the same bytes.

    Bytes of file names that are not UTF-8 (surrogates in Python) become JSON escapes, which `json.loads` reverts.

    Raises:
        ValueError: for NaN and infinity.
        TypeError: for objects that are not JSON-serialisable.
    """
    text = json.dumps(obj, indent=indent, ensure_ascii=False, allow_nan=False)
    with atomic_path(path) as temporary:
        temporary.write_bytes(f"{text}\n".encode("utf-8", "backslashreplace"))


def write_report(path: str | Path, command: str, content: dict[str, Any]) -> None:
    """Write the JSON report of a command, which `report_kind` recognises; see `write_json`."""
    write_json(path, {"written_by": f"maskrcnn {command}", **content})


def read_json(path: str | Path, what: str) -> Any:
    """Reads a JSON file in UTF-8, with or without a byte order mark.

    Args:
        path: file to read.
        what: what the file should be ("an annotation file in COCO's format"), for the error text.

    Raises:
        UserError: if the file cannot be read or is not JSON; the message has the file, and the line of a syntax error.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error})", what, "check the path") from error
    return parse_json(data, str(path), what)


def parse_json(data: bytes, name: str, what: str) -> Any:
    """Parses JSON text in UTF-8; `name` is the file's name in errors, see `read_json`."""
    fix = "restore the file, or choose another one"
    for start, kind in ((b"\x1f\x8b", "a gzip file"), (b"PK\x03\x04", "a zip archive")):
        if data.startswith(start):
            raise UserError(f"{name}: {kind}, not JSON", what, "unpack it, and use the file in it")
    if not data.strip():
        raise UserError(f"{name}: an empty file, not JSON", what, fix)
    try:
        return json.loads(data)
    except json.JSONDecodeError as error:
        found = f"{name}, line {error.lineno}, column {error.colno}: not JSON ({error.msg})"
        if error.msg == "Extra data" and error.doc[error.pos :].lstrip()[:1] in ("{", "["):
            fix = "this may be JSON Lines, an object on each line: export one JSON file instead"
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
            "choose another output folder, or change the permissions of this one",
        ) from error


def files_below(folder: Path, suffixes: tuple[str, ...]) -> list[Path]:
    """The files with these suffixes (in lower case) in a folder and its subfolders, sorted.

    Hidden files are left out, such as macOS's `._photo.jpg` and `.ipynb_checkpoints`.
    """
    found = (path for path in folder.rglob("*") if path.suffix.lower() in suffixes)
    return sorted(path for path in found if not any(part.startswith(".") for part in path.relative_to(folder).parts))


def cache_folder() -> Path:
    """Returns the folder of files that can be recreated; it may not exist yet.

    It is $MASKRCNN_CACHE, else ~/.cache/maskrcnn, else, for a user whose home folder is missing or cannot be written,
    `maskrcnn-<user id>` in the temporary folder, which only this user may access.

    Raises:
        UserError: if that folder belongs to another user.
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
            f"{folder}, which other users may write to, instead of a home folder",
            "a writable home folder, or MASKRCNN_CACHE",
            "set MASKRCNN_CACHE to a private folder of this user",
        )
    return folder


def report_path(path: Path) -> Path:
    """Path of an HTML report: the file itself, or `report.html` in a folder."""
    return path if path.suffix.lower() in (".html", ".htm") else path / "report.html"


# Rules for overwriting


@dataclass(frozen=True)
class FileKind:
    """A kind of file that a command writes, and how a file from an earlier run is recognised."""

    name: str  # such as "an HTML page of maskrcnn"
    recognises: Callable[[Path], bool]  # recognises an existing, non-empty file

    @classmethod
    def starting_with(cls, name: str, pattern: bytes) -> FileKind:
        """A kind whose files begin with a regular expression."""
        expression = re.compile(pattern, re.DOTALL)
        return cls(name, lambda path: expression.match(_head(path)) is not None)


def report_kind(command: str) -> FileKind:
    """The kind of the JSON reports that a command writes with `write_report`."""
    pattern = rb'\s*\{\s*"written_by": "maskrcnn %s"' % re.escape(command).encode()
    return FileKind.starting_with(f"a JSON report of `maskrcnn {command}`", pattern)


RESULTS_FILE = FileKind.starting_with(
    "a results file in COCO's format", rb'\s*\[\s*(\]|\{\s*"(image_id|category_id|bbox)")'
)
PAGE = FileKind.starting_with(
    "an HTML page of maskrcnn", rb'<!doctype html>.*<meta name="generator" content="maskrcnn"'
)
DRAWING = FileKind.starting_with(
    "an image that maskrcnn drew",
    rb"\x89PNG\r\n\x1a\n.*tEXtSoftware\x00maskrcnn|\xff\xd8.*\xff\xfe\x00\x0amaskrcnn",  # PNG, JPEG
)
ONNX = FileKind.starting_with("an ONNX file", rb"\x08[\x01-\x7f]")  # the field ir_version, which is written first
OPENVINO = FileKind.starting_with("an OpenVINO model", rb"<\?xml[^>]*>\s*<net\b")


@dataclass(frozen=True)
class Output:
    """A file that a command will write."""

    option: str  # the option for this file, for errors: "--json"
    path: Path
    kind: FileKind | None  # None: the writer itself refuses files of other kinds


def check_outputs(outputs: Iterable[Output], inputs: Iterable[str | Path | None], *, overwrite: bool = False) -> None:
    """Check, before any work, that a command's outputs replace nothing but its own earlier outputs.

    A file that the command reads is never replaced, regardless of the path, link or hard link by which it is given, nor
    is any other file in a folder that the command reads. Elsewhere, a file of another kind is replaced only with
    `overwrite`.

    Args:
        outputs: files to write; existing files of the same kind, from an earlier run, are replaced.
        inputs: files and folders that the command reads; None is ignored.
        overwrite: replace files of another kind too.

    Raises:
        UserError: for the first output that may not or cannot be written.
    """
    read = [Path(path) for path in inputs if path is not None]
    folders = [path for path in read if path.is_dir()]
    taken = {key: "a file that the command reads" for path in read for key in _identities(path)}
    for output in outputs:
        named = f"{output.option} {output.path}"
        check_target(output.path)
        if _is_device(output.path):
            continue
        keys = _identities(output.path)
        if user := next((taken[key] for key in keys if key in taken), None):
            raise UserError(f"{named}, {user}", "another file", f"choose another name for {output.option}")
        taken |= dict.fromkeys(keys, f"which {output.option} names as well")
        kind = output.kind
        if kind is None or not output.path.exists() or not output.path.stat().st_size or kind.recognises(output.path):
            continue
        folder = next((path for path in folders if _is_inside(output.path, path)), None)
        if folder is not None:
            expected = f"a new file, or {kind.name}, in {folder}, which the command reads"
            raise UserError(f"{named}, a file that maskrcnn did not write", expected, "choose another name")
        if not overwrite:
            raise UserError(
                f"{named}, a file that exists and is not {kind.name}",
                "a new file, or one that the same command wrote",
                "choose another name, or replace the file with --overwrite",
            )


def check_output_folder(
    option: str,
    folder: Path,
    inputs: Iterable[str | Path | None],
    kinds: Iterable[FileKind],
    *,
    overwrite: bool = False,
) -> None:
    """Check, before any work, that a folder for outputs is not one that the command reads, and can be written.

    Args:
        option: the option for this folder, for errors.
        folder: folder to write to.
        inputs: files and folders that the command reads; None is ignored.
        kinds: kinds of the written files; inside a folder that the command reads, `folder` may contain no others.
        overwrite: elsewhere, allow writing next to other files.

    Raises:
        UserError: otherwise.
    """
    check_target(folder / "x")
    named = f"{option} {folder}"
    read = [Path(path) for path in inputs if path is not None and Path(path).is_dir()]
    if any(set(_identities(folder)) & set(_identities(path)) for path in read):
        found = f"{named}, a folder that the command reads"
        raise UserError(found, "a separate folder for the output", f"choose another {option}")
    is_read = any(_is_inside(folder, path) for path in read)
    if overwrite and not is_read:
        return
    known = tuple(kinds)
    for path in sorted(folder.iterdir()) if folder.exists() else ():
        if path.is_dir() or not any(kind.recognises(path) for kind in known):
            fix = f"choose another {option}" + ("" if is_read else ", or write next to these files with --overwrite")
            raise UserError(
                f"{named}, which holds {path.name}", "a new folder, or one written by the same command", fix
            )


def _head(path: Path) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read(_HEAD_BYTES)
    except OSError:  # a file that cannot be read was not written by us
        return b""


def _is_device(path: Path) -> bool:
    """Whether a path exists and is neither a file nor a folder: a device, a pipe."""
    return path.exists() and not path.is_file() and not path.is_dir()


def _identities(path: Path) -> list[str | tuple[int, int]]:
    """Identities shared by all names of a file or folder: the path without links, or the inode of hard links."""
    try:
        state = path.stat()
    except OSError:  # missing, or a loop of links
        return [os.path.realpath(path)]
    return [os.path.realpath(path), (state.st_dev, state.st_ino)]


def kind_of(path: Path) -> str:
    """Describes a path without an expected suffix, for an error."""
    return "a folder" if path.is_dir() else f"a file of kind {path.suffix!r}"


def _is_inside(path: Path, folder: Path) -> bool:
    return Path(os.path.realpath(folder)) in Path(os.path.realpath(path)).parents


@contextmanager
def disk_errors(*paths: Path) -> Iterator[None]:
    """Turns operating system errors about `paths` into a UserError about the first."""
    try:
        yield
    except OSError as error:
        if error.errno not in _OF_THE_DISK and error.filename not in map(str, paths):
            raise  # about another file
        raise UserError(
            f"{paths[0]} cannot be written ({error.strerror or error})",
            "disk space and permission to write there",
            "free disk space, or choose another output",
        ) from error


def _flush(path: Path) -> None:
    """Flush a file or folder to the disk."""
    # Windows flushes writable descriptors only.
    descriptor = os.open(path, os.O_RDWR if path.is_file() else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

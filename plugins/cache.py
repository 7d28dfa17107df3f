"""Where compiled plugins are kept: a folder for each set of sources, compiler, architectures and flags.

A folder appears whole or not at all, so any number of processes can build at the same time: they compile in folders
of their own, and the first to finish is kept.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from maskrcnn.errors import UserError
from maskrcnn.files import make_folder, write_json

SOURCES = Path(__file__).with_name("csrc")
RECORD = "build.json"  # in each folder: what it was made from


def folder() -> Path:
    """`plugins` in $MASKRCNN_CACHE, by default in ~/.cache/maskrcnn.

    Raises:
        UserError: for a user without a home folder, where the variable is not set.
    """
    root = os.environ.get("MASKRCNN_CACHE")
    try:
        return (Path(root) if root else Path.home() / ".cache" / "maskrcnn") / "plugins"
    except RuntimeError as error:
        came = "no home folder to keep compiled plugins in"
        raise UserError(came, "one, or MASKRCNN_CACHE", "set MASKRCNN_CACHE to a folder of this user alone") from error


def sources_hash(paths: Iterable[Path]) -> str:
    """A hash over names and bytes of source files, and of all headers, as any of them may include any."""
    digest = hashlib.sha256()
    headers = (path for suffix in ("h", "cuh") for path in SOURCES.rglob(f"*.{suffix}"))
    for path in sorted({*paths, *headers}):
        digest.update(os.path.relpath(path, SOURCES).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def key_of(record: Mapping[str, Any]) -> str:
    """The name of the folder for what a record says."""
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()[:32]


def find(record: Mapping[str, Any], name: str) -> Path | None:
    """A file made from exactly this, or None."""
    path = folder() / key_of(record) / name
    return path if path.is_file() else None


def records() -> Iterator[tuple[Path, dict[str, Any]]]:
    """Every folder with its record, the newest first; none where there can be no cache."""
    found = []
    try:
        paths = list(folder().glob(f"[!.]*/{RECORD}"))
    except (OSError, UserError):
        paths = []
    for path in paths:
        try:
            found.append((path.stat().st_mtime, path.parent, json.loads(path.read_text(encoding="utf-8"))))
        except (OSError, ValueError):  # removed meanwhile, or not ours
            continue
    yield from ((parent, record) for _, parent, record in sorted(found, key=lambda entry: entry[0], reverse=True))


def store(record: Mapping[str, Any], name: str, make: Callable[[Path], None], *, force: bool = False) -> Path:
    """The file of this record; `make` writes it to the path it is given, unless it is there.

    Args:
        record: what the file depends on, as JSON holds it.
        name: of the file.
        make: may write further files beside it; may raise, and then nothing is kept.
        force: make it even if it is there.

    Raises:
        UserError: where the cache's folder cannot be made or written to.
    """
    if not force and (path := find(record, name)):
        return path
    make_folder(folder())
    with _draft() as draft:
        make(draft / name)
        write_json(draft / RECORD, dict(record))
        final = folder() / key_of(record)
        try:
            os.rename(draft, final)
        except OSError:  # the folder is there: another process was faster, or it is to be replaced, or broken
            while force or not (final / name).is_file():
                _set_aside(final)
                try:
                    os.rename(draft, final)
                    break
                except OSError:
                    if not final.exists():
                        raise
                    force = False  # somebody else's came between, which is as fresh as ours
    return final / name


@contextmanager
def _draft() -> Iterator[Path]:
    try:
        path = Path(tempfile.mkdtemp(dir=folder(), prefix=".draft-"))
    except OSError as error:
        came, expected = f"{folder()} cannot be written to ({error.strerror})", "a folder for compiled plugins"
        raise UserError(came, expected, "set MASKRCNN_CACHE to another folder") from error
    try:
        path.chmod(0o755)  # mkdtemp's own mode would hide a shared cache from other users
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def _set_aside(path: Path) -> None:
    """Removes a folder, under another name first: whoever has its library open keeps it."""
    aside = path.with_name(f".old-{secrets.token_hex(4)}")
    try:
        os.rename(path, aside)
    except FileNotFoundError:
        return
    shutil.rmtree(aside, ignore_errors=True)

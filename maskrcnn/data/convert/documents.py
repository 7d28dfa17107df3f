"""JSON, XML and list files of annotations; what cannot be read is named with its line."""

from __future__ import annotations

import codecs
import json
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from maskrcnn.data.convert.faults import BadEntry
from maskrcnn.errors import UserError

UNREADABLE = "annotation file that cannot be read"
_RESTORE = "restore the file from its source"
_NOT_SPACE = re.compile(r"[^ \t\r\n]")
_CHUNK = 1 << 20  # bytes that are read at a time from a file that is not read whole


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        BadEntry: where it is missing or is not JSON.
    """
    return json_from(_bytes_of(path), str(path))


def json_from(data: bytes, name: str) -> Any:
    """The content of JSON text in UTF-8, with or without a byte order mark; `name` is what errors call it."""
    try:
        return json.loads(data.decode("utf-8-sig"))
    except json.JSONDecodeError as error:
        came = f"{name}, line {error.lineno}, column {error.colno}: not JSON ({error.msg})"
        raise BadEntry(UNREADABLE, came, "a complete JSON file", _RESTORE) from error
    except (ValueError, RecursionError) as error:
        raise BadEntry(UNREADABLE, f"{name}: not JSON ({error})", "a complete JSON file in UTF-8", _RESTORE) from error


def object_at(value: Any, where: str) -> dict[str, Any]:
    """The value, which must be a JSON object."""
    return _typed(value, dict, "an object", where)


def list_at(value: Any, where: str) -> list[Any]:
    """The value, which must be a JSON list."""
    return _typed(value, list, "a list", where)


def text_at(value: Any, where: str) -> str:
    """The value, which must be a text that is not empty."""
    if isinstance(value, str) and value.strip():
        return value
    raise BadEntry("malformed entry", f"{where}: {value!r}", "a text", "correct the file")


def _typed(value: Any, kind: type, name: str, where: str) -> Any:
    if isinstance(value, kind):
        return value
    raise BadEntry("malformed entry", f"{where}: of type {type(value).__name__}", name, "correct the file")


def array_spans(path: Path) -> Iterator[tuple[int, int]]:
    """Where the entries of a JSON file that is one list lie, `(start, end)` in bytes, without holding the file.

    Raises:
        BadEntry: where the file is missing or is not such a list.
    """
    decoder = json.JSONDecoder()
    try:
        with open(path, "rb") as file:
            window = _Window(file)
            if window.next_character() != "[":
                _no_list(path, window.offset + window.place)
            window.place += 1
            while (character := window.next_character()) != "]":
                if character == ",":
                    window.place += 1
                    continue
                try:
                    _, end = decoder.raw_decode(window.text, window.place)
                except json.JSONDecodeError as error:  # perhaps the entry goes on
                    byte = window.offset + error.pos
                    if not window.grow():
                        _no_list(path, byte)
                    continue
                yield window.offset + window.place, window.offset + end
                window.place = end
    except OSError as error:
        _not_readable(path, error)


class _Window:
    """The part of a file that is looked at, one character per byte.

    JSON's structure is ASCII, and no byte of a longer UTF-8 character is, so its strings may look wrong meanwhile.
    """

    def __init__(self, file: BinaryIO) -> None:
        head = file.read(len(codecs.BOM_UTF8))
        has_mark = head == codecs.BOM_UTF8
        self._file, self.offset, self.place = file, len(head) if has_mark else 0, 0
        self.text = "" if has_mark else head.decode("latin-1")

    def grow(self) -> bool:
        """Forgets what lies before `place` and reads on; False at the file's end."""
        read = self._file.read(max(_CHUNK, len(self.text))).decode("latin-1")
        self.offset, self.text, self.place = self.offset + self.place, self.text[self.place :] + read, 0
        return bool(read)

    def next_character(self) -> str:
        """The first character from `place` on that is no space, to which `place` moves; empty at the end."""
        while True:
            found = _NOT_SPACE.search(self.text, self.place)
            if found:
                self.place = found.start()
                return found.group()
            self.place = len(self.text)
            if not self.grow():
                return ""


def _no_list(path: Path, byte: int) -> NoReturn:
    came = f"{path}, byte {byte}: not JSON, or not one list"
    raise BadEntry(UNREADABLE, came, "a complete JSON list", _RESTORE)


def read_xml(path: Path) -> ElementTree.Element:
    """The root element of an XML file.

    A document type declaration is refused before anything in it is read: annotations have none, and only there
    can entities be declared whose expansion would fill the memory. External entities are never fetched.

    Raises:
        BadEntry: where the file is missing, is not XML or declares a document type.
    """
    data = _bytes_of(path)
    try:
        return ElementTree.fromstring(data, parser=ElementTree.XMLParser(target=_NoDeclarations()))
    except ElementTree.ParseError as error:
        line, column = error.position
        came = f"{path}, line {line}, column {column + 1}: not XML ({error})"
        raise BadEntry(UNREADABLE, came, "a complete XML file", _RESTORE) from error
    except _DeclaredError as error:
        came = f"{path}: a document type declaration"
        raise BadEntry(UNREADABLE, came, "XML without <!DOCTYPE …>", "take the declaration out") from error
    except (ValueError, LookupError) as error:  # unknown encodings
        raise BadEntry(UNREADABLE, f"{path}: not XML ({error})", "a complete XML file", _RESTORE) from error


class _DeclaredError(Exception):
    pass


class _NoDeclarations(ElementTree.TreeBuilder):
    def doctype(self, name: str, public_id: str | None, system: str | None) -> None:
        raise _DeclaredError


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """The lines of a text file with their numbers, without empty ones and those that begin with `#`.

    Raises:
        UserError: where it cannot be read.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        what = getattr(error, "strerror", None) or error
        raise UserError(f"{path} cannot be read ({what})", "a text file in UTF-8", "correct the path") from error
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip() and not line.lstrip().startswith("#"):
            yield number, line.strip()


def _bytes_of(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        _not_readable(path, error)


def _not_readable(path: Path, error: OSError) -> NoReturn:
    came = f"{path} cannot be read ({error.strerror or error})"
    raise BadEntry(UNREADABLE, came, "a file that exists and can be read", "complete the dataset") from error

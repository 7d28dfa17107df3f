"""JSON, XML and list files of annotations; what cannot be read is named with its line."""

from __future__ import annotations

import codecs
import io
import json
import os
import re
import shutil
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NoReturn, TypeVar

import numpy as np
from PIL import ExifTags, Image, ImageOps

from maskrcnn.data.images import decode_image, read_image
from maskrcnn.errors import UserError

# Faults of single entries: the first stops a conversion, or all are counted and their entries left out.

Item = TypeVar("Item")
Made = TypeVar("Made")


class BadEntry(UserError):
    """One image or object that cannot be converted.

    Args:
        reason: the same for all of its kind.
        found: what was found, naming the file and the line or object.
        expected: what would have been right.
        fix: what the user can do about it.
    """

    def __init__(self, reason: str, found: str, expected: str, fix: str) -> None:
        self.reason = reason
        super().__init__(found, expected, fix)

    def __reduce__(self) -> tuple:
        return type(self), (self.reason, self.found, self.expected, self.fix)


class Faults:
    """What a conversion met that it could not, or was not meant to, convert.

    Args:
        keep_going: count faults and go on; otherwise the first one is raised.
    """

    def __init__(self, *, keep_going: bool = False) -> None:
        self.keep_going = keep_going
        self.skipped: Counter[str] = Counter()
        self.left_out: Counter[str] = Counter()
        self._examples: dict[str, str] = {}

    def meet(self, fault: BadEntry) -> None:
        """Raises the fault, or counts it."""
        if not self.keep_going:
            raise fault
        self.skipped[fault.reason] += 1
        self._examples.setdefault(fault.reason, fault.found)

    def leave_out(self, reason: str, example: str) -> None:
        """Counts what the format or an option says is not to be converted; that is no fault."""
        self.left_out[reason] += 1
        self._examples.setdefault(reason, example)

    def usable(self, items: Iterable[Item], make: Callable[[int, Item], Made | None]) -> Iterator[Made]:
        """`make(index, item)` of each item, without those that are None or at fault."""
        for index, item in enumerate(items):
            try:
                made = make(index, item)
            except BadEntry as fault:
                self.meet(fault)
                continue
            if made is not None:
                yield made

    def lines(self) -> list[str]:
        """A line for each reason, with the first example."""
        counted = (("skipped", self.skipped), ("left out", self.left_out))
        return [
            f"{verb} {count}: {reason}, first: {self._examples[reason]}"
            for verb, counts in counted
            for reason, count in sorted(counts.items())
        ]


_UNREADABLE = "annotation file that cannot be read"
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
        raise BadEntry(_UNREADABLE, came, "a complete JSON file", _RESTORE) from error
    except (ValueError, RecursionError) as error:
        raise BadEntry(_UNREADABLE, f"{name}: not JSON ({error})", "a complete JSON file in UTF-8", _RESTORE) from error


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
    raise BadEntry(_UNREADABLE, came, "a complete JSON list", _RESTORE)


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
        raise BadEntry(_UNREADABLE, came, "a complete XML file", _RESTORE) from error
    except _DeclaredError as error:
        came = f"{path}: a document type declaration"
        raise BadEntry(_UNREADABLE, came, "XML without <!DOCTYPE …>", "take the declaration out") from error
    except (ValueError, LookupError) as error:  # unknown encodings
        raise BadEntry(_UNREADABLE, f"{path}: not XML ({error})", "a complete XML file", _RESTORE) from error


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
    raise BadEntry(_UNREADABLE, came, "a file that exists and can be read", "complete the dataset") from error


# Image files on their way into a dataset: looked through once, then linked, copied or turned upright.

_UNREADABLE_IMAGE = "image that cannot be read"
_OTHER_SIZE = "annotation of another size than its image"
_JPEG_QUALITY = 95  # of a picture that is turned; Pillow's documentation advises against more


@dataclass(frozen=True)
class _Looked:
    """What an image file is."""

    size_hw: tuple[int, int]  # as stored
    orientation: int  # EXIF's, 1 for upright

    @property
    def upright_hw(self) -> tuple[int, int]:
        """The size once the orientation is applied: 5 to 8 swap rows and columns (EXIF 2.3, tag 274)."""
        return self.size_hw[::-1] if self.orientation > 4 else self.size_hw


def look(content: Path | bytes, name: str = "") -> _Looked:
    """Decodes an image once, so that nothing is converted that training could not read.

    Of a JPEG only an eighth of the pixels is computed; all of the file is read for it.

    Raises:
        BadEntry: naming the file, where it is missing, damaged or no image.
    """
    name = name or str(content)
    try:
        with Image.open(io.BytesIO(content) if isinstance(content, bytes) else content) as image:
            size_hw = image.size[::-1]
            orientation = _orientation(image)
            if image.format == "JPEG" and image.draft(None, (1, 1)):
                image.load()
                return _Looked(size_hw, orientation)
    except Exception:  # Pillow's decoders raise whatever they stumble over; `read_image` has words for it
        orientation = 1
    try:
        pixels = decode_image(content, name) if isinstance(content, bytes) else read_image(content)
    except UserError as error:
        raise BadEntry(_UNREADABLE_IMAGE, error.found, error.expected, error.fix) from error
    return _Looked(pixels.shape[:2], orientation)


def require_size(size_hw: tuple[int, int], expected_hw: tuple[int, int], where: str) -> None:
    """Raises a BadEntry where an annotation is for an image of another size than `expected_hw`, the image's."""
    if tuple(size_hw) != tuple(expected_hw):
        came = f"{where}: for {size_hw[1]}×{size_hw[0]} pixels"
        expected = f"the image's size, {expected_hw[1]}×{expected_hw[0]}"
        raise BadEntry(_OTHER_SIZE, came, expected, "restore the image that was annotated, or correct the annotation")


def place(content: Path | bytes, target: Path, *, is_upright: bool, copies: bool) -> None:
    """Puts an image at `target`: turned if `is_upright` and its EXIF orientation asks for it, else byte for byte.

    A file is linked (a further name of the same file, which costs no space) unless `copies`; where the file system
    does not link, it is copied.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    if is_upright and _save_upright(content, target):
        return
    if isinstance(content, bytes):
        target.write_bytes(content)
    else:
        _link(content.resolve(), target, copies=copies)


def _link(source: Path, target: Path, *, copies: bool) -> None:
    if not copies:
        try:
            os.link(source, target)
            return
        except OSError:
            pass  # another disk, or a file system without links
    shutil.copyfile(source, target)


def _save_upright(content: Path | bytes, target: Path) -> bool:
    """Writes a picture turned; False, and nothing is written, for one that is upright."""
    with Image.open(io.BytesIO(content) if isinstance(content, bytes) else content) as image:
        if _orientation(image) == 1:
            return False
        options = {"quality": _JPEG_QUALITY, "subsampling": 0} if image.format == "JPEG" else {}
        ImageOps.exif_transpose(image).save(target, format=image.format, **options)
    return True


def _orientation(image: Image.Image) -> int:
    orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    return orientation if orientation in range(1, 9) else 1


# PNG files whose pixels are numbers: of instances, of classes, or of both.

_UNREADABLE_MASK = "mask that cannot be read"
_RESTORE_MASK = "restore the file from its source"
_NUMBERS = ("1", "L", "P", "I")  # Pillow's modes of one number per pixel, and those that begin with I;16


def read_ids(path: Path) -> np.ndarray:
    """The numbers of a single-channel image, int64 `[H, W]`; of a palette image its indices, not its colours.

    Raises:
        BadEntry: where the file is missing, damaged, or has several channels.
    """
    pixels, mode = _decoded(path)
    if mode not in _NUMBERS and not mode.startswith("I;16"):
        came = f"{path}: {mode} pixels"
        raise BadEntry(
            _UNREADABLE_MASK, came, "one number per pixel (grey or palette image)", "save it without colours"
        )
    return pixels.astype(np.int64)


def read_two_channels(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """The first two channels of an image of 8 or 16 bits per channel, int64 `[H, W]` each.

    Raises:
        BadEntry: where the file is missing, damaged, or has fewer than three channels.
    """
    pixels, mode = _decoded(path)
    if mode not in ("RGB", "RGBA"):
        came = f"{path}: {mode} pixels"
        raise BadEntry(_UNREADABLE_MASK, came, "a PNG of three channels", _RESTORE_MASK)
    return pixels[..., 0].astype(np.int64), pixels[..., 1].astype(np.int64)


def _decoded(path: Path) -> tuple[np.ndarray, str]:
    """Pixels and Pillow's mode; of 16-bit colours all 16 bits."""
    try:
        with Image.open(path) as image:
            if image.format == "JPEG":
                raise ValueError("a JPEG, whose compression changes the numbers")
            mode, packing = image.mode, _packing(image)
            pixels = np.array(image)
        if packing.endswith(";16B") and mode in ("RGB", "RGBA"):
            # Pillow keeps one byte of such samples, the first; told that they are the other way round, the second.
            with Image.open(path) as image:
                image.tile = [_with_packing(tile, f"{mode};16L") for tile in image.tile]
                pixels = pixels.astype(np.uint16) << 8 | np.array(image)
        return pixels, mode
    except Exception as error:  # on damaged bytes Pillow's decoders raise whatever they stumble over
        what = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
        raise BadEntry(_UNREADABLE_MASK, f"{path} ({what})", "an undamaged PNG file", _RESTORE_MASK) from error


def _packing(image: Image.Image) -> str:
    """How the file's samples are packed, in Pillow's words."""
    packing = image.tile[0][3] if image.tile else ""
    return packing if isinstance(packing, str) else str(packing[0])


def _with_packing(tile: tuple, packing: str) -> tuple:
    changed = (*tile[:3], packing)
    return type(tile)(*changed) if hasattr(tile, "_fields") else changed

"""Reads annotation files, images and id masks of source datasets, and writes converted images.

A file that cannot be read raises a `BadEntry` with the file name and, for JSON and XML, the line.
"""

from __future__ import annotations

import io
import math
import os
import shutil
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from maskrcnn import files
from maskrcnn.data.convert.source import BadEntry
from maskrcnn.data.images import decode_image, read_header, read_image, same_ratio
from maskrcnn.errors import UserError
from maskrcnn.imaging.preprocess import Preprocessing

UNREADABLE = "annotation file that cannot be read"
_UNREADABLE_MASK = "mask that cannot be read"
_RESTORE = "restore the file from its source"
_ID_MODES = ("1", "L", "P", "I")  # Pillow's modes with one number per pixel, besides those that begin with I;16


@contextmanager
def as_fault(reason: str) -> Iterator[None]:
    """Converts a `UserError` in this context to a `BadEntry` of the given reason."""
    try:
        yield
    except UserError as error:
        raise BadEntry(reason, error.found, error.expected, error.fix) from error


def read_json(path: Path) -> Any:
    """Reads a JSON file; raises a BadEntry if it is missing or not JSON."""
    with as_fault(UNREADABLE):
        return files.read_json(path, "a complete JSON file in UTF-8")


def object_at(value: Any, where: str) -> dict[str, Any]:
    """Returns the value if it is a JSON object, else raises a BadEntry; `where` identifies it in the error."""
    if isinstance(value, dict):
        return value
    raise _malformed(f"{where}: of type {type(value).__name__}", "an object")


def list_at(value: Any, where: str) -> list[Any]:
    """Returns the value if it is a JSON list, else raises a BadEntry."""
    if isinstance(value, list):
        return value
    raise _malformed(f"{where}: of type {type(value).__name__}", "a list")


def text_at(value: Any, where: str) -> str:
    """Returns the value if it is a non-empty string, else raises a BadEntry."""
    if isinstance(value, str) and value.strip():
        return value
    raise _malformed(f"{where}: {value!r}", "a non-empty string")


def number_at(value: Any, where: str, *, positive: bool = False) -> Any:
    """Returns the value if it is a finite number, and positive if required; else raises a BadEntry."""
    if type(value) in (int, float) and math.isfinite(value) and (value > 0 or not positive):
        return value
    expected = "a positive number" if positive else "a number"
    raise BadEntry("malformed shape", f"{where}: {value!r}", expected, "correct the file")


def _malformed(found: str, expected: str) -> BadEntry:
    return BadEntry("malformed entry", found, expected, "correct the file")


def read_xml(path: Path) -> ElementTree.Element:
    """Reads an XML file and returns its root element.

    A document type declaration is rejected: annotations need none, and entities that it declares could expand to fill
    the memory. External entities are never fetched.

    Raises:
        BadEntry: if the file is missing, not XML, or has a document type declaration.
    """
    try:
        return ElementTree.fromstring(path.read_bytes(), parser=ElementTree.XMLParser(target=_NoDeclarations()))
    except OSError as error:
        found = f"{path} cannot be read ({error.strerror or error})"
        raise BadEntry(UNREADABLE, found, "a file that exists and can be read", "complete the dataset") from error
    except ElementTree.ParseError as error:
        line, column = error.position
        found = f"{path}, line {line}, column {column + 1}: not XML ({error})"
        raise BadEntry(UNREADABLE, found, "a complete XML file", _RESTORE) from error
    except _DeclarationError as error:
        found = f"{path}: a document type declaration"
        raise BadEntry(UNREADABLE, found, "XML without <!DOCTYPE …>", "remove the declaration") from error
    except (ValueError, LookupError) as error:  # unknown encodings
        raise BadEntry(UNREADABLE, f"{path}: not XML ({error})", "a complete XML file", _RESTORE) from error


class _DeclarationError(Exception):
    pass


class _NoDeclarations(ElementTree.TreeBuilder):
    def doctype(self, name: str, public_id: str | None, system: str | None) -> None:
        raise _DeclarationError


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yields number and text of each line of a file, except empty lines and lines that begin with `#`.

    Raises:
        UserError: if the file cannot be read.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path} cannot be read ({reason})", "a text file in UTF-8", "correct the path") from error
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip() and not line.lstrip().startswith("#"):
            yield number, line.strip()


def annotated_size(
    content: Path | bytes, declared_hw: tuple[int, int] | None = None, where: str = "", name: str = ""
) -> tuple[int, int]:
    """Decodes an image, to check that training can read it, and returns the size of the annotated image.

    This is the declared size; without one, the size of the upright image (see `data/images.py`). A JPEG file is read
    completely, but only an eighth of its pixels is computed.

    Args:
        content: image file, or the content of one.
        declared_hw: height and width in the annotation.
        where: name of the annotation in errors.
        name: name of the content in errors.

    Raises:
        BadEntry: if the file is missing, damaged or not an image, or has another aspect ratio than declared.
    """
    with as_fault("image that cannot be read"):
        header = read_header(content, name)
        if not _is_complete_jpeg(content):
            any_range = Preprocessing(pixel_range=(0, 65535))
            _ = decode_image(content, name, any_range) if isinstance(content, bytes) else read_image(content, any_range)
    shown_hw = header.shown_hw(declared_hw)
    if declared_hw is None:
        return shown_hw
    if not same_ratio(shown_hw, declared_hw):
        require_size(declared_hw, shown_hw, where)
    return declared_hw


def _is_complete_jpeg(content: Path | bytes) -> bool:
    try:
        with Image.open(io.BytesIO(content) if isinstance(content, bytes) else content) as image:
            if image.format != "JPEG" or image.draft(None, (1, 1)) is None:
                return False
            image.load()
    except Exception:  # Pillow's decoders raise any exception; `read_image` reports the cause
        return False
    return True


def require_size(size_hw: tuple[int, ...], image_hw: tuple[int, int], where: str) -> None:
    """Raises a BadEntry if an annotation is for an image of another size than `image_hw`."""
    if tuple(size_hw) != tuple(image_hw):
        found = f"{where}: for {size_hw[1]}×{size_hw[0]} pixels"
        expected = f"the image's size, {image_hw[1]}×{image_hw[0]}"
        fix = "restore the image that was annotated, or correct the annotation"
        raise BadEntry("annotation of another size than its image", found, expected, fix)


def write_image(content: Path | bytes, target: Path, *, copies: bool) -> None:
    """Writes an image to `target` unchanged: readers apply its EXIF orientation.

    Args:
        content: image file, or the content of one.
        target: file to write.
        copies: copy a file instead of hard-linking it; it is also copied if the file system has no links.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
        target.write_bytes(content)
        return
    source = content.resolve()
    if not copies:
        try:
            os.link(source, target)
            return
        except OSError:
            pass  # another disk, or a file system without links
    shutil.copyfile(source, target)


def read_ids(path: Path) -> np.ndarray:
    """Reads a single-channel image as int64 `[H, W]`; for a palette image, the indices, not the colours.

    Raises:
        BadEntry: if the file is missing, damaged, or has several channels.
    """
    pixels, mode = _decode(path)
    if mode not in _ID_MODES and not mode.startswith("I;16"):
        expected = "one number per pixel (grey or palette image)"
        raise BadEntry(_UNREADABLE_MASK, f"{path}: {mode} pixels", expected, "save it without colours")
    return pixels.astype(np.int64)


def read_two_channels(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Reads the first two channels of an image of 8 or 16 bits per channel, int64 `[H, W]` each.

    Raises:
        BadEntry: if the file is missing, damaged, or has fewer than three channels.
    """
    pixels, mode = _decode(path)
    if mode not in ("RGB", "RGBA"):
        raise BadEntry(_UNREADABLE_MASK, f"{path}: {mode} pixels", "a PNG of three channels", _RESTORE)
    return pixels[..., 0].astype(np.int64), pixels[..., 1].astype(np.int64)


def _decode(path: Path) -> tuple[np.ndarray, str]:
    """Pixels and Pillow's mode of an image; 16-bit colours keep all 16 bits."""
    try:
        with Image.open(path) as image:
            if image.format == "JPEG":
                raise ValueError("a JPEG, whose compression changes the numbers")
            mode, arguments = image.mode, image.tile[0][3] if image.tile else ""
            if arguments is None:
                raise ValueError("samples of unknown layout")
            packing = arguments if isinstance(arguments, str) else str(arguments[0])
            pixels = np.array(image)
        if packing.endswith(";16B") and mode in ("RGB", "RGBA"):
            # Pillow keeps the high byte of such samples; read with swapped byte order, it keeps the low byte.
            with Image.open(path) as image:
                image.tile = [_with_packing(tile, f"{mode};16L") for tile in image.tile]
                pixels = pixels.astype(np.uint16) << 8 | np.array(image)
        return pixels, mode
    except Exception as error:  # Pillow's decoders raise any exception on damaged bytes
        reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
        raise BadEntry(_UNREADABLE_MASK, f"{path} ({reason})", "an undamaged PNG file", _RESTORE) from error


def _with_packing(tile: Any, packing: str) -> Any:
    changed = (*tile[:3], packing)
    return type(tile)(*changed) if hasattr(tile, "_fields") else changed

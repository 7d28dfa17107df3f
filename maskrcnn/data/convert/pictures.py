"""Image files on their way into a dataset: looked through once, then linked, copied or turned upright."""

from __future__ import annotations

import io
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from PIL import ExifTags, Image, ImageOps

from maskrcnn.data.convert.faults import BadEntry
from maskrcnn.data.images import decode_image, read_image
from maskrcnn.errors import UserError

UNREADABLE = "image that cannot be read"
OTHER_SIZE = "annotation of another size than its image"
_JPEG_QUALITY = 95  # of a picture that is turned; Pillow's documentation advises against more


@dataclass(frozen=True)
class Looked:
    """What an image file is."""

    size_hw: tuple[int, int]  # as stored
    orientation: int  # EXIF's, 1 for upright

    @property
    def upright_hw(self) -> tuple[int, int]:
        """The size once the orientation is applied: 5 to 8 swap rows and columns (EXIF 2.3, tag 274)."""
        return self.size_hw[::-1] if self.orientation > 4 else self.size_hw


def look(content: Path | bytes, name: str = "") -> Looked:
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
                return Looked(size_hw, orientation)
    except Exception:  # Pillow's decoders raise whatever they stumble over; `read_image` has words for it
        orientation = 1
    try:
        pixels = decode_image(content, name) if isinstance(content, bytes) else read_image(content)
    except UserError as error:
        raise BadEntry(UNREADABLE, error.came, error.expected, error.do) from error
    return Looked(pixels.shape[:2], orientation)


def require_size(size_hw: tuple[int, int], expected_hw: tuple[int, int], where: str) -> None:
    """Raises a BadEntry where an annotation is for an image of another size than `expected_hw`, the image's."""
    if tuple(size_hw) != tuple(expected_hw):
        came = f"{where}: for {size_hw[1]}×{size_hw[0]} pixels"
        expected = f"the image's size, {expected_hw[1]}×{expected_hw[0]}"
        raise BadEntry(OTHER_SIZE, came, expected, "restore the image that was annotated, or correct the annotation")


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

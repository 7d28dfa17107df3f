"""Image files as arrays."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from maskrcnn.errors import UserError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")  # of the images that a folder holds
_READABLE = "an image file that Pillow reads, such as JPEG or PNG"


def read_image(path: str | Path) -> np.ndarray:
    """The pixels of an image file, `[H, W, 3]` uint8 RGB.

    Grey, palette, CMYK and other 8-bit modes are converted and an alpha channel is dropped. Of 16-bit
    samples the high byte is kept, which is what Pillow itself does for 16-bit colour. Of several frames the
    first is read. An EXIF orientation is not applied: COCO annotations refer to the pixels as stored.

    Raises:
        UserError: naming the file, where it is missing, empty, no image, damaged, cut short, without
            pixels, or of samples without a known range (32-bit integers beyond 65535, floats).
    """
    path = Path(path)
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise UserError(f"image {path} {what}", _READABLE, "correct the path or restore the file")
    if path.stat().st_size == 0:
        raise UserError(f"image {path} is an empty file", _READABLE, "restore the file from its source")
    return _pixels(path, f"image {path}")


def decode_image(data: bytes, name: str) -> np.ndarray:
    """The pixels of an image file's content, as `read_image` gives those of a file.

    Args:
        data: the whole content.
        name: what errors call it, after the word image.

    Raises:
        UserError: as `read_image`.
    """
    if not data:
        raise UserError(f"image {name} is empty", _READABLE, "send the content of an image file")
    return _pixels(io.BytesIO(data), f"image {name}")


def _pixels(source: Path | io.BytesIO, name: str) -> np.ndarray:
    try:
        with Image.open(source) as image:
            pixels = _rgb_from_image(image)
    except UnidentifiedImageError as error:
        raise UserError(
            f"{name} is not an image", _READABLE, "convert the file to PNG or remove it from the input"
        ) from error
    except Exception as error:  # on damaged bytes Pillow's decoders raise whatever they stumble over
        raise UserError(
            f"{name} cannot be decoded ({type(error).__name__}: {error})",
            "an undamaged image file of complete length",
            "restore the file from its source or convert it to 8-bit PNG",
        ) from error
    if pixels.size == 0:
        raise UserError(
            f"{name} measures {pixels.shape[1]}×{pixels.shape[0]} pixels",
            "at least 1×1 pixel",
            "restore the file from its source",
        )
    return pixels


def images_in(folder: Path, limit: int) -> list[Path]:
    """The images of a folder and its sub-folders: at most `limit`, evenly spread over the sorted names.

    Raises:
        UserError: when there is no such folder or no image in it.
    """
    if not folder.is_dir():
        raise UserError(f"no folder {folder}", "a folder of images", "name one with images like those to be seen later")
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
    if not found:
        raise UserError(
            f"{folder}: no image in it ({', '.join(IMAGE_SUFFIXES)})",
            "some images like those that the model will see, a hundred are plenty",
            "put images there, or name another folder",
        )
    places = np.linspace(0, len(found) - 1, min(limit, len(found))).round().astype(int)
    return [found[place] for place in places]


def _rgb_from_image(image: Image.Image) -> np.ndarray:
    """Pixels `[H, W, 3]` uint8 of an open image of any mode."""
    if image.mode == "F":
        raise ValueError("floating-point samples, whose range is not known")
    if image.mode.startswith("I"):  # "I;16" and its byte orders; "I" is 32 bits, often holding 16
        samples = np.array(image)
        if samples.size and (samples.min() < 0 or samples.max() > 65535):
            raise ValueError("32-bit samples outside 0 to 65535")
        return np.repeat((samples >> 8).astype(np.uint8)[..., None], 3, axis=2)
    if image.mode == "P":  # by way of RGBA, or Pillow warns about palettes with transparency
        image = image.convert("RGBA")
    return np.array(image.convert("RGB"))

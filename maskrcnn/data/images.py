"""Image files as arrays."""

from __future__ import annotations

import io
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from maskrcnn.errors import UserError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")  # of image files in folders
_READABLE = "an image file that Pillow reads, such as JPEG or PNG"


def read_image(path: str | Path) -> np.ndarray:
    """Reads an image file as uint8 RGB `[H, W, 3]`.

    Grey, palette, CMYK and other 8-bit modes are converted, and an alpha channel is dropped. Of 16-bit samples the high
    byte is kept, as Pillow does for 16-bit colour. Of several frames the first is read. An EXIF orientation is not
    applied: COCO annotations refer to the pixels as stored.

    Raises:
        UserError: where the file is missing, empty, damaged, not an image, has no pixels, or samples without a known
            range (32-bit integers above 65535, floats).
    """
    path = Path(path)
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise UserError(f"image {path} {what}", _READABLE, "correct the path or restore the file")
    if path.stat().st_size == 0:
        raise UserError(f"image {path} is an empty file", _READABLE, "restore the file from its source")
    return _pixels(path, f"image {path}")


def decode_image(data: bytes, name: str) -> np.ndarray:
    """Decodes the content of an image file, as `read_image` does that of a file.

    Args:
        data: content of the file.
        name: name of the image in errors.

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
            f"{name} is not an image", _READABLE, "convert the file to PNG, or remove it from the input"
        ) from error
    except Exception as error:  # Pillow's decoders raise any exception on damaged bytes
        raise UserError(
            f"{name} cannot be decoded ({type(error).__name__}: {error})",
            "an undamaged image file of complete length",
            "restore the file from its source, or convert it to 8-bit PNG",
        ) from error
    if pixels.size == 0:
        raise UserError(
            f"{name} measures {pixels.shape[1]}×{pixels.shape[0]} pixels",
            "at least 1×1 pixel",
            "restore the file from its source",
        )
    return pixels


def unreadable_images(paths: Sequence[Path], *, workers: int) -> list[UserError]:
    """Decodes image files in threads; returns the errors of `read_image`, in the order of the files."""

    def error_of(path: Path) -> UserError | None:
        try:
            read_image(path)
        except UserError as error:
            return error
        return None

    with ThreadPoolExecutor(max(1, workers)) as pool:
        return [error for error in pool.map(error_of, paths) if error is not None]


def images_in(folder: Path, limit: int) -> list[Path]:
    """The images of a folder and its subfolders: at most `limit`, evenly spaced in the sorted list.

    Raises:
        UserError: where there is no such folder, or no image in it.
    """
    if not folder.is_dir():
        raise UserError(f"no folder {folder}", "a folder of images", "name a folder of images like those to predict on")
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
    if not files:
        raise UserError(
            f"{folder}: no image in it ({', '.join(IMAGE_SUFFIXES)})",
            "images like those to predict on; a hundred suffice",
            "add images, or name another folder",
        )
    indices = np.linspace(0, len(files) - 1, min(limit, len(files))).round().astype(int)
    return [files[index] for index in indices]


def _rgb_from_image(image: Image.Image) -> np.ndarray:
    """The pixels of an open image of any mode, uint8 `[H, W, 3]`."""
    if image.mode == "F":
        raise ValueError("floating-point samples, whose range is not known")
    if image.mode.startswith("I"):  # "I;16" and its byte orders; "I" is 32 bits, often holding 16
        samples = np.array(image)
        if samples.size and (samples.min() < 0 or samples.max() > 65535):
            raise ValueError("32-bit samples outside 0 to 65535")
        return np.repeat((samples >> 8).astype(np.uint8)[..., None], 3, axis=2)
    if image.mode == "P":  # through RGBA, or Pillow warns about palettes with transparency
        image = image.convert("RGBA")
    return np.array(image.convert("RGB"))

"""PNG files whose pixels are numbers: of instances, of classes, or of both."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from maskrcnn.data.convert.faults import BadEntry

UNREADABLE = "mask that cannot be read"
_RESTORE = "restore the file from its source"
_NUMBERS = ("1", "L", "P", "I")  # Pillow's modes of one number per pixel, and those that begin with I;16


def read_ids(path: Path) -> np.ndarray:
    """The numbers of a single-channel image, int64 `[H, W]`; of a palette image its indices, not its colours.

    Raises:
        BadEntry: where the file is missing, damaged, or has several channels.
    """
    pixels, mode = _decoded(path)
    if mode not in _NUMBERS and not mode.startswith("I;16"):
        came = f"{path}: {mode} pixels"
        raise BadEntry(UNREADABLE, came, "one number per pixel (grey or palette image)", "save it without colours")
    return pixels.astype(np.int64)


def read_two_channels(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """The first two channels of an image of 8 or 16 bits per channel, int64 `[H, W]` each.

    Raises:
        BadEntry: where the file is missing, damaged, or has fewer than three channels.
    """
    pixels, mode = _decoded(path)
    if mode not in ("RGB", "RGBA"):
        came = f"{path}: {mode} pixels"
        raise BadEntry(UNREADABLE, came, "a PNG of three channels", _RESTORE)
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
        raise BadEntry(UNREADABLE, f"{path} ({what})", "an undamaged PNG file", _RESTORE) from error


def _packing(image: Image.Image) -> str:
    """How the file's samples are packed, in Pillow's words."""
    packing = image.tile[0][3] if image.tile else ""
    return packing if isinstance(packing, str) else str(packing[0])


def _with_packing(tile: tuple, packing: str) -> tuple:
    changed = (*tile[:3], packing)
    return type(tile)(*changed) if hasattr(tile, "_fields") else changed

"""Large images, read window by window.

TIFF files (including BigTIFF and COG; in strips, tiles or contiguous) and .npy files are read in parts: only the strips
or tiles of the file that one row of windows touches are in memory. Other files, and TIFF files that need a colour
conversion or a codec that is not installed, are decoded whole, up to `MASKRCNN_MAX_IMAGE_PIXELS`. In both cases, a
window has the same pixels as in the result of `read_image`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from maskrcnn.data.images import (
    ArrayFile,
    ImageNotes,
    OpenedImage,
    TiffPage,
    explained,
    is_npy,
    is_tiff,
    max_pixels,
    open_tiff,
    oriented,
    pixels_of,
    read_header,
    read_image,
)
from maskrcnn.errors import require_memory
from maskrcnn.imaging.preprocess import Preprocessing

_IN_TILES = "free memory, or convert it to a tiled TIFF file (gdal_translate -of COG IN OUT.tif)"
_BYTES_WHOLE = 4 + 3  # bytes per pixel of an image decoded whole: Pillow's RGB, and the array


class Window(NamedTuple):
    """A rectangle of an image, in pixels."""

    top: int
    left: int
    height: int
    width: int

    @property
    def slices(self) -> tuple[slice, slice]:
        """Rows and columns."""
        return slice(self.top, self.top + self.height), slice(self.left, self.left + self.width)


class Scene:
    """An image whose windows are read one at a time; see `open_scene`.

    Args:
        size_hw: size of the upright image.
        orientation: EXIF orientation to apply, 1 to 8.
        read_stored: reads a window of the pixels as stored.
    """

    def __init__(self, size_hw: tuple[int, int], orientation: int, read_stored: Callable[[Window], np.ndarray]) -> None:
        self.size_hw, self._orientation, self._read_stored = size_hw, orientation, read_stored
        self.applied_orientation = orientation

    @classmethod
    def of_array(cls, image: np.ndarray, applied_orientation: int = 1) -> Scene:
        """A scene from an array `[H, W, C]`, to which an EXIF orientation may have been applied."""
        scene = cls((image.shape[0], image.shape[1]), 1, lambda window: image[window.slices])
        scene.applied_orientation = applied_orientation
        return scene

    def read(self, window: Window) -> np.ndarray:
        """The pixels of a window of the upright image, `[h, w, C]`, as `read_image` returns them.

        Windows are read fastest in the order of `stored`.

        Raises:
            UserError: if the file is damaged there.
        """
        return np.ascontiguousarray(oriented(self._read_stored(self.stored(window)), self._orientation))

    def stored(self, window: Window) -> Window:
        """The position of a window in the pixels as stored."""
        top, left, height, width = window
        rows, columns = self.size_hw
        if self._orientation > 4:
            top, left, height, width, rows, columns = left, top, width, height, columns, rows
        if self._orientation in (3, 4, 6, 7):
            top = rows - top - height
        if self._orientation in (2, 3, 7, 8):
            left = columns - left - width
        return Window(top, left, height, width)


@contextmanager
def open_scene(
    path: str | Path,
    preprocessing: Preprocessing | None = None,
    *,
    annotated_hw: tuple[int, int] | None = None,
    exif: str = "auto",
    notes: ImageNotes | None = None,
) -> Iterator[Scene]:
    """Opens an image to be read in windows; arguments and errors are those of `read_image`.

    An image of another size than `annotated_hw` is decoded and resized whole.

    Raises:
        UserError: as in `read_image`; for an image that must be decoded whole, also if memory is insufficient.
    """
    path, name = Path(path), f"image {path}"
    preprocessing, notes = preprocessing or Preprocessing(), notes if notes is not None else ImageNotes()
    own = ImageNotes()
    windows = 0  # that were read
    with ExitStack() as stack:
        opened, reason = _opened_in_parts(path, name, stack)
        if opened is not None and annotated_hw in (None, opened.header.shown_hw(annotated_hw, exif)):
            header = opened.header

            def read_stored(window: Window) -> np.ndarray:
                nonlocal windows
                windows += 1
                with explained(name):
                    return pixels_of(_Part(opened, window), preprocessing, own, name)

            yield Scene(header.shown_hw(annotated_hw, exif), header.orientation_for(annotated_hw, exif), read_stored)
        else:
            whole = read_header(path)
            size = whole.size_hw
            what = f"{name} of {size[1]}×{size[0]} px, decoded whole"
            require_memory(_BYTES_WHOLE * float(size[0]) * size[1], what, _IN_TILES + reason)
            image = read_image(path, preprocessing, annotated_hw=annotated_hw, exif=exif, notes=own)
            yield Scene.of_array(image, whole.orientation_for(annotated_hw, exif))
    for kind in own.counts:  # of all windows, which are one image
        if kind != "few levels" or own.counts[kind] >= windows:
            notes.add(kind, name)


class _Part(OpenedImage):
    """A window of an image as an image."""

    def __init__(self, whole: _InParts, window: Window) -> None:
        self.header, self._whole, self._window = whole.header, whole, window

    def samples(self) -> np.ndarray:
        return self._whole.read(self._window)

    def has_alpha(self) -> bool:
        return self._whole.opened.has_alpha()


class _InParts:
    """A file whose samples can be read in windows."""

    def __init__(self, opened: OpenedImage, read: Callable[[Window], np.ndarray]) -> None:
        self.opened, self.header, self.read = opened, opened.header, read


def _opened_in_parts(path: Path, name: str, stack: ExitStack) -> tuple[_InParts | None, str]:
    """The file, or None if it must be decoded whole, and how to avoid that."""
    if not path.is_file() or path.stat().st_size == 0:
        return None, ""  # the reader of whole files reports the error
    with explained(name):
        if is_npy(path):
            array = ArrayFile(path)
            bands = array.header.bands
            return _InParts(array, lambda window: np.array(array.mapped[window.slices]).reshape(*window[2:], bands)), ""
        if not is_tiff(path):
            return None, ""
        opened = TiffPage(stack.enter_context(open_tiff(path)))
        segments, reason = _Segments.of(opened.page, name)
    return (None if segments is None else _InParts(opened, segments.read)), reason


class _Segments:
    """The strips or tiles of a TIFF page; keeps decoded ones until reading has passed them."""

    def __init__(self, page: Any) -> None:
        self._page, self._kept = page, dict[int, np.ndarray]()
        height, width = int(page.imagelength), int(page.imagewidth)
        self._size = (
            (int(page.tilelength), int(page.tilewidth))
            if page.is_tiled
            else (min(int(page.rowsperstrip), height), width)
        )
        self._grid = -(-height // self._size[0]), -(-width // self._size[1])
        self._bands = int(page.samplesperpixel)
        self._planes = self._bands if int(page.planarconfig) == 2 else 1  # 2: bands one after the other
        self._map: np.ndarray | None = None
        if page.is_memmappable:
            array = np.asarray(page.asarray(out="memmap", squeeze=False))  # [planes, depth, rows, columns, bands]
            self._map = array.reshape(self._planes, height, width, -1)

    @classmethod
    def of(cls, page: Any, name: str) -> tuple[_Segments | None, str]:
        """The segments, or None if samples need a conversion or cannot be decoded; and the remedy.

        Raises:
            UserError: if memory is insufficient for a row of segments, which is kept.
        """
        bits = page.bitspersample
        is_plain = int(page.photometric) in (1, 2)  # grey (0 is black) or RGB
        is_jpeg = int(page.photometric) == 6 and int(page.compression) == 7  # YCbCr, decoded to RGB
        if not (is_plain or is_jpeg) or bits not in (8, 16, 32, 64) or page.dtype is None or page.imagedepth != 1:
            return None, ""
        segments = cls(page)
        if segments._map is None:
            if segments._size[0] * segments._size[1] > max_pixels():
                return None, ""
            high, wide = segments._size
            row_bytes = float(high) * wide * segments._grid[1] * segments._bands * page.dtype.itemsize
            kind = "tiles" if page.is_tiled else "strips"
            require_memory(row_bytes, f"{name} in {kind} of {wide}×{high} px, of which a row is decoded", _IN_TILES)
            try:
                segments._segment(0)
            except ValueError as error:
                if "imagecodecs" not in str(error):
                    raise
                return None, "; or install the codec: pip install imagecodecs"
        return segments, ""

    def read(self, window: Window) -> np.ndarray:
        """Samples `[h, w, bands]` of a window, in their own type."""
        rows, columns = window.slices
        if self._map is not None:
            part = self._map[:, rows, columns]
            return np.array(part[0] if self._planes == 1 else np.moveaxis(part[..., 0], 0, -1))
        out = np.zeros((window.height, window.width, self._bands), self._page.dtype)
        high, wide = self._size
        per_plane = self._grid[0] * self._grid[1]
        for index in [key for key in self._kept if (key % per_plane // self._grid[1] + 1) * high <= window.top]:
            del self._kept[index]
        for plane in range(self._planes):
            bands = slice(plane, plane + 1) if self._planes > 1 else slice(None)
            for i in range(rows.start // high, -(-rows.stop // high)):
                for j in range(columns.start // wide, -(-columns.stop // wide)):
                    segment = self._segment(plane * per_plane + i * self._grid[1] + j)
                    top, left = max(rows.start, i * high), max(columns.start, j * wide)
                    bottom, right = min(rows.stop, (i + 1) * high), min(columns.stop, (j + 1) * wide)
                    out[top - rows.start : bottom - rows.start, left - columns.start : right - columns.start, bands] = (
                        segment[top - i * high : bottom - i * high, left - j * wide : right - j * wide]
                    )
        return out

    def _segment(self, index: int) -> np.ndarray:
        """The samples of a strip or tile, `[h, w, bands of a plane]`."""
        if index not in self._kept:
            page = self._page
            data = None
            if page.databytecounts[index]:  # otherwise a tile missing from a sparse file
                file = page.parent.filehandle
                file.seek(page.dataoffsets[index])
                data = file.read(page.databytecounts[index])
            options = {}
            if int(page.compression) in (6, 7):
                options = {"jpegtables": page.jpegtables, "jpegheader": page.jpegheader}
            array, _, shape = page.decode(data, index, _fullsize=False, **options)
            self._kept[index] = np.full(shape, page.nodata, page.dtype)[0] if array is None else array[0]
        return self._kept[index]

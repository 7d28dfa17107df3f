"""Image files as arrays: orientation, sample ranges and bands, in the same way for every command.

**Orientation.** An image is returned upright, as viewers show it. If an annotation gives a size, the size decides: if
it matches the pixels as stored and not the upright image, the annotation refers to the pixels as stored. Sizes cannot
decide for orientations 2, 3 and 4 (mirrored or upside down) and square images; these are returned upright too, as
labelling tools, OpenCV and Detectron2 show them. `exif` overrides the rule.

**Range.** Samples of 8 bits are 0–255. Wider samples (integers of 16 or 32 bits, floats) are scaled to float32 with
`Preprocessing.pixel_range`, which maps to 0 and 255, or else with the range stated in a TIFF file. Without either, the
high byte of 16-bit samples is kept, and other samples are an error.

**Bands.** A model of three channels without `Preprocessing.bands` reads RGB: grey is repeated, palettes, CMYK, YCbCr
and LAB are converted, an alpha channel and further bands are dropped. A model with another number of channels reads the
first bands of a file, or `bands`; a model with one channel reads grey, or the luminance of RGB.

Losses in these conversions are counted in `ImageNotes`.
"""

from __future__ import annotations

import importlib
import io
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, PngImagePlugin, UnidentifiedImageError

from maskrcnn.errors import UserError
from maskrcnn.files import files_below
from maskrcnn.imaging.preprocess import Preprocessing, resize_antialiased

# Suffixes of image files in folders.
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".gif", ".jp2", ".avif")
# Suffixes of other files that may be images: arrays, which are read if given explicitly, and photos that are not read.
UNSEARCHED_SUFFIXES = (".npy", ".heic", ".heif", ".jxl", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".dcm")
EXIF_RULES = ("auto", "upright", "stored")
MAX_PIXELS_VARIABLE = "MASKRCNN_MAX_IMAGE_PIXELS"
_MAX_PIXELS = 1_000_000_000  # 3 GB of RGB; Pillow's own limit is 179 million
_IN_TILES = "read it in tiles (--tile 1024) from a tiled TIFF file (gdal_translate -of COG IN OUT.tif)"
_READABLE = "an image file that Pillow or tifffile reads, such as JPEG, PNG or TIFF, or an .npy file"
_ORIENTATION_TAG = 274  # EXIF 2.3, and TIFF 6.0 like the next ones
_WIDTH_TAG, _HEIGHT_TAG, _BITS_TAG, _SAMPLES_TAG, _MAX_SAMPLE_TAG, _SUBFILE_TAG, _EXTRA_TAG = (
    256,
    257,
    258,
    277,
    281,
    254,
    338,
)
_PNG_EXIF = {"exif", "Raw profile type exif", "XML:com.adobe.xmp"}  # Pillow's keys of EXIF data in PNG files
_TIFF_STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_NPY_START = b"\x93NUMPY"
_LUMINANCE = (0.299, 0.587, 0.114)  # ITU-R BT.601, as Pillow's mode L
_FEW_LEVELS = 32  # out of 256 levels; a 12-bit image stored in 16 bits has 16
_BANDS_OF_MODE = {"1": 1, "L": 1, "I": 1, "F": 1, "LA": 2, "La": 2, "RGB": 3, "YCbCr": 3, "LAB": 3, "HSV": 3, "P": 3}
_GREY_ALPHA = "LA;16B"
_SAMPLES_MODE = {  # modes whose samples are not bands, and the mode to convert them to
    "1": "L",
    "P": "RGB",
    "PA": "RGBA",
    "La": "LA",
    "RGBa": "RGBA",
    "YCbCr": "RGB",
    "LAB": "RGB",
    "HSV": "RGB",
}
# Pillow rejects PNG files with more than 1 MB in a text or profile, which are read but not used.
PngImagePlugin.MAX_TEXT_CHUNK = max(PngImagePlugin.MAX_TEXT_CHUNK, 64 << 20)
PngImagePlugin.MAX_TEXT_MEMORY = max(PngImagePlugin.MAX_TEXT_MEMORY, 256 << 20)

RANGE_OPTION = "set --pixel-range LOW,HIGH (training: --set model.preprocessing.pixel_range=[LOW,HIGH])"
_NOTES = {
    "frames": "with several frames or pages, of which the first is read; split the file to use the others",
    "alpha": "with transparency, which is dropped; train with --set model.channels=4 to read it as a band",
    "bands": "with more bands than the model reads; the others are dropped; train with --set model.channels=N, or "
    "choose bands with --set model.preprocessing.bands=[…]",
    "cmyk": "in CMYK, converted without their colour profile; convert them to RGB for exact colours",
    "high byte": f"of 16 bits, of which a model without a pixel range keeps 8; {RANGE_OPTION} to keep all",
    "few levels": f"of more than 8 bits with values in less than an eighth of the range, almost black; {RANGE_OPTION}",
    "unit range": f"of floats from 0 to 1, scaled to 0–255 as the model has no range; {RANGE_OPTION} to change it",
    "clipped": f"with values outside the pixel range, which are clipped; {RANGE_OPTION} to change it",
    "nan": "with values that are not numbers, read as the low end of the pixel range",
    "resized": "of another size than their annotations, resized to the annotated size",
}


@dataclass
class ImageNotes:
    """Information lost or changed in reading images, counted by kind."""

    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)

    def add(self, kind: str, name: str) -> None:
        """Counts an image."""
        self.counts[kind] += 1
        self.examples.setdefault(kind, name)

    def texts(self) -> list[str]:
        """Descriptions of the kinds, without those that depend on the pixel range."""
        return [f"an image {_NOTES[kind]}" for kind in self.counts if kind not in ("clipped", "nan")]

    def lines(self) -> list[str]:
        """One line per kind, with the first image."""
        return [f"{count} image(s) {_NOTES[kind]}; first: {self.examples[kind]}" for kind, count in self.counts.items()]


@dataclass(frozen=True)
class ImageHeader:
    """Properties of an image file that are known without decoding it."""

    size_hw: tuple[int, int]  # size of the pixels as stored
    orientation: int  # EXIF orientation, 1 (upright) to 8
    bands: int
    is_wide: bool  # whether samples have more than 8 bits
    stated_range: tuple[float, float] | None = None  # range of the samples, if the file states it
    frames: int = 1  # 1 or 2 (more than one)

    def orientation_for(self, annotated_hw: tuple[int, int] | None = None, exif: str = "auto") -> int:
        """The orientation to apply (1: none), by the rule at the top of this module.

        Args:
            annotated_hw: size in the annotation.
            exif: one of `EXIF_RULES`.
        """
        if exif == "stored":
            return 1
        if exif == "upright" or annotated_hw is None or self.orientation < 5:
            return self.orientation
        stored, upright = self.size_hw, self.size_hw[::-1]
        if annotated_hw == upright:
            return self.orientation
        if annotated_hw == stored or (same_ratio(stored, annotated_hw) and not same_ratio(upright, annotated_hw)):
            return 1
        return self.orientation

    def shown_hw(self, annotated_hw: tuple[int, int] | None = None, exif: str = "auto") -> tuple[int, int]:
        """The size after `orientation_for` is applied."""
        return self.size_hw[::-1] if self.orientation_for(annotated_hw, exif) > 4 else self.size_hw


def read_image(
    path: str | Path,
    preprocessing: Preprocessing | None = None,
    *,
    annotated_hw: tuple[int, int] | None = None,
    exif: str = "auto",
    notes: ImageNotes | None = None,
) -> np.ndarray:
    """Reads an image file as `[H, W, C]`: uint8, or float32 from 0 to 255 for samples of more than 8 bits.

    The rules of orientation, range and bands are at the top of this module. If the file has several frames, the first
    is read.

    Args:
        path: the file.
        preprocessing: the model's channels, bands and pixel range (default: RGB).
        annotated_hw: size in the annotation of the image: it decides on the orientation, and an image of another size
            but the same aspect ratio is resized to it.
        exif: one of `EXIF_RULES`.
        notes: counts information losses.

    Raises:
        UserError: if the file is missing, empty, damaged or not an image, or has no pixels, more than
            `MASKRCNN_MAX_IMAGE_PIXELS`, samples without a known range, too few bands, or another aspect ratio than
            `annotated_hw`.
    """
    path = Path(path)
    with _source(path) as source:
        return _read(source, f"image {path}", preprocessing or Preprocessing(), annotated_hw, exif, notes)[0]


def decode_image(
    data: bytes, name: str, preprocessing: Preprocessing | None = None, *, notes: ImageNotes | None = None
) -> np.ndarray:
    """Decodes the content of an image file, like `read_image`.

    Args:
        data: content of the file.
        name: name of the image in errors.
        preprocessing: see `read_image`.
        notes: counts information losses.

    Raises:
        UserError: as in `read_image`.
    """
    return read_upright(data, name, preprocessing or Preprocessing(), notes)[0]


def read_upright(
    content: Path | bytes, name: str, preprocessing: Preprocessing, notes: ImageNotes | None = None
) -> tuple[np.ndarray, int]:
    """As `read_image` or `decode_image`, for a file or its content; also returns the EXIF orientation (1: none)."""
    if isinstance(content, bytes):
        if not content:
            raise UserError(f"image {name} is empty", _READABLE, "send the content of an image file")
        return _read(io.BytesIO(content), f"image {name}", preprocessing, None, "auto", notes)
    with _source(content) as source:
        return _read(source, f"image {name}", preprocessing, None, "auto", notes)


def read_header(content: str | Path | bytes, name: str = "") -> ImageHeader:
    """Reads the header of an image file or of its content; `name` is its name in errors.

    Raises:
        UserError: if the file is missing, empty or not an image.
    """
    if isinstance(content, bytes):
        with explained(f"image {name}"), _opened(io.BytesIO(content)) as opened:
            return opened.header
    with _source(Path(content)) as source, explained(f"image {content}"), _opened(source) as opened:
        return opened.header


def read_samples(path: Path, preprocessing: Preprocessing | None = None) -> np.ndarray:
    """Reads the samples of an image in their own type, `[H, W, bands]`, as stored, neither scaled nor rotated.

    Args:
        path: image file.
        preprocessing: a model's: return only the bands that it reads, without an alpha channel, for example.
    """
    name = f"image {path}"
    with _source(path) as source, explained(name), _opened(source) as opened:
        samples = opened.samples()
        if preprocessing is None:
            return samples
        return _bands_read(samples, preprocessing, ImageNotes(), name, has_alpha=opened.has_alpha())


def upright_size(path: Path) -> tuple[int, int] | None:
    """Height and width of an image after its EXIF orientation is applied, from its header; None without a header."""
    try:
        return read_header(path).shown_hw()
    except UserError:
        return None


def kinds_not_read(files: Sequence[Path], where: str) -> tuple[str, str]:
    """The suffixes of files in `where` that may be images but are not read, and the fix."""
    kinds = sorted({path.suffix.lower() for path in files})
    fixes = [f"give .npy files explicitly ('{where}/*.npy')"] if ".npy" in kinds else []
    fixes += ["convert them to JPEG or PNG"] if set(kinds) - {".npy"} else []
    return ", ".join(kinds), ", ".join(fixes)


def images_in(folder: Path, limit: int) -> list[Path]:
    """The images of a folder and its subfolders: at most `limit`, evenly spaced in the sorted list.

    Raises:
        UserError: if the folder does not exist, or has no image.
    """
    if not folder.is_dir():
        raise UserError(
            f"no folder {folder}", "a folder of images", "choose a folder of images like those to predict on"
        )
    files = files_below(folder, IMAGE_SUFFIXES)
    if not files:
        others, fix = kinds_not_read(files_below(folder, UNSEARCHED_SUFFIXES), str(folder))
        raise UserError(
            f"{folder}: no image in it ({', '.join(IMAGE_SUFFIXES)})" + (f", but files {others}" if others else ""),
            "images",
            fix or "add images, or choose another folder",
        )
    indices = np.linspace(0, len(files) - 1, min(limit, len(files))).round().astype(int)
    return [files[index] for index in indices]


def fits_size(size_hw: tuple[int, int], annotated_hw: tuple[int, int], name: str) -> bool:
    """Whether an image has the size of its annotation; False for another size of the same aspect ratio.

    Raises:
        UserError: for another aspect ratio; `name` identifies the image.
    """
    if size_hw == annotated_hw:
        return True
    if same_ratio(size_hw, annotated_hw):
        return False
    raise UserError(
        f"{name}: {size_hw[1]}×{size_hw[0]} pixels",
        f"{annotated_hw[1]}×{annotated_hw[0]} as in its annotations, or that size scaled",
        "restore the annotated image, or correct width and height in the annotation file",
    )


def same_ratio(first_hw: tuple[int, int], second_hw: tuple[int, int]) -> bool:
    """Whether two sizes are the same up to scale, if the sides of the smaller one are rounded to pixels.

    An image that differs in only one side has been cropped or padded, not scaled.
    """
    (height, width), (other_height, other_width) = first_hw, second_hw
    if (height == other_height) != (width == other_width):
        return False
    return abs(width * other_height - other_width * height) <= max(*first_hw, *second_hw)


# --- opening -----------------------------------------------------------------------------------------


@contextmanager
def _source(path: Path) -> Iterator[Path]:
    """Checks that the file exists and is not empty."""
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise UserError(f"image {path} {what}", _READABLE, "correct the path or restore the file")
    if path.stat().st_size == 0:
        raise UserError(f"image {path} is an empty file", _READABLE, "restore the file from its source")
    yield path


@contextmanager
def explained(name: str) -> Iterator[None]:
    """Turns any exception of a decoder into a UserError."""
    try:
        yield
    except UserError:
        raise
    except UnidentifiedImageError as error:
        raise UserError(
            f"{name} is not an image", _READABLE, "convert the file to PNG, or remove it from the input"
        ) from error
    except MemoryError as error:
        raise UserError(
            f"{name} does not fit into memory", "an image that can be decoded here", f"scale it down, or {_IN_TILES}"
        ) from error
    except Image.DecompressionBombError as error:  # Pillow's error for more than twice the limit
        raise _too_large(name) from error
    except Exception as error:  # decoders raise any exception on damaged bytes
        raise UserError(
            f"{name} cannot be decoded ({type(error).__name__}: {error})",
            "a complete, undamaged image file",
            "restore the file from its source, or convert it to 8-bit PNG",
        ) from error


def max_pixels() -> int:
    """The maximum number of pixels of an image to read.

    Raises:
        UserError: if the environment variable is not a number.
    """
    text = os.environ.get(MAX_PIXELS_VARIABLE, "")
    try:
        limit = int(text) if text else _MAX_PIXELS
    except ValueError as error:
        raise UserError(
            f"{MAX_PIXELS_VARIABLE}={text}", "a number of pixels", "correct or unset the variable"
        ) from error
    if Image.MAX_IMAGE_PIXELS is not None and limit > Image.MAX_IMAGE_PIXELS:
        Image.MAX_IMAGE_PIXELS = limit  # Pillow's own check does not suggest a fix
    return limit


def _check_pixels(size_hw: tuple[int, int], name: str) -> None:
    limit = max_pixels()
    if size_hw[0] * size_hw[1] > limit:
        raise _too_large(f"{name} of {size_hw[1]}×{size_hw[0]} pixels")


def _too_large(found: str) -> UserError:
    return UserError(
        found if "pixels" in found else f"{found} of more than {2 * max_pixels()} pixels",
        f"at most {max_pixels()} pixels, a limit against files that fill the memory",
        f"{_IN_TILES}, or allow more with the environment variable {MAX_PIXELS_VARIABLE}",
    )


class OpenedImage:
    """An open image file: its header, samples, and RGB of 8 bits."""

    header: ImageHeader

    def samples(self) -> np.ndarray:
        """Samples in their own type, `[H, W, bands]`, as stored."""
        raise NotImplementedError

    def rgb(self, notes: ImageNotes, name: str) -> np.ndarray | None:
        """uint8 `[H, W, 3]` as stored, converted by Pillow; None if Pillow cannot convert it."""
        return None

    def has_alpha(self) -> bool:
        """Whether the last band is transparency."""
        return False


@contextmanager
def _opened(source: Path | io.BytesIO) -> Iterator[OpenedImage]:
    max_pixels()  # raises Pillow's limit
    if is_npy(source):
        yield ArrayFile(source)
        return
    try:
        image = Image.open(source)
    except UnidentifiedImageError:
        if not is_tiff(source):
            raise
        with open_tiff(source) as tiff:
            yield TiffPage(tiff)
        return
    with image:
        yield _Pillow(image, source)


def is_npy(source: Path | io.BytesIO) -> bool:
    """Whether the content is that of an .npy file."""
    return _beginning(source) == _NPY_START


def is_tiff(source: Path | io.BytesIO) -> bool:
    """Whether the content is that of a TIFF or BigTIFF file."""
    return _beginning(source)[:4] in _TIFF_STARTS


def _beginning(source: Path | io.BytesIO) -> bytes:
    if isinstance(source, io.BytesIO):
        return source.getvalue()[: len(_NPY_START)]
    with open(source, "rb") as file:
        return file.read(len(_NPY_START))


def open_tiff(source: Path | io.BytesIO) -> Any:
    """Opens a file with tifffile; the caller must close it.

    Raises:
        UserError: if tifffile is not installed.
    """
    try:
        tifffile = importlib.import_module("tifffile")
    except ImportError as error:
        raise UserError(
            "a TIFF file with more bands or bits than Pillow reads, without tifffile",
            "the library tifffile",
            "pip install tifffile imagecodecs (the latter for compressed files)",
        ) from error
    if isinstance(source, io.BytesIO):
        source.seek(0)
    return tifffile.TiffFile(source)


class ArrayFile(OpenedImage):
    """An .npy file, `[H, W]` or `[H, W, bands]`."""

    def __init__(self, source: Path | io.BytesIO) -> None:
        if isinstance(source, Path):
            self.mapped = np.load(source, mmap_mode="r", allow_pickle=False)
        else:
            self.mapped = np.load(source, allow_pickle=False)
        shape = self.mapped.shape
        if self.mapped.ndim not in (2, 3) or self.mapped.dtype.kind not in "buif":
            raise ValueError(f"{self.mapped.dtype} of shape {shape} instead of numbers of shape (H, W, bands)")
        bands = shape[2] if self.mapped.ndim == 3 else 1
        self.header = ImageHeader((shape[0], shape[1]), 1, bands, is_wide=self.mapped.dtype not in (np.uint8, bool))

    def samples(self) -> np.ndarray:
        return np.array(self.mapped).reshape(*self.header.size_hw, self.header.bands)


class TiffPage(OpenedImage):
    """The first page of a TIFF file, read by tifffile."""

    def __init__(self, tiff: Any) -> None:
        self.page = page = tiff.pages[0]
        orientation = next((int(each) for each in _numbers(_value(page, _ORIENTATION_TAG)) if each in range(1, 9)), 1)
        further = [other for other in tiff.pages[1:2] if not int(getattr(other, "subfiletype", 0)) & 1]  # 1: overview
        self.header = ImageHeader(
            (int(page.imagelength), int(page.imagewidth)),
            orientation,
            int(page.samplesperpixel),
            is_wide=max(_numbers(page.bitspersample)) > 8,
            stated_range=_stated_range(page.bitspersample, _value(page, _MAX_SAMPLE_TAG)),
            frames=1 + len(further),
        )

    def samples(self) -> np.ndarray:
        try:
            array = np.asarray(self.page.asarray())
        except ValueError as error:
            if "imagecodecs" not in str(error):
                raise
            raise UserError(
                f"a compressed TIFF file ({error})", "the library imagecodecs", "pip install imagecodecs"
            ) from error
        if self.page.axes.startswith("S"):  # bands one after the other
            array = np.moveaxis(array, 0, -1)
        return array.reshape(*self.header.size_hw, self.header.bands)

    def has_alpha(self) -> bool:
        return any(int(kind) in (1, 2) for kind in self.page.extrasamples[-1:])  # associated or unassociated alpha


class _Pillow(OpenedImage):
    """An image read by Pillow."""

    def __init__(self, image: Image.Image, source: Path | io.BytesIO) -> None:
        self._image, self._source = image, source
        width: int
        height: int
        bands: int
        (width, height), bands = image.size, _BANDS_OF_MODE.get(image.mode, len(image.getbands()))
        self._needs_tifffile = False
        self._packing = _packing_of_16_bits(image)
        if self._packing == _GREY_ALPHA:
            bands = 2
        bits = 16 if self._packing or image.mode.startswith("I") or image.mode == "F" else 8
        stated = None
        if image.format == "TIFF":
            # Prevents memory mapping, with which Pillow 13.0 exchanges width and height of rotated images.
            image.filename = ""  # type: ignore[attr-defined]
            tags = image.tag_v2  # type: ignore[attr-defined]
            width, height = tags[_WIDTH_TAG], tags[_HEIGHT_TAG]  # `size` of newer versions is that of the upright image
            bits = int(max(_numbers(tags.get(_BITS_TAG)), default=bits))
            bands = tags.get(_SAMPLES_TAG, bands) if image.mode != "P" else bands
            is_premultiplied = 1 in _numbers(tags.get(_EXTRA_TAG))
            self._needs_tifffile = bands > 1 and (bits > 8 or bands > 4 or is_premultiplied)
            stated = _stated_range(bits, tags.get(_MAX_SAMPLE_TAG))
        self.header = ImageHeader(
            (height, width), _orientation(image, source), bands, bits > 8, stated, 1 + _has_more_frames(image)
        )

    def samples(self) -> np.ndarray:
        if self._needs_tifffile:
            with open_tiff(self._source) as tiff:
                return TiffPage(tiff).samples()
        image = self._image
        if image.mode == "P" and "transparency" in image.info:
            image = image.convert("RGBA")
        elif image.mode in _SAMPLES_MODE:
            image = image.convert(_SAMPLES_MODE[image.mode])
        array = np.array(image)
        if self._packing:  # Pillow keeps the high byte; with the byte order swapped, it keeps the low byte
            has_grey = self._packing == _GREY_ALPHA  # its four bytes per pixel are read unchanged
            with Image.open(self._source) as opened:
                other: Any = opened
                packing = "RGBA" if has_grey else self._packing[:-1] + "L"
                other.tile = [tile._replace(args=packing) for tile in other.tile]
                low = np.array(other)
            high, low = (low[..., ::2], low[..., 1::2]) if has_grey else (array, low)
            array = high.astype(np.uint16) << 8 | low
        array = self._as_stored(array)
        return array.reshape(*array.shape[:2], -1)

    def rgb(self, notes: ImageNotes, name: str) -> np.ndarray | None:
        image = self._image
        if image.mode == "F":
            return None
        if image.mode.startswith("I"):  # "I;16" and its byte orders; "I" is 32 bits, often holding 16
            samples = np.array(image)
            if samples.size and (samples.min() < 0 or samples.max() > 65535):
                return None
            return self._as_stored(np.repeat((samples >> 8).astype(np.uint8)[..., None], 3, axis=2))
        if image.mode == "CMYK":
            notes.add("cmyk", name)
        elif self.header.bands > 3 and not self.has_alpha():
            notes.add("bands", name)
        if image.mode == "P" and "transparency" in image.info:  # or Pillow warns
            image = image.convert("RGBA")
        elif image.mode != "P" and image.mode in _SAMPLES_MODE:
            image = image.convert(_SAMPLES_MODE[image.mode])
        if image.mode in ("RGBA", "LA") and image.getchannel("A").getextrema()[0] != 255:
            notes.add("alpha", name)
        return self._as_stored(np.array(image.convert("RGB")))

    def has_alpha(self) -> bool:
        return self._image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in self._image.info

    def _as_stored(self, array: np.ndarray) -> np.ndarray:
        """Undoes the orientation that Pillow has applied to a TIFF file while decoding it."""
        if self._image.format != "TIFF" or self._image.getexif().get(_ORIENTATION_TAG, 1) != 1:
            return array
        return oriented(array, {6: 8, 8: 6}.get(self.header.orientation, self.header.orientation))


def _numbers(value: Any) -> tuple[float, ...]:
    """A value of a TIFF tag as a tuple; () for none."""
    return () if value is None else tuple(value) if isinstance(value, tuple) else (value,)


def _value(page: Any, tag: int) -> Any:
    """The value of a tag of tifffile's page; None without it."""
    found = page.tags.get(tag)
    return None if found is None else found.value


def _stated_range(bits: Any, most_sample: Any) -> tuple[float, float] | None:
    """The range of samples stated in the tags of a TIFF file, for more than 8 and at most 16 bits."""
    bits, most = int(max(_numbers(bits))), max(_numbers(most_sample), default=0)
    if 8 < bits < 16:
        return 0.0, float((1 << bits) - 1)
    return (0.0, float(most)) if bits == 16 and 0 < most < 65535 else None


def _packing_of_16_bits(image: Image.Image) -> str:
    """Pillow's packing of 16-bit PNG colours, such as "RGB;16B", of which it decodes 8 bits; "" for other images.

    Grey with alpha is RGBA to Pillow.
    """
    tiles: Any = getattr(image, "tile", None) if image.format == "PNG" else None
    arguments = tiles[0].args if tiles else None
    return arguments if isinstance(arguments, str) and arguments in ("RGB;16B", "RGBA;16B", _GREY_ALPHA) else ""


def _has_more_frames(image: Image.Image) -> bool:
    """Whether the image has several frames, not counting the overviews of a TIFF file."""
    if image.format not in ("GIF", "PNG", "TIFF", "WEBP"):
        return False
    try:
        if image.format != "TIFF" or not getattr(image, "is_animated", False):
            return bool(getattr(image, "is_animated", False))
        image.seek(1)
        return not image.tag_v2.get(_SUBFILE_TAG, 0) & 1  # type: ignore[attr-defined]
    except Exception:  # a damaged second frame; the first may be intact
        return False
    finally:
        image.seek(0)


def _orientation(image: Image.Image, source: Path | io.BytesIO) -> int:
    """The EXIF orientation, 1 without one or if the metadata cannot be read, as in viewers."""
    try:
        if image.format == "PNG" and not (_PNG_EXIF & image.info.keys() or _has_late_exif(source)):
            return 1  # `getexif` would decode the whole image to search for EXIF data
        orientation = image.getexif().get(_ORIENTATION_TAG, 1)
    except Exception:  # Pillow raises any exception
        return 1
    return orientation if orientation in range(1, 9) else 1


def _has_late_exif(source: Path | io.BytesIO) -> bool:
    """Whether a PNG file has EXIF data, also after the pixels, where Pillow does not find it on opening."""
    with open(source, "rb") if isinstance(source, Path) else io.BytesIO(source.getvalue()) as file:
        file.seek(8)
        while len(start := file.read(8)) == 8 and start[4:] != b"eXIf":
            file.seek(int.from_bytes(start[:4], "big") + 4, os.SEEK_CUR)
    return start[4:] == b"eXIf"


# --- pixels ------------------------------------------------------------------------------------------


def _read(
    source: Path | io.BytesIO,
    name: str,
    preprocessing: Preprocessing,
    annotated_hw: tuple[int, int] | None,
    exif: str,
    notes: ImageNotes | None,
) -> tuple[np.ndarray, int]:
    """Pixels, and the orientation applied to them."""
    notes = notes if notes is not None else ImageNotes()
    with explained(name), _opened(source) as opened:
        header = opened.header
        shown_hw = header.shown_hw(annotated_hw, exif)
        if 0 in shown_hw:
            raise UserError(
                f"{name} measures {shown_hw[1]}×{shown_hw[0]} pixels",
                "at least 1×1 pixel",
                "restore the file from its source",
            )
        for size_hw in (shown_hw, annotated_hw or shown_hw):
            _check_pixels(size_hw, name)
        fits = annotated_hw is None or fits_size(shown_hw, annotated_hw, name)
        pixels = pixels_of(opened, preprocessing, notes, name)
    orientation = header.orientation_for(annotated_hw, exif)
    pixels = np.ascontiguousarray(oriented(pixels, orientation))
    if annotated_hw is not None and not fits:
        notes.add("resized", name)
        pixels = resize_antialiased(pixels, annotated_hw)
    return pixels, orientation


def pixels_of(opened: OpenedImage, preprocessing: Preprocessing, notes: ImageNotes, name: str) -> np.ndarray:
    """Pixels as stored, in the model's range and bands."""
    header = opened.header
    if header.frames > 1:
        notes.add("frames", name)
    value_range = preprocessing.pixel_range or header.stated_range
    if preprocessing.channels in (1, 3) and not preprocessing.bands and not (header.is_wide and value_range):
        rgb = opened.rgb(notes, name)
        if rgb is not None:
            if header.is_wide:
                notes.add("few levels" if rgb.max() < _FEW_LEVELS else "high byte", name)
            return rgb if preprocessing.channels == 3 else _luminance(rgb)
    samples = _bands_read(opened.samples(), preprocessing, notes, name, has_alpha=opened.has_alpha())
    samples = _scaled(samples, value_range, notes, name)
    if preprocessing.channels == 1 and samples.shape[2] == 3:
        return _luminance(samples)
    return samples if samples.shape[2] == preprocessing.channels else np.repeat(samples, preprocessing.channels, axis=2)


def oriented(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Pixels `[H, W, …]` after an EXIF orientation, 1 to 8, is applied; a view."""
    if orientation in (3, 4, 7):
        pixels = pixels[::-1]
    if orientation in (2, 3, 7):
        pixels = pixels[:, ::-1]
    if orientation in (5, 7):
        pixels = pixels.swapaxes(0, 1)
    return np.rot90(pixels, {6: 3, 8: 1}.get(orientation, 0))


def _scaled(samples: np.ndarray, value_range: tuple[float, ...] | None, notes: ImageNotes, name: str) -> np.ndarray:
    """Samples of any type as uint8, or as float32 from 0 to 255."""
    if samples.dtype == np.uint8 or samples.size == 0:
        return samples
    if samples.dtype == bool:
        return samples.astype(np.uint8) * np.uint8(255)
    if samples.dtype.kind not in "iuf":
        raise ValueError(f"samples of {samples.dtype}, which are neither integers nor floats")
    values: np.ndarray = samples.astype(np.float32 if samples.dtype.itemsize <= 2 else np.float64)
    is_nan = np.isnan(values)
    if is_nan.any():
        notes.add("nan", name)
    least, most = (
        float(extreme(values, initial=start, where=~is_nan)) for extreme, start in ((np.min, np.inf), (np.max, -np.inf))
    )
    if not value_range:
        if samples.dtype.kind == "f" and least >= 0 and most <= 1:
            value_range = (0.0, 1.0)
            notes.add("unit range", name)
        elif samples.dtype.kind in "iu" and least >= 0 and most <= 65535:
            notes.add("few levels" if most < _FEW_LEVELS << 8 else "high byte", name)
            return (samples >> 8).astype(np.uint8)
        else:
            raise UserError(
                f"{name} has samples from {least:g} to {most:g} ({samples.dtype}), whose range is not known",
                "samples of 8 or 16 bits, or a model with a pixel range",
                RANGE_OPTION,
            )
    low, high = value_range
    if least < low or most > high:
        notes.add("clipped", name)
    values = np.where(is_nan, low, values) if is_nan.any() else values
    scaled: np.ndarray = np.clip((values - low) * (255 / (high - low)), 0, 255).astype(np.float32)
    if 0 < scaled.max() < _FEW_LEVELS:
        notes.add("few levels", name)
    return scaled


def _bands_read(
    samples: np.ndarray, preprocessing: Preprocessing, notes: ImageNotes, name: str, *, has_alpha: bool
) -> np.ndarray:
    """The bands of samples `[H, W, bands]` that a model reads: one per channel, one grey, or three colour bands."""
    count, channels, bands = samples.shape[2], preprocessing.channels, preprocessing.bands
    if channels in (1, 3) and not bands:
        if has_alpha and count in (2, 4):
            if samples[..., -1].min() < samples[..., -1].max():
                notes.add("alpha", name)
        elif count > 3:
            notes.add("bands", name)
        return samples[..., : 3 if count >= 3 else 1]
    needed = max(bands, default=channels)
    if count < needed:
        raise UserError(
            f"{name} has {count} band(s)",
            f"at least {needed}, as the model reads",
            "use images with all bands (multi-band TIFF, .npy), or train a model with other "
            "--set model.channels or model.preprocessing.bands",
        )
    if bands:
        return samples[..., [band - 1 for band in bands]]
    if count > channels:
        notes.add("bands", name)
    return samples[..., :channels]


def _luminance(rgb: np.ndarray) -> np.ndarray:
    grey = rgb @ np.array(_LUMINANCE, np.float32)
    return (grey.round() if rgb.dtype == np.uint8 else grey).astype(rgb.dtype)[..., None]

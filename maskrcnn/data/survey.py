"""The images of a dataset: reading them according to their annotations, and a survey of their headers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import numpy as np

from maskrcnn.data.coco import CocoDataset
from maskrcnn.data.images import (
    EXIF_RULES,
    ImageHeader,
    ImageNotes,
    fits_size,
    read_header,
    read_image,
    read_samples,
)
from maskrcnn.data.records import ImageRecord
from maskrcnn.errors import UserError
from maskrcnn.imaging.draw import displayed
from maskrcnn.imaging.preprocess import Preprocessing

_THREADS = 8  # threads that read headers
_MEASURED = 200  # number of images from which the range is measured


def read_record(
    record: ImageRecord, preprocessing: Preprocessing | None = None, notes: ImageNotes | None = None
) -> np.ndarray:
    """Reads an annotated image in the frame and size of its annotation, `[H, W, C]`; see `read_image`."""
    return read_image(
        record.path, preprocessing, annotated_hw=(record.height, record.width), exif=record.exif, notes=notes
    )


def unreadable_images(records: Sequence[ImageRecord], preprocessing: Preprocessing, *, workers: int) -> list[UserError]:
    """Decodes images in threads; returns the errors of `read_record`, in the order of the images."""

    def error_of(index: int) -> UserError | None:
        try:
            read_record(records[index], preprocessing)
        except UserError as error:
            return error
        return None

    with ThreadPoolExecutor(max(1, workers)) as pool:
        return [error for error in pool.map(error_of, range(len(records))) if error is not None]


def read_for_display(record: ImageRecord) -> np.ndarray:
    """Reads an annotated image for display, uint8 `[H, W, 3]`; samples of more than 8 bits are scaled by their range.

    An image that does not fit its annotation is returned unchanged.

    Raises:
        UserError: if it cannot be read.
    """
    rule = Preprocessing()
    if read_header(record.path).is_wide:
        samples = read_samples(record.path, rule)
        finite = samples[np.isfinite(samples)]
        low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)
        rule = Preprocessing(pixel_range=(low, high if high > low else low + 1))
    try:
        return displayed(read_record(record, rule))
    except UserError:
        return displayed(read_image(record.path, rule))


def with_exif(dataset: CocoDataset, exif: str) -> CocoDataset:
    """A dataset whose images are read with an EXIF orientation rule, one of `images.EXIF_RULES`.

    Raises:
        UserError: for another rule.
    """
    if exif not in EXIF_RULES:
        raise UserError(f"exif {exif!r}", f"one of {', '.join(EXIF_RULES)}", "choose one of these")
    return replace(dataset, images=replace(dataset.images, exif=exif))


@dataclass(frozen=True)
class ImageSurvey:
    """Statistics of the image headers of one split."""

    split: str
    images: int
    wide: tuple[ImageRecord, ...]  # images whose samples have more than 8 bits
    stated_range: tuple[float, float] | None  # the widest range stated in an image of more than 8 bits
    counts: Counter[str] = field(default_factory=Counter)  # images by remark
    examples: dict[str, str] = field(default_factory=dict)  # the first image by remark

    def lines(self) -> list[str]:
        """One line per remark."""
        return [
            f"{self.split}: {count} of {self.images} image(s) {remark}; first: {self.examples[remark]}"
            for remark, count in self.counts.items()
        ]


def survey_images(dataset: CocoDataset, preprocessing: Preprocessing | None = None) -> ImageSurvey:
    """Reads the headers of a dataset's images. Images that cannot be opened are reported when their pixels are read.

    Args:
        dataset: images and annotations.
        preprocessing: the model's (default: its channels and bands are not compared with the images).

    Raises:
        UserError: if images have another aspect ratio than their annotations, or fewer bands than the model reads.
    """
    faults: list[UserError] = []
    wide: list[ImageRecord] = []
    ranges: list[tuple[float, float]] = []
    survey = ImageSurvey(dataset.split, len(dataset.images), (), None)
    for record, header in _headers(dataset.images):
        if header is None:
            continue
        try:
            remarks = list(_remarks(record, header, preprocessing))
        except UserError as fault:
            faults.append(fault)
            continue
        for remark in remarks:
            survey.counts[remark] += 1
            survey.examples.setdefault(remark, str(record.path))
        if header.is_wide:
            wide.append(record)
            ranges += [header.stated_range] if header.stated_range else []
    if faults:
        first = faults[0]
        found = (
            f"{dataset.annotation_path}: {len(faults)} of {len(dataset.images)} images do not fit, first: {first.found}"
        )
        raise UserError(found, first.expected, first.fix)
    stated = (min(low for low, _ in ranges), max(high for _, high in ranges)) if len(ranges) == len(wide) > 0 else None
    return replace(survey, wide=tuple(wide), stated_range=stated)


def _headers(records: Sequence[ImageRecord]) -> Iterator[tuple[ImageRecord, ImageHeader | None]]:
    def read(index: int) -> tuple[ImageRecord, ImageHeader | None]:
        record = records[index]
        try:
            return record, read_header(record.path)
        except UserError:
            return record, None

    with ThreadPoolExecutor(_THREADS) as pool:
        yield from pool.map(read, range(len(records)))


def _remarks(record: ImageRecord, header: ImageHeader, preprocessing: Preprocessing | None) -> Iterator[str]:
    annotated_hw = (record.height, record.width)
    if header.orientation != 1:
        if header.orientation_for(annotated_hw, record.exif) == 1:
            yield "are read as stored, ignoring their EXIF orientation (--exif)"
        else:
            yield "are rotated or mirrored by their EXIF orientation (--exif)"
    if not fits_size(header.shown_hw(annotated_hw, record.exif), annotated_hw, str(record.path)):
        yield "of another size than their annotations are scaled to the annotated size"
    if preprocessing is None:
        return
    if header.frames > 1:
        yield "have several frames or pages, of which the first is read"
    channels = preprocessing.channels
    needed = max(preprocessing.bands, default=channels if channels not in (1, 3) else 1)
    if header.bands < needed:
        raise UserError(
            f"{record.path} has {header.bands} band(s)",
            f"at least {needed}, as the model reads",
            "use images with all bands, or train with other --set model.channels or model.preprocessing.bands",
        )
    if header.bands > 3 and header.bands > channels and not preprocessing.bands:
        yield (
            f"have {header.bands} bands, of which the model reads {channels}: "
            f"train with --set model.channels={header.bands} for all, --set model.preprocessing.bands=[…] for some"
        )


def measured_range(
    survey: ImageSurvey, preprocessing: Preprocessing | None = None
) -> tuple[tuple[float, float] | None, str]:
    """The pixel range of samples of more than 8 bits, and a line about it; None and "" for images of 8 bits.

    The range is stated in the files, else measured on up to 200 images: for non-negative integers up to the next power
    of two, for floats 0–1 or 0–255 if these contain them, else from minimum to maximum. Only the bands that a model
    with this preprocessing reads are used; without `preprocessing`, all bands.

    Raises:
        UserError: if an image cannot be read, or some are floats from 0 to 1 and others integers.
    """
    if not survey.wide:
        return None, ""
    value_range, how = survey.stated_range, "stated in the files"
    if value_range is None:
        indices = np.linspace(0, len(survey.wide) - 1, min(len(survey.wide), _MEASURED)).round().astype(int)
        low, high, is_integer = np.inf, -np.inf, True
        unit, wider = "", ""  # the first image of floats from 0 to 1, and of integers beyond
        for index in indices:
            path = survey.wide[index].path
            samples = read_samples(path, preprocessing)
            is_float = samples.dtype.kind == "f"
            if is_float:
                is_integer, samples = False, samples[np.isfinite(samples)]
            if samples.size:
                least, most = float(samples.min()), float(samples.max())
                low, high = min(low, least), max(high, most)
                unit = unit or (str(path) if is_float and least >= 0 and 0 < most <= 1 else "")
                wider = wider or ("" if is_float or most <= 1 else str(path))
        if unit and wider:
            raise UserError(
                f"{survey.split}: floats from 0 to 1 ({unit}) and integers up to {high:g} ({wider})",
                "samples of one range in all images",
                "convert one kind to the other, or set the range: --set model.preprocessing.pixel_range=[LOW,HIGH]",
            )
        value_range = _rounded(low, high, is_integer=is_integer)
        how = f"from samples of {low:g} to {high:g} in {len(indices)} of them"
    shown = f"{value_range[0]:g},{value_range[1]:g}"
    return value_range, (
        f"{survey.split}: {len(survey.wide)} of {survey.images} image(s) with more than 8 bits per sample: pixel range "
        f"[{shown}], {how}; stored with the model (to change it: --set model.preprocessing.pixel_range=[LOW,HIGH])"
    )


def _rounded(low: float, high: float, *, is_integer: bool) -> tuple[float, float]:
    if not low < high:  # constant, or only NaN
        return (min(low, 0.0), max(low, 0.0) + 1) if np.isfinite(low) else (0.0, 1.0)
    if low >= 0 and is_integer:
        return 0.0, float((1 << max(8, int(high).bit_length())) - 1)
    if low >= 0 and high <= 255:
        return 0.0, 1.0 if high <= 1 else 255.0
    return low, high

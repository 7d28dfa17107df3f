"""Preprocessing: images resized, padded and batched as in torchvision, in NumPy.

Pixel centres are at half-integers: pixel i covers [i, i + 1), and its value belongs to position i + 0.5. Linear
interpolation reads output pixel j at input position (j + 0.5) · in / out, clamped to the first and last centre, without
antialiasing (torch's `align_corners=False` without `antialias`). Normalisation is in the graph, so pixels stay between
0 and 255 here.

Weights from Detectron2 need its resizing (`Preprocessing.resize`): with Pillow, antialiasing and rounding to integers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from maskrcnn.errors import UserError, require_memory

RESIZES = ("torchvision", "pillow")
# Named sets of fields. "caffe": weights converted from Caffe take BGR from 0 to 255 minus the mean of py-faster-rcnn.
PRESETS: dict[str, dict[str, Any]] = {
    "imagenet": {"channel_order": "RGB", "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)},
    "caffe": {
        "channel_order": "BGR",
        "mean": (102.9801 / 255, 115.9465 / 255, 122.7717 / 255),
        "std": (1 / 255, 1 / 255, 1 / 255),
    },
}
# Size of the first feature map: 64 channels at half the resolution.
_FEATURE_BYTES_PER_PIXEL = 64 * 4 / 4
_OPTIONAL = ("resize", "pixel_range", "bands")  # fields that files may lack
_BAND_ROWS = 32  # output rows resized at once, to stay within a core's cache


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """Preprocessing of a model; `mean` and `std` are applied inside the graph."""

    min_size_px: int = 800  # length of the shorter side
    max_size_px: int = 1333  # maximum length of the longer side
    divisor: int = 32  # height and width of a batch are multiples of this
    mean: tuple[float, ...] = (
        0.485,
        0.456,
        0.406,
    )  # mean of pixels scaled to 0–1, in the channels' order; one per channel
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    channel_order: str = "RGB"  # or "BGR", for a model with three channels; input images are always RGB
    resize: str = "torchvision"  # or "pillow", as in Detectron2; absent in older files
    # Scaling of image files to 0–255; absent for models that read 8-bit RGB (see `data/images.py`).
    pixel_range: tuple[
        float, ...
    ] = ()  # (low, high): sample values that map to 0 and 255, for more than 8 bits; (): unknown
    bands: tuple[int, ...] = ()  # bands of the file, numbered from 1, one per channel; (): RGB, or the first bands

    def __post_init__(self) -> None:
        sizes = (self.min_size_px, self.max_size_px, self.divisor)
        if not all(isinstance(size, int) and size >= 1 for size in sizes):
            raise _invalid(
                f"min_size_px, max_size_px, divisor = {sizes}",
                "whole numbers of at least 1",
            )
        if not len(self.mean) == len(self.std) > 0 or not all(value > 0 for value in self.std):
            raise _invalid(
                f"mean {self.mean}, std {self.std}",
                "a number per channel each (three for RGB), those of std above 0",
            )
        if not np.isfinite([*self.mean, *self.std, *self.pixel_range]).all():
            found = f"mean {self.mean}, std {self.std}, pixel_range {self.pixel_range}"
            raise _invalid(found, "finite numbers")
        if self.channel_order not in ("RGB", "BGR"):
            raise _invalid(f"channel_order {self.channel_order!r}", "'RGB' or 'BGR'")
        if self.channel_order == "BGR" and self.channels != 3:
            raise _invalid(f"channel_order 'BGR' of {self.channels} channels", "'RGB', which keeps the order of bands")
        if self.resize not in RESIZES:
            raise _invalid(f"resize {self.resize!r}", f"one of {', '.join(RESIZES)}")
        if self.pixel_range and not (len(self.pixel_range) == 2 and self.pixel_range[0] < self.pixel_range[1]):
            raise _invalid(f"pixel_range {list(self.pixel_range)}", "two numbers, the lower first, such as [0, 4095]")
        if self.bands and not (len(self.bands) == self.channels and min(self.bands) >= 1):
            raise _invalid(
                f"bands {list(self.bands)} for {self.channels} channels", "one band per channel, numbered from 1"
            )

    @property
    def channels(self) -> int:
        """Number of input channels of the model."""
        return len(self.mean)

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields as JSON types, without those that only some models have."""
        values = dataclasses.asdict(self)
        for key in _OPTIONAL[1:]:
            if not values[key]:
                del values[key]
        return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Preprocessing:
        """Restores a preprocessing from `to_dict`.

        Raises:
            UserError: for unknown or missing keys, or an invalid value.
        """
        names = {field.name for field in dataclasses.fields(cls)}
        wrong = [
            f"{kind} key(s) {', '.join(sorted(keys))}"
            for kind, keys in (("unknown", values.keys() - names), ("missing", names - values.keys() - {*_OPTIONAL}))
            if keys
        ]
        if wrong:
            raise _invalid(" and ".join(wrong), f"the keys {', '.join(sorted(names))}")
        try:
            fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
            return cls(**fields)
        except TypeError as error:
            raise _invalid(f"values of the wrong type ({error})", "the output of `to_dict`") from error


def with_preset(changes: Any) -> Any:
    """Replaces the name of a preset by its fields.

    Args:
        changes: fields of a `Preprocessing`, possibly with `preset`, a name from `PRESETS`, or only such a name. Other
            fields override those of the preset.

    Raises:
        UserError: for a name that is not in `PRESETS`.
    """
    changes = {"preset": changes} if isinstance(changes, str) else changes
    if not isinstance(changes, dict) or "preset" not in changes:
        return changes
    name = changes["preset"]
    if name not in PRESETS:
        raise UserError(f"preprocessing {name!r}", f"one of {', '.join(PRESETS)}", "choose one, or set mean and std")
    return {**PRESETS[name], **{key: value for key, value in changes.items() if key != "preset"}}


def with_channels(preprocessing: Preprocessing, channels: int) -> Preprocessing:
    """Extends the mean and standard deviation of RGB to a number of channels.

    Further channels, and a single channel, get the average of the three.

    Raises:
        UserError: if the preprocessing has neither three nor `channels` channels.
    """
    found = preprocessing.channels
    if found == channels:
        return preprocessing
    if found != 3:
        raise UserError(
            f"model.channels {channels} with a mean and std of {found} values",
            "one value per channel",
            f"set model.channels={found}, or as many values of model.preprocessing.mean and std as channels",
        )
    kept = 3 if channels > 3 else 0
    mean, std = (
        (*values[:kept], *[sum(values) / 3] * (channels - kept)) for values in (preprocessing.mean, preprocessing.std)
    )
    return dataclasses.replace(preprocessing, mean=mean, std=std)


def channels_from_rgb(image: np.ndarray, channels: int) -> np.ndarray:
    """A drawn RGB image `[H, W, 3]` for a model with any number of channels: the three repeated, `[H, W, C]`."""
    return image if channels == 3 else image[..., np.arange(channels) % 3]


def resized_size(size_hw: tuple[int, int], preprocessing: Preprocessing) -> tuple[int, int]:
    """Returns height and width of an image after resizing, in pixels.

    The shorter side becomes `min_size_px` unless the longer side would then exceed `max_size_px`. Both are rounded
    down, as in torchvision's `GeneralizedRCNNTransform`, or with "pillow" to nearest, as in Detectron2's
    `ResizeShortestEdge`. A side is at least 1 pixel, whereas both libraries fail at 0.
    """
    if preprocessing.resize == "pillow":
        return _nearest_size(size_hw, preprocessing)
    scale = min(preprocessing.min_size_px / min(size_hw), preprocessing.max_size_px / max(size_hw))
    height, width = (max(int(side * scale), 1) for side in size_hw)
    return height, width


def _nearest_size(size_hw: tuple[int, int], preprocessing: Preprocessing) -> tuple[int, int]:
    """As `resized_size`, but in two steps and float64, which affects the rounding of sides near one half."""
    shorter, target = min(size_hw), float(preprocessing.min_size_px)
    sides = [target if side == shorter else target / shorter * side for side in size_hw]
    if max(sides) > preprocessing.max_size_px:
        scale = preprocessing.max_size_px / max(sides)
        sides = [side * scale for side in sides]
    height, width = (max(int(side + 0.5), 1) for side in sides)
    return height, width


def resize_bilinear(image: np.ndarray, size_hw: tuple[int, int]) -> np.ndarray:
    """Resizes an image by linear interpolation, without rounding.

    Args:
        image: `[H, W, C]` uint8 or float32, H and W at least 1.
        size_hw: height and width after resizing, at least 1.

    Returns:
        `[C, h, w]` float32, equal to `torch.nn.functional.interpolate(mode="bilinear", align_corners=False)` within
        1e-3 of a grey level, except for differences between torch's own results with one and several threads.
    """
    resized = np.empty((image.shape[2], *size_hw), np.float32)
    _resize_into(image, resized)
    return resized


def resize_antialiased(image: np.ndarray, size_hw: tuple[int, int]) -> np.ndarray:
    """Resizes an image `[H, W, C]`, uint8 or float32, by Pillow's bilinear filter with antialiasing, in the same type.

    Raises:
        UserError: if Pillow is not installed.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise UserError(
            "a model whose images Pillow resizes, without Pillow",
            "Pillow: this model's weights are from Detectron2",
            "pip install pillow",
        ) from error
    if image.shape[2] != 3 or image.dtype != np.uint8:  # band by band
        planes = [Image.fromarray(np.ascontiguousarray(plane)) for plane in image.transpose(2, 0, 1)]
        resized_planes = [np.asarray(plane.resize(size_hw[::-1], Image.Resampling.BILINEAR)) for plane in planes]
        return np.stack(resized_planes, axis=-1)
    resized = Image.fromarray(np.ascontiguousarray(image)).resize(size_hw[::-1], Image.Resampling.BILINEAR)
    return np.array(resized)  # a copy, which PyTorch may write to


def batch_images(images: Sequence[np.ndarray], preprocessing: Preprocessing) -> tuple[np.ndarray, np.ndarray]:
    """Resizes and pads images of any sizes into the detector's inputs.

    Args:
        images: at least one image `[H, W, C]`, RGB if the model has three channels: uint8, or float32 from 0 to 255,
            as `data.images.read_image` returns it.
        preprocessing: the model's, from its metadata.

    Returns:
        `images` `[N, C, H, W]` float32, values 0–255, padded with zeros at the right and bottom to a multiple of the
        divisor; `image_sizes` `[N, 2]` int64, (height, width) before padding.

    Raises:
        UserError: for an empty list, or an image of another type or shape or without pixels.
    """
    sizes, padded_hw = batch_sizes(images, preprocessing)
    require_memory(
        len(images) * float(padded_hw[0]) * padded_hw[1] * (4 * preprocessing.channels + _FEATURE_BYTES_PER_PIXEL),
        f"{len(images)} image(s) of {padded_hw[0]}×{padded_hw[1]} px",
        "resize images to a smaller size, or use fewer per batch",
    )
    batch = np.zeros((len(images), preprocessing.channels, *padded_hw), np.float32)
    for slot, image, (height, width) in zip(batch, images, sizes, strict=True):
        channels = image if preprocessing.channel_order == "RGB" else image[..., ::-1]
        if preprocessing.resize == "pillow":
            slot[:, :height, :width] = resize_antialiased(channels, (height, width)).transpose(2, 0, 1)
        else:
            _resize_into(channels, slot[:, :height, :width])
    return batch, np.array(sizes, np.int64)


def batch_sizes(
    images: Sequence[np.ndarray], preprocessing: Preprocessing
) -> tuple[list[tuple[int, int]], tuple[int, int]]:
    """Returns height and width of each image after resizing, and of the padded batch; see `batch_images`.

    Raises:
        UserError: for an empty list, or an image of another type or shape or without pixels.
    """
    if len(images) == 0:
        raise UserError("an empty list of images", "at least one image", "pass the images to detect on")
    for index, image in enumerate(images):
        _check_image(image, index, preprocessing)
    sizes = [resized_size(image.shape[:2], preprocessing) for image in images]
    divisor = preprocessing.divisor
    height, width = (-(-max(side) // divisor) * divisor for side in zip(*sizes, strict=True))
    return sizes, (height, width)


def padded_size(size_hw: tuple[int, int], preprocessing: Preprocessing) -> tuple[int, int]:
    """Returns height and width that an image of `size_hw` has alone in a batch, after resizing and padding."""
    height, width = resized_size(size_hw, preprocessing)
    divisor = preprocessing.divisor
    return -(-height // divisor) * divisor, -(-width // divisor) * divisor


def linear_taps(size_in: int, size_out: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the taps of linear interpolation along one axis.

    Returns:
        `low`, `high` `[size_out]` int64, the two input pixels (equal at the border), and the weight `[size_out]`
        float32 of `high`; the weight of `low` is one minus this.
    """
    scale = np.float32(size_in) / np.float32(size_out)
    centres = np.arange(size_out, dtype=np.float32) + np.float32(0.5)
    # Rounded once, after the subtraction, like torch with one thread. With several threads, torch also rounds the
    # product, which changes a weight by up to 1e-4 near position 1000, and a pixel by hundredths of a level.
    positions = (centres.astype(np.float64) * np.float64(scale) - 0.5).astype(np.float32)
    positions = np.maximum(positions, np.float32(0))
    low = np.minimum(positions.astype(np.int64), size_in - 1)
    high = np.minimum(low + 1, size_in - 1)
    return low, high, np.clip(positions - low.astype(np.float32), np.float32(0), np.float32(1))


def _resize_into(image: np.ndarray, out: np.ndarray) -> None:
    """Resizes `image` `[H, W, C]` into `out` `[C, h, w]` float32, which may be a view."""
    height, width = out.shape[1:]
    if image.shape[:2] == (height, width):
        out[:] = image.transpose(2, 0, 1)
        return
    top, bottom, weight_y = linear_taps(image.shape[0], height)
    left, right, weight_x = linear_taps(image.shape[1], width)
    weight_y = weight_y[:, None]
    for channel, plane in enumerate(np.ascontiguousarray(image.transpose(2, 0, 1))):
        for start in range(0, height, _BAND_ROWS):
            rows = slice(start, min(start + _BAND_ROWS, height))
            upper = plane[top[rows]].astype(np.float32)
            lower = plane[bottom[rows]].astype(np.float32)
            band = _lerp(upper, lower, weight_y[rows])
            # mode="clip" skips NumPy's bounds check; no index is out of range.
            first = np.take(band, left, axis=1, mode="clip")
            second = np.take(band, right, axis=1, mode="clip")
            out[channel, rows] = _lerp(first, second, weight_x)


def _lerp(low: np.ndarray, high: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """`low + weight · (high − low)`, in place of `high`."""
    high -= low
    high *= weight
    high += low
    return high


def _check_image(image: Any, index: int, preprocessing: Preprocessing) -> None:
    """Raises a UserError unless `image` is `[H, W, C]` uint8 or float32 with pixels."""
    channels = preprocessing.channels
    if not isinstance(image, np.ndarray) or image.dtype not in (np.uint8, np.float32) or image.ndim != 3:
        dtype, shape = getattr(image, "dtype", type(image).__name__), getattr(image, "shape", None)
        described = f"{dtype}" if shape is None else f"{dtype} of shape {tuple(shape)}"
        raise UserError(
            f"image {index} is {described}",
            f"a NumPy array of uint8 and shape (H, W, {channels})"
            + (", RGB" if channels == 3 else "")
            + ", or of float32 from 0 to 255",
            "read it with maskrcnn.data.images.read_image, or convert it",
        )
    if image.shape[2] != channels:
        raise UserError(
            f"image {index} of shape {image.shape}",
            f"{channels} channel(s), those of the model",
            "read it with maskrcnn.data.images.read_image(path, preprocessing of the model's metadata)",
        )
    if image.size == 0:
        raise UserError(f"image {index} of shape {image.shape}", "at least 1×1 pixel", "leave out empty images")
    if image.dtype == np.float32 and not (image.min() >= 0 and image.max() <= 255):  # also false for NaN
        raise UserError(
            f"image {index} of float32 from {image.min():g} to {image.max():g}",
            "values from 0 to 255, not normalised: normalisation is in the model",
            "scale them, or let maskrcnn.data.images.read_image read the file",
        )
    # Files of more than 8 bits, which a model with a pixel range reads, can be as dark as this.
    if image.dtype == np.float32 and 0 < image.max() <= 1 and not preprocessing.pixel_range:
        raise UserError(
            f"image {index} of float32 from {image.min():g} to {image.max():g}",
            "values from 0 to 255, of which these are almost black",
            "multiply them by 255; or if the image really is this dark, pass it as uint8",
        )


def _invalid(found: str, expected: str) -> UserError:
    return UserError(
        f"preprocessing with {found}",
        expected,
        "correct the configuration, or use the version of maskrcnn that wrote the file",
    )

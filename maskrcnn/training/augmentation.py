"""Random views, colours and compositions of training images.

All randomness of a sample comes from one NumPy generator. Torchvision's transforms use torch's global generator, which
is seeded from the sample's generator while they run.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision import tv_tensors
from torchvision.transforms import v2

from maskrcnn.config import AugmentConfig
from maskrcnn.data.coco import instance_mask
from maskrcnn.data.records import ImageRecord
from maskrcnn.imaging.preprocess import Preprocessing, resize_bilinear, resized_size
from maskrcnn.training.view import Objects, View, instances_of, keypoints_in_view, mask_crop, mask_extent, only_inside


@dataclass(frozen=True, eq=False)
class Scene:
    """A canvas and its objects, at the size that the detector receives.

    Masks are full-size, so that objects can be covered, moved and warped.
    """

    image: np.ndarray  # [C, h, w], 0–255: uint8, or float32 if an image has more than 8 bits per sample
    masks: np.ndarray  # bool [G, h, w], visible pixels of each object
    labels: np.ndarray  # int64 [G]
    visible: np.ndarray  # float [G], visible fraction of each object's area
    keypoints: np.ndarray  # float32 [G, K, 3]: x, y, visibility; zeros if unlabelled or outside the canvas
    has_mask: np.ndarray  # bool [G]; False: the object has no mask, its box is used

    @property
    def size_hw(self) -> tuple[int, int]:
        """Height and width of the canvas."""
        return self.image.shape[1:]

    def only(self, chosen: np.ndarray) -> Scene:
        """The scene with some of its objects: indices, or bool `[G]`."""
        names = ("masks", "labels", "visible", "keypoints", "has_mask")
        return replace(self, **{name: getattr(self, name)[chosen] for name in names})

    def shown(self, min_visible: float) -> Scene:
        """The scene with the objects that have a pixel and at least `min_visible` of their area."""
        return self.only(self.masks.any(axis=(1, 2)) & (self.visible >= min_visible))

    def covered(self, masks: np.ndarray) -> Scene:
        """The scene with masks `[G, h, w]` that may be partly covered or moved away."""
        before, after = (np.count_nonzero(stack, axis=(1, 2)) for stack in (self.masks, masks))
        return replace(self, masks=masks, visible=self.visible * after / np.maximum(before, 1))


def scene_in_view(record: ImageRecord, image: np.ndarray, view: View, partners: tuple[int, ...] = ()) -> Scene:
    """Scene of one image.

    Args:
        record: annotations.
        image: uint8 or float32 `[C, h, w]`, the canvas.
        view: placement of the image on it.
        partners: see `keypoints_in_view`.
    """
    objects = instances_of(record)
    masks = np.zeros((len(objects), *view.canvas_hw), bool)
    visible = np.zeros(len(objects))
    for k, instance in enumerate(objects):
        mask = instance_mask(record, instance)
        visible[k] = int(np.count_nonzero(view.cut(mask))) / max(int(np.count_nonzero(mask)), 1)
        masks[k] = view.mask(mask)
    labels = np.array([instance.label for instance in objects], np.int64)
    has_mask = np.array([instance.has_mask for instance in objects], bool)
    return Scene(image, masks, labels, visible, keypoints_in_view(objects, view, partners), has_mask)


def objects_of_scene(scene: Scene, min_visible: float) -> Objects:
    """Visible objects, with the extents of their masks as boxes.

    Objects without a pixel, or with less than `min_visible` of their area, are dropped.
    """
    rows = []
    each = zip(scene.masks, scene.labels, scene.visible, scene.keypoints, scene.has_mask, strict=True)
    for mask, label, visible, keypoints, has_mask in each:
        crop = mask_crop(mask, scene.size_hw)
        if crop is not None and visible >= min_visible:
            pixels, frame = crop
            rows.append((np.array(mask_extent(mask), np.float32), label, pixels * np.uint8(has_mask), frame, keypoints))
    return Objects.stacked(rows, scene.keypoints.shape[1])


def mosaic(tiles: Sequence[Scene]) -> Scene:
    """Combine four scenes: top left, top right, bottom left, bottom right (Bochkovskiy et al. 2020).

    Tiles of a row have equal height, tiles of a column equal width.
    """
    (centre_y, centre_x), (height, width) = tiles[0].size_hw, tiles[3].size_hw
    size_hw = (centre_y + height, centre_x + width)
    image = np.empty((len(tiles[0].image), *size_hw), np.result_type(*(tile.image for tile in tiles)))
    masks = np.zeros((sum(len(tile.labels) for tile in tiles), *size_hw), bool)
    keypoints = np.concatenate([tile.keypoints for tile in tiles])
    first = 0
    for tile, (top, left) in zip(tiles, ((0, 0), (0, centre_x), (centre_y, 0), (centre_y, centre_x)), strict=True):
        rows, columns = slice(top, top + tile.size_hw[0]), slice(left, left + tile.size_hw[1])
        image[:, rows, columns] = tile.image
        own = slice(first, first + len(tile.labels))
        masks[own, rows, columns] = tile.masks
        keypoints[own, :, :2] += np.array([left, top], np.float32) * (keypoints[own, :, 2:] > 0)
        first = own.stop
    labels, visible, has_mask = (
        np.concatenate([getattr(tile, name) for tile in tiles]) for name in ("labels", "visible", "has_mask")
    )
    return Scene(image, masks, labels, visible, keypoints, has_mask)


def mixup(first: Scene, second: Scene, weight: float) -> Scene:
    """Blend two scenes of equal size, with the objects of both; `weight` is the first's (Zhang et al. 2019)."""
    one, other = (scene.image.astype(np.float32, copy=False) for scene in (first, second))
    image = np.float32(weight) * one + np.float32(1 - weight) * other
    return _concatenated(as_pixels(image, np.result_type(first.image, second.image)), first, second)


def copy_paste(scene: Scene, other: Scene, chosen: np.ndarray) -> Scene:
    """Paste objects of another scene of equal size (Ghiasi et al. 2021).

    Covered pixels are removed from the masks below, and covered keypoints become hidden (visibility 1), as annotators
    label keypoints that can be inferred. Edges are not blurred: the paper found no difference.

    Args:
        scene: background.
        other: scene of the pasted objects.
        chosen: int64, indices of the objects of `other` to paste.
    """
    cover = other.masks[chosen].any(axis=0)
    image = np.where(cover, other.image, scene.image)
    pasted = other.only(chosen)
    below = replace(scene.covered(scene.masks & ~cover), keypoints=_hidden(scene.keypoints, cover))
    return _concatenated(image, below, pasted)


def _hidden(keypoints: np.ndarray, cover: np.ndarray) -> np.ndarray:
    """Keypoints `[G, K, 3]` with the visible ones inside a mask bool `[h, w]` marked as hidden."""
    column, row = (
        np.minimum(keypoints[..., axis].astype(np.int64), side - 1) for axis, side in enumerate(cover.shape[::-1])
    )
    max_visibility = np.where(cover[row, column], np.float32(1), np.float32(2))
    return np.concatenate([keypoints[..., :2], np.minimum(keypoints[..., 2], max_visibility)[..., None]], axis=-1)


def _concatenated(image: np.ndarray, first: Scene, second: Scene) -> Scene:
    return Scene(
        image,
        np.concatenate([first.masks, second.masks]),
        np.concatenate([first.labels, second.labels]),
        np.concatenate([first.visible, second.visible]),
        np.concatenate([first.keypoints, second.keypoints]),
        np.concatenate([first.has_mask, second.has_mask]),
    )


def as_pixels(values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Computed pixels, float32 from 0 to 255 up to rounding errors, as uint8 or float32."""
    return np.rint(values).clip(0, 255).astype(np.uint8) if dtype == np.uint8 else values


def resized(image: np.ndarray, size_hw: tuple[int, int]) -> np.ndarray:
    """An image `[H, W, C]`, uint8 or float32, at another size, `[C, h, w]` of the same type.

    As `resize_bilinear`, which inference uses. PyTorch computes uint8 in integers, three times as fast, but rounds
    after each axis, which changes pixels by at most one level compared with inference.
    """
    if image.dtype != np.uint8:
        return resize_bilinear(image, size_hw)
    pixels = torch.from_numpy(image).permute(2, 0, 1)[None]
    return interpolate(pixels, size_hw, mode="bilinear", align_corners=False)[0].numpy()


@contextmanager
def torch_seeded_from(rng: np.random.Generator) -> Iterator[None]:
    """Seed torch's CPU generator from `rng` inside the context and restore it afterwards.

    Limits torch to one thread, as in a loading process: sums, and thus colours, depend on the number of threads.
    """
    threads = torch.get_num_threads()
    with torch.random.fork_rng(devices=[]):
        # torch.manual_seed would also seed the generators of GPUs, which are not restored.
        torch.default_generator.manual_seed(int(rng.integers(2**63)))
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(threads)


class Augmentation:
    """Random changes of single images.

    Args:
        config: kinds, strengths and probabilities.
        preprocessing: the model's, for sizes and the colour of empty canvas.
    """

    def __init__(self, config: AugmentConfig, preprocessing: Preprocessing) -> None:
        self.config, self.preprocessing = config, preprocessing
        # The mean colour, zero after normalisation like padding.
        mean_rgb = preprocessing.mean if preprocessing.channel_order == "RGB" else preprocessing.mean[::-1]
        self.fill = 255 * np.array(mean_rgb, np.float32)  # rounded on a canvas of uint8
        self._colours = v2.ColorJitter(
            config.colour_brightness, config.colour_contrast, config.colour_saturation, config.colour_hue
        )
        self._tilt = v2.RandomPerspective(config.perspective_distortion, p=1.0)

    def image(self, image: np.ndarray, view: View, rng: np.random.Generator) -> np.ndarray:
        """Canvas `[C, h, w]` of an image `[H, W, C]`, both uint8 or both float32, with random colours.

        Colour changes take most of the time, so they are applied before or after resizing, to whichever has fewer
        pixels.
        """
        part = np.ascontiguousarray(view.cut(image))
        is_coloured = rng.random() < self.config.colour_probability
        is_enlarged = math.prod(view.size_hw) > math.prod(part.shape[:2])
        if is_coloured and is_enlarged:
            part = self._jitter_colours(torch.from_numpy(part).permute(2, 0, 1), rng).permute(1, 2, 0).numpy()
        pixels = resized(part, view.size_hw)
        if is_coloured and not is_enlarged:
            pixels = self._jitter_colours(torch.from_numpy(pixels), rng).numpy()
        return view.on_canvas(pixels, as_pixels(self.fill, pixels.dtype))

    def _jitter_colours(self, image: Tensor, rng: np.random.Generator) -> Tensor:
        """Change the colours of an image `[C, h, w]`, uint8 or float32 from 0 to 255.

        With more than three channels, only the first three (RGB) change; with two, none.
        """
        if len(image) == 2:
            return image
        if len(image) > 3:
            return torch.cat([self._jitter_colours(image[:3], rng), image[3:]])
        with torch_seeded_from(rng):
            changed: Tensor = self._colours(image) if image.dtype == torch.uint8 else 255 * self._colours(image / 255)
            return changed

    def view(self, size_hw: tuple[int, int], rng: np.random.Generator) -> View:
        """Random view of an image that becomes a sample by itself."""
        config = self.config
        if rng.random() < config.jitter_probability:
            side = config.jitter_canvas_px or self.preprocessing.min_size_px
            return self._jittered(size_hw, (side, side), rng)
        rule = self.preprocessing
        if config.shorter_sides_px:
            rule = replace(rule, min_size_px=config.shorter_sides_px[rng.integers(len(config.shorter_sides_px))])
        window = self._limited(size_hw, rng)
        canvas_hw = resized_size((window[2] - window[0], window[3] - window[1]), rule)
        return self._flipped(View(window, canvas_hw, canvas_hw), rng)

    def _limited(self, size_hw: tuple[int, int], rng: np.random.Generator) -> tuple[int, int, int, int]:
        """Random window (top, left, bottom, right) of an image with at most the largest aspect ratio."""
        limit, short = self.config.largest_aspect_ratio, min(size_hw)
        if not limit or max(size_hw) <= limit * short:
            return (0, 0, *size_hw)
        height, width = (min(side, int(limit * short)) for side in size_hw)
        top, left = int(rng.integers(size_hw[0] - height + 1)), int(rng.integers(size_hw[1] - width + 1))
        return top, left, top + height, left + width

    def partner_view(self, size_hw: tuple[int, int], canvas_hw: tuple[int, int], rng: np.random.Generator) -> View:
        """Random view of an image on a given canvas: large-scale jitter, or covering it."""
        if rng.random() < self.config.jitter_probability:
            return self._jittered(size_hw, canvas_hw, rng)
        return self.covering_view(size_hw, canvas_hw, rng)

    def covering_view(self, size_hw: tuple[int, int], canvas_hw: tuple[int, int], rng: np.random.Generator) -> View:
        """Largest crop of an image with the aspect ratio of the canvas, at a random place."""
        ratio = max(canvas / size for canvas, size in zip(canvas_hw, size_hw, strict=True))
        return self._flipped(_scaled_view(size_hw, canvas_hw, ratio, rng), rng)

    def _jittered(self, size_hw: tuple[int, int], canvas_hw: tuple[int, int], rng: np.random.Generator) -> View:
        """Large-scale jitter, equal to v2's ScaleJitter, RandomCrop and Pad up to a pixel of rounding.

        v2's transforms would resize whole images and masks before cropping them.
        """
        scale = rng.uniform(self.config.jitter_least_scale, self.config.jitter_largest_scale)
        fitting = min(canvas / size for canvas, size in zip(canvas_hw, size_hw, strict=True))
        return self._flipped(_scaled_view(size_hw, canvas_hw, scale * fitting, rng), rng)

    def _flipped(self, view: View, rng: np.random.Generator) -> View:
        is_mirrored = bool(rng.random() < self.config.flip_probability)
        is_upside_down = bool(rng.random() < self.config.vertical_flip_probability)
        return replace(view, is_mirrored=is_mirrored, is_upside_down=is_upside_down)

    def tilted(self, scene: Scene, rng: np.random.Generator) -> Scene:
        """Random perspective of a scene. Its corners move inwards, so nothing leaves the canvas."""
        height, width = scene.size_hw
        # Relative to the fill, because torchvision blends the border with zeros.
        fill = as_pixels(self.fill, scene.image.dtype).astype(np.float32)[:, None, None]
        image = tv_tensors.Image(torch.from_numpy(scene.image - fill))
        # Pixel indices from 1, warped like a mask, give the source of each pixel, so that a single warp suffices for
        # any number of objects. Float32 represents them exactly up to 2^24.
        numbers = tv_tensors.Mask(torch.arange(1, height * width + 1, dtype=torch.float32).view(1, height, width))
        places = tv_tensors.KeyPoints(torch.from_numpy(scene.keypoints[..., :2]), canvas_size=scene.size_hw)
        with torch_seeded_from(rng):
            image, numbers, places = self._tilt(image, numbers, places)
        source = numbers.to(torch.int64).numpy().ravel()
        flat = np.pad(scene.masks.reshape(-1, height * width), ((0, 0), (1, 0)))  # index 0: empty canvas
        masks = np.take(flat, source, axis=1).reshape(-1, height, width)
        keypoints = np.concatenate([places.numpy(), scene.keypoints[..., 2:]], axis=-1)
        keypoints = only_inside(keypoints, scene.size_hw)
        pixels = as_pixels(image.numpy() + fill, scene.image.dtype)
        return replace(scene, image=pixels, masks=masks, keypoints=keypoints)


def _scaled_view(size_hw: tuple[int, int], canvas_hw: tuple[int, int], ratio: float, rng: np.random.Generator) -> View:
    """Scale an image by `ratio` and crop it at random along each axis that exceeds the canvas."""
    (top, bottom, height), (left, right, width) = (
        _scaled_axis(size, canvas, ratio, rng) for size, canvas in zip(size_hw, canvas_hw, strict=True)
    )
    return View((top, left, bottom, right), (height, width), canvas_hw)


def _scaled_axis(size: int, canvas: int, ratio: float, rng: np.random.Generator) -> tuple[int, int, int]:
    """Start and end of the window along an axis, and its length after resizing."""
    scaled = max(round(size * ratio), 1)
    window = size if scaled <= canvas else min(max(round(canvas / ratio), 1), size)
    start = int(rng.integers(size - window + 1))
    return start, start + window, min(scaled, canvas)

"""Random views, colours and tilts of training pictures.

All draws come from one NumPy generator per sample. Torchvision's transforms take theirs from torch's global
generator, which is therefore seeded from the sample's for as long as they run.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2

from maskrcnn.config import AugmentConfig
from maskrcnn.data.coco import ImageRecord, instance_mask
from maskrcnn.imaging.preprocess import Preprocessing, resize_bilinear, resized_size
from maskrcnn.training.view import Objects, View, instances_of, keypoints_in_view, mask_crop, mask_extent, only_inside

# Samples made of several images. A `Scene` carries full-size masks, so that objects can be covered, moved and bent.


@dataclass(frozen=True, eq=False)
class Scene:
    """A canvas and what is on it, at the size that the detector sees."""

    image: np.ndarray  # float32 [3, h, w], 0–255
    masks: np.ndarray  # bool [G, h, w], what can be seen of each object
    labels: np.ndarray  # int64 [G]
    visible: np.ndarray  # float [G], the share of each object's area that can be seen
    keypoints: np.ndarray  # float32 [G, K, 3]: x, y and visibility, all 0 for what is not labelled or not on the canvas

    @property
    def size_hw(self) -> tuple[int, int]:
        """Height and width of the canvas."""
        return self.image.shape[1:]

    def seen(self, masks: np.ndarray) -> Scene:
        """The scene after something covered or moved objects, of which `masks` `[G, h, w]` are left where they were."""
        before, after = (np.count_nonzero(stack, axis=(1, 2)) for stack in (self.masks, masks))
        return replace(self, masks=masks, visible=self.visible * after / np.maximum(before, 1))


def scene_in_view(record: ImageRecord, image: np.ndarray, view: View, partners: tuple[int, ...] = ()) -> Scene:
    """The scene of one image.

    Args:
        record: what is on it.
        image: float32 `[3, h, w]`, its canvas.
        view: how it was laid there.
        partners: see `keypoints_in_view`.
    """
    objects = instances_of(record)
    masks = np.zeros((len(objects), *view.canvas_hw), bool)
    visible = np.zeros(len(objects))
    for k, instance in enumerate(objects):
        mask = instance_mask(record, instance)
        visible[k] = np.count_nonzero(view.cut(mask)) / max(np.count_nonzero(mask), 1)
        masks[k] = view.mask(mask)
    labels = np.array([instance.label for instance in objects], np.int64)
    return Scene(image, masks, labels, visible, keypoints_in_view(objects, view, partners))


def objects_of_scene(scene: Scene, least_visible: float) -> Objects:
    """The objects that can be seen, with the extents of their masks as boxes.

    Left out are those without a pixel, and those of which less than `least_visible` of the area is left.
    """
    rows = []
    each = zip(scene.masks, scene.labels, scene.visible, scene.keypoints, strict=True)
    for mask, label, visible, keypoints in each:
        made = mask_crop(mask, scene.size_hw)
        if made is not None and visible >= least_visible:
            rows.append((np.array(mask_extent(mask), np.float32), label, *made, keypoints))
    return Objects.stacked(rows, scene.keypoints.shape[1])


def mosaic(tiles: Sequence[Scene]) -> Scene:
    """Four scenes as one: top left, top right, bottom left, bottom right (Bochkovskiy et al. 2020).

    The tiles of a row have the same height, those of a column the same width.
    """
    (centre_y, centre_x), (height, width) = tiles[0].size_hw, tiles[3].size_hw
    size_hw = (centre_y + height, centre_x + width)
    image = np.empty((3, *size_hw), np.float32)
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
    labels, visible = (np.concatenate([getattr(tile, name) for tile in tiles]) for name in ("labels", "visible"))
    return Scene(image, masks, labels, visible, keypoints)


def mixup(first: Scene, second: Scene, share: float) -> Scene:
    """Two scenes of one size blended, `share` of the first, with the objects of both (Zhang et al. 2019)."""
    image = np.float32(share) * first.image + np.float32(1 - share) * second.image
    return _together(image, first, second)


def copy_paste(scene: Scene, other: Scene, chosen: np.ndarray) -> Scene:
    """Objects of another scene of the same size on top of this one (Ghiasi et al. 2021).

    What they cover is taken out of the masks below, and keypoints below them become hidden ones (visibility 1), as
    people label what they can infer. Edges are not blurred: the paper found no difference.

    Args:
        chosen: int64, the objects of `other` that are pasted.
    """
    cover = other.masks[chosen].any(axis=0)
    image = np.where(cover, other.image, scene.image)
    names = ("masks", "labels", "visible", "keypoints")
    pasted = replace(other, **{name: getattr(other, name)[chosen] for name in names})
    below = replace(scene.seen(scene.masks & ~cover), keypoints=_hidden(scene.keypoints, cover))
    return _together(image, below, pasted)


def _hidden(keypoints: np.ndarray, cover: np.ndarray) -> np.ndarray:
    """Keypoints `[G, K, 3]` of which those in a mask bool `[h, w]` are hidden, not visible."""
    column, row = (
        np.minimum(keypoints[..., axis].astype(np.int64), side - 1) for axis, side in enumerate(cover.shape[::-1])
    )
    most = np.where(cover[row, column], np.float32(1), np.float32(2))
    return np.concatenate([keypoints[..., :2], np.minimum(keypoints[..., 2], most)[..., None]], axis=-1)


def _together(image: np.ndarray, first: Scene, second: Scene) -> Scene:
    return Scene(
        image,
        np.concatenate([first.masks, second.masks]),
        np.concatenate([first.labels, second.labels]),
        np.concatenate([first.visible, second.visible]),
        np.concatenate([first.keypoints, second.keypoints]),
    )


@contextmanager
def torch_seeded_from(rng: np.random.Generator) -> Iterator[None]:
    """Torch's generator for the CPU continues from `rng` inside, and from where it was afterwards.

    Inside, torch has one thread, as in a loading process: sums, and with them colours, depend on the number.
    """
    threads = torch.get_num_threads()
    with torch.random.fork_rng(devices=[]):
        # Not torch.manual_seed: it would seed the generators of GPUs as well, which are not restored.
        torch.default_generator.manual_seed(int(rng.integers(2**63)))
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(threads)


class Augmentation:
    """What a configuration does to single pictures.

    Args:
        config: what changes, how much, how often.
        preprocessing: the model's, for sizes and for the colour of empty canvas.
    """

    def __init__(self, config: AugmentConfig, preprocessing: Preprocessing) -> None:
        self.config, self.preprocessing = config, preprocessing
        # The mean colour, which normalisation turns to zero, as padding is.
        mean_rgb = preprocessing.mean if preprocessing.channel_order == "RGB" else preprocessing.mean[::-1]
        self.fill = 255 * np.array(mean_rgb, np.float32)
        self._colours = v2.ColorJitter(
            config.colour_brightness, config.colour_contrast, config.colour_saturation, config.colour_hue
        )
        self._tilt = v2.RandomPerspective(config.perspective_distortion, p=1.0)

    def image(self, picture: np.ndarray, view: View, rng: np.random.Generator) -> np.ndarray:
        """The canvas of a picture, float32 `[3, h, w]` from uint8 `[H, W, 3]`, perhaps with other colours.

        Colours cost most of the time, so they are changed where there are fewer pixels: before or after resizing.
        """
        part = np.ascontiguousarray(view.cut(picture))
        is_coloured = rng.random() < self.config.colour_probability
        is_enlarged = math.prod(view.size_hw) > math.prod(part.shape[:2])
        if is_coloured and is_enlarged:
            part = self._coloured(torch.from_numpy(part).permute(2, 0, 1), rng).permute(1, 2, 0).numpy()
        pixels = resize_bilinear(part, view.size_hw)
        if is_coloured and not is_enlarged:
            pixels = 255 * self._coloured(torch.from_numpy(pixels) / 255, rng).numpy()
        return view.on_canvas(pixels, self.fill)

    def _coloured(self, image: Tensor, rng: np.random.Generator) -> Tensor:
        """An image `[3, h, w]`, uint8 or float32 from 0 to 1, with other colours."""
        with torch_seeded_from(rng):
            return self._colours(image)

    def view(self, size_hw: tuple[int, int], rng: np.random.Generator) -> View:
        """How a picture of this size becomes a sample of its own."""
        config = self.config
        if rng.random() < config.jitter_probability:
            side = config.jitter_canvas_px or self.preprocessing.min_size_px
            return self._jittered(size_hw, (side, side), rng)
        rule = self.preprocessing
        if config.shorter_sides_px:
            rule = replace(rule, min_size_px=config.shorter_sides_px[rng.integers(len(config.shorter_sides_px))])
        canvas_hw = resized_size(size_hw, rule)
        return self._flipped(View((0, 0, *size_hw), canvas_hw, canvas_hw), rng)

    def partner_view(self, size_hw: tuple[int, int], canvas_hw: tuple[int, int], rng: np.random.Generator) -> View:
        """How a picture of this size is laid on a given canvas: as large-scale jitter does it, or covering it."""
        if rng.random() < self.config.jitter_probability:
            return self._jittered(size_hw, canvas_hw, rng)
        return self.covering_view(size_hw, canvas_hw, rng)

    def covering_view(self, size_hw: tuple[int, int], canvas_hw: tuple[int, int], rng: np.random.Generator) -> View:
        """The largest part of a picture that has the canvas's proportions, at a random place."""
        ratio = max(canvas / size for canvas, size in zip(canvas_hw, size_hw, strict=True))
        return self._flipped(_scaled_view(size_hw, canvas_hw, ratio, rng), rng)

    def _jittered(self, size_hw: tuple[int, int], canvas_hw: tuple[int, int], rng: np.random.Generator) -> View:
        """Large-scale jitter. Equal to v2's ScaleJitter, RandomCrop and Pad in a row but for a pixel of rounding.

        Those would resize whole pictures and masks, of which the crop then leaves a part.
        """
        scale = rng.uniform(self.config.jitter_least_scale, self.config.jitter_largest_scale)
        fitting = min(canvas / size for canvas, size in zip(canvas_hw, size_hw, strict=True))
        return self._flipped(_scaled_view(size_hw, canvas_hw, scale * fitting, rng), rng)

    def _flipped(self, view: View, rng: np.random.Generator) -> View:
        is_mirrored = bool(rng.random() < self.config.flip_probability)
        is_upside_down = bool(rng.random() < self.config.vertical_flip_probability)
        return replace(view, is_mirrored=is_mirrored, is_upside_down=is_upside_down)

    def tilted(self, scene: Scene, rng: np.random.Generator) -> Scene:
        """The scene from another angle. Its corners move inwards, so nothing of it is lost to the canvas's edges."""
        height, width = scene.size_hw
        # Relative to the fill, empty canvas is zero. A fill other than zero would get a dark seam from torchvision.
        image = tv_tensors.Image(torch.from_numpy(scene.image - self.fill[:, None, None]))
        # Each pixel's number, from 1, tilted like a mask: where each pixel comes from. Float32 holds it exactly
        # up to 2^24, and only one mask is tilted, whatever the number of objects.
        numbers = tv_tensors.Mask(torch.arange(1, height * width + 1, dtype=torch.float32).view(1, height, width))
        places = tv_tensors.KeyPoints(torch.from_numpy(scene.keypoints[..., :2]), canvas_size=scene.size_hw)
        with torch_seeded_from(rng):
            image, numbers, places = self._tilt(image, numbers, places)
        source = numbers.to(torch.int64).numpy().ravel()
        flat = np.pad(scene.masks.reshape(-1, height * width), ((0, 0), (1, 0)))  # number 0: empty canvas
        masks = np.take(flat, source, axis=1).reshape(-1, height, width)
        keypoints = np.concatenate([places.numpy(), scene.keypoints[..., 2:]], axis=-1)
        keypoints = only_inside(keypoints, scene.size_hw)
        return replace(scene, image=image.numpy() + self.fill[:, None, None], masks=masks, keypoints=keypoints)


def _scaled_view(size_hw: tuple[int, int], canvas_hw: tuple[int, int], ratio: float, rng: np.random.Generator) -> View:
    """A picture scaled by `ratio` and, along each axis on which it is then longer than the canvas, cut at random."""
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

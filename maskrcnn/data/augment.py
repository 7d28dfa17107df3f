"""Random views, colours and tilts of training pictures.

All draws come from one NumPy generator per sample. Torchvision's transforms take theirs from torch's global
generator, which is therefore seeded from the sample's for as long as they run.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2

from maskrcnn.config import AugmentConfig
from maskrcnn.data.compose import Scene
from maskrcnn.data.view import View, only_inside
from maskrcnn.preprocess import Preprocessing, resize_bilinear, resized_size


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

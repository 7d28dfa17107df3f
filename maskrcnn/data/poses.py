"""The drawn dataset of poses: stick figures with masks and joints, in COCO's format.

Left and right are not encoded in colour: a figure that faces the camera has a face, and its left hand is on the right
of its body in the image; a figure seen from behind shows hair, and the sides are swapped. As with people, a mirrored
figure is therefore a figure whose left and right joints have exchanged names.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from maskrcnn.data.drawn import (
    background,
    contrasting_colour,
    mask_annotation,
    noisy,
    paint,
    pixel_centres,
    write_drawn_dataset,
)

CLASS_NAMES = ("figure",)
JOINTS = (
    "head",
    "neck",
    "hip",
    "left_elbow",
    "right_elbow",
    "left_hand",
    "right_hand",
    "left_knee",
    "right_knee",
    "left_foot",
    "right_foot",
)
SKELETON = ((1, 2), (2, 3), (2, 4), (4, 6), (2, 5), (5, 7), (3, 8), (8, 10), (3, 9), (9, 11))  # numbers from 1
_EMPTY_FRACTION = 0.05  # share of images without a figure
_MAX_FIGURES = 3
_HEIGHT_PX = (56, 100)  # height of an upright figure, in an image whose shorter side is 128 px
_MIN_VISIBLE = 0.5  # minimum share of a figure's pixels in the image; other figures are not drawn
_MIN_VISIBLE_PX = 60
_MAX_TILT = math.radians(35)

# Lengths as shares of a figure's height.
_HEAD_RADIUS, _HEAD_ABOVE_NECK, _TORSO = 0.1, 0.15, 0.3
_SHOULDER, _HIP_BONE = 0.07, 0.05  # from the middle line
_UPPER_ARM, _FOREARM, _THIGH, _SHIN = 0.17, 0.16, 0.21, 0.21
_TORSO_RADIUS, _ARM_RADIUS, _LEG_RADIUS, _HAND_RADIUS, _FOOT_RADIUS = 0.06, 0.032, 0.038, 0.042, 0.048


def generate_poses(
    out: str | Path, *, train_images: int = 600, val_images: int = 100, size_px: int = 128, seed: int = 0
) -> Path:
    """Writes the dataset to `out` and returns `out`, see `write_drawn_dataset`.

    Joints have visibility 2 if visible, 1 if covered by another figure, and 0 outside the image.

    Raises:
        UserError: for arguments out of range, and if `out` contains anything else.
    """

    def draw(rng: np.random.Generator) -> tuple[np.ndarray, list[dict[str, Any]]]:
        image, figures = poses_image(rng, (size_px, size_px))
        return image, [_annotation(joints, visible) for joints, visible in figures]

    return write_drawn_dataset(
        out,
        draw,
        name="poses",
        info={"description": "generated stick figures", "generator": "maskrcnn.data.poses, version 1"},
        categories=[
            {"id": 1, "name": CLASS_NAMES[0], "keypoints": list(JOINTS), "skeleton": [list(line) for line in SKELETON]}
        ],
        train_images=train_images,
        val_images=val_images,
        size_px=size_px,
        seed=seed,
    )


def poses_image(
    rng: np.random.Generator, size_hw: tuple[int, int]
) -> tuple[np.ndarray, list[tuple[np.ndarray, np.ndarray]]]:
    """One random image: `[H, W, 3]` uint8 RGB, and for each figure its joints and visible mask.

    Joints are float64 `[11, 3]`: x and y in pixels, and visibility; masks `[H, W]` bool do not overlap, and the last
    figure is in front. About one image in twenty has no figure.
    """
    image = background(rng, size_hw)
    count = 0 if rng.random() < _EMPTY_FRACTION else int(rng.integers(1, _MAX_FIGURES + 1))
    drawn = _visible_figures([_random_figure(rng, size_hw) for _ in range(count)])
    for figure, _ in drawn:
        _paint(rng, image, figure)
    return noisy(rng, image), [(_joints_with_visibility(figure, visible), visible) for figure, visible in drawn]


@dataclass
class _Part:
    coverage: np.ndarray  # [H, W] float32, 0 … 1: soft over one pixel at the edge
    kind: str  # key of its colour


@dataclass
class _Figure:
    parts: list[_Part]  # back to front
    joints_xy: np.ndarray  # [11, 2] px
    whole: np.ndarray  # [H, W] bool


def _random_figure(rng: np.random.Generator, size_hw: tuple[int, int]) -> _Figure:
    """A figure of random size, place, tilt and pose; parts of it may be outside the image."""
    height_px = rng.uniform(*_HEIGHT_PX) * min(size_hw) / 128
    is_facing = bool(rng.random() < 0.5)
    joints = _pose(rng, is_facing)
    tilt = rng.uniform(-_MAX_TILT, _MAX_TILT)
    turn = np.array([[math.cos(tilt), math.sin(tilt)], [-math.sin(tilt), math.cos(tilt)]])
    half_width, half_height = (
        min(share * height_px, side / 2) for share, side in ((0.25, size_hw[1]), (0.4, size_hw[0]))
    )
    centre = np.array(
        [rng.uniform(half_width, size_hw[1] - half_width), rng.uniform(half_height, size_hw[0] - half_height)]
    )
    placed = {name: centre + height_px * (np.array(at) - (0, 0.2)) @ turn for name, at in joints.items()}
    parts = _parts(placed, height_px, is_facing, size_hw)
    whole = np.max([part.coverage for part in parts], axis=0) > 0.5
    return _Figure(parts, np.array([placed[name] for name in JOINTS]), whole)


def _pose(rng: np.random.Generator, is_facing: bool) -> dict[str, tuple[float, float]]:
    """The points of an upright figure as shares of its height: x to the right, y down, the neck at 0."""
    at = {"head": (0.0, -_HEAD_ABOVE_NECK), "neck": (0.0, 0.0), "hip": (0.0, _TORSO)}
    for side, sign in (("left", 1 if is_facing else -1), ("right", -1 if is_facing else 1)):
        shoulder, bone = (sign * _SHOULDER, 0.03), (sign * _HIP_BONE, _TORSO)
        upper = math.radians(rng.uniform(15, 140))  # of arms and legs, from straight down and outwards
        fore = upper + math.radians(rng.uniform(-20, 80))
        thigh = math.radians(rng.uniform(0, 45))
        shin = thigh + math.radians(rng.uniform(-45, 15))
        elbow = _along(shoulder, _UPPER_ARM, upper, sign)
        knee = _along(bone, _THIGH, thigh, sign)
        at |= {
            f"{side}_shoulder": shoulder,
            f"{side}_elbow": elbow,
            f"{side}_hand": _along(elbow, _FOREARM, fore, sign),
        }
        at |= {f"{side}_bone": bone, f"{side}_knee": knee, f"{side}_foot": _along(knee, _SHIN, shin, sign)}
    return at


def _along(start: tuple[float, float], length: float, angle: float, sign: int) -> tuple[float, float]:
    return start[0] + sign * length * math.sin(angle), start[1] + length * math.cos(angle)


def _parts(at: dict[str, np.ndarray], height_px: float, is_facing: bool, size_hw: tuple[int, int]) -> list[_Part]:
    """The parts of a figure, back to front: legs, torso, arms, head."""

    def limb(first: str, second: str, radius: float, kind: str) -> _Part:
        return _Part(_capsule(at[first], at[second], radius * height_px, size_hw), kind)

    parts = []
    for side in ("left", "right"):
        parts.append(limb(f"{side}_bone", f"{side}_knee", _LEG_RADIUS, "legs"))
        parts.append(limb(f"{side}_knee", f"{side}_foot", _LEG_RADIUS, "legs"))
        parts.append(limb(f"{side}_foot", f"{side}_foot", _FOOT_RADIUS, "feet"))
    parts.append(limb("neck", "hip", _TORSO_RADIUS, "torso"))
    for side in ("left", "right"):
        parts.append(limb("neck", f"{side}_shoulder", _ARM_RADIUS, "torso"))
        parts.append(limb(f"{side}_shoulder", f"{side}_elbow", _ARM_RADIUS, "arms"))
        parts.append(limb(f"{side}_elbow", f"{side}_hand", _ARM_RADIUS, "arms"))
        parts.append(limb(f"{side}_hand", f"{side}_hand", _HAND_RADIUS, "skin"))
    parts.append(limb("neck", "head", _ARM_RADIUS, "skin"))
    parts.append(limb("head", "head", _HEAD_RADIUS, "skin" if is_facing else "hair"))
    if is_facing:
        up = (at["head"] - at["neck"]) / _HEAD_ABOVE_NECK
        across = np.array([-up[1], up[0]])
        for sign in (-1, 1):
            eye = at["head"] + sign * 0.042 * across + 0.015 * up
            parts.append(_Part(_capsule(eye, eye, 0.022 * height_px, size_hw), "hair"))
    return parts


def _capsule(start: np.ndarray, end: np.ndarray, radius_px: float, size_hw: tuple[int, int]) -> np.ndarray:
    """The coverage `[H, W]` of the area within a radius of the line from `start` to `end`, xy px."""
    y, x = pixel_centres(size_hw)
    along = (end - start).astype(np.float32)
    dx, dy = x - np.float32(start[0]), y - np.float32(start[1])
    share = np.clip((dx * along[0] + dy * along[1]) / max(float(along @ along), 1e-6), 0, 1)
    distance = np.hypot(dx - share * along[0], dy - share * along[1])
    coverage: np.ndarray = np.clip(0.5 + np.float32(radius_px) - distance, 0, 1)
    return coverage


def _visible_figures(figures: list[_Figure]) -> list[tuple[_Figure, np.ndarray]]:
    """The figures that are visible enough, back to front, with their visible masks.

    Other figures are not drawn, so that everything drawn is annotated.
    """
    kept: list[tuple[_Figure, np.ndarray]] = []
    covered = np.zeros((), bool)
    for figure in reversed(figures):  # from the front
        visible = figure.whole & ~covered
        if visible.sum() >= max(_MIN_VISIBLE * figure.whole.sum(), _MIN_VISIBLE_PX):
            covered = figure.whole | covered
            kept.append((figure, visible))
    return kept[::-1]


def _paint(rng: np.random.Generator, image: np.ndarray, figure: _Figure) -> None:
    """Paints a figure: light skin, dark hair, and clothes whose torso and legs contrast with the background."""
    tone, dark = rng.uniform(0.75, 1.0), rng.uniform(5, 45)
    colours: dict[str, np.ndarray | None] = {
        "skin": tone * np.array([245, 205, 170], np.float32),
        "hair": np.full(3, dark, np.float32) + rng.uniform(0, 15, 3).astype(np.float32),
        "feet": rng.uniform(10, 90, 3).astype(np.float32),
        "torso": None,
        "legs": None,
        "arms": rng.uniform(10, 245, 3).astype(np.float32),
    }
    for part in figure.parts:
        if not part.coverage.any():
            continue  # outside the image
        if colours[part.kind] is None:
            mean = (image * part.coverage[..., None]).sum(axis=(0, 1)) / part.coverage.sum()
            colours[part.kind] = contrasting_colour(rng, mean)
        paint(rng, image, part.coverage, colours[part.kind])


def _joints_with_visibility(figure: _Figure, visible: np.ndarray) -> np.ndarray:
    """The joints, float64 `[11, 3]`, with their visibility; zeros outside the image."""
    height, width = visible.shape
    x, y = figure.joints_xy.T
    inside = (x >= 0) & (y >= 0) & (x <= width) & (y <= height)
    column, row = (np.clip(values.astype(int), 0, side - 1) for values, side in ((x, width), (y, height)))
    shown = np.where(inside, 1 + visible[row, column], 0)
    joints: np.ndarray = np.column_stack([x, y, shown]) * inside[:, None]
    return joints


def _annotation(joints: np.ndarray, visible: np.ndarray) -> dict[str, Any]:
    """COCO's fields of a figure."""
    numbers = [(round(float(x), 2), round(float(y), 2), int(shown)) for x, y, shown in joints]
    keypoints = [number for joint in numbers for number in joint]
    return {
        **mask_annotation(1, visible),
        "keypoints": keypoints,
        "num_keypoints": sum(shown > 0 for _, _, shown in numbers),
    }

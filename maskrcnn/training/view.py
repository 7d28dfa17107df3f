"""Geometric views of an image and its objects: cropped, mirrored and resized.

Every axis-aligned change of a sample is one `View`, which transforms pixels, masks and boxes consistently. Pixels that
are cropped afterwards are not computed, and masks are processed one at a time.

Object masks become crops of constant size, from which `maskrcnn.model.targets` computes training targets. Pixel i of a
resized mask is pixel floor(i · in / out) of the original (nearest neighbour, as torchvision resizes masks); the crop
keeps these pixels unchanged if the object is small enough.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from maskrcnn.data.coco import instance_mask
from maskrcnn.data.records import ImageRecord, Instance

MASK_SIDE = 112  # pixels per side of a mask crop: four times the 28 × 28 of the mask head
MIN_SIDE_PX = 1.0  # objects with a shorter box are dropped


def nearest_index(size_in: int, size_out: int) -> np.ndarray:
    """Source pixel of each pixel of a resized axis, int64 `[size_out]`.

    Computed like torch's `interpolate(mode="nearest")`, which multiplies by a rounded ratio.
    """
    ratio = np.float32(size_in) / np.float32(size_out)
    index = np.floor(np.arange(size_out, dtype=np.float32) * ratio).astype(np.int64)
    return np.minimum(index, size_in - 1)


def resized_mask(mask: np.ndarray, size_hw: tuple[int, int]) -> np.ndarray:
    """Resize a mask bool `[H, W]` to `size_hw` by nearest neighbour."""
    rows, columns = (nearest_index(size_in, size_out) for size_in, size_out in zip(mask.shape, size_hw, strict=True))
    return mask[rows][:, columns]


def mask_extent(mask: np.ndarray) -> tuple[int, int, int, int] | None:
    """Extent (x1, y1, x2, y2) of a mask bool `[H, W]`, upper ends exclusive; None if it is empty."""
    rows = np.flatnonzero(mask.any(axis=1))
    if rows.size == 0:
        return None
    columns = np.flatnonzero(mask[rows[0] : rows[-1] + 1].any(axis=0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def mask_crop(mask: np.ndarray, size_hw: tuple[int, int]) -> tuple[np.ndarray, np.ndarray] | None:
    """Crop of a mask after resizing, and the region of the resized image that it covers.

    Along each axis on which the resized object is at most `MASK_SIDE` pixels long, the crop starts at the object's
    first pixel at full resolution. Otherwise it spans the object exactly and samples it at the centres of its pixels.

    Args:
        mask: bool `[H, W]`.
        size_hw: size of the resized image.

    Returns:
        uint8 `[MASK_SIDE, MASK_SIDE]` of 0 or 255 and its frame, float32 `[4]` xyxy in pixels of the resized image;
        None if the resized mask is empty.
    """
    extent = mask_extent(mask)
    if extent is None:
        return None
    x1, y1, x2, y2 = extent
    top, rows = _index_range(nearest_index(mask.shape[0], size_hw[0]), y1, y2)
    left, columns = _index_range(nearest_index(mask.shape[1], size_hw[1]), x1, x2)
    if size_hw[0] < mask.shape[0] or size_hw[1] < mask.shape[1]:
        # Downsampling may skip rows or columns at the object's edge.
        extent = mask_extent(mask[rows][:, columns])
        if extent is None:
            return None
        x1, y1, x2, y2 = extent
        top, left, rows, columns = top + y1, left + x1, rows[y1:y2], columns[x1:x2]
    (height, rows), (width, columns) = _crop_pixels(rows), _crop_pixels(columns)
    crop = np.zeros((MASK_SIDE, MASK_SIDE), np.uint8)
    crop[: rows.size, : columns.size] = mask[rows][:, columns]
    return crop * np.uint8(255), np.array([left, top, left + width, top + height], np.float32)


def _index_range(index: np.ndarray, start: int, end: int) -> tuple[int, np.ndarray]:
    """Part of an ascending index with values from `start` to `end`, and its offset."""
    first, last = np.searchsorted(index, (start, end))
    return int(first), index[first:last]


def _crop_pixels(index: np.ndarray) -> tuple[int, np.ndarray]:
    """Resized pixels covered by a crop along an axis, and the original pixels it contains.

    Args:
        index: original pixel of each resized pixel of the object.
    """
    if index.size <= MASK_SIDE:
        return MASK_SIDE, index
    return index.size, index[((np.arange(MASK_SIDE) + 0.5) * index.size / MASK_SIDE).astype(np.int64)]


@dataclass(frozen=True)
class View:
    """Crop of an image, optionally mirrored, resized and placed in the top left corner of a canvas."""

    window: tuple[int, int, int, int]  # top, left, bottom, right in pixels of the image; ends exclusive
    size_hw: tuple[int, int]  # size of the window after resizing
    canvas_hw: tuple[int, int]  # at least size_hw
    is_mirrored: bool = False  # left to right
    is_upside_down: bool = False

    def cut(self, image: np.ndarray) -> np.ndarray:
        """Crop and mirror `[H, W, …]` without resizing; returns a view."""
        top, left, bottom, right = self.window
        part = image[top:bottom, left:right]
        return part[:: -1 if self.is_upside_down else 1, :: -1 if self.is_mirrored else 1]

    def points(self, keypoints: np.ndarray) -> np.ndarray:
        """Transform keypoints `[…, 3]` (x, y, visibility) to the canvas; points outside the window become zeros."""
        top, left, bottom, right = self.window
        x, y = keypoints[..., 0] - left, keypoints[..., 1] - top
        if self.is_mirrored:
            x = right - left - x
        if self.is_upside_down:
            y = bottom - top - y
        (height, width), shown = self.size_hw, keypoints[..., 2]
        moved = np.stack([x * (width / (right - left)), y * (height / (bottom - top)), shown], axis=-1)
        return only_inside(moved.astype(np.float32), self.size_hw)

    @property
    def is_mirror_image(self) -> bool:
        """Whether left and right are exchanged; mirroring both axes is a rotation."""
        return self.is_mirrored != self.is_upside_down

    def cuts(self, size_hw: tuple[int, int]) -> bool:
        """Whether the window is smaller than an image of this size."""
        return self.window != (0, 0, *size_hw)

    def on_canvas(self, pixels: np.ndarray, fill: np.ndarray) -> np.ndarray:
        """Place resized pixels `[C, *size_hw]` on a canvas `[C, h, w]` filled with `fill` `[C]`."""
        if self.size_hw == self.canvas_hw:
            return pixels
        canvas = np.empty((len(pixels), *self.canvas_hw), pixels.dtype)
        canvas[:] = fill[:, None, None]
        canvas[:, : self.size_hw[0], : self.size_hw[1]] = pixels
        return canvas

    def mask(self, mask: np.ndarray) -> np.ndarray:
        """Transform a mask bool `[H, W]` to the canvas: bool `[h, w]`."""
        canvas = np.zeros(self.canvas_hw, bool)
        canvas[: self.size_hw[0], : self.size_hw[1]] = resized_mask(self.cut(mask), self.size_hw)
        return canvas

    def box(self, box_xyxy_px: npt.ArrayLike) -> np.ndarray:
        """Transform a box to the canvas, clipped to the window: float32 `[4]`."""
        top, left, bottom, right = self.window
        x1, y1, x2, y2 = np.asarray(box_xyxy_px, np.float32) - np.array([left, top, left, top], np.float32)
        if self.is_mirrored:
            x1, x2 = right - left - x2, right - left - x1
        if self.is_upside_down:
            y1, y2 = bottom - top - y2, bottom - top - y1
        return self.scaled_box(np.array([x1, y1, x2, y2], np.float32))

    def scaled_box(self, box_xyxy_px: np.ndarray) -> np.ndarray:
        """Scale a box of the window to the canvas: float32 `[4]`."""
        top, left, bottom, right = self.window
        window_wh, size_wh = (right - left, bottom - top), self.size_hw[::-1]
        scale = np.array(size_wh, np.float32) / np.array(window_wh, np.float32)
        return np.clip(box_xyxy_px * np.tile(scale, 2), 0, np.tile(np.array(size_wh, np.float32), 2))


@dataclass(frozen=True, eq=False)
class Objects:
    """Objects of one sample, in coordinates of the canvas."""

    boxes: np.ndarray  # float32 [G, 4] xyxy
    labels: np.ndarray  # int64 [G]
    masks: np.ndarray  # uint8 [G, MASK_SIDE, MASK_SIDE], see `mask_crop`; all zero: an object without a mask
    frames: np.ndarray  # float32 [G, 4] xyxy, regions of the masks
    keypoints: np.ndarray  # float32 [G, K, 3]: x, y, visibility; zeros if unlabelled or outside the canvas

    def __len__(self) -> int:
        return len(self.labels)

    @classmethod
    def stacked(cls, rows: list[tuple[np.ndarray, int, np.ndarray, np.ndarray, np.ndarray]], keypoints: int) -> Objects:
        """Stack (box, label, mask, frame, keypoints) rows of objects with `keypoints` keypoints each."""
        boxes, labels, masks, frames, points = zip(*rows, strict=True) if rows else ((), (), (), (), ())
        return cls(
            boxes=np.array(boxes, np.float32).reshape(-1, 4),
            labels=np.array(labels, np.int64),
            masks=np.array(masks, np.uint8).reshape(-1, MASK_SIDE, MASK_SIDE),
            frames=np.array(frames, np.float32).reshape(-1, 4),
            keypoints=np.array(points, np.float32).reshape(len(rows), keypoints, 3),
        )


def instances_of(record: ImageRecord) -> list[Instance]:
    """Objects of an image without crowd regions."""
    return [instance for instance in record.instances if not instance.is_crowd]


def only_inside(keypoints: np.ndarray, size_hw: tuple[int, int]) -> np.ndarray:
    """Keypoints `[…, 3]`; unlabelled ones and those outside an image of this size become zeros."""
    x, y, shown = np.moveaxis(keypoints, -1, 0)
    inside = (shown > 0) & (x >= 0) & (y >= 0) & (x <= size_hw[1]) & (y <= size_hw[0])
    return np.where(inside[..., None], keypoints, np.float32(0))


def keypoints_in_view(instances: list[Instance], view: View, partners: tuple[int, ...]) -> np.ndarray:
    """Keypoints of objects on the canvas, float32 `[G, K, 3]`; left and right are exchanged in a mirror image.

    Args:
        instances: objects; those without keypoints get zeros.
        view: placement of their image.
        partners: index of each keypoint's mirrored counterpart (`maskrcnn.keypoints.mirrored`).
    """
    nothing = np.zeros((len(partners), 3), np.float32)
    found = [nothing if each.keypoints is None else each.keypoints for each in instances]
    moved = view.points(np.array(found, np.float32).reshape(len(instances), len(partners), 3))
    return moved[:, list(partners)] if view.is_mirror_image else moved


def objects_in_view(record: ImageRecord, view: View, min_visible: float, partners: tuple[int, ...] = ()) -> Objects:
    """Objects of an image on the canvas; `partners` as in `keypoints_in_view`.

    Boxes are the annotated ones, or the extent of the remaining mask for objects cut by the view. Objects are dropped
    if no pixel is left after resizing, a side is shorter than `MIN_SIDE_PX`, or less than `min_visible` of their area
    remains.
    """
    rows, instances = [], instances_of(record)
    for instance, keypoints in zip(instances, keypoints_in_view(instances, view, partners), strict=True):
        mask = instance_mask(record, instance)
        part, box = view.cut(mask), view.box(instance.box_xyxy_px)
        if view.cuts(mask.shape):
            whole, left = np.count_nonzero(mask), np.count_nonzero(part)
            if left == 0 or left < min_visible * whole:
                continue
            if left < whole:
                box = view.scaled_box(np.array(mask_extent(part), np.float32))
        crop = mask_crop(part, view.size_hw)
        if crop is not None and min(box[2:] - box[:2]) >= MIN_SIDE_PX:
            pixels, frame = crop
            rows.append((box, instance.label, pixels * np.uint8(instance.has_mask), frame, keypoints))
    return Objects.stacked(rows, len(partners))

"""A picture and its objects as the detector gets to see them: cut, mirrored and resized.

Every change of a sample that keeps rows rows and columns columns is one `View`. Pixels, masks and boxes go through
the same one; nothing is computed that is cut away afterwards, and masks are handled one at a time.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from maskrcnn.data.coco import ImageRecord, Instance, instance_mask

# Object masks as crops of constant size, from which `maskrcnn.model.targets` computes training targets.
#
# A mask in the resized image has pixel i where the original has pixel floor(i · in / out): nearest-neighbour
# interpolation, as torchvision resizes masks. The crop keeps those pixels as they are where the object is small enough.

MASK_SIDE = 112  # pixels per side of a crop: four times the 28 × 28 that the mask head predicts


def nearest_index(size_in: int, size_out: int) -> np.ndarray:
    """The pixel that each pixel of a resized axis is read from, int64 `[size_out]`.

    In the arithmetic of torch's `interpolate(mode="nearest")`, which multiplies by a rounded ratio.
    """
    ratio = np.float32(size_in) / np.float32(size_out)
    index = np.floor(np.arange(size_out, dtype=np.float32) * ratio).astype(np.int64)
    return np.minimum(index, size_in - 1)


def resized_mask(mask: np.ndarray, size_hw: tuple[int, int]) -> np.ndarray:
    """A mask bool `[H, W]` at another size, nearest pixel: bool `[h, w]`."""
    rows, columns = (nearest_index(size_in, size_out) for size_in, size_out in zip(mask.shape, size_hw, strict=True))
    return mask[rows][:, columns]


def mask_extent(mask: np.ndarray) -> tuple[int, int, int, int] | None:
    """(x1, y1, x2, y2) of the pixels set in a mask bool `[H, W]`, upper ends exclusive; None without any."""
    rows = np.flatnonzero(mask.any(axis=1))
    if rows.size == 0:
        return None
    columns = np.flatnonzero(mask[rows[0] : rows[-1] + 1].any(axis=0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def mask_crop(mask: np.ndarray, size_hw: tuple[int, int]) -> tuple[np.ndarray, np.ndarray] | None:
    """The crop of a mask after resizing, and the region of the resized image that it covers.

    Along each axis on which the resized object measures at most `MASK_SIDE` pixels, the crop begins with the object's
    first pixel and has one pixel per pixel. On a longer one, the crop covers the object exactly and holds the pixels
    at its own pixels' centres.

    Args:
        mask: bool `[H, W]`.
        size_hw: of the resized image.

    Returns:
        uint8 `[MASK_SIDE, MASK_SIDE]` of 0 or 255, and its frame float32 `[4]` xyxy in pixels of the resized image;
        None where the resized mask has no pixel.
    """
    extent = mask_extent(mask)
    if extent is None:
        return None
    x1, y1, x2, y2 = extent
    top, rows = _reading(nearest_index(mask.shape[0], size_hw[0]), y1, y2)
    left, columns = _reading(nearest_index(mask.shape[1], size_hw[1]), x1, x2)
    if size_hw[0] < mask.shape[0] or size_hw[1] < mask.shape[1]:
        # Rows or columns are left out, perhaps at the object's edge: only what is read tells the extent.
        extent = mask_extent(mask[rows][:, columns])
        if extent is None:
            return None
        x1, y1, x2, y2 = extent
        top, left, rows, columns = top + y1, left + x1, rows[y1:y2], columns[x1:x2]
    (height, rows), (width, columns) = _sampled(rows), _sampled(columns)
    crop = np.zeros((MASK_SIDE, MASK_SIDE), np.uint8)
    crop[: rows.size, : columns.size] = mask[rows][:, columns]
    return crop * np.uint8(255), np.array([left, top, left + width, top + height], np.float32)


def _reading(index: np.ndarray, start: int, end: int) -> tuple[int, np.ndarray]:
    """The part of an ascending index that reads pixels from `start` to `end`, and its first place."""
    first, last = np.searchsorted(index, (start, end))
    return int(first), index[first:last]


def _sampled(index: np.ndarray) -> tuple[int, np.ndarray]:
    """How many resized pixels a crop covers along an axis, and the original pixels it holds.

    Args:
        index: the original pixel of each resized one that shows the object.
    """
    if index.size <= MASK_SIDE:
        return MASK_SIDE, index
    return index.size, index[((np.arange(MASK_SIDE) + 0.5) * index.size / MASK_SIDE).astype(np.int64)]


MIN_SIDE_PX = 1.0  # boxes with a shorter side teach nothing


@dataclass(frozen=True)
class View:
    """A window of a picture, perhaps mirrored, resized, in the top left corner of a canvas."""

    window: tuple[int, int, int, int]  # top, left, bottom, right in pixels of the picture; ends exclusive
    size_hw: tuple[int, int]  # of the window after resizing
    canvas_hw: tuple[int, int]  # at least as large
    is_mirrored: bool = False  # left to right
    is_upside_down: bool = False

    def cut(self, picture: np.ndarray) -> np.ndarray:
        """The window of `[H, W, …]`, mirrored and not yet resized; no copy."""
        top, left, bottom, right = self.window
        part = picture[top:bottom, left:right]
        return part[:: -1 if self.is_upside_down else 1, :: -1 if self.is_mirrored else 1]

    def points(self, keypoints: np.ndarray) -> np.ndarray:
        """Keypoints `[…, 3]` of the picture, x, y and visibility, on the canvas; zeros for those outside the window."""
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
        """Whether left and right of what it shows are exchanged: a picture mirrored twice is only turned."""
        return self.is_mirrored != self.is_upside_down

    def cuts(self, size_hw: tuple[int, int]) -> bool:
        """Whether it leaves out a part of a picture of this size."""
        return self.window != (0, 0, *size_hw)

    def on_canvas(self, pixels: np.ndarray, fill: np.ndarray) -> np.ndarray:
        """The canvas `[3, h, w]` with resized pixels float32 `[3, *size_hw]`, and `fill` `[3]` beside them."""
        if self.size_hw == self.canvas_hw:
            return pixels
        canvas = np.empty((3, *self.canvas_hw), np.float32)
        canvas[:] = fill[:, None, None]
        canvas[:, : self.size_hw[0], : self.size_hw[1]] = pixels
        return canvas

    def mask(self, mask: np.ndarray) -> np.ndarray:
        """The canvas of a mask: bool `[h, w]` from bool `[H, W]`."""
        canvas = np.zeros(self.canvas_hw, bool)
        canvas[: self.size_hw[0], : self.size_hw[1]] = resized_mask(self.cut(mask), self.size_hw)
        return canvas

    def box(self, box_xyxy_px: np.ndarray) -> np.ndarray:
        """A box of the picture on the canvas, cut to the window: float32 `[4]`."""
        top, left, bottom, right = self.window
        x1, y1, x2, y2 = np.asarray(box_xyxy_px, np.float32) - np.array([left, top, left, top], np.float32)
        if self.is_mirrored:
            x1, x2 = right - left - x2, right - left - x1
        if self.is_upside_down:
            y1, y2 = bottom - top - y2, bottom - top - y1
        return self.scaled_box(np.array([x1, y1, x2, y2], np.float32))

    def scaled_box(self, box_xyxy_px: np.ndarray) -> np.ndarray:
        """A box of the cut window on the canvas: float32 `[4]`."""
        top, left, bottom, right = self.window
        window_wh, size_wh = (right - left, bottom - top), self.size_hw[::-1]
        scale = np.array(size_wh, np.float32) / np.array(window_wh, np.float32)
        return np.clip(box_xyxy_px * np.tile(scale, 2), 0, np.tile(np.array(size_wh, np.float32), 2))


@dataclass(frozen=True, eq=False)
class Objects:
    """The objects of one sample, on the canvas."""

    boxes: np.ndarray  # float32 [G, 4] xyxy
    labels: np.ndarray  # int64 [G]
    masks: np.ndarray  # uint8 [G, MASK_SIDE, MASK_SIDE], see crops.py
    frames: np.ndarray  # float32 [G, 4] xyxy, what the masks cover
    keypoints: np.ndarray  # float32 [G, K, 3]: x, y and visibility, all 0 for what is not labelled or not on the canvas

    def __len__(self) -> int:
        return len(self.labels)

    @classmethod
    def stacked(cls, rows: list[tuple[np.ndarray, int, np.ndarray, np.ndarray, np.ndarray]], keypoints: int) -> Objects:
        """From (box, label, mask, frame, keypoints) of each object, with so many keypoints."""
        boxes, labels, masks, frames, points = zip(*rows, strict=True) if rows else ((), (), (), (), ())
        return cls(
            boxes=np.array(boxes, np.float32).reshape(-1, 4),
            labels=np.array(labels, np.int64),
            masks=np.array(masks, np.uint8).reshape(-1, MASK_SIDE, MASK_SIDE),
            frames=np.array(frames, np.float32).reshape(-1, 4),
            keypoints=np.array(points, np.float32).reshape(len(rows), keypoints, 3),
        )


def instances_of(record: ImageRecord) -> list[Instance]:
    """The objects of an image; crowd regions are none."""
    return [instance for instance in record.instances if not instance.is_crowd]


def only_inside(keypoints: np.ndarray, size_hw: tuple[int, int]) -> np.ndarray:
    """Keypoints `[…, 3]`, those that are unlabelled or outside an image of this size replaced by zeros."""
    x, y, shown = np.moveaxis(keypoints, -1, 0)
    inside = (shown > 0) & (x >= 0) & (y >= 0) & (x <= size_hw[1]) & (y <= size_hw[0])
    return np.where(inside[..., None], keypoints, np.float32(0))


def keypoints_in_view(instances: list[Instance], view: View, partners: tuple[int, ...]) -> np.ndarray:
    """The keypoints of objects on the canvas, float32 `[G, K, 3]`; in a mirror image left and right change places.

    Args:
        instances: the objects; one without keypoints gets zeros.
        view: how their picture is laid there.
        partners: which keypoint each one is in a mirror (`maskrcnn.keypoints.mirrored`).
    """
    nothing = np.zeros((len(partners), 3), np.float32)
    found = [nothing if each.keypoints is None else each.keypoints for each in instances]
    moved = view.points(np.array(found, np.float32).reshape(len(instances), len(partners), 3))
    return moved[:, list(partners)] if view.is_mirror_image else moved


def objects_in_view(record: ImageRecord, view: View, least_visible: float, partners: tuple[int, ...] = ()) -> Objects:
    """The objects of an image on the canvas; `partners` as for `keypoints_in_view`.

    Boxes are the annotated ones, except those of objects that the view cuts: theirs are the extents of what is left.
    Left out are objects without a pixel in the resized image, with a side below `MIN_SIDE_PX`, or of which less than
    `least_visible` of the area is left.
    """
    rows, instances = [], instances_of(record)
    for instance, keypoints in zip(instances, keypoints_in_view(instances, view, partners), strict=True):
        mask = instance_mask(record, instance)
        part, box = view.cut(mask), view.box(instance.box_xyxy_px)
        if view.cuts(mask.shape):
            whole, left = np.count_nonzero(mask), np.count_nonzero(part)
            if left == 0 or left < least_visible * whole:
                continue
            if left < whole:
                box = view.scaled_box(np.array(mask_extent(part), np.float32))
        made = mask_crop(part, view.size_hw)
        if made is not None and min(box[2:] - box[:2]) >= MIN_SIDE_PX:
            rows.append((box, instance.label, *made, keypoints))
    return Objects.stacked(rows, len(partners))

"""Samples made of several images. A `Scene` carries full-size masks, so that objects can be covered, moved and bent."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from maskrcnn.data.coco import ImageRecord, instance_mask
from maskrcnn.data.crops import mask_crop, mask_extent
from maskrcnn.data.view import Objects, View, instances_of, keypoints_in_view


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

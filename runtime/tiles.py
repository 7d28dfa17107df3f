"""Detection in large scenes, tile by tile; detections of overlapping tiles are joined.

A tile contains some objects completely and others cut by its border. An object cut by a tile's border that is fully
inside a neighbouring tile is taken from that neighbour. Two detections of one class in overlapping tiles are merged if
the intersection of their masks (boxes, for models without masks) is at least half of the smaller mask, measured in the
overlap of the tiles, or on the full masks if neither is cut. The object is then the best complete view, or the union of
its parts.

Masks are spans of the scene's pixels (`maskrcnn.imaging.run_lengths`): the cost grows with the objects, not with the
scene.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from maskrcnn.data.scenes import Scene, Window, open_scene
from maskrcnn.errors import UserError
from maskrcnn.imaging.postprocess import Detections
from maskrcnn.imaging.preprocess import Preprocessing
from maskrcnn.imaging.run_lengths import clipped, covered, moved, runs_from_spans
from maskrcnn.runtime.detector import Detector

if TYPE_CHECKING:
    from maskrcnn.data.sources import ImageItem

T = TypeVar("T")
SHOWN_MEGAPIXELS = 40  # larger scenes are not read as a whole for drawing
_SAME = 0.5  # minimum intersection over the smaller of two views of an object, as in SAHI
_WHOLE = 0.8  # minimum fraction of the union of all views that a view of the whole object covers
_BORDER = 0.01  # fraction of a tile's side: boxes that end this close to its border count as cut


@dataclass(frozen=True)
class Tiles:
    """The tiles of a scene: squares, cropped in narrower scenes.

    Args:
        size_px: side of a tile in pixels of the scene; a tile is resized like an image of its size.
        overlap: fraction of a tile's side that its neighbour also covers, 0 to 1; the last tiles overlap more.

    Raises:
        UserError: for numbers out of range.
    """

    size_px: int = 1024
    overlap: float = 0.2

    def __post_init__(self) -> None:
        if self.size_px < 1:
            raise UserError(f"tiles of {self.size_px} px (--tile)", "at least 1 px", "use a value such as 1024")
        if not 0 <= self.overlap < 1:
            found = f"an overlap of {self.overlap:g} (--overlap)"
            raise UserError(found, "a share of the tile's side, from 0 to less than 1", "use a value such as 0.2")

    def check(self, preprocessing: Preprocessing) -> None:
        """Checks that a model can run on tiles of this size.

        Raises:
            UserError: if a tile is smaller than the stride of its features.
        """
        if self.size_px < preprocessing.divisor:
            raise UserError(
                f"tiles of {self.size_px} px (--tile)",
                f"at least {preprocessing.divisor} px, the stride of the model's coarsest features",
                "choose a tile size at which objects are about as large as in the training images",
            )

    def starts(self, length_px: int) -> list[int]:
        """Returns the first pixel of each tile along a side of a scene."""
        last = max(0, length_px - self.size_px)
        step = max(1, round(self.size_px * (1 - self.overlap)))
        return [*range(0, last, step), last]


def tiles_of(tile: int | None, overlap: float) -> Tiles | None:
    """Returns the tiles for the options `tile` and `overlap`; None without `tile`.

    Raises:
        UserError: for numbers out of range, or an overlap without tiles.
    """
    if tile is None:
        if overlap != Tiles.overlap:
            raise UserError(f"--overlap {overlap:g} without --tile", "a tile size", "add --tile, such as --tile 1024")
        return None
    return Tiles(tile, overlap)


def detect_scenes(
    detector: Detector,
    items: Iterable[ImageItem],
    finish: Callable[[ImageItem, np.ndarray, int, Detections], T],
    tiles: Tiles,
    *,
    batch: int = 1,
    progress: Callable[[str, int, int], None] = lambda name, done, total: None,
) -> Iterator[tuple[ImageItem, T | UserError]]:
    """Like `maskrcnn.runtime.pipeline.detect_images`, but tile by tile, one image at a time.

    Args:
        detector, items: see `detect_images`.
        finish: see `detect_images`; images of more than `SHOWN_MEGAPIXELS` are passed as `[0, 0, C]`.
        tiles: tile size and overlap.
        batch: tiles per model call.
        progress: called with the name of an image, the number of finished tiles, and the total number.
    """
    for item in items:
        try:
            with _opened(item, detector) as (scene, orientation):
                height, width = scene.size_hw
                told = partial(progress, item.name)
                found = detect_tiles(detector, scene, tiles, batch_size=batch, progress=told)
                is_shown = height * width <= SHOWN_MEGAPIXELS * 1e6
                image = scene.read(Window(0, 0, height, width)) if is_shown else np.zeros((0, 0, 3), np.uint8)
            outcome: T | UserError = finish(item, image, orientation, found)
        except UserError as error:
            outcome = error
        yield item, outcome


@contextmanager
def _opened(item: ImageItem, detector: Detector) -> Iterator[tuple[Scene, int]]:
    """The scene of an item, and its EXIF orientation: files are read in parts, other images as a whole."""
    if item.is_file:
        with open_scene(item.name, detector.preprocessing, notes=detector.notes) as scene:
            yield scene, scene.applied_orientation
    else:
        image, orientation = item.read(detector.preprocessing, detector.notes)
        yield Scene.of_array(image), orientation


def detect_tiles(
    detector: Detector,
    scene: Scene | np.ndarray | str | Path,
    tiles: Tiles,
    *,
    batch_size: int = 1,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Detections:
    """Detects in a scene tile by tile.

    A scene that fits into one tile is processed like any image. Otherwise masks are `Detections.mask_runs`, keypoints
    come from the best view of an object, and there may be more detections than the model's limit per image.

    Args:
        detector: a detector with any backend.
        scene: file, array as for `Detector.detect`, or an opened scene.
        tiles: tile size and overlap.
        batch_size: tiles per model call.
        progress: called with the number of finished tiles, and the total number.

    Raises:
        UserError: if the scene cannot be read, or a tile is smaller than the model's stride.
    """
    tiles.check(detector.preprocessing)
    with ExitStack() as stack:
        if isinstance(scene, np.ndarray):
            scene = Scene.of_array(scene)
        elif not isinstance(scene, Scene):
            scene = stack.enter_context(open_scene(scene, detector.preprocessing, notes=detector.notes))
        height, width = scene.size_hw
        if max(height, width) <= tiles.size_px:
            progress(0, 1)
            found = detector.detect([scene.read(Window(0, 0, height, width))])[0]
            progress(1, 1)
            return found
        joiner = _Joiner(scene.size_hw, tiles)
        windows = sorted(joiner.windows, key=scene.stored)
        for start in range(0, len(windows), batch_size):
            progress(start, len(windows))
            batch = windows[start : start + batch_size]
            for window, found in zip(batch, detector.detect([scene.read(each) for each in batch]), strict=True):
                joiner.add(window, found)
        progress(len(windows), len(windows))
    return joiner.joined()


@dataclass(frozen=True, eq=False)
class _View:
    """A detection of one tile, in pixels of the scene."""

    box: np.ndarray  # [4] float32 xyxy
    shape: np.ndarray  # spans of the mask, int64 [S, 2]; without masks the box
    score: float
    label: int
    keypoints: np.ndarray | None  # [K, 3]
    is_cut: np.ndarray  # [4] bool: at the tile's left, top, right and bottom border, unless the scene ends there


class _Joiner:
    """Collects the detections of all tiles of a scene, and joins them."""

    def __init__(self, size_hw: tuple[int, int], tiles: Tiles) -> None:
        self._size_hw = size_hw
        self._tops, self._lefts = (tiles.starts(side) for side in size_hw)
        self._side_hw = min(tiles.size_px, size_hw[0]), min(tiles.size_px, size_hw[1])
        self._margin_px = max(1.0, _BORDER * tiles.size_px)
        self.windows = [Window(top, left, *self._side_hw) for top, left in product(self._tops, self._lefts)]
        self._views: dict[Window, list[_View]] = {}
        self._first: Detections | None = None  # for fields common to all

    def add(self, window: Window, found: Detections) -> None:
        """Adds the detections of a tile, except those that another tile contains more completely."""
        self._first = self._first or found
        boxes = found.boxes_xyxy_px + np.array([window.left, window.top] * 2, np.float32)
        is_cut = self._is_cut(boxes, window)
        kept = np.flatnonzero(~(is_cut.any(axis=1) & self._fits(boxes, 0) & self._fits(boxes, 1)))
        spans = found.runs().spans() if found.has_masks else []
        keypoints = found.keypoints
        if keypoints is not None:
            keypoints = keypoints + np.array([window.left, window.top, 0], np.float32)
        self._views[window] = [
            _View(
                box=boxes[k],
                shape=moved(spans[k], window[2:], window.top, window.left, self._size_hw[0]) if spans else boxes[k],
                score=float(found.scores[k]),
                label=int(found.labels[k]),
                keypoints=None if keypoints is None else keypoints[k],
                is_cut=is_cut[k],
            )
            for k in kept.tolist()
        ]

    def _is_cut(self, boxes: np.ndarray, window: Window) -> np.ndarray:
        """Whether the tile's borders may cut boxes `[D, 4]`, bool `[D, 4]`."""
        low = np.array([window.left, window.top])
        high = low + np.array([window.width, window.height])
        at_low = (boxes[:, :2] <= low + self._margin_px) & (low > 0)
        at_high = (boxes[:, 2:] >= high - self._margin_px) & (high < np.array(self._size_hw[::-1]))
        return np.concatenate([at_low, at_high], axis=1)

    def _fits(self, boxes: np.ndarray, axis: int) -> np.ndarray:
        """Whether boxes `[D, 4]` are clearly inside some tile along an axis (0: x).

        The margin is twice that of `_is_cut`, so that no tile leaves a box to another tile that also does.
        """
        starts, side, length = (
            (self._lefts, self._side_hw[1], self._size_hw[1]),
            (self._tops, self._side_hw[0], self._size_hw[0]),
        )[axis]
        low = np.array([start + 2 * self._margin_px if start else -np.inf for start in starts])
        high = np.array([np.inf if start + side == length else start + side - 2 * self._margin_px for start in starts])
        is_inside = (boxes[:, axis, None] >= low) & (boxes[:, axis + 2, None] <= high)
        return np.asarray(is_inside.any(axis=1))

    def joined(self) -> Detections:
        """The objects of the scene, by descending score."""
        assert self._first is not None
        views = [view for window in self.windows for view in self._views[window]]
        number = {id(view): k for k, view in enumerate(views)}
        parent = list(range(len(views)))

        def root(k: int) -> int:
            while parent[k] != k:
                parent[k] = k = parent[parent[k]]
            return k

        extras: list[tuple[int, int]] = []
        for first, second in self._neighbours():
            same, more = self._same_objects(first, second)
            for one, other in same:
                parent[root(number[id(other)])] = root(number[id(one)])
            extras += [(number[id(one)], number[id(other)]) for one, other in more]
        groups: dict[int, list[_View]] = {}
        for k, view in enumerate(views):
            groups.setdefault(root(k), []).append(view)
        scores = {key: max(view.score for view in group) for key, group in groups.items()}
        covering: dict[int, set[int]] = {}
        for a, b in extras:
            if scores[root(a)] <= scores[root(b)] and root(a) != root(b):
                covering.setdefault(root(a), set()).add(root(b))
        kept: dict[int, _View] = {}
        for key in sorted(groups, key=lambda key: -scores[key]):
            if not any(other in kept for other in covering.get(key, ())):
                kept[key] = _object(groups[key])
        objects = list(kept.values())
        has_masks, has_keypoints = self._first.has_masks, self._first.has_keypoints
        points = [view.keypoints for view in objects if view.keypoints is not None]
        height, width = self._size_hw
        return Detections(
            boxes_xyxy_px=np.array([view.box for view in objects], np.float32).reshape(-1, 4),
            scores=np.array([view.score for view in objects], np.float32),
            labels=np.array([view.label for view in objects], np.int64),
            masks=None,
            size_hw=self._size_hw,
            keypoints=np.array(points, np.float32).reshape(len(objects), -1, 3) if has_keypoints else None,
            class_names=self._first.class_names,
            category_ids=self._first.category_ids,
            keypoint_skeleton=self._first.keypoint_skeleton,
            mask_runs=runs_from_spans([covered([v.shape], 1) for v in objects], height * width) if has_masks else None,
        )

    def _neighbours(self) -> Iterator[tuple[Window, Window]]:
        """The pairs of overlapping tiles that have detections."""
        near = [
            [[other for other in starts if abs(other - start) < side] for start in starts]
            for starts, side in zip((self._tops, self._lefts), self._side_hw, strict=True)
        ]
        for (i, top), (j, left) in product(enumerate(self._tops), enumerate(self._lefts)):
            window = Window(top, left, *self._side_hw)
            for place in product(near[0][i], near[1][j]):
                other = Window(*place, *self._side_hw)
                if window < other and self._views[window] and self._views[other]:
                    yield window, other

    def _same_objects(
        self, first: Window, second: Window
    ) -> tuple[list[tuple[_View, _View]], list[tuple[_View, _View]]]:
        """The pairs of detections of two tiles that show one object, each detection in at most one pair.

        Also returns the pairs of other detections that overlap a paired one: the other detection and the paired one.
        """
        height = self._size_hw[0]
        ones, others = self._views[first], self._views[second]
        a, b = (np.array([view.box for view in views]) for views in (ones, others))
        sides = np.minimum(a[:, None, 2:], b[None, :, 2:]) - np.maximum(a[:, None, :2], b[None, :, :2])
        labels = [np.array([view.label for view in views]) for views in (ones, others)]
        pairs = np.argwhere((sides > 0).all(axis=2) & (labels[0][:, None] == labels[1]))
        shared = _intersection(first, second)
        cut_here, cut_there = _borders_inside(first, second), _borders_inside(second, first)
        alike: list[tuple[float, float, int, int]] = []
        for i, j in pairs.tolist():
            one, other = ones[i], others[j]
            is_part = bool((one.is_cut & cut_here).any() or (other.is_cut & cut_there).any())
            shapes = [_within(each.shape, shared, height) if is_part else each.shape for each in (one, other)]
            common = _area(_common(*shapes))
            if common and common >= _SAME * min(map(_area, shapes)):
                of_whole = common / min(_area(one.shape), _area(other.shape))
                alike.append((common / (sum(map(_area, shapes)) - common), of_whole, i, j))
        same, more = [], []
        done: tuple[set[int], set[int]] = (set(), set())
        alike.sort(key=lambda each: -each[0])
        for _, _, i, j in alike:
            if i not in done[0] and j not in done[1]:
                same.append((ones[i], others[j]))
                done[0].add(i)
                done[1].add(j)
        for _, of_whole, i, j in alike:
            if of_whole >= _SAME and (i in done[0]) != (j in done[1]):
                more.append((others[j], ones[i]) if i in done[0] else (ones[i], others[j]))
        return same, more


def _object(views: Sequence[_View]) -> _View:
    """An object from all its views: the best complete view, or the union of all."""
    ordered = sorted(views, key=lambda view: -view.score)
    best = ordered[0]
    if len(views) == 1:
        return best
    shape = _union([view.shape for view in views])
    box = np.concatenate([np.min([v.box[:2] for v in views], axis=0), np.max([v.box[2:] for v in views], axis=0)])
    whole = next((view for view in ordered if not view.is_cut.any()), None)
    if whole is not None and _area(whole.shape) >= _WHOLE * _area(shape):
        return replace(whole, score=best.score)
    return replace(best, shape=shape, box=box)


def _intersection(first: Window, second: Window) -> Window:
    top, left = max(first.top, second.top), max(first.left, second.left)
    bottom = min(first.top + first.height, second.top + second.height)
    return Window(top, left, bottom - top, min(first.left + first.width, second.left + second.width) - left)


def _borders_inside(window: Window, other: Window) -> np.ndarray:
    """Whether each border (left, top, right, bottom) of a window is inside another window, bool `[4]`."""
    x = np.array([window.left, window.left + window.width])
    y = np.array([window.top, window.top + window.height])
    in_x, in_y = (x > other.left) & (x < other.left + other.width), (y > other.top) & (y < other.top + other.height)
    return np.array([in_x[0], in_y[0], in_x[1], in_y[1]])


# A shape is the spans of a mask `[S, 2]`, or a box `[4]`.


def _area(shape: np.ndarray) -> float:
    if shape.ndim == 2:
        return float((shape[:, 1] - shape[:, 0]).sum())
    return float((shape[2:] - shape[:2]).clip(0).prod())


def _common(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    if first.ndim == 2:
        return covered([first, second], 2)
    return np.concatenate([np.maximum(first[:2], second[:2]), np.minimum(first[2:], second[2:])])


def _union(shapes: Sequence[np.ndarray]) -> np.ndarray:
    """The union of masks; for boxes, the enclosing box."""
    if shapes[0].ndim == 2:
        return covered(shapes, 1)
    corners = np.array(shapes)
    return np.concatenate([corners[:, :2].min(axis=0), corners[:, 2:].max(axis=0)])


def _within(shape: np.ndarray, window: Window, height: int) -> np.ndarray:
    rows, columns = ((each.start, each.stop) for each in window.slices)
    if shape.ndim == 2:
        return clipped(shape, height, rows, columns)
    low, high = np.array([columns[0], rows[0]]), np.array([columns[1], rows[1]])
    return _common(shape, np.concatenate([low, high]))

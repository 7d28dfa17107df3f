"""Detections of tiles, joined: the objects of the scene, whatever borders cut them."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from maskrcnn.data.images import ImageNotes
from maskrcnn.errors import UserError
from maskrcnn.imaging.postprocess import Detections
from maskrcnn.imaging.preprocess import Preprocessing
from maskrcnn.imaging.run_lengths import runs_from_spans
from maskrcnn.runtime.tiles import Tiles, detect_tiles

_CLASSES = 3


class _SeesColours:
    """A detector whose objects are the grey values above 0, of class value % 3 + 1; it sees what is in the image."""

    preprocessing, notes = Preprocessing(), ImageNotes()

    def __init__(self, *, masks: bool = True, keypoints: bool = False, again: float = 0.0) -> None:
        self.masks, self.keypoints, self.again, self.calls = masks, keypoints, again, list[tuple[int, ...]]()

    def detect(self, images: list[np.ndarray]) -> list[Detections]:
        self.calls.append(tuple(image.shape[1] for image in images))
        return [self._found(image[..., 0]) for image in images]

    def _found(self, image: np.ndarray) -> Detections:
        values = [value for value in np.unique(image).tolist() if value]
        boxes, spans, scores = [], [], []
        for value in values:
            rows, columns = np.nonzero(image == value)
            boxes.append([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
            pixels = np.flatnonzero((image == value).T)
            spans.append(np.stack([pixels, pixels + 1], axis=1))
            scores.append(len(rows) / image.size)  # larger views are better
        points = np.array([[[box[0], box[1], 1.0], [box[2], box[3], 1.0]] for box in boxes]).reshape(-1, 2, 3)
        return Detections(
            boxes_xyxy_px=np.array(boxes, np.float32).reshape(-1, 4),
            scores=np.array(scores, np.float32),
            labels=np.array(values, np.int64) % _CLASSES + 1,
            masks=None,
            size_hw=image.shape,  # type: ignore[arg-type]
            keypoints=points.astype(np.float32) if self.keypoints else None,
            class_names=("a", "b", "c"),
            category_ids=(1, 2, 3),
            mask_runs=runs_from_spans(spans, image.size) if self.masks else None,
        )


def _scene(*rectangles: tuple[int, int, int, int], size_hw: tuple[int, int] = (700, 900)) -> np.ndarray:
    """Rectangles (x0, y0, x1, y1) of the values 3, 6, …, all of one class."""
    image = np.zeros((*size_hw, 3), np.uint8)
    for number, (x0, y0, x1, y1) in enumerate(rectangles, start=1):
        image[y0:y1, x0:x1] = 3 * number
    return image


def _check(image: np.ndarray, tiles: Tiles, **options: Any) -> Detections:
    """The objects are those of the scene, each once and pixel by pixel."""
    detector: Any = _SeesColours()
    found = detect_tiles(detector, image, tiles, **options)
    values = [value for value in np.unique(image).tolist() if value]
    expected = {(image[..., 0] == value).tobytes() for value in values}
    masks = found.full_masks()
    assert len(found) == len(values)
    assert {mask.tobytes() for mask in masks} == expected
    for mask, box in zip(masks, found.boxes_xyxy_px.tolist(), strict=True):
        rows, columns = np.nonzero(mask)
        assert box == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
    assert (np.diff(found.scores) <= 0).all()
    return found


# Tiles of 256 px and 20 % begin at 0, 205, 410, 615, and the last one at 444 (rows) or 644 (columns).
@pytest.mark.parametrize(
    "rectangles",
    [
        [(30, 40, 90, 100)],  # in one tile
        [(210, 40, 250, 100)],  # in two
        [(190, 40, 300, 100)],  # cut by both, whole in none but one
        [(150, 40, 310, 100)],  # whole in no tile
        [(150, 150, 330, 330)],  # over the corner of four
        [(20, 60, 880, 90)],  # larger than a tile, along a row
        [(100, 10, 140, 690)],  # along a column
        [(50, 60, 850, 650)],  # over all tiles
        [(0, 0, 900, 700)],  # the whole scene
        [(100, 100, 240, 200), (240, 100, 400, 200)],  # touching, of one class
        [(100, 100, 800, 150), (100, 150, 800, 200), (100, 200, 800, 260)],
        [(0, 0, 30, 30), (880, 680, 900, 700), (204, 204, 206, 206), (255, 0, 257, 10)],
        [(643, 443, 645, 445), (254, 100, 258, 104)],
    ],
    ids=str,
)
@pytest.mark.parametrize("overlap", [0.1, 0.2, 0.5])
def test_rectangles_are_joined_exactly(rectangles, overlap):
    _check(_scene(*rectangles), Tiles(256, overlap))


def test_objects_of_any_shape_are_joined_exactly():
    """A ring, an L, and a diagonal band, all larger than a tile; and 60 rectangles at random places."""
    rows, columns = np.mgrid[:700, :900]
    image = np.zeros((700, 900, 3), np.uint8)
    radius = np.hypot(rows - 350, columns - 450)
    image[(radius > 280) & (radius < 310)] = 3
    image[(abs(rows - columns) < 20) & (radius < 250)] = 6
    image[20:40, 20:600] = image[20:680, 20:40] = 9
    _check(image, Tiles(256, 0.2), batch_size=5)
    rng = np.random.default_rng(3)
    image = np.zeros((700, 900, 3), np.uint8)
    for number in range(60):
        row, column = divmod(int(number), 10)
        top, left = row * 116 + rng.integers(0, 40), column * 90 + rng.integers(0, 40)
        image[top : top + rng.integers(8, 76), left : left + rng.integers(8, 50)] = 1 + number
    _check(image, Tiles(200, 0.3))


def test_a_scene_that_fits_into_a_tile_is_detected_in_as_an_image():
    image = _scene((10, 10, 60, 60), (80, 20, 90, 60), size_hw=(100, 200))
    detector: Any = _SeesColours()
    found, plain = detect_tiles(detector, image, Tiles(256, 0.2)), detector.detect([image])[0]
    np.testing.assert_array_equal(found.boxes_xyxy_px, plain.boxes_xyxy_px)
    np.testing.assert_array_equal(found.full_masks(), plain.full_masks())
    assert found.rles() == plain.rles()


def test_models_of_boxes_join_boxes():
    image = _scene((150, 40, 310, 100), (20, 300, 880, 330), (700, 500, 720, 520))
    detector: Any = _SeesColours(masks=False)
    found = detect_tiles(detector, image, Tiles(256, 0.2))
    assert not found.has_masks
    assert sorted(found.boxes_xyxy_px.tolist()) == [[20, 300, 880, 330], [150, 40, 310, 100], [700, 500, 720, 520]]


def test_keypoints_are_those_of_the_better_part():
    detector: Any = _SeesColours(keypoints=True)
    found = detect_tiles(detector, _scene((100, 40, 310, 100)), Tiles(256, 0.2))
    assert found.boxes_xyxy_px.tolist() == [[100, 40, 310, 100]]
    # Of the first tile, which sees 156 columns of it, the second 105.
    assert found.keypoints is not None and found.keypoints.tolist() == [[[100, 40, 1], [256, 100, 1]]]


def test_neighbours_of_other_classes_are_kept_apart():
    class Two(_SeesColours):
        def detect(self, images: list[np.ndarray]) -> list[Detections]:
            twice = []
            for found in super().detect(images):
                both = np.concatenate([found.labels, found.labels % _CLASSES + 1])
                runs = found.runs()
                twice.append(
                    replace(
                        found,
                        boxes_xyxy_px=np.tile(found.boxes_xyxy_px, (2, 1)),
                        scores=np.tile(found.scores, 2),
                        labels=both,
                        mask_runs=type(runs)(np.tile(runs.runs, 2), np.tile(runs.lengths, 2)),
                    )
                )
            return twice

    detector: Any = Two()
    found = detect_tiles(detector, _scene((150, 40, 310, 100)), Tiles(256, 0.2))
    assert sorted(found.labels.tolist()) == [1, 2]
    np.testing.assert_array_equal(found.full_masks()[0], found.full_masks()[1])


def test_tiles_run_in_batches():
    detector: Any = _SeesColours()
    told: list[tuple[int, int]] = []
    detect_tiles(detector, _scene(), Tiles(256, 0.2), batch_size=8, progress=lambda *now: told.append(now))
    assert [len(call) for call in detector.calls] == [8, 8, 4]  # 4 rows of 5
    assert told[-1] == (20, 20)


def test_an_empty_scene_has_no_objects():
    detector: Any = _SeesColours()
    found = detect_tiles(detector, _scene(), Tiles(256, 0.2))
    assert len(found) == 0 and found.full_masks().shape == (0, 700, 900) and found.to_coco() == []


@pytest.mark.parametrize(
    ("tile", "overlap", "message"),
    [(16, 0.2, "stride"), (0, 0.2, "1 px"), (256, 1.0, "less than 1"), (256, -0.1, "from 0"), (256, np.nan, "from 0")],
)
def test_faults_of_tiles_are_told(tile, overlap, message):
    detector: Any = SimpleNamespace(preprocessing=Preprocessing(), notes=ImageNotes())
    with pytest.raises(UserError) as caught:
        detect_tiles(detector, _scene(), Tiles(tile, overlap))
    assert message in f"{caught.value.expected}"

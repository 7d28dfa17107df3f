"""Keypoints stay with their pixels in augmented samples, and keep their names."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from marked import write_marked_dataset

from maskrcnn.config import AugmentConfig
from maskrcnn.data.coco import CocoDataset
from maskrcnn.imaging.preprocess import Preprocessing
from maskrcnn.training.augmentation import Scene, copy_paste, mixup, mosaic
from maskrcnn.training.samples import Sample, TrainingSamples
from maskrcnn.training.view import View, keypoints_in_view

CHANGES = {
    "nothing": {"flip_probability": 0.0},
    "flip": {"flip_probability": 1.0},
    "flips": {"flip_probability": 0.5, "vertical_flip_probability": 0.5},
    "shorter sides": {"shorter_sides_px": (60, 100)},
    "jitter": {"jitter_probability": 1.0, "jitter_canvas_px": 104, "jitter_least_scale": 0.5},
    "perspective": {"perspective_probability": 1.0, "perspective_distortion": 0.4},
    "own": {"transform": "own_transforms:turned"},
    "mosaic": {"mosaic_probability": 1.0},
    "copy-paste": {"copy_paste_probability": 1.0},
    "everything": {
        "vertical_flip_probability": 0.5,
        "jitter_probability": 0.5,
        "jitter_least_scale": 0.6,
        "mosaic_probability": 0.5,
        "perspective_probability": 0.5,
        "copy_paste_probability": 0.5,
    },
}
LEFT, TIP, RIGHT = range(3)
RED, GREEN, BLUE = range(3)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> CocoDataset:
    return CocoDataset.load(write_marked_dataset(tmp_path_factory.mktemp("marked") / "data"), "train")


def samples(dataset, seed: int, **changes) -> TrainingSamples:
    rule = Preprocessing(min_size_px=100, max_size_px=150)
    return TrainingSamples(dataset, rule, augment=AugmentConfig(**changes), seed=seed)


def colours_at(sample: Sample, keypoints: np.ndarray) -> list[int | None]:
    """The spot that each visible keypoint `[K, 3]` lies on, by its colour; None for no spot.

    The clearest of nine pixels tells: at the edge of a tilted picture a pixel is half empty canvas.
    """
    _, height, width = sample.image.shape
    found: list[int | None] = []
    for x, y, _ in keypoints:
        column, row = min(int(x), width - 1), min(int(y), height - 1)
        near = sample.image[:, max(row - 1, 0) : row + 2, max(column - 1, 0) : column + 2].reshape(3, -1)
        pixel = near[:, np.ptp(near, axis=0).argmax()]
        strongest = int(pixel.argmax())
        stands_out = pixel[strongest] - np.delete(pixel, strongest).max() > 80
        found.append(strongest if stands_out else None)
    return found


def is_clockwise(keypoints: np.ndarray) -> bool:
    """Whether left corner, tip and right corner follow each other clockwise in the image, whose y points down."""
    first, second = keypoints[TIP, :2] - keypoints[LEFT, :2], keypoints[RIGHT, :2] - keypoints[LEFT, :2]
    return bool(first[0] * second[1] - first[1] * second[0] > 0)


@pytest.mark.parametrize("change", CHANGES)
def test_a_keypoint_lies_on_its_spot_and_left_stays_left(dataset, change):
    looked_at = []

    @settings(deadline=None, max_examples=30, derandomize=True)  # rarely, a spot of the next tile is nearer
    @given(seed=st.integers(0, 10_000), epoch=st.integers(0, 10_000), index=st.integers(0, 8))
    def check(seed, epoch, index):
        sample = samples(dataset, seed, **CHANGES[change])[epoch, index]
        _, height, width = sample.image.shape
        assert sample.objects.keypoints.shape == (len(sample.objects), 3, 3)
        for keypoints in sample.objects.keypoints:
            labelled = keypoints[:, 2] > 0
            assert (keypoints[~labelled] == 0).all()
            assert (keypoints[:, :2] >= 0).all() and (keypoints[:, :2] <= (width, height)).all()
            colours, seen = colours_at(sample, keypoints), keypoints[:, 2] == 2
            if seen[TIP]:
                assert colours[TIP] == GREEN
            assert all(colours[k] in (RED, BLUE) for k in (LEFT, RIGHT) if seen[k])
            if seen.all():
                assert colours[LEFT] != colours[RIGHT] and is_clockwise(keypoints)
                looked_at.append(colours[LEFT])

    check()
    assert len(looked_at) >= 10
    mirrored = {"nothing": {RED}, "flip": {BLUE}}.get(change, {RED, BLUE})
    assert set(looked_at) == mirrored  # a mirrored plate's red corner is its right one


@pytest.mark.parametrize(
    "changes", [{"shorter_sides_px": (70, 150)}, {"perspective_probability": 1.0, "perspective_distortion": 0.3}]
)
def test_a_keypoint_is_the_middle_of_its_spot(dataset, changes):
    made, off = samples(dataset, 3, flip_probability=0.5, **changes), []
    for epoch in range(40):
        sample = made[epoch, 0]
        (x, y, shown) = sample.objects.keypoints[0, TIP]
        red, green, blue = sample.image.astype(np.float32)
        rows, columns = np.nonzero(green - np.maximum(red, blue) > 100)
        is_whole = len(rows) and min(rows.min(), columns.min()) > 0
        if shown and is_whole and rows.max() < len(green) - 1 and columns.max() < len(green[0]) - 1:
            off.append((columns.mean() + 0.5 - x, rows.mean() + 0.5 - y))
    assert len(off) > 20
    assert np.abs(np.mean(off, axis=0)).max() < 0.25 and np.abs(off).max() < 1.0


def test_what_is_not_labelled_has_zeros(dataset):
    without = [index for index, record in enumerate(dataset.images) if record.instances[0].keypoints is None]
    assert without == [2, 5, 8]
    keypoints = samples(dataset, 0)[0, 2].objects.keypoints
    assert keypoints.shape == (1, 3, 3) and not keypoints.any()


def test_a_dataset_without_keypoints_has_arrays_without_any(shapes):
    sample = samples(CocoDataset.load(shapes, "train"), 0)[0, 0]
    assert sample.objects.keypoints.shape == (len(sample.objects), 0, 3)


# --- by hand -----------------------------------------------------------------------------------------

# Top 10, left 20, bottom 30, right 50, twice as large, on a canvas with room below and to the right.
ENLARGED = View((10, 20, 30, 50), (40, 60), (64, 70))
POINTS = np.array([[25, 12, 2], [50, 30, 1], [50.5, 20, 2], [30, 9.5, 2], [40, 20, 0]], np.float32)


@pytest.mark.parametrize(
    ("flips", "first", "second"),
    [
        ((False, False), [10, 4, 2], [60, 40, 1]),
        ((True, False), [50, 4, 2], [0, 40, 1]),
        ((False, True), [10, 36, 2], [60, 0, 1]),
        ((True, True), [50, 36, 2], [0, 0, 1]),
    ],
)
def test_points_take_the_way_of_their_picture(flips, first, second):
    found = View(ENLARGED.window, ENLARGED.size_hw, ENLARGED.canvas_hw, *flips).points(POINTS)
    assert found.tolist() == [first, second, [0, 0, 0], [0, 0, 0], [0, 0, 0]]  # outside, outside, unlabelled


def test_partners_change_places_in_a_mirror_image_only(dataset):
    instances = list(dataset.images[0].instances)
    size = (dataset.images[0].height, dataset.images[0].width)

    def found(*flips):
        return keypoints_in_view(instances, View((0, 0, *size), size, size, *flips), (2, 1, 0))[0, :, 0]

    x = instances[0].keypoints[:, 0]
    np.testing.assert_array_equal(found(), x)
    np.testing.assert_array_equal(found(True, False), size[1] - x[::-1])
    np.testing.assert_array_equal(found(False, True), x[::-1])
    np.testing.assert_array_equal(found(True, True), size[1] - x)  # turned by 180 degrees


def plate(x1: int, y1: int, x2: int, y2: int, *points: tuple[float, float, int]) -> Scene:
    """A scene of 20 × 20 px with one object and its keypoints."""
    masks = np.zeros((1, 20, 20), bool)
    masks[0, y1:y2, x1:x2] = True
    image = np.zeros((3, 20, 20), np.float32)
    return Scene(image, masks, np.array([1]), np.ones(1), np.array([points], np.float32), np.ones(1, bool))


def test_keypoints_below_a_pasted_object_become_hidden():
    below = plate(0, 0, 10, 10, (2.5, 2.5, 2), (7.5, 7.5, 2), (8.5, 8.5, 1), (0, 0, 0))
    above = plate(5, 0, 15, 10, (20, 20, 2), (6, 3, 2), (6, 4, 1), (0, 0, 0))
    found = copy_paste(below, above, np.array([0])).keypoints
    assert found[0].tolist() == [[2.5, 2.5, 2], [7.5, 7.5, 1], [8.5, 8.5, 1], [0, 0, 0]]
    assert found[1].tolist() == above.keypoints[0].tolist()


def test_mixup_keeps_all_keypoints_and_a_mosaic_moves_them():
    one, other = plate(0, 0, 4, 4, (1, 2, 2)), plate(2, 2, 8, 8, (0, 0, 0))
    assert mixup(one, other, 0.5).keypoints.tolist() == [[[1, 2, 2]], [[0, 0, 0]]]
    found = mosaic([one, other, one, one]).keypoints
    assert found[:, 0].tolist() == [[1, 2, 2], [0, 0, 0], [1, 22, 2], [21, 22, 2]]

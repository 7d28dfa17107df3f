"""Mosaic, mixup and copy-paste on scenes drawn by hand."""

import numpy as np
import pytest

from maskrcnn.training.augmentation import Scene, copy_paste, mixup, mosaic, objects_of_scene


def scene(size_hw: tuple[int, int], level: float, objects: dict[int, tuple[int, int, int, int]]) -> Scene:
    """A grey scene with objects given as label -> (x1, y1, x2, y2), each of grey level + 10 · label."""
    image = np.full((3, *size_hw), level, np.float32)
    masks = np.zeros((len(objects), *size_hw), bool)
    for mask, (label, (x1, y1, x2, y2)) in zip(masks, objects.items(), strict=True):
        mask[y1:y2, x1:x2] = True
        image[:, mask] = level + 10 * label
    keypoints = np.array([[(x1, y1, 2)] for x1, y1, _, _ in objects.values()], np.float32).reshape(-1, 1, 3)
    everywhere = np.ones(len(objects))
    return Scene(image, masks, np.array(list(objects), np.int64), everywhere, keypoints, everywhere.astype(bool))


def test_a_mosaic_has_four_images_and_their_objects_in_place():
    tiles = [
        scene((10, 20), 0, {1: (1, 2, 5, 6)}),
        scene((10, 30), 50, {}),
        scene((40, 20), 100, {2: (0, 0, 20, 40), 3: (3, 3, 9, 5)}),
        scene((40, 30), 150, {4: (10, 30, 30, 40)}),
    ]
    found = mosaic(tiles)
    assert found.size_hw == (50, 50)
    for (y, x), level in {(0, 19): 0, (9, 20): 50, (10, 19): 120, (10, 20): 150, (49, 49): 190}.items():
        assert (found.image[:, y, x] == level).all()
    made = objects_of_scene(found, 0.5)
    assert made.labels.tolist() == [1, 2, 3, 4]
    assert made.boxes.tolist() == [[1, 2, 5, 6], [0, 10, 20, 50], [3, 13, 9, 15], [30, 40, 50, 50]]


def test_mixup_blends_pixels_and_keeps_all_objects():
    one, other = scene((20, 20), 0, {1: (0, 0, 4, 4)}), scene((20, 20), 100, {2: (2, 2, 8, 8)})
    found = mixup(one, other, 0.25)
    np.testing.assert_allclose(found.image[:, 10, 10], 75)
    np.testing.assert_allclose(found.image[:, 3, 3], 0.25 * 10 + 0.75 * 120)
    assert found.labels.tolist() == [1, 2]
    assert objects_of_scene(found, 1.0).boxes.tolist() == [[0, 0, 4, 4], [2, 2, 8, 8]]


def test_pasted_objects_cover_what_is_below_in_pixels_and_masks():
    below = scene((20, 20), 0, {1: (0, 0, 10, 10), 2: (12, 12, 16, 16), 3: (5, 5, 6, 6)})
    above = scene((20, 20), 100, {4: (5, 0, 15, 10), 5: (0, 15, 5, 20)})
    found = copy_paste(below, above, np.array([0]))
    assert found.labels.tolist() == [1, 2, 3, 4]
    pasted = above.masks[0]
    np.testing.assert_array_equal(found.masks[3], pasted)
    assert (found.image[:, pasted] == 140).all()
    np.testing.assert_array_equal(found.image[:, ~pasted], below.image[:, ~pasted])
    np.testing.assert_array_equal(found.masks[0], below.masks[0] & ~pasted)
    np.testing.assert_array_equal(found.visible, [0.5, 1, 0, 1])
    made = objects_of_scene(found, 0.0)
    assert made.labels.tolist() == [1, 2, 4]  # the third is covered completely
    assert made.boxes[0].tolist() == [0, 0, 5, 10]


@pytest.mark.parametrize(("least", "labels"), [(0.4, [1, 2]), (0.6, [2])])
def test_objects_that_are_mostly_covered_are_dropped(least, labels):
    below = scene((20, 20), 0, {1: (0, 0, 10, 10)})
    above = scene((20, 20), 100, {2: (5, 0, 15, 10)})
    assert objects_of_scene(copy_paste(below, above, np.array([0])), least).labels.tolist() == labels


def test_shares_covered_one_after_another_add_up():
    found = scene((20, 20), 0, {1: (0, 0, 10, 10)})
    for x in (0, 5):
        found = copy_paste(found, scene((20, 20), 0, {2: (x, 0, x + 4, 10)}), np.array([0]))
    np.testing.assert_allclose(found.visible[0], 0.2)


def test_scenes_without_objects():
    empty = scene((8, 8), 5, {})
    for found in (mixup(empty, empty, 0.5), mosaic([empty] * 4), copy_paste(empty, empty, np.array([], np.int64))):
        assert (found.image == 5).all()
        assert len(objects_of_scene(found, 0.1)) == 0

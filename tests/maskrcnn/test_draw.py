"""Overlay pictures."""

from dataclasses import replace

import numpy as np

from maskrcnn.draw import colour_of, overlay
from maskrcnn.postprocess import Detections


def detections(size_hw, *boxes) -> Detections:
    count = len(boxes)
    return Detections(
        np.array(boxes, np.float32).reshape(-1, 4),
        np.linspace(0.9, 0.6, count).astype(np.float32),
        np.ones(count, np.int64),
        np.ones((count, 28, 28), np.float32),
        size_hw,
    )


def test_a_mask_is_tinted_and_the_rest_is_left_alone():
    image = np.full((700, 800, 3), 100, np.uint8)
    picture = np.asarray(overlay(image, detections((700, 800), (200, 300, 400, 500)), ("disc",)))
    assert picture.shape == image.shape
    expected = 0.55 * 100 + 0.45 * np.array(colour_of(0))
    np.testing.assert_allclose(picture[400, 300], expected, atol=1)
    assert (picture[600, 700] == 100).all()


def test_small_images_are_enlarged_with_their_detections():
    image = np.zeros((64, 100, 3), np.uint8)
    picture = np.asarray(overlay(image, detections((64, 100), (50, 32, 90, 60)), ("disc",)))
    assert picture.shape == (7 * 64, 7 * 100, 3)
    assert picture[7 * 50, 7 * 70].any()
    assert not picture[7 * 10, 7 * 10].any()


def test_without_masks_only_boxes_are_drawn():
    image = np.full((700, 800, 3), 100, np.uint8)
    found = replace(detections((700, 800), (200, 300, 400, 500)), masks=None)
    picture = np.asarray(overlay(image, found, ("disc",)))
    assert (picture[400, 300] == 100).all()
    assert (picture[500, 300] == colour_of(0)).all()  # the box's lower side


def test_no_detections_leave_the_picture_as_it_is():
    image = np.random.default_rng(0).integers(0, 255, (650, 650, 3), dtype=np.uint8)
    np.testing.assert_array_equal(np.asarray(overlay(image, detections((650, 650)), ("disc",))), image)

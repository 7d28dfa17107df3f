"""Drawing of detections on images."""

from dataclasses import replace

import numpy as np

from maskrcnn.imaging.draw import POINT_SCORE, colour_of, overlay
from maskrcnn.imaging.postprocess import Detections


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
    drawn = np.asarray(overlay(image, detections((700, 800), (200, 300, 400, 500)), ("disc",)))
    assert drawn.shape == image.shape
    expected = 0.55 * 100 + 0.45 * np.array(colour_of(0))
    np.testing.assert_allclose(drawn[400, 300], expected, atol=1)
    assert (drawn[600, 700] == 100).all()


def test_small_images_are_enlarged_with_their_detections():
    image = np.zeros((64, 100, 3), np.uint8)
    drawn = np.asarray(overlay(image, detections((64, 100), (50, 32, 90, 60)), ("disc",)))
    assert drawn.shape == (7 * 64, 7 * 100, 3)
    assert drawn[7 * 50, 7 * 70].any()
    assert not drawn[7 * 10, 7 * 10].any()


def test_without_masks_only_boxes_are_drawn():
    image = np.full((700, 800, 3), 100, np.uint8)
    found = replace(detections((700, 800), (200, 300, 400, 500)), masks=None)
    drawn = np.asarray(overlay(image, found, ("disc",)))
    assert (drawn[400, 300] == 100).all()
    assert (drawn[500, 300] == colour_of(0)).all()  # the box's lower side


def test_no_detections_leave_the_drawn_as_it_is():
    image = np.random.default_rng(0).integers(0, 255, (650, 650, 3), dtype=np.uint8)
    np.testing.assert_array_equal(np.asarray(overlay(image, detections((650, 650)), ("disc",))), image)


def with_keypoints(*points, size_hw=(700, 800)) -> Detections:
    """One detection without a mask, whose keypoints (x, y, score) are in its box."""
    found = detections(size_hw, (100, 100, 500, 600))
    return replace(found, masks=None, keypoints=np.array([points], np.float32))


def test_a_skeleton_has_joints_in_the_box_colour_and_lines_in_their_own():
    image = np.full((700, 800, 3), 100, np.uint8)
    found = with_keypoints((200, 200, 9), (400, 200, 9), (400, 500, 9))
    drawn = np.asarray(overlay(image, found, ("figure",), ((1, 2), (3, 2))))
    for x, y in ((200, 200), (400, 200), (400, 500)):
        assert (drawn[y, x] == colour_of(0)).all()
    assert (drawn[200, 300] == colour_of(0)).all() and (drawn[350, 400] == colour_of(1)).all()
    assert (drawn[350, 300] == 100).all()  # no line between the first and the third


def test_keypoints_of_a_low_score_are_left_out_with_their_lines():
    image = np.full((700, 800, 3), 100, np.uint8)
    found = with_keypoints((200, 200, POINT_SCORE), (400, 200, POINT_SCORE - 0.1))
    drawn = np.asarray(overlay(image, found, ("figure",), ((1, 2),)))
    assert (drawn[200, 200] == colour_of(0)).all()
    assert (drawn[200, 300] == 100).all() and (drawn[200, 400] == 100).all()
    all_shown = np.asarray(overlay(image, found, ("figure",), ((1, 2),), point_score=0.0))
    assert (all_shown[200, 300] == colour_of(0)).all() and (all_shown[200, 400] == colour_of(0)).all()


def test_keypoints_are_enlarged_with_the_drawn():
    image = np.full((70, 80, 3), 100, np.uint8)
    found = replace(with_keypoints((20, 30, 9), size_hw=(70, 80)), boxes_xyxy_px=np.array([[5, 5, 60, 60]], np.float32))
    drawn = np.asarray(overlay(image, found, ("figure",)))
    assert drawn.shape == (8 * 70, 8 * 80, 3) and (drawn[8 * 30, 8 * 20] == colour_of(0)).all()


def test_keypoints_beyond_the_drawn_are_no_error():
    image = np.full((700, 800, 3), 100, np.uint8)
    found = with_keypoints((-50, 900, 9), (1000, -10, 9))
    assert np.asarray(overlay(image, found, ("figure",), ((1, 2),))).shape == image.shape

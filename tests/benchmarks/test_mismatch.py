"""Pairing and comparison of two models' detections on the same image."""

import dataclasses

import numpy as np
import pytest
from mismatch import compare_detections, merge_mismatches

from maskrcnn.imaging.postprocess import Detections


def detections(boxes, scores, labels):
    count = len(boxes)
    return Detections(
        np.array(boxes, np.float32).reshape(count, 4),
        np.array(scores, np.float32),
        np.array(labels, np.int64),
        np.ones((count, 28, 28), np.float32),
        (60, 80),
    )


def test_detections_are_paired_by_label_and_overlap():
    first = detections([[5, 5, 25, 25], [30, 10, 50, 40]], [0.9, 0.5], [1, 2])
    second = detections([[30, 10, 50, 41], [5, 5, 25, 25]], [0.9, 0.8], [2, 1])
    found = compare_detections(first, second)
    assert (found.unpaired, found.reordered) == (0, 2)
    assert found.box_px == 1
    assert found.score == pytest.approx(0.4)


def test_detections_of_different_labels_are_not_paired():
    found = compare_detections(detections([[5, 5, 25, 25]], [0.9], [1]), detections([[5, 5, 25, 25]], [0.9], [2]))
    assert found.unpaired == 2
    assert not found.within(box_px=1, score=1, mask_iou=0, unpaired_share=0.5)


def test_a_detection_at_the_threshold_may_be_unpaired():
    found = compare_detections(detections([[5, 5, 25, 25]], [0.0504], [1]), detections([], [], []))
    assert (found.unpaired, found.excused) == (0, 1)


def test_a_box_at_a_whole_pixel_shifts_the_mask_window():
    # A box of 28 px is enlarged by one pixel on each side: the right side of this one is at 44.
    first = detections([[15, 5, 43, 33]], [0.9], [1])
    second = detections([[15, 5, 42.999, 33]], [0.9], [1])
    assert compare_detections(first, first).jumped == 0
    found = compare_detections(first, second)
    assert found.jumped == 1 and found.mask_px == 0


def test_displaced_keypoints_are_a_difference():
    first = detections([[5, 5, 25, 25], [30, 10, 50, 40]], [0.9, 0.5], [1, 2])
    points = np.random.default_rng(0).uniform(5, 25, (2, 4, 3)).astype(np.float32)
    first = dataclasses.replace(first, keypoints=points)
    moved = dataclasses.replace(first, keypoints=points + np.float32([3, 0, 0]))
    bounds = {"box_px": 1, "score": 1, "mask_iou": 0, "unpaired_share": 0}
    assert compare_detections(first, first).within(**bounds)
    assert not compare_detections(first, moved).within(**bounds)
    assert "8 of 8 farther off (at most 3 px)" in str(merge_mismatches([compare_detections(first, moved)]))
    # Without keypoints on one side, nothing is compared.
    assert compare_detections(first, dataclasses.replace(first, keypoints=None)).keypoints is None

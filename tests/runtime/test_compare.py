"""Comparing detections: differences, and excused detections."""

import numpy as np
import pytest

from maskrcnn.errors import UserError
from maskrcnn.runtime.verification.compare import EXACT, Tolerance, compare_outputs

ROWS = 6


def outputs(*images: list[tuple]) -> dict[str, np.ndarray]:
    """Detector outputs from lists of (box, score, label), masks all 0.5."""
    result = {
        "num_detections": np.array([len(image) for image in images], np.int32),
        "boxes": np.zeros((len(images), ROWS, 4), np.float32),
        "scores": np.zeros((len(images), ROWS), np.float32),
        "labels": np.zeros((len(images), ROWS), np.int64),
        "masks": np.zeros((len(images), ROWS, 28, 28), np.float32),
    }
    for n, image in enumerate(images):
        for k, (box, score, label) in enumerate(image):
            result["boxes"][n, k], result["scores"][n, k], result["labels"][n, k] = box, score, label
            result["masks"][n, k] = 0.5
    return result


A, B = ((0, 0, 10, 10), 0.9, 1), ((40, 40, 60, 60), 0.8, 2)


def test_equal_outputs_need_no_tolerance():
    difference = compare_outputs(outputs([A, B], []), outputs([A, B], []), EXACT)
    assert (difference.box_px, difference.score, difference.mask, difference.unpaired) == (0, 0, 0, 0)
    assert (difference.images, difference.detections, difference.images_without_detections) == (2, 2, 1)
    assert difference.within(EXACT)


def without_masks(values: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: value for name, value in values.items() if name != "masks"}


def test_models_without_masks_are_compared_by_their_boxes():
    moved = outputs([((0, 0, 10, 11), 0.9, 1), B])
    difference = compare_outputs(without_masks(outputs([A, B])), without_masks(moved), EXACT)
    assert difference.mask is None and difference.mask_mean is None
    assert difference.box_px == pytest.approx(1)
    assert not difference.within(EXACT)
    assert difference.within(Tolerance(box_px=1, score=0, mask=0, mask_mean=0))
    with pytest.raises(UserError, match=r"outputs .*'masks'"):
        compare_outputs(without_masks(moved), moved, EXACT)


def test_order_does_not_matter_and_the_largest_difference_is_reported():
    other = outputs([((40, 40, 60, 61.5), 0.7, 2), A])
    other["masks"][0, 0, 3, 3] = 0.25
    difference = compare_outputs(outputs([A, B]), other, EXACT)
    assert difference.box_px == pytest.approx(1.5)
    assert difference.score == pytest.approx(0.1)
    assert difference.mask == pytest.approx(0.25)
    assert difference.mask_mean == pytest.approx(0.25 / 28**2)
    assert not difference.within(EXACT)
    assert difference.within(Tolerance(box_px=2, score=0.2, mask=0.3, mask_mean=0.01))


@pytest.mark.parametrize(
    "other",
    [
        [A],  # one is missing
        [A, (B[0], B[1], 1)],  # of another label
        [A, ((50, 40, 90, 60), 0.8, 2)],  # elsewhere
        [A, B, ((80, 80, 90, 90), 0.5, 1)],  # one too many
    ],
)
def test_an_unpaired_detection_is_a_difference(other):
    difference = compare_outputs(outputs([A, B]), outputs(other), EXACT)
    assert difference.unpaired > 0
    assert not difference.within(EXACT)


@pytest.mark.parametrize(("label", "is_possible"), [(0, False), (1, True), (2, True), (3, False)])
def test_impossible_labels_are_an_error(label, is_possible):
    other = outputs([A, (B[0], B[1], label)], [])
    other["labels"][0, 2] = 9  # past the detections, where anything may stand
    if is_possible:
        compare_outputs(outputs([A, B], []), other, EXACT, num_classes=2)
        return
    with pytest.raises(UserError, match=rf"1 of 2 detections with impossible labels, such as {label}"):
        compare_outputs(outputs([A, B], []), other, EXACT, num_classes=2)


def test_a_detection_at_the_score_threshold_is_excused():
    faint = ((80, 80, 90, 90), 0.0505, 1)
    assert compare_outputs(outputs([A, faint]), outputs([A]), EXACT).within(EXACT)
    plain = ((80, 80, 90, 90), 0.06, 1)
    assert not compare_outputs(outputs([A, plain]), outputs([A]), EXACT).within(EXACT)


def test_the_last_of_a_full_output_is_excused():
    boxes = [((20 * k, 0, 20 * k + 10, 10), 0.9 - 0.1 * k, 1) for k in range(ROWS)]
    swapped = [*boxes[:-1], ((500, 0, 510, 10), boxes[-1][1], 1)]
    assert compare_outputs(outputs(boxes), outputs(swapped), EXACT).within(EXACT)
    early = [((500, 0, 510, 10), 0.9, 1), *boxes[1:]]
    assert not compare_outputs(outputs(boxes), outputs(early), EXACT).within(EXACT)


def test_nan_is_never_within():
    bad = outputs([A])
    bad["masks"][0, 0, 0, 0] = np.nan
    difference = compare_outputs(outputs([A]), bad, EXACT)
    assert not difference.within(Tolerance(box_px=1e9, score=1e9, mask=1e9, mask_mean=1e9))


@pytest.mark.parametrize("name", ["boxes", "scores"])
def test_nan_boxes_or_scores_are_not_excused_as_lying_at_the_edge(name):
    bad = outputs([A])
    bad["scores"][0, 0] = np.nan
    bad[name][0, 0] = np.nan
    assert not compare_outputs(outputs([]), bad, EXACT).within(EXACT)
    assert not compare_outputs(outputs([A]), bad, EXACT).within(EXACT)


def test_the_text_names_the_tolerance_that_was_needed():
    other = outputs([((0, 0, 10, 10.5), 0.9, 1)])
    text = str(compare_outputs(outputs([A]), other, EXACT))
    assert "boxes 0.5 px" in text
    assert "1 detections on 1 images" in text


def test_a_share_of_detections_may_depart_but_not_be_nan():
    boxes = [((40 * k, 0, 40 * k + 30, 30), 0.9 - 0.1 * k, 1) for k in range(5)]
    moved = [((10, 0, 40, 30), 0.9, 1), *boxes[1:]]
    fifth = Tolerance(box_px=5, score=0.1, mask=1, mask_mean=1, min_iou=0.3, departing_share=0.2)
    none = Tolerance(box_px=5, score=0.1, mask=1, mask_mean=1, min_iou=0.3)
    found = compare_outputs(outputs(boxes), outputs(moved), fifth)
    assert (found.departing, found.unpaired, found.box_px) == (1, 0, 10)
    assert found.within(fifth)
    assert not found.within(none)
    two = compare_outputs(outputs(boxes), outputs([moved[0], ((50, 0, 80, 30), 0.8, 1), *boxes[2:]]), fifth)
    assert two.departing == 2 and not two.within(fifth)
    bad = outputs(boxes)
    bad["boxes"][0, 3] = np.nan
    assert not compare_outputs(outputs(boxes), bad, fifth).within(fifth)

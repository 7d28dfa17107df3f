"""Metrics of single images, confusions and differences, against a scoring of each image and counts by hand."""

import numpy as np
import pytest
from coco_cases import make_case, rle_of
from hypothesis import given, settings
from hypothesis import strategies as st

from maskrcnn.runtime.evaluation.differences import difference, image_ap, image_scores
from maskrcnn.runtime.evaluation.ground_truth import GroundTruth
from maskrcnn.runtime.evaluation.matching import confusion_matrix
from maskrcnn.runtime.evaluation.protocol import KINDS
from maskrcnn.runtime.evaluation.scoring import f1_curve, score_entries

SQUARES = {name: [x, y, 30, 30] for name, x, y in (("a", 0, 0), ("b", 40, 0), ("c", 80, 0), ("d", 0, 60))}
AWAY = [100, 80, 20, 20]


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 2**32 - 1), kind=st.sampled_from(KINDS), grid=st.booleans())
def test_the_ap_of_an_image_is_that_of_a_data_set_of_one(seed, kind, grid):
    content, results = make_case(seed, kind=kind, grid=grid)
    found = image_ap(score_entries(GroundTruth.of_content(content, "gt"), results, kind).records)
    for place, image in enumerate(sorted(content["images"], key=lambda entry: entry["id"])):
        alone = GroundTruth.of_content({**content, "images": [image]}, "gt")
        own = [entry for entry in results if entry["image_id"] == image["id"]]
        assert found[place] == pytest.approx(score_entries(alone, own, kind).metrics["AP"], abs=1e-12)


def content_of(objects, images=1):
    """An annotation file of objects (image, class, square, crowd)."""
    return {
        "images": [{"id": i, "height": 120, "width": 150, "file_name": f"{i}.png"} for i in range(1, images + 1)],
        "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
        "annotations": [
            {
                "id": k,
                "image_id": i,
                "category_id": c,
                "bbox": box,
                "area": 900,
                "iscrowd": crowd,
                "segmentation": rle_of(box),
            }
            for k, (i, c, box, crowd) in enumerate(objects, start=1)
        ],
    }


def results_of(*detections):
    """Results (image, class, square, score) with masks alone."""
    return [
        {"image_id": i, "category_id": c, "segmentation": rle_of(box), "score": score}
        for i, c, box, score in detections
    ]


OBJECTS = [
    (1, 1, SQUARES["a"], 0),  # found
    (1, 1, SQUARES["b"], 0),  # taken for a dog
    (1, 2, SQUARES["c"], 0),  # missed
    (1, 2, SQUARES["d"], 1),  # a crowd
    (2, 2, SQUARES["a"], 0),  # found below the threshold
]
FOUND = [
    (1, 1, SQUARES["a"], 0.9),
    (1, 1, SQUARES["a"], 0.8),  # a second time
    (1, 2, SQUARES["b"], 0.7),
    (1, 2, SQUARES["d"], 0.6),  # in the crowd
    (1, 1, AWAY, 0.55),
    (2, 2, SQUARES["a"], 0.3),
    (3, 1, SQUARES["a"], 0.9),  # nothing there
]


def test_true_and_false_positives_and_missed_objects_are_counted():
    scored = score_entries(GroundTruth.of_content(content_of(OBJECTS, images=4), "gt"), results_of(*FOUND), "segm")
    scores = image_scores(scored.records, 0.5)
    assert scores.objects.tolist() == [3, 1, 0, 0]
    assert scores.found.tolist() == [1, 0, 0, 0]
    assert scores.missed.tolist() == [2, 1, 0, 0]
    assert scores.false.tolist() == [3, 0, 1, 0]
    assert scores.ap[1] == pytest.approx(1) and scores.ap[2:].tolist() == [-1, -1]
    assert scores.worst(9) == [2, 0, 1] and scores.worst(1) == [2]  # the fourth has nothing to show


def test_f1_over_the_threshold_by_hand():
    truth = GroundTruth.of_content(content_of(OBJECTS, images=4), "gt")
    curve = f1_curve(score_entries(truth, results_of(*FOUND), "segm").records)
    assert curve.thresholds.tolist() == [0.9, 0.8, 0.7, 0.55, 0.3]  # the detection in the crowd does not count
    assert curve.precision == pytest.approx([1 / 2, 1 / 3, 1 / 4, 1 / 5, 2 / 6])
    assert curve.recall == pytest.approx([1 / 4, 1 / 4, 1 / 4, 1 / 4, 2 / 4])
    assert curve.best() == pytest.approx((0.3, 0.4, 2 / 6, 2 / 4))
    without_last = f1_curve(score_entries(truth, results_of(*FOUND[:5], FOUND[6]), "segm").records)
    assert without_last.best() == pytest.approx((0.85, 1 / 3, 1 / 2, 1 / 4))  # between 0.9 and the next score
    assert f1_curve(score_entries(truth, results_of(FOUND[6]), "segm").records).best() is None


def confusions(scored, min_score):
    return confusion_matrix(scored.truth, scored.results, scored.records, min_score)


def test_confusions_are_of_the_remaining_detections_and_objects():
    scored = score_entries(GroundTruth.of_content(content_of(OBJECTS, images=4), "gt"), results_of(*FOUND), "segm")
    # Columns: cat, dog, missed. The last row counts detections without an object.
    assert confusions(scored, 0.5)[1].tolist() == [[1, 1, 0], [0, 0, 2], [3, 0, 0]]
    assert confusions(scored, 0.0)[1].tolist() == [[1, 1, 0], [0, 1, 1], [3, 0, 0]]


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 2**32 - 1), kind=st.sampled_from(KINDS), min_score=st.sampled_from([0.0, 0.4]))
def test_every_object_and_detection_is_in_the_confusions(seed, kind, min_score):
    content, results = make_case(seed, kind=kind)
    scored = score_entries(GroundTruth.of_content(content, "gt"), results, kind)
    classes, matrix = confusions(scored, min_score)
    counted = scored.truth.category[scored.records.is_counted[:, 0]]
    objects = np.bincount(counted, minlength=len(scored.truth.category_ids))
    assert matrix.sum(axis=1)[:-1].tolist() == objects[classes].tolist()
    assert objects.sum() == objects[classes].sum()
    scores = image_scores(scored.records, min_score)
    assert matrix[:, :-1].sum() == scores.found.sum() + scores.false.sum()
    assert np.trace(matrix) == scores.found.sum()


# Differences of two results


def compared(first, other, images=3, **options):
    truth = GroundTruth.of_content(content_of(OBJECTS, images=images), "gt")
    scored = (score_entries(truth, results_of(*detections), "segm") for detections in (first, other))
    return difference(*scored, **{"min_score": 0.5, "resamples": 50, **options})


def test_equal_results_do_not_differ():
    found = compared(FOUND, FOUND)
    assert all(image.is_equal for image in found.images)
    assert set(found.metrics.values()) == {0.0} and "AP_large" not in found.metrics
    assert found.lines() == [
        f"AP difference {found.interval}",
        "0 of 3 images differ in detections of score 0.5 or more: in their number, by more than 0.01 in a score, or by "
        "more than 1 px in a box",
    ]


def test_rounding_is_no_difference():
    image, category, square, score = FOUND[0]
    others = FOUND[2:]
    for by_score, by_px, is_equal in ((0.009, 1, True), (0.011, 0, False), (0.0, 2, False)):
        moved = (image, category, [square[0] + by_px, *square[1:]], score - by_score)
        found = compared([FOUND[0], *others], [moved, *others])
        assert all(each.is_equal for each in found.images) == is_equal


def test_images_that_differ_come_first():
    other = [
        (1, 1, [1, 0, 30, 30], 0.88),  # moved by one pixel
        *FOUND[2:4],
        (1, 2, SQUARES["c"], 0.95),  # found by this one alone
        (2, 2, SQUARES["a"], 0.31),  # below the threshold in both
        FOUND[6],
    ]
    found = compared([FOUND[0], *FOUND[2:]], other)
    assert [image.image_id for image in found.images if not image.is_equal] == [1]
    first = found.images[0]
    assert (first.file_name, first.lost, first.gained, first.unpaired) == ("1.png", 0, 1, 2)
    assert first.score_shift == pytest.approx(0.02) and first.box_shift_px == 1
    assert first.other_ap > first.ap and found.interval.value > 0
    assert found.metrics["AP"] == pytest.approx(found.interval.value)
    lines = found.lines()
    assert len(lines) == 4 and lines[3].split()[:2] == ["1", "1.png"]
    assert len(found.lines(0)) == 3


def test_an_image_without_detections_on_one_side():
    found = compared(FOUND, [])
    by_id = {image.image_id: image for image in found.images}
    assert (by_id[1].lost, by_id[1].unpaired, by_id[3].unpaired) == (1, 5, 1)
    assert by_id[2].unpaired == 0 and found.metrics["AP50"] < 0

"""Resampled AP against the AP of datasets with copied images, and bootstrap intervals."""

import copy

import numpy as np
import pytest
from coco_cases import make_case
from hypothesis import given, settings
from hypothesis import strategies as st

from maskrcnn.errors import UserError
from maskrcnn.runtime.evaluation.bootstrap import interval_of_ap, interval_of_difference, resampled_ap
from maskrcnn.runtime.evaluation.ground_truth import GroundTruth
from maskrcnn.runtime.evaluation.matching import match_records
from maskrcnn.runtime.evaluation.results_file import checked_results
from maskrcnn.runtime.evaluation.scoring import score_entries


def records_of(content, results, kind="bbox"):
    truth = GroundTruth.of_content(content, "gt")
    return match_records(truth, checked_results(truth, results, kind, "results"))


def copied(content, results, weights):
    """The dataset that has each image, in ascending order of the ids, `weight` times."""
    images, annotations, made = [], [], []
    for weight, image in zip(weights, sorted(content["images"], key=lambda entry: entry["id"]), strict=True):
        for _ in range(weight):
            new = 1000 + len(images)
            images.append({**image, "id": new})
            annotations += [{**a, "image_id": new} for a in content["annotations"] if a["image_id"] == image["id"]]
            made += [{**r, "image_id": new} for r in results if r["image_id"] == image["id"]]
    annotations = [{**entry, "id": number} for number, entry in enumerate(annotations, start=1)]
    return {**content, "images": images, "annotations": annotations}, made


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 2**32 - 1),
    kind=st.sampled_from(["bbox", "keypoints"]),
    weights=st.lists(st.integers(0, 3), min_size=4, max_size=4).filter(any),
)
def test_weights_are_copies_of_images(seed, kind, weights):
    content, results = make_case(seed, images=4, kind=kind)
    found = resampled_ap(records_of(content, results, kind), np.array([weights]))[0]
    expected = score_entries(
        GroundTruth.of_content(copied(content, results, weights)[0], "gt"), copied(content, results, weights)[1], kind
    )
    if expected.metrics["AP"] == -1:
        assert np.isnan(found)
    else:
        assert found == pytest.approx(expected.metrics["AP"], abs=1e-12)


def drawn_weights(images, resamples, seed):
    """The number of times that each image is drawn in each resample."""
    drawn = np.random.default_rng(seed).integers(0, images, (resamples, images))
    return np.stack([np.bincount(row, minlength=images) for row in drawn])


def expected_interval(records, weights, value):
    """The percentiles of the resamples, shifted so that their mean is the measured value."""
    drawn = resampled_ap(records, weights)
    return tuple(np.quantile(drawn, [0.025, 0.975]) - (drawn.mean() - value))


def test_many_resamples_are_computed_in_portions():
    records = records_of(*make_case(5, images=1000, categories=1, objects=1, detections=1, kind="bbox"))
    weights = drawn_weights(1000, 1100, seed=1)  # more than fit in one portion, of draws and of detections
    halves = np.concatenate([resampled_ap(records, half) for half in (weights[:500], weights[500:])])
    np.testing.assert_array_equal(resampled_ap(records, weights), halves)
    found = interval_of_ap(records, resamples=1100, seed=1)
    assert (found.low, found.high) == pytest.approx(expected_interval(records, weights, found.value))


def test_intervals_depend_on_seed_and_level():
    content, results = make_case(8, images=12, kind="bbox")
    records = records_of(content, results)
    done = []
    found = interval_of_difference(records, records, resamples=25, progress=done.append)
    assert (found.value, found.low, found.high) == (0, 0, 0) and sum(done) == 25
    own = interval_of_ap(records, resamples=200, seed=4)
    assert own == interval_of_ap(records, resamples=200, seed=4) != interval_of_ap(records, resamples=200, seed=5)
    assert own.low < own.value < own.high
    narrow = interval_of_ap(records, resamples=200, seed=4, level=0.5)
    assert own.low < narrow.low <= narrow.high < own.high
    assert own.value == pytest.approx(
        score_entries(GroundTruth.of_content(content, "gt"), results, "bbox").metrics["AP"]
    )


def test_shared_variation_does_not_widen_the_difference():
    content, results = make_case(21, images=30, objects=6, kind="bbox")
    worse = copy.deepcopy(results)
    for entry in worse[::2]:
        entry["bbox"][0] += 0.2 * entry["bbox"][2]
    first, other = records_of(content, results), records_of(content, worse)
    both = interval_of_difference(first, other, resamples=300)
    own = interval_of_ap(first, resamples=300)
    assert both.high < 0
    assert both.high - both.low < own.high - own.low
    back = interval_of_difference(other, first, resamples=300)
    assert (back.value, back.low, back.high) == pytest.approx((-both.value, -both.high, -both.low))
    assert str(both).startswith(f"{both.value:+.4f}, 95% interval {both.low:+.4f} to {both.high:+.4f} (300 resamples")


def test_the_width_is_that_of_the_binomial():
    """One object per image, found or not: AP is the share of images, whose deviation is known."""
    images = [{"id": i, "height": 50, "width": 50} for i in range(400)]
    box = {"category_id": 1, "bbox": [5, 5, 30, 30]}
    content = {
        "images": images,
        "categories": [{"id": 1, "name": "thing"}],
        "annotations": [{**box, "id": i + 1, "image_id": i, "area": 900, "iscrowd": 0} for i in range(400)],
    }
    results = [{**box, "image_id": i, "score": 1.0} for i in range(100)]
    found = interval_of_ap(records_of(content, results), resamples=2000)
    deviation = np.sqrt(0.25 * 0.75 / 400)
    assert found.value == pytest.approx(0.25, abs=0.01)
    assert found.high - found.low == pytest.approx(2 * 1.96 * deviation, rel=0.1)


def test_the_interval_lies_around_the_measured_value():
    """Resamples score higher on average; see the module."""
    records = records_of(*make_case(2, images=40, objects=6, detections=12, kind="bbox"))
    weights = drawn_weights(40, 400, seed=0)
    found = interval_of_ap(records, resamples=400)
    assert resampled_ap(records, weights).mean() > found.value
    assert (found.low, found.high) == pytest.approx(expected_interval(records, weights, found.value))


def test_resampling_needs_resamples_and_objects():
    content, results = make_case(3, kind="bbox")
    records = records_of(content, results)
    with pytest.raises(UserError, match="0 resamples"):
        interval_of_ap(records, resamples=0)
    with pytest.raises(UserError, match="annotations without objects"):
        interval_of_ap(records_of({**content, "annotations": []}, []))

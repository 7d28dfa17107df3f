"""Pairs of boxes, errors of stages, and verdicts."""

import itertools
import math

import numpy as np
import pytest
import torch
import torchvision

from maskrcnn.errors import UserError
from maskrcnn.imaging.preprocess import Preprocessing
from maskrcnn.metadata import ModelMetadata
from maskrcnn.runtime.verification.compare import pair_boxes, pair_detections, pairwise_iou
from maskrcnn.runtime.verification.report import Verdict, judged, needed
from maskrcnn.runtime.verification.stage_errors import Side, dense_error, image_errors, valid_part
from maskrcnn.runtime.verification.tolerances import (
    EXACT_STAGES,
    HALF_STAGES,
    INT8_STAGES,
    PEAK,
    Limit,
    tolerances_for,
    tolerances_named,
)
from maskrcnn.stages import STAGES

INF, NAN = math.inf, math.nan


def random_boxes(count: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    corner = rng.uniform(0, 80, (count, 2))
    return np.concatenate([corner, corner + rng.uniform(20, 60, (count, 2))], axis=1).astype(np.float32)


def test_iou_equals_torchvision():
    first, second = random_boxes(30), random_boxes(20, seed=1)
    wanted = torchvision.ops.box_iou(torch.from_numpy(first), torch.from_numpy(second)).numpy()
    np.testing.assert_allclose(pairwise_iou(first, second), wanted, atol=1e-6)
    assert pairwise_iou(first[:0], second).shape == (0, 20)
    assert pairwise_iou(np.zeros((1, 4)), np.zeros((1, 4))) == 0


def pair_one_label(boxes, other_boxes, min_iou):
    return pair_detections(boxes, np.ones(len(boxes)), other_boxes, np.ones(len(other_boxes)), min_iou)


def strips(*sides):
    """Boxes of height 1 from one x to another."""
    return np.array([(low, 0, high, 1) for low, high in sides], np.float32).reshape(-1, 4)


def test_detections_are_paired_in_order_and_boxes_by_overlap():
    first, second = strips((0, 10), (0, 7.2), (50, 60)), strips((0, 8), (4, 10))
    np.testing.assert_allclose(pairwise_iou(first, second)[:2], [[0.8, 0.6], [0.9, 0.32]], atol=1e-6)
    ordered, best = pair_one_label(first, second, 0.5), pair_boxes(first, second, 0.5)
    assert (ordered.first.tolist(), ordered.second.tolist()) == ([0], [0])
    assert (ordered.unpaired_first.tolist(), ordered.unpaired_second.tolist()) == ([1, 2], [1])
    assert (best.first.tolist(), best.second.tolist()) == ([0, 1], [1, 0])
    assert (best.unpaired_first.tolist(), best.unpaired_second.tolist()) == ([2], [])


@pytest.mark.parametrize("pair", [pair_one_label, pair_boxes])
def test_empty_sides_and_nan_make_no_pairs(pair):
    assert [len(part) for part in pair(strips(), strips((0, 1), (2, 3), (4, 5)), 0.5)] == [0, 0, 0, 3]
    assert [len(part) for part in pair(strips((0, 1), (2, 3)), strips(), 0.5)] == [0, 0, 2, 0]
    assert len(pair(strips((0, NAN)), strips((0, 1)), 0.5).first) == 0


def test_only_detections_of_the_same_label_are_paired():
    boxes = strips((0, 1), (0, 1))
    found = pair_detections(boxes, np.array([1, 2]), boxes, np.array([2, 1]), 0.5)
    assert list(zip(found.first, found.second, strict=True)) == [(0, 1), (1, 0)]


def test_a_dense_error_is_relative_and_shows_one_wrong_element():
    reference = np.full((4, 500, 500), 3.0, np.float32)
    assert dense_error(reference, reference * 1.01).values == pytest.approx([0.01], rel=1e-3)
    other = reference.copy()
    other[2, 7, 9] += 30
    found = dense_error(reference, other)
    assert found.values == pytest.approx([10 / PEAK]) and found.largest == 30
    assert dense_error(reference, other[:, 1:]).values == [INF]
    assert dense_error(np.zeros((2, 2)), np.ones((2, 2))).values[0] > 1e9
    assert np.isnan(dense_error(reference, other * np.float32(NAN)).values).all()
    assert len(dense_error(reference[:0], reference[:0]).values) == 0


def test_padding_is_left_out_except_in_normalised_images():
    feeds = {"images": np.zeros((1, 3, 64, 96)), "image_sizes": np.array([[40, 50]])}
    anchors = np.arange(16 * 24 * 3, dtype=np.float32)[None]
    stages = {
        "normalised": np.zeros((1, 3, 64, 96)),
        "P2": np.zeros((1, 8, 16, 24)),
        "objectness_P2": anchors,
        "anchor_deltas_P2": np.repeat(anchors[..., None], 4, axis=2),
    }
    side = Side(feeds, {}, stages)
    shapes = {stage: valid_part(side, stage, 0).shape for stage in stages}
    assert shapes == {
        "normalised": (3, 64, 96),
        "P2": (8, 10, 13),
        "objectness_P2": (3, 10, 13),
        "anchor_deltas_P2": (12, 10, 13),
    }
    assert valid_part(side, "objectness_P2", 0)[1, 2, 5] == (2 * 24 + 5) * 3 + 1
    assert valid_part(side, "anchor_deltas_P2", 0)[6, 2, 5] == (2 * 24 + 5) * 3 + 1


def side_of(rows: int, seed: int = 0) -> Side:
    """Random proposals and detections of one image."""
    rng = np.random.default_rng(seed)
    boxes = 200 * np.arange(rows)[:, None] + random_boxes(rows)  # far from one another
    outputs = {
        "num_detections": np.array([rows]),
        "boxes": boxes[None],
        "scores": np.sort(rng.uniform(0.2, 0.9, (1, rows)))[:, ::-1],
        "labels": rng.integers(1, 4, (1, rows)),
        "masks": rng.random((1, rows, 28, 28)),
    }
    stages = {
        "proposals": boxes[None],
        "box_features": rng.normal(size=(1, rows, 8, 7, 7)),
        "class_logits": rng.normal(size=(1, rows, 4)),
        "mask_logits": rng.normal(size=(1, rows, 28, 28)),
        **outputs,
    }
    return Side({}, outputs, stages)


def changed(side: Side, change) -> Side:
    return Side({}, *({k: change(k, v.copy()) for k, v in values.items()} for values in side[1:]))


def test_the_order_of_rows_does_not_matter():
    side = side_of(12)
    order = np.random.default_rng(1).permutation(12)
    mixed = changed(side, lambda name, value: value if name == "num_detections" else value[:, order])
    for stage, error in image_errors(side, mixed, 0, EXACT_STAGES).items():
        assert len(error.values) == 12 and (error.values == 0).all(), stage


def test_rows_are_compared_where_boxes_agree():
    side = side_of(10)

    def change(name, value):
        if name in ("proposals", "boxes"):
            value[:, 0] += 1
        elif name in ("class_logits", "mask_logits", "masks"):
            value[:, 0] = 1e3
        return value

    errors = image_errors(side, changed(side, change), 0, EXACT_STAGES)
    assert (errors["proposals"].values > 1e-3).tolist() == [True] + [False] * 9
    for stage in ("class_logits", "mask_logits", "masks"):
        assert errors[stage].compared == 9 and errors[stage].largest == 0, stage


def test_a_wrong_label_is_an_error_of_labels_and_a_missing_box_of_boxes():
    side = side_of(5)

    def change(name, value):
        if name == "labels":
            value[0, 0] = value[0, 0] % 3 + 1
        if name == "boxes":
            value[0, 1] += 5000
        return value

    errors = image_errors(side, changed(side, change), 0, EXACT_STAGES)
    assert np.isinf(errors["labels"].values).sum() == 1
    assert errors["boxes"].alone == 2  # one of either side
    assert np.isinf(errors["boxes"].values).sum() == 2


@pytest.mark.parametrize(
    ("errors", "share", "need"),
    [
        ([], 0.5, None),
        ([1, 5, 3], 0, 5),
        ([1, 2, 3, INF], 0.25, 3),
        ([1, 2, 3, INF], 0.24, INF),
        ([1, NAN, 3], 0.9, NAN),
    ],
)
def test_the_tolerance_that_all_but_a_share_need(errors, share, need):
    assert needed(np.array(errors, float), share) == pytest.approx(need, nan_ok=True)


def test_every_stage_has_a_limit_and_lower_precisions_allow_more():
    for stage in ("images", *(stage for stage in STAGES if stage != "num_detections")):
        limits = [tolerances.limit(stage) for tolerances in (EXACT_STAGES, HALF_STAGES, INT8_STAGES)]
        for finer, coarser in itertools.pairwise(limits):
            assert finer.tolerance <= coarser.tolerance and finer.share <= coarser.share, stage


def test_a_verdict_at_and_beyond_the_limit():
    at, beyond = dense_error(np.ones(4), np.full(4, 1.5)), dense_error(np.ones(4), np.full(4, 1.75))
    assert judged("P2", [at, None], Limit(0.5), [False, False]).verdict is Verdict.AGREES
    result = judged("P2", [at, beyond], Limit(0.5), [False, False])
    assert (result.verdict, result.needed, result.beyond, result.worst_image) == (Verdict.DEPARTS, 0.75, 0.5, 1)
    absent = judged("P2", [None], Limit(0.5), [True, False])
    assert (absent.verdict, absent.note) == (Verdict.NOT_COMPARED, "no such name in the reference")


@pytest.mark.parametrize(
    ("precision", "stamp", "wanted"),
    [
        ("fp32", {}, "exact"),
        ("fp16", {}, "half"),
        ("fp32", {"weights": "fp16", "execution": "fp32"}, "half"),
        ("fp32", {"execution": "bf16"}, "half"),
        ("fp16, simulated", {}, "half"),
        ("int8", {}, "int8"),
        ("int8, bf16", {}, "int8"),
    ],
)
def test_the_lowest_precision_decides(precision, stamp, wanted):
    plain = ModelMetadata(model="m", class_names=("a",), category_ids=(1,), preprocessing=Preprocessing(), detections=5)
    other = ModelMetadata(**{**vars(plain), "stamp": stamp})
    assert tolerances_for([(plain, "fp32"), (other, precision)]) is tolerances_named(wanted)


def test_unknown_tolerances_are_refused():
    with pytest.raises(UserError, match="tolerance 'loose'\n  expected: exact or half or int8"):
        tolerances_named("loose")

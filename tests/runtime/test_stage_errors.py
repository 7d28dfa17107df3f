"""Pairs, figures and verdicts by themselves."""

import itertools
import math

import numpy as np
import pytest
import torch
import torchvision

from maskrcnn.imaging.preprocess import Preprocessing
from maskrcnn.metadata import ModelMetadata
from maskrcnn.runtime.verification.compare import of_equal_label, pair_best_first, pair_in_order, pairwise_iou
from maskrcnn.runtime.verification.report import Verdict, figure, judged, needed
from maskrcnn.runtime.verification.stage_errors import Side, dense_error, image_errors, valid_part
from maskrcnn.runtime.verification.tolerances import EXACT_STAGES, HALF_STAGES, INT8_STAGES, PEAK, Limit, tolerances_for
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


def test_in_order_takes_what_best_first_leaves():
    overlaps = np.array([[0.8, 0.6], [0.9, 0.1], [0.0, 0.0]])
    ordered, best = pair_in_order(overlaps, 0.5), pair_best_first(overlaps, 0.5)
    assert (ordered.first.tolist(), ordered.second.tolist()) == ([0], [0])
    assert (ordered.alone_first.tolist(), ordered.alone_second.tolist()) == ([1, 2], [1])
    assert (best.first.tolist(), best.second.tolist()) == ([0, 1], [1, 0])
    assert (best.alone_first.tolist(), best.alone_second.tolist()) == ([2], [])


@pytest.mark.parametrize("pair", [pair_in_order, pair_best_first])
def test_pairs_of_nothing_of_nan_and_of_other_labels(pair):
    assert [len(part) for part in pair(np.zeros((0, 3)), 0.5)] == [0, 0, 0, 3]
    assert [len(part) for part in pair(np.zeros((2, 0)), 0.5)] == [0, 0, 2, 0]
    assert len(pair(np.array([[NAN]]), 0.5).first) == 0
    labels = np.array([1, 2]), np.array([2, 1])
    found = pair(of_equal_label(np.ones((2, 2)), *labels), 0.5)
    assert list(zip(found.first, found.second, strict=True)) == [(0, 1), (1, 0)]


def test_a_dense_figure_is_relative_and_one_wrong_element_is_not_lost():
    reference = np.full((4, 500, 500), 3.0, np.float32)
    assert dense_error(reference, reference * 1.01).figures == pytest.approx([0.01], rel=1e-3)
    other = reference.copy()
    other[2, 7, 9] += 30
    found = dense_error(reference, other)
    assert found.figures == pytest.approx([10 / PEAK]) and found.largest == 30
    assert dense_error(reference, other[:, 1:]).figures == [INF]
    assert dense_error(np.zeros((2, 2)), np.ones((2, 2))).figures[0] > 1e9
    assert np.isnan(dense_error(reference, other * np.float32(NAN)).figures).all()
    assert len(dense_error(reference[:0], reference[:0]).figures) == 0


def test_padding_is_left_out_of_all_but_the_normalised_images():
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
    """What a model with proposals and detections in random places might have made of one image."""
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


def test_the_order_of_rows_is_no_difference():
    side = side_of(12)
    order = np.random.default_rng(1).permutation(12)
    mixed = changed(side, lambda name, value: value if name == "num_detections" else value[:, order])
    for stage, error in image_errors(side, mixed, 0, EXACT_STAGES).items():
        assert len(error.figures) == 12 and (error.figures == 0).all(), stage


def test_rows_hang_on_boxes_that_agree():
    side = side_of(10)

    def change(name, value):
        if name in ("proposals", "boxes"):
            value[:, 0] += 1
        elif name in ("class_logits", "mask_logits", "masks"):
            value[:, 0] = 1e3
        return value

    errors = image_errors(side, changed(side, change), 0, EXACT_STAGES)
    assert (errors["proposals"].figures > 1e-3).tolist() == [True] + [False] * 9
    for stage in ("class_logits", "mask_logits", "masks"):
        assert errors[stage].compared == 9 and errors[stage].largest == 0, stage


def test_a_wrong_label_is_a_matter_of_labels_and_a_missing_box_of_boxes():
    side = side_of(5)

    def change(name, value):
        if name == "labels":
            value[0, 0] = value[0, 0] % 3 + 1
        if name == "boxes":
            value[0, 1] += 5000
        return value

    errors = image_errors(side, changed(side, change), 0, EXACT_STAGES)
    assert np.isinf(errors["labels"].figures).sum() == 1
    assert errors["boxes"].alone == 2  # one of either side
    assert np.isinf(errors["boxes"].figures).sum() == 2


@pytest.mark.parametrize(
    ("figures", "share", "need"),
    [
        ([], 0.5, None),
        ([1, 5, 3], 0, 5),
        ([1, 2, 3, INF], 0.25, 3),
        ([1, 2, 3, INF], 0.24, INF),
        ([1, NAN, 3], 0.9, NAN),
    ],
)
def test_the_tolerance_that_all_but_a_share_need(figures, share, need):
    assert needed(np.array(figures, float), share) == pytest.approx(need, nan_ok=True)


def test_every_stage_has_a_limit_in_every_class_and_coarser_ones_allow_more():
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
def test_the_coarsest_precision_decides(precision, stamp, wanted):
    plain = ModelMetadata(model="m", class_names=("a",), category_ids=(1,), preprocessing=Preprocessing(), detections=5)
    other = ModelMetadata(**{**vars(plain), "stamp": stamp})
    assert tolerances_for([(plain, "fp32"), (other, precision)]).name == wanted


def test_figures_are_short():
    assert [figure(value) for value in (None, 0.0, 1.234e-5, 0.1234, 12.3, INF)] == [
        "", "0", "1.2e-05", "0.12", "12", "inf",
    ]  # fmt: skip

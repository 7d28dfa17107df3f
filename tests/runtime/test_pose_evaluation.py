"""Scores of keypoints: any number of them, with the model's own OKS sigmas."""

import copy
import dataclasses
import json

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from tiny import TINY_POSE, keypoints_in

from maskrcnn.data.coco import CocoDataset
from maskrcnn.errors import UserError
from maskrcnn.runtime.detector import Detector
from maskrcnn.runtime.evaluation.evaluate import check_classes, evaluate, score_kinds
from maskrcnn.runtime.evaluation.ground_truth import GroundTruth
from maskrcnn.runtime.evaluation.matching import keypoint_overlaps
from maskrcnn.runtime.evaluation.protocol import KINDS
from maskrcnn.runtime.evaluation.scoring import score_entries

NAMES, SKELETON, OWN_SIGMAS = (TINY_POSE[f"keypoint_{field}"] for field in ("names", "skeleton", "sigmas"))


@pytest.fixture(scope="module")
def dataset(poses) -> CocoDataset:
    return CocoDataset.load(poses, "val")


@pytest.fixture(scope="module")
def detector(joint_onnx_file) -> Detector:
    return Detector.load(joint_onnx_file, "onnxruntime", providers=["CPUExecutionProvider"])


def content_of(dataset) -> dict:
    return json.loads(dataset.annotation_path.read_text())


def perfect(dataset, shift_px: float = 0.0) -> list[dict]:
    """The annotations as results, unlabelled keypoints in their places too, all moved to the right."""
    fields = ("image_id", "category_id", "bbox", "segmentation")
    results = []
    for entry in content_of(dataset)["annotations"]:
        points = np.array(keypoints_in(entry["bbox"])["keypoints"], float).reshape(-1, 3)
        points[:, 0], points[:, 2] = points[:, 0] + shift_px, 1
        kept = {name: entry[name] for name in fields}
        results.append({**kept, "keypoints": points.ravel().tolist(), "score": 0.9})
    return results


def test_perfect_detections_have_an_ap_of_one(dataset):
    found = score_kinds(dataset, perfect(dataset), KINDS)
    assert found.summary() == {"box_ap": 1.0, "mask_ap": 1.0, "keypoint_ap": 1.0}
    assert found.keypoint["AR"] == 1.0 and "keypoint" in found.table()
    # A third of the objects has no keypoints, and is ignored.
    truth = GroundTruth(dataset)
    assert 0 < truth.is_ignored("keypoints").sum() < len(truth)
    np.testing.assert_array_equal(truth.sigmas, [0.05] * 5)
    assert truth.skeleton == list(SKELETON)


def test_the_sigmas_are_the_models(dataset):
    results = perfect(dataset, shift_px=2.0)
    tight, wide = (score_kinds(dataset, results, ("bbox", "keypoints"), sigmas=[sigma] * 5) for sigma in (0.02, 0.3))
    assert tight.keypoint["AP"] < 0.5 and wide.keypoint["AP"] > 0.9
    assert tight.box["AP"] == wide.box["AP"] == 1.0


def test_similarity_is_the_mean_over_labelled_keypoints():
    truth = np.array([[[10, 10, 2], [30, 10, 1], [0, 0, 0]]], float)
    found = np.array([[[13, 14, 1], [30, 10, 1], [99, 99, 1]]], float)
    sigmas, area = np.array([0.1, 0.2, 0.3]), 900.0
    expected = (np.exp(-(3**2 + 4**2) / (2 * (2 * 0.1) ** 2 * area)) + 1) / 2
    ours = keypoint_overlaps(found, truth, np.array([[0, 0, 40, 40.0]]), np.array([area]), sigmas)
    np.testing.assert_allclose(ours, [expected])


def test_a_model_is_scored_as_by_pycocotools_with_its_sigmas(detector, dataset):
    found = evaluate(detector, dataset, batch_size=4)
    assert list(found.scored) == list(KINDS)
    assert found.results[0]["keypoints"][2::3] == [1] * 5 and len(found.results[0]["keypoint_scores"]) == 5
    np.testing.assert_array_equal(found.scored["keypoints"].truth.sigmas, OWN_SIGMAS)
    json.dumps(found.results)
    truth = COCO(dataset.annotation_path)
    for kind, field in (("bbox", "bbox"), ("segm", "segmentation"), ("keypoints", "keypoints")):
        fields = ("image_id", "category_id", "score", field)
        results = truth.loadRes([{name: copy.deepcopy(entry[name]) for name in fields} for entry in found.results])
        scorer = COCOeval(truth, results, kind)
        scorer.params.kpt_oks_sigmas = np.array(OWN_SIGMAS)
        scorer.evaluate()
        scorer.accumulate()
        scorer.summarize()
        assert list(found.scored[kind].metrics.values()) == list(scorer.stats)


def test_boxes_alone_are_scored_where_the_dataset_has_no_keypoints(detector, shapes):
    plain = CocoDataset.load(shapes, "val")
    assert "keypoint_ap" not in evaluate(detector, plain).summary()
    with pytest.raises(UserError, match="whose categories name none"):
        score_kinds(plain, [], ("keypoints",))


def test_keypoints_must_be_there_and_be_those_of_the_dataset(detector, dataset):
    with pytest.raises(UserError, match="--iou-type keypoints and detections without keypoints"):
        score_kinds(dataset, [{"bbox": [0, 0, 1, 1]}], ("keypoints",))
    check_classes(detector, dataset)
    other = dataclasses.replace(dataset, keypoint_names=("nose", *NAMES[1:]))
    with pytest.raises(UserError, match=r"a model of the keypoints head, left_hand(.|\n)*nose, left_hand"):
        check_classes(detector, other)


def test_annotations_of_other_keypoints_are_refused_or_told_apart(dataset):
    content = content_of(dataset)
    content["categories"][0]["keypoints"] = [*NAMES[:4], "tail"]
    with pytest.raises(UserError, match="categories 1 and 2 with different keypoints"):
        score_entries(GroundTruth.of_content(content, "gt"), [], "keypoints")
    with pytest.raises(UserError, match="5 keypoints\n  expected: the model's 4"):
        score_entries(GroundTruth.of_content(content_of(dataset), "gt", [0.1] * 4), [], "keypoints")
    unnamed = content_of(dataset)
    for category in unnamed["categories"]:
        del category["keypoints"], category["skeleton"]
    found = GroundTruth.of_content(unnamed, "gt")
    assert found.dataset.keypoint_names == ("1", "2", "3", "4", "5") and len(found.sigmas) == 5
    np.testing.assert_array_equal(found.keypoints, GroundTruth(dataset).keypoints)
    assert found.skeleton == []


def test_lines_that_join_nothing_are_not_drawn(dataset):
    content = content_of(dataset)
    content["categories"][0]["skeleton"] = [[1, 2], [3, 3], [2, 6], [1], "12", [4, 5]]
    assert GroundTruth.of_content(content, "gt").skeleton == [(1, 2), (4, 5)]
    content["categories"][0]["skeleton"] = [[0, 1], [3, 4]]  # counted from 0
    assert GroundTruth.of_content(content, "gt").skeleton == [(1, 2), (4, 5)]

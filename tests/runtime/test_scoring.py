"""Scores against pycocotools, on random and adversarial results: every array and metric is equal."""

import contextlib
import copy
import io
import json
import os
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from coco_cases import make_case, rle_of
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as mask_api
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval, Params

from maskrcnn.data.coco import CocoDataset
from maskrcnn.data.shapes import generate_shapes
from maskrcnn.errors import UserError
from maskrcnn.runtime.evaluation.ground_truth import GroundTruth
from maskrcnn.runtime.evaluation.protocol import KINDS, PROTOCOLS, SIGMAS, protocol_of
from maskrcnn.runtime.evaluation.scoring import score_entries

REAL = Path(os.environ.get("MASKRCNN_DATA", Path(__file__).parents[3] / "shared" / "data"))


def pycocotools_scores(content, results, kind, max_detections=()):
    """The evaluation object of pycocotools, after all its steps, on copies of the contents."""
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = copy.deepcopy(content)
        truth.createIndex()
        scorer = COCOeval(truth, truth.loadRes(copy.deepcopy(results)), kind)
        if max_detections:
            scorer.params.maxDets = list(max_detections)
        scorer.evaluate()
        scorer.accumulate()
        if not max_detections:
            scorer.summarize()
    return scorer


def expect_equal(content, results, kind, max_detections=()):
    """Every array and every metric has pycocotools' digits, and the inputs stay as they are."""
    before = copy.deepcopy((content, results))
    found = score_entries(GroundTruth.of_content(content, "gt"), results, kind, max_detections=max_detections)
    assert (content, results) == before
    if results:  # pycocotools refuses an empty list
        expected = pycocotools_scores(content, results, kind, max_detections)
        for name in ("precision", "recall", "scores"):
            np.testing.assert_array_equal(found.scores.of_all_classes(name), expected.eval[name])
        if not max_detections:  # its `summarize` knows no other limits
            assert list(found.metrics.values()) == list(expected.stats)
    return found


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**32 - 1),
    kind=st.sampled_from(KINDS),
    grid=st.booleans(),
    images=st.integers(1, 5),
    categories=st.integers(1, 4),
    objects=st.sampled_from([1, 4, 12]),
    detections=st.sampled_from([3, 8, 30]),
)
def test_random_results(seed, kind, grid, images, categories, objects, detections):
    sizes = {"images": images, "categories": categories, "objects": objects, "detections": detections}
    expect_equal(*make_case(seed, kind=kind, grid=grid, **sizes), kind)


@pytest.mark.parametrize("kind", KINDS)
def test_more_detections_than_the_limit(kind):
    content, results = make_case(3, images=2, categories=1, objects=20, detections=260, grid=True, kind=kind)
    assert len(results) > 200
    assert expect_equal(content, results, kind).metrics["AP"] > 0


@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_other_limits_of_detections(kind):
    content, results = make_case(3, images=2, categories=2, objects=20, detections=260, grid=True, kind=kind)
    found = expect_equal(content, results, kind, (2, 150))
    assert {"AR_2", "AR_150"} < set(found.metrics) and "AR_100" not in found.metrics
    assert 0 < found.metrics["AR_2"] < found.metrics["AR_150"]
    assert found.metrics["AR_150"] == found.scores.recall[:, :, 0, 1].mean()
    assert "not COCO's: up to 150 detections" in " ".join(found.remarks())
    assert not any("not COCO's" in line for line in expect_equal(content, results, kind, (1, 10, 100)).remarks())


@pytest.mark.parametrize("limits", [(10, 1), (0, 5), (3, 3)])
def test_limits_that_are_not_ascending(limits):
    content, results = make_case(3, kind="bbox")
    with pytest.raises(UserError, match="limits of detections"):
        score_entries(GroundTruth.of_content(content, "gt"), results, "bbox", max_detections=limits).metrics  # noqa: B018


def test_three_hundred_perfect_boxes_are_all_found_with_the_limit_for_them():
    content, _ = make_case(1, images=1, categories=1)
    boxes = [[7.0 * column, 7.0 * row, 6.0, 6.0] for row in range(15) for column in range(20)]
    content["annotations"] = [annotation(content, number, box) for number, box in enumerate(boxes, start=1)]
    results = [result(content, bbox=box) for box in boxes]
    truth = GroundTruth.of_content(content, "gt")
    assert score_entries(truth, results, "bbox").metrics["AP"] < 0.4
    assert score_entries(truth, results, "bbox", max_detections=(1, 10, 300)).metrics["AP"] == 1


def test_memory_grows_with_the_classes_that_occur_not_with_those_that_exist():
    content, results = make_case(1, kind="bbox", categories=3)
    few = score_entries(GroundTruth.of_content(content, "gt"), results, "bbox")
    content["categories"] = content["categories"] + [{"id": 1000 + k, "name": f"c{k}"} for k in range(10_000)]
    tracemalloc.start()
    many = score_entries(GroundTruth.of_content(content, "gt"), results, "bbox")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert many.metrics == few.metrics
    assert len(many.by_class()) == len(few.by_class()) + 10_000
    assert peak < 50e6  # pycocotools' arrays of 10,003 classes are 2 GB


@pytest.mark.parametrize("kind", KINDS)
def test_perfect_results(kind):
    content, _ = make_case(5, images=3, kind=kind)
    whole = [entry for entry in content["annotations"] if not entry["iscrowd"] and entry["num_keypoints"]]
    results = [{**entry, "score": 1.0, "segmentation": rle_of(entry["bbox"])} for entry in whole]
    if kind != "bbox":
        results = [{k: v for k, v in entry.items() if k != "bbox"} for entry in results]
    assert expect_equal(content, results, kind).metrics["AP"] > 0.5


@pytest.mark.parametrize("kind", KINDS)
def test_without_results_precision_is_0_where_there_are_objects(kind):
    content, _ = make_case(2, kind=kind)
    content["annotations"] = [{**entry, "area": 500.0} for entry in content["annotations"]]
    metrics = score_entries(GroundTruth.of_content(content, "gt"), [], kind).metrics
    assert metrics["AP"] == metrics["AP50"] == 0
    assert metrics["AP_medium"] == metrics["AP_large"] == -1


def first_ids(content):
    return {"image_id": content["images"][0]["id"], "category_id": content["categories"][0]["id"]}


def annotation(content, number, bbox, **fields):
    own = {"id": number, "bbox": bbox, "area": bbox[2] * bbox[3], "iscrowd": 0}
    return own | first_ids(content) | fields


def result(content, **fields):
    return first_ids(content) | {"score": 0.5} | fields


@pytest.mark.parametrize("categories", [1, 2])
def test_categories_without_objects_and_results_without_category(categories):
    content, _ = make_case(1, images=1, categories=categories)
    own = content["categories"][0]["id"]
    content["annotations"] = [a for a in content["annotations"] if a["category_id"] == own]
    results = [result(content, bbox=[1, 1, 30, 30]), result(content, bbox=[1, 1, 30, 30], category_id=4711)]
    scored = expect_equal(content, results, "bbox")
    assert scored.results.remark() == (
        "1 result(s) of categories that are not in the annotations (4711) are not scored"
    )


def test_only_results_of_unknown_categories():
    content, _ = make_case(1)
    expect_equal(content, [result(content, bbox=[0, 0, 5, 5], category_id=4711)], "bbox")


@pytest.mark.parametrize("kind", ["segm", "keypoints"])
def test_boxes_decide_on_sizes_where_results_have_them(kind):
    content, results = make_case(9, kind=kind)
    rng = np.random.default_rng(0)
    results = [{**entry, "bbox": rng.uniform(1, 200, 4).tolist()} for entry in results]
    scored = expect_equal(content, results, kind)
    assert "box areas determine" in scored.results.remark()


@pytest.mark.parametrize("kind", ["segm", "keypoints"])
def test_boxes_are_computed_from_masks_or_keypoints(kind):
    content, results = make_case(11, kind=kind)
    expect_equal(content, results, "bbox")


def test_annotations_of_unknown_images_and_categories_are_left_out():
    content, results = make_case(7, kind="bbox")
    first = content["annotations"][0]
    content["annotations"] += [{**first, "id": 900, "image_id": 10**6}, {**first, "id": 901, "category_id": 10**6}]
    expect_equal(content, results, "bbox")


def test_a_crowd_matches_any_number_of_detections():
    content, _ = make_case(1, images=1, categories=1)
    crowd = annotation(content, 1, [0, 0, 100, 100], iscrowd=1)
    content["annotations"] = [crowd, annotation(content, 2, [10, 10, 40, 40])]
    boxes = ([10, 10, 40, 40], [12, 10, 40, 40], [50, 50, 30, 30], [52, 50, 30, 30], [120, 100, 20, 15])
    results = [result(content, bbox=box, score=0.9 - 0.1 * k) for k, box in enumerate(boxes)]
    scored = expect_equal(content, results, "bbox")
    assert scored.records.outcome[:, 0, 0].tolist() == [2, 0, 0, 0, 1]


def test_an_object_of_id_0_can_be_found():
    content, _ = make_case(1, images=1, categories=1)
    content["annotations"] = [annotation(content, 0, box) for box in ([10, 10, 40, 40], [60, 60, 40, 40])]
    results = [result(content, bbox=entry["bbox"]) for entry in content["annotations"]]
    # pycocotools takes id 0 for no match, and two objects of one id for one.
    assert score_entries(GroundTruth.of_content(content, "gt"), results, "bbox").metrics["AP"] == 1


@pytest.mark.parametrize("kind", ["bbox", "segm"])
@pytest.mark.parametrize("name", ["coco/annotations/instances_val2017.json", "nuclei/annotations/instances_val.json"])
def test_real_annotations_with_noisy_copies_as_results(name, kind):
    if not (REAL / name).exists():
        pytest.skip(f"no file {name} in {REAL} (MASKRCNN_DATA)")
    content, rng = json.loads((REAL / name).read_text()), np.random.default_rng(0)
    truth = GroundTruth.of_content(content, name)
    results = []
    for index, (box, rle) in enumerate(zip(truth.boxes, truth.masks[0], strict=True)):
        moved = box + rng.normal(0, 0.1, 4) * np.tile(box[2:], 2)
        own = {"bbox": moved.tolist()} if kind == "bbox" else {"segmentation": rle}
        image_id, category_id = truth.image_ids[truth.image[index]], truth.category_ids[truth.category[index]]
        ids = {"image_id": int(image_id), "category_id": int(category_id)}
        results.append({**ids, **own, "score": float(rng.integers(0, 50) / 50)})
    assert 0.2 < expect_equal(content, results, kind).metrics["AP"] <= 1


def test_the_protocol_is_that_of_pycocotools():
    for kind, protocol in PROTOCOLS.items():
        theirs = Params(kind)
        np.testing.assert_array_equal(protocol.iou_thresholds, theirs.iouThrs)
        np.testing.assert_array_equal(protocol.recall_thresholds, theirs.recThrs)
        np.testing.assert_array_equal(protocol.areas_px, theirs.areaRng)
        assert list(protocol.area_names) == theirs.areaRngLbl and list(protocol.max_detections) == theirs.maxDets
    np.testing.assert_array_equal(SIGMAS, Params("keypoints").kpt_oks_sigmas)
    with pytest.raises(UserError, match="'panoptic'\n  expected: one of bbox, segm, keypoints"):
        protocol_of("panoptic")


def test_classes_have_the_metrics_of_a_scoring_of_their_own():
    content, results = make_case(13, kind="segm", categories=3)
    content["categories"][0]["name"] = content["categories"][1]["name"] = "twin"
    by_class = score_entries(GroundTruth.of_content(content, "gt"), results, "segm").by_class()
    for entry in content["categories"]:
        name = "twin (id 6)" if entry["id"] == 6 else entry["name"]
        alone = {**content, "categories": [entry]}
        expected = dict(zip(by_class[name], [None, *pycocotools_scores(alone, results, "segm").stats], strict=False))
        own = [a for a in content["annotations"] if a["category_id"] == entry["id"] and not a["iscrowd"]]
        assert by_class[name] == {**expected, "objects": len(own)}


def test_a_dataset_scores_as_its_file(shapes, poses):
    """Objects go from the dataset to arrays directly, and have the file's boxes, areas, masks and keypoints."""
    for root, kinds in ((shapes, ("bbox", "segm")), (poses, KINDS)):
        dataset = CocoDataset.load(root, "val")
        file, direct = GroundTruth.read(dataset.annotation_path), GroundTruth(dataset)
        for name in ("image_ids", "category_ids", "image", "category", "boxes", "areas_px", "is_crowd"):
            np.testing.assert_array_equal(getattr(direct, name), getattr(file, name), err_msg=name)
        np.testing.assert_array_equal(direct.masks[1], file.masks[1])
        assert direct.category_names == file.category_names and direct.sizes_hw == file.sizes_hw
        ids = direct.image_ids.tolist()
        assert [direct.file_name(each) for each in ids] == [file.file_name(each) for each in ids]
        for kind in kinds:
            np.testing.assert_array_equal(direct.is_ignored(kind), file.is_ignored(kind))
        if "keypoints" in kinds:
            np.testing.assert_array_equal(direct.keypoints, file.keypoints)
            assert direct.skeleton == file.skeleton


def test_more_objects_than_fit_into_a_byte(tmp_path):
    """`pycocotools.mask.area` of more than 255 masks raises OverflowError with NumPy 2."""
    root = generate_shapes(tmp_path / "shapes", train_images=150, val_images=1, size_px=64)
    masks, pixels = GroundTruth(CocoDataset.load(root, "train")).masks
    assert len(masks) > 255 and pixels.tolist() == [int(mask_api.area(mask)) for mask in masks]

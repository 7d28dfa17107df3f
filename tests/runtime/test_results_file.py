"""Results and annotation files of any origin: errors name the entry."""

import copy
import json

import numpy as np
import pytest
from coco_cases import SIZE_HW, make_case, rle_of

from maskrcnn.errors import UserError
from maskrcnn.runtime.evaluation.ground_truth import GroundTruth
from maskrcnn.runtime.evaluation.results_file import (
    checked_results,
    kinds_of,
    read_results,
    write_server_results,
)

CONTENT, _ = make_case(4)
FINE = {
    "image_id": CONTENT["images"][0]["id"],
    "category_id": CONTENT["categories"][0]["id"],
    "score": 0.5,
    "bbox": [1.0, 2.0, 30.0, 40.0],
    "segmentation": rle_of((1, 2, 30, 40)),
    "keypoints": [1.0, 2.0, 0.5] * 17,
}


def without(*names, **changes):
    return {name: value for name, value in {**FINE, **changes}.items() if name not in names}


def rle(counts, size=SIZE_HW):
    return {"size": list(size), "counts": counts}


@pytest.mark.parametrize(
    ("kind", "wrong", "message"),
    [
        ("bbox", "text", "result 1: str 'text'"),
        ("bbox", without("score"), "result 1: without score"),
        ("bbox", without("category_id", "image_id"), "result 1: without image_id, category_id"),
        ("bbox", without("bbox"), "result 1: bbox is NoneType None, not 4 numbers"),
        ("bbox", without(bbox=[1, 2, 3]), r"result 1: bbox is list \[1, 2, 3\], not 4 numbers"),
        ("bbox", without(bbox=[1, 2, "3", 4]), "result 1: bbox has '3' among its numbers"),
        ("bbox", without(bbox=[1, 2, [3], 4]), r"result 1: bbox has \[3\] among its numbers"),
        ("bbox", without(bbox=[1, 2, float("nan"), 4]), "result 1: bbox has nan"),
        ("bbox", without(score=float("inf")), "result 1: score has inf"),
        ("bbox", without(score=None), "result 1: score has None"),
        ("segm", without("segmentation"), "result 1: without segmentation"),
        ("segm", without(segmentation=[]), "result 1: no segmentation"),
        ("segm", without(segmentation="mask"), "result 1: segmentation of type str"),
        ("segm", without(segmentation=rle("51", (7, 9))), r"a mask of size \[7, 9\] in an image of size \[120, 150\]"),
        ("segm", without(segmentation=rle("")), "run lengths that do not add up to 120×150 pixels"),
        ("segm", without(segmentation=rle("500")), "do not add up"),
        ("segm", without(segmentation=rle(rle_of((0, 0, 9, 9))["counts"] + "1")), "do not add up"),
        ("segm", without(segmentation=rle("P\x00")), "do not add up"),
        ("segm", without(segmentation=rle(7)), "run lengths of type int"),
        ("segm", without(segmentation=rle([5, -1, 120 * 150 - 4])), "not integers from 0 to 18000"),
        ("segm", without(segmentation=rle([5, 1.5])), "not integers from 0 to 18000"),
        ("segm", without(segmentation=[[1, 2, 3, 4]]), "malformed segmentation"),
        ("keypoints", without("keypoints"), "result 1: without keypoints"),
        ("keypoints", without(keypoints=[1, 2, 3]), r"result 1: keypoints is list \[1, 2, 3\], not 51 numbers"),
    ],
)
def test_a_malformed_result_is_named(kind, wrong, message):
    with pytest.raises(UserError, match=f"file.json: {message}" if message.startswith("result") else message):
        checked_results(GroundTruth.of_content(CONTENT, "gt"), [FINE, wrong], kind, "file.json")


def test_boxes_in_some_results_only_are_refused():
    with pytest.raises(UserError, match="result 1: has a bbox, but the first result does not"):
        checked_results(GroundTruth.of_content(CONTENT, "gt"), [without("bbox"), FINE], "bbox", "file.json")


def test_results_of_unknown_images_are_counted_and_named():
    strange = [without(image_id=value) for value in (777, 778, 777, "x", None, [1])]
    with pytest.raises(UserError, match=r"6 result.* of 5 unknown image.*: image_id 777, 778, 'x', None, \[1\]"):
        checked_results(GroundTruth.of_content(CONTENT, "gt"), [FINE, *strange], "bbox", "file.json")


def test_all_encodings_of_a_mask_are_equal():
    x, y, width, height = (1, 2, 30, 40)
    polygon = [[x, y, x + width, y, x + width, y + height, x, y + height]]
    runs = [x * SIZE_HW[0] + y]
    for _ in range(width):
        runs += [height, SIZE_HW[0] - height]
    runs[-1] = SIZE_HW[0] * SIZE_HW[1] - sum(runs[:-1])
    strings = rle_of((x, y, width, height)), rle_of((x, y, width, height), string=False)
    entries = [without("bbox", segmentation=value) for value in (*strings, rle(runs), polygon)]
    found = checked_results(GroundTruth.of_content(CONTENT, "gt"), entries, "segm", "file.json")
    counts = {m["counts"] if isinstance(m["counts"], str) else m["counts"].decode() for m in found.masks}
    assert counts == {strings[0]["counts"]}
    assert found.pixels.tolist() == [1200] * 4 and found.area_px.tolist() == [1200.0] * 4
    np.testing.assert_array_equal(found.boxes, [[x, y, width, height]] * 4)


def test_an_empty_mask_is_a_result():
    entry = without("bbox", segmentation=rle_of((0, 0, 0, 0)))
    assert checked_results(GroundTruth.of_content(CONTENT, "gt"), [entry], "segm", "f").pixels.tolist() == [0]


def test_written_results_have_the_fields_of_the_server_and_score_alike(tmp_path):
    truth = GroundTruth.of_content(CONTENT, "gt")
    for kind, field in (("bbox", "bbox"), ("segm", "segmentation"), ("keypoints", "keypoints")):
        write_server_results(tmp_path / "r.json", [FINE], kind)
        written = read_results(tmp_path / "r.json")
        assert written == [{name: FINE[name] for name in ("image_id", "category_id", "score", field)}]
        read, whole = (
            checked_results(truth, entries, kind, "r.json", measured_by=measured_by)
            for entries, measured_by in ((written, None), ([FINE], field))
        )
        np.testing.assert_array_equal(read.boxes, whole.boxes)
        np.testing.assert_array_equal(read.area_px, whole.area_px)


def test_the_kinds_are_those_of_the_first_result():
    assert kinds_of([FINE]) == ("bbox", "segm", "keypoints")
    assert kinds_of([without("bbox", "keypoints")]) == ("segm",)
    assert kinds_of([without("segmentation", bbox=[])]) == ("keypoints",)
    assert kinds_of([]) == kinds_of(["text"]) == ("bbox",)


@pytest.mark.parametrize(
    ("text", "message"),
    [(None, "cannot be read"), ("{", "not JSON"), ('{"annotations": []}', "dict .*\n  expected: a list of results")],
)
def test_a_file_that_is_not_a_list_is_refused(tmp_path, text, message):
    path = tmp_path / "r.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=message):
        read_results(path)


# Annotations


def changed(change):
    content = copy.deepcopy(CONTENT)
    change(content)
    return content


def test_crowd_flags_and_keypoint_counts_are_optional():
    content = changed(lambda c: [(a.pop("iscrowd"), a.pop("num_keypoints")) for a in c["annotations"]])
    truth = GroundTruth.of_content(content, "gt")
    assert not truth.is_crowd.any()
    visible = (truth.keypoints[:, :, 2] > 0).any(axis=1)
    np.testing.assert_array_equal(truth.is_ignored("keypoints"), ~visible)
    assert visible.any() and not visible.all()


def test_a_file_is_read_or_refused(tmp_path):
    path = tmp_path / "gt.json"
    path.write_text(json.dumps(CONTENT))
    assert len(GroundTruth.read(path)) == len(CONTENT["annotations"])
    path.write_text("[]")
    with pytest.raises(UserError, match=r"gt.json: the file is of type list"):
        GroundTruth.read(path)
    with pytest.raises(UserError, match=r"gone\.json does not exist"):
        GroundTruth.read(tmp_path / "gone.json")

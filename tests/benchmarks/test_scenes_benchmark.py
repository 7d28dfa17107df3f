"""The benchmark of large scenes: what it draws is what it takes as the truth, and what it counts is right."""

import json

import numpy as np
import pytest
import tifffile
from pycocotools import mask as mask_api
from scenes import KINDS, DrawnScene, main, scored

from maskrcnn.runtime.tiles import Tiles


def test_the_truth_is_what_is_drawn(tmp_path):
    scene = DrawnScene(900, 8, 128)
    scene.write(tmp_path / "scene.tif")
    with tifffile.TiffFile(tmp_path / "scene.tif") as file:
        assert file.is_bigtiff and file.pages[0].is_tiled
        image = file.asarray().astype(float)
    masks = [mask_api.decode(each).astype(bool) for each in scene.truth()]
    assert image.shape == (900, 900, 3) and len(masks) == 8
    assert np.sum(masks, axis=0).max() == 1  # apart from each other
    for mask, each in zip(masks, scene.objects, strict=True):
        inner = mask & np.roll(mask, 2, 0) & np.roll(mask, -2, 0) & np.roll(mask, 2, 1) & np.roll(mask, -2, 1)
        np.testing.assert_allclose(image[inner].mean(axis=0), each.colour, atol=2)
        x, y = each.outline.T  # shoelace formula
        assert mask.sum() == pytest.approx(abs(x @ np.roll(y, -1) - y @ np.roll(x, -1)) / 2, rel=0.03)
    kinds = scene.kinds(Tiles(128, 0.2))
    assert kinds[0] == 2 and (kinds != 2).any()  # the first is larger than a tile
    for mask, kind in zip(masks, kinds, strict=True):
        spans = [np.ptp(np.flatnonzero(mask.any(axis=axis))) + 1 for axis in (0, 1)]
        assert (max(spans) > 130) == (kind == 2)


def test_each_object_counts_once_for_the_best_detection_of_its_class():
    def square(left, side=10):
        mask = np.zeros((20, 100), np.uint8, order="F")
        mask[5:15, left : left + side] = 1
        return mask_api.encode(mask)

    truth, labels, kinds = [square(0), square(30), square(60)], [1, 2, 1], np.array([0, 1, 2])
    found = [
        (0.6, 1, square(1)),  # a second one of the first object, whose best is the next
        (0.9, 1, square(0)),
        (0.8, 1, square(30)),  # another class
        (0.7, 1, square(66)),  # IoU 4/16
    ]
    entries = [{"score": a, "category_id": b, "segmentation": c} for a, b, c in found]
    row = scored(entries, truth, labels, kinds)
    assert row["recall"] == pytest.approx(1 / 3) and row["precision"] == pytest.approx(1 / 4)
    assert (row["other class"], row["again"]) == (1, 1)
    assert [row[name] for name in KINDS] == [[1, 1], [0, 1], [0, 1]]
    assert scored([], truth, labels, kinds)["precision"] is None


def test_the_dataset_has_tiles_with_cut_objects(tmp_path):
    main(["--dataset", str(tmp_path / "scenes"), "--images", "10"])
    content = json.loads((tmp_path / "scenes" / "annotations" / "instances_train.json").read_text())
    assert len(content["images"]) == 9 == len(list((tmp_path / "scenes" / "train").glob("*.png")))
    boxes = np.array([each["bbox"] for each in content["annotations"]])
    assert {tuple(each["segmentation"]["size"]) for each in content["annotations"]} == {(128, 128)}
    is_cut = (boxes[:, :2] == 0).any(axis=1) | (boxes[:, :2] + boxes[:, 2:] == 128).any(axis=1)
    assert is_cut.any() and not is_cut.all()


def test_both_ways_are_measured(onnx_file, tmp_path, capsys):
    given = ["--side", "600", "--objects", "4", "--tile", "256", "--score", "0", "--json", str(tmp_path / "out.json")]
    main([str(onnx_file), *given])
    content = json.loads((tmp_path / "out.json").read_text())
    assert list(content["rows"]) == ["tiles of 256 px", "whole"]
    for row in content["rows"].values():
        assert row["detections"] > 0 and row["peak_mb"] > 50 and sum(row[name][1] for name in KINDS) == 4
    assert "| whole " in capsys.readouterr().out

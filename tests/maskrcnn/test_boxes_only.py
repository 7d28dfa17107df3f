"""Datasets in which no object has a mask: loaded, checked, refused by models that learn masks."""

import json
import shutil

import numpy as np
import pytest

from maskrcnn.data.check import check_dataset
from maskrcnn.data.coco import CocoDataset, instance_mask
from maskrcnn.errors import UserError
from maskrcnn.runtime.evaluation.evaluate import score_kinds
from maskrcnn.training.recipe import training_config


def strip(root, split, keep=0, empty=None):
    """Takes the segmentations from a split, or puts `empty` in their place; leaves the first `keep`."""
    path = root / "annotations" / f"instances_{split}.json"
    content = json.loads(path.read_text())
    for annotation in content["annotations"][keep:]:
        del annotation["segmentation"]
        if empty is not None:
            annotation["segmentation"] = empty
    path.write_text(json.dumps(content))
    return content["annotations"]


@pytest.fixture
def root(shapes, tmp_path):
    return shutil.copytree(shapes, tmp_path / "data")


@pytest.mark.parametrize("empty", [None, []])
def test_every_object_has_the_pixels_of_its_box(root, empty):
    annotations = strip(root, "train", empty=empty)
    dataset = CocoDataset.load(root, "train")
    assert not dataset.has_masks and dataset.skipped == {}
    found = [(record, instance) for record in dataset.images for instance in record.instances]
    assert len(found) == len(annotations)
    for record, instance in found:
        x1, y1, x2, y2 = instance.box_xyxy_px
        mask = instance_mask(record, instance)
        wanted = np.zeros_like(mask)
        wanted[int(y1) : int(np.ceil(y2)), int(x1) : int(np.ceil(x2))] = True
        assert (mask == wanted).all() and instance.area_px > 0


def test_thin_boxes_have_pixels_too(root):
    path = root / "annotations" / "instances_train.json"
    content = json.loads(path.read_text())
    box = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [10.2, 3.4, 0.3, 9.1]}
    path.write_text(json.dumps({**content, "annotations": [box]}))
    record = CocoDataset.load(root, "train").images[0]
    (instance,) = record.instances
    assert instance_mask(record, instance).sum() == 10 and instance.area_px == pytest.approx(0.3 * 9.1)


def test_one_segmentation_makes_it_a_dataset_of_masks(root):
    annotations = strip(root, "train", keep=1)
    dataset = CocoDataset.load(root, "train")
    assert dataset.has_masks and dataset.skipped == {}
    masked = [instance.has_mask for record in dataset.images for instance in record.instances]
    assert masked.count(True) == 1 and masked.count(False) == len(annotations) - 1


def test_a_split_without_annotations_is_no_dataset_of_boxes(root):
    path = root / "annotations" / "instances_val.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "annotations": []}))
    assert CocoDataset.load(root, "val").has_masks


def test_the_check_says_so_and_has_nothing_against_it(root):
    before = check_dataset(root, workers=1)
    strip(root, "train")
    strip(root, "val")
    report = check_dataset(root, workers=1)
    assert [figures.has_masks for figures in report.splits] == [False, False]
    assert report.text().count("boxes without masks") == 2 and "boxes without masks" not in before.text()
    assert report.by_problem(is_error=True) == {}
    assert not [name for name in report.by_problem(is_error=False) if name.startswith(("annotation", "box"))]


@pytest.mark.parametrize("split", ["train", "val"])
def test_models_with_masks_refuse_it(root, split):
    strip(root, split)
    splits = [CocoDataset.load(root, name) for name in ("train", "val")]
    with pytest.raises(UserError, match=rf"instances_{split}\.json has boxes only[\s\S]*--model fasterrcnn"):
        training_config(*splits)
    assert not training_config(*splits, {"model": "fasterrcnn_resnet50_fpn"}).model.has_masks


def test_masks_are_not_scored_on_boxes(root):
    strip(root, "val")
    dataset = CocoDataset.load(root, "val")
    box = dataset.images[0].instances[0]
    x1, y1, x2, y2 = box.box_xyxy_px
    category_id = dataset.category_ids[box.label - 1]
    result = {
        "image_id": dataset.images[0].id,
        "category_id": category_id,
        "bbox": [x1, y1, x2 - x1, y2 - y1],
        "score": 1.0,
    }
    assert score_kinds(dataset, [result], ("bbox",)).box["AR_1"] > 0
    with pytest.raises(UserError, match="only boxes"):
        score_kinds(dataset, [result], ("bbox", "segm"))

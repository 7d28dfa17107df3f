"""Keypoints in annotation files: valid ones, faults of an annotation, and faults of the categories."""

import json

import pytest

from maskrcnn.data.annotations import REPAIRED
from maskrcnn.data.coco import CocoDataset
from maskrcnn.data.layouts import find_split, list_splits
from maskrcnn.errors import UserError
from maskrcnn.training.recipe import training_config

PERSON = {"id": 1, "name": "person", "keypoints": ["nose", "left_ear", "right_ear"], "skeleton": [[1, 2], [3, 1]]}
CAR = {"id": 3, "name": "car"}
GIVEN = [4, 3, 2, 1, 2, 1, 9, 9, 0]


def annotation(number: int, **changes) -> dict:
    square = [[1, 1, 5, 1, 5, 5, 1, 5]]
    box = {"bbox": [1, 1, 4, 4], "area": 16, "iscrowd": 0, "segmentation": square}
    return {"id": number, "image_id": 1, "category_id": 1, **box, **changes}


def write(root, *annotations, categories=(PERSON, CAR), name="instances_val", folder="val"):
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    (root / folder).mkdir(exist_ok=True)
    (root / folder / "one.png").touch()
    images = [{"id": 1, "file_name": "one.png", "height": 8, "width": 8}]
    content = {"images": images, "categories": list(categories), "annotations": list(annotations)}
    (root / "annotations" / f"{name}.json").write_text(json.dumps(content))
    return root


def load(root, *annotations, **changes) -> CocoDataset:
    return CocoDataset.load(write(root, *annotations, **changes), "val")


def test_names_lines_and_places_are_read(tmp_path):
    dataset = load(tmp_path, annotation(1, keypoints=GIVEN, num_keypoints=2), annotation(2, category_id=3))
    assert dataset.keypoint_names == ("nose", "left_ear", "right_ear")
    assert dataset.keypoint_skeleton == ((1, 2), (3, 1)) and dataset.has_keypoints
    person, car = dataset.images[0].instances
    assert person.keypoints.tolist() == [[4, 3, 2], [1, 2, 1], [0, 0, 0]]  # unlabelled ones have no place
    assert person.stated_keypoints == 2
    assert car.keypoints is None


@pytest.mark.parametrize("nothing", [{}, {"keypoints": [], "num_keypoints": 0}, {"keypoints": [0] * 9}])
def test_an_object_may_have_none(tmp_path, nothing):
    dataset = load(tmp_path, annotation(1, **nothing))
    assert dataset.images[0].instances[0].keypoints is None
    assert dataset.keypoint_names and not dataset.has_keypoints  # nothing to learn


@pytest.mark.parametrize(
    ("keypoints", "text"),
    [
        ([1, 2, 2], "3 numbers instead of 3 for each of 3"),
        ([*GIVEN, 1, 1, 2], "12 numbers"),
        ([4, 3, 5, *GIVEN[3:]], "visibility 5 instead of 0, 1 or 2"),
        ([4, "x", 2, *GIVEN[3:]], "not a list of finite numbers"),
        ([4, float("nan"), 2, *GIVEN[3:]], "not a list of finite numbers"),
        ("nose", "not a list of finite numbers"),
    ],
)
def test_malformed_keypoints_do_not_cost_their_object(tmp_path, keypoints, text):
    dataset = load(tmp_path, annotation(1, keypoints=GIVEN), annotation(7, keypoints=keypoints))
    assert [instance.keypoints is not None for instance in dataset.images[0].instances] == [True, False]
    (note,) = dataset.notes.of(REPAIRED)
    assert note.name == "annotation 7" and note.reason.startswith("malformed keypoints") and text in note.detail
    (line,) = dataset.note_lines()
    assert str(dataset.annotation_path) in line and "7" in line and text in line


def test_keypoints_of_a_category_without_any_are_not_looked_at(tmp_path):
    dataset = load(tmp_path, annotation(1, category_id=3, keypoints=[1, 2]))
    assert dataset.skipped == {} and dataset.images[0].instances[0].keypoints is None


@pytest.mark.parametrize(
    ("categories", "text"),
    [
        ([PERSON, {"id": 2, "name": "dog", "keypoints": ["nose", "tail"]}], "categories 1 and 2 with different keypo"),
        ([{**PERSON, "keypoints": ["nose", "nose", "ear"]}], "'keypoints' of category 1 is"),
        ([{**PERSON, "keypoints": "nose"}], "a list of unique names"),
    ],
)
def test_categories_that_disagree_spoil_the_keypoints_alone(tmp_path, categories, text):
    dataset = load(tmp_path, annotation(1, keypoints=GIVEN), categories=categories)
    assert len(dataset.images[0].instances) == 1 and not dataset.has_keypoints and dataset.keypoint_names == ()
    assert text in str(dataset.keypoint_fault) and str(dataset.annotation_path) in str(dataset.keypoint_fault)
    assert not training_config(dataset, dataset).model.has_keypoints
    with pytest.raises(UserError) as caught:
        training_config(dataset, dataset, {"model": {"has_keypoints": True, "keypoint_names": ["nose"]}})
    assert caught.value is dataset.keypoint_fault


def test_two_categories_may_share_their_keypoints(tmp_path):
    child = {**PERSON, "id": 2, "name": "child"}
    annotations = (annotation(number, category_id=number, keypoints=GIVEN) for number in (1, 2))
    dataset = load(tmp_path, *annotations, categories=[PERSON, child])
    assert [instance.keypoints is not None for instance in dataset.images[0].instances] == [True, True]


def test_cocos_own_files_of_keypoints_are_splits(tmp_path):
    write(tmp_path, annotation(1), name="instances_val2017", folder="val2017")
    write(tmp_path, annotation(1, keypoints=GIVEN), name="person_keypoints_val2017", folder="val2017")
    assert list_splits(tmp_path) == ["val2017"] and find_split(tmp_path, "val") == "val2017"
    split = find_split(tmp_path, "person_keypoints_val2017")
    dataset = CocoDataset.load(tmp_path, split)
    assert (dataset.split, dataset.images[0].path) == (split, tmp_path / "val2017" / "one.png")
    assert dataset.images[0].instances[0].keypoints is not None
    (tmp_path / "annotations" / "instances_val2017.json").unlink()
    assert list_splits(tmp_path) == [split] == [find_split(tmp_path, "person_keypoints_val")]

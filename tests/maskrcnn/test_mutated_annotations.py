"""Annotation files spoilt at random: read or refused, never a traceback, and by every command alike."""

import copy
import json
import random
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from maskrcnn.data.annotations import read_annotations
from maskrcnn.data.arrays import table_of
from maskrcnn.data.check import check_dataset
from maskrcnn.data.coco import CocoDataset, divided
from maskrcnn.data.convert.conversion import SplitPlan, convert
from maskrcnn.data.records import Records
from maskrcnn.data.segmentation import compressed_rle
from maskrcnn.errors import UserError
from maskrcnn.runtime.evaluation.ground_truth import GroundTruth

SIDE_PX = 24
STRANGE = [
    None,
    "",
    "x",
    "1",
    1,
    0,
    -1,
    1.0,
    1.5,
    True,
    float("nan"),
    float("inf"),
    10**60,
    [],
    [[]],
    {},
    [1, 2],
    "[/red]",
    "\udcff",
]


def square(number, image_id, category_id, x, y, side):
    return {
        "id": number,
        "image_id": image_id,
        "category_id": category_id,
        "bbox": [x, y, side, side],
        "area": side * side,
        "iscrowd": 0,
        "segmentation": [[x, y, x + side, y, x + side, y + side, x, y + side]],
    }


GOOD = {
    "images": [{"id": k, "file_name": f"{k}.png", "height": SIDE_PX, "width": SIDE_PX} for k in (1, 2, 3)],
    "categories": [{"id": 1, "name": "cat", "supercategory": "pet"}, {"id": 7, "name": "dog", "supercategory": "pet"}],
    "annotations": [
        square(1, 1, 1, 2, 3, 8),
        square(2, 1, 7, 10, 4, 9),
        {**square(3, 2, 1, 5, 5, 10), "segmentation": {"size": [24, 24], "counts": [125, 10, 14, 10, 24 * 24 - 159]}},
        {**square(4, 3, 7, 1, 1, 20), "iscrowd": 1},
    ],
}


def entries(content):
    """All dictionaries and lists of a content, the content itself included."""
    found, queue = [], [content]
    while queue:
        value = queue.pop()
        if isinstance(value, (dict, list)) and value:
            found.append(value)
            queue += value.values() if isinstance(value, dict) else value
    return found


def mutated(rng, content):
    """The content after one to four random changes of type, value, presence, number and order."""
    for _ in range(rng.randint(1, 4)):
        target = rng.choice(entries(content))
        keys = list(target) if isinstance(target, dict) else list(range(len(target)))
        key = rng.choice(keys)
        match rng.choice(["replace", "remove", "text", "copy", "shuffle", "extra"]):
            case "replace":
                target[key] = copy.deepcopy(rng.choice(STRANGE))
            case "remove":
                del target[key]
            case "text":
                target[key] = str(target[key])
            case "copy" if isinstance(target, list):
                target.insert(rng.randint(0, len(target)), copy.deepcopy(target[key]))
            case "shuffle" if isinstance(target, list):
                rng.shuffle(target)
            case _ if isinstance(target, dict):
                target["attributes"] = {"rotation": rng.choice([0, 45, "x"]), "occluded": False}
    return content


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("mutated")
    (root / "data" / "annotations").mkdir(parents=True)
    (root / "data" / "train").mkdir()
    for k in (1, 2, 3):
        Image.new("RGB", (SIDE_PX, SIDE_PX), (k, 9, 9)).save(root / "data" / "train" / f"{k}.png")
    return root


def read(root):
    """Objects and crowd regions that training, evaluation, the check and the conversion use; None where refused."""
    data, path = root / "data", root / "data" / "annotations" / "instances_train.json"

    def trained():
        dataset = CocoDataset.load(data, "train", drop_roots=False)
        used = sum(len(record.instances) for record in dataset.images)
        assert used + sum(dataset.skipped.values()) == len(json.loads(path.read_text()).get("annotations") or [])
        return used

    def checked():
        (split,) = check_dataset(data, workers=1).splits
        return split.object_count + split.crowd_regions

    def converted():
        shutil.rmtree(root / "out", ignore_errors=True)
        return sum(convert("coco", data, root / "out", plan=SplitPlan(rest="all"), keep_going=True).objects.values())

    counts = []
    for reader in (trained, lambda: len(GroundTruth.read(path, data / "train")), checked, converted):
        try:
            counts.append(reader())
        except UserError as error:
            assert error.found and error.expected and error.fix
            counts.append(None)
        except ValueError:  # a check without a readable split
            assert reader is checked
            counts.append(None)
    return counts


@settings(deadline=None, max_examples=500, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32 - 1))
def test_a_spoilt_file_counts_the_same_everywhere(root, seed):
    path = root / "data" / "annotations" / "instances_train.json"
    path.write_text(json.dumps(mutated(random.Random(seed), copy.deepcopy(GOOD))))
    trained, evaluated, checked, converted = read(root)
    if trained is not None:  # missing images are an error of training, a finding of the check
        assert trained == evaluated == checked
    else:
        assert evaluated == checked
    if converted is not None and trained is not None:
        assert converted == trained


def test_file_names_that_are_not_utf8_are_divided_like_others(tmp_path):
    content, names = copy.deepcopy(GOOD), [f"{k}\udcff.png" for k in (1, 2, 3)]
    (tmp_path / "data" / "annotations").mkdir(parents=True)
    (tmp_path / "data" / "train").mkdir()
    for entry, name in zip(content["images"], names, strict=True):
        entry["file_name"] = name
        Image.new("RGB", (SIDE_PX, SIDE_PX)).save(tmp_path / "data" / "train" / name)
    (tmp_path / "data" / "annotations" / "instances_train.json").write_text(json.dumps(content))
    dataset = CocoDataset.load(tmp_path / "data", "train")
    parts = [{record.path.name for record in divided(dataset, part).images} for part in ("train", "val")]
    assert all(parts) and parts[0].isdisjoint(parts[1]) and parts[0] | parts[1] == set(names)
    plan = SplitPlan(shares={"val": 0.4}, rest="train")
    assert sum(convert("coco", tmp_path / "data", tmp_path / "out", plan=plan).objects.values()) == 4
    stored = {path.name for path in (tmp_path / "out").rglob("*.png")}
    assert stored == set(names)


KEYPOINTS = {"keypoints": ["top", "end"], "skeleton": [[1, 2]]}
RICH = {
    "images": GOOD["images"],
    "categories": [{**GOOD["categories"][0], **KEYPOINTS}, GOOD["categories"][1]],
    "annotations": [
        {**each, "attributes": {"occluded": False, "rotation": 0.0}} if each["id"] == 2 else each
        for each in GOOD["annotations"]
    ]
    + [
        {**square(5, 2, 1, 3, 3, 6), "keypoints": [3, 3, 2, 0, 0, 0], "num_keypoints": 1},
        {**square(6, 3, 1, 2.25, 3.125, 6.1), "keypoints": [0] * 6, "num_keypoints": 0},
        {**square(7, 3, 7, 4, 4, 8), "segmentation": {"size": [24, 24], "counts": "e1:>:]1"}},
        {**square(8, 3, 7, 4, 4, 8), "bbox": [-1.1, 2.3, 30, 3.7]},
    ],
}


def described(objects, size_of):
    """The fields of objects, with the pixels of their masks."""
    return [
        (
            each.annotation_id,
            each.box_xyxy,
            compressed_rle(each.segmentation, *size_of(each)),
            [part.tolist() for part in each.segmentation] if isinstance(each.segmentation, list) else None,
            (each.has_mask, each.is_crowd, each.area, each.stated_keypoints),
            None if each.keypoints is None else each.keypoints.tolist(),
        )
        for each in objects
    ]


@settings(deadline=None, max_examples=1000, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32 - 1), drop_roots=st.booleans(), boxes_only=st.booleans())
def test_plain_entries_are_read_as_by_the_tolerant_reader(tmp_path, seed, drop_roots, boxes_only):
    rng, path = random.Random(seed), tmp_path / "spoilt.json"
    content = copy.deepcopy(rng.choice([RICH, GOOD]))
    if boxes_only:
        for each in content["annotations"]:
            del each["segmentation"]
    path.write_text(json.dumps(mutated(rng, content) if rng.random() < 0.9 else content))
    known = {"size_of": lambda name, names: (SIDE_PX, SIDE_PX) if name == "1.png" else None, "drop_roots": drop_roots}
    try:
        expected = read_annotations(json.loads(path.read_text()), str(path), **known)
    except UserError as error:
        with pytest.raises(UserError) as raised:
            table_of(path, **known)
        assert str(raised.value) == str(error)
        return
    table, read = table_of(path, **known)
    records = Records(table, np.arange(len(expected.images)))
    assert [(r.id, str(r.path), r.height, r.width) for r in records] == [
        (image_id, str(Path(each.file_name)), each.height, each.width) for image_id, each in expected.images.items()
    ]
    labels = list(expected.categories)
    for record, boxes in zip(records, np.split(table.arrays["bbox"], table.arrays["object_end"]), strict=False):
        own = [each for each in expected.objects if each.image_id == record.id]
        found = [
            SimpleNamespace(**vars(each), box_xyxy=each.box_xyxy_px, area=each.area_px) for each in record.instances
        ]
        assert repr(described(found, lambda _, r=record: (r.height, r.width))) == repr(
            described(own, lambda _, r=record: (r.height, r.width))
        )
        assert [each.label for each in found] == [1 + labels.index(each.category_id) for each in own]
        np.testing.assert_array_equal(boxes, np.array([each.bbox_xywh for each in own]).reshape(-1, 4))
    assert repr(read.notes.to_json()) == repr(expected.notes.to_json())
    assert vars(read) | {"images": 0, "objects": 0, "notes": 0, "keypoints": 0} == vars(expected) | {
        "images": 0,
        "objects": 0,
        "notes": 0,
        "keypoints": 0,
    }
    assert str(vars(read.keypoints)) == str(vars(expected.keypoints))


def test_the_good_file_counts_four(root):
    (root / "data" / "annotations" / "instances_train.json").write_text(json.dumps(GOOD))
    assert read(root) == [4, 4, 4, 4]

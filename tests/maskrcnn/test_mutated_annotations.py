"""Annotation files spoilt at random: read or refused, never a traceback, and by every command alike."""

import copy
import json
import random
import shutil

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from maskrcnn.data.check import check_dataset
from maskrcnn.data.coco import CocoDataset
from maskrcnn.data.convert.conversion import SplitPlan, convert
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


def mutated(seed):
    """The good content after one to four random changes of type, value, presence, number and order."""
    rng, content = random.Random(seed), copy.deepcopy(GOOD)
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
    path.write_text(json.dumps(mutated(seed)))
    trained, evaluated, checked, converted = read(root)
    if trained is not None:  # missing images are an error of training, a finding of the check
        assert trained == evaluated == checked
    else:
        assert evaluated == checked
    if converted is not None and trained is not None:
        assert converted == trained


def test_the_good_file_counts_four(root):
    (root / "data" / "annotations" / "instances_train.json").write_text(json.dumps(GOOD))
    assert read(root) == [4, 4, 4, 4]

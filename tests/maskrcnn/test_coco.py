import copy
import json
import math
import os
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from maskrcnn.data.annotations import BOX_ONLY
from maskrcnn.data.coco import CocoDataset, crowded_line, instance_mask
from maskrcnn.data.layouts import find_split
from maskrcnn.errors import UserError

REAL = Path(os.environ.get("MASKRCNN_DATA", Path(__file__).parents[3] / "shared" / "data"))
HEIGHT, WIDTH = 6, 8

SQUARE = {  # columns 1 … 4, rows 2 … 4 of image 5
    "id": 7,
    "image_id": 5,
    "category_id": 30,
    "bbox": [1, 2, 4, 3],
    "area": 12,
    "iscrowd": 0,
    "segmentation": [[1, 2, 5, 2, 5, 5, 1, 5]],
}
CONTENT = {
    "images": [
        {"id": 5, "file_name": "five.png", "height": HEIGHT, "width": WIDTH},
        {"id": 2, "file_name": "sub/two.png", "height": 4, "width": 4},
    ],
    "categories": [{"id": 30, "name": "dog"}, {"id": 4, "name": "cat"}],
    "annotations": [SQUARE],
}


def write(root, content=CONTENT, split="val", images=True):
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    text = content if isinstance(content, str) else json.dumps(content)
    (root / "annotations" / f"instances_{split}.json").write_text(text)
    if images:
        for name in ("five.png", "sub/two.png"):
            (root / split / name).parent.mkdir(parents=True, exist_ok=True)
            (root / split / name).touch()
    return root


def load(root, *annotations, **changes):
    return CocoDataset.load(write(root, {**CONTENT, "annotations": list(annotations), **changes}), "val")


def only(dataset):
    (record,) = [record for record in dataset.images if record.instances]
    (instance,) = record.instances
    return record, instance


# --- splits ------------------------------------------------------------------------------------------


def test_exact_name_wins_over_names_that_begin_with_it(tmp_path):
    for split in ("train", "train2017", "val2017"):
        write(tmp_path, split=split)
    (tmp_path / "annotations" / "captions_test.json").touch()
    assert find_split(tmp_path, "train") == "train"
    assert find_split(tmp_path, "train2017") == "train2017"
    assert find_split(tmp_path, "val") == "val2017"


def test_unknown_and_ambiguous_splits_list_what_exists(tmp_path):
    with pytest.raises(UserError, match=r"is not a dataset: it is empty\n  expected: a folder in COCO layout"):
        find_split(tmp_path, "val")
    for split in ("val2014", "val2017"):
        write(tmp_path, split=split)
    with pytest.raises(UserError, match=r"several splits for 'val' .*: val2014, val2017"):
        find_split(tmp_path, "val")
    for kind in ("train", ""):
        with pytest.raises(UserError, match=rf"no split '{kind}' .*\n  expected: one of: val2014, val2017"):
            find_split(tmp_path, kind)


# --- loading -----------------------------------------------------------------------------------------


def test_labels_follow_ascending_category_ids(tmp_path):
    dataset = CocoDataset.load(write(tmp_path), "val")
    assert dataset.class_names == ("cat", "dog") and dataset.category_ids == (4, 30)
    assert (dataset.root, dataset.split) == (tmp_path, "val")
    assert dataset.annotation_path == tmp_path / "annotations" / "instances_val.json"
    five, two = dataset.images
    assert (five.id, five.path, five.height, five.width) == (5, tmp_path / "val" / "five.png", 6, 8)
    assert two.path == tmp_path / "val" / "sub" / "two.png" and two.instances == ()
    (square,) = five.instances
    assert (square.annotation_id, square.label, square.is_crowd, square.area_px) == (7, 2, False, 12.0)
    assert square.box_xyxy_px == (1.0, 2.0, 5.0, 5.0)
    assert dataset.skipped == {} and dataset.skipped_examples == {}


def test_boxes_are_cut_to_the_image_and_stay_whole_for_the_evaluation(tmp_path):
    dataset = load(tmp_path, {**SQUARE, "bbox": [-1, 2, 20, 3.5]})
    assert only(dataset)[1].box_xyxy_px == (0.0, 2.0, 8.0, 5.5)
    assert dataset.images.objects("bbox").tolist() == [[-1, 2, 20, 3.5]]


def test_arrays_of_a_large_file_are_cached_and_mapped_by_workers(tmp_path, monkeypatch):
    cache, folder = tmp_path / "cache", tmp_path / "cache" / "annotations"
    monkeypatch.setenv("MASKRCNN_CACHE", str(cache))
    content = {**CONTENT, "info": "x" * 5_000_000}
    content["annotations"] = [SQUARE, {**SQUARE, "id": 8, "category_id": 99}, {**SQUARE, "id": 9, "area": None}]

    def described(dataset):
        return repr(([*dataset.images], dataset.note_lines(), dataset.class_names, dataset.skipped_examples))

    first = CocoDataset.load(write(tmp_path / "data", content), "val")
    (cached,) = folder.iterdir()
    with monkeypatch.context() as parsing:
        parsing.delattr("maskrcnn.data.annotations.Reader.images")
        again = CocoDataset.load(tmp_path / "data", "val")
    assert described(first) == described(again)
    assert len(again.note_lines()) == 2
    pickled = pickle.dumps(again.images)
    assert len(pickled) < 5000 and repr(list(pickle.loads(pickled))) == repr(list(again.images))

    whole = cached.read_bytes()
    cached.write_bytes(whole[:-1])  # cut short, of another kind, of another version: made again
    assert described(CocoDataset.load(tmp_path / "data", "val")) == described(first)
    assert cached.read_bytes() == whole
    cached.write_bytes(b"")
    assert described(CocoDataset.load(tmp_path / "data", "val")) == described(first)
    other = cached.rename(cached.with_name(cached.name + "0"))
    assert described(CocoDataset.load(tmp_path / "data", "val")) == described(first)
    assert not other.exists() and cached.read_bytes() == whole

    write(tmp_path / "data", {**content, "annotations": [SQUARE]})
    assert CocoDataset.load(tmp_path / "data", "val").note_lines() == []
    monkeypatch.setenv("MASKRCNN_CACHE", str(tmp_path / "data" / "annotations" / "instances_val.json"))  # no folder
    unkept = CocoDataset.load(tmp_path / "data", "val")
    assert repr(list(pickle.loads(pickle.dumps(unkept.images)))) == repr(list(unkept.images))


# --- masks -------------------------------------------------------------------------------------------

BLOCK = np.zeros((HEIGHT, WIDTH), bool)
BLOCK[2:5, 1:5] = True
# Column by column: 6 + 2 empty, then 3 of the object and 3 empty four times, and the last three columns.
BLOCK_RUNS = [8, 3, 3, 3, 3, 3, 3, 3, 1 + 3 * 6]


@pytest.mark.parametrize(
    "segmentation",
    [
        SQUARE["segmentation"],
        [[1, 2, 3, 2, 3, 5, 1, 5], [3, 2, 5, 2, 5, 5, 3, 5]],
        {"size": [HEIGHT, WIDTH], "counts": BLOCK_RUNS},
        {"size": [HEIGHT, WIDTH], "counts": "83300000`0"},
    ],
    ids=["polygon", "two polygons", "uncompressed", "compressed"],
)
def test_every_kind_of_segmentation_gives_the_same_mask(tmp_path, segmentation):
    mask = instance_mask(*only(load(tmp_path, {**SQUARE, "segmentation": segmentation})))
    assert mask.dtype == bool and mask.flags.c_contiguous
    np.testing.assert_array_equal(mask, BLOCK)


def test_overlapping_polygons_are_merged_and_not_added(tmp_path):
    twice = {**SQUARE, "segmentation": SQUARE["segmentation"] * 2}
    np.testing.assert_array_equal(instance_mask(*only(load(tmp_path, twice))), BLOCK)


# --- annotations that are repaired, kept as boxes, or skipped ----------------------------------------

RLE = {"size": [HEIGHT, WIDTH], "counts": BLOCK_RUNS}
OUTSIDE = [[1, 2, 5, 2, 5, 1e9]]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"segmentation": SQUARE["segmentation"][0]}, "segmentation that is one flat list"),
        ({"segmentation": [*SQUARE["segmentation"], [1, 2, 5, 5]]}, "part of a segmentation left out"),
        ({"segmentation": [*SQUARE["segmentation"], []]}, "part of a segmentation left out"),
        ({"segmentation": [*SQUARE["segmentation"], *OUTSIDE]}, "part of a segmentation left out"),
        ({"segmentation": [[1, 2], [5, 2], [5, 5], [1, 5]]}, None),
        ({"segmentation": [{"x": 1, "y": 2}, {"x": 5, "y": 2}, {"x": 5, "y": 5}, {"x": 1, "y": 5}]}, None),
        ({"segmentation": [["1", "2", "5", "2", "5.0", "5", "1", "5"]]}, None),
        ({"segmentation": [RLE]}, None),
        ({"segmentation": {"counts": BLOCK_RUNS}}, None),
        ({"segmentation": "83300000`0"}, None),
        ({"segmentation": {**RLE, "counts": "b'83300000`0'"}}, None),
        ({"segmentation": json.dumps(RLE)}, None),
        ({"segmentation": json.dumps(SQUARE["segmentation"])}, None),
        ({"segmentation": {**RLE, "counts": [float(run) for run in BLOCK_RUNS]}}, None),
        ({"image_id": "5"}, None),
        ({"image_id": 5.0, "category_id": "30"}, None),
        ({"bbox": ["1", "2", 4, 3.0]}, None),
        ({"bbox": [5, 5, -4, -3]}, "box with a negative side: corners exchanged"),
        ({"bbox": None}, "box computed from the mask"),
        ({"bbox": [1, 2, 4]}, "box computed from the mask"),
        ({"bbox": [1, 2, 0, 0]}, "box computed from the mask"),
        ({"bbox": [1, 2, 4, math.nan]}, "box computed from the mask"),
        ({"bbox": [1, 2, 4, 10**400]}, "box computed from the mask"),
        ({"bbox": [80, 2, 4, 3]}, "box outside the image, taken from the mask"),
        ({"iscrowd": None}, "crowd flag that is not 0 or 1"),
        ({"iscrowd": "0"}, "crowd flag that is not 0 or 1"),
        ({"iscrowd": False}, None),
        ({"iscrowd": ...}, None),
        ({"area": None}, "area missing or not positive, computed"),
        ({"area": math.nan}, "area missing or not positive, computed"),
        ({"area": -12}, "area missing or not positive, computed"),
        ({"area": "12"}, None),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_follows_from_other_fields_is_repaired_and_counted(tmp_path, change, reason):
    entry = {key: value for key, value in {**SQUARE, **change}.items() if value is not ...}
    others = [{**SQUARE, "id": 100 + k} for k in range(20)]  # show that boxes are (x, y, width, height)
    dataset = load(tmp_path, *others, entry)
    instance = next(each for each in dataset.images[0].instances if each.annotation_id == 7)
    np.testing.assert_array_equal(instance_mask(dataset.images[0], instance), BLOCK)
    assert instance.box_xyxy_px == (1, 2, 5, 5) and instance.area_px == 12
    assert instance.label == 2 and not instance.is_crowd and instance.has_mask
    assert dataset.notes.counts() == ({reason: 1} if reason else {})


@pytest.mark.parametrize(
    ("segmentation", "reason", "text"),
    [
        (None, "no segmentation", "None"),
        ([], "no segmentation", r"\[\]"),
        ([[]], "no segmentation", r"\[\[\]\]"),
        ({**RLE, "counts": [48]}, "no segmentation", "without object pixels"),
        ([[1, 2, 5, 5]], "malformed segmentation", "three or more pairs"),
        ([[1, 2, 5, 2, 5, 5, 1]], "malformed segmentation", "three or more pairs"),
        ([[1, 2, 5, 2, 5, math.nan]], "malformed segmentation", "three or more pairs"),
        (OUTSIDE, "malformed segmentation", "outside the image"),
        ([[-9, 2, 5, 2, 5, 5]], "malformed segmentation", "outside the image"),
        ([[1, -1e9, 5, 2, 5, 5]], "malformed segmentation", "outside the image"),
        ("RLE", "malformed segmentation", "add up to 6×8"),
        (3, "malformed segmentation", "neither a list"),
        ({"size": [HEIGHT, WIDTH]}, "malformed segmentation", "neither a list"),
        ({**RLE, "size": [WIDTH, HEIGHT]}, "mask of another size than the image", r"size \[8, 6\]"),
        ({**RLE, "counts": [8, 3]}, "malformed segmentation", "add up to 6×8"),
        ({**RLE, "counts": [8, 80, -40]}, "malformed segmentation", "add up to 6×8"),
        ({**RLE, "counts": "83300000"}, "malformed segmentation", "add up to 6×8"),
        ({**RLE, "counts": "83300000`"}, "malformed segmentation", "add up to 6×8"),
        ({**RLE, "counts": "8`2hN"}, "malformed segmentation", "add up to 6×8"),  # 8, 80, -40
        ({**RLE, "counts": "ooooooooooo0"}, "malformed segmentation", "add up to 6×8"),
        ({**RLE, "counts": "\ud800 \x00"}, "malformed segmentation", "add up to 6×8"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_an_object_without_a_usable_mask_keeps_its_box(tmp_path, segmentation, reason, text):
    dataset = load(tmp_path, SQUARE, {**SQUARE, "id": 8, "segmentation": segmentation})
    assert dataset.skipped == {} and dataset.notes.counts(BOX_ONLY) == {reason: 1}
    (note,) = dataset.notes.of(BOX_ONLY)
    assert note.name == "annotation 8" and re.search(text, note.detail)
    masked, boxed = dataset.images[0].instances
    assert (masked.has_mask, boxed.has_mask) == (True, False)
    assert boxed.box_xyxy_px == masked.box_xyxy_px and boxed.area_px == 12


@pytest.mark.parametrize("segmentation", [None, [], [[]], {}, "", ...])
def test_boxes_without_masks_are_told_however_they_are_spelt(tmp_path, segmentation):
    entry = {key: value for key, value in {**SQUARE, "segmentation": segmentation}.items() if value is not ...}
    dataset = load(tmp_path, entry)
    assert not dataset.has_masks and dataset.notes.counts() == {}


@pytest.mark.parametrize(
    ("change", "reason", "text"),
    [
        ({"image_id": 99}, "unknown image", "image_id 99"),
        ({"image_id": [5]}, "unknown image", r"image_id \[5\]"),
        ({"category_id": 1}, "unknown category", "category_id 1"),
        ({"category_id": None}, "unknown category", "category_id None"),
        ({"bbox": [1, 2, 0, 3], "segmentation": []}, "invalid box", r"\[1, 2, 0, 3\]"),
        ({"bbox": None, "segmentation": [[1, 2]]}, "invalid box", "None"),
        ({"bbox": [8, 2, 4, 3], "segmentation": None}, "box outside the image", "image 8×6"),
        ({"bbox": [1, -3, 4, 3], "segmentation": None}, "box outside the image", "image 8×6"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_an_annotation_without_any_place_is_counted_and_left_out(tmp_path, change, reason, text):
    dataset = load(tmp_path, SQUARE, {**SQUARE, "id": 8, **change}, {**SQUARE, "id": 9, **change})
    assert dataset.skipped == {reason: 2}
    assert only(dataset)[1].annotation_id == 7
    assert list(dataset.skipped_examples) == [reason]
    message = dataset.skipped_examples[reason]
    assert message.startswith("annotation 8: ")
    assert re.search(text, message), message
    assert dataset.images.objects("annotation_id").tolist() == [7]


def test_annotation_that_is_no_object_or_lacks_everything(tmp_path):
    dataset = load(tmp_path, 3, {}, SQUARE)
    assert dataset.skipped == {"not an object": 1, "unknown image": 1}
    assert dataset.skipped_examples["unknown image"] == "annotation number 1: image_id None"
    assert only(dataset)[1].annotation_id == 7


def squares(*boxes, **fields):
    """Objects with these boxes (x, y, width, height) and their outlines."""
    return [
        {**SQUARE, "id": k, "bbox": [x, y, w, h], "segmentation": [[x, y, x + w, y, x + w, y + h, x, y + h]], **fields}
        for k, (x, y, w, h) in enumerate(boxes, start=1)
    ]


BOXES = (10, 20, 40, 30), (30, 10, 20, 40), (20, 20, 50, 10)


@pytest.mark.parametrize("segmented", [True, False])
def test_boxes_written_as_corners_or_fractions_are_recognised(tmp_path, segmented):
    def write_as(convert, scale=(1, 1)):
        entries = squares(*BOXES)
        for entry, box in zip(entries, BOXES, strict=True):
            entry["bbox"] = convert(*box)
            polygon = np.array(entry["segmentation"][0]).reshape(-1, 2) * scale
            entry["segmentation"] = [polygon.ravel().tolist()] if segmented else []
        return entries

    image = {**CONTENT["images"][0], "height": 60, "width": 80}
    expected = [(x, y, x + w, y + h) for x, y, w, h in BOXES]
    # Without outlines, corners are told by boxes of which most would leave the image.
    far = [(60, 40, 20, 20)] * 4 if not segmented else []
    corners = load(
        tmp_path / "corners",
        *write_as(lambda x, y, w, h: [x, y, x + w, y + h]),
        *squares(*[(x, y, x + w, y + h) for x, y, w, h in far], segmentation=[]),
        images=[image],
    )
    found = [instance.box_xyxy_px for instance in corners.images[0].instances]
    assert found[:3] == expected
    fractions = load(
        tmp_path / "fractions",
        *write_as(lambda x, y, w, h: [x / 80, y / 60, w / 80, h / 60], scale=(1 / 80, 1 / 60)),
        images=[image],
    )
    for instance, box in zip(fractions.images[0].instances, expected, strict=True):
        assert instance.box_xyxy_px == pytest.approx(box)
        if segmented:
            area = (box[2] - box[0]) * (box[3] - box[1])
            assert instance_mask(fractions.images[0], instance).sum() == area


@pytest.mark.parametrize(
    ("written", "reason"),
    [
        (lambda polygon: polygon / (80, 60), "polygons that are fractions of the image"),
        (lambda polygon: polygon[:, ::-1], "polygons written as (y, x), not (x, y)"),
    ],
    ids=["fractions", "yx"],
)
def test_polygons_that_fit_their_boxes_otherwise_are_read_so(tmp_path, written, reason):
    entries = squares(*BOXES)
    for entry in entries:
        entry["segmentation"] = [written(np.array(entry["segmentation"][0]).reshape(-1, 2)).ravel().tolist()]
    data = load(tmp_path, *entries, images=[{**CONTENT["images"][0], "height": 60, "width": 80}])
    assert data.notes.counts() == {reason: 1}
    for instance, (x, y, w, h) in zip(data.images[0].instances, BOXES, strict=True):
        expected = np.zeros((60, 80), bool)
        expected[y : y + h, x : x + w] = True
        assert np.array_equal(instance_mask(data.images[0], instance), expected)


@pytest.mark.parametrize(
    "fields",
    [
        {"bbox": [4, 3, 2, 4, 90]},  # Detectron2: centre, size, degrees
        {"bbox": [3, 1, 2, 4], "attributes": {"rotation": 90}},  # CVAT: the box before it is turned
    ],
    ids=["detectron2", "cvat"],
)
def test_a_rotated_box_is_an_outline(tmp_path, fields):
    rotated = {**SQUARE, "id": 8, "segmentation": [], **fields}
    dataset = load(tmp_path, SQUARE, rotated)
    instance = dataset.images[0].instances[1]
    assert instance.box_xyxy_px == pytest.approx((2, 2, 6, 4)) and instance.has_mask
    mask = instance_mask(dataset.images[0], instance)
    assert mask[2:4, 2:6].all() and mask.sum() == 8


def test_super_categories_without_objects_are_no_classes(tmp_path):
    root = [{"id": 0, "name": "pets", "supercategory": "none"}]
    own = [{"id": 4, "name": "cat", "supercategory": "pets"}, {"id": 30, "name": "dog", "supercategory": "pets"}]
    dataset = load(tmp_path, SQUARE, categories=root + own)
    assert dataset.class_names == ("cat", "dog")
    used = load(tmp_path, SQUARE, {**SQUARE, "id": 8, "category_id": 0}, categories=root + own)
    assert used.class_names == ("pets", "cat", "dog")
    alone = load(tmp_path, categories=[{"id": 1, "name": "cell", "supercategory": "cell"}])
    assert alone.class_names == ("cell",)


def test_classes_of_one_name_are_told_apart(tmp_path):
    cats = [{"id": 4, "name": "cat"}, {"id": 9, "name": "cat"}, {"id": 30, "name": "cat"}]
    dataset = load(tmp_path, {**SQUARE, "category_id": 9}, categories=cats)
    assert dataset.class_names == ("cat (id 4)", "cat", "cat (id 30)")  # the name is that of the class with objects
    assert dataset.notes.counts() == {"class name of another category": 2}


def test_a_split_without_objects_says_what_it_holds(tmp_path):
    crowd = {**SQUARE, "iscrowd": 1}
    with pytest.raises(UserError, match=r"no object to learn in 2 image\(s\): 1 crowd region.*\n.*\n.*--no-crowd"):
        load(tmp_path, crowd).require_objects("learn")
    with pytest.raises(UserError, match=r"no object to learn.*1 skipped annotation.*\n.*\n.*category_id 1"):
        load(tmp_path, {**SQUARE, "category_id": 1}).require_objects("learn")
    load(tmp_path, SQUARE).require_objects("learn")
    strange = [{**SQUARE, "id": k, "category_id": 1} for k in range(10)]
    with pytest.raises(UserError, match=r"only 1 object\(s\) to learn.*10 skipped annotation"):
        load(tmp_path, SQUARE, *strange).require_objects("learn")
    load(tmp_path, SQUARE, *strange[:9]).require_objects("learn")


# --- faults of the file ------------------------------------------------------------------------------


def changed(path, value):
    """CONTENT with the entry at `path` set, or removed where `value` is the ellipsis."""
    content = copy.deepcopy(CONTENT)
    *front, last = path
    target = content
    for key in front:
        target = target[key]
    if value is ...:
        del target[last]
    else:
        target[last] = value
    return content


TWO_IMAGES, TWO_CATEGORIES = CONTENT["images"], CONTENT["categories"]


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("{", "not JSON"),
        ("[]", "the file is of type list"),
        ('[{"image_id": 1, "score": 0.5}]', "looks like detections in COCO's results format"),
        ('{"shapes": []}', "looks like a LabelMe file: maskrcnn data convert labelme"),
        (changed(["annotations", 0], {"id": 7, "image_id": 1, "segments_info": []}), "panoptic annotations"),
        (changed(["images"], ...), "the file has no key 'images'"),
        (changed(["annotations"], {}), "'annotations'"),
        (changed(["images"], []), "no images"),
        (changed(["categories"], [3]), "no categories"),
        (changed(["images", 1, "id"], 5), "image id 5 occurs twice"),
        (changed(["categories", 1, "id"], 30), "category id 30 occurs twice"),
    ],
    ids=lambda value: value if isinstance(value, str) and len(value) < 60 else "",
)
def test_structure_errors_name_the_file_and_the_place(tmp_path, content, text):
    write(tmp_path, content)
    with pytest.raises(UserError, match=rf".*instances_val\.json.*: .*{text}"):
        CocoDataset.load(tmp_path, "val")


def test_entries_of_images_and_categories_are_completed(tmp_path):
    content = copy.deepcopy(CONTENT)
    five, two = content["images"]
    five |= {"id": "5", "height": None}
    two |= {"id": "b1f0", "file_name": "C:\\data\\val\\sub\\two.png", "width": "4"}
    content["images"] += [{"id": 9}, {"file_name": "no id.png"}, 3]
    content["categories"] = [{"id": 30.0, "name": None}, {"id": "cat", "name": "cat"}]
    content["annotations"] = [
        SQUARE,
        {**SQUARE, "id": 8, "image_id": "b1f0", "category_id": "cat", "bbox": [0, 0, 2, 2]},
    ]
    write(tmp_path, content)
    Image.new("RGB", (WIDTH, HEIGHT)).save(tmp_path / "val" / "five.png")
    dataset = CocoDataset.load(tmp_path, "val")
    first, second = dataset.images
    assert (first.id, first.height, first.width) == (5, HEIGHT, WIDTH)
    assert (second.id, second.path, second.width) == (10, tmp_path / "val" / "sub" / "two.png", 4)
    assert dataset.class_names == ("category 30", "cat") and dataset.category_ids == (30, 31)
    assert [instance.label for record in dataset.images for instance in record.instances] == [1, 2]
    assert dataset.image_keys == {"b1f0": 10} and dataset.category_keys == {"cat": 31}
    assert set(dataset.notes.counts()) == {
        "image id that is not an integer",
        "image without a usable id left out",
        "image without a file name left out",
        "image size missing, taken from the image file",
        "category id that is not an integer",
        "category without a name",
    }


def test_a_file_without_categories_has_those_of_its_annotations(tmp_path):
    dataset = load(tmp_path, SQUARE, {**SQUARE, "id": 8, "category_id": 2}, categories=None)
    assert dataset.class_names == ("2", "30") and dataset.category_ids == (2, 30)


@pytest.mark.parametrize(
    "name",
    [
        "sub/../sub/./two.png",
        "../val/sub/two.png",
        "/mnt/data/val/sub/two.png",
        "s3://bucket/val/two.png",
        "SUB/TWO.PNG",
    ],
)
def test_paths_of_other_folders_and_systems_lead_to_the_image(tmp_path, name):
    write(tmp_path, changed(["images", 1, "file_name"], name))
    assert CocoDataset.load(tmp_path, "val").images[1].path == tmp_path / "val" / "sub" / "two.png"


@pytest.mark.parametrize("name", ["../secret.png", "/etc/passwd", "sub/../../secret.png"])
def test_files_outside_the_image_folder_are_not_read(tmp_path, name):
    write(tmp_path, changed(["images", 1, "file_name"], name))
    (tmp_path / "secret.png").touch()
    with pytest.raises(UserError, match=r"1 of 2 images of .* are missing"):
        CocoDataset.load(tmp_path, "val")


def test_missing_annotation_file_and_missing_images(tmp_path):
    with pytest.raises(UserError, match="is not a dataset: it is empty"):
        CocoDataset.load(tmp_path, "val")
    write(tmp_path, images=False)
    with pytest.raises(UserError, match=r"2 of 2 images of .* are missing, the first is .*five\.png"):
        CocoDataset.load(tmp_path, "val")
    write(tmp_path)
    (tmp_path / "val" / "sub" / "two.png").unlink()
    with pytest.raises(UserError, match=r"1 of 2 images of .* are missing, the first is .*two\.png"):
        CocoDataset.load(tmp_path, "val")


# --- values for the evaluation -----------------------------------------------------------------------


def test_ids_that_the_evaluation_would_misread_are_renumbered(tmp_path):
    copies = [{**SQUARE, "id": given} for given in (0, 7, 7, -1, "a", 9)]
    del copies[4]["id"]
    dataset = load(tmp_path, *copies)
    assert [i.annotation_id for i in dataset.images[0].instances] == [10, 7, 11, 12, 13, 9]
    assert sorted(dataset.images.objects("annotation_id")) == [7, 9, 10, 11, 12, 13]


def test_areas_and_crowd_flags_are_the_files(tmp_path):
    crowd = {**SQUARE, "id": 11, "iscrowd": 1, "segmentation": RLE, "area": 5.5}
    _, instance = only(load(tmp_path, crowd))
    assert (instance.annotation_id, instance.is_crowd, instance.area_px) == (11, True, 5.5)


# --- real data ---------------------------------------------------------------------------------------


def real(name):
    if not (REAL / name).is_dir():
        pytest.skip(f"no dataset {name} in {REAL} (MASKRCNN_DATA)")
    return REAL / name


def test_real_coco_is_read_completely():
    root = real("coco")
    train, val = (CocoDataset.load(root, find_split(root, kind)) for kind in ("train", "val"))
    assert (train.split, val.split) == ("train2017", "val2017")
    assert train.skipped == val.skipped == {}
    assert (len(train.images), len(val.images), len(val.class_names)) == (90, 66, 80)
    instances = [[i for record in d.images for i in record.instances] for d in (train, val)]
    assert [len(found) for found in instances] == [803, 560]
    assert sum(i.is_crowd for found in instances for i in found) == 17
    assert val.class_names[0] == "person" and val.category_ids[-1] == 90


@pytest.mark.parametrize("name", ["coco", "nuclei"])
def test_real_masks_fit_their_boxes_and_areas(name):
    root = real(name)
    dataset = CocoDataset.load(root, find_split(root, "val"))
    assert dataset.skipped == {}
    for record in dataset.images:
        for instance in record.instances[:10]:
            mask = instance_mask(record, instance)
            rows, columns = np.nonzero(mask)
            drawn = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
            # Spikes thinner than a pixel belong to the official boxes but leave no pixel in the mask.
            np.testing.assert_allclose(drawn, instance.box_xyxy_px, atol=4)
            assert mask.sum() == pytest.approx(instance.area_px, rel=0.1, abs=25)


def test_annotations_and_images_may_lie_anywhere(shapes, tmp_path):
    annotations = tmp_path / "truth.json"
    annotations.write_bytes((shapes / "annotations" / "instances_val.json").read_bytes())
    apart = CocoDataset.read(annotations, shapes / "val")
    usual = CocoDataset.load(shapes, "val")
    assert apart.annotation_path == annotations and len(apart.images) == 6
    assert [record.path for record in apart.images] == [record.path for record in usual.images]
    boxes = usual.images.objects("bbox")
    assert len(boxes)
    np.testing.assert_array_equal(apart.images.objects("bbox"), boxes)


def test_images_with_more_objects_than_a_model_returns(shapes):
    dataset = CocoDataset.load(shapes, "train")
    counts = [len(record.instances) for record in dataset.images]
    most = max(counts)
    assert crowded_line(dataset, most) is None
    line = crowded_line(dataset, most - 1)
    assert f"{counts.count(most)} of 12 images have more objects than the {most - 1} detections" in line
    assert f"at least {counts.count(most)} of {sum(counts)} objects cannot be found" in line
    assert f"model.detections={most}" in line
    assert "and no fewer model.proposals" in line
    narrow = crowded_line(dataset, most, most - 2, most - 1)
    assert f"more objects than the {most - 2} candidates of the model" in narrow
    assert f"--set model.candidates={most} --set model.proposals={most}" in narrow
    assert "detections=" not in narrow and "no fewer" not in narrow


def test_what_is_trained_on_may_leave_out_images_and_take_in_crowd_regions(tmp_path):
    """The first of the two images has an object and a crowd region, or the region alone."""
    crowd = {**SQUARE, "id": 8, "iscrowd": 1}
    both, alone = load(tmp_path, SQUARE, crowd), load(tmp_path, crowd)
    assert [each.labels_of_images() for each in (both, alone)] == [[[2], []], [[], []]]

    def found(dataset, **changes):
        chosen = dataset.for_training(**{"empty_images": True, "crowd_objects": False, **changes})
        return [(record.id, sum(not each.is_crowd for each in record.instances)) for record in chosen.images]

    assert found(both) == [(5, 1), (2, 0)]
    assert found(both, empty_images=False) == [(5, 1)]
    assert found(both, crowd_objects=True) == [(5, 2), (2, 0)]
    assert found(alone, crowd_objects=True, empty_images=False) == [(5, 1)]
    with pytest.raises(UserError, match=r"no object to learn in 2 image.*1 crowd region.*\n.*\n.*--crowd-objects"):
        alone.for_training(empty_images=False, crowd_objects=False).require_objects("learn")

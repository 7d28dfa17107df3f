"""Faults planted in a clean dataset: each is found once, and nothing else."""

import json
import math
import shutil

import numpy as np
import pytest
from PIL import Image

from maskrcnn.data.check import check_dataset
from maskrcnn.data.check_report import DatasetReport, draw_findings

ORIENTATION_TAG = 0x0112  # EXIF orientation


class Planted:
    """A copy of the shapes dataset whose files a test spoils."""

    def __init__(self, root):
        self.root = root
        self.content = {split: json.loads(self.file(split).read_text()) for split in ("train", "val")}
        self.train = self.content["train"]

    def file(self, split):
        return self.root / "annotations" / f"instances_{split}.json"

    def image(self, number, split="train"):
        return self.root / split / self.content[split]["images"][number]["file_name"]

    def annotations_of(self, number):
        image_id = self.train["images"][number]["id"]
        return [a for a in self.train["annotations"] if a["image_id"] == image_id]

    def largest_of(self, number):
        return max(self.annotations_of(number), key=lambda a: a["area"])

    def add(self, number, box, **changes):
        x, y, width, height = box
        outline = [x, y, x + width, y, x + width, y + height, x, y + height]
        self.train["annotations"].append(
            {
                "id": 5000 + len(self.train["annotations"]),
                "image_id": self.train["images"][number]["id"],
                "category_id": 1,
                "bbox": list(box),
                "area": width * height,
                "iscrowd": 0,
                "segmentation": [outline],
                **changes,
            }
        )

    def check(self, **arguments) -> DatasetReport:
        for split, content in self.content.items():
            self.file(split).write_text(json.dumps(content))
        return check_dataset(self.root, workers=2, **arguments)


@pytest.fixture
def data(shapes, tmp_path):
    return Planted(shutil.copytree(shapes, tmp_path / "data"))


def counts(report):
    return {
        name: len(found) for is_error in (True, False) for name, found in report.by_problem(is_error=is_error).items()
    }


def cut_file(data):
    data.image(0).write_bytes(data.image(0).read_bytes()[:300])


def rotated(data):
    image = Image.open(data.image(0))
    exif = image.getexif()
    exif[ORIENTATION_TAG] = 6
    image.save(data.image(0), exif=exif)


def rotated_and_of_other_size(data):
    rotated(data)
    exif = Image.open(data.image(0)).getexif()
    Image.open(data.image(0)).resize((96, 80)).save(data.image(0), exif=exif)
    data.train["images"][0] |= {"height": 80 + 40, "width": 80}


def tiny_mask(data):
    data.add(0, (5, 5, 2, 1))


def exact_copy(data):
    data.train["annotations"].append({**data.largest_of(0), "id": 7000})


def nearly_a_copy(data):
    data.add(0, (10, 10, 60, 60))
    data.add(0, (10, 10, 60, 61))


def other_ids(data):
    data.content["val"]["categories"].append({"id": 9, "name": "star"})


def without_a_class(data):
    data.train["annotations"] = [a for a in data.train["annotations"] if a["category_id"] != 2]


def wrong_structure(data):
    data.train["images"] = {}


POINTS = [10, 20, 2, 30, 40, 1]


def with_keypoints(data, **changes):
    """A first object with two keypoints, whose category names two in both splits."""
    for content in data.content.values():
        content["categories"][0]["keypoints"] = ["head", "tail"]
    data.add(0, (5, 5, 60, 70), **{"keypoints": POINTS, "num_keypoints": 2, **changes})


def keypoints_of_other_names(data):
    with_keypoints(data)
    data.content["val"]["categories"][0]["keypoints"] = ["tail", "head"]


def categories_of_other_keypoints(data):
    with_keypoints(data)
    del data.content["val"]["categories"][0]["keypoints"]
    data.train["categories"][1]["keypoints"] = ["wheel"]


def added(*box, **changes):
    """Plants an object."""
    return lambda data: data.add(0, box, **changes)


def keypoints(**changes):
    """Plants an object with keypoints."""
    return lambda data: with_keypoints(data, **changes)


ERRORS = {
    "empty_file": (lambda data: data.image(0).write_bytes(b""), "unreadable image", "empty file"),
    "cut_file": (cut_file, "unreadable image", "cannot be decoded"),
    "no_file": (lambda data: data.image(0).unlink(), "missing image", "000000.png"),
    "other_size": (
        lambda data: Image.open(data.image(0)).resize((96, 80)).save(data.image(0)),
        "image of another size than its entry says",
        "96×80 pixels in the file, 96×96 in the JSON",
    ),
    "rotated_and_of_other_size": (
        rotated_and_of_other_size,
        "image of another size than its entry says",
        "EXIF orientation 6",
    ),
    "other_ids": (other_ids, "category ids that differ between splits", "only in val: 9"),
    "wrong_structure": (wrong_structure, "annotation file that cannot be used", "of type dict at 'images'"),
}
LEFT_OUT = "annotation left out of training: "
REMARKS = {
    "scaled": (
        lambda data: Image.open(data.image(0)).resize((48, 48)).save(data.image(0)),
        "image of another size than its entry says, to which it is scaled",
        "48×48 pixels in the file, 96×96 in the JSON",
    ),
    "transparent": (
        lambda data: Image.fromarray(np.full((96, 96, 4), 99, np.uint8)).save(data.image(0)),
        "image that is not read completely",
        "transparency, which is dropped; train with --set model.channels=4",
    ),
    "box_without_width": (added(5, 5, 0, 10, segmentation=[]), LEFT_OUT + "invalid box", "[5, 5, 0, 10]"),
    "unknown_image": (added(5, 5, 20, 10, image_id=98765), LEFT_OUT + "unknown image", "98765"),
    "outside": (added(500, 5, 20, 10), LEFT_OUT + "box outside the image", "[500, 5, 20, 10]"),
    "no_segmentation": (
        added(5, 5, 20, 10, segmentation=[]),
        "objects with a box but without a mask: no segmentation",
        "1, first: annotation",
    ),
    "flat_segmentation": (
        added(5, 5, 20, 10, segmentation=[5, 5, 25, 5, 25, 15, 5, 15]),
        "repaired when read: segmentation that is one flat list",
        "8 numbers",
    ),
    "mask_of_another_size": (
        added(5, 5, 20, 10, segmentation={"size": [10, 10], "counts": [50, 50]}),
        "objects with a box but without a mask: mask of another size than the image",
        "[10, 10]",
    ),
    "thin_box": (
        added(5, 5, 0.6, 70, segmentation=[[5, 5, 25, 5, 25, 30]]),
        "box with a side below one pixel",
        "0.60×70.00 px",
    ),
    "tiny_mask": (tiny_mask, "mask of fewer than 4 pixels", "2 pixel(s)"),
    "empty_mask": (
        added(5, 5, 12, 12, segmentation=[[5, 5, 17, 17, 5, 5.01]]),
        "mask of fewer than 4 pixels",
        "0 pixel(s)",
    ),
    "box_elsewhere": (
        added(5, 5, 20, 10, segmentation=[[60, 60, 90, 60, 90, 90, 60, 90]]),
        "box that does not fit its mask",
        "IoU 0.00 of box [5, 5, 25, 15]",
    ),
    "exact_copy": (exact_copy, "object annotated twice", "mask IoU 1.00, box IoU 1.00"),
    "nearly_a_copy": (nearly_a_copy, "object annotated twice", "mask IoU 0.98"),
    "copied_image": (
        lambda data: shutil.copy(data.image(0), data.image(1)),
        "the same image twice in a split",
        "000000.png",
    ),
    "leaked_image": (
        lambda data: shutil.copy(data.image(0), data.image(0, "val")),
        "the same image in several splits",
        "of train",
    ),
    "other_name": (
        lambda data: data.content["val"]["categories"][0].update(name="disc"),
        "class names that differ between splits",
        "'circle' in train, 'disc' here",
    ),
    "keypoints_of_wrong_length": (
        keypoints(keypoints=POINTS[:4]),
        "repaired when read: malformed keypoints, left out of their object",
        "4 numbers instead of 3 for each of 2",
    ),
    "keypoint_outside": (
        keypoints(keypoints=[10, 20, 2, 96.5, 40, 1]),
        "visible keypoint outside the image",
        "number 2 at (96.5, 40), image 96×96",
    ),
    "miscounted_keypoints": (
        keypoints(num_keypoints=1),
        "number of keypoints that is not what num_keypoints says",
        "2 labelled, num_keypoints 1",
    ),
    "keypoints_of_other_names": (
        keypoints_of_other_names,
        "keypoint names that differ between splits",
        "tail, head; in train: head, tail",
    ),
    "categories_of_other_keypoints": (
        categories_of_other_keypoints,
        "keypoints that cannot be learnt",
        "categories 1 and 2 with different keypoints",
    ),
    "without_a_class": (without_a_class, "class without objects", "category id 2"),
}


def test_a_clean_dataset_has_no_findings(data):
    report = data.check()
    assert counts(report) == {}
    assert [split.split for split in report.splits] == ["train", "val"]
    assert "errors, at which training stops: none" in report.text()


@pytest.mark.parametrize("fault", [*ERRORS, *REMARKS])
def test_each_fault_is_found_once_and_named(data, fault):
    plant, name, detail = (ERRORS | REMARKS)[fault]
    plant(data)
    report = data.check()
    found = counts(report)
    if fault == "other_ids":  # the new class has no objects, which is a fault as well
        assert found.pop("class without objects") == 1
    assert found == {name: 1}
    (finding,) = (f for f in report.findings if f.problem.name == name)
    assert finding.problem.is_error == (fault in ERRORS)
    assert detail in finding.detail
    assert f"1 × {name}" in report.text() and finding.detail in report.text()


def test_several_faults_are_all_found(data):
    cut_file(data)  # image 0
    shutil.copy(data.image(1), data.image(2))
    shutil.copy(data.image(1), data.image(3))
    data.add(4, (5, 5, 0, 10), segmentation=[])
    data.add(5, (5, 5, math.nan, 10), segmentation=[])
    exact_copy(data)
    data.train["annotations"].append({**data.largest_of(0), "id": 7001})
    assert counts(data.check()) == {
        "unreadable image": 1,
        "annotation left out of training: invalid box": 2,
        "object annotated twice": 2,  # of three copies
        "the same image twice in a split": 2,
    }


def test_an_unusable_annotation_file_does_not_end_the_check(data):
    data.file("val").write_text("{")
    del data.content["val"]
    cut_file(data)
    report = data.check()
    assert counts(report) == {"annotation file that cannot be used": 1, "unreadable image": 1}
    assert [split.split for split in report.splits] == ["train"]


def test_another_class_or_a_crowd_in_the_same_place_is_not_a_duplicate(data):
    data.add(0, (10, 10, 60, 60))
    data.add(0, (10, 10, 60, 60), category_id=2)
    runs = {"size": [96, 96], "counts": [970, 60, 96 * 96 - 1030]}
    data.add(0, (10, 10, 60, 60), iscrowd=1, segmentation=runs)
    assert counts(data.check()) == {}


def test_statistics_of_a_split(data):
    data.train["images"] = data.train["images"][:3]
    data.train["annotations"] = []
    data.add(0, (0, 0, 31, 33))  # 1023
    data.add(0, (40, 0, 32, 32))  # 1024
    data.add(1, (0, 0, 96, 96), category_id=2)  # 9216
    data.add(1, (0, 0, 20, 20), iscrowd=1, segmentation={"size": [96, 96], "counts": [0, 400, 96 * 96 - 400]})
    split = data.check(splits=["train"]).splits[0]
    assert split.objects == {"circle": (1, 1, 0), "rectangle": (0, 0, 1), "triangle": (0, 0, 0)}
    assert (split.images, split.images_without_objects, split.crowd_regions) == (3, 1, 1)
    assert (split.objects_per_image_median, split.objects_per_image_max, split.object_count) == (1, 2, 3)
    assert split.smallest_image_hw == split.largest_image_hw == (96, 96)


def test_objects_with_keypoints_are_counted(data):
    with_keypoints(data)
    data.add(1, (5, 5, 60, 70), keypoints=[0] * 6, num_keypoints=0)
    report = data.check()
    assert counts(report) == {}
    assert [split.objects_with_keypoints for split in report.splits] == [1, 0]
    assert report.text().count("1 objects with keypoints") == 1


def test_a_split_of_crowd_regions_is_an_error_where_it_is_to_be_learnt(data):
    for split in ("train", "val"):
        data.content[split]["annotations"] = []
    data.add(0, (5, 5, 20, 10), iscrowd=1)
    report = data.check()
    errors, remarks = (report.by_problem(is_error=is_error) for is_error in (True, False))
    assert "1 crowd region(s)" in errors["split without an object to learn"][0].detail
    assert [f.split for f in remarks["split without an object: AP cannot be measured"]] == ["val"]


def test_the_number_of_images_is_limited(data, tmp_path):
    cut_file(data)
    for k in range(4):
        data.add(1, (5 + 10 * k, 5, 2, 1))
    report = data.check()
    assert draw_findings(report, tmp_path / "out", per_problem=3) == 4  # the unreadable image has none
    found = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert found == [*(f"mask-of-fewer-than-4-pixels-0{n}-000001.png" for n in (1, 2, 3)), "samples.png"]


def test_small_objects_are_enlarged(data, tmp_path):
    big = np.full((400, 500, 3), 90, np.uint8)
    Image.fromarray(big).save(data.image(0))
    data.train["images"] = data.train["images"][:1]
    data.train["images"][0] |= {"height": 400, "width": 500}
    data.train["annotations"] = []
    data.add(0, (200, 100, 2, 1))
    data.add(0, (10, 10, 400, 300), segmentation=[[450, 350, 490, 350, 490, 390]])
    draw_findings(data.check(splits=["train"]), tmp_path / "out", per_problem=1)
    small = Image.open(tmp_path / "out" / "mask-of-fewer-than-4-pixels-01-000000.png")
    large = Image.open(tmp_path / "out" / "box-that-does-not-fit-its-mask-01-000000.png")
    assert small.width == 1280 and large.width == 640
    red = (np.asarray(small)[:, 640:] == (255, 64, 64)).all(-1)
    assert red.sum() > 100  # outline and label in the enlarged part


def test_boxes_of_skipped_annotations_are_drawn_anywhere(data, tmp_path):
    data.add(0, (5, 5, -30, 10))
    data.add(1, (1e12, -1e12, 3, 3))
    data.add(2, (20, 20, 0, 0))
    for annotation in data.train["annotations"][-3:]:
        annotation["segmentation"] = []
    assert draw_findings(data.check(), tmp_path / "out", per_problem=9) == 3


def test_the_contact_sheet_is_the_same_every_time(data, tmp_path):
    report = data.check()
    for name in ("first", "second"):
        assert draw_findings(report, tmp_path / name, per_problem=1) == 1
    first, second = ((tmp_path / name / "samples.png").read_bytes() for name in ("first", "second"))
    assert first == second and Image.open(tmp_path / "first" / "samples.png").width == 4 * 326


def test_the_command_fails_on_errors_and_if_strict_on_remarks(data, run, tmp_path):
    command = ("data", "check", data.root)
    assert run(*command, "--strict")[0] == 0
    tiny_mask(data)
    data.check()
    code, out, _ = run(*command, "--json", "report.json", "--output", "out")
    assert code == 0 and "1 × mask of fewer than 4 pixels" in out
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["errors"] == {} and report["remarks"]["mask of fewer than 4 pixels"]["count"] == 1
    assert report["splits"][0]["objects"]["circle"]["all"] > 0
    assert (tmp_path / "out" / "samples.png").is_file()
    assert run(*command, "--strict")[0] == 1
    cut_file(data)
    code, out, _ = run(*command, "--split", "train")
    assert code == 1 and "1 × unreadable image" in out
    assert run(*command, "--split", "val", "--strict")[0] == 0

"""Faults planted in a clean dataset: each is found once, under its name, and nothing else is."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from maskrcnn import cli
from maskrcnn.data.check import check_dataset
from maskrcnn.data.check_report import DatasetReport, contact_sheet, write_pictures
from maskrcnn.errors import UserError

UPRIGHT_TAG = 0x0112  # EXIF orientation


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
        finding_name: len(found) for e in (True, False) for finding_name, found in report.by_problem(is_error=e).items()
    }


def empty_file(data):
    data.image(0).write_bytes(b"")


def cut_file(data):
    data.image(0).write_bytes(data.image(0).read_bytes()[:300])


def no_file(data):
    data.image(0).unlink()


def other_size(data):
    Image.open(data.image(0)).resize((96, 80)).save(data.image(0))


def turned(data):
    image = Image.open(data.image(0))
    exif = image.getexif()
    exif[UPRIGHT_TAG] = 6
    image.save(data.image(0), exif=exif)


def turned_and_of_other_size(data):
    turned(data)
    exif = Image.open(data.image(0)).getexif()
    Image.open(data.image(0)).resize((96, 80)).save(data.image(0), exif=exif)
    data.train["images"][0] |= {"height": 80 + 16, "width": 80}


def box_without_width(data):
    data.add(0, (5, 5, 0, 10))


def unknown_image(data):
    data.add(0, (5, 5, 20, 10), image_id=98765)


def outside(data):
    data.add(0, (500, 5, 20, 10))


def no_segmentation(data):
    data.add(0, (5, 5, 20, 10), segmentation=[])


def mask_of_another_size(data):
    data.add(0, (5, 5, 20, 10), segmentation={"size": [10, 10], "counts": [50, 50]})


def thin_box(data):
    data.add(0, (5, 5, 0.6, 70), segmentation=[[5, 5, 25, 5, 25, 30]])


def tiny_mask(data):
    data.add(0, (5, 5, 2, 1))


def empty_mask(data):
    data.add(0, (5, 5, 12, 12), segmentation=[[5, 5, 17, 17, 5, 5.01]])


def box_elsewhere(data):
    data.add(0, (5, 5, 20, 10), segmentation=[[60, 60, 90, 60, 90, 90, 60, 90]])


def exact_copy(data):
    data.train["annotations"].append({**data.largest_of(0), "id": 7000})


def nearly_a_copy(data):
    data.add(0, (10, 10, 60, 60))
    data.add(0, (10, 10, 60, 61))


def copied_image(data):
    shutil.copy(data.image(0), data.image(1))


def leaked_image(data):
    shutil.copy(data.image(0), data.image(0, "val"))


def other_ids(data):
    data.content["val"]["categories"].append({"id": 9, "name": "star"})


def other_name(data):
    data.content["val"]["categories"][0]["name"] = "disc"


def without_a_class(data):
    data.train["annotations"] = [a for a in data.train["annotations"] if a["category_id"] != 2]


def wrong_structure(data):
    del data.train["images"][0]["height"]


POINTS = [10, 20, 2, 30, 40, 1]


def with_keypoints(data, **changes):
    """A first object with two keypoints, whose category names two in both splits."""
    for content in data.content.values():
        content["categories"][0]["keypoints"] = ["head", "tail"]
    data.add(0, (5, 5, 60, 70), **{"keypoints": POINTS, "num_keypoints": 2, **changes})


def keypoints_of_wrong_length(data):
    with_keypoints(data, keypoints=POINTS[:4])


def keypoint_outside(data):
    with_keypoints(data, keypoints=[10, 20, 2, 96.5, 40, 1])


def miscounted_keypoints(data):
    with_keypoints(data, num_keypoints=1)


def keypoints_of_other_names(data):
    with_keypoints(data)
    data.content["val"]["categories"][0]["keypoints"] = ["tail", "head"]


def categories_of_other_keypoints(data):
    with_keypoints(data)
    del data.content["val"]["categories"][0]["keypoints"]
    data.train["categories"][1]["keypoints"] = ["wheel"]


ERRORS = {
    empty_file: ("unreadable image", "empty file"),
    cut_file: ("unreadable image", "cannot be decoded"),
    no_file: ("missing image", "000000.png"),
    other_size: ("image of another size than its entry says", "96×80 pixels in the file, 96×96 in the JSON"),
    turned_and_of_other_size: ("image of another size than its entry says", "EXIF orientation 6"),
    other_ids: ("category ids that differ between splits", "only in val: 9"),
    wrong_structure: ("annotation file that cannot be used", "no key 'height'"),
}
LEFT_OUT = "annotation left out of training: "
REMARKS = {
    turned: ("image with an EXIF orientation, which training does not apply", "orientation 6"),
    box_without_width: (LEFT_OUT + "invalid box", "[5, 5, 0, 10]"),
    unknown_image: (LEFT_OUT + "unknown image", "98765"),
    outside: (LEFT_OUT + "box outside the image", "[500, 5, 20, 10]"),
    no_segmentation: (LEFT_OUT + "no segmentation", "[]"),
    mask_of_another_size: (LEFT_OUT + "mask of another size than the image", "[10, 10]"),
    thin_box: ("box with a side below one pixel", "0.60×70.00 px"),
    tiny_mask: ("mask of fewer than 4 pixels", "2 pixel(s)"),
    empty_mask: ("mask of fewer than 4 pixels", "0 pixel(s)"),
    box_elsewhere: ("box that does not fit its mask", "IoU 0.00 of box [5, 5, 25, 15]"),
    exact_copy: ("object annotated twice", "mask IoU 1.00, box IoU 1.00"),
    nearly_a_copy: ("object annotated twice", "mask IoU 0.98"),
    copied_image: ("the same image twice in a split", "000000.png"),
    leaked_image: ("the same image in several splits", "of train"),
    other_name: ("class names that differ between splits", "'circle' in train, 'disc' here"),
    keypoints_of_wrong_length: (LEFT_OUT + "malformed keypoints", "4 numbers instead of 3 for each of 2"),
    keypoint_outside: ("visible keypoint outside the image", "number 2 at (96.5, 40), image 96×96"),
    miscounted_keypoints: ("number of keypoints that is not what num_keypoints says", "2 labelled, num_keypoints 1"),
    keypoints_of_other_names: ("keypoint names that differ between splits", "tail, head; in train: head, tail"),
    categories_of_other_keypoints: ("keypoints that cannot be learnt", "categories 1 and 2 with different keypoints"),
    without_a_class: ("class without objects", "category id 2"),
}


def test_a_clean_dataset_has_no_findings(data):
    report = data.check()
    assert counts(report) == {}
    assert [figures.split for figures in report.splits] == ["train", "val"]
    assert "errors, at which training stops: none" in report.text()


@pytest.mark.parametrize("plant", [*ERRORS, *REMARKS], ids=lambda plant: plant.__name__)
def test_each_fault_is_found_once_and_named(data, plant):
    name, detail = (ERRORS | REMARKS)[plant]
    plant(data)
    report = data.check()
    found = counts(report)
    if plant is other_ids:  # the new class has no objects, which is a fault as well
        assert found.pop("class without objects") == 1
    assert found == {name: 1}
    (finding,) = (f for f in report.findings if f.problem.name == name)
    assert finding.problem.is_error == (plant in ERRORS)
    assert detail in finding.detail
    assert f"1 × {name}" in report.text() and finding.detail in report.text()


def test_faults_together_are_all_found(data):
    cut_file(data)  # image 0
    shutil.copy(data.image(1), data.image(2))
    shutil.copy(data.image(1), data.image(3))
    data.add(4, (5, 5, 0, 10))
    data.add(5, (5, 5, -3, 10))
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
    assert [figures.split for figures in report.splits] == ["train"]


def test_same_place_but_another_class_or_a_crowd_is_no_copy(data):
    data.add(0, (10, 10, 60, 60))
    data.add(0, (10, 10, 60, 60), category_id=2)
    runs = {"size": [96, 96], "counts": [970, 60, 96 * 96 - 1030]}
    data.add(0, (10, 10, 60, 60), iscrowd=1, segmentation=runs)
    assert counts(data.check()) == {}


def test_figures_of_a_split(data):
    data.train["images"] = data.train["images"][:3]
    data.train["annotations"] = []
    data.add(0, (0, 0, 31, 33))  # 1023
    data.add(0, (40, 0, 32, 32))  # 1024
    data.add(1, (0, 0, 96, 96), category_id=2)  # 9216
    data.add(1, (0, 0, 20, 20), iscrowd=1, segmentation={"size": [96, 96], "counts": [0, 400, 96 * 96 - 400]})
    figures = data.check(splits=["train"]).splits[0]
    assert figures.objects == {"circle": (1, 1, 0), "rectangle": (0, 0, 1), "triangle": (0, 0, 0)}
    assert (figures.images, figures.images_without_objects, figures.crowd_regions) == (3, 1, 1)
    assert (figures.objects_per_image_median, figures.objects_per_image_max, figures.object_count) == (1, 2, 3)
    assert figures.smallest_image_hw == figures.largest_image_hw == (96, 96)


def test_objects_with_keypoints_are_counted(data):
    with_keypoints(data)
    data.add(1, (5, 5, 60, 70), keypoints=[0] * 6, num_keypoints=0)
    report = data.check()
    assert counts(report) == {}
    assert [figures.objects_with_keypoints for figures in report.splits] == [1, 0]
    assert report.text().count("1 objects with keypoints") == 1


def test_splits_are_chosen_as_training_chooses_them(data):
    cut_file(data)
    assert counts(data.check(splits=["va"])) == {}
    with pytest.raises(UserError, match="no split 'test'"):
        data.check(splits=["test"])


def test_a_folder_that_is_no_dataset(tmp_path):
    with pytest.raises(UserError, match="annotations"):
        check_dataset(tmp_path)
    (tmp_path / "annotations").mkdir()
    with pytest.raises(UserError, match="files instances_"):
        check_dataset(tmp_path)


def test_pictures_show_the_object_and_have_a_limit(data, tmp_path):
    cut_file(data)
    for k in range(4):
        data.add(1, (5 + 10 * k, 5, 2, 1))
    report = data.check()
    assert write_pictures(report, tmp_path / "out", per_problem=3) == 4  # the unreadable image has none
    found = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert found == [*(f"mask-of-fewer-than-4-pixels-0{n}-000001.png" for n in (1, 2, 3)), "samples.png"]


def test_a_small_object_has_a_closer_look(data, tmp_path):
    big = np.full((400, 500, 3), 90, np.uint8)
    Image.fromarray(big).save(data.image(0))
    data.train["images"] = data.train["images"][:1]
    data.train["images"][0] |= {"height": 400, "width": 500}
    data.train["annotations"] = []
    data.add(0, (200, 100, 2, 1))
    data.add(0, (10, 10, 400, 300), segmentation=[[450, 350, 490, 350, 490, 390]])
    write_pictures(data.check(splits=["train"]), tmp_path / "out", per_problem=1)
    small = Image.open(tmp_path / "out" / "mask-of-fewer-than-4-pixels-01-000000.png")
    large = Image.open(tmp_path / "out" / "box-that-does-not-fit-its-mask-01-000000.png")
    assert small.width == 1280 and large.width == 640
    red = (np.asarray(small)[:, 640:] == (255, 64, 64)).all(-1)
    assert red.sum() > 100  # outline and label in the closer look


def test_boxes_that_were_left_out_are_drawn_wherever_they_are(data, tmp_path):
    data.add(0, (5, 5, -30, 10))
    data.add(1, (1e12, -1e12, 3, 3))
    data.add(2, (20, 20, 0, 0))
    data.add(3, (1, 2, 3, 4), bbox=[1, 2, 3, "4"])
    assert write_pictures(data.check(), tmp_path / "out", per_problem=9) == 5


def test_the_sheet_of_samples_is_the_same_every_time(data):
    first, second = (np.asarray(contact_sheet(data.check().datasets)) for _ in range(2))
    np.testing.assert_array_equal(first, second)
    assert first.shape[1] == 4 * 326


def test_the_command_fails_on_errors_and_if_strict_on_remarks(data, tmp_path):
    def run(*arguments):
        return CliRunner().invoke(cli.app, ["data", "check", str(data.root), *map(str, arguments)])

    assert run("--strict").exit_code == 0
    tiny_mask(data)
    data.check()
    result = run("--json", tmp_path / "report.json", "--output", tmp_path / "out")
    assert result.exit_code == 0 and "1 × mask of fewer than 4 pixels" in result.output
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["errors"] == {} and report["remarks"]["mask of fewer than 4 pixels"]["count"] == 1
    assert report["splits"][0]["objects"]["circle"]["all"] > 0
    assert (tmp_path / "out" / "samples.png").is_file()
    assert run("--strict").exit_code == 1
    cut_file(data)
    result = run("--split", "train")
    assert result.exit_code == 1 and "1 × unreadable image" in result.output
    assert run("--split", "val", "--strict").exit_code == 0

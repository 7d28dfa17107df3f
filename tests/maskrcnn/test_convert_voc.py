"""Pascal VOC: boxes, flags, lists, masks with borders, and malformed XML."""

import numpy as np
import pytest
from PIL import Image
from source_datasets import BIRD, as_it_is, content, converted, noise_image, numbers, voc

from maskrcnn.data.coco import CocoDataset, instance_mask
from maskrcnn.data.convert.voc import CLASS_NAMES
from maskrcnn.errors import UserError


@pytest.fixture
def source(tmp_path):
    return voc(tmp_path / "VOC2012")


def xml(source, stem="000001"):
    return source / "Annotations" / f"{stem}.xml"


def replaced(source, old, new, stem="000001"):
    text = xml(source, stem).read_text()
    assert old in text
    xml(source, stem).write_text(text.replace(old, new))


def annotations(out, split="train"):
    return content(out, split)["annotations"]


BIRD_1 = {"id": 1, "image_id": 1, "category_id": 3, "bbox": [0.0, 1.0, 4.0, 7.0], "area": 28.0, "iscrowd": 0}
BIRD_1 |= {"difficult": 0, "truncated": 1}
CAT_1 = {"id": 2, "image_id": 1, "category_id": 8, "bbox": [5.0, 2.0, 7.0, 3.0], "area": 21.0, "iscrowd": 1}
CAT_1 |= {"difficult": 1, "truncated": 0}


def test_boxes(source, tmp_path):
    report = as_it_is("voc", source, tmp_path / "out")
    assert report.images == {"train": 1, "val": 1} and report.objects == {"train": 2, "val": 2}
    train = content(tmp_path / "out", "train")
    assert train["images"] == [{"id": 1, "file_name": "000001.jpg", "height": 8, "width": 12}]
    assert train["annotations"] == [BIRD_1, CAT_1]
    assert [(c["id"], c["name"]) for c in train["categories"]] == list(enumerate(CLASS_NAMES, start=1))
    assert content(tmp_path / "out", "val")["images"][0]["id"] == 2


@pytest.mark.parametrize(("difficult", "flags"), [("crowd", [0, 1]), ("keep", [0, 0]), ("drop", [0])])
def test_difficult_objects(source, tmp_path, difficult, flags):
    report = as_it_is("voc", source, tmp_path / "out", difficult=difficult)
    assert [a["iscrowd"] for a in annotations(tmp_path / "out")] == flags
    assert report.left_out == ({"difficult object": 2} if difficult == "drop" else {})
    records = CocoDataset.load(tmp_path / "out", "train").images
    assert sum(not instance.is_crowd for instance in records[0].instances) == flags.count(0)


def test_masks(source, tmp_path):
    as_it_is("voc", source, tmp_path / "out", with_masks=True)
    record = CocoDataset.load(tmp_path / "out", "train").images[0]
    objects = np.array(Image.open(source / "SegmentationObject" / "000001.png"))
    for number, instance in enumerate(record.instances, start=1):
        assert (instance_mask(record, instance) == (objects == number)).all()
    bird, cat = annotations(tmp_path / "out")
    assert (bird["category_id"], bird["bbox"], bird["area"], bird["iscrowd"]) == (3, [1, 2, 2, 5], 10, 0)
    assert (cat["category_id"], cat["bbox"], cat["area"], cat["iscrowd"]) == (8, [6, 2, 5, 3], 15, 1)
    assert bird["segmentation"] == {"size": [8, 12], "counts": ":530V2"}  # runs 10, 5, 3, 5, 73
    assert (bird["truncated"], cat["difficult"]) == (1, 1)


def test_masks_without_xml_or_with_another_class_in_it(source, tmp_path):
    xml(source).unlink()
    replaced(source, "<name>cat</name>", "<name>dog</name>", "000002")
    as_it_is("voc", source, tmp_path / "out", with_masks=True)
    assert [a["iscrowd"] for split in ("train", "val") for a in annotations(tmp_path / "out", split)] == [0, 0, 0, 0]


def test_a_folder_without_lists(tmp_path):
    source = tmp_path / "mine"
    (source / "Annotations").mkdir(parents=True)
    (source / "Annotations" / "._x.xml").write_bytes(b"of macOS")
    for number, stem in enumerate(("x", "y", "z")):
        noise_image(source / "JPEGImages" / f"{stem}.png", (8, 12), number)
        xml(source, stem).parent.mkdir(exist_ok=True)
        text = BIRD.format(stem=stem).replace("<name>cat</name>", "<name>zebra</name>")
        xml(source, stem).write_text(text.replace("<width>12", "<width>0"))
    report = as_it_is("voc", source, tmp_path / "out")
    assert report.images == {"train": 2, "val": 1}
    assert [c["name"] for c in content(tmp_path / "out", "val")["categories"]] == ["bird", "zebra"]


def test_zero_based_boxes(source, tmp_path):
    replaced(source, "<xmin>1</xmin>", "<xmin>0</xmin>")
    with pytest.raises(UserError, match=r"object 1 \(bird\): box from \(0, 2\)[\s\S]*--zero-based"):
        as_it_is("voc", source, tmp_path / "out")
    as_it_is("voc", source, tmp_path / "out", zero_based=True)
    assert annotations(tmp_path / "out")[0]["bbox"] == [0.0, 2.0, 4.0, 6.0]


def test_files_of_classes_and_aliases(source, tmp_path):
    (tmp_path / "classes.txt").write_text("# two\n7: animal, bird\n9: feline\n")
    (tmp_path / "alias.txt").write_text("feline, cat, kitten\n")
    as_it_is("voc", source, tmp_path / "out", classes=str(tmp_path / "classes.txt"), alias=tmp_path / "alias.txt")
    assert content(tmp_path / "out", "train")["categories"] == [
        {"id": 7, "name": "animal"},
        {"id": 9, "name": "feline"},
    ]
    assert [a["category_id"] for a in annotations(tmp_path / "out")] == [7, 9]


def test_lists_by_name(source, tmp_path):
    (source / "ImageSets" / "Main" / "bird_trainval.txt").write_text("000001  1\n000002 -1\n")
    report = as_it_is("voc", source, tmp_path / "out", sets=("bird_trainval",))
    assert report.images == {"bird_trainval": 1}
    (source / "JPEGImages" / "000001.jpg").rename(source / "JPEGImages" / "a 1.jpg")
    xml(source).rename(xml(source, "a 1"))
    for line in ("a 1\n", "a 1 1\n"):
        (source / "ImageSets" / "Main" / "spaced.txt").write_text(line)
        report = as_it_is("voc", source, tmp_path / line.strip(), sets=("spaced",))
        assert report.images == {"spaced": 1}


def outside(source):
    replaced(source, "<xmax>12</xmax>", "<xmax>13</xmax>")


def no_number(source):
    replaced(source, "<xmin>6</xmin>", "<xmin>six</xmin>")


def no_name(source):
    replaced(source, "<name>cat</name>", "<name> </name>")


def odd_flag(source):
    replaced(source, "<difficult>1", "<difficult>maybe")


def broken_xml(source):
    replaced(source, "</annotation>", "")


def entities(source):
    bomb = '<!DOCTYPE a [<!ENTITY b "bbbb"><!ENTITY c "&b;&b;">]><annotation>&c;</annotation>'
    xml(source).write_text(bomb)


def no_xml(source):
    xml(source).unlink()


def no_image(source):
    (source / "JPEGImages" / "000001.jpg").unlink()


def cut_image(source):
    path = source / "JPEGImages" / "000001.jpg"
    path.write_bytes(path.read_bytes()[:200])


def other_size(source):
    noise_image(source / "JPEGImages" / "000001.jpg", (9, 12))


FAULTS = {  # fault, reason, error text, remaining objects of `train`
    outside: ("box outside the image", r"000001.xml, object 2 \(cat\): box from \(6, 3\) to \(13, 5\)", 1),
    no_number: ("malformed entry", "<xmin> 'six'", 1),
    no_name: ("malformed entry", "000001.xml, object 2: no <name>", 1),
    odd_flag: ("malformed entry", "<difficult> 'maybe'", 1),
    broken_xml: ("annotation file that cannot be read", r"000001.xml, line \d+, column \d+: not XML", 0),
    entities: ("annotation file that cannot be read", "document type declaration", 0),
    no_xml: ("annotation file that cannot be read", "000001.xml cannot be read", 0),
    no_image: ("image that cannot be read", "000001.jpg does not exist", 0),
    cut_image: ("image that cannot be read", "000001.jpg", 0),
    other_size: ("annotation of another size than its image", "for 12×8 pixels", 0),
}


def test_a_box_drawn_from_right_to_left_is_the_same_box(source, tmp_path):
    as_it_is("voc", source, tmp_path / "before")
    replaced(source, "<xmin>6</xmin>", "<xmin>12</xmin>")
    replaced(source, "<xmax>12</xmax>", "<xmax>6</xmax>")
    report = as_it_is("voc", source, tmp_path / "out")
    assert content(tmp_path / "out", "train") == content(tmp_path / "before", "train")
    assert report.repaired == {"box with its corners in another order": 1}


@pytest.mark.parametrize("spoil", FAULTS, ids=lambda spoil: spoil.__name__)
def test_a_fault_is_named_or_counted(source, tmp_path, spoil):
    reason, text, left = FAULTS[spoil]
    spoil(source)
    with pytest.raises(UserError, match=text):
        as_it_is("voc", source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    report = as_it_is("voc", source, tmp_path / "out", keep_going=True)
    assert report.skipped == {reason: 1}
    assert report.objects.get("train", 0) == left and report.objects["val"] == 2


def mixed_classes(source):
    path = source / "SegmentationClass" / "000001.png"
    rows = np.array(Image.open(path))
    rows[2:4, 1:3] = 15
    numbers(path, rows)


def no_class(source):
    path = source / "SegmentationClass" / "000001.png"
    rows = np.array(Image.open(path))
    numbers(path, np.where(rows == 3, 0, rows))


def other_mask_size(source):
    numbers(source / "SegmentationObject" / "000001.png", np.ones((12, 8)))


def colour_mask(source):
    noise_image(source / "SegmentationObject" / "000001.png", (8, 12))


def cut_mask(source):
    path = source / "SegmentationObject" / "000001.png"
    path.write_bytes(path.read_bytes()[:60])


@pytest.mark.parametrize(
    ("spoil", "text"),
    [
        (mixed_classes, r"object 1: 60% of its pixels are of class 3"),
        (no_class, "object 1: 100% of its pixels are of class 0"),
        (other_mask_size, "SegmentationObject.*000001.png: for 8×12 pixels"),
        (colour_mask, "SegmentationObject.*RGB pixels"),
        (cut_mask, r"SegmentationObject.*000001.png \("),
    ],
)
def test_faults_of_masks(source, tmp_path, spoil, text):
    spoil(source)
    with pytest.raises(UserError, match=text):
        as_it_is("voc", source, tmp_path / "out", with_masks=True)


def test_invalid_folders_and_lists(source, tmp_path):
    with pytest.raises(
        UserError, match=r"no list trainval \(\.txt\) in .*Main\n  expected: lists such as .*train, val"
    ):
        as_it_is("voc", source, tmp_path / "out", sets=("trainval",))
    (source / "ImageSets" / "Main" / "trainval.txt").write_text("000001\n000002\n")
    with pytest.raises(UserError, match=r"trainval\.txt, line 1: 000001, also in train\.txt"):
        as_it_is("voc", source, tmp_path / "out", sets=("train", "trainval"))
    (source / "ImageSets" / "Main" / "up.txt").write_text("../../000001\n")
    with pytest.raises(UserError, match="a path inside the dataset"):
        as_it_is("voc", source, tmp_path / "out", sets=("up",))
    with pytest.raises(UserError, match="--difficult never"):
        as_it_is("voc", source, tmp_path / "out", difficult="never")


def test_unknown_class_and_two_spellings(source, tmp_path):
    (tmp_path / "classes.txt").write_text("bird\n")
    with pytest.raises(UserError, match=r"object 2 \(cat\): class 'cat'\n  expected: one of bird\n"):
        as_it_is("voc", source, tmp_path / "out", classes=str(tmp_path / "classes.txt"))
    replaced(source, "<name>cat</name>", "<name>Bird</name>", "000002")
    with pytest.raises(UserError, match=r"000001.xml: class 'bird'; .*000002.xml: class 'Bird'"):
        as_it_is("voc", source, tmp_path / "out")
    (tmp_path / "alias.txt").write_text("bird, Bird\n")
    report = converted("voc", source, tmp_path / "out", alias=tmp_path / "alias.txt")
    assert report.objects == {"train": 2, "val": 2}


def test_several_years_become_one_dataset(tmp_path):
    """VOC2012 has no test list, and its images have other names."""
    devkit = tmp_path / "VOCdevkit"
    for year, renames in (("VOC2007", {}), ("VOC2012", {"000001": "2008_000001", "000002": "2008_000002"})):
        root = voc(devkit / year)
        for old, new in renames.items():
            (root / "Annotations" / f"{old}.xml").rename(root / "Annotations" / f"{new}.xml")
            (root / "JPEGImages" / f"{old}.jpg").rename(root / "JPEGImages" / f"{new}.jpg")
        lists = root / "ImageSets" / "Main"
        names = list(renames.values()) or ["000001", "000002"]
        (lists / "trainval.txt").write_text(f"{names[0]}\n" if year == "VOC2007" else "\n".join(names))
        if year == "VOC2007":
            (lists / "test.txt").write_text(f"{names[1]}\n")
    report = as_it_is("voc", devkit, tmp_path / "out", sets=("trainval", "test"))
    assert report.images == {"trainval": 3, "test": 1}
    train = content(tmp_path / "out", "trainval")
    assert [image["file_name"] for image in train["images"]] == ["000001.jpg", "2008_000001.jpg", "2008_000002.jpg"]
    own = [annotation for annotation in train["annotations"] if annotation["image_id"] == train["images"][1]["id"]]
    assert [{**each, "id": 0, "image_id": 0} for each in own] == [
        {**e, "id": 0, "image_id": 0} for e in (BIRD_1, CAT_1)
    ]
    with pytest.raises(UserError, match="no list train2"):
        as_it_is("voc", devkit, tmp_path / "other", sets=("train2",))

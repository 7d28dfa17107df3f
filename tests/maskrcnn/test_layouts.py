"""One small dataset in the layouts that tools write: each is found, read whole, and has a split to validate on."""

import json
import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from maskrcnn.data.check import check_dataset
from maskrcnn.data.coco import CocoDataset
from maskrcnn.data.convert.conversion import convert
from maskrcnn.data.layouts import ImageFinder, find_split, get_split, list_splits, training_splits
from maskrcnn.errors import UserError
from maskrcnn.keypoints import mirrored

SIDE_PX = 96  # of the shapes fixture's images


def content_of(root, split):
    return json.loads((root / "annotations" / f"instances_{split}.json").read_text())


def place(source, split, content, folder, path, name=lambda file_name: file_name):
    """Writes an annotation file, and its images to `folder` under the last part of their new names."""
    folder.mkdir(parents=True, exist_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    for image in content["images"]:
        new = name(image["file_name"])
        shutil.copy(source / split / image["file_name"], folder / new.replace("\\", "/").split("/")[-1])
        image["file_name"] = new
    path.write_text(json.dumps(content))


def roboflow(source, root):
    for split, own in (("train", "train"), ("val", "valid")):
        content = content_of(source, split)
        for entry in content["categories"]:
            entry["supercategory"] = "shapes"
        content["categories"].insert(0, {"id": 0, "name": "shapes", "supercategory": "none"})
        place(source, split, content, root / own, root / own / "_annotations.coco.json")


def cvat(source, root):
    annotations = root / "annotations" / "instances_default.json"
    place(source, "train", content_of(source, "train"), root / "images" / "default", annotations)


def datumaro(source, root):
    for split in ("train", "val"):
        path = root / "annotations" / f"instances_{split}.json"
        place(source, split, content_of(source, split), root / "images" / split, path)


def label_studio(source, root):
    def name(file_name):
        return f"../../label-studio/data/media/upload/1/a1b2-{file_name}"

    place(source, "train", content_of(source, "train"), root / "images", root / "result.json", name)


def fiftyone(source, root):
    place(source, "train", content_of(source, "train"), root / "data", root / "labels.json")


def trainval(source, root):
    place(source, "train", content_of(source, "train"), root / "images", root / "trainval.json")


def two_files(source, root):
    for split in ("train", "val"):
        place(source, split, content_of(source, split), root / "JPEGImages", root / f"coco_{split}_set.json")


def windows(source, root):
    def name(file_name):
        return f"D:\\labels\\imgs\\{file_name}"

    place(source, "train", content_of(source, "train"), root, root / "annotations.json", name)


def yolo(source, root, *, split_folders=True):
    for split in ("train", "val"):
        content = content_of(source, split)
        images, labels = (
            root / kind / split if split_folders else root / split / kind for kind in ("images", "labels")
        )
        images.mkdir(parents=True)
        labels.mkdir(parents=True)
        for image in content["images"]:
            shutil.copy(source / split / image["file_name"], images)
            lines = []
            for entry in content["annotations"]:
                if entry["image_id"] == image["id"]:
                    x, y, w, h = (value / SIDE_PX for value in entry["bbox"])
                    corners = [x, y, x + w, y, x + w, y + h, x, y + h]
                    numbers = corners if isinstance(entry["segmentation"], list) else [x + w / 2, y + h / 2, w, h]
                    lines.append(" ".join(map(str, [entry["category_id"] - 1, *numbers])))
            (labels / image["file_name"]).with_suffix(".txt").write_text("\n".join(lines))
    names = [category["name"] for category in sorted(content["categories"], key=lambda c: c["id"])]
    folders = ("images/train", "images/val") if split_folders else ("../train/images", "../val/images")
    (root / "data.yaml").write_text(f"train: {folders[0]}\nval: {folders[1]}\nnc: 3\nnames: {names}\n")


def roboflow_yolo(source, root):
    yolo(source, root, split_folders=False)


def lists_of_images(root, place):
    for split in ("train", "val"):
        names = sorted(path.name for path in (root / "images" / split).iterdir())
        (root / f"{split}.txt").write_text("".join(f"{place.format(split)}/{name}\n" for name in names))


def cvat_yolo(source, root):
    yolo(source, root)
    lists_of_images(root, "data/images/{}")
    names = (root / "data.yaml").read_text().splitlines()[-1]
    (root / "data.yaml").write_text(f"path: ./\ntrain: train.txt\nval: val.txt\n{names}\n")


def moved_yolo(source, root):
    yolo(source, root)
    lists_of_images(root, "C:\\Users\\me\\shapes\\images\\{}")
    names = (root / "data.yaml").read_text().splitlines()[-1]
    (root / "data.yaml").write_text(
        f"path: /home/me/shapes\ntrain: /home/me/shapes/train.txt\nval: [val.txt]\n{names}\n"
    )


def darknet(source, root):
    yolo(source, root)
    lists_of_images(root, "data/obj_{}_data")
    names = [category["name"] for category in content_of(source, "train")["categories"]]
    (root / "obj.names").write_text("\n".join(names))
    (root / "obj.data").write_text(
        "classes = 3\ntrain = data/train.txt\nvalid = data/val.txt\nnames = data/obj.names\n"
    )
    for split in ("train", "val"):
        shutil.move(root / "images" / split, root / f"obj_{split}_data")
        for label in (root / "labels" / split).iterdir():
            shutil.move(label, root / f"obj_{split}_data")
    (root / "data.yaml").unlink()
    shutil.rmtree(root / "labels")


BOTH = (
    roboflow,
    datumaro,
    two_files,
    yolo,
    roboflow_yolo,
    cvat_yolo,
    moved_yolo,
    darknet,
)  # have a split to validate on
ONE = (cvat, label_studio, fiftyone, trainval, windows)


@pytest.fixture
def root(tmp_path):
    (tmp_path / "mine").mkdir()
    return tmp_path / "mine"


def loaded(root, names):
    return [CocoDataset.load(root, name) for name in names]


def objects_of(datasets):
    """Name, label and box of every object: what does not depend on ids."""
    return sorted(
        (
            record.path.name.removeprefix("a1b2-"),
            dataset.class_names[i.label - 1],
            *(round(v, 2) for v in i.box_xyxy_px),
        )
        for dataset in datasets
        for record in dataset.images
        for i in record.instances
        if not i.is_crowd
    )


@pytest.mark.parametrize("write", [*BOTH, *ONE], ids=lambda write: write.__name__)
def test_a_layout_is_found_and_read_whole(shapes, root, monkeypatch, write):
    write(shapes, root)
    names = training_splits(root, "train", "val")
    train, val = loaded(root, names)
    expected = loaded(shapes, ("train", "val") if write in BOTH else ("train",))
    assert objects_of([train, val]) == objects_of(expected)
    assert train.class_names == val.class_names and set(train.class_names) == set(expected[0].class_names)
    assert all(record.path.is_file() for dataset in (train, val) for record in dataset.images)
    if write in ONE:
        assert names[1] == find_split(root, "val") and names[0].endswith("[train]")
        assert train.division == val.division and "no split to validate on" in train.division
        assert {r.id for r in train.images}.isdisjoint(r.id for r in val.images) and val.objects
    assert not check_dataset(root, workers=1).by_problem(is_error=True)
    for folder, name in ((root, "."), (root.parent, root.name), (root / "..", f"./{root.name}/")):
        monkeypatch.chdir(folder)
        assert objects_of(loaded(Path(name), names)) == objects_of([train, val])
        assert all(record.path.is_file() for dataset in loaded(Path(name), names) for record in dataset.images)


@pytest.mark.parametrize("folder", [".", "annotations", ".."])
def test_the_images_of_an_annotation_file_alone_are_found(shapes, monkeypatch, folder):
    """A file in `annotations`, as in COCO's layout, belongs to the folder above."""
    monkeypatch.chdir(shapes / folder)
    file = Path(os.path.relpath(shapes / "annotations" / "instances_val.json"))
    for path in (file, file.absolute()):
        assert [record.path.resolve() for record in CocoDataset.load(path, "val").images] == [
            record.path.resolve() for record in CocoDataset.load(shapes, "val").images
        ]


@pytest.mark.parametrize("write", [roboflow, cvat, yolo], ids=lambda write: write.__name__)
def test_a_conversion_writes_cocos_layout(shapes, root, tmp_path, write):
    write(shapes, root)
    report = convert("yolo" if write is yolo else "coco", root, tmp_path / "out")
    names = sorted(report.images)
    assert len(names) == 2 and names[0] == "train" and names[1].startswith("val")
    # Crowd regions have no polygon, and are boxes in YOLO's files.
    expected = ("image ids", "super-category", "no segmentation, kept as a box")
    assert not [reason for reason in report.repaired if not any(text in reason for text in expected)]
    before = loaded(root, training_splits(root, "train", "val"))
    assert objects_of(loaded(tmp_path / "out", names)) == objects_of(before)


def test_an_annotation_file_and_a_folder_of_images(shapes, root, tmp_path, run):
    content = content_of(shapes, "train")
    place(shapes, "train", content, tmp_path / "far" / "away", root / "labels" / "mine.json")
    with pytest.raises(UserError, match=r"images of .* are missing"):
        CocoDataset.load(root / "labels" / "mine.json", "mine")
    found = CocoDataset.load(root / "labels" / "mine.json", "mine", images=tmp_path / "far")
    assert objects_of([found]) == objects_of(loaded(shapes, ["train"]))
    both = (root / "labels" / "mine.json", "--images", tmp_path / "far")
    code, out, _ = run("data", "check", *both)
    assert code == 0 and f"mine: {len(found.images)} images" in out, out
    assert run("data", "convert", "coco", both[0], tmp_path / "out", *both[1:])[0] == 0
    assert objects_of(loaded(tmp_path / "out", ["train", "val"])) == objects_of([found])
    names = training_splits(root / "labels" / "mine.json", "train", "val", val_data=root / "labels" / "mine.json")
    assert names == ("mine", "mine")


def test_several_threads_find_images_at_once(tmp_path, monkeypatch):
    names = [f"{number}.png" for number in range(8)]
    (tmp_path / "far" / "away").mkdir(parents=True)
    for name in names:
        (tmp_path / "far" / "away" / name).touch()
    walk = os.walk

    def slow(folder):
        for entry in walk(folder):
            time.sleep(0.05)
            yield entry

    monkeypatch.setattr(os, "walk", slow)
    finder = ImageFinder([tmp_path])
    finder.choose(names)
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(finder.find, names)) == [tmp_path / "far" / "away" / name for name in names]


def test_the_division_keeps_every_class_in_both_parts_and_does_not_depend_on_order(shapes, root):
    trainval(shapes, root)
    train, val = loaded(root, training_splits(root, "train", "val"))
    labels = [{i.label for r in dataset.images for i in r.instances if not i.is_crowd} for dataset in (train, val)]
    assert labels[0] == labels[1] == {1, 2, 3}
    assert len(val.images) < len(train.images)
    content = json.loads((root / "trainval.json").read_text())
    content["images"].reverse()
    (root / "trainval.json").write_text(json.dumps(content))
    again = CocoDataset.load(root, find_split(root, "val"))
    assert {r.id for r in again.images} == {r.id for r in val.images}


def test_keypoints_of_yolo_have_mirrored_partners(shapes, root):
    yolo(shapes, root)
    with open(root / "data.yaml", "a") as file:
        file.write("kpt_shape: [3, 3]\nflip_idx: [1, 0, 2]\n")
    label = next((root / "labels" / "train").iterdir())
    label.write_text("0 0.5 0.5 0.25 0.5 0.25 0.5 2 0.75 0.5 1 0 0 0\n")
    dataset = CocoDataset.load(root, "train")
    (instance,) = next(record for record in dataset.images if record.path.stem == label.stem).instances
    assert instance.keypoints.tolist() == [[24, 48, 2], [72, 48, 1], [0, 0, 0]]
    assert instance.box_xyxy_px == (36, 24, 60, 72)
    assert mirrored(dataset.keypoint_names) == (1, 0, 2)


def test_lists_of_darknet_name_images_anywhere(shapes, root, tmp_path):
    darknet(shapes, root)
    (tmp_path / "far").mkdir()
    for split in ("train", "val"):
        images = shutil.move(root / f"obj_{split}_data", tmp_path / "far")
        files = sorted(path for path in Path(images).iterdir() if path.suffix == ".png")
        (root / f"{split}.txt").write_text("\n".join(map(str, files)))
    assert objects_of(loaded(root, ["train", "val"])) == objects_of(loaded(shapes, ["train", "val"]))


def test_lines_of_yolo_that_cannot_be_read_are_counted(shapes, root):
    yolo(shapes, root)
    label = next((root / "labels" / "train").iterdir())
    label.write_bytes(b"\xef\xbb\xbf0 0.5 0.5\ncat 0.5 0.5 0.1 0.1\n7 0.5 0.5 0.1 0.1\n0 0.5 0.5 0.1 0.1\n")
    (root / "images" / "train" / "._000000.png").write_bytes(b"of macOS")
    dataset = CocoDataset.load(root, "train")
    assert dataset.skipped == {"invalid box": 1, "unknown category": 2} and len(dataset.images) == 12


def test_class_names_of_yolo_are_texts(shapes, root):
    yolo(shapes, root)
    paths = "train: images/train\nval: images/val\n"
    (root / "data.yaml").write_text(f"{paths}names: [no, 01, null]\n")
    assert CocoDataset.load(root, "train").class_names == ("no", "01", "null")
    for names in ("{cat: 0, dog: 1}", "", "cat"):
        (root / "data.yaml").write_text(f"{paths}names: {names}\n")
        with pytest.raises(UserError, match=r"data\.yaml: names is"):
            list_splits(root)


@pytest.mark.parametrize(
    ("files", "text"),
    [
        ({"VOC/Annotations/a.xml": "<a/>"}, r"convert it \(Pascal VOC\): maskrcnn data convert voc"),
        ({"a.json": '{"shapes": []}'}, r"convert it \(LabelMe\): maskrcnn data convert labelme"),
        ({"v.json": '{"_via_img_metadata": {}}'}, r"convert it \(VGG Image Annotator\)"),
        ({"annotations.xml": "<annotations/>"}, "datumaro:cvat"),
        ({"p.json": '[{"id": 1, "data": {}, "annotations": []}]'}, "Label Studio's own JSON: export as COCO"),
        ({"meta.json": '{"classes": [], "projectType": "images"}'}, "Supervisely"),
        ({"a/default.json": '{"items": [], "categories": {}}'}, "datumaro:datumaro"),
        ({"photo.jpg": "", "notes.txt": ""}, r"it holds notes.txt, photo.jpg(.|\n)*--annotations FILE --images DIR"),
    ],
)
def test_another_folder_is_named_with_the_next_step(root, files, text):
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)
    with pytest.raises(UserError, match=text):
        list_splits(root)


@pytest.mark.parametrize(("name", "text"), [("export.zip", "unpack it"), ("cvat.xml", "datumaro:cvat")])
def test_a_file_of_another_kind_is_named_with_the_next_step(root, name, text):
    (root / name).write_text("<?xml version='1.0'?>")
    with pytest.raises(UserError, match=text):
        list_splits(root / name)


@pytest.mark.parametrize(
    ("on_disk", "in_file"),
    [
        ("u\u0308.jpg", "\xfc.jpg"),  # a letter and its mark, as macOS writes them
        ("\xfc.jpg", "u\u0308.jpg"),
        ("a b.jpg", "a%20b.jpg"),
        ("a%20b.jpg", "a%20b.jpg"),
        ("a.jpg", "3f2a1b4c-a.jpg"),  # Label Studio's upload
        ("a.JPG", "a.jpg"),
        ("a.png", "a.jpg"),
    ],
)
def test_an_image_is_found_by_a_name_written_otherwise(tmp_path, on_disk, in_file):
    for split in ("train", "val"):
        (tmp_path / split).mkdir()
        (tmp_path / split / on_disk).touch()
    finder = ImageFinder([tmp_path / "val", tmp_path])
    finder.choose([in_file])
    assert finder.find(in_file) == tmp_path / "val" / on_disk


def test_links_that_go_round_do_not_end_the_search(shapes, root):
    trainval(shapes, root)
    (root / "images" / "loop").symlink_to(root)
    (root / "self").symlink_to(root / "self")
    assert list_splits(root) == ["trainval"]
    content = json.loads((root / "trainval.json").read_text())
    content["images"][0]["file_name"] = "elsewhere/" + content["images"][0]["file_name"].upper()
    (root / "trainval.json").write_text(json.dumps(content))
    assert CocoDataset.load(root, "trainval").images[0].path.is_file()


def test_two_files_of_one_split_are_refused(shapes, root):
    trainval(shapes, root)
    shutil.copy(root / "trainval.json", root / "images" / "trainval.json")
    with pytest.raises(UserError, match="two annotation files of the split 'trainval'"):
        list_splits(root)
    assert get_split(root / "trainval.json", "trainval").annotations == root / "trainval.json"

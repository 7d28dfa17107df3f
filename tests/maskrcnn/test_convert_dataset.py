"""Common parts of all converters: the output folder, splits, vocabularies and faults."""

import os
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from source_datasets import (
    as_it_is,
    coco,
    content,
    converted,
    id_masks,
    labelme,
    mask_files,
    noise_image,
    penn_fudan,
    visual_genome,
    whole,
)

from maskrcnn.data.convert.conversion import KINDS, SplitPlan, convert, split_plan
from maskrcnn.data.convert.files import annotated_size
from maskrcnn.data.convert.source import (
    BadEntry,
    Category,
    Entry,
    Faults,
    Options,
    box_fields,
    mask_fields,
    merged_rle,
    polygon_fields,
)
from maskrcnn.data.convert.vocabulary import Vocabulary, read_aliases, read_classes, vocabulary_from_names
from maskrcnn.errors import UserError


def files_of(root):
    return {path.relative_to(root): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


# --- the folder --------------------------------------------------------------------------------------


def test_the_same_input_gives_the_same_bytes(tmp_path):
    source = labelme(tmp_path / "photos")
    for name in ("one", "two"):
        converted("labelme", source, tmp_path / name)
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")
    assert len(files_of(tmp_path / "one")) == 4


def test_images_are_linked_or_copied(tmp_path):
    source = penn_fudan(tmp_path / "PennFudanPed")
    whole("penn-fudan", source, tmp_path / "linked")
    whole("penn-fudan", source, tmp_path / "copied", copies=True)
    original = source / "PNGImages" / "FudanPed00001.png"
    assert os.path.samefile(original, tmp_path / "linked" / "all" / original.name)
    assert not os.path.samefile(original, tmp_path / "copied" / "all" / original.name)
    assert (tmp_path / "copied" / "all" / original.name).read_bytes() == original.read_bytes()


def test_images_are_copied_where_links_are_not_possible(tmp_path, monkeypatch):
    def refuse(*paths):
        raise OSError("not on this file system")

    monkeypatch.setattr(os, "link", refuse)
    _, report = whole("penn-fudan", penn_fudan(tmp_path / "PennFudanPed"), tmp_path / "out")
    assert report.images == {"all": 2}
    assert all(path.stat().st_nlink == 1 for path in (tmp_path / "out" / "all").iterdir())


@pytest.mark.parametrize("there", ["file", "dataset", "empty"])
def test_nothing_is_overwritten(tmp_path, there):
    source, out = penn_fudan(tmp_path / "PennFudanPed"), tmp_path / "out"
    if there == "empty":
        out.mkdir()
        assert whole("penn-fudan", source, out)[1].images == {"all": 2}
        return
    if there == "file":
        out.write_text("mine")
    else:
        (out / "annotations").mkdir(parents=True)
        (out / "annotations" / "instances_train.json").write_text("mine")
    before = files_of(tmp_path)
    with pytest.raises(UserError, match="exists already"):
        whole("penn-fudan", source, out)
    with pytest.raises(UserError, match="which the command reads"):
        whole("penn-fudan", source, source / "coco")
    assert files_of(tmp_path) == before


def test_a_conversion_that_breaks_off_leaves_nothing(tmp_path):
    source = penn_fudan(tmp_path / "PennFudanPed")

    def stop(done, total):
        assert (done, total) == (1, 2)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert("penn-fudan", source, tmp_path / "out", progress=stop)
    assert [path.name for path in tmp_path.iterdir()] == ["PennFudanPed"]


def test_two_images_of_one_name_in_a_split_are_refused(tmp_path):
    source = mask_files(tmp_path / "nuclei")
    for split in ("train", "val"):
        (source / split).mkdir()
    (source / "0a1b").rename(source / "train" / "x")
    (source / "2c3d").rename(source / "val" / "x")
    for split, name in (("train", "0a1b"), ("val", "2c3d")):
        folder = source / split / "x" / "images"
        (folder / f"{name}.png").rename(folder / "x.png")
    with pytest.raises(UserError, match=r"two images for all/x\.png"):
        whole("mask-files", source, tmp_path / "out")
    assert as_it_is("mask-files", source, tmp_path / "out").images == {"train": 1, "val": 1}


@pytest.mark.parametrize("name", ["annotations", ".hidden"])
def test_split_names_are_folder_names(tmp_path, name):
    plan = SplitPlan(rest=name)
    with pytest.raises(UserError, match=f"split '{name}'"):
        convert("penn-fudan", penn_fudan(tmp_path / "in"), tmp_path / "out", plan=plan)


def test_unknown_kind_missing_source_and_options_of_other_kinds(tmp_path):
    with pytest.raises(UserError, match="kind 'darknet'\n  expected: one of coco, yolo, voc"):
        convert("darknet", tmp_path, tmp_path / "out")
    with pytest.raises(UserError, match="missing does not exist"):
        convert("coco", tmp_path / "missing", tmp_path / "out")
    options = {
        "classes": ("x", "coco"),
        "alias": (tmp_path, "penn-fudan"),
        "class_name": ("x", "labelme"),
        "sets": (("train",), "via"),
        "with_masks": (True, "coco"),
        "difficult": ("keep", "coco"),
        "zero_based": (True, "coco"),
        "class_attribute": ("x", "labelme"),
        "image_folder": ("x", "voc"),
        "mask_folder": ("x", "via"),
        "mask_suffix": ("x", "via"),
        "divisor": (3, "cityscapes"),
        "void": (3, "cityscapes"),
        "crowd": (False, "voc"),
    }
    assert set(options) == set(vars(Options())) >= {name for kind in KINDS.values() for name in kind.options}
    for name, (value, kind) in options.items():
        with pytest.raises(UserError, match=f"with kind {kind}\n  expected: the option with "):
            convert(kind, tmp_path, tmp_path / "out", options=Options(**{name: value}))


# --- images ------------------------------------------------------------------------------------------


def test_a_truncated_jpeg_is_a_fault(tmp_path):
    path = noise_image(tmp_path / "x.jpg", (300, 200))
    data = path.read_bytes()
    assert annotated_size(path) == annotated_size(data) == (300, 200)
    path.write_bytes(data[: len(data) * 2 // 3])
    with pytest.raises(BadEntry, match=r"x\.jpg cannot be decoded"):
        annotated_size(path)
    with pytest.raises(BadEntry, match="name cannot be decoded"):
        annotated_size(path.read_bytes(), name="name")


@pytest.mark.parametrize(
    ("mode", "suffix"), [("RGBA", "png"), ("L", "jpg"), ("CMYK", "jpg"), ("P", "png"), ("1", "bmp")]
)
def test_images_of_any_mode(tmp_path, mode, suffix):
    Image.new(mode, (7, 5)).save(tmp_path / f"x.{suffix}")
    assert annotated_size(tmp_path / f"x.{suffix}") == (5, 7)


# --- objects -----------------------------------------------------------------------------------------


def test_boxes_are_cut_to_the_image():
    assert box_fields((-2, 1.5, 4, 99), (10, 20), "x") == {"bbox": [0, 1.5, 4, 8.5], "area": 34.0, "iscrowd": 0}
    for box in ((1, 1, 1, 5), (5, 1, 1, 5), (1, 1, float("nan"), 5), (1, 1, float("inf"), 5)):
        with pytest.raises(BadEntry, match="x: box from"):
            box_fields(box, (10, 20), "x")


def test_objects_without_a_pixel_are_refused():
    with pytest.raises(BadEntry, match="here\n  expected: at least one pixel"):
        mask_fields(np.zeros((3, 4), bool), "here")
    with pytest.raises(BadEntry, match="here"):
        polygon_fields([[1, 1, 2, 2, 1, 1.01]], (10, 10), "here")
    assert polygon_fields([[1, 1, 2, 2, 1, 1.01], [4, 4, 6, 4, 6, 6, 4, 6]], (10, 10), "here")["area"] == 4
    rle = merged_rle([[4, 4, 6, 4, 6, 6, 4, 6], np.eye(10, dtype=bool)], (10, 10), "here")
    assert rle["size"] == [10, 10]


# --- splits ------------------------------------------------------------------------------------------


def entries(*names, split=None):
    return [Entry(name=name, path=None, split=split) for name in names]


@given(total=st.integers(2, 300), share=st.floats(0.01, 0.99), seed=st.integers(0, 9))
def test_the_number_of_images_of_a_share(total, share, seed):
    names = [f"{k}.jpg" for k in range(total)]
    plan = split_plan([f"val={share}"], rest="train", seed=seed)
    count = max(1, round(share * total))
    if count == total:
        with pytest.raises(UserError, match="at least one image for each split"):
            plan.assign(entries(*names), Faults(), has_splits=False)
        return
    splits = plan.assign(entries(*names), Faults(), has_splits=False)
    assert splits.count("val") == count and splits.count("train") == total - count
    backwards = plan.assign(entries(*names[::-1]), Faults(), has_splits=False)
    assert backwards[::-1] == splits


def test_without_splits_a_tenth_is_for_validation():
    names = [f"{k}.jpg" for k in range(20)]
    default = SplitPlan()
    splits = default.assign(entries(*names), Faults(), has_splits=False)
    assert splits == split_plan([], val_fraction=0.1).assign(entries(*names), Faults(), has_splits=False)
    assert (splits.count("val"), splits.count("train")) == (2, 18)
    assert default.assign(entries("a", "b", split="own"), Faults(), has_splits=True) == ["own", "own"]
    with pytest.raises(UserError, match=r"1 image\(s\) for val"):
        default.assign(entries("a"), Faults(), has_splits=False)


def test_lists_name_images_by_path_name_stem_or_id(tmp_path):
    (tmp_path / "val.txt").write_text("sub/a.jpg\nb.jpg 1\n# nothing\n\nc\n77\nf g 2.jpg\n")
    names = ("sub/a.jpg", "b.jpg", "sub/c.jpg", "e.jpg", "f g 2.jpg")
    listed = [*entries(*names), Entry(name="d.jpg", path=None, image_id=77)]
    plan = split_plan([f"val={tmp_path / 'val.txt'}"])
    faults = Faults()
    assert plan.assign(listed, faults, has_splits=False) == ["val", "val", "val", None, "val", "val"]
    assert faults.left_out == {"image that no split list has": 1}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x\n", r"line 1: x\n  expected: the path, file name or id"),
        ("a\n", r"line 1: a, the name of 2 images"),
        ("b\nb.jpg\n", r"line 2: b\.jpg, also in .*line 1"),
    ],
)
def test_invalid_lines_of_lists(tmp_path, text, message):
    (tmp_path / "val.txt").write_text(text)
    plan = split_plan([f"val={tmp_path / 'val.txt'}"], rest="train")
    with pytest.raises(UserError, match=message):
        plan.assign(entries("1/a.jpg", "2/a.jpg", "b.jpg"), Faults(), has_splits=False)


def test_unknown_images_in_lists_are_counted_with_keep_going(tmp_path):
    (tmp_path / "val.txt").write_text("x\nb\ny\n")
    faults = Faults(keep_going=True)
    plan = split_plan([f"val={tmp_path / 'val.txt'}"], rest="train")
    assert plan.assign(entries("a.jpg", "b.jpg"), faults, has_splits=False) == ["train", "val"]
    assert faults.skipped == {"line of a split list that is no image": 2}


@pytest.mark.parametrize("content", ['{"images": 3}', '{"images": [3]}', "[1.5]", "3"])
def test_json_lists_hold_names_or_ids(tmp_path, content):
    (tmp_path / "val.json").write_text(content)
    with pytest.raises(UserError, match="a list of names or ids"):
        split_plan([f"val={tmp_path / 'val.json'}"]).assign(entries("a"), Faults(), has_splits=False)


@pytest.mark.parametrize(
    ("texts", "options", "message"),
    [
        (["val"], {}, "--split val"),
        (["val="], {}, "--split val="),
        (["../val=0.1"], {}, "--split ../val"),
        (["val=0.1", "val=x.txt"], {}, "--split val=x.txt"),
        (["val=0.1"], {"rest": "val"}, "with --rest val"),
        (["val=0.1"], {"rest": "a/b"}, "--rest a/b"),
        (["val=0.1"], {"val_fraction": 0.2}, "--split val=0.2"),
        (["val=0"], {}, "shares val=0"),
        (["val=1.5"], {}, "shares val=1.5"),
        (["val=nan"], {}, "shares val=nan"),
        (["a=0.6", "b=0.6"], {}, "shares a=0.6, b=0.6"),
    ],
)
def test_invalid_splits(texts, options, message):
    with pytest.raises(UserError, match=message):
        split_plan(texts, **options)


def test_lists_shares_and_the_rest_together(tmp_path):
    (tmp_path / "held.txt").write_text("42\n")
    source = coco(tmp_path / "coco")
    texts = [f"held={tmp_path / 'held.txt'}", "val=0.2"]
    report = converted("coco", source, tmp_path / "out", split=texts, rest="train")
    assert report.images == {"held": 1, "train": 4, "val": 1}
    assert content(tmp_path / "out", "held")["images"][0]["id"] == 42


# --- vocabularies ------------------------------------------------------------------------------------


def written(tmp_path, text):
    (tmp_path / "classes.txt").write_text(text)
    return tmp_path / "classes.txt"


def test_files_of_classes(tmp_path):
    categories, aliases = read_classes(written(tmp_path, "# two\nperson, man ,  a  woman\n\ndog\n"))
    assert categories == [Category(1, "person"), Category(2, "dog")]
    vocabulary = Vocabulary(categories, aliases)
    assert [vocabulary.id_of(name, "x", Faults()) for name in ("Man", "A woman", "dog ")] == [1, 1, 2]
    assert read_classes(written(tmp_path, "7: person\n3:dog\n"))[0] == [Category(7, "person"), Category(3, "dog")]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no class"),
        ("1: a\nb\n", "ids on some lines only"),
        ("1: a\n1: b\n", "'a' and 'b' both have id 1"),
        ("a\nb\nA\n", r"'a' \(id 1\) and 'A' \(id 3\) are one name"),
        ("a b\na  B\n", "are one name"),
        ("0: a\n", "id 0"),
        ("a, b\nb\n", "'b' is a class and a synonym of 'a'"),
        ("a, b\nc, b\n", "line 2: 'b' stands for 'c', and for 'a'"),
        ("a,,b\n", "line 1: 'a,,b'"),
    ],
)
def test_files_of_classes_that_clash(tmp_path, text, message):
    with pytest.raises(UserError, match=message):
        read_classes(written(tmp_path, text))


def test_vocabulary_from_names(tmp_path):
    aliases = read_aliases(written(tmp_path, "person, man, Woman\n"), Faults())
    names = [("woman", "1"), ("dog", "2"), ("man", "3"), ("dog", "4")]
    assert vocabulary_from_names(names, aliases).categories == (Category(1, "dog"), Category(2, "person"))
    with pytest.raises(UserError, match="1: class 'Dog'; 2: class 'dog'"):
        vocabulary_from_names([("Dog", "1"), ("dog", "2")], {})


def test_unknown_classes_of_closed_and_open_vocabularies():
    faults, categories = Faults(), [Category(1, "dog")]
    assert Vocabulary(categories, is_closed=True).id_of("cat", "here", faults) is None
    assert faults.left_out == {"class that is not in the vocabulary": 1}
    with pytest.raises(BadEntry, match="here: class 'cat'\n  expected: one of dog"):
        Vocabulary(categories).id_of("cat", "here", faults)


# --- faults ------------------------------------------------------------------------------------------


def test_faults_travel_between_processes():
    fault = pickle.loads(pickle.dumps(BadEntry("reason", "found", "expected", "fix")))
    assert (fault.reason, str(fault)) == ("reason", "found\n  expected: expected\n  fix:      fix")


def test_the_report_counts_faults_with_examples(tmp_path):
    source = id_masks(tmp_path / "in")
    noise_image(source / "images" / "c.jpg", (6, 8))
    report = converted("id-masks", source, tmp_path / "out", keep_going=True)
    assert report.notes == (f"skipped 1: image without a mask, first: {source / 'images' / 'c.jpg'}",)
    assert report.classes == 1 and report.skipped == {"image without a mask": 1}
    assert sum(report.images.values()) == 2 and sum(report.objects.values()) == 4


def test_large_vocabularies_keep_their_order(tmp_path):
    data, _ = whole("visual-genome", visual_genome(tmp_path / "vg"), tmp_path / "out", classes="1600")
    assert [c["name"] for c in data["categories"]] == ["tree", "cloud", "man", "person"]

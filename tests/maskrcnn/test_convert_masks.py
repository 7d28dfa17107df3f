"""Mask files: Penn-Fudan, SYNTHIA, Cityscapes, other folders of id masks, and one file for each object."""

import json
import shutil

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image
from source_datasets import (
    as_it_is,
    cityscapes,
    colour_16_bit,
    content,
    converted,
    id_masks,
    mask_files,
    noise_image,
    numbers,
    penn_fudan,
    synthia,
    whole,
)

from maskrcnn.data.coco import CocoDataset, instance_mask
from maskrcnn.data.convert.files import read_two_channels
from maskrcnn.errors import UserError


def masks_of(out, split="all"):
    """The masks of each image, as the package reads them."""
    records = CocoDataset.load(out, split).images
    return [[instance_mask(record, instance) for instance in record.instances] for record in records]


# --- formats -----------------------------------------------------------------------------------------


def test_penn_fudan(tmp_path):
    data, _ = whole("penn-fudan", penn_fudan(tmp_path / "PennFudanPed"), tmp_path / "out")
    assert data["categories"] == [{"id": 1, "name": "person"}]
    assert data["images"] == [
        {"id": 1, "file_name": "FudanPed00001.png", "height": 6, "width": 8},
        {"id": 2, "file_name": "PennPed00002.png", "height": 6, "width": 8},
    ]
    first, size = {"image_id": 1, "category_id": 1, "iscrowd": 0}, {"size": [6, 8]}
    assert data["annotations"][:2] == [
        {**first, "id": 1, "bbox": [1.0, 1.0, 2.0, 3.0], "area": 6, "segmentation": {**size, "counts": "7330m0"}},
        {**first, "id": 2, "bbox": [5.0, 2.0, 3.0, 4.0], "area": 12, "segmentation": {**size, "counts": "P142000"}},
    ]  # runs 7, 3, 3, 3, 32, and 32, 4, 2, 4, 2, 4


def test_synthia_reads_both_bytes_of_its_numbers(tmp_path):
    data, _ = whole("synthia", synthia(tmp_path / "RAND_CITYSCAPES"), tmp_path / "out")
    found = [(a["category_id"], a["bbox"], a["area"], a["iscrowd"]) for a in data["annotations"] if a["image_id"] == 1]
    assert found == [
        (8, [0, 0, 3, 1], 3, 1),  # cars without a number: a crowd region
        (8, [1, 1, 3, 3], 9, 0),
        (10, [5, 3, 3, 3], 9, 0),
    ]
    names = {c["id"]: c["name"] for c in data["categories"]}
    assert names[8] == "car" and names[10] == "pedestrian" and len(names) == 8


def test_colours_of_16_bits_are_read_whole(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 2**16, (5, 7, 3))
    colour_16_bit(tmp_path / "x.png", pixels)
    first, second = read_two_channels(tmp_path / "x.png")
    assert (first == pixels[..., 0]).all() and (second == pixels[..., 1]).all()
    eight_bit = noise_image(tmp_path / "y.png", (5, 7))
    assert (read_two_channels(eight_bit)[1] == np.array(Image.open(eight_bit))[..., 1]).all()


def test_cityscapes(tmp_path):
    report = as_it_is("cityscapes", cityscapes(tmp_path / "cityscapes"), tmp_path / "out")
    assert report.images == {"train": 1, "val": 1}
    assert report.left_out == {"class that is not in the vocabulary": 2}
    train = content(tmp_path / "out", "train")
    assert train["images"][0]["file_name"] == "aachen/aachen_000000_000019_leftImg8bit.png"
    found = [(a["category_id"], a["bbox"], a["iscrowd"]) for a in train["annotations"]]
    assert found == [(24, [0, 4, 3, 2], 1), (26, [1, 1, 2, 3], 0), (26, [3, 1, 2, 3], 0)]
    assert [c["id"] for c in train["categories"]] == [24, 25, 26, 27, 28, 31, 32, 33]


def test_cityscapes_with_other_classes_and_sets(tmp_path):
    (tmp_path / "classes.txt").write_text("26: car\n29: caravan\n")
    source, classes = cityscapes(tmp_path / "cityscapes"), str(tmp_path / "classes.txt")
    report = as_it_is("cityscapes", source, tmp_path / "out", classes=classes, sets=("test",))
    assert report.images == {"test": 1} and report.objects == {"test": 3}
    assert [a["category_id"] for a in content(tmp_path / "out", "test")["annotations"]] == [26, 26, 29]


def test_id_masks_of_one_class(tmp_path):
    data, _ = whole("id-masks", id_masks(tmp_path / "mine"), tmp_path / "out", class_name="ring", void=9)
    assert data["categories"] == [{"id": 1, "name": "ring"}]
    assert [(a["image_id"], a["bbox"], a["area"]) for a in data["annotations"]] == [
        (1, [1, 1, 4, 4], 12),
        (2, [1, 1, 4, 4], 12),
    ]
    ring = masks_of(tmp_path / "out")[0][0]
    assert not ring[2:4, 2:4].any() and ring[1:5, 1:5].sum() == 12


def test_id_masks_with_a_divisor_and_a_mask_suffix(tmp_path):
    source = tmp_path / "mine"
    noise_image(source / "shots" / "a.jpg", (4, 6))
    numbers(source / "shots" / "a_ids.png", [[0, 201, 201, 202, 2, 3]] * 4, np.uint16)
    (tmp_path / "classes.txt").write_text("1: nut\n2: bolt\n")
    names = {"image_folder": "shots", "mask_folder": "shots", "mask_suffix": "_ids"}
    data, _ = whole("id-masks", source, tmp_path / "out", classes=str(tmp_path / "classes.txt"), divisor=100, **names)
    assert [image["file_name"] for image in data["images"]] == ["a.jpg"]
    found = [(a["category_id"], a["bbox"], a["iscrowd"]) for a in data["annotations"]]
    assert found == [(2, [4, 0, 1, 4], 1), (2, [1, 0, 2, 4], 0), (2, [3, 0, 1, 4], 0)]
    numbers(source / "shots" / "a_ids.png", [[0, 301, 0, 0, 0, 0]] * 4, np.uint16)
    with pytest.raises(UserError, match=r"a_ids.png, pixels of 301: class 3"):
        whole("id-masks", source, tmp_path / "new", classes=str(tmp_path / "classes.txt"), divisor=100, **names)


def test_mask_files(tmp_path):
    source = mask_files(tmp_path / "stage1_train")
    data, _ = whole("mask-files", source, tmp_path / "out", class_name="nucleus")
    assert [image["file_name"] for image in data["images"]] == ["0a1b.png", "2c3d.png"]
    found = [(a["image_id"], a["bbox"], a["area"]) for a in data["annotations"]]
    assert found == [(1, [1, 1, 3, 2], 6), (1, [0, 4, 8, 2], 16), (2, [1, 1, 3, 2], 6), (2, [0, 4, 8, 2], 16)]
    for record, masks in zip(CocoDataset.load(tmp_path / "out", "all").images, masks_of(tmp_path / "out"), strict=True):
        for k, mask in enumerate(masks):
            file = source / record.path.stem / "masks" / f"{k}f.png"
            assert (mask == (np.array(Image.open(file)) > 0)).all()


def test_folders_that_are_called_like_splits_are_splits(tmp_path):
    source = mask_files(tmp_path / "nuclei")
    (source / "train").mkdir()
    shutil.move(source / "0a1b", source / "train" / "0a1b")
    mixed, _ = whole("mask-files", source, tmp_path / "mixed")
    assert [image["file_name"] for image in mixed["images"]] == ["2c3d.png", "train/0a1b.png"]
    (source / "validation").mkdir()
    shutil.move(source / "2c3d", source / "validation" / "2c3d")
    report = as_it_is("mask-files", source, tmp_path / "out")
    assert report.images == {"train": 1, "validation": 1}
    assert content(tmp_path / "out", "validation")["images"][0]["file_name"] == "2c3d.png"


# --- masks are converted exactly ---------------------------------------------------------------------


@given(
    ids=arrays.arrays(
        np.uint8, arrays.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=12), elements=st.integers(0, 4)
    )
)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_id_masks_are_exact(tmp_path_factory, ids):
    """Masks with holes, of several parts, touching, or one pixel large."""
    root = tmp_path_factory.mktemp("ids")
    noise_image(root / "in" / "images" / "a.png", ids.shape)
    numbers(root / "in" / "masks" / "a.png", ids)
    whole("id-masks", root / "in", root / "out")
    (masks,) = masks_of(root / "out")
    expected = [ids == number for number in np.unique(ids) if number]
    assert len(masks) == len(expected)
    assert all((mask == want).all() for mask, want in zip(masks, expected, strict=True))


@given(stack=arrays.arrays(bool, st.tuples(st.integers(1, 4), st.integers(1, 9), st.integers(1, 9))))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_overlapping_mask_files_are_exact(tmp_path_factory, stack):
    root = tmp_path_factory.mktemp("files")
    noise_image(root / "in" / "x" / "images" / "x.png", stack.shape[1:])
    for k, mask in enumerate(stack):
        numbers(root / "in" / "x" / "masks" / f"{k}.png", mask * 255)
    _, report = whole("mask-files", root / "in", root / "out", keep_going=True)
    expected = [mask for mask in stack if mask.any()]
    assert report.skipped.get("mask without a pixel", 0) == len(stack) - len(expected)
    if expected:
        (masks,) = masks_of(root / "out")
        assert all((mask == want).all() for mask, want in zip(masks, expected, strict=True))


# --- bad input ---------------------------------------------------------------------------------------


def no_mask(source):
    (source / "PedMasks" / "FudanPed00001_mask.png").unlink()


def no_image(source):
    (source / "PNGImages" / "FudanPed00001.png").unlink()


def other_size(source):
    noise_image(source / "PNGImages" / "FudanPed00001.png", (8, 6))


def colours(source):
    noise_image(source / "PedMasks" / "FudanPed00001_mask.png", (6, 8))


def cut(source):
    path = source / "PedMasks" / "FudanPed00001_mask.png"
    path.write_bytes(path.read_bytes()[:50])


def jpeg(source):
    Image.new("L", (8, 6)).save(source / "PedMasks" / "FudanPed00001_mask.png", format="JPEG")


def cut_image(source):
    path = source / "PNGImages" / "FudanPed00001.png"
    path.write_bytes(path.read_bytes()[:70])


FAULTS = {
    no_mask: ("image without a mask", r"FudanPed00001\.png\n.*FudanPed00001_mask\.png"),
    no_image: ("mask without an image", r"FudanPed00001_mask\.png"),
    other_size: ("annotation of another size than its image", r"_mask\.png: for 8×6 pixels\n  expected: .*6×8"),
    colours: ("mask that cannot be read", "RGB pixels"),
    cut: ("mask that cannot be read", "FudanPed00001_mask.png"),
    jpeg: ("mask that cannot be read", "a JPEG, whose compression changes the numbers"),
    cut_image: ("image that cannot be read", "FudanPed00001.png"),
}


@pytest.mark.parametrize("spoil", FAULTS, ids=lambda spoil: spoil.__name__)
def test_a_fault_is_named_or_counted(tmp_path, spoil):
    source, (reason, text) = penn_fudan(tmp_path / "PennFudanPed"), FAULTS[spoil]
    spoil(source)
    with pytest.raises(UserError, match=text):
        whole("penn-fudan", source, tmp_path / "out")
    data, report = whole("penn-fudan", source, tmp_path / "out", keep_going=True)
    assert report.skipped == {reason: 1}
    assert [(image["id"], image["file_name"]) for image in data["images"]] == [(2, "PennPed00002.png")]


def test_an_empty_mask_is_a_fault_of_its_object(tmp_path):
    source = mask_files(tmp_path / "nuclei")
    numbers(source / "0a1b" / "masks" / "0f.png", np.zeros((6, 8)))
    with pytest.raises(UserError, match=r"0a1b.masks.0f\.png\n  expected: at least one pixel"):
        whole("mask-files", source, tmp_path / "out")
    _, report = whole("mask-files", source, tmp_path / "out", keep_going=True)
    assert report.skipped == {"mask without a pixel": 1} and report.objects == {"all": 3}


def test_folders_without_masks_or_with_two_images(tmp_path):
    source = mask_files(tmp_path / "nuclei")
    shutil.rmtree(source / "0a1b" / "masks")
    noise_image(source / "2c3d" / "images" / "other.png", (6, 8))
    with pytest.raises(UserError, match=r"no folder .*0a1b.masks"):
        whole("mask-files", source, tmp_path / "out")
    with pytest.raises(UserError, match=r"no image could be converted[\s\S]*skipped 1: folder without one image"):
        whole("mask-files", source, tmp_path / "out", keep_going=True)
    assert not (tmp_path / "out").exists()


def test_an_image_without_objects_is_converted(tmp_path):
    source = mask_files(tmp_path / "nuclei")
    for path in (source / "0a1b" / "masks").iterdir():
        path.unlink()
    data, _ = whole("mask-files", source, tmp_path / "out")
    assert len(data["images"]) == 2 and {a["image_id"] for a in data["annotations"]} == {2}


@pytest.mark.parametrize(
    ("kind", "folders", "text"),
    [
        ("penn-fudan", (), "no folder .*PNGImages"),
        ("synthia", ("RGB",), "no folder .*LABELS"),
        ("cityscapes", ("leftImg8bit", "gtFine"), "nothing to convert"),
        ("id-masks", ("images", "masks"), "nothing to convert"),
        ("mask-files", ("images",), "nothing to convert"),
    ],
)
def test_folders_of_another_kind_are_refused(tmp_path, kind, folders, text):
    (tmp_path / "in").mkdir()
    for name in folders:
        (tmp_path / "in" / name).mkdir()
    with pytest.raises(UserError, match=text):
        whole(kind, tmp_path / "in", tmp_path / "out")


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"divisor": 1000}, "--divisor without --classes"),
        ({"classes": "x"}, "--classes without --divisor"),
        ({"classes": "{file}", "divisor": 1}, "--divisor 1"),
        ({"classes": "{file}", "divisor": 10, "class_name": "a"}, "--class together with them"),
        ({"classes": "missing.txt", "divisor": 10}, "missing.txt cannot be read"),
    ],
)
def test_options_that_contradict_each_other(tmp_path, options, text):
    (tmp_path / "classes.txt").write_text("1: a\n")
    options = {key: str(tmp_path / "classes.txt") if value == "{file}" else value for key, value in options.items()}
    with pytest.raises(UserError, match=text):
        whole("id-masks", id_masks(tmp_path / "in"), tmp_path / "out", **options)


def test_two_files_of_one_name_are_refused(tmp_path):
    source = id_masks(tmp_path / "in")
    noise_image(source / "images" / "a.png", (6, 8))
    with pytest.raises(UserError, match=r"a\.jpg and .*a\.png"):
        converted("id-masks", source, tmp_path / "out")


def test_the_annotation_files_are_plain_json(tmp_path):
    converted("id-masks", id_masks(tmp_path / "in"), tmp_path / "out")
    for split in ("train", "val"):
        text = (tmp_path / "out" / "annotations" / f"instances_{split}.json").read_text()
        assert text.endswith("\n") and set(json.loads(text)) == {"info", "images", "annotations", "categories"}

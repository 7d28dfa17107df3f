"""LabelMe: shapes, groups, masks, EXIF orientations, and faults."""

import base64
import io
import json
import math

import numpy as np
import pytest
from PIL import Image
from source_datasets import TRIANGLE, as_it_is, content, labelme, labelme_file, noise_image, whole, written_json

from maskrcnn.data.coco import CocoDataset, instance_mask
from maskrcnn.data.images import read_image
from maskrcnn.errors import UserError

ORIENTATION = 0x0112  # EXIF's tag


@pytest.fixture
def source(tmp_path):
    return labelme(tmp_path / "photos")


def one(tmp_path, *shapes, size_hw=(20, 30), **fields):
    """A folder with one labelled image."""
    noise_image(tmp_path / "photos" / "a.jpg", (20, 30))
    labelme_file(tmp_path / "photos" / "a.json", "a.jpg", size_hw, *shapes, **fields)
    return tmp_path / "photos"


def only_mask(out):
    (record,) = CocoDataset.load(out, "all").images
    (instance,) = record.instances
    return instance_mask(record, instance)


def in_base64(pixels):
    buffer = io.BytesIO()
    Image.fromarray(np.array(pixels, np.uint8)).save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def test_shapes_and_groups(source, tmp_path):
    data, _ = whole("labelme", source, tmp_path / "out")
    assert data["categories"] == [{"id": 1, "name": "leaf"}, {"id": 2, "name": "stone"}]
    assert data["images"][0] == {"id": 1, "file_name": "a.jpg", "height": 20, "width": 30}
    leaf, stone, group = data["annotations"][:3]
    assert leaf["segmentation"] == [[1, 1, 9, 1.5, 5, 9]]
    assert (leaf["category_id"], leaf["bbox"], leaf["iscrowd"]) == (1, [1.0, 1.0, 8.0, 8.0], 0)
    assert stone["segmentation"] == [[20, 12, 12, 12, 12, 4, 20, 4]]
    assert (stone["category_id"], stone["bbox"], stone["area"]) == (2, [12.0, 4.0, 8.0, 8.0], 64)
    assert group["segmentation"] == [[2, 12, 6, 12, 6, 16], [8, 12, 11, 12, 11, 18, 8, 18]]
    assert (group["category_id"], group["bbox"]) == (1, [2.0, 12.0, 9.0, 6.0])
    assert [a["image_id"] for a in data["annotations"]] == [1, 1, 1, 2, 2, 2]


def test_a_circle_is_round(tmp_path):
    source = one(tmp_path, ("ball", "circle", [[12, 10], [12, 17]]))
    whole("labelme", source, tmp_path / "out")
    y, x = np.mgrid[:20, :30] + 0.5
    difference = only_mask(tmp_path / "out") ^ (np.hypot(x - 12, y - 10) < 7)
    assert difference.sum() <= 0.05 * math.pi * 49


def test_masks_keep_their_holes_and_unite_with_polygons(tmp_path):
    pixels = np.ones((5, 6), np.uint8)
    pixels[2, 2:4] = 0
    mask = {"mask": in_base64(pixels), "group_id": 1}
    source = one(
        tmp_path,
        ("ring", "mask", [[3, 4], [8, 8]], mask),
        ("ring", "rectangle", [[20, 10], [24, 12]], {"group_id": 1}),
    )
    data, _ = whole("labelme", source, tmp_path / "out")
    expected = np.zeros((20, 30), bool)
    expected[4:9, 3:9] = pixels
    expected[10:12, 20:24] = True
    assert (only_mask(tmp_path / "out") == expected).all()
    assert data["annotations"][0]["area"] == expected.sum() and data["annotations"][0]["bbox"] == [3, 4, 21, 8]


def test_a_group_id_is_one_object_of_each_label(tmp_path):
    shapes = [(label, "polygon", TRIANGLE, {"group_id": 0}) for label in ("a", "b", "a")]
    data, _ = whole("labelme", one(tmp_path, *shapes), tmp_path / "out")
    assert [(a["category_id"], len(a["segmentation"])) for a in data["annotations"]] == [(1, 2), (2, 1)]


@pytest.mark.parametrize("orientation", [2, 3, 6, 8])
def test_an_image_with_an_orientation_is_annotated_upright_and_keeps_its_bytes(tmp_path, orientation):
    """Coordinates refer to the image as LabelMe shows it."""
    stored_hw = (20, 30) if orientation < 5 else (30, 20)
    upright = np.zeros((20, 30, 3), np.uint8)
    upright[2:10, 4:20] = 255
    back = {2: lambda a: a[:, ::-1], 3: lambda a: a[::-1, ::-1], 6: np.rot90, 8: lambda a: np.rot90(a, 3)}
    pixels = back[orientation](upright)
    assert pixels.shape[:2] == stored_hw
    image = Image.fromarray(np.ascontiguousarray(pixels))
    exif = image.getexif()
    exif[ORIENTATION] = orientation
    (tmp_path / "photos").mkdir()
    image.save(tmp_path / "photos" / "a.jpg", exif=exif, quality=95)
    shape = ("box", "rectangle", [[4, 2], [20, 10]])
    labelme_file(tmp_path / "photos" / "a.json", "a.jpg", (20, 30), shape)
    data, _ = whole("labelme", tmp_path / "photos", tmp_path / "out")
    assert (data["images"][0]["height"], data["images"][0]["width"]) == (20, 30)
    assert (tmp_path / "out" / "all" / "a.jpg").read_bytes() == (tmp_path / "photos" / "a.jpg").read_bytes()
    written = read_image(tmp_path / "out" / "all" / "a.jpg")
    assert written.shape == (20, 30, 3)
    mask = only_mask(tmp_path / "out")
    assert written[mask].mean() > 240 and written[~mask].mean() < 15


def test_embedded_images_and_windows_paths(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (20, 30, 3), dtype=np.uint8)
    folder = tmp_path / "photos"
    labelme_file(folder / "a.json", "..\\img\\a.png", (20, 30), ("x", "polygon", TRIANGLE), imageData=in_base64(pixels))
    noise_image(folder / "b.jpg", (20, 30), 1)
    labelme_file(folder / "b.json", "C:\\photos\\b.jpg", (20, 30), ("x", "polygon", TRIANGLE))
    data, _ = whole("labelme", folder, tmp_path / "out")
    assert [image["file_name"] for image in data["images"]] == ["a.png", "b.jpg"]
    assert (read_image(tmp_path / "out" / "all" / "a.png") == pixels).all()


def test_unlabelled_images_and_ignored_labels(tmp_path):
    source = one(tmp_path, ("__ignore__", "polygon", TRIANGLE), ("x", "polygon", TRIANGLE))
    noise_image(source / "unlabelled.jpg", (20, 30), 1)
    labelme_file(source / "empty.json", "empty.jpg", (20, 30))
    noise_image(source / "empty.jpg", (20, 30), 2)
    data, report = whole("labelme", source, tmp_path / "out")
    assert [image["file_name"] for image in data["images"]] == ["a.jpg", "empty.jpg"]
    assert report.left_out == {"shape labelled __ignore__": 1} and len(data["annotations"]) == 1
    assert data["categories"] == [{"id": 1, "name": "x"}]


def test_folders_named_train_and_val_are_the_splits(source, tmp_path):
    for stem, split in (("a", "train"), ("b", "val")):
        (source / split).mkdir()
        for suffix in ("jpg", "json"):
            (source / f"{stem}.{suffix}").rename(source / split / f"{stem}.{suffix}")
    report = as_it_is("labelme", source, tmp_path / "out")
    assert report.images == {"train": 1, "val": 1}
    assert content(tmp_path / "out", "val")["images"][0] == {"id": 2, "file_name": "b.jpg", "height": 20, "width": 30}


@pytest.mark.parametrize("kind", ["rectangle", "rotation", "quadrilateral"])
def test_shapes_of_four_corners_are_polygons(tmp_path, kind):
    corners = [[4, 6], [12, 2], [16, 10], [8, 14]]
    data, _ = whole("labelme", one(tmp_path, ("x", kind, corners)), tmp_path / "out")
    assert data["annotations"][0]["segmentation"] == [[value for point in corners for value in point]]


# --- bad input ---------------------------------------------------------------------------------------

SHAPES = {  # shape, reason, error text
    "point": (("x", "point", [[1, 2]]), "shape that has no area", r"shape 2 \(x\): point of 1 points"),
    "line": (("x", "line", [[1, 2], [3, 4]]), "shape that has no area", "line of 2 points"),
    "two points": (("x", "polygon", [[1, 2], [3, 4]]), "shape that has no area", "polygon of 2 points"),
    "no radius": (("x", "circle", [[1, 2], [1, 2]]), "shape that has no area", "circle of 2 points"),
    "text": (("x", "polygon", [[1, 2], [3, "4"], [5, 1]]), "malformed shape", "'4'"),
    "triple": (("x", "polygon", [[1, 2], [3, 4, 5], [5, 1]]), "malformed shape", r"point \[3, 4, 5\]"),
    "far": (("x", "polygon", [[1, 2], [300, 4], [5, 1]]), "malformed segmentation", "outside the image"),
    "outside": (("x", "rectangle", [[-9, -9], [-2, -2]]), "mask without a pixel", r"shape 2 \(x\)"),
    "no label": (("", "polygon", TRIANGLE), "malformed entry", "shape 2, label: ''"),
    "no mask": (("x", "mask", [[1, 2], [3, 4]]), "malformed shape", "mask"),
    "mask": (("x", "mask", [[1, 2], [3, 4]], {"mask": "AAAA"}), "malformed shape", "mask"),
    "mask of another size": (
        ("x", "mask", [[1, 2], [9, 9]], {"mask": in_base64(np.ones((3, 3)))}),
        "malformed shape",
        r"mask \(3, 3\) from \(1, 2\) to \(9, 9\)",
    ),
}


@pytest.mark.parametrize("name", SHAPES)
def test_a_shape_at_fault_is_named_or_counted(tmp_path, name):
    shape, reason, text = SHAPES[name]
    source = one(tmp_path, ("x", "polygon", TRIANGLE), shape)
    with pytest.raises(UserError, match=text) as refused:
        whole("labelme", source, tmp_path / "out")
    assert "--keep-going" in refused.value.fix
    data, report = whole("labelme", source, tmp_path / "out", keep_going=True)
    assert report.skipped == {reason: 1} and len(data["annotations"]) == 1


def test_a_faulty_part_does_not_cost_its_object(tmp_path):
    group = {"group_id": 1}
    source = one(
        tmp_path, ("x", "polygon", TRIANGLE, group), ("x", "line", [[1, 2], [3, 4]], group), ("x", "polygon", TRIANGLE)
    )
    data, report = whole("labelme", source, tmp_path / "out", keep_going=True)
    first, second = data["annotations"]
    assert first["segmentation"] == second["segmentation"] and report.skipped == {"shape that has no area": 1}


def broken_json(source):
    text = (source / "a.json").read_text()
    (source / "a.json").write_text(text[: len(text) // 2])


def not_labelme(source):
    written_json(source / "a.json", {"shapes": []})


def a_list(source):
    written_json(source / "a.json", [1, 2])


def no_shapes(source):
    content = json.loads((source / "a.json").read_text())
    written_json(source / "a.json", {**content, "shapes": None})


def no_image(source):
    (source / "a.jpg").unlink()


def other_size(source):
    noise_image(source / "a.jpg", (21, 30))


def no_base64(source):
    no_image(source)
    content = json.loads((source / "a.json").read_text())
    written_json(source / "a.json", {**content, "imageData": "no!"})


FILES = {
    broken_json: ("annotation file that cannot be read", r"a\.json, line 1, column \d+: not JSON"),
    not_labelme: ("malformed entry", r"a\.json, imagePath: None"),
    a_list: ("malformed entry", r"a\.json: of type list"),
    no_shapes: ("malformed entry", r"a\.json, shapes: of type NoneType"),
    no_image: ("missing image", r"a\.json: no file .*a\.jpg, and no imageData"),
    other_size: ("annotation of another size than its image", r"a\.json: for 30×20 pixels\n  expected: .*30×21"),
    no_base64: ("missing image", r"a\.json, imageData: not base64"),
}


@pytest.mark.parametrize("spoil", FILES, ids=lambda spoil: spoil.__name__)
def test_a_file_at_fault_is_named_or_counted(source, tmp_path, spoil):
    reason, text = FILES[spoil]
    spoil(source)
    with pytest.raises(UserError, match=text):
        whole("labelme", source, tmp_path / "out")
    data, report = whole("labelme", source, tmp_path / "out", keep_going=True)
    assert report.skipped == {reason: 1}
    assert data["images"] == [{"id": 2, "file_name": "b.jpg", "height": 20, "width": 30}]


def test_two_spellings_of_a_label_are_refused(tmp_path):
    source = one(tmp_path, ("Leaf", "polygon", TRIANGLE), ("leaf", "polygon", TRIANGLE))
    with pytest.raises(UserError, match=r"shape 1: class 'Leaf'; .*shape 2: class 'leaf'"):
        whole("labelme", source, tmp_path / "out", keep_going=True)


def test_two_files_for_one_image_are_refused(source, tmp_path):
    labelme_file(source / "c.json", "a.jpg", (20, 30), ("leaf", "polygon", TRIANGLE))
    with pytest.raises(UserError, match=r"a\.json and .*c\.json: both images would be a\.jpg"):
        whole("labelme", source, tmp_path / "out")


def test_a_folder_without_json_or_labels(tmp_path):
    noise_image(tmp_path / "photos" / "a.jpg", (20, 30))
    with pytest.raises(UserError, match="nothing to convert"):
        whole("labelme", tmp_path / "photos", tmp_path / "out")
    labelme_file(tmp_path / "photos" / "a.json", "a.jpg", (20, 30))
    with pytest.raises(UserError, match="no labelled shape"):
        whole("labelme", tmp_path / "photos", tmp_path / "out")

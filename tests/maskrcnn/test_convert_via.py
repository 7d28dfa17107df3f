"""VGG Image Annotator: regions, attributes, versions, and faults."""

import json
import math

import numpy as np
import pytest
from source_datasets import as_it_is, content, noise_image, via, via_region, whole, written_json

from maskrcnn.data.coco import CocoDataset, instance_mask
from maskrcnn.errors import UserError

LEAF = {"kind": "leaf"}
TRIANGLE = {"all_points_x": [1, 9, 5], "all_points_y": [1, 1, 9]}


@pytest.fixture
def source(tmp_path):
    return via(tmp_path / "photos")


def one(tmp_path, *regions, filename="a.jpg"):
    """A folder with an export of the regions of one image."""
    noise_image(tmp_path / "photos" / "a.jpg", (20, 30))
    image = {"filename": filename, "size": 1, "regions": list(regions), "file_attributes": {}}
    written_json(tmp_path / "photos" / "via_region_data.json", {f"{filename}1": image})
    return tmp_path / "photos"


def test_a_project(source, tmp_path):
    data, _ = whole("via", source, tmp_path / "out")
    assert data["categories"] == [{"id": 1, "name": "leaf"}, {"id": 2, "name": "stone"}]
    assert [image["file_name"] for image in data["images"]] == ["a.jpg", "b.jpg"]
    leaf, stone = data["annotations"][:2]
    assert leaf["segmentation"] == [[1, 1, 9, 1, 5, 9]]
    assert (leaf["image_id"], leaf["category_id"], leaf["bbox"]) == (1, 1, [1.0, 1.0, 8.0, 8.0])
    assert stone["segmentation"] == [[12, 4, 20, 4, 20, 13, 12, 13]]
    assert (stone["category_id"], stone["bbox"], stone["area"], stone["iscrowd"]) == (2, [12.0, 4.0, 8.0, 9.0], 72, 0)


def test_the_file_itself_can_be_named(source, tmp_path):
    data, _ = whole("via", source / "via_project.json", tmp_path / "out")
    assert len(data["images"]) == 2


@pytest.mark.parametrize("turn", [0, 0.5])
def test_ellipses_and_circles_are_round(tmp_path, turn):
    shape = {"cx": 14, "cy": 10, "rx": 9, "ry": 5, "theta": turn}
    source = one(tmp_path, via_region("ellipse", LEAF, **shape), via_region("circle", LEAF, cx=8, cy=9, r=6))
    whole("via", source, tmp_path / "out")
    (record,) = CocoDataset.load(tmp_path / "out", "all").images
    y, x = np.mgrid[:20, :30] + 0.5
    along = (x - 14) * math.cos(turn) + (y - 10) * math.sin(turn)
    across = (y - 10) * math.cos(turn) - (x - 14) * math.sin(turn)
    expected = (along / 9) ** 2 + (across / 5) ** 2 < 1, np.hypot(x - 8, y - 9) < 6
    for instance, inside in zip(record.instances, expected, strict=True):
        assert (instance_mask(record, instance) ^ inside).sum() <= 0.05 * inside.sum()


def test_a_polyline_is_closed(tmp_path):
    source = one(tmp_path, via_region("polyline", LEAF, **TRIANGLE))
    data, _ = whole("via", source, tmp_path / "out")
    assert data["annotations"][0]["segmentation"] == [[1, 1, 9, 1, 5, 9]]


def test_version_1_has_numbered_regions(tmp_path):
    source = one(tmp_path)
    regions = {str(k): via_region("rect", {"kind": f"c{k}"}, x=k, y=0, width=2, height=2) for k in (10, 9, 1)}
    image = {"filename": "a.jpg", "size": 1, "regions": regions, "file_attributes": {}}
    written_json(source / "via_region_data.json", {"a.jpg1": image})
    data, _ = whole("via", source, tmp_path / "out")
    assert [a["bbox"][0] for a in data["annotations"]] == [1, 9, 10]


def test_splits_in_folders_as_in_the_balloon_example(tmp_path):
    for number, split in enumerate(("train", "val")):
        noise_image(tmp_path / "balloon" / split / "x.jpg", (20, 30), number)
        image = {"filename": "x.jpg", "size": 1, "regions": [via_region("polygon", {}, **TRIANGLE)]}
        written_json(tmp_path / "balloon" / split / "via_region_data.json", {"x.jpg1": image})
    report = as_it_is("via", tmp_path / "balloon", tmp_path / "out", class_name="balloon")
    assert report.images == {"train": 1, "val": 1} and report.objects == {"train": 1, "val": 1}
    assert content(tmp_path / "out", "val")["images"][0]["file_name"] == "x.jpg"
    assert content(tmp_path / "out", "val")["categories"] == [{"id": 1, "name": "balloon"}]


def test_images_in_a_folder_of_their_own(source, tmp_path):
    (source / "img").mkdir()
    for name in "ab":
        (source / f"{name}.jpg").rename(source / "img" / f"{name}.jpg")
    data, _ = whole("via", source, tmp_path / "out", image_folder="img")
    assert [image["file_name"] for image in data["images"]] == ["a.jpg", "b.jpg"]


def test_the_class_is_a_text_or_the_ticked_box_of_an_attribute(tmp_path):
    attributes = [{"kind": {"leaf": True, "stone": False}, "id": "1"}, {"kind": "stone", "id": "2"}]
    source = one(tmp_path, *(via_region("polygon", each, **TRIANGLE) for each in attributes))
    with pytest.raises(UserError, match=r"attributes id, kind[\s\S]*--class-attribute"):
        whole("via", source, tmp_path / "out")
    with pytest.raises(UserError, match="expected: the attribute colour"):
        whole("via", source, tmp_path / "out", class_attribute="colour")
    data, _ = whole("via", source, tmp_path / "out", class_attribute="kind")
    names = {c["id"]: c["name"] for c in data["categories"]}
    assert [names[a["category_id"]] for a in data["annotations"]] == ["leaf", "stone"]


def test_a_class_for_all_beside_what_tells_them_apart(source, tmp_path):
    with pytest.raises(UserError, match="--class with --class-attribute"):
        whole("via", source, tmp_path / "out", class_name="x", class_attribute="kind")


REGIONS = {
    "point": (via_region("point", LEAF, cx=1, cy=2), "shape that has no area", "region 2 .*'point'"),
    "two points": (
        via_region("polygon", LEAF, all_points_x=[1, 2], all_points_y=[1, 2]),
        "shape that has no area",
        "2 x",
    ),
    "uneven": (
        via_region("polygon", LEAF, all_points_x=[1, 2, 3], all_points_y=[1, 2]),
        "shape that has no area",
        "2 y",
    ),
    "no points": (via_region("polygon", LEAF), "malformed entry", "all_points_x: of type NoneType"),
    "text": (via_region("rect", LEAF, x="1", y=1, width=2, height=2), "malformed shape", "x: '1'"),
    "no width": (via_region("rect", LEAF, x=1, y=1, width=0, height=2), "malformed shape", "width: 0"),
    "radius": (via_region("circle", LEAF, cx=1, cy=1, r=-2), "malformed shape", "r: -2"),
    "no class": (via_region("polygon", {"kind": ""}, **TRIANGLE), "region without a class", "kind is ''"),
    "two classes": (
        via_region("polygon", {"kind": {"a": True, "b": True}}, **TRIANGLE),
        "region without a class",
        r"kind is \['a', 'b'\]",
    ),
    "no shape": ({"region_attributes": LEAF}, "malformed entry", "shape_attributes: of type NoneType"),
    "no region": (7, "malformed entry", "region 2: of type int"),
}


@pytest.mark.parametrize("name", REGIONS)
def test_a_region_at_fault_is_named_or_counted(tmp_path, name):
    region, reason, text = REGIONS[name]
    source = one(tmp_path, via_region("polygon", LEAF, **TRIANGLE), region)
    with pytest.raises(UserError, match=text):
        whole("via", source, tmp_path / "out")
    data, report = whole("via", source, tmp_path / "out", keep_going=True)
    assert report.skipped == {reason: 1} and len(data["annotations"]) == 1


def test_images_at_fault_are_named_or_counted(source, tmp_path):
    (source / "a.jpg").unlink()
    with pytest.raises(UserError, match=r"a\.jpg does not exist"):
        whole("via", source, tmp_path / "out")
    data, report = whole("via", source, tmp_path / "out", keep_going=True)
    assert report.skipped == {"image that cannot be read": 1}
    assert [image["id"] for image in data["images"]] == [2]


def test_an_entry_at_fault_changes_no_other_images_id(source, tmp_path):
    content = json.loads((source / "via_project.json").read_text())
    del content["_via_img_metadata"]["a.jpg123"]["filename"]
    written_json(source / "via_project.json", content)
    data, report = whole("via", source, tmp_path / "out", keep_going=True)
    assert report.skipped == {"malformed entry": 1} and [image["id"] for image in data["images"]] == [2]


@pytest.mark.parametrize("filename", ["../a.jpg", "/a.jpg"])
def test_images_outside_of_the_folder_are_refused(tmp_path, filename):
    source = one(tmp_path, via_region("polygon", LEAF, **TRIANGLE), filename=filename)
    with pytest.raises(UserError, match="below the folder of images"):
        whole("via", source, tmp_path / "out")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": ', r"via_project\.json, line 1, column \d+: not JSON"),
        ("[]", r"via_project\.json: of type list"),
        ('{"a.jpg1": {"regions": []}}', r"image a\.jpg1, filename: None"),
        ("{}", "nothing to convert"),
        ('{"a.jpg1": {"filename": "a.jpg", "regions": 3}}', "regions: of type int"),
    ],
)
def test_files_that_are_not_via(source, tmp_path, text, message):
    (source / "via_project.json").write_text(text)
    with pytest.raises(UserError, match=message):
        whole("via", source, tmp_path / "out")

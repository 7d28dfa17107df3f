"""Visual Genome: boxes, vocabularies, aliases, and a large file read entry by entry."""

import json

import pytest
from source_datasets import converted, noise_image, visual_genome, whole, written_json

from maskrcnn.data.coco import CocoDataset
from maskrcnn.data.convert.source import BadEntry
from maskrcnn.data.convert.visual_genome import array_spans
from maskrcnn.errors import UserError


@pytest.fixture
def source(tmp_path):
    return visual_genome(tmp_path / "vg")


@pytest.fixture
def alias(tmp_path):
    (tmp_path / "alias.txt").write_text("person,man,woman\n")
    return tmp_path / "alias.txt"


def changed(source, change):
    objects = json.loads((source / "objects.json").read_text())
    change(objects)
    written_json(source / "objects.json", objects)


def test_the_most_frequent_names(source, tmp_path, alias):
    data, report = whole("visual-genome", source, tmp_path / "out", classes="2", alias=alias)
    assert data["categories"] == [{"id": 1, "name": "person"}, {"id": 2, "name": "tree"}]
    assert data["images"] == [
        {"id": 2, "file_name": "2.jpg", "height": 20, "width": 30},
        {"id": 5, "file_name": "5.jpg", "height": 20, "width": 30},
    ]
    assert data["annotations"] == [
        {"id": 1, "image_id": 2, "category_id": 1, "bbox": [3, 4, 10, 5], "area": 50, "iscrowd": 0},
        {"id": 2, "image_id": 2, "category_id": 2, "bbox": [20, 10, 10, 6], "area": 60, "iscrowd": 0},  # cut
        {"id": 3, "image_id": 5, "category_id": 1, "bbox": [1, 2, 3, 4], "area": 12, "iscrowd": 0},
        {"id": 4, "image_id": 5, "category_id": 2, "bbox": [5, 5, 5, 5], "area": 25, "iscrowd": 0},
    ]
    assert report.left_out == {"class that is not in the vocabulary": 1}


def test_names_of_a_file(source, tmp_path):
    (tmp_path / "vocabulary.txt").write_text("cloud\nman, person\n")
    data, _ = whole("visual-genome", source, tmp_path / "out", classes=str(tmp_path / "vocabulary.txt"))
    assert data["categories"] == [{"id": 1, "name": "cloud"}, {"id": 2, "name": "man"}]
    assert [a["category_id"] for a in data["annotations"]] == [2, 1, 2]


def test_the_dataset_has_boxes_only(source, tmp_path):
    converted("visual-genome", source, tmp_path / "out", classes="5")
    dataset = CocoDataset.load(tmp_path / "out", "train")
    assert not dataset.has_masks and dataset.skipped == {}
    assert all(record.instances for record in dataset.images)


def test_classes_are_required(source, tmp_path):
    with pytest.raises(UserError, match="without --classes"):
        whole("visual-genome", source, tmp_path / "out")
    with pytest.raises(UserError, match="--classes 0"):
        whole("visual-genome", source, tmp_path / "out", classes="0")


def test_an_alias_of_two_names_is_refused_or_counted(source, tmp_path, alias):
    alias.write_text("person,man\nmale,man,boy\n")
    with pytest.raises(UserError, match=r"alias\.txt, line 2: 'man' stands for 'male', and for 'person'"):
        whole("visual-genome", source, tmp_path / "out", classes="2", alias=alias)
    data, report = whole("visual-genome", source, tmp_path / "out", classes="2", alias=alias, keep_going=True)
    assert report.skipped == {"name that stands for two classes": 1}
    assert data["categories"][0]["name"] == "person"


def no_extent(objects):
    objects[0]["objects"][0]["w"] = 0


def outside(objects):
    objects[0]["objects"][0]["x"] = 30


def no_name(objects):
    objects[0]["objects"][0]["names"] = []


def no_number(objects):
    del objects[0]["objects"][0]["y"]


def no_object(objects):
    objects[0]["objects"][0] = "man"


OBJECTS = {
    no_extent: ("box without extent", r"image 2, object 11 \(man\): box from \(3, 4\) to \(3, 9\)"),
    outside: ("box outside the image", "image 2, object 11"),
    no_name: ("object without a name", r"object 11: names \[\]"),
    no_number: ("malformed shape", "object 11, y: None"),
    no_object: ("malformed entry", "object number 0: of type str"),
}


@pytest.mark.parametrize("spoil", OBJECTS, ids=lambda spoil: spoil.__name__)
def test_an_object_at_fault_is_named_or_counted(source, tmp_path, spoil):
    reason, text = OBJECTS[spoil]
    changed(source, spoil)
    with pytest.raises(UserError, match=text):
        whole("visual-genome", source, tmp_path / "out", classes="9")
    data, report = whole("visual-genome", source, tmp_path / "out", classes="9", keep_going=True)
    assert report.skipped == {reason: 1} and len(data["annotations"]) == 4


def no_id(objects):
    objects[0]["image_id"] = "2"


def twice(objects):
    objects[0]["image_id"] = 5


def no_list(objects):
    objects[0]["objects"] = None


@pytest.mark.parametrize(
    ("spoil", "text", "left"),
    [
        (no_id, "entry at byte 1: image_id '2'", [5]),
        (twice, "image 5: a second time", [5]),
        (no_list, "image 2, objects: of type NoneType", [5]),
    ],
)
def test_an_image_at_fault_is_named_or_counted(source, tmp_path, spoil, text, left):
    changed(source, spoil)
    with pytest.raises(UserError, match=text):
        whole("visual-genome", source, tmp_path / "out", classes="9")
    data, report = whole("visual-genome", source, tmp_path / "out", classes="9", keep_going=True)
    assert sum(report.skipped.values()) == 1 and [image["id"] for image in data["images"]] == left


def test_missing_images_and_other_sizes(source, tmp_path):
    (source / "VG_100K" / "2.jpg").unlink()
    noise_image(source / "VG_100K_2" / "5.jpg", (21, 30))
    with pytest.raises(UserError, match=r"VG_100K.2\.jpg does not exist"):
        whole("visual-genome", source, tmp_path / "out", classes="9")
    noise_image(source / "VG_100K" / "2.jpg", (20, 30), 1)
    _, report = whole("visual-genome", source, tmp_path / "out", classes="9", keep_going=True)
    assert report.skipped == {"annotation of another size than its image": 1}


def test_a_folder_that_is_not_visual_genome(source, tmp_path):
    with pytest.raises(UserError, match=r"no file .*objects\.json"):
        whole("visual-genome", source / "VG_100K", tmp_path / "out", classes="9")


# --- lists read in chunks ----------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, 3, 7, 1000])
@pytest.mark.parametrize("head", ["", "\ufeff"])
def test_entries_are_found_with_any_chunk_size(tmp_path, chunk, head):
    values = [{"a": [1, {"b": ']},\\" ü€😀'}]}, {}, {"long": "x" * 50}, {"n": -1.5e3}]
    text = head + " [ " + " ,\n ".join(json.dumps(value, ensure_ascii=False) for value in values) + " ] "
    (tmp_path / "x.json").write_text(text, encoding="utf-8")
    data = (tmp_path / "x.json").read_bytes()
    spans = array_spans(tmp_path / "x.json", chunk_bytes=chunk)
    assert [json.loads(data[start:end]) for start, end in spans] == values


@pytest.mark.parametrize("chunk", [2, 1000])
@pytest.mark.parametrize(
    ("text", "byte"), [("{}", 0), ("", 0), ('[{"a": 1}, {"b" 2}]', 16), ('[{"a": 1}', 9), ('[{"a": 1}, {"b": ', 17)]
)
def test_the_error_names_the_byte_of_a_truncated_list(tmp_path, chunk, text, byte):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(BadEntry, match=rf"x\.json, byte {byte}: not JSON"):
        list(array_spans(tmp_path / "x.json", chunk_bytes=chunk))
    with pytest.raises(BadEntry, match=r"y\.json cannot be read"):
        list(array_spans(tmp_path / "y.json"))

"""COCO with new splits: minival and valminusminival; everything else stays the same."""

import json

import pytest
from source_datasets import as_it_is, coco, content, converted, written_json

from maskrcnn.data.coco import CocoDataset
from maskrcnn.data.convert.conversion import convert, split_plan
from maskrcnn.errors import UserError


@pytest.fixture
def source(tmp_path):
    return coco(tmp_path / "coco")


def ids(out, split):
    return [image["id"] for image in content(out, split)["images"]]


def changed(source, split, change):
    path = source / "annotations" / f"instances_{split}.json"
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def test_everything_stays_as_it_is(source, tmp_path):
    report = as_it_is("coco", source, tmp_path / "out")
    assert report.images == {"train2014": 2, "val2014": 4} and report.skipped == {}
    for split in ("train2014", "val2014"):
        before, after = content(source, split), content(tmp_path / "out", split)
        assert after["categories"] == before["categories"]
        assert after["images"] == before["images"] and after["annotations"] == before["annotations"]


def test_minival_is_a_list_of_ids(source, tmp_path):
    (tmp_path / "ids.txt").write_text("73\n285\n")
    out = tmp_path / "out"
    converted(
        "coco", source, out, split=[f"minival2014={tmp_path / 'ids.txt'}"], rest="valminusminival2014", sets=("val",)
    )
    assert ids(out, "minival2014") == [73, 285] and ids(out, "valminusminival2014") == [42, 139]
    assert CocoDataset.load(out, "minival2014").images[0].instances[0].annotation_id == 4


def test_the_rest_joins_the_training_images(source, tmp_path):
    minival = written_json(tmp_path / "instances_minival2014.json", {"images": [{"id": 42}], "annotations": []})
    out = tmp_path / "out"
    converted("coco", source, out, split=[f"minival={minival}"], rest="trainval35k")
    assert ids(out, "minival") == [42] and ids(out, "trainval35k") == [100, 101, 73, 139, 285]
    found = [annotation["id"] for annotation in content(out, "trainval35k")["annotations"]]
    assert found == [1, 2, 4, 5, 6]


def test_a_share_depends_on_the_seed_alone(source, tmp_path):
    chosen = []
    for number, seed in enumerate((0, 0, 1, 2, 3, 4, 5)):
        plan = split_plan(["minival=0.34"], rest="others", seed=seed)
        convert("coco", source, tmp_path / str(number), plan=plan)
        chosen.append(tuple(ids(tmp_path / str(number), "minival")))
    assert chosen[0] == chosen[1] and len(set(chosen)) > 1
    assert {len(each) for each in chosen} == {2}


def test_missing_areas_and_crowd_flags_are_filled_in(source, tmp_path):
    def strip(data):
        for annotation in data["annotations"]:
            del annotation["area"], annotation["iscrowd"]

    changed(source, "val2014", strip)
    as_it_is("coco", source, tmp_path / "out", sets=("val2014",))
    annotation = content(tmp_path / "out", "val2014")["annotations"][0]
    assert (annotation["area"], annotation["iscrowd"]) == (20.0, 0)


def test_crowd_regions_become_objects_on_request(source, tmp_path):
    """CVAT marks the masks of its brush as crowd regions."""

    def mark(data):
        for annotation in data["annotations"]:
            annotation["iscrowd"] = 1

    changed(source, "val2014", mark)
    for name, options, flag in (("kept", {}, 1), ("objects", {"crowd": False}, 0)):
        as_it_is("coco", source, tmp_path / name, sets=("val2014",), **options)
        found = content(tmp_path / name, "val2014")["annotations"]
        assert found and all(annotation["iscrowd"] == flag for annotation in found)


def break_things(data):
    data["annotations"][0]["segmentation"] = [[1, 2, 3]]
    data["annotations"][1]["category_id"] = 5
    data["annotations"][2]["image_id"] = 9999
    data["annotations"][3]["id"] = 1  # of train2014


def test_keep_going_counts_and_leaves_out(source, tmp_path):
    changed(source, "val2014", break_things)
    (source / "val2014" / "COCO_val2014_000000000073.jpg").write_bytes(b"\xff\xd8\xff broken")
    report = as_it_is("coco", source, tmp_path / "out", keep_going=True)
    assert report.skipped == {"unknown image": 1, "unknown category": 1, "image that cannot be read": 1}
    assert report.repaired["malformed segmentation, kept as a box"] == 1
    after = content(tmp_path / "out", "val2014")
    assert [image["id"] for image in after["images"]] == [42, 139, 285]
    assert [(a["id"], a["image_id"]) for a in after["annotations"]] == [(3, 42), (4, 285)]
    assert any("instances_val2014.json, annotation 5" in note for note in report.notes)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda d: d["categories"].append({"id": 18, "name": "wolf"}), "category id 18 occurs twice"),
        (lambda d: d["categories"].append({"id": 19, "name": " Dog"}), r"'dog' \(id 18\) and ' Dog' \(id 19\) are one"),
        (lambda d: d["categories"][1].update(name="wolf"), "category 18 is 'wolf', in another split 'dog'"),
        (lambda d: d["images"][0].update(file_name="../x.jpg"), "x.jpg does not exist"),
        (lambda d: d["images"][0].update(height=11), r"image .*42.jpg: for 12×11 pixels"),
        (break_things, r"annotation \d: "),
    ],
    ids=["ids", "names", "splits", "path", "size", "annotation"],
)
def test_faults_stop_the_conversion(source, tmp_path, change, text):
    changed(source, "val2014", change)
    with pytest.raises(UserError, match=text):
        as_it_is("coco", source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["coco"]


def test_an_unknown_split_and_an_empty_folder_are_named(source, tmp_path):
    with pytest.raises(UserError, match="no split 'test'"):
        as_it_is("coco", source, tmp_path / "out", sets=("test",))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="is not a dataset"):
        as_it_is("coco", tmp_path / "empty", tmp_path / "out")

"""`maskrcnn data convert`: converted datasets pass the check and train."""

import json

import pytest
import source_datasets
from command_line import expect_error
from source_datasets import content, labelme, noise_image, visual_genome, voc

from maskrcnn.data.convert.conversion import KINDS
from maskrcnn.data.convert.source import Options

TINY = ("--epochs", 1, "--min-size", 64, "--workers", 0, "--set", "pictures=0")
OPTIONS = {  # required by a kind
    "visual-genome": ("--classes", 3),
    "id-masks": ("--class", "ring"),
    "mask-files": ("--class", "nucleus"),
}


def test_the_command_line_names_every_kind(run, tmp_path):
    help_text = run("data", "convert", "--help")[1]
    for kind in KINDS:
        assert kind in help_text
    expect_error(run("data", "convert", "x", tmp_path, "out"), "kind 'x'", "datumaro:FORMAT")


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "yolo"])  # see test_layouts
def test_what_is_converted_passes_the_check(run, tmp_path, kind):
    source = getattr(source_datasets, kind.replace("-", "_"))(tmp_path / "in")
    code, out, err = run("data", "convert", kind, source, "out", *OPTIONS.get(kind, ()), "--json", "counts.json")
    assert code == 0, err
    counts = json.loads((tmp_path / "counts.json").read_text())
    assert sum(counts["images"].values()) >= 2 and "maskrcnn data check out" in out
    code, out, err = run("data", "check", "out", "--json", "report.json")
    assert code == 0, out + err
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["errors"] == {} and not [name for name in report["remarks"] if name.startswith("annotation left out")]
    assert ("boxes without masks" in out) == (kind in ("voc", "visual-genome"))


def test_options_reach_the_converter(run, tmp_path, monkeypatch):
    from maskrcnn.data.convert import conversion

    given = {}

    def convert(kind, source, out, **arguments):
        given.update(arguments)
        raise SystemExit(0)

    monkeypatch.setattr(conversion, "convert", convert)
    words = "--keep-going --copy --split a=0.2 --rest b --seed 3 --sets x,y --classes c --alias d --class e"
    words += " --class-attribute f --with-masks --difficult drop --zero-based --images g --mask-folder h"
    words += " --mask-suffix i --divisor 10 --void 11 --no-crowd"
    assert run("data", "convert", "voc", tmp_path, "out", *words.split())[0] == 0
    assert given["keep_going"] and given["copies"]
    plan = given["plan"]
    assert (plan.shares, plan.rest, plan.seed) == ({"a": 0.2}, "b", 3)
    options = vars(given["options"]) | {"alias": str(given["options"].alias)}
    assert options == {
        "sets": ("x", "y"),
        "classes": "c",
        "alias": "d",
        "class_name": "e",
        "class_attribute": "f",
        "with_masks": True,
        "difficult": "drop",
        "zero_based": True,
        "image_folder": "g",
        "mask_folder": "h",
        "mask_suffix": "i",
        "divisor": 10,
        "void": 11,
        "crowd": False,
    }
    assert all(options[name] != value for name, value in vars(Options()).items())  # each was changed


@pytest.mark.usefixtures("narrow_resnet")
def test_own_photos_train_after_conversion(run, tmp_path):
    labelme(tmp_path / "photos")
    code, _, err = run("data", "convert", "labelme", "photos", "mine", "--val-fraction", 0.5)
    assert code == 0, err
    code, out, err = run("train", "--data", "mine", *TINY)
    assert code == 0, err
    assert "best mask AP" in out


@pytest.mark.usefixtures("narrow_resnet")
def test_boxes_train_a_model_without_masks_and_no_other(run, tmp_path):
    voc(tmp_path / "VOC2007")
    assert run("data", "convert", "voc", "VOC2007", "boxes", "--difficult", "keep")[0] == 0
    expect_error(run("train", "--data", "boxes", *TINY), "boxes only", "--model fasterrcnn_resnet50_fpn")
    small = ("--set", "model.fpn_channels=16", "--set", "model.box_head_channels=16", "--set", "model.proposals=20")
    code, out, err = run("train", "--data", "boxes", "--model", "fasterrcnn_resnet18_fpn", *TINY, *small)
    assert code == 0, err
    assert "best box AP" in out and "skipped" not in out
    best = tmp_path / "runs" / "train-1" / "best.safetensors"
    code, out, err = run("evaluate", best, "--data", "boxes", "--json", "metrics.json")
    assert code == 0, err
    expect_error(run("evaluate", best, "--data", "boxes", "--iou-type", "segm"), "only boxes", "--iou-type bbox")


def test_a_fault_stops_it_or_is_counted(run, tmp_path):
    visual_genome(tmp_path / "vg")
    noise_image(tmp_path / "vg" / "VG_100K" / "2.jpg", (21, 30))
    words = ("data", "convert", "visual-genome", "vg", "out", "--classes", 2)
    expect_error(run(*words), "image_data.json, image 2: for 30×20 pixels")
    assert not (tmp_path / "out").exists()
    code, out, err = run(*words, "--keep-going", "--rest", "train")
    assert code == 0, err
    assert "skipped 1: annotation of another size than its image" in out
    assert [image["id"] for image in content(tmp_path / "out", "train")["images"]] == [5]

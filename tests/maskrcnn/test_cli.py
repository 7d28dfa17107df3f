"""The command line as a user meets it: the whole road, and every bad input of it."""

import json
import re
import shutil

import numpy as np
import pytest
from command_line import expect_error
from PIL import Image

from maskrcnn import runs
from maskrcnn.runtime.engine_files import read_model


def picture(path, size=(96, 80)):
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (*size, 3), dtype=np.uint8)).save(path)
    return path


# The road


@pytest.mark.usefixtures("narrow_resnet")
def test_train_evaluate_and_predict(run, shapes, tmp_path):
    code, out, err = run("train", "--data", shapes, "--epochs", 1, "--min-size", 64, "--workers", 0)
    assert code == 0, err
    assert "best mask AP" in out
    best = tmp_path / "runs" / "train-1" / runs.BEST
    assert best.exists()
    assert "3 steps: 1 epochs of 3, with 4 images per step" in out
    assert "warning: 3 steps rarely suffice, also for fine-tuning; --epochs 100 gives 300" in out
    code, out, err = run("evaluate", "--json", "metrics.json")  # the newest run: its best checkpoint, its data
    assert code == 0, err
    assert f"{best.relative_to(tmp_path)} on the data of its run: {shapes}, split val" in out
    assert "AP_small" in out
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert len(metrics["box"]) == len(metrics["mask"]) == 12
    code, out, err = run("predict", shapes / "val" / "000000.png")
    assert code == 0, err
    assert (tmp_path / "predictions" / "000000.png").exists()


def test_predict_writes_pictures_and_coco_results(run, road, tmp_path):
    (tmp_path / "sub").mkdir()
    pictures = [picture(tmp_path / "a.png"), picture(tmp_path / "sub" / "a.png", (60, 120))]
    code, _, err = run("predict", *pictures, "--model", road / runs.ONNX, "--threshold", 0.2)
    assert code == 0, err
    folder = tmp_path / "predictions"
    assert Image.open(folder / "a-1.png").size == (7 * 80, 7 * 96)
    assert Image.open(folder / "a-2.png").size == (6 * 120, 6 * 60)
    results = json.loads((folder / "results.json").read_text())
    assert {r["image_id"] for r in results} <= {1, 2}
    assert set(results[0]) == {"image_id", "category_id", "category_name", "bbox", "score", "segmentation"}
    names = read_model(road / runs.ONNX)[1].class_names
    assert all(entry["category_name"] == names[entry["category_id"] - 1] for entry in results)


def test_results_have_the_image_ids_of_the_dataset(run, road, shapes, tmp_path):
    folder = shutil.copytree(shapes, tmp_path / "data")
    file = folder / "annotations" / "instances_val.json"
    content = json.loads(file.read_text())
    for image in content["images"]:
        image["id"] += 500
    for annotation in content["annotations"]:
        annotation["image_id"] += 500
    file.write_text(json.dumps(content))
    ids = {image["file_name"]: image["id"] for image in content["images"]}
    code, out, err = run("predict", folder / "val" / "000001.png", "--model", road / runs.ONNX, "--format", "jpg")
    assert code == 0, err
    written = json.loads((tmp_path / "predictions" / "images.json").read_text())
    assert list(written) == [str(ids["000001.png"])] and f"image ids are those of {file}" in out
    assert Image.open(tmp_path / "predictions" / "000001.jpg").format == "JPEG"
    # Elsewhere the annotation file is named; an image that it lacks gets the id after its highest.
    photos = [shutil.copy(folder / "val" / "000002.png", tmp_path), picture(tmp_path / "other.png")]
    code, out, err = run("predict", *photos, "--model", road / runs.ONNX, "--annotations", file)
    assert code == 0, err
    written = json.loads((tmp_path / "predictions" / "images.json").read_text())
    assert list(written) == [str(ids["000002.png"]), str(max(ids.values()) + 1)]
    assert "1 image(s) not in this file get new ids" in out
    # Numbers of another annotation file: the warning of `evaluate`.
    (tmp_path / "predictions" / "images.json").write_text(json.dumps({str(ids["000002.png"]): "000003.png"}))
    entries = json.loads((tmp_path / "predictions" / "results.json").read_text())
    kept = [entry for entry in entries if entry["image_id"] in ids.values()]
    (tmp_path / "predictions" / "results.json").write_text(json.dumps(kept))
    code, out, err = run("evaluate", "--results", "predictions/results.json", "--annotations", file)
    assert code == 0, err
    assert "warning: 1 of 1 images are other files" in out and "000003.png, 000002.png" in out


def test_an_image_without_detections_names_the_best_score(run, road, tmp_path):
    image = picture(tmp_path / "a.png")
    code, out, err = run("predict", image, "--model", road / runs.ONNX, "--threshold", 1)
    assert code == 0, err
    entries = json.loads((tmp_path / "predictions" / "results.json").read_text())
    best = max(entry["score"] for entry in entries)
    assert f"0 of {len(entries)} detections drawn (best score {best:.2f}, below --threshold 1)" in out


def test_predict_takes_folders_and_never_the_place_of_an_image(run, road, tmp_path):
    photos = tmp_path / "photos"
    (photos / "b").mkdir(parents=True)
    pictures = [picture(photos / "a.png"), picture(photos / "b" / "a.png"), picture(tmp_path / "a-2.png")]
    before = [path.read_bytes() for path in pictures]
    expect_error(run("predict", photos / "a.png", "--output", photos), "a.png, a file that the command reads")
    code, _, err = run("predict", "photos", "a-2.png", "--model", road / runs.ONNX)
    assert code == 0, err
    written = {path.name for path in (tmp_path / "predictions").glob("*.png")}
    assert written == {"a-1.png", "a-2.png", "a-2-3.png"}
    assert json.loads((tmp_path / "predictions" / "images.json").read_text())["2"] == "photos/b/a.png"
    assert [path.read_bytes() for path in pictures] == before


@pytest.mark.usefixtures("narrow_resnet")
def test_weights_of_other_classes_start_with_new_class_layers(run, shapes, tmp_path):
    run("train", "--data", shapes, "--epochs", 1, "--min-size", 64, "--workers", 0)
    best = tmp_path / "runs" / "train-1" / runs.BEST
    root = broken_dataset(shapes, tmp_path, add_star)
    code, out, err = run("train", "--data", root, "--weights", best, "--epochs", 1, "--min-size", 64, "--workers", 0)
    assert code == 0, err
    assert "they know 3 classes, this model 4" in out
    line = next(line for line in out.splitlines() if line.startswith("starting anew: "))
    assert len(line.split(", ")) == 6 and "roi_heads.mask_predictor.mask_fcn_logits.bias" in line


def test_a_model_without_masks_goes_the_whole_road(run, boxes_onnx_file, shapes, tmp_path):
    folder = tmp_path / "runs" / "train-1"
    folder.mkdir(parents=True)
    shutil.copy(boxes_onnx_file.with_name("best.safetensors"), folder / runs.BEST)
    shutil.copy(boxes_onnx_file, folder / runs.ONNX)
    code, out, err = run("build-engine", "--fp32", "--target", "openvino")
    assert code == 0 and "masks" not in out, err
    code, out, err = run("evaluate", folder / "model.fp32.xml", "--data", shapes, "--json", "metrics.json")
    assert code == 0, err
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert len(metrics["box"]) == 12 and metrics["mask"] is None
    code, out, err = run("predict", shapes / "val" / "000000.png", "--threshold", 0.1)
    assert code == 0, err
    results = json.loads((tmp_path / "predictions" / "results.json").read_text())
    assert results and set(results[0]) == {"image_id", "category_id", "category_name", "bbox", "score"}


def test_a_model_with_keypoints_goes_the_whole_road(run, joint_onnx_file, poses, tmp_path):
    code, out, err = run("build-engine", joint_onnx_file, "--fp32", "--target", "openvino", "--output", "m.fp32.xml")
    assert code == 0, err
    code, out, err = run("evaluate", "m.fp32.xml", "--data", poses, "--json", "metrics.json")
    assert code == 0, err
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert [len(metrics[kind]) for kind in ("box", "mask", "keypoint")] == [12, 12, 10]
    picture = poses / "val" / "000000.png"
    code, out, err = run("predict", picture, "--model", "m.fp32.xml", "--threshold", 0.1, "--keypoint-threshold", -999)
    assert code == 0, err
    results = json.loads((tmp_path / "predictions" / "results.json").read_text())
    drawn = sum(result["score"] >= 0.1 for result in results)
    points = rf"{drawn} of {len(results)} detections drawn \(.*\) with {5 * drawn} of {5 * drawn} keypoints"
    assert drawn and re.search(points, " ".join(out.split()))
    assert len(results[0]["keypoints"]) == 15 and len(results[0]["keypoint_scores"]) == 5
    with_lines = np.asarray(Image.open(tmp_path / "predictions" / "000000.png"))
    code, out, err = run("predict", picture, "--model", "m.fp32.xml", "--threshold", 0.1, "--keypoint-threshold", 999)
    assert code == 0 and f"with 0 of {5 * drawn} keypoints" in out, err
    assert (np.asarray(Image.open(tmp_path / "predictions" / "000000.png")) != with_lines).any()


def test_version(run):
    assert run("--version")[1].strip().count(".") == 2


# Bad input


def test_nothing_to_work_on_names_the_command_before(run):
    expect_error(run("export", "--onnx"), "no checkpoint", "maskrcnn train")
    expect_error(run("build-engine", "--fp16"), "no ONNX file", "maskrcnn export --onnx")


@pytest.mark.parametrize(
    "command",
    [
        *("build-engine . --fp16", "evaluate . --data SHAPES", "predict . --model .", "verify . .", "export ."),
        *("web . page", "triton . models", "train --weights . --data SHAPES"),
    ],
)
def test_a_folder_in_place_of_a_model_is_named_as_one(run, shapes, tmp_path, monkeypatch, command):
    Image.new("RGB", (40, 30)).save(tmp_path / "photo.png")
    monkeypatch.chdir(tmp_path)
    expect_error(run(*command.replace("SHAPES", str(shapes)).split()), ".: a folder")
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["photo.png"]


def test_flags_that_contradict(run, road):
    expect_error(run("export", "--onnx", "--weights", "COCO_V1"), "--weights COCO_V1 without --model")
    expect_error(run("build-engine"), "no precision")
    expect_error(run("build-engine", "--fp16", "--fp32"), "--fp16 and --fp32")


@pytest.mark.parametrize("content", [b"", b"no picture at all", None])
def test_predict_leaves_out_what_is_no_image(run, road, tmp_path, content):
    good = picture(tmp_path / "good.png")
    bad = tmp_path / "bad.png"
    bad.write_bytes(good.read_bytes()[:200] if content is None else content)
    expect_error(run("predict", good, tmp_path / "gone.png"), "gone.png")
    assert not (tmp_path / "predictions").exists()
    expect_error(run("predict", bad), "bad.png")
    expect_error(run("predict", bad, good, "--strict"), "bad.png")
    assert not (tmp_path / "predictions").exists()
    expect_error(run("predict", bad, good), "1 of 2 images cannot be used", "bad.png")
    results = json.loads((tmp_path / "predictions" / "results.json").read_text())
    assert {entry["image_id"] for entry in results} == {2}  # ids count all images
    assert json.loads((tmp_path / "predictions" / "images.json").read_text())["2"] == str(good)


def broken_dataset(shapes, tmp_path, change):
    root = shutil.copytree(shapes, tmp_path / "data")
    for path in (root / "annotations").iterdir():
        content = json.loads(path.read_text())
        path.write_text(json.dumps(change(content)))
    return root


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: ["nothing"], "instances_train.json"),
        (lambda c: {"images": c["images"]}, "no categories"),
        (lambda c: {**c, "annotations": []}, "no object to learn"),
        (lambda c: {**c, "images": [], "annotations": []}, "instances_train.json"),
        (lambda c: {**c, "images": [{**c["images"][0], "file_name": "../../x.png"}]}, "x.png"),
    ],
)
def test_a_dataset_that_is_none_is_refused(run, shapes, tmp_path, change, message):
    root = broken_dataset(shapes, tmp_path, change)
    expect_error(run("train", "--data", root), message)
    assert not (tmp_path / "runs").exists()


@pytest.mark.usefixtures("narrow_resnet")
def test_bad_annotations_are_counted_and_skipped(run, shapes, tmp_path):
    def spoil(content):
        content["annotations"][0]["bbox"] = [5, 5, 0, 10]
        content["annotations"][1]["image_id"] = 987654
        return content

    root = broken_dataset(shapes, tmp_path, spoil)
    code, out, err = run("train", "--data", root, "--epochs", 1, "--min-size", 64, "--workers", 0)
    assert code == 0, err
    assert "repaired 1 entries: box computed from the mask" in out
    assert "skipped 1 annotation(s): unknown image" in out


@pytest.mark.usefixtures("narrow_resnet")
def test_training_names_the_images_that_it_cannot_read(run, shapes, tmp_path):
    root = shutil.copytree(shapes, tmp_path / "cut")
    options = ("--data", root, "--epochs", 1, "--min-size", 64, "--workers", 1, "--batch-size", 4)
    for victim in (root / "val" / "000001.png", root / "val" / "000002.png", root / "train" / "000003.png"):
        whole = victim.read_bytes()
        victim.write_bytes(whole[:300])
        if victim.name == "000002.png":  # validation images are read before the first step
            expect_error(run("train", *options), "2 validation images", "000001.png", "000002.png")
            assert not (tmp_path / "runs").exists()
            shutil.copy(shapes / "val" / "000001.png", root / "val")
            victim.write_bytes(whole)
    expect_error(run("train", *options), "000003.png")  # after the first step, which is kept
    assert (tmp_path / "runs" / "train-1" / runs.STATE).exists()


def test_a_run_is_not_overwritten(run, shapes, road, tmp_path):
    (road / runs.CONFIG).write_text("{}")
    expect_error(run("train", "--data", shapes, "--output", road), "--resume")
    expect_error(run("train", "--resume", tmp_path), "config.json")


def add_star(content):
    content["categories"].append({"id": 9, "name": "star"})
    return content


def test_weights_of_another_architecture_are_refused(run, shapes, tmp_path, checkpoint):
    expect_error(run("train", "--data", shapes, "--weights", checkpoint, "--model", "maskrcnn_resnet18_fpn"), "not fit")
    assert not (tmp_path / "runs").exists()


def test_files_of_the_wrong_kind(run, shapes, tmp_path):
    for name, words in (
        ("text.safetensors", "not a checkpoint"),
        ("text.onnx", "text.onnx"),
        ("text.pth", "kind '.pth'"),
    ):
        (tmp_path / name).write_text("hello")
        expect_error(run("evaluate", name, "--data", shapes), words)
    expect_error(run("export", "text.safetensors", "--onnx"), "text.safetensors: a text file (hello)")
    expect_error(run("build-engine", "text.onnx", "--fp16"), "text.onnx")
    expect_error(
        run("export", "--onnx", "--weights", "text.pth", "--model", "maskrcnn_resnet50_fpn"), "a text file (hello)"
    )
    assert not list(tmp_path.glob("*.xml"))
    assert not (tmp_path / "model.onnx").exists()


def test_a_learning_rate_is_suggested_and_no_run_is_written(run, shapes, tmp_path, monkeypatch):
    losses = [(10 ** (k / 10 - 6), 3 + abs(k - 40) / 10) for k in range(60)]  # the lowest at 1e-2
    monkeypatch.setattr("maskrcnn.training.trainer.Trainer.losses_by_rate", lambda trainer, *arguments: losses)
    command = ("train", "--data", shapes, "--find-learning-rate", "--batch-size", 4)
    code, out, err = run(*command)
    assert code == 0, err
    assert "suggestion: --learning-rate 0.001 with --batch-size 4" in out
    assert f"{1e-6:13.2e}  {7.0:9.4f}" in out
    assert not list(tmp_path.iterdir())
    expect_error(run(*command, "--output", "x"), "--find-learning-rate with --output or --resume", "writes nothing")

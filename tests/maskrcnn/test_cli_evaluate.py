"""`maskrcnn evaluate`: models, results files, written files, and wrong options."""

import json
import shutil

import pytest
from coco_cases import make_case
from command_line import expect_error
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval


def metrics_in(out: str) -> list[str]:
    """The printed metrics, a line each."""
    return [line for line in out.splitlines() if line.startswith(("AP", "AR"))]


@pytest.fixture
def files(tmp_path):
    """Writes annotations and results of a kind; returns their paths."""

    def write(kind, seed=6):
        content, results = make_case(seed, kind=kind, images=8)
        paths = tmp_path / "gt.json", tmp_path / f"{kind}.json"
        for path, value in zip(paths, (content, results), strict=True):
            path.write_text(json.dumps(value, default=bytes.decode))
        return paths

    return write


# Results files


@pytest.mark.parametrize("kind", ["bbox", "segm", "keypoints"])
def test_a_results_file_scores_as_in_pycocotools(run, files, kind):
    truth, results = files(kind)
    expected = COCO(truth)
    scorer = COCOeval(expected, expected.loadRes(str(results)), kind)
    scorer.evaluate()
    scorer.accumulate()
    scorer.summarize()
    options = ("--iou-type", kind, "--json", "m.json", "--per-class")
    code, out, err = run("evaluate", "--results", results, "--annotations", truth, *options)
    assert code == 0, err
    name = {"bbox": "box", "segm": "mask", "keypoints": "keypoint"}[kind]
    written = json.loads((truth.parent / "m.json").read_text())
    assert list(written[name].values()) == list(scorer.stats)
    assert len(written["per_class"][name]) == len(expected.cats) and "results" not in written
    assert all(f"\n{entry['name']} " in out for entry in expected.cats.values())
    assert [float(line.split()[1]) for line in metrics_in(out)] == pytest.approx(scorer.stats, abs=5e-5)


def test_other_limits_of_detections_are_labelled_and_written(run, files, tmp_path):
    truth, results = files("bbox")
    given = ("evaluate", "--results", results, "--annotations", truth)
    code, out, err = run(*given, "--max-detections", "2,500", "--json", "m.json", "--report", "page.html")
    assert code == 0, err
    assert "box metrics are not COCO's: up to 500 detections" in " ".join(out.split())
    assert [line.split()[0] for line in metrics_in(out)][6:8] == ["AR_2", "AR_500"]
    written = json.loads((tmp_path / "m.json").read_text())
    assert written["max_detections"] == {"box": [2, 500]} and "AR_500" in written["box"]
    page = (tmp_path / "page.html").read_text()
    assert "not COCO" in page and "AR_500" in page
    for wrong in ("x", "10,1", "0"):
        expect_error(run(*given, "--max-detections", wrong), "1,10,500")


def test_two_results_files_are_compared(run, files, tmp_path):
    truth, results = files("segm")
    entries = json.loads(results.read_text())
    (tmp_path / "half.json").write_text(json.dumps(entries[::2]))
    options = ("--compare", "half.json", "--resamples", 30, "--seed", 2, "--json", "m.json", "--report", "pages")
    code, out, err = run("evaluate", "--results", results, "--annotations", truth, *options)
    assert code == 0, err
    assert f"mask of half.json minus {results}:" in out
    assert "AP difference -" in out and "(30 resamples of the images, seed 2)" in out
    assert "images differ in detections of score 0.5 or more" in out
    written = json.loads((tmp_path / "m.json").read_text())["difference"]["mask"]
    assert written["interval"]["low"] <= written["interval"]["value"] <= written["interval"]["high"] < 1
    assert len(written["images"]) == 8
    page = (tmp_path / "pages" / "report.html").read_text()
    assert "Difference from the other result" in page and "<img" not in page  # the folder of the images is unknown


def test_empty_results_are_fine(run, files, tmp_path):
    truth, _ = files("bbox")
    (tmp_path / "none.json").write_text("[]")
    code, out, err = run("evaluate", "--results", "none.json", "--annotations", truth, "--iou-type", "bbox")
    assert code == 0, err
    assert "AP            0.0000" in out and "AP_small      0.0000" in out


def test_results_that_cannot_be_scored_are_named(run, files, tmp_path):
    truth, results = files("bbox")
    options = ("--annotations", truth)
    expect_error(
        run("evaluate", "--results", results, *options, "--iou-type", "segm"), "result 0: without segmentation"
    )
    entries = json.loads(results.read_text())
    (tmp_path / "other.json").write_text(json.dumps([*entries, {**entries[0], "image_id": 424242}]))
    expect_error(run("evaluate", "--results", "other.json", *options), "1 unknown image(s): image_id 424242")
    expect_error(run("evaluate", "--results", truth, *options), "a list of results")
    expect_error(run("evaluate", "--results", "gone.json", *options), "gone.json cannot be read")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "no checkpoint in runs/"),
        (("m.onnx", "--results", "r.json"), "a model and --results"),
        (("m.onnx",), "a model without --data"),
        (("m.onnx", "--data", "d", "--annotations", "a.json"), "a model with --annotations"),
        (("--results", "r.json"), "--results without --data or --annotations"),
        (("--results", "r.json", "--annotations", "a.json", "--data", "d"), "--results with --annotations and --data"),
        (("--results", "r.json", "--annotations", "a.json", "--resume", "l"), "--results with --resume"),
        (("--results", "r.json", "--annotations", "a.json", "--processes", "2"), "--results with --resume"),
    ],
)
def test_options_that_contradict_each_other(run, options, message):
    expect_error(run("evaluate", *options), message)


# Models


def test_a_model_writes_server_results_and_a_page_with_images(run, onnx_file, shapes, tmp_path):
    options = ("--save-results", "r.json", "--report", "page.html", "--worst", 3, "--threshold", 0.1, "--resamples", 9)
    code, out, err = run("evaluate", onnx_file, "--data", shapes, *options, "--scorer", "fast")
    assert code == 0, err
    assert "ONNX Runtime fp32 on 6 images" in out and "scoring" in out
    assert "--scorer is ignored" in out
    assert (tmp_path / "page.html").read_text().count("<img") == 6
    for kind, field in (("bbox", "bbox"), ("segm", "segmentation")):
        saved = json.loads((tmp_path / f"r.{kind}.json").read_text())
        assert set(saved[0]) == {"image_id", "category_id", field, "score"}
        where = ("--annotations", shapes / "annotations" / "instances_val.json", "--images", shapes / "val")
        code, again, err = run("evaluate", "--results", f"r.{kind}.json", *where, "--report", "again.html")
        assert code == 0, err
        column = 1 if kind == "bbox" else 2
        assert [line.split()[column] for line in metrics_in(out)] == [line.split()[1] for line in metrics_in(again)]
        assert "<img" in (tmp_path / "again.html").read_text()


def test_an_interrupted_evaluation_continues(run, onnx_file, checkpoint, shapes, tmp_path):
    command = ("evaluate", onnx_file, "--data", shapes, "--resume", "log.jsonl")
    code, whole, err = run(*command)
    assert code == 0, err
    lines = (tmp_path / "log.jsonl").read_bytes().splitlines(keepends=True)
    assert len(lines) == 7
    (tmp_path / "log.jsonl").write_bytes(b"".join(lines[:4]) + lines[4][:50])
    code, out, err = run(*command)
    assert code == 0, err
    assert metrics_in(out) == metrics_in(whole)
    again = (tmp_path / "log.jsonl").read_bytes().splitlines(keepends=True)
    assert again[:4] == lines[:4] and len(again) == 7
    expect_error(run("evaluate", checkpoint, *command[2:]), "log.jsonl: detections of another model", onnx_file.name)


def test_an_evaluation_that_fails_keeps_its_detections(run, checkpoint, shapes, tmp_path):
    root = shutil.copytree(shapes, tmp_path / "data")
    victim = root / "val" / "000003.png"
    whole = victim.read_bytes()
    victim.write_bytes(whole[:300])
    command = ("evaluate", checkpoint, "--data", root)
    result = run(*command)
    expect_error(result, "000003.png")
    assert "the detections of 3 of 6 images are kept: the same command with --resume detections.jsonl" in result[1]
    victim.write_bytes(whole)
    code, out, err = run(*command, "--resume", "detections.jsonl")
    assert code == 0, err
    assert metrics_in(out) == metrics_in(run(*command)[1])


def test_the_batch_size_does_not_change_metrics(run, checkpoint, shapes, tmp_path):
    """Images of two sizes: in one batch, one would be padded to the size of the other."""
    root = shutil.copytree(shapes, tmp_path / "data")
    path = root / "annotations" / "instances_val.json"
    content = json.loads(path.read_text())
    for entry in content["images"][::2]:
        file = root / "val" / entry["file_name"]
        entry["width"] = entry["width"] * 2 // 3
        Image.open(file).crop((0, 0, entry["width"], entry["height"])).save(file)
    content["annotations"] = [
        entry for entry in content["annotations"] if entry["image_id"] not in {e["id"] for e in content["images"][::2]}
    ]
    path.write_text(json.dumps(content))
    found = {}
    for batch in (1, 4):
        code, out, err = run("evaluate", checkpoint, "--data", root, "--batch-size", batch, "--json", f"{batch}.json")
        assert code == 0 and f"batch size {batch}" in out, err
        found[batch] = json.loads((tmp_path / f"{batch}.json").read_text())
        assert found[batch]["batch_size"] == batch
    one, four = (found[batch]["results"] for batch in (1, 4))
    assert [entry["image_id"] for entry in one] == [entry["image_id"] for entry in four]
    assert [entry["score"] for entry in one] == pytest.approx([entry["score"] for entry in four], abs=1e-4)
    assert found[1]["mask"] == pytest.approx(found[4]["mask"], abs=1e-4)


def test_processes_share_an_evaluation(run, onnx_file, shapes):
    code, out, err = run("evaluate", onnx_file, "--data", shapes, "--processes", 2)
    assert code == 0, err
    assert "ONNX Runtime fp32 on 6 images" in out and len(metrics_in(out)) == 12


def test_torchrun_shares_an_evaluation(run, onnx_file, shapes, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    command = ("evaluate", onnx_file, "--data", shapes)
    monkeypatch.setenv("RANK", "1")
    expect_error(run(*command), "WORLD_SIZE=2 without --resume FILE")
    code, out, err = run(*command, "--resume", "log.jsonl")
    assert code == 0 and out == "", err
    monkeypatch.setenv("RANK", "0")
    expect_error(run(*command, "--resume", "log.jsonl", "--processes", 2), "WORLD_SIZE=2 with --processes")
    code, out, err = run(*command, "--resume", "log.jsonl")
    assert code == 0, err
    monkeypatch.delenv("WORLD_SIZE")
    assert metrics_in(out) == metrics_in(run(*command)[1]) and len(metrics_in(out)) == 12


def test_two_models_are_compared(run, onnx_file, checkpoint, shapes, files):
    options = ("--data", shapes, "--iou-type", "bbox", "--resamples", 20)
    code, out, err = run("evaluate", onnx_file, *options, "--compare", checkpoint)
    assert code == 0, err
    assert f"box of {checkpoint} minus {onnx_file}:\nAP difference +0.0000" in out
    truth, results = files("bbox")
    expect_error(
        run("evaluate", "--results", results, "--annotations", truth, "--compare", checkpoint),
        "8 of 8 images",
    )


def test_masks_of_a_model_without_masks_are_not_scored(run, boxes_onnx_file, shapes):
    options = ("--data", shapes, "--iou-type", "segm")
    expect_error(run("evaluate", boxes_onnx_file, *options), "--iou-type segm and detections without segmentation")


def test_keypoints_are_scored_logged_saved_compared_and_drawn(run, joint_onnx_file, poses, tmp_path):
    command = ("evaluate", joint_onnx_file, "--data", poses, "--resume", "log.jsonl", "--json", "m.json")
    shown = ("--report", "page.html", "--worst", 2, "--threshold", 0.1, "--resamples", 9)
    code, out, err = run(*command, *shown, "--save-results", "r.json", "--compare", joint_onnx_file)
    assert code == 0, err
    (heads,) = [line.split() for line in out.splitlines() if line.split()[:2] == ["box", "mask"]]
    assert heads == ["box", "mask", "keypoint"]
    assert f"keypoint of {joint_onnx_file} minus {joint_onnx_file}:\nAP difference +0.0000" in out
    assert (tmp_path / "page.html").read_text().count("<img") == 4
    metrics = json.loads((tmp_path / "m.json").read_text())
    assert len(metrics["keypoint"]) == 10 and metrics["difference"]["keypoint"]
    saved = json.loads((tmp_path / "r.keypoints.json").read_text())
    assert set(saved[0]) == {"image_id", "category_id", "keypoints", "score"} and len(saved[0]["keypoints"]) == 15
    # The log holds the model's OKS sigmas, so that it is scored alike without the model.
    code, again, err = run(*command)
    assert code == 0 and set(metrics_in(again)) <= set(metrics_in(out)), err
    assert json.loads((tmp_path / "m.json").read_text())["keypoint"] == metrics["keypoint"]


def test_keypoints_of_a_model_without_keypoints_are_not_scored(run, onnx_file, poses, joint_onnx_file, shapes):
    options = ("--iou-type", "keypoints")
    code_out_err = run("evaluate", onnx_file, "--data", poses, *options)
    expect_error(code_out_err, "--iou-type keypoints and detections without keypoints")
    expect_error(run("evaluate", joint_onnx_file, "--data", shapes, *options), "whose categories name none")


def test_results_are_written_before_a_comparison_that_fails(run, files, tmp_path):
    truth, results = files("bbox")
    (tmp_path / "broken.json").write_text("[")
    given = ("evaluate", "--results", results, "--annotations", truth, "--save-results", "kept.json")
    expect_error(run(*given, "--compare", "gone.json"), "--compare gone.json: no such file")
    assert not (tmp_path / "kept.json").exists(), "refused before anything was done"
    expect_error(run(*given, "--compare", "broken.json"), "broken.json")
    assert len(json.loads((tmp_path / "kept.json").read_text())) == len(json.loads(results.read_text()))


@pytest.mark.parametrize("option", ["--save-results", "--json", "--report"])
def test_no_input_is_written_over(run, files, tmp_path, option):
    truth, results = files("bbox")
    if option == "--report":
        results = results.rename(tmp_path / "results.html")
    before = results.read_bytes()
    (tmp_path / "folder.html").mkdir()
    given = ("evaluate", "--results", results, "--annotations", truth, option)
    expect_error(run(*given, results), f"{option} {results}, a file that the command reads")
    expect_error(run(*given, "folder.html"), "folder.html: a folder")
    assert results.read_bytes() == before


@pytest.mark.parametrize("content", ["[1, 2]", "not JSON", '{"a": 1}'])
def test_a_foreign_file_beside_the_results_is_ignored(run, files, content):
    truth, results = files("bbox")
    results.with_name("images.json").write_text(content)
    code, out, err = run("evaluate", "--results", results, "--annotations", truth, "--iou-type", "bbox")
    assert code == 0 and metrics_in(out) and "warning" not in out, err

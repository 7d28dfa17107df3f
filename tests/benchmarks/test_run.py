"""benchmarks/run.py on a tiny random model: all rows are present, and what cannot run has a reason."""

import json
import shutil
import sys
from pathlib import Path

import contenders
import jsonschema
import pytest
import run
import torch
import workloads

from maskrcnn.errors import UserError


@pytest.fixture
def folder(tmp_path, monkeypatch, checkpoint, onnx_file, shapes):
    """A working folder with an exported run."""
    made = tmp_path / "runs" / "train-1"
    made.mkdir(parents=True)
    shutil.copy(checkpoint, made / "best.safetensors")
    shutil.copy(onnx_file, made / "model.onnx")
    (made / "config.json").write_text(json.dumps({"data": str(shapes), "val_split": "val"}))
    monkeypatch.chdir(tmp_path)
    return made


def check_schema(content):
    """Validate results.json with benchmarks/results.schema.json."""
    schema = json.loads((Path(run.__file__).parent / "results.schema.json").read_text(encoding="utf-8"))
    jsonschema.validate(content, schema, cls=jsonschema.Draft202012Validator)


def by_key(rows):
    return {(row.model, row.backend, row.precision, row.batch): row for row in rows}


def test_newest_run_with_peers(folder):
    rows = run.main(["--repeat", "2", "--images", "3", "--batch", "1,2"])
    found = by_key(rows)
    for row in rows:
        if row.status == "ok" and not row.peer:
            assert set(row.split_ms) >= {"decode", "preprocess", "engine", "postprocess"}
            assert row.file_mb > 1 and all(value > 0 for value in row.split_ms.values())
    half = "fp16" if any("CUDA" in row.backend and row.status == "ok" for row in rows) else "bf16"
    assert {(row.model, row.precision) for row in rows} >= {
        ("best.safetensors", "fp32"),
        ("best.safetensors", half),
        ("model.onnx", "fp32"),
        ("model.fp16.xml", "bf16"),
        ("model.engine", "fp16"),
        ("torchvision", "fp32"),
        ("torchvision legacy export", "fp32"),
    }
    reference = next(row for row in rows if row.check == "reference")
    assert reference.status == "ok" and reference.mask_ap_difference == 0
    for batch in (1, 2):
        ours = found["model.onnx", "OpenVINO", "fp32", batch]
        assert ours.status == "ok", ours.reason
        assert ours.p50_ms > 0 and ours.p90_ms is ours.p99_ms is None  # of two calls
        assert ours.samples == 2 and ours.images_per_s > 0 and ours.times_torchvision > 0
        assert abs(ours.mask_ap_difference) < 1e-3
    assert found["torchvision", reference.backend, "fp32", 1].times_torchvision == 1
    assert found["torchvision legacy export", "ONNX Runtime", "fp32", 1].times_torchvision_onnx == 1
    beyond = found["torchvision legacy export", "ONNX Runtime", "fp32", 2]
    assert beyond.status == "not run" and "at most 1 image" in beyond.reason
    assert all(row.reason for row in rows if row.status != "ok")

    content = json.loads((folder / "benchmark" / "results.json").read_text(encoding="utf-8"))
    check_schema(content)
    assert len(content["rows"]) == len(rows)
    assert content["environment"]["versions"]["torch"]
    page = (folder / "benchmark" / "results.md").read_text(encoding="utf-8")
    split = sum(row.split_ms is not None for row in rows)
    assert page.count("\n| ") == len(rows) + 2 + split + 2  # and the heads
    web = (folder / "benchmark" / "results.html").read_text(encoding="utf-8")
    assert web.count("<tr") == len(rows) + 1 + split + 1 and "<svg" in web
    assert not list((folder / "benchmark").glob(".*"))


def test_a_model_without_masks_has_box_ap_only(tmp_path, boxes_onnx_file, shapes):
    files = ["--model", str(boxes_onnx_file.with_name("best.safetensors")), "--model", str(boxes_onnx_file)]
    options = ["--data", str(shapes), "--repeat", "1", "--images", "3", "--batch", "1", "--output", str(tmp_path)]
    rows = run.main([*files, *options])
    running = [row for row in rows if row.status == "ok"]
    assert {row.model for row in running} >= {
        "best.safetensors",
        "model.onnx",
        "torchvision",
        "torchvision legacy export",
    }
    for row in running:
        assert row.box_ap is not None and row.mask_ap is None and row.mask_ap_difference is None
        assert "masks" not in row.check
    page = (tmp_path / "results.md").read_text(encoding="utf-8")
    assert "box AP" in page and "| mask AP" not in page


def test_missing_library_and_missing_export_are_rows(folder, monkeypatch):
    (folder / "model.onnx").rename(folder / "elsewhere")
    shutil.copy(folder / "elsewhere", folder / "other.onnx")
    monkeypatch.setitem(sys.modules, "openvino", None)
    rows = run.main(["--repeat", "1", "--images", "1", "--batch", "1", "--no-peers"])
    row = next(row for row in rows if row.backend == "OpenVINO")
    assert row.status == "not run" and "openvino" in row.reason and "pip install" in row.reason
    engine = next(row for row in rows if row.backend == "OpenVINO engine")
    assert "build-engine" in engine.reason
    assert not any(row.peer for row in rows)


def test_export_of_another_checkpoint_is_refused(folder, model):
    from maskrcnn.weights.checkpoint import save_checkpoint

    save_checkpoint(folder / "best.safetensors", model, note="another file")
    rows = run.main(["--repeat", "1", "--images", "1", "--batch", "1", "--no-peers"])
    for row in rows:
        if row.model == "model.onnx":
            assert row.status == "not run" and "maskrcnn export --onnx" in row.reason


def test_without_a_run_the_error_names_the_command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="maskrcnn train"):
        run.main([])


def test_given_file_that_is_missing(tmp_path):
    with pytest.raises(UserError, match=r"nothing\.onnx"):
        run.main(["--model", str(tmp_path / "nothing.onnx")])


def test_given_onnx_alone(tmp_path, onnx_file):
    rows = run.main(["--model", str(onnx_file), "--repeat", "1", "--batch", "1", "--output", str(tmp_path)])
    assert [row.backend.removesuffix(" CUDA") for row in rows] == ["ONNX Runtime", "OpenVINO"]
    assert rows[0].check == "reference" and rows[1].status == "ok"
    assert rows[0].mask_ap is None
    assert "no AP" in (tmp_path / "results.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("text", ["800", "801x1088", "32x32", "axb"])
def test_size_is_checked(text):
    with pytest.raises(SystemExit):
        run.parse(["--size", text])


def test_torch_compile_adds_rows(checkpoint):
    artefacts = contenders.Artefacts(checkpoint=checkpoint, complete=False)
    plain, asked = (contenders.our_contenders(artefacts, compiled=compiled) for compiled in (False, True))
    added = {(each.backend, each.precision) for each in asked} - {(each.backend, each.precision) for each in plain}
    half = "fp16" if torch.cuda.is_available() else "bf16"
    assert {precision for _, precision in added} == {"fp32", half}
    assert all(backend.endswith(", compiled") for backend, _ in added)
    for each in asked:
        if each.spec and "compile" in each.spec.get("options", {}):
            assert each.open().backend.name == "PyTorch, compiled"


def test_a_model_with_keypoints_has_their_ap(tmp_path, joint_onnx_file, poses):
    files = ["--model", str(joint_onnx_file.with_name("best.safetensors")), "--model", str(joint_onnx_file)]
    options = ["--data", str(poses), "--repeat", "1", "--images", "3", "--batch", "1", "--output", str(tmp_path)]
    rows = run.main([*files, *options])
    running = {row.model: row for row in rows if row.status == "ok" and row.precision == "fp32"}
    assert running.keys() >= {"best.safetensors", "model.onnx", "torchvision", "torchvision legacy export"}
    for row in running.values():
        assert row.keypoint_ap is not None and abs(row.keypoint_ap_difference) < 0.02
        assert "keypoints" in row.check or row.check == "reference"
    assert running["model.onnx"].keypoint_ap_difference == pytest.approx(0, abs=1e-3)
    assert "| keypoint AP" in (tmp_path / "results.md").read_text(encoding="utf-8")
    check_schema(json.loads((tmp_path / "results.json").read_text(encoding="utf-8")))


def test_the_earlier_run_is_read_before_its_file_is_replaced(tmp_path, onnx_file, capsys):
    options = ["--model", str(onnx_file), "--repeat", "1", "--batch", "1", "--output", str(tmp_path)]
    run.main(options)
    path = tmp_path / "results.json"
    content = json.loads(path.read_text())
    for row in content["rows"]:
        row["p50_ms"] /= 1000
    path.write_text(json.dumps(content))
    with pytest.raises(SystemExit):
        run.main([*options, "--compare", str(path)])
    assert "times the time (milliseconds)" in capsys.readouterr().err


def test_a_wrong_earlier_run_is_refused_before_measuring(tmp_path, onnx_file, monkeypatch):
    monkeypatch.setattr(run, "measure", lambda *given, **options: pytest.fail("it was measured"))
    with pytest.raises(UserError, match=r"none\.json: not results of this benchmark"):
        run.main(["--model", str(onnx_file), "--compare", str(tmp_path / "none.json"), "--output", str(tmp_path)])


def test_a_page_of_somebody_else_is_not_replaced(tmp_path, onnx_file, monkeypatch):
    monkeypatch.setattr(run, "measure", lambda *given, **options: pytest.fail("it was measured"))
    (tmp_path / "results.md").write_text("# My results")
    with pytest.raises(UserError, match=r"results\.md, a file that exists and is not a page of this benchmark"):
        run.main(["--model", str(onnx_file), "--size", "64x64", "--no-peers", "--output", str(tmp_path)])


@pytest.mark.parametrize(
    "options",
    [
        ("--workload", "resnet50", "--max-images", "5"),
        ("--workload", "resnet50", "--model", "m.onnx"),
        ("--workload", "resnet50", "--afresh"),
        ("--workload", "resnet50", "--min-ap", "0.1"),
        ("--size", "64x64", "--min-ap", "0.1"),
        ("--split", "test"),
    ],
)
def test_options_without_effect_are_refused(options):
    with pytest.raises(UserError, match=options[-2] if len(options) % 2 == 0 else options[-1]):
        run.main(options)


def test_gpu_only_needs_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="--gpu-only"):
        run.main(["--gpu-only"])


def test_images_of_a_trained_model_can_be_resized(folder):
    rows = run.main(["--size", "64x96,96x64", "--repeat", "1", "--batch", "1", "--no-peers", "--max-images", "2"])
    running = [row for row in rows if row.status == "ok"]
    assert {row.size for row in running} == {"64×96", "96×64"}
    assert {row.model for row in running} == {"best.safetensors", "model.onnx"}
    assert all(row.box_ap is None for row in rows)
    content = json.loads((folder / "benchmark" / "results.json").read_text(encoding="utf-8"))
    check_schema(content)
    assert content["workload"]["sizes"] == ["64×96", "96×64"]
    assert content["workload"]["name"] == "shapes val, 2 images" and "--size" in content["workload"]["notes"][0]


def test_resized_images_need_no_dataset(onnx_file):
    artefacts = contenders.Artefacts(onnx=(onnx_file,))
    options = {"data": None, "split": None, "batches": (1,), "repeat": 1, "budget_s": None, "images": None}
    found = workloads.dataset_workload(artefacts, sizes_hw=[(64, 96)], **options)
    assert {name: pool[0].shape for name, pool in found.pools.items()} == {"64×96": (64, 96, 3)}
    assert len(found.notes) == 1 and found.dataset is None


def test_rejected_files_are_no_contenders(folder):
    for kind in ("onnx", "xml", "engine"):
        for name in ("model.fp16", "model.fp16.rejected"):
            (folder / f"{name}.{kind}").touch()
    (folder / "model.fp16.tensorrt.onnx").touch()
    found = contenders.newest_artefacts()
    assert [path.name for path in found.onnx] == ["model.onnx", "model.fp16.onnx"]
    assert [path.name for path in found.engines] == ["model.fp16.xml"]
    assert [path.name for path in found.others] == ["model.fp16.engine"]


@pytest.mark.parametrize(("has_cuda", "on_cpu"), [(True, {"OpenVINO"}), (False, {"OpenVINO", "ONNX Runtime"})])
def test_what_does_not_run_on_a_gpu(checkpoint, onnx_file, monkeypatch, has_cuda, on_cpu):
    provider = contenders.Provider.CUDA if has_cuda else contenders.Provider.CPU
    monkeypatch.setattr(contenders, "best_provider", lambda: provider)
    artefacts = contenders.Artefacts(checkpoint=checkpoint, onnx=(onnx_file,), complete=False)
    found = contenders.our_contenders(artefacts)
    assert {each.backend for each in found if not contenders.runs_on_gpu(each)} == on_cpu

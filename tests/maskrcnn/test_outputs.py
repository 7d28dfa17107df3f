"""What commands may write over: never a file that they read, and other files with --overwrite only."""

import hashlib
import inspect
import json
import os
import shutil
from pathlib import Path

import onnx
import pytest
import typer
from command_line import expect_error

from maskrcnn import runs
from maskrcnn.cli import app

# Every option and argument of every command that names what is written, with a command line that gets as far as its
# check. FILES are the files that `place` makes; "{out}" is the output.
FILES = {
    "model": "m.onnx",
    "checkpoint": "best.safetensors",
    "truth": "data/annotations/instances_val.json",
    "other truth": "data/annotations/instances_train.json",
    "image": "data/val/000000.png",
    "engine": "e.xml",
}
OUTPUTS = {
    ("evaluate", "json"): "evaluate best.safetensors --data data --json {out}",
    ("evaluate", "save_results"): "evaluate best.safetensors --data data --save-results {out}",
    ("evaluate", "report"): "evaluate best.safetensors --data data --report {out}",
    ("verify", "json"): "verify m.onnx best.safetensors --images data/val --json {out}",
    ("verify", "report"): "verify m.onnx best.safetensors --images data/val --report {out}",
    ("inspect", "json"): "inspect m.onnx --json {out}",
    ("lint", "json"): "lint m.onnx --json {out}",
    ("export", "output"): "export best.safetensors --onnx --output {out}",
    ("build-engine", "output"): "build-engine m.onnx --fp16 --target openvino --output {out}",
    ("build-engine", "timing_cache"): "build-engine m.onnx --fp16 --target tensorrt --timing-cache {out}",
    ("refit-engine", "output"): "refit-engine e.xml m.onnx --output {out}",
    ("predict", "output"): "predict data/val/000000.png --model best.safetensors --output {out}",
    ("train", "output"): "train --data data --output {out}",
    ("triton", "out"): "triton m.onnx {out}",
    ("web", "out"): "web m.onnx {out}",
    ("build-plugins", "output"): "build-plugins --output {out}",
    ("data convert", "out"): "data convert coco data {out} --sets val",
    ("data convert", "json"): "data convert coco data new --sets val --json {out}",
    ("data shapes", "out"): "data shapes {out}",
    ("data poses", "out"): "data poses {out}",
    ("data figures", "out"): "data figures {out}",
    ("data check", "output"): "data check data --output {out}",
    ("data check", "json"): "data check data --json {out}",
}
INPUTS = {  # the other paths
    "evaluate": {"model", "data", "results", "annotations", "images", "compare"} | {"resume"},  # a log to continue
    "verify": {"reference", "other", "images"},
    "inspect": {"file"},
    "lint": {"file"},
    "export": {"checkpoint", "calibration", "detectron2_config"},
    "build-engine": {"model", "int8", "gate_images", "gate_annotations"},
    "refit-engine": {"engine", "model", "gate_images", "gate_annotations"},
    "predict": {"annotations", "images", "model"},
    "train": {"data", "annotations", "images", "val_annotations", "val_images", "config"} | {"resume"},  # a run
    "triton": {"models", "plugin_library"},
    "web": {"model", "onnxruntime_web", "image"},
    "doctor": {"places"},
    "data convert": {"source", "alias"},
    "data check": {"data", "images"},
    "build-plugins": {"tensorrt_include"},
}

MAYBE_URLS = {("predict", "images"), ("predict", "output")}  # texts, as a Path would lose the second slash


def paths_of(group: typer.Typer, prefix: str = "") -> set[tuple[str, str]]:
    """(command, parameter) of every option and argument that is a path."""
    found = set()
    for command in group.registered_commands:
        name = command.name or command.callback.__name__
        for parameter in inspect.signature(command.callback, eval_str=True).parameters.values():
            if "Path" in str(parameter.annotation) or (name, parameter.name) in MAYBE_URLS:
                found.add((f"{prefix}{name}", parameter.name))
    for inner in group.registered_groups:
        found |= paths_of(inner.typer_instance, f"{inner.name} ")
    return found


def test_the_tables_of_this_test_are_complete():
    inputs = {(command, name) for command, names in INPUTS.items() for name in names}
    assert paths_of(app) == set(OUTPUTS) | inputs


@pytest.fixture
def place(run, tmp_path, shapes, checkpoint):
    """The present folder with the files of FILES."""
    shutil.copytree(shapes, tmp_path / "data")
    shutil.copy(checkpoint, tmp_path / FILES["checkpoint"])
    value = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])
    graph = onnx.helper.make_graph([onnx.helper.make_node("Relu", ["x"], ["y"])], "g", [value], [value])
    graph.output[0].name = "y"
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)]), FILES["model"])
    (tmp_path / FILES["engine"]).write_text("<?xml version='1.0'?><net>")
    return tmp_path


def content(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_no_output_replaces_an_input_or_a_file_of_another_kind(run, place):
    """Every output of every command, at files that it reads, links and hard links to them, and at other files."""
    shutil.copy(FILES["image"], "photo.png")
    Path("notes.json").write_text('{"mine": 1}')
    targets = [*FILES.values(), "photo.png", "notes.json"]
    for name in (FILES["model"], FILES["truth"]):
        for kind, link in (("link", os.symlink), ("hard", os.link)):
            targets.append(f"{kind}{Path(name).suffix}")
            link(place / name, targets[-1])
    before = content(place)
    for (command, option), line in OUTPUTS.items():
        for target in targets:
            if (command, Path(target).suffix) in (("export", ".onnx"), ("build-engine", ".xml")):
                continue  # of the same kind
            code, out, err = run(*line.format(out=target).split())
            assert code == 1, (command, option, target, out)
            assert err.startswith("Error: ") and "\n  fix:      " in err, (command, option, target, err)
            if command not in ("refit-engine", "triton", "web"):  # which look at their models first
                assert target in err or os.path.realpath(target) in err, (command, option, target, err)
    now = content(place)
    assert {name: now.get(name) for name in before} == before


@pytest.mark.parametrize(
    "line",
    [
        "predict data/val --model best.safetensors --output data/val",
        "predict data --model best.safetensors --output data/val --overwrite",
        "train --data data --output data",
        "data convert coco data data --sets val",
        "data check data --output data --overwrite",
        "data check data --output data/train",
        "data shapes data",
    ],
)
def test_no_output_folder_is_one_that_is_read(run, place, line):
    before = content(place)
    expect_error(run(*line.split()))
    assert content(place) == before


def test_overwrite_replaces_other_files_but_never_inputs(run, place):
    notes = Path("notes.json")
    notes.write_text('{"mine": 1}')
    expect_error(run("lint", "m.onnx", "--json", notes), "notes.json, a file that exists and is not", "--overwrite")
    code, _, err = run("lint", "m.onnx", "--json", notes, "--overwrite")
    assert code == 0, err
    assert json.loads(notes.read_text())["written_by"] == "maskrcnn lint"
    code, _, err = run("lint", "m.onnx", "--json", notes)  # its own report
    assert code == 0, err
    expect_error(run("inspect", "m.onnx", "--json", notes), "not a JSON report of `maskrcnn inspect`")
    before = content(place)
    for path in (FILES["truth"], FILES["image"]):
        expect_error(
            run("evaluate", "best.safetensors", "--data", "data", "--json", path, "--overwrite"), "did not write"
        )
    expect_error(run("lint", "m.onnx", "--json", "m.onnx", "--overwrite"), "a file that the command reads")
    expect_error(
        run("predict", "data/val", "--model", "best.safetensors", "--output", "data/val", "--overwrite"), "reads"
    )
    assert content(place) == before


def test_two_outputs_are_two_files(run, place):
    options = ("--json", "x.json", "--save-results", "./x.json")
    expect_error(run("evaluate", "best.safetensors", "--data", "data", *options), "which --save-results names as well")


def test_the_same_command_replaces_its_own_outputs(run, place):
    evaluated = ("evaluate", "best.safetensors", "--data", "data", "--worst", 1, "--resamples", 9)
    commands = [
        (*evaluated, "--json", "m.json", "--report", "page.html", "--save-results", "r.json"),
        ("predict", "data/val/000000.png", "--model", "best.safetensors", "--output", "."),
        ("predict", "data/val", "--model", "best.safetensors", "--output", "data/val/drawn"),
        ("data", "check", "data", "--output", "found", "--json", "check.json"),
    ]
    printed = {}
    for _ in range(2):
        for command in commands:
            code, out, err = run(*command)
            assert code == 0, (command, err)
            assert printed.setdefault(command, out.count(" drawn")) == out.count(" drawn")  # not of its own overlays


def test_devices_are_written_and_stay_devices(run, place):
    for device in ("/dev/full", "/dev/null"):
        assert Path(device).is_char_device()
    expect_error(run("lint", "m.onnx", "--json", "/dev/full"), "/dev/full cannot be written (No space left on device)")
    code, _, err = run("lint", "m.onnx", "--json", "/dev/null")
    assert code == 0, err
    expect_error(run("evaluate", "best.safetensors", "--data", "data", "--resume", "/dev/null"), "/dev/null")
    for device in ("/dev/full", "/dev/null"):
        assert Path(device).is_char_device()


def test_a_folder_with_files_of_a_run_is_not_trained_into(run, place):
    (place / "old").mkdir()
    (place / "old" / runs.LAST).write_bytes(b"weights")
    expect_error(run("train", "--data", "data", "--output", "old"), runs.LAST)
    expect_error(run("train", "--data", "data", "--output", "data"), "a folder that the command reads")

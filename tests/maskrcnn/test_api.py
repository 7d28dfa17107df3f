"""The Python API: the commands' work as functions whose results are objects."""

import inspect
import json
import math
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import typer.main
from command_line import MessageLog
from PIL import Image

import maskrcnn
from maskrcnn.api.results import Result
from maskrcnn.cli import app
from maskrcnn.data.images import images_in, read_image
from maskrcnn.errors import UserError


@dataclass(frozen=True, repr=False)
class Outer(Result):
    path: Path
    values: dict
    empty: list = field(default_factory=list)
    hidden: object = field(default=None, repr=False)


def test_a_result_prints_itself():
    result = Outer(Path("a") / "b<c>", {"AP": 0.5, "names": ["x", Path("y")]}, hidden=object())
    assert repr(result) == "Outer\n  path: a/b<c>\n  values: AP 0.5000, names x, y"
    assert "<th>path</th><td>a/b&lt;c&gt;</td>" in result._repr_html_()
    assert json.loads(json.dumps(result.to_dict())) == {
        "path": "a/b<c>",
        "values": {"AP": 0.5, "names": ["x", "y"]},
        "empty": [],
    }


def test_importing_the_package_imports_nothing_heavy():
    code = "import sys, maskrcnn; sys.exit(bool({'torch', 'numpy', 'onnx', 'openvino', 'typer'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_every_command_is_a_function_with_the_same_options():
    """What a command can do, Python can do, under the same names."""
    functions = {
        "train": maskrcnn.train,
        "export": __import__("maskrcnn.api.export", fromlist=["export"]).export,
        "build-engine": maskrcnn.build_engine,
        "refit-engine": maskrcnn.refit_engine,
        "predict": maskrcnn.predict,
        "evaluate": maskrcnn.evaluate,
        "verify": maskrcnn.verify,
    }
    # Flags that name one value of an argument, and what only prints or picks the format.
    spelled = {"fp16", "fp32", "bf16", "int8", "tf32", "onnx", "per_class", "scorer", "assign", "install_completion"}
    for name, function in functions.items():
        command = typer.main.get_command(app).commands[name]
        known = inspect.signature(function).parameters
        takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in known.values())
        missing = {p.name for p in command.params} - set(known) - spelled - {"help"}
        assert takes_any or not missing, (name, missing)


def test_every_option_has_a_help_text():
    def commands(command, path=()):
        for name, inner in getattr(command, "commands", {}).items():
            yield from commands(inner, (*path, name))
        yield path, command

    for path, command in commands(typer.main.get_command(app)):
        for parameter in command.params:
            if parameter.name in ("help", "install_completion", "show_completion") or getattr(parameter, "hidden", 0):
                continue
            where = (*path, parameter.name)
            text = parameter.help
            assert text and text.endswith("."), where
            assert text[0].isupper(), where
            assert text.split()[0] not in ("Of", "That", "Which", "Instead", "With", "Another", "Most", "So"), where


def test_predict_takes_arrays_and_returns_detections(onnx_file, shapes):
    path = images_in(shapes / "val", 1)[0]
    image = read_image(path)
    messages = MessageLog()
    result = maskrcnn.predict([image, path], model=onnx_file, progress=messages)
    first, second = result.detections
    assert np.array_equal(first.boxes_xyxy_px, second.boxes_xyxy_px) and len(first) > 0
    assert result.counts == [len(first), len(second)] and result.images == ["0", str(path)]
    assert result.results is None and len(messages.lines) == 2
    assert first.names[0] in ("circle", "rectangle", "triangle")
    assert json.loads(json.dumps(result.to_dict()))["counts"] == result.counts
    for unknown in (Image.open(path), [Image.open(path)], None):
        with pytest.raises(UserError, match=r"an image that is a (PIL\.\w+\.\w+|builtins\.NoneType)"):
            maskrcnn.predict(unknown, model=onnx_file)
    detector = maskrcnn.Detector.load(onnx_file)
    for single in (path, str(path), image):
        with pytest.raises(UserError, match=r"a single image(.|\n)*detect\(\[image\]\)"):
            detector.detect(single)


@pytest.mark.slow
def test_the_package_export_can_be_called(checkpoint, tmp_path):
    result = maskrcnn.export(checkpoint, output=tmp_path / "m.onnx")
    assert result.path == tmp_path / "m.onnx" and result.path.is_file()
    assert result.differences[0].startswith("PyTorch: ")
    compared = maskrcnn.verify(checkpoint, result.path, max_images=2)
    assert compared.ok and compared.first_departure is None


def test_evaluate_returns_metrics_and_writes_nothing(onnx_file, shapes, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = maskrcnn.evaluate(onnx_file, data=shapes)
    assert set(result.metrics) == {"box", "mask"} and result.images == len(images_in(shapes / "val", 999))
    assert f"{result.metrics['mask']['AP']:.4f}" in repr(result)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("option", [{"actors": 2}, {"actor_cpus": 4}, {"actor_gpus": 1}], ids=str)
def test_options_of_a_cluster_need_one(option):
    with pytest.raises(UserError, match=f"--{next(iter(option)).replace('_', '-')}.* without --ray"):
        maskrcnn.predict("m.png", model="m.onnx", **option)


def test_an_unknown_kind_of_overlap_is_refused_before_detecting(tmp_path):
    with pytest.raises(UserError, match="kind of evaluation 'masks'\n  expected: one of bbox, segm, keypoints"):
        maskrcnn.evaluate(tmp_path / "m.onnx", data=tmp_path / "nowhere", iou_type=["masks"])


def test_the_first_process_of_torchrun_reports(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text('{"data": "nowhere"}')
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, reports in (("0", True), ("1", False)):
        monkeypatch.setenv("RANK", rank)
        messages = MessageLog()
        with pytest.raises(UserError):
            maskrcnn.evaluate(tmp_path / "m.onnx", progress=messages)
        assert any("on the data of its run" in line for line in messages.lines) == reports


@pytest.mark.parametrize(
    ("function", "arguments", "name", "value"),
    [
        ("export", {}, "calibration_images", 0),
        ("build_engine", {}, "calibration_images", 0),
        ("build_engine", {}, "gate_max_images", -1),
        ("triton", {"out": "out"}, "max_batch", 0),
        ("triton", {"out": "out"}, "instances", 0),
        ("triton", {"out": "out"}, "step_instances", 0),
        ("triton", {"out": "out"}, "queue_delay", -1),
        ("triton", {"out": "out"}, "threads", -1),
        ("triton", {"out": "out"}, "min_score", math.nan),
        ("predict", {}, "batch_size", 0),
        ("predict", {}, "threshold", math.nan),
        ("predict", {}, "keypoint_threshold", math.nan),
        ("predict", {"ray": "local", "output": "out", "model": "m.onnx"}, "actor_cpus", math.nan),
        ("evaluate", {}, "threshold", 1.5),
        ("verify", {"other": "m.onnx"}, "max_images", 0),
        ("check_data", {}, "pictures", -1),
    ],
)
def test_numbers_out_of_range_are_refused_before_work_begins(function, arguments, name, value, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (8, 8)).save("m.png")
    with pytest.raises(UserError, match=f"^{name} {value}\n"):
        getattr(maskrcnn, function)("m.png" if function == "predict" else "m.onnx", **arguments, **{name: value})
    assert [path.name for path in tmp_path.iterdir()] == ["m.png"]


def test_unknown_names_are_attribute_errors():
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        maskrcnn.trian  # noqa: B018
    assert {"train", "export", "build_engine", "Detector"} <= set(dir(maskrcnn))

"""docs/from-photos-to-engine.md: its commands, run in order on a few drawn images with LabelMe annotations."""

import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import run
from PIL import Image
from recipe_runs import SMALL, put_weights, settings_of
from source_datasets import coco, labelme_file, via
from typer.testing import CliRunner

from maskrcnn.cli import app
from maskrcnn.data.shapes import CLASS_NAMES, shapes_image

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "from-photos-to-engine.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```sh\n(.*?)```", TEXT, re.DOTALL)
COMMANDS = [line for block in BLOCKS for line in block.splitlines() if line.strip()]
# Options added to a command so that it takes seconds and does the same on every machine.
ADDED = {
    "maskrcnn train": SMALL,
    "maskrcnn build-engine": ["--target", "openvino"],
    "maskrcnn benchmark": ["--repeat", "1", "--batch", "1", "--images", "1", "--no-peers"],
}
WRITTEN = {
    "mine": "annotations/instances_val.json",
    "look": "",
    "runs/train-1": "best.safetensors",
    "report.html": "",
    "predictions": "photo.png",
    "models": "",
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Five images with LabelMe files, one of them without objects, and a new image."""
    (tmp_path / "new").mkdir()
    (tmp_path / "photos").mkdir()
    for seed in range(6):
        pixels, objects = shapes_image(np.random.default_rng(seed + 20), (72, 96))
        path = tmp_path / ("photos" if seed < 5 else "new") / ("photo.jpg" if seed == 5 else f"{seed}.jpg")
        Image.fromarray(pixels).save(path, quality=95)
        outlined = [(CLASS_NAMES[label - 1], "rectangle", corners_of(mask)) for label, mask in objects]
        if seed < 5:
            labelme_file(path.with_suffix(".json"), path.name, (72, 96), *(outlined if seed else ()))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.chdir(tmp_path)
    put_weights(settings_of(ROOT / "configs" / "finetune.yaml")[0], tmp_path)
    return tmp_path


def corners_of(mask):
    """The upper left and lower right corners of a mask's box."""
    y, x = mask.nonzero()
    return [[int(x.min()), int(y.min())], [int(x.max()), int(y.max())]]


def execute(line):
    program, first, *rest = shlex.split(line, comments=True)
    added = next((words for start, words in ADDED.items() if f"{program} {first}" == start), [])
    assert program == "maskrcnn"
    if first == "benchmark":
        return run.main([*rest, *added])
    result = CliRunner().invoke(app, [first, *rest, *added], catch_exceptions=False)
    assert result.exit_code == 0, f"{line}: {result.output}"
    return result.output


@pytest.mark.slow
def test_from_photos_to_an_engine(folder, checkpoint):
    assert len(COMMANDS) == 10
    printed = {}
    for line in COMMANDS:
        printed[line] = execute(line)
        if line.startswith("maskrcnn train"):
            # Two steps give an untrained model, whose half-precision engine would be rejected.
            shutil.copy(checkpoint, folder / "runs" / "train-1" / "best.safetensors")
    for name, inside in WRITTEN.items():
        assert (folder / name / inside).exists(), name
    (train,) = [text for line, text in printed.items() if line.startswith("maskrcnn train")]
    assert "MaskRCNN_ResNet50_FPN_Weights.COCO_V1" in train and "roi_heads.box_predictor" in train
    (rows,) = [result for line, result in printed.items() if line.startswith("maskrcnn benchmark")]
    measured = {row.model for row in rows if row.status == "ok"}
    assert measured >= {"best.safetensors", "model.onnx", "model.fp16.xml"}


def test_the_python_example_runs(folder, onnx_file, capsys):
    (program,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    assert "runs/train-1/model.fp16.xml" in program
    exec(compile(program.replace("runs/train-1/model.fp16.xml", str(onnx_file)), "program", "exec"), {})
    assert capsys.readouterr().out.startswith("[[")


@pytest.mark.parametrize("kind", ["via", "coco"])
def test_other_annotations_are_converted_as_documented(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (line,) = re.findall(rf"`(maskrcnn data convert {kind} [^`]*)`", TEXT)
    if kind == "via":
        via(tmp_path / "photos")
        line += " --val-fraction 0.5"
    else:
        exported(tmp_path / "export")
    execute(line)
    splits = {path.stem for path in (tmp_path / "mine" / "annotations").iterdir()}
    assert splits == {"instances_train", "instances_val"}


def exported(root):
    """COCO format as CVAT exports it: one split named default."""
    coco(root)
    (*others, first) = sorted((root / "annotations").iterdir())
    for other in others:
        other.unlink()
    (root / first.stem.removeprefix("instances_")).rename(root / "default")
    first.rename(root / "annotations" / "instances_default.json")

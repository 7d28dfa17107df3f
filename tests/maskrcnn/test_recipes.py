"""Every file in configs/ is a run that can be started: its settings are known, and it trains for two steps."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import pytest
import yaml
from recipe_runs import BATCH, SMALL, put_weights, settings_of
from typer.testing import CliRunner

from maskrcnn.cli import app
from maskrcnn.config import MODELS
from maskrcnn.data.coco import CocoDataset
from maskrcnn.errors import UserError
from maskrcnn.training.recipe import training_config
from maskrcnn.training.step import Step

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "configs").glob("*.yaml"))
QUICK = ("coco-keypoints", "finetune", "nuclei", "shapes", "voc2012-masks")  # trained in every run of the tests
recipe = pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)

STEPS = 2
KEYPOINTS = "person_keypoints_"  # what the names of COCO's splits with keypoints begin with


@pytest.fixture
def data(tmp_path, poses):
    """Makes a dataset of four drawn pictures to train on and one to validate on, with splits of any names."""

    def make(train, val):
        root = tmp_path / "data"
        (root / "annotations").mkdir(parents=True)
        for own, name, count in (("train", train, STEPS * BATCH), ("val", val, 1)):
            (root / name.removeprefix(KEYPOINTS)).symlink_to(poses / own)
            content = json.loads((poses / "annotations" / f"instances_{own}.json").read_text())
            drawn = {entry["image_id"] for entry in content["annotations"]}
            content["images"] = [entry for entry in content["images"] if entry["id"] in drawn][:count]
            kept = {entry["id"] for entry in content["images"]}
            content["annotations"] = [entry for entry in content["annotations"] if entry["image_id"] in kept]
            stem = name if name.startswith(KEYPOINTS) else f"instances_{name}"
            (root / "annotations" / f"{stem}.json").write_text(json.dumps(content))
        return root

    return make


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The present folder, and torch.hub's in it; emptied, as pytest would keep half a gigabyte of each recipe."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    for path in tmp_path.glob("*.pth"):
        path.unlink()
    for name in ("torch", "run"):
        shutil.rmtree(tmp_path / name, ignore_errors=True)


@pytest.fixture
def steps(monkeypatch):
    """The figures of the optimizer steps that were taken."""
    taken, run = [], Step.run

    def counted(self, parts):
        taken.append(run(self, parts))
        return taken[-1]

    monkeypatch.setattr(Step, "run", counted)
    return taken


def test_there_are_recipes():
    assert len(RECIPES) >= 12


@recipe
def test_its_settings_are_known(path, data):
    settings, splits = settings_of(path)
    assert settings["model"]["name"] in MODELS
    root = data(*splits)
    config = training_config(*(CocoDataset.load(root, split) for split in splits), settings)
    assert config.epochs > max((0, *config.step_epochs)), "the rate decays within the run"
    assert config.schedule == "step" or not config.step_epochs
    named = settings["model"].get("preprocessing", {})
    assert config.model.preprocessing.min_size_px == named.get("min_size_px", 800)


@pytest.mark.parametrize(
    "path",
    [pytest.param(path, id=path.stem, marks=[pytest.mark.slow] * (path.stem not in QUICK)) for path in RECIPES],
)
def test_it_trains_for_two_steps(path, data, folder, steps):
    settings, splits = settings_of(path)
    put_weights(settings, folder)
    command = ["train", "--config", str(path), "--data", str(data(*splits)), "--output", "run", *SMALL]
    result = CliRunner().invoke(app, command, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert len(steps) == STEPS and all(figures["finite"] for figures in steps)
    late = ", ".join(map(str, settings.get("step_epochs", ())))
    assert (f"will not decay after epoch {late}: the run ends after epoch 1" in result.output) == bool(late)
    if settings.get("weights"):
        (told,) = [line for line in result.output.splitlines() if line.startswith("starting from ")]
        assert settings["weights"] in told
    (log,) = map(json.loads, (folder / "run" / "log.jsonl").read_text().splitlines())
    model = MODELS[settings["model"]["name"]]
    parts = {"mask": model.get("has_masks", True), "keypoint": model.get("has_keypoints", False)}
    assert {name: name in log for name in parts} == parts == {name: f"{name}_ap" in log for name in parts}
    kept = yaml.safe_load((folder / "run" / "config.json").read_text())
    assert kept["learning_rate"] == settings["learning_rate"]
    assert (kept["train_split"], kept["val_split"]) == splits


def test_shapes_are_what_train_does_without_a_file(shapes):
    settings, _ = settings_of(ROOT / "configs" / "shapes.yaml")
    dataset = CocoDataset.load(shapes, "train")
    dataset = dataclasses.replace(dataset, images=[*dataset.images] * 50)  # 600, as many as are drawn by default
    assert training_config(dataset, dataset, settings) == training_config(dataset, dataset)


@pytest.mark.parametrize("key", ["epoch: 3", "model: {detection: 3}", "augment: {flip: 1.0}"])
def test_a_key_that_is_none_is_found(key, tmp_path, shapes):
    (tmp_path / "broken.yaml").write_text(key + "\n")
    settings, _ = settings_of(tmp_path / "broken.yaml")
    dataset = CocoDataset.load(shapes, "train")
    with pytest.raises(UserError, match=r"unknown field\(s\)"):
        training_config(dataset, dataset, settings)


@recipe
def test_its_head_says_what_it_is(path):
    head = [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    text = "\n".join(head)
    assert f"maskrcnn train --config configs/{path.name}" in text
    assert "\n# Source: " in text and "\n# Run: " in text


def test_every_recipe_has_a_line_in_its_page_and_no_other():
    text = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    assert {path.name for path in RECIPES} == set(re.findall(r"\.\./configs/([\w.-]+\.yaml)", text))

"""Settings: one dataclass behind the command line, YAML and what a run keeps."""

import dataclasses
import json

import pytest
from typer.testing import CliRunner

from maskrcnn.cli import app
from maskrcnn.config import LossConfig, TrainConfig, changed, from_dict, to_dict
from maskrcnn.data.coco import CocoDataset
from maskrcnn.errors import UserError
from maskrcnn.options import assignments, merged, read_settings
from maskrcnn.recipes import training_config


@pytest.fixture
def started(monkeypatch):
    """What `maskrcnn train` would do, instead of doing it."""
    calls = []
    monkeypatch.setattr("maskrcnn.cli_train.run_training", lambda console, **call: calls.append(call))

    def run(*arguments):
        result = CliRunner().invoke(app, ["train", *map(str, arguments)], catch_exceptions=True)
        if isinstance(result.exception, UserError):
            raise result.exception
        assert result.exit_code == 0, result.output
        return calls.pop()

    return run


def test_every_setting_with_a_help_text_is_an_option():
    options = {opt for p in _command("train").params for opt in p.opts}
    named = [f.name for f in dataclasses.fields(TrainConfig) if "help" in f.metadata]
    assert len(named) > 20
    assert {f"--{name.replace('_', '-')}" for name in named} <= options


def _command(name):
    import typer.main

    return typer.main.get_command(app).commands[name]


def test_options_go_before_assignments_and_those_before_the_file(started, tmp_path):
    file = tmp_path / "settings.yaml"
    file.write_text("model: {name: maskrcnn_resnet18_fpn, detections: 7}\nepochs: 3\nbatch_size: 2\nseed: 9\n")
    call = started(
        "--config", file, "--set", "batch_size=4", "--set", "model.nms_iou=0.6", "--epochs", 5, "--min-size", 64,
        "--step-epochs", "8,11", "--no-tensorboard", "--data", "somewhere",
    )  # fmt: skip
    assert call["settings"] == {
        "model": {
            "name": "maskrcnn_resnet18_fpn",
            "detections": 7,
            "nms_iou": 0.6,
            "preprocessing": {"min_size_px": 64},
        },
        "epochs": 5,
        "batch_size": 4,
        "seed": 9,
        "step_epochs": (8, 11),
        "tensorboard": False,
        "data": "somewhere",
    }


def test_a_model_may_be_a_name_alone(started, tmp_path):
    file = tmp_path / "settings.yaml"
    file.write_text("model: maskrcnn_resnet34_fpn\n")
    assert started("--config", file)["settings"] == {"model": {"name": "maskrcnn_resnet34_fpn"}}
    call = started("--config", file, "--model", "maskrcnn_resnet18_fpn")
    assert call["settings"]["model"] == {"name": "maskrcnn_resnet18_fpn"}


def test_a_resumed_run_keeps_its_data_and_model(started):
    assert started("--resume", "runs/x", "--accumulate", 2)["settings"] == {"accumulate": 2}
    with pytest.raises(UserError, match="--resume with"):
        started("--resume", "runs/x", "--data", "elsewhere")


def test_bad_settings_are_named(tmp_path, started):
    for text, words in (
        ("epochs 3", "a mapping"),
        ("a: [", "not YAML"),
    ):
        (tmp_path / "bad.yaml").write_text(text)
        with pytest.raises(UserError, match=r"bad\.yaml") as caught:
            read_settings(tmp_path / "bad.yaml")
        assert words in str(caught.value)
    with pytest.raises(UserError, match="No such file"):
        read_settings(tmp_path / "none.yaml")
    with pytest.raises(UserError, match="--set epochs"):
        assignments(["epochs"])
    with pytest.raises(UserError, match=r"'8,x'"):
        started("--step-epochs", "8,x")


def test_settings_make_a_configuration(shapes):
    dataset = CocoDataset.load(shapes, "train")
    settings = merged(assignments(["loss.box_loss=giou", "augment.flip_probability=0"]), {"batch_norm": "frozen"})
    config = training_config(dataset, dataset, settings)
    assert config.loss.box_loss == "giou"
    assert config.loss.rpn_samples == 64, "the small model's default stays"
    assert config.augment.flip_probability == 0.0
    assert config.model.frozen_batch_norm
    assert config.model.class_names == dataset.class_names
    assert from_dict(TrainConfig, json.loads(json.dumps(to_dict(config)))) == config
    again = training_config(dataset, dataset, json.loads(json.dumps(to_dict(config))))
    assert again == config, "what a run keeps makes the same run"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"epoch": 3}, r"unknown field\(s\) epoch"),
        ({"model": {"detection": 3}}, r"ModelConfig with unknown field\(s\) detection"),
        ({"learning_rate": "1e-4"}, r"learning_rate '1e-4' of type str"),
        ({"epochs": 2.5}, r"epochs 2.5 of type float"),
        ({"epochs": 0}, r"epochs 0"),
        ({"optimizer": "lion"}, r"optimizer 'lion'"),
        ({"loss": {"box_loss": "l3"}}, r"loss.box_loss 'l3'"),
        ({"trainable_stages": 6}, r"trainable_stages 6"),
        ({"model": "maskrcnn_resnet19"}, r"maskrcnn_resnet19"),
        ({"model": {"class_names": ["cat"], "category_ids": [1]}}, r"settings for the classes \('cat',\)"),
    ],
)
def test_settings_that_cannot_be_are_refused(shapes, settings, words):
    dataset = CocoDataset.load(shapes, "train")
    with pytest.raises(UserError, match=words):
        training_config(dataset, dataset, settings)


def test_changes_keep_the_rest():
    loss = LossConfig(rpn_samples=10)
    assert changed(loss, {"box_samples": 5}) == LossConfig(rpn_samples=10, box_samples=5)

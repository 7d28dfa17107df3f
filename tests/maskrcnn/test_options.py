"""Settings: one dataclass behind the command line, YAML and what a run keeps."""

import dataclasses
import inspect
import json
import math
from pathlib import Path

import pytest
from typer.testing import CliRunner

import maskrcnn
from maskrcnn import cli
from maskrcnn.cli import app
from maskrcnn.config import LossConfig, TrainConfig, changed, from_dict, model_config, to_dict
from maskrcnn.data.coco import CocoDataset
from maskrcnn.errors import UserError
from maskrcnn.imaging.preprocess import PRESETS
from maskrcnn.settings import assignments, merged, read_settings, with_sections
from maskrcnn.training.recipe import training_config


@pytest.fixture
def started(monkeypatch):
    """What `maskrcnn train` would do, instead of doing it."""
    calls = []
    monkeypatch.setattr(
        "maskrcnn.api.train.run_training", lambda settings, **call: calls.append({"settings": settings, **call})
    )

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


def test_a_recipe_has_a_name(started, tmp_path, monkeypatch):
    file = Path(__file__).parents[2] / "configs" / "finetune.yaml"
    by_path = started("--config", file)["settings"]
    monkeypatch.chdir(tmp_path)  # without the clone's configs/
    assert by_path == started("--config", "finetune")["settings"]
    assert by_path == started("--config", "configs/finetune.yaml")["settings"]
    for unknown in ("finetun", "elsewhere/finetune.yaml"):
        with pytest.raises(UserError, match=r"finetun.*: No such file or directory\n.*finetune, nuclei, penn-fudan"):
            started("--config", unknown)
    (tmp_path / "finetune").write_text("epochs: 3\n")
    assert started("--config", "finetune")["settings"] == {"epochs": 3}


def test_options_override_assignments_and_those_the_file(started, tmp_path):
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


def test_a_resumed_run_keeps_its_splits_and_model(started):
    assert started("--resume", "runs/x", "--accumulate", 2)["settings"] == {"accumulate": 2}
    assert started("--resume", "runs/x", "--data", "elsewhere")["settings"] == {"data": "elsewhere"}
    with pytest.raises(UserError, match=r"--resume with --split.*\n  expected: the run as it began"):
        started("--resume", "runs/x", "--split", "other")
    for name in ("model", "model.name"):
        with pytest.raises(UserError, match=r"--resume with the model 'maskrcnn_resnet34_fpn'\n.*\n  fix: .*a new run"):
            started("--resume", "runs/x", "--set", f"{name}=maskrcnn_resnet34_fpn")
    assert started("--resume", "runs/x", "--set", "model.detections=7")["settings"] == {"model": {"detections": 7}}


@pytest.mark.parametrize("words", [("--weights", "w.pth"), ("--set", "weights=w.pth")])
def test_a_resumed_run_has_its_weights(started, words):
    with pytest.raises(UserError) as caught:
        started("--resume", "runs/x", *words)
    assert caught.value.found == "--resume with the weights 'w.pth'"
    assert "its own" in caught.value.expected and "start a new run from those weights" in caught.value.fix


def test_the_help_says_which_of_file_and_options_counts():
    (option,) = [p for p in _command("train").params if "--config" in p.opts]
    assert option.help.startswith("YAML file of settings, or name of a recipe, such as finetune; options override it.")


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (["model=A", "model.neck=panet"], {"name": "A", "neck": "panet"}),
        (["model.neck=panet", "model=A"], {"name": "A", "neck": "panet"}),
        (
            ["model.preprocessing=imagenet", "model.preprocessing.min_size_px=600"],
            {"preprocessing": {**PRESETS["imagenet"], "min_size_px": 600}},
        ),
        (
            ["model.preprocessing.preset=caffe", "model.preprocessing.channel_order=RGB"],
            {"preprocessing": {**PRESETS["caffe"], "channel_order": "RGB"}},
        ),
    ],
)
def test_a_name_and_fields_of_its_section_are_set_side_by_side(texts, expected):
    assert assignments(texts)["model"] == expected


def test_a_preset_overrides_the_fields_of_the_layer_below():
    kept = {"model": {"preprocessing": {**PRESETS["imagenet"], "min_size_px": 64}}}  # as a run's config.json
    found = merged(with_sections(kept), assignments(["model.preprocessing=caffe"]))["model"]["preprocessing"]
    assert found == {**PRESETS["caffe"], "min_size_px": 64}


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--set", "step_epochs=8,11"), {"step_epochs": (8, 11)}),
        (("--set", "step_epochs=8"), {"step_epochs": (8,)}),
        (("--step-epochs", "8"), {"step_epochs": (8,)}),
        (("--step-epochs", ""), {"step_epochs": ()}),
        (("--set", "augment.shorter_sides_px=640"), {"augment": {"shorter_sides_px": (640,)}}),
        (("--set", "augment.shorter_sides_px=640,672"), {"augment": {"shorter_sides_px": (640, 672)}}),
        (("--set", "model.anchor_aspect_ratios=0.5,1"), {"model": {"anchor_aspect_ratios": (0.5, 1.0)}}),
        (("--set", "augment="), {"augment": {}}),
    ],
)
def test_a_list_on_the_command_line_needs_no_brackets(started, words, expected):
    assert started(*words)["settings"] == expected


@pytest.mark.parametrize(
    ("text", "found", "expected"),
    [
        ("step_epochs=8,x", "step_epochs '8,x'", "a list of integers, as [8, 11]"),
        ("step_epochs=8.5", "step_epochs[0] 8.5 of type float", "int"),
        ("step_epochs=[8,[11]]", "step_epochs[1] [11] of type list", "int"),
        ("step_epochs=true", "step_epochs True", "a list of integers, as [8, 11]"),
        ("augment.shorter_sides_px=[640,x]", "augment.shorter_sides_px[1] 'x' of type str", "int"),
        (
            "model.mask_head_channels=256",
            "model.mask_head_channels 256",
            "a list of integers, as [256, 256, 256, 256]",
        ),
        ("model.anchor_sizes_px=32", "model.anchor_sizes_px 32", "a list of numbers, as [32, 64, 128, 256, 512]"),
        ("model.keypoint_names=nose", "model.keypoint_names 'nose'", "a list of strings, as [cat, dog]"),
        ("model.keypoint_skeleton=3", "model.keypoint_skeleton 3", "a list of lists, as [[1, 2], [2, 3]]"),
        ("model.preprocessing.min_size_px=big", "model.preprocessing.min_size_px 'big' of type str", "int"),
        ("model=3", "model 3", "a section: fields of ModelConfig"),
        ("model.preprocessing=3", "model.preprocessing 3", "a section: fields of Preprocessing"),
        ("loss=giou", "loss 'giou'", "a section: fields of LossConfig"),
        ("epochs.x=3", "epochs {'x': 3} of type dict", "int"),
        ("data=3", "data 3 of type int", "str"),
        ("train_split=2017", "train_split 2017 of type int", "str"),
        ("batch_size=0", "batch_size 0", "at least 1"),
        ("loss.rpn_samples=0", "loss.rpn_samples 0", "at least 1"),
        ("augment.3=4", "AugmentConfig with unknown field(s) 3", "fields among colour_probability"),
    ],
)
def test_a_value_of_the_wrong_type_is_named_before_anything_is_loaded(started, text, found, expected):
    with pytest.raises(UserError) as caught:
        started("--set", text)
    assert caught.value.found == found and caught.value.expected.startswith(expected)


@pytest.mark.parametrize("line", ["step_epochs: 8", "step_epochs: 8,", "step_epochs: [8]"])
def test_a_list_of_one_in_a_file(started, tmp_path, line):
    (tmp_path / "settings.yaml").write_text(line + "\n")
    assert started("--config", tmp_path / "settings.yaml")["settings"] == {"step_epochs": (8,)}


def test_keys_that_are_no_words_are_named(started, tmp_path):
    (tmp_path / "settings.yaml").write_text("8: 3\nepoch: 3\n")
    with pytest.raises(UserError, match=r"unknown field\(s\) 8, epoch"):
        started("--config", tmp_path / "settings.yaml")


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
    with pytest.raises(UserError, match="did you mean epochs"):
        started("--set", "epoch=3")
    with pytest.raises(UserError, match=r"did you mean maskrcnn_vgg16_fpn or .* or fasterrcnn_vgg16_fpn\?"):
        model_config("vgg16")
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


def test_small_data_get_epochs_for_some_hundred_steps(shapes):
    dataset = CocoDataset.load(shapes, "train")  # 12 images: three steps of 4 in an epoch
    config = training_config(dataset, dataset)
    assert (config.epochs, config.evaluate_every) == (100, 8)
    assert training_config(dataset, dataset, {"epochs": 2}).epochs == 2
    assert training_config(dataset, dataset, {"batch_size": 1}).epochs == 25
    many = dataclasses.replace(dataset, images=[*dataset.images] * 20)  # 60 steps: the usual epochs are 720
    assert (training_config(many, many).epochs, training_config(many, many).evaluate_every) == (12, 1)


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
        ({"model": {"preprocessing": {"min_size_px": 200, "max_size_px": 100}}}, r"side of 200 px \(--min-size\)"),
        ({"model": "maskrcnn_resnet19"}, r"maskrcnn_resnet19"),
        (
            {"model": {"class_names": ["cat"], "category_ids": [1]}},
            r"a model with the classes cat \(1\)\n  expected: .*: circle \(1\), rectangle \(2\), triangle \(3\)",
        ),
        (
            {"model": {"anchor_sizes_px": [12, 24]}},
            r"model.anchor_sizes_px \[12.0, 24.0\]\n  expected: 5 values, one for each",
        ),
        ({"model": {"anchor_strides_px": [4]}}, r"model.anchor_strides_px \[4\]\n  expected: 5 values, .* P2, P3"),
        ({"model": {"mask_head_channels": []}}, r"model.mask_head_channels \[\]\n  expected: at least one"),
        ({"model": {"anchor_aspect_ratios": []}}, r"model.anchor_aspect_ratios \[\]\n  expected: at least one"),
        ({"schedule": "step"}, r"schedule step without step_epochs\n.*decays\n  fix: +.*--step-epochs 8,11.*constant"),
        ({"step_epochs": [11, 8]}, r"step_epochs \[11, 8\]\n  expected: epochs from 1 on, in ascending order"),
        ({"step_epochs": [8, 8]}, r"step_epochs \[8, 8\]"),
        ({"step_epochs": [0, 8]}, r"step_epochs \[0, 8\]"),
        (
            {"loss": {"class_weights": "equal"}},
            r"loss.class_weights 'equal'\n  expected: one of none, inverse, effective",
        ),
        ({"loss": {"class_weights": {"circel": 2}}}, r"loss.class_weights of circel\n  expected: .*circle, rectangle"),
        ({"loss": {"class_weights": {"circle": -1}}}, r"loss.class_weights of 'circle' -1.0\n  expected: at least 0"),
        ({"loss": {"class_weights": [1, 2]}}, r"loss.class_weights \[1, 2\] of type list\n  expected: values by name"),
        ({"loss": {"class_weights": {"circle": "x"}}}, r"loss.class_weights.circle 'x' of type str\n  expected: float"),
        ({"loss": {"class_weights_beta": 1}}, r"loss.class_weights_beta 1.0"),
        ({"loss": {"objectness_loss": "hinge"}}, r"loss.objectness_loss 'hinge'"),
        ({"loss": {"focal_gamma": -1}}, r"loss.focal_gamma -1.0"),
        ({"repeat_threshold": 2}, r"repeat_threshold 2.0\n  expected: 0 to 1"),
        ({"aspect_ratio_groups": 1}, r"aspect_ratio_groups 1"),
        ({"augment": {"largest_aspect_ratio": 0.5}}, r"augment.largest_aspect_ratio 0.5"),
    ],
)
def test_settings_that_cannot_be_are_refused(shapes, settings, words):
    dataset = CocoDataset.load(shapes, "train")
    with pytest.raises(UserError, match=words):
        training_config(dataset, dataset, settings)


def test_every_number_has_a_range(shapes):
    """-2 is in none of them, nor are NaN and infinity."""
    dataset = CocoDataset.load(shapes, "train")
    plain = to_dict(training_config(dataset, dataset))
    checked = 0
    for section, fields in (("", plain), *((f"{name}.", plain[name]) for name in ("model", "augment", "loss"))):
        for name, default in fields.items():
            several = isinstance(default, (tuple, list))
            # Empty lists of numbers are anchor strides, keypoint sigmas and shorter sides; ids may be any number.
            kind = type(default[0]) if several and default else type(default)
            if kind not in (int, float) or name == "category_ids":
                continue
            for value in (-2, math.nan, math.inf) if kind is float else (-2,):
                wrong = [kind(value)] * len(default) if several else kind(value)
                settings = {section[:-1]: {name: wrong}} if section else {name: wrong}
                with pytest.raises(UserError, match=rf"{section}{name} .*\n  expected: "):
                    training_config(dataset, dataset, settings)
            checked += 1
    assert checked > 70


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("model.proposals=0", "model.proposals 0\n  expected: at least 1"),
        ("model.fpn_channels=0", "model.fpn_channels 0\n  expected: at least 1"),
        ("model.mask_head_channels=[256,0]", "model.mask_head_channels 0\n  expected: at least 1"),
        ("model.anchor_sizes_px=[8,16,.nan,64,128]", "model.anchor_sizes_px nan\n  expected: above 0 and finite"),
        ("model.anchor_sizes_px=[0,1,2,3,4]", "model.anchor_sizes_px 0.0\n  expected: above 0"),
        ("model.score_threshold=2", "model.score_threshold 2.0\n  expected: 0 to 1"),
        ("model.anchor_aspect_ratios=[0,1]", "model.anchor_aspect_ratios 0.0\n  expected: above 0"),
        ("loss.box_loss_weight=-1", "loss.box_loss_weight -1.0\n  expected: at least 0"),
        ("loss.rpn_background_iou=0.8", "loss.rpn_background_iou 0.8\n  expected: 0 to 0.7"),
        ("augment.shorter_sides_px=64,0", "augment.shorter_sides_px 0\n  expected: at least 1"),
        ("learning_rate=.inf", "learning_rate inf\n  expected: at least 0 and finite"),
        ("momentum=-0.5", "momentum -0.5\n  expected: 0 to 1"),
    ],
)
def test_numbers_outside_their_range_are_named_by_their_key(shapes, text, words):
    dataset = CocoDataset.load(shapes, "train")
    with pytest.raises(UserError) as caught:
        training_config(dataset, dataset, assignments([text]))
    assert str(caught.value).startswith(words)


def test_changes_keep_the_rest():
    loss = LossConfig(rpn_samples=10)
    assert changed(loss, {"box_samples": 5}) == LossConfig(rpn_samples=10, box_samples=5)


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        ({}, "none"),
        ({"class_weights": "inverse"}, {"a": 10 / 18, "b": 10 / 9, "c": 10 / 3, "d": 1.0}),
        # 1 / effective number: 0.5 / (1 - 0.5^6), 0.5 / (1 - 0.5^3), 1; scaled to a mean of 1 over ten objects.
        (
            {"class_weights": "effective", "class_weights_beta": 0.5},
            {"a": 0.881543, "b": 0.991736, "c": 1.735537, "d": 1.0},
        ),
        ({"class_weights": "effective", "class_weights_beta": 0}, dict.fromkeys("abcd", 1.0)),
        ({"class_weights": {"c": 5}}, {"a": 1.0, "b": 1.0, "c": 5.0, "d": 1.0}),
    ],
)
def test_class_weights_by_hand(loss, expected):
    """Six objects of class a, three of b, one of c, none of d; a crowd region of c does not count."""
    numbers = [1] * 6 + [2] * 3 + [3, 3]
    box = {"image_id": 1, "bbox": [1, 1, 9, 9], "area": 81, "segmentation": [[1, 1, 10, 1, 10, 10, 1, 10]]}
    objects = [{**box, "id": k, "category_id": each, "iscrowd": int(k == 11)} for k, each in enumerate(numbers, 1)]
    content = {
        "images": [{"id": 1, "file_name": "1.png", "height": 20, "width": 20}],
        "annotations": objects,
        "categories": [{"id": k, "name": name} for k, name in enumerate("abcd", 1)],
    }
    dataset = CocoDataset.from_content(content, "unequal.json")
    config = training_config(dataset, dataset, {"loss": loss})
    found = config.loss.class_weights
    assert found == (expected if isinstance(expected, str) else pytest.approx(expected, rel=1e-5))
    assert isinstance(found, str) or list(found) == list("abcd")
    assert from_dict(TrainConfig, json.loads(json.dumps(to_dict(config)))) == config
    assert training_config(dataset, dataset, json.loads(json.dumps(to_dict(config)))) == config


def test_class_weights_are_set_one_by_one_or_together(started):
    call = started("--set", "loss.class_weights={1: 2, dog: 3}", "--set", "loss.class_weights.cat=4", "--data", "x")
    assert call["settings"]["loss"]["class_weights"] == {"1": 2.0, "dog": 3.0, "cat": 4.0}
    call = started("--set", "loss.class_weights={dog: 3}", "--set", "loss.class_weights=inverse", "--data", "x")
    assert call["settings"]["loss"]["class_weights"] == "inverse"


@pytest.mark.parametrize(
    ("command", "arguments"), [("predict", ("x.png",)), ("evaluate", ("x.onnx",)), ("verify", ("x.onnx", "y.onnx"))]
)
def test_python_refuses_the_numbers_that_the_command_line_refuses(command, arguments):
    parameters = inspect.signature(getattr(getattr(cli, command), command), eval_str=True).parameters
    for name, parameter in parameters.items():
        option = parameter.annotation.__metadata__[0]
        for bound, step in ((option.min, -1), (option.max, 1)) if not name.startswith("actor") else ():
            if bound is not None:
                with pytest.raises(UserError, match=f"^{name} {bound + step}\n"):
                    getattr(maskrcnn, command)(*arguments, **{name: bound + step})

"""`maskrcnn train --resume`: where the data lies, which of it fits, and what is printed."""

import errno
import json
import shutil
import subprocess
import sys
from unittest.mock import Mock

import pytest
import torch
from command_line import expect_error
from tiny import TINY_POSE, tiny_config

from maskrcnn import runs
from maskrcnn.config import TrainConfig, to_dict
from maskrcnn.data.coco import CocoDataset
from maskrcnn.training.state import read_run
from maskrcnn.training.trainer import Trainer
from maskrcnn.weights.checkpoint import read_tensors, write_tensors

pytestmark = pytest.mark.usefixtures("narrow_resnet")


@pytest.fixture
def began(shapes, tmp_path):
    """Makes a run on a copy of the shapes, stopped before its first step; returns the run and the copy."""

    def make(*, written=None, **settings):
        data = shutil.copytree(shapes, tmp_path / "data")
        values = {"batch_size": 4, "epochs": 2, "workers": 0, "device": "cpu", "precision": "fp32", "pictures": 0}
        config = TrainConfig(
            model=tiny_config(), data=str(data), tensorboard=False, warmup_steps=0, **{**values, **settings}
        )
        Trainer(config, tmp_path / "run", CocoDataset.load(data, "train")).begin()
        if written:
            path = tmp_path / "run" / runs.CONFIG
            path.write_text(json.dumps(json.loads(path.read_text()) | written))
        return tmp_path / "run", data

    return make


@pytest.fixture
def fitted(monkeypatch):
    """The configurations of the runs that would train, instead of training."""
    configs = []
    monkeypatch.setattr(Trainer, "fit", lambda self, *functions: configs.append(self.config))
    return configs


def kept(run) -> dict:
    return json.loads((run / runs.CONFIG).read_text())


def test_a_new_run_keeps_the_full_path_of_its_data(run, shapes, tmp_path, fitted, monkeypatch):
    shutil.copytree(shapes, tmp_path / "data")
    code, _, err = run("train", "--data", "data", "--output", "run", "--workers", 0)
    assert code == 0, err
    assert fitted[0].data == kept(tmp_path / "run")["data"] == str((tmp_path / "data").resolve())
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    code, out, err = run("train", "--resume", "../run")
    assert code == 0, err
    assert " instead of " not in out and fitted[1] == fitted[0]


def test_a_run_whose_data_moved_goes_on_with_the_new_folder(run, began, tmp_path):
    folder, data = began(epochs=1)
    data.rename(tmp_path / "moved")
    expect_error(run("train", "--resume", folder), f"{data} does not exist", "--data DIR")
    code, out, err = run("train", "--resume", folder, "--data", "moved")
    assert code == 0, err
    moved = str((tmp_path / "moved").resolve())
    assert f"data: {moved} instead of {data}" in out
    assert kept(folder)["data"] == moved and (folder / runs.LAST).exists()


def test_a_relative_path_that_a_run_kept_becomes_a_full_one(run, began, fitted):
    folder, data = began(written={"data": "data"})
    code, out, err = run("train", "--resume", folder)
    assert code == 0, err
    assert kept(folder)["data"] == str(data.resolve()) and "instead of" not in out


def renamed(content):
    content["categories"][1]["name"] = "square"


def renumbered(content):
    content["categories"][2]["id"] = 9
    content["annotations"] = [each for each in content["annotations"] if each["category_id"] != 3]


def boxes_alone(content):
    for annotation in content["annotations"]:
        del annotation["segmentation"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (renamed, ("circle (1), rectangle (2), triangle (3)", "circle (1), square (2), triangle (3)")),
        (renumbered, ("triangle (3)\n", "triangle (9)\n", "instances_train.json")),
        (boxes_alone, ("learns masks", "has boxes only")),
    ],
)
@pytest.mark.parametrize("is_named", [True, False])
def test_data_that_the_model_does_not_fit_is_refused(run, began, fitted, change, words, is_named):
    folder, data = began()
    before = kept(folder)
    for path in (data / "annotations").iterdir():
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))
    expect_error(run("train", "--resume", folder, *(("--data", data) if is_named else ())), *words)
    assert not fitted and kept(folder) == before


def test_keypoints_of_a_model_are_looked_for(run, began, fitted):
    folder, _ = began(written={"model": json.loads(json.dumps(to_dict(tiny_config(**TINY_POSE))))})
    expect_error(run("train", "--resume", folder), "learns keypoints", "instances_train.json has none")
    assert not fitted


def test_changes_are_printed_setting_by_setting(run, began, fitted):
    folder, _ = began()
    options = ("--set", "model.detections=7", "--set", "augment.shorter_sides_px=64,96", "--epochs", 5)
    code, out, err = run("train", "--resume", folder, *options, "--batch-size", 4)
    assert code == 0, err
    assert [line for line in out.splitlines() if "instead of" in line] == [
        "model.detections: 7 instead of 12",
        "augment.shorter_sides_px: (64, 96) instead of ()",
        "epochs: 5 instead of 2",
    ]
    assert fitted[0].model.detections == kept(folder)["model"]["detections"] == 7


def test_weights_are_not_given_to_a_run_that_has_them(run, began, fitted, checkpoint):
    folder, _ = began()
    expect_error(run("train", "--resume", folder, "--weights", checkpoint), "--resume with the weights", "a new run")
    assert not fitted


def test_a_damaged_state_names_the_weights_that_are_left(run, began, fitted):
    folder, _ = began()
    state = folder / runs.STATE
    state.write_bytes(state.read_bytes()[:-8])
    (folder / runs.LAST).touch()
    expect_error(run("train", "--resume", folder), runs.STATE, f"--weights {folder / runs.LAST}")
    assert not fitted


def saved(run) -> dict:
    return read_tensors(run / runs.STATE)[0]


def test_settings_that_a_run_cannot_change_are_refused_and_nothing_is_written(run, began, fitted):
    folder, _ = began()
    before = kept(folder)
    for words, found in (
        (("--optimizer", "adam"), "optimizer adam instead of sgd"),
        (("--set", "model.fpn_channels=32"), "model.fpn_channels 32 instead of 16"),
        (("--set", "model.anchor_sizes_px=8,16,32,64,128"), "model.anchor_sizes_px"),
    ):
        expect_error(run("train", "--resume", folder, *words), found, "as the run began", "a new run with --weights")
        assert not fitted and kept(folder) == before
    expect_error(run("train", "--resume", folder, "--accumulate", 3), "batch_size 4")
    assert not fitted and kept(folder) == before


@pytest.mark.parametrize("words", [("--trainable-stages", 3), ("--trainable-stages", 5), ("--batch-norm", "frozen")])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_the_optimizer_goes_on_with_what_it_knew_of_each_parameter(run, began, fitted, words, optimizer):
    """Though other parameters are trained than before: those that begin have no state, those that end lose it."""
    folder, data = began(optimizer=optimizer, trainable_stages=4, learning_rate=1e-3)
    trainer = Trainer(read_run(folder), folder, CocoDataset.load(data, "train"))
    trainer.load_state()
    trainer.step.run(next(trainer._step_batches()))
    trainer._save_state()
    before = saved(folder)
    code, _, err = run("train", "--resume", folder, *words)
    assert code == 0, err
    (config,) = fitted
    resumed = Trainer(config, folder, CocoDataset.load(data, "train"))
    resumed.load_state()
    assert config.model.frozen_batch_norm == (words[1] == "frozen")
    trained = {name for name, parameter in resumed.model.named_parameters() if parameter.requires_grad}
    known = {
        f"optimizer.{name}.{key}": value
        for name, parameter in resumed.model.named_parameters()
        for key, value in resumed.optimizer.state.get(parameter, {}).items()
    }
    shared = {name for name in before if name.startswith("optimizer.") and name in known}
    assert {name.removeprefix("optimizer.").rpartition(".")[0] for name in shared} == {
        name for name in trained if any(key.startswith(f"optimizer.{name}.") for key in before)
    }
    assert len(shared) > 50 and all(torch.equal(known[name], before[name]) for name in shared)
    resumed.step.run(next(resumed._step_batches()))
    assert all(parameter.isfinite().all() for parameter in resumed.model.parameters())


HOLDS = """
import sys, time
from pathlib import Path
from maskrcnn.files import locked
with locked(Path(sys.argv[1]), found="", expected="", fix=""):
    print("locked", flush=True)
    time.sleep(600)
"""


def test_a_run_is_trained_by_one_process_at_a_time(run, began, fitted, shapes, tmp_path):
    folder, _ = began()
    (tmp_path / "new").mkdir()
    commands = {folder: ("--resume", folder), tmp_path / "new": ("--data", shapes, "--output", tmp_path / "new")}
    for place, words in commands.items():
        command = [sys.executable, "-c", HOLDS, str(place / runs.LOCK)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
            assert holder.stdout.readline() == "locked\n"
            before = kept(folder)
            result = run("train", *words, "--epochs", 7)
            expect_error(result, f"another process is training (process {holder.pid} on ", "one command at a time")
            assert not fitted and kept(folder) == before and not (tmp_path / "new" / runs.CONFIG).exists()
            holder.kill()
        assert (place / runs.LOCK).exists(), "what a killed process leaves behind"
        code, _, err = run("train", *words)
        assert code == 0 and len(fitted) == 1, err
        assert fitted.pop() and not (place / runs.LOCK).exists()


def test_a_file_system_without_locks_is_said(run, began, fitted, monkeypatch):
    folder, _ = began()
    monkeypatch.setattr("fcntl.lockf", Mock(side_effect=OSError(errno.ENOLCK, "No locks available")))
    code, out, err = run("train", "--resume", folder)
    assert code == 0 and len(fitted) == 1, err
    assert f"the file system of {folder} has no locks" in out


def test_the_newest_unfinished_run_of_the_same_settings_is_continued(run, fitted, shapes, tmp_path):
    command = ("train", "--data", shapes, "--workers", 0, "--resume", "auto")
    for words, expected in (
        ((), "no unfinished run of these settings in runs/: beginning a new one"),
        ((), "continuing runs/train-1 after epoch 0 of 100"),
        (("--epochs", 3), "beginning a new one"),
        (("--epochs", 3), "continuing runs/train-2 after epoch 0 of 3"),
        ((), "continuing runs/train-1"),
        (("--output", "mine"), "no unfinished run of these settings in mine: beginning a new one"),
        (("--output", "mine"), "continuing mine"),
    ):
        code, out, err = run(*command, *words)
        assert code == 0 and expected in out, (out, err)
    path = tmp_path / "mine" / runs.STATE
    tensors, header = read_tensors(path)
    header["progress"]["epoch"] = 100
    write_tensors(path, tensors, header)
    expect_error(run(*command, "--output", "mine"), "mine, which holds config.json", "--resume mine")


def test_a_run_that_named_no_steps_can_be_mended(run, began, fitted):
    """Earlier versions let a step schedule without steps pass."""
    folder, _ = began(written={"schedule": "step"})
    expect_error(run("train", "--resume", folder), "schedule step without step_epochs", "--schedule constant")
    code, out, err = run("train", "--resume", folder, "--schedule", "constant")
    assert code == 0, err
    assert "schedule: constant instead of step" in out and fitted[0].schedule == "constant"


def test_steps_beyond_the_end_are_named(run, began, fitted):
    folder, _ = began(schedule="step", step_epochs=(1, 3))
    code, out, err = run("train", "--resume", folder)
    assert code == 0, err
    assert "will not decay after epoch 3: the run ends after epoch 2" in out

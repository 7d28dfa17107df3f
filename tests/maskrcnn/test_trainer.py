"""The training loop: learning, exact resume, and faults."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from tiny import tiny_config

from maskrcnn import runs
from maskrcnn.checkpoint import load_checkpoint, read_tensors
from maskrcnn.config import LossConfig, TrainConfig
from maskrcnn.data.coco import CocoDataset
from maskrcnn.errors import UserError
from maskrcnn.training.schedule import learning_rate
from maskrcnn.training.trainer import Trainer, choose_precision, read_run

SAMPLES = LossConfig(rpn_samples=32, box_samples=16)


def config(shapes, **changes) -> TrainConfig:
    values = {
        "model": tiny_config(),
        "loss": SAMPLES,
        "data": str(shapes),
        "epochs": 3,
        "batch_size": 4,
        "learning_rate": 0.01,
        "warmup_steps": 3,
        "precision": "fp32",
        "workers": 0,
        "device": "cpu",
    }
    return TrainConfig(**{**values, **changes})


def start_run(config, run, dataset) -> Trainer:
    trainer = Trainer(config, run, dataset)
    trainer.begin()
    return trainer


def fixed_ap(*values):
    """An evaluation that returns the given mask APs one after another."""
    left = list(values)
    return lambda model: {"box_ap": 0.0, "mask_ap": left.pop(0)}


class Interruption(Exception):
    pass


def interrupted(model):
    raise Interruption


def weights(run, name=runs.LAST):
    return read_tensors(run / name)[0]


def test_training_lowers_the_loss(shapes, tmp_path):
    trainer = start_run(config(shapes, epochs=6), tmp_path, CocoDataset.load(shapes, "train"))
    trainer.fit(fixed_ap(*[0.1] * 6))
    losses = [json.loads(line)["loss"] for line in (tmp_path / runs.LOG).read_text().splitlines()]
    assert len(losses) == 6
    assert losses[-1] < 0.8 * losses[0]


def test_the_best_checkpoint_is_the_one_of_highest_mask_ap(shapes, tmp_path):
    trainer = start_run(config(shapes), tmp_path, CocoDataset.load(shapes, "train"))
    trainer.fit(fixed_ap(0.1, 0.4, 0.2))
    _, best = read_tensors(tmp_path / runs.BEST)
    _, last = read_tensors(tmp_path / runs.LAST)
    assert (best["figures"]["epoch"], last["figures"]["epoch"]) == (2, 3)
    assert trainer.best_ap == 0.4
    assert load_checkpoint(tmp_path / runs.BEST).config == tiny_config()


def test_a_resumed_run_ends_in_the_same_weights(shapes, tmp_path):
    dataset = CocoDataset.load(shapes, "train")
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    for run in (whole, broken):
        run.mkdir()
    start_run(config(shapes), whole, dataset).fit(fixed_ap(0.1, 0.2, 0.3))

    def stops_in_epoch_2(model, calls=[]):  # noqa: B006
        calls.append(1)
        return interrupted(model) if len(calls) == 2 else {"box_ap": 0.0, "mask_ap": 0.1}

    with pytest.raises(Interruption):
        start_run(config(shapes), broken, dataset).fit(stops_in_epoch_2)
    torch.manual_seed(999)  # whatever happened in between must not matter
    resumed = Trainer(read_run(broken), broken, dataset)
    resumed.load_state()
    assert resumed.epoch == 1
    resumed.fit(fixed_ap(0.2, 0.3))
    one, other = weights(whole), weights(broken)
    assert set(one) == set(other)
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


def test_a_killed_process_continues_to_the_same_weights(shapes, tmp_path):
    def command(*arguments):
        program = [sys.executable, "-m", "maskrcnn", "train", *map(str, arguments)]
        return subprocess.Popen(program, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    options = ("--data", shapes, "--epochs", 3, "--min-size", 64, "--precision", "fp32", "--workers", 0)
    whole = command(*options, "--output", "whole")
    output, _ = whole.communicate(timeout=300)
    assert whole.returncode == 0, output
    broken = command(*options, "--output", "broken")
    state = tmp_path / "broken" / runs.STATE
    deadline = time.monotonic() + 300
    while not state.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(broken.pid, signal.SIGKILL)
    broken.communicate()
    assert read_tensors(state)[1]["epoch"] < 3, "killed too late to show anything"
    again = command("--resume", "broken")
    output, _ = again.communicate(timeout=300)
    assert again.returncode == 0, output
    assert "continuing broken after epoch" in output
    one, other = weights(tmp_path / "whole"), weights(tmp_path / "broken")
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


def test_a_loss_that_is_not_finite_stops_and_names_the_images(shapes, tmp_path):
    trainer = start_run(config(shapes), tmp_path, CocoDataset.load(shapes, "train"))
    with torch.no_grad():
        trainer.model.roi_heads.box_predictor.cls_score.bias.fill_(math.nan)
    with pytest.raises(UserError, match=r"loss nan at step 0, images \[\d+, \d+, \d+, \d+\]"):
        trainer.fit(fixed_ap(0.1))
    assert not (tmp_path / runs.BEST).exists()


def test_a_run_without_state_cannot_be_resumed(tmp_path):
    with pytest.raises(UserError, match=r"without config\.json"):
        read_run(tmp_path)


def test_cosine_schedule_by_hand(shapes):
    plan = config(shapes, epochs=10, learning_rate=1.0, warmup_steps=10)
    rates = [learning_rate(plan, step, 10) for step in (0, 4, 9, 10, 55, 99)]
    expected = [0.1, 0.5, 1.0, 1.0, 0.5, 0.5 * (1 + math.cos(math.pi * 89 / 90))]
    assert rates == pytest.approx(expected)


def test_step_schedule_by_hand(shapes):
    plan = config(shapes, epochs=12, learning_rate=1.0, warmup_steps=0, schedule="step", step_epochs=(8, 11))
    rates = [learning_rate(plan, step, 10) for step in (0, 79, 80, 109, 110)]
    assert rates == pytest.approx([1, 1, 0.1, 0.1, 0.01])
    with pytest.raises(UserError, match="schedule 'zigzag'"):
        learning_rate(replace(plan, schedule="zigzag"), 5, 10)


def test_a_long_warmup_never_takes_more_than_half_the_run(shapes):
    plan = config(shapes, epochs=2, learning_rate=1.0, warmup_steps=1000)
    assert max(learning_rate(plan, step, 10) for step in range(20)) == 1.0


def test_precision_is_chosen_by_the_processor(monkeypatch):
    cpu = torch.device("cpu")
    for features, expected in (
        ({"amx_bf16": False, "avx512_bf16": False}, "fp32"),
        ({"amx_bf16": False, "avx512_bf16": True}, "bf16"),
        ({}, "fp32"),
    ):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda f=features: f, raising=False)
        assert choose_precision("auto", cpu) == expected
    assert choose_precision("fp32", cpu) == "fp32"
    with pytest.raises(UserError, match="precision 'fp8'"):
        choose_precision("fp8", cpu)

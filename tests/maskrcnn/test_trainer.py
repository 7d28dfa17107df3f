"""The training loop: learning, exact resume, and faults."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from tiny import tiny_config

from maskrcnn import runs
from maskrcnn.config import AugmentConfig, LossConfig, TrainConfig
from maskrcnn.data.coco import CocoDataset
from maskrcnn.errors import UserError
from maskrcnn.training import trainer as trainer_module
from maskrcnn.training.distributed import choose_precision, choose_workers
from maskrcnn.training.optimizer import learning_rate, make_optimizer, without_effect
from maskrcnn.training.samples import TrainingSamples
from maskrcnn.training.state import read_run
from maskrcnn.training.trainer import Trainer
from maskrcnn.weights.checkpoint import load_checkpoint, read_tensors

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
        "tensorboard": False,
        "pictures": 0,
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
    assert (best["metrics"]["epoch"], last["metrics"]["epoch"]) == (2, 3)
    assert trainer.progress.best_ap == 0.4
    assert load_checkpoint(tmp_path / runs.BEST).config == tiny_config()


def test_without_a_measured_ap_the_last_epoch_is_the_best(shapes, tmp_path):
    """A validation split without objects has an AP of -1 after every epoch."""
    trainer = start_run(config(shapes, epochs=2), tmp_path / "run", CocoDataset.load(shapes, "train"))
    trainer.fit(fixed_ap(-1.0, -1.0))
    best, last = (weights(tmp_path / "run", name) for name in (runs.BEST, runs.LAST))
    assert all(torch.equal(best[name], last[name]) for name in last)


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
    assert (resumed.progress.epoch, resumed.progress.step) == (1, resumed.sampler.steps)  # only to be evaluated
    resumed.fit(fixed_ap(0.2, 0.3))
    one, other = weights(whole), weights(broken)
    assert set(one) == set(other)
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


def epochs_saved(state) -> int:
    return read_tensors(state)[1]["progress"]["epoch"] if state.exists() else 0


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
    while not epochs_saved(state) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(broken.pid, signal.SIGKILL)
    broken.communicate()
    assert 0 < read_tensors(state)[1]["progress"]["epoch"] < 3, "killed too late to show anything"
    again = command("--resume", "broken")
    output, _ = again.communicate(timeout=300)
    assert again.returncode == 0, output
    assert "continuing broken after epoch" in output
    one, other = weights(tmp_path / "whole"), weights(tmp_path / "broken")
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


DIES_WHILE_WRITING = """
import os, pathlib, signal, sys
from maskrcnn.cli import main

replace, written = os.replace, []

def dies(source, target):
    if pathlib.Path(source).name.startswith(".state"):
        written.append(source)
        if len(written) == 4:  # the initial state, two of the first epoch (before and after its evaluation), and this
            os.truncate(source, os.path.getsize(source) // 2)
            os.kill(os.getpid(), signal.SIGKILL)
    replace(source, target)

os.replace = dies
sys.argv[0] = "maskrcnn"
main()
"""


def test_a_process_killed_while_it_writes_its_state_continues_the_state_before(shapes, tmp_path):
    options = ["--data", shapes, "--epochs", 2, "--min-size", 64, "--precision", "fp32", "--workers", 0]
    options = ["train", *map(str, options), "--pictures", "0", "--no-tensorboard"]

    def run(*command):
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)

    whole = run(sys.executable, "-m", "maskrcnn", *options, "--output", "whole")
    assert whole.returncode == 0, whole.stderr
    killed = run(sys.executable, "-c", DIES_WHILE_WRITING, *options, "--output", "broken")
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert epochs_saved(tmp_path / "broken" / runs.STATE) == 1
    again = run(sys.executable, "-m", "maskrcnn", "train", "--resume", "broken")
    assert again.returncode == 0, again.stderr
    one, other = weights(tmp_path / "whole"), weights(tmp_path / "broken")
    assert all(torch.equal(value, other[name]) for name, value in one.items())


UNEQUAL = {
    "repeat_threshold": 1.0,
    "aspect_ratio_groups": 4,
    "augment": AugmentConfig(transform="own_transforms:moved"),
    "loss": replace(
        SAMPLES,
        class_weights={"circle": 0.5, "rectangle": 2.0, "triangle": 1.0},
        classification_loss="focal",
        objectness_loss="focal",
    ),
}


@pytest.mark.parametrize(
    ("optimizer", "changes"),
    [("sgd", {}), ("adam", {}), ("adamw", {}), ("sgd", UNEQUAL)],
    ids=["sgd", "adam", "adamw", "unequal"],
)
def test_a_run_interrupted_inside_an_epoch_ends_in_the_same_weights(shapes, tmp_path, monkeypatch, optimizer, changes):
    monkeypatch.setattr(trainer_module, "SECONDS_BETWEEN_STATES", -1.0)  # after every step
    dataset = CocoDataset.load(shapes, "train")
    plan = config(shapes, epochs=2, optimizer=optimizer, learning_rate=0.001, ema_decay=0.9, accumulate=2, **changes)
    start_run(plan, tmp_path / "whole", dataset).fit(fixed_ap(0.1, 0.2))
    broken = start_run(plan, tmp_path / "broken", dataset)
    take, steps = broken.step.run, []

    def interrupted_step(parts):
        steps.append(1)
        if len(steps) == broken.sampler.steps + 3:  # the third of the second epoch
            raise Interruption
        return take(parts)

    broken.step.run = interrupted_step
    with pytest.raises(Interruption):
        broken.fit(fixed_ap(0.1, 0.2))
    resumed = Trainer(read_run(tmp_path / "broken"), tmp_path / "broken", dataset)
    resumed.load_state()
    assert (resumed.progress.epoch, resumed.progress.step) == (1, 2)
    resumed.fit(fixed_ap(0.2))
    one, other = weights(tmp_path / "whole"), weights(tmp_path / "broken")
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    logs = [(tmp_path / run / runs.LOG).read_text().splitlines()[-1] for run in ("whole", "broken")]
    losses = [{k: v for k, v in json.loads(line).items() if k != "images_per_s"} for line in logs]
    assert losses[0] == losses[1]
    assert resumed.sampler.steps > 3 or not changes  # images are repeated
    assert read_tensors(tmp_path / "broken" / runs.LAST)[1]["transform"] == plan.augment.transform


def poisoned(trainer):
    """The trainer with NaN images in its second step."""
    take, steps = trainer.step.run, []

    def run(parts):
        steps.append(1)
        if len(steps) == 2:
            parts[0].images[:] = math.nan
        return take(parts)

    trainer.step.run = run
    return trainer


def test_a_loss_that_is_not_finite_stops_and_names_the_images(shapes, tmp_path):
    trainer = start_run(config(shapes), tmp_path, CocoDataset.load(shapes, "train"))
    with pytest.raises(UserError, match=r"loss nan, .* at step 1, images \[\d+, \d+, \d+, \d+\]") as caught:
        poisoned(trainer).fit(fixed_ap(0.1))
    assert f"--resume {tmp_path}" in caught.value.fix
    assert not (tmp_path / runs.BEST).exists()


def test_a_step_that_is_not_finite_changes_nothing(shapes, tmp_path):
    for optimizer in ("sgd", "adam", "adamw"):
        plan = config(shapes, on_nonfinite="skip", optimizer=optimizer, epochs=1)
        trainer = start_run(plan, tmp_path / optimizer, CocoDataset.load(shapes, "train"))
        batch = next(
            iter(trainer_module.training_loader(trainer.samples, batch_size=4, workers=0, pin_memory=False)[0])
        )
        batch.images[:] = math.nan
        before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
        figures = trainer.step.run([batch])
        assert not figures["finite"]
        assert all(torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items())
        figures = poisoned(trainer).fit(fixed_ap(0.1))
        assert figures["nonfinite_steps"] == 1
        assert math.isfinite(figures["loss"])
        assert all(value.isfinite().all() for value in weights(tmp_path / optimizer).values())


def test_averaged_weights_are_evaluated_and_saved(shapes, tmp_path):
    trainer = start_run(config(shapes, epochs=1, ema_decay=0.5), tmp_path, CocoDataset.load(shapes, "train"))
    name = "rpn.head.cls_logits.weight"
    take, seen = trainer.step.run, [trainer.model.state_dict()[name].clone()]

    def run(parts):
        figures = take(parts)
        seen.append(trainer.model.state_dict()[name].clone())
        return figures

    trainer.step.run = run
    evaluated = []
    trainer.fit(lambda model: evaluated.append(model.state_dict()[name].clone()) or {"box_ap": 0.0, "mask_ap": 0.1})
    expected = seen[0]
    for step, value in enumerate(seen[1:]):
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * value
    torch.testing.assert_close(evaluated[0], expected)
    torch.testing.assert_close(weights(tmp_path, runs.BEST)[name], expected)
    assert not torch.allclose(expected, seen[-1])


def test_frozen_stages_and_frozen_batch_norm_stay(shapes, tmp_path):
    plan = config(shapes, epochs=1, trainable_stages=2)
    trainer = start_run(plan, tmp_path, CocoDataset.load(shapes, "train"))
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trainer.fit(fixed_ap(0.1))
    same = {name for name, value in trainer.model.state_dict().items() if torch.equal(value, before[name])}
    body = "backbone.body."
    frozen = {
        name for name in before if name.startswith((body + "conv1", body + "bn1", body + "layer1", body + "layer2"))
    }
    assert frozen <= same
    assert not any(name.startswith((body + "layer3.0.conv", body + "layer4.0.conv", "rpn.head.cls")) for name in same)


def test_accumulated_parts_give_the_mean_of_their_gradients(shapes, tmp_path):
    dataset = CocoDataset.load(shapes, "train")
    plan = config(shapes, model=tiny_config(frozen_batch_norm=True), clip_gradient_norm=0.0)
    trainer = start_run(plan, tmp_path, dataset)
    loader, _ = trainer_module.training_loader(trainer.samples, batch_size=4, workers=0, pin_memory=False, accumulate=2)
    parts = list(loader)[:2]

    def gradients(parts):
        trainer.step.optimizer.step = lambda: None  # the weights stay
        trainer.step.run(parts)
        return [p.grad.clone() for p in trainer.step.parameters]

    together, first, second = gradients(parts), gradients(parts[:1]), gradients(parts[1:])
    assert max(float(g.abs().max()) for g in together) > 0
    for both, one, other in zip(together, first, second, strict=True):
        torch.testing.assert_close(both, (one + other) / 2, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_trains_with_finite_losses(shapes, tmp_path, precision):
    trainer = start_run(config(shapes, epochs=2, precision=precision), tmp_path, CocoDataset.load(shapes, "train"))
    figures = trainer.fit(fixed_ap(0.1, 0.2))
    assert math.isfinite(figures["loss"])
    assert all(value.isfinite().all() for value in weights(tmp_path).values())
    assert trainer.step.scaler.is_enabled() == (precision == "fp16")


@pytest.mark.parametrize(
    ("changes", "advice", "not_advised"),
    [
        ({"batch_size": 4, "accumulate": 2}, ["--accumulate 4", "bf16", "--max-size below 160"], []),
        ({"batch_size": 1, "precision": "bf16"}, ["--max-size below 160"], ["--accumulate", "bf16"]),
    ],
)
def test_an_out_of_memory_error_names_what_would_help(shapes, tmp_path, changes, advice, not_advised):
    trainer = start_run(config(shapes, **changes), tmp_path, CocoDataset.load(shapes, "train"))

    def run(parts):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.")

    trainer.step.run = run
    with pytest.raises(UserError, match=r"out of memory with images of [12]×3×96×96") as caught:
        trainer.fit(fixed_ap(0.1))
    assert f"--resume {tmp_path}" in caught.value.fix
    assert [text for text in advice if text not in caught.value.fix] == []
    assert [text for text in not_advised if text in caught.value.fix] == []


def test_running_out_of_memory_in_the_validation_is_explained(shapes, tmp_path):
    def evaluate(model):
        raise MemoryError

    trainer = start_run(config(shapes, epochs=1), tmp_path, CocoDataset.load(shapes, "train"))
    with pytest.raises(UserError, match=r"out of memory with validation batches of 4 image\(s\)"):
        trainer.fit(evaluate)


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no such signal")
def test_a_killed_worker_ends_the_run_with_an_explanation(shapes, tmp_path, monkeypatch):
    trainer = start_run(config(shapes, workers=2), tmp_path, CocoDataset.load(shapes, "train"))
    monkeypatch.setattr(TrainingSamples, "__getitem__", lambda samples, key: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(UserError, match="a data loading process that ended unexpectedly") as caught:
        trainer.fit(fixed_ap(0.1))
    assert caught.value.fix.endswith(f"--resume {tmp_path} --workers 1")


def test_a_small_shared_memory_is_said_once(shapes, tmp_path, monkeypatch):
    def fail(tensor):
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)")

    monkeypatch.setattr(torch.Tensor, "share_memory_", fail)
    trainer = start_run(config(shapes, epochs=2, workers=1), tmp_path, CocoDataset.load(shapes, "train"))
    display = Mock()
    trainer.fit(fixed_ap(0.1, 0.2), display=display)
    (message,) = (call.args[0] for call in display.message.call_args_list)
    assert "does not fit into" in message and "--shm-size" in message


def test_a_run_keeps_scalars_and_pictures(shapes, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    plan = config(shapes, epochs=1, tensorboard=True, pictures=2)
    trainer = start_run(plan, tmp_path, CocoDataset.load(shapes, "train"))
    picture = np.zeros((8, 9, 3), np.uint8)
    trainer.fit(fixed_ap(0.1), draw=lambda model: [("prediction-0", picture)])
    found = sorted(path.name for path in (tmp_path / runs.PICTURES).iterdir())
    assert found == ["prediction-0.png", "sample-0.png", "sample-1.png"]
    events = EventAccumulator(str(tmp_path / runs.EVENTS)).Reload()
    assert len(events.Scalars("train/loss")) == 3
    assert {"train/gradient_norm", "train/learning_rate", "epoch/mask_ap"} <= set(events.Tags()["scalars"])
    assert {"sample-0", "prediction-0"} <= set(events.Tags()["images"])


def test_a_run_without_state_cannot_be_resumed(tmp_path):
    with pytest.raises(UserError, match=r"without config\.json"):
        read_run(tmp_path)


@pytest.mark.parametrize(
    ("changes", "steps", "expected"),
    [
        (
            {"epochs": 10, "warmup_steps": 10},
            (0, 4, 9, 10, 55, 99),
            [0.1, 0.5, 1.0, 1.0, 0.5, 0.5 * (1 + math.cos(math.pi * 89 / 90))],
        ),
        ({"epochs": 10, "learning_rate": 2.0, "warmup_steps": 0, "cosine_end": 0.1}, (0, 50, 100), [2.0, 1.1, 0.2]),
        (
            {"epochs": 12, "warmup_steps": 0, "schedule": "step", "step_epochs": (8, 11)},
            (0, 79, 80, 109, 110),
            [1, 1, 0.1, 0.1, 0.01],
        ),
        (
            {"epochs": 12, "warmup_steps": 2, "schedule": "constant", "step_epochs": (8,)},
            (0, 2, 79, 80, 119),
            [0.5, 1, 1, 1, 1],
        ),
    ],
    ids=["cosine", "cosine_end", "step", "constant"],
)
def test_learning_rate_schedules_by_hand(shapes, changes, steps, expected):
    plan = config(shapes, **{"learning_rate": 1.0, **changes})
    assert [learning_rate(plan, step, 10) for step in steps] == pytest.approx(expected)


def test_warmup_takes_at_most_half_the_run(shapes):
    plan = config(shapes, epochs=2, learning_rate=1.0, warmup_steps=1000)
    assert max(learning_rate(plan, step, 10) for step in range(20)) == 1.0
    with pytest.raises(UserError, match="schedule 'zigzag'"):
        replace(plan, schedule="zigzag")


def test_weight_decay_of_adam_and_adamw(shapes):
    steps = {}
    for optimizer in ("adam", "adamw"):
        layer = torch.nn.Linear(2, 1, bias=False)
        torch.nn.init.constant_(layer.weight, 1.0)
        plan = config(shapes, optimizer=optimizer, learning_rate=0.1, weight_decay=0.5)
        layer.weight.grad = torch.tensor([[1.0, 0.0]])
        make_optimizer(layer, plan).step()
        steps[optimizer] = (1 - layer.weight.detach()).flatten().tolist()
    # Adam's first step is the sign of gradient and decay; AdamW's is the gradient's sign and 0.1 · 0.5 of the weight.
    assert steps["adam"] == pytest.approx([0.1, 0.1], abs=1e-6)
    assert steps["adamw"] == pytest.approx([0.15, 0.05], abs=1e-6)


def test_schedule_settings_without_effect_are_reported(shapes):
    plan = config(shapes, epochs=12, schedule="step", step_epochs=(8, 11))
    assert without_effect(plan) == []
    (line,) = without_effect(replace(plan, epochs=11))
    assert line == "the learning rate will not decay after epoch 11: the run ends after epoch 11"
    (line,) = without_effect(replace(plan, epochs=1))
    assert "after epoch 8, 11:" in line
    for schedule in ("cosine", "constant"):
        assert without_effect(replace(plan, schedule=schedule)) == [
            f"schedule {schedule}: step_epochs 8, 11 change nothing"
        ]
        assert without_effect(replace(plan, schedule=schedule, step_epochs=())) == []


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


def test_workers_take_the_other_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(12)), raising=False)
    assert [choose_workers(n) for n in (-1, 0, 3)] == [8, 0, 3]
    assert [choose_workers(-1, processes) for processes in (2, 4, 12)] == [5, 2, 1]


def test_synchronised_batch_norm_needs_gpus(shapes, tmp_path):
    with pytest.raises(UserError, match="--batch-norm sync on cpu"):
        Trainer(config(shapes, batch_norm="sync"), tmp_path, CocoDataset.load(shapes, "train"))

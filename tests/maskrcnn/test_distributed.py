"""Two processes on one machine train as one does."""

import json
import subprocess
import sys

import pytest
import torch

from maskrcnn import runs
from maskrcnn.errors import UserError
from maskrcnn.training.distributed import joined
from maskrcnn.weights.checkpoint import read_tensors

# One optimizer step on a batch of four, whose gradients the first process writes down.
ONE_STEP = """
import sys
from pathlib import Path
import torch
from tiny import lively_model, tiny_config
from maskrcnn.weights.checkpoint import write_tensors
from maskrcnn.config import LossConfig, TrainConfig
from maskrcnn.errors import UserError
from maskrcnn.data.coco import CocoDataset
from maskrcnn.training.loader import training_loader
from maskrcnn.training.distributed import joined
from maskrcnn.training.trainer import Trainer

torch.set_num_threads(1)
data, output = sys.argv[1:]

def one_step(processes):
    config = TrainConfig(
        model=tiny_config(frozen_batch_norm=True),
        loss=LossConfig(rpn_samples=32, box_samples=16),
        batch_size=4, precision="fp32", clip_gradient_norm=0.0, device="cpu", workers=0,
    )
    trainer = Trainer(config, Path(output).parent / "run", CocoDataset.load(data, "train"), processes)
    trainer.load_weights(lively_model(tiny_config()).state_dict(), "a lively model")
    loader, _ = training_loader(
        trainer.samples, batch_size=4, workers=0, pin_memory=False,
        rank=processes.rank, world_size=processes.world_size,
    )
    batch = next(iter(loader))
    assert len(batch.image_ids) == 4 // processes.world_size
    figures = trainer.step.run([batch])
    images = sorted(i for part in processes.gather(batch.image_ids) for i in part)
    losses = processes.gather({name: float(value) for name, value in figures.items()})
    gradients = {str(n): p.grad.clone() for n, p in enumerate(trainer.step.parameters)}
    # An infinite loss in the last process alone, whose gradient is finite.
    trainer.begin()
    plain, infinite = trainer.model.losses, processes.rank == processes.world_size - 1
    trainer.model.losses = lambda *a: {k: v + (float("inf") if infinite else 0.0) for k, v in plain(*a).items()}
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    try:
        trainer.fit(None)
        message = "no error"
    except UserError as error:
        message = error.found
    same = all(torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items())
    told = processes.gather((message, same, sorted(batch.image_ids)))
    if processes.is_first:
        write_tensors(Path(output), gradients, {"images": images, "losses": losses, "told": told})

with joined("cpu") as processes:
    one_step(processes)
"""


def python(*arguments, cwd, processes=1):
    """Runs a program, alone or under torchrun."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [sys.executable, *(torchrun if processes > 1 else []), *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


@pytest.fixture
def support(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(next(path for path in sys.path if path.endswith("support"))))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.mark.slow
def test_gradients_of_two_processes_equal_those_of_one(shapes, tmp_path, support):
    program = tmp_path / "one_step.py"
    program.write_text(ONE_STEP)
    for processes in (1, 2):
        python(program, shapes, tmp_path / f"{processes}.safetensors", cwd=tmp_path, processes=processes)
    (alone, told), (both, told_both) = (read_tensors(tmp_path / f"{n}.safetensors") for n in (1, 2))
    assert told["images"] == told_both["images"]
    for name in ("loss", "objectness", "classification", "mask", "gradient_norm"):
        for losses in told_both["losses"]:
            assert losses[name] == pytest.approx(told["losses"][0][name], rel=1e-4), "the mean, in every process"
    images = told_both["told"][1][2]  # of the second process
    for message, same, _ in told_both["told"]:
        assert same and message.startswith("loss inf, gradient norm nan at step 0, images [")
        assert sorted(json.loads(message.partition("images ")[2])) == images
    assert max(float(g.abs().max()) for g in alone.values()) > 1e-3
    for name, gradient in alone.items():
        scale = float(gradient.abs().max()) + 1e-6
        torch.testing.assert_close(both[name], gradient, rtol=1e-3, atol=1e-4 * scale)


def test_two_processes_train_evaluate_and_are_continued_by_one(run, shapes, tmp_path, support):
    options = ["-m", "maskrcnn", "train", "--data", shapes, "--epochs", 1, "--min-size", 64, "--precision", "fp32"]
    options += ["--workers", 0, "--pictures", 1, "--device", "cpu"]
    options += ["--validation-loss", "--set", "log_every=1"]
    done = python(*options, "--output", "run", cwd=tmp_path, processes=2)
    assert done.stdout.count("2 processes") == 1, "only the first process speaks"
    figures = [json.loads(line) for line in (tmp_path / "run" / runs.LOG).read_text().splitlines()]
    assert [each.get("step", "epoch") for each in figures] == [0, 1, 2, "epoch"]
    # Of three batches of 4.
    assert figures[3]["loss"] == pytest.approx(sum(each["loss"] for each in figures[:3]) / 3)
    figures = figures[3:]
    assert figures[0]["validation_loss"] == pytest.approx(
        sum(value for name, value in figures[0].items() if name.startswith("validation_loss/"))
    )
    code, _, err = run("evaluate", f"run/{runs.LAST}", "--data", shapes, "--json", "alone.json")
    assert code == 0, err
    alone = json.loads((tmp_path / "alone.json").read_text())
    # Every image counted once: the same AP as one process finds, up to float sums in another order.
    assert figures[0]["mask_ap"] == pytest.approx(alone["mask"]["AP"], abs=1e-3)
    assert figures[0]["box_ap"] == pytest.approx(alone["box"]["AP"], abs=1e-3)
    code, out, err = run("train", "--resume", "run", "--epochs", 2)
    assert code == 0 and "epochs: 2 instead of 1" in out, err
    assert json.loads((tmp_path / "run" / runs.CONFIG).read_text())["epochs"] == 2, "the next --resume does the same"
    assert read_tensors(tmp_path / "run" / runs.STATE)[1]["progress"]["epoch"] == 2


def test_half_an_environment_is_named(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError, match=r"WORLD_SIZE=2 .* without RANK, LOCAL_RANK"), joined("cpu"):
        pass


@pytest.mark.parametrize("value", ["x", "0", "-1", ""])
def test_a_number_of_processes_that_is_none_is_named(monkeypatch, value):
    monkeypatch.setenv("WORLD_SIZE", value)
    with (
        pytest.raises(UserError, match=f"WORLD_SIZE={value} in the environment\n  expected: a whole number"),
        joined("cpu"),
    ):
        pass


def test_one_process_has_nothing_to_share():
    with joined("cpu") as processes:
        assert (processes.rank, processes.world_size) == (0, 1)
        assert processes.gather("x") == ["x"]
        assert float(processes.mean(torch.tensor(3.0))) == 3.0

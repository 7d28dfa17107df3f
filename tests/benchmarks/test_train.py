"""The training benchmark on a tiny model."""

import json
import sys
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
import train
import trainers
from resources import call_in_new_process
from train import pipeline_images_per_s, stages_ms, synchronisations
from trainers import SPLIT, generated_dataset, make_work

from maskrcnn.config import LossConfig, TrainConfig, to_dict
from maskrcnn.data.coco import CocoDataset
from maskrcnn.errors import UserError

TINY = {
    "model.fpn_channels": 16,
    "model.box_head_channels": 32,
    "model.mask_head_channels": "[16]",
    "model.rpn_candidates_per_level_training": 40,
    "model.proposals_training": 30,
    "loss.rpn_samples": 256,
    "loss.box_samples": 128,
}
ARGUMENTS = ["--model", "maskrcnn_resnet18_fpn_small", "--size", "64x96", "--steps", "2", "--warmup", "1"]
ARGUMENTS += [word for name, value in TINY.items() for word in ("--set", f"{name}={value}")]


@pytest.fixture
def config(tmp_path) -> TrainConfig:
    """A tiny model on two generated images."""
    folder = tmp_path / "made"
    given = train.parse([*ARGUMENTS, "--device", "cpu", "--workers", "0"])
    return train.configuration(given, "maskrcnn_resnet18_fpn_small", 2, folder)


@pytest.fixture
def weights(config, tmp_path):
    path = tmp_path / "weights.safetensors"
    trainers.write_weights(config, make_work(config, 1, pinned=False)[0], torch.device("cpu"), path)
    return path


def test_report_of_both_trainers(tmp_path, capsys):
    path = tmp_path / "results.json"
    arguments = ["--precision", "fp32,bf16", "--device", "cpu", "--no-memory", "--markdown", "--json", str(path)]
    (report,) = train.main([*ARGUMENTS, *arguments])
    assert [(row.trainer, row.precision, row.status) for row in report.rows] == [
        ("maskrcnn", "fp32", "ok"),
        ("torchvision", "fp32", "ok"),
        ("maskrcnn", "bf16", "ok"),
        ("torchvision", "bf16", "ok"),
    ]
    for row in report.rows:
        assert row.steps == 2 and 0 < row.p50_s <= row.p90_s
        assert row.images_per_s == pytest.approx(2 / row.p50_s)
        assert row.times_torchvision_p10 <= row.times_torchvision <= row.times_torchvision_p90
        assert row.synchronisations is None  # a GPU's
        if row.trainer == "torchvision":
            assert row.times_torchvision == 1
    assert report.size_hw == (64, 96) and report.batch == 2 and 4 < report.objects_per_image < 24
    assert set(report.losses["maskrcnn"]) == {"objectness", "rpn_box", "classification", "box", "mask", "sum"}
    assert report.losses["maskrcnn"].keys() == report.losses["torchvision"].keys()
    assert list(report.stages_ms["fp32"]) == [
        "transfer and layout",
        "backbone and FPN",
        "RPN losses",
        "RPN head",
        "proposals",
        "RoI heads and losses",
        "backward and clipping",
        "optimizer",
        "averages and statistics",
    ]
    assert report.pipeline_images_per_s > 0
    content = json.loads(path.read_text())
    assert content["environment"]["versions"]["torch"] and len(content["reports"][0]["rows"]) == 4
    page = capsys.readouterr().out
    assert page.count("| ok ") == 4 and "Machine:" in page and "Loss of the first batch" in page


def test_measuring_stages_leaves_the_step_unchanged(config, weights):
    ours = trainers.OurTrainer(config, weights, torch.device("cpu"), "fp32")
    work = make_work(config, 1, pinned=False)[0]
    stages_ms(ours, work, 1)
    assert "features" not in vars(ours.model) and "forward" not in vars(ours.model.rpn)
    assert train.detector.rpn_losses.__module__ == "maskrcnn.model.losses"


def test_losses_that_differ_are_not_timed(monkeypatch):
    right = trainers.OurTrainer.losses
    monkeypatch.setattr(
        trainers.OurTrainer, "losses", lambda self, work: {k: 1.3 * v for k, v in right(self, work).items()}
    )
    (report,) = train.main([*ARGUMENTS, "--precision", "fp32", "--device", "cpu", "--no-memory"])
    assert [row.status for row in report.rows] == ["not run"] * 2
    assert all("differ by more than 20%: objectness" in row.reason and row.p50_s is None for row in report.rows)


def test_a_failing_trainer_has_a_row_with_the_reason(monkeypatch):
    def fail(self, work):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(trainers.TorchvisionTrainer, "run", fail)
    (report,) = train.main([*ARGUMENTS, "--precision", "fp32", "--device", "cpu", "--no-memory"])
    ours, theirs = report.rows
    assert ours.status == "ok" and ours.times_torchvision is None and ours.p50_s > 0
    assert theirs.status == "not run" and "no such kernel" in theirs.reason


def test_a_step_that_is_not_finite_is_not_reported(monkeypatch):
    monkeypatch.setattr(trainers.TorchvisionTrainer, "check", trainers.OurTrainer.check)
    monkeypatch.setattr(
        trainers.TorchvisionTrainer,
        "metrics",
        {"finite": torch.tensor(False), "loss": torch.tensor(float("nan"))},
        raising=False,
    )
    (report,) = train.main([*ARGUMENTS, "--precision", "fp32", "--device", "cpu", "--no-memory"])
    assert report.rows[1].status == "not run" and "loss nan" in report.rows[1].reason


def test_both_trainers_learn_from_the_same_weights(config, weights):
    config = replace(config, learning_rate=0.005, model=replace(config.model, frozen_batch_norm=True))
    work = make_work(config, 1, pinned=False)[0]
    first, second = (
        make(config, weights, torch.device("cpu"), "fp32")
        for make in (trainers.OurTrainer, trainers.TorchvisionTrainer)
    )
    theirs = second.model.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in first.model.state_dict().items())
    before = trainers.compared_losses(first, second, work)
    for trainer in (first, second):
        for _ in range(8):
            trainer.run(work)
        assert sum(trainer.losses(work).values()) < 0.9 * before["maskrcnn"]["sum"]


def test_settings_reach_torchvision(config, weights):
    model = trainers.TorchvisionTrainer(config, weights, torch.device("cpu"), "fp32").model
    assert config.loss == LossConfig(rpn_samples=256, box_samples=128)
    assert model.rpn.fg_bg_sampler.batch_size_per_image == 256
    assert model.roi_heads.fg_bg_sampler.batch_size_per_image == 128
    assert (model.rpn.pre_nms_top_n(), model.rpn.post_nms_top_n()) == (40, 30)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux reports peak memory")
def test_peak_memory_is_measured_in_a_new_process(config, weights):
    parameters = sum(
        p.numel() for p in trainers.OurTrainer(config, weights, torch.device("cpu"), "fp32").step.parameters
    )
    task = {"config": to_dict(config), "weights": str(weights), "trainer": "maskrcnn", "precision": "fp32", "steps": 2}
    found = call_in_new_process("trainers:peak_memory_mb", task)
    assert found > 3 * 4 * parameters / 1e6  # weights, gradients and momentum at least


def test_synchronisations_are_counted_among_other_warnings(monkeypatch):
    modes = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)

    def run():
        for text in ("called a synchronizing CUDA operation", "something old", "called a synchronizing CUDA operation"):
            warnings.warn(text, stacklevel=1)

    assert synchronisations(run, torch.device("cuda")) == 2
    assert modes == ["warn", "default"]
    assert synchronisations(run, torch.device("cpu")) is None


def test_generated_images_have_about_a_dozen_objects(tmp_path):
    dataset = CocoDataset.load(generated_dataset(tmp_path / "data", 6, (96, 128), classes=5), SPLIT)
    assert dataset.skipped == {} and len(dataset.class_names) == 5
    assert 8 < np.mean([len(record.instances) for record in dataset.images]) < 16
    assert {(record.height, record.width) for record in dataset.images} == {(96, 128)}


def test_both_forms_of_a_batch_are_equal(config):
    work = make_work(config, 3, pinned=False)
    assert len(work) == 3
    for one in work:
        for n, target in enumerate(one.targets):
            assert torch.equal((one.images[n] * 255).round(), one.batch.images[n].float())
            assert len(target["boxes"]) == len(target["masks"]) == int(one.batch.valid[n].sum())
            for box, mask in zip(target["boxes"], target["masks"], strict=True):
                rows, columns = torch.nonzero(mask, as_tuple=True)
                extent = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
                assert torch.allclose(torch.stack(extent).float(), box)


def test_the_rate_of_the_loader_counts_images(config):
    assert pipeline_images_per_s(config, seconds=0.2) > 1


def test_unknown_precision_and_missing_data():
    with pytest.raises(SystemExit):
        train.parse(["--precision", "fp8"])
    with pytest.raises(UserError, match="nowhere"):
        train.main(["--data", "nowhere", "--steps", "1"])

"""A training step on a GPU: the CPU's losses; on NVIDIA's no waiting, and the same as a CUDA graph."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny import lively_model, tiny_config

from maskrcnn.config import LossConfig, TrainConfig
from maskrcnn.data.coco import CocoDataset
from maskrcnn.runtime.backends.torch import TorchBackend
from maskrcnn.training.loader import training_loader
from maskrcnn.training.trainer import Trainer

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
needs_apple = pytest.mark.skipif(not torch.backends.mps.is_available(), reason="no Apple GPU")
each_gpu = pytest.mark.parametrize(
    "device", [pytest.param("cuda", marks=needs_cuda), pytest.param("mps", marks=needs_apple)]
)


def trainer_and_batch(shapes, folder, **changes):
    config = TrainConfig(
        model=tiny_config(frozen_batch_norm=True),
        loss=LossConfig(rpn_samples=32, box_samples=16),
        batch_size=4,
        workers=0,
        **{"precision": "fp32", **changes},
    )
    trainer = Trainer(config, folder / "run", CocoDataset.load(shapes, "train"))
    trainer.load_weights(lively_model(tiny_config()).state_dict(), "a lively model")
    loader, _ = training_loader(trainer.samples, batch_size=4, workers=0, pin_memory=torch.cuda.is_available())
    return trainer, next(iter(loader))


@each_gpu
def test_gpu_losses_and_gradients_equal_the_cpus(shapes, tmp_path, monkeypatch, device):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    found = []
    for each in ("cpu", device):
        trainer, batch = trainer_and_batch(shapes, tmp_path, device=each, learning_rate=0.0)
        figures = trainer.step.run([batch])
        assert figures["finite"]
        found.append([{k: float(v) for k, v in figures.items()}, [p.grad.cpu() for p in trainer.step.parameters]])
    (figures, gradients), (figures_gpu, gradients_gpu) = found
    assert figures_gpu == pytest.approx(figures, rel=1e-3)
    for a, b in zip(gradients, gradients_gpu, strict=True):
        assert (a - b).norm() <= 2e-2 * a.norm() + 1e-5


@each_gpu
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_step_that_is_not_finite_changes_nothing(shapes, tmp_path, device, optimizer):
    trainer, batch = trainer_and_batch(shapes, tmp_path, device=device, optimizer=optimizer)
    before = [parameter.detach().clone() for parameter in trainer.step.parameters]
    assert not trainer.step.run([replace(batch, images=batch.images * torch.nan)])["finite"]
    assert all(map(torch.equal, before, trainer.step.parameters))
    assert trainer.step.run([batch])["finite"]
    assert not all(map(torch.equal, before, trainer.step.parameters))


@each_gpu
def test_a_gpu_detects_what_the_cpu_does(device):
    rng, model = np.random.default_rng(0), lively_model(tiny_config())
    images = [rng.integers(0, 255, (*size_hw, 3), dtype=np.uint8) for size_hw in ((60, 90), (80, 70))]
    expected, found = (
        TorchBackend(copy.deepcopy(model), device=each).run_images(images)[0] for each in ("cpu", device)
    )
    assert expected["num_detections"].sum() and (found["num_detections"] == expected["num_detections"]).all()
    np.testing.assert_allclose(found["boxes"], expected["boxes"], atol=0.1)
    np.testing.assert_allclose(found["scores"], expected["scores"], atol=1e-3)


@needs_cuda
@pytest.mark.parametrize("changes", [{}, {"optimizer": "adamw", "ema_decay": 0.9}, {"precision": "bf16"}])
def test_a_gpu_step_never_waits(shapes, tmp_path, changes):
    trainer, batch = trainer_and_batch(shapes, tmp_path, device="cuda", **changes)
    for _ in range(3):  # kernels are compiled and memory is reserved
        trainer.step.run([batch])
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            figures = trainer.step.run([batch])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert bool(figures["finite"])


@needs_cuda
@pytest.mark.parametrize("changes", [{}, {"optimizer": "adamw", "ema_decay": 0.9}, {"precision": "bf16"}])
def test_gpu_steps_as_graphs_equal_other_steps(shapes, tmp_path, changes, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    found = []
    for cuda_graphs in (False, True):
        trainer, batch = trainer_and_batch(shapes, tmp_path, device="cuda", cuda_graphs=cuda_graphs, **changes)
        losses = []
        for number in range(8):
            for group in trainer.optimizer.param_groups:
                group["lr"] = 1e-3 / (1 + number)
            losses.append(float(trainer.step.run([batch])["loss"]))
        found.append((losses, [parameter.detach().clone() for parameter in trainer.step.parameters]))
    assert trainer.step.graphs.captured == 1
    (losses, weights), (graphed, graphed_weights) = found
    # RoIAlign's gradient is a sum in no fixed order.
    assert graphed == pytest.approx(losses, rel=5e-2 if changes.get("precision") == "bf16" else 5e-3)
    for one, other in zip(weights, graphed_weights, strict=True):
        assert (one - other).norm() <= 1e-2 * one.norm() + 1e-4

"""Two steps of training for every backbone, neck and pooling method: each pair of them is in some run."""

import itertools

import pytest
import torch
from tiny import tiny_config

from maskrcnn import runs
from maskrcnn.checkpoint import load_checkpoint
from maskrcnn.config import NECKS, OTHER_BACKBONES, POOL_METHODS, LossConfig, TrainConfig
from maskrcnn.data.coco import CocoDataset
from maskrcnn.runtime.detector import Detector
from maskrcnn.runtime.torch_backend import TorchBackend
from maskrcnn.training.trainer import Trainer

BACKBONES = ("resnet18", *OTHER_BACKBONES)
# A Latin square: with backbone b and neck n goes the method b + n.
RUNS = [
    (backbone, neck, POOL_METHODS[(b + n) % len(POOL_METHODS)])
    for (b, backbone), (n, neck) in itertools.product(enumerate(BACKBONES), enumerate(NECKS))
]


def test_the_runs_have_every_pair():
    for first, second in itertools.combinations(range(3), 2):
        choices = (BACKBONES, NECKS, POOL_METHODS)
        wanted = set(itertools.product(choices[first], choices[second]))
        assert {(run[first], run[second]) for run in RUNS} == wanted


@pytest.mark.parametrize(("backbone", "neck", "method"), RUNS)
def test_two_steps_change_every_part_and_evaluate(backbone, neck, method, shapes, tmp_path):
    model = tiny_config(backbone=backbone, neck=neck, bifpn_repeats=1, pool_method=method, proposals_training=20)
    config = TrainConfig(
        model=model,
        loss=LossConfig(rpn_samples=32, box_samples=16),
        data=str(shapes),
        epochs=1,
        batch_size=6,
        learning_rate=0.01,
        warmup_steps=0,
        precision="fp32",
        workers=0,
        device="cpu",
        tensorboard=False,
        pictures=0,
    )
    trainer = Trainer(config, tmp_path, CocoDataset.load(shapes, "train"))
    trainer.begin()
    before = {name: value.clone() for name, value in trainer.model.named_parameters()}
    figures = trainer.fit(lambda model: {"box_ap": 0.0, "mask_ap": 0.1})
    assert trainer.steps_per_epoch == 2 and 0 < figures["loss"] < 100
    parts = {".".join(name.split(".")[:3]) for name in before}
    changed = {
        ".".join(name.split(".")[:3])
        for name, value in trainer.model.named_parameters()
        if value.isfinite().all() and not torch.equal(value, before[name])
    }
    assert parts == changed
    detector = Detector(TorchBackend(load_checkpoint(tmp_path / runs.BEST), device="cpu"))
    image = torch.zeros(90, 120, 3, dtype=torch.uint8).numpy()
    assert len(detector.detect([image, image[:50]])) == 2

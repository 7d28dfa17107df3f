"""Two steps of training for every backbone, neck and pooling method: each pair of them is in some run."""

import itertools

import numpy as np
import pytest
import torch
from tiny import tiny_config

from maskrcnn.config import NECKS, POOL_METHODS, LossConfig, TrainConfig
from maskrcnn.data.coco import CocoDataset
from maskrcnn.model.detector import MaskRCNN
from maskrcnn.runtime.backends.torch import TorchBackend
from maskrcnn.runtime.detector import Detector
from maskrcnn.training.loader import training_loader
from maskrcnn.training.trainer import Trainer
from maskrcnn.weights.checkpoint import load_checkpoint, save_checkpoint

BACKBONES = ("resnet18", "vgg16", "mobilenet_v3_large", "convnext_tiny")
# A Latin square: with backbone b and neck n goes the method b + n.
RUNS = [
    (backbone, neck, POOL_METHODS[(b + n) % len(POOL_METHODS)])
    for (b, backbone), (n, neck) in itertools.product(enumerate(BACKBONES), enumerate(NECKS))
]


@pytest.mark.parametrize(("backbone", "neck", "method"), RUNS)
def test_two_steps_change_every_part_and_the_model_still_detects(backbone, neck, method, shapes, tmp_path):
    config = TrainConfig(
        model=tiny_config(backbone=backbone, neck=neck, bifpn_repeats=1, pool_method=method),
        loss=LossConfig(rpn_samples=32, box_samples=16),
        learning_rate=0.01,
        warmup_steps=0,
        precision="fp32",
        device="cpu",
    )
    trainer = Trainer(config, tmp_path, CocoDataset.load(shapes, "train"))
    before = {name: value.clone() for name, value in trainer.model.named_parameters()}
    loader, _ = training_loader(trainer.samples, batch_size=2, workers=0, pin_memory=False)
    for batch in itertools.islice(loader, 2):
        figures = trainer.step.run([batch])
        assert figures["finite"] == 1 and 0 < figures["loss"] < 100
    changed = {name for name, value in trainer.model.named_parameters() if not torch.equal(value, before[name])}
    assert {part_of(name) for name in changed} == {part_of(name) for name in before}
    images = [np.zeros((90, 120, 3), np.uint8), np.full((64, 96, 3), 200, np.uint8)]
    assert len(Detector(TorchBackend(trainer.model.eval(), device="cpu")).detect(images)) == 2


def part_of(parameter: str) -> str:
    """The layer of a backbone or block of a neck that it belongs to, and likewise elsewhere."""
    return ".".join(parameter.split(".")[:3])


def test_a_checkpoint_brings_back_the_whole_choice(tmp_path):
    choice = {"backbone": "mobilenet_v3_large", "neck": "bifpn", "bifpn_repeats": 2, "pool_method": "crop"}
    model = MaskRCNN(tiny_config(**choice))
    save_checkpoint(tmp_path / "m.safetensors", model)
    loaded = load_checkpoint(tmp_path / "m.safetensors")
    assert loaded.config == model.config and loaded.config.pool_method == "crop"
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name

"""Training of keypoints: settings, losses and the road from drawn poses to an evaluated model."""

import json
from dataclasses import replace
from functools import partial

import pytest
import torch
from tiny import TINY_POSE, lively_model, tiny_config

from maskrcnn import runs
from maskrcnn.api import train
from maskrcnn.config import LossConfig, TrainConfig
from maskrcnn.data.coco import CocoDataset
from maskrcnn.data.poses import JOINTS, SKELETON, generate_poses
from maskrcnn.errors import UserError
from maskrcnn.keypoints import USUAL_SIGMA
from maskrcnn.training.loader import collate
from maskrcnn.training.recipe import training_config
from maskrcnn.training.samples import TrainingSamples
from maskrcnn.training.trainer import Trainer, score_of
from maskrcnn.weights.checkpoint import load_checkpoint

pytestmark = pytest.mark.usefixtures("narrow_resnet")


@pytest.fixture(scope="module")
def dataset(stick_figures) -> CocoDataset:
    return CocoDataset.load(stick_figures, "train")


# --- settings ----------------------------------------------------------------------------------------


def test_data_with_keypoints_make_a_model_of_masks_and_keypoints(dataset):
    model = training_config(dataset, dataset).model
    assert (model.name, model.has_masks, model.has_keypoints) == ("maskrcnn_resnet18_fpn_small", True, True)
    assert (model.keypoint_names, model.keypoint_skeleton) == (JOINTS, SKELETON)
    assert model.keypoint_sigmas == (USUAL_SIGMA,) * len(JOINTS)


@pytest.mark.parametrize(
    ("asked", "masks", "keypoints"),
    [
        ({"has_keypoints": False}, True, False),
        ({"name": "maskrcnn_resnet18_fpn"}, True, False),
        ({"name": "maskrcnn_resnet18_fpn", "has_keypoints": True}, True, True),
        ({"name": "fasterrcnn_resnet18_fpn", "has_keypoints": True}, False, True),
        ("keypointrcnn_resnet18_fpn", False, True),
    ],
)
def test_a_model_has_the_heads_that_were_asked_for(dataset, asked, masks, keypoints):
    model = training_config(dataset, dataset, {"model": asked}).model
    assert (model.has_masks, model.has_keypoints) == (masks, keypoints)
    assert model.keypoint_names == (JOINTS if keypoints else ())


def test_keypoints_that_the_data_do_not_have_are_refused(dataset, shapes):
    without = CocoDataset.load(shapes, "train")
    assert not training_config(without, without).model.has_keypoints
    with pytest.raises(UserError, match=r"learns keypoints, but .*instances_train.json has none"):
        training_config(without, without, {"model": "keypointrcnn_resnet18_fpn"})
    other = replace(dataset, keypoint_names=JOINTS[::-1])
    with pytest.raises(UserError, match="a model with the keypoints head, neck"):
        training_config(dataset, other)


# --- losses ------------------------------------------------------------------------------------------


def one_batch(dataset):
    config = tiny_config(**POSES)
    samples = TrainingSamples(dataset, config.preprocessing, seed=0)
    return collate([samples[0, index] for index in range(4)], config.preprocessing.divisor)


POSES = {
    **TINY_POSE,
    "class_names": ("figure",),
    "category_ids": (1,),
    "keypoint_names": JOINTS,
    "keypoint_skeleton": SKELETON,
    "keypoint_sigmas": (),
}


def keypoint_loss(model, batch, **changes) -> torch.Tensor:
    truth = {**batch.truth(), **changes}
    return model.losses(batch.images, batch.image_sizes, truth, LossConfig(rpn_samples=64, box_samples=32))["keypoint"]


def test_without_labelled_keypoints_there_is_nothing_to_learn(dataset):
    model, batch = lively_model(tiny_config(**POSES)).eval(), one_batch(dataset)
    assert float(keypoint_loss(model, batch).detach()) > 1
    loss = keypoint_loss(model, batch, keypoints=torch.zeros_like(batch.keypoints))
    loss.backward()
    assert float(loss.detach()) == 0
    assert all(float(p.grad.abs().sum()) == 0 for p in model.roi_heads.keypoint_head.parameters())


def test_hidden_keypoints_count_as_visible_ones(dataset):
    model, batch = lively_model(tiny_config(**POSES)).eval(), one_batch(dataset)
    hidden = batch.keypoints.clone()
    hidden[..., 2] = hidden[..., 2].clamp(max=1)
    assert not torch.equal(hidden, batch.keypoints)
    assert torch.equal(keypoint_loss(model, batch, keypoints=hidden), keypoint_loss(model, batch))


def test_the_mean_is_taken_over_all_processes(dataset):
    model, batch = lively_model(tiny_config(**POSES)).eval(), one_batch(dataset)
    loss, seen = LossConfig(rpn_samples=64, box_samples=32), []

    def twice(count):
        seen.append(float(count))
        return count * 2  # as if another process had as many

    shared = model.losses(batch.images, batch.image_sizes, batch.truth(), loss, twice)
    alone = model.losses(batch.images, batch.image_sizes, batch.truth(), loss)
    assert float(shared["keypoint"].detach()) == pytest.approx(0.5 * float(alone["keypoint"].detach()))
    assert seen[-1] > 20  # labelled keypoints of positive RoIs


# --- runs --------------------------------------------------------------------------------------------


def test_training_lowers_the_losses_of_masks_and_keypoints(stick_figures, dataset, tmp_path):
    config = TrainConfig(
        model=tiny_config(**POSES),
        loss=LossConfig(rpn_samples=32, box_samples=32),
        data=str(stick_figures),
        epochs=12,
        batch_size=4,
        learning_rate=0.02,
        warmup_steps=3,
        precision="fp32",
        workers=0,
        device="cpu",
        tensorboard=False,
        pictures=0,
    )
    trainer = Trainer(config, tmp_path, dataset)
    trainer.begin()
    trainer.fit(lambda model: {"box_ap": 0.0, "keypoint_ap": 0.1})
    lines = [json.loads(line) for line in (tmp_path / runs.LOG).read_text().splitlines()]
    assert lines[-1]["mask"] < 0.9 * lines[0]["mask"]
    assert lines[-1]["keypoint"] < 0.95 * lines[0]["keypoint"]
    assert load_checkpoint(tmp_path / runs.BEST).config == config.model


def test_the_best_checkpoint_is_the_best_by_masks_and_keypoints():
    assert score_of({"box_ap": 0.9, "mask_ap": 0.4, "keypoint_ap": 0.2}) == pytest.approx(0.3)
    assert score_of({"box_ap": 0.9, "keypoint_ap": 0.2}) == 0.2
    assert (score_of({"box_ap": 0.9, "mask_ap": 0.4}), score_of({"box_ap": 0.9})) == (0.4, 0.9)


def test_poses_are_drawn_trained_and_evaluated(run, tmp_path, monkeypatch):
    few = partial(generate_poses, train_images=8, val_images=4, size_px=64)
    monkeypatch.setitem(train.GENERATED, "poses", few)
    code, out, err = run("train", "--data", "poses", "--epochs", 1, "--workers", 0, "--batch-size", 4)
    assert code == 0, err
    assert "best mask and keypoint AP" in out
    (line,) = (tmp_path / "runs" / "train-1" / runs.LOG).read_text().splitlines()
    assert {"mask", "keypoint", "box_ap", "mask_ap", "keypoint_ap"} <= json.loads(line).keys()
    assert (tmp_path / "runs" / "poses" / "annotations" / "instances_val.json").exists()
    config = load_checkpoint(tmp_path / "runs" / "train-1" / runs.BEST).config
    assert config.has_masks and config.keypoint_names == JOINTS
    code, out, err = run("evaluate", "runs/train-1/best.safetensors", "--data", "runs/poses", "--json", "metrics.json")
    assert code == 0, err
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["keypoint"]["AP"] >= 0 and len(metrics["keypoint"]) == 10

"""Our losses and their gradients equal torchvision's, on the same weights, images and sampled RoIs.

All proposals and anchors are sampled, so that both sample the same ones.
"""

import numpy as np
import pytest
import torch
from peers import calibrate, torchvision_from_config
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler

from maskrcnn.config import AugmentConfig, LossConfig, model_config
from maskrcnn.data.coco import CocoDataset, instance_mask
from maskrcnn.data.images import read_image
from maskrcnn.data.poses import generate_poses
from maskrcnn.data.shapes import generate_shapes
from maskrcnn.imaging.preprocess import Preprocessing, batch_images
from maskrcnn.model.detector import MaskRCNN
from maskrcnn.training.loader import TrainingSamples, collate
from maskrcnn.weights.checkpoint import load_weights

ALL = 100_000
TAKE_ALL = LossConfig(
    rpn_samples=ALL,
    rpn_positive_fraction=1.0,
    box_samples=ALL,
    box_positive_fraction=1.0,
    mask_target_aligned=False,
)
NAMES = {
    "objectness": "loss_objectness",
    "rpn_box": "loss_rpn_box_reg",
    "classification": "loss_classifier",
    "box": "loss_box_reg",
    "mask": "loss_mask",
    "keypoint": "loss_keypoint",
}
SMALL = {
    "fpn_channels": 32,
    "box_head_channels": 64,
    "mask_head_channels": (32, 32),
    "anchor_sizes_px": (12, 24, 48, 96, 192),
    "rpn_candidates_per_level_training": 60,
    "proposals_training": 80,
    "class_names": ("circle", "rectangle", "triangle"),
    "category_ids": (1, 2, 3),
    "frozen_batch_norm": True,
    "preprocessing": Preprocessing(min_size_px=112, max_size_px=160),
}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> CocoDataset:
    root = generate_shapes(
        tmp_path_factory.mktemp("parity") / "shapes", train_images=3, val_images=1, size_px=96, seed=5
    )
    return CocoDataset.load(root, "train")


@pytest.fixture(scope="module")
def poses(tmp_path_factory) -> CocoDataset:
    root = generate_poses(tmp_path_factory.mktemp("parity") / "poses", train_images=3, val_images=1, size_px=96, seed=5)
    return CocoDataset.load(root, "train")


def torchvision_like(config) -> torch.nn.Module:
    """torchvision's model that samples every anchor and proposal, in training mode but for batch norm."""
    model = torchvision_from_config(config)
    model.rpn._pre_nms_top_n["training"] = config.rpn_candidates_per_level_training
    model.rpn._post_nms_top_n["training"] = config.proposals_training
    for part in (model.rpn, model.roi_heads):
        part.fg_bg_sampler = BalancedPositiveNegativeSampler(ALL, 1.0)
    return model


def in_training(model: torch.nn.Module) -> torch.nn.Module:
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
    return model


def their_targets(dataset):
    images, targets = [], []
    for record in dataset.images:
        masks = np.stack([instance_mask(record, instance) for instance in record.instances])
        images.append(torch.from_numpy(read_image(record.path)).permute(2, 0, 1) / 255)
        targets.append(
            {
                "boxes": torch.tensor([instance.box_xyxy_px for instance in record.instances]),
                "labels": torch.tensor([instance.label for instance in record.instances]),
                "masks": torch.from_numpy(masks.astype(np.uint8)),
                "keypoints": torch.tensor(np.array([_keypoints(instance) for instance in record.instances])),
            }
        )
    return images, targets


def _keypoints(instance) -> np.ndarray:
    """Of an object, float32 `[K, 3]`; of a dataset without keypoints, none."""
    return np.zeros((0, 3), np.float32) if instance.keypoints is None else instance.keypoints.astype(np.float32)


def our_batch(dataset, config):
    plain = AugmentConfig(flip_probability=0.0)
    samples = TrainingSamples(dataset, config.preprocessing, augment=plain, seed=0)
    batch = collate([samples[0, index] for index in range(len(samples))], config.preprocessing.divisor)
    inferred, sizes = batch_images([read_image(record.path) for record in dataset.images], config.preprocessing)
    assert batch.image_sizes.tolist() == sizes.tolist()
    batch.images = torch.from_numpy(inferred)  # not rounded, as torchvision's
    return batch


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("maskrcnn_resnet18_fpn", {}),
        ("fasterrcnn_resnet18_fpn", {}),
        ("maskrcnn_resnet50_fpn_v2", {"backbone": "resnet18", "box_head_convolutions": (32, 32)}),
    ],
    ids=["v1", "faster", "v2"],
)
def test_losses_and_gradients_equal_torchvisions(dataset, name, changes):
    assert_same_losses(dataset, name, changes)


@pytest.mark.parametrize("changes", [{}, {"has_masks": True}], ids=["pose", "joint"])
def test_keypoint_losses_and_gradients_equal_torchvisions(poses, changes):
    assert any((instance.keypoints[:, 2] == 0).any() for record in poses.images for instance in record.instances)
    pose = {
        "class_names": ("figure",),
        "category_ids": (1,),
        "keypoint_names": poses.keypoint_names,
        "keypoint_head_channels": (32, 32),
    }
    assert_same_losses(poses, "keypointrcnn_resnet18_fpn", {**pose, **changes})


def assert_same_losses(dataset, name, changes):
    torch.manual_seed(3)
    config = model_config(name, **{**SMALL, **changes})
    theirs = torchvision_like(config)
    calibrate(theirs, [read_image(record.path) for record in dataset.images])
    ours = MaskRCNN(config)
    load_weights(ours, theirs.state_dict(), "torchvision's weights")
    batch = our_batch(dataset, config)

    found = in_training(ours).losses(batch.images, batch.image_sizes, batch.truth(), TAKE_ALL)
    sum(found.values()).backward()
    wanted = in_training(theirs)(*their_targets(dataset))
    sum(wanted.values()).backward()

    assert {NAMES[name] for name in found} == set(wanted)
    for name, value in found.items():
        assert float(value.detach()) > 1e-4, name
        assert float(value.detach()) == pytest.approx(float(wanted[NAMES[name]].detach()), rel=1e-5), name
    gradients = gradients_of(theirs)
    # A value near zero that rounds to the other side of a ReLU changes gradients by more than the rounding itself:
    # torchvision's own gradients for images changed in the last bit show by how much.
    changes = []
    for factor in (1 - 2**-23, 1 + 2**-23):
        images, targets = their_targets(dataset)
        theirs.zero_grad()
        sum(theirs([image * factor for image in images], targets).values()).backward()
        changes += relative_differences(gradients_of(theirs), gradients).values()
    limit = max(1e-3, 2 * max(changes))
    for name, difference in relative_differences(gradients_of(ours), gradients).items():
        assert difference < limit, name


def gradients_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def relative_differences(found, wanted) -> dict[str, float]:
    differences = {}
    for name, gradient in found.items():
        if name.endswith("kps_score_lowres.bias"):  # a softmax ignores it: rounding is all there is
            assert max(gradient.norm(), wanted[name].norm()) < 1e-5
            continue
        differences[name] = float((gradient - wanted[name]).norm() / wanted[name].norm().clamp(min=1e-6))
    return differences

"""Our detector and torchvision's, with the same weights, find the same in the same images."""

import copy
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from mismatch import Mismatch, compare_detections, merge_mismatches
from peers import TorchvisionDetector, calibrate, calibrated_state_dict, torchvision_from_config, torchvision_model
from torchvision.models import get_model, list_models

from maskrcnn.config import MODELS, model_config
from maskrcnn.data.coco import CocoDataset
from maskrcnn.data.images import read_image
from maskrcnn.data.layouts import find_split
from maskrcnn.data.poses import poses_image
from maskrcnn.data.shapes import shapes_image
from maskrcnn.errors import UserError
from maskrcnn.imaging.preprocess import Preprocessing, resized_size
from maskrcnn.model.detector import MaskRCNN
from maskrcnn.runtime.backends.torch import TorchBackend
from maskrcnn.runtime.detector import Detector
from maskrcnn.weights.checkpoint import load_weights

COCO = os.environ.get("MASKRCNN_COCO")  # a COCO-format folder with the split val2017
MIXED_SIZES = [(120, 160), (200, 150), (97, 211)]
SMALL = model_config(
    "maskrcnn_resnet18_fpn_small",
    class_names=("a", "b", "c", "d", "e"),
    category_ids=(1, 2, 3, 4, 5),
    preprocessing=Preprocessing(min_size_px=128, max_size_px=213),
)


def images_of(sizes, seed=1):
    rng = np.random.default_rng(seed)
    return [shapes_image(rng, size)[0] for size in sizes]


def mismatches(theirs, ours, images) -> list[Mismatch]:
    pairs = zip(theirs.detect(images), ours.detect(images), strict=True)
    return [compare_detections(a, b, max_rows=ours.metadata.detections) for a, b in pairs]


def assert_equal(found: Mismatch):
    """Equal up to what float32 sums in another order give, which random weights amplify."""
    assert found.detections == found.other_detections
    assert found.unpaired == 0
    assert found.box_px < 0.05
    assert found.score < 5e-4
    assert found.mask_px <= 60
    assert found.jumped <= 3


@pytest.fixture(scope="module")
def small_pair():
    torch.manual_seed(0)
    theirs = torchvision_from_config(SMALL)
    calibrate(theirs, images_of([(128, 160)] * 4, seed=0))
    ours = MaskRCNN(SMALL)
    load_weights(ours, theirs.state_dict(), "calibrated weights")
    detector = Detector(TorchBackend(ours, device="cpu"))
    return TorchvisionDetector(theirs, detector.metadata), detector


def test_each_image_alone(small_pair):
    found = merge_mismatches([mismatches(*small_pair, [image])[0] for image in images_of(MIXED_SIZES)])
    assert found.detections >= 20 and found.labels >= 2
    assert_equal(found)


def test_batch_of_mixed_sizes(small_pair):
    found = merge_mismatches(mismatches(*small_pair, images_of(MIXED_SIZES)))
    assert found.detections >= 20 and found.labels >= 2
    assert_equal(found)


def test_an_adaptive_number_of_samples():
    config = replace(SMALL, pool_sampling_ratio=0)
    torch.manual_seed(0)
    theirs = torchvision_from_config(config)
    calibrate(theirs, images_of([(128, 160)] * 4, seed=0))
    ours = MaskRCNN(config)
    load_weights(ours, theirs.state_dict(), "calibrated weights")
    detector = Detector(TorchBackend(ours, device="cpu"))
    parts = mismatches(TorchvisionDetector(theirs, detector.metadata), detector, images_of(MIXED_SIZES))
    found = merge_mismatches(parts)
    assert found.detections >= 20
    assert_equal(found)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"stride_in_1x1": True}, "stride_in_1x1=True\n  expected: stride_in_1x1=False, as torchvision"),
        ({"anchors_rounded": False, "pool_aligned": True}, "anchors_rounded=False, pool_aligned=True\n"),
        ({"anchor_strides_px": (4, 8, 16, 32, 64)}, r"anchor_strides_px=\(4, 8, 16, 32, 64\)\n  expected: \S+=\(\)"),
        ({"detection_min_side_px": 0.0}, "detection_min_side_px=0.0"),
        ({"preprocessing": Preprocessing(resize="pillow")}, "resize='pillow'\n  expected: resize='torchvision'"),
        ({"preprocessing": Preprocessing(divisor=64)}, "divisor=64\n  expected: divisor=32"),
    ],
)
def test_conventions_that_torchvision_does_not_have_are_refused(changes, text):
    with pytest.raises(UserError, match=text):
        torchvision_from_config(replace(SMALL, **changes))


def both_detectors(name, weights, **sizes):
    """Our detector and torchvision's with the same weights."""
    classes = len(weights["roi_heads.box_predictor.cls_score.weight"])
    config = model_config(
        name,
        class_names=tuple(f"class_{label}" for label in range(1, classes)),
        category_ids=tuple(range(1, classes)),
        preprocessing=Preprocessing(**sizes),
    )
    ours = MaskRCNN(config)
    load_weights(ours, weights, "calibrated weights")
    theirs = torchvision_model(name, classes, **sizes)
    theirs.load_state_dict(weights)
    detector = Detector(TorchBackend(ours))
    return detector, TorchvisionDetector(theirs, detector.metadata)


def test_plain_architecture():
    sizes = {"min_size_px": 128, "max_size_px": 213}
    images = images_of([(120, 160), (160, 120)], seed=2)
    weights = calibrated_state_dict("maskrcnn_resnet18_fpn", 6, images, 0, **sizes)
    ours, theirs = both_detectors("maskrcnn_resnet18_fpn", weights, **sizes)
    found = merge_mismatches(mismatches(theirs, ours, images))
    assert found.detections >= 10 and found.labels >= 3
    assert_equal(found)


@pytest.mark.slow
@pytest.mark.skipif(COCO is None, reason="needs the environment variable MASKRCNN_COCO")
@pytest.mark.parametrize(
    ("name", "count", "short_side_px"),
    [
        ("maskrcnn_resnet50_fpn", 12, 800),
        ("maskrcnn_resnet50_fpn", 4, 400),
        ("maskrcnn_resnet50_fpn_v2", 4, 400),
        ("fasterrcnn_resnet50_fpn", 4, 400),
        ("fasterrcnn_resnet50_fpn_v2", 4, 400),
    ],
)
def test_coco_images(name, count, short_side_px):
    """Print the metrics of docs/results.md: images one by one, torchvision with itself, and a batch of mixed sizes.

    Convolutions in another memory layout add in another order: float32 cannot agree better than torchvision with
    itself.
    """
    records = CocoDataset.load(Path(COCO), find_split(Path(COCO), "val2017")).images[:count]
    images = [read_image(record.path) for record in records]
    sizes = {"min_size_px": short_side_px, "max_size_px": round(short_side_px * 1333 / 800)}
    weights = calibrated_state_dict(name, 91, images[:8], 0, **sizes)
    ours, theirs = both_detectors(name, weights, **sizes)
    other_layout = copy.deepcopy(theirs.model).to(memory_format=torch.channels_last)
    same = TorchvisionDetector(other_layout, theirs.metadata)
    found = {title: [] for title in ("torchvision and ours", "torchvision with itself")}
    for image in images:
        for detector, parts in zip((ours, same), found.values(), strict=True):
            parts += mismatches(theirs, detector, [image])
    by_shape = {image.shape: image for image in reversed(images)}
    mixed = list(by_shape.values())[-3:] if len(by_shape) >= 3 else images[:3]
    found["one batch of " + ", ".join(f"{w}×{h}" for h, w, _ in (image.shape for image in mixed))] = mismatches(
        theirs, ours, mixed
    )
    print(f"\n{name} at {short_side_px} px, {count} images")
    for title, parts in found.items():
        print(f"{title}: {merge_mismatches(parts)}")
        for part in parts:
            assert part.detections > 0
            assert_equal(part)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] * name.startswith("fasterrcnn"))  # a Mask R-CNN has its layers, too
        for name in sorted(set(MODELS) & set(list_models(module=torchvision.models.detection)))
    ],
)
def test_models_that_torchvision_builds_itself(name):
    # The heads of version 2 and of keypoints are slow.
    few = {"rpn_candidates_per_level": 100, "proposals": 60, "detections": 8 if "keypoint" in name else 20}
    config = model_config(
        name,
        class_names=tuple("abcdef"),
        category_ids=tuple(range(1, 7)),
        preprocessing=Preprocessing(min_size_px=128, max_size_px=213),
        **few,
    )
    torch.manual_seed(0)
    theirs = get_model(
        name,
        weights=None,
        weights_backbone=None,
        num_classes=7,
        min_size=128,
        max_size=213,
        rpn_pre_nms_top_n_test=few["rpn_candidates_per_level"],
        rpn_post_nms_top_n_test=few["proposals"],
        box_detections_per_img=few["detections"],
    )
    images = images_of([(120, 160), (160, 120)], seed=2)
    calibrate(theirs, images)
    ours = MaskRCNN(config)
    load_weights(ours, theirs.state_dict(), "calibrated weights")
    detector = Detector(TorchBackend(ours, device="cpu"))
    found = merge_mismatches(mismatches(TorchvisionDetector(theirs, detector.metadata), detector, images))
    assert found.detections >= 10 and found.labels >= 3
    assert found.masks == (found.detections if config.has_masks else 0)
    assert_equal(found)


LARGE = {  # boxes of some 200 px, which no window holds
    "preprocessing": Preprocessing(min_size_px=320, max_size_px=640),
    "anchor_sizes_px": (96, 160, 224, 288, 352),
}


@pytest.mark.parametrize(("changes", "least_share"), [({}, 1.0), ({"has_masks": True}, 1.0), (LARGE, 0.85)])
def test_keypoints(changes, least_share):
    """Keypoints of paired detections are torchvision's.

    Random heat maps are rough: in a box larger than the window some have another peak of nearly the same height, and
    there torchvision's, the best of all pixels, may be the other one. A box within the tolerance of a whole number of
    resized pixels may have one pixel more in one of the two, which are other pixels: such boxes are left out.
    """
    pose = {"has_masks": False, "has_keypoints": True, "keypoint_names": ("a", "b", "c")}
    config = replace(SMALL, **{**pose, "keypoint_head_channels": (32, 32), **changes})
    rng = np.random.default_rng(6)
    images = [poses_image(rng, size)[0] for size in MIXED_SIZES]
    torch.manual_seed(0)
    theirs = torchvision_from_config(config)
    calibrate(theirs, images)
    ours = MaskRCNN(config)
    load_weights(ours, theirs.state_dict(), "calibrated weights")
    detector, off, lower = Detector(TorchBackend(ours, device="cpu")), [], []
    for image in images:
        one = detector.detect([image])[0]
        with torch.inference_mode():
            other = theirs([torch.from_numpy(image).permute(2, 0, 1).float() / 255])[0]
        boxes = other["boxes"].numpy()
        assert len(one) == len(boxes) > 5 and one.has_masks == config.has_masks
        nearest = np.abs(one.boxes_xyxy_px[:, None] - boxes[None]).max(axis=-1)
        pairs = nearest.argmin(axis=1)
        assert nearest.min(axis=1).max() < 0.05
        height, width = resized_size(image.shape[:2], config.preprocessing)
        sides = (boxes[:, 2:] - boxes[:, :2]) * (width / image.shape[1], height / image.shape[0])
        kept = (np.abs(sides - sides.round()) > 0.01).all(axis=1)[pairs]
        assert kept.mean() > 0.8
        off.append(np.abs(one.keypoints[..., :2] - other["keypoints"].numpy()[pairs, :, :2]).max(axis=-1)[kept])
        lower.append((other["keypoints_scores"].numpy()[pairs] - one.keypoints[..., 2])[kept])
    off, lower = np.concatenate(off).ravel(), np.concatenate(lower).ravel()
    assert (off < 0.1).mean() >= least_share
    assert np.abs(lower[off < 0.1]).max() < 1e-3 and lower.min() > -1e-3 and lower.max() < 1.0


@pytest.mark.parametrize("name", MODELS)
def test_every_model_has_torchvisions_tensors(name):
    with torch.device("meta"):  # shapes alone
        theirs = torchvision_model(name, 4).state_dict()
        ours = MaskRCNN(model_config(name, class_names=("a", "b", "c"))).state_dict()
    assert {n: v.shape for n, v in ours.items()} == {n: v.shape for n, v in theirs.items()}

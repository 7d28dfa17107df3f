"""Small detectors with all parts, for tests."""

import torch
import torchvision
from torchvision.models.resnet import BasicBlock, ResNet

from maskrcnn.config import ModelConfig, model_config
from maskrcnn.imaging.preprocess import Preprocessing
from maskrcnn.model.detector import MaskRCNN

# Settings of a small version 2 model.
TINY_V2 = {"head_batch_norm": True, "rpn_convolutions": 2, "box_head_convolutions": (16, 16)}
# Settings of a keypoint head.
TINY_POSE = {
    "has_keypoints": True,
    "keypoint_names": ("head", "left_hand", "right_hand", "left_foot", "right_foot"),
    "keypoint_skeleton": ((1, 2), (1, 3), (1, 4), (1, 5)),
    "keypoint_sigmas": (0.04, 0.05, 0.06, 0.07, 0.08),
    "keypoint_head_channels": (16,),
}


def tiny_config(**changes) -> ModelConfig:
    """Configuration of a small detector with all parts: 11 million parameters, mostly in ResNet-18."""
    values = {
        "fpn_channels": 16,
        "box_head_channels": 32,
        "mask_head_channels": (16,),
        "rpn_candidates_per_level": 60,
        "rpn_candidates_per_level_training": 60,
        "proposals": 40,
        "proposals_training": 40,
        "candidates": 60,
        "detections": 12,
        "preprocessing": Preprocessing(min_size_px=96, max_size_px=160),
        "class_names": ("circle", "rectangle", "triangle"),
        "category_ids": (1, 2, 3),
    }
    return model_config("maskrcnn_resnet18_fpn_small", **{**values, **changes})


class NarrowResNet(ResNet):
    """ResNet-18 with an eighth of the channels after its first layer: 200,000 parameters, the same layer names."""

    def __init__(self, **options) -> None:
        super().__init__(BasicBlock, [2, 2, 2, 2], **options)

    def _make_layer(self, block, planes, *arguments, **options):
        return super()._make_layer(block, planes // 8, *arguments, **options)


def narrow_model(name: str, *, get_model=torchvision.models.get_model, **options) -> torch.nn.Module:
    """Replaces `torchvision.models.get_model` and returns a narrow ResNet-18."""
    options.pop("weights", None)
    return NarrowResNet(**options) if name == "resnet18" else get_model(name, weights=None, **options)


def keypoints_in(box_xywh_px: list[float], count: int = 5) -> dict[str, list | int]:
    """Annotation fields of the five keypoints of `TINY_POSE`, the first `count` of them labelled."""
    x, y, width, height = box_xywh_px
    places = ((0.5, 0.1), (0.1, 0.4), (0.9, 0.45), (0.2, 0.9), (0.8, 0.85))
    labelled = [(x + a * width, y + b * height, 2) for a, b in places[:count]] + [(0, 0, 0)] * (5 - count)
    return {"keypoints": [number for point in labelled for number in point], "num_keypoints": count}


def lively_model(config: ModelConfig, seed: int = 0) -> MaskRCNN:
    """A random model with detections: batch-norm statistics from noise, and last layers with varied scores."""
    torch.manual_seed(seed)
    model = MaskRCNN(config)
    norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    with torch.no_grad():
        for norm in norms:
            norm.momentum = None  # cumulative average
        model.train()
        for _ in range(3):
            model.features(torch.rand(4, config.channels, 96, 128) * 255, torch.tensor([[96, 128]] * 4))
        model.eval()
        for convolution in model.rpn.head.conv[1:]:  # with the small initial weights, scores would be equal
            convolution[0].weight *= 10
        model.rpn.head.cls_logits.weight *= 30
        model.rpn.head.bbox_pred.weight *= 10
        model.roi_heads.box_predictor.cls_score.weight *= 8
        model.roi_heads.box_predictor.bbox_pred.weight *= 5
        if config.has_masks:
            model.roi_heads.mask_predictor.mask_fcn_logits.weight *= 3
    return model

"""Weights of other libraries: what names and shapes determine about a detector, what they do not, and class order.

Tensors have torchvision's names here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torchvision
from torch import Tensor

from maskrcnn.config import MODELS, ModelConfig, model_config
from maskrcnn.errors import UserError

BODY = "backbone.body."
CLASS_SCORES = "roi_heads.box_predictor.cls_score."  # weight [1 + classes, channels] and bias
CLASS_BOXES = "roi_heads.box_predictor.bbox_pred."  # weight [4 · (1 + classes), channels] and bias
CLASS_MASKS = "roi_heads.mask_predictor.mask_fcn_logits."  # weight [1 + classes, channels, 1, 1] and bias
ANCHOR_SCORES = "rpn.head.cls_logits."  # weight [anchors of a cell, channels, 1, 1] and bias
ANCHOR_BOXES = "rpn.head.bbox_pred."
HEAT_MAPS = "roi_heads.keypoint_predictor.kps_score_lowres."  # weight [channels, keypoints, 4, 4] and bias

# Backbones by blocks of the four stages, convolutions of a block, and output and input channels of the second
# convolution of the first block; the input channels are the width of a group.
_RESNETS: dict[tuple[tuple[int, ...], int, tuple[int, int]], str] = {
    ((2, 2, 2, 2), 2, (64, 64)): "resnet18",
    ((3, 4, 6, 3), 2, (64, 64)): "resnet34",
    ((3, 4, 6, 3), 3, (64, 64)): "resnet50",
    ((3, 4, 23, 3), 3, (64, 64)): "resnet101",
    ((3, 8, 36, 3), 3, (64, 64)): "resnet152",
    ((3, 4, 6, 3), 3, (128, 4)): "resnext50_32x4d",
    ((3, 4, 23, 3), 3, (256, 8)): "resnext101_32x8d",
    ((3, 4, 23, 3), 3, (256, 4)): "resnext101_64x4d",
    ((3, 4, 6, 3), 3, (128, 128)): "wide_resnet50_2",
    ((3, 4, 23, 3), 3, (128, 128)): "wide_resnet101_2",
}


def resnet_layout(tensors: Mapping[str, Tensor]) -> tuple[tuple[int, ...], int, tuple[int, int]]:
    """Blocks of the four stages, convolutions of a block, and channels of the first block's second convolution."""
    blocks = {found[0] for name in tensors if (found := re.match(r"backbone\.body\.layer(\d)\.\d+\.", name))}
    counts = tuple(sum(block.startswith(f"{BODY}layer{stage}.") for block in blocks) for stage in (1, 2, 3, 4))
    convolutions = 3 if f"{BODY}layer1.0.conv3.weight" in tensors else 2
    second = tensors.get(f"{BODY}layer1.0.conv2.weight")
    return counts, convolutions, (0, 0) if second is None else (second.shape[0], second.shape[1])


def resnet_of(tensors: Mapping[str, Tensor]) -> str | None:
    """Name of the ResNet, ResNeXt or wide ResNet that has these tensors below `backbone.body.`."""
    return _RESNETS.get(resnet_layout(tensors))


def architecture_of(tensors: Mapping[str, Tensor]) -> str | None:
    """Name of the detector on a ResNet that has these tensors, one of `maskrcnn.config.MODELS`."""
    backbone = resnet_of(tensors)
    if backbone is None or f"{CLASS_SCORES}weight" not in tensors:
        return None
    has_masks, has_keypoints = f"{CLASS_MASKS}weight" in tensors, f"{HEAT_MAPS}weight" in tensors
    family = "maskrcnn" if has_masks else "keypointrcnn" if has_keypoints else "fasterrcnn"
    name = f"{family}_{backbone}_fpn{'_v2' if 'rpn.head.conv.1.0.weight' in tensors else ''}"
    return name if name in MODELS else None


def fields_of(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Fields of `ModelConfig` that follow from the shapes of the tensors that are present."""
    fields: dict[str, Any] = {}
    if (stem := tensors.get(f"{BODY}conv1.weight")) is not None:
        fields["channels"] = stem.shape[1]
    lateral, first = tensors.get("backbone.fpn.inner_blocks.0.0.weight"), tensors.get("roi_heads.box_head.fc6.weight")
    if lateral is not None:
        fields["fpn_channels"] = lateral.shape[0]
        if first is not None:
            fields["box_head_channels"] = first.shape[0]
            fields["box_pool_size"] = round((first.shape[1] / lateral.shape[0]) ** 0.5)
    for kind, pattern in (
        ("mask", r"roi_heads\.mask_head\.(\d+)\.0\.weight"),
        ("keypoint", r"roi_heads\.keypoint_head\.(\d+)\.weight"),
    ):
        numbered = {int(found[1]): value for name, value in tensors.items() if (found := re.fullmatch(pattern, name))}
        if numbered:
            fields[f"{kind}_head_channels"] = tuple(numbered[number].shape[0] for number in sorted(numbered))
    return fields


def class_count(tensors: Mapping[str, Tensor]) -> int:
    """Number of classes without background; 0 for a backbone."""
    weight = tensors.get(f"{CLASS_SCORES}weight")
    return 0 if weight is None else weight.shape[0] - 1


def check_shapes(config: ModelConfig, tensors: Mapping[str, Tensor], source: str | Path) -> None:
    """Check settings that a user can get wrong against the tensors.

    Raises:
        UserError: for another number of anchors, classes or keypoints.
    """
    ratios, weight = config.anchor_aspect_ratios, tensors.get(f"{ANCHOR_SCORES}weight")
    if weight is not None and weight.shape[0] != len(ratios):
        raise UserError(
            f"{source}: {weight.shape[0]} anchors in each cell, and a model with {len(ratios)}: one size on each level "
            f"with the aspect ratios {', '.join(map(str, ratios))}",
            f"as many aspect ratios as the weights have anchors, {weight.shape[0]}",
            "set them: --set 'model.anchor_aspect_ratios=[0.5, 1.0, 2.0]'; several sizes on a level are not supported",
        )
    count = class_count(tensors)
    if count and count != config.num_classes:
        raise UserError(
            f"{source}: weights of {count} classes, and {config.num_classes} class names",
            f"{count} names, without background",
            "list every class in the order of the labels: --class-names FILE, with one name per line",
        )
    heat_maps = tensors.get(f"{HEAT_MAPS}weight")
    if heat_maps is not None and config.has_keypoints and heat_maps.shape[1] != len(config.keypoint_names):
        raise UserError(
            f"{source}: weights of {heat_maps.shape[1]} keypoints, and {len(config.keypoint_names)} keypoint names",
            f"{heat_maps.shape[1]} names",
            "set model.keypoint_names to the names in the order of the heat maps",
        )


# Older repositories with other model structures: prefix of their names, description, and what to use instead.
_OLDER = (
    (
        "RCNN_",
        "a Faster R-CNN of faster-rcnn.pytorch (RCNN_base, RCNN_rpn, RCNN_top), which has no feature pyramid",
        "train from the backbone of such models (--weights resnet101_caffe.pth or vgg16_caffe.pth), or "
        "from a detector: --model fasterrcnn_resnet50_fpn --weights COCO_V1",
    ),
    (
        "fpn.C1.",
        "Matterport's Mask R-CNN as pytorch-mask-rcnn converts it (fpn.C1, rpn.conv_shared, classifier, mask), whose "
        "proposals have 512 channels and whose objects are pooled from other levels",
        "use weights of the same 80 COCO classes: --model maskrcnn_resnet50_fpn --weights COCO_V1",
    ),
)


def refuse_older(names: Iterable[str], source: str | Path) -> None:
    """Raise a UserError for weights of older repositories whose models cannot be represented."""
    for prefix, what, instead in _OLDER:
        if any(name.startswith(prefix) for name in names):
            raise UserError(f"{source}: {what}", "a Faster or Mask R-CNN with a feature pyramid (FPN)", instead)


# Fields that tensors do not determine

ANCHORS = ("anchor_sizes_px", "anchor_aspect_ratios")
SIZES = ("preprocessing.min_size_px", "preprocessing.max_size_px")
PIXELS = ("preprocessing.channel_order", "preprocessing.mean", "preprocessing.std")
THRESHOLDS = ("score_threshold", "nms_iou", "detections")
CLASSES = ("class_names",)
UNSTATED = (*ANCHORS, *SIZES, *PIXELS, *THRESHOLDS, *CLASSES)  # fields of ModelConfig


def assumptions(config: ModelConfig, assumed: Collection[str]) -> str:
    """One line that states the assumed fields of a model, and how to change them.

    Args:
        config: the model.
        assumed: some of `UNSTATED`.
    """
    pixels, names = config.preprocessing, config.class_names
    several = f"{names[0]} … {names[-1]}" if len(names) > 2 else ", ".join(names)
    texts = (
        (ANCHORS, f"anchors {_numbers(config.anchor_sizes_px)} px, ratios {_numbers(config.anchor_aspect_ratios)}"),
        (SIZES, f"images {pixels.min_size_px}/{pixels.max_size_px} px"),
        (PIXELS, f"pixels {pixels.channel_order}, mean {_numbers(pixels.mean)}, std {_numbers(pixels.std)}"),
        (THRESHOLDS[:1], f"score threshold {config.score_threshold:g}"),
        (THRESHOLDS[1:2], f"NMS IoU {config.nms_iou:g}"),
        (THRESHOLDS[2:], f"{config.detections} detections"),
        (CLASSES, f"classes {several}"),
    )
    shown = "; ".join(text for fields, text in texts if any(name in assumed for name in fields))
    options = "--anchor-sizes, --min-size, --max-size, --class-names, --set model.FIELD=VALUE"
    return f"assumed, the file does not state it: {shown}; change with {options}" if shown else ""


def _numbers(values: Iterable[float]) -> str:
    return ", ".join(f"{value:.4g}" for value in values)


def coco_classes() -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Names and category ids of the 80 COCO classes, ordered by id."""
    categories = torchvision.models.detection.MaskRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"]
    used = [(name, number) for number, name in enumerate(categories) if number > 0 and name != "N/A"]
    names, ids = zip(*used, strict=True)
    return names, ids


# Libraries whose background class is last


class Imported(NamedTuple):
    """A detector of another library with our names and order of classes and channels."""

    tensors: dict[str, Tensor]
    config: ModelConfig
    unstated: tuple[str, ...]  # fields of `UNSTATED` that neither the file nor a configuration next to it states
    notes: tuple[str, ...] = ()


def detector_of(
    renamed: dict[str, Tensor], conventions: dict[str, Any], unsupported: Callable[[str], UserError]
) -> tuple[dict[str, Tensor], ModelConfig]:
    """Put the background class first, and derive the configuration.

    Args:
        renamed: a Faster or Mask R-CNN on a ResNet with FPN, background last, boxes and masks of each class.
        conventions: fields of `ModelConfig` that do not follow from shapes.
        unsupported: returns the error for another architecture, given what was found.

    Raises:
        UserError: for tensors of another architecture.
    """
    has_masks = any(name.startswith("roi_heads.mask_") for name in renamed)
    missing = sorted(_landmarks(has_masks=has_masks) - set(renamed))
    if missing:
        raise unsupported(f"a model without {', '.join(missing)}")
    classes = class_count(renamed)
    for name, each in ((f"{CLASS_BOXES}weight", 4), (f"{CLASS_MASKS}weight", 1)):
        rows = renamed[name].shape[0] if name in renamed else each * classes
        if rows != each * classes:
            shared = " shared by all classes (class-agnostic boxes or masks)" if rows == each else ""
            raise unsupported(f"{rows} rows of {name}{shared}, for {classes} classes")
    backbone = resnet_of(renamed)
    if backbone is None:
        counts, convolutions, width = resnet_layout(renamed)
        raise unsupported(f"a ResNet with {counts} blocks of {convolutions} convolutions, the second one {width}")
    names, ids = coco_classes() if classes == 80 else ((), ())
    config = model_config(
        f"{'mask' if has_masks else 'faster'}rcnn_{backbone}_fpn",
        **{
            "class_names": names or tuple(f"class_{label}" for label in range(1, classes + 1)),
            "category_ids": ids or tuple(range(1, classes + 1)),
            **fields_of(renamed),
            **conventions,
        },
    )
    return _background_first(renamed), config


def _landmarks(*, has_masks: bool) -> set[str]:
    """Tensors whose shapes define the architecture."""
    return {
        f"{BODY}conv1.weight",
        "backbone.fpn.inner_blocks.0.0.weight",
        "roi_heads.box_head.fc6.weight",
        *(f"{layer}{kind}" for layer in (CLASS_SCORES, CLASS_BOXES) for kind in ("weight", "bias")),
        *((f"{CLASS_MASKS}weight", "roi_heads.mask_head.0.0.weight") if has_masks else ()),
    }


def _background_first(renamed: dict[str, Tensor]) -> dict[str, Tensor]:
    """Move the background class from last to 0, and add its boxes and masks, which these libraries lack."""
    converted = dict(renamed)
    for name, value in renamed.items():
        if name.startswith(CLASS_SCORES):
            converted[name] = torch.cat([value[-1:], value[:-1]])
        elif name.startswith(CLASS_BOXES):
            converted[name] = torch.cat([torch.zeros_like(value[:4]), value])
        elif name.startswith(CLASS_MASKS):
            converted[name] = torch.cat([torch.zeros_like(value[:1]), value])
    return converted


def scaled_boxes(
    tensors: dict[str, Tensor], layer: str, weights: Iterable[float], ours: Iterable[float]
) -> dict[str, Tensor]:
    """Scale the predictor of box deltas, so that our division by `ours` has the same result as the model's own.

    Args:
        tensors: tensors of a detector.
        layer: `CLASS_BOXES` or `ANCHOR_BOXES`, with 4 rows for each class or anchor.
        weights: the four weights by which the model divides its deltas.
        ours: the four weights by which this package divides them.
    """
    factors = torch.tensor([our / own for our, own in zip(ours, weights, strict=True)])
    scaled = dict(tensors)
    for kind in ("weight", "bias"):
        value = tensors[f"{layer}{kind}"]
        rows = factors.repeat(value.shape[0] // 4).to(value.dtype)
        scaled[f"{layer}{kind}"] = value * rows.reshape(-1, *(1,) * (value.dim() - 1))
    return scaled

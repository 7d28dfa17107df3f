"""Frozen dataclasses that define a detector and a training run.

The same objects are built from the command line, stored in a checkpoint as JSON, and read back.
"""

from __future__ import annotations

import dataclasses
import math
import re
import typing
from dataclasses import dataclass, field
from typing import Any

from maskrcnn.data.images import EXIF_RULES
from maskrcnn.errors import SMALLEST_POSITIVE, UserError, check_range, did_you_mean
from maskrcnn.imaging.preprocess import Preprocessing, with_channels
from maskrcnn.keypoints import COCO_NAMES, COCO_SIGMAS, COCO_SKELETON, check_skeleton
from maskrcnn.settings import typed
from maskrcnn.stages import LEVELS

RESNETS = tuple(f"resnet{depth}" for depth in (18, 34, 50, 101, 152))
_WIDER = ("resnext50_32x4d", "resnext101_32x8d", "resnext101_64x4d", "wide_resnet50_2", "wide_resnet101_2")
OTHER_BACKBONES = ("vgg16", "vgg16_bn", "mobilenet_v3_large", "convnext_tiny")
BACKBONES = (*RESNETS, *OTHER_BACKBONES, *_WIDER)  # torchvision's names
NECKS = ("fpn", "panet", "bifpn")
POOL_METHODS = ("align", "pool", "crop")
_MAX_CHANNELS = 512  # channels of input images; hyperspectral cameras have about 300 bands


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Mask R-CNN with a feature pyramid (He et al. 2017; Lin et al. 2017), or Faster R-CNN if it has no masks.

    Both can also predict keypoints (He et al. 2017, section 5), the same set for every class. Defaults are those of
    torchvision's `maskrcnn_resnet50_fpn`. Lengths are pixels of the resized image. Labels run from 1 to
    `len(class_names)`; label 0 is background and padding.
    """

    name: str = "maskrcnn_resnet50_fpn"
    class_names: tuple[str, ...] = ()
    category_ids: tuple[int, ...] = ()  # category_ids[k - 1] is the dataset's id of label k
    channels: int = 3  # channels of the input images; 3: RGB
    backbone: str = "resnet50"  # one of BACKBONES
    frozen_batch_norm: bool = False  # freeze batch norm of the backbone, for fine-tuning in small batches
    batch_norm_epsilon: float = 1e-5  # epsilon of the backbone; 0 for torchvision's COCO_V1 weights of version 1
    stride_in_1x1: bool = False  # stride in the first convolution of a bottleneck, as in Detectron2
    neck: str = "fpn"  # one of NECKS
    bifpn_repeats: int = 3  # bidirectional passes of the neck "bifpn"
    fpn_channels: int = 256  # channels of P2 … P6 of any neck
    head_batch_norm: bool = False  # batch norm in neck and mask head, never frozen
    anchor_sizes_px: tuple[float, ...] = (32, 64, 128, 256, 512)  # one per level P2 … P6
    anchor_aspect_ratios: tuple[float, ...] = (0.5, 1.0, 2.0)  # height / width
    anchors_rounded: bool = True  # round anchor corners to whole pixels, as torchvision does
    anchor_strides_px: tuple[int, ...] = ()  # one per level; (): image side // map side, as in torchvision
    rpn_convolutions: int = 1  # convolutions before the RPN's two predictors
    rpn_candidates_per_level: int = 1000  # anchors per level that enter NMS
    rpn_candidates_per_level_training: int = 2000
    proposals: int = 1000  # proposals per image that reach the box head
    proposals_training: int = 2000
    rpn_nms_iou: float = 0.7
    proposal_min_side_px: float = 1e-3  # proposals with a shorter side are dropped; 0: only empty ones
    box_head_channels: int = 1024
    box_head_convolutions: tuple[
        int, ...
    ] = ()  # channels, with batch norm, before one linear layer; (): two linear layers
    box_pool_size: int = 7
    has_masks: bool = True  # has a mask head
    mask_pool_size: int = 14
    mask_head_channels: tuple[int, ...] = (256, 256, 256, 256)
    has_keypoints: bool = False  # has a keypoint head
    keypoint_names: tuple[str, ...] = ()  # names of the K keypoints; training uses the dataset's
    keypoint_skeleton: tuple[tuple[int, int], ...] = ()  # lines between keypoints (numbered from 1), for drawing
    keypoint_sigmas: tuple[float, ...] = ()  # OKS sigmas
    keypoint_pool_size: int = 14  # heat maps have four times as many cells per side
    keypoint_head_channels: tuple[int, ...] = (512,) * 8
    pool_method: str = "align"  # one of POOL_METHODS, see `maskrcnn.model.pooling`
    pool_sampling_ratio: int = 2  # "align": samples per bin and axis; 0: ceil(bin length in pixels)
    pool_aligned: bool = False  # pixel centres at half-integers (ONNX's half_pixel); not for "pool"
    score_threshold: float = 0.05
    nms_iou: float = 0.5
    recommended_threshold: float = 0.0  # score with the best F1 on the validation split, set by training; 0: unknown
    detection_min_side_px: float = 1e-2  # detections with a shorter side are dropped; 0: only empty ones
    candidates: int = 1000  # (proposal, class) pairs per image that enter NMS
    detections: int = 100  # rows of the output; unused rows are zero
    preprocessing: Preprocessing = field(default_factory=Preprocessing)

    def __post_init__(self) -> None:
        for name, choices in (("backbone", BACKBONES), ("neck", NECKS), ("pool_method", POOL_METHODS)):
            _check_choice(f"model.{name}", getattr(self, name), choices)
        check_ranges(vars(self), "model.")
        object.__setattr__(self, "preprocessing", with_channels(self.preprocessing, self.channels))
        _check_levels("model.anchor_sizes_px", self.anchor_sizes_px)
        if self.anchor_strides_px:
            _check_levels("model.anchor_strides_px", self.anchor_strides_px)
        for name in ("anchor_aspect_ratios", "mask_head_channels", "keypoint_head_channels"):
            if not getattr(self, name):
                raise UserError(f"model.{name} []", "at least one value", "set values, or omit it for the default")
        check_skeleton("model.keypoint_skeleton", self.keypoint_skeleton, len(self.keypoint_names))
        if self.keypoint_sigmas and len(self.keypoint_sigmas) != len(self.keypoint_names):
            raise UserError(
                f"{len(self.keypoint_sigmas)} model.keypoint_sigmas for {len(self.keypoint_names)} keypoint names",
                "one sigma per name, or none",
                "give model.keypoint_names and model.keypoint_sigmas the same length",
            )

    @property
    def num_classes(self) -> int:
        """Number of classes without background."""
        return len(self.class_names)

    @property
    def strides_px(self) -> tuple[int, ...]:
        """Strides of the pooled levels P2 … P5."""
        return (4, 8, 16, 32)


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """Random changes of training samples, in the order in which they are applied.

    Probabilities are per sample. Lengths are pixels of the resized image.
    """

    # Colours (torchvision's ColorJitter): factors from 1 - x to 1 + x, hue shift from -x to x.
    colour_probability: float = 0.0
    colour_brightness: float = 0.125
    colour_contrast: float = 0.5
    colour_saturation: float = 0.5
    colour_hue: float = 0.05  # fraction of the hue circle; at most 0.5

    flip_probability: float = 0.5  # left to right
    vertical_flip_probability: float = 0.0  # upside down

    # Images whose sides differ by a larger factor are cropped at random along the longer side; 0: no limit.
    largest_aspect_ratio: float = 0.0

    # Size: one of the sides is chosen per sample; (): the model's min_size_px.
    shorter_sides_px: tuple[int, ...] = ()
    # Large-scale jitter (Ghiasi et al. 2021): the image is scaled, then cropped or padded to a square canvas.
    jitter_probability: float = 0.0
    jitter_least_scale: float = 0.1  # 1 fits the canvas
    jitter_largest_scale: float = 2.0
    jitter_canvas_px: int = 0  # side of the canvas; 0: the model's min_size_px

    # Composition with other images of the dataset, which get independent colours, flips and sizes.
    mosaic_probability: float = 0.0  # four images around a random point (Bochkovskiy et al. 2020)
    perspective_probability: float = 0.0  # random perspective; the corners move inwards
    perspective_distortion: float = 0.2  # maximum shift of a corner as a fraction of half a side, 0 to 1
    mixup_probability: float = 0.0  # two images blended, with the objects of both (Zhang et al. 2019)
    mixup_alpha: float = 8.0  # weight of the first image ~ Beta(alpha, alpha); large: near 0.5
    copy_paste_probability: float = 0.0  # objects of another image pasted on top (Ghiasi et al. 2021)

    # Own augmentation, called last: "package.module:function", see `maskrcnn.training.transform`.
    transform: str = ""

    least_visible: float = 0.1  # minimum visible fraction of an object's area; others are dropped

    def __post_init__(self) -> None:
        check_ranges(vars(self), "augment.")
        check_range("augment.jitter_largest_scale", self.jitter_largest_scale, self.jitter_least_scale)
        if self.transform and not re.fullmatch(r"[\w.]+:[\w.]+", self.transform):
            raise UserError(
                f"augment.transform {self.transform!r}",
                "package.module:function",
                "for example augment.transform=transforms:rotated for `rotated` in transforms.py",
            )
        if self.largest_aspect_ratio:
            check_range("augment.largest_aspect_ratio", self.largest_aspect_ratio, low=1)


BOX_LOSSES = ("smooth_l1", "iou", "giou", "diou", "ciou")
CLASS_LOSSES = ("cross_entropy", "focal")
CLASS_WEIGHTS = ("none", "inverse", "effective")  # weighting schemes, see `class_weights`


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Matching, sampling and loss constants (Ren et al. 2015; values of torchvision)."""

    rpn_foreground_iou: float = 0.7
    rpn_background_iou: float = 0.3
    rpn_samples: int = 256
    rpn_positive_fraction: float = 0.5
    box_foreground_iou: float = 0.5
    box_samples: int = 512
    box_positive_fraction: float = 0.25
    smooth_l1_beta: float = 1 / 9
    mask_target_aligned: bool = True  # False: shifted half a pixel right and down, as in torchvision
    rpn_box_loss: str = "smooth_l1"  # one of BOX_LOSSES, for the RPN
    box_loss: str = "smooth_l1"  # one of BOX_LOSSES, for the box head
    rpn_box_loss_weight: float = 1.0
    box_loss_weight: float = 1.0
    # Weights of the box head's classification loss: class name → weight, or one of CLASS_WEIGHTS, from which weights
    # are computed for the training split (`maskrcnn.training.recipe.class_weights`). Background has weight 1.
    class_weights: str | dict[str, float] = "none"
    class_weights_beta: float = (
        0.999  # beta of "effective" (Cui et al. 2019); 0: equal weights, near 1: inverse frequency
    )
    objectness_loss: str = "cross_entropy"  # one of CLASS_LOSSES, for the RPN
    classification_loss: str = "cross_entropy"  # one of CLASS_LOSSES, for the box head
    focal_gamma: float = 2.0  # gamma of "focal" (Lin et al. 2017); 0: cross-entropy
    focal_alpha: float = 0.25  # weight of objects in the RPN's focal loss; that of background is 1 - alpha

    def __post_init__(self) -> None:
        for name in ("rpn_box_loss", "box_loss"):
            _check_choice(f"loss.{name}", getattr(self, name), BOX_LOSSES)
        check_ranges(vars(self), "loss.")
        check_range("loss.rpn_background_iou", self.rpn_background_iou, 0, self.rpn_foreground_iou)
        for name in ("objectness_loss", "classification_loss"):
            _check_choice(f"loss.{name}", getattr(self, name), CLASS_LOSSES)
        if isinstance(self.class_weights, str):
            if self.class_weights not in CLASS_WEIGHTS:
                raise UserError(
                    f"loss.class_weights {self.class_weights!r}",
                    f"one of {', '.join(CLASS_WEIGHTS)}, or a weight for each class name",
                    "use --set loss.class_weights=inverse, or --set 'loss.class_weights={cat: 2, dog: 1}'",
                )
        else:
            for name, weight in self.class_weights.items():
                check_range(f"loss.class_weights of {name!r}", weight, low=0)


def _setting(default: Any, text: str, *choices: str) -> Any:
    """Defines a field that is also an option of `maskrcnn train`, with its help text and allowed values."""
    return field(default=default, metadata={"help": text, "choices": choices})


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run. Every field with a help text is an option of `maskrcnn train` and a key of its YAML file.

    One optimizer step uses `batch_size` images, regardless of the number of processes and accumulation steps.
    """

    model: ModelConfig
    loss: LossConfig = field(default_factory=LossConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    data: str = ""  # folder of the dataset, or its annotation file
    images: str = ""  # folder of the images; "": searched for near the annotation file
    train_split: str = "train"
    val_split: str = "val"
    val_data: str = ""  # dataset of the validation split; "": `data`
    val_images: str = ""
    weights: str = _setting(
        "",
        "Pretrained weights: a checkpoint, a torchvision, Detectron2 or mmdetection file, or a name such as COCO_V1.",
    )
    epochs: int = _setting(12, "Number of epochs; by default more for small datasets, to reach 300 steps.")
    batch_size: int = _setting(8, "Images per optimizer step, across all processes; 4 by default for the small model.")
    accumulate: int = _setting(1, "Gradient accumulation steps per batch, to save memory.")
    group_by_aspect_ratio: bool = _setting(True, "Batch images of similar aspect ratios together.")
    aspect_ratio_groups: int = _setting(
        2, "Number of aspect ratio groups; 2: landscape and portrait, 4: also separates ratios beyond 2:1."
    )
    repeat_threshold: float = _setting(
        0.0, "Repeat images of classes that occur in less than this share of the images (repeat factors); 0 disables."
    )
    empty_images: bool = _setting(True, "Train on images without objects.")
    crowd_objects: bool = _setting(False, "Train on crowd regions as objects.")
    optimizer: str = _setting("sgd", "Optimizer.", "sgd", "adam", "adamw")
    learning_rate: float = _setting(0.02, "Peak learning rate.")
    base_batch_size: int = _setting(
        0, "Batch size that the learning rate refers to; the rate is scaled linearly to the actual one; 0: unscaled."
    )
    momentum: float = _setting(0.9, "Momentum of SGD.")
    weight_decay: float = _setting(
        1e-4, "Weight decay of convolution and linear weights; usually 0.05 for AdamW; L2 penalty for Adam."
    )
    warmup_steps: int = _setting(200, "Steps of linear warm-up from learning rate / 1000, at most half the run.")
    schedule: str = _setting("cosine", "Learning rate schedule.", "cosine", "step", "constant")
    cosine_end: float = _setting(0.0, "Final learning rate of the cosine schedule, as a fraction of the peak.")
    step_epochs: tuple[int, ...] = _setting(
        (), "Epochs after which the step schedule decays the learning rate, such as 8,11."
    )
    step_factor: float = _setting(0.1, "Factor of each decay of the step schedule.")
    clip_gradient_norm: float = _setting(10.0, "Maximum gradient norm; 0 disables clipping.")
    precision: str = _setting("auto", "Training precision.", "auto", "fp32", "bf16", "fp16")
    ema_decay: float = _setting(
        0.0, "Decay of the exponential moving average of weights, which is evaluated and saved; 0 disables it."
    )
    batch_norm: str = _setting(
        "train",
        "Batch norm statistics: per process, frozen, or synchronized across processes.",
        "train",
        "frozen",
        "sync",
    )
    trainable_stages: int = _setting(
        5, "Number of trainable backbone stages, counted from the last; 5: all, 3: usual for COCO."
    )
    on_nonfinite: str = _setting("stop", "Action on a non-finite loss or gradient.", "stop", "skip")
    workers: int = _setting(
        -1, "Number of data loading processes; 0 loads in the training process, -1 uses the remaining cores."
    )
    exif: str = _setting("auto", "EXIF orientation: from the annotated sizes, or the same for all images.", *EXIF_RULES)
    seed: int = _setting(0, "Random seed for weights, order, augmentation and sampling.")
    evaluate_every: int = _setting(1, "Epochs between evaluations; the last epoch is always evaluated.")
    validation_loss: bool = _setting(False, "Also compute the losses on the validation split.")
    best_metric: str = _setting(
        "", "Metric of the best checkpoint, such as box_ap, mask_ap50, mask_ap/CLASS or validation_loss."
    )
    patience: int = _setting(
        0, "Evaluations without improvement of the best metric after which training stops; 0: never."
    )
    log_every: int = _setting(50, "Steps between loss lines in log.jsonl; 0 writes only one line per epoch.")
    tensorboard: bool = _setting(True, "Write TensorBoard scalars and images to the run's folder.")
    pictures: int = _setting(4, "Number of images to save of augmented samples, and of predictions at each evaluation.")
    device: str = _setting("auto", "Training device.", "auto", "cpu", "cuda", "mps")
    cuda_graphs: bool = _setting(
        False, "Run steps as CUDA graphs, one per batch shape: faster for small images on a fast GPU."
    )

    def __post_init__(self) -> None:
        for each in dataclasses.fields(self):
            if choices := each.metadata.get("choices"):
                _check_choice(each.name, getattr(self, each.name), choices)
        check_ranges(vars(self), "")
        _check_steps(self.schedule, self.step_epochs)
        if self.best_metric.startswith("validation_") and not self.validation_loss:
            raise UserError(
                f"best_metric {self.best_metric} without validation_loss",
                "the losses of the validation split, which are computed on request",
                "add --validation-loss",
            )


def _check_levels(name: str, values: tuple[float, ...]) -> None:
    """Raise a UserError unless there is a value for each pyramid level."""
    if len(values) != len(LEVELS):
        raise UserError(
            f"{name} {list(values)}",
            f"{len(LEVELS)} values, one for each of the levels {', '.join(LEVELS)}",
            "give one value per level, or omit it for the default",
        )


def _check_steps(schedule: str, epochs: tuple[int, ...]) -> None:
    """Raise a UserError unless these are valid epochs of a step schedule."""
    if any(late <= early for early, late in zip((0, *epochs), epochs, strict=False)):
        raise UserError(
            f"step_epochs {list(epochs)}",
            "epochs from 1 on, in ascending order",
            "sort them, as in --step-epochs 8,11",
        )
    if schedule == "step" and not epochs:
        raise UserError(
            "schedule step without step_epochs",
            "the epochs after which the learning rate decays",
            "set them, as in --step-epochs 8,11, or use --schedule constant",
        )


def _check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Raise a UserError unless the value is one of the choices."""
    if value not in choices:
        fix = f"set {name} to one of these{did_you_mean(value, choices)}"
        raise UserError(f"{name} {value!r}", f"one of {', '.join(choices)}", fix)


_LIMITLESS = math.inf
_SHARE = (0, 1)  # a fraction, a probability, an IoU
_POSITIVE = (SMALLEST_POSITIVE, _LIMITLESS)
_COUNT = (1, _LIMITLESS)
_FROM_0 = (0, _LIMITLESS)

# Minimum and maximum of every number in a configuration, by its YAML key; for a list, of each of its numbers.
# `Preprocessing` checks its own numbers.
RANGES: dict[str, tuple[float, float]] = {
    "model.channels": (1, _MAX_CHANNELS),
    "model.batch_norm_epsilon": _FROM_0,
    "model.bifpn_repeats": _COUNT,
    "model.fpn_channels": _COUNT,
    "model.anchor_sizes_px": _POSITIVE,
    "model.anchor_strides_px": _COUNT,
    "model.anchor_aspect_ratios": _POSITIVE,
    "model.rpn_convolutions": _COUNT,
    "model.rpn_candidates_per_level": _COUNT,
    "model.rpn_candidates_per_level_training": _COUNT,
    "model.proposals": _COUNT,
    "model.proposals_training": _COUNT,
    "model.rpn_nms_iou": _SHARE,
    "model.proposal_min_side_px": _FROM_0,
    "model.box_head_channels": _COUNT,
    "model.box_head_convolutions": _COUNT,
    "model.box_pool_size": _COUNT,
    "model.mask_pool_size": _COUNT,
    "model.mask_head_channels": _COUNT,
    "model.keypoint_pool_size": _COUNT,
    "model.keypoint_head_channels": _COUNT,
    "model.keypoint_sigmas": _POSITIVE,
    "model.pool_sampling_ratio": _FROM_0,
    "model.score_threshold": _SHARE,
    "model.recommended_threshold": _SHARE,
    "model.nms_iou": _SHARE,
    "model.detection_min_side_px": _FROM_0,
    "model.candidates": _COUNT,
    "model.detections": _COUNT,
    "augment.colour_probability": _SHARE,
    "augment.colour_brightness": _FROM_0,
    "augment.colour_contrast": _FROM_0,
    "augment.colour_saturation": _FROM_0,
    "augment.colour_hue": (0, 0.5),
    "augment.flip_probability": _SHARE,
    "augment.largest_aspect_ratio": _FROM_0,
    "augment.vertical_flip_probability": _SHARE,
    "augment.shorter_sides_px": _COUNT,
    "augment.jitter_probability": _SHARE,
    "augment.jitter_least_scale": (1e-3, _LIMITLESS),
    "augment.jitter_largest_scale": (1e-3, _LIMITLESS),
    "augment.jitter_canvas_px": _FROM_0,
    "augment.mosaic_probability": _SHARE,
    "augment.perspective_probability": _SHARE,
    "augment.perspective_distortion": _SHARE,
    "augment.mixup_probability": _SHARE,
    "augment.mixup_alpha": (1e-3, _LIMITLESS),
    "augment.copy_paste_probability": _SHARE,
    "augment.least_visible": _SHARE,
    "loss.rpn_foreground_iou": _SHARE,
    "loss.rpn_background_iou": _SHARE,
    "loss.rpn_samples": _COUNT,
    "loss.rpn_positive_fraction": _SHARE,
    "loss.box_foreground_iou": _SHARE,
    "loss.box_samples": _COUNT,
    "loss.box_positive_fraction": _SHARE,
    "loss.smooth_l1_beta": _FROM_0,
    "loss.rpn_box_loss_weight": _FROM_0,
    "loss.box_loss_weight": _FROM_0,
    "loss.class_weights_beta": (0, 1 - 1e-9),
    "loss.focal_gamma": (0, 100),
    "loss.focal_alpha": _SHARE,
    "epochs": _COUNT,
    "batch_size": _COUNT,
    "accumulate": _COUNT,
    "base_batch_size": _FROM_0,
    "aspect_ratio_groups": (2, 64),
    "repeat_threshold": _SHARE,
    "learning_rate": _FROM_0,
    "momentum": _SHARE,
    "weight_decay": _FROM_0,
    "warmup_steps": _FROM_0,
    "cosine_end": _SHARE,
    "step_epochs": _FROM_0,  # see `_check_steps`
    "step_factor": (1e-12, 1),
    "clip_gradient_norm": _FROM_0,
    "ema_decay": _SHARE,
    "trainable_stages": (0, 5),
    "workers": (-1, _LIMITLESS),
    "seed": _FROM_0,
    "evaluate_every": _COUNT,
    "patience": _FROM_0,
    "log_every": _FROM_0,
    "pictures": _FROM_0,
}


def check_ranges(settings: dict[str, Any], section: str = "") -> None:
    """Raise a UserError if a number in (nested) settings is outside its range in `RANGES`."""
    for name, value in settings.items():
        if isinstance(value, dict):
            check_ranges(value, f"{section}{name}.")
        for number in value if isinstance(value, tuple) else (value,):
            if f"{section}{name}" in RANGES:
                check_range(f"{section}{name}", number, *RANGES[f"{section}{name}"])


def usual_epsilon(backbone: str) -> float:
    """Batch norm epsilon of torchvision's ImageNet weights for a backbone."""
    return 1e-3 if backbone == "mobilenet_v3_large" else 1e-5


_SMALL = {
    "backbone": "resnet18",
    "fpn_channels": 96,
    "anchor_sizes_px": (12, 24, 48, 96, 192),
    "rpn_candidates_per_level": 200,
    "rpn_candidates_per_level_training": 300,
    "proposals": 100,
    "proposals_training": 200,
    "box_head_channels": 256,
    "mask_head_channels": (96, 96),
    "keypoint_head_channels": (96, 96, 96),
    "candidates": 200,
    "detections": 30,
}

# Li et al. 2021, "Benchmarking Detection Transfer Learning with Vision Transformers", as torchvision builds it.
_V2: dict[str, Any] = {"head_batch_norm": True, "rpn_convolutions": 2, "box_head_convolutions": (256, 256, 256, 256)}

# As in torchvision: no masks, and COCO's person keypoints by default.
_POSE = {
    "has_masks": False,
    "has_keypoints": True,
    "keypoint_names": COCO_NAMES,
    "keypoint_skeleton": COCO_SKELETON,
    "keypoint_sigmas": COCO_SIGMAS,
}
_FAMILIES: dict[str, dict[str, Any]] = {"maskrcnn": {}, "fasterrcnn": {"has_masks": False}, "keypointrcnn": _POSE}
_VERSIONS: dict[str, dict[str, Any]] = {"": {}, "_v2": _V2}

# Named models, as differences from ModelConfig's defaults. Models named as in torchvision are the same as there.
SMALL_MODEL = "maskrcnn_resnet18_fpn_small"  # the default
MODELS: dict[str, dict[str, Any]] = {
    "maskrcnn_resnet18_fpn_small": _SMALL,
    **{
        f"{family}_{backbone}_fpn{version}": {"backbone": backbone, **heads, **changes}
        for family, heads in _FAMILIES.items()
        for version, changes in _VERSIONS.items()
        for backbone in (*RESNETS, *_WIDER)
        if (family, version) != ("keypointrcnn", "_v2")
    },
    **{
        f"{family}_{backbone}_fpn": {"backbone": backbone, **heads, "batch_norm_epsilon": usual_epsilon(backbone)}
        for family, heads in _FAMILIES.items()
        for backbone in OTHER_BACKBONES
        if (family, backbone)
        != ("fasterrcnn", "mobilenet_v3_large")  # a different model in torchvision, with a finest stride of 32
    },
}


def model_config(name: str, **changes: Any) -> ModelConfig:
    """Configuration of a named model with some fields changed.

    With other keypoint names, the named model's skeleton and sigmas are dropped.

    Raises:
        UserError: for a name that is not in `MODELS`.
    """
    if name not in MODELS:
        fix = f"set --model to one of these{did_you_mean(name, MODELS)}"
        raise UserError(f"model {name!r}", f"one of {', '.join(MODELS)}", fix)
    given = MODELS[name]
    if changes.get("keypoint_names", COCO_NAMES) != COCO_NAMES:
        given = {key: value for key, value in given.items() if key not in ("keypoint_skeleton", "keypoint_sigmas")}
    return ModelConfig(**{"name": name, **given, **changes})


def to_dict(config: Any) -> dict[str, Any]:
    """Configuration as a JSON-serialisable dictionary."""
    return dataclasses.asdict(config)


def from_dict(kind: type, values: dict[str, Any]) -> Any:
    """Configuration written by `to_dict`; lists become tuples, missing fields have their default.

    Raises:
        UserError: for unknown fields and values of the wrong type.
    """
    return _build(kind, typed(kind, values, where=f"{kind.__name__}."))


def _build(kind: type, values: dict[str, Any]) -> Any:
    types = typing.get_type_hints(kind)
    built = {}
    for key, each in values.items():
        is_section = isinstance(each, dict) and dataclasses.is_dataclass(types[key])
        built[key] = _build(types[key], each) if is_section else each
    return kind(**built)


def changed(config: Any, changes: dict[str, Any]) -> Any:
    """Copy of a configuration with some fields changed; sections are nested dictionaries of changes.

    Raises:
        UserError: for unknown fields and values of the wrong type.
    """
    values = {}
    for key, value in typed(type(config), changes, where=f"{type(config).__name__}.").items():
        section = getattr(config, key)
        is_section = isinstance(value, dict) and dataclasses.is_dataclass(section)
        values[key] = changed(section, value) if is_section else value
    return dataclasses.replace(config, **values)

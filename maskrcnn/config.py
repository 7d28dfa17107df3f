"""Every number that decides what a detector or a training run is, as frozen dataclasses.

The same objects are built from the command line, stored in a checkpoint as JSON, and read back.
"""

from __future__ import annotations

import dataclasses
import math
import typing
from dataclasses import dataclass, field
from typing import Any

from maskrcnn.errors import UserError
from maskrcnn.imaging.preprocess import Preprocessing
from maskrcnn.keypoints import COCO_NAMES, COCO_SIGMAS, COCO_SKELETON, check_skeleton
from maskrcnn.settings import typed
from maskrcnn.stages import LEVELS

RESNETS = tuple(f"resnet{depth}" for depth in (18, 34, 50, 101, 152))
_WIDER = ("resnext50_32x4d", "resnext101_32x8d", "resnext101_64x4d", "wide_resnet50_2", "wide_resnet101_2")
OTHER_BACKBONES = ("vgg16", "vgg16_bn", "mobilenet_v3_large", "convnext_tiny")
BACKBONES = (*RESNETS, *OTHER_BACKBONES, *_WIDER)  # torchvision's names
NECKS = ("fpn", "panet", "bifpn")
POOL_METHODS = ("align", "pool", "crop")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A Mask R-CNN with a feature pyramid (He et al. 2017; Lin et al. 2017), or a Faster R-CNN: without masks.

    Either may have keypoints besides (He et al. 2017, section 5): the same for every class, as many as have names.
    Defaults are those of torchvision's `maskrcnn_resnet50_fpn`. Lengths are pixels of the resized image.
    Labels run from 1 to `len(class_names)`; label 0 is background and padding.
    """

    name: str = "maskrcnn_resnet50_fpn"
    class_names: tuple[str, ...] = ()
    category_ids: tuple[int, ...] = ()  # the dataset's own id of label k is category_ids[k - 1]
    backbone: str = "resnet50"  # one of BACKBONES
    frozen_batch_norm: bool = False  # the backbone's statistics and affine fixed, for fine-tuning in small batches
    batch_norm_epsilon: float = 1e-5  # the backbone's; 0 for torchvision's v1 COCO_V1 weights, which do not say so
    stride_in_1x1: bool = False  # which convolution of a bottleneck halves a map: True: its first, as in Detectron2
    neck: str = "fpn"  # one of NECKS: what makes P2 … P6 of the backbone's maps
    bifpn_repeats: int = 3  # passes down and up of the neck "bifpn"
    fpn_channels: int = 256  # of P2 … P6, whatever the neck
    head_batch_norm: bool = False  # after the convolutions of neck and mask head too; never frozen
    anchor_sizes_px: tuple[float, ...] = (32, 64, 128, 256, 512)  # one per level P2 … P6
    anchor_aspect_ratios: tuple[float, ...] = (0.5, 1.0, 2.0)  # height / width
    anchors_rounded: bool = True  # whether their corners are whole pixels from their centre, as torchvision's
    anchor_strides_px: tuple[int, ...] = ()  # one per level; (): image side // map side, as torchvision has it
    rpn_convolutions: int = 1  # before the RPN's two predictors
    rpn_candidates_per_level: int = 1000  # best anchors of a level that go into NMS
    rpn_candidates_per_level_training: int = 2000
    proposals: int = 1000  # proposals per image that reach the box head
    proposals_training: int = 2000
    rpn_nms_iou: float = 0.7
    proposal_min_side_px: float = 1e-3  # proposals with a shorter side are dropped; 0: only empty ones
    box_head_channels: int = 1024
    box_head_convolutions: tuple[int, ...] = ()  # channels; with batch norm, before one linear layer. Without: two
    box_pool_size: int = 7
    has_masks: bool = True  # whether there is a mask head
    mask_pool_size: int = 14
    mask_head_channels: tuple[int, ...] = (256, 256, 256, 256)
    has_keypoints: bool = False  # whether there is a keypoint head
    keypoint_names: tuple[str, ...] = ()  # of the K keypoints; training takes the dataset's
    keypoint_skeleton: tuple[tuple[int, int], ...] = ()  # lines between keypoints, which count from 1; for pictures
    keypoint_sigmas: tuple[float, ...] = ()  # deviation of each relative to the object's size, for COCO's similarity
    keypoint_pool_size: int = 14  # heat maps have four times as many cells per side
    keypoint_head_channels: tuple[int, ...] = (512,) * 8
    pool_method: str = "align"  # one of POOL_METHODS, see `maskrcnn.model.pooling`
    pool_sampling_ratio: int = 2  # "align": points per bin and axis; 0: as many as a bin is pixels long, rounded up
    pool_aligned: bool = False  # not for "pool". True: pixel centres at half-integers (ONNX's half_pixel)
    score_threshold: float = 0.05
    nms_iou: float = 0.5
    detection_min_side_px: float = 1e-2  # detections with a shorter side are dropped; 0: only empty ones
    candidates: int = 1000  # best (proposal, class) pairs per image that go into NMS
    detections: int = 100  # rows of the output; unused rows are zero
    preprocessing: Preprocessing = field(default_factory=Preprocessing)

    def __post_init__(self) -> None:
        for name, choices in (("backbone", BACKBONES), ("neck", NECKS), ("pool_method", POOL_METHODS)):
            _check_choice(f"model.{name}", getattr(self, name), choices)
        _check_range("model.bifpn_repeats", self.bifpn_repeats, low=1)
        _check_levels("model.anchor_sizes_px", self.anchor_sizes_px)
        if self.anchor_strides_px:
            _check_levels("model.anchor_strides_px", self.anchor_strides_px)
        for name in ("anchor_aspect_ratios", "mask_head_channels", "keypoint_head_channels"):
            if not getattr(self, name):
                raise UserError(f"model.{name} []", "at least one", "name some, or leave it out for the default")
        check_skeleton("model.keypoint_skeleton", self.keypoint_skeleton, len(self.keypoint_names))
        if self.keypoint_sigmas and len(self.keypoint_sigmas) != len(self.keypoint_names):
            raise UserError(
                f"{len(self.keypoint_sigmas)} model.keypoint_sigmas for {len(self.keypoint_names)} keypoint names",
                "one for each name, or none",
                "give model.keypoint_names and model.keypoint_sigmas the same length",
            )

    @property
    def num_classes(self) -> int:
        """Classes without background."""
        return len(self.class_names)

    @property
    def strides_px(self) -> tuple[int, ...]:
        """Strides of the pooled levels P2 … P5."""
        return (4, 8, 16, 32)


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """Random changes of training samples, in the order in which they are made.

    Probabilities are per sample, from 0 (never) to 1 (always). Lengths are pixels of the resized image.
    """

    # Colours (torchvision's ColorJitter). Factors are drawn from 1 - x to 1 + x, the shift of hue from -x to x.
    colour_probability: float = 0.0
    colour_brightness: float = 0.125
    colour_contrast: float = 0.5
    colour_saturation: float = 0.5
    colour_hue: float = 0.05  # of the whole circle of hues; at most 0.5

    flip_probability: float = 0.5  # left to right
    vertical_flip_probability: float = 0.0  # upside down

    # Size. One of the sides is drawn for each sample; without any it is the model's min_size_px.
    shorter_sides_px: tuple[int, ...] = ()
    # Large-scale jitter (Ghiasi et al. 2021) instead: the image is scaled and cut or padded to a square canvas.
    jitter_probability: float = 0.0
    jitter_least_scale: float = 0.1  # 1 just fits the canvas
    jitter_largest_scale: float = 2.0
    jitter_canvas_px: int = 0  # side of the canvas; 0 is the model's min_size_px

    # Composition. Partners are other images of the dataset, with colours, flips and sizes of their own.
    mosaic_probability: float = 0.0  # four images around a random point (Bochkovskiy et al. 2020)
    perspective_probability: float = 0.0  # a tilted view; the corners move inwards
    perspective_distortion: float = 0.2  # by at most this share of half a side, 0 to 1
    mixup_probability: float = 0.0  # two images blended, with the objects of both (Zhang et al. 2019)
    mixup_alpha: float = 8.0  # the first image's share is drawn from Beta(alpha, alpha); large: near one half
    copy_paste_probability: float = 0.0  # some objects of another image on top (Ghiasi et al. 2021)

    least_visible: float = 0.1  # objects of which less is left, as a share of their area, are dropped

    def __post_init__(self) -> None:
        for each in dataclasses.fields(self):
            if each.name.endswith("_probability"):
                _check_range(f"augment.{each.name}", getattr(self, each.name), low=0, high=1)
        for name in ("colour_brightness", "colour_contrast", "colour_saturation", "jitter_canvas_px"):
            _check_range(f"augment.{name}", getattr(self, name), low=0)
        _check_range("augment.colour_hue", self.colour_hue, low=0, high=0.5)
        for side in self.shorter_sides_px:
            _check_range("augment.shorter_sides_px", side, low=1)
        _check_range("augment.jitter_least_scale", self.jitter_least_scale, low=1e-3)
        _check_range("augment.jitter_largest_scale", self.jitter_largest_scale, low=self.jitter_least_scale)
        _check_range("augment.perspective_distortion", self.perspective_distortion, low=0, high=1)
        _check_range("augment.mixup_alpha", self.mixup_alpha, low=1e-3)
        _check_range("augment.least_visible", self.least_visible, low=0, high=1)


BOX_LOSSES = ("smooth_l1", "iou", "giou", "diou", "ciou")


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
    mask_target_aligned: bool = True  # False: half a pixel to the right and down, as torchvision's targets are
    rpn_box_loss: str = "smooth_l1"  # one of BOX_LOSSES, on the RPN's boxes
    box_loss: str = "smooth_l1"  # likewise, on the detections' boxes
    rpn_box_loss_weight: float = 1.0
    box_loss_weight: float = 1.0

    def __post_init__(self) -> None:
        for name in ("rpn_box_loss", "box_loss"):
            _check_choice(f"loss.{name}", getattr(self, name), BOX_LOSSES)


def _setting(default: Any, text: str, *choices: str) -> Any:
    """A field that is an option of `maskrcnn train` too, with its help text and its possible values."""
    return field(default=default, metadata={"help": text, "choices": choices})


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run. Every field with a help text is an option of `maskrcnn train`, and a key of its YAML file.

    One optimizer step takes `batch_size` images, whatever the number of processes and of accumulated batches:
    those change where the step is computed and not what it is.
    """

    model: ModelConfig
    loss: LossConfig = field(default_factory=LossConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    data: str = ""  # folder in COCO layout
    train_split: str = "train"
    val_split: str = "val"
    weights: str = _setting(
        "", "Weights to start from: a checkpoint, a file of torchvision's or Detectron2's, or a name such as COCO_V1."
    )
    epochs: int = _setting(12, "Passes over the data.")
    batch_size: int = _setting(8, "Images per optimizer step, over all processes.")
    accumulate: int = _setting(1, "Parts that a batch is computed in, one after another; saves memory.")
    group_by_aspect_ratio: bool = _setting(True, "Landscape and portrait images in batches of their own.")
    optimizer: str = _setting("sgd", "Optimizer.", "sgd", "adam", "adamw")
    learning_rate: float = _setting(0.02, "Peak learning rate.")
    momentum: float = _setting(0.9, "Momentum of SGD.")
    weight_decay: float = _setting(
        1e-4, "Decay of convolution and linear weights; 0.05 is usual for AdamW; Adam adds it to the gradient."
    )
    warmup_steps: int = _setting(200, "Steps of linear warm-up from learning rate / 1000; at most half the run.")
    schedule: str = _setting("cosine", "Decay of the learning rate.", "cosine", "step", "constant")
    cosine_end: float = _setting(0.0, "With cosine: the last learning rate, as a share of the peak.")
    step_epochs: tuple[int, ...] = _setting((), "With step: epochs after which the rate decays, as 8,11.")
    step_factor: float = _setting(0.1, "With step: factor of each decay.")
    clip_gradient_norm: float = _setting(10.0, "Largest gradient norm; 0 switches clipping off.")
    precision: str = _setting("auto", "Arithmetic.", "auto", "fp32", "bf16", "fp16")
    ema_decay: float = _setting(0.0, "Decay of averaged weights, which are evaluated and saved; 0 is off.")
    batch_norm: str = _setting(
        "train", "Statistics: own of each process, fixed, or over all processes.", "train", "frozen", "sync"
    )
    trainable_stages: int = _setting(5, "Backbone stages that train, from the last; 5 is all, 3 is usual for COCO.")
    on_nonfinite: str = _setting("stop", "At a loss or gradient that is not finite.", "stop", "skip")
    workers: int = _setting(-1, "Data loading processes; 0 loads in the training process, -1 uses the other cores.")
    seed: int = _setting(0, "Decides weights, order, augmentation and sampling.")
    evaluate_every: int = _setting(1, "Epochs between evaluations; the last one is always evaluated.")
    tensorboard: bool = _setting(True, "TensorBoard scalars and pictures in the run's folder.")
    pictures: int = _setting(4, "Pictures of augmented samples, and of predictions at each evaluation.")
    device: str = _setting("auto", "Where to train.", "auto", "cpu", "cuda")

    def __post_init__(self) -> None:
        for each in dataclasses.fields(self):
            if choices := each.metadata.get("choices"):
                _check_choice(each.name, getattr(self, each.name), choices)
        for name in ("epochs", "batch_size", "accumulate", "evaluate_every"):
            _check_range(name, getattr(self, name), low=1)
        _check_range("workers", self.workers, low=-1)
        for name in ("warmup_steps", "pictures", "weight_decay", "clip_gradient_norm", "learning_rate"):
            _check_range(name, getattr(self, name), low=0)
        _check_range("trainable_stages", self.trainable_stages, low=0, high=5)
        for name in ("ema_decay", "cosine_end"):
            _check_range(name, getattr(self, name), low=0, high=1)
        _check_steps(self.schedule, self.step_epochs)


def _check_levels(name: str, values: tuple[float, ...]) -> None:
    """Raises a UserError unless there is a positive value for each level of the pyramid."""
    if len(values) != len(LEVELS) or not min(values) > 0:
        raise UserError(
            f"{name} {list(values)}",
            f"{len(LEVELS)} values above 0, one for each of the levels {', '.join(LEVELS)}",
            "name as many, or leave it out for the default",
        )


def _check_steps(schedule: str, epochs: tuple[int, ...]) -> None:
    """Raises a UserError unless these can be the epochs after which a step schedule lowers the rate."""
    if any(late <= early for early, late in zip((0, *epochs), epochs, strict=False)):
        raise UserError(
            f"step_epochs {list(epochs)}",
            "epochs from 1 on, each after the one before it",
            "put them in order, as --step-epochs 8,11",
        )
    if schedule == "step" and not epochs:
        raise UserError(
            "schedule step without step_epochs",
            "the epochs after which the learning rate decays",
            "name them, as --step-epochs 8,11, or take --schedule constant for a rate that stays",
        )


def _check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Raises a UserError unless the value is one of the choices."""
    if value not in choices:
        raise UserError(f"{name} {value!r}", f"one of {', '.join(choices)}", f"choose {name} among them")


def _check_range(name: str, value: float, *, low: float, high: float = math.inf) -> None:
    """Raises a UserError unless low ≤ value ≤ high."""
    if not low <= value <= high:
        bounds = f"at least {low}" if high == math.inf else f"{low} to {high}"
        raise UserError(f"{name} {value}", bounds, f"set {name} to such a number")


def usual_epsilon(backbone: str) -> float:
    """The epsilon of batch norm with which torchvision trains a backbone's ImageNet weights."""
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
_V2 = {"head_batch_norm": True, "rpn_convolutions": 2, "box_head_convolutions": (256, 256, 256, 256)}

# Keypoints of a person unless training says otherwise, and no masks, as torchvision's model of the name.
_POSE = {
    "has_masks": False,
    "has_keypoints": True,
    "keypoint_names": COCO_NAMES,
    "keypoint_skeleton": COCO_SKELETON,
    "keypoint_sigmas": COCO_SIGMAS,
}
_FAMILIES = {"maskrcnn": {}, "fasterrcnn": {"has_masks": False}, "keypointrcnn": _POSE}
# torchvision's `fasterrcnn_mobilenet_v3_large_fpn` is another model: its finest map has stride 32.
_TORCHVISIONS_OWN = "fasterrcnn_mobilenet_v3_large_fpn"

# The models that can be named on the command line: only what differs from ModelConfig's defaults. Where torchvision
# has a model of the same name, it is the same model.
MODELS: dict[str, dict[str, Any]] = {
    "maskrcnn_resnet18_fpn_small": _SMALL,
    **{
        f"{family}_{backbone}_fpn{version}": {"backbone": backbone, **heads, **changes}
        for family, heads in _FAMILIES.items()
        for version, changes in (("", {}), ("_v2", _V2))
        for backbone in RESNETS
        if (family, version) != ("keypointrcnn", "_v2")
    },
    **{
        f"{family}_{backbone}_fpn": {"backbone": backbone, **heads, "batch_norm_epsilon": usual_epsilon(backbone)}
        for family, heads in _FAMILIES.items()
        for backbone in OTHER_BACKBONES
        if f"{family}_{backbone}_fpn" != _TORCHVISIONS_OWN
    },
}


def model_config(name: str, **changes: Any) -> ModelConfig:
    """The configuration of a named model, with fields changed as given.

    Lines between keypoints and deviations belong to the keypoints' names, and go where other names are given.

    Raises:
        UserError: for a name that is not in `MODELS`.
    """
    if name not in MODELS:
        raise UserError(f"model {name!r}", f"one of {', '.join(MODELS)}", "name one of these models with --model")
    given = MODELS[name]
    if changes.get("keypoint_names", COCO_NAMES) != COCO_NAMES:
        given = {key: value for key, value in given.items() if key not in ("keypoint_skeleton", "keypoint_sigmas")}
    return ModelConfig(**{"name": name, **given, **changes})


def to_dict(config: Any) -> dict[str, Any]:
    """A configuration as a dictionary that JSON can hold."""
    return dataclasses.asdict(config)


def from_dict(kind: type, values: dict[str, Any]) -> Any:
    """The configuration that `to_dict` wrote; lists become tuples, and fields left out have their default.

    Raises:
        UserError: for fields that this version does not know, and values of the wrong type.
    """
    return _made(kind, typed(kind, values, where=f"{kind.__name__}."))


def _made(kind: type, values: dict[str, Any]) -> Any:
    types = typing.get_type_hints(kind)
    return kind(**{key: _made(types[key], each) if isinstance(each, dict) else each for key, each in values.items()})


def changed(config: Any, changes: dict[str, Any]) -> Any:
    """A configuration with some fields changed; sections are nested dictionaries of changes themselves.

    Raises:
        UserError: for fields that the configuration does not have, and values of the wrong type.
    """
    made = {}
    for key, value in typed(type(config), changes, where=f"{type(config).__name__}.").items():
        made[key] = changed(getattr(config, key), value) if isinstance(value, dict) else value
    return dataclasses.replace(config, **made)

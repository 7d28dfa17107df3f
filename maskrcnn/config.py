"""Every number that decides what a detector or a training run is, as frozen dataclasses.

The same objects are built from the command line, stored in a checkpoint as JSON, and read back.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from maskrcnn.errors import UserError
from maskrcnn.preprocess import Preprocessing


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A Mask R-CNN with a ResNet-FPN backbone (He et al. 2017; Lin et al. 2017).

    Defaults are those of torchvision's `maskrcnn_resnet50_fpn`. Lengths are pixels of the resized image.
    Labels run from 1 to `len(class_names)`; label 0 is background and padding.
    """

    name: str = "maskrcnn_resnet50_fpn"
    class_names: tuple[str, ...] = ()
    category_ids: tuple[int, ...] = ()  # the dataset's own id of label k is category_ids[k - 1]
    backbone: str = "resnet50"
    frozen_batch_norm: bool = False  # statistics and affine fixed, for fine-tuning in small batches
    batch_norm_epsilon: float = 1e-5  # 0 for torchvision's COCO_V1 weights, whose file does not say so
    fpn_channels: int = 256
    anchor_sizes_px: tuple[float, ...] = (32, 64, 128, 256, 512)  # one per level P2 … P6
    anchor_aspect_ratios: tuple[float, ...] = (0.5, 1.0, 2.0)  # height / width
    rpn_candidates_per_level: int = 1000  # best anchors of a level that go into NMS
    rpn_candidates_per_level_training: int = 2000
    proposals: int = 1000  # proposals per image that reach the box head
    proposals_training: int = 2000
    rpn_nms_iou: float = 0.7
    box_head_channels: int = 1024
    box_pool_size: int = 7
    mask_pool_size: int = 14
    mask_head_channels: tuple[int, ...] = (256, 256, 256, 256)
    pool_sampling_ratio: int = 2  # sampling points per bin and axis
    pool_aligned: bool = False  # False: torchvision v1 and ONNX output_half_pixel; True: half_pixel
    score_threshold: float = 0.05
    nms_iou: float = 0.5
    candidates: int = 1000  # best (proposal, class) pairs per image that go into NMS
    detections: int = 100  # rows of the output; unused rows are zero
    preprocessing: Preprocessing = field(default_factory=Preprocessing)

    @property
    def num_classes(self) -> int:
        """Classes without background."""
        return len(self.class_names)

    @property
    def strides_px(self) -> tuple[int, ...]:
        """Strides of the pooled levels P2 … P5."""
        return (4, 8, 16, 32)


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


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run."""

    model: ModelConfig
    loss: LossConfig = field(default_factory=LossConfig)
    data: str = ""  # folder in COCO layout
    train_split: str = "train"
    val_split: str = "val"
    epochs: int = 12
    batch_size: int = 8  # images per optimizer step
    learning_rate: float = 0.02
    momentum: float = 0.9
    weight_decay: float = 1e-4
    warmup_steps: int = 200  # linear from learning_rate / 1000
    schedule: str = "cosine"  # cosine | step
    step_epochs: tuple[int, ...] = ()  # for "step": learning rate × 0.1 after each of these epochs
    clip_gradient_norm: float = 10.0  # 0 switches clipping off
    precision: str = "auto"  # auto | fp32 | bf16 (autocast)
    flip_probability: float = 0.5
    workers: int = 1  # data loading processes; 0 loads in the training process
    seed: int = 0
    evaluate_every: int = 1  # epochs; the last one is always evaluated
    device: str = "auto"  # auto | cpu | cuda


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
    "candidates": 200,
    "detections": 30,
}

# The models that can be named on the command line: only what differs from ModelConfig's defaults.
MODELS: dict[str, dict[str, Any]] = {
    "maskrcnn_resnet18_fpn": {"backbone": "resnet18"},
    "maskrcnn_resnet34_fpn": {"backbone": "resnet34"},
    "maskrcnn_resnet50_fpn": {"backbone": "resnet50"},
    "maskrcnn_resnet18_fpn_small": _SMALL,
}


def model_config(name: str, **changes: Any) -> ModelConfig:
    """The configuration of a named model, with fields changed as given.

    Raises:
        UserError: for a name that is not in `MODELS`.
    """
    if name not in MODELS:
        raise UserError(f"model {name!r}", f"one of {', '.join(MODELS)}", "name one of these models with --model")
    return ModelConfig(**{"name": name, **MODELS[name], **changes})


def to_dict(config: Any) -> dict[str, Any]:
    """A configuration as a dictionary that JSON can hold."""
    return dataclasses.asdict(config)


def from_dict(kind: type, values: dict[str, Any]) -> Any:
    """The configuration that `to_dict` wrote; lists become tuples.

    Raises:
        UserError: for fields that this version does not know.
    """
    fields = {f.name: f for f in dataclasses.fields(kind)}
    unknown = sorted(set(values) - set(fields))
    if unknown:
        raise UserError(
            f"{kind.__name__} with unknown field(s) {', '.join(unknown)}",
            f"fields among {', '.join(fields)}",
            "use the version of maskrcnn that wrote the file, or remove the fields",
        )
    nested = {"model": ModelConfig, "loss": LossConfig, "preprocessing": Preprocessing}
    made = {}
    for key, value in values.items():
        if key in nested and isinstance(value, dict):
            made[key] = from_dict(nested[key], value)
        else:
            made[key] = tuple(value) if isinstance(value, list) else value
    return kind(**made)

"""Adapting pretrained weights to a model with other classes, keypoints or parts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

from maskrcnn.config import ModelConfig
from maskrcnn.model.backbone import inflated
from maskrcnn.model.detector import MaskRCNN
from maskrcnn.weights.foreign import BODY, HEAT_MAPS, check_shapes
from maskrcnn.weights.torchvision import StartingWeights

# First convolutions of ResNets, VGG, and the other backbones.
FIRST_CONVOLUTIONS = tuple(f"backbone.body.{layer}.weight" for layer in ("conv1", "0", "0.0"))
_MASK_HEAD = "roi_heads.mask_"
_KEYPOINT_HEAD = "roi_heads.keypoint_"
_NECK = "backbone.fpn."
# Parts of necks, each completely present or absent: FPN, PANet's second path, BiFPN.
_NECK_PARTS = (
    ("backbone.fpn.inner_blocks.", "backbone.fpn.layer_blocks."),
    ("backbone.fpn.down_blocks.", "backbone.fpn.fuse_blocks."),
    ("backbone.fpn.lateral_blocks.", "backbone.fpn.passes."),
)
# Tensors whose shape depends on the number of classes.
_CLASS_TENSORS = ("roi_heads.box_predictor.", "roi_heads.mask_predictor.mask_fcn_logits.")


@dataclass(frozen=True, kw_only=True)
class FineTuning:
    """Tensors that `finetuning_tensors` did not use from the weights."""

    source: str
    classes: str  # comparison of the classes; empty for a backbone
    keypoints: str = ""  # comparison of the keypoints; empty unless both have some
    channels: str = ""  # how RGB weights were adapted to other channels; empty if channels are equal
    reset: tuple[str, ...] = ()  # tensors initialised randomly because classes or keypoints differ
    added: tuple[str, ...] = ()  # tensors initialised randomly because the weights do not have them
    dropped: tuple[str, ...] = ()  # tensors that the model does not have

    def lines(self) -> list[str]:
        """Summary for the user, one line per kind."""
        lines = [
            "; ".join(
                part for part in (f"starting from {self.source}", self.classes, self.keypoints, self.channels) if part
            )
        ]
        if self.reset:
            lines.append(f"starting anew: {', '.join(self.reset)}")
        if self.added:
            lines.append(f"not in these weights, starting anew: {_parts(self.added)}")
        if self.dropped:
            lines.append(f"not in this model, left out: {_parts(self.dropped)}")
        return lines


def finetuning_tensors(model: MaskRCNN, weights: StartingWeights) -> tuple[dict[str, Tensor], FineTuning]:
    """Adapt pretrained weights to a model with other classes or parts.

    The following keep the model's initial values: tensors whose shape depends on the number of classes or keypoints,
    unless these are the same; a mask head, keypoint head or neck part missing from the weights; with a classifier's
    weights, everything except the backbone. Parts missing from the model are dropped. All other tensors are passed to
    `load_weights`, which rejects those that do not fit.

    Returns:
        the tensors for `load_weights`, and a summary.
    """
    own, tensors = model.state_dict(), dict(weights.tensors)
    same, classes = _compare_classes(weights, model.config)
    same_keypoints, keypoints = _compare_keypoints(weights, model.config)
    others = (*(() if same else _CLASS_TENSORS), *(() if same_keypoints else (HEAT_MAPS,)))
    reset = [name for name in own if name.startswith(others) and name in tensors]
    channels = _inflate(tensors, own)
    added, dropped = _other_parts(own, tensors)
    for name in dropped:
        del tensors[name]
    tensors |= {name: own[name] for name in (*reset, *added)}
    check_shapes(model.config, tensors, weights.source)
    return tensors, FineTuning(
        source=weights.source,
        classes=classes,
        channels=channels,
        keypoints=keypoints,
        reset=tuple(reset),
        added=tuple(added),
        dropped=tuple(dropped),
    )


def _inflate(tensors: dict[str, Tensor], own: dict[str, Tensor]) -> str:
    """Adapt the first convolution of RGB weights to the model's input channels, in place; see `inflated`."""
    for name in FIRST_CONVOLUTIONS:
        if name in tensors and name in own and tensors[name].shape[1] != own[name].shape[1] and own[name].dim() == 4:
            given, channels = tensors[name].shape[1], own[name].shape[1]
            if given != 3:
                break  # the meaning of the channels is unknown; `load_weights` reports the shapes
            tensors[name] = inflated(tensors[name], channels)
            return f"their first convolution reads RGB and is adapted to {channels} channels"
    return ""


def _compare_classes(weights: StartingWeights, config: ModelConfig) -> tuple[bool, str]:
    """Whether label k means the same in both, and why."""
    count, names = weights.class_count, weights.class_names
    if weights.is_backbone:
        return True, ""
    if count != config.num_classes:
        return False, f"they know {count} classes, this model {config.num_classes}"
    if names is None:
        return True, f"their {count} classes have no names and are assumed to be this model's"
    for label, (theirs, ours) in enumerate(zip(names, config.class_names, strict=True), start=1):
        if theirs != ours:
            return False, f"they know other classes: label {label} is {theirs!r} to them and {ours!r} here"
    return True, f"they know the same {count} classes"


def _compare_keypoints(weights: StartingWeights, config: ModelConfig) -> tuple[bool, str]:
    """Whether keypoint k means the same in both (if both have keypoints), and why."""
    count, names, ours = weights.keypoint_count, weights.keypoint_names, config.keypoint_names
    if not count or not config.has_keypoints:
        return True, ""
    if count != len(ours):
        return False, f"they find {count} keypoints, this model {len(ours)}"
    if names is None:
        return True, f"their {count} keypoints have no names and are assumed to be this model's"
    if names != ours:
        theirs, own = next(pair for pair in zip(names, ours, strict=True) if pair[0] != pair[1])
        return False, f"they find other keypoints: one is {theirs!r} to them and {own!r} here"
    return True, f"they find the same {count} keypoints"


def _other_parts(own: Iterable[str], given: Iterable[str]) -> tuple[list[str], list[str]]:
    """Tensors of parts that only the model has, and of parts that only the weights have."""
    own, given = list(own), list(given)
    if all(name.startswith(BODY) for name in given):
        return [name for name in own if not name.startswith(BODY)], []
    added, dropped = [], []
    # Weights without any neck are incomplete; `load_weights` reports them.
    for part in (_MASK_HEAD, _KEYPOINT_HEAD, *(_NECK_PARTS if any(name.startswith(_NECK) for name in given) else ())):
        ours, theirs = ([name for name in names if name.startswith(part)] for names in (own, given))
        added += [] if theirs else ours
        dropped += [] if ours else theirs
    return added, dropped


def _parts(names: Iterable[str]) -> str:
    """Tensors counted by module: "rpn.head (6 tensors), …"."""
    counts = Counter(".".join(name.split(".")[:2]) for name in names)
    return ", ".join(f"{part} ({count} tensors)" for part, count in counts.items())

"""What a model of other classes, keypoints or parts takes of weights to start from, and what starts anew."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

from maskrcnn.config import ModelConfig
from maskrcnn.model.detector import MaskRCNN
from maskrcnn.weights.torchvision import BODY, HEAT_MAPS, StartingWeights

_MASK_HEAD = "roi_heads.mask_"
_KEYPOINT_HEAD = "roi_heads.keypoint_"
_NECK = "backbone.fpn."
# Parts that a neck has as a whole or not at all: FPN, PANet's second path beside it, BiFPN.
_OF_NECKS = (
    ("backbone.fpn.inner_blocks.", "backbone.fpn.layer_blocks."),
    ("backbone.fpn.down_blocks.", "backbone.fpn.fuse_blocks."),
    ("backbone.fpn.lateral_blocks.", "backbone.fpn.passes."),
)
# The tensors whose shape depends on the number of classes, and on that of keypoints.
_OF_CLASSES = ("roi_heads.box_predictor.", "roi_heads.mask_predictor.mask_fcn_logits.")
OF_KEYPOINTS = HEAT_MAPS


@dataclass(frozen=True, kw_only=True)
class _FineTuning:
    """What `finetuning_tensors` did not take from the weights."""

    source: str
    classes: str  # what became of what was learnt about classes, and why; empty for a backbone alone
    keypoints: str = ""  # likewise of keypoints; empty unless both have them
    reset: tuple[str, ...] = ()  # tensors that depend on classes or keypoints, and start anew because those are others
    added: tuple[str, ...] = ()  # tensors that the weights do not have, and that start anew
    dropped: tuple[str, ...] = ()  # tensors that the model does not have

    def lines(self) -> list[str]:
        """The same as lines for a user."""
        told = ["; ".join(part for part in (f"starting from {self.source}", self.classes, self.keypoints) if part)]
        if self.reset:
            told.append(f"starting anew: {', '.join(self.reset)}")
        if self.added:
            told.append(f"not in these weights, starting anew: {_parts(self.added)}")
        if self.dropped:
            told.append(f"not in this model, left out: {_parts(self.dropped)}")
        return told


def finetuning_tensors(model: MaskRCNN, weights: StartingWeights) -> tuple[dict[str, Tensor], _FineTuning]:
    """Weights made to fit a model of other classes, or of other parts.

    What keeps the model's present values: the tensors whose shape depends on the number of classes, unless the
    classes are the same, and on the number of keypoints, unless those are; a mask or keypoint head or a neck's part
    that the weights do not have; with a classifier's weights all but the backbone. Left out are such parts that the
    model does not have. The rest goes as it is to `load_weights`, which refuses what does not fit.

    Returns:
        the tensors for `load_weights`, and what was done to them.
    """
    own, tensors = model.state_dict(), dict(weights.tensors)
    same, classes = _compare_classes(weights, model.config)
    same_keypoints, keypoints = _compare_keypoints(weights, model.config)
    others = (*(() if same else _OF_CLASSES), *(() if same_keypoints else (OF_KEYPOINTS,)))
    reset = [name for name in own if name.startswith(others) and name in tensors]
    added, dropped = _other_parts(own, tensors)
    for name in dropped:
        del tensors[name]
    return tensors | {name: own[name] for name in (*reset, *added)}, _FineTuning(
        source=weights.source,
        classes=classes,
        keypoints=keypoints,
        reset=tuple(reset),
        added=tuple(added),
        dropped=tuple(dropped),
    )


def _compare_classes(weights: StartingWeights, config: ModelConfig) -> tuple[bool, str]:
    """Whether label k means the same to both, and the reason in words."""
    count, names = weights.class_count, weights.class_names
    if weights.is_backbone:
        return True, ""
    if count != config.num_classes:
        return False, f"they know {count} classes, this model {config.num_classes}"
    if names is None:
        return True, f"their {count} classes have no names and are taken for this model's"
    for label, (theirs, ours) in enumerate(zip(names, config.class_names, strict=True), start=1):
        if theirs != ours:
            return False, f"they know other classes: label {label} is {theirs!r} to them and {ours!r} here"
    return True, f"they know the same {count} classes"


def _compare_keypoints(weights: StartingWeights, config: ModelConfig) -> tuple[bool, str]:
    """Whether keypoint k means the same to both, where both have any, and the reason in words."""
    count, names, ours = weights.keypoint_count, weights.keypoint_names, config.keypoint_names
    if not count or not config.has_keypoints:
        return True, ""
    if count != len(ours):
        return False, f"they find {count} keypoints, this model {len(ours)}"
    if names is None:
        return True, f"their {count} keypoints have no names and are taken for this model's"
    if names != ours:
        theirs, own = next(pair for pair in zip(names, ours, strict=True) if pair[0] != pair[1])
        return False, f"they find other keypoints: one is {theirs!r} to them and {own!r} here"
    return True, f"they find the same {count} keypoints"


def _other_parts(own: Iterable[str], given: Iterable[str]) -> tuple[list[str], list[str]]:
    """The model's tensors of parts that the weights lack altogether, and the other way round."""
    own, given = list(own), list(given)
    if all(name.startswith(BODY) for name in given):
        return [name for name in own if not name.startswith(BODY)], []
    added, dropped = [], []
    # Weights without any neck are a file with something missing.
    for part in (_MASK_HEAD, _KEYPOINT_HEAD, *(_OF_NECKS if any(name.startswith(_NECK) for name in given) else ())):
        ours, theirs = ([name for name in names if name.startswith(part)] for names in (own, given))
        added += [] if theirs else ours
        dropped += [] if ours else theirs
    return added, dropped


def _parts(names: Iterable[str]) -> str:
    """Tensors by module: "rpn.head (6 tensors), …"."""
    counts = Counter(".".join(name.split(".")[:2]) for name in names)
    return ", ".join(f"{part} ({count} tensors)" for part, count in counts.items())

"""The models of the export matrix: every architecture, with random weights that tell the kinds of images apart.

Calibrated random weights (`random_weights`) find about as many objects in an even grey image as in a crowded one.
Here the background's row of the last layer is fitted, by least squares on what the layer sees of other images of
each kind, so that even grey is background, drawn shapes give some detections and crowds fill the output.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import statistics
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from matrix_cells import Kind, picture
from random_weights import calibrated_state_dict
from torch import Tensor

from maskrcnn.checkpoint import load_weights
from maskrcnn.config import MODELS, NECKS, POOL_METHODS, ModelConfig, model_config
from maskrcnn.detectron2 import CONVENTIONS
from maskrcnn.errors import UserError
from maskrcnn.model.detector import MaskRCNN

# What may stand after a model's name and a colon, several of them with "+" between.
VARIANTS: dict[str, dict[str, Any]] = {
    "detectron2": CONVENTIONS,
    **{neck: {"neck": neck} for neck in NECKS},
    **{method: {"pool_method": method} for method in POOL_METHODS},
}
CLASSES = 90  # COCO's count of labels, as torchvision's weights have
_CALIBRATION_IMAGES = 4
_CALIBRATION_SIZE_HW = (320, 416)
_OTHER_IMAGES = 1000  # index from which on pictures are used for fitting: the matrix has the ones before
_FITTED_SIZES = 3  # the smallest: the others take longer
_RIDGE = 1e-1  # of the mean square of a feature
_CLASS_GAIN = 2.0  # how much the classes' logits are spread, so that some scores are high
_STRENGTH = 5.0  # logits of background between an ordinary and a grey image, and a crowded and an ordinary one


def variant_config(variant: str) -> ModelConfig:
    """The configuration of a model's name, which may end in variants, as `:detectron2` or `:panet+crop`.

    Raises:
        UserError: for a name that is not in `maskrcnn.config.MODELS`, and a variant that there is not.
    """
    name, changes = _parsed(variant)
    return model_config(
        name,
        class_names=tuple(f"class_{label}" for label in range(1, CLASSES + 1)),
        category_ids=tuple(range(1, CLASSES + 1)),
        **changes,
    )


def _parsed(variant: str) -> tuple[str, dict[str, Any]]:
    """A model's name and the fields that its variants change."""
    name, _, endings = variant.partition(":")
    chosen = endings.split("+") if endings else []
    if name not in MODELS or not set(chosen) <= VARIANTS.keys():
        expected = f"one of {', '.join(MODELS)}, perhaps with :{', :'.join(VARIANTS)}"
        raise UserError(f"model {variant!r}", expected, "name one")
    return name, {field: value for ending in chosen for field, value in VARIANTS[ending].items()}


def matrix_model(variant: str, sizes_hw: Sequence[tuple[int, int]], proposals: int | None = None) -> MaskRCNN:
    """A model of the matrix with its weights, which are the same every time.

    Args:
        variant: as `variant_config` takes it.
        sizes_hw: of the images that it is to see; the smaller ones are fitted to.
        proposals: per image, by default the model's own number.
    """
    config = variant_config(variant)
    config = dataclasses.replace(config, proposals=proposals or config.proposals)
    images = [picture(Kind.ORDINARY, _CALIBRATION_SIZE_HW, _OTHER_IMAGES + k) for k in range(_CALIBRATION_IMAGES)]
    short, long = min(_CALIBRATION_SIZE_HW), max(_CALIBRATION_SIZE_HW)
    # torchvision's model is what is calibrated: it has no other conventions, but the same tensors, given the neck.
    weights = calibrated_state_dict(
        config.name, CLASSES + 1, images, 0, min_size_px=short, max_size_px=long, neck=config.neck
    )
    model = MaskRCNN(config)
    load_weights(model, for_pixels_of(config, weights), "calibrated weights")
    tell_kinds_apart(model.eval(), sorted(sizes_hw, key=math.prod)[:_FITTED_SIZES])
    return model


def for_pixels_of(config: ModelConfig, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights of a model with the default preprocessing for one that divides pixels by other deviations."""
    name = "backbone.body.conv1.weight"
    factor = torch.tensor(config.preprocessing.std) / torch.tensor(ModelConfig().preprocessing.std)
    return weights | {name: weights[name] * factor.view(1, 3, 1, 1)}


@torch.no_grad()
def tell_kinds_apart(model: MaskRCNN, sizes_hw: Sequence[tuple[int, int]], images: int = 1) -> None:
    """Fits the background's logit: high in even grey images, low in crowded ones, in between in ordinary ones.

    Args:
        model: whose last layer of the box head is changed in place.
        sizes_hw: of the images it is fitted on.
        images: so many of each kind and size.
    """
    target = {Kind.EMPTY: 1.0, Kind.ORDINARY: 0.0, Kind.CROWDED: -1.0}
    fitted, others = ([_OTHER_IMAGES + 2 * k + part for k in range(images)] for part in (0, 1))
    seen = [(kind, rows) for kind in Kind for rows in _embeddings(model, kind, sizes_hw, fitted)]
    inputs = torch.cat([rows for _, rows in seen]).double()
    wanted = torch.cat([torch.full((len(rows),), target[kind]) for kind, rows in seen]).double()
    mean, level = inputs.mean(dim=0), wanted.mean()
    moved = inputs - mean
    square = moved.T @ moved
    square.diagonal().add_(_RIDGE * square.diagonal().mean())
    row = torch.linalg.solve(square, moved.T @ (wanted - level))
    layer = model.roi_heads.box_predictor.cls_score
    layer.weight[1:] *= _CLASS_GAIN
    layer.bias[1:] *= _CLASS_GAIN
    layer.weight[0] = _STRENGTH * row
    layer.bias[0] = _STRENGTH * (level - mean @ row)
    fresh = _embeddings(model, Kind.ORDINARY, sizes_hw, others)  # those that were fitted are told apart too well
    layer.bias[0] += _shift([layer(rows) for rows in fresh], model.config)


def _embeddings(
    model: MaskRCNN, kind: Kind, sizes_hw: Sequence[tuple[int, int]], indices: Sequence[int]
) -> Iterator[Tensor]:
    """What the last layer of the box head sees of each image's proposals, `[R, C]`."""
    caught: list[Tensor] = []
    hook = model.roi_heads.box_predictor.register_forward_pre_hook(lambda _, inputs: caught.append(inputs[0]))
    try:
        for size, index in itertools.product(sizes_hw, indices):
            image = torch.from_numpy(picture(kind, size, index).transpose(2, 0, 1)[None].copy()).float()
            stages: dict[str, Tensor] = {}
            model(image, torch.tensor([size]), stages)
            yield caught.pop()[stages["proposals"][0].any(dim=1)]  # rows of zeros are no proposals
    finally:
        hook.remove()


def _shift(logits: Sequence[Tensor], config: ModelConfig) -> float:
    """What to add to background so that the median image has as many scores as the output has rows.

    Some of them are then suppressed, and the output is not full.

    Args:
        logits: `[R, 1 + classes]` of each image.
        config: for the score threshold and the rows of the output.
    """
    low, high = -40.0, 40.0
    for _ in range(30):
        middle = (low + high) / 2
        shifted = [rows + torch.tensor([middle] + [0.0] * config.num_classes) for rows in logits]
        passing = [int((rows.softmax(dim=1)[:, 1:] > config.score_threshold).sum()) for rows in shifted]
        low, high = (middle, high) if statistics.median(passing) > config.detections else (low, middle)
    return high

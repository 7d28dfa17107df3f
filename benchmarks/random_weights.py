"""Random weights whose detections are worth comparing.

A network as it is initialised says nothing: its features grow from layer to layer until every score is 1.0.
Here one forward pass over a few images sets each layer in turn to outputs of known mean and spread, so that
scores are distinct, several classes appear, and an image gets tens of detections. Two implementations of the
model can then be compared on weights that anybody can make again from a seed.

A random deep network is also chaotic: each residual block multiplies rounding errors, until bfloat16 changes
the last features by half of their spread. Trained networks do not, as their blocks change their input little.
So the random blocks' branches are scaled down too, after which the change is some 6 %.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Sequence
from contextlib import ExitStack

import numpy as np
import torch
import torchvision
from peers import torchvision_from_config
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.resnet import BasicBlock, Bottleneck

from maskrcnn.config import model_config
from maskrcnn.imaging.preprocess import Preprocessing

# Standard deviation of each layer's outputs, by the first pattern that its name matches.
_SPREADS = (
    (r"rpn\.head\.cls_logits", 1.5),
    (r"rpn\.head\.bbox_pred", 0.2),  # of anchor sides
    (r"roi_heads\.box_predictor\.cls_score", 1.0),
    (r"roi_heads\.box_predictor\.bbox_pred", 1.0),  # of a tenth and a fifth of a proposal's sides
    (r"roi_heads\.mask_predictor\.mask_fcn_logits", 3.0),
    (r"backbone\.fpn|rpn\.head|roi_heads", 1.0),
)
_BRANCH_SCALE = 0.25  # of what a residual block adds to its input
_SCORE_THRESHOLD = 0.05
_PAIRS_PER_IMAGE = 100  # wanted (proposal, class) pairs above the threshold; suppression leaves tens


def torchvision_model(
    model_name: str, num_classes: int, *, min_size_px: int = 800, max_size_px: int = 1333, neck: str = "fpn"
) -> FasterRCNN:
    """torchvision's model of this name with new random weights, in evaluation mode.

    Where torchvision has a builder of this name it builds the model, else our configuration says what it is.

    Args:
        model_name: one of `maskrcnn.config.MODELS`.
        num_classes: with background, as torchvision counts.
        min_size_px, max_size_px: of torchvision's resizing.
        neck: one of `maskrcnn.config.NECKS`, of which torchvision has the first.
    """
    if neck == "fpn" and model_name in torchvision.models.list_models(module=torchvision.models.detection):
        build = torchvision.models.get_model_builder(model_name)
        sizes = {"min_size": min_size_px, "max_size": max_size_px}
        return build(weights=None, weights_backbone=None, num_classes=num_classes, **sizes).eval()
    config = model_config(
        model_name,
        class_names=tuple(f"class_{label}" for label in range(1, num_classes)),
        preprocessing=Preprocessing(min_size_px=min_size_px, max_size_px=max_size_px),
        neck=neck,
    )
    return torchvision_from_config(config)


def calibrated_state_dict(
    model_name: str,
    num_classes: int,
    images: Sequence[np.ndarray],
    seed: int,
    *,
    min_size_px: int = 800,
    max_size_px: int = 1333,
    neck: str = "fpn",
) -> dict[str, Tensor]:
    """A random state dict with sensible detections on images like those given.

    Args:
        model_name: one of `maskrcnn.config.MODELS`.
        num_classes: with background.
        images: uint8 `[H, W, 3]` RGB; they should differ, as the images do that are compared; eight are enough.
        seed: decides the weights.
        min_size_px, max_size_px: the size at which the model is to be used.
        neck: as for `torchvision_model`.
    """
    sizes = {"min_size_px": min_size_px, "max_size_px": max_size_px}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = torchvision_model(model_name, num_classes, **sizes, neck=neck)
    calibrate(model, images)
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


@torch.no_grad()
def calibrate(model: FasterRCNN, images: Sequence[np.ndarray]) -> None:
    """Sets a torchvision model's batch-norm statistics and head layers from images, in one forward pass."""
    model.eval()
    for module in model.modules():
        if isinstance(module, BasicBlock | Bottleneck):
            last = module.bn2 if isinstance(module, BasicBlock) else module.bn3
            last.weight.fill_(_BRANCH_SCALE)
    pixels = [torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255 for image in images]
    with ExitStack() as hooks:
        for name, module in model.named_modules():
            if isinstance(module, nn.BatchNorm2d):
                _measure_in_next_pass(module)
            spread = _spread_of(name, module)
            if spread is not None:
                hooks.enter_context(_standardise_in_next_pass(module, spread))
        batch, _ = model.transform(pixels)
        features = model.backbone(batch.tensors)
        proposals, _ = model.rpn(batch, features)
        heads, sizes = model.roi_heads, batch.image_sizes
        embedded = heads.box_head(heads.box_roi_pool(features, proposals, sizes))
        _ignore_image_means(heads.box_predictor.cls_score, embedded.split([len(x) for x in proposals]))
        logits, deltas = heads.box_predictor(embedded)
        shift = _background_shift(logits, [len(rows) for rows in proposals])
        heads.box_predictor.cls_score.bias[0] += shift
        logits[:, 0] += shift
        boxes, _, _ = heads.postprocess_detections(logits, deltas, proposals, sizes)
        if heads.has_mask():
            heads.mask_predictor(heads.mask_head(heads.mask_roi_pool(features, boxes, sizes)))
        if heads.has_keypoint():
            heads.keypoint_predictor(heads.keypoint_head(heads.keypoint_roi_pool(features, boxes, sizes)))
    model.eval()


def _spread_of(name: str, module: nn.Module) -> float | None:
    """The standard deviation wanted of a layer's outputs; None for layers that batch norm takes care of."""
    if not isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.Linear) or module.bias is None:
        return None  # torchvision's convolutions before batch norm have no bias
    return next((spread for pattern, spread in _SPREADS if re.match(pattern, name)), None)


def _measure_in_next_pass(norm: nn.BatchNorm2d) -> None:
    norm.reset_running_stats()
    norm.momentum = None  # average over passes, instead of a decaying one
    norm.train()


def _standardise_in_next_pass(layer: nn.Module, spread: float) -> torch.utils.hooks.RemovableHandle:
    """Rescales a layer at its first call, so that each channel has mean 0 and the given deviation."""
    done = False

    def hook(layer: nn.Module, _inputs: tuple, outputs: Tensor) -> Tensor | None:
        nonlocal done
        if done:  # the RPN's head is called once for each level; the first has by far the most positions
            return None
        done = True
        others = [axis for axis in range(outputs.dim()) if axis != 1]
        deviation, mean = torch.std_mean(outputs, dim=others)
        factor = spread / deviation.clamp(min=1e-6)
        channel = 1 if isinstance(layer, nn.ConvTranspose2d) else 0
        layer.weight *= factor.view([-1 if axis == channel else 1 for axis in range(layer.weight.dim())])
        offset = -mean * factor
        layer.bias.mul_(factor).add_(offset)
        shape = [1, -1] + [1] * (outputs.dim() - 2)
        return outputs * factor.view(shape) + offset.view(shape)

    return layer.register_forward_hook(hook)


def _ignore_image_means(classifier: nn.Linear, embedded: Sequence[Tensor]) -> None:
    """Makes a classifier blind to the directions in which images differ as wholes.

    What a random network sees differs more between images than inside one; without this one image would get
    all the detections and the next none.
    """
    means = torch.stack([rows.mean(dim=0) for rows in embedded])
    directions = torch.linalg.svd(means - means.mean(dim=0), full_matrices=False).Vh[: len(means) - 1]
    classifier.weight -= classifier.weight @ directions.T @ directions


def _background_shift(logits: Tensor, counts: Sequence[int]) -> float:
    """What to add to the background's logit so that the median image gets the wanted number of scores.

    Args:
        logits: `[K, 1 + C]`, the background's first, of all images' proposals.
        counts: proposals of each image.
    """
    low, high = -40.0, 40.0
    shifted = logits.clone()
    for _ in range(40):
        middle = (low + high) / 2
        shifted[:, 0] = logits[:, 0] + middle
        passing = (shifted.softmax(dim=1)[:, 1:] > _SCORE_THRESHOLD).sum(dim=1)
        typical = statistics.median(int(image.sum()) for image in passing.split(list(counts)))
        low, high = (middle, high) if typical > _PAIRS_PER_IMAGE else (low, middle)
    return high

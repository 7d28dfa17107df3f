"""torchvision's detectors for comparison: built from our configuration, with calibrated random weights, as detectors.

    python benchmarks/peers.py torchvision.onnx

writes torchvision's legacy export with random weights, for example for `maskrcnn lint torchvision.onnx`.

Calibrated weights. With the usual initialisation, features grow from layer to layer until every score is 1.0. Here one
forward pass over a few images scales each layer in turn to outputs of known mean and standard deviation, so that scores
are distinct, several classes appear, and an image has tens of detections. Two implementations of the model can then be
compared on weights that are reproducible from a seed.

A random deep network is also chaotic: each residual block amplifies rounding errors, until bfloat16 changes the last
features by half of their standard deviation. The blocks of trained networks change their input little, so the branches
of the random blocks are scaled down too, after which the change is about 6 %.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import re
import statistics
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from pycocotools import mask as mask_api
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN, MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.keypoint_rcnn import KeypointRCNNHeads, KeypointRCNNPredictor
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.rpn import RPNHead
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.ops import FrozenBatchNorm2d, MultiScaleRoIAlign

from maskrcnn.config import LossConfig, ModelConfig, model_config
from maskrcnn.data.images import ImageNotes
from maskrcnn.errors import UserError, missing_library, report_errors
from maskrcnn.files import atomic_path
from maskrcnn.imaging.postprocess import Detections
from maskrcnn.imaging.preprocess import Preprocessing, resized_size
from maskrcnn.metadata import ModelMetadata
from maskrcnn.model.backbone import RESNET_STAGES, Backbone

_LEGACY_OPSET = 17
# Settings of ours that torchvision's models do not have; Detectron2's conventions differ in them.
_MODEL_CONVENTIONS = (
    "stride_in_1x1",
    "anchors_rounded",
    "anchor_strides_px",
    "pool_method",
    "pool_aligned",
    "proposal_min_side_px",
    "detection_min_side_px",
)
_PIXEL_CONVENTIONS = ("divisor", "channel_order", "resize")
# Standard deviation of each layer's outputs, by the first pattern that matches its name.
_SPREADS = (
    (r"rpn\.head\.cls_logits", 1.5),
    (r"rpn\.head\.bbox_pred", 0.2),  # of anchor sides
    (r"roi_heads\.box_predictor\.cls_score", 1.0),
    (r"roi_heads\.box_predictor\.bbox_pred", 1.0),  # of a tenth and a fifth of a proposal's sides
    (r"roi_heads\.mask_predictor\.mask_fcn_logits", 3.0),
    (r"backbone\.fpn|rpn\.head|roi_heads", 1.0),
)
_BRANCH_SCALE = 0.25  # of the branches of residual blocks
_SCORE_THRESHOLD = 0.05
_PAIRS_PER_IMAGE = 100  # (proposal, class) pairs above the threshold; NMS keeps tens of them


def torchvision_from_config(config: ModelConfig, loss: LossConfig | None = None) -> FasterRCNN:
    """Build torchvision's Mask R-CNN or Faster R-CNN from our configuration, with random weights, in evaluation mode.

    With keypoints it also has the heads of torchvision's Keypoint R-CNN.

    Args:
        config: our model's configuration.
        loss: matching and sampling in training (default: as torchvision's models).

    Raises:
        UserError: for settings that torchvision's models do not have.
    """
    _check_conventions(config)
    levels, ratio = [str(level) for level in range(len(config.strides_px))], config.pool_sampling_ratio
    ratios, loss = config.anchor_aspect_ratios, loss or LossConfig()
    model = (MaskRCNN if config.has_masks else FasterRCNN)(
        _backbone(config),
        min_size=config.preprocessing.min_size_px,
        max_size=config.preprocessing.max_size_px,
        image_mean=list(config.preprocessing.mean),
        image_std=list(config.preprocessing.std),
        rpn_anchor_generator=AnchorGenerator(
            tuple((size,) for size in config.anchor_sizes_px), (ratios,) * len(config.anchor_sizes_px)
        ),
        rpn_head=RPNHead(config.fpn_channels, len(ratios), conv_depth=config.rpn_convolutions),
        rpn_pre_nms_top_n_train=config.rpn_candidates_per_level_training,
        rpn_pre_nms_top_n_test=config.rpn_candidates_per_level,
        rpn_post_nms_top_n_train=config.proposals_training,
        rpn_post_nms_top_n_test=config.proposals,
        rpn_nms_thresh=config.rpn_nms_iou,
        rpn_fg_iou_thresh=loss.rpn_foreground_iou,
        rpn_bg_iou_thresh=loss.rpn_background_iou,
        rpn_batch_size_per_image=loss.rpn_samples,
        rpn_positive_fraction=loss.rpn_positive_fraction,
        box_roi_pool=MultiScaleRoIAlign(levels, config.box_pool_size, ratio),
        box_head=_box_head(config),
        box_predictor=FastRCNNPredictor(config.box_head_channels, config.num_classes + 1),
        box_score_thresh=config.score_threshold,
        box_nms_thresh=config.nms_iou,
        box_detections_per_img=config.detections,
        box_fg_iou_thresh=loss.box_foreground_iou,
        box_bg_iou_thresh=loss.box_foreground_iou,
        box_batch_size_per_image=loss.box_samples,
        box_positive_fraction=loss.box_positive_fraction,
        **(_mask_parts(config, levels, ratio) if config.has_masks else {}),
    )
    if config.has_keypoints:
        for name, part in _keypoint_parts(config, levels, ratio).items():
            setattr(model.roi_heads, name, part)
    return model.eval()


def _check_conventions(config: ModelConfig) -> None:
    values = [(name, config, ModelConfig()) for name in _MODEL_CONVENTIONS]
    values += [(name, config.preprocessing, Preprocessing()) for name in _PIXEL_CONVENTIONS]
    different = [(name, getattr(ours, name), getattr(plain, name)) for name, ours, plain in values]
    different = [(name, ours, theirs) for name, ours, theirs in different if ours != theirs]
    if different:
        raise UserError(
            f"{config.name} with " + ", ".join(f"{name}={ours!r}" for name, ours, _ in different),
            ", ".join(f"{name}={theirs!r}" for name, _, theirs in different) + ", as torchvision's models have it",
            "compare without torchvision",
        )


def _box_head(config: ModelConfig) -> nn.Module:
    channels, side = config.fpn_channels, config.box_pool_size
    if not config.box_head_convolutions:
        return TwoMLPHead(channels * side**2, config.box_head_channels)
    return FastRCNNConvFCHead(
        (channels, side, side), list(config.box_head_convolutions), [config.box_head_channels], nn.BatchNorm2d
    )


def _mask_parts(config: ModelConfig, levels: list[str], ratio: int) -> dict[str, nn.Module]:
    norm, last = nn.BatchNorm2d if config.head_batch_norm else None, config.mask_head_channels[-1]
    return {
        "mask_roi_pool": MultiScaleRoIAlign(levels, config.mask_pool_size, ratio),
        "mask_head": MaskRCNNHeads(config.fpn_channels, config.mask_head_channels, 1, norm),
        "mask_predictor": MaskRCNNPredictor(last, last, config.num_classes + 1),
    }


def _keypoint_parts(config: ModelConfig, levels: list[str], ratio: int) -> dict[str, nn.Module]:
    channels = config.keypoint_head_channels
    return {
        "keypoint_roi_pool": MultiScaleRoIAlign(levels, config.keypoint_pool_size, ratio),
        "keypoint_head": KeypointRCNNHeads(config.fpn_channels, channels),
        "keypoint_predictor": KeypointRCNNPredictor(channels[-1], len(config.keypoint_names)),
    }


def _backbone(config: ModelConfig) -> nn.Module:
    """torchvision's ResNets with FPN; for other backbones and necks our own backbone."""
    if config.neck != "fpn" or "resne" not in config.backbone:
        return Backbone(config)
    norm = partial(FrozenBatchNorm2d if config.frozen_batch_norm else nn.BatchNorm2d, eps=config.batch_norm_epsilon)
    body = torchvision.models.get_model(config.backbone, weights=None, norm_layer=norm)
    first = body.inplanes // 8
    backbone = BackboneWithFPN(
        body,
        {f"layer{stage + 1}": str(stage) for stage in range(4)},
        [first * 2**stage for stage in range(4)],
        config.fpn_channels,
        norm_layer=nn.BatchNorm2d if config.head_batch_norm else None,
    )
    backbone.stages = RESNET_STAGES  # `freeze_stages` reads it
    return backbone


@dataclass(frozen=True, eq=False)
class _PastedDetections(Detections):
    """Detections with masks already pasted into the image by torchvision."""

    pasted: np.ndarray = field(kw_only=True)  # [D, H, W] bool

    @property
    def has_masks(self) -> bool:
        """True: models without masks return plain `Detections`."""
        return True

    def full_masks(self, threshold: float = 0.5) -> np.ndarray:
        """Return the pasted masks `[D, H, W]`; they exist for the threshold 0.5 only."""
        return self.pasted

    def rles(self, threshold: float = 0.5) -> list[dict[str, Any]]:
        """Return the pasted masks as compressed COCO RLEs."""
        encoded = mask_api.encode(np.asfortranarray(self.pasted.transpose(1, 2, 0).astype(np.uint8)))
        return [{"size": list(rle["size"]), "counts": rle["counts"].decode("ascii")} for rle in encoded]


def _detections(found: Mapping[str, np.ndarray], size_hw: tuple[int, int]) -> Detections:
    values = {
        "boxes_xyxy_px": np.asarray(found["boxes"], np.float32).reshape(-1, 4),
        "scores": np.asarray(found["scores"], np.float32),
        "labels": np.asarray(found["labels"], np.int64),
        "masks": None,
        "size_hw": size_hw,
    }
    if "keypoints" in found:
        points, scores = (np.asarray(found[name], np.float32) for name in ("keypoints", "keypoints_scores"))
        values["keypoints"] = np.concatenate([points[..., :2], scores[..., None]], axis=-1)
    if "masks" not in found:
        return Detections(**values)
    return _PastedDetections(**values, pasted=np.asarray(found["masks"]).reshape(-1, *size_hw) > 0.5)


def _floats(image: np.ndarray) -> Tensor:
    """Image `[3, H, W]` float32 in [0, 1], the input of torchvision's models."""
    return torch.from_numpy(image).permute(2, 0, 1).float() / 255


class TorchvisionDetector:
    """torchvision's model in eager PyTorch.

    Args:
        model: from `torchvision_from_config`, with its weights loaded.
        metadata: metadata of our model.
    """

    def __init__(self, model: FasterRCNN, metadata: ModelMetadata) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model, self.metadata = model.eval().to(self.device), metadata
        self.preprocessing, self.notes = metadata.preprocessing, ImageNotes()

    def set_input_size(self, size_hw: tuple[int, int]) -> None:
        """Disable the resizing of images of this size."""
        self.model.transform.min_size, self.model.transform.max_size = (min(size_hw),), max(size_hw)

    def detect(self, images: list[np.ndarray]) -> list[Detections]:
        """See `maskrcnn.runtime.Detector.detect`."""
        with torch.inference_mode():
            found = self.model([_floats(image).to(self.device) for image in images])
        return [
            _detections({name: value.cpu().numpy() for name, value in one.items()}, image.shape[:2])
            for one, image in zip(found, images, strict=True)
        ]


class TorchvisionOnnxDetector:
    """A legacy export of torchvision's model in ONNX Runtime.

    Args:
        path: file written by `export_legacy`.
        metadata: metadata of our model.
    """

    def __init__(self, path: Path, metadata: ModelMetadata) -> None:
        try:
            import onnxruntime
        except ImportError as error:
            raise missing_library("onnxruntime", f"run {path}", "pip install onnxruntime-gpu") from error
        from maskrcnn.runtime.backends.onnxruntime import session_options, usable_providers

        self.session = onnxruntime.InferenceSession(str(path), session_options(), providers=usable_providers())
        self.metadata = metadata
        self.preprocessing, self.notes = metadata.preprocessing, ImageNotes()
        self._refused: str | None = None

    def set_input_size(self, size_hw: tuple[int, int]) -> None:
        """Refuse images of this size if the export would resize them: its resizing is fixed."""
        resized = resized_size(size_hw, self.metadata.preprocessing)
        is_same = resized == tuple(size_hw)
        self._refused = None if is_same else f"{size_hw[0]}×{size_hw[1]} to {resized[0]}×{resized[1]}"

    def detect(self, images: list[np.ndarray]) -> list[Detections]:
        """See `maskrcnn.runtime.Detector.detect`; one image only."""
        if self._refused:
            raise UserError(
                f"the legacy export would resize {self._refused}",
                "the image size it was exported for",
                "choose sizes with the same shorter side",
            )
        if len(images) != 1:
            raise UserError(
                f"{len(images)} images",
                "one image: the batch size of the legacy export is fixed",
                "run it image by image",
            )
        names = [output.name for output in self.session.get_outputs()]
        values = self.session.run(names, {"image": _floats(images[0]).numpy()})
        return [_detections(dict(zip(names, values, strict=True)), images[0].shape[:2])]


def export_legacy(model: FasterRCNN, example: np.ndarray, output: Path) -> None:
    """Export torchvision's model with PyTorch's tracing ONNX exporter; the image size is dynamic.

    Args:
        model: torchvision's model.
        example: uint8 `[H, W, 3]` image with detections, which is traced.
        output: file to write.
    """
    outputs = {name: {0: "detections"} for name in ("boxes", "labels", "scores")}
    if model.roi_heads.has_mask():
        outputs["masks"] = {0: "detections", 2: "height", 3: "width"}
    if model.roi_heads.has_keypoint():
        outputs |= {name: {0: "detections"} for name in ("keypoints", "keypoints_scores")}
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with (
            atomic_path(output) as draft,
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            torch.onnx.export(
                model.cpu().eval(),
                ([_floats(example)],),
                str(draft),
                dynamo=False,
                opset_version=_LEGACY_OPSET,
                input_names=["image"],
                output_names=list(outputs),
                dynamic_axes={"image": {1: "height", 2: "width"}, **outputs},
            )
    finally:
        logger.setLevel(level)


def torchvision_model(
    model_name: str, num_classes: int, *, min_size_px: int = 800, max_size_px: int = 1333, neck: str = "fpn"
) -> FasterRCNN:
    """Build a model with torchvision's builder of this name, or else from our configuration, with random weights.

    Args:
        model_name: one of `maskrcnn.config.MODELS`.
        num_classes: number of classes with background.
        min_size_px, max_size_px: image size of torchvision's resizing.
        neck: one of `maskrcnn.config.NECKS`; torchvision has "fpn" only.
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
    """Make a random state dict with plausible detections on images like those given.

    Args:
        model_name: one of `maskrcnn.config.MODELS`.
        num_classes: number of classes with background.
        images: uint8 `[H, W, 3]` RGB, as varied as the images to be compared; eight are enough.
        seed: random seed of the weights.
        min_size_px, max_size_px: image size at which the model will be used.
        neck: see `torchvision_model`.
    """
    sizes = {"min_size_px": min_size_px, "max_size_px": max_size_px}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = torchvision_model(model_name, num_classes, **sizes, neck=neck)
    calibrate(model, images)
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


@torch.no_grad()
def calibrate(model: FasterRCNN, images: Sequence[np.ndarray]) -> None:
    """Set a torchvision model's batch-norm statistics and head layers from images, in one forward pass."""
    model.eval()
    for module in model.modules():
        if isinstance(module, BasicBlock | Bottleneck):
            last = module.bn2 if isinstance(module, BasicBlock) else module.bn3
            last.weight.fill_(_BRANCH_SCALE)
    pixels = [torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255 for image in images]
    with contextlib.ExitStack() as hooks:
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
    """Target standard deviation of a layer's outputs; None for layers followed by batch norm."""
    if not isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.Linear) or module.bias is None:
        return None  # convolutions before batch norm have no bias
    return next((spread for pattern, spread in _SPREADS if re.match(pattern, name)), None)


def _measure_in_next_pass(norm: nn.BatchNorm2d) -> None:
    norm.reset_running_stats()
    norm.momentum = None  # cumulative instead of moving average
    norm.train()


def _standardise_in_next_pass(layer: nn.Module, spread: float) -> torch.utils.hooks.RemovableHandle:
    """Rescale a layer at its first call, so that each output channel has mean 0 and the given standard deviation."""
    done = False

    def hook(layer: nn.Module, _inputs: tuple, outputs: Tensor) -> Tensor | None:
        nonlocal done
        if done:  # the RPN's head is called once per level; the first has by far the most positions
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
    """Project out the directions in which the mean features of images differ.

    The features of a random network differ more between images than within one; otherwise one image would get all
    detections and the next none.
    """
    means = torch.stack([rows.mean(dim=0) for rows in embedded])
    directions = torch.linalg.svd(means - means.mean(dim=0), full_matrices=False).Vh[: len(means) - 1]
    classifier.weight -= classifier.weight @ directions.T @ directions


def _background_shift(logits: Tensor, counts: Sequence[int]) -> float:
    """Return the offset of the background logit at which the median image has `_PAIRS_PER_IMAGE` scores.

    Args:
        logits: `[K, 1 + C]` of all images' proposals, background first.
        counts: number of proposals per image.
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


def main(arguments: Sequence[str] | None = None) -> None:
    """Write torchvision's legacy export of a model with random weights."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("output", type=Path, help="ONNX file to write")
    parser.add_argument("--model", default="maskrcnn_resnet50_fpn", help="one of maskrcnn.config.MODELS")
    given = parser.parse_args(arguments)
    torch.manual_seed(0)
    model = torchvision_from_config(model_config(given.model, class_names=("thing",)))
    export_legacy(model, np.zeros((320, 320, 3), np.uint8), given.output)
    print(given.output)


if __name__ == "__main__":
    with report_errors():
        main()

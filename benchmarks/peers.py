"""torchvision's own detectors behind the interface of our Detector, so that both are measured alike.

    python benchmarks/peers.py torchvision.onnx

writes its legacy export of random weights, to look into: `maskrcnn lint torchvision.onnx`.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pycocotools import mask as mask_api
from torch import Tensor, nn
from torchvision.models import get_model
from torchvision.models.detection import FasterRCNN, MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.keypoint_rcnn import KeypointRCNNHeads, KeypointRCNNPredictor
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.rpn import RPNHead
from torchvision.ops import FrozenBatchNorm2d, MultiScaleRoIAlign

from maskrcnn.config import LossConfig, ModelConfig, model_config
from maskrcnn.errors import UserError, missing_library, told_to_the_user
from maskrcnn.files import atomic_path
from maskrcnn.imaging.postprocess import Detections
from maskrcnn.imaging.preprocess import Preprocessing, resized_size
from maskrcnn.metadata import ModelMetadata
from maskrcnn.model.backbone import RESNET_STAGES, Backbone

_LEGACY_OPSET = 17
# What torchvision's models cannot be told otherwise; Detectron2's conventions are others.
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


def torchvision_from_config(config: ModelConfig, loss: LossConfig | None = None) -> FasterRCNN:
    """torchvision's Mask R-CNN or Faster R-CNN of our configuration, with random weights, in evaluation mode.

    With keypoints either has the parts of torchvision's Keypoint R-CNN besides.

    Args:
        config: of our model.
        loss: how it trains; by default as torchvision's own models do.

    Raises:
        UserError: for what torchvision's models do not have.
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
    given = [(name, config, ModelConfig()) for name in _MODEL_CONVENTIONS]
    given += [(name, config.preprocessing, Preprocessing()) for name in _PIXEL_CONVENTIONS]
    other = [(name, getattr(ours, name), getattr(plain, name)) for name, ours, plain in given]
    other = [(name, value, wanted) for name, value, wanted in other if value != wanted]
    if other:
        raise UserError(
            f"{config.name} with " + ", ".join(f"{name}={value!r}" for name, value, _ in other),
            ", ".join(f"{name}={wanted!r}" for name, _, wanted in other) + ", as torchvision's models have it",
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
    """torchvision's where it has one, and ours around its classifiers for the others."""
    if config.neck != "fpn" or "resne" not in config.backbone:
        return Backbone(config)
    norm = partial(FrozenBatchNorm2d if config.frozen_batch_norm else nn.BatchNorm2d, eps=config.batch_norm_epsilon)
    body = get_model(config.backbone, weights=None, norm_layer=norm)
    first = body.inplanes // 8
    backbone = BackboneWithFPN(
        body,
        {f"layer{stage + 1}": str(stage) for stage in range(4)},
        [first * 2**stage for stage in range(4)],
        config.fpn_channels,
        norm_layer=nn.BatchNorm2d if config.head_batch_norm else None,
    )
    backbone.stages = RESNET_STAGES  # which our trainer freezes by
    return backbone


@dataclass(frozen=True, eq=False)
class _PastedDetections(Detections):
    """Detections whose masks torchvision has already pasted into the image."""

    pasted: np.ndarray = field(kw_only=True)  # [D, H, W] bool

    @property
    def has_masks(self) -> bool:
        """Always: models without masks give plain `Detections`."""
        return True

    def full_masks(self, threshold: float = 0.5) -> np.ndarray:
        """The pasted masks; only the threshold 0.5 is kept."""
        return self.pasted

    def rles(self, threshold: float = 0.5) -> list[dict[str, Any]]:
        """The same as COCO's compressed run lengths."""
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
    """`[3, H, W]` float32 in 0–1, as torchvision's models take images."""
    return torch.from_numpy(image).permute(2, 0, 1).float() / 255


class TorchvisionDetector:
    """torchvision's model in eager PyTorch.

    Args:
        model: from `torchvision_from_config`, with its weights loaded.
        metadata: of the same model of ours.
    """

    def __init__(self, model: FasterRCNN, metadata: ModelMetadata) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model, self.metadata = model.eval().to(self.device), metadata

    def take_size(self, size_hw: tuple[int, int]) -> None:
        """Lets images of this size through as they are."""
        self.model.transform.min_size, self.model.transform.max_size = (min(size_hw),), max(size_hw)

    def detect(self, images: list[np.ndarray]) -> list[Detections]:
        """As `maskrcnn.runtime.Detector.detect`."""
        with torch.inference_mode():
            found = self.model([_floats(image).to(self.device) for image in images])
        return [
            _detections({name: value.cpu().numpy() for name, value in one.items()}, image.shape[:2])
            for one, image in zip(found, images, strict=True)
        ]


class TorchvisionOnnxDetector:
    """A legacy export of torchvision's model in ONNX Runtime.

    Args:
        path: a file that `export_legacy` wrote.
        metadata: of the same model of ours.
    """

    def __init__(self, path: Path, metadata: ModelMetadata) -> None:
        try:
            import onnxruntime
        except ImportError as error:
            raise missing_library("onnxruntime", f"run {path}", "pip install onnxruntime-gpu") from error
        from maskrcnn.runtime.backends.onnxruntime import session_options, usable_providers

        self.session = onnxruntime.InferenceSession(str(path), session_options(), providers=usable_providers())
        self.metadata = metadata
        self._refused: str | None = None

    def take_size(self, size_hw: tuple[int, int]) -> None:
        """The export fixes how images are resized; those that it would resize are refused from now on."""
        made = resized_size(size_hw, self.metadata.preprocessing)
        self._refused = None if made == tuple(size_hw) else f"{size_hw[0]}×{size_hw[1]} to {made[0]}×{made[1]}"

    def detect(self, images: list[np.ndarray]) -> list[Detections]:
        """As `maskrcnn.runtime.Detector.detect`, of one image."""
        if self._refused:
            raise UserError(
                f"the legacy export would resize {self._refused}",
                "an image as it was exported for",
                "choose sizes with one shorter side",
            )
        if len(images) != 1:
            raise UserError(
                f"{len(images)} images",
                "one image: the legacy export fixes their number",
                "run it image by image",
            )
        names = [output.name for output in self.session.get_outputs()]
        values = self.session.run(names, {"image": _floats(images[0]).numpy()})
        return [_detections(dict(zip(names, values, strict=True)), images[0].shape[:2])]


def export_legacy(model: FasterRCNN, example: np.ndarray, output: Path) -> None:
    """Writes torchvision's model with PyTorch's older, tracing ONNX exporter; the image's size stays dynamic.

    Args:
        model: torchvision's, on the CPU.
        example: uint8 `[H, W, 3]`, with detections: the exporter traces what happens to it.
        output: the file to write.
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


def main(arguments: Sequence[str] | None = None) -> None:
    """Writes torchvision's legacy export of a model with random weights, for whoever wants to look into one."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("output", type=Path, help="ONNX file to write")
    parser.add_argument("--model", default="maskrcnn_resnet50_fpn", help="one of maskrcnn.config.MODELS")
    given = parser.parse_args(arguments)
    torch.manual_seed(0)
    model = torchvision_from_config(model_config(given.model, class_names=("thing",)))
    export_legacy(model, np.zeros((320, 320, 3), np.uint8), given.output)
    print(given.output)


if __name__ == "__main__":
    with told_to_the_user():
        main()

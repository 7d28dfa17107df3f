"""Simple implementation of mmdetection's Mask R-CNN with ResNet-50 and FPN: tensor names, and inference.

Written from the documentation of its layers and configuration, independently of the importer that is compared with it.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
import torchvision
from torch import Tensor
from torch.nn import functional as F

BLOCKS = (3, 4, 6, 3)
CONFIG_2 = """
img_norm_cfg = dict(
    mean=[103.53, 116.28, 123.675], std=[1.0, 1.0, 1.0], to_rgb=False)
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(
        type='MultiScaleFlipAug', img_scale=(128, 96), flip=False,
        transforms=[dict(type='Resize', keep_ratio=True), dict(type='Pad', size_divisor=32)])
]
model = dict(
    type='MaskRCNN',
    backbone=dict(type='ResNet', depth=50, style='caffe', norm_eval=True),
    neck=dict(type='FPN', num_outs=5),
    rpn_head=dict(
        type='RPNHead',
        anchor_generator=dict(
            type='AnchorGenerator', scales=[4], ratios=[0.4, 1.0, 2.5], strides=[4, 8, 16, 32, 64]),
        bbox_coder=dict(
            type='DeltaXYWHBBoxCoder', target_means=[0.0, 0.0, 0.0, 0.0], target_stds=[0.5, 0.5, 1.0, 1.0])),
    roi_head=dict(
        type='StandardRoIHead',
        bbox_roi_extractor=dict(
            type='SingleRoIExtractor', roi_layer=dict(type='RoIAlign', output_size=7, sampling_ratio=0)),
        bbox_head=dict(
            type='Shared2FCBBoxHead', num_classes=3,
            bbox_coder=dict(type='DeltaXYWHBBoxCoder', target_means=[0.0, 0.0, 0.0, 0.0],
                            target_stds=[0.05, 0.05, 0.1, 0.1]))),
    train_cfg=dict(rcnn=dict(debug=False)),
    test_cfg=dict(
        rpn=dict(nms_pre=500, max_per_img=400, nms=dict(type='nms', iou_threshold=0.6), min_bbox_size=0),
        rcnn=dict(score_thr=0.2, nms=dict(type='nms', iou_threshold=0.3), max_per_img=40, mask_thr_binary=0.5)))
work_dir = str(1 + 1)
"""
CONFIG_3 = """
model = dict(
    type='MaskRCNN',
    data_preprocessor=dict(
        type='DetDataPreprocessor', mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], bgr_to_rgb=True),
    backbone=dict(type='ResNet', depth=50, style='pytorch'),
    rpn_head=dict(anchor_generator=dict(scales=[8], ratios=[0.5, 1.0, 2.0], strides=[4, 8, 16, 32, 64])),
    test_cfg=dict(rcnn=dict(score_thr=0.05, nms=dict(type='nms', iou_threshold=0.5), max_per_img=100)))
test_pipeline = [dict(type='Resize', scale=(1333, 800), keep_ratio=True)]
"""


@dataclass(frozen=True)
class Settings:
    """Settings that the tensors do not contain; the defaults are those of `CONFIG_3`."""

    is_rgb: bool = True
    mean: tuple[float, ...] = (123.675, 116.28, 103.53)
    std: tuple[float, ...] = (58.395, 57.12, 57.375)
    is_caffe: bool = False
    scale: float = 8.0
    ratios: tuple[float, ...] = (0.5, 1.0, 2.0)
    rpn_stds: tuple[float, ...] = (1.0, 1.0, 1.0, 1.0)
    box_stds: tuple[float, ...] = (0.1, 0.1, 0.2, 0.2)
    rpn_pre: int = 1000
    rpn_most: int = 1000
    rpn_nms: float = 0.7
    score: float = 0.05
    nms: float = 0.5
    detections: int = 100


OF_CONFIG_2 = Settings(
    *(False, (103.53, 116.28, 123.675), (1.0, 1.0, 1.0), True, 4.0, (0.4, 1.0, 2.5)),
    *((0.5, 0.5, 1.0, 1.0), (0.05, 0.05, 0.1, 0.1), 500, 400, 0.6, 0.2, 0.3, 40),
)


def lively_tensors(pixel_gain: float = 1.0, seed: int = 0) -> dict[str, Tensor]:
    """Random weights of a small model with three classes that has detections."""
    shapes: dict[str, tuple[int, ...]] = {"backbone.conv1.weight": (64, 3, 7, 7), "backbone.bn1": (64,)}
    entering, widths = 64, []
    for stage, blocks in enumerate(BLOCKS):
        inner, leaving = 64 * 2**stage, 256 * 2**stage
        for block in range(blocks):
            name = f"backbone.layer{stage + 1}.{block}"
            sides = ((inner, entering, 1), (inner, inner, 3), (leaving, inner, 1))
            for number, (out, into, kernel) in enumerate(sides, start=1):
                shapes |= {f"{name}.conv{number}.weight": (out, into, kernel, kernel), f"{name}.bn{number}": (out,)}
            if block == 0:
                shapes |= {f"{name}.downsample.0.weight": (leaving, entering, 1, 1), f"{name}.downsample.1": (leaving,)}
            entering = leaving
        widths.append(leaving)
    biased: dict[str, tuple[int, ...]] = {}
    for level, width in enumerate(widths):
        biased[f"neck.lateral_convs.{level}.conv"] = (16, width, 1, 1)
        biased[f"neck.fpn_convs.{level}.conv"] = (16, 16, 3, 3)
    biased |= {"rpn_head.rpn_conv": (16, 16, 3, 3), "rpn_head.rpn_cls": (3, 16, 1, 1)}
    biased |= {"rpn_head.rpn_reg": (12, 16, 1, 1)}
    biased |= {"roi_head.bbox_head.shared_fcs.0": (32, 784), "roi_head.bbox_head.shared_fcs.1": (32, 32)}
    biased |= {"roi_head.bbox_head.fc_cls": (4, 32), "roi_head.bbox_head.fc_reg": (12, 32)}
    biased |= {"roi_head.mask_head.convs.0.conv": (16, 16, 3, 3), "roi_head.mask_head.upsample": (16, 16, 2, 2)}
    biased |= {"roi_head.mask_head.conv_logits": (3, 16, 1, 1)}
    rng = torch.Generator().manual_seed(seed)
    gains = {"rpn_cls": 2.0, "rpn_reg": 0.3, "fc_cls": 1.0, "conv_logits": 3.0}
    tensors: dict[str, Tensor] = {}
    for name, shape in (shapes | biased).items():
        noise = torch.randn(shape, generator=rng)
        if len(shape) == 1:  # batch norm
            tensors[f"{name}.weight"] = (0.3 if "bn3" in name else 0.7) + 0.1 * noise
            tensors[f"{name}.bias"] = 0.1 * torch.randn(shape, generator=rng)
            tensors[f"{name}.running_mean"] = 0.1 * torch.randn(shape, generator=rng)
            tensors[f"{name}.running_var"] = 1 + 0.3 * torch.randn(shape, generator=rng).clamp(-2, 2)
            tensors[f"{name}.num_batches_tracked"] = torch.tensor(7)
            continue
        gain = next((gain for end, gain in gains.items() if name.endswith(end)), 1.0)
        gain = pixel_gain if name == "backbone.conv1.weight" else gain
        weight = gain * noise * math.sqrt(2 / math.prod(shape[1:]))
        tensors[name if name.endswith("weight") else f"{name}.weight"] = weight
        if name in biased:
            out = shape[1] if "upsample" in name else shape[0]
            tensors[f"{name}.bias"] = 0.1 * torch.randn(out, generator=rng)
    tensors["rpn_head.rpn_reg.bias"].view(3, 4)[:, 2:] -= 1.5  # else those of the coarsest map would be the whole image
    return tensors


class PlainMmdetection:
    """mmdetection's inference on one resized image."""

    def __init__(self, tensors: dict[str, Tensor], settings: Settings) -> None:
        self.tensors, self.settings = tensors, settings

    def conv(self, name: str, x: Tensor, stride: int = 1, norm: str = "") -> Tensor:
        weight = self.tensors[f"{name}.weight"]
        x = F.conv2d(x, weight, self.tensors.get(f"{name}.bias"), stride, padding=weight.shape[-1] // 2)
        if norm:
            of = {kind: self.tensors[f"{norm}.{kind}"] for kind in ("running_mean", "running_var", "weight", "bias")}
            x = F.batch_norm(x, **of, training=False, eps=1e-5)
        return x

    def features(self, x: Tensor) -> list[Tensor]:
        x = F.max_pool2d(self.conv("backbone.conv1", x, 2, "backbone.bn1").relu(), 3, 2, 1)
        maps = []
        for stage, blocks in enumerate(BLOCKS, start=1):
            for block in range(blocks):
                name, stride = f"backbone.layer{stage}.{block}", 2 if stage > 1 and block == 0 else 1
                first, second = (stride, 1) if self.settings.is_caffe else (1, stride)
                y = self.conv(f"{name}.conv1", x, first, f"{name}.bn1").relu()
                y = self.conv(f"{name}.conv2", y, second, f"{name}.bn2").relu()
                y = self.conv(f"{name}.conv3", y, 1, f"{name}.bn3")
                x = (y + (x if block else self.conv(f"{name}.downsample.0", x, stride, f"{name}.downsample.1"))).relu()
            maps.append(x)
        laterals = [self.conv(f"neck.lateral_convs.{level}.conv", feature) for level, feature in enumerate(maps)]
        for level in (3, 2, 1):
            laterals[level - 1] = laterals[level - 1] + F.interpolate(laterals[level], laterals[level - 1].shape[2:])
        outs = [self.conv(f"neck.fpn_convs.{level}.conv", lateral) for level, lateral in enumerate(laterals)]
        return [*outs, F.max_pool2d(outs[-1], 1, stride=2)]

    def proposals(self, features: list[Tensor], size_hw: tuple[int, int]) -> Tensor:
        boxes, scores, levels = [], [], []
        for level, feature in enumerate(features):
            hidden, stride = self.conv("rpn_head.rpn_conv", feature).relu(), 4 * 2**level
            score = self.conv("rpn_head.rpn_cls", hidden)[0].permute(1, 2, 0).reshape(-1).sigmoid()
            delta = self.conv("rpn_head.rpn_reg", hidden)[0].permute(1, 2, 0).reshape(-1, 4)
            roots = torch.tensor(self.settings.ratios).sqrt()
            w, h = stride * self.settings.scale / roots, stride * self.settings.scale * roots
            base = torch.stack([-w, -h, w, h], dim=1) / 2
            rows, columns = torch.meshgrid(*(torch.arange(n) * stride for n in feature.shape[2:]), indexing="ij")
            shift = torch.stack([columns, rows, columns, rows], dim=-1).reshape(-1, 1, 4)
            anchors = (shift + base).reshape(-1, 4)
            best = score.sort(descending=True).indices[: self.settings.rpn_pre]
            boxes.append(decoded(anchors[best], delta[best], self.settings.rpn_stds, size_hw))
            scores.append(score[best])
            levels.append(torch.full_like(best, level))
        boxes, scores, levels = torch.cat(boxes), torch.cat(scores), torch.cat(levels)
        real = ((boxes[:, 2:] - boxes[:, :2]) > 0).all(dim=1)
        boxes, scores, levels = boxes[real], scores[real], levels[real]
        return boxes[
            torchvision.ops.batched_nms(boxes, scores, levels, self.settings.rpn_nms)[: self.settings.rpn_most]
        ]

    def pooled(self, features: list[Tensor], boxes: Tensor, size: int) -> Tensor:
        rows = []
        for box in boxes:
            side = torch.sqrt((box[2] - box[0]) * (box[3] - box[1]))
            level = int(torch.floor(torch.log2(side / 56 + 1e-6)).clamp(0, 3))
            roi = torch.cat([torch.zeros(1), box])[None]
            rows.append(torchvision.ops.roi_align(features[level], roi, size, 0.25 / 2**level, 0, aligned=True))
        return torch.cat(rows)

    def linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, *(self.tensors[f"roi_head.bbox_head.{name}.{kind}"] for kind in ("weight", "bias")))

    def detect(self, resized_rgb: np.ndarray) -> dict[str, np.ndarray]:
        """Returns detections in the format of maskrcnn's outputs, for a resized image uint8 `[H, W, 3]`."""
        settings, size_hw = self.settings, resized_rgb.shape[:2]
        pixels = resized_rgb if settings.is_rgb else resized_rgb[:, :, ::-1]
        pixels = (pixels.astype(np.float32) - np.float32(settings.mean)) / np.float32(settings.std)
        x = torch.from_numpy(pixels.transpose(2, 0, 1).copy())[None]
        features = self.features(F.pad(x, (0, -size_hw[1] % 32, 0, -size_hw[0] % 32)))
        proposals = self.proposals(features, size_hw)
        x = self.linear("shared_fcs.0", self.pooled(features, proposals, 7).flatten(1)).relu()
        x = self.linear("shared_fcs.1", x).relu()
        scores = self.linear("fc_cls", x).softmax(dim=1)[:, :-1]  # the background is the last
        deltas = self.linear("fc_reg", x).reshape(len(x), -1, 4)
        row, label = torch.nonzero(scores > settings.score, as_tuple=True)
        boxes = decoded(proposals[row], deltas[row, label], settings.box_stds, size_hw)
        kept = torchvision.ops.batched_nms(boxes, scores[row, label], label, settings.nms)[: settings.detections]
        boxes, found, labels = boxes[kept], scores[row, label][kept], label[kept]
        x = self.conv("roi_head.mask_head.convs.0.conv", self.pooled(features, boxes, 14)).relu()
        upsample = (self.tensors[f"roi_head.mask_head.upsample.{kind}"] for kind in ("weight", "bias"))
        masks = self.conv("roi_head.mask_head.conv_logits", F.conv_transpose2d(x, *upsample, 2).relu()).sigmoid()
        masks = masks[torch.arange(len(kept)), labels]
        outputs = {"boxes": boxes, "scores": found, "labels": labels + 1, "masks": masks}
        count = np.array([len(kept)], np.int32)
        return {name: value[None].numpy() for name, value in outputs.items()} | {"num_detections": count}


def decoded(boxes: Tensor, deltas: Tensor, stds: tuple[float, ...], size_hw: tuple[int, int]) -> Tensor:
    """Boxes shifted by deltas and clipped to the image."""
    deltas = deltas * torch.tensor(stds)
    sides = boxes[:, 2:] - boxes[:, :2]
    most = abs(math.log(16 / 1000))
    centres = (boxes[:, :2] + boxes[:, 2:]) * 0.5 + sides * deltas[:, :2]
    half = sides * deltas[:, 2:].clamp(-most, most).exp() * 0.5
    moved = torch.cat([centres - half, centres + half], dim=1)
    height, width = size_hw
    return torch.minimum(moved.clamp(min=0), torch.tensor([width, height, width, height], dtype=torch.float32))

"""Simple implementation of Detectron2's R-CNNs with FPN: tensor names and shapes, and inference.

Written from Detectron2's documentation of its layers, independently of the importer, which is compared with it.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
import torchvision
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}
NORM = ("weight", "bias", "running_mean", "running_var")


@dataclass(frozen=True)
class Sizes:
    """Numbers of channels; the defaults are those of the model zoo."""

    classes: int = 80
    fpn: int = 256
    box: int = 1024
    mask: tuple[int, ...] = (256, 256, 256, 256)  # channels of each convolution; () for a Faster R-CNN
    groups: int = 1  # RESNETS.NUM_GROUPS
    width: int = 64  # RESNETS.WIDTH_PER_GROUP


@dataclass(frozen=True)
class Settings:
    """Settings that the tensors do not contain; the defaults are those of Base-RCNN-FPN.yaml."""

    anchor_px: float = 32.0  # at P2; doubles at each level
    ratios: tuple[float, ...] = (0.5, 1.0, 2.0)
    is_bgr: bool = True  # INPUT.FORMAT
    mean: tuple[float, ...] = (103.53, 116.28, 123.675)
    std: tuple[float, ...] = (1.0, 1.0, 1.0)
    stride_in_1x1: bool = True
    score: float = 0.05
    nms: float = 0.5
    detections: int = 100
    box_weights: tuple[float, ...] = (10.0, 10.0, 5.0, 5.0)


ZOO = Sizes()
SMALL = Sizes(classes=3, fpn=16, box=32, mask=(16,))


def layout(depth: int, sizes: Sizes = ZOO) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all parameters and of the statistics of norms."""
    shapes = {"backbone.bottom_up.stem.conv1.weight": (64, 3, 7, 7)}
    shapes |= {f"backbone.bottom_up.stem.conv1.norm.{kind}": (64,) for kind in NORM}
    entering = 64
    for stage, blocks in enumerate(BLOCKS[depth]):
        inner = sizes.groups * sizes.width * 2**stage
        leaving = 256 * 2**stage if depth >= 50 else inner
        for block in range(blocks):
            name = f"backbone.bottom_up.res{stage + 2}.{block}"
            convolutions = {"conv1": (inner, entering, 1, 1), "conv2": (inner, inner // sizes.groups, 3, 3)}
            convolutions["conv3"] = (leaving, inner, 1, 1)
            if depth < 50:
                convolutions = {"conv1": (inner, entering, 3, 3), "conv2": (inner, inner, 3, 3)}
            if entering != leaving:
                convolutions["shortcut"] = (leaving, entering, 1, 1)
            for part, shape in convolutions.items():
                shapes[f"{name}.{part}.weight"] = shape
                shapes |= {f"{name}.{part}.norm.{kind}": shape[:1] for kind in NORM}
            entering = leaving
        weighted = {f"fpn_lateral{stage + 2}": (sizes.fpn, leaving, 1, 1)}
        weighted[f"fpn_output{stage + 2}"] = (sizes.fpn, sizes.fpn, 3, 3)
        shapes |= _with_bias("backbone", weighted)
    head = {"conv": (sizes.fpn, sizes.fpn, 3, 3)}
    head |= {"objectness_logits": (3, sizes.fpn, 1, 1), "anchor_deltas": (12, sizes.fpn, 1, 1)}
    shapes |= _with_bias("proposal_generator.rpn_head", head)
    boxes = {"box_head.fc1": (sizes.box, sizes.fpn * 49), "box_head.fc2": (sizes.box, sizes.box)}
    boxes |= {"box_predictor.cls_score": (sizes.classes + 1, sizes.box)}
    boxes |= {"box_predictor.bbox_pred": (4 * sizes.classes, sizes.box)}
    shapes |= _with_bias("roi_heads", boxes)
    masks, entering = {}, sizes.fpn
    for number, leaving in enumerate(sizes.mask, start=1):
        masks[f"mask_fcn{number}"] = (leaving, entering, 3, 3)
        entering = leaving
    if sizes.mask:
        masks |= {"deconv": (entering, entering, 2, 2), "predictor": (sizes.classes, entering, 1, 1)}
    return shapes | _with_bias("roi_heads.mask_head", masks)


def _with_bias(prefix: str, weights: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    shapes = {}
    for name, shape in weights.items():
        shapes |= {f"{prefix}.{name}.weight": shape, f"{prefix}.{name}.bias": shape[:1]}
    return shapes


def lively_tensors(depth: int, sizes: Sizes = SMALL, seed: int = 0) -> dict[str, Tensor]:
    """Random weights with detections: activations of about unit size, and varied scores and boxes."""
    rng = torch.Generator().manual_seed(seed)
    gains = {
        "stem.conv1.weight": 0.02,  # pixels go up to 150
        "objectness_logits.weight": 2.0,
        "anchor_deltas.weight": 0.3,
        "cls_score.weight": 1.0,
        "mask_head.predictor.weight": 3.0,
    }
    tensors = {}
    for name, shape in layout(depth, sizes).items():
        noise = torch.randn(shape, generator=rng)
        if name.endswith("running_var"):
            value = 1 + 0.3 * noise.clamp(-2, 2)
        elif name.endswith("norm.weight"):
            value = (0.3 if "conv3" in name else 0.7) + 0.1 * noise
        elif len(shape) == 1:
            value = 0.1 * noise
        else:
            gain = next((gain for end, gain in gains.items() if name.endswith(end)), 1.0)
            value = gain * noise * math.sqrt(2 / math.prod(shape[1:]))
        tensors[name] = value
    # Proposals smaller than their anchors: otherwise all proposals of P6 would be the whole image if it is small.
    sides = tensors["proposal_generator.rpn_head.anchor_deltas.bias"].view(3, 4)[:, 2:]
    sides -= 1.5
    return tensors


class PlainDetectron2:
    """Detectron2's inference on one image, step by step and without any padding of results.

    Args:
        tensors: named as in `layout`, with bottleneck blocks.
        min_size_px, max_size_px: parameters of `ResizeShortestEdge`.
        settings: settings that the tensors do not contain.
    """

    def __init__(
        self, tensors: dict[str, Tensor], min_size_px: int, max_size_px: int, settings: Settings | None = None
    ) -> None:
        self.tensors, self.min_size_px, self.max_size_px = tensors, min_size_px, max_size_px
        self.settings = settings or Settings()
        names = [name.split(".")[2:4] for name in tensors if name.startswith("backbone.bottom_up.res")]
        self.blocks = [len({block for res, block in names if res == f"res{stage}"}) for stage in (2, 3, 4, 5)]

    def pixels(self, picture_rgb: np.ndarray) -> Tensor:
        """Returns the input `[1, 3, h, w]` for an image uint8 `[H, W, 3]`: BGR, with the mean subtracted."""
        height, width = picture_rgb.shape[:2]
        scale = self.min_size_px / min(height, width)
        scale = min(scale, self.max_size_px / max(height, width))
        size = (int(width * scale + 0.5), int(height * scale + 0.5))
        resized = np.asarray(Image.fromarray(picture_rgb).resize(size, Image.BILINEAR))
        resized = resized[:, :, ::-1] if self.settings.is_bgr else resized
        mean, std = (np.array(values, np.float32) for values in (self.settings.mean, self.settings.std))
        return torch.from_numpy(((resized.astype(np.float32) - mean) / std).transpose(2, 0, 1).copy())[None]

    def convolution(self, name: str, x: Tensor, stride: int = 1) -> Tensor:
        weight = self.tensors[f"{name}.weight"]
        bias, groups = self.tensors.get(f"{name}.bias"), x.shape[1] // weight.shape[1]
        x = F.conv2d(x, weight, bias, stride, padding=weight.shape[-1] // 2, groups=groups)
        if f"{name}.norm.weight" in self.tensors:
            gamma, beta, mean, variance = (self.tensors[f"{name}.norm.{kind}"][:, None, None] for kind in NORM)
            x = (x - mean) / torch.sqrt(variance + 1e-5) * gamma + beta
        return x

    def features(self, x: Tensor) -> list[Tensor]:
        """P2 to P6."""
        x = F.max_pool2d(self.convolution("backbone.bottom_up.stem.conv1", x, 2).relu(), 3, 2, 1)
        maps = []
        for stage, blocks in enumerate(self.blocks):
            for block in range(blocks):
                name, stride = f"backbone.bottom_up.res{stage + 2}.{block}", 2 if stage and not block else 1
                strides = (stride, 1) if self.settings.stride_in_1x1 else (1, stride)
                y = self.convolution(f"{name}.conv1", x, strides[0]).relu()
                y = self.convolution(f"{name}.conv3", self.convolution(f"{name}.conv2", y, strides[1]).relu())
                x = (y + (x if block else self.convolution(f"{name}.shortcut", x, stride))).relu()
            maps.append(x)
        levels, top = [], 0
        for stage in (5, 4, 3, 2):
            top = self.convolution(f"backbone.fpn_lateral{stage}", maps[stage - 2]) + top
            levels.insert(0, self.convolution(f"backbone.fpn_output{stage}", top))
            top = F.interpolate(top, scale_factor=2, mode="nearest")
        return [*levels, levels[-1][:, :, ::2, ::2]]

    def proposals(self, features: list[Tensor], size_hw: tuple[int, int]) -> Tensor:
        """Boxes `[R, 4]`."""
        boxes, scores, level_of = [], [], []
        for level, feature in enumerate(features):
            stride, size = 4 * 2**level, self.settings.anchor_px * 2**level
            hidden = self.convolution("proposal_generator.rpn_head.conv", feature).relu()
            logits = self.convolution("proposal_generator.rpn_head.objectness_logits", hidden)[0]
            deltas = self.convolution("proposal_generator.rpn_head.anchor_deltas", hidden)[0]
            anchors = []
            for row in range(feature.shape[2]):
                for column in range(feature.shape[3]):
                    for ratio in self.settings.ratios:
                        half_w = math.sqrt(size * size / ratio) / 2
                        half_h, x, y = half_w * ratio, column * stride, row * stride
                        anchors.append([x - half_w, y - half_h, x + half_w, y + half_h])
            logits = logits.permute(1, 2, 0).flatten()
            deltas = deltas.unflatten(0, (3, 4)).permute(2, 3, 0, 1).flatten(0, 2)
            best = logits.topk(min(1000, len(logits))).indices
            boxes.append(moved(torch.tensor(anchors)[best], deltas[best], (1, 1, 1, 1)))
            scores.append(logits[best])
            level_of.append(torch.full_like(best, level))
        boxes, scores, level_of = clipped(torch.cat(boxes), size_hw), torch.cat(scores), torch.cat(level_of)
        real = ((boxes[:, 2:] - boxes[:, :2]) > 0).all(dim=1)
        boxes, scores, level_of = boxes[real], scores[real], level_of[real]
        return boxes[torchvision.ops.batched_nms(boxes, scores, level_of, 0.7)[:1000]]

    def pooled(self, features: list[Tensor], boxes: Tensor, size: int) -> Tensor:
        """`[R, C, size, size]`, box by box."""
        rows = []
        for box in boxes:
            area = float((box[2] - box[0]) * (box[3] - box[1]))
            level = min(max(math.floor(4 + math.log2(math.sqrt(area) / 224 + 1e-8)), 2), 5)
            roi = torch.cat([torch.zeros(1), box])[None]
            rows.append(torchvision.ops.roi_align(features[level - 2], roi, size, 0.5**level, -1, aligned=True))
        return torch.cat(rows)

    def linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self.tensors[f"roi_heads.{name}.weight"], self.tensors[f"roi_heads.{name}.bias"])

    def detect(self, picture_rgb: np.ndarray) -> dict[str, Tensor]:
        """Returns `boxes` in the resized image, `scores`, `classes` from 0, `masks` `[D, 28, 28]`, and `pairs`.

        `pairs` is the number of (box, class) pairs before NMS.
        """
        pixels = self.pixels(picture_rgb)
        size_hw = pixels.shape[2:]
        features = self.features(F.pad(pixels, (0, -size_hw[1] % 32, 0, -size_hw[0] % 32)))
        proposals = self.proposals(features, size_hw)
        x = self.pooled(features, proposals, 7).flatten(1)
        x = self.linear("box_head.fc2", self.linear("box_head.fc1", x).relu()).relu()
        scores = self.linear("box_predictor.cls_score", x).softmax(dim=1)[:, :-1]  # the last is background
        deltas = self.linear("box_predictor.bbox_pred", x).unflatten(1, (-1, 4))
        row, label = torch.nonzero(scores > self.settings.score, as_tuple=True)
        boxes = clipped(moved(proposals[row], deltas[row, label], self.settings.box_weights), size_hw)
        kept = torchvision.ops.batched_nms(boxes, scores[row, label], label, self.settings.nms)
        kept = kept[: self.settings.detections]
        found = {"boxes": boxes[kept], "scores": scores[row, label][kept], "classes": label[kept], "pairs": len(row)}
        x = self.convolution("roi_heads.mask_head.mask_fcn1", self.pooled(features, found["boxes"], 14)).relu()
        deconvolution = (self.tensors[f"roi_heads.mask_head.deconv.{kind}"] for kind in ("weight", "bias"))
        x = self.convolution("roi_heads.mask_head.predictor", F.conv_transpose2d(x, *deconvolution, 2).relu())
        return found | {"masks": x.sigmoid()[torch.arange(len(kept)), found["classes"]]}


def moved(boxes: Tensor, deltas: Tensor, weights: tuple[float, ...]) -> Tensor:
    """Boxes `[K, 4]` shifted and scaled by deltas `[K, 4]`."""
    deltas = deltas / torch.tensor(weights, dtype=torch.float32)
    sides = boxes[:, 2:] - boxes[:, :2]
    centres = boxes[:, :2] + 0.5 * sides + deltas[:, :2] * sides
    half = 0.5 * sides * deltas[:, 2:].clamp(max=math.log(1000 / 16)).exp()
    return torch.cat([centres - half, centres + half], dim=1)


def clipped(boxes: Tensor, size_hw: tuple[int, int]) -> Tensor:
    """Boxes `[K, 4]` clipped to the image."""
    height, width = size_hw
    return torch.minimum(boxes.clamp(min=0), torch.tensor([width, height, width, height], dtype=torch.float32))

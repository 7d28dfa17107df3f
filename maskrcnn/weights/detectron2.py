"""Detectron2's Faster and Mask R-CNN with ResNet and FPN: their weights under our names, and their conventions.

Weights do not say how the model that has them computes. What is taken here are the settings of Detectron2's
configuration `Base-RCNN-FPN.yaml` and of its model zoo; what a file does say about them is compared.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
import torchvision
from torch import Tensor

from maskrcnn.config import ModelConfig, model_config
from maskrcnn.errors import UserError
from maskrcnn.imaging.preprocess import Preprocessing
from maskrcnn.model.rpn import cell_anchors

_BODY, _PREDICTOR = "backbone.bottom_up.", "roi_heads.box_predictor."
_PIXEL_MEAN_BGR, _PIXEL_STD = (103.53, 116.28, 123.675), (1.0, 1.0, 1.0)  # MODEL.PIXEL_MEAN and PIXEL_STD

# Fields of ModelConfig in which Detectron2's models differ from torchvision's.
CONVENTIONS = {
    "frozen_batch_norm": True,  # RESNETS.NORM "FrozenBN"
    "batch_norm_epsilon": 1e-5,  # of its FrozenBatchNorm2d
    "stride_in_1x1": True,  # RESNETS.STRIDE_IN_1X1: the first weights were MSRA's
    "anchors_rounded": False,
    "anchor_strides_px": (4, 8, 16, 32, 64),
    "pool_aligned": True,  # POOLER_TYPE "ROIAlignV2"
    "pool_sampling_ratio": 0,  # POOLER_SAMPLING_RATIO
    "proposal_min_side_px": 0.0,  # PROPOSAL_GENERATOR.MIN_SIZE
    "detection_min_side_px": 0.0,
    # Its images are BGR from 0 to 255; `_rgb_first` makes the weights ones for RGB.
    "preprocessing": Preprocessing(
        mean=tuple(value / 255 for value in reversed(_PIXEL_MEAN_BGR)),
        std=tuple(value / 255 for value in _PIXEL_STD),
        resize="pillow",
    ),
}

# Blocks of the stages res2 to res5, and whether they have three convolutions, of each depth.
_DEPTHS = {((2, 2, 2, 2), False): 18, ((3, 4, 6, 3), False): 34, ((3, 4, 6, 3), True): 50, ((3, 4, 23, 3), True): 101}

# Names as patterns, with their present form.
_RENAMED: tuple[tuple[str, str | Callable[[re.Match], str]], ...] = (
    (r"backbone\.bottom_up\.stem\.conv1\.(weight|bias)", r"backbone.body.conv1.\1"),
    (r"backbone\.bottom_up\.stem\.conv1\.norm\.(\w+)", r"backbone.body.bn1.\1"),
    (
        r"backbone\.bottom_up\.res([2-5])\.(\d+)\.shortcut\.(norm\.)?(\w+)",
        lambda m: f"{_block(m)}.downsample.{1 if m[3] else 0}.{m[4]}",
    ),
    (r"backbone\.bottom_up\.res([2-5])\.(\d+)\.conv([1-3])\.norm\.(\w+)", lambda m: f"{_block(m)}.bn{m[3]}.{m[4]}"),
    (r"backbone\.bottom_up\.res([2-5])\.(\d+)\.conv([1-3])\.(\w+)", lambda m: f"{_block(m)}.conv{m[3]}.{m[4]}"),
    (r"backbone\.fpn_lateral([2-5])\.(\w+)", lambda m: f"backbone.fpn.inner_blocks.{int(m[1]) - 2}.0.{m[2]}"),
    (r"backbone\.fpn_output([2-5])\.(\w+)", lambda m: f"backbone.fpn.layer_blocks.{int(m[1]) - 2}.0.{m[2]}"),
    (r"proposal_generator\.rpn_head\.conv\.(\w+)", r"rpn.head.conv.0.0.\1"),
    (r"proposal_generator\.rpn_head\.objectness_logits\.(\w+)", r"rpn.head.cls_logits.\1"),
    (r"proposal_generator\.rpn_head\.anchor_deltas\.(\w+)", r"rpn.head.bbox_pred.\1"),
    (r"roi_heads\.box_head\.fc1\.(\w+)", r"roi_heads.box_head.fc6.\1"),
    (r"roi_heads\.box_head\.fc2\.(\w+)", r"roi_heads.box_head.fc7.\1"),
    (r"(roi_heads\.box_predictor\.(?:cls_score|bbox_pred)\.\w+)", r"\1"),
    (r"roi_heads\.mask_head\.mask_fcn(\d+)\.(\w+)", lambda m: f"roi_heads.mask_head.{int(m[1]) - 1}.0.{m[2]}"),
    (r"roi_heads\.mask_head\.deconv\.(\w+)", r"roi_heads.mask_predictor.conv5_mask.\1"),
    (r"roi_heads\.mask_head\.predictor\.(\w+)", r"roi_heads.mask_predictor.mask_fcn_logits.\1"),
)
_BUFFERS = re.compile(r"pixel_mean|pixel_std|proposal_generator\.anchor_generator\.cell_anchors\.(\d+)")


def is_detectron2(names: Iterable[str]) -> bool:
    """Whether these are names of tensors as Detectron2 gives them to a model with FPN."""
    return any(name.startswith((_BODY, "proposal_generator.")) for name in names)


def from_detectron2(tensors: dict[str, Tensor], source: str | Path) -> tuple[dict[str, Tensor], ModelConfig]:
    """Weights under our names and with our order of channels and classes, and the model that computes with them.

    Args:
        tensors: named as Detectron2 names them; a Faster R-CNN's or a Mask R-CNN's, with 80 classes COCO's.
        source: where they are from, for messages.

    Returns:
        the tensors, and the configuration, in which depth, widths, classes and masks are those of the tensors and
        everything else is as `CONVENTIONS` says.

    Raises:
        UserError: for tensors of another architecture, and for pixel values or anchors other than the model zoo's.
    """
    _check_buffers(tensors, source)
    given = {name: value for name, value in tensors.items() if not _BUFFERS.fullmatch(name)}
    renamed = {_our_name(name, source): value for name, value in given.items()}
    missing = sorted(_landmarks(renamed) - set(renamed))
    if missing:
        raise _other(source, f"a model of Detectron2's without {', '.join(missing)}")
    classes = renamed[_PREDICTOR + "cls_score.weight"].shape[0] - 1
    _check_class_specific(renamed, classes, source)
    config = _config(renamed, classes, source)
    return _rgb_first(_background_first(renamed)), config


def coco_classes() -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Names and category ids of COCO's 80 classes, in the order of the ids."""
    categories = torchvision.models.detection.MaskRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"]
    used = [(name, number) for number, name in enumerate(categories) if number > 0 and name != "N/A"]
    names, ids = zip(*used, strict=True)
    return names, ids


def _block(found: re.Match) -> str:
    """Torchvision's name of a block, from stage and number."""
    return f"backbone.body.layer{int(found[1]) - 1}.{found[2]}"


def _our_name(name: str, source: str | Path) -> str:
    for pattern, present in _RENAMED:
        if found := re.fullmatch(pattern, name):
            return present(found) if callable(present) else found.expand(present)
    raise _other(source, f"a tensor {name}, which a ResNet with FPN and Detectron2's standard heads has not")


def _landmarks(renamed: Iterable[str]) -> set[str]:
    """The tensors whose shapes tell the architecture."""
    of_masks = {"roi_heads.mask_predictor.mask_fcn_logits.weight", "roi_heads.mask_head.0.0.weight"}
    return {
        "backbone.body.conv1.weight",
        "backbone.fpn.inner_blocks.0.0.weight",
        "roi_heads.box_head.fc6.weight",
        *(f"{_PREDICTOR}{layer}.{kind}" for layer in ("cls_score", "bbox_pred") for kind in ("weight", "bias")),
        *(of_masks if any(name.startswith("roi_heads.mask_") for name in renamed) else ()),
    }


def _check_class_specific(renamed: dict[str, Tensor], classes: int, source: str | Path) -> None:
    """Refuses boxes or masks that all classes share."""
    for name, each in ((_PREDICTOR + "bbox_pred.weight", 4), ("roi_heads.mask_predictor.mask_fcn_logits.weight", 1)):
        rows = renamed[name].shape[0] if name in renamed else each * classes
        if rows != each * classes:
            shared = " shared by all classes (CLS_AGNOSTIC_BBOX_REG or _MASK)" if rows == each else ""
            raise _other(source, f"{rows} rows of {name}{shared}, for {classes} classes")


def _config(renamed: dict[str, Tensor], classes: int, source: str | Path) -> ModelConfig:
    """The model that has tensors of these shapes."""
    has_masks = any(name.startswith("roi_heads.mask_") for name in renamed)
    backbone, first = f"resnet{_depth(renamed, source)}", renamed["roi_heads.box_head.fc6.weight"]
    channels = renamed["backbone.fpn.inner_blocks.0.0.weight"].shape[0]
    names, ids = coco_classes() if classes == 80 else ((), ())
    is_frozen = not any(name.endswith("num_batches_tracked") for name in renamed)
    return model_config(
        f"{'mask' if has_masks else 'faster'}rcnn_{backbone}_fpn",
        class_names=names or tuple(f"class_{label}" for label in range(1, classes + 1)),
        category_ids=ids or tuple(range(1, classes + 1)),
        fpn_channels=channels,
        box_head_channels=first.shape[0],
        box_pool_size=round((first.shape[1] / channels) ** 0.5),
        **({"mask_head_channels": _mask_channels(renamed)} if has_masks else {}),
        **CONVENTIONS | {"frozen_batch_norm": is_frozen},
    )


def _depth(renamed: Iterable[str], source: str | Path) -> int:
    blocks = {found[0] for name in renamed if (found := re.match(r"backbone\.body\.layer(\d)\.\d+", name))}
    counts = tuple(sum(block.startswith(f"backbone.body.layer{stage}.") for block in blocks) for stage in (1, 2, 3, 4))
    has_bottlenecks = any(name.startswith("backbone.body.layer1.0.conv3.") for name in renamed)
    if (counts, has_bottlenecks) not in _DEPTHS:
        raise _other(source, f"a ResNet with {counts} blocks of {3 if has_bottlenecks else 2} convolutions")
    return _DEPTHS[counts, has_bottlenecks]


def _mask_channels(renamed: dict[str, Tensor]) -> tuple[int, ...]:
    weights = [name for name in renamed if re.fullmatch(r"roi_heads\.mask_head\.\d+\.0\.weight", name)]
    return tuple(renamed[name].shape[0] for name in sorted(weights, key=lambda name: (len(name), name)))


def _background_first(renamed: dict[str, Tensor]) -> dict[str, Tensor]:
    """The class layers with background as class 0: Detectron2 has it last, and no boxes and masks of it."""
    made = dict(renamed)
    for name, value in renamed.items():
        if name.startswith(_PREDICTOR + "cls_score."):
            made[name] = torch.cat([value[-1:], value[:-1]])
        elif name.startswith(_PREDICTOR + "bbox_pred."):
            made[name] = torch.cat([torch.zeros_like(value[:4]), value])
        elif name.startswith("roi_heads.mask_predictor.mask_fcn_logits."):
            made[name] = torch.cat([torch.zeros_like(value[:1]), value])
    return made


def _rgb_first(renamed: dict[str, Tensor]) -> dict[str, Tensor]:
    """The first convolution for images in RGB instead of BGR."""
    name = "backbone.body.conv1.weight"
    return renamed | {name: renamed[name].flip(1)}


def _check_buffers(tensors: dict[str, Tensor], source: str | Path) -> None:
    """Compares what older files say of pixels and anchors, which Detectron2 itself takes from its configuration."""
    for name, expected in (("pixel_mean", _PIXEL_MEAN_BGR), ("pixel_std", _PIXEL_STD)):
        found = tensors.get(name, torch.tensor(expected)).flatten().tolist()
        if len(found) != 3 or any(abs(a - b) > 0.01 for a, b in zip(found, expected, strict=True)):
            raise _other(source, f"{name} {found} instead of {list(expected)}")
    plain = ModelConfig()
    for name, cells in tensors.items():
        level = found[1] if (found := _BUFFERS.fullmatch(name)) else None
        if level is None:
            continue
        size = plain.anchor_sizes_px[int(level)] if int(level) < len(plain.anchor_sizes_px) else 0.0
        expected = cell_anchors(size, plain.anchor_aspect_ratios, rounded=False)
        sides = [corners[:, 2:] - corners[:, :2] for corners in (cells.float(), expected)]
        # Loosely: those of Detectron's first version were rounded, which Detectron2 passes over too.
        if sides[0].shape != sides[1].shape or not torch.allclose(*sides, rtol=0.05, atol=2):
            raise _other(source, f"anchors {name} with sides {sides[0].tolist()}")


def _other(source: str | Path, came: str) -> UserError:
    return UserError(
        f"{source}: {came}",
        "a Faster or Mask R-CNN of Detectron2's Base-RCNN-FPN.yaml with ResNet 18, 34, 50 or 101, such as "
        "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_3x",
        "export a model of that configuration",
    )

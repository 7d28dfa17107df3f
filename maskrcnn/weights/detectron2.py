"""Detectron2's Faster and Mask R-CNN with ResNet or ResNeXt and FPN: names, conventions, and its YAML configuration.

Weights alone do not define a model's computation. The settings here are those of Detectron2's `Base-RCNN-FPN.yaml` and
its model zoo, unless the file's buffers or a configuration next to it state others.
"""

from __future__ import annotations

import ast
import dataclasses
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from maskrcnn.config import ModelConfig, changed
from maskrcnn.errors import UserError
from maskrcnn.imaging.preprocess import Preprocessing
from maskrcnn.model.roi_heads import BOX_WEIGHTS
from maskrcnn.model.rpn import BOX_WEIGHTS as ANCHOR_WEIGHTS
from maskrcnn.model.rpn import cell_anchors
from maskrcnn.settings import merged
from maskrcnn.weights.foreign import (
    ANCHOR_BOXES,
    ANCHORS,
    BODY,
    CLASS_BOXES,
    CLASSES,
    PIXELS,
    UNSTATED,
    Imported,
    class_count,
    detector_of,
    resnet_layout,
    scaled_boxes,
)

CONFIG_NAME = "config.yaml"  # written by Detectron2's trainer next to its checkpoints
_BODY = "backbone.bottom_up."
_PIXEL_MEAN_BGR, _PIXEL_STD = (103.53, 116.28, 123.675), (1.0, 1.0, 1.0)  # MODEL.PIXEL_MEAN and PIXEL_STD
_PIXEL_STD_RESNEXT = (57.375, 57.12, 58.395)  # of mask_rcnn_X_101_32x8d_FPN_3x.yaml

# Fields of ModelConfig in which Detectron2's models differ from torchvision's.
CONVENTIONS: dict[str, Any] = {
    "frozen_batch_norm": True,  # RESNETS.NORM "FrozenBN"
    "batch_norm_epsilon": 1e-5,  # its FrozenBatchNorm2d
    "stride_in_1x1": True,  # RESNETS.STRIDE_IN_1X1, for the MSRA weights
    "anchors_rounded": False,
    "anchor_strides_px": (4, 8, 16, 32, 64),
    "pool_aligned": True,  # POOLER_TYPE "ROIAlignV2"
    "pool_sampling_ratio": 0,  # POOLER_SAMPLING_RATIO
    "proposal_min_side_px": 0.0,  # PROPOSAL_GENERATOR.MIN_SIZE
    "detection_min_side_px": 0.0,
    # BGR from 0 to 255 in Detectron2; `from_detectron2` converts the weights to RGB.
    "preprocessing": Preprocessing(
        mean=tuple(value / 255 for value in reversed(_PIXEL_MEAN_BGR)),
        std=tuple(value / 255 for value in _PIXEL_STD),
        resize="pillow",
    ),
}

# Patterns of tensor names with their replacements.
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
    """Whether these are tensor names of a Detectron2 model with FPN."""
    return any(name.startswith((_BODY, "proposal_generator.")) for name in names)


def from_detectron2(tensors: dict[str, Tensor], source: str | Path, config_file: Path | None = None) -> Imported:
    """Convert Detectron2 weights to our names and order of channels and classes.

    Args:
        tensors: a Faster or Mask R-CNN under Detectron2's names; 80 classes are COCO's.
        source: origin of the tensors, for error messages.
        config_file: Detectron2's YAML configuration of the model.

    Returns:
        the tensors and the configuration of the model: architecture, widths and number of classes follow from the
        tensors; the rest comes from the configuration file, from buffers of older files, or from `CONVENTIONS`.

    Raises:
        UserError: for tensors or settings of another architecture, and a configuration file that contradicts the
            tensors.
    """
    given = {name: value for name, value in tensors.items() if not _BUFFERS.fullmatch(name)}
    renamed = {_our_name(name, source): value for name, value in given.items()}
    is_frozen = not any(name.endswith("num_batches_tracked") for name in renamed)
    found, config = detector_of(
        renamed, CONVENTIONS | {"frozen_batch_norm": is_frozen}, lambda what: _unsupported(source, what)
    )
    _, _, (width, group_width) = resnet_layout(renamed)
    mean_bgr, std_bgr = _PIXEL_MEAN_BGR, _PIXEL_STD
    if group_width != width:  # the model zoo's ResNeXt
        config = dataclasses.replace(config, stride_in_1x1=False)
        std_bgr = _PIXEL_STD_RESNEXT
    stated = _of_buffers(tensors, source)
    yaml_file = _DetectronConfig(config_file) if config_file is not None else None
    if yaml_file is not None:
        yaml_file.check(class_count(found), resnet_layout(renamed), source)
        stated = merged(stated, yaml_file.fields())
        for layer, key, ours in (
            (CLASS_BOXES, "MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS", BOX_WEIGHTS),
            (ANCHOR_BOXES, "MODEL.RPN.BBOX_REG_WEIGHTS", ANCHOR_WEIGHTS),
        ):
            if (own := yaml_file.numbers(key, length=4)) is not None and own != ours:
                found = scaled_boxes(found, layer, own, ours)
    pixels = stated.pop("preprocessing", {})
    order = pixels.pop("channel_order", "BGR")
    mean, std = pixels.pop("mean", mean_bgr), pixels.pop("std", std_bgr)
    if order == "BGR":  # reversed, so that images stay RGB
        mean, std = mean[::-1], std[::-1]
        first = f"{BODY}conv1.weight"
        found[first] = found[first].flip(1)
    pixels |= {"mean": tuple(value / 255 for value in mean), "std": tuple(value / 255 for value in std)}
    config = changed(config, {**stated, "preprocessing": pixels})
    known = {*stated, *(f"preprocessing.{name}" for name in pixels if name not in ("mean", "std"))}
    if yaml_file is not None and yaml_file.value("MODEL.PIXEL_MEAN") is not None:
        known |= set(PIXELS)
    if yaml_file is not None and yaml_file.is_coco and class_count(found) == 80:
        known |= set(CLASSES)
    unstated = tuple(name for name in UNSTATED if name not in known)
    return Imported(found, config, unstated, yaml_file.notes if yaml_file is not None else ())


def _block(found: re.Match) -> str:
    """Torchvision's name of a block."""
    return f"backbone.body.layer{int(found[1]) - 1}.{found[2]}"


def _our_name(name: str, source: str | Path) -> str:
    for pattern, present in _RENAMED:
        if found := re.fullmatch(pattern, name):
            return present(found) if callable(present) else found.expand(present)
    raise _unsupported(source, f"tensor {name}, unknown in a ResNet with FPN and Detectron2's standard heads")


def _of_buffers(tensors: dict[str, Tensor], source: str | Path) -> dict[str, Any]:
    """Fields that follow from the pixel statistics and anchors in older files, if they are not the usual ones."""
    fields: dict[str, Any] = {}
    pixels: dict[str, Any] = {}
    for name, field, usual in (("pixel_mean", "mean", _PIXEL_MEAN_BGR), ("pixel_std", "std", _PIXEL_STD)):
        if name not in tensors:
            continue
        found = tuple(round(value, 4) for value in tensors[name].flatten().tolist())
        if len(found) != 3:
            raise _unsupported(source, f"{name} of {len(found)} channels")
        if field == "mean" and _near(found, usual[::-1]):
            pixels["channel_order"] = "RGB"  # the usual values in the other channel order
        if not _near(found, usual):
            pixels[field] = found
    cells = {
        int(match[1]): value for name, value in tensors.items() if (match := _BUFFERS.fullmatch(name)) and match[1]
    }
    default = ModelConfig()
    sizes, ratios = list(default.anchor_sizes_px), set()
    if cells and max(cells) >= len(sizes):
        raise _unsupported(source, f"anchors on {max(cells) + 1} levels")
    for level, corners in cells.items():
        sides = corners.float()[:, 2:] - corners.float()[:, :2]
        usual_cells = cell_anchors(sizes[level], default.anchor_aspect_ratios, rounded=False)
        usual_sides = usual_cells[:, 2:] - usual_cells[:, :2]
        # Loose tolerance: Detectron's first version rounded its anchors, which Detectron2 also ignores.
        if sides.shape == usual_sides.shape and torch.allclose(sides, usual_sides, rtol=0.05, atol=2):
            ratios.add(default.anchor_aspect_ratios)
            continue
        areas = sides.prod(dim=1).sqrt()
        if not torch.allclose(areas, areas[:1], rtol=0.01):
            raise _unsupported(source, f"anchors of several sizes on a level: sides {sides.tolist()}")
        sizes[level] = round(float(areas.mean()), 3)
        ratios.add(tuple(round(value, 3) for value in (sides[:, 1] / sides[:, 0]).tolist()))
    if len(ratios) > 1:
        raise _unsupported(source, f"anchors with other aspect ratios on each level: {sorted(ratios)}")
    if ratios:
        fields |= dict(zip(ANCHORS, (tuple(sizes), ratios.pop()), strict=True))
    return fields | ({"preprocessing": pixels} if pixels else {})


def _near(found: tuple[float, ...], usual: tuple[float, ...]) -> bool:
    return all(abs(a - b) <= 0.01 for a, b in zip(found, usual, strict=True))


def _unsupported(source: str | Path, found: str) -> UserError:
    return UserError(
        f"{source}: {found}",
        "a Faster or Mask R-CNN of Detectron2's Base-RCNN-FPN.yaml with ResNet 18, 34, 50 or 101 or ResNeXt 101, such "
        "as COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_3x",
        "export a model with that configuration",
    )


# Detectron2's configuration

# Fields of ModelConfig by Detectron2's keys, for values that are used unchanged.
_KEYS: dict[str, tuple[str, type]] = {
    "MODEL.RESNETS.STRIDE_IN_1X1": ("stride_in_1x1", bool),
    "MODEL.RPN.PRE_NMS_TOPK_TEST": ("rpn_candidates_per_level", int),
    "MODEL.RPN.POST_NMS_TOPK_TEST": ("proposals", int),
    "MODEL.RPN.NMS_THRESH": ("rpn_nms_iou", float),
    "MODEL.PROPOSAL_GENERATOR.MIN_SIZE": ("proposal_min_side_px", float),
    "MODEL.ROI_HEADS.SCORE_THRESH_TEST": ("score_threshold", float),
    "MODEL.ROI_HEADS.NMS_THRESH_TEST": ("nms_iou", float),
    "MODEL.ROI_BOX_HEAD.POOLER_SAMPLING_RATIO": ("pool_sampling_ratio", int),
    "MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION": ("mask_pool_size", int),
    "TEST.DETECTIONS_PER_IMAGE": ("detections", int),
    "INPUT.MIN_SIZE_TEST": ("preprocessing.min_size_px", int),
    "INPUT.MAX_SIZE_TEST": ("preprocessing.max_size_px", int),
    "INPUT.FORMAT": ("preprocessing.channel_order", str),
}
# Settings with their supported values.
_REQUIRED: dict[str, tuple[Any, ...]] = {
    "MODEL.META_ARCHITECTURE": ("GeneralizedRCNN",),
    "MODEL.BACKBONE.NAME": ("build_resnet_fpn_backbone",),
    "MODEL.PROPOSAL_GENERATOR.NAME": ("RPN",),
    "MODEL.ANCHOR_GENERATOR.NAME": ("DefaultAnchorGenerator",),
    "MODEL.ANCHOR_GENERATOR.OFFSET": (0, 0.0),
    "MODEL.ROI_HEADS.NAME": ("StandardROIHeads",),
    "MODEL.FPN.FUSE_TYPE": ("sum",),
    "MODEL.RESNETS.RES5_DILATION": (1,),
    "MODEL.ROI_BOX_HEAD.POOLER_TYPE": ("ROIAlignV2", "ROIAlign"),
    "INPUT.FORMAT": ("BGR", "RGB"),
}


class _DetectronConfig:
    """Detectron2's YAML file, including its base files.

    Raises:
        UserError: if it cannot be read, is not YAML, or has settings of another architecture.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.notes: tuple[str, ...] = ()
        self.values = self._read(path, ())
        for key, allowed in _REQUIRED.items():
            if (found := self.value(key)) is not None and found not in allowed:
                raise self._wrong(key, f"{found!r}", " or ".join(map(str, allowed)))
        box, mask = (
            tuple(self.value(f"MODEL.ROI_{head}_HEAD.POOLER_{kind}") for kind in ("TYPE", "SAMPLING_RATIO"))
            for head in ("BOX", "MASK")
        )
        if self.value("MODEL.MASK_ON") and None not in (*box, *mask) and box != mask:
            raise self._wrong("MODEL.ROI_MASK_HEAD.POOLER_TYPE", f"{mask}, but {box} in the box head", "the same")

    def _read(self, path: Path, above: tuple[Path, ...]) -> dict[str, Any]:
        """Settings of a file merged over those of its base."""
        try:
            values = yaml.load(path.read_text(encoding="utf-8"), _Loader)  # a safe loader
        except OSError as error:
            raise UserError(
                f"{path}: {error.strerror}", "Detectron2's configuration of the weights", "check --detectron2-config"
            ) from error
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            reason = str(error).replace("\n", " ")
            raise UserError(
                f"{path}: not YAML ({reason})",
                "Detectron2's configuration of the weights",
                "write it with open(FILE, 'w').write(cfg.dump())",
            ) from error
        if not isinstance(values, dict):
            raise UserError(
                f"{path}: {type(values).__name__} instead of settings",
                "Detectron2's configuration of the weights",
                "write it with open(FILE, 'w').write(cfg.dump())",
            )
        base = values.pop("_BASE_", None)
        if base is None:
            return values
        parent = path.parent / str(base)
        if not parent.is_file() or parent.resolve() in (path.resolve(), *above):
            self.notes += (f"{path}: its _BASE_ {base} was not read, so Base-RCNN-FPN.yaml's settings are assumed",)
            return values
        return merged(self._read(parent, (*above, path.resolve())), values)

    def value(self, key: str) -> Any:
        """Value of a dotted key, or None if the file does not state it."""
        found: Any = self.values
        for part in key.split("."):
            found = found.get(part) if isinstance(found, dict) else None
        if isinstance(found, str) and found[:1] in "([":  # tuples are strings in Detectron2's own files
            try:
                return ast.literal_eval(found)
            except (ValueError, SyntaxError):
                return found
        return found

    def numbers(self, key: str, length: int | None = None) -> tuple[float, ...] | None:
        """Value of a key as numbers."""
        found = self.value(key)
        if found is None:
            return None
        if not isinstance(found, (list, tuple)) or not all(type(each) in (int, float) for each in found):
            raise self._wrong(key, f"{found!r}", "a list of numbers")
        if length is not None and len(found) != length:
            raise self._wrong(key, f"{len(found)} numbers", str(length))
        return tuple(map(float, found))

    @property
    def is_coco(self) -> bool:
        """Whether the model was trained on COCO's own categories."""
        names = self.value("DATASETS.TRAIN")
        return isinstance(names, (list, tuple)) and bool(names) and all(str(n).startswith("coco_") for n in names)

    def check(self, classes: int, layout: tuple[tuple[int, ...], int, tuple[int, int]], source: str | Path) -> None:
        """Raise a UserError if the settings contradict the tensors."""
        _, _, (width, group_width) = layout
        groups, group = (self.value(f"MODEL.RESNETS.{name}") for name in ("NUM_GROUPS", "WIDTH_PER_GROUP"))
        for key, stated, found in (
            ("MODEL.ROI_HEADS.NUM_CLASSES", self.value("MODEL.ROI_HEADS.NUM_CLASSES"), classes),
            ("MODEL.RESNETS.NUM_GROUPS", groups, width // max(group_width, 1)),
            ("MODEL.RESNETS.WIDTH_PER_GROUP", group, group_width),
        ):
            if stated is not None and stated != found:
                raise UserError(
                    f"{self.path}: {key} {stated}, and {source} with {found}",
                    "the configuration of these weights",
                    "specify it with --detectron2-config FILE, or move this file away",
                )

    def fields(self) -> dict[str, Any]:
        """The stated fields of `ModelConfig`; pixel statistics from 0 to 255 in the model's channel order."""
        fields: dict[str, Any] = {}
        for key, (field, kind) in _KEYS.items():
            value = self.value(key)
            if value is None:
                continue
            value = float(value) if kind is float and type(value) is int else value
            if type(value) is not kind:
                raise self._wrong(key, f"{value!r}", f"of type {kind.__name__}")
            section, _, name = field.rpartition(".")
            fields = merged(fields, {section: {name: value}} if section else {name: value})
        if fields.get("preprocessing", {}).get("min_size_px") == 0:
            raise self._wrong("INPUT.MIN_SIZE_TEST", "0 (images are not resized)", "the shorter side in pixels")
        for key, name in (("MODEL.PIXEL_MEAN", "mean"), ("MODEL.PIXEL_STD", "std")):
            if (values := self.numbers(key, length=3)) is not None:
                fields = merged(fields, {"preprocessing": {name: values}})
        pooler = self.value("MODEL.ROI_BOX_HEAD.POOLER_TYPE")
        if pooler is not None:
            fields["pool_aligned"] = pooler == "ROIAlignV2"
        for key, field in (("SIZES", "anchor_sizes_px"), ("ASPECT_RATIOS", "anchor_aspect_ratios")):
            if (values := self._of_levels(f"MODEL.ANCHOR_GENERATOR.{key}")) is not None:
                fields[field] = values
        return fields

    def _of_levels(self, key: str) -> tuple[float, ...] | None:
        """Anchor sizes, one per level; or aspect ratios, the same on all levels."""
        found = self.value(key)
        if found is None:
            return None
        rows = found if isinstance(found, (list, tuple)) else [found]
        rows = [list(row) if isinstance(row, (list, tuple)) else [row] for row in rows]
        if not all(type(each) in (int, float) for row in rows for each in row):
            raise self._wrong(key, f"{found!r}", "a list of lists of numbers")
        if key.endswith("ASPECT_RATIOS"):
            if any(row != rows[0] for row in rows):
                raise self._wrong(key, f"{found!r}", "the same aspect ratios on every level")
            return tuple(map(float, rows[0]))
        levels = len(ModelConfig().anchor_sizes_px)
        rows = rows * levels if len(rows) == 1 else rows
        if len(rows) != levels or any(len(row) != 1 for row in rows):
            raise self._wrong(key, f"{found!r}", f"one size on each of {levels} levels")
        return tuple(float(row[0]) for row in rows)

    def _wrong(self, key: str, found: str, expected: str) -> UserError:
        return UserError(
            f"{self.path}: {key} {found}",
            f"{expected}: a Faster or Mask R-CNN of Base-RCNN-FPN.yaml",
            "export a model with that configuration, or correct the file",
        )


class _Loader(yaml.SafeLoader):
    """Safe loader that also reads the tuples of older dumps."""


def _tuple(loader: _Loader, node: yaml.SequenceNode) -> tuple[Any, ...]:
    return tuple(loader.construct_sequence(node))


_Loader.add_constructor("tag:yaml.org,2002:python/tuple", _tuple)

"""mmdetection's Faster and Mask R-CNN with ResNet or ResNeXt and FPN, of versions 2 and 3.

A checkpoint of its trainer contains the class names and the text of the configuration in the entry `meta`. The text is
a Python program of assignments, of which only literals are read. Settings that it does not state have the values of
mmdetection's `mask-rcnn_r50_fpn.py`. Images are resized as in torchvision, with sides up to a pixel shorter than
mmdetection's.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from maskrcnn.config import changed
from maskrcnn.errors import UserError
from maskrcnn.model.roi_heads import BOX_WEIGHTS
from maskrcnn.model.rpn import BOX_WEIGHTS as ANCHOR_WEIGHTS
from maskrcnn.weights.foreign import (
    ANCHOR_BOXES,
    CLASS_BOXES,
    PIXELS,
    SIZES,
    UNSTATED,
    Imported,
    class_count,
    coco_classes,
    detector_of,
    scaled_boxes,
)

_STRIDES = (4, 8, 16, 32, 64)
# Fields of ModelConfig in which mmdetection's models differ from torchvision's.
_CONVENTIONS: dict[str, Any] = {
    "batch_norm_epsilon": 1e-5,
    "anchors_rounded": False,
    "anchor_strides_px": _STRIDES,
    "pool_aligned": True,  # the default of mmcv's RoIAlign
    "pool_sampling_ratio": 0,
    "proposal_min_side_px": 0.0,
    "detection_min_side_px": 0.0,
}
# Patterns of tensor names with their replacements.
_RENAMED: tuple[tuple[str, str | Callable[[re.Match[str]], str]], ...] = (
    (r"backbone\.((?:conv1|bn1|layer[1-4])\..+)", r"backbone.body.\1"),
    (r"neck\.lateral_convs\.([0-3])\.conv\.(\w+)", r"backbone.fpn.inner_blocks.\1.0.\2"),
    (r"neck\.fpn_convs\.([0-3])\.conv\.(\w+)", r"backbone.fpn.layer_blocks.\1.0.\2"),
    (r"rpn_head\.rpn_conv\.(\w+)", r"rpn.head.conv.0.0.\1"),
    (r"rpn_head\.rpn_cls\.(\w+)", r"rpn.head.cls_logits.\1"),
    (r"rpn_head\.rpn_reg\.(\w+)", r"rpn.head.bbox_pred.\1"),
    (r"roi_head\.bbox_head\.shared_fcs\.([01])\.(\w+)", lambda m: f"roi_heads.box_head.fc{int(m[1]) + 6}.{m[2]}"),
    (r"roi_head\.bbox_head\.fc_cls\.(\w+)", r"roi_heads.box_predictor.cls_score.\1"),
    (r"roi_head\.bbox_head\.fc_reg\.(\w+)", r"roi_heads.box_predictor.bbox_pred.\1"),
    (r"roi_head\.mask_head\.convs\.(\d+)\.conv\.(\w+)", r"roi_heads.mask_head.\1.0.\2"),
    (r"roi_head\.mask_head\.upsample\.(\w+)", r"roi_heads.mask_predictor.conv5_mask.\1"),
    (r"roi_head\.mask_head\.conv_logits\.(\w+)", r"roi_heads.mask_predictor.mask_fcn_logits.\1"),
)


def is_mmdetection(names: Iterable[str]) -> bool:
    """Whether these are tensor names of an mmdetection model with FPN."""
    return any(name.startswith(("neck.lateral_convs.", "rpn_head.", "roi_head.", "bbox_head.")) for name in names)


def from_mmdetection(tensors: dict[str, Tensor], source: str | Path, meta: dict[str, Any] | None = None) -> Imported:
    """Convert mmdetection's weights to our names and order of classes.

    Args:
        tensors: a Faster or Mask R-CNN under mmdetection's names; 80 classes without names are COCO's.
        source: origin of the tensors, for error messages.
        meta: the entry `meta` of the checkpoint.

    Returns:
        the tensors and the configuration: architecture, widths and number of classes follow from the tensors, the rest
        from the configuration in `meta` or the conventions.

    Raises:
        UserError: for tensors or settings of another architecture, and if classes and class names differ in number.
    """

    def unsupported(found: str) -> UserError:
        return UserError(
            f"{source}: {found}",
            "a Faster or Mask R-CNN of mmdetection 2 or 3 with ResNet or ResNeXt and FPN, such as mask-rcnn_r50_fpn",
            "export a model with that configuration",
        )

    renamed = {}
    for name, value in tensors.items():
        if not name.startswith("data_preprocessor."):
            renamed[_our_name(name, unsupported)] = value
    is_frozen = not any(name.endswith("num_batches_tracked") for name in renamed)
    found, config = detector_of(renamed, _CONVENTIONS | {"frozen_batch_norm": is_frozen}, unsupported)
    meta = meta or {}
    text = next((meta[key] for key in ("cfg", "config") if isinstance(meta.get(key), str)), None)
    settings = _literals(text) if text is not None else {}
    fields, scales = _fields(settings, unsupported)
    for layer, ours in ((CLASS_BOXES, BOX_WEIGHTS), (ANCHOR_BOXES, ANCHOR_WEIGHTS)):
        if (own := scales.get(layer)) is not None:
            found = scaled_boxes(found, layer, own, ours)
    if names := _class_names(meta):
        if len(names) != class_count(found):
            raise unsupported(f"{len(names)} class names in its meta, and tensors of {class_count(found)} classes")
        fields["class_names"] = names
        coco, ids = coco_classes()
        fields["category_ids"] = ids if names == coco else tuple(range(1, len(names) + 1))
    known = {*fields, *(f"preprocessing.{name}" for name in fields.get("preprocessing", {}))}
    note = "settings of the configuration in its meta" if settings else "no configuration in its meta"
    return Imported(
        found, changed(config, fields), tuple(field for field in UNSTATED if field not in known), (f"{source}: {note}",)
    )


def _our_name(name: str, unsupported: Callable[[str], UserError]) -> str:
    for pattern, present in _RENAMED:
        if found := re.fullmatch(pattern, name):
            return present(found) if callable(present) else found.expand(present)
    version = " of mmdetection 1" if name.startswith(("bbox_head.", "mask_head.")) else ""
    raise unsupported(f"tensor {name}{version}, unknown in a ResNet with FPN and the standard heads")


def _class_names(meta: dict[str, Any]) -> tuple[str, ...]:
    """Class names of a checkpoint of version 2 or 3; () if it has none."""
    data = meta.get("dataset_meta")
    for values in (meta, data if isinstance(data, dict) else {}):
        for key in ("CLASSES", "classes"):
            names = values.get(key)
            if isinstance(names, (list, tuple)) and names and all(isinstance(name, str) for name in names):
                return tuple(names)
    return ()


# mmdetection's configuration


def _literals(text: str) -> dict[str, Any]:
    """Literal values assigned in a Python text, which is not executed."""
    try:
        body = ast.parse(text).body
    except (SyntaxError, ValueError, RecursionError):
        return {}
    return {
        target.id: _literal(statement.value)
        for statement in body
        if isinstance(statement, ast.Assign)
        for target in statement.targets
        if isinstance(target, ast.Name)
    }


def _literal(node: ast.expr) -> Any:
    """Value of a literal, `dict(…)` included; None for any other expression."""
    if isinstance(node, ast.Call):
        is_dict = isinstance(node.func, ast.Name) and node.func.id == "dict" and not node.args
        return {word.arg: _literal(word.value) for word in node.keywords if word.arg} if is_dict else None
    if isinstance(node, ast.Dict):
        pairs = [(_literal(key), _literal(value)) for key, value in zip(node.keys, node.values, strict=True) if key]
        return {key: value for key, value in pairs if isinstance(key, str)}
    if isinstance(node, (ast.List, ast.Tuple)):
        return [_literal(each) for each in node.elts]
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError, SyntaxError):
        return None


def _at(values: Any, path: str) -> Any:
    """Value of a dotted path, or None."""
    for part in path.split("."):
        values = values.get(part) if isinstance(values, dict) else None
    return values


def _steps(values: Any) -> Iterator[dict[str, Any]]:
    """Dictionaries with a type, at any depth."""
    inner = values.values() if isinstance(values, dict) else values if isinstance(values, list) else ()
    if isinstance(values, dict) and "type" in values:
        yield values
    for each in inner:
        yield from _steps(each)


def _fields(
    settings: dict[str, Any], unsupported: Callable[[str], UserError]
) -> tuple[dict[str, Any], dict[str, tuple[float, ...]]]:
    """Fields of `ModelConfig` stated by a configuration, and the weights of box deltas by layer."""
    model = settings.get("model")
    test = _at(model, "test_cfg") or settings.get("test_cfg")
    for path, allowed in (
        ("type", ("MaskRCNN", "FasterRCNN")),
        ("backbone.type", ("ResNet", "ResNeXt")),
        ("neck.type", ("FPN",)),
        ("rpn_head.type", ("RPNHead",)),
        ("rpn_head.anchor_generator.type", ("AnchorGenerator",)),
        ("roi_head.type", ("StandardRoIHead",)),
        ("roi_head.bbox_roi_extractor.roi_layer.type", ("RoIAlign",)),
        ("rpn_head.anchor_generator.center_offset", (0, 0.0)),
        ("rpn_head.anchor_generator.centers", ()),
        ("rpn_head.anchor_generator.base_sizes", ()),
    ):
        if (value := _at(model, path)) is not None and value not in allowed:
            raise unsupported(f"model.{path} {value!r} in its configuration")
    fields: dict[str, Any] = {}

    def take(name: str, *values: Any, kind: type = float) -> None:
        value = next((value for value in values if type(value) in (int, float)), None)
        if value is not None:
            fields[name] = kind(value)

    take("rpn_candidates_per_level", _at(test, "rpn.nms_pre"), kind=int)
    take("proposals", _at(test, "rpn.max_per_img"), _at(test, "rpn.max_num"), kind=int)
    take("rpn_nms_iou", _at(test, "rpn.nms.iou_threshold"), _at(test, "rpn.nms_thr"))
    take("proposal_min_side_px", _at(test, "rpn.min_bbox_size"))
    take("score_threshold", _at(test, "rcnn.score_thr"))
    take("nms_iou", _at(test, "rcnn.nms.iou_threshold"), _at(test, "rcnn.nms.iou_thr"))
    take("detections", _at(test, "rcnn.max_per_img"), kind=int)
    take("pool_sampling_ratio", _at(model, "roi_head.bbox_roi_extractor.roi_layer.sampling_ratio"), kind=int)
    aligned, style = _at(model, "roi_head.bbox_roi_extractor.roi_layer.aligned"), _at(model, "backbone.style")
    fields |= {"pool_aligned": aligned} if isinstance(aligned, bool) else {}
    fields |= {"stride_in_1x1": style == "caffe"} if isinstance(style, str) else {}
    anchors = _at(model, "rpn_head.anchor_generator")
    if anchors is not None:
        fields |= _anchors(anchors, unsupported)
    if pixels := _pixels(settings) | _sizes(settings):
        fields["preprocessing"] = pixels
    scales = {}
    for layer, head in ((CLASS_BOXES, "roi_head.bbox_head"), (ANCHOR_BOXES, "rpn_head")):
        means, stds = (_at(model, f"{head}.bbox_coder.target_{kind}") for kind in ("means", "stds"))
        if means is not None and any(means):
            raise unsupported(f"model.{head}.bbox_coder.target_means {means}")
        if isinstance(stds, list) and len(stds) == 4 and all(stds):
            scales[layer] = tuple(1 / float(value) for value in stds)
    return fields, scales


def _anchors(anchors: dict[str, Any], unsupported: Callable[[str], UserError]) -> dict[str, Any]:
    scales, ratios, strides = (anchors.get(name) for name in ("scales", "ratios", "strides"))
    if not isinstance(scales, list) or len(scales) != 1 or not isinstance(ratios, list) or not ratios:
        raise unsupported(f"anchors with the scales {scales} and ratios {ratios}, not one scale")
    if strides is not None and tuple(strides) != _STRIDES:
        raise unsupported(f"anchors with the strides {strides}")
    return {
        "anchor_sizes_px": tuple(float(scales[0] * stride) for stride in _STRIDES),
        "anchor_aspect_ratios": tuple(map(float, ratios)),
    }


def _pixels(settings: dict[str, Any]) -> dict[str, Any]:
    """Channel order, mean and std."""
    places = (_at(settings, "model.data_preprocessor"), settings.get("data_preprocessor"), settings.get("img_norm_cfg"))
    steps = (step for step in _steps(settings.get("test_pipeline")) if step["type"] == "Normalize")
    stated = next((place for place in (*places, *steps) if isinstance(place, dict) and place.get("mean")), None)
    if stated is None:
        return {}
    to_rgb = stated.get("bgr_to_rgb", stated.get("to_rgb", "img_norm_cfg" in settings))
    mean, std = (tuple(float(value) / 255 for value in stated[name]) for name in ("mean", "std"))
    return dict(zip((name.partition(".")[2] for name in PIXELS), ("RGB" if to_rgb else "BGR", mean, std), strict=True))


def _sizes(settings: dict[str, Any]) -> dict[str, Any]:
    """Sides of the resized images in the test pipeline."""
    for step in _steps(settings.get("test_pipeline")):
        scale = step.get("img_scale", step.get("scale"))
        if isinstance(scale, list) and len(scale) == 2 and all(isinstance(side, int) for side in scale):
            return dict(zip((name.partition(".")[2] for name in SIZES), (min(scale), max(scale)), strict=True))
    return {}

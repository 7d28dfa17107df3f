"""Detectron2's Faster and Mask R-CNN with ResNet and FPN: reading, renaming and model conventions.

Weights do not define how a model computes. The settings here are those of Detectron2's `Base-RCNN-FPN.yaml` and its
model zoo; what a file states about them is checked.

Files of the model zoo are pickles of NumPy arrays. A pickle is a program that names functions and calls them; the
unpickler here knows the few that rebuild arrays and rejects every other name before looking it up.
"""

from __future__ import annotations

import pickle
import re
from collections import OrderedDict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from torch import Tensor

from maskrcnn.config import ModelConfig, model_config
from maskrcnn.errors import UserError
from maskrcnn.imaging.preprocess import Preprocessing
from maskrcnn.model.rpn import cell_anchors

PICKLE_SUFFIX = ".pkl"  # of the model zoo's files
_BODY, _PREDICTOR = "backbone.bottom_up.", "roi_heads.box_predictor."
_PIXEL_MEAN_BGR, _PIXEL_STD = (103.53, 116.28, 123.675), (1.0, 1.0, 1.0)  # MODEL.PIXEL_MEAN and PIXEL_STD

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

# Depth by (blocks of the stages res2 to res5, bottleneck blocks).
_DEPTHS: dict[tuple[tuple[int, ...], bool], int] = {
    ((2, 2, 2, 2), False): 18,
    ((3, 4, 6, 3), False): 34,
    ((3, 4, 6, 3), True): 50,
    ((3, 4, 23, 3), True): 101,
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


def from_detectron2(tensors: dict[str, Tensor], source: str | Path) -> tuple[dict[str, Tensor], ModelConfig]:
    """Convert Detectron2 weights to our names and order of channels and classes.

    Args:
        tensors: a Faster or Mask R-CNN under Detectron2's names; 80 classes are COCO's.
        source: origin of the tensors, for error messages.

    Returns:
        the tensors and the configuration of the model: depth, widths, classes and masks follow from the tensors,
        everything else from `CONVENTIONS`.

    Raises:
        UserError: for tensors of another architecture, or pixel statistics or anchors that differ from the model zoo's.
    """
    _check_buffers(tensors, source)
    given = {name: value for name, value in tensors.items() if not _BUFFERS.fullmatch(name)}
    renamed = {_our_name(name, source): value for name, value in given.items()}
    missing = sorted(_landmarks(renamed) - set(renamed))
    if missing:
        raise _unsupported(source, f"a Detectron2 model without {', '.join(missing)}")
    classes = renamed[_PREDICTOR + "cls_score.weight"].shape[0] - 1
    _check_class_specific(renamed, classes, source)
    config = _config(renamed, classes, source)
    renamed = _background_first(renamed)
    renamed["backbone.body.conv1.weight"] = renamed["backbone.body.conv1.weight"].flip(1)  # for RGB instead of BGR
    return renamed, config


def coco_classes() -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Names and category ids of the 80 COCO classes, ordered by id."""
    categories = torchvision.models.detection.MaskRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"]
    used = [(name, number) for number, name in enumerate(categories) if number > 0 and name != "N/A"]
    names, ids = zip(*used, strict=True)
    return names, ids


def _block(found: re.Match) -> str:
    """Torchvision's name of a block."""
    return f"backbone.body.layer{int(found[1]) - 1}.{found[2]}"


def _our_name(name: str, source: str | Path) -> str:
    for pattern, present in _RENAMED:
        if found := re.fullmatch(pattern, name):
            return present(found) if callable(present) else found.expand(present)
    raise _unsupported(source, f"tensor {name}, unknown in a ResNet with FPN and Detectron2's standard heads")


def _landmarks(renamed: Iterable[str]) -> set[str]:
    """Tensors whose shapes define the architecture."""
    of_masks = {"roi_heads.mask_predictor.mask_fcn_logits.weight", "roi_heads.mask_head.0.0.weight"}
    return {
        "backbone.body.conv1.weight",
        "backbone.fpn.inner_blocks.0.0.weight",
        "roi_heads.box_head.fc6.weight",
        *(f"{_PREDICTOR}{layer}.{kind}" for layer in ("cls_score", "bbox_pred") for kind in ("weight", "bias")),
        *(of_masks if any(name.startswith("roi_heads.mask_") for name in renamed) else ()),
    }


def _check_class_specific(renamed: dict[str, Tensor], classes: int, source: str | Path) -> None:
    """Reject class-agnostic boxes or masks."""
    for name, each in ((_PREDICTOR + "bbox_pred.weight", 4), ("roi_heads.mask_predictor.mask_fcn_logits.weight", 1)):
        rows = renamed[name].shape[0] if name in renamed else each * classes
        if rows != each * classes:
            shared = " shared by all classes (CLS_AGNOSTIC_BBOX_REG or _MASK)" if rows == each else ""
            raise _unsupported(source, f"{rows} rows of {name}{shared}, for {classes} classes")


def _config(renamed: dict[str, Tensor], classes: int, source: str | Path) -> ModelConfig:
    """Configuration of the model that has tensors of these shapes."""
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
        raise _unsupported(source, f"a ResNet with {counts} blocks of {3 if has_bottlenecks else 2} convolutions")
    return _DEPTHS[counts, has_bottlenecks]


def _mask_channels(renamed: dict[str, Tensor]) -> tuple[int, ...]:
    weights = [name for name in renamed if re.fullmatch(r"roi_heads\.mask_head\.\d+\.0\.weight", name)]
    return tuple(renamed[name].shape[0] for name in sorted(weights, key=lambda name: (len(name), name)))


def _background_first(renamed: dict[str, Tensor]) -> dict[str, Tensor]:
    """Move the background class from last to 0, and add its boxes and masks, which Detectron2 does not have."""
    converted = dict(renamed)
    for name, value in renamed.items():
        if name.startswith(_PREDICTOR + "cls_score."):
            converted[name] = torch.cat([value[-1:], value[:-1]])
        elif name.startswith(_PREDICTOR + "bbox_pred."):
            converted[name] = torch.cat([torch.zeros_like(value[:4]), value])
        elif name.startswith("roi_heads.mask_predictor.mask_fcn_logits."):
            converted[name] = torch.cat([torch.zeros_like(value[:1]), value])
    return converted


def _check_buffers(tensors: dict[str, Tensor], source: str | Path) -> None:
    """Check pixel statistics and anchors, which older files contain, against the conventions."""
    for name, expected in (("pixel_mean", _PIXEL_MEAN_BGR), ("pixel_std", _PIXEL_STD)):
        found = tensors.get(name, torch.tensor(expected)).flatten().tolist()
        if len(found) != 3 or any(abs(a - b) > 0.01 for a, b in zip(found, expected, strict=True)):
            raise _unsupported(source, f"{name} {found} instead of {list(expected)}")
    default = ModelConfig()
    for name, cells in tensors.items():
        match = _BUFFERS.fullmatch(name)
        if match is None or match[1] is None:
            continue
        level = int(match[1])
        size = default.anchor_sizes_px[level] if level < len(default.anchor_sizes_px) else 0.0
        anchors = cell_anchors(size, default.anchor_aspect_ratios, rounded=False)
        sides, expected_sides = (corners[:, 2:] - corners[:, :2] for corners in (cells.float(), anchors))
        # Loose tolerance: Detectron's first version rounded its anchors, which Detectron2 ignores too.
        if sides.shape != expected_sides.shape or not torch.allclose(sides, expected_sides, rtol=0.05, atol=2):
            raise _unsupported(source, f"anchors {name} with sides {sides.tolist()}")


def _unsupported(source: str | Path, found: str) -> UserError:
    return UserError(
        f"{source}: {found}",
        "a Faster or Mask R-CNN of Detectron2's Base-RCNN-FPN.yaml with ResNet 18, 34, 50 or 101, such as "
        "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_3x",
        "export a model of that configuration",
    )


def read_model_zoo(path: Path) -> dict[str, Tensor]:
    """Read the arrays of a Detectron2 model zoo file as tensors.

    Raises:
        UserError: if the file is missing, is not a complete pickle, refers to a class or function that arrays do not
            need (nothing in it has been executed then), or contains no named arrays.
    """
    values = _read_pickle(path)
    arrays = values.get("model") if isinstance(values, dict) else None
    if not isinstance(arrays, dict) or not all(
        isinstance(value, (np.ndarray, np.number)) and value.dtype.kind in "fiu" for value in arrays.values()
    ):
        keys = f" with {', '.join(map(str, list(values)[:3]))}" if isinstance(values, dict) else ""
        raise UserError(
            f"{path}: a pickled {type(values).__name__}{keys}",
            "a dict whose entry 'model' maps names to arrays, as in Detectron2's model zoo",
            "use a detector of Detectron2's model zoo; backbones and Detectron's first version are not supported",
        )
    return {name: torch.tensor(value) for name, value in arrays.items()}


def _read_pickle(path: Path) -> Any:
    """Content of a pickle of NumPy arrays in lists and dictionaries."""
    if not path.is_file():
        raise UserError(f"no file {path}", "a pickle of weights", "check the path given with --weights")
    try:
        with open(path, "rb") as file:
            return _ArraysOnly(file, path).load()
    except UserError:
        raise
    except Exception as error:  # a corrupt pickle can raise nearly any error
        raise UserError(
            f"{path}: not a complete pickle of NumPy arrays ({type(error).__name__}: {str(error)[:120]})",
            "a file of Detectron2's model zoo",
            "download it again and compare its size; name files of torch.save .pth",
        ) from error


def _encoded(text: str, encoding: str) -> bytes:
    """Replaces `_codecs.encode`, with which Python 3 writes bytes that Python 2 can read."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"bytes in the encoding {encoding!r}")
    return text.encode("latin1")


def _no_bytes() -> bytes:
    """Replaces `bytes`, which Python 3 calls for empty ones; an argument could exhaust the memory."""
    return b""


# The first element of a reduced array or scalar is the function that rebuilds it.
_REBUILDING = {
    "multiarray._reconstruct": np.zeros(1).__reduce__()[0],
    "numeric._frombuffer": np.zeros(1).__reduce_ex__(5)[0],
    "multiarray.scalar": np.float32(0).__reduce__()[0],
}
_ALLOWED = {
    "numpy.dtype": np.dtype,
    "numpy.ndarray": np.ndarray,
    **{f"numpy.core.{name}": function for name, function in _REBUILDING.items()},  # NumPy 1
    **{f"numpy._core.{name}": function for name, function in _REBUILDING.items()},  # NumPy 2
    "_codecs.encode": _encoded,
    "__builtin__.bytes": _no_bytes,
    "collections.OrderedDict": OrderedDict,
}


class _ArraysOnly(pickle.Unpickler):
    """Unpickler that resolves only the names in `_ALLOWED`."""

    def __init__(self, file: Any, path: Path) -> None:
        super().__init__(file, encoding="latin1")  # required by NumPy for arrays pickled by Python 2
        self.path = path

    def find_class(self, module: str, name: str) -> Any:
        """Resolve a name of the pickle.

        Raises:
            UserError: for a name that arrays do not need.
        """
        found = _ALLOWED.get(f"{module}.{name}")
        if found is None:
            raise UserError(
                f"{self.path}: a pickle that calls {module}.{name}",
                "NumPy arrays, numbers, strings and containers only",
                "save plain arrays; a pickle can execute any program, so make sure of the origin of this file",
            )
        return found

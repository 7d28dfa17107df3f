"""Pretrained weights: our checkpoints, torchvision's or Detectron2's files, or torchvision's weights by name.

A name is a member of torchvision's enumerations: `COCO_V1` or `DEFAULT` for a detector, `IMAGENET1K_V1` or
`IMAGENET1K_V2` for a backbone. torch.hub downloads its file once.
"""

from __future__ import annotations

import dataclasses
import http.client
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import torch
import torchvision
from torch import Tensor
from torchvision.models import WeightsEnum

from maskrcnn.config import ModelConfig, model_config, usual_epsilon
from maskrcnn.errors import UserError
from maskrcnn.imaging.preprocess import Preprocessing
from maskrcnn.keypoints import COCO_NAMES
from maskrcnn.model.detector import MaskRCNN
from maskrcnn.weights.checkpoint import SUFFIX, config_of, load_weights, read_state_dict
from maskrcnn.weights.detectron2 import CONVENTIONS, PICKLE_SUFFIX, from_detectron2, is_detectron2

BODY = "backbone.body."
# Weight [channels, keypoints, 4, 4] and bias of the heat maps.
HEAT_MAPS = "roi_heads.keypoint_predictor.kps_score_lowres."
_CLASSIFIER = "roi_heads.box_predictor.cls_score.weight"  # [1 + classes, channels]
_FILE_SUFFIXES = (SUFFIX, PICKLE_SUFFIX, ".pth", ".pt", ".bin", ".ckpt")
_COCO_LABELS = 90  # labels of torchvision's COCO weights: COCO's category ids, ten of them unused


def _named_weights(name: str, config: ModelConfig | None) -> WeightsEnum:
    """Torchvision's enumeration member of a name.

    Args:
        name: member of the detector's or the backbone's enumeration (`COCO_V1`), or a full name.
        config: model that the weights are for.

    Raises:
        UserError: for an unknown name.
    """
    members: dict[str, WeightsEnum] = {}
    for architecture in (config.backbone, config.name) if config else ():
        if architecture in torchvision.models.list_models():  # some of our models are not in torchvision
            members |= torchvision.models.get_model_weights(architecture).__members__
    if name in members:
        return members[name]
    try:
        return torchvision.models.get_weight(name)
    except (ValueError, KeyError) as error:
        raise UserError(
            f"weights {name!r}: neither a file nor torchvision weights" + (f" for {config.name}" if config else ""),
            f"a file, or one of {', '.join(members)}" if members else "a file",
            "check the path or the name given with --weights",
        ) from error


def _pixels_of(weights: WeightsEnum) -> dict[str, Any]:
    """Pixel mean and std that weights were trained with, if not the usual (`VGG16_Weights.IMAGENET1K_FEATURES`)."""
    given = getattr(weights.transforms, "keywords", {})
    return {name: tuple(given[name]) for name in ("mean", "std") if name in given}


def downloaded(weights: WeightsEnum) -> Path:
    """File of torchvision's weights in torch.hub's folder, downloaded if missing.

    Raises:
        UserError: if it cannot be downloaded.
    """
    path = Path(torch.hub.get_dir()) / "checkpoints" / Path(urlparse(weights.url).path).name
    if not path.is_file():
        try:
            weights.get_state_dict(progress=True, check_hash=True, map_location="cpu", weights_only=True)
        except (OSError, http.client.HTTPException, RuntimeError) as error:  # RuntimeError: hash mismatch
            raise UserError(
                f"{weights!r}: {weights.url} cannot be downloaded ({error})",
                f"a network connection, or the file at {path}",
                "download it elsewhere, and place it there or pass it with --weights FILE",
            ) from error
    return path


@dataclass(frozen=True, kw_only=True)
class StartingWeights:
    """Pretrained tensors and what is known about them."""

    tensors: dict[str, Tensor]  # named as in our model
    source: str  # name in messages
    path: Path
    config: ModelConfig | None = None  # configuration of the saved model, if known
    pixels: dict[str, Any] = field(default_factory=dict)  # mean and std of a classifier, if not the usual
    is_legacy: bool = False  # torchvision's COCO_LEGACY keypoint weights, whose tensors look like COCO_V1

    @property
    def is_backbone(self) -> bool:
        """Whether they are of a classifier, which shares only the backbone with a detector."""
        return all(name.startswith(BODY) for name in self.tensors)

    @property
    def class_count(self) -> int:
        """Number of classes without background; 0 for a backbone."""
        return self.tensors[_CLASSIFIER].shape[0] - 1 if _CLASSIFIER in self.tensors else 0

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """Names of labels 1, 2, …, or None if unknown."""
        if self.config is not None:
            return self.config.class_names
        if self.class_count == _COCO_LABELS:
            return coco_labels()
        return ("person",) if self.is_coco_pose else None

    @property
    def keypoint_count(self) -> int:
        """Number of keypoints; 0 without a keypoint head."""
        weight = self.tensors.get(HEAT_MAPS + "weight")
        return 0 if weight is None else weight.shape[1]

    @property
    def keypoint_names(self) -> tuple[str, ...] | None:
        """Names of the keypoints, or None if unknown."""
        if self.config is not None:
            return self.config.keypoint_names
        return COCO_NAMES if self.keypoint_count == len(COCO_NAMES) else None

    @property
    def is_coco_pose(self) -> bool:
        """Whether they match torchvision's COCO keypoint weights: one class, 17 keypoints."""
        return self.class_count == 1 and self.keypoint_count == len(COCO_NAMES)


def starting_weights(spec: str | Path, config: ModelConfig | None = None) -> StartingWeights:
    """Read pretrained weights.

    Args:
        spec: a checkpoint; a state dict in `.pth` or `.safetensors` of a torchvision detector or classifier; a
            Detectron2 detector in `.pkl` or `.pth`; or the name of torchvision's weights, either a member of the
            enumeration for the detector or the backbone (`COCO_V1`) or a full name
            (`FasterRCNN_ResNet50_FPN_Weights.COCO_V1`).
        config: model that they are for; it resolves names.

    Raises:
        UserError: if the file cannot be read, or the name is unknown or its file cannot be downloaded.
    """
    path, source = Path(spec), str(spec)
    known: dict[str, Any] = {}
    if not path.is_file() and path.suffix not in _FILE_SUFFIXES and path.name == source:
        weights = _named_weights(source, config)
        path, source = downloaded(weights), repr(weights)
        known = {"pixels": _pixels_of(weights), "is_legacy": weights.name == "COCO_LEGACY"}
    tensors, header = read_state_dict(path)
    saved = config_of(header, path) if header else None
    if saved is None and (path.suffix == PICKLE_SUFFIX or is_detectron2(tensors)):
        tensors, saved = from_detectron2(tensors, path)
    return StartingWeights(tensors=_for_detector(tensors), source=source, path=path, config=saved, **known)


def model_changes(weights: StartingWeights, config: ModelConfig) -> dict[str, Any]:
    """Fields of `config` that these weights require in order to compute what they were trained to.

    These are the batch norm settings and, if the saved model has other conventions than the defaults of `config`, those
    conventions. An ImageNet backbone keeps its batch norm statistics as in torchvision's detectors, except with heads
    of version 2, which train all batch norms. A backbone without batch norm has none to keep.
    """
    if weights.config is not None:
        norm = {name: getattr(weights.config, name) for name in ("frozen_batch_norm", "batch_norm_epsilon")}
        return _other_conventions(weights.config, config) | norm
    if weights.is_backbone:
        is_normed = any(name.endswith("running_var") for name in weights.tensors)
        return _pixel_changes(weights.pixels, config) | {
            "frozen_batch_norm": is_normed and not config.head_batch_norm,
            "batch_norm_epsilon": usual_epsilon(config.backbone),
        }
    return {
        "frozen_batch_norm": _is_frozen(weights.tensors),
        "batch_norm_epsilon": _default_batch_norm_epsilon(weights, usual_epsilon(config.backbone)),
    }


def _pixel_changes(pixels: dict[str, Any], config: ModelConfig) -> dict[str, Any]:
    """Preprocessing that a classifier was trained with, if `config` has the default one."""
    usual = Preprocessing()
    if not pixels or (config.preprocessing.mean, config.preprocessing.std) != (usual.mean, usual.std):
        return {}
    return {"preprocessing": dataclasses.replace(config.preprocessing, **pixels)}


def _other_conventions(saved: ModelConfig, config: ModelConfig) -> dict[str, Any]:
    """Conventions of the saved model for the fields that `config` leaves at their defaults."""
    changes = _where_default(config, saved, [name for name in CONVENTIONS if name != "preprocessing"])
    of_pixels = _where_default(config.preprocessing, saved.preprocessing, ["mean", "std", "resize"])
    if of_pixels:
        changes["preprocessing"] = dataclasses.replace(config.preprocessing, **of_pixels)
    return changes


def _where_default(config: Any, saved: Any, names: Iterable[str]) -> dict[str, Any]:
    """Non-default values of `saved` for fields in which `config` has the default."""
    default = type(config)()
    unset = [name for name in names if getattr(config, name) == getattr(default, name)]
    return {name: getattr(saved, name) for name in unset if getattr(saved, name) != getattr(default, name)}


def load_detector(
    spec: str | Path, name: str | None = None, *, batch_norm_epsilon: float | None = None
) -> tuple[MaskRCNN, Path]:
    """Load a detector from weights, in evaluation mode on the CPU; returns it and the file.

    Args:
        spec: as for `starting_weights`.
        name: architecture, one of `maskrcnn.config.MODELS`; not needed for checkpoints and Detectron2 weights.
        batch_norm_epsilon: as for `load_torchvision`.

    Raises:
        UserError: if weights and architecture do not fit, or the architecture is unknown.
    """
    config = model_config(name) if name else None
    knows_itself = Path(spec).is_file() or Path(spec).suffix in (SUFFIX, PICKLE_SUFFIX)
    weights = starting_weights(spec, config) if config or knows_itself else None
    if weights is not None and weights.config is not None:
        model = _of_checkpoint(weights, name, batch_norm_epsilon)
    elif weights is not None and name is not None:
        model = load_torchvision(weights, name, batch_norm_epsilon=batch_norm_epsilon)
    else:
        raise UserError("--weights without --model", "the architecture of the weights", "add --model NAME")
    return model, weights.path


def _of_checkpoint(weights: StartingWeights, name: str | None, batch_norm_epsilon: float | None) -> MaskRCNN:
    """Model of a checkpoint; options must not contradict it."""
    config = weights.config
    assert config is not None
    if name not in (None, config.name) or batch_norm_epsilon not in (None, config.batch_norm_epsilon):
        raise UserError(
            f"{weights.source}: a checkpoint of {config.name} with batch norm epsilon {config.batch_norm_epsilon:g}, "
            "and options that contradict it",
            "no such options: the file contains them",
            "leave out --model and --batch-norm-epsilon",
        )
    model = MaskRCNN(config)
    load_weights(model, weights.tensors, weights.source)
    return model.eval()


def load_torchvision(
    weights: StartingWeights | str | Path,
    name: str,
    class_names: tuple[str, ...] = (),
    category_ids: tuple[int, ...] = (),
    batch_norm_epsilon: float | None = None,
) -> MaskRCNN:
    """Load a detector from torchvision's weights, in evaluation mode; the class count follows from them.

    Args:
        weights: as read by `starting_weights`, or its argument.
        name: architecture, one of `maskrcnn.config.MODELS`.
        class_names: names of labels 1, 2, … (default: COCO's for 90 labels, otherwise `class_1`, `class_2`, …).
        category_ids: dataset ids of labels 1, 2, … (default: 1, 2, …).
        batch_norm_epsilon: epsilon of the saved model, which the file does not contain (default: inferred by
            `_default_batch_norm_epsilon`).

    Raises:
        UserError: if weights and architecture do not fit.
    """
    if not isinstance(weights, StartingWeights):
        weights = starting_weights(weights, model_config(name))
    count = weights.class_count
    if not count:
        raise UserError(
            f"{weights.source}: no tensor {_CLASSIFIER}",
            "the weights of a whole detector",
            "pass a detector, not a classifier; to train a detector from a backbone: `maskrcnn train --weights`",
        )
    class_names = class_names or weights.class_names or tuple(f"class_{label}" for label in range(1, count + 1))
    if len(class_names) != count:
        raise UserError(
            f"{len(class_names)} class names for weights of {count} classes",
            f"{count} names",
            "name every class but background",
        )
    if batch_norm_epsilon is None:
        usual = usual_epsilon(model_config(name).backbone)
        batch_norm_epsilon = _default_batch_norm_epsilon(weights, usual)
    config = model_config(
        name,
        class_names=class_names,
        category_ids=category_ids or tuple(range(1, count + 1)),
        batch_norm_epsilon=batch_norm_epsilon,
        **_keypoint_fields(weights),
    )
    model = MaskRCNN(config)
    load_weights(model, weights.tensors, weights.source)
    return model.eval()


def _keypoint_fields(weights: StartingWeights) -> dict[str, Any]:
    """Keypoint fields of the model for weights whose keypoints are not COCO's."""
    count = weights.keypoint_count
    if count in (0, len(COCO_NAMES)):
        return {}
    return {"keypoint_names": tuple(f"keypoint_{number}" for number in range(1, count + 1))}


def _default_batch_norm_epsilon(weights: StartingWeights, usual: float = 1e-5) -> float:
    """Epsilon with which torchvision runs these weights.

    Its COCO_V1 weights of version 1 were trained with 0 (`overwrite_eps`). They are recognised by 90 classes, or one
    class and 17 keypoints, and by frozen batch norm, which saves no `num_batches_tracked`. All others, COCO_LEGACY of
    keypoints included, have the usual one.
    """
    is_coco = weights.class_count == _COCO_LABELS or (weights.is_coco_pose and not weights.is_legacy)
    return 0.0 if is_coco and _is_frozen(weights.tensors) else usual


def coco_labels() -> tuple[str, ...]:
    """Names of labels 1 to 90 of torchvision's COCO weights; unused ones are "N/A"."""
    return tuple(torchvision.models.detection.MaskRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"][1:])


def _is_frozen(tensors: dict[str, Tensor]) -> bool:
    """Whether the backbone was saved with frozen batch norm."""
    return not any(name.startswith(BODY) and name.endswith("num_batches_tracked") for name in tensors)


def _for_detector(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a classifier renamed to a detector's backbone; those of a detector unchanged."""
    if {"conv1.weight", "fc.weight"} <= set(tensors):
        return {BODY + name: value for name, value in tensors.items() if not name.startswith("fc.")}
    if tensors and all(name.startswith(("features.", "classifier.")) for name in tensors):
        return {
            BODY + name.removeprefix("features."): value
            for name, value in tensors.items()
            if name.startswith("features.")
        }
    return tensors

"""Weights to start from: a checkpoint of ours, a file of torchvision's or Detectron2's, or a name of torchvision's.

A name is that of a member of torchvision's enumerations: `COCO_V1` or `DEFAULT` for the whole detector,
`IMAGENET1K_V1` or `IMAGENET1K_V2` for the backbone alone. Its file is downloaded once by torch.hub, which keeps it.
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
from maskrcnn.weights.checkpoint import PICKLE_SUFFIX, SUFFIX, config_of, load_weights, read_state_dict
from maskrcnn.weights.detectron2 import CONVENTIONS, from_detectron2, is_detectron2

# Torchvision's weights by name: members of its enumerations, whose files torch.hub downloads once and keeps.


def _named_weights(name: str, config: ModelConfig | None) -> WeightsEnum:
    """The member of torchvision's enumerations that a name stands for.

    Args:
        name: of a member for the detector or the backbone (`COCO_V1`), or one in full.
        config: of the model that the weights are for.

    Raises:
        UserError: for an unknown name.
    """
    members: dict[str, WeightsEnum] = {}
    for architecture in (config.backbone, config.name) if config else ():
        if architecture in torchvision.models.list_models():  # of ours, some have no counterpart there
            members |= torchvision.models.get_model_weights(architecture).__members__
    if name in members:
        return members[name]
    try:
        return torchvision.models.get_weight(name)
    except (ValueError, KeyError) as error:
        raise UserError(
            f"weights {name!r}: no file, and no weights of torchvision's" + (f" for {config.name}" if config else ""),
            f"a file, or one of {', '.join(members)}" if members else "a file",
            "check the path or the name given with --weights",
        ) from error


def _pixels_of(weights: WeightsEnum) -> dict[str, Any]:
    """Mean and deviation of the pixels that weights were trained on, where they are not the usual.

    `VGG16_Weights.IMAGENET1K_FEATURES`, which come from Caffe, are such.
    """
    given = getattr(weights.transforms, "keywords", {})
    return {name: tuple(given[name]) for name in ("mean", "std") if name in given}


def downloaded(weights: WeightsEnum) -> Path:
    """The file of torchvision's weights in torch.hub's folder, where it is downloaded to if need be.

    Raises:
        UserError: where it is not there and cannot be downloaded.
    """
    path = Path(torch.hub.get_dir()) / "checkpoints" / Path(urlparse(weights.url).path).name
    if not path.is_file():
        try:
            weights.get_state_dict(progress=True, check_hash=True, map_location="cpu", weights_only=True)
        except (OSError, http.client.HTTPException, RuntimeError) as error:  # RuntimeError: another hash
            raise UserError(
                f"{weights!r}: {weights.url} cannot be downloaded ({error})",
                f"the network, or that file as {path}",
                "download it elsewhere, and put it there or name it with --weights FILE",
            ) from error
    return path


BODY = "backbone.body."
# Of all heat maps: [channels, keypoints, 4, 4] and a bias.
HEAT_MAPS = "roi_heads.keypoint_predictor.kps_score_lowres."
_CLASSIFIER = "roi_heads.box_predictor.cls_score.weight"  # [1 + classes, channels]
_FILE_SUFFIXES = (SUFFIX, PICKLE_SUFFIX, ".pth", ".pt", ".bin", ".ckpt")
_COCO_LABELS = 90  # of torchvision's COCO weights: COCO's ids, of which ten are unused


@dataclass(frozen=True, kw_only=True)
class StartingWeights:
    """Tensors to start from, and what is known of them."""

    tensors: dict[str, Tensor]  # named as in our model
    source: str  # as messages call it
    path: Path  # the file
    config: ModelConfig | None = None  # of the model that saved them, where that is known
    pixels: dict[str, Any] = field(default_factory=dict)  # a classifier's mean and std, where they are not the usual
    is_legacy: bool = False  # torchvision's COCO_LEGACY of keypoints, which no tensor tells from COCO_V1

    @property
    def is_backbone(self) -> bool:
        """Whether they are a classifier's, which has nothing but the backbone in common with a detector."""
        return all(name.startswith(BODY) for name in self.tensors)

    @property
    def class_count(self) -> int:
        """Classes without background; 0 for a backbone alone."""
        return self.tensors[_CLASSIFIER].shape[0] - 1 if _CLASSIFIER in self.tensors else 0

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """The names of labels 1, 2, …, or None where nobody knows them."""
        if self.config is not None:
            return self.config.class_names
        if self.class_count == _COCO_LABELS:
            return coco_labels()
        return ("person",) if self.is_coco_pose else None

    @property
    def keypoint_count(self) -> int:
        """Keypoints that they find; 0 without a keypoint head."""
        weight = self.tensors.get(HEAT_MAPS + "weight")
        return 0 if weight is None else weight.shape[1]

    @property
    def keypoint_names(self) -> tuple[str, ...] | None:
        """Their names, or None where nobody knows them."""
        if self.config is not None:
            return self.config.keypoint_names
        return COCO_NAMES if self.keypoint_count == len(COCO_NAMES) else None

    @property
    def is_coco_pose(self) -> bool:
        """Whether they are like torchvision's COCO weights of keypoints: one class, 17 keypoints."""
        return self.class_count == 1 and self.keypoint_count == len(COCO_NAMES)


def starting_weights(spec: str | Path, config: ModelConfig | None = None) -> StartingWeights:
    """Reads weights.

    Args:
        spec: a checkpoint of ours, a state dict in `.pth` or `.safetensors` as torchvision and its reference
            scripts save them, of a detector or a classifier, a detector of Detectron2's in `.pkl` or `.pth`, or the
            name of torchvision's weights: a member of the enumeration for the detector or the backbone (`COCO_V1`),
            or one in full (`FasterRCNN_ResNet50_FPN_Weights.COCO_V1`).
        config: of the model that they are for; it says what a name stands for.

    Raises:
        UserError: when the file cannot be read, the name is unknown, or its file is neither in torch.hub's folder
            nor can be downloaded.
    """
    path, source, known = Path(spec), str(spec), {}
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
    """The fields of `config` that must change for these weights to mean what they meant.

    Those are batch norm's, and where the model that saved them has other conventions than `config`'s defaults, these.
    A backbone that was trained on ImageNet keeps its statistics, as in torchvision's detectors: all but those of
    version 2, which have batch norm in their heads and train them all. One without batch norm has nothing to keep.
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
    """The preprocessing that a classifier was trained with, where `config` has the usual one."""
    usual = Preprocessing()
    if not pixels or (config.preprocessing.mean, config.preprocessing.std) != (usual.mean, usual.std):
        return {}
    return {"preprocessing": dataclasses.replace(config.preprocessing, **pixels)}


def _other_conventions(saved: ModelConfig, config: ModelConfig) -> dict[str, Any]:
    """The conventions of the saved model, as far as `config` leaves them at the default and so takes no side."""
    changes = _where_default(config, saved, [name for name in CONVENTIONS if name != "preprocessing"])
    of_pixels = _where_default(config.preprocessing, saved.preprocessing, ["mean", "std", "resize"])
    if of_pixels:
        changes["preprocessing"] = dataclasses.replace(config.preprocessing, **of_pixels)
    return changes


def _where_default(config: Any, saved: Any, names: Iterable[str]) -> dict[str, Any]:
    """Values of `saved` that differ from the default where those of `config` do not."""
    plain = type(config)()
    unset = [name for name in names if getattr(config, name) == getattr(plain, name)]
    return {name: getattr(saved, name) for name in unset if getattr(saved, name) != getattr(plain, name)}


def load_detector(
    spec: str | Path, name: str | None = None, *, batch_norm_epsilon: float | None = None
) -> tuple[MaskRCNN, Path]:
    """A whole model from weights, in evaluation mode on the CPU, and the file that they came from.

    Args:
        spec: as for `starting_weights`.
        name: the architecture, one of `maskrcnn.config.MODELS`; a checkpoint of ours knows its own, and Detectron2's
            tensors tell theirs.
        batch_norm_epsilon: as for `load_torchvision`.

    Raises:
        UserError: when weights and architecture do not fit, or the architecture is not known.
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
    """The model of a checkpoint, which no option may contradict."""
    config = weights.config
    if name not in (None, config.name) or batch_norm_epsilon not in (None, config.batch_norm_epsilon):
        raise UserError(
            f"{weights.source}: a checkpoint of {config.name} with batch norm epsilon {config.batch_norm_epsilon:g}, "
            "and options that say otherwise",
            "the file alone, which tells its architecture",
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
    """A model from torchvision's weights, in evaluation mode; the class count is read from them.

    Args:
        weights: read already, or what `starting_weights` reads.
        name: the architecture, one of `maskrcnn.config.MODELS`.
        class_names: of labels 1, 2, …; by default COCO's for 90 labels, else `class_1`, `class_2`, ….
        category_ids: likewise; by default 1, 2, ….
        batch_norm_epsilon: of the model that was saved, which its file does not tell; by default what
            `_default_batch_norm_epsilon` reads off the tensors.

    Raises:
        UserError: when weights and architecture do not fit.
    """
    if not isinstance(weights, StartingWeights):
        weights = starting_weights(weights, model_config(name))
    count = weights.class_count
    if not count:
        raise UserError(
            f"{weights.source}: no tensor {_CLASSIFIER}",
            "the weights of a whole detector",
            "name a detector, not a classifier; to train a detector from a backbone: `maskrcnn train --weights`",
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
    """What weights with a keypoint head that is not COCO's say of the model."""
    count = weights.keypoint_count
    if count in (0, len(COCO_NAMES)):
        return {}
    return {"keypoint_names": tuple(f"keypoint_{number}" for number in range(1, count + 1))}


def _default_batch_norm_epsilon(weights: StartingWeights, usual: float = 1e-5) -> float:
    """The epsilon with which torchvision would run these weights.

    Its first COCO_V1 weights were trained with 0 and are loaded so (`overwrite_eps`). They are known by their 90
    classes, or one class and 17 keypoints, and by batch norm that is frozen, which saves no `num_batches_tracked`.
    Everything else has the usual one, COCO_LEGACY of keypoints too.
    """
    is_coco = weights.class_count == _COCO_LABELS or (weights.is_coco_pose and not weights.is_legacy)
    return 0.0 if is_coco and _is_frozen(weights.tensors) else usual


def coco_labels() -> tuple[str, ...]:
    """The names of labels 1 to 90 of torchvision's COCO weights; unused ones are "N/A"."""
    return tuple(torchvision.models.detection.MaskRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"][1:])


def _is_frozen(tensors: dict[str, Tensor]) -> bool:
    """Whether the backbone was saved with frozen batch norm."""
    return not any(name.startswith(BODY) and name.endswith("num_batches_tracked") for name in tensors)


def _for_detector(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A detector's tensors as they are; a classifier's, of a ResNet or with `features`, as a detector's backbone."""
    if {"conv1.weight", "fc.weight"} <= set(tensors):
        return {BODY + name: value for name, value in tensors.items() if not name.startswith("fc.")}
    if tensors and all(name.startswith(("features.", "classifier.")) for name in tensors):
        return {
            BODY + name.removeprefix("features."): value
            for name, value in tensors.items()
            if name.startswith("features.")
        }
    return tensors

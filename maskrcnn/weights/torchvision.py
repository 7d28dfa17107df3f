"""Pretrained weights: our checkpoints, torchvision's or Detectron2's files, or torchvision's weights by name.

A name is a member of torchvision's enumerations: `COCO_V1` or `DEFAULT` for a detector, `IMAGENET1K_V1` or
`IMAGENET1K_V2` for a backbone. torch.hub downloads its file once.
"""

from __future__ import annotations

import dataclasses
import http.client
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlparse

import torch
import torchvision
from torch import Tensor
from torchvision.models import WeightsEnum

from maskrcnn.config import MODELS, ModelConfig, changed, model_config, to_dict, usual_epsilon
from maskrcnn.errors import UserError
from maskrcnn.imaging.preprocess import PRESETS, Preprocessing
from maskrcnn.keypoints import COCO_NAMES
from maskrcnn.model.detector import MaskRCNN
from maskrcnn.settings import merged, typed
from maskrcnn.weights.checkpoint import config_of, load_weights
from maskrcnn.weights.detectron2 import CONFIG_NAME, from_detectron2, is_detectron2
from maskrcnn.weights.files import PICKLE_SUFFIX, SUFFIXES, read_weights
from maskrcnn.weights.foreign import (
    BODY,
    CLASS_SCORES,
    HEAT_MAPS,
    UNSTATED,
    architecture_of,
    assumptions,
    check_shapes,
    class_count,
    fields_of,
    refuse_older,
)
from maskrcnn.weights.mmdetection import from_mmdetection, is_mmdetection

_COCO_LABELS = 90  # labels of torchvision's COCO weights: COCO's category ids, ten of them unused


def _named_weights(name: str, config: ModelConfig | None) -> WeightsEnum:
    """Torchvision's enumeration member with a name.

    Args:
        name: member of the detector's or the backbone's enumeration (`COCO_V1`), or a full name.
        config: model for the weights.

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
    """Pixel mean and std of weights, if not the usual ones (`VGG16_Weights.IMAGENET1K_FEATURES`)."""
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
                "download it elsewhere, and copy it to this path or pass it with --weights FILE",
            ) from error
    return path


@dataclass(frozen=True, kw_only=True)
class StartingWeights:
    """Pretrained tensors and their known properties."""

    tensors: dict[str, Tensor]  # named as in our model
    source: str  # name in messages
    path: Path
    config: ModelConfig | None = None  # configuration of the saved model, if known
    pixels: dict[str, Any] = field(default_factory=dict)  # mean and std of a classifier, if not the usual ones
    is_legacy: bool = False  # torchvision's COCO_LEGACY keypoint weights, whose tensors look like COCO_V1
    unstated: tuple[str, ...] = ()  # fields of the model that neither the file nor its name states
    notes: tuple[str, ...] = ()  # what was unwrapped, stripped or left out of the file

    @property
    def is_backbone(self) -> bool:
        """Whether the weights are a classifier's, which shares only the backbone with a detector."""
        return all(name.startswith(BODY) for name in self.tensors)

    @property
    def is_caffe(self) -> bool:
        """Whether the weights are a backbone converted from Caffe, judging only from the usual file names."""
        return self.is_backbone and "caffe" in self.path.name.lower()

    @property
    def class_count(self) -> int:
        """Number of classes without background; 0 for a backbone."""
        return class_count(self.tensors)

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
        """Whether the weights match torchvision's COCO keypoint weights: one class, 17 keypoints."""
        return self.class_count == 1 and self.keypoint_count == len(COCO_NAMES)


def starting_weights(
    spec: str | Path, config: ModelConfig | None = None, *, detectron2_config: str | Path | None = None
) -> StartingWeights:
    """Read pretrained weights.

    Args:
        spec: a checkpoint; a state dict of a torchvision detector or classifier, or a detector of Detectron2 or
            mmdetection, in any file that `read_weights` reads; or the name of torchvision's weights, either a member of
            the enumeration for the detector or the backbone (`COCO_V1`) or a full name
            (`FasterRCNN_ResNet50_FPN_Weights.COCO_V1`).
        config: model for the weights; used to resolve names.
        detectron2_config: YAML configuration of a Detectron2 detector (default: config.yaml in the file's folder).

    Raises:
        UserError: if the file cannot be read, or the name is unknown or its file cannot be downloaded.
    """
    path, source = Path(spec), str(spec)
    known: dict[str, Any] = {"unstated": UNSTATED}
    if not path.exists() and path.suffix not in SUFFIXES and path.name == source:
        weights = _named_weights(source, config)
        path, source = downloaded(weights), repr(weights)
        known = {"pixels": _pixels_of(weights), "is_legacy": weights.name == "COCO_LEGACY"}
    file = read_weights(path)
    tensors, notes, saved = file.tensors, file.notes, None
    refuse_older(tensors, source)
    if file.header is not None:
        saved, known = config_of(file.header, path), {}
    elif path.suffix == PICKLE_SUFFIX or is_detectron2(tensors):
        beside = path.with_name(CONFIG_NAME)
        stated = Path(detectron2_config) if detectron2_config else beside if beside.is_file() else None
        tensors, saved, unstated, more = from_detectron2(tensors, path, stated)
        known, notes = {"unstated": unstated}, (*notes, *([f"settings of {stated}"] if stated else []), *more)
    elif is_mmdetection(tensors):
        tensors, saved, unstated, more = from_mmdetection(tensors, path, file.meta)
        known, notes = {"unstated": unstated}, (*notes, *more)
    if detectron2_config and not is_detectron2(file.tensors):
        raise UserError(
            f"--detectron2-config {detectron2_config} with {source}",
            "weights of Detectron2, whose names begin with backbone.bottom_up",
            "omit --detectron2-config, or use weights of Detectron2",
        )
    weights = StartingWeights(
        tensors=_for_detector(tensors), source=source, path=path, notes=notes, config=saved, **known
    )
    if weights.is_caffe:
        note = (
            f"{path.name}: from Caffe, judging by its name: pixels BGR 0–255 minus Caffe's mean, stride in 1×1 "
            "convolutions (other pixels: --set model.preprocessing=imagenet, or rename the file)"
        )
        weights = dataclasses.replace(weights, pixels=PRESETS["caffe"], notes=(*weights.notes, note))
    return weights


def continued_model(saved: ModelConfig, given: dict[str, Any]) -> dict[str, Any]:
    """Settings of a model that starts from another model's weights: the settings of that model, updated with `given`.

    Another architecture (`name`) changes the fields in which the two named models differ. Classes and keypoints are
    left out, since they are the dataset's; so is the maximum image size if only the minimum is given.

    Args:
        saved: the model of the weights.
        given: fields of `ModelConfig`, `preprocessing` as a nested dictionary.
    """
    of_data = ("class_names", "category_ids", "keypoint_names", "keypoint_skeleton", "keypoint_sigmas")
    values = {name: value for name, value in to_dict(saved).items() if name not in of_data}
    name = given.get("name", saved.name)
    if name != saved.name:
        own = to_dict(model_config(saved.name) if saved.name in MODELS else ModelConfig())
        values |= {k: v for k, v in to_dict(model_config(name)).items() if k in values and v != own[k]}
    sizes = given.get("preprocessing", {})
    if "min_size_px" in sizes and "max_size_px" not in sizes:
        del values["preprocessing"]["max_size_px"]
    return merged(values, given)


def model_changes(weights: StartingWeights, config: ModelConfig) -> dict[str, Any]:
    """Fields of `config` that these weights require in order to compute as in their training.

    These are the batch norm settings, and the pixel statistics of a classifier. `continued_model` has the other fields
    of a saved model. An ImageNet backbone keeps its batch norm statistics as in torchvision's detectors, except with
    heads of version 2, which train all batch norms. A backbone without batch norm has none to keep.
    """
    if weights.config is not None:
        return {name: getattr(weights.config, name) for name in ("frozen_batch_norm", "batch_norm_epsilon")}
    if weights.is_backbone:
        is_normed = any(name.endswith("running_var") for name in weights.tensors)
        strides = (
            {"stride_in_1x1": True} if weights.is_caffe and f"{BODY}layer1.0.conv3.weight" in weights.tensors else {}
        )
        return _pixel_changes(weights.pixels, config) | {
            **strides,
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


class LoadedDetector(NamedTuple):
    """A detector in evaluation mode on the CPU, and its origin."""

    model: MaskRCNN
    path: Path  # of the file
    assumed: tuple[str, ...]  # fields of the model that neither the file nor the caller stated
    notes: tuple[str, ...]  # what was unwrapped, stripped or left out of the file

    def messages(self) -> list[str]:
        """Messages for the user: how the file was read, the model, and assumed fields."""
        config = self.model.config
        model = f"{config.name}: {config.num_classes} classes, batch norm epsilon {config.batch_norm_epsilon:g}"
        return [*self.notes, model, *filter(None, [assumptions(config, self.assumed)])]


def load_detector(
    spec: str | Path,
    name: str | None = None,
    *,
    batch_norm_epsilon: float | None = None,
    settings: dict[str, Any] | None = None,
    detectron2_config: str | Path | None = None,
) -> LoadedDetector:
    """Load a detector from weights.

    Args:
        spec: as in `starting_weights`.
        name: architecture, one of `maskrcnn.config.MODELS`; not needed for checkpoints, Detectron2 weights and files of
            torchvision detectors with a ResNet.
        batch_norm_epsilon: epsilon of a saved torchvision model, which the file does not contain (default: 0 for
            COCO_V1, 1e-5 for others).
        settings: fields of `ModelConfig` that replace those of the weights, `preprocessing` as a nested dictionary.
        detectron2_config: as in `starting_weights`.

    Raises:
        UserError: if weights, architecture and settings do not fit, or the architecture is unknown.
    """
    given = typed(ModelConfig, settings or {}, where="model.")
    name = given.pop("name", None) or name
    config = model_config(name) if name else None
    path = Path(spec)
    if config is None and not path.exists() and path.suffix not in SUFFIXES and path.name == str(spec):
        raise UserError(f"--weights {spec} without --model", "the architecture of the weights", "add --model NAME")
    weights = starting_weights(spec, config, detectron2_config=detectron2_config)
    base = _saved_config(weights, name, batch_norm_epsilon) or _foreign_config(weights, name, batch_norm_epsilon)
    names = given.get("class_names", ())
    if len(names) == base.num_classes + 1 and names[0].strip("_").lower() == "background":
        given["class_names"] = names[1:]
    config = changed(base, given)
    check_shapes(config, weights.tensors, weights.source)
    model = MaskRCNN(config)
    load_weights(model, weights.tensors, weights.source)
    stated = {*given, *(f"preprocessing.{key}" for key in given.get("preprocessing", {}))}
    assumed = tuple(field for field in weights.unstated if field not in stated)
    return LoadedDetector(model.eval(), weights.path, assumed, weights.notes)


def _saved_config(weights: StartingWeights, name: str | None, batch_norm_epsilon: float | None) -> ModelConfig | None:
    """Configuration of weights that include one; options must not contradict it."""
    config = weights.config
    if config is None:
        return None
    if name not in (None, config.name) or batch_norm_epsilon not in (None, config.batch_norm_epsilon):
        raise UserError(
            f"{weights.source}: a checkpoint of {config.name} with batch norm epsilon {config.batch_norm_epsilon:g}, "
            "and options that contradict it",
            "no such options: the file contains them",
            "omit --model and --batch-norm-epsilon",
        )
    return config


def _foreign_config(weights: StartingWeights, name: str | None, batch_norm_epsilon: float | None) -> ModelConfig:
    """Configuration of torchvision's weights: fields that follow from the tensors, and torchvision's defaults."""
    count = weights.class_count
    if not count:
        raise UserError(
            f"{weights.source}: no tensor {CLASS_SCORES}weight; it has {', '.join(list(weights.tensors)[:3])}",
            "the weights of a whole detector under the names of torchvision, Detectron2 or maskrcnn",
            "pass a Faster or Mask R-CNN, not a classifier or another kind of detector; to train a detector from a "
            "backbone: `maskrcnn train --weights`",
        )
    name = name or architecture_of(weights.tensors)
    if name is None:
        raise UserError(
            f"--weights {weights.source} without --model, and a backbone that is not a known ResNet",
            "the architecture of the weights",
            f"add --model with one of {', '.join(MODELS)}",
        )
    usual = usual_epsilon(model_config(name).backbone)
    return model_config(
        name,
        **fields_of(weights.tensors),
        class_names=weights.class_names or tuple(f"class_{label}" for label in range(1, count + 1)),
        category_ids=tuple(range(1, count + 1)),
        batch_norm_epsilon=_default_batch_norm_epsilon(weights, usual)
        if batch_norm_epsilon is None
        else batch_norm_epsilon,
        **_keypoint_fields(weights),
    )


def _keypoint_fields(weights: StartingWeights) -> dict[str, Any]:
    """Keypoint fields of the model for weights whose keypoints are not COCO's."""
    count = weights.keypoint_count
    if count in (0, len(COCO_NAMES)):
        return {}
    return {"keypoint_names": tuple(f"keypoint_{number}" for number in range(1, count + 1))}


def _default_batch_norm_epsilon(weights: StartingWeights, usual: float = 1e-5) -> float:
    """Epsilon with which torchvision runs these weights.

    Its COCO_V1 weights of version 1 were trained with 0 (`overwrite_eps`). They are recognised by 90 classes, or one
    class and 17 keypoints, and by frozen batch norm, which saves no `num_batches_tracked`. All others, including
    COCO_LEGACY for keypoints, have the usual epsilon.
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
    if {"conv1.weight", "layer1.0.conv1.weight"} <= set(tensors):  # with or without `fc`
        return {BODY + name: value for name, value in tensors.items() if not name.startswith("fc.")}
    if tensors and all(name.startswith(("features.", "classifier.")) for name in tensors):
        return {
            BODY + name.removeprefix("features."): value
            for name, value in tensors.items()
            if name.startswith("features.")
        }
    return tensors

"""Training configuration from a dataset and settings."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from maskrcnn.config import MODELS, SMALL_MODEL, LossConfig, ModelConfig, TrainConfig, changed, model_config
from maskrcnn.data.coco import CocoDataset
from maskrcnn.errors import UserError
from maskrcnn.keypoints import sigmas_of
from maskrcnn.settings import typed, with_sections

SHAPES_SIZE_PX = 128  # side of drawn images, and input size of the small model for them
_SMALL_SIZE_PX = 256  # shorter side of the small model's input for other data

MIN_STEPS = 300  # fewer rarely suffice, also with pretrained weights

# On a CPU, the cost of a step grows with its images and the samples per image; the small model needs fewer.
_SMALL_LOSS = LossConfig(rpn_samples=64, box_samples=64)
_SMALL_BATCH = 4


def training_config(
    dataset: CocoDataset, validation: CocoDataset, settings: dict[str, Any] | None = None
) -> TrainConfig:
    """Configuration for training on a dataset.

    Args:
        dataset: training split; its classes become the model's.
        validation: validation split.
        settings: fields of `TrainConfig`, sections as nested dictionaries. `model` may be a name, one of
            `maskrcnn.config.MODELS` (default: the small model, with keypoints if the dataset has them).

    Raises:
        UserError: for an unknown model or field, an invalid value, classes or keypoints that differ from the dataset's,
            or a model with masks or keypoints that the dataset does not have.
    """
    settings = typed(TrainConfig, with_sections(settings or {}))
    model = settings.pop("model", {})
    if "name" not in model:
        model = {"name": SMALL_MODEL, "has_keypoints": dataset.has_keypoints, **model}
    name = model["name"]
    sizes = dict(model.get("preprocessing", {}))
    if sizes.get("min_size_px", 0) > sizes.get("max_size_px", math.inf):
        found = (
            f"a shorter side of {sizes['min_size_px']} px (--min-size), a longer one of at most {sizes['max_size_px']}"
        )
        raise UserError(
            found, "a shorter side that does not exceed the longer one", "raise --max-size, or lower --min-size"
        )
    small = name == SMALL_MODEL
    native = int(dataset.images.sizes_hw.max())
    default_size = (_SMALL_SIZE_PX if native > SHAPES_SIZE_PX else SHAPES_SIZE_PX) if small else 800
    min_size = sizes.setdefault("min_size_px", default_size)
    sizes.setdefault("max_size_px", max(min_size, round(min_size * 1333 / 800)))
    base = TrainConfig(
        model=model_config(
            name,
            class_names=dataset.class_names,
            category_ids=dataset.category_ids,
            **_keypoints_for(dataset, model),
        ),
        loss=_SMALL_LOSS if small else LossConfig(),
        batch_size=_SMALL_BATCH if small else TrainConfig.batch_size,
    )
    settings = {**_length(dataset, {"batch_size": base.batch_size, **settings}), **settings}
    config = changed(base, {**settings, "model": {**model, "preprocessing": sizes}})
    require_fitting(config.model, dataset, validation)
    config = replace(config, loss=replace(config.loss, class_weights=class_weights(config.loss, dataset)))
    frozen = config.batch_norm == "frozen" or config.model.frozen_batch_norm
    return replace(
        config,
        batch_norm="frozen" if frozen else config.batch_norm,
        model=replace(config.model, frozen_batch_norm=frozen),
        # Absolute, since a run may be resumed in another working directory.
        data=str(dataset.root.resolve()),
        images=str(Path(config.images).resolve()) if config.images else "",
        val_data=str(validation.root.resolve()) if config.val_data else "",
        val_images=str(Path(config.val_images).resolve()) if config.val_images else "",
        train_split=dataset.split,
        val_split=validation.split,
    )


def _length(dataset: CocoDataset, settings: dict[str, Any]) -> dict[str, int]:
    """Default epochs and evaluation interval for a dataset for which the usual epochs have too few steps."""
    steps = -(-len(dataset.images) // settings["batch_size"])
    epochs = -(-MIN_STEPS // steps)
    if epochs <= TrainConfig.epochs or "epochs" in settings or "step_epochs" in settings:
        return {}
    return {"epochs": epochs, "evaluate_every": max(1, epochs // TrainConfig.epochs)}


def class_weights(loss: LossConfig, dataset: CocoDataset) -> str | dict[str, float]:
    """`loss.class_weights` as a weight for every class name, in label order, in place of a weighting scheme.

    Computed weights are scaled to a mean of 1 over the objects, so that objects and background keep their balance:
    "inverse" weights are objects / (classes · objects of the class), as scikit-learn's `balanced`; "effective" weights
    are proportional to (1 - beta) / (1 - beta^objects of the class) (Cui et al. 2019, equation 2). Classes without
    objects, or without a given weight, have weight 1.

    Raises:
        UserError: for names that are not classes.
    """
    given = loss.class_weights
    if given == "none":
        return given
    names = dataset.class_names
    if not isinstance(given, str):
        if unknown := [name for name in given if name not in names]:
            raise UserError(
                f"loss.class_weights of {', '.join(unknown)}",
                f"classes of {dataset.annotation_path}: {', '.join(names[:20])}{' …' if len(names) > 20 else ''}",
                "correct the names",
            )
        return {name: given.get(name, 1.0) for name in names}
    labels = [label for own in dataset.labels_of_images() for label in own]
    counts = np.bincount(np.array(labels, np.int64), minlength=len(names) + 1)[1:].astype(np.float64)
    used, beta = counts > 0, loss.class_weights_beta
    effective = counts[used] if given == "inverse" else (1 - beta ** counts[used]) / (1 - beta)
    weights = np.ones(len(names))
    weights[used] = counts.sum() / (effective * (counts[used] / effective).sum())
    return dict(zip(names, weights.tolist(), strict=True))


def require_fitting(model: ModelConfig, dataset: CocoDataset, validation: CocoDataset) -> None:
    """Check that the datasets provide what the model learns: classes, and masks and keypoints if it has such heads.

    Raises:
        UserError: if they do not.
    """
    if (model.class_names, model.category_ids) != (dataset.class_names, dataset.category_ids):
        raise UserError(
            f"a model with the classes {_classes(model.class_names, model.category_ids)}",
            f"those of {dataset.annotation_path}: {_classes(dataset.class_names, dataset.category_ids)}",
            "remove class_names and category_ids from the settings, or train on a dataset with the model's classes",
        )
    for each in (dataset, validation):
        if model.has_masks and not each.has_masks:
            raise UserError(
                f"{model.name} learns masks, but {each.annotation_path} has boxes only",
                "annotations with segmentation, or a model without masks",
                "train --model fasterrcnn_resnet50_fpn, or annotate outlines",
            )
    if model.has_keypoints:
        _check_keypoints(model, dataset, validation)


def _classes(names: tuple[str, ...], ids: tuple[int, ...]) -> str:
    """First classes with their ids, and the number of further ones."""
    shown = ", ".join(f"{name} ({number})" for name, number in zip(names[:5], ids, strict=False))
    return shown + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _keypoints_for(dataset: CocoDataset, model: dict[str, Any]) -> dict[str, Any]:
    """Keypoint fields of a model configuration: the dataset's if the model has keypoints, otherwise empty."""
    named = MODELS.get(model["name"], {}).get("has_keypoints", False)
    names = dataset.keypoint_names if model.get("has_keypoints", named) else ()
    return {
        "keypoint_names": names,
        "keypoint_skeleton": dataset.keypoint_skeleton if names else (),
        "keypoint_sigmas": sigmas_of(names),
    }


def _check_keypoints(model: ModelConfig, dataset: CocoDataset, validation: CocoDataset) -> None:
    """Check that both splits have the model's keypoints."""
    for each in (dataset, validation):
        if each.keypoint_fault is not None:
            raise each.keypoint_fault
        if not each.has_keypoints:
            raise UserError(
                f"{model.name} learns keypoints, but {each.annotation_path} has none",
                "a category with keypoint names, and objects with keypoints",
                "use a split with keypoints (COCO's are person_keypoints_train2017 and person_keypoints_val2017), or "
                "add --set model.has_keypoints=false",
            )
        if each.keypoint_names != model.keypoint_names:
            raise UserError(
                f"a model with the keypoints {', '.join(model.keypoint_names)}",
                f"those of {each.annotation_path}: {', '.join(each.keypoint_names)}",
                "remove keypoint_names from the settings, and use the same keypoints in both splits",
            )

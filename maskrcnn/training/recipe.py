"""From a dataset and a few wishes to a whole training configuration."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from maskrcnn.config import MODELS, LossConfig, ModelConfig, TrainConfig, changed, model_config
from maskrcnn.data.coco import CocoDataset
from maskrcnn.errors import UserError
from maskrcnn.keypoints import sigmas_of
from maskrcnn.settings import typed, with_sections

SMALL_MODEL = "maskrcnn_resnet18_fpn_small"
SHAPES_SIZE_PX = 128  # side of a generated picture, and what a small model on shapes sees
_SMALL_SIZE_PX = 256  # shorter side for a small model on other data

# A small model learns from fewer samples per image; a CPU's time goes where the samples go.
_SMALL_LOSS = LossConfig(rpn_samples=64, box_samples=64)


def training_config(
    dataset: CocoDataset, validation: CocoDataset, settings: dict[str, Any] | None = None
) -> TrainConfig:
    """The configuration for training on a dataset.

    Args:
        dataset: what to train on; its classes become the model's.
        validation: what to evaluate on.
        settings: fields of `TrainConfig`, sections as nested dictionaries. `model` may be a name alone, one of
            `maskrcnn.config.MODELS`; by default it is the small one, with keypoints where the dataset has them.

    Raises:
        UserError: for an unknown model or field, a value that cannot be, classes or keypoints other than the
            dataset's, and a model with masks or keypoints where there are none.
    """
    settings = typed(TrainConfig, with_sections(settings or {}))
    model = settings.pop("model", {})
    if "name" not in model:
        model = {"name": SMALL_MODEL, "has_keypoints": dataset.has_keypoints, **model}
    name = model["name"]
    sizes = dict(model.get("preprocessing", {}))
    small = name == SMALL_MODEL
    native = max(max(record.height, record.width) for record in dataset.images)
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
    )
    config = changed(base, {**settings, "model": {**model, "preprocessing": sizes}})
    require_fitting(config.model, dataset, validation)
    frozen = config.batch_norm == "frozen" or config.model.frozen_batch_norm
    return replace(
        config,
        batch_norm="frozen" if frozen else config.batch_norm,
        model=replace(config.model, frozen_batch_norm=frozen),
        data=str(dataset.root.resolve()),  # a run is continued from other folders too
        train_split=dataset.split,
        val_split=validation.split,
    )


def require_fitting(model: ModelConfig, dataset: CocoDataset, validation: CocoDataset) -> None:
    """Raises a UserError unless a dataset has what the model learns: its classes, and objects in both splits.

    Objects have masks for a model with masks, and keypoints for one with keypoints.
    """
    if (model.class_names, model.category_ids) != (dataset.class_names, dataset.category_ids):
        raise UserError(
            f"a model of the classes {_classes(model.class_names, model.category_ids)}",
            f"those of {dataset.annotation_path}: {_classes(dataset.class_names, dataset.category_ids)}",
            "leave class_names and category_ids out of the settings, or train on a dataset of the model's classes",
        )
    for each in (dataset, validation):
        if model.has_masks and not each.has_masks:
            raise UserError(
                f"{model.name}, which learns masks, and {each.annotation_path}, which has boxes only",
                "annotations with segmentation, or a model without masks",
                "train --model fasterrcnn_resnet50_fpn, or annotate outlines",
            )
    if model.has_keypoints:
        _check_keypoints(model, dataset, validation)


def _classes(names: tuple[str, ...], ids: tuple[int, ...]) -> str:
    """The first classes with their ids, and how many more there are."""
    shown = ", ".join(f"{name} ({number})" for name, number in zip(names[:5], ids, strict=False))
    return shown + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _keypoints_for(dataset: CocoDataset, model: dict[str, Any]) -> dict[str, Any]:
    """The fields of a model that say which keypoints it finds: the dataset's, if it is to find any.

    Args:
        dataset: what to train on.
        model: settings, with a name.
    """
    named = MODELS.get(model["name"], {}).get("has_keypoints", False)
    names = dataset.keypoint_names if model.get("has_keypoints", named) else ()
    return {
        "keypoint_names": names,
        "keypoint_skeleton": dataset.keypoint_skeleton if names else (),
        "keypoint_sigmas": sigmas_of(names),
    }


def _check_keypoints(model: ModelConfig, dataset: CocoDataset, validation: CocoDataset) -> None:
    """Raises a UserError unless both splits have the model's keypoints."""
    for each in (dataset, validation):
        if each.keypoint_fault is not None:
            raise each.keypoint_fault
        if not each.has_keypoints:
            raise UserError(
                f"{model.name}, which learns keypoints, and {each.annotation_path}, which has none",
                "a category that names keypoints, and objects that have them",
                "name such a split (COCO's are person_keypoints_train2017 and person_keypoints_val2017), or add "
                "--set model.has_keypoints=false",
            )
        if each.keypoint_names != model.keypoint_names:
            raise UserError(
                f"a model of the keypoints {', '.join(model.keypoint_names)}",
                f"those of {each.annotation_path}: {', '.join(each.keypoint_names)}",
                "leave keypoint_names out of the settings, and name the same keypoints in both splits",
            )

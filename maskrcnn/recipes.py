"""From a dataset and a few wishes to a whole training configuration."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from maskrcnn.config import LossConfig, TrainConfig, changed, model_config
from maskrcnn.data.coco import CocoDataset
from maskrcnn.errors import UserError
from maskrcnn.preprocess import with_preset

SMALL_MODEL = "maskrcnn_resnet18_fpn_small"
SHAPES_SIZE_PX = 128  # side of a generated picture, and what a small model on shapes sees
SMALL_SIZE_PX = 256  # shorter side for a small model on other data

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
            `maskrcnn.config.MODELS`; by default it is the small one.

    Raises:
        UserError: for an unknown model or field, a value that cannot be, classes other than the dataset's, and a
            model with masks where there are boxes only.
    """
    settings = dict(settings or {})
    model = settings.pop("model", {})
    model = {"name": model} if isinstance(model, str) else dict(model)
    name = model.setdefault("name", SMALL_MODEL)
    sizes = dict(with_preset(model.get("preprocessing", {})))
    small = name == SMALL_MODEL
    native = max(max(record.height, record.width) for record in dataset.images)
    default_size = (SMALL_SIZE_PX if native > SHAPES_SIZE_PX else SHAPES_SIZE_PX) if small else 800
    min_size = sizes.setdefault("min_size_px", default_size)
    sizes.setdefault("max_size_px", max(min_size, round(min_size * 1333 / 800)))
    base = TrainConfig(
        model=model_config(name, class_names=dataset.class_names, category_ids=dataset.category_ids),
        loss=_SMALL_LOSS if small else LossConfig(),
    )
    config = changed(base, {**settings, "model": {**model, "preprocessing": sizes}})
    if config.model.class_names != dataset.class_names or config.model.category_ids != dataset.category_ids:
        raise UserError(
            f"settings for the classes {config.model.class_names[:5]}",
            f"those of {dataset.annotation_path}: {dataset.class_names[:5]}",
            "leave class_names and category_ids out of the settings, or train on that dataset",
        )
    for each in (dataset, validation):
        if config.model.has_masks and not each.has_masks:
            raise UserError(
                f"{config.model.name}, which learns masks, and {each.annotation_path}, which has boxes only",
                "annotations with segmentation, or a model without masks",
                "train --model fasterrcnn_resnet50_fpn, or annotate outlines",
            )
    frozen = config.batch_norm == "frozen" or config.model.frozen_batch_norm
    return replace(
        config,
        batch_norm="frozen" if frozen else config.batch_norm,
        model=replace(config.model, frozen_batch_norm=frozen),
        data=str(dataset.root),
        train_split=dataset.split,
        val_split=validation.split,
    )

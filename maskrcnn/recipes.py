"""From a dataset and a few wishes to a whole training configuration."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from maskrcnn.config import LossConfig, TrainConfig, model_config
from maskrcnn.data.coco import CocoDataset
from maskrcnn.preprocess import Preprocessing

SMALL_MODEL = "maskrcnn_resnet18_fpn_small"
SHAPES_SIZE_PX = 128  # side of a generated picture, and what a small model on shapes sees
SMALL_SIZE_PX = 256  # shorter side for a small model on other data

# A small model learns from fewer samples per image; a CPU's time goes where the samples go.
_SMALL_LOSS = LossConfig(rpn_samples=64, box_samples=64)


def training_config(
    dataset: CocoDataset, validation: CocoDataset, *, model: str | None = None, **wishes: Any
) -> TrainConfig:
    """The configuration for training on a dataset.

    Args:
        dataset: what to train on; its classes become the model's.
        validation: what to evaluate on.
        model: one of `maskrcnn.config.MODELS`; by default the small one.
        wishes: fields of `TrainConfig`, and `min_size_px` and `max_size_px`; None leaves the default.

    Raises:
        UserError: for an unknown model.
    """
    name = model or SMALL_MODEL
    wishes = {key: value for key, value in wishes.items() if value is not None}
    small = name == SMALL_MODEL
    native = max(max(record.height, record.width) for record in dataset.images)
    default_size = (SMALL_SIZE_PX if native > SHAPES_SIZE_PX else SHAPES_SIZE_PX) if small else 800
    min_size = wishes.pop("min_size_px", default_size)
    max_size = wishes.pop("max_size_px", max(min_size, round(min_size * 1333 / 800)))
    config = model_config(
        name,
        class_names=dataset.class_names,
        category_ids=dataset.category_ids,
        preprocessing=Preprocessing(min_size_px=min_size, max_size_px=max_size),
    )
    base = TrainConfig(
        model=config,
        data=str(dataset.root),
        train_split=dataset.split,
        val_split=validation.split,
    )
    if small:
        base = replace(base, loss=_SMALL_LOSS)
    return replace(base, **wishes)

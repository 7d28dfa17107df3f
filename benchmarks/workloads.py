"""On which images a benchmark runs, and with what weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from contenders import Artefacts, validation_split
from making import Order, make_files
from random_weights import calibrated_state_dict
from session import Progress

from maskrcnn.config import model_config
from maskrcnn.data.coco import CocoDataset, find_split
from maskrcnn.data.images import read_image
from maskrcnn.data.shapes import shapes_image
from maskrcnn.imaging.preprocess import Preprocessing, resize_bilinear, resized_size
from maskrcnn.model.detector import MaskRCNN
from maskrcnn.runtime import Detector
from maskrcnn.weights.checkpoint import SUFFIX, load_weights, save_checkpoint

_POOL = 8  # distinct images that are timed; all fit the caches of shapes that libraries keep
_GENERATED_SIZE_HW = (128, 128)
_RESNET50 = "maskrcnn_resnet50_fpn"
_CLASSES = 91  # with background, COCO's
_RANDOM_WEIGHTS = (
    "random weights: detections are compared, an AP would mean nothing",
    "random weights score neighbouring boxes alike, and half precision keeps others of them: what it costs "
    "in accuracy only a trained model's AP tells",
)


@dataclass(frozen=True, kw_only=True, eq=False)
class Workload:
    """What every contender does."""

    name: str
    pools: dict[str, list[np.ndarray]]  # images that are timed, by size as 800×1088; "": as the dataset's are
    batches: tuple[int, ...]
    repeat: int
    dataset: CocoDataset | None  # for AP
    budget_s: float | None = None  # for the timing of one batch size, see `time_in_turns`
    notes: tuple[str, ...] = ()
    files: tuple[Path, ...] = ()  # that the images of the only pool were read from

    def batch(self, size: str, count: int, turn: int) -> list[np.ndarray]:
        """The images of one call; the same for every contender in the same turn."""
        pool = self.pools[size]
        return [pool[(turn * count + k) % len(pool)] for k in range(count)]

    def files_of_batch(self, size: str, count: int) -> list[Path]:
        """The files of the images of turn 0, where they come from files as they are."""
        return [self.files[k % len(self.files)] for k in range(count)] if self.files and not size else []


def size_name(size_hw: tuple[int, int]) -> str:
    """As tables show it."""
    return f"{size_hw[0]}×{size_hw[1]}"


def take_size(detector: Any, size: str) -> None:
    """Lets a detector, ours or a peer, take images of one size as they are; "" leaves it at its own resizing."""
    if not size:
        return
    height, width = (int(side) for side in size.split("×"))
    if not isinstance(detector, Detector):
        detector.take_size((height, width))
        return
    metadata = detector.backend.metadata
    sizes = {"min_size_px": min(height, width), "max_size_px": max(height, width)}
    detector.backend.metadata = replace(metadata, preprocessing=replace(metadata.preprocessing, **sizes))


def dataset_workload(
    artefacts: Artefacts,
    *,
    data: Path | None,
    split: str | None,
    sizes_hw: Sequence[tuple[int, int]] = (),
    batches: tuple[int, ...],
    repeat: int,
    budget_s: float | None,
    images: int | None,
) -> Workload:
    """Images of a dataset: the one given, else that of the run's validation, else generated ones.

    With `sizes_hw` they are fitted into each of these sizes, and there is no dataset to measure AP on: a model's AP is
    that of its own resizing.
    """
    found, no_ap = _known_split(artefacts, data, split)
    no_ap = "no AP: the images have the sizes of --size; it is measured without" if sizes_hw else no_ap
    given = {"batches": batches, "repeat": repeat, "budget_s": budget_s, "notes": (no_ap,) if no_ap else ()}
    if found is None:
        pools = {size_name(size_hw): generated_images(_POOL, size_hw) for size_hw in sizes_hw}
        pools = pools or {"": generated_images(_POOL, _GENERATED_SIZE_HW)}
        return Workload(name="generated shapes", pools=pools, dataset=None, **given)
    dataset = CocoDataset.load(*found)
    if images is not None:
        dataset = replace(dataset, images=dataset.images[:images])
    files = tuple(record.path for record in dataset.images[:_POOL])
    pool = [read_image(path) for path in files]
    name = f"{found[0].name} {found[1]}, {len(pool if sizes_hw else dataset.images)} images"
    if sizes_hw:
        pools = {size_name(size_hw): [_fitted(image, size_hw) for image in pool] for size_hw in sizes_hw}
        return Workload(name=name, pools=pools, dataset=None, **given)
    return Workload(name=name, pools={"": pool}, files=files, dataset=dataset, **given)


def _known_split(artefacts: Artefacts, data: Path | None, split: str | None) -> tuple[tuple[Path, str] | None, str]:
    """The dataset given, or that of the run's validation, with its split; or None and what that leaves out."""
    if data:
        return (data, find_split(data, split or "val")), ""
    found = validation_split(artefacts.checkpoint)
    if found is None:
        return None, "no AP: no dataset is known for these files; name one with --data"
    if not found[0].is_dir():
        return None, f"no AP: the run's dataset {found[0]} is not there; name one with --data"
    return found, ""


def resnet50_workload(
    folder: Path,
    progress: Progress,
    *,
    sizes_hw: Sequence[tuple[int, int]],
    data: Path | None,
    split: str | None,
    batches: tuple[int, ...],
    repeat: int,
    budget_s: float | None,
    gpu_only: bool = False,
) -> tuple[Artefacts, Workload]:
    """Mask R-CNN ResNet-50 with calibrated random weights, exported and built here, on images of each size.

    Args:
        gpu_only: make no files for the CPU; for the others see `run.py`.
    """
    pools = {size_name(size_hw): images_of_size(size_hw, data, split) for size_hw in sizes_hw}
    size_hw, (pool, kind) = sizes_hw[0], next(iter(pools.values()))
    progress.say(f"{_RESNET50}: random weights, batch norm and heads set from {kind}")
    sizes = {"min_size_px": min(size_hw), "max_size_px": max(max(each) for each in sizes_hw)}
    weights = calibrated_state_dict(_RESNET50, _CLASSES, pool[:4], seed=0, **sizes)
    config = model_config(
        _RESNET50,
        class_names=tuple(f"class_{label}" for label in range(1, _CLASSES)),
        category_ids=tuple(range(1, _CLASSES)),
        preprocessing=Preprocessing(**sizes),
    )
    model = MaskRCNN(config)
    load_weights(model, weights, "calibrated weights")
    checkpoint = folder / f"resnet50{SUFFIX}"
    save_checkpoint(checkpoint, model)
    order = Order(model=model, checkpoint=checkpoint, pool=pool, sizes_hw=sizes_hw, batches=batches, gpu_only=gpu_only)
    artefacts, notes = make_files(order, progress)
    workload = Workload(
        name=f"{_RESNET50}, random weights, {kind} of {', '.join(pools)}",
        pools={name: images for name, (images, _) in pools.items()},
        batches=batches,
        repeat=repeat,
        budget_s=budget_s,
        dataset=None,
        notes=(*notes, *_RANDOM_WEIGHTS),
    )
    return artefacts, workload


def generated_images(count: int, size_hw: tuple[int, int]) -> list[np.ndarray]:
    """Drawn shapes, uint8 `[H, W, 3]` each."""
    return [shapes_image(np.random.default_rng((0, k)), size_hw)[0] for k in range(count)]


def images_of_size(size_hw: tuple[int, int], data: Path | None, split: str | None) -> tuple[list[np.ndarray], str]:
    """Images of exactly this size, and what they are."""
    if data is None:
        return generated_images(_POOL, size_hw), "generated shapes"
    records = CocoDataset.load(data, find_split(data, split or "val")).images[:_POOL]
    return [_fitted(read_image(record.path), size_hw) for record in records], "photos"


def _fitted(image: np.ndarray, size_hw: tuple[int, int]) -> np.ndarray:
    """An image resized to fit into `size_hw`, and padded right and bottom with black."""
    if (image.shape[0] > image.shape[1]) != (size_hw[0] > size_hw[1]):
        image = np.ascontiguousarray(image.transpose(1, 0, 2))
    wanted = resized_size(image.shape[:2], Preprocessing(min_size_px=min(size_hw), max_size_px=max(size_hw)))
    resized = resize_bilinear(image, tuple(np.minimum(wanted, size_hw).tolist()))
    fitted = np.zeros((*size_hw, 3), np.uint8)
    fitted[: resized.shape[1], : resized.shape[2]] = resized.transpose(1, 2, 0).round().astype(np.uint8)
    return fitted

"""The user's own augmentation, `augment.transform`: imported by name, called on a sample, and checked.

It is a callable `function(image, target, generator)` that returns `(image, target)`:

- `image`: `tv_tensors.Image` float32 `[C, h, w]`, 0 to 1, RGB; resized by the model's preprocessing, after the other
  augmentations. The function may return another size. The result is rounded to 8 bits if the file has at most 8 bits.
- `target["boxes"]`: `tv_tensors.BoundingBoxes` float32 `[G, 4]` xyxy, the extents of the masks.
- `target["labels"]`: int64 `[G]`, from 1.
- `target["masks"]`: `tv_tensors.Mask` uint8 `[G, h, w]`, 1 inside the object; 2 inside the box of an object that has no
  mask.
- `target["keypoints"]`: `tv_tensors.KeyPoints` float32 `[G, K, 2]` x, y, and `target["visibility"]` int64 `[G, K]`, 0
  where unlabelled; only of datasets with keypoints.
- `generator`: `torch.Generator`, seeded by (seed, epoch, image). During the call, the global generators of torch, NumPy
  and `random` are seeded in the same way.

The function may drop and add objects, consistently in all entries of the target. Objects without remaining pixels are
dropped afterwards, and boxes become the extents of the masks; returned boxes are optional and only compared with them.
"""

from __future__ import annotations

import importlib
import os
import random
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as v2_functional

from maskrcnn.errors import UserError
from maskrcnn.training.augmentation import Scene, as_pixels, torch_seeded_from
from maskrcnn.training.view import mask_extent, only_inside

Transform = Callable[[Tensor, dict[str, Any], torch.Generator], tuple[Tensor, dict[str, Any]]]

_STRICT_SAMPLES = 64  # number of samples per process whose boxes are compared with the masks
_BOX_SLACK = 0.1  # maximum distance of a mask beyond its box, as a fraction of the box's longer side
_BOX_SLACK_PX = 2.0


def load_transform(name: str) -> Transform:
    """The callable with the name `package.module:function`; modules in the working directory are found.

    Raises:
        UserError: if it cannot be imported or is not callable.
    """
    module_name, _, attribute = name.partition(":")
    here = os.getcwd()
    if here not in sys.path and "" not in sys.path:
        sys.path.append(here)  # last, so that files in it do not hide installed packages
    expected = "package.module:function, importable from here"
    try:
        found: Any = importlib.import_module(module_name)
    except Exception as error:  # any exception of the user's module
        raise UserError(
            f"augment.transform {name}: module {module_name} cannot be imported ({type(error).__name__}: {error})",
            expected,
            f"correct the name or the module, run in its folder (current folder: {here}), or set PYTHONPATH",
        ) from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            near = [each for each in vars(found) if not each.startswith("_") and callable(getattr(found, each))][:9]
            raise UserError(
                f"augment.transform {name}: no {part} in {module_name}",
                f"{expected}; {module_name} has {', '.join(near) or 'no functions'}",
                "correct the name after the colon",
            )
        found = getattr(found, part)
    if not callable(found):
        raise UserError(
            f"augment.transform {name}: a {type(found).__name__}", "a function or another callable", "name that"
        )
    transform: Transform = found
    return transform


class OwnTransform:
    """The user's augmentation of scenes.

    Args:
        name: see `load_transform`.
        num_classes: number of classes without background.
    """

    def __init__(self, name: str, num_classes: int) -> None:
        self.name, self.num_classes = name, num_classes
        self._function = load_transform(name)
        self._strict = _STRICT_SAMPLES

    def __call__(self, scene: Scene, rng: np.random.Generator, path: Path) -> Scene:
        """Call the transform on a scene whose objects all have pixels.

        Args:
            scene: canvas and objects.
            rng: source of the seeds.
            path: image, for errors.

        Raises:
            UserError: if the transform fails, or its result is inconsistent. Boxes are compared with masks only in the
                first samples, because such an error would show there.
        """
        has_keypoints = scene.keypoints.shape[1] > 0
        with _seeded_from(rng):
            generator = torch.Generator().manual_seed(int(rng.integers(2**63)))
            try:
                result = self._function(*_given(scene), generator)
            except MemoryError:
                raise
            except Exception as error:
                raise UserError(
                    f"augment.transform {self.name} on {path}: {type(error).__name__}: {error}{self._place(error)}",
                    "a transformed image and target",
                    "correct the function",
                ) from error
        try:
            changed, boxes = _scene_of(result, len(scene.image), self.num_classes, scene.keypoints.shape[1])
            changed = replace(changed, image=as_pixels(changed.image, scene.image.dtype))
            if self._strict and boxes is not None:
                self._strict -= 1
                _require_boxes_at_masks(boxes, changed.masks)
        except _Inconsistent as error:
            raise UserError(
                f"augment.transform {self.name} on {path}: {error.found}",
                error.expected,
                "correct the function; docs/training.md lists what it receives and returns"
                + (" (keypoints and visibility belong to the objects too)" if has_keypoints else ""),
            ) from error
        return changed

    def _place(self, error: Exception) -> str:
        """The location of the error in the transform's own file."""
        file = getattr(sys.modules.get(self.name.partition(":")[0]), "__file__", None)
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
        return f" ({file}, line {lines[-1]})" if lines else ""


class _Inconsistent(Exception):
    def __init__(self, found: str, expected: str) -> None:
        super().__init__(found)
        self.found, self.expected = found, expected


@contextmanager
def _seeded_from(rng: np.random.Generator) -> Iterator[None]:
    """Seed the global generators of torch, NumPy and `random` inside the context and restore them afterwards."""
    python, numpy = random.getstate(), np.random.get_state()
    random.seed(int(rng.integers(2**63)))
    np.random.seed(int(rng.integers(2**32)))
    try:
        with torch_seeded_from(rng):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


def _given(scene: Scene) -> tuple[Tensor, dict[str, Any]]:
    """The image and target of a scene, as the transform receives them."""
    boxes = np.array([mask_extent(mask) for mask in scene.masks], np.float32).reshape(-1, 4)
    masks = scene.masks.astype(np.uint8) * np.where(scene.has_mask, 1, 2).astype(np.uint8)[:, None, None]
    target: dict[str, Any] = {
        "boxes": tv_tensors.BoundingBoxes(torch.from_numpy(boxes), format="XYXY", canvas_size=scene.size_hw),
        "labels": torch.from_numpy(scene.labels.copy()),
        "masks": tv_tensors.Mask(torch.from_numpy(masks)),
    }
    if scene.keypoints.shape[1]:
        places = np.ascontiguousarray(scene.keypoints[..., :2])
        target["keypoints"] = tv_tensors.KeyPoints(torch.from_numpy(places), canvas_size=scene.size_hw)
        target["visibility"] = torch.from_numpy(scene.keypoints[..., 2].astype(np.int64))
    return tv_tensors.Image(torch.from_numpy(np.clip(scene.image.astype(np.float32) / 255, 0, 1))), target


def _scene_of(result: Any, channels: int, num_classes: int, keypoints: int) -> tuple[Scene, np.ndarray | None]:
    """Scene and boxes `[G, 4]` xyxy, if any, from the result of a transform."""
    if not (isinstance(result, (tuple, list)) and len(result) == 2 and isinstance(result[1], dict)):
        raise _Inconsistent(f"returned {_kind(result)}", "(image, target), target a dictionary")
    image, target = result
    names = ("labels", "masks", *(("keypoints", "visibility") if keypoints else ()))
    names += ("boxes",) * ("boxes" in target)
    for name, value in (("image", image), *((name, target.get(name)) for name in names)):
        if not isinstance(value, Tensor):
            raise _Inconsistent(f"returned {_kind(value)} as {name}", "a tensor")
    if image.dim() != 3 or len(image) != channels or not image.is_floating_point() or 0 in image.shape:
        raise _Inconsistent(f"returned {_kind(image)} as image", f"a tensor [{channels}, h, w] of floating point")
    low, high = (float(value) for value in torch.aminmax(image.detach()))
    if not (low >= -0.5 and high <= 1.5):  # filters overshoot slightly; NaN fails both comparisons
        raise _Inconsistent(f"returned an image of values from {low:g} to {high:g}", "0 to 1, not normalised")
    size_hw, count = (int(image.shape[1]), int(image.shape[2])), len(target["labels"])
    shapes: dict[str, tuple[int, ...]] = {
        "boxes": (count, 4),
        "labels": (count,),
        "masks": (count, *size_hw),
        "keypoints": (count, keypoints, 2),
        "visibility": (count, keypoints),
    }
    shapes = {name: shape for name, shape in shapes.items() if name in names}
    if any(tuple(target[name].shape) != shape for name, shape in shapes.items()):
        raise _Inconsistent(
            f"returned an image of {size_hw[0]}×{size_hw[1]} with "
            + ", ".join(f"{name} {list(target[name].shape)}" for name in shapes),
            "one row per object in each of them, and masks of the image's size: "
            + ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items()),
        )
    boxes, labels, masks = target.get("boxes"), target["labels"], target["masks"]
    if isinstance(boxes, tv_tensors.BoundingBoxes) and boxes.format != tv_tensors.BoundingBoxFormat.XYXY:
        boxes = v2_functional.convert_bounding_box_format(boxes, new_format=tv_tensors.BoundingBoxFormat.XYXY)
    for name in shapes:
        if not torch.isfinite(target[name]).all():
            raise _Inconsistent(f"returned {name} that are not finite", "numbers")
    if labels.is_floating_point() or (count and not (int(labels.min()) >= 1 and int(labels.max()) <= num_classes)):
        raise _Inconsistent(f"returned labels {labels.tolist()[:9]}", f"integers from 1 to {num_classes}")
    values = masks.detach().numpy()
    inside = values > 0.5  # also for masks interpolated as floating point
    shown = np.zeros((count, keypoints, 3), np.float32)
    if keypoints:
        shown[..., :2], shown[..., 2] = target["keypoints"].detach().numpy(), target["visibility"].numpy()
    return Scene(
        image=np.ascontiguousarray(255 * image.detach().clamp(0, 1).float().numpy()),
        masks=inside,
        labels=labels.to(torch.int64).numpy(),
        visible=np.ones(count),
        keypoints=only_inside(shown, size_hw),
        has_mask=values.max(axis=(1, 2), initial=0) != 2,
    ), None if boxes is None else boxes.detach().float().numpy()


def _require_boxes_at_masks(boxes: np.ndarray, masks: np.ndarray) -> None:
    """Raise unless each mask is inside its box, up to interpolation; the box may be larger, as after a rotation."""
    for number, (box, mask) in enumerate(zip(boxes, masks, strict=True)):
        extent = mask_extent(mask)
        if extent is None:
            continue
        slack = _BOX_SLACK_PX + _BOX_SLACK * float(max(box[2:] - box[:2]))
        outside = max(*(box[:2] - extent[:2]), *(extent[2:] - box[2:]))
        if outside > slack:
            raise _Inconsistent(
                f"returned box [{', '.join(f'{value:.4g}' for value in box)}] of object {number}, whose mask extends "
                f"over {list(extent)}",
                "boxes around their masks: move both, in the same order of objects",
            )


def _kind(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor {list(value.shape)} of {str(value.dtype).removeprefix('torch.')}"
    return "nothing" if value is None else f"a {type(value).__name__}"

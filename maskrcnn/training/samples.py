"""Training samples, whose randomness depends only on (seed, epoch, index).

Augmentation is thus independent of the number of workers and processes, and of interruptions of the run.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch.utils.data import Dataset

from maskrcnn.config import AugmentConfig
from maskrcnn.data.coco import CocoDataset
from maskrcnn.data.records import ImageRecord
from maskrcnn.data.survey import read_record
from maskrcnn.errors import UserError
from maskrcnn.imaging.preprocess import Preprocessing
from maskrcnn.keypoints import mirrored
from maskrcnn.training.augmentation import (
    Augmentation,
    Scene,
    copy_paste,
    mixup,
    mosaic,
    objects_of_scene,
    scene_in_view,
)
from maskrcnn.training.transform import OwnTransform
from maskrcnn.training.view import Objects, View, objects_in_view

_MIN_MOSAIC_PX = 8  # minimum shorter side of a canvas that is divided in four


@dataclass(frozen=True, eq=False)
class Sample:
    """One training image as the detector receives it."""

    image_id: int
    image: np.ndarray  # uint8 or float32 [C, h, w], 0–255, see `Scene`; channels in the model's order
    objects: Objects
    seed: int  # non-negative, for the sampling of the losses


class TrainingSamples(Dataset):
    """Samples of a dataset, indexed by (epoch, index, copy); copies of an image in an epoch are changed independently.

    The dataset itself is not kept, only its `Records`.

    Args:
        dataset: images and annotations.
        preprocessing: the model's.
        augment: random changes (default: half of the images are mirrored).
        seed: non-negative.
    """

    def __init__(
        self,
        dataset: CocoDataset,
        preprocessing: Preprocessing,
        *,
        augment: AugmentConfig | None = None,
        seed: int,
    ) -> None:
        self.records, self.preprocessing, self.seed = dataset.images, preprocessing, seed
        sizes = dataset.images.sizes_hw
        self.aspect_ratios = sizes[:, 0] / sizes[:, 1]
        self.augment = augment or AugmentConfig()
        self._augmentation = Augmentation(self.augment, preprocessing)
        self._partners = mirrored(dataset.keypoint_names)
        self._transform = (
            OwnTransform(self.augment.transform, len(dataset.class_names)) if self.augment.transform else None
        )

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, key: tuple[int, int] | tuple[int, int, int]) -> Sample | UserError:
        """A sample, or the error about its file: PyTorch would not preserve an error raised in a worker."""
        try:
            return self._sample(*key)
        except UserError as error:
            return error
        except MemoryError:
            record = self.records[key[1]]
            return UserError(
                f"out of memory while {record.path} ({record.width}×{record.height} pixels, {len(record.instances)} "
                "objects) was loaded",
                "memory for one image per data loading process",
                "use fewer --workers, or smaller images",
            )
        except Exception as error:
            raise RuntimeError(f"{self.records[key[1]].path}: {type(error).__name__}: {error}") from error

    def _sample(self, epoch: int, index: int, copy: int = 0) -> Sample:
        rng = np.random.default_rng((self.seed, epoch, index, copy) if copy else (self.seed, epoch, index))
        seed = int(rng.integers(2**63))
        record, config = self.records[index], self.augment
        view = self._augmentation.view((record.height, record.width), rng)
        steps = [step for step, probability in self._compositions() if rng.random() < probability]
        if steps or self._transform is not None:
            scene = self._composed(record, view, steps, rng)
            if self._transform is not None:
                scene = self._transform(scene.shown(config.least_visible), rng, record.path)
            image, objects = scene.image, objects_of_scene(scene, config.least_visible)
        else:  # without full-size masks, which would take most of the time and memory
            image = self._augmentation.image(read_record(record, self.preprocessing), view, rng)
            objects = objects_in_view(record, view, config.least_visible, self._partners)
        if self.preprocessing.channel_order == "BGR":
            image = np.ascontiguousarray(image[::-1])
        return Sample(record.id, image, objects, seed)

    def _compositions(self) -> tuple[tuple[str, float], ...]:
        config = self.augment
        return (
            ("mosaic", config.mosaic_probability),
            ("perspective", config.perspective_probability),
            ("mixup", config.mixup_probability),
            ("copy_paste", config.copy_paste_probability),
        )

    def _composed(self, record: ImageRecord, view: View, steps: list[str], rng: np.random.Generator) -> Scene:
        if "mosaic" in steps and min(view.canvas_hw) >= _MIN_MOSAIC_PX:
            scene = self._mosaic(record, view.canvas_hw, rng)
        else:
            scene = self._scene(record, view, rng)
        if "perspective" in steps:
            scene = self._augmentation.tilted(scene, rng)
        if "mixup" in steps:
            alpha = self.augment.mixup_alpha
            scene = mixup(scene, self._partner(scene.size_hw, rng), rng.beta(alpha, alpha))
        if "copy_paste" in steps:
            other = self._partner(scene.size_hw, rng)
            other = other.shown(self.augment.least_visible)
            if len(other.labels):
                number = rng.integers(1, len(other.labels) + 1)
                scene = copy_paste(scene, other, np.sort(rng.choice(len(other.labels), number, replace=False)))
        return scene

    def _mosaic(self, record: ImageRecord, canvas_hw: tuple[int, int], rng: np.random.Generator) -> Scene:
        """The image and three others around a point in the middle half of the canvas."""
        centre_y, centre_x = (round(side * rng.uniform(0.25, 0.75)) for side in canvas_hw)
        heights, widths = (centre_y, canvas_hw[0] - centre_y), (centre_x, canvas_hw[1] - centre_x)
        tiles_hw = [(height, width) for height in heights for width in widths]
        records = [record, *(self._other(rng) for _ in range(3))]
        order = rng.permutation(4)  # the image itself may be any of the four tiles
        tiles = []
        for tile_hw, chosen in zip(tiles_hw, (records[k] for k in order), strict=True):
            view = self._augmentation.covering_view((chosen.height, chosen.width), tile_hw, rng)
            tiles.append(self._scene(chosen, view, rng))
        return mosaic(tiles)

    def _partner(self, canvas_hw: tuple[int, int], rng: np.random.Generator) -> Scene:
        record = self._other(rng)
        view = self._augmentation.partner_view((record.height, record.width), canvas_hw, rng)
        return self._scene(record, view, rng)

    def _other(self, rng: np.random.Generator) -> ImageRecord:
        return self.records[int(rng.integers(len(self.records)))]

    def _scene(self, record: ImageRecord, view: View, rng: np.random.Generator) -> Scene:
        return scene_in_view(
            record, self._augmentation.image(read_record(record, self.preprocessing), view, rng), view, self._partners
        )

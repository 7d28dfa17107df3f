"""Training samples: images and padded ground truth as tensors.

Every sample is random by (seed, epoch, index) alone, so the order of the data and its augmentation do not
depend on the number of workers or on where a run was interrupted.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from maskrcnn.data.coco import CocoDataset, ImageRecord, instance_mask
from maskrcnn.data.images import read_image
from maskrcnn.errors import UserError
from maskrcnn.preprocess import Preprocessing, resize_bilinear, resized_size

MASK_SIDE = 112  # pixels per side of a stored object mask: four times the 28 × 28 that the mask head predicts


@dataclass
class Batch:
    """A batch on fixed shapes. G is the largest number of objects of an image, at least 1."""

    images: Tensor  # float32 [N, 3, H, W], RGB 0–255, padded right and bottom
    image_sizes: Tensor  # int64 [N, 2], (height, width) before padding
    boxes: Tensor  # float32 [N, G, 4] xyxy, pixels of the resized image; zero in padding
    labels: Tensor  # int64 [N, G]
    valid: Tensor  # bool [N, G]
    masks: Tensor  # uint8 [N, G, MASK_SIDE, MASK_SIDE], 0 or 255, in the frame of each object's box
    image_ids: list[int]

    def truth(self) -> dict[str, Tensor]:
        """The ground truth as `MaskRCNN.losses` takes it."""
        return {"boxes": self.boxes, "labels": self.labels, "valid": self.valid, "masks": self.masks}

    def to(self, device: torch.device) -> Batch:
        """The same batch on a device."""
        moved = {
            name: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
            for name, value in vars(self).items()
        }
        return Batch(**moved)

    def pin_memory(self) -> Batch:
        """The same batch in page-locked memory."""
        return Batch(
            **{k: v.pin_memory() if isinstance(v, Tensor) else v for k, v in vars(self).items()},
        )


def mask_in_box(mask: np.ndarray, box_xyxy_px: np.ndarray, side: int = MASK_SIDE) -> np.ndarray:
    """A full-size mask bool `[H, W]` stretched over its box, nearest pixel, uint8 `[side, side]` of 0 or 255."""
    x1, y1, x2, y2 = box_xyxy_px
    centres = (np.arange(side) + 0.5) / side
    rows = np.clip(np.floor(y1 + centres * (y2 - y1)).astype(np.int64), 0, mask.shape[0] - 1)
    columns = np.clip(np.floor(x1 + centres * (x2 - x1)).astype(np.int64), 0, mask.shape[1] - 1)
    return mask[np.ix_(rows, columns)].astype(np.uint8) * 255


class TrainingSamples(Dataset):
    """Samples of a dataset, indexed by (epoch, index)."""

    def __init__(
        self, dataset: CocoDataset, preprocessing: Preprocessing, *, flip_probability: float, seed: int
    ) -> None:
        self.dataset = dataset
        self.preprocessing = preprocessing
        self.flip_probability = flip_probability
        self.seed = seed

    def __len__(self) -> int:
        return len(self.dataset.images)

    def __getitem__(self, key: tuple[int, int]) -> tuple | UserError:
        """One sample, or the error that its file deserves: PyTorch would lose an error raised in a worker."""
        try:
            return self._sample(*key)
        except UserError as error:
            return error

    def _sample(self, epoch: int, index: int) -> tuple:
        record = self.dataset.images[index]
        rng = np.random.default_rng((self.seed, epoch, index))
        image = read_image(record.path)
        if image.shape[:2] != (record.height, record.width):
            raise UserError(
                f"{record.path}: {image.shape[1]}×{image.shape[0]} pixels",
                f"{record.width}×{record.height}, as its annotations say",
                "restore the image that was annotated, or correct the JSON",
            )
        boxes, labels, masks = self._objects(record)
        if rng.random() < self.flip_probability:
            image, masks = image[:, ::-1], masks[:, :, ::-1]
            boxes = np.stack([record.width - boxes[:, 2], boxes[:, 1], record.width - boxes[:, 0], boxes[:, 3]], axis=1)
        size = resized_size(image.shape[:2], self.preprocessing)
        scale = np.array([size[1] / record.width, size[0] / record.height], np.float32)
        pixels = resize_bilinear(image.copy(), size)
        return record.id, pixels, boxes * np.tile(scale, 2), labels, masks.copy()

    def _objects(self, record: ImageRecord) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Boxes `[G, 4]`, labels `[G]` and box-frame masks of an image's objects, crowd regions left out."""
        objects = [instance for instance in record.instances if not instance.is_crowd]
        boxes = np.array([o.box_xyxy_px for o in objects], np.float32).reshape(-1, 4)
        labels = np.array([o.label for o in objects], np.int64)
        masks = [mask_in_box(instance_mask(record, o), box) for o, box in zip(objects, boxes, strict=True)]
        return boxes, labels, np.array(masks, np.uint8).reshape(-1, MASK_SIDE, MASK_SIDE)


def collate(samples: list[tuple], divisor: int) -> Batch:
    """Samples padded to common sizes; H and W become multiples of `divisor`."""
    objects = max(1, *(len(labels) for _, _, _, labels, _ in samples))
    height, width = (-(-max(pixels.shape[axis] for _, pixels, *_ in samples) // divisor) * divisor for axis in (1, 2))
    count = len(samples)
    batch = Batch(
        images=torch.zeros(count, 3, height, width),
        image_sizes=torch.zeros(count, 2, dtype=torch.int64),
        boxes=torch.zeros(count, objects, 4),
        labels=torch.zeros(count, objects, dtype=torch.int64),
        valid=torch.zeros(count, objects, dtype=torch.bool),
        masks=torch.zeros(count, objects, MASK_SIDE, MASK_SIDE, dtype=torch.uint8),
        image_ids=[sample[0] for sample in samples],
    )
    for n, (_, pixels, boxes, labels, masks) in enumerate(samples):
        number = len(labels)
        batch.images[n, :, : pixels.shape[1], : pixels.shape[2]] = torch.from_numpy(pixels)
        batch.image_sizes[n] = torch.tensor(pixels.shape[1:])
        batch.boxes[n, :number] = torch.from_numpy(boxes)
        batch.labels[n, :number] = torch.from_numpy(labels)
        batch.valid[n, :number] = True
        batch.masks[n, :number] = torch.from_numpy(masks)
    return batch


class EpochSampler(Sampler):
    """(epoch, index) pairs in an order that only the seed and the epoch decide."""

    def __init__(self, length: int, seed: int) -> None:
        self.length, self.seed, self.epoch = length, seed, 0

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[tuple[int, int]]:
        order = np.random.default_rng((self.seed, self.epoch)).permutation(self.length)
        return iter([(self.epoch, int(index)) for index in order])


class _Collate:
    def __init__(self, divisor: int) -> None:
        self.divisor = divisor

    def __call__(self, samples: list[tuple | UserError]) -> Batch | UserError:
        errors = [sample for sample in samples if isinstance(sample, UserError)]
        return errors[0] if errors else collate(samples, self.divisor)


def training_loader(
    samples: TrainingSamples, *, batch_size: int, workers: int, pin_memory: bool
) -> tuple[DataLoader, EpochSampler]:
    """Batches of one epoch, the last one possibly smaller; set `sampler.epoch` before iterating.

    Where a file cannot be used, the loader yields the `UserError` in place of the batch.
    """
    sampler = EpochSampler(len(samples), samples.seed)
    loader = DataLoader(
        samples,
        batch_size=batch_size,
        sampler=sampler,
        num_workers=workers,
        collate_fn=_Collate(samples.preprocessing.divisor),
        pin_memory=pin_memory,
        persistent_workers=workers > 0,
    )
    return loader, sampler

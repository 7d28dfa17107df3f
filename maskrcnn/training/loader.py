"""Training batches: samples as tensors of fixed shapes, loaded by worker processes."""

from __future__ import annotations

import gc
import math
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler, get_worker_info

from maskrcnn.errors import UserError
from maskrcnn.training.samples import Sample, TrainingSamples
from maskrcnn.training.view import MASK_SIDE


class StepSampler(Sampler[list[tuple[int, int, int]]]):
    """Batches of (epoch, index, copy) for one process; `copy` numbers the occurrences of a repeated image from 0.

    The images of an optimizer step, the global batch, depend only on the seed, the epoch and the batch size. Each of
    `world_size` processes takes an equal slice, in `accumulate` equal parts. A run can therefore continue with another
    number of processes or parts, and every gradient is a mean over equally many images.

    Each image occurs once per epoch, or with `repeats` the given number of times on average over the epochs. The last
    global batch is filled up from the start of the epoch's order, so fewer than `batch_size` images occur once more
    (all of them, repeatedly, if the dataset is smaller than a batch).

    Args:
        length: number of images.
        batch_size: images per optimizer step, over all processes and parts.
        seed: non-negative.
        groups: group of each image, `length` values; a batch contains images of one group, except the last ones, which
            combine the remainders. None: one group.
        repeats: occurrences of each image per epoch, `length` numbers of at least 1; fractions are probabilities.
            Their sum is rounded, so that all epochs have equally many images. None: once.
        rank: rank of this process.
        world_size: number of processes.
        accumulate: parts of each process's slice.

    Attributes:
        length: number of images of an epoch, including repeated ones.
        epoch: epoch of the next iteration.
        start: batches of this process to skip, for a run that continues within an epoch.

    Raises:
        UserError: if a batch cannot be divided evenly.
    """

    def __init__(
        self,
        length: int,
        *,
        batch_size: int,
        seed: int,
        groups: Sequence[int] | np.ndarray | None = None,
        repeats: np.ndarray | None = None,
        rank: int = 0,
        world_size: int = 1,
        accumulate: int = 1,
    ) -> None:
        if batch_size % (world_size * accumulate):
            raise UserError(
                f"batch_size {batch_size} for {world_size} process(es), accumulate {accumulate}",
                f"a multiple of {world_size * accumulate}",
                "change --batch-size or --accumulate",
            )
        self.images, self.batch_size, self.seed, self.repeats = length, batch_size, seed, repeats
        self.length = length if repeats is None else int(np.floor(repeats).sum() + round((repeats % 1).sum()))
        self.groups = np.zeros(length, np.int64) if groups is None else np.asarray(groups)
        self.rank, self.world_size, self.accumulate = rank, world_size, accumulate
        self.epoch, self.start = 0, 0

    @property
    def steps(self) -> int:
        """Optimizer steps per epoch."""
        return -(-self.length // self.batch_size)

    def __len__(self) -> int:
        """Batches of this process in a whole epoch, regardless of `start`."""
        return self.steps * self.accumulate

    def __iter__(self) -> Iterator[list[tuple[int, int, int]]]:
        parts = self.global_batches().reshape(self.steps, self.world_size, self.accumulate, -1)[:, self.rank]
        for part in parts.reshape(len(self), -1)[self.start :].tolist():
            yield [(self.epoch, key % self.images, key // self.images) for key in part]

    def global_batches(self) -> np.ndarray:
        """Images of each optimizer step of the epoch, index + copy · images, int64 `[steps, batch_size]`."""
        rng = np.random.default_rng((self.seed, self.epoch))
        order = rng.permutation(self.images)
        if self.repeats is not None:
            order = rng.permutation(self._repeated(order, rng))
        groups = self.groups[order % self.images]
        members = [order[groups == group] for group in np.unique(groups)]
        if len(members) > 1:
            cuts = [len(images) // self.batch_size * self.batch_size for images in members]
            whole = np.concatenate([images[:cut] for images, cut in zip(members, cuts, strict=True)])
            left = np.concatenate([images[cut:] for images, cut in zip(members, cuts, strict=True)])
            batches = rng.permutation(whole.reshape(-1, self.batch_size))
            order = np.concatenate([batches.ravel(), left])
        return np.resize(order, (self.steps, self.batch_size))  # repeats from the start

    def _repeated(self, order: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Every image repeated as given by `repeats`, with fractions rounded at random: int64 `[length]`.

        Systematic sampling over a random order: marks at distance 1 from a random start fall on images whose lengths
        are their fractions. Rounding each image independently, as in the paper, would give epochs of varying length,
        while the learning rate and a resumed run count steps.
        """
        assert self.repeats is not None
        whole = np.floor(self.repeats[order]).astype(np.int64)
        rest = self.repeats[order] - whole
        marks = self.length - whole.sum()
        ends = np.cumsum(rest) * (marks / max(rest.sum(), 1e-9))
        ends[-1] = marks
        counts = whole + np.diff(np.ceil(ends - rng.random()), prepend=0.0).astype(np.int64)
        first = np.cumsum(counts) - counts
        copies = np.arange(self.length) - np.repeat(first, counts)
        return np.repeat(order, counts) + copies * self.images


@dataclass
class Batch:
    """A batch with fixed shapes; G is the maximum number of objects of an image, at least 1."""

    # uint8, or float32 if an image has more than 8 bits per sample; the model makes both float32.
    images: Tensor  # [N, C, H, W], 0–255, padded right and bottom; channels in the model's order
    image_sizes: Tensor  # int64 [N, 2], (height, width) before padding
    boxes: Tensor  # float32 [N, G, 4] xyxy, pixels of the resized image; zero in padding
    labels: Tensor  # int64 [N, G]
    valid: Tensor  # bool [N, G]
    masks: Tensor  # uint8 [N, G, MASK_SIDE, MASK_SIDE], 0 or 255, crops of the objects' masks
    mask_frames: Tensor  # float32 [N, G, 4] xyxy, region of each crop in pixels of the resized image
    keypoints: Tensor  # float32 [N, G, K, 3]: x, y in pixels of the resized image, visibility (0: unlabelled)
    seeds: Tensor  # int64 [N], non-negative, random by seed, epoch and image
    image_ids: list[int]

    def truth(self) -> dict[str, Tensor]:
        """Ground truth as expected by `MaskRCNN.losses`."""
        names = ("boxes", "labels", "valid", "masks", "mask_frames", "keypoints", "seeds")
        return {name: getattr(self, name) for name in names}

    def to(self, device: torch.device) -> Batch:
        """Copy to a device."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=device.type == "cuda"))

    def pin_memory(self) -> Batch:
        """Copy to page-locked memory."""
        return self._map(Tensor.pin_memory)

    def _map(self, function: Callable[[Tensor], Tensor]) -> Batch:
        tensors: dict[str, Any] = {k: function(v) for k, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, **tensors)


class PipedBatch(Batch):
    """A batch that is sent to the training process by value, because it did not fit into shared memory."""

    def __reduce__(self) -> tuple[Any, ...]:
        values = {k: v.numpy() if isinstance(v, Tensor) else v for k, v in vars(self).items()}
        return _piped_batch, (values,)


def _piped_batch(values: dict[str, Any]) -> PipedBatch:
    tensors: dict[str, Any] = {k: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for k, v in values.items()}
    return PipedBatch(**tensors)


def collate(samples: list[Sample], divisor: int) -> Batch:
    """Pad samples to common sizes; H and W become multiples of `divisor`."""
    objects = max(1, *(len(sample.objects) for sample in samples))
    sizes = torch.tensor([sample.image.shape[1:] for sample in samples])
    height, width = (-(-int(side) // divisor) * divisor for side in sizes.amax(dim=0))
    count, is_uint8 = len(samples), all(sample.image.dtype == np.uint8 for sample in samples)
    shape = (count, samples[0].image.shape[0], height, width)
    batch = Batch(
        images=torch.empty(shape, dtype=torch.uint8 if is_uint8 else torch.float32),  # only padding is zeroed, below
        image_sizes=sizes,
        boxes=torch.zeros(count, objects, 4),
        labels=torch.zeros(count, objects, dtype=torch.int64),
        valid=torch.zeros(count, objects, dtype=torch.bool),
        masks=torch.zeros(count, objects, MASK_SIDE, MASK_SIDE, dtype=torch.uint8),
        mask_frames=torch.zeros(count, objects, 4),
        keypoints=torch.zeros(count, objects, *samples[0].objects.keypoints.shape[1:]),
        seeds=torch.tensor([sample.seed for sample in samples]),
        image_ids=[sample.image_id for sample in samples],
    )
    for n, sample in enumerate(samples):
        number, found = len(sample.objects), sample.objects
        rows, columns = sample.image.shape[1:]
        batch.images[n, :, :rows, :columns] = torch.from_numpy(sample.image)
        batch.images[n, :, rows:] = 0
        batch.images[n, :, :rows, columns:] = 0
        batch.boxes[n, :number] = torch.from_numpy(found.boxes)
        batch.labels[n, :number] = torch.from_numpy(found.labels)
        batch.valid[n, :number] = True
        batch.masks[n, :number] = torch.from_numpy(found.masks)
        batch.mask_frames[n, :number] = torch.from_numpy(found.frames)
        batch.keypoints[n, :number] = torch.from_numpy(found.keypoints)
    return batch


def _collate_or_error(samples: list[Sample | UserError], divisor: int) -> Batch | UserError:
    errors = [sample for sample in samples if isinstance(sample, UserError)]
    if errors:
        return errors[0]
    batch = collate([s for s in samples if isinstance(s, Sample)], divisor)
    return batch if get_worker_info() is None else _shared(batch)


def _shared(batch: Batch) -> Batch:
    """The batch in shared memory, or if it does not fit, a batch that is sent by value.

    PyTorch would move it to shared memory in a thread of the worker, whose errors are lost: the training process would
    wait forever.
    """
    try:
        for value in vars(batch).values():
            if isinstance(value, Tensor):
                value.share_memory_()
    except RuntimeError:  # /dev/shm is full, or there are too many open files
        return PipedBatch(**vars(batch))
    return batch


def _start_worker(number: int) -> None:
    """Prevents the garbage collector from writing to, and thus copying, memory shared with the training process."""
    gc.freeze()


def aspect_ratio_group(ratios: np.ndarray, groups: int) -> np.ndarray:
    """Group of each image, int64: 2 groups are landscape and portrait.

    The bounds of more groups are spaced logarithmically from 1:2 to 2:1, as in torchvision's reference training.

    Args:
        ratios: height / width of each image.
        groups: number of groups.
    """
    bounds = 2.0 ** np.linspace(-1, 1, groups - 1) if groups > 2 else np.ones(groups - 1)
    return np.searchsorted(bounds, ratios)


def repeat_factors(labels: Sequence[Collection[int]], threshold: float) -> np.ndarray:
    """Occurrences of each image per epoch, float64: repeat factor sampling (Gupta et al. 2019, appendix A).

    A class in a fraction f of the images has the factor max(1, √(threshold / f)); an image has its rarest class's.

    Args:
        labels: classes of the objects of each image.
        threshold: fraction of the images; images of less frequent classes are repeated.
    """
    counts = Counter(label for own in labels for label in set(own))
    factors = {label: math.sqrt(threshold * len(labels) / count) for label, count in counts.items()}
    return np.array([max(1.0, *(factors[label] for label in own)) if own else 1.0 for own in labels])


def training_loader(
    samples: TrainingSamples,
    *,
    batch_size: int,
    workers: int,
    pin_memory: bool,
    rank: int = 0,
    world_size: int = 1,
    accumulate: int = 1,
    aspect_ratio_groups: int = 1,
    repeats: np.ndarray | None = None,
) -> tuple[DataLoader, StepSampler]:
    """Loader of the batches of one process; set `sampler.epoch` before iterating.

    If a file cannot be used, the loader yields the `UserError` in place of the batch. Batches that do not fit into
    shared memory are `PipedBatch`es.

    Args:
        samples: samples to load.
        batch_size: images per optimizer step, over all processes; a batch of the loader has
            `batch_size / (world_size · accumulate)`.
        workers: single-threaded loading processes; 0 loads in the calling process.
        pin_memory: put batches in page-locked memory, for a GPU.
        rank: rank of this process.
        world_size: number of processes.
        accumulate: batches of the loader per optimizer step.
        aspect_ratio_groups: number of groups of images that are batched separately, to need less padding, see
            `aspect_ratio_group`; 1: no grouping.
        repeats: see `StepSampler`.

    Raises:
        UserError: if a batch cannot be divided evenly.
    """
    sampler = StepSampler(
        len(samples),
        batch_size=batch_size,
        seed=samples.seed,
        groups=aspect_ratio_group(samples.aspect_ratios, aspect_ratio_groups),
        repeats=repeats,
        rank=rank,
        world_size=world_size,
        accumulate=accumulate,
    )
    loader = DataLoader(
        samples,
        batch_sampler=sampler,
        num_workers=workers,
        collate_fn=partial(_collate_or_error, divisor=samples.preprocessing.divisor),
        pin_memory=pin_memory,
        persistent_workers=workers > 0,
        worker_init_fn=_start_worker,
        generator=torch.Generator(),  # the default draws from the global generator in each epoch
    )
    return loader, sampler

"""Which images make which optimizer step, on which process."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from torch.utils.data import Sampler

from maskrcnn.errors import UserError


class StepSampler(Sampler[list[tuple[int, int]]]):
    """Batches of (epoch, index) for one process.

    The images of an optimizer step are decided by the seed, the epoch and the batch size alone: a global batch. Each
    of `world_size` processes takes an equal slice of it, in `accumulate` equal parts, one after another. So a run may
    continue with another number of processes or parts, and every gradient is a mean over equally many images.

    Each image occurs once in an epoch. What the last global batch lacks is filled from the beginning of the epoch's
    order, so that every batch has the same number of images; fewer than `batch_size` images then occur again (all of
    them, and repeatedly, where the dataset is smaller than a batch).

    Args:
        length: number of images.
        batch_size: images per optimizer step, over all processes and parts.
        seed: non-negative.
        groups: the group of each image, `length` of them; a batch holds images of one group, except the last ones,
            which take what is left of each. None: one group.
        rank: of this process.
        world_size: processes that share a batch.
        accumulate: parts of each process's slice.

    Attributes:
        epoch: of the next iteration.
        start: batches of this process that the next iterations leave out, for a run that continues amid an epoch.

    Raises:
        UserError: where a batch cannot be divided evenly.
    """

    def __init__(
        self,
        length: int,
        *,
        batch_size: int,
        seed: int,
        groups: Sequence[int] | None = None,
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
        self.length, self.batch_size, self.seed = length, batch_size, seed
        self.groups = np.zeros(length, np.int64) if groups is None else np.asarray(groups)
        self.rank, self.world_size, self.accumulate = rank, world_size, accumulate
        self.epoch, self.start = 0, 0

    @property
    def steps(self) -> int:
        """Optimizer steps of an epoch."""
        return -(-self.length // self.batch_size)

    def __len__(self) -> int:
        """Batches of this process in a whole epoch, whatever `start` is."""
        return self.steps * self.accumulate

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        parts = self.global_batches().reshape(self.steps, self.world_size, self.accumulate, -1)[:, self.rank]
        for part in parts.reshape(len(self), -1)[self.start :].tolist():
            yield [(self.epoch, index) for index in part]

    def global_batches(self) -> np.ndarray:
        """The images of each optimizer step of the epoch, int64 `[steps, batch_size]`."""
        rng = np.random.default_rng((self.seed, self.epoch))
        order = rng.permutation(self.length)
        members = [order[self.groups[order] == group] for group in np.unique(self.groups)]
        if len(members) > 1:
            cuts = [len(images) // self.batch_size * self.batch_size for images in members]
            whole = np.concatenate([images[:cut] for images, cut in zip(members, cuts, strict=True)])
            left = np.concatenate([images[cut:] for images, cut in zip(members, cuts, strict=True)])
            batches = rng.permutation(whole.reshape(-1, self.batch_size))
            order = np.concatenate([batches.ravel(), left])
        return np.resize(order, (self.steps, self.batch_size))  # repeats from the beginning

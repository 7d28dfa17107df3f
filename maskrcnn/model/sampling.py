"""Matching of anchors and proposals to objects, and their sampling, on fixed shapes.

Nothing here depends on a value for its shape, so a training step never waits for the device.
"""

from __future__ import annotations

import torch
from torch import Tensor


def match_anchors(
    iou: Tensor, valid: Tensor, *, foreground: float, background: float, keep_best: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """Which object each box belongs to (Ren et al. 2015, section 3.1.2).

    Args:
        iou: `[A, G]`, -1 in columns of padding.
        valid: bool `[G]`, whether a column is an object.
        foreground: a box is positive from this IoU on.
        background: a box is negative below this IoU.
        keep_best: also make positive every box that is the best for some object, ties included.

    Returns:
        index of the best object int64 `[A]`, positive bool `[A]`, negative bool `[A]`. Without objects every
        box is negative.
    """
    best, matched = iou.max(dim=1)
    positive, negative = best >= foreground, best < background
    if keep_best:
        best_of_object = iou.max(dim=0).values
        positive = positive | ((iou == best_of_object) & valid & (best_of_object > 0)).any(dim=1)
    return matched, positive, negative & ~positive


_BITS = 29  # of a random key; positives get the next bit, so that all keys of a sample fit an int32


def random_keys(seed: Tensor, count: int) -> Tensor:
    """Random whole numbers that depend on the seed alone: int32 `[count]` in [0, 2^29).

    A hash of (seed, position) instead of a generator's stream: the same image gets the same sample on every
    device, in every process and after every resumption, and no generator's state has to be kept.

    Args:
        seed: int64 scalar.
        count: how many.

    Source: the finaliser of splitmix64 (Steele et al. 2014).
    """
    value = seed + torch.arange(1, count + 1, device=seed.device) * -7046029254386353131  # 2^64 / golden ratio
    for shift, factor in ((30, -4658895280553007687), (27, -7723592293110705685)):
        value = (value ^ (value >> shift & (1 << 64 - shift) - 1)) * factor
    return (value >> 31 & (1 << _BITS) - 1).to(torch.int32)


def sample_balanced(
    positive: Tensor, negative: Tensor, seed: Tensor, *, count: int, positive_fraction: float
) -> tuple[Tensor, Tensor, Tensor]:
    """A random sample of `count` boxes with at most `positive_fraction` positives, filled up with negatives.

    Args:
        positive: bool `[A]`.
        negative: bool `[A]`, disjoint from `positive`; boxes that are neither are never taken.
        seed: int64 scalar that decides the sample.

    Returns:
        index int64 `[S]` with S = min(count, A), positives in the first slots; is_positive bool `[S]`;
        is_sampled bool `[S]`, false where there were too few boxes.
    """
    size = min(count, positive.shape[0])
    wanted = min(int(count * positive_fraction), size)
    random = random_keys(seed, positive.shape[0])
    never = torch.full_like(random, -1)
    key = torch.where(negative, random, never)
    chosen_key, chosen = torch.where(positive, random + (1 << _BITS), never).topk(wanted)
    key = key.scatter(0, chosen, torch.where(chosen_key >= 1 << _BITS, chosen_key, key[chosen]))
    key, index = key.topk(size)
    return index, key >= 1 << _BITS, key >= 0

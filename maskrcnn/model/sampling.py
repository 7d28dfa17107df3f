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


def sample_balanced(
    positive: Tensor, negative: Tensor, *, count: int, positive_fraction: float
) -> tuple[Tensor, Tensor, Tensor]:
    """A random sample of `count` boxes with at most `positive_fraction` positives, filled up with negatives.

    Args:
        positive: bool `[A]`.
        negative: bool `[A]`, disjoint from `positive`; boxes that are neither are never taken.

    Returns:
        index int64 `[S]` with S = min(count, A), positives in the first slots; is_positive bool `[S]`;
        is_sampled bool `[S]`, false where there were too few boxes.
    """
    size = min(count, positive.shape[0])
    wanted = min(int(count * positive_fraction), size)
    random = torch.rand(positive.shape, device=positive.device)
    key = torch.where(negative, random, torch.full_like(random, -1.0))
    chosen_key, chosen = torch.where(positive, random + 2.0, torch.full_like(random, -1.0)).topk(wanted)
    key = key.scatter(0, chosen, torch.where(chosen_key >= 2.0, chosen_key, key[chosen]))
    key, index = key.topk(size)
    return index, key >= 2.0, key >= 0.0

"""Matching of anchors and proposals to objects, and their sampling, on fixed shapes.

Nothing here depends on a value for its shape, so a training step never waits for the device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from maskrcnn.model.boxes import take_rows


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


# What the mask head is to predict: torchvision's targets from small crops instead of full-size masks.
#
# Torchvision pools each RoI from the object's mask at the size of the resized image: RoIAlign with `aligned=False`,
# one sample per pixel. A bin's value is there a mean over a grid of samples, each bilinear, so both steps separate into
# rows and columns: target = A_y · mask · A_xᵀ, where row b of A_y holds the weight of each pixel row in bin row b. The
# mask may then be a crop, as long as it holds every pixel of the object.

_MAX_SAMPLES = 8  # per bin and axis. A RoI of IoU ≥ 0.5 is at most twice its object's side: 2 · 112 / 28 crop pixels


def mask_targets(
    masks: Tensor,
    frames: Tensor,
    rois: Tensor,
    owner: Tensor,
    image_sizes: Tensor,
    size: int,
    *,
    aligned: bool = False,
) -> Tensor:
    """Each RoI's view of its object's mask, float32 `[N, P, size, size]` in [0, 1].

    Without `aligned` equal to `torchvision.models.detection.roi_heads.project_masks_on_boxes`, up to rounding for
    objects whose crop is at full resolution, and close to it for the larger ones.

    Args:
        masks: uint8 `[N, G, M, M]`, 0 or 255, a crop of each object's mask.
        frames: float32 `[N, G, 4]` xyxy, the region each crop covers, in pixels of the resized image.
        rois: float32 `[N, P, 4]` xyxy, likewise.
        owner: int64 `[N, P]`, each RoI's object.
        image_sizes: int64 `[N, 2]`, (height, width) of the resized images.
        size: bins per side.
        aligned: whether pixel centres lie at half-integers, where they are; torchvision's targets have them at
            integers, which moves masks by half a pixel to the right and down.
    """
    side = masks.shape[-1]
    own = take_rows(frames, owner)
    image = torch.arange(masks.shape[0], device=masks.device)[:, None]
    crops = masks[image, owner].to(rois.dtype)
    if aligned:
        rois = rois - 0.5  # below, pixel i lies at i
    rows, columns = (
        _axis_weights(
            rois[..., axis],
            rois[..., axis + 2],
            own[..., axis],
            own[..., axis + 2],
            image_sizes[:, 1 - axis],
            size,
            side,
        )
        for axis in (1, 0)
    )
    # Autocast would do these in half precision, and a target is no place to save time.
    with torch.autocast(masks.device.type, enabled=False):
        return rows @ crops @ columns.transpose(-1, -2) / 255


def _axis_weights(
    start: Tensor, end: Tensor, frame_start: Tensor, frame_end: Tensor, limit: Tensor, size: int, side: int
) -> Tensor:
    """The weight of each crop pixel in each bin along one axis, `[N, P, size, side]`.

    Args:
        start: `[N, P]`, and `end`, of the RoIs, in pixels of the image.
        frame_start: `[N, P]`, and `frame_end`, of the crop.
        limit: int64 `[N]`, pixels of the image along this axis.
        size: bins.
        side: pixels of the crop.
    """
    length = (end - start).clamp(min=1.0)  # RoIAlign's rule
    scale = (frame_end - frame_start).clamp(min=1.0) / side  # image pixels per crop pixel, 1 for small objects
    count = (length / scale / size).ceil().clamp(1, _MAX_SAMPLES)[..., None]
    bins = torch.arange(size, device=start.device)
    limit = limit[:, None, None].to(start.dtype)
    weights = start.new_zeros(*start.shape, size, side)
    bin_length = (length / size)[..., None]
    # One sample of every bin after the other, not all at once: within one, no pixel is written to twice except with
    # a zero, so the order in which a GPU adds does not show in the result.
    for sample in range(_MAX_SAMPLES):
        position = start[..., None] + bins * bin_length + (sample + 0.5) * bin_length / count  # pixel i lies at i
        counts = (sample < count) & (position >= -1) & (position <= limit)
        position = torch.minimum(position.clamp(min=0.0), limit - 1)
        position = (position - frame_start[..., None] + 0.5) / scale[..., None] - 0.5  # crop pixel k lies at k
        low = position.floor()
        fraction = position - low
        pixel = torch.stack([low, low + 1], dim=-1)
        weight = torch.stack([1 - fraction, fraction], dim=-1) / count[..., None]
        weight = weight * (counts[..., None] & (pixel >= 0) & (pixel < side))
        weights.scatter_add_(-1, pixel.clamp(0, side - 1).long(), weight)
    return weights

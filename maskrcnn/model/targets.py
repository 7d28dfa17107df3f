"""Training targets with fixed shapes: matching, sampling and mask targets.

No shape depends on a value, so a training step never synchronises with the device.

Mask targets equal torchvision's, which pool each RoI from the full-size mask by RoIAlign (`aligned=False`, one sample
per pixel). Bilinear sampling and averaging over a bin both separate into rows and columns: target = A_y · mask · A_xᵀ,
where row b of A_y contains the weight of each pixel row in bin row b. The mask can therefore be a crop that contains
every pixel of the object.
"""

from __future__ import annotations

import torch
from torch import Tensor

from maskrcnn.model.boxes import pairwise_iou, take_rows

_MAX_PAIRS = 1 << 22  # maximum boxes × objects whose IoU is computed at once: 16 MB per array


def match_anchors(
    boxes: Tensor,
    objects: Tensor,
    valid: Tensor,
    *,
    foreground: float,
    background: float,
    keep_best: bool = True,
    max_pairs: int = _MAX_PAIRS,
) -> tuple[Tensor, Tensor, Tensor]:
    """Match boxes to objects (Ren et al. 2015, section 3.1.2).

    Memory use does not depend on the product of A and G: overlaps are computed for portions of the boxes. With
    `keep_best` and several portions, they are computed twice.

    Args:
        boxes: `[A, 4]` anchors or proposals.
        objects: `[G, 4]`, of any value in padded rows.
        valid: bool `[G]`, false in padded rows.
        foreground: minimum IoU of a positive box.
        background: IoU below which a box is negative.
        keep_best: also make every box positive that is the best for an object, including ties.
        max_pairs: boxes × objects of a portion.

    Returns:
        index of the best object int64 `[A]`, positive bool `[A]`, negative bool `[A]`. Without objects every box is
        negative.
    """
    # Outputs are allocated before the temporaries: small tensors between them would fragment the heap.
    best, matched = boxes.new_empty(len(boxes)), valid.new_empty(len(boxes), dtype=torch.int64)
    is_best, best_of_object = valid.new_zeros(len(boxes)), torch.full_like(objects[:, 0], -1.0)
    size = max(1, max_pairs // max(len(objects), 1))
    parts = [slice(start, start + size) for start in range(0, len(boxes), size)]
    for part in parts:
        iou = _overlaps(boxes[part], objects, valid)
        best[part], matched[part] = iou.max(dim=1)
        if keep_best:
            torch.maximum(best_of_object, iou.max(dim=0).values, out=best_of_object)
    for part in parts if keep_best else ():
        if len(parts) > 1:
            iou = _overlaps(boxes[part], objects, valid)
        is_best[part] = ((iou == best_of_object) & valid & (best_of_object > 0)).any(dim=1)
    positive, negative = (best >= foreground) | is_best, best < background
    return matched, positive, negative & ~positive


def _overlaps(boxes: Tensor, objects: Tensor, valid: Tensor) -> Tensor:
    """IoU `[A, G]`, -1 in padded columns."""
    return pairwise_iou(boxes, objects).masked_fill_(~valid, -1.0)


_BITS = 29  # bits of a random key; positives also set the next bit, so that all keys fit an int32


def random_keys(seed: Tensor, count: int) -> Tensor:
    """Random integers that depend only on the seed: int32 `[count]` in [0, 2^29).

    A hash of (seed, position) instead of a random generator: an image gets the same sample on every device, in every
    process and after resuming, without storing a generator's state.

    Args:
        seed: int64 scalar.
        count: number of integers.

    Source: the finaliser of splitmix64 (Steele et al. 2014).
    """
    value = seed + torch.arange(1, count + 1, device=seed.device) * -7046029254386353131  # 2^64 / golden ratio
    for shift, factor in ((30, -4658895280553007687), (27, -7723592293110705685)):
        value = (value ^ (value >> shift & (1 << 64 - shift) - 1)) * factor
    return (value >> 31 & (1 << _BITS) - 1).to(torch.int32)


def sample_balanced(
    positive: Tensor, negative: Tensor, seed: Tensor, *, count: int, positive_fraction: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Sample `count` random boxes, at most `positive_fraction` of them positive, the rest negative.

    Args:
        positive: bool `[A]`.
        negative: bool `[A]`, disjoint from `positive`; boxes that are neither are never sampled.
        seed: int64 scalar that determines the sample.
        count: number of boxes.
        positive_fraction: maximum fraction of positives.

    Returns:
        index int64 `[S]` with S = min(count, A), positives first; is_positive bool `[S]`; is_sampled bool `[S]`, false
        in slots that remain unused for lack of boxes.
    """
    size = min(count, positive.shape[0])
    max_positives = min(int(count * positive_fraction), size)
    random = random_keys(seed, positive.shape[0])
    never = torch.full_like(random, -1)
    key = torch.where(negative, random, never)
    chosen_key, chosen = torch.where(positive, random + (1 << _BITS), never).topk(max_positives)
    key = key.scatter(0, chosen, torch.where(chosen_key >= 1 << _BITS, chosen_key, key[chosen]))
    key, index = key.topk(size)
    return index, key >= 1 << _BITS, key >= 0


_MAX_SAMPLES = 8  # per bin and axis: a RoI with IoU ≥ 0.5 is at most twice as long as its object, 2 · 112 / 28 pixels


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
    """Crop and resize each RoI's object mask: float32 `[N, P, size, size]` in [0, 1].

    With `aligned=False` equal to `torchvision.models.detection.roi_heads.project_masks_on_boxes`: up to rounding for
    objects whose crop is at full resolution, approximately for larger ones.

    Args:
        masks: uint8 `[N, G, M, M]`, 0 or 255, crop of each object's mask.
        frames: float32 `[N, G, 4]` xyxy, region of each crop in pixels of the resized image.
        rois: float32 `[N, P, 4]` xyxy in pixels of the resized image.
        owner: int64 `[N, P]`, index of each RoI's object.
        image_sizes: int64 `[N, 2]`, (height, width) of the resized images.
        size: bins per side.
        aligned: place pixel centres at half-integers; torchvision's targets place them at integers, which shifts masks
            by half a pixel to the right and down.
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
    # Targets are float32, also under autocast.
    with torch.autocast(masks.device.type, enabled=False):
        return rows @ crops @ columns.transpose(-1, -2) / 255


def _axis_weights(
    start: Tensor, end: Tensor, frame_start: Tensor, frame_end: Tensor, limit: Tensor, size: int, side: int
) -> Tensor:
    """Weight of each crop pixel in each bin along one axis, `[N, P, size, side]`.

    Args:
        start: `[N, P]` start of the RoIs in pixels of the image.
        end: `[N, P]` end of the RoIs.
        frame_start: `[N, P]` start of the crops.
        frame_end: `[N, P]` end of the crops.
        limit: int64 `[N]`, length of the image along this axis.
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
    # One sample of every bin at a time: within it, no pixel is written twice except with zero, so that the result does
    # not depend on the order of atomic additions on a GPU.
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

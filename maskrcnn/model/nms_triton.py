"""Batched NMS on a GPU without synchronisation, as two Triton kernels.

The first kernel writes one bit per box and later box: whether the first would suppress the second. The second kernel
traverses the boxes of a problem in order and keeps those not suppressed by a kept one. Both have fixed shapes, whereas
torchvision's kernel returns a tensor as long as the result, for which the host must wait.

Arguments and results as in `maskrcnn.model.ops.batched_nms`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_WORD = 32  # bits per word of the suppression matrix
_ROWS = 64  # boxes per program of the first kernel


@triton.jit
def _iou_is_above(x1, y1, x2, y2, u1, v1, u2, v2, threshold):
    """Whether the IoU exceeds the threshold, in torchvision's order of operations."""
    width = tl.maximum(tl.minimum(x2, u2) - tl.maximum(x1, u1), 0.0)
    height = tl.maximum(tl.minimum(y2, v2) - tl.maximum(y1, v1), 0.0)
    overlap = width * height
    union = (x2 - x1) * (y2 - y1) + (u2 - u1) * (v2 - v1) - overlap
    return tl.div_rn(overlap, tl.where(union > 0.0, union, 1.0)) > threshold  # empty boxes suppress nothing


@triton.jit
def _suppression_kernel(boxes, groups, counts, words, threshold, length, width, ROWS: tl.constexpr, WORD: tl.constexpr):
    """words[p, i, w], bit b: box i of problem p, if kept, suppresses box w · 32 + b."""
    problem, word = tl.program_id(0), tl.program_id(2)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    bit = tl.arange(0, WORD)
    column = word * WORD + bit
    count = tl.load(counts + problem)
    row_in, column_in = row < count, column < count
    corner, other = boxes + (problem * length + row) * 4, boxes + (problem * length + column) * 4
    above = _iou_is_above(
        tl.load(corner, row_in, 0.0)[:, None],
        tl.load(corner + 1, row_in, 0.0)[:, None],
        tl.load(corner + 2, row_in, 0.0)[:, None],
        tl.load(corner + 3, row_in, 0.0)[:, None],
        tl.load(other, column_in, 0.0)[None, :],
        tl.load(other + 1, column_in, 0.0)[None, :],
        tl.load(other + 2, column_in, 0.0)[None, :],
        tl.load(other + 3, column_in, 0.0)[None, :],
        threshold,
    )
    mine = tl.load(groups + problem * length + row, row_in, -1)
    theirs = tl.load(groups + problem * length + column, column_in, -2)
    suppressed = above & (mine[:, None] == theirs[None, :]) & (column[None, :] > row[:, None])
    packed = tl.sum(suppressed.to(tl.int32) << bit[None, :], axis=1)
    tl.store(words + (problem * length + row) * width + word, packed, row < length)


@triton.jit
def _sweep_kernel(words, counts, indices, kept_counts, length, width, limit, WIDTH: tl.constexpr, WORD: tl.constexpr):
    """Greedy selection in order of score; one program per problem."""
    problem = tl.program_id(0)
    count = tl.load(counts + problem)
    place = tl.arange(0, WIDTH)
    removed = tl.zeros([WIDTH], tl.int32)
    kept = 0
    box = 0
    while (box < count) & (kept < limit):
        word = tl.sum(tl.where(place == box // WORD, removed, 0), axis=0)
        alive = 1 - ((word >> (box % WORD)) & 1)
        line = tl.load(words + (problem * length + box) * width + place, place < width * alive, 0)
        removed = removed | line
        tl.store(indices + problem * limit + kept, box, alive != 0)
        kept += alive
        box += 1
    tl.store(kept_counts + problem, kept)


def batched_nms_triton(
    boxes: Tensor, groups: Tensor, counts: Tensor, iou_threshold: float, max_output: int
) -> tuple[Tensor, Tensor]:
    """`batched_nms` for tensors on a GPU: indices and their count, both int32."""
    problems, length = boxes.shape[:2]
    indices = torch.zeros(problems, max_output, dtype=torch.int32, device=boxes.device)
    kept_counts = torch.zeros(problems, dtype=torch.int32, device=boxes.device)
    if problems == 0 or length == 0:
        return indices, kept_counts
    width = triton.cdiv(length, _WORD)
    words = torch.empty(problems, length, width, dtype=torch.int32, device=boxes.device)
    boxes, groups, counts = boxes.float().contiguous(), groups.contiguous(), counts.contiguous()
    with torch.cuda.device_of(boxes):  # Triton launches on the current device, not on that of the tensors
        _suppression_kernel[(problems, triton.cdiv(length, _ROWS), width)](
            boxes,
            groups,
            counts,
            words,
            iou_threshold,
            length,
            width,
            ROWS=_ROWS,
            WORD=_WORD,
            enable_fp_fusion=False,  # same rounding as on a CPU
        )
        # One warp: the traversal is sequential, and a reduction within a warp needs no barrier.
        _sweep_kernel[(problems,)](
            words,
            counts,
            indices,
            kept_counts,
            length,
            width,
            max_output,
            WIDTH=max(triton.next_power_of_2(width), 32),
            WORD=_WORD,
            num_warps=1,
        )
    return indices, kept_counts

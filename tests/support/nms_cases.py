"""Hypothesis strategies for BatchedNms, and the expected results."""

from __future__ import annotations

from dataclasses import dataclass

import kernel_calls
import numpy as np
import torch
import torchvision
from hypothesis import strategies as st
from kernel_calls import Device

PATTERNS = ("scattered", "crowded", "equal", "chain", "apart", "snapped", "snapped", "degenerate", "wild")
THRESHOLDS = (0.0, 0.3, 1 / 3, 0.5, 0.5, 0.6, 0.7, 1.0, 1.5, -0.5)
INTS = (-(2**31), -7, -1, 0, 1, 31, 32, 90, 2**31 - 1)


@dataclass(frozen=True, repr=False)
class NmsCase:
    """One call."""

    boxes: np.ndarray  # [N, K, 4] float32
    groups: np.ndarray  # [N, K] int32
    counts: np.ndarray  # [N] int32
    iou_threshold: float
    max_output: int

    def __repr__(self) -> str:
        n, k = self.groups.shape
        arrays = f"boxes {self.boxes.tolist()}, groups {self.groups.tolist()}" if n * k < 20 else f"{n} x {k} boxes"
        return f"NmsCase({arrays}, counts {self.counts.tolist()}, {self.iou_threshold}, {self.max_output})"

    def kept(self, device: Device) -> tuple[np.ndarray, np.ndarray]:
        """Runs the kernels; returns indices `[N, M]` and num `[N]`."""
        return kernel_calls.nms(
            device,
            self.boxes,
            self.groups,
            self.counts,
            iou_threshold=self.iou_threshold,
            max_output=self.max_output,
        )


def by_torchvision(case: NmsCase) -> tuple[np.ndarray, np.ndarray]:
    """The expected result from torchvision's operator, group by group."""
    indices, num = np.zeros((len(case.counts), case.max_output), np.int32), np.zeros(len(case.counts), np.int32)
    for image, count in enumerate(case.counts.clip(0, case.groups.shape[1])):
        kept = []
        for group in np.unique(case.groups[image, :count]):
            members = np.flatnonzero(case.groups[image, :count] == group)
            boxes = torch.from_numpy(case.boxes[image, members])
            # torchvision uses a double-precision threshold, the contract float32.
            order, limit = torch.arange(len(members), 0, -1.0), float(np.float32(case.iou_threshold))
            kept += members[torchvision.ops.nms(boxes, order, limit).numpy()].tolist()
        rows = sorted(kept)[: case.max_output]
        indices[image, : len(rows)], num[image] = rows, len(rows)
    return indices, num


def check(case: NmsCase, found: tuple[np.ndarray, np.ndarray]) -> None:
    """Asserts that a result equals torchvision's, padded with zeros."""
    for name, mine, theirs in zip(("num", "indices"), found[::-1], by_torchvision(case)[::-1], strict=True):
        np.testing.assert_array_equal(mine, theirs, err_msg=name)


def boxes_of(rng: np.random.Generator, pattern: str, count: int) -> np.ndarray:
    """Boxes float32 `[count, 4]` that overlap in a given pattern."""
    corners, sides = rng.uniform(0, 100, (count, 2)), rng.uniform(5, 60, (count, 2))
    if pattern == "crowded":
        corners, sides = rng.uniform(0, 3, (count, 2)), 30 + rng.uniform(0, 3, (count, 2))
    elif pattern == "equal":
        corners, sides = np.full((count, 2), 7.0), np.full((count, 2), 9.0)
    elif pattern == "chain":  # each overlaps the next by more than half and the one after by less
        corners, sides = np.stack([np.arange(count) * 2.5, np.zeros(count)], axis=1), np.full((count, 2), 10.0)
    elif pattern == "apart":
        corners, sides = np.stack([np.arange(count) * 9.0, np.zeros(count)], axis=1), np.full((count, 2), 8.0)
    elif pattern == "snapped":  # IoUs are ratios of small integers, some equal to a threshold
        corners, sides = np.floor(corners / 12), rng.integers(1, 5, (count, 2))
    elif pattern == "degenerate":
        sides = sides * rng.choice([-1, 0, 1, 1, 1e-30], (count, 2))
    boxes = np.concatenate([corners, corners + sides], axis=1).astype(np.float32)
    if pattern == "wild":
        strange = np.float32([np.nan, np.inf, -np.inf, 3e38, -3e38, 1e-45])
        boxes = np.where(rng.random(boxes.shape) < 0.1, rng.choice(strange, boxes.shape), boxes)
    return boxes if pattern == "chain" and rng.random() < 0.5 else boxes[rng.permutation(count)]


@st.composite
def nms_cases(draw: st.DrawFn, max_boxes: int = 700) -> NmsCase:
    """Draws boxes, groups, counts and attributes of every kind."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    edges = [k for k in (0, 1, 31, 63, 64, 65, 127, 128, 129, 255, 256, 257, 300, 700) if k <= max_boxes]
    batch, num_boxes = draw(st.sampled_from([0, 1, 1, 2, 3])), draw(st.sampled_from(edges) | st.integers(0, max_boxes))
    boxes = [boxes_of(rng, draw(st.sampled_from(PATTERNS)), num_boxes) for _ in range(batch)]
    ids = draw(st.sampled_from(["one", "few", "many", "any", "blocks"]))
    shape = (batch, num_boxes)
    groups = {
        "one": np.full(shape, 3),
        "few": rng.integers(0, 4, shape),
        "many": rng.integers(-50, 50, shape),
        "any": rng.choice(INTS, shape),
        "blocks": np.broadcast_to(np.arange(num_boxes) // 64, shape),  # sorted, like pyramid levels
    }[ids].astype(np.int32)
    counts = [draw(st.sampled_from([num_boxes, num_boxes, 0, -3, num_boxes + 9]) | st.integers(0, num_boxes))] * batch
    if batch > 1:
        counts[1] = draw(st.integers(0, num_boxes))
    return NmsCase(
        np.array(boxes, np.float32).reshape(*shape, 4),
        groups,
        np.array(counts, np.int32),
        draw(st.sampled_from(THRESHOLDS)),
        draw(st.sampled_from([num_boxes, num_boxes, num_boxes + 5, 0, 1]) | st.integers(0, 100)),
    )

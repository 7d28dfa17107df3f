"""Hypothesis strategies for mask pasting, and the expected results."""

from __future__ import annotations

from dataclasses import dataclass

import kernel_calls
import numpy as np
from hypothesis import strategies as st
from kernel_calls import Device

from maskrcnn.imaging.postprocess import paste_mask

PROBABILITY = 1e-5  # tolerance between implementations
KINDS_OF_BOX = (
    "inside",
    "inside",
    "across",
    "around",
    "outside",
    "pixel",
    "thin",
    "empty",
    "inverted",
    "exact",
    "vast",
)


@dataclass(frozen=True, repr=False)
class PasteCase:
    """One call."""

    masks: np.ndarray  # [D, S, S] float32 or float16
    boxes: np.ndarray  # [D, 4] float32
    size_hw: tuple[int, int]
    threshold: float
    by_columns: bool

    def __repr__(self) -> str:
        masks = f"{self.masks.dtype.name}{list(self.masks.shape)}"
        return f"PasteCase({masks}, {self.boxes.tolist()}, {self.size_hw}, {self.threshold}, {self.by_columns})"

    def pixels(self, device: Device) -> np.ndarray:
        """Runs the kernel; returns bool `[D, H, W]`."""
        found = kernel_calls.paste(
            device, self.masks, self.boxes, self.size_hw, self.threshold, by_columns=self.by_columns
        )
        return found.swapaxes(1, 2) if self.by_columns else found

    def probabilities(self) -> np.ndarray:
        """Probabilities before the threshold, float32 `[D, H, W]`; -inf outside the boxes."""
        full = np.full((len(self.masks), *self.size_hw), -np.inf, np.float32)
        for slot, mask, box in zip(full, self.masks, self.boxes, strict=True):
            window, top, left = paste_mask(mask.astype(np.float32), box, self.size_hw)
            slot[top : top + window.shape[0], left : left + window.shape[1]] = window
        return full


def check(case: PasteCase, pixels: np.ndarray, probabilities: np.ndarray | None = None) -> None:
    """Asserts that all pixels are correct, except where the probability equals the threshold within the tolerance."""
    probabilities = case.probabilities() if probabilities is None else probabilities
    is_near = np.abs(probabilities - np.float32(case.threshold)) < PROBABILITY
    np.testing.assert_array_equal(pixels & ~is_near, (probabilities > np.float32(case.threshold)) & ~is_near)
    assert is_near.sum() <= 5 + probabilities.size / 1000


def boxes_of(rng: np.random.Generator, kinds: list[str], size_hw: tuple[int, int]) -> np.ndarray:
    """One box `[len(kinds), 4]` of each kind."""
    return np.array([_box(rng, kind, np.array(size_hw[::-1])) for kind in kinds], np.float32).reshape(-1, 4)


def _box(rng: np.random.Generator, kind: str, extent: np.ndarray) -> np.ndarray:
    side = rng.uniform(0, 1, 2) * extent
    corner = rng.uniform(0, 1, 2) * (extent - side)
    if kind == "across":
        corner = corner + rng.choice([-1, 1], 2) * rng.uniform(0, 1, 2) * extent
    elif kind == "around":
        corner, side = -rng.uniform(0, 3, 2) * extent, rng.uniform(3, 9, 2) * extent
    elif kind == "outside":
        corner = corner + rng.permutation([rng.choice([-3, 3]), 0]) * (extent + 2)
    elif kind == "pixel":
        corner, side = np.floor(corner), np.ones(2)
    elif kind == "thin":
        side = side * rng.permutation([1, 0.001])
    elif kind == "empty":
        side = side * rng.choice([0, 1], 2)
    elif kind == "inverted":
        corner, side = corner + side, -side
    elif kind == "exact":
        corner, side = np.zeros(2), extent.astype(float)
    elif kind == "vast":
        corner, side = -rng.uniform(0, 1e6, 2), 10.0 ** rng.uniform(3, 6.5, 2)
    return np.concatenate([corner, corner + side])


@st.composite
def paste_cases(draw: st.DrawFn) -> PasteCase:
    """Every size of masks and images, every kind of box, with random probabilities."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    side = st.sampled_from([1, 2, 31, 32, 33, 63, 64, 65]) | st.integers(1, 150)
    size_hw = (draw(side), draw(side))
    mask_size, count = draw(st.sampled_from([1, 2, 7, 14, 28, 28, 29, 30, 31, 32, 60])), draw(st.integers(0, 4))
    masks = rng.random((count, mask_size, mask_size), np.float32).astype(draw(st.sampled_from(["float32", "float16"])))
    boxes = boxes_of(rng, list(rng.choice(KINDS_OF_BOX, count)), size_hw)
    return PasteCase(masks, boxes, size_hw, draw(st.sampled_from([0.5, 0.5, 0.05, 0.37, 0.9])), draw(st.booleans()))

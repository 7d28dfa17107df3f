"""Hypothesis strategies for MultilevelRoiAlign, and a check of results."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import kernel_calls
import numpy as np
import pooling_truth
from hypothesis import strategies as st
from kernel_calls import Device
from kernels_on_cpu import bfloat16, single

HALF_STEP = {"float32": 0.0, "float16": 2.0**-11, "bfloat16": 2.0**-8}  # relative rounding error of a result
SMALLEST = {"float32": 0.0, "float16": 2.0**-25, "bfloat16": 0.0}  # absolute rounding error
KINDS_OF_BOX = ("inside", "inside", "wide", "across", "outside", "pixel", "thin", "empty", "inverted", "far", "snapped")


@dataclass(frozen=True, repr=False)
class RoiCase:
    """One call."""

    features: list[np.ndarray]  # [N, C, H_l, W_l] float32, float16, or bfloat16 of kernels_on_cpu
    rois: np.ndarray  # [N, R, 4] float32
    attributes: dict[str, Any]
    form: dict[str, Any] = field(default_factory=dict)  # layout, pitch, float32_output, shift

    def __repr__(self) -> str:
        maps = ", ".join(f"{kernel_calls.name_of(f)}{list(f.shape)}" for f in self.features)
        return f"RoiCase({maps}, {self.rois.tolist()}, {self.attributes}, {self.form})"

    def pooled(self, device: Device) -> np.ndarray:
        """Runs the kernel."""
        return kernel_calls.roi_align(device, self.features, self.rois, **self.form, **self.attributes)

    @property
    def output_dtype(self) -> str:
        """Type of the result."""
        return "float32" if self.form.get("float32_output") else kernel_calls.name_of(self.features[0])


def as_dtype(values: np.ndarray, dtype: str) -> np.ndarray:
    """Converts float32 to a feature type."""
    return bfloat16(values).reshape(values.shape) if dtype == "bfloat16" else values.astype(dtype)


def check(case: RoiCase, pooled: np.ndarray) -> int:
    """Asserts that a result is correct up to rounding; returns the number of RoIs for which this is certain."""
    truth = pooling_truth.multilevel_roi_align([single(f) for f in case.features], case.rois, **case.attributes)
    assert pooled.shape == truth.pooled.shape and pooled.dtype == np.float32
    half_step = HALF_STEP[case.output_dtype]
    allowed = truth.tolerance[..., None, None, None] + half_step * np.abs(truth.pooled) * 1.01
    beyond = np.abs(pooled - truth.pooled) - allowed - SMALLEST[case.output_dtype]
    assert not (beyond[truth.is_sure] > 0).any(), f"wrong by {beyond[truth.is_sure].max()} more than roundings explain"
    assert np.isfinite(pooled).all()
    return int(truth.is_sure.sum())


def boxes(rng: np.random.Generator, kinds: list[str], extent_wh: tuple[float, float], stride: float) -> np.ndarray:
    """One box of each kind, `[len(kinds), 4]`, for an image of the given size in pixels."""
    return np.array([_box(rng, kind, np.array(extent_wh), stride) for kind in kinds], np.float32).reshape(-1, 4)


def _box(rng: np.random.Generator, kind: str, extent: np.ndarray, stride: float) -> np.ndarray:
    corner, side = rng.uniform(0, 1, 2) * extent, rng.uniform(0.05, 1, 2) * extent
    if kind == "inside":
        corner = rng.uniform(0, 1, 2) * (extent - side)
    elif kind == "wide":  # much larger than the image
        corner, side = -rng.uniform(0, 4, 2) * extent, rng.uniform(1, 9, 2) * extent
    elif kind == "across":  # across a border
        corner = rng.choice([-0.5, 0.5], 2) * extent
    elif kind == "outside":
        corner = np.where(
            rng.permutation([True, rng.random() < 0.5]), rng.choice([-1, 1]) * (extent + side + 2 * stride), corner
        )
    elif kind == "pixel":
        corner, side = np.floor(corner), np.ones(2)
    elif kind == "thin":
        side = side * rng.permutation([1, 1e-4])
    elif kind == "empty":
        side = side * rng.choice([0, 1], 2)
    elif kind == "inverted":
        side = -side * rng.choice([-1, 1], 2)
    elif kind == "far":
        corner = corner + rng.choice([-1, 1]) * 10.0 ** rng.uniform(2, 5)
    elif kind == "snapped":
        corner, side = np.round(corner / stride) * stride, np.round(side / stride) * stride
    return np.concatenate([corner, corner + side])


@st.composite
def roi_cases(
    draw: st.DrawFn, dtypes: tuple[str, ...] = ("float32", "float16", "bfloat16"), *, largest: int = 28, least: int = 0
) -> RoiCase:
    """Draws maps, types, layouts and attributes of every kind, with few RoIs.

    Args:
        draw: draw function of the strategy.
        dtypes: types of the features.
        largest: greatest output size.
        least: smallest number of images, RoIs and channels.
    """
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    size = draw(st.sampled_from([size for size in (1, 2, 3, 7, 8, 9, 14, 28) if size <= largest]))
    channels = draw(st.sampled_from([count for count in (0, 1, 3, 4, 5, 33, 64, 65, 128, 130, 264) if count >= least]))
    batch, num_rois = draw(st.integers(least, 3)), draw(st.integers(least, 5))
    while batch * num_rois * (channels + 32) * size * size > 40_000 and num_rois > 1:  # limits the run time
        num_rois -= 1
    levels, min_level = draw(st.integers(1, 6)), draw(st.sampled_from([0, 2, 2, 3]))
    first_hw = draw(st.tuples(st.integers(1, 40), st.integers(1, 40)))
    dtype = draw(st.sampled_from(dtypes))
    shapes = [(batch, channels, *(-(-side >> level) for side in first_hw)) for level in range(levels)]
    shapes = [(*s[:2], max(s[2], 1), max(s[3], 1)) for s in shapes]
    features = [as_dtype(rng.standard_normal(s).astype(np.float32), dtype) for s in shapes]
    stride = 2.0**min_level
    extent = (first_hw[1] * stride, first_hw[0] * stride)
    rois = boxes(rng, list(rng.choice(KINDS_OF_BOX, batch * num_rois)), extent, stride).reshape(batch, num_rois, 4)
    attributes = {
        "output_size": size,
        "sampling_ratio": draw(st.sampled_from([0, 1, 2, 2, 3, 4])),
        "aligned": draw(st.booleans()),
        "min_level": min_level,
        # Small canonical sizes give small maps boxes of every level.
        "canonical_size": draw(st.sampled_from([224.0, 56.0, 30.0])),
        "canonical_level": draw(st.sampled_from([4, 4, 3])),
    }
    return RoiCase(features, rois, attributes, draw(forms(channels)))


@st.composite
def forms(draw: st.DrawFn, channels: int) -> dict[str, Any]:
    """Draws the memory layout of features and the type of the result."""
    form = {"layout": draw(st.sampled_from(["NCHW", "NHWC"])), "float32_output": draw(st.booleans())}
    if form["layout"] == "NHWC":
        to_four, to_eight = -channels % 4, -channels % 8
        form["pitch"] = channels + draw(st.sampled_from([0, to_four, to_eight, to_four + 4, 1, 3]))
    return form | {"shift": draw(st.sampled_from([0, 0, 0, 1, 2]))}

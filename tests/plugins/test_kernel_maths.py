"""Arithmetic functions of the kernels, which are the same code on GPU and CPU, against independent implementations."""

import math

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from kernel_maths import AXIS_CASE
from torchvision.models.detection.roi_heads import expand_boxes

FPN = {"num_levels": 4, "min_level": 2, "canonical_level": 4, "canonical_size": 224.0, "epsilon": 1e-6}
SINGLE = st.floats(width=32)  # including infinite, subnormal and NaN


def random_singles(count: int, seed: int) -> np.ndarray:
    """float32 of random bits: every magnitude, infinities and NaN."""
    return np.random.default_rng(seed).integers(0, 2**32, count, dtype=np.uint32).view(np.float32)


def just(value: float, steps: int) -> np.float32:
    """The float32 `steps` representable values away from a value."""
    for _ in range(abs(steps)):
        value = np.nextafter(np.float32(value), np.float32(math.copysign(math.inf, steps)))
    return np.float32(value)


def test_every_half_converts_exactly_to_single(maths):
    bits = np.arange(65536, dtype=np.uint16)
    with np.errstate(invalid="ignore"):
        wanted = bits.view(np.float16).astype(np.float32)
    found = maths.singles_from_halves(bits)
    is_number = ~np.isnan(wanted)
    assert is_number.sum() == 65536 - 2 * 1023
    np.testing.assert_array_equal(found.view(np.uint32)[is_number], wanted.view(np.uint32)[is_number])
    assert np.isnan(found[~is_number]).all()


@pytest.mark.parametrize(
    ("value", "bits"),
    [
        (0.0, 0x0000),
        (-0.0, 0x8000),
        (1.0, 0x3C00),
        (-2.0, 0xC000),
        (1 + 2**-11, 0x3C00),  # a tie goes to the even neighbour, downwards
        (1 + 3 * 2**-11, 0x3C02),  # and upwards
        (just(1 + 2**-11, 1), 0x3C01),
        (just(1 + 3 * 2**-11, -1), 0x3C01),
        (65504.0, 0x7BFF),  # the largest
        (just(65520.0, -1), 0x7BFF),
        (65520.0, 0x7C00),  # half a step more: a tie, and infinity is even
        (65536.0, 0x7C00),
        (3.4e38, 0x7C00),
        (-math.inf, 0xFC00),
        (2.0**-14, 0x0400),  # the smallest normal one
        (just(2.0**-14, -1), 0x0400),
        (2.0**-24, 0x0001),  # the smallest of all
        (1.5 * 2.0**-24, 0x0002),
        (2.5 * 2.0**-24, 0x0002),
        (2.0**-25, 0x0000),  # a tie with zero
        (just(2.0**-25, 1), 0x0001),
        (-(2.0**-25), 0x8000),
        (1e-45, 0x0000),
    ],
)
def test_a_single_rounds_to_the_nearest_half(maths, value, bits):
    assert maths.halves_from_singles(np.float32([value])).tolist() == [bits]


def test_random_singles_round_to_halves_as_in_numpy(maths):
    values = np.concatenate(
        [random_singles(1_000_000, 1), np.random.default_rng(2).normal(0, 30000, 10**6).astype(np.float32)]
    )
    with np.errstate(over="ignore", invalid="ignore"):
        wanted = values.astype(np.float16)
    found, is_number = maths.halves_from_singles(values), ~np.isnan(wanted)
    np.testing.assert_array_equal(found[is_number], wanted.view(np.uint16)[is_number])
    assert np.isnan(found.view(np.float16)[~is_number]).all() and not is_number.all()


def test_random_singles_round_to_bfloat16_as_in_torch_and_back(maths):
    ties = (np.arange(65536, dtype=np.uint32) << 16 | 0x8000).view(np.float32)
    values = np.concatenate([random_singles(1_000_000, 3), ties])
    wanted = torch.from_numpy(values).bfloat16()
    found, is_number = maths.bfloat16s_from_singles(values), ~np.isnan(values)
    np.testing.assert_array_equal(found[is_number], wanted.view(torch.int16).numpy().view(np.uint16)[is_number])
    back = maths.singles_from_bfloat16s(found)
    np.testing.assert_array_equal(back[is_number], wanted.float().numpy()[is_number])
    assert np.isnan(back[~is_number]).all() and not is_number.all()


@pytest.mark.parametrize(
    ("side", "level"),
    [
        (1.0, 0),
        (just(56, -1), 0),
        (56.0, 0),  # lower limit of the first level
        (just(112, -1), 1),  # slightly smaller, compensated by the epsilon of 1e-6
        (112 * (1 - 4e-7), 1),
        (112 * (1 - 2e-6), 0),
        (112.0, 1),
        (just(112, 1), 1),
        (224 * (1 - 2e-6), 1),
        (just(224, -1), 2),
        (224.0, 2),
        (just(224, 1), 2),
        (448 * (1 - 2e-6), 2),
        (448.0, 3),
        (896.0, 3),  # above the last level
        (1e18, 3),
        (1e25, 3),  # an infinite area
        (math.inf, 3),
        (1e-20, 0),  # subnormal area
        (1e-30, 0),  # area 0
        (0.0, 0),
        (math.nan, 0),
    ],
)
def test_the_level_of_a_square_box(maths, side, level):
    assert maths.levels(np.array([[side, side]]), **FPN).tolist() == [level]


@pytest.mark.parametrize("sides", [(0, 9), (9, 0), (-5, 9), (9, -5), (math.nan, 9), (9, math.nan), (0, math.inf)])
def test_a_box_without_area_belongs_to_the_first_level(maths, sides):
    assert maths.levels(np.array([sides]), **FPN).tolist() == [0]


def test_two_negative_sides_have_a_positive_area(maths):
    assert maths.levels(np.array([[-224.0, -224.0]]), **FPN).tolist() == [2]  # as in torchvision


@pytest.mark.parametrize(
    ("position", "size", "tap"),
    [
        (0.0, 5, (0, 1, 1.0, 0.0)),
        (0.25, 5, (0, 1, 0.75, 0.25)),
        (1.0, 5, (1, 2, 1.0, 0.0)),
        (3.5, 5, (3, 4, 0.5, 0.5)),
        (4.0, 5, (4, 4, 1.0, 0.0)),  # the last pixel's centre
        (4.75, 5, (4, 4, 1.0, 0.0)),  # up to one pixel beyond it
        (5.0, 5, (4, 4, 1.0, 0.0)),
        (just(5.0, 1), 5, (0, 0, 0.0, 0.0)),
        (-0.5, 5, (0, 1, 1.0, 0.0)),
        (-1.0, 5, (0, 1, 1.0, 0.0)),
        (just(-1.0, -1), 5, (0, 0, 0.0, 0.0)),
        (-1.0, 1, (0, 0, 1.0, 0.0)),  # a map of one pixel
        (0.5, 1, (0, 0, 1.0, 0.0)),
        (1.0, 1, (0, 0, 1.0, 0.0)),
        (just(1.0, 1), 1, (0, 0, 0.0, 0.0)),
        (just(1.0, -1), 2, (0, 1, 2.0**-24, 1 - 2.0**-24)),
        (math.nan, 5, (0, 0, 0.0, 0.0)),
        (math.inf, 5, (0, 0, 0.0, 0.0)),
        (-math.inf, 5, (0, 0, 0.0, 0.0)),
    ],
)
def test_taps_by_hand(maths, position, size, tap):
    assert maths.taps(np.array([position]), np.array([size])).tolist() == [tap]


def axis_case(low, high, *, stride=4, size=20, bins=7, ratio=0, aligned=False) -> np.ndarray:
    return np.array((low, high, 1 / stride, size, bins, ratio, aligned), AXIS_CASE)


@pytest.mark.parametrize(
    ("case", "axis"),
    [
        (axis_case(8, 64, aligned=False), (2.0, 2.0, 2, 20)),
        (axis_case(8, 64, aligned=True), (1.5, 2.0, 2, 20)),
        (axis_case(8, 64.5, bins=1), (2.0, 14.125, 15, 20)),  # one sample per pixel, rounded up
        (axis_case(8, 64, ratio=3), (2.0, 2.0, 3, 20)),
        (axis_case(8, 10, bins=2, aligned=False), (2.0, 0.5, 1, 20)),  # widened to one pixel
        (axis_case(8, 10, bins=2, aligned=True), (1.5, 0.25, 1, 20)),
        (axis_case(8, 8, bins=2, aligned=True), (1.5, 0.0, 0, 20)),  # empty: no samples
        (axis_case(16, 8, bins=2, aligned=True), (3.5, -1.0, 0, 20)),
        (axis_case(16, 8, bins=2, aligned=True, ratio=2), (3.5, -1.0, 2, 20)),
        (axis_case(16, 8, bins=2, aligned=False), (4.0, 0.5, 1, 20)),
        (axis_case(0, 4e9, bins=1, aligned=True), (-0.5, 1e9, 1 << 24, 20)),
    ],
)
def test_axes_by_hand(maths, case, axis):
    assert maths.axes(case[None]).tolist() == [axis]


@pytest.mark.parametrize("ends", [(0, math.inf), (-math.inf, 5), (0, math.nan), (math.nan, 5), (-3.3e38, 3.3e38)])
@pytest.mark.parametrize("aligned", [False, True])
def test_an_axis_that_is_not_finite_has_no_samples_if_adaptive(maths, ends, aligned):
    assert maths.axes(axis_case(*ends, stride=1, aligned=aligned)[None])["samples"] == [0]


COORDINATE = st.floats(-300, 300, width=32) | st.floats(-1e6, 1e6, width=32) | SINGLE
NEAR_EDGE = st.sampled_from([-4.0, 0.0, 4.0, 80.0]).flatmap(  # positions close to -1, 0 or the map's size
    lambda edge: st.floats(-(2.0**-13), 2.0**-13, width=32).map(lambda by: np.float32(edge) + np.float32(by))
)


@settings(max_examples=300, deadline=None)
@given(
    ends=st.tuples(COORDINATE | NEAR_EDGE, COORDINATE | NEAR_EDGE),
    stride=st.sampled_from([1, 4, 32, 64]),
    size=st.sampled_from([1, 2, 20, 333, 2000]),
    bins=st.sampled_from([1, 2, 7, 14, 28]),
    ratio=st.sampled_from([0, 0, 0, 1, 2, 3, 10]),
    aligned=st.booleans(),
)
@example(ends=(-1e30, 1e30), stride=4, size=20, bins=7, ratio=0, aligned=False)
@example(ends=(0, math.inf), stride=4, size=20, bins=7, ratio=0, aligned=False)
@example(ends=(-4.0000005, -4.0), stride=4, size=20, bins=7, ratio=3, aligned=False)
@example(ends=(-2.0000005, -2.0), stride=4, size=20, bins=7, ratio=3, aligned=True)
@example(ends=(-4e7, 4e7), stride=1, size=20, bins=1, ratio=0, aligned=False)
@example(ends=(-1e9, 4e7), stride=1, size=2000, bins=28, ratio=0, aligned=False)
def test_the_range_of_samples_contains_all_inside_the_map_and_few_others(
    maths, ends, stride, size, bins, ratio, aligned
):
    case = axis_case(*ends, stride=stride, size=size, bins=bins, ratio=ratio, aligned=aligned)
    given, lost = maths.ranges(case)
    assert not lost.any()
    # At most a sample per pixel of the map and its surroundings, not per pixel of the box.
    limit = max(ratio, 1) if ratio else 2 * (size + 2) + 64 * (bins + 1) + 10
    assert given.max() <= limit
    assert (given <= maths.axes(case[None])["samples"][0]).all()


def plain_overlap(a: np.ndarray, b: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
    """Intersection over union in float32, step by step."""
    with np.errstate(all="ignore"):
        sides = np.minimum(a[:, 2:], b[:, 2:]) - np.maximum(a[:, :2], b[:, :2])
        both = np.fmax(sides, np.float32(0)).prod(axis=1)
        area_a, area_b = (a[:, 2:] - a[:, :2]).prod(axis=1), (b[:, 2:] - b[:, :2]).prod(axis=1)
        return both / (area_a + area_b - both) > thresholds


def test_overlaps_of_random_bits_equal_a_division(maths):
    a, b = random_singles(4_000_000, 4).reshape(2, -1, 4)
    thresholds = np.random.default_rng(5).choice(np.float32([0, 0.3, 0.5, 0.7, 1, 1.5, -0.5, np.nan]), len(a))
    np.testing.assert_array_equal(maths.overlap(a, b, thresholds), plain_overlap(a, b, thresholds))


def test_overlaps_of_boxes_of_every_magnitude_equal_a_division(maths):
    rng = np.random.default_rng(6)
    corners = rng.uniform(0, 1, (2, 300_000, 2))
    boxes = np.concatenate([corners, corners + rng.uniform(0, 1, corners.shape)], axis=-1)
    boxes *= 2.0 ** rng.integers(-80, 70, (300_000, 1))  # areas from underflow to overflow
    (a, b), thresholds = boxes.astype(np.float32), rng.uniform(0, 1, 300_000).astype(np.float32)
    wanted = plain_overlap(a, b, thresholds)
    np.testing.assert_array_equal(maths.overlap(a, b, thresholds), wanted)
    assert 0.05 < wanted.mean() < 0.95


@pytest.mark.parametrize("mask_size", [1, 2, 7, 14, 28, 30, 31, 60])
def test_spans_equal_torchvision(maths, mask_size):
    rng = np.random.default_rng(mask_size)
    lows = rng.uniform(-500, 1500, 20000).astype(np.float32)
    highs = (lows + np.where(rng.random(20000) < 0.1, 0, rng.uniform(-20, 900, 20000))).astype(np.float32)
    boxes = torch.from_numpy(np.stack([lows, highs, lows, highs], axis=1))[:, [0, 0, 1, 1]]
    wanted = expand_boxes(boxes, float(mask_size + 2) / mask_size).to(torch.int64)[:, [0, 2]]
    found = maths.spans(lows, highs, mask_size)
    np.testing.assert_array_equal(np.stack([found["first"], found["last"]], axis=1), wanted.numpy())


@pytest.mark.parametrize(
    "ends", [(math.nan, 5), (5, math.nan), (0, math.inf), (-math.inf, 0), (-3e38, 3e38), (0, 4e9), (-4e9, 0)]
)
def test_a_span_that_exceeds_integers_is_empty(maths, ends):
    (found,) = maths.spans(*np.float32(ends)[:, None].copy(), 28)
    assert found["last"] < found["first"]

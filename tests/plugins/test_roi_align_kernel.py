"""The RoIAlign kernels against values by hand, double precision and the reference, in every layout, type and shape.

The fixture `device` is the kernels on the CPU, and on a GPU if there is one.
"""

import math

import numpy as np
import pooling_truth
import pytest
from hypothesis import assume, event, example, given, settings
from hypothesis import strategies as st
from kernel_calls import roi_align
from kernels_on_cpu import ORDERS, single, thread_order
from roi_align_cases import HALF_STEP, RoiCase, as_dtype, boxes, check, roi_cases

from maskrcnn.plugins import reference
from maskrcnn.plugins.native import MAX_LEVELS, Pyramid

FORMS = (
    {"layout": "NCHW"},
    {"layout": "NHWC"},
    {"layout": "NHWC", "pitch": 3},
    {"layout": "NHWC", "pitch": 8},
    {"layout": "NHWC", "pitch": 8, "shift": 1},
)


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("ratio", [0, 1, 2, 3])
def test_a_ramp_is_the_ramp_at_the_centres_of_bins(device, form, dtype, ratio):
    # Bilinear sampling of 10 y + x is exact, and samples are symmetric about the centre of each bin.
    ramp = 10 * np.arange(16.0)[:, None] + np.arange(16.0)
    features = [as_dtype(np.stack([ramp, -ramp])[None].astype(np.float32), dtype)]
    rois = np.array([[[8.0, 16.0, 40.0, 48.0]]])  # at stride 4: x 2 to 10, y 4 to 12
    given = {"output_size": 2, "sampling_ratio": ratio, "float32_output": True, **form}
    for aligned, wanted in ((False, [[64, 68], [104, 108]]), (True, [[58.5, 62.5], [98.5, 102.5]])):
        pooled = roi_align(device, features, rois, aligned=aligned, **given)
        np.testing.assert_allclose(pooled[0, 0], [wanted, -np.array(wanted)], rtol=1e-6)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_adaptive_samples_by_hand(device, form):
    # A RoI of 8 x 2 pixels in 2 x 2 bins has 4 samples along x and 1 along y, on the pixels of row 3 or 4.
    feature = np.zeros((1, 1, 16, 16), np.float32)
    feature[0, 0, 3, 2:6] = [4, 8, 0, 12]
    rois = np.array([[[8.0, 12.0, 40.0, 20.0]]])
    pooled = roi_align(device, [feature], rois, output_size=2, sampling_ratio=0, aligned=True, **form)
    assert pooled[0, 0, 0].tolist() == [[6, 0], [0, 0]]


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize(
    ("roi", "aligned", "of_one", "of_two"),  # results with one and with two samples along each axis
    [
        ((-4, 0, -4, 0), False, 3, 3),  # widened, from -1 to 0: samples before the first pixel get its value
        ((-6, 0, -2, 0), False, 3, 1.5),  # one sample at -1, the limit; or two at -1.25 and -0.75
        ((-6.25, 0, -2.25, 0), False, 0, 1.5),
        ((-8, 0, -4, 0), False, 0, 0),
        ((4, 0, 8, 0), False, 5, 5),  # from 1 to 2, after the centre of the last pixel
        ((6, 0, 10, 0), False, 5, 2.5),
        ((6.25, 0, 10.25, 0), False, 0, 2.5),
        ((8.5, 0, 12.5, 0), False, 0, 0),
        ((0, 0, 4, 4), True, 3, 3.25),  # exactly the first pixel
        ((2, 0, 6, 4), True, 4, 4),  # between the two
        ((4, 0, 8, 4), True, 5, 4.75),
        ((-4, 0, 0, 4), True, 3, 1.5),
        ((-4.25, 0, -0.25, 4), True, 0, 1.5),
        ((-8, 0, -4, 4), True, 0, 0),
        ((8.25, 0, 12.25, 4), True, 0, 2.5),
        ((11, 0, 15, 4), True, 0, 0),
    ],
)
def test_borders_by_hand(device, form, roi, aligned, of_one, of_two):
    feature = np.array([[[[3.0, 5.0]]]], np.float32)  # a map of 1 x 2 pixels; the RoI is one pixel wide
    for ratio, wanted in ((0, of_one), (1, of_one), (2, of_two)):
        given = {"output_size": 1, "sampling_ratio": ratio, "aligned": aligned}
        assert roi_align(device, [feature], np.array([[roi]]), **given, **form).item() == wanted


@settings(max_examples=300, deadline=None)
@given(case=roi_cases())
def test_it_is_correct_up_to_rounding(device, case):
    compared = check(case, case.pooled(device))
    event("every RoI compared" if compared == case.rois[..., 0].size else "some RoIs depend on rounding")


@settings(max_examples=120, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    size=st.sampled_from([1, 2, 4]),
    ratio=st.sampled_from([0, 1, 2, 4]),
    aligned=st.booleans(),
    form=st.sampled_from(FORMS),
)
def test_borders_without_rounding(device, seed, size, ratio, aligned, form):
    # With quarters of pixels samples are exactly at -1 and at the map's size. Bins are at most 1.5 wide.
    rng = np.random.default_rng(seed)
    height, width = rng.integers(1, 7, 2)
    features = [rng.standard_normal((1, 3, height, width)).astype(np.float32)]
    corners = rng.integers(-12, 30, (1, 8, 2))
    rois = np.concatenate([corners, corners + rng.integers(0, 7, corners.shape) * size], axis=-1).astype(np.float32)
    attributes = {"output_size": size, "sampling_ratio": ratio, "aligned": aligned}
    wanted = pooling_truth.multilevel_roi_align(features, rois, **attributes).pooled
    np.testing.assert_allclose(roi_align(device, features, rois, **attributes, **form), wanted, atol=2e-6)


@settings(max_examples=50, deadline=None)
@given(case=roi_cases(largest=7, least=1))
def test_it_equals_the_reference(device, case):
    features, rois = [single(f) for f in case.features], case.rois[:, :2]
    widest = np.abs(rois[..., 2:] - rois[..., :2]).max() / 2.0 ** case.attributes["min_level"]
    assume(case.attributes["sampling_ratio"] or widest < 60)  # the reference is slow
    truth = pooling_truth.multilevel_roi_align(features, rois, **case.attributes)
    wanted = reference.multilevel_roi_align(features, rois, **case.attributes)
    found = RoiCase(case.features, rois, case.attributes, case.form).pooled(device)
    allowed = 2 * truth.tolerance[..., None, None, None] + 1.01 * HALF_STEP[case.output_dtype] * np.abs(wanted)
    assert (np.abs(found - wanted) <= allowed + 1e-6)[truth.is_sure].all()


ANY = st.floats(width=32)
NEAR = st.floats(-50, 50, width=32)


@settings(max_examples=120, deadline=None)
@given(
    roi=st.tuples(*(4 * [ANY | NEAR | NEAR])),
    size=st.sampled_from([1, 2, 7]),
    ratio=st.sampled_from([0, 0, 1, 2, 3]),
    aligned=st.booleans(),
    form=st.sampled_from(FORMS),
)
@example(roi=(0, 0, math.inf, math.inf), size=7, ratio=0, aligned=False, form={"layout": "NHWC"})
@example(roi=(-1e30, -1e30, 1e30, 1e30), size=7, ratio=0, aligned=True, form={"layout": "NCHW"})
@example(roi=(-3e38, -3e38, 3e38, 3e38), size=7, ratio=0, aligned=True, form={"layout": "NHWC"})
@example(roi=(-1e9, -5e8, 1e9, 5e8), size=7, ratio=0, aligned=False, form={"layout": "NCHW"})
@example(roi=(0, 0, math.nan, 20), size=2, ratio=2, aligned=False, form={"layout": "NCHW"})
@example(roi=(0, 0, math.nan, 20), size=2, ratio=0, aligned=False, form={"layout": "NHWC"})
def test_any_four_numbers_are_a_roi(device, roi, size, ratio, aligned, form):
    # With an adaptive ratio it must terminate.
    feature = np.random.default_rng(0).standard_normal((1, 3, 5, 6)).astype(np.float32)
    rois = np.array([[roi]], np.float32)
    attributes = {"output_size": size, "sampling_ratio": ratio, "aligned": aligned}
    pooled = roi_align(device, [feature], rois, **attributes, **form)
    assert np.isfinite(pooled).all() and np.abs(pooled).max() <= np.abs(feature).max() * (1 + 1e-6)
    if np.isnan(rois).any() or np.isinf(rois[..., :2]).any() or (rois[..., 2:] == math.inf).any():
        assert not pooled.any()
    elif np.abs(rois).max() < 1e5:
        check(RoiCase([feature], rois, attributes), pooled)


@pytest.mark.parametrize("form", [{"layout": "NCHW"}, {"layout": "NHWC"}], ids=str)
def test_many_bins_of_a_box_much_larger_than_the_map(device, form):
    # Bins times samples overflows an int.
    feature = np.random.default_rng(0).standard_normal((1, 1, 5, 6)).astype(np.float32)
    rois = np.array([[[-1e10, 0, 40, 20], [-40, -1e10, 1e10, 1e10]]], np.float32)
    pooled = roi_align(device, [feature], rois, output_size=150, sampling_ratio=0, aligned=True, **form)
    assert np.isfinite(pooled).all() and np.abs(pooled).max() <= np.abs(feature).max()


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize(("size", "ratio"), [(1, 70), (28, 3), (33, 2), (65, 1), (14, 5)])
def test_more_samples_than_the_table_of_taps_holds(device, form, size, ratio):
    rng = np.random.default_rng(size)
    features = [rng.standard_normal((1, 2, 40, 30)).astype(np.float32)]
    rois = boxes(rng, ["inside", "across"], (120, 160), 4)[None]
    case = RoiCase(features, rois, {"output_size": size, "sampling_ratio": ratio, "aligned": True}, form)
    assert check(case, case.pooled(device)) == 2


@pytest.mark.parametrize("levels", [1, 9, MAX_LEVELS])
def test_every_level_is_used(any_device, levels):
    rng = np.random.default_rng(levels)
    features = [rng.standard_normal((1, 4, 6, 5)).astype(np.float32) for _ in range(levels)]
    sides = 1.5 * 2.0 ** np.arange(levels)  # with canonical_size 1 at canonical_level 0 box k belongs to level k
    corners = rng.uniform(0, 3, (levels, 2)) * sides[:, None]
    rois = np.concatenate([corners, corners + sides[:, None]], axis=1)[None].astype(np.float32)
    attributes = {"output_size": 2, "sampling_ratio": 2, "aligned": True}
    attributes |= {"min_level": 0, "canonical_level": 0, "canonical_size": 1.0}
    case = RoiCase(features, rois, attributes, {"layout": "NHWC"})
    assert check(case, case.pooled(any_device)) == levels


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 3, 0), (0, 0, 0)])
@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_empty_inputs_give_empty_results(any_device, shape, layout):
    batch, num_rois, channels = shape
    features, rois = [np.ones((batch, channels, 4, 4), np.float32)], np.zeros((batch, num_rois, 4), np.float32)
    pooled = roi_align(any_device, features, rois, output_size=7, sampling_ratio=2, aligned=True, layout=layout)
    assert pooled.shape == (batch, num_rois, channels, 7, 7)


@pytest.mark.parametrize("form", FORMS[:4], ids=str)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_coordinates_are_not_rounded_to_the_features_type(device, form, dtype):
    # Above 1024 px half precision only has integers, a quarter of a pixel of this map.
    rng = np.random.default_rng(1)
    checks = np.indices((1, 3, 300, 301)).sum(0) % 2 * 2.0 - 1
    features = [as_dtype((checks * rng.uniform(0.5, 1, checks.shape)).astype(np.float32), dtype)]
    corners = rng.uniform(1030, 1120, (1, 40, 2))
    rois = np.concatenate([corners, corners + rng.uniform(10, 60, corners.shape)], axis=-1).astype(np.float32)
    attributes = {"output_size": 3, "sampling_ratio": 2, "aligned": True}
    case = RoiCase(features, rois, attributes, {**form, "float32_output": True})
    assert check(case, case.pooled(device)) == 40
    rounded = RoiCase(features, single(as_dtype(rois, dtype)), attributes, case.form)
    with pytest.raises(AssertionError, match="more than roundings explain"):
        check(case, rounded.pooled(device))


@pytest.mark.parametrize("form", FORMS[:2], ids=str)
@pytest.mark.parametrize("ratio", [0, 2])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_its_error_is_at_most_twice_the_rounding_of_the_type(device, form, ratio, dtype):
    rng = np.random.default_rng(ratio)
    features = [rng.standard_normal((2, 33, 60 >> level, 50 >> level)).astype(np.float32) for level in range(3)]
    rois = boxes(rng, 12 * ["inside"], (200, 240), 4).reshape(2, 6, 4)
    attributes = {"output_size": 7, "sampling_ratio": ratio, "aligned": True}
    exact = pooling_truth.multilevel_roi_align(features, rois, **attributes).pooled
    halves = [as_dtype(f, dtype) for f in features]
    plain = pooling_truth.multilevel_roi_align([single(f) for f in halves], rois, **attributes).pooled
    plain = single(as_dtype(plain.astype(np.float32), dtype)).reshape(exact.shape)
    found = roi_align(device, halves, rois, **attributes, **form)
    assert np.abs(found - exact).max() <= 2 * np.abs(plain - exact).max()
    assert np.abs(found - exact).mean() <= 1.05 * np.abs(plain - exact).mean()


@settings(max_examples=60, deadline=None)
@given(case=roi_cases(), shift=st.sampled_from([1, 2, 3]))
def test_the_alignment_of_features_changes_only_the_rounding(cpu, case, shift):
    # Four channels are loaded at once only if the address is aligned.
    form = {k: v for k, v in case.form.items() if k != "shift"}
    apart = [RoiCase(case.features, case.rois, case.attributes, {**form, "shift": s}).pooled(cpu) for s in (0, shift)]
    np.testing.assert_allclose(*apart, rtol=2 * HALF_STEP[case.output_dtype], atol=2e-6)


@settings(max_examples=60, deadline=None)
@given(case=roi_cases())
def test_the_order_of_threads_has_no_effect(cpu, case):
    found = set()
    for order in ORDERS:
        with thread_order(order):
            found.add(case.pooled(cpu).tobytes())
    assert len(found) == 1


VALID = {"batch": 1, "channels": 4, "dtype": "float32", "layout": "NCHW"}


@pytest.mark.parametrize(
    ("pyramid", "arguments"),
    [
        ({"heights": [], "widths": [], "addresses": []}, {}),
        ({"heights": [0]}, {}),
        ({"widths": [-3]}, {}),
        ({"batch": -1}, {}),
        ({"channels": -1}, {}),
        ({"channels": 64 * 65535}, {}),
        ({"layout": "NHWC", "channel_pitch": 3}, {}),
        ({"dtype": "float16"}, {"output_dtype": "bfloat16"}),
        ({}, {"output_dtype": "float16"}),
        ({}, {"output_size": 0}),
        ({}, {"output_size": 32768}),
        ({}, {"sampling_ratio": -1}),
        ({}, {"canonical_size": 0.0}),
        ({}, {"canonical_size": math.nan}),
        ({}, {"num_rois": -1}),
        ({"batch": 1 << 16}, {"num_rois": 1 << 16}),
        ({"layout": "NHWC"}, {"num_rois": 0x7FFFFFFF, "output_size": 9}),
    ],
)
def test_invalid_arguments_are_errors_and_nothing_is_written(any_device, pyramid, arguments):
    feature, rois = np.zeros((1, 4, 2, 2), np.float32), np.zeros((1, 1, 4), np.float32)
    pooled = np.full((1, 1, 4, 2, 2), 7, np.float32)
    maps = {"addresses": [feature.ctypes.data], "heights": [2], "widths": [2], **VALID, **pyramid}
    given = {"output_dtype": "float32", "output_size": 2, "sampling_ratio": 2, "aligned": True, "num_rois": 1}
    given |= arguments
    with pytest.raises(ValueError, match=r"kernels\.h"):
        any_device.kernels.multilevel_roi_align(
            Pyramid(**maps), rois.ctypes.data, given.pop("num_rois"), pooled.ctypes.data, **given
        )
    assert (pooled == 7).all()


def test_too_many_levels_are_an_error(device):
    many = MAX_LEVELS + 1
    with pytest.raises(ValueError, match=f"{many} levels"):
        device.kernels.multilevel_roi_align(
            Pyramid(many * [0], many * [1], many * [1], **VALID),
            0, 1, 0, output_dtype="float32", output_size=2, sampling_ratio=2, aligned=True,
        )  # fmt: skip

"""Metamorphic tests of the RoIAlign kernels: relations between the results for two inputs.

Different kernels are compared only on the CPU, because a GPU compiler may round them differently.
"""

from dataclasses import replace

import numpy as np
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from kernel_calls import roi_align
from kernels_on_cpu import single
from roi_align_cases import RoiCase, as_dtype, boxes, forms, roi_cases

SEEDS = st.integers(0, 2**32 - 1)


@st.composite
def inside_cases(draw: st.DrawFn, margin: int = 0) -> RoiCase:
    """A single map, and boxes wider than two of its pixels and at least `margin` pixels from its border."""
    rng = np.random.default_rng(draw(SEEDS))
    channels, num_rois = draw(st.sampled_from([1, 4, 5])), draw(st.integers(1, 4))
    height, width = (draw(st.integers(2 * margin + 4, 40)) for _ in range(2))
    features = [rng.standard_normal((1, channels, height, width)).astype(np.float32)]
    inner = np.array([width - 2 * margin, height - 2 * margin]) * 4.0
    side = rng.uniform(8, np.maximum(inner, 8), (num_rois, 2))
    corner = margin * 4 + rng.uniform(0, 1, side.shape) * np.maximum(inner - side, 0)
    rois = np.round(np.concatenate([corner, corner + side], axis=1)[None] * 16) / 16  # so that a shift is exact
    attributes = {
        "output_size": draw(st.sampled_from([1, 3, 7, 8])),
        "sampling_ratio": draw(st.sampled_from([0, 1, 2, 3])),
        "aligned": draw(st.booleans()),
    }
    return RoiCase(features, rois.astype(np.float32), attributes, draw(forms(channels)))


@settings(max_examples=60, deadline=None)
@given(case=roi_cases())
def test_scaling_image_and_boxes_by_two_and_one_level_up(device, case):
    up = {**case.attributes, "min_level": case.attributes["min_level"] + 1}
    twice = replace(case, rois=case.rois * 2, attributes=up)
    np.testing.assert_array_equal(twice.pooled(device), case.pooled(device))


@settings(max_examples=50, deadline=None)
@given(case=inside_cases())
def test_a_box_twice_as_large_is_pooled_from_the_next_level(device, case):
    attributes = {**case.attributes, "canonical_size": 4.0, "canonical_level": 2}  # 8 to 160 px: P3 to P7
    nothing = np.full_like(case.features[0], 99)
    once = replace(case, features=[nothing, *(5 * case.features), nothing], attributes=attributes)
    scaled = replace(once, features=[nothing, nothing, *(5 * case.features)], rois=case.rois * 2)
    np.testing.assert_array_equal(scaled.pooled(device), once.pooled(device))


@settings(max_examples=50, deadline=None)
@given(case=inside_cases())
def test_mirroring_the_image_mirrors_the_result(device, case):
    height, width = case.features[0].shape[2:]
    far = np.array([width, height]) * 4.0 - (0 if case.attributes["aligned"] else 4)  # pixel centres
    mirrored = np.concatenate([far - case.rois[..., 2:], far - case.rois[..., :2]], axis=-1).astype(np.float32)
    turned = replace(case, features=[case.features[0][..., ::-1, ::-1]], rois=mirrored)
    np.testing.assert_allclose(turned.pooled(device)[..., ::-1, ::-1], case.pooled(device), atol=2e-4)


@settings(max_examples=50, deadline=None)
@given(case=inside_cases())
def test_transposing_the_image_transposes_the_result(device, case):
    turned = replace(case, features=[case.features[0].swapaxes(2, 3)], rois=case.rois[..., [1, 0, 3, 2]])
    np.testing.assert_allclose(turned.pooled(device).swapaxes(3, 4), case.pooled(device), atol=5e-5)


@settings(max_examples=50, deadline=None)
@given(case=inside_cases(margin=2), by=st.tuples(st.integers(0, 9), st.integers(0, 9)), seed=SEEDS)
def test_shifting_the_image_by_map_pixels(device, case, by, seed):
    down, right = by
    n, c, h, w = case.features[0].shape
    larger = np.random.default_rng(seed).standard_normal((n, c, h + down + 2, w + right + 1)).astype(np.float32)
    larger[..., down : down + h, right : right + w] = case.features[0]
    moved = replace(case, features=[larger], rois=case.rois + np.float32([4 * right, 4 * down, 4 * right, 4 * down]))
    np.testing.assert_allclose(moved.pooled(device), case.pooled(device), atol=5e-5)


@settings(max_examples=60, deadline=None)
@given(case=roi_cases(), seed=SEEDS)
def test_permuting_images_rois_and_channels_permutes_the_result(device, case, seed):
    rng = np.random.default_rng(seed)
    images, rois, channels = (rng.permutation(n) for n in (*case.rois.shape[:2], case.features[0].shape[1]))
    shuffled = replace(case, features=[f[images][:, channels] for f in case.features], rois=case.rois[images][:, rois])
    found = case.pooled(device)[images][:, rois][:, :, channels]
    np.testing.assert_array_equal(shuffled.pooled(device), found)


@settings(max_examples=50, deadline=None)
@given(case=roi_cases(dtypes=("float32",)), seed=SEEDS)
def test_it_is_linear_in_the_features(device, case, seed):
    rng = np.random.default_rng(seed)
    others = [rng.standard_normal(f.shape).astype(np.float32) for f in case.features]
    mixed = [2 * f - 3 * g for f, g in zip(case.features, others, strict=True)]
    separate = 2 * case.pooled(device) - 3 * replace(case, features=others).pooled(device)
    np.testing.assert_allclose(replace(case, features=mixed).pooled(device), separate, atol=5e-5)


@settings(max_examples=50, deadline=None)
@given(case=inside_cases(), dtype=st.sampled_from(["float32", "float16", "bfloat16"]))
def test_a_constant_map_pools_to_the_constant(device, case, dtype):
    features = [as_dtype(np.full_like(case.features[0], 1.625), dtype)]
    pooled = replace(case, features=features).pooled(device)
    np.testing.assert_allclose(pooled, 1.625, rtol=1e-6)


@settings(max_examples=50, deadline=None)
@given(case=roi_cases())
def test_a_half_precision_result_is_the_rounded_float32_result(cpu, case):
    assume(case.output_dtype != "float32")
    exact = replace(case, form={**case.form, "float32_output": True}).pooled(cpu)
    np.testing.assert_array_equal(case.pooled(cpu), single(as_dtype(exact, case.output_dtype)).reshape(exact.shape))


@settings(max_examples=50, deadline=None)
@given(case=roi_cases(), other=forms(0))
def test_layouts_give_the_same_result(cpu, case, other):
    other = {**other, "pitch": case.features[0].shape[1] + other.get("pitch", 0), "float32_output": True}
    apart = [replace(case, form=form).pooled(cpu) for form in ({**case.form, "float32_output": True}, other)]
    np.testing.assert_allclose(*apart, atol=2e-6)


@settings(max_examples=50, deadline=None)
@given(seed=SEEDS, form=forms(3), ratio=st.sampled_from([0, 1, 2, 3]), aligned=st.booleans())
def test_boxes_outside_the_map_pool_zeros(device, seed, form, ratio, aligned):
    rng = np.random.default_rng(seed)
    feature = rng.uniform(1, 2, (1, 3, 9, 11)).astype(np.float32)
    rois = boxes(rng, 8 * ["outside"], (44, 36), 4)[None]
    attributes = {"output_size": 3, "sampling_ratio": ratio, "aligned": aligned}
    assert not roi_align(device, [feature], rois, **attributes, **form).any()
    across = boxes(rng, 8 * ["across"], (44, 36), 4)[None]
    pooled = roi_align(device, [feature], across, **attributes, **form)
    assert ((pooled >= 0) & (pooled <= 2.001)).all() and pooled.any()

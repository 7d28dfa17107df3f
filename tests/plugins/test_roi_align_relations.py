"""What must hold between two results of the RoIAlign kernels, whatever each of them is.

Two different kernels are compared on the CPU alone: a GPU's compiler may round the two differently.
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
    """Boxes wider than two pixels of the one map there is, and `margin` pixels and more from its border."""
    rng = np.random.default_rng(draw(SEEDS))
    channels, num_rois = draw(st.sampled_from([1, 4, 5])), draw(st.integers(1, 4))
    height, width = (draw(st.integers(2 * margin + 4, 40)) for _ in range(2))
    features = [rng.standard_normal((1, channels, height, width)).astype(np.float32)]
    inner = np.array([width - 2 * margin, height - 2 * margin]) * 4.0
    side = rng.uniform(8, np.maximum(inner, 8), (num_rois, 2))
    corner = margin * 4 + rng.uniform(0, 1, side.shape) * np.maximum(inner - side, 0)
    rois = np.round(np.concatenate([corner, corner + side], axis=1)[None] * 16) / 16  # so that moving rounds nothing
    attributes = {
        "output_size": draw(st.sampled_from([1, 3, 7, 8])),
        "sampling_ratio": draw(st.sampled_from([0, 1, 2, 3])),
        "aligned": draw(st.booleans()),
    }
    return RoiCase(features, rois.astype(np.float32), attributes, draw(forms(channels)))


@settings(max_examples=150, deadline=None)
@given(case=roi_cases())
def test_twice_the_image_and_its_boxes_one_level_up_pool_the_same(device, case):
    up = {**case.attributes, "min_level": case.attributes["min_level"] + 1}
    twice = replace(case, rois=case.rois * 2, attributes=up)
    np.testing.assert_array_equal(twice.pooled(device), case.pooled(device))


@settings(max_examples=100, deadline=None)
@given(case=inside_cases())
def test_twice_the_box_is_pooled_from_the_next_level_of_the_same_pyramid(device, case):
    attributes = {**case.attributes, "canonical_size": 4.0, "canonical_level": 2}  # 8 to 160 px: P3 to P7
    nothing = np.full_like(case.features[0], 99)
    once = replace(case, features=[nothing, *(5 * case.features), nothing], attributes=attributes)
    scaled = replace(once, features=[nothing, nothing, *(5 * case.features)], rois=case.rois * 2)
    np.testing.assert_array_equal(scaled.pooled(device), once.pooled(device))


@settings(max_examples=100, deadline=None)
@given(case=inside_cases())
def test_the_mirrored_image_pools_mirrored(device, case):
    height, width = case.features[0].shape[2:]
    far = np.array([width, height]) * 4.0 - (0 if case.attributes["aligned"] else 4)  # without, pixels lie at corners
    mirrored = np.concatenate([far - case.rois[..., 2:], far - case.rois[..., :2]], axis=-1).astype(np.float32)
    turned = replace(case, features=[case.features[0][..., ::-1, ::-1]], rois=mirrored)
    np.testing.assert_allclose(turned.pooled(device)[..., ::-1, ::-1], case.pooled(device), atol=2e-4)


@settings(max_examples=100, deadline=None)
@given(case=inside_cases())
def test_rows_and_columns_are_treated_alike(device, case):
    turned = replace(case, features=[case.features[0].swapaxes(2, 3)], rois=case.rois[..., [1, 0, 3, 2]])
    np.testing.assert_allclose(turned.pooled(device).swapaxes(3, 4), case.pooled(device), atol=5e-5)


@settings(max_examples=100, deadline=None)
@given(case=inside_cases(margin=2), by=st.tuples(st.integers(0, 9), st.integers(0, 9)), seed=SEEDS)
def test_an_image_moved_by_pixels_of_the_map_pools_the_same(device, case, by, seed):
    down, right = by
    n, c, h, w = case.features[0].shape
    larger = np.random.default_rng(seed).standard_normal((n, c, h + down + 2, w + right + 1)).astype(np.float32)
    larger[..., down : down + h, right : right + w] = case.features[0]
    moved = replace(case, features=[larger], rois=case.rois + np.float32([4 * right, 4 * down, 4 * right, 4 * down]))
    np.testing.assert_allclose(moved.pooled(device), case.pooled(device), atol=5e-5)


@settings(max_examples=150, deadline=None)
@given(case=roi_cases(), seed=SEEDS)
def test_results_go_where_their_inputs_were(device, case, seed):
    rng = np.random.default_rng(seed)
    images, rois, channels = (rng.permutation(n) for n in (*case.rois.shape[:2], case.features[0].shape[1]))
    shuffled = replace(case, features=[f[images][:, channels] for f in case.features], rois=case.rois[images][:, rois])
    found = case.pooled(device)[images][:, rois][:, :, channels]
    np.testing.assert_array_equal(shuffled.pooled(device), found)


@settings(max_examples=100, deadline=None)
@given(case=roi_cases(dtypes=("float32",)), seed=SEEDS)
def test_it_is_linear_in_the_features(device, case, seed):
    rng = np.random.default_rng(seed)
    others = [rng.standard_normal(f.shape).astype(np.float32) for f in case.features]
    mixed = [2 * f - 3 * g for f, g in zip(case.features, others, strict=True)]
    separate = 2 * case.pooled(device) - 3 * replace(case, features=others).pooled(device)
    np.testing.assert_allclose(replace(case, features=mixed).pooled(device), separate, atol=5e-5)


@settings(max_examples=100, deadline=None)
@given(case=inside_cases(), dtype=st.sampled_from(["float32", "float16", "bfloat16"]))
def test_a_constant_map_pools_to_the_constant(device, case, dtype):
    features = [as_dtype(np.full_like(case.features[0], 1.625), dtype)]
    pooled = replace(case, features=features).pooled(device)
    np.testing.assert_allclose(pooled, 1.625, rtol=1e-6)


@settings(max_examples=100, deadline=None)
@given(case=roi_cases())
def test_one_type_is_the_other_rounded(cpu, case):
    assume(case.output_dtype != "float32")
    exact = replace(case, form={**case.form, "float32_output": True}).pooled(cpu)
    np.testing.assert_array_equal(case.pooled(cpu), single(as_dtype(exact, case.output_dtype)).reshape(exact.shape))


@settings(max_examples=100, deadline=None)
@given(case=roi_cases(), other=forms(0))
def test_layouts_agree(cpu, case, other):
    other = {**other, "pitch": case.features[0].shape[1] + other.get("pitch", 0), "float32_output": True}
    apart = [replace(case, form=form).pooled(cpu) for form in ({**case.form, "float32_output": True}, other)]
    np.testing.assert_allclose(*apart, atol=2e-6)


@settings(max_examples=100, deadline=None)
@given(seed=SEEDS, form=forms(3), ratio=st.sampled_from([0, 1, 2, 3]), aligned=st.booleans())
def test_boxes_outside_the_map_pool_zeros(device, seed, form, ratio, aligned):
    rng = np.random.default_rng(seed)
    feature = rng.uniform(1, 2, (1, 3, 9, 11)).astype(np.float32)
    rois = boxes(rng, 8 * ["outside"], (44, 36), 4)[None]
    given_ = {"output_size": 3, "sampling_ratio": ratio, "aligned": aligned}
    assert not roi_align(device, [feature], rois, **given_, **form).any()
    across = boxes(rng, 8 * ["across"], (44, 36), 4)[None]
    pooled = roi_align(device, [feature], across, **given_, **form)
    assert ((pooled >= 0) & (pooled <= 2.001)).all() and pooled.any()

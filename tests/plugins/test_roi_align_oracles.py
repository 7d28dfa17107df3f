"""The RoIAlign kernels against independent implementations: torchvision, ONNX Runtime, torch's grid_sample."""

import numpy as np
import pooling_truth
import torch
import torchvision
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from kernel_calls import Device
from roi_align_cases import KINDS_OF_BOX, RoiCase, boxes, forms, roi_cases


def assert_agree(device: Device, case: RoiCase, wanted: np.ndarray) -> None:
    """Both are single precision: each may differ by the tolerance, or more where the result depends on rounding."""
    truth = pooling_truth.multilevel_roi_align(case.features, case.rois, **case.attributes)
    beyond = np.abs(case.pooled(device) - wanted) - 2 * truth.tolerance[..., None, None, None]
    assert not (beyond[truth.is_sure] > 1e-6).any()


def of_one_level(case: RoiCase) -> tuple[RoiCase, float]:
    """The case with only its first level, and the scale of that level."""
    assume(case.rois.size and case.features[0].shape[1])
    rois = case.rois
    if case.attributes["sampling_ratio"] == 0:  # the other implementations fail for negative sides
        rois = np.concatenate([rois[..., :2], np.maximum(rois[..., :2], rois[..., 2:])], axis=-1)
    return RoiCase(case.features[:1], rois, case.attributes, case.form), 0.5 ** case.attributes["min_level"]


def with_image_numbers(rois: np.ndarray) -> torch.Tensor:
    """`[N, R, 4]` as torchvision's `[N · R, 5]`."""
    images = np.repeat(np.arange(len(rois)), rois.shape[1])
    return torch.from_numpy(np.concatenate([images[:, None], rois.reshape(-1, 4)], axis=1).astype(np.float32))


@settings(max_examples=100, deadline=None)
@given(case=roi_cases(dtypes=("float32",)))
def test_torchvision_at_one_level(device, case):
    case, scale = of_one_level(case)
    size, ratio, aligned = (case.attributes[name] for name in ("output_size", "sampling_ratio", "aligned"))
    wanted = torchvision.ops.roi_align(
        torch.from_numpy(case.features[0]), with_image_numbers(case.rois), size, scale, ratio or -1, aligned
    )
    assert_agree(device, case, wanted.unflatten(0, case.rois.shape[:2]).numpy())


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    levels=st.integers(2, 5),
    size=st.sampled_from([1, 7, 14]),
    ratio=st.sampled_from([0, 1, 2, 3]),
    channels=st.sampled_from([1, 5, 8]),
    data=st.data(),
)
def test_torchvisions_pooler_at_many_levels(device, seed, levels, size, ratio, channels, data):
    rng = np.random.default_rng(seed)
    features = [rng.standard_normal((2, channels, 64 >> i, 64 >> i)).astype(np.float32) for i in range(levels)]
    rois = boxes(rng, list(rng.choice(KINDS_OF_BOX, 12)), (256, 256), 4).reshape(2, 6, 4)
    rois = rois[:, (np.prod(rois[..., 2:] - rois[..., :2], axis=-1) > 0).all(0)]  # torchvision needs areas
    pooler = torchvision.ops.MultiScaleRoIAlign(
        [str(i) for i in range(levels)], size, ratio or -1, canonical_scale=64, canonical_level=3
    )
    maps = {str(i): torch.from_numpy(f) for i, f in enumerate(features)}
    wanted = pooler(maps, [torch.from_numpy(r) for r in rois], [(256, 256)] * 2)
    attributes = {"output_size": size, "sampling_ratio": ratio, "aligned": False}
    attributes |= {"canonical_size": 64.0, "canonical_level": 3}
    case = RoiCase(features, rois, attributes, data.draw(forms(channels)))
    assert_agree(device, case, wanted.numpy().reshape(*rois.shape[:2], channels, size, size))

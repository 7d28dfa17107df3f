"""The PyTorch custom ops against the NumPy truth, torchvision and hand-typed values."""

import numpy as np
import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st

from maskrcnn.model.ops import assign_levels, batched_nms, multilevel_roi_align
from maskrcnn.plugins import reference


def pyramid(rng: torch.Generator, batch: int, channels: int, size: int = 64) -> list[torch.Tensor]:
    return [torch.randn(batch, channels, size >> i, size >> i, generator=rng) for i in range(4)]


def random_rois(rng: torch.Generator, batch: int, count: int, extent: float) -> torch.Tensor:
    corners = torch.rand(batch, count, 2, generator=rng) * extent
    sides = torch.exp(torch.rand(batch, count, 2, generator=rng) * 7) * 0.7  # 0.7 … 770 px: every level
    return torch.cat([corners, corners + sides], dim=-1)


def test_roi_align_of_a_ramp_is_the_ramp_at_the_bin_centres():
    # Bilinear sampling of f(y, x) = 10 y + x is exact, and samples are symmetric around each bin's centre.
    ramp = 10 * torch.arange(32.0)[:, None] + torch.arange(32.0)[None, :]
    features = [ramp[None, None], torch.zeros(1, 1, 16, 16)]
    rois = torch.tensor([[[8.0, 16.0, 40.0, 48.0]]])  # at stride 4: x from 2 to 10, y from 4 to 12
    pooled = multilevel_roi_align(features, rois, output_size=2, sampling_ratio=2, aligned=False)
    assert pooled[0, 0, 0].tolist() == [[60 + 4, 60 + 8], [100 + 4, 100 + 8]]
    pooled = multilevel_roi_align(features, rois, output_size=2, sampling_ratio=2, aligned=True)
    assert pooled[0, 0, 0].tolist() == [[55 + 3.5, 55 + 7.5], [95 + 3.5, 95 + 7.5]]


@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize(("output_size", "sampling_ratio"), [(7, 2), (14, 2), (3, 1), (2, 3), (7, 0), (3, 0)])
def test_roi_align_equals_the_reference(aligned, output_size, sampling_ratio):
    rng = torch.Generator().manual_seed(1)
    features, rois = pyramid(rng, 2, 3), random_rois(rng, 2, 12, 260.0) - 20
    ours = multilevel_roi_align(features, rois, output_size=output_size, sampling_ratio=sampling_ratio, aligned=aligned)
    truth = reference.multilevel_roi_align(
        [f.numpy() for f in features],
        rois.numpy(),
        output_size=output_size,
        sampling_ratio=sampling_ratio,
        aligned=int(aligned),
    )
    # Single precision, coordinates up to 1000: a position is known to 1e-4 pixels.
    np.testing.assert_allclose(ours.numpy(), truth, atol=1e-3)


@pytest.mark.parametrize("seed", range(3))
def test_roi_align_equals_torchvision(seed):
    rng = torch.Generator().manual_seed(seed)
    features, rois = pyramid(rng, 3, 5, 128), random_rois(rng, 3, 200, 500.0) - 10
    pool = torchvision.ops.MultiScaleRoIAlign(["0", "1", "2", "3"], 7, 2)
    theirs = pool({str(i): f for i, f in enumerate(features)}, list(rois), [(512, 512)] * 3)
    ours = multilevel_roi_align(features, rois, output_size=7, sampling_ratio=2, aligned=False)
    torch.testing.assert_close(ours.flatten(0, 1), theirs, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize(("ratio", "torchvision_ratio"), [(2, 2), (0, -1)])
def test_roi_align_gradient_equals_torchvisions(ratio, torchvision_ratio):
    rng = torch.Generator().manual_seed(5)
    rois, weight = random_rois(rng, 2, 40, 200.0), torch.randn(80, 4, 7, 7, generator=rng)
    pool = torchvision.ops.MultiScaleRoIAlign(["0", "1", "2", "3"], 7, torchvision_ratio)
    gradients = []
    for is_ours in (True, False):
        features = [f.requires_grad_() for f in pyramid(torch.Generator().manual_seed(6), 2, 4)]
        if is_ours:
            out = multilevel_roi_align(features, rois, output_size=7, sampling_ratio=ratio, aligned=False).flatten(0, 1)
        else:
            out = pool({str(i): f for i, f in enumerate(features)}, list(rois), [(256, 256)] * 2)
        (out * weight).sum().backward()
        gradients.append([f.grad for f in features])
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("ratio", [2, 0])
def test_roi_align_of_no_rois_is_empty(ratio):
    features = pyramid(torch.Generator().manual_seed(0), 2, 3)
    pooled = multilevel_roi_align(features, torch.zeros(2, 0, 4), output_size=7, sampling_ratio=ratio, aligned=False)
    assert pooled.shape == (2, 0, 3, 7, 7)


def test_an_adaptive_ratio_by_hand():
    # A RoI of 8 × 2 pixels in 2 × 2 bins: 4 samples along x and 1 along y. They lie on the pixels of row 3 or 4.
    feature = torch.zeros(1, 1, 16, 16)
    feature[0, 0, 3, 2:6] = torch.tensor([4.0, 8.0, 0.0, 12.0])
    rois = torch.tensor([[[8.0, 12.0, 40.0, 20.0]]])
    settings = {"output_size": 2, "sampling_ratio": 0, "aligned": True}
    pooled = multilevel_roi_align([feature], rois, **settings)
    assert pooled[0, 0, 0].tolist() == [[6.0, 0.0], [0.0, 0.0]]
    truth = reference.multilevel_roi_align([feature.numpy()], rois.numpy(), **settings)
    assert truth[0, 0, 0].tolist() == [[6.0, 0.0], [0.0, 0.0]]


@pytest.mark.parametrize("aligned", [False, True])
def test_an_adaptive_ratio_equals_torchvisions_level_by_level(aligned):
    rng = torch.Generator().manual_seed(7)
    features, rois = pyramid(rng, 2, 5, 128), random_rois(rng, 2, 150, 500.0) - 10
    rois[0, :3] = torch.tensor([[0.0, 0, 0, 0], [5, 5, 5, 90], [300, 20, 420, 20]])  # empty, as unused rows are
    ours = multilevel_roi_align(features, rois, output_size=7, sampling_ratio=0, aligned=aligned)
    level = assign_levels(rois, min_level=2, num_levels=4)
    assert len(level.unique()) == 4
    for n in range(2):
        for k, feature in enumerate(features):
            here = level[n] == k
            boxes = torch.nn.functional.pad(rois[n, here], (1, 0), value=n)
            theirs = torchvision.ops.roi_align(feature, boxes, 7, 0.25 / 2**k, -1, aligned)
            torch.testing.assert_close(ours[n, here], theirs, atol=2e-5, rtol=1e-5)
    if aligned:
        assert not ours[0, :3].any()


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_an_adaptive_ratio_takes_half_precision_and_compiles_to_one_graph(kind):
    rng = torch.Generator().manual_seed(2)
    features, rois = pyramid(rng, 2, 3), random_rois(rng, 2, 9, 200.0)
    settings = {"output_size": 3, "sampling_ratio": 0, "aligned": True}
    half = [feature.to(kind) for feature in features]
    pooled = multilevel_roi_align(half, rois, **settings)
    assert pooled.dtype == torch.float32 and pooled.shape == (2, 9, 3, 3, 3)
    torch.testing.assert_close(pooled, multilevel_roi_align([f.float() for f in half], rois, **settings))
    compiled = torch.compile(multilevel_roi_align, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(half, rois, **settings), pooled)


def test_roi_align_refuses_a_negative_ratio():
    features = pyramid(torch.Generator().manual_seed(0), 1, 3)
    with pytest.raises(ValueError, match="expected: 0 or more"):
        multilevel_roi_align(features, torch.zeros(1, 1, 4), output_size=7, sampling_ratio=-1, aligned=False)


@pytest.mark.parametrize("ratio", [0, 2])
@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
def test_nan_and_infinite_rois_are_pooled_to_zeros(ratio, wrong):
    features = pyramid(torch.Generator().manual_seed(0), 1, 3)
    rois = torch.tensor([[[4.0, 4.0, 40.0, 40.0], [wrong] * 4, [4.0, 4.0, 40.0, wrong]]])
    options = {"output_size": 7, "sampling_ratio": ratio, "aligned": False}
    pooled = multilevel_roi_align(features, rois, **options)
    assert torch.equal(pooled[:, :1], multilevel_roi_align(features, rois[:, :1], **options))
    assert not pooled[:, 1].any() and pooled[:, 2].isfinite().all()


def test_levels_follow_equation_1():
    sides = torch.tensor([0.0, 1.0, 111.9, 112.0, 223.9, 224.0, 447.9, 448.0, 896.0, 5000.0])
    rois = torch.stack([torch.zeros(10), torch.zeros(10), sides, sides], dim=1)
    assert assign_levels(rois, min_level=2, num_levels=4).tolist() == [0, 0, 0, 1, 1, 2, 2, 3, 3, 3]
    assert assign_levels(torch.full((1, 4), torch.nan), min_level=2, num_levels=4).tolist() == [0]


def test_nms_by_hand():
    boxes = torch.tensor([[[0, 0, 10, 10], [0, 0, 10, 9], [20, 0, 30, 10], [0, 0, 10, 10.0], [0, 0, 1, 1]]])
    groups = torch.tensor([[0, 0, 0, 1, 0]], dtype=torch.int32)
    kept, count = batched_nms(boxes, groups, torch.tensor([4]), iou_threshold=0.5, max_output=4)
    assert kept.tolist() == [[0, 2, 3, 0]]  # 1 falls to 0; 3 is of another group; 4 is padding
    assert count.tolist() == [3]
    kept, count = batched_nms(boxes, groups, torch.tensor([5]), iou_threshold=0.95, max_output=2)
    assert (kept.tolist(), count.tolist()) == ([[0, 1]], [2])


@st.composite
def nms_problems(draw):
    count, batch = draw(st.integers(1, 24)), draw(st.integers(1, 3))
    side = st.integers(0, 12)
    boxes = np.array(
        [[[draw(side), draw(side), draw(side), draw(side)] for _ in range(count)] for _ in range(batch)],
        np.float32,
    )
    boxes[..., 2:] += boxes[..., :2]
    groups = np.array([[draw(st.integers(0, 3)) for _ in range(count)] for _ in range(batch)], np.int32)
    counts = np.array([draw(st.integers(0, count)) for _ in range(batch)], np.int32)
    return boxes, groups, counts, draw(st.integers(1, 26)), draw(st.sampled_from([0.3, 0.5, 0.7]))


def test_a_threshold_is_float32_like_the_overlap():
    """An overlap of 3/10 is not greater than 0.3, though 0.3 as a double is less than 3/10 in float32."""
    boxes = torch.tensor([[[0.0, 0.0, 10.0, 1.0], [0.0, 0.0, 3.0, 1.0]]])
    groups, counts = torch.zeros(1, 2, dtype=torch.int32), torch.tensor([2], dtype=torch.int32)
    assert batched_nms(boxes, groups, counts, iou_threshold=0.3, max_output=2)[1].tolist() == [2]
    assert batched_nms(boxes, groups, counts, iou_threshold=0.29, max_output=2)[1].tolist() == [1]


@settings(max_examples=300, deadline=None)
@given(nms_problems())
def test_nms_equals_the_reference(problem):
    boxes, groups, counts, rows, threshold = problem
    ours = batched_nms(
        torch.from_numpy(boxes),
        torch.from_numpy(groups),
        torch.from_numpy(counts),
        iou_threshold=threshold,
        max_output=rows,
    )
    truth = reference.batched_nms(boxes, groups, counts, iou_threshold=threshold, max_output=rows)
    np.testing.assert_array_equal(ours[0].numpy(), truth[0])
    np.testing.assert_array_equal(ours[1].numpy(), truth[1])


@pytest.mark.parametrize("seed", range(5))
def test_nms_keeps_what_torchvision_keeps_in_its_order(seed):
    rng = torch.Generator().manual_seed(seed)
    corners = torch.rand(300, 2, generator=rng) * 60
    boxes = torch.cat([corners, corners + 5 + torch.rand(300, 2, generator=rng) * 30], dim=1)
    scores = torch.rand(300, generator=rng).sort(descending=True).values
    groups = torch.randint(0, 6, (300,), generator=rng)
    theirs = torchvision.ops.batched_nms(boxes, scores, groups, 0.5)
    kept, count = batched_nms(
        boxes[None], groups[None].to(torch.int32), torch.tensor([300]), iou_threshold=0.5, max_output=300
    )
    assert kept[0, : count[0]].tolist() == theirs.tolist()

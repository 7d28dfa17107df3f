"""RoIPool and RoICrop against torchvision, their definitions, the NumPy truth and values by hand."""

import functools

import numpy as np
import pytest
import torch
import torchvision
from tiny import tiny_config
from torch.nn import functional as F

from maskrcnn.config import POOL_METHODS
from maskrcnn.model.ops import assign_levels
from maskrcnn.model.pooling import multilevel_pool, multilevel_roi_crop, multilevel_roi_pool
from maskrcnn.model.roi_heads import RoiHeads
from maskrcnn.plugins import reference


def pyramid(seed: int, batch: int = 2, channels: int = 3, size_hw=(160, 192)) -> list[torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    height, width = size_hw
    return [torch.randn(batch, channels, height >> k, width >> k, generator=rng) for k in range(4)]


def boxes_in(seed: int, batch: int = 2, count: int = 60, size_hw=(640, 768)) -> torch.Tensor:
    """Boxes of every level inside the image; some lie on halves of a pixel, some have no area, one is the image."""
    rng = torch.Generator().manual_seed(seed)
    height, width = size_hw
    side = torch.tensor([width, height])
    middle = torch.rand(batch, count, 2, generator=rng) * side
    half = torch.exp(torch.rand(batch, count, 2, generator=rng) * 6.5) * 0.5
    rois = torch.cat([middle - half, middle + half], dim=-1)
    rois = torch.minimum(rois.clamp(min=0), side.repeat(2).float())
    rois[:, 10:20] = (rois[:, 10:20] / 16).round() * 16 + 2  # at stride 4 halves of a pixel
    rois[0, 0], rois[0, 1] = 0, torch.tensor([5.0, 9, 5, 300])
    rois[0, 2] = torch.tensor([0.0, 0, width, height])
    return rois


def per_level(features, rois, output, pool):
    """What `pool(feature, rois_of_the_level, stride)` gives, beside the rows of `output` that it should equal."""
    level = assign_levels(rois, min_level=2, num_levels=len(features))
    assert level.unique().tolist() == [0, 1, 2, 3]
    for k, feature in enumerate(features):
        for n in range(len(rois)):
            here = level[n] == k
            yield pool(feature[n : n + 1], rois[n, here], 4 * 2**k), output[n, here]


def crop_by_definition(feature: torch.Tensor, rois: torch.Tensor, stride: int, size: int, shift: float = 0.0):
    """RoICrop of one map `[1, C, H, W]`, RoI by RoI: an affine grid over the box, and the largest of each 2 × 2."""
    height, width = feature.shape[2:]
    pooled = []
    for x1, y1, x2, y2 in (rois / stride - shift).tolist():
        theta = torch.tensor(
            [
                [(x2 - x1) / (width - 1), 0, (x1 + x2 - width + 1) / (width - 1)],
                [0, (y2 - y1) / (height - 1), (y1 + y2 - height + 1) / (height - 1)],
            ]
        )
        grid = F.affine_grid(theta[None], (1, 1, 2 * size, 2 * size), align_corners=True)
        pooled.append(F.max_pool2d(F.grid_sample(feature, grid, align_corners=True), 2)[0])
    return torch.stack(pooled) if pooled else feature.new_zeros(0, feature.shape[1], size, size)


# RoIPool


def torchvisions(feature: torch.Tensor, rois: torch.Tensor, stride: int, size: int = 7) -> torch.Tensor:
    return torchvision.ops.RoIPool(size, 1 / stride)(feature, [rois])


@pytest.mark.parametrize("size", [7, 14])
def test_roi_pool_is_torchvisions(size):
    features, rois = pyramid(1), boxes_in(2)
    ours = multilevel_roi_pool(features, rois, output_size=size)
    for expected, found in per_level(features, rois, ours, functools.partial(torchvisions, size=size)):
        assert torch.equal(found, expected)


def test_roi_pool_has_torchvisions_gradient():
    rois, gradients = boxes_in(3), []
    weight = torch.randn(2, 60, 3, 7, 7, generator=torch.Generator().manual_seed(4))
    for is_ours in (True, False):
        features = [feature.requires_grad_() for feature in pyramid(1)]
        if is_ours:
            total = (multilevel_roi_pool(features, rois, output_size=7) * weight).sum()
        else:
            pairs = per_level(features, rois, weight, torchvisions)
            total = sum((pooled * own).sum() for pooled, own in pairs)
        gradients.append(torch.autograd.grad(total, features))
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_roi_pool_by_hand():
    # At stride 4 the box covers pixels 1 to 4: 0.5 and 3.5 are rounded away from zero, both ends included.
    feature = torch.arange(64.0).view(1, 1, 8, 8)
    rois = torch.tensor([[[2.0, 2.0, 14.0, 14.0], [20.0, 20.0, 8.0, 8.0]]])
    pooled = multilevel_roi_pool([feature], rois, output_size=2)
    assert pooled[0, 0, 0].tolist() == [[18.0, 20.0], [34.0, 36.0]]
    assert pooled[0, 1, 0].tolist() == [[45.0, 45.0], [45.0, 45.0]]  # ends before it begins: one pixel, its first


@pytest.mark.parametrize("size", [7, 2])
def test_roi_pool_equals_the_reference(size):
    features, rois = pyramid(5, size_hw=(32, 48)), boxes_in(6, count=20, size_hw=(128, 192)) - 7
    ours = multilevel_roi_pool(features, rois, output_size=size)
    truth = reference.multilevel_roi_pool([f.numpy() for f in features], rois.numpy(), pooled_shape=(size, size))
    np.testing.assert_array_equal(ours.numpy(), truth)
    assert (truth == 0).any()  # bins outside the map


# RoICrop


@pytest.mark.parametrize(("size", "aligned"), [(7, False), (14, False), (7, True)])
def test_roi_crop_is_its_definition(size, aligned):
    features, rois = pyramid(7), boxes_in(8)
    ours = multilevel_roi_crop(features, rois, output_size=size, aligned=aligned)

    def definition(feature, boxes, stride):
        return crop_by_definition(feature, boxes, stride, size, 0.5 if aligned else 0.0)

    for expected, found in per_level(features, rois, ours, definition):
        torch.testing.assert_close(found, expected, atol=3e-4, rtol=0)  # positions are known to 1e-4 pixels


def test_roi_crop_has_the_gradient_of_its_definition():
    rois, gradients = boxes_in(9), []
    rois[0, :2] = rois[0, 3:5]  # where all samples are one point, either may get the gradient of the largest
    weight = torch.randn(2, 60, 3, 7, 7, generator=torch.Generator().manual_seed(4))
    for is_ours in (True, False):
        features = [feature.requires_grad_() for feature in pyramid(7)]
        if is_ours:
            total = (multilevel_roi_crop(features, rois, output_size=7, aligned=False) * weight).sum()
        else:
            pairs = per_level(features, rois, weight, lambda f, boxes, stride: crop_by_definition(f, boxes, stride, 7))
            total = sum((pooled * own).sum() for pooled, own in pairs)
        gradients.append(torch.autograd.grad(total, features))
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-3)


def test_roi_crop_fades_to_zero_around_the_map():
    ones = [torch.ones(1, 1, 32 >> k, 32 >> k) for k in range(4)]
    # At P2 the points of an axis lie at -1.5, -0.5, 0.5, 1.5 of the first box, at 29.5 … 32.5 of the second.
    rois = torch.tensor([[[-6.0, -6.0, 6.0, 6.0], [118.0, 118.0, 130.0, 130.0]]])
    pooled = multilevel_roi_crop(ones, rois, output_size=2, aligned=False)[0, :, 0]
    assert pooled.flatten(1).tolist() == [pytest.approx([0.25, 0.5, 0.5, 1]), pytest.approx([1, 0.5, 0.5, 0.25])]


# Both, and RoIAlign


@pytest.mark.parametrize("method", POOL_METHODS)
def test_no_rois_give_nothing_and_empty_ones_something_finite(method):
    settings = {"method": method, "output_size": 7, "sampling_ratio": 2, "aligned": False}
    features = pyramid(12)
    assert multilevel_pool(features, torch.zeros(2, 0, 4), **settings).shape == (2, 0, 3, 7, 7)
    pooled = multilevel_pool(features, torch.zeros(2, 5, 4), **settings)  # the rows past the last proposal
    first = torch.stack([f[:, 0, 0] for f in (features[0].permute(0, 2, 3, 1),)])[0]
    assert pooled.isfinite().all()
    if method != "align":  # which takes such a RoI for one of a pixel
        torch.testing.assert_close(pooled, first[:, None, :, None, None].expand_as(pooled))


@pytest.mark.parametrize("method", POOL_METHODS)
@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_half_precision_features_are_pooled_in_single_precision_and_in_one_graph(method, kind):
    features, rois = [f.to(kind) for f in pyramid(13, size_hw=(64, 64))], boxes_in(14, count=9, size_hw=(256, 256))
    settings = {"method": method, "output_size": 3, "sampling_ratio": 2, "aligned": False}
    pooled = multilevel_pool(features, rois, **settings)
    assert pooled.dtype == torch.float32
    torch.testing.assert_close(pooled, multilevel_pool([f.float() for f in features], rois, **settings))
    compiled = torch.compile(multilevel_pool, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(features, rois, **settings), pooled)


@pytest.mark.parametrize("method", POOL_METHODS)
def test_the_heads_pool_by_the_configured_method(method):
    heads, features = RoiHeads(tiny_config(pool_method=method)), pyramid(15, channels=16, size_hw=(32, 32))
    seen = {}
    rois = boxes_in(16, count=4, size_hw=(128, 128))
    heads.classify(features, rois, seen)
    expected = multilevel_pool(features, rois, method=method, output_size=7, sampling_ratio=2, aligned=False)
    assert torch.equal(seen["box_features"], expected)

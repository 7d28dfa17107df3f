"""Mask targets from crops against torchvision's from full-size masks, and by hand."""

import numpy as np
import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.models.detection.roi_heads import project_masks_on_boxes

from maskrcnn.data.shapes import shapes_image
from maskrcnn.model.targets import mask_targets
from maskrcnn.training.view import MASK_SIDE, mask_crop, mask_extent, nearest_index, resized_mask


def targets(masks: list[np.ndarray], size_hw: tuple[int, int], rois: torch.Tensor, size: int = 28) -> torch.Tensor:
    """Targets `[G, R, size, size]` of every RoI `[G, R, 4]` on its mask, from crops."""
    crops, frames = zip(*(mask_crop(mask, size_hw) for mask in masks), strict=True)
    owner = torch.arange(len(masks)).repeat_interleave(rois.shape[1])
    found = mask_targets(
        torch.from_numpy(np.stack(crops))[None],
        torch.from_numpy(np.stack(frames))[None],
        rois.flatten(0, 1)[None],
        owner[None],
        torch.tensor([size_hw]),
        size,
    )
    return found.view(*rois.shape[:2], size, size)


def torchvision_targets(masks: list[np.ndarray], size_hw: tuple[int, int], rois: torch.Tensor) -> torch.Tensor:
    full = torch.from_numpy(np.stack(masks))[:, None].float()
    full = torch.nn.functional.interpolate(full, size=size_hw)[:, 0]
    owner = torch.arange(len(masks)).repeat_interleave(rois.shape[1])
    return project_masks_on_boxes(full, rois.flatten(0, 1), owner, 28).view(*rois.shape[:2], 28, 28)


def rois_around(masks: list[np.ndarray], size_hw: tuple[int, int], count: int, spread: float) -> torch.Tensor:
    """RoIs `[G, count, 4]` in the image, each edge up to `spread` of a side from the mask's; the first fits."""
    extents = torch.tensor([mask_extent(resized_mask(mask, size_hw)) for mask in masks], dtype=torch.float32)
    sides = (extents[:, 2:] - extents[:, :2]).repeat(1, 2)[:, None]
    moved = extents[:, None] + (torch.rand(len(masks), count, 4) * 2 - 1) * spread * sides
    moved[:, 0] = extents
    height, width = size_hw
    return moved.clamp(min=0).minimum(torch.tensor([width, height, width, height]))


def blobs(seed: int, size_hw: tuple[int, int], diameter: float) -> list[np.ndarray]:
    """Masks with ragged edges and holes, some of them cut by the image's border."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[: size_hw[0], : size_hw[1]]
    masks = []
    for place in ((0.5, 0.5), (0.02, 0.3), (1.0, 1.0), (0.6, 0.0)):
        angle = np.arctan2(y - place[0] * size_hw[0], x - place[1] * size_hw[1])
        radius = np.hypot(y - place[0] * size_hw[0], x - place[1] * size_hw[1])
        edge = diameter / 2 * (0.8 + 0.2 * np.sin(rng.integers(2, 7) * angle + rng.random() * 6))
        masks.append((radius < edge) & (radius > edge * 0.3 * rng.random()))
    return [mask for mask in masks if mask.any()]


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 2**32 - 1),
    size=st.tuples(st.integers(20, 150), st.integers(20, 150)),
    resized=st.tuples(st.integers(20, 170), st.integers(20, 170)),
)
def test_targets_of_small_objects_equal_torchvisions(seed, size, resized):
    torch.manual_seed(seed)
    diameter = 108 * min(1, size[0] / resized[0], size[1] / resized[1])
    masks = [mask for mask in blobs(seed, size, diameter) if resized_mask(mask, resized).any()]
    if not masks:
        return
    rois = rois_around(masks, resized, 8, spread=0.4)
    torch.testing.assert_close(
        targets(masks, resized, rois), torchvision_targets(masks, resized, rois), rtol=0, atol=3e-5
    )


@pytest.mark.parametrize("resized", [(320, 400), (700, 500), (900, 1200)])
def test_targets_of_large_objects_are_close_to_torchvisions(resized):
    torch.manual_seed(0)
    masks = blobs(3, (450, 600), 300)
    masks += [mask for _, mask in shapes_image(np.random.default_rng(5), (450, 600))[1]]
    rois = rois_around(masks, resized, 8, spread=0.15)
    ours, theirs = targets(masks, resized, rois), torchvision_targets(masks, resized, rois)
    assert (ours - theirs).abs().mean() < 0.005  # measured: 0.0013, 0.0027, 0.0035
    assert (ours - theirs).abs().mean(dim=(-1, -2)).max() < 0.012  # the worst RoI; measured: 0.0076


def test_targets_by_hand():
    # Two objects at one crop pixel per pixel: the second's left half is set. Pixel i lies at coordinate i, so a RoI
    # of 4 × 4 bins from 10 to 14 samples at 10.5, 11.5, …: between two pixels.
    masks = torch.zeros(1, 2, MASK_SIDE, MASK_SIDE, dtype=torch.uint8)
    masks[0, 1, :4, :2] = 255
    frames = torch.tensor([[[0.0, 0, 112, 112], [10, 20, 122, 132]]])
    rois = torch.tensor([[[10.0, 20, 14, 24], [8, 20, 12, 24], [10, 17, 14, 21]]])
    same, left, up = mask_targets(masks, frames, rois, torch.tensor([[1, 1, 1]]), torch.tensor([[100, 100]]), 4)[0]
    bottom = torch.tensor([1, 1, 1, 0.5])[:, None]
    torch.testing.assert_close(same, torch.tensor([1, 0.5, 0, 0]) * bottom)
    torch.testing.assert_close(left, torch.tensor([0, 0.5, 1, 0.5]) * bottom)
    torch.testing.assert_close(up, torch.tensor([1, 0.5, 0, 0]) * torch.tensor([0, 0, 0.5, 1])[:, None])


def test_samples_beyond_the_last_pixel_read_it():
    # The image ends at 24: samples at 23.25 and 23.75 read row 23, which is set, and not what would follow it.
    masks = torch.zeros(1, 1, MASK_SIDE, MASK_SIDE, dtype=torch.uint8)
    masks[0, 0, :4] = 255
    frames, rois = torch.tensor([[[0.0, 20, 112, 132]]]), torch.tensor([[[0.0, 23, 1, 24]]])
    owner = torch.zeros(1, 1, dtype=torch.int64)
    inside = mask_targets(masks, frames, rois, owner, torch.tensor([[24, 112]]), 2)
    assert inside.flatten().tolist() == [1, 1, 1, 1]
    # A RoI is at least a pixel long: the second sample of this one, at 24.25, is outside the image and counts as 0.
    narrow = torch.tensor([[[0.0, 23.5, 1, 24]]])
    outside = mask_targets(masks, frames, narrow, owner, torch.tensor([[24, 112]]), 2)
    assert outside.flatten().tolist() == [1, 1, 0, 0]
    beyond = mask_targets(masks, frames, rois, owner, torch.tensor([[40, 112]]), 2)
    torch.testing.assert_close(beyond[0, 0], torch.tensor([[0.75, 0.75], [0.25, 0.25]]))


def test_no_value_decides_a_shape_or_is_waited_for():
    # Such a value would break the graph, which is refused here.
    compiled = torch.compile(mask_targets, backend="eager", fullgraph=True)
    masks = torch.zeros(2, 3, MASK_SIDE, MASK_SIDE, dtype=torch.uint8)
    frames, rois, owner = torch.zeros(2, 3, 4), torch.zeros(2, 5, 4), torch.zeros(2, 5, dtype=torch.int64)
    assert compiled(masks, frames, rois, owner, torch.ones(2, 2, dtype=torch.int64), 28).shape == (2, 5, 28, 28)


@settings(deadline=None, max_examples=200)
@given(size_in=st.integers(1, 3000), size_out=st.integers(1, 3000))
def test_nearest_pixels_are_those_of_torch(size_in, size_out):
    line = torch.arange(size_in, dtype=torch.float32)[None, None]
    theirs = torch.nn.functional.interpolate(line, size=size_out)[0, 0]
    np.testing.assert_array_equal(nearest_index(size_in, size_out), theirs.numpy())


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**32 - 1),
    size=st.tuples(st.integers(1, 60), st.integers(1, 60)),
    resized=st.tuples(st.integers(1, 300), st.integers(1, 300)),
)
def test_a_crop_holds_the_resized_mask(seed, size, resized):
    rng = np.random.default_rng(seed)
    mask = rng.random(size) < rng.choice([0.002, 0.05, 0.5])
    full = resized_mask(mask, resized)
    made = mask_crop(mask, resized)
    if not full.any():
        assert made is None
        return
    crop, (left, top, right, bottom) = made[0], made[1].astype(int)
    x1, y1, x2, y2 = mask_extent(full)
    assert (left, top) == (x1, y1)
    assert (right - left, bottom - top) == (max(x2 - x1, MASK_SIDE), max(y2 - y1, MASK_SIDE))
    expected = np.pad(full, ((0, MASK_SIDE), (0, MASK_SIDE)))[top:bottom, left:right]
    centres = (np.arange(MASK_SIDE) + 0.5) / MASK_SIDE
    rows, columns = (np.floor(centres * side).astype(int) for side in expected.shape)
    np.testing.assert_array_equal(crop, expected[rows][:, columns] * np.uint8(255))


def test_extents_by_hand():
    mask = np.zeros((5, 7), bool)
    assert mask_extent(mask) is None
    mask[1, 2] = mask[3, 6] = True
    assert mask_extent(mask) == (2, 1, 7, 4)


def test_aligned_targets_equal_aligned_roi_align():
    rng = np.random.default_rng(3)
    mask = np.zeros((64, 80), bool)
    mask[10:50, 20:60] = rng.random((40, 40)) > 0.4
    crop, frame = mask_crop(mask, mask.shape)
    rois = torch.tensor([[18.0, 8.0, 62.0, 52.0], [25.5, 15.25, 58.0, 47.0], [20.0, 10.0, 60.0, 50.0]])
    found = mask_targets(
        torch.from_numpy(crop)[None, None],
        torch.from_numpy(frame)[None, None],
        rois[None],
        torch.zeros(1, 3, dtype=torch.int64),
        torch.tensor([[64, 80]]),
        28,
        aligned=True,
    )[0]
    full = torch.from_numpy(mask)[None, None].float()
    boxes = torch.cat([torch.zeros(3, 1), rois], dim=1)
    torch.testing.assert_close(found, torchvision.ops.roi_align(full, boxes, 28, aligned=True)[:, 0], rtol=0, atol=1e-4)
    half = torchvision.ops.roi_align(full, boxes, 28, aligned=False)[:, 0]
    assert (found - half).abs().max() > 0.1

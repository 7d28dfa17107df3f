"""Heat maps: where they say that keypoints are, and which cells keypoints are in, as torchvision has it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from torchvision.models.detection.roi_heads import heatmaps_to_keypoints, keypoints_to_heatmap

from maskrcnn.model.roi_heads import WINDOW, cells_from_keypoints, keypoints_from_heatmaps

SIDE = 56


def rois_of(low_px: float, high_px: float, count: int = 12, seed: int = 0) -> torch.Tensor:
    torch.manual_seed(seed)
    corner, size = 200 * torch.rand(count, 2), low_px + (high_px - low_px) * torch.rand(count, 2)
    return torch.cat([corner, corner + size], dim=1)


def peaks(count: int, keypoints: int = 5, width: float = 3.0, seed: int = 1) -> torch.Tensor:
    """Maps with one round peak each, anywhere: `[count, keypoints, SIDE, SIDE]`."""
    torch.manual_seed(seed)
    x, y = (SIDE * torch.rand(2, count, keypoints, 1, 1)).unbind(0)
    cells = torch.arange(SIDE) + 0.5
    return 10 - ((cells - x) ** 2 + (cells[:, None] - y) ** 2) / (2 * width**2)


def both(maps: torch.Tensor, rois: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Our keypoints and torchvision's, `[D, K, 3]`."""
    places, scores = heatmaps_to_keypoints(maps, rois)
    return keypoints_from_heatmaps(maps[None], rois[None])[0], torch.cat([places[..., :2], scores[..., None]], dim=-1)


@pytest.mark.parametrize(("low_px", "high_px"), [(0.0, 3), (1, 60), (50, 130), (100, 500), (400, 1300)])
def test_the_same_pixel_as_torchvisions_for_one_peak(low_px, high_px):
    ours, theirs = both(peaks(12), rois_of(low_px, high_px))
    # Two pixels on either side of a peak may be equal but for rounding.
    same = (ours - theirs)[..., :2].abs().amax(dim=-1) < 1e-3
    assert same.float().mean() > 0.98
    assert (ours - theirs)[..., :2].abs().max() < 1.001
    torch.testing.assert_close(ours[..., 2], theirs[..., 2], rtol=0, atol=1e-4)


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 10_000))
def test_up_to_64_px_every_pixel_is_looked_at(seed):
    torch.manual_seed(seed)
    maps = torch.randn(6, 3, SIDE, SIDE)  # peaks everywhere
    ours, theirs = both(maps, rois_of(0.3, WINDOW - 0.01, 6, seed))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-4)


def test_rough_maps_of_large_rois_differ_only_where_another_peak_is_as_good():
    torch.manual_seed(2)
    maps = F.interpolate(torch.randn(30, 4, 14, 14), scale_factor=4.0, mode="bilinear", align_corners=False)
    ours, theirs = both(maps, rois_of(80, 300, 30))
    same = (ours - theirs)[..., :2].abs().amax(dim=-1) < 1e-3
    assert same.float().mean() > 0.85  # these maps have some thirty peaks each
    assert (theirs - ours)[..., 2].max() < 0.1 * maps.amax()
    assert ((theirs - ours)[..., 2] > -1e-4).all()  # nothing is better than the best pixel of all


def test_rois_beyond_the_window_are_looked_at_more_coarsely():
    maps, rois = peaks(2, keypoints=2), rois_of(2000, 3600, 2)
    ours, theirs = both(maps, rois)
    cells = (rois[:, 2:] - rois[:, :2])[:, None] / SIDE
    assert ((ours - theirs)[..., :2].abs() < 0.06 * cells).all()


def test_a_peak_in_the_middle_of_a_cell_lies_there():
    maps = torch.full((1, 1, 2, SIDE, SIDE), -5.0)
    maps[0, 0, 0, 10, 20] = 3.0
    maps[0, 0, 1, 0, 55] = 2.0  # in a corner
    found = keypoints_from_heatmaps(maps, torch.tensor([[[100.0, 50.0, 156.0, 106.0]]]))  # a pixel for each cell
    torch.testing.assert_close(found[0, 0], torch.tensor([[120.5, 60.5, 3.0], [155.5, 50.5, 2.0]]))


def test_empty_boxes_and_no_boxes():
    found = keypoints_from_heatmaps(torch.randn(1, 2, 3, SIDE, SIDE), torch.tensor([[[5.0, 6, 5, 6], [0, 0, 0, 0]]]))
    torch.testing.assert_close(found[0, 0, :, :2], torch.tensor([5.5, 6.5]).expand(3, 2))
    assert torch.isfinite(found).all()
    assert keypoints_from_heatmaps(torch.randn(2, 0, 3, SIDE, SIDE), torch.zeros(2, 0, 4)).shape == (2, 0, 3, 3)


def test_half_precision_around_it_changes_nothing():
    maps, rois = peaks(4)[None], rois_of(100, 300, 4)[None]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = keypoints_from_heatmaps(maps, rois)
    assert torch.equal(found, keypoints_from_heatmaps(maps, rois))


def test_cells_equal_torchvisions():
    torch.manual_seed(3)
    rois = rois_of(3, 120, 40)
    share = torch.rand(40, 7, 2) * 1.4 - 0.2  # some outside
    places = rois[:, None, :2] + share * (rois[:, 2:] - rois[:, :2])[:, None]
    places[:, 0] = rois[:, 2:]  # the right and bottom edge
    places[:, 1] = rois[:, :2]
    keypoints = torch.cat([places, torch.randint(0, 3, (40, 7, 1))], dim=-1)
    cells, valid = keypoints_to_heatmap(keypoints, rois, SIDE)
    found, is_found = cells_from_keypoints(keypoints, rois, SIDE)
    assert torch.equal(found, cells) and torch.equal(is_found, valid.bool())
    assert 0.2 < is_found.float().mean() < 0.8


def test_cells_by_hand():
    roi = torch.tensor([10.0, 20, 66, 132])  # 56 × 112 px
    keypoints = torch.tensor([[10.0, 20, 2], [11.5, 24.1, 1], [66, 132, 2], [66.1, 132, 2], [9.9, 30, 2], [30, 30, 0]])
    cells, found = cells_from_keypoints(keypoints, roi, SIDE)
    assert found.tolist() == [True, True, True, False, False, False]
    assert cells.tolist() == [0, 2 * SIDE + 1, SIDE * SIDE - 1, 0, 0, 0]


def test_where_a_keypoint_is_learnt_it_is_found_again():
    """The cell of a keypoint, as a map of one peak, gives the keypoint back to half a cell."""
    rois = rois_of(60, 200, 20)
    share = 0.05 + 0.9 * torch.rand(20, 6, 2)  # not in the cells at the edge, whose surface does not fall towards it
    places = rois[:, None, :2] + share * (rois[:, 2:] - rois[:, :2])[:, None]
    cells, found = cells_from_keypoints(torch.cat([places, torch.full((20, 6, 1), 2.0)], -1), rois, SIDE)
    assert found.all()
    maps = 10.0 * F.one_hot(cells, SIDE * SIDE).view(20, 6, SIDE, SIDE)
    again = keypoints_from_heatmaps(maps[None], rois[None])[0]
    cell = ((rois[:, 2:] - rois[:, :2]) / SIDE)[:, None]
    assert ((again[..., :2] - places).abs() <= 0.5 * cell + 0.51).all()

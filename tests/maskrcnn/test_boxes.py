"""Box arithmetic and anchors against torchvision and hand-typed values."""

import pytest
import torch
from torchvision.models.detection._utils import BoxCoder
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import box_iou, clip_boxes_to_image

from maskrcnn.model.boxes import clip_boxes, decode_boxes, encode_boxes, has_min_side, pairwise_iou, take_rows
from maskrcnn.model.rpn import cell_anchors, grid_anchors

WEIGHTS = (10.0, 10.0, 5.0, 5.0)


def random_boxes(count: int, seed: int) -> torch.Tensor:
    rng = torch.Generator().manual_seed(seed)
    corners = torch.rand(count, 2, generator=rng) * 300
    return torch.cat([corners, corners + 1 + torch.rand(count, 2, generator=rng) * 200], dim=1)


def test_decoding_equals_torchvision_extreme_deltas_included():
    references = random_boxes(200, 0)
    deltas = torch.randn(200, 4, generator=torch.Generator().manual_seed(1)) * 20
    theirs = BoxCoder(WEIGHTS).decode_single(deltas, references)
    torch.testing.assert_close(decode_boxes(deltas, references, WEIGHTS), theirs, rtol=1e-5, atol=1e-2)


def test_encoding_equals_torchvision_and_decodes_to_the_box():
    boxes, references = random_boxes(100, 2), random_boxes(100, 3)
    deltas = encode_boxes(boxes, references, WEIGHTS)
    torch.testing.assert_close(deltas, BoxCoder(WEIGHTS).encode_single(boxes, references), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(decode_boxes(deltas, references, WEIGHTS), boxes, rtol=1e-4, atol=1e-3)


def test_clipping_equals_torchvision_image_by_image():
    boxes = random_boxes(60, 4).reshape(2, 30, 4) - 50
    sizes = torch.tensor([[100, 240], [310, 33]])
    ours = clip_boxes(boxes, sizes)
    for n in range(2):
        torch.testing.assert_close(ours[n], clip_boxes_to_image(boxes[n], tuple(sizes[n].tolist())))


def test_iou_equals_torchvision_and_is_zero_for_points():
    first, second = random_boxes(20, 5), random_boxes(30, 6)
    torch.testing.assert_close(pairwise_iou(first, second), box_iou(first, second))
    point = torch.tensor([[5.0, 5.0, 5.0, 5.0]])
    assert pairwise_iou(point, point).item() == 0


def test_smallest_side_decides():
    boxes = torch.tensor([[0, 0, 1, 9.0], [0, 0, 2, 2.0], [3, 3, 3, 3.0]])
    assert has_min_side(boxes, 2.0).tolist() == [False, True, False]
    sides = torch.tensor([[3.0, 3, 3, 9], [3, 3, 9, 3], [9, 3, 3, 9], [3, 3, 3.0001, 3.0001]])
    assert has_min_side(sides, 0).tolist() == [False, False, False, True]


def test_rows_are_taken_per_image():
    values = torch.arange(12).reshape(2, 3, 2)
    index = torch.tensor([[2, 0], [1, 1]])
    assert take_rows(values, index).tolist() == [[[4, 5], [0, 1]], [[8, 9], [8, 9]]]
    assert take_rows(values[..., 0], index).tolist() == [[4, 0], [8, 8]]


@pytest.mark.parametrize("size_hw", [(800, 1088), (96, 64), (320, 416), (32, 32)])
def test_anchors_equal_torchvision_at_every_level(size_hw):
    sizes, ratios = (32, 64, 128, 256, 512), (0.5, 1.0, 2.0)
    images = torch.zeros(1, 3, *size_hw)
    features, height, width = [], *(side // 4 for side in size_hw)
    for level in range(5):
        features.append(torch.zeros(1, 1, height, width))
        # P6 is a max-pool of stride 2 and kernel 1: it rounds up.
        height, width = (height // 2, width // 2) if level < 3 else (-(-height // 2), -(-width // 2))
    theirs = AnchorGenerator(tuple((s,) for s in sizes), (ratios,) * 5)(ImageList(images, [size_hw]), features)[0]
    ours = [
        grid_anchors(cell_anchors(size, ratios), feature, images) for size, feature in zip(sizes, features, strict=True)
    ]
    torch.testing.assert_close(torch.cat(ours), theirs)

"""Views: windows, flips and sizes of pictures, masks and boxes, by hand."""

from pathlib import Path

import numpy as np
import pytest
from pycocotools import mask as mask_api

from maskrcnn.config import AugmentConfig
from maskrcnn.data.records import ImageRecord, Instance
from maskrcnn.imaging.preprocess import Preprocessing, resize_bilinear
from maskrcnn.training.augmentation import Augmentation, objects_of_scene, scene_in_view
from maskrcnn.training.view import View, objects_in_view

SIZE_HW = (40, 60)
# Top 10, left 20, bottom 30, right 50, twice as large, on a canvas with room below and to the right.
ENLARGED = View((10, 20, 30, 50), (40, 60), (64, 70))


def record(*objects: tuple[int, tuple[float, float, float, float], np.ndarray], crowd: int = 0) -> ImageRecord:
    """An image of `SIZE_HW` with objects (label, box, mask)."""
    instances = []
    for number, (label, box, mask) in enumerate(objects, start=1):
        rle = mask_api.encode(np.asfortranarray(mask, dtype=np.uint8))
        segmentation = {"size": list(mask.shape), "counts": rle["counts"].decode()}
        instances.append(Instance(number, label, box, segmentation, label == crowd, float(mask.sum())))
    return ImageRecord(1, Path("none.png"), *SIZE_HW, tuple(instances))


def rectangle(x1: int, y1: int, x2: int, y2: int) -> np.ndarray:
    mask = np.zeros(SIZE_HW, bool)
    mask[y1:y2, x1:x2] = True
    return mask


@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float32, 0), (np.uint8, 1.01)])
def test_a_view_cuts_resizes_and_fills(dtype, tolerance):
    picture = np.random.default_rng(0).integers(0, 256, (*SIZE_HW, 3)).astype(dtype)
    augmentation = Augmentation(AugmentConfig(), Preprocessing(mean=(0.1, 0.2, 0.3)))
    image = augmentation.image(picture, ENLARGED, np.random.default_rng(0))
    assert image.shape == (3, 64, 70) and image.dtype == dtype
    expected = resize_bilinear(picture[10:30, 20:50], (40, 60))
    np.testing.assert_allclose(image[:, :40, :60], expected, rtol=0, atol=tolerance)
    mean = np.array([25.5, 51, 76.5], np.float32)[:, None, None]
    for filled in (image[:, 40:], image[:, :, 60:]):
        np.testing.assert_allclose(filled, np.broadcast_to(mean, filled.shape), rtol=1e-6, atol=tolerance / 2)


@pytest.mark.parametrize(
    ("flips", "expected"),
    [((False, False), [10, 4, 30, 16]), ((True, False), [30, 4, 50, 16]), ((False, True), [10, 24, 30, 36])],
)
def test_masks_and_boxes_take_the_same_way(flips, expected):
    view = View(ENLARGED.window, ENLARGED.size_hw, ENLARGED.canvas_hw, *flips)
    mask = view.mask(rectangle(25, 12, 35, 18))
    x1, y1, x2, y2 = expected
    assert mask.sum() == (x2 - x1) * (y2 - y1) and mask[y1:y2, x1:x2].all()
    assert view.box((25, 12, 35, 18)).tolist() == expected


def test_a_cut_object_gets_the_extent_of_what_is_left_as_its_box():
    whole, cut = rectangle(22, 12, 40, 20), rectangle(40, 12, 60, 20)  # half of the second is in the window
    image = record(
        (1, (21.5, 11.5, 40.5, 20.5), whole), (2, (40, 12, 60, 20), cut), (3, (0, 0, 9, 9), rectangle(0, 0, 9, 9))
    )
    found = objects_in_view(image, ENLARGED, 0.4)
    assert found.labels.tolist() == [1, 2]
    assert found.boxes.tolist() == [[3, 3, 41, 21], [40, 4, 60, 20]]  # the first as annotated
    assert found.frames.tolist() == [[4, 4, 116, 116], [40, 4, 152, 116]]
    assert objects_in_view(image, ENLARGED, 0.6).labels.tolist() == [1]


def test_objects_that_shrink_to_nothing_are_dropped():
    view = View((0, 0, *SIZE_HW), (4, 6), (4, 6))
    small, large = rectangle(1, 1, 6, 6), rectangle(10, 10, 50, 30)
    image = record((1, (1, 1, 6, 6), small), (2, (10, 10, 50, 30), large))
    assert objects_in_view(image, view, 0.0).labels.tolist() == [2]
    # The box alone: a side of 1 pixel in the resized image is enough.
    boxes = [(0, 0, width, 12) for width in (9.9, 10)]
    image = record(*((label, box, rectangle(0, 0, 10, 12)) for label, box in enumerate(boxes, start=1)))
    assert objects_in_view(image, view, 0.0).labels.tolist() == [2]


def test_a_mask_without_pixels_is_no_object():
    view = View((0, 0, *SIZE_HW), SIZE_HW, SIZE_HW)
    assert len(objects_in_view(record((1, (2, 2, 9, 9), np.zeros(SIZE_HW, bool))), view, 0.0)) == 0


def test_crowd_regions_are_no_objects():
    view = View((0, 0, *SIZE_HW), SIZE_HW, SIZE_HW)
    image = record((1, (0, 0, 9, 9), rectangle(0, 0, 9, 9)), (2, (0, 0, 9, 9), rectangle(0, 0, 9, 9)), crowd=2)
    scene = scene_in_view(image, np.zeros((3, *view.canvas_hw), np.float32), view)
    assert objects_in_view(image, view, 0.0).labels.tolist() == scene.labels.tolist() == [1]


@pytest.mark.parametrize("flips", [(False, False), (True, False), (True, True)])
def test_a_scene_has_the_objects_of_its_view(flips):
    rng = np.random.default_rng(3)
    masks = [rectangle(*(5 * rng.integers(0, 3, 2)), *(20 + 5 * rng.integers(0, 4, 2))) for _ in range(6)]
    extents = [
        (m.any(0).argmax(), m.any(1).argmax(), 60 - m.any(0)[::-1].argmax(), 40 - m.any(1)[::-1].argmax())
        for m in masks
    ]
    image = record(*((k + 1, box, mask) for k, (mask, box) in enumerate(zip(masks, extents, strict=True))))
    view = View((5, 10, 35, 50), (60, 80), (60, 90), *flips)
    direct = objects_in_view(image, view, 0.3)
    scene = scene_in_view(image, np.zeros((3, *view.canvas_hw), np.float32), view)
    composed = objects_of_scene(scene, 0.3)
    assert len(direct) > 3
    for name, value in vars(direct).items():
        np.testing.assert_array_equal(value, getattr(composed, name), err_msg=name)

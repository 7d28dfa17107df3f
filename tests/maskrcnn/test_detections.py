"""`Detections` for other tools: outlines, tables, COCO results, drawings."""

import numpy as np
import pytest

from maskrcnn.errors import UserError
from maskrcnn.imaging.postprocess import Detections

SIZE_HW = (40, 60)


def detections(**changes):
    """Two detections: a mask that fills its box, and one that fills its left half."""
    values = np.zeros((2, 28, 28), np.float32)
    values[0] = 1
    values[1, :, :14] = 1
    fields = {
        "boxes_xyxy_px": np.array([[10, 5, 38, 33], [0, 0, 28, 28]], np.float32),
        "scores": np.array([0.9, 0.25], np.float32),
        "labels": np.array([2, 1]),
        "masks": values,
        "size_hw": SIZE_HW,
        "class_names": ("cat", "dog"),
        "category_ids": (17, 18),
    }
    return Detections(**{**fields, **changes})


def test_outlines_enclose_the_masks():
    found = detections()
    for parts, mask in zip(found.polygons(), found.full_masks(), strict=True):
        (ring,) = parts
        assert np.array_equal(ring[0], ring[-1])
        x, y = ring.T
        area = abs(np.sum(x[:-1] * y[1:] - x[1:] * y[:-1])) / 2
        assert area == pytest.approx(mask.sum(), rel=0.03)  # corners of pixels are cut
        rows, columns = np.nonzero(mask)
        assert np.allclose((x.min(), x.max()), (columns.min(), columns.max() + 1), atol=0.5)
        assert np.allclose((y.min(), y.max()), (rows.min(), rows.max() + 1), atol=0.5)


def test_a_mask_of_two_parts_has_two_outlines_and_an_empty_mask_none():
    masks = np.zeros((2, 28, 28), np.float32)
    masks[0, :, :8] = masks[0, :, 20:] = 1
    parts, nothing = detections(masks=masks).polygons()
    assert len(parts) == 2 and nothing == []


def test_coco_results_have_category_ids_and_the_same_masks():
    found = detections()
    first, second = found.to_coco(image_id=7)
    assert (first["image_id"], first["category_id"], second["category_id"]) == (7, 18, 17)
    assert first["bbox"] == [10, 5, 28, 28] and first["score"] == pytest.approx(0.9)
    assert first["segmentation"] == found.rles()[0]
    assert [entry["category_id"] for entry in detections(category_ids=()).to_coco()] == [2, 1]


def test_table_and_supervision():
    found = detections()
    table = found.to_dataframe()
    assert table["class_name"].tolist() == ["dog", "cat"]
    assert table[["x0", "y1"]].to_numpy().tolist() == [[10, 33], [0, 28]]
    assert table["area_px"].tolist() == found.full_masks().sum((1, 2)).tolist()
    other = found.to_supervision()
    assert other.class_id.tolist() == [1, 0] and other.data["class_name"].tolist() == ["dog", "cat"]
    assert np.array_equal(other.mask, found.full_masks()) and np.array_equal(other.xyxy, found.boxes_xyxy_px)


def test_drawing_leaves_out_low_scores():
    image = np.zeros((*SIZE_HW, 3), np.uint8)
    drawn = np.asarray(detections().draw(image))
    scale = drawn.shape[0] // SIZE_HW[0]
    assert drawn[30 * scale, 30 * scale].any()  # in the confident mask
    assert not drawn[20 * scale, 3 * scale].any()  # in the other mask alone
    assert np.asarray(detections().draw(image, min_score=0))[20 * scale, 3 * scale].any()


def test_without_masks():
    found = detections(masks=None)
    assert "segmentation" not in found.to_coco()[0] and "area_px" not in found.to_dataframe()
    assert found.to_supervision().mask is None
    with pytest.raises(UserError, match="without masks"):
        found.polygons()

"""Postprocessing against torchvision's pasting and pycocotools' own encoder."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as mask_api
from torchvision.models.detection.roi_heads import paste_masks_in_image
from torchvision.models.detection.transform import resize_boxes

from maskrcnn.errors import UserError
from maskrcnn.imaging.postprocess import Detections, coco_results, paste_mask, unpack

PROBABILITY = 1e-5  # agreement wanted of pasted probabilities


def torchvision_pasted(masks: np.ndarray, boxes: np.ndarray, size_hw: tuple[int, int]) -> np.ndarray:
    """torchvision's masks in the whole image, `[D, H, W]`."""
    pasted = paste_masks_in_image(torch.from_numpy(masks)[:, None], torch.from_numpy(boxes), size_hw)
    return pasted[:, 0].numpy()


def pasted(mask: np.ndarray, box: np.ndarray, size_hw: tuple[int, int]) -> np.ndarray:
    """Our mask in the whole image, `[H, W]`."""
    window, y0, x0 = paste_mask(mask, box, size_hw)
    assert window.dtype == np.float32
    full = np.zeros(size_hw, np.float32)
    full[y0 : y0 + window.shape[0], x0 : x0 + window.shape[1]] = window
    return full


def made_detections(seed: int, number: int, size_hw: tuple[int, int]) -> Detections:
    """Detections whose boxes lie in the image, as those of a detector do."""
    rng = np.random.default_rng(seed)
    corners = rng.uniform(0, 1, (number, 2, 2)) * (size_hw[1], size_hw[0])
    return Detections(
        boxes_xyxy_px=np.sort(corners, axis=1).reshape(number, 4).astype(np.float32),
        scores=np.sort(rng.random(number, np.float32))[::-1],
        labels=rng.integers(1, 4, number),
        masks=rng.random((number, 28, 28), np.float32),
        size_hw=size_hw,
    )


@settings(deadline=None, max_examples=200)
@given(
    seed=st.integers(0, 2**32 - 1),
    size_hw=st.tuples(st.integers(1, 120), st.integers(1, 120)),
    mask_size=st.sampled_from([1, 7, 28]),
    corner=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    far_corner=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    overhang_px=st.floats(0, 60),
)
def test_paste_equals_torchvision(seed, size_hw, mask_size, corner, far_corner, overhang_px):
    # The box begins and ends anywhere in a frame that reaches beyond the image; it is kept to boxes of
    # which some part is inside, because torchvision cannot paste the others.
    height, width = size_hw
    xs = sorted(value * (width + 2 * overhang_px) - overhang_px for value in (corner[0], far_corner[0]))
    ys = sorted(value * (height + 2 * overhang_px) - overhang_px for value in (corner[1], far_corner[1]))
    box = np.array([xs[0], ys[0], xs[1], ys[1]], np.float32)
    if not (xs[0] < width - 1 and ys[0] < height - 1 and xs[1] > 0 and ys[1] > 0):
        return
    mask = np.random.default_rng(seed).random((mask_size, mask_size), np.float32)
    expected = torchvision_pasted(mask[None], box[None], size_hw)[0]
    np.testing.assert_allclose(pasted(mask, box, size_hw), expected, rtol=0, atol=PROBABILITY)


@pytest.mark.parametrize(
    "box",
    [
        [10, 10, 10, 10],  # no extent
        [10, 10, 11, 11],  # one pixel
        [10.4, 10.6, 10.9, 11.2],
        [0, 0, 1, 1],
        [63, 47, 64, 48],  # the last pixel
        [0, 0, 64, 48],  # the whole image
        [5, 0, 6, 48],  # one column
        [-30, -20, 5, 6],  # partly outside
        [-100, -100, 200, 200],  # around the image
        [50.5, 40.5, 90, 90],
    ],
)
def test_paste_equals_torchvision_for_peculiar_boxes(box):
    mask = np.random.default_rng(0).random((28, 28), np.float32)
    box = np.array(box, np.float32)
    expected = torchvision_pasted(mask[None], box[None], (48, 64))[0]
    np.testing.assert_allclose(pasted(mask, box, (48, 64)), expected, rtol=0, atol=PROBABILITY)


@pytest.mark.parametrize("box", [[-50, 5, -20, 15], [70, 5, 90, 15], [5, -40, 15, -9], [5, 60, 15, 99]])
def test_paste_outside_the_image_gives_an_empty_window(box):
    window, y0, x0 = paste_mask(np.ones((28, 28), np.float32), np.array(box, np.float32), (48, 64))
    assert window.shape == (0, 0) and (y0, x0) == (0, 0)


def test_paste_of_a_vast_box_computes_only_the_image():
    box = np.array([-1e6, -1e6, 1e6, 1e6], np.float32)  # pasted as torchvision does: 16 TB
    window, y0, x0 = paste_mask(np.ones((28, 28), np.float32), box, (48, 64))
    assert window.shape == (48, 64) and (y0, x0) == (0, 0)
    np.testing.assert_allclose(window, 1)


def test_full_masks_equal_torchvision():
    made = made_detections(2, 12, (90, 130))
    expected = torchvision_pasted(made.masks, made.boxes_xyxy_px, made.size_hw)
    for threshold in (0.5, 0.3):
        full = made.full_masks(threshold)
        assert full.dtype == bool and full.shape == (12, 90, 130)
        differing = full != (expected > threshold)
        assert np.abs(expected[differing] - threshold).max(initial=0) < PROBABILITY


@settings(deadline=None, max_examples=150)
@given(
    seed=st.integers(0, 2**32 - 1),
    size_hw=st.tuples(st.integers(1, 70), st.integers(1, 70)),
    level=st.sampled_from([0.0, 0.2, 0.5, 0.8, 1.0]),
)
def test_run_lengths_equal_pycocotools(seed, size_hw, level):
    made = made_detections(seed, 3, size_hw)
    for rle, mask in zip(made.rles(level), made.full_masks(level), strict=True):
        expected = mask_api.encode(np.asfortranarray(mask, np.uint8))
        assert rle == {"size": list(size_hw), "counts": expected["counts"].decode()}


def test_no_detections():
    outputs = {
        "num_detections": np.zeros(1, np.int32),
        "boxes": np.zeros((1, 5, 4), np.float32),
        "scores": np.zeros((1, 5), np.float32),
        "labels": np.zeros((1, 5), np.int64),
        "masks": np.zeros((1, 5, 28, 28), np.float32),
    }
    (made,) = unpack(outputs, np.array([[32, 32]]), [(48, 64)])
    assert len(made) == 0 and made.boxes_xyxy_px.shape == (0, 4) and made.masks.shape == (0, 28, 28)
    assert made.full_masks().shape == (0, 48, 64) and made.rles() == []
    assert coco_results(made, 1, [1], with_masks=True) == []


@settings(deadline=None, max_examples=50)
@given(
    seed=st.integers(0, 2**32 - 1),
    resized_hw=st.tuples(st.integers(1, 1400), st.integers(1, 1400)),
    original_hw=st.tuples(st.integers(1, 4000), st.integers(1, 4000)),
)
def test_unpack_scales_boxes_as_torchvision(seed, resized_hw, original_hw):
    boxes = np.random.default_rng(seed).uniform(0, 1400, (1, 6, 4)).astype(np.float32)
    outputs = {
        "num_detections": np.array([4], np.int32),
        "boxes": boxes,
        "scores": np.zeros((1, 6), np.float32),
        "labels": np.ones((1, 6), np.int64),
    }
    (made,) = unpack(outputs, np.array([resized_hw]), [original_hw])
    expected = resize_boxes(torch.from_numpy(boxes[0, :4]), resized_hw, original_hw).numpy()
    np.testing.assert_array_equal(made.boxes_xyxy_px, expected)
    assert made.masks is None and made.size_hw == original_hw


def test_unpack_keeps_the_images_apart():
    outputs = {
        "num_detections": np.array([2, 0, 1], np.int32),
        "boxes": np.ones((3, 2, 4), np.float32),
        "scores": np.array([[0.9, 0.8], [0, 0], [0.7, 0]], np.float32),
        "labels": np.array([[1, 2], [0, 0], [3, 0]], np.int64),
        "masks": np.ones((3, 2, 28, 28), np.float16),
    }
    made = unpack(outputs, np.full((3, 2), 10), [(10, 10), (20, 10), (10, 30)])
    assert [one.labels.tolist() for one in made] == [[1, 2], [], [3]]
    assert made[2].boxes_xyxy_px.tolist() == [[3, 1, 3, 1]]
    assert made[0].masks.dtype == np.float32 and made[0].labels.dtype == np.int64


def test_unpack_scales_keypoints_with_their_boxes_and_leaves_the_score():
    outputs = {
        "num_detections": np.array([1, 2], np.int32),
        "boxes": np.array([[[10, 20, 30, 60], [0, 0, 0, 0]]] * 2, np.float32),
        "scores": np.zeros((2, 2), np.float32),
        "labels": np.ones((2, 2), np.int64),
        "keypoints": np.array([[[[10, 60, 4.5], [20, 20, -1]], [[1, 2, 3], [0, 0, 0]]]] * 2, np.float32),
    }
    one, two = unpack(outputs, np.array([[100, 100], [50, 100]]), [(200, 300), (50, 25)])
    assert one.has_keypoints and one.boxes_xyxy_px.tolist() == [[30, 40, 90, 120]]
    assert one.keypoints.tolist() == [[[30, 120, 4.5], [60, 40, -1]]] and one.keypoints.dtype == np.float32
    assert two.keypoints.tolist() == [[[2.5, 60, 4.5], [5, 20, -1]], [[0.25, 2, 3], [0, 0, 0]]]
    kept = replace(one, scores=np.array([0.2])).above(0.5)
    assert kept.keypoints.shape == (0, 2, 3) and not replace(kept, keypoints=None).above(0.5).has_keypoints


def test_coco_results_of_keypoints():
    made = Detections(
        np.array([[0, 0, 9, 9]], np.float32),
        np.array([0.5], np.float32),
        np.array([1]),
        None,
        (20, 20),
        keypoints=np.array([[[1.5, 2.25, 7], [3, 4, -0.5]]], np.float32),
    )
    (result,) = coco_results(made, 3, [8], with_masks=False)
    assert result["keypoints"] == [1.5, 2.25, 1, 3, 4, 1] and result["keypoint_scores"] == [7, -0.5]
    assert set(result) == {"image_id", "category_id", "bbox", "score", "keypoints", "keypoint_scores"}


def test_above_keeps_the_confident():
    made = made_detections(6, 9, (60, 80))
    threshold = float(made.scores[3])
    kept = made.above(threshold)
    assert len(kept) == 4 and kept.size_hw == made.size_hw
    np.testing.assert_array_equal(kept.full_masks(), made.full_masks()[:4])
    boxes_only = Detections(made.boxes_xyxy_px, made.scores, made.labels, None, made.size_hw)
    assert len(boxes_only.above(2.0)) == 0 and boxes_only.above(2.0).masks is None


def test_unpack_refuses_sizes_of_other_images():
    outputs = {"num_detections": np.zeros(2, np.int32), "boxes": np.zeros((2, 1, 4), np.float32)}
    with pytest.raises(UserError, match="2 num_detections, 2 boxes, 2 image_sizes, 1 original_sizes"):
        unpack(outputs, np.ones((2, 2)), [(5, 5)])


def test_coco_results_are_what_pycocotools_reads():
    made = made_detections(3, 5, (60, 80))
    results = coco_results(made, 17, [10, 20, 30], with_masks=True)
    assert len(results) == 5
    for result, box, score, label, mask in zip(
        results, made.boxes_xyxy_px, made.scores, made.labels, made.full_masks(), strict=True
    ):
        assert set(result) == {"image_id", "category_id", "bbox", "score", "segmentation"}
        assert result["image_id"] == 17 and result["category_id"] == 10 * label
        assert result["score"] == pytest.approx(score)
        x, y, width, height = result["bbox"]
        np.testing.assert_allclose([x, y, x + width, y + height], box, atol=1e-5)
        np.testing.assert_array_equal(mask_api.decode(result["segmentation"]), mask)


def test_coco_results_without_masks_need_none():
    made = made_detections(4, 2, (60, 80))
    boxes_only = Detections(made.boxes_xyxy_px, made.scores, made.labels, None, made.size_hw)
    assert "segmentation" not in coco_results(boxes_only, 1, [1, 2, 3], with_masks=False)[0]
    with pytest.raises(UserError, match="detections without masks"):
        coco_results(boxes_only, 1, [1, 2, 3], with_masks=True)


@pytest.mark.parametrize("label", [0, 4])
def test_coco_results_refuse_labels_without_a_category(label):
    made = Detections(np.zeros((1, 4), np.float32), np.ones(1), np.array([label]), None, (5, 5))
    with pytest.raises(UserError, match=rf"label\(s\) {label}\n  expected: labels from 1 to 3"):
        coco_results(made, 1, [1, 2, 3], with_masks=False)

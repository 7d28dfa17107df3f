"""Run lengths made without pixels against those of pasted pixels, and COCO's strings against pycocotools."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as mask_api

from maskrcnn.imaging import paste
from maskrcnn.imaging.paste import paste_mask, pasted_runs
from maskrcnn.imaging.run_lengths import Runs, runs_from_strings, strings_from_runs


def strings_of_pixels(masks, boxes, size_hw, threshold) -> list[str]:
    """COCO's strings of whole images, pasted and encoded one by one."""
    strings = []
    for mask, box in zip(masks, boxes, strict=True):
        window, y0, x0 = paste_mask(mask, box, size_hw)
        full = np.zeros(size_hw, np.uint8, order="F")
        full[y0 : y0 + window.shape[0], x0 : x0 + window.shape[1]] = window > np.float32(threshold)
        strings.append(mask_api.encode(full)["counts"].decode())
    return strings


def made_masks(rng, count: int, size: int, threshold: float, kind: str) -> np.ndarray:
    """Masks whose values lie anywhere, at the threshold, or a rounding away from it."""
    if kind == "noise":
        return rng.random((count, size, size), np.float32)
    if kind == "smooth":
        return np.cumsum(np.cumsum(rng.random((count, size, size), np.float32) - 0.5, 1), 2) % 1
    if kind == "binary":
        return rng.integers(0, 2, (count, size, size)).astype(np.float32)
    steps = rng.integers(-3, 4, (count, size, size)) * np.spacing(np.float32(max(threshold, 1e-6)))
    return (np.float32(threshold) + steps).astype(np.float32).clip(0, 1)


@settings(deadline=None, max_examples=300)
@given(
    seed=st.integers(0, 2**32 - 1),
    size_hw=st.tuples(st.integers(1, 130), st.integers(1, 130)),
    mask_size=st.sampled_from([1, 2, 7, 28]),
    threshold=st.sampled_from([0.0, 0.1, 0.3, 0.5, 0.9, 1.0]),
    kind=st.sampled_from(["noise", "smooth", "binary", "at the threshold"]),
    overhang=st.sampled_from([0.0, 0.2, 3.0]),
)
def test_runs_equal_those_of_the_pixels(seed, size_hw, mask_size, threshold, kind, overhang):
    rng = np.random.default_rng(seed)
    corners = (rng.random((5, 2, 2)) * (1 + 2 * overhang) - overhang) * (size_hw[1], size_hw[0])
    boxes = np.sort(corners, axis=1).reshape(5, 4).astype(np.float32)
    masks = made_masks(rng, 5, mask_size, threshold, kind)
    found = strings_from_runs(pasted_runs(masks, boxes, size_hw, threshold))
    assert found == strings_of_pixels(masks, boxes, size_hw, threshold)


def test_runs_of_large_images_equal_those_of_the_pixels():
    rng = np.random.default_rng(5)
    boxes = np.sort(rng.random((6, 2, 2)) * (1900, 1100), axis=1).reshape(6, 4).astype(np.float32)
    for kind in ("smooth", "noise"):
        masks = made_masks(rng, 6, 28, 0.5, kind)
        found = strings_from_runs(pasted_runs(masks, boxes, (1080, 1920), 0.5))
        assert found == strings_of_pixels(masks, boxes, (1080, 1920), 0.5)


def test_portions_change_nothing(monkeypatch):
    rng = np.random.default_rng(6)
    boxes = np.sort(rng.random((9, 2, 2)) * 100, axis=1).reshape(9, 4).astype(np.float32)
    masks = rng.random((9, 28, 28), np.float32)
    whole = pasted_runs(masks, boxes, (100, 100), 0.5)
    monkeypatch.setattr(paste, "MAX_COLUMNS", 60)
    parts = pasted_runs(masks, boxes, (100, 100), 0.5)
    np.testing.assert_array_equal(parts.runs, whole.runs)
    np.testing.assert_array_equal(parts.lengths, whole.lengths)


@pytest.mark.parametrize("box", [[np.nan] * 4, [-50, 5, -20, 15], [1e9, 1e9, 2e9, 2e9], [20, 20, 10, 10]])
@pytest.mark.filterwarnings("ignore:invalid value encountered in cast")
def test_a_box_that_does_not_touch_the_image_has_no_pixels(box):
    found = pasted_runs(np.ones((1, 28, 28), np.float32), np.array([box], np.float32), (48, 64), 0.5)
    assert found.runs.tolist() == [48 * 64]


def test_no_masks_give_no_runs():
    found = pasted_runs(np.zeros((0, 28, 28), np.float32), np.zeros((0, 4), np.float32), (48, 64), 0.5)
    assert found.lengths.shape == (0,) and strings_from_runs(found) == []


# Strings

RUN_LISTS = st.lists(st.lists(st.integers(0, 2**20), min_size=1, max_size=12), min_size=0, max_size=6)


@settings(deadline=None, max_examples=200)
@given(lists=RUN_LISTS)
def test_strings_equal_pycocotools_and_are_read_back(lists):
    masks = Runs(np.array([run for runs in lists for run in runs], np.int64), np.array([len(r) for r in lists], int))
    expected = [mask_api.frPyObjects({"size": [sum(r), 1], "counts": r}, sum(r), 1)["counts"].decode() for r in lists]
    strings = strings_from_runs(masks)
    assert strings == expected
    back, good = runs_from_strings(strings)
    assert good.all()
    np.testing.assert_array_equal(back.runs, masks.runs)
    np.testing.assert_array_equal(back.lengths, masks.lengths)
    areas = mask_api.area([{"size": [sum(r), 1], "counts": s} for r, s in zip(lists, strings, strict=True)])
    assert back.sums()[0].tolist() == list(areas)
    assert back.sums()[1].tolist() == [sum(r) for r in lists]


def test_malformed_strings_are_told_from_the_others():
    fine = strings_from_runs(Runs(np.array([3, 4, 5, 900, 2]), np.array([5])))[0]
    strings = [fine, "", "\x01", fine[:-1] + "P", "ä", "\ud800", fine, "o" * 9 + "0", b"35"]
    runs, good = runs_from_strings(strings)
    assert good.tolist() == [True, False, False, False, False, False, True, False, True]
    assert runs.lengths.tolist() == [5, 0, 0, 0, 0, 0, 5, 0, 2]
    assert runs.runs.tolist() == [3, 4, 5, 900, 2] * 2 + [3, 5]


def test_negative_runs_are_given_as_they_are():
    runs, good = runs_from_strings(["36O"])  # 3, 6, −1
    assert good.all() and runs.runs.tolist() == [3, 6, -1]


def test_runs_of_very_large_images_equal_pycocotools():
    runs = [5, 2**30, 7, 2**30 + 3, 2**29, 1, 2**31 - 9, 40, 2]
    expected = mask_api.frPyObjects({"size": [65536, 65535], "counts": runs}, 65536, 65535)["counts"].decode()
    assert strings_from_runs(Runs(np.array(runs), np.array([9]))) == [expected]
    back, good = runs_from_strings([expected])
    assert good.all() and back.runs.tolist() == runs

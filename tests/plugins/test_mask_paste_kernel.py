"""The mask pasting kernel against pixels by hand, the package's NumPy pasting, torchvision and pycocotools.

`maskrcnn.imaging.paste.paste_mask` is the reference; mask pasting is not an op of the graph.
"""

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from kernels_on_cpu import ORDERS, thread_order
from paste_cases import PasteCase, boxes_of, check, paste_cases
from torchvision.models.detection.roi_heads import paste_masks_in_image

# A mask of 2 x 2 pixels has 4 x 4 with its border of zeros, and a box of 3.5 px grows to 8, two pixels for each.
# Linear interpolation of 0, 1, 1, 0 gives 0, 1/4, 3/4, 1, 1, 3/4, 1/4, 0, and of 0, 1, 0, 0 gives 0, 1/4, 3/4, 3/4,
# 1/4, 0, 0, 0; a pixel is the product of the values of its row and column.
FULL, UPPER, CORNER = [[1, 1], [1, 1]], [[1, 1], [0, 0]], [[0, 1], [0, 0]]
BOX = np.float32([1.75, 1.75, 5.25, 5.25])


@pytest.mark.parametrize("by_columns", [False, True])
@pytest.mark.parametrize("by", [(0, 0), (3, 1), (-2, 0), (0, -3), (-4, -4), (30, 0), (0, 30), (29, 31)])
@pytest.mark.parametrize(
    ("mask", "threshold", "rows"),
    [
        (FULL, 0.5, "........ ........ ..####.. ..####.. ..####.. ..####.. ........ ........"),
        # The corners equal the threshold.
        (FULL, 9 / 16, "........ ........ ...##... ..####.. ..####.. ...##... ........ ........"),
        (FULL, 0.75, "........ ........ ........ ...##... ...##... ........ ........ ........"),
        (FULL, 0.2, "........ ...##... ..####.. .######. .######. ..####.. ...##... ........"),
        (FULL, 0.0, "........ .######. .######. .######. .######. .######. .######. ........"),
        (FULL, 1.0, "........ ........ ........ ........ ........ ........ ........ ........"),
        (UPPER, 0.5, "........ ........ ..####.. ..####.. ........ ........ ........ ........"),
        (CORNER, 0.5, "........ ........ ....##.. ....##.. ........ ........ ........ ........"),
        (CORNER, 0.15, "........ ....##.. ...####. ...####. ....##.. ........ ........ ........"),
    ],
    ids=[str(number) for number in range(9)],
)
def test_by_hand(any_device, mask, threshold, rows, by, by_columns):
    right, down = by
    boxes = (BOX + np.float32([right, down, right, down]))[None]
    pixels = PasteCase(np.float32([mask]), boxes, (34, 35), threshold, by_columns).pixels(any_device)[0]
    wanted = np.zeros((34, 35), bool)
    for row, line in enumerate(rows.split()):
        for column, sign in enumerate(line):
            if 0 <= row + down < 34 and 0 <= column + right < 35:
                wanted[row + down, column + right] = sign == "#"
    np.testing.assert_array_equal(pixels, wanted)


@settings(max_examples=200, deadline=None)
@given(case=paste_cases())
def test_it_equals_numpy_pasting(device, case):
    check(case, case.pixels(device))


@settings(max_examples=100, deadline=None)
@given(case=paste_cases())
def test_it_equals_torchvision(device, case):
    height, width = case.size_hw
    x1, y1, x2, y2 = case.boxes.T
    # torchvision needs boxes that reach into the image, and memory for the whole box.
    fitting = (x1 < width - 1) & (y1 < height - 1) & (x2 > 0) & (y2 > 0) & (x2 >= x1) & (y2 >= y1)
    fitting &= np.maximum(x2 - x1, y2 - y1) < 2000
    assume(fitting.any())
    case = PasteCase(case.masks[fitting], case.boxes[fitting], case.size_hw, case.threshold, case.by_columns)
    masks = torch.from_numpy(case.masks.astype(np.float32))[:, None]
    probabilities = paste_masks_in_image(masks, torch.from_numpy(case.boxes), case.size_hw)[:, 0].numpy()
    check(case, case.pixels(device), probabilities)


@settings(max_examples=100, deadline=None)
@given(
    box=st.tuples(*(4 * [st.floats(width=32) | st.floats(-50, 90, width=32)])),
    mask_size=st.sampled_from([1, 28, 31]),
    by_columns=st.booleans(),
)
def test_any_four_numbers_are_a_box(device, box, mask_size, by_columns):
    masks = np.random.default_rng(0).random((1, mask_size, mask_size), np.float32)
    case = PasteCase(masks, np.float32([box]), (40, 50), 0.5, by_columns)
    pixels = case.pixels(device)
    with np.errstate(invalid="ignore"):
        low, high = case.boxes.astype(np.float64).reshape(2, 2)
        reach = np.abs(low + high) / 2 + np.abs(high - low) * (mask_size + 2) / mask_size / 2
    if not (reach < 1.1e9).all():  # NaN, or too many pixels
        assert not pixels.any()
    elif (reach < 1e8).all():
        check(case, pixels)


@pytest.mark.parametrize("size_hw", [(1, 1), (1, 70), (70, 1), (3, 1025), (1025, 3), (257, 33)])
@pytest.mark.parametrize("by_columns", [False, True])
@pytest.mark.parametrize("mask_size", [1, 28, 47])
def test_images_of_every_shape(device, size_hw, by_columns, mask_size):
    rng = np.random.default_rng(size_hw[0] + mask_size)
    masks = rng.random((5, mask_size, mask_size), np.float32)
    boxes = boxes_of(rng, ["inside", "across", "around", "exact", "pixel"], size_hw)
    case = PasteCase(masks, boxes, size_hw, 0.5, by_columns)
    check(case, case.pixels(device))


@pytest.mark.parametrize(("count", "size_hw"), [(0, (5, 5)), (2, (0, 5)), (2, (5, 0)), (0, (0, 0))])
@pytest.mark.parametrize("by_columns", [False, True])
def test_empty_inputs_give_empty_results(any_device, count, size_hw, by_columns):
    case = PasteCase(np.ones((count, 28, 28), np.float32), np.zeros((count, 4), np.float32), size_hw, 0.5, by_columns)
    assert case.pixels(any_device).shape == (count, *size_hw)


def test_nan_sets_no_pixel(device):
    masks = np.full((1, 28, 28), np.nan, np.float32)
    masks[0, :, 14:] = 1
    pixels = PasteCase(masks, np.float32([[0, 0, 56, 56]]), (56, 56), 0.5, False).pixels(device)[0]
    assert not pixels[:, :27].any() and pixels[:, 30:].any()


@settings(max_examples=60, deadline=None)
@given(case=paste_cases())
def test_the_order_of_threads_has_no_effect(cpu, case):
    found = set()
    for order in ORDERS:
        with thread_order(order):
            found.add(case.pixels(cpu).tobytes())
    assert len(found) == 1


@pytest.mark.parametrize(
    "arguments",
    [
        {"num_masks": -1},
        {"mask_size": 0},
        {"mask_size": 32768},
        {"dtype": "bfloat16"},
        {"size_hw": (-1, 4)},
        {"size_hw": (4, -1)},
        {"size_hw": ((1 << 24) + 1, 4)},
        {"size_hw": (4, (1 << 24) + 1)},
    ],
)
def test_invalid_arguments_are_errors_and_nothing_is_written(any_device, arguments):
    masks, boxes, bits = np.ones((1, 2, 2), np.float32), np.ones((1, 4), np.float32), np.full(8, 7, np.uint32)
    given_ = {"num_masks": 1, "mask_size": 2, "dtype": "float32", "size_hw": (4, 4), **arguments}
    with pytest.raises(ValueError, match=r"kernels\.h"):
        any_device.kernels.paste_masks(masks.ctypes.data, boxes.ctypes.data, bits.ctypes.data, **given_)
    assert (bits == 7).all()

"""The NMS kernels against tables by hand, the reference, torchvision, ONNX Runtime and the torch op: equal indices.

Two further builds have such small blocks that a few hundred boxes take the code paths of many thousands: several
chunks, and more kept boxes than shared memory holds.
"""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from kernel_calls import Device, nms
from kernels_on_cpu import ORDERS, build, thread_order
from nms_cases import NmsCase, boxes_of, check, nms_cases

from maskrcnn.plugins import reference
from maskrcnn.plugins.native import Kernels

SMALL = ((64, 3), (192, 40))  # threads per block, and kept boxes in shared memory


@pytest.fixture(scope="module")
def small(kernels_for_cpu, tmp_path_factory) -> list[Device]:
    """Kernels with the block sizes of SMALL."""
    devices = []
    for threads, held in SMALL:
        macros = {"MASKRCNN_NMS_THREADS": threads, "MASKRCNN_NMS_KEPT": held}
        folder, source = tmp_path_factory.mktemp("nms"), ["batched_nms/launch.cu"]
        devices.append(Device(Kernels(build(folder, sources=source, beside=kernels_for_cpu, **macros))))
    return devices


def kept_rows(
    device: Device, boxes: list, *, groups: list | None = None, threshold: float = 0.5, most: int = 9
) -> list:
    """Kept rows of one image."""
    count = len(boxes)
    found = nms(
        device,
        np.float32(boxes).reshape(1, count, 4),
        np.int32(groups or [0] * count).reshape(1, count),
        np.int32([count]),
        iou_threshold=threshold,
        max_output=most,
    )
    assert not found[0][0, found[1][0] :].any()
    return found[0][0, : found[1][0]].tolist()


TEN = (0, 0, 10, 10)
HALF = (0, 0, 10, 5)  # IoU with TEN: 0.5
UPPER = (0, 0, 10, 6)  # 0.6
BESIDE = (10, 0, 20, 10)  # touches TEN


@pytest.mark.parametrize(
    ("boxes", "options", "kept"),
    [
        ([], {}, []),
        ([TEN], {}, [0]),
        ([TEN, TEN, TEN], {}, [0]),  # the first of equal boxes
        ([TEN, HALF], {}, [0, 1]),  # IoU equal to the threshold: both are kept
        ([TEN, UPPER], {}, [0]),
        ([UPPER, TEN], {}, [0]),
        ([TEN, UPPER], {"threshold": 0.6}, [0, 1]),  # 0.6 in float32 equals the quotient
        ([TEN, HALF, UPPER], {"threshold": 0.3}, [0]),
        ([TEN, BESIDE], {"threshold": 0.0}, [0, 1]),
        ([TEN, (9, 9, 20, 20)], {"threshold": 0.0}, [0]),
        ([TEN, TEN], {"threshold": 1.0}, [0, 1]),
        ([TEN, TEN], {"threshold": 2.0}, [0, 1]),
        ([TEN, BESIDE], {"threshold": -0.5}, [0]),  # IoU 0 is greater
        ([TEN, UPPER, TEN], {"groups": [0, 1, 0]}, [0, 1]),
        ([TEN, TEN, TEN], {"groups": [-1, 2**31 - 1, -(2**31)]}, [0, 1, 2]),
        # Suppressed boxes do not suppress: 0 suppresses 1, so 2, which overlaps only 1, is kept.
        ([(0, 0, 10, 1), (3, 0, 13, 1), (6, 0, 16, 1)], {"threshold": 0.4}, [0, 2]),
        ([TEN, BESIDE, TEN, (30, 0, 40, 10)], {"most": 2}, [0, 1]),
        ([TEN, BESIDE], {"most": 0}, []),
        ([(5, 5, 5, 5), (5, 5, 5, 5)], {}, [0, 1]),  # 0 / 0 is NaN and not greater
        ([(5, 5, 5, 9), TEN, (5, 5, 5, 9)], {"threshold": 0.0}, [0, 1, 2]),
        ([(9, 9, 1, 1), TEN, TEN], {}, [0, 1]),
        ([TEN, (0, 0, math.nan, 10), (0, 0, math.nan, 10), TEN], {}, [0, 1, 2]),
        ([(0, 0, math.inf, math.inf), TEN, (0, 0, math.inf, math.inf)], {}, [0, 1, 2]),
        ([(0, 0, 1e-22, 1e-22), (0, 0, 1e-22, 1e-22)], {}, [0]),  # subnormal areas
        ([(0, 0, 1e-23, 1e-23), (0, 0, 1e-23, 1e-23)], {}, [0, 1]),  # areas of 0
    ],
)
def test_by_hand(any_device, small, boxes, options, kept):
    assert [kept_rows(kernels, boxes, **options) for kernels in (any_device, *small)] == 3 * [kept]


@settings(max_examples=60, deadline=None)
@given(case=nms_cases())
def test_it_equals_torchvision(device, case):
    check(case, case.kept(device))


@settings(max_examples=200, deadline=None)
@given(case=nms_cases())
def test_small_blocks_equal_torchvision(small, case):
    for kernels in small:
        check(case, case.kept(kernels))


@settings(max_examples=250, deadline=None)
@given(case=nms_cases(max_boxes=70))
def test_small_blocks_equal_the_reference(small, case):
    with np.errstate(all="ignore"):
        indices, num = reference.batched_nms(
            case.boxes, case.groups, case.counts, iou_threshold=case.iou_threshold, max_output=case.max_output
        )
    for kernels in small:
        found = case.kept(kernels)
        np.testing.assert_array_equal(found[1], num)
        np.testing.assert_array_equal(found[0], indices)


@pytest.mark.parametrize("pattern", ["scattered", "chain", "apart", "equal", "crowded"])
@pytest.mark.parametrize("groups", [1, 5])
def test_several_chunks_of_a_real_block(device, pattern, groups):
    # 5000 boxes are several chunks of 1024 threads, and more kept boxes than shared memory holds.
    rng = np.random.default_rng(1)
    boxes = boxes_of(rng, pattern, 5000)
    ids = rng.integers(0, groups, (1, 5000)).astype(np.int32)
    for most in (5000, 1000):
        case = NmsCase(boxes[None], ids, np.int32([4990]), 0.5, most)
        check(case, case.kept(device))


def test_every_other_box_of_a_chain_is_kept(device, small):
    # Tiles, batches and chunks end within the chain.
    count = 500
    boxes = np.float32(
        [(k * 4, 0, k * 4 + 10, 1) for k in range(count)]
    )  # IoU of neighbours 6 / 14, of every other box 2 / 18
    case = NmsCase(boxes[None], np.zeros((1, count), np.int32), np.int32([count]), 0.4, count)
    for kernels in (device, *small):
        indices, num = case.kept(kernels)
        assert indices[0, : num[0]].tolist() == list(range(0, count, 2))


@pytest.mark.parametrize("more", [-1, 0, 1, 2, 3])
def test_more_kept_boxes_than_shared_memory_holds(small, more):
    # Different boxes, copies of the first up to the end of the batch, and all of them again in the next batch.
    for kernels, (threads, held) in zip(small, SMALL, strict=True):
        kept = list(range(held + more))
        corners = 20 * np.float32(kept + [0] * (threads - len(kept)) + kept)
        boxes = np.stack([corners, 0 * corners, corners + 10, 0 * corners + 10], axis=1)
        assert kept_rows(kernels, list(boxes), most=99) == kept


@settings(max_examples=60, deadline=None)
@given(case=nms_cases(max_boxes=300))
def test_the_order_of_threads_has_no_effect(small, case):
    for kernels in small:
        found = set()
        for order in ORDERS:
            with thread_order(order):
                found.add(tuple(part.tobytes() for part in case.kept(kernels)))
        assert len(found) == 1


@pytest.mark.parametrize(
    "arguments",
    [
        {"batch": -1},
        {"batch": 65536},
        {"num_boxes": -1},
        {"num_boxes": 0x7FFFFFFF},
        {"max_output": -1},
        {"workspace": 0},
    ],
)
def test_invalid_arguments_are_errors_and_nothing_is_written(any_device, arguments):
    boxes, groups, counts = np.zeros((1, 2, 4), np.float32), np.zeros((1, 2), np.int32), np.full(1, 2, np.int32)
    written = {name: np.full(8, 7, np.int32) for name in ("workspace", "indices", "num")}
    arguments_ = {"batch": 1, "num_boxes": 2, "iou_threshold": 0.5, "max_output": 2}
    arguments_ |= {name: array.ctypes.data for name, array in written.items()} | arguments
    with pytest.raises(ValueError, match=r"kernels\.h"):
        any_device.kernels.batched_nms(boxes.ctypes.data, groups.ctypes.data, counts.ctypes.data, **arguments_)
    assert all((array == 7).all() for array in written.values())

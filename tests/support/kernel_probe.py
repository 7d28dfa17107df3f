"""Runs a kernel library on fixed inputs and prints a hash of the results, for kernels that may crash the process.

python kernel_probe.py libmaskrcnn_kernels.so multilevel_roi_align
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator

import kernel_calls
import numpy as np
from kernel_calls import Device
from kernels_on_cpu import ORDERS, thread_order

from maskrcnn.plugins.native import Kernels


def rois_pooled(device: Device) -> Iterator[np.ndarray]:
    """Runs each RoIAlign kernel once, and the gradient's."""
    rng = np.random.default_rng(1)
    features = [rng.standard_normal((1, 8, 30, 20)).astype(np.float32)]
    rois = np.float32([[[3, 5, 60, 70], [10, -9, 30, 120]]])
    for form in ({"layout": "NCHW"}, {"layout": "NHWC"}, {"layout": "NHWC", "shift": 1}):
        for ratio in (1, 2):
            given = {"output_size": 7, "sampling_ratio": ratio, "aligned": True, **form}
            yield kernel_calls.roi_align(device, features, rois, **given)
    # Samples half-way between pixels, and integer gradients: sums are exact in any order.
    pooled = rng.integers(-9, 9, (1, 2, 40, 4, 4)).astype(np.float32)
    rois = np.float32([[[8, 8, 40, 40], [16, 0, 48, 32]]])
    given = {"output_size": 4, "sampling_ratio": 2, "aligned": False}
    yield kernel_calls.roi_align_gradient(device, pooled, rois, [(30, 20)], **given)


def rows_kept(device: Device) -> Iterator[np.ndarray]:
    """Runs NMS on more boxes than a chunk of a small block has, with another suppression pattern per tile of 64."""
    rng = np.random.default_rng(1)
    corners = np.stack([np.arange(1500) * 9.0, np.zeros(1500)], axis=-1)
    for tile in range(0, 1400, 64):
        copies = tile + rng.permutation(64)[:40]
        corners[copies[20:]] = corners[copies[:20]]
        if tile % 128:
            corners[tile + np.array([2, 3, 60, 61, 62, 63])] = corners[tile + np.array([0, 1, 40, 40, 41, 41])]
    for row in range(150, 1200, 11):  # row + 1 is suppressed, so row + 128 in the next batch is kept
        corners[[row + 1, row + 128], 0] = corners[row, 0] + np.array([4, 8])
    boxes = np.concatenate([corners, corners + 8], axis=-1)[None]
    for most in (1500, 70):
        given = {"iou_threshold": 0.3, "max_output": most}
        yield from kernel_calls.nms(device, boxes, np.zeros((1, 1500)), np.array([1400]), **given)


PROBES = {"multilevel_roi_align": rois_pooled, "batched_nms": rows_kept}


def main(library: str, op: str) -> None:
    """Prints a hash of the results for each order of threads."""
    device = Device(Kernels(library))
    for order in ORDERS:
        with thread_order(order):
            results = b"".join(result.tobytes() for result in PROBES[op](device))
        print(order, hashlib.sha256(results).hexdigest(), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])

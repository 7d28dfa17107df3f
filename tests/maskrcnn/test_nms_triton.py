"""The GPU's NMS, run by Triton's interpreter on the CPU, against the CPU's."""

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton", reason="Triton comes with torch's CUDA builds for Linux")

PROGRAM = """
import sys, torch
from maskrcnn.model import nms_triton

class DeviceOf:
    shape = None  # of the tensor whose GPU is the thread's
    def __init__(self, tensor):
        self.tensor = tensor
    def __enter__(self):
        DeviceOf.shape = tuple(self.tensor.shape)
    def __exit__(self, *_):
        DeviceOf.shape = None

class Watched:
    def __init__(self, kernel):
        self.kernel = kernel
    def __getitem__(self, grid):
        case["launched_on"].append(DeviceOf.shape)
        return self.kernel[grid]

torch.cuda.device_of = DeviceOf
nms_triton._suppression_kernel = Watched(nms_triton._suppression_kernel)
nms_triton._sweep_kernel = Watched(nms_triton._sweep_kernel)
for case in torch.load(sys.argv[1]):
    case["launched_on"] = []
    case["found"] = nms_triton.batched_nms_triton(*case["inputs"])
    torch.save(case, case["output"])
"""


def inputs(length, limit, threshold, groups, seed):
    """Three problems: full, half full and empty; some boxes without area, some twice."""
    rng = torch.Generator().manual_seed(seed)
    corners = torch.rand(3, length, 2, generator=rng) * 60
    boxes = torch.cat([corners, corners + 3 + torch.rand(3, length, 2, generator=rng) * 40], dim=-1)
    boxes[:, ::7, 2:] = boxes[:, ::7, :2]
    boxes[:, 5::11] = boxes[:, 4::11][:, : boxes[:, 5::11].shape[1]]
    of_group = torch.randint(0, groups, (3, length), generator=rng, dtype=torch.int32)
    counts = torch.tensor([length, length // 2, 0], dtype=torch.int32)
    return boxes, of_group, counts, threshold, limit


def test_the_triton_kernels_keep_what_the_cpu_keeps(tmp_path):
    from maskrcnn.model.ops import batched_nms

    shapes = [(1, 1, 0.5, 1), (33, 40, 0.5, 2), (70, 20, 0.5, 3), (130, 130, 0.7, 1), (130, 25, 0.3, 5)]
    cases = [
        {"inputs": inputs(*shape, seed), "output": str(tmp_path / f"{seed}.pt")} for seed, shape in enumerate(shapes)
    ]
    torch.save(cases, tmp_path / "cases.pt")
    # The interpreter is chosen when Triton is imported, so it gets a process of its own.
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", PROGRAM, str(tmp_path / "cases.pt")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    suppressed = 0
    for case in cases:
        boxes, groups, counts, threshold, limit = case["inputs"]
        done = torch.load(case["output"])
        assert done["launched_on"] == [tuple(boxes.shape)] * 2, "both kernels start on the GPU of the boxes"
        indices, number = done["found"]
        wanted, wanted_number = batched_nms(boxes, groups, counts, iou_threshold=threshold, max_output=limit)
        assert torch.equal(number, wanted_number)
        assert torch.equal(indices, wanted)
        suppressed += int((counts.clamp(max=limit) - number).sum())
    assert suppressed > 20


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
@given(length=st.integers(1, 2000), groups=st.integers(1, 90), seed=st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_on_a_gpu(length, groups, seed):
    from maskrcnn.model.ops import batched_nms

    boxes, of_group, counts, threshold, limit = inputs(length, min(length, 1000), 0.5, groups, seed)
    wanted = batched_nms(boxes, of_group, counts, iou_threshold=threshold, max_output=limit)
    on_gpu = (value.cuda() for value in (boxes, of_group, counts))
    found = batched_nms(*on_gpu, iou_threshold=threshold, max_output=limit)
    assert all(torch.equal(a, b.cpu()) for a, b in zip(wanted, found, strict=True))

"""The kernels on a GPU: real sizes, CUDA graphs, concurrent streams, reproducible results.

The other kernel tests also run on a GPU if there is one, through the fixture `device`.
"""

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torchvision
from hypothesis import given, settings
from kernel_calls import Device
from nms_cases import NmsCase, boxes_of, nms_cases
from nms_cases import check as check_nms
from paste_cases import PasteCase, paste_cases
from paste_cases import boxes_of as boxes_of_masks
from paste_cases import check as check_paste
from roi_align_cases import KINDS_OF_BOX, RoiCase, as_dtype, boxes, check, roi_cases
from torch import Tensor

from maskrcnn.model import cuda_ops

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")

Op = Callable[[dict[str, Tensor]], list[Tensor]]


def pyramid_inputs(seed: int, dtype: torch.dtype = torch.float16) -> dict[str, Tensor]:
    """Channels-last features `[2, 64, H, W]` and 200 RoIs per image, on the GPU."""
    rng = np.random.default_rng(seed)
    kinds = list(rng.choice(KINDS_OF_BOX, 400))
    tensors = {"rois": torch.from_numpy(boxes(rng, kinds, (320, 256), 4).reshape(2, 200, 4)).cuda()}
    for level in range(4):
        feature = torch.from_numpy(rng.standard_normal((2, 64, 64 >> level, 80 >> level)).astype(np.float32))
        tensors[f"P{level}"] = feature.to("cuda", dtype).to(memory_format=torch.channels_last)
    return tensors


def nms_inputs(seed: int) -> dict[str, Tensor]:
    """3000 boxes in 80 groups for each of two images, on the GPU."""
    rng = np.random.default_rng(seed)
    kept = np.stack([boxes_of(rng, "scattered", 3000) for _ in range(2)])
    groups = rng.integers(0, 80, (2, 3000)).astype(np.int32)
    counts = np.int32([3000, 2000 + seed])
    arrays = {"boxes": kept, "groups": groups, "counts": counts}
    return {name: torch.from_numpy(array).cuda() for name, array in arrays.items()}


def paste_inputs(seed: int) -> dict[str, Tensor]:
    """100 masks for an image of 400 x 667 px, on the GPU."""
    rng = np.random.default_rng(seed)
    found = boxes_of_masks(rng, list(rng.choice(["inside", "across"], 100)), (400, 667))
    masks = rng.random((100, 28, 28), np.float32)
    return {"masks": torch.from_numpy(masks).cuda(), "boxes": torch.from_numpy(found).cuda()}


def ops_of(gpu: Device) -> dict[str, tuple[Callable[[int], dict[str, Tensor]], Op]]:
    """Input generator and function of each op."""
    kernels, pooling = gpu.kernels, {"output_size": 7, "aligned": True, "min_level": 2}

    def pool(ratio: int) -> Op:
        return lambda t: [
            cuda_ops.multilevel_roi_align(
                kernels, [t[f"P{k}"] for k in range(4)], t["rois"], sampling_ratio=ratio, **pooling
            )
        ]

    return {
        "roi_align": (pyramid_inputs, pool(2)),
        "adaptive": (pyramid_inputs, pool(0)),
        "nms": (nms_inputs, lambda t: [*cuda_ops.batched_nms(kernels, *(t[k] for k in t), 0.5, 1000)]),
        "paste": (paste_inputs, lambda t: [cuda_ops.paste_masks(kernels, t["masks"], t["boxes"], (400, 667))]),
    }


OPS = ("roi_align", "adaptive", "nms", "paste")


@pytest.mark.parametrize("name", OPS)
def test_a_captured_gpu_graph_computes_new_inputs(gpu, name):
    make, op = ops_of(gpu)[name]
    tensors = make(0)
    op(tensors)  # the first call initialises the library outside of the graph
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = op(tensors)
    for seed in (1, 2, 0):
        fresh = make(seed)
        for key, value in fresh.items():
            tensors[key].copy_(value)
        for result in captured:
            result.zero_()
        graph.replay()
        for found, wanted in zip(captured, op(fresh), strict=True):
            assert torch.equal(found, wanted)
        assert any(result.any() for result in captured)


@pytest.mark.parametrize("name", OPS)
def test_twenty_gpu_runs_are_equal(gpu, name):
    make, op = ops_of(gpu)[name]
    tensors = make(3)
    first = op(tensors)
    for _ in range(19):
        torch.full((1 << 20,), -7, dtype=torch.int32, device="cuda")  # overwrites freed memory and workspaces
        assert all(torch.equal(a, b) for a, b in zip(first, op(tensors), strict=True))


@pytest.mark.parametrize("pair", [("roi_align", "nms"), ("nms", "nms"), ("paste", "adaptive")], ids=str)
def test_two_gpu_streams_are_independent(gpu, pair):
    both = [ops_of(gpu)[name] for name in pair]
    inputs = [make(seed) for seed, (make, _) in enumerate(both)]
    wanted = [op(tensors) for tensors, (_, op) in zip(inputs, both, strict=True)]
    streams = [torch.cuda.Stream() for _ in pair]
    torch.cuda.synchronize()
    found: list[list[list[Tensor]]] = [[], []]
    for _ in range(20):
        for side, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                found[side].append(both[side][1](inputs[side]))
    torch.cuda.synchronize()
    for side in range(2):
        for results in found[side]:
            assert all(torch.equal(a, b) for a, b in zip(results, wanted[side], strict=True))


def test_gpu_work_waits_for_its_stream(gpu):
    # The inputs are written late on the same stream; on another stream the kernel would run too early.
    make, op = ops_of(gpu)["nms"]
    tensors, late = make(1), make(2)
    wanted = op(late)
    busy = torch.eye(4096, device="cuda")
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        for _ in range(50):
            busy = busy @ busy
        for key, value in late.items():
            tensors[key].copy_(value)
        found = op(tensors)
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@settings(max_examples=80, deadline=None)
@given(case=roi_cases())
def test_a_gpu_pools_as_the_cpu_does(gpu, cpu, case):
    # Both equal the reference up to rounding.
    assert check(case, case.pooled(gpu)) == check(case, case.pooled(cpu))


@settings(max_examples=80, deadline=None)
@given(case=nms_cases(max_boxes=1500))
def test_a_gpu_keeps_what_torchvision_keeps(gpu, case):
    check_nms(case, case.kept(gpu))


@settings(max_examples=80, deadline=None)
@given(case=paste_cases())
def test_a_gpu_pastes_the_same_pixels(gpu, case):
    check_paste(case, case.pixels(gpu))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("form", [{"layout": "NCHW"}, {"layout": "NHWC"}, {"layout": "NHWC", "pitch": 264}], ids=str)
@pytest.mark.parametrize(
    ("size", "ratio", "channels"), [(7, 2, 256), (14, 2, 256), (7, 0, 256), (7, 2, 7), (28, 3, 33)]
)
def test_a_real_pyramid_on_a_gpu(gpu, dtype, form, size, ratio, channels):
    rng = np.random.default_rng(size)
    features = [
        as_dtype(rng.standard_normal((2, channels, 200 >> k, 272 >> k)).astype(np.float32), dtype) for k in range(4)
    ]
    rois = boxes(rng, list(rng.choice(KINDS_OF_BOX, 120)), (1088, 800), 4).reshape(2, 60, 4)
    attributes = {"output_size": size, "sampling_ratio": ratio, "aligned": True}
    case = RoiCase(features, rois, attributes, form)
    assert check(case, case.pooled(gpu)) > 90


def test_a_gpu_pools_as_torchvisions_cuda_op(gpu):
    tensors = pyramid_inputs(5, torch.float32)
    tensors["rois"][..., 2:] = torch.maximum(tensors["rois"][..., :2] + 1, tensors["rois"][..., 2:])
    pooler = torchvision.ops.MultiScaleRoIAlign(list("0123"), 7, 2)
    wanted = pooler({str(k): tensors[f"P{k}"] for k in range(4)}, list(tensors["rois"]), [(256, 320)] * 2)
    found = cuda_ops.multilevel_roi_align(
        gpu.kernels, [tensors[f"P{k}"] for k in range(4)], tensors["rois"],
        output_size=7, sampling_ratio=2, aligned=False, min_level=2,
    )  # fmt: skip
    near = (found.flatten(0, 1) - wanted).abs().flatten(1).amax(1) < 1e-3
    assert near.float().mean() > 0.99  # except where rounding decides at the border


@pytest.mark.parametrize("pattern", ["scattered", "crowded", "chain", "apart", "equal"])
@pytest.mark.parametrize("groups", [1, 80])
def test_very_many_boxes_on_a_gpu(gpu, pattern, groups):
    rng = np.random.default_rng(groups)
    kept = np.stack([boxes_of(rng, pattern, 20000) for _ in range(2)])
    ids = rng.integers(0, groups, kept.shape[:2]).astype(np.int32)
    case = NmsCase(kept, ids, np.int32([20000, 12345]), 0.5, 3000)
    check_nms(case, case.kept(gpu))


@pytest.mark.parametrize("by_columns", [False, True])
def test_a_real_image_full_of_masks_on_a_gpu(gpu, by_columns):
    rng = np.random.default_rng(1)
    found = boxes_of_masks(rng, list(rng.choice(["inside", "across", "outside"], 100)), (800, 1333))
    case = PasteCase(rng.random((100, 28, 28), np.float32), found, (800, 1333), 0.5, by_columns)
    check_paste(case, case.pixels(gpu))


def test_more_masks_than_a_gpus_grid_is_deep(gpu):
    count = 65535 + 70
    masks = np.zeros((count, 1, 1), np.float32)
    masks[::3] = 1
    found = np.tile(np.float32([0, 0, 8, 8]), (count, 1))
    pixels = PasteCase(masks, found, (8, 8), 0.5, False).pixels(gpu)
    np.testing.assert_array_equal(pixels[:, 4, 4], masks[:, 0, 0] > 0)

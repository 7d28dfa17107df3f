"""The torch side of the compiled kernels: layouts, types and shapes, with the kernels compiled for the CPU."""

import numpy as np
import pytest
import torch
import torchvision

from maskrcnn.imaging.postprocess import Detections
from maskrcnn.model import cuda_ops, ops
from maskrcnn.plugins import native
from maskrcnn.plugins.native import Kernels


@pytest.fixture(scope="module")
def kernels(kernels_for_cpu):
    return Kernels(kernels_for_cpu)


def pyramid(channels: int, dtype: torch.dtype, memory_format: torch.memory_format) -> list[torch.Tensor]:
    rng = torch.Generator().manual_seed(1)
    maps = [torch.randn(2, channels, 40 >> i, 56 >> i, generator=rng) for i in range(3)]
    return [m.to(dtype).contiguous(memory_format=memory_format) for m in maps]


def some_rois(count: int) -> torch.Tensor:
    rng = torch.Generator().manual_seed(2)
    corners = torch.rand(2, count, 2, generator=rng) * 180 - 10
    return torch.cat([corners, corners + torch.exp(torch.rand(2, count, 2, generator=rng) * 6)], dim=-1)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("channels", "output_size", "sampling_ratio"), [(1, 7, 2), (6, 14, 2), (8, 3, 0)])
def test_roi_align_equals_the_torch_code(kernels, memory_format, dtype, channels, output_size, sampling_ratio):
    features, rois = pyramid(channels, dtype, memory_format), some_rois(11)
    given = {"output_size": output_size, "sampling_ratio": sampling_ratio, "aligned": True, "min_level": 2}
    found = cuda_ops.multilevel_roi_align(kernels, features, rois, **given)
    wanted = ops.multilevel_roi_align(features, rois, **given)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, wanted, atol=2e-5, rtol=1e-5)  # sums of 16 in another order
    half = cuda_ops.multilevel_roi_align(kernels, features, rois, dtype=dtype, **given)
    assert torch.equal(half, found.to(dtype))


def gradients_by_torchvision(features, rois, pooled, *, output_size, sampling_ratio, aligned, min_level):
    """Gradients of float64 feature maps, from torchvision's kernel level by level."""
    maps = [feature.double().requires_grad_() for feature in features]
    levels = ops.assign_levels(rois, min_level=min_level, num_levels=len(maps))
    images = torch.arange(len(rois))[:, None].expand(levels.shape)
    for level, feature in enumerate(maps):
        own = levels == level
        boxes = torch.cat([images[own][:, None].double(), rois[own].double()], dim=1)
        scale, ratio = 0.5 ** (min_level + level), sampling_ratio or -1
        found = torchvision.ops.roi_align(feature, boxes, output_size, scale, ratio, aligned)
        found.backward(pooled[own].double())
    return [feature.grad for feature in maps]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("channels", "output_size", "sampling_ratio", "aligned"),
    [(1, 7, 2, False), (35, 7, 2, True), (6, 14, 2, True), (3, 3, 0, True), (64, 8, 3, False)],
)
def test_the_gradient_equals_torchvisions(kernels, dtype, channels, output_size, sampling_ratio, aligned):
    features, rois = pyramid(channels, dtype, torch.channels_last), some_rois(9)
    rois[1, 0] = torch.tensor([30.0, 40.0, 30.0, 40.0])  # empty
    rois[1, 1] = torch.tensor([-400.0, -300.0, 900.0, 800.0])  # most samples are outside
    given = {"output_size": output_size, "sampling_ratio": sampling_ratio, "aligned": aligned, "min_level": 2}
    leaves = [feature.requires_grad_() for feature in features]
    found = cuda_ops.TrainedRoiAlign.apply(kernels, rois, given, *leaves)
    torch.testing.assert_close(found, ops.multilevel_roi_align(features, rois, **given), atol=2e-5, rtol=1e-5)
    pooled = torch.randn(found.shape, generator=torch.Generator().manual_seed(3))
    found.backward(pooled)
    wanted = gradients_by_torchvision([leaf.detach() for leaf in leaves], rois, pooled, **given)
    for leaf, gradient in zip(leaves, wanted, strict=True):
        largest = gradient.abs().max()
        assert leaf.grad.dtype == dtype and largest > 0
        tolerance = {"atol": 1e-4, "rtol": 1e-5 if dtype == torch.float32 else 4e-3}
        torch.testing.assert_close(leaf.grad.double() / largest, gradient / largest, **tolerance)


def test_rois_of_nan_have_no_gradient_and_no_rois_give_zeros(kernels):
    given = {"output_size": 7, "sampling_ratio": 2, "aligned": False, "min_level": 2}
    for rois in (torch.full((2, 3, 4), torch.nan), some_rois(0)):
        pooled = torch.ones(2, rois.shape[1], 8, 7, 7)
        found = cuda_ops.multilevel_roi_align_gradient(kernels, pooled, rois, [(40, 56), (20, 28)], **given)
        assert [tuple(each.shape) for each in found] == [(2, 8, 40, 56), (2, 8, 20, 28)]
        assert not any(each.any() for each in found)


def test_maps_of_mixed_layouts_and_parts_of_larger_maps_are_copied(kernels):
    features, rois = pyramid(8, torch.float32, torch.channels_last), some_rois(5)
    given = {"output_size": 7, "sampling_ratio": 2, "aligned": False, "min_level": 2}
    wanted = ops.multilevel_roi_align(features, rois, **given)
    mixed = [features[0].contiguous(), *features[1:]]
    torch.testing.assert_close(cuda_ops.multilevel_roi_align(kernels, mixed, rois, **given), wanted)
    wide = [torch.cat([f, f], dim=1)[:, :8] for f in features]
    torch.testing.assert_close(cuda_ops.multilevel_roi_align(kernels, wide, rois, **given), wanted)
    strided = torch.cat([rois, rois], dim=-1)[..., :4]
    torch.testing.assert_close(cuda_ops.multilevel_roi_align(kernels, features, strided, **given), wanted)


def test_no_rois_and_no_images_give_empty_results(kernels):
    features = pyramid(8, torch.float32, torch.contiguous_format)
    given = {"output_size": 7, "sampling_ratio": 2, "aligned": False, "min_level": 2}
    assert cuda_ops.multilevel_roi_align(kernels, features, some_rois(0), **given).shape == (2, 0, 8, 7, 7)
    empty = [f[:0] for f in features]
    assert cuda_ops.multilevel_roi_align(kernels, empty, some_rois(3)[:0], **given).shape == (0, 3, 8, 7, 7)


def test_nms_equals_the_torch_op(kernels):
    boxes, rng = some_rois(200), torch.Generator().manual_seed(3)
    groups = torch.randint(0, 4, (2, 200), generator=rng, dtype=torch.int32)
    counts = torch.tensor([200, 77], dtype=torch.int32)
    found = cuda_ops.batched_nms(kernels, boxes, groups, counts, 0.5, 60)
    wanted = ops.batched_nms(boxes, groups, counts, iou_threshold=0.5, max_output=60)
    assert torch.equal(found[0], wanted[0])
    assert torch.equal(found[1], wanted[1])


@pytest.mark.parametrize("by_columns", [False, True])
def test_pasted_bits_are_the_masks(kernels, by_columns):
    masks = torch.zeros(2, 28, 28)
    masks[0, :, :14] = 1.0  # the left half of its box
    boxes = torch.tensor([[10.0, 20.0, 66.0, 48.0], [-50.0, -50.0, -20.0, -20.0]])
    bits = cuda_ops.paste_masks(kernels, masks, boxes, (60, 90), by_columns=by_columns)
    pixels = np.unpackbits(bits.numpy().view(np.uint8), axis=-1, bitorder="little")
    pixels = pixels.transpose(0, 2, 1) if by_columns else pixels
    found = pixels[:, :60, :90].astype(bool)
    wanted = Detections(boxes.numpy(), np.ones(2), np.ones(2, np.int64), masks.numpy(), (60, 90)).full_masks()
    assert found[0].sum() > 28 * 28
    assert np.array_equal(found, wanted)
    assert not found[1].any()


def test_the_library_to_use_can_be_named_or_switched_off(kernels_for_cpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    device = torch.device("cuda", 0)
    monkeypatch.setenv(native.SWITCH, str(kernels_for_cpu))
    assert cuda_ops.kernels_for(device).origin == str(kernels_for_cpu)
    monkeypatch.setenv(native.SWITCH, "off")
    assert cuda_ops.kernels_for(device) is None
    monkeypatch.setenv(native.SWITCH, str(kernels_for_cpu.with_name("no.so")))
    with pytest.raises(OSError, match=r"no\.so"):
        cuda_ops.kernels_for(device)

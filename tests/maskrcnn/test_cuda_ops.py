"""The torch side of the compiled kernels: layouts, types and shapes, with the kernels compiled for the CPU."""

import numpy as np
import pytest
import torch

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


def test_the_library_to_use_can_be_named_or_switched_off(kernels, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    device = torch.device("cuda", 0)
    monkeypatch.setenv(native.SWITCH, str(kernels.path))
    assert cuda_ops.kernels_for(device).path == kernels.path
    monkeypatch.setenv(native.SWITCH, "off")
    assert cuda_ops.kernels_for(device) is None
    monkeypatch.setenv(native.SWITCH, str(kernels.path.with_name("no.so")))
    with pytest.raises(OSError, match=r"no\.so"):
        cuda_ops.kernels_for(device)

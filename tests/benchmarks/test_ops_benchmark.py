"""The benchmark of the ops compares values before timing."""

import ops
import pytest

from maskrcnn.model import cuda_ops
from maskrcnn.plugins.native import Kernels


@pytest.fixture(scope="module")
def kernels(kernels_for_cpu):
    return Kernels(kernels_for_cpu)


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(ops, "SIZE_HW", (64, 96))
    monkeypatch.setattr(ops, "PASTE_HW", (50, 70))
    monkeypatch.setattr(ops, "CHANNELS", 8)


def test_every_contender_of_a_case_agrees_and_has_a_row(small, kernels):
    made = [
        ops.roi_align_case(2, 12, 7, "cpu", kernels=kernels),
        ops.gradient_case(2, 12, "cpu", kernels),
        ops.nms_case(3, 40, "cpu", 0.1, kernels),
        ops.paste_case(4, "cpu", kernels),
    ]
    for case in made:
        rows = ops.measure(case, "cpu", repeat=3, copy_gb_per_s=1.0)
        assert [row["contender"] for row in rows] == list(case.contenders)
        assert any(row["contender"].startswith("kernel") for row in rows)
        by_name = {row["contender"]: row for row in rows}
        assert by_name["torchvision"]["speedup"] == 1.0
        for row in rows:
            assert row["p10_us"] <= row["p50_us"] <= row["p90_us"]
            moved = row["of_copy_bandwidth"] and row["of_copy_bandwidth"] * row["p50_us"] * 1e3
            assert moved == (pytest.approx(case.min_bytes) if case.min_bytes else None)


@pytest.mark.parametrize("make", ["roi_align", "nms", "paste"])
def test_a_contender_that_disagrees_is_not_timed(small, kernels, monkeypatch, make):
    right = {name: getattr(cuda_ops, name) for name in ("multilevel_roi_align", "batched_nms", "paste_masks")}
    monkeypatch.setattr(
        cuda_ops,
        "multilevel_roi_align",
        lambda *a, **k: right["multilevel_roi_align"](*a, **{**k, "aligned": True}),
    )
    monkeypatch.setattr(cuda_ops, "batched_nms", lambda *a: right["batched_nms"](*a[:4], 0.9, a[5]))
    monkeypatch.setattr(cuda_ops, "paste_masks", lambda *a, **k: right["paste_masks"](*a, threshold=0.6, **k))
    with pytest.raises(AssertionError, match="kernel"):
        if make == "roi_align":
            ops.roi_align_case(1, 20, 7, "cpu", kernels=kernels)
        elif make == "nms":
            ops.nms_case(3, 40, "cpu", 0.1, kernels)
        else:
            ops.paste_case(4, "cpu", kernels)

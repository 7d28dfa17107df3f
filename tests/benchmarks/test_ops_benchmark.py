"""The micro-benchmark compares before it times."""

import ops as ops_benchmark
import pytest
import torch


def test_both_sides_of_a_case_agree():
    for ours, theirs in (
        ops_benchmark.roi_align_case(20, 7, "cpu"),
        ops_benchmark.nms_case(3, 40, "cpu", 0.1),
    ):
        first, second = ours(), theirs()
        if isinstance(first, torch.Tensor):
            torch.testing.assert_close(first, second, rtol=1e-3, atol=1e-3)
        else:
            assert first == second
            assert 0 < len(first) < 120


def test_a_case_that_disagrees_is_not_timed(monkeypatch):
    right = ops_benchmark.multilevel_roi_align
    monkeypatch.setattr(ops_benchmark, "multilevel_roi_align", lambda *a, **k: right(*a, **{**k, "aligned": True}))
    with pytest.raises(AssertionError, match="not close"):
        ops_benchmark.roi_align_case(20, 7, "cpu")

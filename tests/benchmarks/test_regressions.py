"""Limits and comparison with an earlier run, for CI."""

import dataclasses
import json

import pytest
from measure import Measurement
from run import beyond_limits, read_results, regressions

from maskrcnn.errors import UserError

MACHINE = {"cpu": "this", "gpu": None}


def row(**changes) -> Measurement:
    given = {"model": "m.onnx", "backend": "ONNX Runtime", "precision": "fp32", "size": "", "batch": 1}
    values = {"p50_ms": 10.0, "times_torchvision": 2.0, "box_ap": 0.5, "latencies_ms": (9.9, 10.0, 10.0, 10.0, 10.1)}
    return Measurement(**{**given, **values, **changes})


def older(tmp_path, rows, machine=None):
    path = tmp_path / "old.json"
    content = {"rows": [dataclasses.asdict(each) for each in rows], "environment": machine or MACHINE}
    path.write_text(json.dumps(content))
    return read_results(path)


def test_limits_apply_to_our_models_only():
    rows = [row(), row(p50_ms=30.0, box_ap=0.1), row(p50_ms=99.0, box_ap=0.0, peer="eager"), row(p50_ms=None)]
    assert beyond_limits(rows) == []
    (latency,) = beyond_limits(rows, max_latency_ms=20)
    assert "latency 30, limit 20" in latency
    (ap,) = beyond_limits(rows, min_ap=0.4)
    assert "box AP 0.1, limit 0.4" in ap


def test_a_limit_without_a_row_is_exceeded():
    assert "no row" in beyond_limits([row(p50_ms=None)], max_latency_ms=1)[0]
    assert "no row" in beyond_limits([row(box_ap=None)], min_ap=0.1)[0]


@pytest.mark.parametrize(("ratio", "is_worse"), [(2.0, False), (1.8, False), (1.7, True), (3.0, False)])
def test_latencies_are_compared_relative_to_torchvision(tmp_path, ratio, is_worse):
    # The milliseconds doubled on another machine; only the ratio counts.
    now = row(p50_ms=20.0, times_torchvision=ratio)
    worse, notes = regressions([now], {"cpu": "other", "gpu": None}, older(tmp_path, [row()]))
    assert bool(worse) == is_worse and len(worse) + len(notes) == 1


def test_without_torchvision_milliseconds_are_compared_on_the_same_machine_only(tmp_path):
    now, old = row(p50_ms=20.0, times_torchvision=None), older(tmp_path, [row()])
    assert "2.00 times the time (milliseconds)" in regressions([now], MACHINE, old)[0][0]
    worse, notes = regressions([now], {"cpu": "other", "gpu": None}, old)
    assert worse == [] and "another machine" in notes[0]


def test_slowdown_within_the_noise_is_no_regression(tmp_path):
    noisy = row(times_torchvision=1.6, latencies_ms=(5.0, 8.0, 10.0, 15.0, 20.0))
    worse, notes = regressions([noisy], MACHINE, older(tmp_path, [row()]))
    assert worse == [] and "noise" in notes[0]
    # The interquartile range of these is 15 %; of fewer than four samples it is not known.
    spread = row(times_torchvision=None, p50_ms=11.6, latencies_ms=(9.0, 10.0, 10.0, 11.0))
    few = row(times_torchvision=None, p50_ms=10.0, latencies_ms=(1.0, 2.0, 3.0))
    old = row(latencies_ms=())
    assert "noise 15%" in regressions([spread], MACHINE, older(tmp_path, [old]))[0][0]
    assert "noise 0%" in regressions([few], MACHINE, older(tmp_path, [old]))[1][0]


def test_lost_ap_and_rows_in_one_run_only(tmp_path):
    rows = [row(box_ap=0.49), row(model="new.onnx")]
    worse, notes = regressions(rows, MACHINE, older(tmp_path, [row()]))
    assert worse == ["m.onnx · ONNX Runtime fp32 · own size · batch 1: box AP 0.4900, was 0.5000"]
    assert any("new.onnx" in line and "not in both" in line for line in notes)


@pytest.mark.parametrize(
    "content",
    [
        None,
        "{",
        "{}",
        "[]",
        '{"rows": []}',
        '{"rows": [], "environment": {}}',
        '{"rows": 1, "environment": {}}',
        '{"rows": [{"work": "score bbox", "ours_ms": 1}], "environment": {}}',  # of another benchmark
    ],
)
def test_files_of_something_else_are_refused(tmp_path, content):
    path = tmp_path / "x.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match="not results of this benchmark"):
        read_results(path)

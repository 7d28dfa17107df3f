"""What CI stops a change for."""

import dataclasses
import json

import pytest
from measure import Measurement
from regressions import Limits, beyond_limits, read_rows, regressions, spread

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
    return read_rows(path)


def test_limits_hold_ours_alone():
    rows = [row(), row(p50_ms=30.0, box_ap=0.1), row(p50_ms=99.0, box_ap=0.0, peer="eager"), row(p50_ms=None)]
    assert beyond_limits(rows, Limits()) == []
    (latency,) = beyond_limits(rows, Limits(latency_ms=20))
    assert "latency 30, limit 20" in latency
    (ap,) = beyond_limits(rows, Limits(box_ap=0.4))
    assert "box AP 0.1, limit 0.4" in ap


def test_a_limit_without_a_row_is_beyond():
    assert "no row" in beyond_limits([row(p50_ms=None)], Limits(latency_ms=1))[0]
    assert "no row" in beyond_limits([row(box_ap=None)], Limits(box_ap=0.1))[0]


@pytest.mark.parametrize(("ratio", "is_worse"), [(2.0, False), (1.8, False), (1.7, True), (3.0, False)])
def test_a_row_is_slower_by_its_ratio_to_torchvision(tmp_path, ratio, is_worse):
    # The milliseconds doubled: another machine. Only the ratio counts.
    now = row(p50_ms=20.0, times_torchvision=ratio)
    worse, told = regressions([now], {"cpu": "other", "gpu": None}, older(tmp_path, [row()]))
    assert bool(worse) == is_worse and len(worse) + len(told) == 1


def test_without_torchvision_milliseconds_count_on_the_same_machine_only(tmp_path):
    now, old = row(p50_ms=20.0, times_torchvision=None), older(tmp_path, [row()])
    assert "2.00 times the time (milliseconds)" in regressions([now], MACHINE, old)[0][0]
    worse, told = regressions([now], {"cpu": "other", "gpu": None}, old)
    assert worse == [] and "another machine" in told[0]


def test_noise_excuses(tmp_path):
    noisy = row(times_torchvision=1.6, latencies_ms=(5.0, 8.0, 10.0, 15.0, 20.0))
    worse, told = regressions([noisy], MACHINE, older(tmp_path, [row()]))
    assert worse == [] and "noise" in told[0]
    assert spread((1.0, 2.0, 3.0)) == 0
    assert spread((9.0, 10.0, 10.0, 11.0)) == pytest.approx(0.15)


def test_lost_ap_and_rows_of_one_side(tmp_path):
    rows = [row(box_ap=0.49), row(model="new.onnx")]
    worse, told = regressions(rows, MACHINE, older(tmp_path, [row()]))
    assert worse == ["m.onnx · ONNX Runtime fp32 · own size · batch 1: box AP 0.4900, was 0.5000"]
    assert any("new.onnx" in line and "not in both" in line for line in told)


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
def test_another_file_is_refused(tmp_path, content):
    path = tmp_path / "x.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match="no results of this benchmark"):
        read_rows(path)

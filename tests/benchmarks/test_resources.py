"""Memory of a process, and the GPU's state as nvidia-smi reports it."""

import time

import pytest
from resources import call_in_new_process, watch_gpu

LINES = """1980, 1980, 45, 300.5, 0x0000000000000000
1755, 1980, 61, 690.0, 0x0000000000000004
1200, 1980, 88, 650.0, 0x0000000000000060
[N/A], 1980, 45, 1.0, 0x0
17
"""


@pytest.mark.parametrize("peer", [None, "eager"])
def test_a_model_costs_more_than_its_weights(onnx_file, checkpoint, peer):
    model = {"path": str(checkpoint), "peer": peer} if peer else {"path": str(onnx_file), "backend": "onnxruntime"}
    found = call_in_new_process("resources:detector_peak", {**model, "size_hw": [64, 96], "batch": 2})
    assert found["host_mb"] > found["host_before_mb"] + checkpoint.stat().st_size / 1e6
    assert found["host_before_mb"] > 20


def test_a_process_that_fails_or_hangs_gives_the_reason(tmp_path):
    with pytest.raises(RuntimeError, match=r"no\.onnx"):
        call_in_new_process("resources:detector_peak", {"path": str(tmp_path / "no.onnx"), "size_hw": [64, 64]})
    with pytest.raises(RuntimeError, match=r"more than 0.001 s"):
        call_in_new_process("resources:detector_peak", {}, limit_s=0.001)


@pytest.fixture
def nvidia_smi(tmp_path):
    """A program that writes its arguments to `given`, prints `LINES` and runs until it is stopped."""
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\ncat <<'END'\n{LINES}END\necho \"$@\" > {tmp_path}/given\nexec sleep 60\n")
    program.chmod(0o755)
    return program


def test_the_gpu_is_watched_during_the_block(nvidia_smi):
    given = nvidia_smi.with_name("given")
    with watch_gpu(str(nvidia_smi)) as found:
        assert found == {}
        while not given.exists() or not given.read_text():
            time.sleep(0.02)
    assert found == {
        "samples": 3,
        "sm_clock_mhz": 1755,
        "sm_clock_low_mhz": 1200,
        "sm_clock_max_mhz": 1980,
        "temperature_c": 88,
        "power_w": 650.0,
        "throttled": ["hardware thermal slowdown", "power cap", "thermal slowdown"],
    }
    assert "--query-gpu=clocks.sm" in given.read_text()


def test_without_nvidia_smi_the_summary_is_empty(tmp_path):
    with watch_gpu(str(tmp_path / "none")) as found:
        pass
    assert found == {}

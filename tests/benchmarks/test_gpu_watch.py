"""What nvidia-smi says while something is measured."""

import time

from gpu_watch import summary, watch

LINES = """1980, 1980, 45, 300.5, 0x0000000000000000
1755, 1980, 61, 690.0, 0x0000000000000004
1200, 1980, 88, 650.0, 0x0000000000000060
[N/A], 1980, 45, 1.0, 0x0
17
"""


def test_the_summary_of_lines():
    found = summary(LINES)
    assert found == {
        "samples": 3,
        "sm_clock_mhz": 1755,
        "sm_clock_low_mhz": 1200,
        "sm_clock_max_mhz": 1980,
        "temperature_c": 88,
        "power_w": 650.0,
        "throttled": ["hardware thermal slowdown", "power cap", "thermal slowdown"],
    }
    assert summary("") == {}


def test_the_program_runs_as_long_as_the_block(tmp_path):
    program = tmp_path / "nvidia-smi"
    program.write_text(
        f"#!/bin/sh\necho \"$@\" > {tmp_path}/given\nwhile true; do echo '1500, 1980, 50, 200, 0x1'; sleep 0.05; done\n"
    )
    program.chmod(0o755)
    with watch(str(program)) as found:
        assert found == {}
        while not (tmp_path / "given").exists():
            time.sleep(0.02)
        time.sleep(0.3)
    assert found["samples"] >= 1 and found["throttled"] == []
    assert "--query-gpu=clocks.sm" in (tmp_path / "given").read_text()


def test_without_the_program_nothing_is_known(tmp_path):
    with watch(str(tmp_path / "none")) as found:
        pass
    assert found == {}

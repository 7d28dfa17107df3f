"""The serving benchmark: its loops count every request, and latency counts from the arrival."""

import subprocess
import sys
import threading
import time
from pathlib import Path

import serving


def test_a_closed_loop_keeps_its_clients_busy_and_counts_failures():
    running, most, lock = [0], [0], threading.Lock()

    def call(number):
        with lock:
            running[0] += 1
            most[0] = max(most[0], running[0])
        time.sleep(0.01)
        with lock:
            running[0] -= 1
        if number % 4 == 3:
            raise OSError

    load = serving.closed_loop(call, 3, 0.5)
    assert most == [3] and min(load.latencies_ms) >= 10
    total = len(load.latencies_ms) + load.errors
    assert load.errors == total // 4 and load.per_second == len(load.latencies_ms) / load.seconds


def test_an_open_loop_counts_the_time_a_request_waits():
    """One request at a time and arrivals faster than that: requests wait longer and longer."""
    lock = threading.Lock()

    def call(number):
        with lock:
            time.sleep(0.02)

    load = serving.open_loop(call, 200, 0.25)
    assert len(load.latencies_ms) == 50 and load.errors == 0
    assert max(load.latencies_ms) > 20 * 50 - 1000 * 0.5  # 50 in turn, the last of which arrives after about 0.25 s


def test_a_server_that_is_not_there_is_an_error_in_words():
    script = Path(serving.__file__)
    command = [sys.executable, script, "gone.onnx", "--server", "127.0.0.1:9"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=script.parent)
    assert done.returncode == 1 and "no answer from 127.0.0.1:9" in done.stderr and "Traceback" not in done.stderr

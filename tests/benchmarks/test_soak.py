"""The soak benchmark: every size is run, and memory is read on the way."""

import subprocess
import sys
from pathlib import Path

import soak

SCRIPT = Path(soak.__file__)


def test_every_size_is_run_and_memory_is_read_at_even_marks():
    sizes, calls = list(soak.shapes_hw(100, 32, 96)), []
    rows = list(soak.soak(calls.append, sizes))
    assert calls == sizes and {side for size in sizes for side in size} == {32, 64, 96}
    numbers = [number for number, _, _ in rows]
    assert numbers[0] == 1 and numbers[-1] == 100 and numbers == sorted(numbers)
    assert all(megabytes > 0 and milliseconds >= 0 for _, megabytes, milliseconds in rows)


def test_a_missing_model_is_an_error_in_words():
    done = subprocess.run([sys.executable, SCRIPT, "gone.onnx"], capture_output=True, text=True, cwd=SCRIPT.parent)
    assert done.returncode == 1 and "gone.onnx" in done.stderr and "Traceback" not in done.stderr

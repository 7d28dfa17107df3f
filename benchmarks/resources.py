"""Memory of a process, and clock, temperature and power of the GPU during a measurement.

    python benchmarks/resources.py MODULE:FUNCTION '{"argument": "value"}'

calls a function of a benchmark module in a new process and prints its result as JSON. This is how peak memory is
measured: the process holds nothing else. For one model file:

    python benchmarks/resources.py resources:detector_peak '{"path": "model.onnx", "size_hw": [800, 1088]}'
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

_STATUS, _CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_RESET_PEAK = "5"  # written to clear_refs, see proc_pid_clear_refs(5)
_CALLS = 2
_GPU_INTERVAL_MS = 200
_GPU_FIELDS = ("clocks.sm", "clocks.max.sm", "temperature.gpu", "power.draw", "clocks_event_reasons.active")
# Bits of NVML's clocks event reasons that slow a GPU down; idle and application clocks do not count.
_THROTTLES = {
    0x4: "power cap",
    0x8: "hardware slowdown",
    0x20: "thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "hardware power brake",
}


def call_in_new_process(function: str, arguments: dict[str, Any], limit_s: float = 600) -> Any:
    """Call a function of a benchmark module in a new Python process.

    Args:
        function: `module:function`.
        arguments: keyword arguments, JSON-compatible.
        limit_s: time limit.

    Returns:
        The function's JSON-compatible result.

    Raises:
        RuntimeError: with the error in one line, or the time limit.
    """
    command = [sys.executable, __file__, function, "-"]
    try:
        done = subprocess.run(command, input=json.dumps(arguments), capture_output=True, text=True, timeout=limit_s)
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"more than {limit_s:g} s") from error
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or ["no output"])[-1])
    return json.loads(done.stdout.splitlines()[-1])


def memory_growth_mb(call: Callable[[], Any]) -> float | None:
    """Growth of this process's resident memory to its peak during a call, MB; None on systems other than Linux.

    Where the peak cannot be reset, earlier allocations may hide a small growth.
    """
    with contextlib.suppress(OSError):
        _CLEAR_REFS.write_text(_RESET_PEAK)
    before = resident_mb("VmRSS")
    call()
    after = resident_mb("VmHWM")
    return None if before is None or after is None else after - before


def resident_mb(field: str) -> float | None:
    """Resident memory of this process, MB: `VmRSS` now, `VmHWM` at its peak; None on systems other than Linux."""
    try:
        found = re.search(rf"^{field}:\s+(\d+) kB", _STATUS.read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(found[1]) * 1024 / 1e6 if found else None


def detector_peak(
    path: str,
    size_hw: Sequence[int],
    backend: str | None = None,
    options: dict[str, Any] | None = None,
    peer: str | None = None,
    batch: int = 1,
) -> dict[str, float | None]:
    """Peak memory of this process with one detector, on generated images.

    Args:
        path: model file; the checkpoint for a peer.
        size_hw: size of the images.
        backend, options: passed to `Detector.load`.
        peer: torchvision's model instead, "eager" or "onnx".
        batch: images per call.

    Returns:
        MB: `host_mb` at the peak, `host_before_mb` with Python and libraries only, and `device_mb` on a GPU. None where
        the system does not report it.
    """
    import numpy as np

    from maskrcnn.data.shapes import shapes_image

    images = [shapes_image(np.random.default_rng((0, seed)), tuple(size_hw))[0] for seed in range(batch)]
    with contextlib.ExitStack() as stack:
        if peer:
            from contenders import peer_contenders

            from maskrcnn.weights.checkpoint import load_checkpoint

            before = _peak_mb()
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            peers = peer_contenders(load_checkpoint(Path(path)), Path(folder), images[0])
            detector = next(each for each in peers if each.peer == peer).open()
        else:
            from maskrcnn.runtime.detector import BACKENDS, Detector

            # The library is imported first: its memory is not part of the model's.
            name = backend or BACKENDS[Path(path).suffix][0]
            importlib.import_module({"torch": "maskrcnn.runtime.backends.torch"}.get(name, name))
            before = _peak_mb()
            detector = Detector.load(path, backend, **(options or {}))
    for _ in range(_CALLS):
        for found in detector.detect(images):
            if found.has_masks:
                found.rles()
    return {"host_mb": _peak_mb(), "host_before_mb": before, "device_mb": _device_mb()}


def _peak_mb() -> float:
    """Peak resident memory of this process. On Linux, rusage would include the parent's memory at the fork."""
    if (held := resident_mb("VmHWM")) is not None:
        return held
    import resource  # not available on Windows

    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes on macOS, in KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def _device_mb() -> float | None:
    """GPU memory of this process as the driver reports it: unlike torch's count it includes every library."""
    command = ["nvidia-smi", "--query-compute-apps=pid,used_memory", "--format=csv,noheader,nounits"]
    try:
        lines = subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.splitlines()
    except (OSError, subprocess.TimeoutExpired):
        return None
    held = [line.partition(",") for line in lines]
    own = [float(used) * 1.048576 for pid, _, used in held if pid.strip() == str(os.getpid())]
    return sum(own) if own else None


@contextlib.contextmanager
def watch_gpu(program: str = "nvidia-smi") -> Iterator[dict[str, Any]]:
    """Monitor the first GPU during the block; the dictionary is filled at its end and stays empty without a GPU.

    Keys: `samples`, `sm_clock_mhz` (median), `sm_clock_low_mhz` (minimum), `sm_clock_max_mhz` (the GPU's maximum),
    `temperature_c` (maximum), `power_w` (median), `throttled` (reasons).
    """
    found: dict[str, Any] = {}
    command = [program, "-i", "0", f"--query-gpu={','.join(_GPU_FIELDS)}", "--format=csv,noheader,nounits"]
    try:
        process = subprocess.Popen(
            [*command, "-lms", str(_GPU_INTERVAL_MS)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
    except OSError:
        yield found
        return
    try:
        yield found
    finally:
        process.terminate()
        printed, _ = process.communicate()
        found.update(_gpu_summary(printed))


def _gpu_summary(printed: str) -> dict[str, Any]:
    rows = [row for line in printed.splitlines() if (row := _gpu_sample(line))]
    if not rows:
        return {}
    clocks, max_clocks, temperatures, powers, reasons = zip(*rows, strict=True)
    return {
        "samples": len(rows),
        "sm_clock_mhz": statistics.median(clocks),
        "sm_clock_low_mhz": min(clocks),
        "sm_clock_max_mhz": max(max_clocks),
        "temperature_c": max(temperatures),
        "power_w": statistics.median(powers),
        "throttled": sorted({name for bits in reasons for bit, name in _THROTTLES.items() if int(bits) & bit}),
    }


def _gpu_sample(line: str) -> list[float] | None:
    parts = [part.strip() for part in line.split(",")]
    if len(parts) != len(_GPU_FIELDS):
        return None
    try:
        return [*(float(part) for part in parts[:-1]), float(int(parts[-1], 16))]
    except ValueError:  # "[N/A]", or a truncated line
        return None


def _main(function: str, arguments: str) -> None:
    module, _, name = function.partition(":")
    given = json.loads(sys.stdin.read() if arguments == "-" else arguments)
    try:
        result = getattr(importlib.import_module(module), name)(**given)
    except Exception as error:
        raise SystemExit(" ".join(f"{type(error).__name__}: {error}".split())) from None
    print(json.dumps(result))


if __name__ == "__main__":
    _main(*sys.argv[1:])

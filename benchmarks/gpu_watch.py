"""A GPU's clock, temperature and power while something is measured: a throttled GPU's latencies are no result."""

from __future__ import annotations

import contextlib
import statistics
import subprocess
from collections.abc import Iterator
from typing import Any

_INTERVAL_MS = 200
FIELDS = ("clocks.sm", "clocks.max.sm", "temperature.gpu", "power.draw", "clocks_event_reasons.active")
# Bits of NVML's clocks event reasons that slow a GPU down; idle and application clocks are no fault.
_THROTTLES = {
    0x4: "power cap",
    0x8: "hardware slowdown",
    0x20: "thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "hardware power brake",
}


@contextlib.contextmanager
def watch(program: str = "nvidia-smi") -> Iterator[dict[str, Any]]:
    """Watches the first GPU during the block; the dictionary is filled when it ends, and stays empty without a GPU.

    Its keys: `samples`, `sm_clock_mhz` (median), `sm_clock_low_mhz` (lowest while busy), `sm_clock_max_mhz`,
    `temperature_c` (highest), `power_w` (median), `throttled` (reasons seen).
    """
    found: dict[str, Any] = {}
    command = [program, "-i", "0", f"--query-gpu={','.join(FIELDS)}", "--format=csv,noheader,nounits"]
    try:
        process = subprocess.Popen(
            [*command, "-lms", str(_INTERVAL_MS)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
    except OSError:
        yield found
        return
    try:
        yield found
    finally:
        process.terminate()
        printed, _ = process.communicate()
        found.update(summary(printed))


def summary(printed: str) -> dict[str, Any]:
    """What `watch` gives, from the tool's lines; broken ones are skipped."""
    rows = [row for line in printed.splitlines() if (row := _numbers(line))]
    if not rows:
        return {}
    clocks, most, temperatures, powers, reasons = zip(*rows, strict=True)
    seen = sorted({name for bits in reasons for bit, name in _THROTTLES.items() if int(bits) & bit})
    return {
        "samples": len(rows),
        "sm_clock_mhz": statistics.median(clocks),
        "sm_clock_low_mhz": min(clocks),
        "sm_clock_max_mhz": max(most),
        "temperature_c": max(temperatures),
        "power_w": statistics.median(powers),
        "throttled": seen,
    }


def _numbers(line: str) -> list[float] | None:
    parts = [part.strip() for part in line.split(",")]
    if len(parts) != len(FIELDS):
        return None
    try:
        return [*(float(part) for part in parts[:-1]), float(int(parts[-1], 16))]
    except ValueError:  # "[N/A]", or a line cut off
        return None

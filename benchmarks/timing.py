"""Interleaved latency measurement of several functions, and a description of the machine.

Measured one after the other, the first function would run on a cool machine and the last on a warm one. Here every
round calls each function once, in random order, so that drift affects all of them equally. A short pause before each
call lets the threads of the previous library go to sleep: they spin for a while after their work.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import random
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

_REST_S = 0.03
MIN_ROUNDS = 3
_PACKAGES = (
    "maskrcnn",
    "torch",
    "torchvision",
    "onnx",
    "onnxruntime-gpu",
    "onnxruntime",
    "openvino",
    "tensorrt",
)


@dataclass(frozen=True)
class Samples:
    """Latencies of one function, or the exception that ended its measurement."""

    latencies_ms: tuple[float, ...]
    error: Exception | None = None

    def percentile_ms(self, percent: float) -> float:
        """Return the nearest-rank percentile of the latencies."""
        return percentile(self.latencies_ms, percent)

    def per_second(self, items: int) -> float:
        """Return items per second at the median latency of a call with this many items."""
        return 1000.0 * items / self.percentile_ms(50)


def percentile(values: Sequence[float], percent: float) -> float:
    """Return the nearest-rank percentile, which is one of the values.

    Raises:
        ValueError: without values, or for a percentage outside (0, 100].
    """
    if not values or not 0 < percent <= 100:
        raise ValueError(f"found: {len(values)} values, {percent} %; expected: values, and 0 < percent ≤ 100")
    rank = -(-len(values) * percent // 100)  # rounded up
    return sorted(values)[int(rank) - 1]


def time_in_turns(
    calls: Mapping[str, Callable[[int], Any]],
    *,
    repeat: int,
    warmup: int = 1,
    rest_s: float = _REST_S,
    budget_s: float | None = None,
    seed: int = 0,
    clock: Callable[[], float] = time.perf_counter,
    sleep: Callable[[float], None] = time.sleep,
    progress: Callable[[str], None] = lambda name: None,
) -> dict[str, Samples]:
    """Measure each function `repeat` times, interleaved.

    Args:
        calls: functions by name; each takes the round's number, so that all can do the same work in a round.
        repeat: measured rounds.
        warmup: rounds before them, not measured.
        rest_s: pause before each call, seconds.
        budget_s: time limit for starting another round after the first `MIN_ROUNDS`, seconds.
        seed: random seed of the order within rounds.
        clock: returns the time in seconds.
        sleep: pauses for some seconds.
        progress: called with the function's name after each call.

    Returns:
        Samples by name. A function that raises is not called again; its samples hold the exception.
    """
    order, rng = list(calls), random.Random(seed)
    latencies: dict[str, list[float]] = {name: [] for name in calls}
    errors: dict[str, Exception] = {}
    started = clock()
    for turn in range(-warmup, repeat):
        if budget_s is not None and turn >= MIN_ROUNDS and clock() - started > budget_s:
            break
        rng.shuffle(order)
        for name in order:
            if name in errors:
                continue
            sleep(rest_s)
            start = clock()
            try:
                calls[name](turn % max(repeat, 1))
            except Exception as error:  # any error of a library must not end the measurement of the others
                errors[name] = error
                continue
            if turn >= 0:
                latencies[name].append(1000.0 * (clock() - start))
            progress(name)
    return {name: Samples(tuple(values), errors.get(name)) for name, values in latencies.items()}


def environment() -> dict[str, Any]:
    """Describe what a latency depends on besides the code: processor, threads, versions, commit, GPU and date."""
    import torch

    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "memory_gb": _memory_gb(),
        "gpu": gpu,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": _installed_versions(),
        "commit": _commit(),
    }


def machine(environment: dict[str, Any]) -> list[str]:
    """Format an `environment` as items of a Markdown list."""
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items())
    lines = [
        f"- Machine: {environment['cpu']}, {environment['cores']} cores, "
        f"{environment['torch_threads']} PyTorch threads, {environment['memory_gb']} GB, "
        f"GPU: {environment['gpu'] or 'none'}; {environment['system']}, Python {environment['python']}",
        f"- Versions: {versions}; commit {environment['commit'] or 'unknown'}; {environment['date']}",
    ]
    if gpu := environment.get("gpu_watch"):
        lines.append(
            f"- GPU while timing: {gpu['sm_clock_mhz']:.0f} of {gpu['sm_clock_max_mhz']:.0f} MHz (lowest "
            f"{gpu['sm_clock_low_mhz']:.0f}), {gpu['temperature_c']:.0f} °C, {gpu['power_w']:.0f} W, "
            f"{', '.join(gpu['throttled']) or 'not throttled'}"
        )
    return lines


def _installed_versions() -> dict[str, str]:
    """Versions of the installed libraries that affect latency."""
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def _cpu_model() -> str:
    """Name of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _commit() -> str | None:
    """Commit of the checkout, with "-modified" if files differ from it; None outside a checkout."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + ("-modified" if git("status", "--porcelain") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _memory_gb() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1)
    except (AttributeError, OSError, ValueError):
        return None

"""Latency of several functions, measured in turns, and a description of the machine they ran on.

Measuring one function after the other gives the first a cool machine and the last a warm one. Here every round
calls each function once, in an order drawn anew, so that drifts fall on all alike. A short rest before each
call lets the threads of the library before it go to sleep: they spin for a while after their work.
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
LEAST_REPEAT = 3
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
        """The smallest measured latency that at least this share of the samples does not exceed."""
        return percentile(self.latencies_ms, percent)

    def per_second(self, items: int) -> float:
        """Items per second, at the median latency of a call that handles so many."""
        return 1000.0 * items / self.percentile_ms(50)


def percentile(values: Sequence[float], percent: float) -> float:
    """The nearest-rank percentile, always one of the values.

    Raises:
        ValueError: for no values, or a percentage outside (0, 100].
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
    """Measures each function `repeat` times, in turns.

    Args:
        calls: by name; each takes the number of the round, so that all can do the same work in it.
        repeat: measured rounds.
        warmup: rounds before them, not measured.
        rest_s: pause before each call.
        budget_s: no round begins later than this, once there are `LEAST_REPEAT`.
        seed: decides the order inside the rounds.
        clock: seconds.
        sleep: pauses.
        progress: called with a function's name after each of its calls.

    Returns:
        samples by name. A function that raises is not called again; its samples hold the exception.
    """
    order, rng = list(calls), random.Random(seed)
    latencies: dict[str, list[float]] = {name: [] for name in calls}
    errors: dict[str, Exception] = {}
    started = clock()
    for turn in range(-warmup, repeat):
        if budget_s is not None and turn >= LEAST_REPEAT and clock() - started > budget_s:
            break
        rng.shuffle(order)
        for name in order:
            if name in errors:
                continue
            sleep(rest_s)
            began = clock()
            try:
                calls[name](turn % max(repeat, 1))
            except Exception as error:  # whatever one library raises must not end the others' measurement
                errors[name] = error
                continue
            if turn >= 0:
                latencies[name].append(1000.0 * (clock() - began))
            progress(name)
    return {name: Samples(tuple(values), errors.get(name)) for name, values in latencies.items()}


def environment() -> dict[str, Any]:
    """What a latency depends on besides the code: processor, threads, versions, commit, GPU and date."""
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
        "commit": commit(),
    }


def _installed_versions() -> dict[str, str]:
    """Versions of the libraries that decide the numbers, those that are installed."""
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def _cpu_model() -> str:
    """The processor's name, as the system knows it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def commit() -> str | None:
    """The checkout's commit, marked where files differ from it; None outside a checkout."""

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

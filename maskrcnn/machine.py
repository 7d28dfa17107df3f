"""Resources available to this process: CPUs, by affinity and control group, and shared memory."""

from __future__ import annotations

import contextlib
import math
import os
import shutil
from pathlib import Path

_CGROUPS = Path("/sys/fs/cgroup")
_OWN_CGROUPS = Path("/proc/self/cgroup")
_TOPOLOGY = Path("/sys/devices/system/cpu")
SHARED_MEMORY = Path("/dev/shm")


def available_cpus() -> int:
    """Returns the number of logical CPUs that this process may use, at least 1.

    It is limited by the affinity (`taskset`, cpusets) and by the CPU quota of the control groups (`docker --cpus`,
    Kubernetes limits), rounded up.
    """
    return max(1, math.ceil(min(len(_affinity()), cpu_quota())))


def available_cores() -> int:
    """As `available_cpus`, counting the hardware threads of a core once if the system reports them."""
    cores = set()
    for cpu in _affinity():
        try:
            cores.add((_TOPOLOGY / f"cpu{cpu}" / "topology" / "thread_siblings_list").read_text())
        except OSError:
            cores.add(str(cpu))
    return min(len(cores), available_cpus())


def is_quota_bound() -> bool:
    """Whether the control groups' quota allows fewer CPUs than the affinity."""
    return available_cpus() < len(_affinity())


def cpu_quota(mount: Path = _CGROUPS, own: Path = _OWN_CGROUPS) -> float:
    """Returns the CPUs' worth of time that the control groups (version 1 or 2) grant; infinity without a limit.

    Args:
        mount: where the control groups are mounted.
        own: file with the groups of this process.
    """
    try:
        entries = [line.split(":", 2) for line in own.read_text().splitlines()]
    except OSError:  # not Linux
        return math.inf
    quotas = [math.inf]
    for entry in entries:
        if len(entry) != 3:
            continue
        _, controllers, path = entry
        if controllers and "cpu" not in controllers.split(","):
            continue
        roots = [mount] if not controllers else [mount / controllers, mount / "cpu"]
        for root in roots:  # the group's own folder and its parents; in a container it may be mounted as the root
            for folder in (root / path.strip("/"), *(root / path.strip("/")).parents):
                quotas.append(_quota_of(folder))
                if folder == root:
                    break
    return min(quotas)


def _quota_of(group: Path) -> float:
    """Quota of a single control group."""
    with contextlib.suppress(OSError, ValueError):
        quota, period = (group / "cpu.max").read_text().split()
        return math.inf if quota == "max" else int(quota) / int(period)
    with contextlib.suppress(OSError, ValueError):
        micros = int((group / "cpu.cfs_quota_us").read_text())
        return math.inf if micros <= 0 else micros / int((group / "cpu.cfs_period_us").read_text())
    return math.inf


def _affinity() -> set[int]:
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def shared_memory_mb() -> tuple[int, int] | None:
    """Returns the total and free shared memory for exchanging tensors between processes, MB; None if unknown."""
    try:
        usage = shutil.disk_usage(SHARED_MEMORY)
    except OSError:  # not Linux
        return None
    return usage.total // 10**6, usage.free // 10**6

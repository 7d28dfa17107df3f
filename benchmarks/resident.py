"""The memory that this process holds and has held, as Linux tells it."""

from __future__ import annotations

import re
from pathlib import Path

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_RESET_PEAK = "5"  # to clear_refs, see proc_pid_clear_refs(5)


def resident_mb(field: str) -> float | None:
    """Memory of this process as Linux tells it: `VmRSS` now, `VmHWM` at most; None elsewhere."""
    try:
        found = re.search(rf"^{field}:\s+(\d+) kB", _STATUS.read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(found[1]) * 1024 / 1e6 if found else None


def forget_peak() -> None:
    """Makes the present memory the peak; where the system does not allow it, imports may hide small peaks."""
    try:
        _CLEAR.write_text(_RESET_PEAK)
    except OSError:
        return

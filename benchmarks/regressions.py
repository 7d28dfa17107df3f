"""A benchmark's rows against an older run's and against limits: what CI stops a change for."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from measure import Measurement

from maskrcnn.errors import UserError

_SLOWDOWN = 1.15  # of a row's ratio, beyond the spread of its own samples
AP_LOSS = 0.002
_KEY = ("model", "backend", "precision", "size", "batch")
_NEEDED = (*(name for name in _KEY if name != "size"), "p50_ms")  # of a row; older files have no size


class Before(NamedTuple):
    """What an older run has written."""

    rows: list[dict[str, Any]]
    environment: dict[str, Any]


@dataclass(frozen=True)
class Limits:
    """What no row that ran may exceed or fall below; None: anything goes."""

    latency_ms: float | None = None  # p50
    box_ap: float | None = None


def beyond_limits(rows: Sequence[Measurement], limits: Limits) -> list[str]:
    """One line for every row of ours beyond a limit.

    A limit that nothing could be held to is beyond, too: no row ran, or none has an AP.
    """
    ours = [row for row in rows if not row.peer and row.p50_ms is not None]
    found = []
    for name, limit, values in (
        ("latency", limits.latency_ms, [(row, row.p50_ms) for row in ours]),
        ("box AP", limits.box_ap, [(row, row.box_ap) for row in ours if row.box_ap is not None]),
    ):
        if limit is None:
            continue
        if not values:
            found.append(f"{name}: no row to hold to the limit {limit:g}")
        for row, value in values:
            if value > limit if name == "latency" else value < limit:
                found.append(f"{title(row)}: {name} {value:.4g}, limit {limit:g}")
    return found


def title(row: Measurement | dict[str, Any]) -> str:
    """A row's name in one line."""
    get = row.get if isinstance(row, dict) else lambda name, _=None: getattr(row, name)
    return f"{get('model')} · {get('backend')} {get('precision')} · {get('size') or 'own size'} · batch {get('batch')}"


def read_rows(path: Path) -> Before:
    """Rows and environment of a results.json.

    Raises:
        UserError: for a file that is missing or was not written by the benchmark.
    """
    try:
        found = _results(json.loads(path.read_text(encoding="utf-8")))
        reason = "no rows of latencies" if found is None else ""
    except (OSError, ValueError) as error:
        found, reason = None, str(error)
    if found is None:
        raise UserError(
            f"{path}: no results of this benchmark ({reason})", "a results.json", "name one that `run.py` wrote"
        )
    return found


def _results(content: Any) -> Before | None:
    """Rows and environment of a file's content; None where it is something else, as another benchmark's results."""
    rows, environment = (content.get(name) if isinstance(content, dict) else None for name in ("rows", "environment"))
    if not isinstance(rows, list) or not rows or not isinstance(environment, dict):
        return None
    is_ours = all(isinstance(row, dict) and row.keys() >= set(_NEEDED) for row in rows)
    return Before(rows, environment) if is_ours else None


def regressions(
    rows: Sequence[Measurement], environment: dict[str, Any], before: Before
) -> tuple[list[str], list[str]]:
    """What became worse since an older run.

    Latencies are compared as ratios to torchvision's in the same run, which another machine or a busy one changes
    little; without torchvision in both, as milliseconds, if CPU and GPU are the same. A row is slower when it is so by
    more than `_SLOWDOWN` and by more than both runs' middle half of samples explains.

    Returns:
        a line for every row that is slower or lost AP, and a line for everything compared or left out.
    """
    known = {tuple(row.get(name) or "" for name in _KEY): row for row in before.rows}
    same_machine = all(environment.get(name) == before.environment.get(name) for name in ("cpu", "gpu"))
    worse, told = [], []
    for row in rows:
        then = known.get(tuple(getattr(row, name) or "" for name in _KEY))
        if then is None or row.p50_ms is None or then.get("p50_ms") is None:
            told.append(f"{title(row)}: not in both")
            continue
        factor, unit = _slowdown(row, then, same_machine=same_machine)
        if factor is None:
            told.append(f"{title(row)}: another machine and no torchvision to divide by")
        else:
            line = f"{title(row)}: {factor:.2f} times the time ({unit}), noise {_noise(row, then):.0%}"
            (worse if factor > max(_SLOWDOWN, 1 + _noise(row, then)) and not row.peer else told).append(line)
        worse += _lost_ap(row, then)
    return worse, told


def _slowdown(row: Measurement, then: dict[str, Any], *, same_machine: bool) -> tuple[float | None, str]:
    if row.times_torchvision and then.get("times_torchvision"):
        return then["times_torchvision"] / row.times_torchvision, "relative to torchvision"
    return (row.p50_ms / then["p50_ms"], "milliseconds") if same_machine else (None, "")


def _noise(row: Measurement, then: dict[str, Any]) -> float:
    """The larger of both runs' quartile ranges, relative to the median."""
    return max(spread(row.latencies_ms), spread(then.get("latencies_ms") or ()))


def spread(latencies: Sequence[float]) -> float:
    """The range of the middle half of samples, relative to their median; 0 for fewer than 4."""
    if len(latencies) < 4:
        return 0.0
    low, middle, high = statistics.quantiles(latencies, n=4)
    return (high - low) / middle


def _lost_ap(row: Measurement, then: dict[str, Any]) -> list[str]:
    found = []
    for name in ("box_ap", "mask_ap", "keypoint_ap"):
        now, was = getattr(row, name), then.get(name)
        if now is not None and was is not None and now < was - AP_LOSS:
            found.append(f"{title(row)}: {name.replace('_ap', ' AP')} {now:.4f}, was {was:.4f}")
    return found

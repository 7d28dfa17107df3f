"""Opens every contender, compares it with the reference, then times and evaluates it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from contenders import Contender, precision_of
from matching import Mismatch, compare_detections, merge
from progress import Progress
from timing import Samples, time_in_turns
from workloads import Workload

from maskrcnn.errors import UserError
from maskrcnn.postprocess import Detections
from maskrcnn.runtime.compare import EXACT, HALF, INT8
from maskrcnn.runtime.evaluate import evaluate

CHECKED_IMAGES = 4
# Detections are compared where users see them, in the photo; see `runtime.compare` for boxes and scores. One
# in fifty may lack a partner in FP32: the overlap of two boxes can lie at suppression's very threshold.
FP32_BOUNDS = {
    "box_px": EXACT.box_px,
    "score": EXACT.score,
    "mask_iou": 0.95,
    "unpaired_share": 0.02,
}
HALF_BOUNDS = {
    "box_px": HALF.box_px,
    "score": HALF.score,
    "mask_iou": 0.5,
    "unpaired_share": HALF.departing_share,
}
INT8_BOUNDS = {
    "box_px": INT8.box_px,
    "score": INT8.score,
    "mask_iou": 0.3,
    "unpaired_share": INT8.departing_share,
}


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One row of the table."""

    model: str
    backend: str
    precision: str
    batch: int
    status: str = "ok"  # ok | inexact | not run | differs | failed
    reason: str = ""  # one line, where the status is not ok
    peer: str = ""
    samples: int = 0
    p50_ms: float | None = None  # of a call with the whole batch
    p90_ms: float | None = None
    p99_ms: float | None = None
    images_per_s: float | None = None
    times_torchvision: float | None = None  # its p50 divided by this one's, at the same batch size
    times_torchvision_onnx: float | None = None
    box_ap: float | None = None
    mask_ap: float | None = None
    box_ap_difference: float | None = None  # to the reference
    mask_ap_difference: float | None = None
    check: str = ""  # difference to the reference's detections
    latencies_ms: tuple[float, ...] = field(default=(), repr=False)


@dataclass
class _Entry:
    """A contender on its way through the benchmark."""

    contender: Contender
    detector: Any = None
    precision: str = ""
    status: str = "ok"
    reason: str = ""
    check: str = ""
    summary: dict[str, float] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.contender.model} · {self.contender.backend} {self.precision}".strip()

    def fail(self, status: str, error: Exception | str) -> None:
        """Takes the contender out, with a reason of one line."""
        self.status, self.reason = status, one_line(error)

    @property
    def runs(self) -> bool:
        """Whether it can still be called."""
        return self.detector is not None and self.status in ("ok", "inexact")


def measure(contenders: Sequence[Contender], workload: Workload, progress: Progress) -> list[Measurement]:
    """The table's rows: every contender at every batch size."""
    entries = [_open(contender, progress) for contender in contenders]
    _check(entries, workload, progress)
    samples = {batch: _time(entries, workload, batch, progress) for batch in workload.batches}
    _evaluate(entries, workload, progress)
    rows = [
        _row(entry, batch, samples[batch].get(entry.name)) for entry in entries for batch in _batches(entry, workload)
    ]
    return _with_ratios(rows, entries)


def detect_and_encode(detector: Any, images: list) -> list[Detections]:
    """What is timed: from decoded images to boxes, scores, labels and, if any, pasted masks as run lengths."""
    found = detector.detect(images)
    for detections in found:
        if detections.has_masks:
            detections.rles()
    return found


def one_line(error: Exception | str) -> str:
    """An error in one line; of a UserError what came and what to do."""
    if isinstance(error, UserError):
        return " ".join(f"{error.came}; {error.do}".split())
    text = " ".join(str(error).split())
    name = "" if isinstance(error, str) else f"{type(error).__name__}: "
    return name + (text if len(text) <= 200 else text[:200] + " …")


def _open(contender: Contender, progress: Progress) -> _Entry:
    entry = _Entry(contender, precision=contender.precision)
    try:
        entry.detector = contender.open()
        entry.precision = precision_of(entry.detector)
    except (UserError, ImportError) as error:
        entry.fail("not run", error)
    except Exception as error:  # a library that fails in its own way costs its own row only
        entry.fail("failed", error)
    progress.say(f"{entry.name}: {entry.reason or 'ready'}")
    return entry


def _check(entries: list[_Entry], workload: Workload, progress: Progress) -> None:
    """Compares each entry's detections with the reference's; the first that runs where none is named."""
    running = [entry for entry in entries if entry.runs]
    if not running:
        return
    reference = next((entry for entry in running if entry.contender.is_reference), running[0])
    calls = _checked_calls(workload)
    try:
        wanted = [reference.detector.detect(images) for images in calls]
    except Exception as error:  # without a reference nothing can be checked
        for entry in running:
            entry.fail("failed", f"the reference {reference.name} failed: {one_line(error)}")
        return
    reference.check = "reference"
    with progress.steps(f"comparing with {reference.name}", len(running) - 1) as stepper:
        for entry in running:
            if entry is not reference:
                _compare(entry, calls, wanted, reference.detector.metadata.detections)
                progress.say(f"{entry.name}: {entry.check or entry.reason}")
                stepper.advance()


def _checked_calls(workload: Workload) -> list[list]:
    alone = [[image] for image in workload.pool[:CHECKED_IMAGES]]
    return alone + [workload.batch(batch, 0) for batch in workload.batches if batch > 1][:1]


def _compare(entry: _Entry, calls: list[list], wanted: list[list[Detections]], rows: int) -> None:
    is_exact = entry.precision == "fp32"
    bounds = FP32_BOUNDS if is_exact else INT8_BOUNDS if "int8" in entry.precision else HALF_BOUNDS
    limit = entry.contender.largest_batch
    parts: list[Mismatch] = []
    try:
        for images, reference in zip(calls, wanted, strict=True):
            if limit is None or len(images) <= limit:
                found = entry.detector.detect(images)
                parts += [
                    compare_detections(first, second, edge=bounds["score"], rows=rows)
                    for first, second in zip(reference, found, strict=True)
                ]
    except Exception as error:
        entry.fail("failed", error)
        return
    difference = merge(parts)
    entry.check = str(difference)
    if not difference.within(**bounds):
        # A wrong FP32 model is a bug, and its latency no result. Other precisions are judged by their AP.
        entry.fail("differs" if is_exact else "inexact", f"from the reference: {difference}")


def _time(entries: list[_Entry], workload: Workload, batch: int, progress: Progress) -> dict[str, Samples]:
    calls: dict[str, Callable[[int], Any]] = {}
    for entry in entries:
        if entry.runs and batch <= (entry.contender.largest_batch or batch):
            calls[entry.name] = lambda turn, detector=entry.detector: detect_and_encode(
                detector, workload.batch(batch, turn)
            )
    # Libraries prepare themselves for each shape that they see for the first time.
    shapes = {tuple(image.shape for image in workload.batch(batch, turn)) for turn in range(workload.repeat)}
    warmup = min(workload.repeat, len(workload.pool)) if len(shapes) > 1 else 1
    total = len(calls) * (workload.repeat + warmup)
    with progress.steps(f"timing at batch {batch}: {workload.repeat} rounds", total) as stepper:
        return time_in_turns(
            calls,
            repeat=workload.repeat,
            warmup=warmup,
            budget_s=workload.budget_s,
            progress=lambda name: stepper.advance(),
        )


def _evaluate(entries: list[_Entry], workload: Workload, progress: Progress) -> None:
    if workload.dataset is None:
        return
    running = [entry for entry in entries if entry.runs]
    with progress.steps("evaluating", len(running) * len(workload.dataset.images)) as stepper:
        for entry in running:
            try:
                entry.summary = evaluate(entry.detector, workload.dataset, progress=stepper.advance).summary()
                figures = (f"{name.replace('_ap', ' AP')} {value:.4f}" for name, value in entry.summary.items())
                progress.say(f"{entry.name}: {', '.join(figures)}")
            except Exception as error:
                entry.reason = f"no AP: {one_line(error)}"
                progress.say(f"{entry.name}: {entry.reason}")


def _batches(entry: _Entry, workload: Workload) -> tuple[int, ...]:
    """A contender that cannot run has one row."""
    return workload.batches if entry.runs else workload.batches[:1]


def _row(entry: _Entry, batch: int, samples: Samples | None) -> Measurement:
    contender = entry.contender
    row = Measurement(
        model=contender.model,
        backend=contender.backend,
        precision=entry.precision,
        batch=batch,
        status=entry.status,
        reason=entry.reason,
        peer=contender.peer,
        check=entry.check,
        **entry.summary,
    )
    if not entry.runs:
        return row
    if samples is None:
        reason = f"takes at most {contender.largest_batch} image(s) at a time"
        return replace(row, status="not run", reason=reason, box_ap=None, mask_ap=None)
    if samples.error is not None or not samples.latencies_ms:
        return replace(row, status="failed", reason=one_line(samples.error or "no samples"))
    p50, p90, p99 = (samples.percentile_ms(percent) for percent in (50, 90, 99))
    return replace(
        row,
        samples=len(samples.latencies_ms),
        p50_ms=p50,
        p90_ms=p90,
        p99_ms=p99,
        images_per_s=samples.per_second(batch),
        latencies_ms=samples.latencies_ms,
    )


def _with_ratios(rows: list[Measurement], entries: list[_Entry]) -> list[Measurement]:
    """The rows with their ratios to torchvision's and their AP's difference to the reference's."""
    peers = {(row.peer, row.batch): row.p50_ms for row in rows if row.peer and row.p50_ms}
    base = next((entry.summary for entry in entries if entry.check == "reference"), {})

    def ratio(row: Measurement, peer: str) -> float | None:
        theirs = peers.get((peer, row.batch))
        return theirs / row.p50_ms if theirs and row.p50_ms else None

    def difference(value: float | None, name: str) -> float | None:
        return value - base[name] if value is not None and name in base else None

    return [
        replace(
            row,
            times_torchvision=ratio(row, "eager"),
            times_torchvision_onnx=ratio(row, "onnx"),
            box_ap_difference=difference(row.box_ap, "box_ap"),
            mask_ap_difference=difference(row.mask_ap, "mask_ap"),
        )
        for row in rows
    ]

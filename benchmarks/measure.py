"""Measure every contender: open it, compare its detections with the reference, time it, and evaluate its AP.

Every call of a detector is also split into its parts: decoding, preprocessing, copies, the engine and postprocessing.
"""

from __future__ import annotations

import contextlib
import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from contenders import Contender, backend_of, precision_of
from mismatch import Mismatch, compare_detections, merge_mismatches
from resources import call_in_new_process, watch_gpu
from session import Progress, Unfinished, one_line
from timing import Samples, time_in_turns
from workloads import Workload, set_input_size

from maskrcnn.data.images import read_image
from maskrcnn.errors import UserError
from maskrcnn.imaging.postprocess import Detections, unpack
from maskrcnn.imaging.preprocess import batch_images
from maskrcnn.runtime.backends.base import TimedInference
from maskrcnn.runtime.detector import Detector
from maskrcnn.runtime.evaluation.evaluate import evaluate
from maskrcnn.runtime.verification.compare import EXACT, HALF, INT8

PARTS = ("decode", "preprocess", "copy in", "engine", "copy out", "postprocess")


_CHECKED_IMAGES = 4
_SPLIT_CALLS = 5
_MEMORY = ("host_mb", "host_before_mb", "device_mb")  # see `resources.detector_peak`
# Detections are compared in pixels of the original image, with the box and score tolerances of
# `runtime.verification.compare`. In FP32 one in fifty may be unpaired: the IoU of two boxes can be at NMS's threshold.
_BOUNDS = {
    name: {
        "box_px": tolerance.box_px,
        "score": tolerance.score,
        "mask_iou": mask_iou,
        "keypoints": tolerance.keypoints,
        "unpaired_share": unpaired_share,
    }
    for name, tolerance, mask_iou, unpaired_share in (
        ("fp32", EXACT, 0.95, 0.02),
        ("half", HALF, 0.5, HALF.departing_share),
        ("int8", INT8, 0.3, INT8.departing_share),
    )
}


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One row of the table: a contender at one image size and batch size."""

    model: str
    backend: str
    precision: str
    size: str  # of the images, such as 800×1088; empty: the dataset's own sizes
    batch: int
    status: str = "ok"  # ok | inexact | not run | differs | failed
    reason: str = ""  # one line, unless the status is ok
    peer: str = ""
    samples: int = 0
    p50_ms: float | None = None  # of a call with the whole batch
    p90_ms: float | None = None  # of 10 calls or more
    p99_ms: float | None = None  # of 100 calls or more
    images_per_s: float | None = None
    times_torchvision: float | None = None  # torchvision's p50 / this p50, at the same size and batch
    times_torchvision_onnx: float | None = None
    box_ap: float | None = None
    mask_ap: float | None = None
    keypoint_ap: float | None = None
    box_ap_difference: float | None = None  # to the reference
    mask_ap_difference: float | None = None
    keypoint_ap_difference: float | None = None
    check: str = ""  # difference to the reference's detections
    split_ms: dict[str, float] | None = None  # by `PARTS`, medians of additional calls
    host_mb: float | None = None  # peak memory of a process with this contender only, libraries included
    model_mb: float | None = None  # the part of it beyond the libraries
    device_mb: float | None = None
    file_mb: float | None = None  # weights included
    build_s: float | None = None  # time to make the file
    latencies_ms: tuple[float, ...] = field(default=(), repr=False)


@dataclass
class _Entry:
    """State of a contender during the benchmark."""

    contender: Contender
    backend: str
    detector: Any = None
    precision: str = ""
    status: str = "ok"
    reason: str = ""
    check: str = ""
    summary: dict[str, float] = field(default_factory=dict)
    memory: dict[str, float | None] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.contender.model} · {self.backend} {self.precision}".strip()

    def fail(self, status: str, error: Exception | str) -> None:
        """Set the status, with a reason of one line."""
        self.status, self.reason = status, one_line(error)

    @property
    def runs(self) -> bool:
        """Whether it is opened and may be called."""
        return self.detector is not None and self.status in ("ok", "inexact")


def measure(
    contenders: Sequence[Contender],
    workload: Workload,
    progress: Progress,
    *,
    memory: bool = False,
    kept: Unfinished | None = None,
) -> tuple[list[Measurement], dict[str, Any]]:
    """Measure every contender at every size and batch size.

    Args:
        contenders: models to measure.
        workload: images, batch sizes and dataset.
        progress: progress output.
        memory: also measure peak memory, each contender in its own process.
        kept: results of an interrupted run.

    Returns:
        The rows of the table, and the GPU's state during timing (empty without a GPU).
    """
    kept = kept or Unfinished(None, {})
    entries = [_open(contender, progress) for contender in contenders]
    _check(entries, workload, progress)
    groups = [(size, batch) for size in workload.pools for batch in workload.batches]
    with watch_gpu() as gpu:
        samples = {group: _kept_samples(kept, entries, workload, group, progress) for group in groups}
    splits = {group: _split(entries, workload, group) for group in groups}
    if memory:
        _measure_memory(entries, workload, progress, kept)
    _evaluate(entries, workload, progress, kept)
    rows = [
        _row(entry, size, batch, samples[size, batch].get(entry.name), splits[size, batch].get(entry.name))
        for entry in entries
        for size, batch in (groups if entry.runs else groups[:1])
    ]
    return _with_ratios(rows, entries), gpu


def _detect_and_encode(detector: Any, images: list[np.ndarray]) -> list[Detections]:
    """The timed call: from decoded images to boxes, scores, labels and, if the model has masks, their run lengths."""
    found = detector.detect(images)
    for detections in found:
        if detections.has_masks:
            detections.rles()
    return found


def _open(contender: Contender, progress: Progress) -> _Entry:
    entry = _Entry(contender, contender.backend, precision=contender.precision)
    try:
        entry.detector = contender.open()
        entry.precision = precision_of(entry.detector)
        entry.backend = backend_of(entry.detector, contender.backend)
    except (UserError, ImportError) as error:
        entry.fail("not run", error)
    except Exception as error:  # any error of a library affects its own row only
        entry.fail("failed", error)
    progress.say(f"{entry.name}: {entry.reason or 'ready'}")
    return entry


def _check(entries: list[_Entry], workload: Workload, progress: Progress) -> None:
    """Compare each entry's detections with the reference's; without a named reference, with the first that runs."""
    running = [entry for entry in entries if entry.runs]
    if not running:
        return
    reference = next((entry for entry in running if entry.contender.is_reference), running[0])
    calls = _checked_calls(workload)
    for entry in running:
        set_input_size(entry.detector, next(iter(workload.pools)))
    try:
        expected = [reference.detector.detect(images) for images in calls]
    except Exception as error:  # nothing can be checked without a reference
        for entry in running:
            entry.fail("failed", f"the reference {reference.name} failed: {one_line(error)}")
        return
    reference.check = "reference"
    with progress.steps(f"comparing with {reference.name}", len(running) - 1) as stepper:
        for entry in running:
            if entry is not reference:
                _compare(entry, calls, expected, reference.detector.metadata.detections)
                progress.say(f"{entry.name}: {entry.check or entry.reason}")
                stepper.advance()


def _checked_calls(workload: Workload) -> list[list[np.ndarray]]:
    """Some images one by one, and one batch."""
    size = next(iter(workload.pools))
    alone = [[image] for image in workload.pools[size][:_CHECKED_IMAGES]]
    return alone + [workload.batch(size, batch, 0) for batch in workload.batches if batch > 1][:1]


def _compare(entry: _Entry, calls: list[list[np.ndarray]], expected: list[list[Detections]], rows: int) -> None:
    is_exact = entry.precision == "fp32"
    bounds = _BOUNDS["fp32" if is_exact else "int8" if "int8" in entry.precision else "half"]
    limit = entry.contender.largest_batch
    parts: list[Mismatch] = []
    try:
        for images, reference in zip(calls, expected, strict=True):
            if limit is None or len(images) <= limit:
                found = entry.detector.detect(images)
                parts += [
                    compare_detections(first, second, bounds["keypoints"], edge=bounds["score"], max_rows=rows)
                    for first, second in zip(reference, found, strict=True)
                ]
    except Exception as error:
        entry.fail("failed", error)
        return
    difference = merge_mismatches(parts)
    entry.check = str(difference)
    if not difference.within(**bounds):
        # A wrong FP32 model is a bug, and its latency is not reported. Other precisions are judged by their AP.
        entry.fail("differs" if is_exact else "inexact", f"from the reference: {difference}")


def _kept_samples(
    kept: Unfinished, entries: list[_Entry], workload: Workload, group: tuple[str, int], progress: Progress
) -> dict[str, Samples]:
    """Latencies of all contenders at one size and batch, from one interleaved measurement or from the kept results."""

    def make() -> dict[str, Any]:
        found = _time(entries, workload, group, progress)
        return {name: [list(s.latencies_ms), one_line(s.error) if s.error else ""] for name, s in found.items()}

    taken = kept.get("samples", f"{group[0]} {group[1]}", make)
    return {name: Samples(tuple(ms), RuntimeError(error) if error else None) for name, (ms, error) in taken.items()}


def _time(entries: list[_Entry], workload: Workload, group: tuple[str, int], progress: Progress) -> dict[str, Samples]:
    size, batch = group
    calls: dict[str, Callable[[int], Any]] = {}
    for entry in _able(entries, batch):
        set_input_size(entry.detector, size)
        calls[entry.name] = lambda turn, detector=entry.detector: _detect_and_encode(
            detector, workload.batch(size, batch, turn)
        )
    # Libraries prepare for each new input shape.
    shapes = {tuple(image.shape for image in workload.batch(size, batch, turn)) for turn in range(workload.repeat)}
    warmup = min(workload.repeat, len(workload.pools[size])) if len(shapes) > 1 else 1
    total = len(calls) * (workload.repeat + warmup)
    with progress.steps(f"timing {size} batch {batch}: {workload.repeat} rounds".replace("  ", " "), total) as stepper:
        return time_in_turns(
            calls,
            repeat=workload.repeat,
            warmup=warmup,
            budget_s=workload.budget_s,
            progress=lambda name: stepper.advance(),
        )


def _able(entries: list[_Entry], batch: int) -> list[_Entry]:
    """Entries that run at this batch size."""
    return [entry for entry in entries if entry.runs and batch <= (entry.contender.largest_batch or batch)]


def _split(entries: list[_Entry], workload: Workload, group: tuple[str, int]) -> dict[str, dict[str, float] | None]:
    """Median milliseconds of each of `PARTS` of a call, by contender; None for peers and where the call fails."""
    size, batch = group
    found: dict[str, dict[str, float] | None] = {}
    for entry in _able(entries, batch):
        set_input_size(entry.detector, size)
        images, files = workload.batch(size, batch, 0), workload.files_of_batch(size, batch)
        found[entry.name] = None
        if isinstance(entry.detector, Detector):
            with contextlib.suppress(Exception):  # the row has its latency, or the reason why there is none
                calls = [_one_call(entry.detector, images, files) for _ in range(_SPLIT_CALLS + 1)][1:]
                parts = [part for part in PARTS if part in calls[0]]
                found[entry.name] = {part: statistics.median(call[part] for call in calls) for part in parts}
    return found


def _one_call(detector: Detector, images: Sequence[np.ndarray], files: Sequence[Path]) -> dict[str, float]:
    """Milliseconds of each part; "decode" only with files, copies within "engine" unless the backend measures them."""
    marks = [("", time.perf_counter())]

    def mark(part: str) -> None:
        marks.append((part, time.perf_counter()))

    for path in files:
        read_image(path)
    mark("decode")
    pixels, sizes = batch_images(list(images), detector.metadata.preprocessing)
    mark("preprocess")
    feeds = {"images": pixels, "image_sizes": sizes}
    backend = detector.backend
    outputs, inside = backend.infer_timed(feeds) if isinstance(backend, TimedInference) else (backend(feeds), {})
    mark("engine")
    for found in unpack(outputs, sizes, [image.shape[:2] for image in images]):
        if found.has_masks:
            found.rles()
    mark("postprocess")
    parts = {part: 1e3 * (end - began) for (_, began), (part, end) in itertools.pairwise(marks)} | inside
    return parts if files else {part: value for part, value in parts.items() if part != "decode"}


def _measure_memory(entries: list[_Entry], workload: Workload, progress: Progress, kept: Unfinished) -> None:
    able = [entry for entry in entries if entry.runs and entry.contender.spec]
    size_hw = list(next(iter(workload.pools.values()))[0].shape[:2])

    def peak(spec: dict[str, Any]) -> dict[str, float | None]:
        try:
            return call_in_new_process("resources:detector_peak", {**spec, "size_hw": size_hw})
        except RuntimeError:  # the row has its latency
            return dict.fromkeys(_MEMORY)

    with progress.steps("measuring memory", len(able)) as stepper:
        for entry in able:
            entry.memory = kept.get("memory", entry.name, lambda entry=entry: peak(entry.contender.spec))
            stepper.advance()


def _evaluate(entries: list[_Entry], workload: Workload, progress: Progress, kept: Unfinished) -> None:
    if workload.dataset is None:
        return
    running = [entry for entry in entries if entry.runs]
    with progress.steps("evaluating", len(running) * len(workload.dataset.images)) as stepper:
        for entry in running:
            set_input_size(entry.detector, next(iter(workload.pools)))
            try:
                entry.summary = kept.get(
                    "ap",
                    entry.name,
                    lambda entry=entry: evaluate(entry.detector, workload.dataset, progress=stepper.advance).summary(),
                )
                metrics = (f"{name.replace('_ap', ' AP')} {value:.4f}" for name, value in entry.summary.items())
                progress.say(f"{entry.name}: {', '.join(metrics)}")
            except Exception as error:
                entry.reason = f"no AP: {one_line(error)}"
                progress.say(f"{entry.name}: {entry.reason}")


def _row(entry: _Entry, size: str, batch: int, samples: Samples | None, split: dict[str, float] | None) -> Measurement:
    contender = entry.contender
    host, before, device = (entry.memory.get(key) for key in _MEMORY)
    row = Measurement(
        model=contender.model,
        backend=entry.backend,
        precision=entry.precision,
        size=size,
        batch=batch,
        status=entry.status,
        reason=entry.reason,
        peer=contender.peer,
        check=entry.check,
        host_mb=host,
        model_mb=host - before if host and before else None,
        device_mb=device,
        file_mb=contender.file_mb(),
        build_s=contender.build_s,
        **entry.summary,
    )
    if not entry.runs:
        return row
    if samples is None:
        reason = f"takes at most {contender.largest_batch} image(s) at a time"
        return replace(row, status="not run", reason=reason, **dict.fromkeys(entry.summary))
    if samples.error is not None or not samples.latencies_ms:
        return replace(row, status="failed", reason=one_line(samples.error or "no samples"))
    count = len(samples.latencies_ms)
    p50, p90, p99 = (
        samples.percentile_ms(percent) if count >= least else None for percent, least in ((50, 1), (90, 10), (99, 100))
    )
    return replace(
        row,
        samples=count,
        p50_ms=p50,
        p90_ms=p90,
        p99_ms=p99,
        images_per_s=samples.per_second(batch),
        split_ms=split,
        latencies_ms=samples.latencies_ms,
    )


def spread(latencies_ms: Sequence[float]) -> float:
    """Interquartile range relative to the median; 0 for fewer than 4 samples."""
    if len(latencies_ms) < 4:
        return 0.0
    low, middle, high = statistics.quantiles(latencies_ms, n=4)
    return (high - low) / middle


def _with_ratios(rows: list[Measurement], entries: list[_Entry]) -> list[Measurement]:
    """Add the latency ratios to torchvision and the AP differences to the reference."""
    peers = {(row.peer, row.size, row.batch): row.p50_ms for row in rows if row.peer and row.p50_ms}
    base = next((entry.summary for entry in entries if entry.check == "reference"), {})

    def ratio(row: Measurement, peer: str) -> float | None:
        theirs = peers.get((peer, row.size, row.batch))
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
            keypoint_ap_difference=difference(row.keypoint_ap, "keypoint_ap"),
        )
        for row in rows
    ]

"""Opens every contender, compares it with the reference, then times and evaluates it."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from contenders import Contender, backend_of, precision_of
from gpu_watch import watch
from matching import Mismatch, compare_detections, merge
from memory import KEYS, peak_memory
from session import Progress, Unfinished
from timing import Samples, time_in_turns
from workloads import Workload, take_size

from maskrcnn.data.images import read_image
from maskrcnn.errors import UserError
from maskrcnn.imaging.postprocess import Detections, unpack
from maskrcnn.imaging.preprocess import batch_images
from maskrcnn.runtime import Detector
from maskrcnn.runtime.evaluation.evaluate import evaluate
from maskrcnn.runtime.verification.compare import EXACT, HALF, INT8

# Where the time of one call goes: decoding, preprocessing, copies, the engine, postprocessing.

PARTS = ("decode", "preprocess", "copy in", "engine", "copy out", "postprocess")


def _split_of_call(
    detector: Any, images: Sequence[np.ndarray], files: Sequence[Path], *, repeat: int
) -> dict[str, float] | None:
    """Milliseconds of each part of one call, medians.

    Args:
        detector: opened; a peer, which does not show its parts, gives None.
        images: of one call.
        files: those that the images were read from; without them there is no "decode".
        repeat: measured calls, after one to warm up.

    Returns:
        by the names of `PARTS`. Backends that do not tell their copies apart have them in "engine".
    """
    if not isinstance(detector, Detector):
        return None
    calls = [_one_call(detector, images, files) for _ in range(repeat + 1)][1:]
    found = {part: statistics.median(call[part] for call in calls) for part in PARTS if part in calls[0]}
    return {part: milliseconds for part, milliseconds in found.items() if part in calls[0]}


def _one_call(detector: Detector, images: Sequence[np.ndarray], files: Sequence[Path]) -> dict[str, float]:
    marks = [("", time.perf_counter())]

    def mark(part: str) -> None:
        marks.append((part, time.perf_counter()))

    for path in files:
        read_image(path)
    mark("decode")
    pixels, sizes = batch_images(list(images), detector.metadata.preprocessing)
    mark("preprocess")
    feeds = {"images": pixels, "image_sizes": sizes}
    timed = getattr(detector.backend, "infer_timed", None)
    outputs, inside = timed(feeds) if timed else (detector.backend(feeds), {})
    mark("engine")
    for found in unpack(outputs, sizes, [image.shape[:2] for image in images]):
        if found.has_masks:
            found.rles()
    mark("postprocess")
    parts = {part: 1e3 * (end - began) for (_, began), (part, end) in itertools.pairwise(marks)} | inside
    return parts if files else {part: value for part, value in parts.items() if part != "decode"}


_CHECKED_IMAGES = 4
_SPLIT_CALLS = 5
# Detections are compared where users see them, in the photo; see `runtime.compare` for boxes and scores. One
# in fifty may lack a partner in FP32: the overlap of two boxes can lie at suppression's very threshold.
_FP32_BOUNDS = {
    "box_px": EXACT.box_px,
    "score": EXACT.score,
    "mask_iou": 0.95,
    "keypoints": EXACT.keypoints,
    "unpaired_share": 0.02,
}
_HALF_BOUNDS = {
    "box_px": HALF.box_px,
    "score": HALF.score,
    "mask_iou": 0.5,
    "keypoints": HALF.keypoints,
    "unpaired_share": HALF.departing_share,
}
_INT8_BOUNDS = {
    "box_px": INT8.box_px,
    "score": INT8.score,
    "mask_iou": 0.3,
    "keypoints": INT8.keypoints,
    "unpaired_share": INT8.departing_share,
}


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One row of the table."""

    model: str
    backend: str
    precision: str
    size: str  # of the images, as 800×1088; empty: as the dataset's are
    batch: int
    status: str = "ok"  # ok | inexact | not run | differs | failed
    reason: str = ""  # one line, where the status is not ok
    peer: str = ""
    samples: int = 0
    p50_ms: float | None = None  # of a call with the whole batch
    p90_ms: float | None = None
    p99_ms: float | None = None
    images_per_s: float | None = None
    times_torchvision: float | None = None  # its p50 divided by this one's, at the same size and batch
    times_torchvision_onnx: float | None = None
    box_ap: float | None = None
    mask_ap: float | None = None
    keypoint_ap: float | None = None
    box_ap_difference: float | None = None  # to the reference
    mask_ap_difference: float | None = None
    keypoint_ap_difference: float | None = None
    check: str = ""  # difference to the reference's detections
    split_ms: dict[str, float] | None = None  # by splits.PARTS, medians of other calls than those above
    host_mb: float | None = None  # most memory that a process with this contender alone held, libraries included
    model_mb: float | None = None  # the part of it beyond the libraries
    device_mb: float | None = None
    file_mb: float | None = None  # of the file, with its weights
    build_s: float | None = None  # what making the file took
    latencies_ms: tuple[float, ...] = field(default=(), repr=False)


@dataclass
class _Entry:
    """A contender on its way through the benchmark."""

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
        """Takes the contender out, with a reason of one line."""
        self.status, self.reason = status, one_line(error)

    @property
    def runs(self) -> bool:
        """Whether it can still be called."""
        return self.detector is not None and self.status in ("ok", "inexact")


def measure(
    contenders: Sequence[Contender],
    workload: Workload,
    progress: Progress,
    *,
    memory: bool = False,
    kept: Unfinished | None = None,
) -> tuple[list[Measurement], dict[str, Any]]:
    """The table's rows, every contender at every size and batch; and what the GPU did meanwhile, if there is one.

    Args:
        contenders: what is compared.
        workload: on what.
        progress: is told what is being done.
        memory: measure peak memory too, each contender in a process of its own.
        kept: what a broken run has measured already.
    """
    kept = kept or Unfinished(None, {})
    entries = [_open(contender, progress) for contender in contenders]
    _check(entries, workload, progress)
    groups = [(size, batch) for size in workload.pools for batch in workload.batches]
    with watch() as gpu:
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


def _detect_and_encode(detector: Any, images: list) -> list[Detections]:
    """What is timed: from decoded images to boxes, scores, labels and, if any, pasted masks as run lengths."""
    found = detector.detect(images)
    for detections in found:
        if detections.has_masks:
            detections.rles()
    return found


def one_line(error: Exception | str) -> str:
    """An error in one line; of a UserError what came and what to do."""
    if isinstance(error, UserError):
        return " ".join(f"{error.found}; {error.fix}".split())
    text = " ".join(str(error).split())
    name = "" if isinstance(error, str) else f"{type(error).__name__}: "
    return name + (text if len(text) <= 200 else text[:200] + " …")


def _open(contender: Contender, progress: Progress) -> _Entry:
    entry = _Entry(contender, contender.backend, precision=contender.precision)
    try:
        entry.detector = contender.open()
        entry.precision = precision_of(entry.detector)
        entry.backend = backend_of(entry.detector, contender.backend)
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
    for entry in running:
        take_size(entry.detector, next(iter(workload.pools)))
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
    size = next(iter(workload.pools))
    alone = [[image] for image in workload.pools[size][:_CHECKED_IMAGES]]
    return alone + [workload.batch(size, batch, 0) for batch in workload.batches if batch > 1][:1]


def _compare(entry: _Entry, calls: list[list], wanted: list[list[Detections]], rows: int) -> None:
    is_exact = entry.precision == "fp32"
    bounds = _FP32_BOUNDS if is_exact else _INT8_BOUNDS if "int8" in entry.precision else _HALF_BOUNDS
    limit = entry.contender.largest_batch
    parts: list[Mismatch] = []
    try:
        for images, reference in zip(calls, wanted, strict=True):
            if limit is None or len(images) <= limit:
                found = entry.detector.detect(images)
                parts += [
                    compare_detections(first, second, bounds["keypoints"], edge=bounds["score"], rows=rows)
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


def _kept_samples(
    kept: Unfinished, entries: list[_Entry], workload: Workload, group: tuple[str, int], progress: Progress
) -> dict[str, Samples]:
    """The samples of one size and batch: all contenders' from one measurement, in turns, or none."""

    def make() -> dict[str, Any]:
        found = _time(entries, workload, group, progress)
        return {name: [list(s.latencies_ms), one_line(s.error) if s.error else ""] for name, s in found.items()}

    taken = kept.get("samples", f"{group[0]} {group[1]}", make)
    return {name: Samples(tuple(ms), RuntimeError(error) if error else None) for name, (ms, error) in taken.items()}


def _time(entries: list[_Entry], workload: Workload, group: tuple[str, int], progress: Progress) -> dict[str, Samples]:
    size, batch = group
    calls: dict[str, Callable[[int], Any]] = {}
    for entry in _able(entries, batch):
        take_size(entry.detector, size)
        calls[entry.name] = lambda turn, detector=entry.detector: _detect_and_encode(
            detector, workload.batch(size, batch, turn)
        )
    # Libraries prepare themselves for each shape that they see for the first time.
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
    """Those that run and take so many images at once."""
    return [entry for entry in entries if entry.runs and batch <= (entry.contender.largest_batch or batch)]


def _split(entries: list[_Entry], workload: Workload, group: tuple[str, int]) -> dict[str, dict[str, float] | None]:
    """Where the time of a call goes, by contender; a contender that fails here has no split."""
    size, batch = group
    found: dict[str, dict[str, float] | None] = {}
    for entry in _able(entries, batch):
        take_size(entry.detector, size)
        images, files = workload.batch(size, batch, 0), workload.files_of_batch(size, batch)
        try:
            found[entry.name] = _split_of_call(entry.detector, images, files, repeat=_SPLIT_CALLS)
        except Exception:  # it has a row with its latency, or with the reason why there is none
            found[entry.name] = None
    return found


def _measure_memory(entries: list[_Entry], workload: Workload, progress: Progress, kept: Unfinished) -> None:
    able = [entry for entry in entries if entry.runs and entry.contender.spec]
    size_hw = next(iter(workload.pools.values()))[0].shape[:2]
    with progress.steps("measuring memory", len(able)) as stepper:
        for entry in able:
            spec = {**entry.contender.spec, "size_hw": list(size_hw)}
            entry.memory = kept.get("memory", entry.name, lambda spec=spec: peak_memory(spec))
            stepper.advance()


def _evaluate(entries: list[_Entry], workload: Workload, progress: Progress, kept: Unfinished) -> None:
    if workload.dataset is None:
        return
    running = [entry for entry in entries if entry.runs]
    with progress.steps("evaluating", len(running) * len(workload.dataset.images)) as stepper:
        for entry in running:
            take_size(entry.detector, next(iter(workload.pools)))
            try:
                entry.summary = kept.get(
                    "ap",
                    entry.name,
                    lambda entry=entry: evaluate(entry.detector, workload.dataset, progress=stepper.advance).summary(),
                )
                figures = (f"{name.replace('_ap', ' AP')} {value:.4f}" for name, value in entry.summary.items())
                progress.say(f"{entry.name}: {', '.join(figures)}")
            except Exception as error:
                entry.reason = f"no AP: {one_line(error)}"
                progress.say(f"{entry.name}: {entry.reason}")


def _row(entry: _Entry, size: str, batch: int, samples: Samples | None, split: dict[str, float] | None) -> Measurement:
    contender = entry.contender
    host, before, device = (entry.memory.get(key) for key in KEYS)
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
        build_s=contender.build_s(),
        **entry.summary,
    )
    if not entry.runs:
        return row
    if samples is None:
        reason = f"takes at most {contender.largest_batch} image(s) at a time"
        return replace(row, status="not run", reason=reason, **dict.fromkeys(entry.summary))
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
        split_ms=split,
        latencies_ms=samples.latencies_ms,
    )


def _with_ratios(rows: list[Measurement], entries: list[_Entry]) -> list[Measurement]:
    """The rows with their ratios to torchvision's and their AP's difference to the reference's."""
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

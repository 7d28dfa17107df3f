"""Scaling of a model's cost with image size, batch size, threads, detections and dataset size.

    python benchmarks/scaling.py [--model FILE …] [--curves size,batch,threads,detections,dataset] [--output FOLDER]

measures the newest run's ONNX file and engines, or the given files. The points of a curve are measured interleaved, so
that other load does not bend it. Each curve is drawn as an SVG; scaling.json holds the values, and tables are printed.

The last two curves need no model: masks of random boxes are pasted and encoded, and the simulated results of
benchmarks/evaluation.py, 100 per image, are scored by pycocotools and by our own scorer.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from contenders import newest_artefacts
from evaluation import SIZE_HW, scored_by_pycocotools, simulated
from session import Progress, aligned, numbers, sizes_hw
from timing import environment, machine, time_in_turns
from workloads import generated_images, set_input_size, size_name

from maskrcnn.errors import report_errors
from maskrcnn.files import atomic_path, write_json
from maskrcnn.imaging.postprocess import Detections
from maskrcnn.machine import available_cpus
from maskrcnn.runtime.detector import Detector
from maskrcnn.runtime.evaluation.ground_truth import GroundTruth
from maskrcnn.runtime.evaluation.scoring import score_entries
from maskrcnn.runtime.plots import line_chart

_SIZES_HW = [(224, 320), (320, 448), (480, 640), (640, 896), (800, 1088), (800, 1344)]
_BATCHES = (1, 2, 4, 8)
_DETECTIONS = (1, 5, 20, 50, 100)
_IMAGES = (250, 500, 1000, 2000, 5000)
_PASTED_HW = (800, 1333)
_RESULTS = 100  # per image of the simulated dataset


@dataclass(frozen=True, kw_only=True)
class _Curve:
    """A chart: the latency of `calls[line][x]` divided by `units[x]`, against x."""

    name: str
    title: str
    across: str
    along: str
    calls: Mapping[str, Mapping[float, Callable[[int], Any]]]
    units: Mapping[float, float]
    warmup: int = 1


def _size_curve(detectors: Mapping[str, Detector], sizes: Sequence[tuple[int, int]]) -> _Curve:
    """Milliseconds per image against its pixels."""
    pixels = {height * width / 1e6: (height, width) for height, width in sizes}
    return _Curve(
        name="size",
        title="One image, by its size",
        across="megapixels",
        along="ms",
        calls={
            name: {x: _detecting(detector, size_hw, 1) for x, size_hw in pixels.items()}
            for name, detector in detectors.items()
        },
        units=dict.fromkeys(pixels, 1.0),
    )


def _batch_curve(detectors: Mapping[str, Detector], batches: Sequence[int], size_hw: tuple[int, int]) -> _Curve:
    """Milliseconds per image against the batch size."""
    return _Curve(
        name="batch",
        title=f"Each image of {size_name(size_hw)}, by the batch",
        across="images of a call",
        along="ms per image",
        calls={
            name: {float(batch): _detecting(detector, size_hw, batch) for batch in batches}
            for name, detector in detectors.items()
        },
        units={float(batch): float(batch) for batch in batches},
    )


def _threads_curve(paths: Sequence[Path], size_hw: tuple[int, int]) -> _Curve:
    """Milliseconds per image against the number of threads, for runtimes where it can be set."""
    cpus = available_cpus()
    counts = sorted({2**k for k in range(10) if 2**k <= cpus} | {cpus})
    return _Curve(
        name="threads",
        title=f"One image of {size_name(size_hw)}, by threads",
        across="threads",
        along="ms",
        calls={
            path.name: {float(n): _detecting(Detector.load(path, threads=n), size_hw, 1) for n in counts}
            for path in paths
        },
        units=dict.fromkeys(map(float, counts), 1.0),
    )


def _detecting(detector: Detector, size_hw: tuple[int, int], batch: int) -> Callable[[int], Any]:
    images = generated_images(batch, size_hw)

    def call(turn: int) -> None:
        set_input_size(detector, size_name(size_hw))
        for found in detector.detect(images):
            if found.has_masks:
                found.rles()

    return call


def _detections_curve(counts: Sequence[int]) -> _Curve:
    """Milliseconds of pasting and encoding against the number of detections."""
    found = {float(count): _random_detections(count) for count in counts}
    return _Curve(
        name="detections",
        title=f"Masks pasted into {size_name(_PASTED_HW)} and encoded",
        across="detections",
        along="ms",
        calls={"paste and encode": {x: (lambda turn, found=each: found.rles()) for x, each in found.items()}},
        units=dict.fromkeys(found, 1.0),
    )


def _random_detections(count: int) -> Detections:
    rng = np.random.default_rng(count)
    sides = np.exp(rng.uniform(np.log(16), np.log(400), (count, 2)))
    corners = rng.random((count, 2)) * (np.array(_PASTED_HW[::-1]) - sides)
    boxes = np.concatenate([corners, corners + sides], axis=1).astype(np.float32)
    ones = np.ones(count, np.float32)
    return Detections(boxes, ones, ones.astype(np.int64), rng.random((count, 28, 28), np.float32), _PASTED_HW)


def dataset_curve(images: Sequence[int]) -> _Curve:
    """Seconds of scoring boxes against the number of images, by pycocotools and by our scorer."""
    datasets = {float(count): simulated(count, _RESULTS, "bbox", SIZE_HW) for count in images}

    def fast(content: dict[str, Any], results: list[dict[str, Any]]) -> Callable[[int], Any]:
        return lambda turn: score_entries(GroundTruth.of_content(content, "simulated"), results, "bbox")

    def theirs(content: dict[str, Any], results: list[dict[str, Any]]) -> Callable[[int], Any]:
        return lambda turn: scored_by_pycocotools(content, list(results), "bbox")

    return _Curve(
        name="dataset",
        title=f"Scoring boxes, {_RESULTS} results an image",
        across="images",
        along="s",
        calls={
            "pycocotools": {count: theirs(*dataset) for count, dataset in datasets.items()},
            "maskrcnn": {count: fast(*dataset) for count, dataset in datasets.items()},
        },
        units=dict.fromkeys(map(float, images), 1000.0),
        warmup=0,
    )


def _measured(curve: _Curve, *, repeat: int, progress: Progress) -> dict[str, list[tuple[float, float]]]:
    """Measure (x, median) for every point of every line."""
    calls = {f"{line} {x:g}": call for line, points in curve.calls.items() for x, call in points.items()}
    with progress.steps(curve.title, len(calls) * (repeat + curve.warmup)) as stepper:
        samples = time_in_turns(calls, repeat=repeat, warmup=curve.warmup, progress=lambda name: stepper.advance())
    found: dict[str, list[tuple[float, float]]] = {}
    for line, points in curve.calls.items():
        for x in sorted(points):
            sample = samples[f"{line} {x:g}"]
            if sample.error is not None:
                raise RuntimeError(f"{curve.title}, {line} at {x:g}: {sample.error}") from sample.error
            found.setdefault(line, []).append((x, statistics.median(sample.latencies_ms) / curve.units[x]))
    return found


def growth(points: Sequence[tuple[float, float]]) -> float:
    """Fit the exponent p of cost ~ x^p by least squares on logarithms: 1 is proportional, 0 no growth."""
    x, y = np.log(np.array(points).T)
    return float(np.polyfit(x, y, 1)[0])


def table(curve: Mapping[str, Any]) -> str:
    """Format a curve of scaling.json as a Markdown table: a row per line, a column per x, and the growth."""
    first = next(iter(curve["lines"].values()))
    heads = [f"{curve['along']} at {curve['across']}", *(f"{x:.4g}" for x, _ in first), "grows as"]
    rows = [
        [name, *(f"{y:.3g}" for _, y in points), f"x^{growth(points):.2f}" if len(points) > 1 else ""]
        for name, points in curve["lines"].items()
    ]
    return aligned(heads, rows)


def _curves_of(given: argparse.Namespace, paths: Sequence[Path]) -> Iterator[_Curve]:
    """The chosen curves, each made when it is measured."""
    detectors = {path.name: Detector.load(path) for path in paths} if {"size", "batch"} & set(given.curves) else {}
    for name in given.curves:
        if name in ("size", "batch", "threads") and not paths:
            continue
        if name == "size":
            yield _size_curve(detectors, given.sizes)
        elif name == "batch":
            yield _batch_curve(detectors, given.batch, given.sizes[0])
        elif name == "threads":
            yield _threads_curve([path for path in paths if path.suffix in (".onnx", ".xml")], given.sizes[-1])
        elif name == "detections":
            yield _detections_curve(_DETECTIONS)
        else:
            yield dataset_curve(given.images)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    names = ("size", "batch", "threads", "detections", "dataset")
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--model", type=Path, action="append", default=[], help="file, repeatable; default: those of the newest run"
    )
    parser.add_argument("--curves", type=lambda text: text.split(","), default=list(names), help=",".join(names))
    parser.add_argument("--sizes", type=sizes_hw, default=_SIZES_HW, help="image sizes, such as 224x320,480x640")
    parser.add_argument("--batch", type=numbers, default=_BATCHES, help="batch sizes, at the first image size")
    parser.add_argument("--images", type=numbers, default=_IMAGES, help="numbers of images of the simulated datasets")
    parser.add_argument("--repeat", type=int, default=5, help="measurements per point; default: 5")
    parser.add_argument("--output", type=Path, default=Path("runs") / "scaling", help="default: runs/scaling")
    given = parser.parse_args(arguments)
    if unknown := set(given.curves) - set(names):
        parser.error(f"--curves {','.join(sorted(unknown))}: expected {', '.join(names)}")
    return given


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, write, print, and return the content of scaling.json."""
    given, progress = parse(arguments), Progress()
    paths = given.model
    if not paths and {"size", "batch", "threads"} & set(given.curves):
        artefacts = newest_artefacts()
        paths = [*artefacts.onnx, *artefacts.engines]
    content: dict[str, Any] = {"schema": 1, "environment": environment(), "repeat": given.repeat, "curves": {}}
    for curve in _curves_of(given, paths):
        lines = _measured(curve, repeat=given.repeat, progress=progress)
        shown = {"title": curve.title, "across": curve.across, "along": curve.along, "lines": lines}
        content["curves"][curve.name] = shown
        chart = line_chart(curve.title, curve.across, curve.along, lines, log_x=True, log_y=True)
        with atomic_path(given.output / f"{curve.name}.svg") as draft:
            draft.write_text(chart, encoding="utf-8")
        write_json(given.output / "scaling.json", content)
        print(f"\n{curve.title}\n\n{table(shown)}")
    print("\n".join(["", *machine(content["environment"]), "", str(given.output / "scaling.json")]))
    return content


if __name__ == "__main__":
    with report_errors():
        main()

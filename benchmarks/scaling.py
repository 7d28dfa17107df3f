"""How the cost of a model grows: with the image, the batch, the threads, the detections and the dataset.

    python benchmarks/scaling.py [--model FILE …] [--curves size,batch,threads,detections,dataset] [--output FOLDER]

Takes the newest run's ONNX file and engines, or the files named. The points of one curve take turns, so that a busy
machine bends no curve. Each curve becomes an SVG; scaling.json holds the numbers, and a table is printed.

The last two curves need no model: masks of random boxes are pasted and encoded, and the simulated results
of benchmarks/evaluation.py, 100 an image, are scored by pycocotools and by our own scorer.
"""

from __future__ import annotations

import argparse
import os
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from contenders import newest_artefacts
from evaluation import SIZE_HW, scored_by_pycocotools, simulated
from report import Axis, Series, aligned, chart, machine
from session import Progress, numbers, sizes_hw
from timing import environment, time_in_turns
from workloads import generated_images, size_name, take_size

from maskrcnn.errors import told_to_the_user
from maskrcnn.files import atomic_path, write_json
from maskrcnn.imaging.postprocess import Detections
from maskrcnn.runtime import Detector
from maskrcnn.runtime.evaluation.ground_truth import GroundTruth
from maskrcnn.runtime.evaluation.scoring import Scorer, score_entries

_SIZES_HW = [(224, 320), (320, 448), (480, 640), (640, 896), (800, 1088), (800, 1344)]
_BATCHES = (1, 2, 4, 8)
_DETECTIONS = (1, 5, 20, 50, 100)
IMAGES = (250, 500, 1000, 2000, 5000)
_PASTED_HW = (800, 1333)
RESULTS = 100  # of each image of the simulated dataset


@dataclass(frozen=True, kw_only=True)
class _Curve:
    """One question: `calls[line][x]` is measured and divided by `units[x]`."""

    name: str
    title: str
    across: str
    along: str
    calls: Mapping[str, Mapping[float, Callable[[int], Any]]]
    units: Mapping[float, float]
    warmup: int = 1


def _size_curve(detectors: Mapping[str, Detector], sizes: Sequence[tuple[int, int]]) -> _Curve:
    """Milliseconds of one image against its pixels."""
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
    """Milliseconds of each image against the images of a call."""
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
    """Milliseconds of one image against the threads a runtime may use; of runtimes that take their number."""
    counts = sorted({2**k for k in range(10) if 2**k <= (os.cpu_count() or 1)} | {os.cpu_count() or 1})
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
        take_size(detector, size_name(size_hw))
        for found in detector.detect(images):
            if found.has_masks:
                found.rles()

    return call


def _detections_curve(counts: Sequence[int]) -> _Curve:
    """Milliseconds of pasting and encoding against the detections of an image."""
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
    """Seconds of scoring boxes against the images of a dataset, by pycocotools and by `--scorer fast`."""
    datasets = {float(count): simulated(count, RESULTS, "bbox", SIZE_HW) for count in images}

    def fast(content: dict[str, Any], results: list[dict[str, Any]]) -> Callable[[int], Any]:
        return lambda turn: score_entries(GroundTruth(content, "simulated"), results, "bbox", scorer=Scorer.FAST)

    def theirs(content: dict[str, Any], results: list[dict[str, Any]]) -> Callable[[int], Any]:
        return lambda turn: scored_by_pycocotools(content, list(results), "bbox")

    return _Curve(
        name="dataset",
        title=f"Scoring boxes, {RESULTS} results an image",
        across="images",
        along="s",
        calls={
            "pycocotools": {count: theirs(*dataset) for count, dataset in datasets.items()},
            "--scorer fast": {count: fast(*dataset) for count, dataset in datasets.items()},
        },
        units=dict.fromkeys(map(float, images), 1000.0),
        warmup=0,
    )


def _measured(curve: _Curve, *, repeat: int, progress: Progress) -> dict[str, list[tuple[float, float]]]:
    """(x, median) of every point of every line."""
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
    """The exponent p of cost ~ x^p, by least squares on logarithms: 1 is proportional, 0 no growth."""
    x, y = np.log(np.array(points).T)
    return float(np.polyfit(x, y, 1)[0])


def table(curve: Mapping[str, Any]) -> str:
    """One curve of scaling.json as a Markdown table: a row for each line, a column for each x, and the growth."""
    first = next(iter(curve["lines"].values()))
    heads = [f"{curve['along']} at {curve['across']}", *(f"{x:.4g}" for x, _ in first), "grows as"]
    rows = [
        [name, *(f"{y:.3g}" for _, y in points), f"x^{growth(points):.2f}" if len(points) > 1 else ""]
        for name, points in curve["lines"].items()
    ]
    return aligned(heads, rows)


def _curves_of(given: argparse.Namespace, paths: Sequence[Path]) -> Iterator[_Curve]:
    """Those that were asked for, made when their turn comes."""
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
    """The command line's options."""
    names = ("size", "batch", "threads", "detections", "dataset")
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, action="append", default=[], help="file, repeatable; default: newest run")
    parser.add_argument("--curves", type=lambda text: text.split(","), default=list(names), help=",".join(names))
    parser.add_argument("--sizes", type=sizes_hw, default=_SIZES_HW)
    parser.add_argument("--batch", type=numbers, default=_BATCHES, help="at the first of the sizes")
    parser.add_argument("--images", type=numbers, default=IMAGES, help="of the simulated datasets")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path("runs") / "scaling")
    given = parser.parse_args(arguments)
    if unknown := set(given.curves) - set(names):
        parser.error(f"--curves {','.join(sorted(unknown))}: none of {', '.join(names)}")
    return given


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measures, writes, prints, and returns what scaling.json holds."""
    given, progress = parse(arguments), Progress()
    needs_model = {"size", "batch", "threads"} & set(given.curves)
    paths = given.model or (_newest() if needs_model else [])
    content: dict[str, Any] = {"schema": 1, "environment": environment(), "repeat": given.repeat, "curves": {}}
    for curve in _curves_of(given, paths):
        lines = _measured(curve, repeat=given.repeat, progress=progress)
        shown = {"title": curve.title, "across": curve.across, "along": curve.along, "lines": lines}
        content["curves"][curve.name] = shown
        picture = chart(
            curve.title,
            Axis(curve.across, logarithmic=True),
            Axis(curve.along, logarithmic=True),
            [Series(name, points) for name, points in lines.items()],
        )
        with atomic_path(given.output / f"{curve.name}.svg") as draft:
            draft.write_text(picture, encoding="utf-8")
        write_json(given.output / "scaling.json", content)
        print(f"\n{curve.title}\n\n{table(shown)}")
    print("\n".join(["", *machine(content["environment"]), "", str(given.output / "scaling.json")]))
    return content


def _newest() -> list[Path]:
    artefacts = newest_artefacts()
    return [*artefacts.onnx, *artefacts.engines]


if __name__ == "__main__":
    with told_to_the_user():
        main()

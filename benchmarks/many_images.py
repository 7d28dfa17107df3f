"""Images per second of `maskrcnn predict` against a loop of `Detector.detect`, and the memory of both.

    python benchmarks/many_images.py MODEL [--images FOLDER] [--counts 200,2000] [--workers 2] [--ray 1,2]

Both write COCO results with run lengths, without overlays: the loop `json.dump(Detector.detect(file).to_coco(id))`, the
pipeline `maskrcnn.predict(files, save=["results"])`. Each measurement runs in its own process; timing starts when the
model is loaded, on Ray when the cluster is running. Images come from a folder, repeated as needed, or are generated in
eight sizes. `--ray` also runs `predict --ray local` with these numbers of actors, with one CPU each, and reports when
every actor had completed its first block, and the rate from then on.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from resources import call_in_new_process, resident_mb
from session import aligned, numbers
from timing import environment, machine

from maskrcnn.api.progress import Progress
from maskrcnn.data.images import images_in
from maskrcnn.data.shapes import shapes_image
from maskrcnn.errors import report_errors

_LIMIT_S = 3600.0  # time limit of a measurement
_SIZES_HW = ((480, 640), (640, 480), (427, 640), (375, 500), (500, 375), (768, 1024), (1080, 1920), (240, 320))


def draw_images(folder: Path, count: int) -> list[Path]:
    """Writes generated JPEG images, cycling through the sizes `_SIZES_HW`."""
    from PIL import Image

    files = []
    for number in range(count):
        size_hw = _SIZES_HW[number % len(_SIZES_HW)]
        files.append(folder / f"{number:04d}.jpg")
        Image.fromarray(shapes_image(np.random.default_rng(number), size_hw)[0]).save(files[-1], quality=90)
    return files


class _Blocks(Progress):
    """Records when the blocks of a Ray run were completed, and their numbers of images."""

    def __init__(self) -> None:
        self.done: list[tuple[float, int]] = []

    @contextmanager
    def task(self, title: str, total: int | None) -> Iterator[Callable[[int], None]]:
        yield lambda images: self.done.append((time.perf_counter(), images))


def measure(way: str, model: str, folder: str, workers: int | None, output: str) -> dict[str, float]:
    """Runs one variant in this process; returns seconds, detections and peak resident memory in MB."""
    import maskrcnn
    from maskrcnn.runtime.detector import Detector

    files = images_in(Path(folder), 1 << 30)
    if way == "loop":
        detector = Detector.load(model)
        began = time.perf_counter()
        entries = []
        for number, file in enumerate(files, start=1):
            entries += detector.detect([file])[0].to_coco(number)
        Path(output, "results.json").write_text(json.dumps(entries))
        return {"seconds": time.perf_counter() - began, "detections": len(entries), "mb": resident_mb("VmHWM") or 0.0}
    if way.startswith("ray"):
        import ray

        ray.init(log_to_driver=False, include_dashboard=False, configure_logging=False)
        blocks = _Blocks()
        began = time.perf_counter()
        actors = int(way.removeprefix("ray"))
        found = maskrcnn.predict(files, model=model, output=output, ray="local", actors=actors, progress=blocks)
        row = {"seconds": time.perf_counter() - began, "detections": found.total, "mb": float("nan")}
        if len(blocks.done) > actors:
            first, last = blocks.done[actors - 1][0], blocks.done[-1][0]  # each actor has completed one
            row["start_s"] = first - began
            row["then"] = sum(images for _, images in blocks.done[actors:]) / (last - first)
        return row
    maskrcnn.predict(files[:1], model=model)  # imports
    began = time.perf_counter()
    Detector.load(model)
    load_s = time.perf_counter() - began
    began = time.perf_counter()
    found = maskrcnn.predict(files, model=model, output=output, save=["results"], workers=workers)
    return {
        "seconds": time.perf_counter() - began - load_s,
        "detections": found.total,
        "mb": resident_mb("VmHWM") or 0.0,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures each variant in its own process and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="ONNX file or engine")
    parser.add_argument("--images", type=Path, help="folder of images (default: generated images)")
    parser.add_argument("--counts", type=numbers, default=(200, 2000), help="numbers of images (default: 200,2000)")
    parser.add_argument("--workers", type=int, help="worker threads of the pipeline (default: the pipeline's)")
    parser.add_argument("--ray", type=numbers, default=(), help="numbers of Ray actors to measure (default: none)")
    parser.add_argument("--only-ray", action="store_true", help="leave out the loop and the pipeline")
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        found = images_in(given.images, 1 << 30) if given.images else draw_images(folder, 64)
        rows = []
        for count in given.counts:
            files = folder / str(count)
            files.mkdir()
            names = [files / f"{number:06d}{found[number % len(found)].suffix}" for number in range(count)]
            for number, name in enumerate(names):
                name.symlink_to(found[number % len(found)].absolute())
            for way in (*(() if given.only_ray else ("loop", "pipeline")), *(f"ray{each}" for each in given.ray)):
                output = folder / f"{way}-{count}"
                output.mkdir()
                given_to = {"way": way, "model": str(given.model), "folder": str(files), "output": str(output)}
                one = call_in_new_process("many_images:measure", {**given_to, "workers": given.workers}, _LIMIT_S)
                rate = count / one["seconds"]
                rows.append([way, str(count), f"{rate:.2f}", str(one["detections"]), f"{one['mb']:.0f}"])
                rows[-1] += [f"{one[key]:.1f}" if key in one else "" for key in ("start_s", "then")]
                print(" ".join(rows[-1]), file=sys.stderr, flush=True)
    head = ["way", "images", "images/s", "detections", "peak MB", "start s", "images/s then"]
    print("\n".join(machine(environment())))
    print(aligned(head, rows))


if __name__ == "__main__":
    with report_errors():
        main()

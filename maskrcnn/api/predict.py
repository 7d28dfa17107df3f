"""`maskrcnn.predict(...)`: detections of images, with overlays and COCO results on disk if wanted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from maskrcnn import runs
from maskrcnn.api.progress import Progress
from maskrcnn.api.results import Result
from maskrcnn.errors import UserError
from maskrcnn.imaging.postprocess import Detections

RESULTS, IMAGES = "results.json", "images.json"


@dataclass(frozen=True, repr=False)
class PredictResult(Result):
    """The detections of each image, and the files that were written."""

    model: Path
    runs_in: str  # backend and precision
    images: list[str]  # file of each image, or its index for arrays
    counts: list[int]  # detections of each image
    results: Path | None = None  # COCO results of all images
    overlays: list[Path] = field(default_factory=list)
    detections: list[Detections] = field(default_factory=list, repr=False)


def predict(
    images: str | Path | np.ndarray | Sequence[str | Path | np.ndarray],
    *,
    model: str | Path | None = None,
    backend: str | None = None,
    provider: str | None = None,
    precision: str | None = None,
    pixel_range: Sequence[float] | None = None,
    output: str | Path | None = None,
    threshold: float = 0.5,
    keypoint_threshold: float = 2.0,
    progress: Progress | None = None,
) -> PredictResult:
    """Detects objects in images, one after the other.

    Args:
        images: image files, folders of images, or arrays uint8 `[H, W, 3]` RGB. Files are read upright, as viewers show
            them.
        model: checkpoint, ONNX file or engine. Default: the best checkpoint of the newest run.
        backend: "torch", "onnxruntime", "openvino" or "tensorrt". Default: the first that runs this kind of file.
        provider: ONNX Runtime execution provider: "cpu", "cuda" or "tensorrt".
        precision: arithmetic of PyTorch: "fp32", "bf16" or "fp16".
        pixel_range: (low, high) of samples of more than 8 bits, which become 0 and 255. Default: the model's, else what
            a TIFF file states, else the high byte.
        output: folder for an overlay of each image, `results.json` (COCO results) and `images.json` (file of each image
            id). Default: nothing is written.
        threshold: lowest score of a detection in the overlays; the results have all detections.
        keypoint_threshold: lowest score (heat map logit) of a keypoint in the overlays.
        progress: receives messages.

    Raises:
        UserError: before anything is written, for images that cannot be read and overlays that would replace an image.
    """
    from maskrcnn.files import atomic_path, make_folder, write_json
    from maskrcnn.imaging.draw import overlay
    from maskrcnn.runtime.detector import Detector, backend_spec

    progress = progress or Progress()
    sources = _expanded(images)
    folder = None if output is None else Path(output)
    names = [str(source) if isinstance(source, Path) else str(n) for n, source in enumerate(sources)]
    targets = [] if folder is None else _targets([Path(name) for name in names], folder)
    path = Path(model) if model is not None else runs.newest_checkpoint()
    detector = Detector.load(path, backend_spec(backend, provider, precision), pixel_range=pixel_range)
    for source in sources:  # decoded once for the faults, and again in turn: together they may not fit into memory
        if isinstance(source, Path):
            detector.read(source)
    for line in detector.notes.lines():
        progress.message(line)
    metadata = detector.metadata
    if folder is not None:
        make_folder(folder)
    found: list[Detections] = []
    for number, source in enumerate(sources):
        image = detector.read(source) if isinstance(source, Path) else source
        found.append(detector.detect([image])[0])
        if folder is None:
            progress.message(f"{names[number]}: {len(found[-1])} detections")
            continue
        shown = found[-1].above(threshold)
        drawn = overlay(image, shown, metadata.class_names, metadata.keypoint_skeleton, point_score=keypoint_threshold)
        with atomic_path(targets[number]) as draft:
            drawn.save(draft, format="PNG")
        points = ""
        if shown.keypoints is not None:
            count = int((shown.keypoints[:, :, 2] >= keypoint_threshold).sum())
            points = f" with {count} of {shown.keypoints[:, :, 2].size} keypoints"
        progress.message(
            f"{names[number]}: {len(shown)} of {len(found[-1])} detections drawn{points} → {targets[number]}"
        )
    results = None
    if folder is not None:
        results = folder / RESULTS
        entries = [entry for number, each in enumerate(found, start=1) for entry in each.to_coco(number)]
        write_json(results, entries)
        write_json(folder / IMAGES, {str(number): name for number, name in enumerate(names, start=1)})
    for line in detector.remarks():
        progress.message(line)
    counts = [len(each) for each in found]
    runs_in = f"{detector.backend.name} {detector.backend.precision}"
    return PredictResult(path, runs_in, names, counts, results, targets, found)


def _expanded(images: str | Path | np.ndarray | Sequence[str | Path | np.ndarray]) -> list[Path | np.ndarray]:
    """The images one by one; a folder gives all of its images."""
    import sys

    from maskrcnn.data.images import images_in

    several = [images] if isinstance(images, (str, Path, np.ndarray)) else list(images)
    found: list[Path | np.ndarray] = []
    for each in several:
        if isinstance(each, np.ndarray):
            found.append(each)
        elif Path(each).is_dir():
            found += images_in(Path(each), sys.maxsize)
        else:
            found.append(Path(each))
    return found


def _targets(images: Sequence[Path], output: Path) -> list[Path]:
    """The overlay of each image: its name, with a number if several images have the same.

    Raises:
        UserError: if an overlay would replace one of the images.
    """
    stems = [path.stem for path in images]
    taken: set[str] = set()
    targets = []
    for number, stem in enumerate(stems, start=1):
        name = f"{stem}-{number}" if stems.count(stem) > 1 else stem
        while name in taken:
            name += f"-{number}"
        taken.add(name)
        targets.append(output / f"{name}.png")
    originals = {path.resolve() for path in images}
    for target in targets:
        if target.resolve() in originals:
            raise UserError(
                f"--output {output}, where the overlay {target.name} would replace the image of that name",
                "a folder apart from the images",
                "name another --output",
            )
    return targets

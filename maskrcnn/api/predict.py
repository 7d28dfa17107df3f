"""`maskrcnn.predict(...)`: detections of images, with overlays and COCO results on disk if wanted."""

from __future__ import annotations

from collections import Counter
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
    images: list[str]  # file of each image with detections, or its index for arrays
    counts: list[int]  # detections of each image
    results: Path | None = None  # COCO results of all images
    overlays: list[Path] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)  # images without detections: what was wrong
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
    strict: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> PredictResult:
    """Detects objects in images, one after the other.

    An image that cannot be read is named and counted, and the others are processed. What was detected before an error
    or an interruption is written.

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
        strict: stop at the first image that cannot be used.
        overwrite: replace files in `output` that maskrcnn did not write.
        progress: receives messages.

    Raises:
        UserError: before anything is written, for images that do not exist and files that would be replaced; with
            `strict`, for the first image that cannot be used; if none can be.
    """
    from maskrcnn.files import write_json
    from maskrcnn.imaging.draw import overlay, save_drawing
    from maskrcnn.runtime.detector import Detector, backend_spec

    progress = progress or Progress()
    folder = None if output is None else Path(output)
    sources = _expanded(images, folder)
    names = [str(source) if isinstance(source, Path) else str(n) for n, source in enumerate(sources)]
    path = Path(model) if model is not None else runs.newest_checkpoint()
    targets = [] if folder is None else _targets([Path(name) for name in names], folder)
    if folder is not None:
        _check_output(folder, targets, images, [*names, path], overwrite=overwrite)
    detector = Detector.load(path, backend_spec(backend, provider, precision), pixel_range=pixel_range)
    metadata = detector.metadata
    found: dict[int, Detections] = {}
    failed: dict[str, str] = {}
    try:
        for number, source in enumerate(sources):
            try:
                image = detector.read(source) if isinstance(source, Path) else source
                detections = detector.detect([image])[0]
            except UserError as error:
                if strict or len(sources) == 1:
                    raise
                failed[names[number]] = error.found
                progress.message(f"failed: {error.found}")
                continue
            found[number] = detections
            if folder is None:
                progress.message(f"{names[number]}: {len(detections)} detections")
                continue
            shown = detections.above(threshold)
            skeleton = metadata.keypoint_skeleton
            save_drawing(
                overlay(image, shown, metadata.class_names, skeleton, point_score=keypoint_threshold), targets[number]
            )
            points = ""
            if shown.keypoints is not None:
                count = int((shown.keypoints[:, :, 2] >= keypoint_threshold).sum())
                points = f" with {count} of {shown.keypoints[:, :, 2].size} keypoints"
            progress.message(
                f"{names[number]}: {len(shown)} of {len(detections)} detections drawn{points} → {targets[number]}"
            )
    finally:  # an error or an interruption loses no image that is done
        if folder is not None and found:
            entries = [entry for number, each in found.items() for entry in each.to_coco(number + 1)]
            write_json(folder / RESULTS, entries)
            write_json(folder / IMAGES, {str(number): name for number, name in enumerate(names, start=1)})
            if len(found) + len(failed) < len(sources):
                progress.message(f"stopped after {len(found)} of {len(sources)} images; results → {folder / RESULTS}")
    for line in detector.notes.lines():
        progress.message(line)
    if not found:
        reasons = "\n".join(failed.values())
        raise UserError(f"none of {len(sources)} images can be used:\n{reasons}", "image files", "name other images")
    for line in detector.remarks():
        progress.message(line)
    return PredictResult(
        path,
        f"{detector.backend.name} {detector.backend.precision}",
        [names[number] for number in found],
        [len(each) for each in found.values()],
        None if folder is None else folder / RESULTS,
        [] if folder is None else [targets[number] for number in found],
        failed,
        list(found.values()),
    )


def _expanded(
    images: str | Path | np.ndarray | Sequence[str | Path | np.ndarray], output: Path | None
) -> list[Path | np.ndarray]:
    """The images one by one; a folder gives all of its images, except for those in the output folder.

    Raises:
        UserError: for a file that does not exist, and a folder without images.
    """
    import sys
    from os import sep
    from os.path import realpath

    from maskrcnn.data.images import images_in

    several = [images] if isinstance(images, (str, Path, np.ndarray)) else list(images)
    found: list[Path | np.ndarray] = []
    for each in several:
        if isinstance(each, np.ndarray):
            found.append(each)
        elif Path(each).is_dir():
            inner = images_in(Path(each), sys.maxsize)
            if output is not None and realpath(output) != realpath(each):
                inner = [path for path in inner if not realpath(path).startswith(f"{realpath(output)}{sep}")]
            found += inner
        elif not Path(each).exists():
            raise UserError(f"image {each} does not exist", "image files, or folders of images", "correct the path")
        else:
            found.append(Path(each))
    if not found:
        raise UserError("no images", "image files, or folders of images", "name at least one")
    return found


def _targets(images: Sequence[Path], output: Path) -> list[Path]:
    """The overlay of each image: its name, with a number if several images have the same."""
    stems = [path.stem for path in images]
    repeated = Counter(stems)
    taken: set[str] = set()
    targets = []
    for number, stem in enumerate(stems, start=1):
        name = f"{stem}-{number}" if repeated[stem] > 1 else stem
        while name in taken:
            name += f"-{number}"
        taken.add(name)
        targets.append(output / f"{name}.png")
    return targets


def _check_output(
    folder: Path,
    targets: Sequence[Path],
    images: str | Path | np.ndarray | Sequence[str | Path | np.ndarray],
    inputs: Sequence[str | Path],
    *,
    overwrite: bool,
) -> None:
    """Refuses a folder, overlays and results that would replace images or other files."""
    from maskrcnn.files import DRAWING, RESULTS_FILE, FileKind, Output, check_output_folder, check_outputs

    several = [images] if isinstance(images, (str, Path, np.ndarray)) else images
    folders = [path for path in several if not isinstance(path, np.ndarray) and Path(path).is_dir()]
    index = FileKind.starting_with("the images.json of `maskrcnn predict`", rb'\{\s*"1": "')
    kinds = (DRAWING, RESULTS_FILE, index)
    check_output_folder("--output", folder, folders, kinds, overwrite=True)
    outputs = [
        *(Output("--output", target, DRAWING) for target in targets),
        Output("--output", folder / RESULTS, RESULTS_FILE),
        Output("--output", folder / IMAGES, index),
    ]
    check_outputs(outputs, inputs, overwrite=overwrite)

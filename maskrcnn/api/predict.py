"""`maskrcnn.predict(...)`: detections of images, with overlays and COCO results on disk if wanted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from maskrcnn import runs
from maskrcnn.api.progress import Progress
from maskrcnn.api.results import Result
from maskrcnn.errors import UserError
from maskrcnn.imaging.postprocess import Detections

RESULTS, IMAGES = "results.json", "images.json"
_THRESHOLD = 0.5  # of models without a recommended one


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
    format: Literal["png", "jpg"] = "png",
    annotations: str | Path | None = None,
    threshold: float | None = None,
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
        format: of the overlays.
        annotations: COCO annotation file of these images, whose image ids the results get. Default: that of the dataset
            whose images they are (`annotations/instances_NAME.json` beside the folder NAME, or `_annotations.coco.json`
            in it); else images are counted from 1.
        threshold: lowest score of a detection in the overlays; the results have all detections. Default: the one that
            training recommended for the model, else 0.5.
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
    if format not in ("png", "jpg"):
        raise UserError(f"--format {format}", "png or jpg", "choose one of these")
    targets = [] if folder is None else _targets([Path(name) for name in names], folder, format)
    if folder is not None:
        _check_output(
            folder, targets, images, [*names, path, *([annotations] if annotations else [])], overwrite=overwrite
        )
    ids = list(range(1, len(names) + 1))
    if folder is not None and all(isinstance(source, Path) for source in sources):
        ids = _image_ids([Path(name) for name in names], annotations, progress)
    detector = Detector.load(path, backend_spec(backend, provider, precision), pixel_range=pixel_range)
    metadata = detector.metadata
    if threshold is None:
        threshold = metadata.recommended_threshold
        if threshold is not None and folder is not None:
            progress.message(f"drawn from score {threshold:g}, which training recommended (--threshold)")
        threshold = _THRESHOLD if threshold is None else threshold
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
            found_text = _in_words(shown, detections, threshold, metadata.class_names)
            progress.message(f"{names[number]}: {found_text}{points} → {targets[number]}")
    finally:  # an error or an interruption loses no image that is done
        if folder is not None and found:
            class_of = dict(zip(metadata.category_ids, metadata.class_names, strict=True))
            entries = [
                {**entry, "category_name": class_of[entry["category_id"]]}
                for number, each in found.items()
                for entry in each.to_coco(ids[number])
            ]
            write_json(folder / RESULTS, entries)
            write_json(folder / IMAGES, {str(key): name for key, name in zip(ids, names, strict=True)})
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


def _in_words(shown: Detections, detections: Detections, threshold: float, class_names: Sequence[str]) -> str:
    """What an overlay shows: `2 of 9 detections drawn (person, dog)`; without any, the best score there was."""
    text = f"{len(shown)} of {len(detections)} detections drawn"
    if len(shown):
        counts = Counter(class_names[label - 1] for label in shown.labels.tolist())
        return f"{text} ({', '.join(name if n == 1 else f'{n} × {name}' for name, n in counts.most_common())})"
    if len(detections):
        text += f" (best score {float(detections.scores.max()):.2f}, below --threshold {threshold:g})"
    return text


def _image_ids(files: Sequence[Path], annotations: str | Path | None, progress: Progress) -> list[int]:
    """The image ids of these files in their dataset's annotations; counted from 1 without such a file.

    Files that an annotation file named by the user lacks get ids after its highest.
    """
    from maskrcnn.files import read_json

    places = [] if annotations is None else [Path(annotations)]
    for folder in {file.parent.resolve() for file in files} if annotations is None else ():
        near = (folder.parent / "annotations" / f"instances_{folder.name}.json", folder / "_annotations.coco.json")
        places += [path for path in near if path.is_file()]
    for path in places:
        known: dict[str, list[tuple[str, int]]] = {}
        try:
            content = read_json(path, "annotations in COCO's format")
        except UserError:
            if annotations is not None:
                raise
            continue
        with suppress(TypeError, KeyError, ValueError):
            for record in content["images"]:
                name = str(record["file_name"])
                known.setdefault(Path(name).name, []).append((name, int(record["id"])))
        if not known:
            if annotations is None:
                continue
            found = f"{path}: no list of images with file_name and id"
            raise UserError(found, "annotations in COCO's format", "correct --annotations")
        ids = [_id_of(file, known.get(file.name, ())) for file in files]
        missing = [file for file, each in zip(files, ids, strict=True) if each is None]
        if missing and annotations is None:
            continue
        progress.message(f"image ids are those of {path}")
        if missing:
            progress.message(f"{len(missing)} image(s) that it does not have get other ids, such as {missing[0]}")
        highest = max(each for entries in known.values() for _, each in entries)
        others = iter(range(highest + 1, highest + 1 + len(missing)))
        return [next(others) if each is None else each for each in ids]
    return list(range(1, len(files) + 1))


def _id_of(file: Path, entries: Sequence[tuple[str, int]]) -> int | None:
    """The id of a file among the entries (file_name, id) of its name; of several the one whose folders agree too."""
    if len(entries) > 1:
        entries = [each for each in entries if file.as_posix().endswith(f"/{each[0]}")]
    return entries[0][1] if len(entries) == 1 else None


def _targets(images: Sequence[Path], output: Path, suffix: str) -> list[Path]:
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
        targets.append(output / f"{name}.{suffix}")
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
    index = FileKind.starting_with("the images.json of `maskrcnn predict`", rb'\{\s*"\d+": "')
    kinds = (DRAWING, RESULTS_FILE, index)
    check_output_folder("--output", folder, folders, kinds, overwrite=True)
    outputs = [
        *(Output("--output", target, DRAWING) for target in targets),
        Output("--output", folder / RESULTS, RESULTS_FILE),
        Output("--output", folder / IMAGES, index),
    ]
    check_outputs(outputs, inputs, overwrite=overwrite)

"""`maskrcnn.predict(...)`: detections of images, folders and videos, with overlays and results on disk if wanted."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, overload

import numpy as np

from maskrcnn import runs
from maskrcnn.api.predict_output import BlockFolder, Job, PredictionFolder, jobs_of, run_facts
from maskrcnn.api.progress import Progress
from maskrcnn.api.results import Result
from maskrcnn.data.sources import ImageItem, Source, find_sources, is_remote, left_out_of
from maskrcnn.errors import UserError, check_range, did_you_mean
from maskrcnn.imaging.postprocess import Detections

if TYPE_CHECKING:
    from maskrcnn.metadata import ModelMetadata
    from maskrcnn.runtime.cluster import Pool
    from maskrcnn.runtime.detector import Detector
    from maskrcnn.runtime.tiles import Tiles

_T = TypeVar("_T")
SAVED = ("overlays", "video", "results", "parquet", "coco", "labelme", "yolo")
_THRESHOLD = 0.5  # score threshold of models without a recommended one
_LINES = 20  # up to this number of images, one line is printed for each
_TILES = 50  # images with at least this number of tiles report progress
_MOST_CALLS = 8  # maximum concurrent model calls on a CPU; each needs memory for its activations

Images = str | Path | np.ndarray | Iterable[str | Path | np.ndarray]


@dataclass(frozen=True, repr=False)
class PredictResult(Result):
    """The detections of each image, and the files written."""

    model: Path
    runs_in: str  # backend and precision
    images: list[str]  # name of each image with detections: file, URL, `video.mp4#12`, or the index of an array
    counts: list[int] = field(default_factory=list)  # detections of each image; [] for runs on Ray
    results: Path | str | None = None  # COCO results of all images, or another file with them
    overlays: list[Path] = field(default_factory=list)  # overlays and annotated videos
    failed: dict[str, str] = field(default_factory=dict)  # images that failed: name → reason
    total: int = 0  # detections of all images
    detections: list[Detections] = field(default_factory=list, repr=False)  # [] if written to `output`


@dataclass(frozen=True)
class _Options:
    """Options of processing and output."""

    saved: frozenset[str]
    suffix: str  # file suffix of overlays
    threshold: float
    keypoint_threshold: float
    tolerance_px: float
    strict: bool


@overload
def predict(
    images: Images,
    *,
    stream: Literal[True],
    model: str | Path | None = ...,
    backend: str | None = ...,
    provider: str | None = ...,
    precision: str | None = ...,
    pixel_range: Sequence[float] | None = ...,
    batch_size: int = ...,
    tile: int | None = ...,
    overlap: float = ...,
    workers: int | None = ...,
    limit: int | None = ...,
    strict: bool = ...,
    progress: Progress | None = ...,
) -> Iterator[Detections]: ...


@overload
def predict(
    images: Images,
    *,
    model: str | Path | None = ...,
    backend: str | None = ...,
    provider: str | None = ...,
    precision: str | None = ...,
    pixel_range: Sequence[float] | None = ...,
    output: str | Path | None = ...,
    save: Sequence[str] | None = ...,
    format: Literal["png", "jpg"] = ...,
    annotations: str | Path | None = ...,
    threshold: float | None = ...,
    keypoint_threshold: float = ...,
    tolerance: float = ...,
    batch_size: int = ...,
    tile: int | None = ...,
    overlap: float = ...,
    workers: int | None = ...,
    limit: int | None = ...,
    resume: bool = ...,
    ray: str | None = ...,
    actors: int | tuple[int, int] | None = ...,
    actor_cpus: float = ...,
    actor_gpus: float = ...,
    stream: Literal[False] = ...,
    strict: bool = ...,
    overwrite: bool = ...,
    progress: Progress | None = ...,
) -> PredictResult: ...


def predict(
    images: Images,
    *,
    model: str | Path | None = None,
    backend: str | None = None,
    provider: str | None = None,
    precision: str | None = None,
    pixel_range: Sequence[float] | None = None,
    output: str | Path | None = None,
    save: Sequence[str] | None = None,
    format: Literal["png", "jpg"] = "png",
    annotations: str | Path | None = None,
    threshold: float | None = None,
    keypoint_threshold: float = 2.0,
    tolerance: float = 0.5,
    batch_size: int = 1,
    tile: int | None = None,
    overlap: float = 0.2,
    workers: int | None = None,
    limit: int | None = None,
    resume: bool = False,
    ray: str | None = None,
    actors: int | tuple[int, int] | None = None,
    actor_cpus: float = 1,
    actor_gpus: float = 0,
    stream: bool = False,
    strict: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> PredictResult | Iterator[Detections]:
    """Detects objects in images: reading, detecting and writing overlap; memory use does not grow with their number.

    An image that cannot be read is reported and counted, and the others are processed. Detections made before an error
    or an interruption are written, and `resume` continues from there.

    Args:
        images: image files, folders, patterns, lists, annotation files, videos, cameras, URLs, or arrays uint8
            `[H, W, 3]` RGB; see `maskrcnn.data.sources.find_sources`. Files are read upright, as viewers show them.
        model: checkpoint, ONNX file or engine. Default: the best checkpoint of the newest run.
        backend: "torch", "onnxruntime", "openvino" or "tensorrt". Default: the first that runs this kind of file.
        provider: ONNX Runtime execution provider: "cpu", "cuda" or "tensorrt".
        precision: arithmetic of PyTorch: "fp32", "bf16" or "fp16".
        pixel_range: (low, high) of samples of more than 8 bits, which become 0 and 255. Default: the model's, else what
            a TIFF file states, else the high byte.
        output: folder for `detections.jsonl` (one line per image), `images.json` (file of each image id) and the
            outputs given by `save`. Default: nothing is written.
        save: any of "overlays" (a drawing of each image), "video" (an annotated video of each video), "results"
            (`results.json`, COCO results), "parquet" (`detections.parquet`), and labels for annotation tools with the
            detections that score at least `threshold`: "coco" (`annotations.json`), "labelme" and "yolo" (folders).
            Default: overlays of images, annotated videos of videos, and results.
        format: file format of the overlays.
        annotations: COCO annotation file with the image ids for the results. Default: that of the dataset that contains
            the images (`annotations/instances_NAME.json` next to the folder NAME, or `_annotations.coco.json` in it);
            else images are numbered from 1.
        threshold: minimum score of a detection in overlays and labels; the results contain all detections. Default: the
            threshold that training recommended for the model, else 0.5.
        keypoint_threshold: minimum score (heat map logit) of a keypoint in the overlays.
        tolerance: maximum distance in pixels of a label's simplified outline from the mask's.
        batch_size: maximum number of images, or tiles, per model call; only images of one size are batched.
        tile: side in pixels of the tiles that larger images are divided into, one image at a time; see
            `maskrcnn.runtime.tiles`. TIFF files are read tile by tile. Default: images are processed whole.
        overlap: overlap of neighbouring tiles, as a share of their side.
        workers: number of images processed concurrently. Default: the available CPUs, at most 8; 1 with `tile`.
        limit: maximum number of images or frames to process, for instance of a camera.
        resume: continue the interrupted run in `output`, with the same images and model.
        ray: run on a Ray cluster: "local" (this machine), "auto" (the cluster of this node) or "ray://HOST:10001".
            Writes `detections.parquet` only, a folder of files, to `output`, which may be a URL. Not for videos.
        actors: number of actors (copies of the model) on the cluster, or (minimum, maximum). Default: as many as the
            work and the cluster allow.
        actor_cpus: CPUs per actor; also its number of threads.
        actor_gpus: GPUs per actor.
        stream: return an iterator that yields the detections image by image, with `name` and `image`; nothing is
            written.
        strict: stop at the first image that cannot be used.
        overwrite: replace files in `output` that maskrcnn did not write, and an interrupted run.
        progress: receives messages.

    Raises:
        UserError: before anything is written, for images that do not exist and files that would be replaced; with
            `strict`, for the first image that cannot be used; otherwise if no image can be used.
    """
    from maskrcnn.runtime.cluster import ray_package
    from maskrcnn.runtime.tiles import tiles_of

    for name, value in (("batch_size", batch_size), ("workers", workers), ("limit", limit)):
        check_range(name, value, 1)
    check_range("threshold", threshold, 0, 1)
    check_range("keypoint_threshold", keypoint_threshold, -math.inf)
    check_range("tolerance", tolerance, 0)
    progress = progress or Progress()
    save = [save] if isinstance(save, str) else save
    folder = None if output is None or ray is not None else Path(output)
    if format not in ("png", "jpg"):
        raise UserError(f"--format {format}", "png or jpg", "choose one of these")
    if folder is None and (resume or save) and ray is None:
        raise UserError("save or resume without output", "a folder to write to", "add output=DIR")
    if ray is None and (actors, actor_cpus, actor_gpus) != (None, 1, 0):
        option = "--actors, --actor-cpus or --actor-gpus without --ray"
        raise UserError(option, "a run on a Ray cluster", "add --ray local, or drop them (without Ray: --workers)")
    if isinstance(images, Iterator):
        images = list(images)
    sources = find_sources(images, leave_out=folder)
    for line in left_out_of(images):
        progress.message(line)
    path = Path(model) if model is not None else runs.newest_checkpoint()
    spec = (backend, provider, precision, pixel_range)
    tiles = tiles_of(tile, overlap)
    if ray is not None:
        if stream or workers is not None or set(save or ("parquet",)) != {"parquet"} or output is None:
            raise UserError(
                "a run on Ray with stream or workers, without output, or with another output than parquet",
                "--output DIR-OR-URL, --save parquet",
                "drop the other options, or drop --ray",
            )
        if any(source.is_video or source.pixels is not None for source in sources):
            expected = "image files and URLs, which any node can read by itself"
            raise UserError("a video, camera or array with --ray", expected, "drop --ray, or extract the frames")
        pool = _pool(actors, actor_cpus, actor_gpus)
        ray_package()  # raises if Ray is missing
        blocks = BlockFolder(str(output), resume=resume, overwrite=overwrite)
        ids = _ids(sources, annotations, progress, is_written=True)
        given = {"tiles": tiles, "batch": batch_size, "strict": strict}
        return _on_ray(sources[:limit], ids and ids[:limit], path, spec, blocks, ray, pool, given, progress)
    workers = workers if tiles is None else 1
    if stream:
        if folder is not None:
            raise UserError("output with stream", "only one of them", "write what the iterator yields, or drop stream")
        return _streamed(sources, path, spec, tiles, batch_size, workers, limit, strict, progress)
    saved = _saved(save, sources)
    run = None
    if folder is not None:
        named = [images] if isinstance(images, (str, Path, np.ndarray)) else list(images)
        inputs = [path, annotations]
        run = PredictionFolder(folder, sources, saved, format, named, inputs, resume=resume, overwrite=overwrite)
    ids = _ids(sources, annotations, progress, is_written=run is not None)
    detector, calls = _load(path, spec, workers, sources)
    if tiles is not None:
        tiles.check(detector.preprocessing)
    metadata = detector.metadata
    if threshold is None:
        threshold = metadata.recommended_threshold
        if threshold is not None and folder is not None:
            progress.message(f"drawn from score {threshold:g}, which training recommended (--threshold)")
        threshold = _THRESHOLD if threshold is None else threshold
    options = _Options(saved, format, threshold, keypoint_threshold, tolerance, strict)
    found = _detect(detector, path, sources, ids, run, options, tiles, batch_size, calls, limit, progress)
    for line in (*detector.notes.lines(), *detector.remarks()):
        progress.message(line)
    return found


def _saved(save: Sequence[str] | None, sources: Sequence[Source]) -> frozenset[str]:
    """The outputs to write; see `predict`."""
    if save is None:
        videos = {source.is_video for source in sources}
        return frozenset(
            {"results", *(("video",) if True in videos else ()), *(("overlays",) if False in videos else ())}
        )
    for each in save:
        if each not in SAVED:
            raise UserError(f"--save {each}", ", ".join(SAVED), f"choose from these{did_you_mean(each, SAVED)}")
    if {"labelme", "yolo", "coco"} & set(save):
        from maskrcnn.data.prelabels import require_files

        require_files([source.name for source in sources], "labels")
        if any(source.is_video for source in sources):
            fix = "extract its frames first: `ffmpeg -i VIDEO frames/%06d.png`"
            raise UserError("labels of a video", "image files, to which labels can refer", fix)
    return frozenset(save)


def _load(path: Path, spec: tuple[Any, ...], workers: int | None, sources: Sequence[Source]) -> tuple[Detector, int]:
    """The model, and its number of concurrent calls: on a CPU several, with one or a few threads each."""
    from maskrcnn.machine import available_cpus
    from maskrcnn.runtime.detector import BACKENDS, Detector, backend_spec

    backend, provider, precision, pixel_range = spec
    name = (backend or next(iter(BACKENDS.get(path.suffix, ("",))))).partition(":")[0]
    is_single = len(sources) == 1 and not sources[0].is_video
    calls = 1 if is_single else workers or min(available_cpus(), _MOST_CALLS)
    threads = max(1, available_cpus() // calls)
    options: dict[str, int] = {}
    if calls > 1 and name == "openvino":
        options = {"threads": calls * threads, "streams": calls}
    elif calls > 1 and name == "onnxruntime" and provider in (None, "cpu"):
        options = {"threads": threads}
    detector = Detector.load(path, backend_spec(backend, provider, precision), pixel_range=pixel_range, **options)
    on_cpu = detector.backend.name in ("OpenVINO", "ONNX Runtime")
    return detector, calls if options and on_cpu else 1


def _on_ray(
    sources: Sequence[Source],
    ids: Sequence[int] | None,
    path: Path,
    spec: tuple[Any, ...],
    folder: BlockFolder,
    address: str,
    pool: Pool,
    options: dict[str, Any],
    progress: Progress,
) -> PredictResult:
    """Detects on a Ray cluster; see `maskrcnn.runtime.cluster`, whose options these are."""
    from maskrcnn.runtime.cluster import blocks_of, connected, detect_blocks
    from maskrcnn.runtime.detector import Detector, backend_spec

    backend, provider, precision, pixel_range = spec
    load = {"backend": backend_spec(backend, provider, precision), "pixel_range": pixel_range}
    detector = Detector.load(
        path, load["backend"], pixel_range=pixel_range
    )  # check that the model loads here before sending it to the cluster
    if options["tiles"] is not None:
        options["tiles"].check(detector.preprocessing)
    about = run_facts(detector, path, options["tiles"])
    runs_in = f"{detector.backend.name} {detector.backend.precision} on Ray"
    del detector
    numbers = range(1, len(sources) + 1) if ids is None else ids
    names = [source.name if is_remote(source.name) else str(Path(source.name).absolute()) for source in sources]
    blocks = blocks_of([*zip(numbers, names, strict=True)])
    total, failed = 0, dict[int, str]()
    with connected(address, pool), progress.task("detecting", len(names)) as advance:
        done = folder.start(blocks, about)
        left = {key: block for key, block in blocks.items() if key not in done}
        if done:
            progress.message(f"continues after {sum(len(blocks[key]) for key in done)} images")
        before = ((len(blocks[key]), *outcome) for key, outcome in done.items())
        for images, detections, errors in chain(
            before, detect_blocks(left, folder.place, path, load, about, pool, **options) if left else ()
        ):
            for reason in [*errors.values()][: max(0, _LINES - len(failed))]:
                progress.message(f"failed: {reason}")
            total += detections
            failed |= errors
            advance(images)
    reasons = {name: failed[number] for number, name in zip(numbers, names, strict=True) if number in failed}
    usable = [name for name in names if name not in reasons]
    folder.finish(about, is_empty=not usable)
    if not usable:
        raise _none_usable(reasons)
    return PredictResult(path, runs_in, usable, results=folder.result, failed=reasons, total=total)


def _pool(actors: int | tuple[int, int] | None, cpus: float, gpus: float) -> Pool:
    """The actors of a run on Ray; see `predict`."""
    from maskrcnn.runtime.cluster import Pool

    check_range("actor_cpus", cpus, 0)
    check_range("actor_gpus", gpus, 0)
    least, most = (actors, actors) if isinstance(actors, int) else actors or (1, None)
    if least < 1 or (most is not None and most < least):
        raise UserError(f"--actors {least}-{most}", "N, or MIN-MAX, at least 1", "correct the numbers")
    return Pool(least, most, cpus, gpus)


def _streamed(
    sources: Sequence[Source],
    path: Path,
    spec: tuple[Any, ...],
    tiles: Tiles | None,
    batch_size: int,
    workers: int | None,
    limit: int | None,
    strict: bool,
    progress: Progress,
) -> Iterator[Detections]:
    """Yields the detections image by image; images that cannot be used are reported to `progress`."""
    from itertools import islice

    def finish(item: ImageItem, image: np.ndarray, orientation: int, detections: Detections) -> Detections:
        return replace(detections, name=item.name, image=image if image.size else None)

    detector, calls = _load(path, spec, workers, sources)
    items = islice(jobs_of(sources, None, {}), limit)
    for _, found in _found(detector, items, finish, tiles, batch_size, calls, progress):
        if isinstance(found, Detections):
            yield found
        elif strict:
            raise found
        else:
            progress.message(f"failed: {found.found}")
    for line in (*detector.notes.lines(), *detector.remarks()):
        progress.message(line)


def _found(
    detector: Detector,
    items: Iterator[Job],
    finish: Callable[[ImageItem, np.ndarray, int, Detections], _T],
    tiles: Tiles | None,
    batch_size: int,
    calls: int,
    progress: Progress,
) -> Iterator[tuple[ImageItem, _T | UserError]]:
    """Yields each image with the result of `finish` for its detections, or with its error."""
    from maskrcnn.runtime.pipeline import detect_images
    from maskrcnn.runtime.tiles import detect_scenes

    def told(name: str, done: int, total: int) -> None:
        step = max(batch_size, total // 10)
        if total >= _TILES and 0 < done < total and done // step != (done - batch_size) // step:
            progress.message(f"{name}: {done} of {total} tiles")

    if tiles is not None:
        return detect_scenes(detector, items, finish, tiles, batch=batch_size, progress=told)
    return detect_images(detector, items, finish, batch=batch_size, calls=calls, threads=max(2, calls))


@dataclass(frozen=True, eq=False)
class _Finished:
    """What is kept of an image after its overlay was written."""

    record: str  # its line of JSON
    text: str  # for the user
    detections: Detections
    drawn: np.ndarray | None = None  # for the annotated video


def _detect(
    detector: Detector,
    path: Path,
    sources: Sequence[Source],
    ids: Sequence[int] | None,
    run: PredictionFolder | None,
    options: _Options,
    tiles: Tiles | None,
    batch_size: int,
    calls: int,
    limit: int | None,
    progress: Progress,
) -> PredictResult:
    """Runs all images through the pipeline and writes the requested outputs."""
    from itertools import islice

    metadata = detector.metadata
    lengths = [source.length() for source in sources] if limit is None else [limit]
    total = None if None in lengths else sum(length or 0 for length in lengths)
    names, counts, kept, failed = list[str](), list[int](), list[Detections](), dict[str, str]()
    jobs: Iterator[Job] = islice(jobs_of(sources, ids, {} if run is None else run.targets), limit)
    done = 0
    if run is not None:
        jobs, done, names, counts, failed = run.start(run_facts(detector, path, tiles), jobs)
        if done:
            progress.message(f"continues after {done} images")
        if run.undrawn:
            progress.message(
                f"{run.undrawn} of them without a drawing, which --resume does not add to completed images; to draw "
                "them, detect again with --overwrite instead of --resume"
            )
    is_told = total is not None and total <= _LINES
    finish = _finisher(metadata, options, is_written=run is not None)
    results = _found(detector, jobs, finish, tiles, batch_size, calls, progress)
    is_complete = False
    try:
        with progress.task("detecting", total) as advance:
            advance(done)
            for job, outcome in results:
                assert isinstance(job, Job)
                if isinstance(outcome, UserError):
                    if options.strict or (len(sources) == 1 and not names):
                        raise outcome
                    failed[job.name] = outcome.found
                    if len(failed) <= _LINES:
                        progress.message(f"failed: {outcome.found}")
                    if run is not None:
                        record = {"image_id": job.image_id, "file": job.name, "error": outcome.found}
                        run.add(job, json.dumps(record, ensure_ascii=False), None)
                else:
                    names.append(job.name)
                    counts.append(len(outcome.detections))
                    if run is None:
                        kept.append(outcome.detections)
                    else:
                        run.add(job, outcome.record, outcome.drawn)
                    if is_told:
                        progress.message(outcome.text)
                advance(1)
        is_complete = True
    finally:  # an error or an interruption loses no completed image
        results.close()  # type: ignore[attr-defined]
        if run is not None:
            run.finish(
                metadata,
                options.threshold,
                options.tolerance_px,
                is_complete=is_complete and bool(names),
                is_empty=not names,
            )
            if not is_complete and names:
                of = "" if total is None else f" of {total}"
                progress.message(
                    f"stopped after {len(names) + len(failed)}{of} images; results → {run.results}; "
                    "continue with --resume"
                )
    if not names:
        raise _none_usable(failed)
    return PredictResult(
        path,
        f"{detector.backend.name} {detector.backend.precision}",
        names,
        counts,
        None if run is None else run.results,
        [] if run is None else run.drawn,
        failed,
        sum(counts),
        kept,
    )


def _none_usable(failed: dict[str, str]) -> UserError:
    reasons = "\n".join(failed.values())
    return UserError(f"none of {len(failed)} images can be used:\n{reasons}", "image files", "choose other images")


def _finisher(
    metadata: ModelMetadata, options: _Options, *, is_written: bool
) -> Callable[[ImageItem, np.ndarray, int, Detections], _Finished]:
    """Returns the function that processes an image's detections, in any thread: overlay, and line of JSON."""
    from maskrcnn.imaging.draw import overlay, save_drawing
    from maskrcnn.runtime.predictions import record_of
    from maskrcnn.runtime.tiles import SHOWN_MEGAPIXELS

    def finish(job: ImageItem, image: np.ndarray, orientation: int, detections: Detections) -> _Finished:
        assert isinstance(job, Job)
        detections = replace(detections, name=job.name)
        if not is_written:
            return _Finished("", f"{job.name}: {len(detections)} detections", detections)
        record = record_of(job, job.image_id, orientation, detections, metadata)
        shown = detections.above(options.threshold)
        in_video = job.frame is not None and "video" in options.saved
        text = f"{job.name}: {_in_words(shown, detections, options.threshold, metadata.class_names)}"
        if shown.keypoints is not None:
            count = int((shown.keypoints[:, :, 2] >= options.keypoint_threshold).sum())
            text += f" with {count} of {shown.keypoints[:, :, 2].size} keypoints"
        frame = None
        if job.target is not None and not image.size:
            text += f" (not drawn: more than {SHOWN_MEGAPIXELS} megapixels)"
        elif in_video or job.target is not None:
            skeleton = metadata.keypoint_skeleton
            drawn = overlay(image, shown, metadata.class_names, skeleton, point_score=options.keypoint_threshold)
            if job.target is not None:
                save_drawing(drawn, job.target)
                text += f" → {job.target}"
            frame = np.asarray(drawn) if in_video else None
        return _Finished(json.dumps(record, ensure_ascii=False), text, detections, frame)

    return finish


def _in_words(shown: Detections, detections: Detections, threshold: float, class_names: Sequence[str]) -> str:
    """Describes an overlay: `2 of 9 detections drawn (person, dog)`; if none is drawn, with the best score."""
    text = f"{len(shown)} of {len(detections)} detections drawn"
    if len(shown):
        counts = Counter(class_names[label - 1] for label in shown.labels.tolist())
        return f"{text} ({', '.join(name if n == 1 else f'{n} × {name}' for name, n in counts.most_common())})"
    if len(detections):
        text += f" (best score {float(detections.scores.max()):.2f}, below --threshold {threshold:g})"
    return text


def _ids(
    sources: Sequence[Source], annotations: str | Path | None, progress: Progress, *, is_written: bool
) -> list[int] | None:
    """The image id of each source; None: images are numbered from 1."""
    given = [source.image_id for source in sources if source.image_id is not None]
    if annotations is None and len(set(given)) == len(sources):
        return given
    if not is_written or not all(source.pixels is None and not source.is_video for source in sources):
        return None
    return _image_ids([Path(source.name) for source in sources], annotations, progress)


def _image_ids(files: Sequence[Path], annotations: str | Path | None, progress: Progress) -> list[int]:
    """The image ids of these files in their dataset's annotations; numbered from 1 without such a file.

    Files missing from an annotation file given by the user get ids after its highest.
    """
    from maskrcnn.data.annotations import usable_id
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
        images = content.get("images") if isinstance(content, dict) else None
        for record in images if isinstance(images, list) else ():
            name = record.get("file_name") if isinstance(record, dict) else None
            image_id = usable_id(record.get("id")) if isinstance(name, str) else None
            if isinstance(name, str) and isinstance(image_id, int):
                known.setdefault(Path(name).name, []).append((name, image_id))
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
            progress.message(f"{len(missing)} image(s) not in this file get new ids, such as {missing[0]}")
        highest = max(each for entries in known.values() for _, each in entries)
        others = iter(range(highest + 1, highest + 1 + len(missing)))
        return [next(others) if each is None else each for each in ids]
    return list(range(1, len(files) + 1))


def _id_of(file: Path, entries: Sequence[tuple[str, int]]) -> int | None:
    """The id of a file among the entries (file_name, id) with its name; of several, the one with the same folders."""
    if len(entries) > 1:
        entries = [each for each in entries if file.as_posix().endswith(f"/{each[0]}")]
    return entries[0][1] if len(entries) == 1 else None

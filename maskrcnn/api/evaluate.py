"""`maskrcnn.evaluate(...)`: COCO metrics of a model on a dataset, or of a results file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from maskrcnn import runs
from maskrcnn.api.progress import Progress
from maskrcnn.api.results import Result
from maskrcnn.errors import UserError, check_range
from maskrcnn.files import (
    PAGE,
    RESULTS_FILE,
    Output,
    atomic_path,
    check_outputs,
    read_json,
    report_kind,
    report_path,
    write_report,
)
from maskrcnn.runtime.predictions import IMAGES

if TYPE_CHECKING:
    from maskrcnn.data.coco import CocoDataset
    from maskrcnn.runtime.evaluation.differences import Difference
    from maskrcnn.runtime.evaluation.evaluate import Evaluation
    from maskrcnn.runtime.evaluation.ground_truth import GroundTruth
    from maskrcnn.runtime.evaluation.sharding import Share
    from maskrcnn.runtime.tiles import Tiles


@dataclass(frozen=True, repr=False)
class EvaluateResult(Result):
    """COCO metrics, and the files written."""

    source: str  # the model or the results file
    annotations: str  # the file of the ground truth
    images: int
    metrics: dict[str, dict[str, float]]  # "box", "mask", "keypoint" → metric → value
    seconds: dict[str, float]  # seconds by part
    files: list[Path] = field(default_factory=list)  # results, JSON and report
    remarks: list[str] = field(default_factory=list)
    differences: dict[str, Difference] = field(default_factory=dict, repr=False)  # by kind, with `compare`
    voc: dict[str, Any] = field(default_factory=dict, repr=False)  # see `voc_metrics`, with `voc`
    evaluation: Evaluation | None = field(default=None, repr=False)  # match records, results, per-class metrics

    def table(self) -> str:
        """The metrics as a table."""
        assert self.evaluation is not None
        return self.evaluation.table()


@dataclass(frozen=True, kw_only=True)
class _Options:
    """The arguments of `evaluate`, as paths."""

    model: Path | None
    data: Path | None
    split: str
    backend: str | None
    batch_size: int
    tiles: Tiles | None
    processes: int
    resume: Path | None
    results: Path | None
    annotations: Path | None
    images: Path | None
    kinds: tuple[str, ...]
    compare: Path | None
    max_detections: tuple[int, ...]
    resamples: int
    seed: int
    threshold: float
    exif: str
    pixel_range: tuple[float, ...] | None
    save_results: Path | None
    json: Path | None
    report: Path | None
    worst: int
    strict: bool
    overwrite: bool


def evaluate(
    model: str | Path | None = None,
    *,
    data: str | Path | None = None,
    split: str = "val",
    backend: str | None = None,
    provider: str | None = None,
    precision: str | None = None,
    batch_size: int = 1,
    tile: int | None = None,
    overlap: float = 0.2,
    processes: int = 1,
    resume: str | Path | None = None,
    results: str | Path | None = None,
    annotations: str | Path | None = None,
    images: str | Path | None = None,
    iou_type: Sequence[str] = (),
    max_detections: Sequence[int] = (),
    voc: bool = False,
    compare: str | Path | None = None,
    resamples: int = 1000,
    seed: int = 0,
    threshold: float = 0.5,
    exif: str = "auto",
    pixel_range: Sequence[float] | None = None,
    save_results: str | Path | None = None,
    json: str | Path | None = None,
    report: str | Path | None = None,
    worst: int = 12,
    strict: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> EvaluateResult | None:
    """Computes COCO metrics; every value equals pycocotools' to the last digit.

    Args:
        model: checkpoint, ONNX file or engine. Default, without `results`: the best checkpoint of the newest run.
        data: folder of a dataset (see docs/formats.md for the layouts), or its annotation file. Default for a model in
            the folder of a run: the run's validation data.
        split: split of `data` to evaluate on.
        backend, provider, precision: as `maskrcnn.predict`.
        batch_size: images per batch, or with `tile`, tiles per batch. All images of a batch have the same padded size,
            so that metrics do not depend on the batch size.
        tile, overlap: as `maskrcnn.predict`.
        processes: number of worker processes.
        resume: file to save the detections of each image to; an interrupted evaluation continues from it.
        results: results file in COCO format to score instead of a model.
        annotations: annotation file in COCO format, instead of `data`.
        images: folder of the images. Default: searched for near the annotations.
        iou_type: "bbox", "segm", "keypoints". Default: all kinds of the detections.
        max_detections: maximum detections per image and class, ascending, such as (1, 10, 500): average recall is
            measured at each, all other metrics at the last. Default: COCO's 1, 10 and 100 (20 for keypoints).
        voc: also compute Pascal VOC's box AP, by its 11-point and its area rule.
        compare: results file or model to compare with: computes the difference in AP and its interval.
        resamples: number of bootstrap resamples of the images for AP intervals.
        seed: random seed of the resamples.
        threshold: minimum score in comparisons of images, in confusions and in the images of the report.
        exif: EXIF orientation: "auto" from the annotated sizes, "upright" or "stored" for all images.
        pixel_range: as in `maskrcnn.predict`.
        save_results: file to write the results to, in the format of COCO's evaluation server.
        json: file to write metrics and results to.
        report: HTML file to write, or a folder for `report.html`.
        worst: maximum number of images in the report.
        strict: refuse annotation files with entries that are skipped or repaired.
        overwrite: replace output files that `evaluate` did not write; input files are never replaced.
        progress: receives messages.

    Returns:
        the result; None in processes of torchrun other than the first.

    Raises:
        UserError: for options that contradict each other and files that cannot be used.
    """
    from maskrcnn.runtime.detector import backend_spec
    from maskrcnn.runtime.evaluation.protocol import KIND_NAMES, protocol_of
    from maskrcnn.runtime.evaluation.sharding import Share
    from maskrcnn.runtime.evaluation.voc import voc_metrics
    from maskrcnn.runtime.tiles import tiles_of

    for name, value in (("batch_size", batch_size), ("processes", processes), ("resamples", resamples)):
        check_range(name, value, 1)
    check_range("seed", seed, 0)
    check_range("worst", worst, 0)
    check_range("threshold", threshold, 0, 1)
    if progress is None or Share.of_environment().rank:  # with torchrun, only the first process reports
        progress = Progress()
    options = _Options(
        model=_path(model),
        data=_path(data),
        split=split,
        backend=backend_spec(backend, provider, precision),
        batch_size=batch_size,
        tiles=tiles_of(tile, overlap),
        processes=processes,
        resume=_path(resume),
        results=_path(results),
        annotations=_path(annotations),
        images=_path(images),
        kinds=(iou_type,) if isinstance(iou_type, str) else tuple(iou_type),
        max_detections=tuple(max_detections),
        compare=_path(compare),
        resamples=resamples,
        seed=seed,
        threshold=threshold,
        exif=exif,
        pixel_range=None if pixel_range is None else tuple(pixel_range),
        save_results=_path(save_results),
        json=_path(json),
        report=_path(report),
        worst=worst,
        strict=strict,
        overwrite=overwrite,
    )
    options = _with_run(options, progress)
    _check(options)
    for kind in options.kinds or ("bbox",):  # to find errors before detecting
        protocol_of(kind, options.max_detections)
    if options.model is not None:
        evaluation = _evaluate_model(options, options.model, options.kinds, options.resume, progress)
    else:
        evaluation = _evaluate_file(options, progress)
    if evaluation is None:
        return None
    truth = next(iter(evaluation.scored.values())).truth
    remarks = _remarks(evaluation)
    for remark in remarks:
        progress.message(remark)
    files: list[Path] = []
    if options.save_results is not None:  # before the comparison, which may fail
        if options.model is None:  # results of a model were written before scoring
            _save(options.save_results, evaluation.results, tuple(evaluation.scored))
        files += _kind_paths(options.save_results, tuple(evaluation.scored)).values()
    by_voc = voc_metrics(truth, evaluation.results) if voc else {}
    differences = _differences(options, evaluation, truth, progress)
    if options.json is not None:
        _write_json(options, evaluation, differences, by_voc)
        files.append(options.json)
    if options.report is not None:
        files.append(_write_report(options, evaluation, differences, truth))
    return EvaluateResult(
        source=str(options.model or options.results),
        annotations=str(truth.source),
        images=evaluation.images,
        metrics={KIND_NAMES[kind]: scored.metrics for kind, scored in evaluation.scored.items()},
        seconds=asdict(evaluation.seconds),
        files=files,
        remarks=remarks,
        differences=differences,
        voc=by_voc,
        evaluation=evaluation,
    )


def _path(value: str | Path | None) -> Path | None:
    return None if value is None else Path(value)


def _remarks(evaluation: Evaluation) -> list[str]:
    return list(dict.fromkeys(text for scored in evaluation.scored.values() for text in scored.remarks()))


def _with_run(options: _Options, progress: Progress) -> _Options:
    """Completes the options from the newest run, or the model's run: its best checkpoint and validation data."""
    if options.results is not None:
        return options
    model = options.model or runs.newest_checkpoint()
    config = model.parent / runs.CONFIG
    if options.data or options.annotations or not config.is_file():
        return replace(options, model=model)
    settings = read_json(config, "the settings of a run")
    if not isinstance(settings, dict):  # another program's file of the same name
        return replace(options, model=model)
    data = settings.get("val_data") or settings.get("data")
    if not data:
        return replace(options, model=model)
    split = settings.get("val_split", options.split) if options.split == "val" else options.split
    folder = settings.get("val_images" if settings.get("val_data") else "images")
    progress.message(f"{model} on the data of its run: {data}, split {split}")
    return replace(options, model=model, data=Path(data), images=options.images or _path(folder or None), split=split)


def _check(options: _Options) -> None:
    """Refuses options that contradict each other."""
    if options.model is not None and options.results is not None:
        fix = "maskrcnn evaluate MODEL --data DIR, or --results FILE --annotations FILE"
        raise UserError("a model and --results", "only one of them", fix)
    if (options.annotations is None) == (options.data is None):
        given = "a model" if options.model is not None else "--results"
        found = f"{given} with --annotations and --data" if options.data else f"{given} without --data or --annotations"
        raise UserError(found, "the ground truth", "add --data DIR, or --annotations FILE")
    if options.results is not None and (options.resume is not None or options.processes > 1):
        raise UserError("--results with --resume or --processes", "a model", "drop them: nothing is detected")
    if options.results is not None and options.tiles is not None:
        raise UserError("--results with --tile", "a model", "drop --tile: nothing is detected")
    if options.compare is not None and not options.compare.is_file():
        raise UserError(f"--compare {options.compare}: no such file", "a results file or a model", "check the path")
    outputs = [
        *(Output("--save-results", path, RESULTS_FILE) for path in _results_paths(options.save_results)),
        *([Output("--json", options.json, report_kind("evaluate"))] if options.json else []),
        *([Output("--report", report_path(options.report), PAGE)] if options.report else []),
        *([Output("--resume", options.resume, None)] if options.resume else []),
    ]
    inputs = (options.model, options.data, options.results, options.annotations, options.images, options.compare)
    check_outputs(outputs, inputs, overwrite=options.overwrite)


def _results_paths(path: Path | None) -> list[Path]:
    """The files that `save_results` may write: itself for one kind, and one for each of several kinds."""
    if path is None:
        return []
    from maskrcnn.runtime.evaluation.protocol import KIND_NAMES

    return [path, *_kind_paths(path, tuple(KIND_NAMES)).values()]


def _dataset(options: _Options, progress: Progress, *, require_images: bool) -> CocoDataset:
    from maskrcnn.data.coco import CocoDataset
    from maskrcnn.data.layouts import find_split, list_splits
    from maskrcnn.data.survey import with_exif

    place = options.data or options.annotations
    assert place is not None
    splits = list_splits(place, options.images)
    is_only = options.annotations is not None and len(splits) == 1  # otherwise --split selects the split
    split = splits[0] if is_only else find_split(place, options.split, options.images)
    dataset = CocoDataset.load(place, split, images=options.images, require_images=require_images)
    dataset = with_exif(dataset, options.exif)
    for line in dataset.note_lines():
        progress.message(line)
    if options.strict:
        dataset.require_unchanged()
    dataset.require_objects("find")
    return dataset


def _evaluate_model(
    options: _Options, model: Path, kinds: Sequence[str], resume: Path | None, progress: Progress
) -> Evaluation | None:
    """Detects on the dataset and scores; None in processes of torchrun other than the first."""
    from maskrcnn.runtime.evaluation.evaluate import kinds_found, score_kinds
    from maskrcnn.runtime.evaluation.sharding import Share

    share = Share.of_environment()
    if share.count > 1 and (options.processes > 1 or resume is None):
        found = f"WORLD_SIZE={share.count} " + (
            "with --processes" if options.processes > 1 else "without --resume FILE"
        )
        raise UserError(found, "processes of torchrun that share one file", "add --resume FILE, drop --processes")
    dataset = _dataset(options, progress, require_images=True)
    detected = _detect(options, model, resume, dataset, share, progress)
    if detected is None:
        return None
    results, seconds, facts = detected
    kinds = tuple(kinds) or kinds_found(
        with_masks=facts["has_masks"] and dataset.has_masks,
        with_keypoints=facts.get("has_keypoints", False) and dataset.has_keypoints,  # absent from older logs
    )
    if options.save_results is not None and model == options.model:  # before the scoring, which may fail
        _save(options.save_results, results, kinds)
    evaluation = score_kinds(
        dataset,
        results,
        kinds,
        sigmas=facts.get("sigmas", ()),
        max_detections=options.max_detections,
        seconds=seconds,
    )
    on = f"{evaluation.images} images of {dataset.annotation_path}"
    progress.message(f"{model} in {facts['runs_in']} on {on}, batch size {options.batch_size}")
    return evaluation


def _detect(
    options: _Options, model: Path, resume: Path | None, dataset: CocoDataset, share: Share, progress: Progress
) -> tuple[list[dict[str, Any]], Any, dict[str, Any]] | None:
    """Results, time, and facts about the model, from this process, several, or the processes of torchrun."""
    from maskrcnn.data.coco import crowded_line
    from maskrcnn.data.survey import survey_images
    from maskrcnn.runtime.detector import Detector
    from maskrcnn.runtime.evaluation.evaluate import check_classes, detect_records, facts_of, names_line
    from maskrcnn.runtime.evaluation.sharding import (
        DetectionTask,
        detect_in_processes,
        detect_share,
        gathered,
        use_own_gpu,
    )

    task = DetectionTask(
        model=model,
        data=dataset.root,
        split=dataset.split,
        backend=options.backend,
        batch_size=options.batch_size,
        images=options.images,
        exif=options.exif,
        pixel_range=options.pixel_range,
        tiles=options.tiles,
    )
    for line in survey_images(dataset).lines():
        progress.message(line)
    with progress.task("detecting", len(dataset.images)) as advance, TemporaryDirectory() as folder:
        log_path = resume or Path(folder) / "detections.jsonl"
        if options.processes > 1:
            log = task.log(log_path, dataset)
            results, seconds = detect_in_processes(task, dataset, log, options.processes, progress=advance)
            return results, seconds, log.facts()
        use_own_gpu(share)
        detector = Detector.load(model, options.backend, pixel_range=options.pixel_range)
        crowded = None if options.tiles else crowded_line(dataset, detector.metadata.detections)
        renamed = names_line(detector, dataset)
        for line in (*detector.remarks(), *(each for each in (crowded, renamed) if each)):
            progress.message(line)
        if resume is None:
            check_classes(detector, dataset)
            done: list[tuple[list[int], list[list[dict[str, Any]]], Any]] = []
            try:
                results, seconds = detect_records(
                    detector,
                    dataset.images,
                    batch_size=options.batch_size,
                    tiles=options.tiles,
                    progress=advance,
                    keep=lambda *batch: done.append(batch),
                )
            except BaseException:  # an error or an interruption loses no completed image
                if done:
                    kept = task.log(_free_name(Path("detections.jsonl")), dataset)
                    kept.write(facts_of(detector), done)
                    count = sum(len(ids) for ids, _, _ in done)
                    progress.message(
                        f"the detections of {count} of {len(dataset.images)} images are kept: the same command with "
                        f"--resume {kept.path} continues"
                    )
                raise
            for line in detector.notes.lines():
                progress.message(line)
            return results, seconds, facts_of(detector)
        log = task.log(log_path, dataset)
        detect_share(detector, dataset, log, share, tiles=options.tiles, progress=advance)
        if share.rank:
            return None
        results, seconds = gathered(dataset, log)
        return results, seconds, facts_of(detector)


def _free_name(path: Path) -> Path:
    """The path, with a number appended to the name if it exists already."""
    number, free = 1, path
    while free.exists():
        number += 1
        free = path.with_stem(f"{path.stem}-{number}")
    return free


def _evaluate_file(options: _Options, progress: Progress) -> Evaluation:
    """The evaluation of `results`."""
    from maskrcnn.runtime.evaluation.evaluate import score_file
    from maskrcnn.runtime.evaluation.ground_truth import GroundTruth

    assert options.results is not None
    truth = GroundTruth(_dataset(options, progress, require_images=False))
    evaluation = score_file(truth, options.results, options.kinds, options.max_detections)
    for line in _other_files(options.results, truth):
        progress.message(line)
    count = len(evaluation.results)
    progress.message(f"{options.results}: {count} results on {evaluation.images} images of {truth.source}")
    return evaluation


def _other_files(results: Path, truth: GroundTruth) -> list[str]:
    """Returns a warning if `predict` used the annotations' image ids for other files."""
    index = results.parent / IMAGES
    if not index.is_file():
        return []
    try:
        files = read_json(index, "the image files of `maskrcnn predict`")
    except UserError:
        files = None
    if not isinstance(files, dict):  # another program's file of the same name
        return []
    known = set(truth.image_ids.tolist())
    named = {int(key): Path(str(name)).name for key, name in files.items() if key.isdigit() and int(key) in known}
    wrong = {key: name for key, name in named.items() if name != Path(truth.file_name(key)).name}
    if not wrong:
        return []
    key, name = next(iter(wrong.items()))
    return [
        f"warning: {len(wrong)} of {len(named)} images are other files in {index} than in {truth.source} (id {key}: "
        f"{name}, {truth.file_name(key)}): their results are scored against other images. Repeat `maskrcnn predict` "
        "with --annotations, which keeps the ids"
    ]


def _differences(
    options: _Options, evaluation: Evaluation, truth: GroundTruth, progress: Progress
) -> dict[str, Difference]:
    """The difference from `compare`, by kind."""
    if options.compare is None:
        return {}
    from maskrcnn.runtime.detector import BACKENDS
    from maskrcnn.runtime.evaluation.differences import difference
    from maskrcnn.runtime.evaluation.evaluate import score_file
    from maskrcnn.runtime.evaluation.protocol import KIND_NAMES
    from maskrcnn.runtime.evaluation.sharding import Share

    kinds = tuple(evaluation.scored)
    if options.compare.suffix not in BACKENDS:
        other: Evaluation | None = score_file(truth, options.compare, kinds, options.max_detections)
    elif Share.of_environment().count > 1:
        found = f"--compare {options.compare}, a model, under torchrun"
        fix = "run it without torchrun; or evaluate that model with --save-results, and compare with the file"
        raise UserError(found, "a results file, or a dataset to run the model on", fix)
    else:
        other = _evaluate_model(options, options.compare, kinds, None, progress)
    assert other is not None
    for remark in _remarks(other):
        progress.message(remark)
    differences = {}
    for kind, scored in evaluation.scored.items():
        with progress.task("resampling", options.resamples) as advance:
            differences[kind] = difference(
                scored,
                other.scored[kind],
                min_score=options.threshold,
                resamples=options.resamples,
                seed=options.seed,
                progress=advance,
            )
        progress.message(f"{KIND_NAMES[kind]} of {options.compare} minus {options.model or options.results}:")
        progress.message("\n".join(differences[kind].lines()))
    return differences


def _kind_paths(path: Path, kinds: Sequence[str]) -> dict[str, Path]:
    """The results file of each kind: `path` itself for a single kind."""
    return {kind: path if len(kinds) == 1 else path.with_suffix(f".{kind}{path.suffix}") for kind in kinds}


def _save(path: Path, results: list[dict[str, Any]], kinds: Sequence[str]) -> None:
    """Writes one results file per kind."""
    from maskrcnn.runtime.evaluation.results_file import FIELDS, write_server_results

    for kind, own in _kind_paths(path, kinds).items():
        if not results or FIELDS[kind] in results[0]:
            write_server_results(own, results, kind)


def _write_json(
    options: _Options, evaluation: Evaluation, differences: dict[str, Difference], by_voc: dict[str, Any]
) -> None:
    from maskrcnn.runtime.evaluation.protocol import KIND_NAMES

    assert options.json is not None
    content: dict[str, Any] = {"model": str(options.model)} if options.model else {"file": str(options.results)}
    content |= {"box": evaluation.box, "mask": evaluation.mask, "keypoint": evaluation.keypoint}
    content |= {KIND_NAMES[kind]: scored.metrics for kind, scored in evaluation.scored.items()}
    content["max_detections"] = {
        KIND_NAMES[kind]: list(scored.records.protocol.max_detections) for kind, scored in evaluation.scored.items()
    }
    content["per_class"] = {KIND_NAMES[kind]: scored.by_class() for kind, scored in evaluation.scored.items()}
    content["seconds"] = asdict(evaluation.seconds)
    if by_voc:
        content["voc"] = by_voc
    if differences:
        content["compared_with"] = str(options.compare)
        content["difference"] = {KIND_NAMES[kind]: asdict(each) for kind, each in differences.items()}
    if options.model:
        content["batch_size"] = options.batch_size
        content["tiles"] = None if options.tiles is None else asdict(options.tiles)
        content["results"] = evaluation.results
    write_report(options.json, "evaluate", content)


def _write_report(
    options: _Options, evaluation: Evaluation, differences: dict[str, Difference], truth: GroundTruth
) -> Path:
    from maskrcnn.runtime.evaluation.report import report_page

    assert options.report is not None
    path = report_path(options.report)
    facts = [
        f"{evaluation.images} images of {truth.source}",
        f"{len(evaluation.results)} results",
        evaluation.seconds.line(),
        *_remarks(evaluation),
        *([f"compared with {options.compare}"] if options.compare else []),
    ]
    html = report_page(
        str(options.model or options.results),
        facts,
        evaluation.scored,
        differences=differences,
        image_file=_image_file(options, truth),
        min_score=options.threshold,
        worst=options.worst,
        resamples=options.resamples,
        seed=options.seed,
    )
    with atomic_path(path) as draft:
        draft.write_text(html, encoding="utf-8")
    return path


def _image_file(options: _Options, truth: GroundTruth) -> Callable[[int], Path] | None:
    """Maps image ids to files; None if no images are wanted, or some are missing."""
    if options.worst == 0 or truth.images.missing():
        return None
    return truth.path

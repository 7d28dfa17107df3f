"""`maskrcnn evaluate MODEL`: where the detections come from — this process, several, or those of torchrun."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import Progress

from maskrcnn.data.coco import CocoDataset, find_split
from maskrcnn.errors import UserError
from maskrcnn.runtime.detector import Detector
from maskrcnn.runtime.evaluation.evaluate import (
    Evaluation,
    Seconds,
    check_classes,
    detect_records,
    facts_of,
    kinds_found,
    score_kinds,
)
from maskrcnn.runtime.evaluation.scoring import Scorer
from maskrcnn.runtime.evaluation.sharding import (
    DetectionTask,
    Share,
    detect_in_processes,
    detect_share,
    gathered,
    use_own_gpu,
)

if TYPE_CHECKING:
    from maskrcnn.cli.evaluate import Request

_Found = tuple[list[dict[str, Any]], Seconds, dict[str, Any]]  # results, time, facts about the model


def evaluate_model(console: Console, request: Request, model: Path) -> Evaluation | None:
    """Detects on the dataset of a request and scores; prints which model, where it ran and on what.

    Args:
        console: where to print.
        request: the options.
        model: the file to load; it may be another than the request's.

    Returns:
        the evaluation; None in a process of torchrun that is not the first.

    Raises:
        UserError: see `evaluate`, and for a sharing of work that cannot be.
    """
    share = Share.of_environment()
    if share.count > 1 and (request.processes > 1 or request.resume is None):
        came = f"WORLD_SIZE={share.count} " + ("with --processes" if request.processes > 1 else "without --resume FILE")
        raise UserError(came, "processes of torchrun that meet in one file", "add --resume FILE, leave out --processes")
    if share.rank:
        console = Console(quiet=True)
    dataset = dataset_of(console, request, require_images=True)
    found = _detections(console, request, model, dataset, share)
    if found is None:
        return None
    results, seconds, facts = found
    kinds = request.kinds or kinds_found(
        with_masks=facts["has_masks"] and dataset.has_masks,
        with_keypoints=facts.get("has_keypoints", False) and dataset.has_keypoints,  # older logs do not say
    )
    sigmas, scorer = facts.get("sigmas", ()), Scorer(request.scorer)
    evaluation = score_kinds(dataset, results, kinds, sigmas=sigmas, seconds=seconds, scorer=scorer)
    told = f"{model} in {facts['runs_in']} on {evaluation.images} images of {dataset.annotation_path}"
    console.print(told, markup=False)
    return evaluation


def dataset_of(console: Console, request: Request, *, require_images: bool) -> CocoDataset:
    """The dataset of a request; prints what of its annotations is left out."""
    split = find_split(request.data, request.split)
    dataset = CocoDataset.load(request.data, split, require_images=require_images)
    for line in dataset.skipped_lines():
        console.print(line, markup=False)
    return dataset


@contextmanager
def progress_bar(console: Console, title: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal; gives what advances it."""
    with Progress(console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task(title, total=total)
        yield lambda count: bar.advance(task, count)


def _detections(console: Console, request: Request, model: Path, dataset: CocoDataset, share: Share) -> _Found | None:
    task = DetectionTask(model, request.data, dataset.split, request.backend, request.batch_size)
    with progress_bar(console, "detecting", len(dataset.images)) as advance, TemporaryDirectory() as folder:
        log_path = request.resume or Path(folder) / "detections.jsonl"
        if request.processes > 1:
            log = task.log(log_path, dataset)
            results, seconds = detect_in_processes(task, dataset, log, request.processes, progress=advance)
            return results, seconds, log.facts()
        use_own_gpu(share)
        detector = Detector.load(model, request.backend)
        for line in detector.backend.remarks():
            console.print(line, markup=False)
        if request.resume is None:
            check_classes(detector, dataset)
            batch_size = request.batch_size
            found = detect_records(detector, dataset.images, batch_size=batch_size, progress=advance)
            return *found, facts_of(detector)
        log = task.log(log_path, dataset)
        detect_share(detector, dataset, log, share, progress=advance)
        if share.rank:
            return None
        return *gathered(dataset, log), facts_of(detector)

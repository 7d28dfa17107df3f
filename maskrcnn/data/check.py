"""Looks through a dataset for what training would refuse, leave out, or learn wrongly from.

An error is what `maskrcnn train` stops at: an annotation file that is none, images that are missing, cannot be
decoded or measure otherwise than their entries say, and splits with different category ids. A remark is what it goes
on with: annotations that it leaves out, and annotations and images that are probably not meant as they are.
"""

from __future__ import annotations

import os
import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from maskrcnn.data.check_image import examine, place
from maskrcnn.data.coco import CocoDataset, ImageRecord, SkippedAnnotation, annotation_file, find_split, list_splits
from maskrcnn.data.findings import DatasetReport, Finding, Problem, SplitFigures
from maskrcnn.data.segmentation import finite_numbers
from maskrcnn.errors import UserError

_SMALL_PX, _MEDIUM_PX = 32**2, 96**2  # areas at which COCO's sizes end

STRUCTURE = Problem("annotation file that cannot be used", is_error=True)
CATEGORY_IDS = Problem("category ids that differ between splits", is_error=True)
CLASS_NAMES = Problem("class names that differ between splits")
KEYPOINTS = Problem("keypoints that cannot be learnt")
KEYPOINT_NAMES = Problem("keypoint names that differ between splits")
UNUSED_CLASS = Problem("class without objects")
REPEATED = Problem("the same image twice in a split")
LEAKED = Problem("the same image in several splits")
SKIPPED = "annotation left out of training"  # and the reason


def check_dataset(
    root: str | Path,
    splits: Sequence[str] = (),
    *,
    workers: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> DatasetReport:
    """Reads every annotation and decodes every image of a dataset in COCO layout.

    Args:
        root: the dataset's folder.
        splits: names of splits, or beginnings of them; by default all.
        workers: threads that decode; by default one per core.
        progress: called with the images that are done, and with all there are.

    Raises:
        UserError: where there is no such folder or split. What is wrong inside is in the report.
    """
    root = Path(root)
    names = [find_split(root, name) for name in splits] or list_splits(root) or [find_split(root, "train")]
    datasets, findings = [], []
    for name in dict.fromkeys(names):
        try:
            datasets.append(CocoDataset.load(root, name, require_images=False))
        except UserError as error:
            detail = f"{error.came}; expected: {error.expected}"
            findings.append(
                Finding(problem=STRUCTURE, split=name, where=annotation_file(root, name).name, detail=detail)
            )
    findings += _category_findings(datasets)
    findings += _keypoint_findings(datasets)
    for dataset in datasets:
        findings += _class_findings(dataset)
        findings += _skipped_findings(dataset)
    findings += _image_findings(datasets, workers or os.cpu_count() or 1, progress)
    return DatasetReport(
        root=root,
        datasets=tuple(datasets),
        splits=tuple(_figures(dataset) for dataset in datasets),
        findings=tuple(findings),
    )


def _figures(dataset: CocoDataset) -> SplitFigures:
    objects = {name: [0, 0, 0] for name in dataset.class_names}
    numbers = []
    for record in dataset.images:
        own = [instance for instance in record.instances if not instance.is_crowd]
        numbers.append(len(own))
        for instance in own:
            size = (instance.area_px >= _SMALL_PX) + (instance.area_px >= _MEDIUM_PX)
            objects[dataset.class_names[instance.label - 1]][size] += 1
    sizes = sorted((r.height * r.width, r.height, r.width) for r in dataset.images)
    return SplitFigures(
        split=dataset.split,
        images=len(dataset.images),
        images_without_objects=numbers.count(0),
        crowd_regions=sum(instance.is_crowd for record in dataset.images for instance in record.instances),
        skipped_annotations=len(dataset.skipped_annotations),
        smallest_image_hw=sizes[0][1:],
        largest_image_hw=sizes[-1][1:],
        objects_per_image_median=statistics.median(numbers),
        objects_per_image_max=max(numbers),
        objects={name: tuple(counts) for name, counts in objects.items()},
        has_masks=dataset.has_masks,
        objects_with_keypoints=sum(
            instance.keypoints is not None for record in dataset.images for instance in record.instances
        ),
    )


def _category_findings(datasets: Sequence[CocoDataset]) -> Iterator[Finding]:
    """What differs between the categories of the first split and those of each other one."""
    for dataset in datasets[1:]:
        first = datasets[0]
        expected, came = (dict(zip(d.category_ids, d.class_names, strict=True)) for d in (first, dataset))
        lacking, new = sorted(expected.keys() - came.keys()), sorted(came.keys() - expected.keys())
        if lacking or new:
            detail = f"only in {first.split}: {_listed(lacking)}; only in {dataset.split}: {_listed(new)}"
            yield _of_file(CATEGORY_IDS, dataset, detail)
        renamed = [k for k in expected.keys() & came.keys() if expected[k] != came[k]]
        if renamed:
            k = min(renamed)
            detail = f"{len(renamed)} name(s); id {k} is {expected[k]!r} in {first.split}, {came[k]!r} here"
            yield _of_file(CLASS_NAMES, dataset, detail)


def _keypoint_findings(datasets: Sequence[CocoDataset]) -> Iterator[Finding]:
    """Splits whose keypoints cannot be used, and names that are not those of the first split that has any."""
    named = [dataset for dataset in datasets if dataset.keypoint_names]
    for dataset in datasets:
        if dataset.keypoint_fault is not None:
            fault = dataset.keypoint_fault
            yield _of_file(KEYPOINTS, dataset, f"{fault.came}; expected: {fault.expected}")
        elif named and dataset.keypoint_names != named[0].keypoint_names:
            came = ", ".join(dataset.keypoint_names) or "none"
            yield _of_file(
                KEYPOINT_NAMES, dataset, f"{came}; in {named[0].split}: {', '.join(named[0].keypoint_names)}"
            )


def _listed(ids: list[int]) -> str:
    return (", ".join(map(str, ids[:9])) + (" …" if len(ids) > 9 else "")) or "none"


def _of_file(problem: Problem, dataset: CocoDataset, detail: str) -> Finding:
    return Finding(problem=problem, split=dataset.split, where=dataset.annotation_path.name, detail=detail)


def _class_findings(dataset: CocoDataset) -> Iterator[Finding]:
    labels = (i.label for record in dataset.images for i in record.instances if not i.is_crowd)
    counts = Counter(labels)
    for label, (category_id, name) in enumerate(zip(dataset.category_ids, dataset.class_names, strict=True), start=1):
        if not counts[label]:
            detail = f"category id {category_id}"
            yield Finding(problem=UNUSED_CLASS, split=dataset.split, where=name, detail=detail)


def _skipped_findings(dataset: CocoDataset) -> Iterator[Finding]:
    records = {record.id: record for record in dataset.images}
    for skipped in dataset.skipped_annotations:
        record = records.get(skipped.image_id)
        yield Finding(
            problem=Problem(f"{SKIPPED}: {skipped.reason}"),
            split=dataset.split,
            where=f"{place(record)}, {skipped.name}" if record else skipped.name,
            detail=skipped.detail,
            record=record,
            boxes_xyxy_px=_drawable_box(skipped),
        )


def _drawable_box(skipped: SkippedAnnotation) -> tuple[tuple[float, float, float, float], ...]:
    values = finite_numbers(skipped.bbox)
    if values is None or values.size != 4:
        return ()
    x, y, width, height = values.tolist()
    return ((x, y, x + width, y + height),)


def _image_findings(
    datasets: Sequence[CocoDataset], workers: int, progress: Callable[[int, int], None]
) -> Iterator[Finding]:
    """What is wrong with each image, and which files are the same as earlier ones."""
    places = [(dataset.split, record) for dataset in datasets for record in dataset.images]
    seen: dict[str, list[tuple[str, ImageRecord]]] = {}
    with ThreadPoolExecutor(workers) as pool:  # Pillow decodes without holding Python's lock
        for number, (own, digest) in enumerate(pool.map(lambda at: examine(*at), places)):
            yield from own
            if digest is not None:
                earlier = seen.setdefault(digest, [])
                yield from _repeated(*places[number], earlier)
                earlier.append(places[number])
            progress(number + 1, len(places))


def _repeated(split: str, record: ImageRecord, earlier: list[tuple[str, ImageRecord]]) -> Iterator[Finding]:
    """A finding where the file's content has been seen: in the same split if there is such a one, else elsewhere."""
    if not earlier:
        return
    same = [twin for name, twin in earlier if name == split]
    twin_split, twin = (split, same[0]) if same else earlier[0]
    yield Finding(
        problem=REPEATED if same else LEAKED,
        split=split,
        where=place(record),
        detail=f"the same bytes as {place(twin)} of {twin_split}",
        record=record,
        instances=record.instances,
    )

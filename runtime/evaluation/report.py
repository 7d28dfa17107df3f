"""An evaluation as one self-contained HTML page."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as mask_api

from maskrcnn.data.images import read_image
from maskrcnn.errors import UserError
from maskrcnn.imaging.draw import Colour, Mark, draw_marks, with_pose
from maskrcnn.runtime.evaluation.bootstrap import RESAMPLES, interval_of_ap
from maskrcnn.runtime.evaluation.differences import Difference, ImageScores, image_scores
from maskrcnn.runtime.evaluation.matching import FALSE_POSITIVE, IGNORED, TRUE_POSITIVE, confusion_matrix
from maskrcnn.runtime.evaluation.protocol import KIND_NAMES
from maskrcnn.runtime.evaluation.scoring import Scored, f1_curve
from maskrcnn.runtime.html import image_tag, key, page, row, table, text
from maskrcnn.runtime.plots import line_chart

_MAX_CURVES = 18  # classes in one plot
_MAX_CONFUSED = 40  # classes in one matrix
_MAX_MISTAKES = 12
_MAX_DIFFERENCES = 25
_MAX_MARKS = 60  # in one image
_CLASS_METRICS = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large")
_FOUND, _MISSED, _FALSE, _IGNORED = (60, 200, 90), (255, 150, 0), (255, 70, 70), (170, 170, 170)
_MARK_COLOURS = {TRUE_POSITIVE: _FOUND, FALSE_POSITIVE: _FALSE, IGNORED: _IGNORED}

_ImageFile = Callable[[int], Path]  # by image id


def report_page(
    title: str,
    facts: Sequence[str],
    scored: Mapping[str, Scored],
    *,
    differences: Mapping[str, Difference] | None = None,
    image_file: _ImageFile | None = None,
    min_score: float = 0.5,
    worst: int = 12,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> str:
    """Creates the page: metrics, classes, curves, confusions, differences from another result, and the worst images.

    Args:
        title: name of the evaluated model or file.
        facts: lines about the evaluation.
        scored: scored results by kind.
        differences: comparison with another result by kind.
        image_file: path of the image of an id; None: no images.
        min_score: minimum score in the confusion matrix and in images.
        worst: maximum number of images.
        resamples, seed: for the interval of each AP, see `interval_of_ap`.
    """
    parts = [f"<h1>{text(title)}</h1>", f"<ul>{''.join(f'<li>{text(fact)}</li>' for fact in facts)}</ul>"]
    parts.append(_metrics(scored, resamples, seed))
    last = list(scored.values())[-1]
    scores = image_scores(last.records, min_score)
    shown = scores.worst(worst) if image_file is not None else []
    for kind, own in scored.items():
        parts += [f"<h2>{KIND_NAMES[kind].capitalize()} AP by class</h2>", _classes(own, shown), _curves(own)]
        parts += [_thresholds(own), _confusion(own, min_score)]
        if differences and kind in differences:
            parts.append(_difference(differences[kind]))
    if image_file is not None:
        parts.append(_gallery(last, scores, shown, image_file, min_score=min_score))
    return page(f"maskrcnn evaluate: {title}", parts)


def _metrics(scored: Mapping[str, Scored], resamples: int, seed: int) -> str:
    names = dict.fromkeys(name for own in scored.values() for name in own.metrics)
    rows = [row((name, *(_digits(own.metrics.get(name)) for own in scored.values()))) for name in names]
    intervals = []
    for own in scored.values():
        if own.metrics["AP"] < 0:
            intervals.append("")
            continue
        interval = interval_of_ap(own.records, resamples=resamples, seed=seed)
        intervals.append(f"{interval.low:.4f} to {interval.high:.4f}")
    rows.append(row((f"AP, 95 % interval over images ({resamples} resamples, seed {seed})", *intervals)))
    return "<h2>Metrics</h2>" + table(("", *(KIND_NAMES[kind] for kind in scored)), rows)


def _classes(scored: Scored, shown: Sequence[int]) -> str:
    """Metrics of each class, with links to the images on the page that have an object or a detection of the class."""
    truth, records = scored.truth, scored.records
    places: dict[int, str] = {}
    for index in shown:
        present = {*truth.category[truth.image == index].tolist(), *records.category[records.image == index].tolist()}
        link = f'<a href="#image-{index}">{text(Path(truth.file_name(int(truth.image_ids[index]))).stem)}</a> '
        for category in present:
            places[category] = places.get(category, "") + link
    metrics = [name for name in _CLASS_METRICS if name in scored.metrics]
    recall = next(name for name in (f"AR_{scored.records.protocol.max_detections[-1]}", "AR") if name in scored.metrics)
    rows = []
    for category, (name, values) in enumerate(scored.by_class().items()):
        cells = (text(name), f"{values['objects']}", *(_digits(values[each]) for each in (*metrics, recall)))
        links = [f'<td class="text">{places.get(category, "")}</td>'] if shown else []
        rows.append(f"<tr>{''.join([*(f'<td>{cell}</td>' for cell in cells), *links])}</tr>")
    return table(("class", "objects", *metrics, recall, *(["images below"] if shown else [])), rows)


def _curves(scored: Scored) -> str:
    """Precision over recall: the mean over all classes, and single classes at the lowest threshold."""
    scores = scored.scores
    precision, recalls = scores.precision[:, :, :, 0, -1], scores.protocol.recall_thresholds
    if not scores.classes.size:
        return ""
    mean = precision.mean(axis=2)
    low, high = scores.protocol.iou_thresholds[[0, -1]]
    lines = {f"IoU {low:g}": mean[0], "IoU 0.75": mean[5], f"IoU {low:g} to {high:g}": mean.mean(axis=0)}
    objects = np.bincount(scored.truth.category, minlength=scores.categories)[scores.classes]
    largest = np.sort(np.argsort(-objects, kind="stable")[:_MAX_CURVES])  # in the order of the table
    names = scored.truth.category_names
    classes = {f"{names[scores.classes[index]]}": precision[0, :, index] for index in largest.tolist()}
    few = "" if len(largest) == len(scores.classes) else f", the {_MAX_CURVES} with the most objects"
    plots = (
        line_chart(
            title,
            "recall",
            "precision",
            {name: np.stack([recalls, values], axis=1) for name, values in shown.items()},
            x_range=(0, 1),
            y_range=(0, 1.02),
            markers=False,
        )
        for title, shown in (("mean of all classes", lines), (f"classes at IoU {low:g}{few}", classes))
    )
    return f"<h3>Precision over recall</h3><div class='images'>{''.join(plots)}</div>"


def _thresholds(scored: Scored) -> str:
    """F1, precision and recall over the score threshold, and the threshold with the best F1."""
    curve = f1_curve(scored.records)
    best = curve.best()
    if best is None:
        return ""
    threshold, f1, precision, recall = best
    lines = {"F1": curve.f1, "precision": curve.precision, "recall": curve.recall}
    points = {name: np.stack([curve.thresholds, values], axis=1) for name, values in lines.items()}
    points[f"recommended, {threshold:.2f}"] = np.array([[threshold, 0], [threshold, 1]])
    chart = line_chart("all classes", "score threshold", "", points, x_range=(0, 1), y_range=(0, 1.02), markers=False)
    iou = scored.records.protocol.iou_thresholds[0]
    words = (
        f"Recommended score threshold: <b>{threshold:.2f}</b>, which gives the best F1 over all classes, {f1:.3f} "
        f"(precision {precision:.3f}, recall {recall:.3f}, IoU {iou:g})."
    )
    return f"<h3>Score threshold</h3><p>{words}</p>{chart}"


def _confusion(scored: Scored, min_score: float) -> str:
    occurring, matrix = confusion_matrix(scored.truth, scored.results, scored.records, min_score)
    names = [scored.truth.category_names[index] for index in occurring.tolist()]
    classes = np.arange(len(names))
    caption = (
        f"IoU {scored.records.protocol.iou_thresholds[0]:g}, score {min_score:g} or more. Rows are annotated classes, "
        "columns are detected classes. The diagonal holds COCO's true positives, the other cells the "
        "remaining detections and objects."
    )
    if len(names) > _MAX_CONFUSED:
        wrong = matrix.sum(axis=0)[:-1] + matrix.sum(axis=1)[:-1] - 2 * np.diag(matrix)[:-1]
        classes = np.sort(np.argsort(-wrong, kind="stable")[:_MAX_CONFUSED])
        caption += f" Only the {_MAX_CONFUSED} classes with the most errors."
    shown = np.append(classes, len(names))
    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    rows = []
    for r in shown.tolist():
        cells = "".join(_cell(int(matrix[r, c]), float(shares[r, c]), r == c) for c in shown.tolist())
        rows.append(f"<tr><td>{text(names[r]) if r < len(names) else 'no object'}</td>{cells}</tr>")
    heads = ("annotated \\ detected", *(names[index] for index in classes.tolist()), "missed")
    inner = matrix[:-1, :-1] * ~np.eye(len(names), dtype=bool)
    mistakes = [
        f"<li>{text(names[true])} detected as {text(names[detected])}: {inner[true, detected]}</li>"
        for true, detected in zip(*np.nonzero(inner), strict=True)
    ]
    order = np.argsort(-inner[np.nonzero(inner)], kind="stable")[:_MAX_MISTAKES]
    listed = f"<p>Most frequent:</p><ul>{''.join(mistakes[k] for k in order)}</ul>" if mistakes else ""
    return f"<h3>Confusions</h3><p>{caption}</p>{table(heads, rows)}{listed}"


def _cell(count: int, share: float, is_right: bool) -> str:
    colour = f"rgba({'46,125,50' if is_right else '198,40,40'},{0.6 * share:.2f})"
    return f'<td style="background:{colour}">{count or ""}</td>'


def _difference(found: Difference) -> str:
    rows = [
        row(
            (
                f"{image.image_id}",
                image.file_name,
                _digits(image.ap),
                _digits(image.other_ap),
                *(f"{value}" for value in (image.lost, image.gained, image.unpaired)),
                f"{image.score_shift:.3g}",
                f"{image.box_shift_px:.3g}",
            )
        )
        for image in [image for image in found.images if not image.is_equal][:_MAX_DIFFERENCES]
    ]
    heads = ("image", "file", "AP", "other AP", "lost", "gained", "unpaired", "score shift", "box shift px")
    metrics = "".join(row((name, f"{value:+.4f}")) for name, value in found.metrics.items())
    interval, images = (text(line) for line in found.lines(0)[:2])
    return (
        f"<h3>Difference from the other result</h3><p>{interval}.</p>{table(('other minus this', ''), [metrics])}"
        f"<p>{images}; largest differences:</p>{table(heads, rows)}"
    )


def _digits(value: float | None) -> str:
    """A metric with four digits; empty for None and -1 (no objects)."""
    return "" if value is None or value < 0 else f"{value:.4f}"


def _gallery(
    scored: Scored, scores: ImageScores, indices: Sequence[int], image_file: _ImageFile, *, min_score: float
) -> str:
    """HTML of the worst images: annotations on the left, detections on the right.

    Args:
        scored: the results.
        scores: `image_scores` of the results, with the same `min_score`.
        indices: indices of the images.
        image_file: path of the image of an id; an error text replaces an image that cannot be read.
        min_score: minimum score drawn.
    """
    if not indices:
        return "<h2>Worst images</h2><p>No objects, and no false positives.</p>"
    caption = (
        "By ascending AP of the image. Annotations on the left: "
        f"{key('found', _FOUND)}, {key('missed', _MISSED)}, {key('not counted', _IGNORED)}. Detections of score "
        f"{min_score:g} or more on the right: {key('correct', _FOUND)}, {key('wrong', _FALSE)}, "
        f"{key('not counted', _IGNORED)}. At IoU {scored.records.protocol.iou_thresholds[0]:g}."
    )
    parts = [_image(scored, scores, index, image_file, min_score) for index in indices]
    return f"<h2>Worst images</h2><p>{caption}</p>{''.join(parts)}"


def _image(scored: Scored, scores: ImageScores, index: int, image_file: _ImageFile, min_score: float) -> str:
    image_id = int(scored.truth.image_ids[index])
    ap = f"AP {scores.ap[index]:.3f}" if scores.ap[index] >= 0 else "no objects"
    head = (
        f'<h3 id="image-{index}">{text(scored.truth.file_name(image_id))} (id {image_id}): {ap}, '
        f"{scores.missed[index]} of {scores.objects[index]} missed, "
        f"{scores.false[index]} wrong</h3>"
    )
    try:
        image = read_image(image_file(image_id), annotated_hw=scored.truth.sizes_hw[index])
    except UserError as error:
        return f"{head}<p>{text(error.found)}</p>"
    images = (
        image_tag(draw_marks(image, marks[:_MAX_MARKS]), caption, is_photo=True)
        for marks, caption in (
            (_objects(scored, index, min_score), f"{image_file(image_id).name}, annotations"),
            (_detections(scored, index, min_score), "detections"),
        )
    )
    return f'{head}<div class="images large">{"".join(images)}</div>'


def _objects(scored: Scored, image: int, min_score: float) -> list[Mark]:
    """The annotated objects of an image, missed ones first."""
    truth, records = scored.truth, scored.records
    is_found = records.found_objects(min_score)
    marks = []
    for index in np.flatnonzero(truth.image == image).tolist():
        name = truth.category_names[truth.category[index]]
        colour = _IGNORED if not records.is_counted[index, 0] else _FOUND if is_found[index] else _MISSED
        mask = truth.masks[0][index] if scored.kind == "segm" else None
        marks.append(_mark(truth.boxes[index] if mask is None else None, name, colour, mask))
        if scored.kind == "keypoints":
            marks[-1] = _posed(marks[-1], truth.keypoints[index], truth.skeleton)
    return sorted(marks, key=lambda mark: (_MISSED, _FOUND, _IGNORED).index(mark.colour))


def _detections(scored: Scored, image: int, min_score: float) -> list[Mark]:
    """The detections of an image by descending score."""
    records, results = scored.records, scored.results
    rows = np.flatnonzero((records.image == image) & (records.score >= min_score))
    marks = []
    for index in rows[np.argsort(-records.score[rows], kind="stable")].tolist():
        own = int(records.row[index])
        name = f"{scored.truth.category_names[records.category[index]]} {records.score[index]:.2f}"
        mask = results.masks[own] if scored.kind == "segm" else None
        colour = _MARK_COLOURS[int(records.outcome[index, 0, 0])]
        marks.append(_mark(None if mask is not None else results.boxes[own], name, colour, mask))
        if scored.kind == "keypoints":
            marks[-1] = _posed(marks[-1], results.keypoints[own], scored.truth.skeleton)
    return marks


def _mark(box: np.ndarray | None, name: str, colour: Colour, rle: dict[str, Any] | None) -> Mark:
    """A mark from a box (x, y, width, height) or from a run-length encoding."""
    mask = None
    if rle is not None:
        mask, box = np.ascontiguousarray(mask_api.decode(rle)).view(bool), mask_api.toBbox(rle)
    x, y, width, height = np.asarray(box, np.float64).tolist()
    return Mark((x, y, x + width, y + height), name, colour, mask)


def _posed(mark: Mark, keypoints: np.ndarray, skeleton: list[tuple[int, int]]) -> Mark:
    """Adds the keypoints `[K, 3]` with a positive third value, and the lines between them."""
    return with_pose(mark, keypoints, keypoints[:, 2] > 0, skeleton, mark.colour)

"""An evaluation as one HTML page that needs nothing beside it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from maskrcnn.data.images import read_image
from maskrcnn.errors import UserError
from maskrcnn.imaging.draw import Colour, Mark, figure_of, marked
from maskrcnn.runtime.evaluation.bootstrap import RESAMPLES, interval_of_ap
from maskrcnn.runtime.evaluation.differences import Difference, ImageScores, image_scores
from maskrcnn.runtime.evaluation.ground_truth import GroundTruth
from maskrcnn.runtime.evaluation.matching import (
    FALSE,
    IGNORED,
    TRUE,
    MatchRecords,
    Side,
    candidates,
    choices,
    sorted_side,
)
from maskrcnn.runtime.evaluation.protocol import KIND_NAMES
from maskrcnn.runtime.evaluation.results_file import Results
from maskrcnn.runtime.evaluation.scoring import Scored
from maskrcnn.runtime.html import page, picture, row, table, text

# Which classes are taken for which.


@dataclass(frozen=True, eq=False)
class _Confusion:
    """Counts at one threshold of overlap and of score."""

    matrix: np.ndarray  # [K + 1, K + 1] int64: rows are true classes and nothing, columns detected classes and missed
    min_overlap: float
    min_score: float

    def mistakes(self) -> list[tuple[int, int, int]]:
        """Pairs of different classes (true, detected, count), the most frequent first."""
        inner = self.matrix[:-1, :-1] * ~np.eye(len(self.matrix) - 1, dtype=bool)
        rows, columns = np.nonzero(inner)
        order = np.argsort(-inner[rows, columns], kind="stable")
        return [(int(rows[k]), int(columns[k]), int(inner[rows[k], columns[k]])) for k in order]


def confusion(truth: GroundTruth, results: Results, records: MatchRecords, min_score: float) -> _Confusion:
    """The matrix at the lowest threshold of overlap, 0.5.

    The diagonal are COCO's true positives. What is left of detections then looks for what is left of objects,
    whatever their class: that is a confusion; the rest is made up or missed. Crowds are left out.

    Args:
        truth, results, records: of one scoring.
        min_score: the lowest score of a detection that is counted.
    """
    overlap = float(records.protocol.iou_thresholds[0])
    matrix = np.zeros((records.categories + 1,) * 2, np.int64)
    confident = records.score >= min_score
    true = confident & (records.outcome[:, 0, 0] == TRUE)
    np.add.at(matrix, (records.category[true], records.category[true]), 1)
    false = np.flatnonzero(confident & (records.outcome[:, 0, 0] == FALSE))
    is_left = records.is_counted[:, 0].copy()
    is_left[records.found[true, 0]] = False
    left = np.flatnonzero(is_left)
    objects = _side(left, records.object_image[left], np.zeros(len(left)))
    rows = np.searchsorted(results.place, records.place[false])  # in the results' own order
    detections = _side(rows, records.image[false], -records.score[false])
    pairs = candidates(truth, results, detections, objects, overlap)
    ones = np.ones((len(left), 1), bool)
    chosen, taken = choices(pairs, detections.group, ones, np.zeros(len(left), bool), np.array([overlap]))
    object_class = np.append(records.object_category[objects.order], records.categories)
    taken_by = np.full(len(false), len(left))
    taken_by[chosen] = taken[:, 0, 0]
    np.add.at(matrix, (object_class[taken_by], results.category[detections.order]), 1)
    is_missed = np.ones(len(left) + 1, bool)
    is_missed[taken_by] = False
    np.add.at(matrix, (object_class[:-1][is_missed[:-1]], records.categories), 1)
    return _Confusion(matrix, overlap, min_score)


def _side(indices: np.ndarray, group: np.ndarray, key: np.ndarray) -> Side:
    """Some of the detections or objects, by group."""
    order, groups = sorted_side(group, key)
    return Side(indices[order], groups)


# Curves over the unit square as SVG, such as precision over recall.

_COLOURS = (
    "#1565c0",
    "#c62828",
    "#2e7d32",
    "#6a1b9a",
    "#ef6c00",
    "#00838f",
    "#4e342e",
    "#ad1457",
    "#827717",
    "#37474f",
)
_SIDE_PX, _LEFT_PX, _TOP_PX, _LEGEND_PX, _LINE_PX = 300, 46, 26, 170, 17


def curves(title: str, across: str, along: str, lines: Mapping[str, np.ndarray]) -> str:
    """A plot with a legend; both axes reach from 0 to 1.

    Args:
        title, across, along: of the plot and its axes.
        lines: points `[P, 2]` by the name that the legend shows; colours repeat after ten.
    """
    height = max(_SIDE_PX + _TOP_PX + 40, _TOP_PX + _LINE_PX * len(lines) + 10)
    width = _LEFT_PX + _SIDE_PX + 16 + _LEGEND_PX
    parts = [f'<text x="{_LEFT_PX}" y="16" font-weight="600">{text(title)}</text>', *_frame(across, along)]
    for number, (name, points) in enumerate(lines.items()):
        colour, y = _COLOURS[number % len(_COLOURS)], _TOP_PX + 10 + _LINE_PX * number
        parts += [_line(points, colour), _legend(name, colour, y)]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'font-family="system-ui, sans-serif" font-size="12">{"".join(parts)}</svg>'
    )


def _frame(across: str, along: str) -> list[str]:
    middle, bottom = _LEFT_PX + _SIDE_PX / 2, _TOP_PX + _SIDE_PX
    turned = f"translate(12 {_TOP_PX + _SIDE_PX / 2}) rotate(-90)"
    parts = [
        f'<text x="{middle}" y="{bottom + 34}" text-anchor="middle">{text(across)}</text>',
        f'<text transform="{turned}" text-anchor="middle">{text(along)}</text>',
    ]
    for tick in (0, 0.25, 0.5, 0.75, 1):
        x, y = _place(tick, tick)
        parts += [
            f'<path d="M{x:.0f} {_TOP_PX}V{bottom}M{_LEFT_PX} {y:.0f}h{_SIDE_PX}" stroke="#ddd"/>',
            f'<text x="{x:.0f}" y="{bottom + 16}" text-anchor="middle">{tick:g}</text>',
            f'<text x="{_LEFT_PX - 6}" y="{y + 4:.0f}" text-anchor="end">{tick:g}</text>',
        ]
    return parts


def _line(points: np.ndarray, colour: str) -> str:
    path = "L".join(f"{x:.1f} {y:.1f}" for x, y in (_place(*point) for point in points.tolist()))
    return f'<path d="M{path}" fill="none" stroke="{colour}" stroke-width="1.8"/>' if path else ""


def _legend(name: str, colour: str, y: float) -> str:
    x = _LEFT_PX + _SIDE_PX + 16
    return (
        f'<path d="M{x} {y}h14" stroke="{colour}" stroke-width="3"/><text x="{x + 20}" y="{y + 4}">{text(name)}</text>'
    )


def _place(across: float, along: float) -> tuple[float, float]:
    """Pixels of a point of the unit square."""
    return _LEFT_PX + across * _SIDE_PX, _TOP_PX + (1 - along) * _SIDE_PX


# Pictures of the images on which a detector does worst, beside what it should have found.

_FOUND, _MISSED, _FALSE, _IGNORED = (60, 200, 90), (255, 150, 0), (255, 70, 70), (170, 170, 170)
_MARK_COLOURS = {TRUE: _FOUND, FALSE: _FALSE, IGNORED: _IGNORED}
_MOST_MARKS = 60  # on one picture

_ImageFile = Callable[[int], Path]  # by image id


def _gallery(scored: Scored, scores: ImageScores, image_file: _ImageFile, *, min_score: float, count: int) -> str:
    """HTML of the worst images: annotations at the left, detections at the right.

    Args:
        scored: the results.
        scores: of the same results and `min_score`.
        image_file: where the image of an id lies; one that cannot be read is said to be missing.
        min_score: the lowest score drawn.
        count: most images.
    """
    places = scores.worst(count)
    if not places:
        return "<h2>Worst images</h2><p>Nothing is missed and nothing made up.</p>"
    told = (
        "Lowest AP of the image by itself first. Annotations at the left: "
        f"{_key('found', _FOUND)}, {_key('missed', _MISSED)}, {_key('not counted', _IGNORED)}. Detections of score "
        f"{min_score:g} or more at the right: {_key('right', _FOUND)}, {_key('wrong', _FALSE)}, "
        f"{_key('not counted', _IGNORED)}. At IoU {scored.records.protocol.iou_thresholds[0]:g}."
    )
    parts = [_image(scored, scores, place, image_file, min_score) for place in places]
    return f"<h2>Worst images</h2><p>{told}</p>{''.join(parts)}"


def _key(word: str, colour: Colour) -> str:
    return f'<span style="background:rgb{colour}">&nbsp;{word}&nbsp;</span>'


def _image(scored: Scored, scores: ImageScores, place: int, image_file: _ImageFile, min_score: float) -> str:
    image_id = int(scored.truth.image_ids[place])
    ap = f"AP {scores.ap[place]:.3f}" if scores.ap[place] >= 0 else "nothing to be found"
    head = (
        f"<h3>image {image_id}: {ap}, {scores.missed[place]} of {scores.objects[place]} missed, "
        f"{scores.false[place]} wrong</h3>"
    )
    try:
        image = read_image(image_file(image_id))
    except UserError as error:
        return f"{head}<p>{text(error.found)}</p>"
    height, width = image.shape[:2]
    if (height, width) != scored.truth.sizes_hw[place]:
        return f"{head}<p>{text(f'the file measures {width}×{height}, the annotations say otherwise')}</p>"
    pictures = (
        picture(marked(image, marks[:_MOST_MARKS]), caption, is_photo=True)
        for marks, caption in (
            (_objects(scored, place, min_score), f"{image_file(image_id).name}, annotations"),
            (_detections(scored, place, min_score), "detections"),
        )
    )
    return f'{head}<div class="pictures large">{"".join(pictures)}</div>'


def _objects(scored: Scored, place: int, min_score: float) -> list[Mark]:
    """The annotated objects of an image, those that are missed on top."""
    truth, records = scored.truth, scored.records
    true = (records.score >= min_score) & (records.outcome[:, 0, 0] == TRUE)
    found = set(records.found[true, 0].tolist())
    marks = []
    for index in np.flatnonzero(truth.image == place).tolist():
        name = truth.category_names[truth.category[index]]
        fate = _FOUND if index in found else _MISSED
        colour = fate if records.is_counted[index, 0] else _IGNORED
        mask = truth.masks[0][index] if scored.kind == "segm" else None
        marks.append(_mark(truth.boxes[index] if mask is None else None, name, colour, mask))
        if scored.kind == "keypoints":
            marks[-1] = _posed(marks[-1], truth.keypoints[index], truth.skeleton)
    return sorted(marks, key=lambda mark: (_MISSED, _FOUND, _IGNORED).index(mark.colour))


def _detections(scored: Scored, place: int, min_score: float) -> list[Mark]:
    """The detections of an image by descending score."""
    records, results = scored.records, scored.results
    rows = np.flatnonzero((records.image == place) & (records.score >= min_score))
    marks = []
    for index in rows[np.argsort(-records.score[rows], kind="stable")].tolist():
        own = int(np.searchsorted(results.place, records.place[index]))
        name = f"{scored.truth.category_names[records.category[index]]} {records.score[index]:.2f}"
        mask = results.masks[own] if scored.kind == "segm" else None
        colour = _MARK_COLOURS[int(records.outcome[index, 0, 0])]
        marks.append(_mark(None if mask is not None else results.boxes[own], name, colour, mask))
        if scored.kind == "keypoints":
            marks[-1] = _posed(marks[-1], results.keypoints[own], scored.truth.skeleton)
    return marks


def _mark(box: np.ndarray | None, name: str, colour: Colour, rle: dict | None) -> Mark:
    """A mark from a box (x, y, width, height) or from run lengths."""
    from pycocotools import mask as mask_api

    mask = None
    if rle is not None:
        mask, box = np.ascontiguousarray(mask_api.decode(rle)).view(bool), mask_api.toBbox(rle)
    x, y, width, height = (float(value) for value in box)
    return Mark((x, y, x + width, y + height), name, colour, mask)


def _posed(mark: Mark, keypoints: np.ndarray, skeleton: list[tuple[int, int]]) -> Mark:
    """The mark with those of its keypoints `[K, 3]` whose third number is positive, and the lines between them."""
    return replace(mark, **figure_of(keypoints, keypoints[:, 2] > 0, skeleton, mark.colour))


_MOST_CURVES = 18  # classes in one plot
_MOST_CONFUSED = 40  # classes in one matrix
_MOST_MISTAKES = 12
_MOST_DIFFERENCES = 25
_CLASS_METRICS = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large")


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
    """The page: metrics, classes, curves, confusions, differences to another result, and the worst images.

    Args:
        title: what was evaluated.
        facts: lines about it.
        scored: by kind.
        differences: to another result, by kind.
        image_file: where images lie; None leaves the pictures out.
        min_score: the lowest score in confusion matrix and pictures.
        worst: most images in the gallery.
        resamples, seed: of the interval of each AP; see `interval_of_ap`.
    """
    parts = [f"<h1>{text(title)}</h1>", f"<ul>{''.join(f'<li>{text(fact)}</li>' for fact in facts)}</ul>"]
    parts.append(_metrics(scored, resamples, seed))
    for kind, own in scored.items():
        parts += [f"<h2>{KIND_NAMES[kind].capitalize()} AP by class</h2>", _classes(own), _curves(own)]
        parts.append(_confusion(confusion(own.truth, own.results, own.records, min_score), own.truth.category_names))
        if differences and kind in differences:
            parts.append(_difference(differences[kind]))
    if image_file is not None:
        last = list(scored.values())[-1]
        scores = image_scores(last.records, min_score)
        parts.append(_gallery(last, scores, image_file, min_score=min_score, count=worst))
    return page(f"maskrcnn evaluate: {title}", parts)


def _metrics(scored: Mapping[str, Scored], resamples: int, seed: int) -> str:
    names = dict.fromkeys(name for own in scored.values() for name in own.metrics)
    rows = [row((name, *(_figure(own.metrics.get(name)) for own in scored.values()))) for name in names]
    intervals = []
    for own in scored.values():
        if own.metrics["AP"] < 0:
            intervals.append("")
            continue
        found = interval_of_ap(own.records, resamples=resamples, seed=seed)
        intervals.append(f"{found.low:.4f} to {found.high:.4f}")
    told = f"AP, 95 % interval over images ({resamples} resamples, seed {seed})"
    rows.append(row((told, *intervals)))
    return "<h2>Metrics</h2>" + table(("", *(KIND_NAMES[kind] for kind in scored)), rows)


def _classes(scored: Scored) -> str:
    metrics = [name for name in _CLASS_METRICS if name in scored.metrics]
    recall = next(name for name in ("AR_100", "AR") if name in scored.metrics)
    rows = [
        row((name, f"{figures['objects']}", *(_figure(figures[key]) for key in (*metrics, recall))))
        for name, figures in scored.by_class().items()
    ]
    return table(("class", "objects", *metrics, recall), rows)


def _curves(scored: Scored) -> str:
    """Precision over recall: the mean of all classes, and each class at the lowest threshold."""
    scores = scored.scores
    precision, recalls = scores.precision[:, :, :, 0, -1], scores.protocol.recall_thresholds
    measured = np.flatnonzero(precision[0, 0] > -1)
    if not measured.size:
        return ""
    mean = precision[:, :, measured].mean(axis=2)
    low, high = scores.protocol.iou_thresholds[[0, -1]]
    lines = {f"IoU {low:g}": mean[0], "IoU 0.75": mean[5], f"IoU {low:g} to {high:g}": mean.mean(axis=0)}
    objects = np.bincount(scored.truth.category, minlength=precision.shape[2])[measured]
    largest = measured[np.argsort(-objects, kind="stable")[:_MOST_CURVES]]
    names = scored.truth.category_names
    classes = {f"{names[index]}": precision[0, :, index] for index in largest.tolist()}
    few = "" if len(largest) == len(measured) else f", the {_MOST_CURVES} with most objects"
    plots = (
        curves(title, "recall", "precision", {n: np.stack([recalls, v], axis=1) for n, v in shown.items()})
        for title, shown in (("mean of all classes", lines), (f"classes at IoU {low:g}{few}", classes))
    )
    return f"<h3>Precision over recall</h3><div class='pictures'>{''.join(plots)}</div>"


def _confusion(found: _Confusion, names: Sequence[str]) -> str:
    matrix, classes = found.matrix, np.arange(len(names))
    told = (
        f"IoU {found.min_overlap:g}, score {found.min_score:g} or more. Rows are annotated classes, columns detected "
        "ones; on the diagonal COCO's true positives, elsewhere what is left of detections and objects."
    )
    if len(names) > _MOST_CONFUSED:
        wrong = matrix.sum(axis=0)[:-1] + matrix.sum(axis=1)[:-1] - 2 * np.diag(matrix)[:-1]
        classes = np.sort(np.argsort(-wrong, kind="stable")[:_MOST_CONFUSED])
        told += f" Only the {_MOST_CONFUSED} classes with most errors."
    shown = np.append(classes, len(names))
    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    rows = []
    for r in shown.tolist():
        cells = "".join(_cell(int(matrix[r, c]), float(shares[r, c]), r == c) for c in shown.tolist())
        rows.append(f"<tr><td>{text(names[r]) if r < len(names) else 'nothing there'}</td>{cells}</tr>")
    heads = ("annotated \\ detected", *(names[index] for index in classes.tolist()), "missed")
    mistakes = [
        f"<li>{text(names[true])} taken for {text(names[taken])}: {count}</li>"
        for true, taken, count in found.mistakes()[:_MOST_MISTAKES]
    ]
    listed = f"<p>Most frequent:</p><ul>{''.join(mistakes)}</ul>" if mistakes else ""
    return f"<h3>Confusions</h3><p>{told}</p>{table(heads, rows)}{listed}"


def _cell(count: int, share: float, is_right: bool) -> str:
    colour = f"rgba({'46,125,50' if is_right else '198,40,40'},{0.75 * share:.2f})"
    return f'<td style="background:{colour}">{count or ""}</td>'


def _difference(found: Difference) -> str:
    rows = [
        row(
            (
                f"{image.image_id}",
                image.file_name,
                _figure(image.ap),
                _figure(image.other_ap),
                *(f"{value}" for value in (image.lost, image.gained, image.unpaired)),
                f"{image.score_shift:.3g}",
                f"{image.box_shift_px:.3g}",
            )
        )
        for image in [image for image in found.images if not image.is_equal][:_MOST_DIFFERENCES]
    ]
    heads = ("image", "file", "AP", "other AP", "lost", "gained", "unpaired", "score shift", "box shift px")
    metrics = "".join(row((name, f"{value:+.4f}")) for name, value in found.metrics.items())
    interval, images = (text(line) for line in found.lines(0)[:2])
    return (
        f"<h3>Difference to the other result</h3><p>{interval}.</p>{table(('other minus this', ''), [metrics])}"
        f"<p>{images}; those that differ most:</p>{table(heads, rows)}"
    )


def _figure(value: float | None) -> str:
    """A metric; nothing where there is none or nothing to be measured."""
    return "" if value is None or value < 0 else f"{value:.4f}"

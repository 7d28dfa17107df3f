"""An evaluation as one HTML page that needs nothing beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from maskrcnn.runtime.evaluation.bootstrap import RESAMPLES, interval_of_ap
from maskrcnn.runtime.evaluation.confusion import Confusion, confusion
from maskrcnn.runtime.evaluation.differences import Difference
from maskrcnn.runtime.evaluation.gallery import ImageFile, gallery
from maskrcnn.runtime.evaluation.image_scores import image_scores
from maskrcnn.runtime.evaluation.protocol import KIND_NAMES
from maskrcnn.runtime.evaluation.scoring import Scored
from maskrcnn.runtime.evaluation.svg_curves import curves
from maskrcnn.runtime.html_parts import page, row, table, text

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
    image_file: ImageFile | None = None,
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
        parts.append(gallery(last, scores, image_file, min_score=min_score, count=worst))
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


def _confusion(found: Confusion, names: Sequence[str]) -> str:
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

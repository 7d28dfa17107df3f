"""Pictures of the images on which a detector does worst, beside what it should have found."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from maskrcnn.data.images import read_image
from maskrcnn.draw import Colour, Mark, figure_of, marked
from maskrcnn.errors import UserError
from maskrcnn.runtime.evaluation.image_scores import ImageScores
from maskrcnn.runtime.evaluation.match_records import FALSE, IGNORED, TRUE
from maskrcnn.runtime.evaluation.scoring import Scored
from maskrcnn.runtime.html_parts import picture, text

_FOUND, _MISSED, _FALSE, _IGNORED = (60, 200, 90), (255, 150, 0), (255, 70, 70), (170, 170, 170)
_COLOURS = {TRUE: _FOUND, FALSE: _FALSE, IGNORED: _IGNORED}
_MOST_MARKS = 60  # on one picture

ImageFile = Callable[[int], Path]  # by image id


def gallery(scored: Scored, scores: ImageScores, image_file: ImageFile, *, min_score: float, count: int) -> str:
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


def _image(scored: Scored, scores: ImageScores, place: int, image_file: ImageFile, min_score: float) -> str:
    image_id = int(scored.truth.image_ids[place])
    ap = f"AP {scores.ap[place]:.3f}" if scores.ap[place] >= 0 else "nothing to be found"
    head = (
        f"<h3>image {image_id}: {ap}, {scores.missed[place]} of {scores.objects[place]} missed, "
        f"{scores.false[place]} wrong</h3>"
    )
    try:
        image = read_image(image_file(image_id))
    except UserError as error:
        return f"{head}<p>{text(error.came)}</p>"
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
    for row in np.flatnonzero(truth.image == place).tolist():
        name = truth.category_names[truth.category[row]]
        fate = _FOUND if row in found else _MISSED
        colour = fate if records.is_counted[row, 0] else _IGNORED
        mask = truth.masks[0][row] if scored.kind == "segm" else None
        marks.append(_mark(truth.boxes[row] if mask is None else None, name, colour, mask))
        if scored.kind == "keypoints":
            marks[-1] = _posed(marks[-1], truth.keypoints[row], truth.skeleton)
    return sorted(marks, key=lambda mark: (_MISSED, _FOUND, _IGNORED).index(mark.colour))


def _detections(scored: Scored, place: int, min_score: float) -> list[Mark]:
    """The detections of an image by descending score."""
    records, results = scored.records, scored.results
    rows = np.flatnonzero((records.image == place) & (records.score >= min_score))
    marks = []
    for row in rows[np.argsort(-records.score[rows], kind="stable")].tolist():
        own = int(np.searchsorted(results.place, records.place[row]))
        name = f"{scored.truth.category_names[records.category[row]]} {records.score[row]:.2f}"
        mask = results.masks[own] if scored.kind == "segm" else None
        colour = _COLOURS[int(records.outcome[row, 0, 0])]
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

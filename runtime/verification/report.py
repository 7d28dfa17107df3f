"""What a comparison by stages found, as text and as JSON can hold it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import numpy as np
from PIL import Image

from maskrcnn.imaging.draw import overlay
from maskrcnn.imaging.postprocess import Detections
from maskrcnn.metadata import ModelMetadata
from maskrcnn.runtime.html import page, picture, table, text
from maskrcnn.runtime.verification.stage_errors import StageError
from maskrcnn.runtime.verification.tolerances import Limit
from maskrcnn.stages import LEVELS

# What makes a stage the first to depart, as a rule.
_CAUSES = {
    "images": "the resize rule, the divisor or the channel order in the metadata",
    "normalised": "mean and standard deviation, or what becomes of the padding",
    "levels": "weights or batch norm of backbone and FPN, or the channel order that the first convolution expects",
    "objectness": "the RPN head, or another order of anchors",
    "anchor_deltas": "the RPN head, or another order of anchors",
    "proposals": "anchors, decoding, clipping, or the RPN's top-k and NMS threshold",
    "box_features": "RoIAlign 7 × 7: pixel centres (aligned), sampling ratio, choice of level",
    "class_logits": "the box head or its classifier",
    "box_deltas": "the box head or its regressor",
    "boxes": "decoding weights, score threshold, candidates, or the NMS threshold between detections",
    "scores": "softmax, or the background's place among the classes",
    "labels": "the order of classes, or NMS across instead of within them",
    "mask_features": "RoIAlign 14 × 14: pixel centres (aligned), sampling ratio, choice of level",
    "mask_logits": "the mask head, which class's mask is taken, or transposed masks",
    "masks": "sigmoid, transposed masks, or rows past the last detection",
    "keypoint_features": "RoIAlign 14 × 14: pixel centres (aligned), sampling ratio, choice of level",
    "keypoint_logits": "the keypoint head, the resizing of its maps, or the order of keypoints",
    "keypoints": "the search of heat maps: half a cell, x and y exchanged, or rows past the last detection",
}


class Verdict(str, Enum):
    """What is said of a stage."""

    AGREES = "agrees"
    DEPARTS = "departs"
    NOT_COMPARED = "not compared"


@dataclass(frozen=True, kw_only=True)
class _StageResult:
    """One stage on all images."""

    stage: str
    verdict: Verdict
    needed: float | None  # the smallest tolerance at which the stage would agree; None where nothing was compared
    limit: Limit
    beyond: float  # share of the figures that are beyond the tolerance
    largest: float  # absolute difference, in the stage's own unit
    compared: int  # elements of a dense stage, rows of the others
    per_image: tuple[float | None, ...]  # the tolerance that each image would need
    note: str = ""

    @property
    def worst_image(self) -> int | None:
        """Index of the image that needs the largest tolerance."""
        needs = [(math.inf if math.isnan(n) else n, -k) for k, n in enumerate(self.per_image) if n is not None]
        return -max(needs)[1] if needs else None


@dataclass(frozen=True, eq=False)
class Evidence:
    """The image on which the models depart earliest or most."""

    name: str
    image: np.ndarray  # uint8 [H, W, 3] RGB
    detections: tuple[Detections, Detections]  # of the reference and the other, in pixels of the image
    maps: dict[str, np.ndarray]  # by level: [H_l, W_l] mean difference over the channels, relative to the RMS


@dataclass(frozen=True, kw_only=True)
class VerifyReport:
    """All stages of two models in their order."""

    models: tuple[str, str]  # what ran the reference, and the other
    tolerances: str  # name of the class
    images: tuple[str, ...]
    stages: tuple[_StageResult, ...]
    notes: tuple[str, ...] = ()
    worst: Evidence | None = None

    @property
    def ok(self) -> bool:
        """Whether no stage departs."""
        return self.first_departure is None

    @property
    def first_departure(self) -> str | None:
        """The first stage in order that departs; what comes after it inherits its difference."""
        return next((result.stage for result in self.stages if result.verdict is Verdict.DEPARTS), None)

    def result(self, stage: str) -> _StageResult:
        """What was found of one stage."""
        return next(result for result in self.stages if result.stage == stage)

    def conclusion(self) -> str:
        """One or two lines: whether the models agree, or where they depart first and what to look at."""
        if self.ok:
            skipped = sum(result.verdict is Verdict.NOT_COMPARED for result in self.stages)
            return f"no stage departs, by the tolerances of {self.tolerances!r}" + (
                f"; {skipped} of {len(self.stages)} were not compared" if skipped else ""
            )
        first = self.result(self.first_departure)
        kept = f" of all but {first.limit.share:.1%} of the rows" if first.limit.share else ""
        return (
            f"first departure: {first.stage}, most on {self.images[first.worst_image]}: "
            f"needs a tolerance of {figure(first.needed)}{kept}, {self.tolerances!r} allows {first.limit.tolerance:g}\n"
            f"look at: {_CAUSES[_cause_of(first.stage)]}"
        )

    def table(self) -> str:
        """One line for each stage: what it needs and may need, the worst image and the verdict."""
        rows = [("stage", "needs", "may", "beyond", "largest", "compared", "verdict", "worst image, remarks")]
        for result in self.stages:
            worst = "" if result.worst_image is None or not result.needed else self.images[result.worst_image]
            rows.append(
                (
                    result.stage,
                    figure(result.needed),
                    f"{result.limit.tolerance:g}",
                    f"{result.beyond:.1%}" if result.compared else "",
                    figure(result.largest) if result.compared else "",
                    str(result.compared),
                    result.verdict.value,
                    "; ".join(part for part in (worst, result.note) if part),
                )
            )
        widths = [max(len(row[column]) for row in rows) for column in range(7)]
        lines = ["  ".join([*map(str.ljust, row, widths), row[-1]]).rstrip() for row in rows]
        return "\n".join([*lines, *self.notes])

    def to_dict(self) -> dict[str, Any]:
        """The report without its evidence; what is no finite number becomes a string."""
        return {
            "ok": self.ok,
            "first_departure": self.first_departure,
            "models": list(self.models),
            "tolerances": self.tolerances,
            "images": list(self.images),
            "stages": [_stage_dict(result) for result in self.stages],
            "notes": list(self.notes),
        }


def judged(stage: str, errors: Sequence[StageError | None], limit: Limit, absent: Sequence[bool]) -> _StageResult:
    """The verdict on one stage.

    Args:
        stage: its name.
        errors: of each image; None where it could not be computed.
        limit: of its figures.
        absent: whether the reference, and the other, lack the stage.
    """
    present = [error for error in errors if error is not None]
    figures = np.concatenate([np.zeros(0), *(error.figures for error in present)])
    need = needed(figures, limit.share)
    agrees = need is not None and need <= limit.tolerance  # NaN is not
    return _StageResult(
        stage=stage,
        verdict=Verdict.NOT_COMPARED if need is None else Verdict.AGREES if agrees else Verdict.DEPARTS,
        needed=need,
        limit=limit,
        beyond=float((~(figures <= limit.tolerance)).mean()) if len(figures) else 0.0,
        largest=float(np.max([error.largest for error in present], initial=0.0)),  # NaN where there is one
        compared=sum(error.compared for error in present),
        per_image=tuple(None if error is None else needed(error.figures, limit.share) for error in errors),
        note=_remark(present, absent) if not agrees else "",
    )


def _remark(errors: Sequence[StageError], absent: Sequence[bool]) -> str:
    """What a table says beside a stage that does not agree."""
    where = [name for name, lacks in zip(("the reference", "the other"), absent, strict=True) if lacks]
    if where:
        return f"no such name in {' and '.join(where)}"
    if not errors:
        return "what its rows belong to is missing"
    compared = [error for error in errors if len(error.figures)]
    alone = sum(error.alone for error in compared)
    notes = dict.fromkeys(error.note for error in compared or errors if error.note)
    return "; ".join([*([f"{alone} without partner"] if alone else []), *notes])


def needed(figures: np.ndarray, share: float) -> float | None:
    """The smallest tolerance that all but a share of figures `[K]` keep; NaN where one is, None of nothing."""
    if not len(figures):
        return None
    if np.isnan(figures).any():
        return math.nan
    return float(np.sort(figures)[len(figures) - 1 - int(share * len(figures))])


def figure(value: float | None) -> str:
    """A figure in two digits; nothing for None."""
    return "" if value is None else "0" if value == 0 else f"{value:.1e}" if value < 0.01 else f"{value:.2g}"


def _cause_of(stage: str) -> str:
    """The name under which the causes of a stage's departure are listed."""
    name, _, level = stage.rpartition("_")
    return "levels" if stage in LEVELS else name if level in LEVELS else stage


def _stage_dict(result: _StageResult) -> dict[str, Any]:
    return {
        "stage": result.stage,
        "verdict": result.verdict.value,
        "needed": _finite(result.needed),
        "tolerance": result.limit.tolerance,
        "share_allowed": result.limit.share,
        "share_beyond": result.beyond,
        "largest": _finite(result.largest),
        "compared": result.compared,
        "per_image": [_finite(value) for value in result.per_image],
        "note": result.note,
    }


def _finite(value: float | None) -> float | str | None:
    return value if value is None or math.isfinite(value) else str(value)


# A comparison by stages as one HTML file that needs nothing beside it.

_MOST_DRAWN = 20  # detections on a picture
_MAP_WIDTH_PX = 240
_COLOURS = {Verdict.AGREES: "#2e7d32", Verdict.DEPARTS: "#c62828", Verdict.NOT_COMPARED: "#757575"}


def html_page(report: VerifyReport, names: tuple[str, str], metadata: ModelMetadata) -> str:
    """The page: conclusion, table of stages and images, and the worst image as both models see it.

    Args:
        report: of `verify`.
        names: of the two models' files.
        metadata: of the reference, for the names of classes and the lines between keypoints.
    """
    models = "".join(
        f"<li>{role}: <b>{text(name)}</b>, {text(model)}</li>"
        for role, name, model in zip(("reference", "other"), names, report.models, strict=True)
    )
    parts = [
        f"<h1>{text(names[0])} and {text(names[1])}</h1>",
        f"<ul>{models}</ul>",
        f"<pre>{text(report.conclusion())}</pre>",
        *(f"<p>{text(note)}</p>" for note in report.notes),
        _table(report),
    ]
    if report.worst is not None:
        parts.append(_evidence(report.worst, names, metadata))
    return page("maskrcnn verify", parts)


def _table(report: VerifyReport) -> str:
    heads = ("stage", "needs", "may", "beyond", "largest", "compared", "verdict", *report.images, "remarks")
    return table(heads, map(_row, report.stages))


def _row(result: _StageResult) -> str:
    cells = [
        figure(result.needed),
        f"{result.limit.tolerance:g}",
        f"{result.beyond:.1%}" if result.compared else "",
        figure(result.largest) if result.compared else "",
        f"{result.compared}",
    ]
    verdict = f'<td style="color:{_COLOURS[result.verdict]}">{result.verdict.value}</td>'
    images = "".join(_image_cell(need, result.limit.tolerance) for need in result.per_image)
    numbers = "".join(f"<td>{cell}</td>" for cell in cells)
    return f'<tr><td>{result.stage}</td>{numbers}{verdict}{images}<td class="text">{text(result.note)}</td></tr>'


def _image_cell(need: float | None, tolerance: float) -> str:
    is_beyond = need is not None and not need <= tolerance
    return f"<td{' style=background:#ffcdd2' if is_beyond else ''}>{figure(need)}</td>"


def _evidence(worst: Evidence, names: tuple[str, str], metadata: ModelMetadata) -> str:
    pictures = "".join(
        picture(
            overlay(worst.image, _best(found), metadata.class_names, metadata.keypoint_skeleton, point_score=-np.inf),
            f"{name}: {len(found)} detections",
        )
        for name, found in zip(names, worst.detections, strict=True)
    )
    told = f"The image that departs first, or most; at most {_MOST_DRAWN} detections are drawn."
    section = f'<h2>{text(worst.name)}</h2><p>{told}</p><div class="pictures large">{pictures}</div>'
    if worst.maps:
        brightest = max(float(np.nan_to_num(values, posinf=0.0).max(initial=0.0)) for values in worst.maps.values())
        maps = "".join(
            picture(_map_picture(values, brightest), f"{level}: {figure(float(values.mean()))} on average")
            for level, values in worst.maps.items()
            if values.size
        )
        section += (
            "<h2>Where the feature maps differ</h2><p>Mean difference over the channels, relative to the reference's "
            f'RMS; white is {figure(brightest)}.</p><div class="pictures">{maps}</div>'
        )
    return section


def _best(detections: Detections) -> Detections:
    if len(detections) <= _MOST_DRAWN:
        return detections
    return detections.above(float(np.sort(detections.scores)[-_MOST_DRAWN]))


def _map_picture(values: np.ndarray, brightest: float) -> Image.Image:
    """A map `[H, W]` from black over red and yellow to white; what is not finite is white."""
    share = np.nan_to_num(values / max(brightest, 1e-12), nan=1.0, posinf=1.0).clip(0, 1)
    channels = [(3 * share - k).clip(0, 1) for k in range(3)]
    image = Image.fromarray((255 * np.stack(channels, axis=-1)).round().astype(np.uint8))
    height = max(1, round(_MAP_WIDTH_PX * values.shape[0] / values.shape[1]))
    return image.resize((_MAP_WIDTH_PX, height), Image.Resampling.NEAREST)

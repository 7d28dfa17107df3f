"""The report of a comparison by stages: text, JSON and HTML."""

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
from maskrcnn.runtime.html import image_tag, page, table, text
from maskrcnn.runtime.verification.stage_errors import StageError
from maskrcnn.runtime.verification.tolerances import Limit, stage_kind

# Usual causes of a stage that is the first to differ.
_CAUSES = {
    "images": "the resize rule, the divisor or the channel order in the metadata",
    "normalised": "mean and standard deviation, or the padding",
    "levels": "weights or batch norm of backbone and FPN, or the channel order that the first convolution expects",
    "objectness": "the RPN head, or another order of anchors",
    "anchor_deltas": "the RPN head, or another order of anchors",
    "proposals": "anchors, decoding, clipping, or the RPN's top-k and NMS threshold",
    "box_features": "RoIAlign 7 × 7: pixel centres (aligned), sampling ratio, choice of level",
    "class_logits": "the box head or its classifier",
    "box_deltas": "the box head or its regressor",
    "boxes": "decoding weights, score threshold, candidates, or the NMS threshold between detections",
    "scores": "softmax, or the position of the background class",
    "labels": "the order of classes, or NMS across instead of within them",
    "mask_features": "RoIAlign 14 × 14: pixel centres (aligned), sampling ratio, choice of level",
    "mask_logits": "the mask head, the class whose mask is selected, or transposed masks",
    "masks": "sigmoid, transposed masks, or rows past the last detection",
    "keypoint_features": "RoIAlign 14 × 14: pixel centres (aligned), sampling ratio, choice of level",
    "keypoint_logits": "the keypoint head, the resizing of its maps, or the order of keypoints",
    "keypoints": "the search of heat maps: half a cell, x and y exchanged, or rows past the last detection",
}


class Verdict(str, Enum):
    """Result of comparing a stage."""

    AGREES = "agrees"
    DEPARTS = "departs"
    NOT_COMPARED = "not compared"


@dataclass(frozen=True, kw_only=True)
class _StageResult:
    """One stage on all images."""

    stage: str
    verdict: Verdict
    needed: float | None  # minimum tolerance at which the stage agrees; None: nothing was compared
    limit: Limit
    beyond: float  # share of the errors beyond the tolerance
    largest: float  # maximum absolute difference, in the stage's unit
    compared: int  # elements of a dense stage, rows of other stages
    per_image: tuple[float | None, ...]  # minimum tolerance of each image
    note: str = ""

    @property
    def worst_image(self) -> int | None:
        """Index of the image with the largest error."""
        needs = [(math.inf if math.isnan(n) else n, -k) for k, n in enumerate(self.per_image) if n is not None]
        return -max(needs)[1] if needs else None


@dataclass(frozen=True, eq=False)
class Evidence:
    """The image on which the models differ earliest or most."""

    name: str
    image: np.ndarray  # uint8 [H, W, 3] RGB
    detections: tuple[Detections, Detections]  # of the reference and the other model, in pixels of the image
    maps: dict[str, np.ndarray]  # by level: [H_l, W_l] mean difference over the channels relative to the RMS


@dataclass(frozen=True, kw_only=True)
class VerifyReport:
    """Comparison of two models, stage by stage in order."""

    models: tuple[str, str]  # backend and precision of the reference and the other model
    tolerances: str  # name, see `tolerances_named`
    images: tuple[str, ...]
    stages: tuple[_StageResult, ...]
    notes: tuple[str, ...] = ()
    worst: Evidence | None = None

    @property
    def ok(self) -> bool:
        """Whether every compared stage agrees."""
        return self.first_departure is None

    @property
    def first_departure(self) -> str | None:
        """The first stage that differs; its difference propagates to later stages."""
        return next((result.stage for result in self.stages if result.verdict is Verdict.DEPARTS), None)

    def result(self, stage: str) -> _StageResult:
        """The result of one stage."""
        return next(result for result in self.stages if result.stage == stage)

    def conclusion(self) -> str:
        """One or two lines: how closely the models agree, or the first stage that differs and its usual cause."""
        departure = self.first_departure
        if departure is None:
            skipped = sum(result.verdict is Verdict.NOT_COMPARED for result in self.stages)
            agreeing = f"OK: {len(self.stages) - skipped} of {len(self.stages)} stages agree within {self.tolerances!r}"
            largest = {result.stage: result.largest for result in self.stages if result.compared}
            shown = (("boxes", " px"), ("scores", ""))
            parts = [f"{name} differ by ≤ {_digits(largest[name])}{unit}" for name, unit in shown if name in largest]
            return "; ".join([agreeing, *parts, *([f"{skipped} not compared"] if skipped else [])])
        first = self.result(departure)
        image = "" if first.worst_image is None else self.images[first.worst_image]
        kept = f" of all but {first.limit.share:.1%} of the rows" if first.limit.share else ""
        return (
            f"first departure: {first.stage}, most on {image}: "
            f"requires a tolerance of {_digits(first.needed)}{kept}, "
            f"{self.tolerances!r} allows {first.limit.tolerance:g}\n"
            f"look at: {_CAUSES[stage_kind(first.stage)]}"
        )

    def table(self) -> str:
        """One line per stage: minimum and allowed tolerance, verdict and worst image."""
        rows = [("stage", "required", "allowed", "beyond", "largest", "compared", "verdict", "worst image, remarks")]
        for result in self.stages:
            worst = "" if result.worst_image is None or not result.needed else self.images[result.worst_image]
            rows.append(
                (
                    result.stage,
                    _digits(result.needed),
                    f"{result.limit.tolerance:g}",
                    f"{result.beyond:.1%}" if result.compared else "",
                    _digits(result.largest) if result.compared else "",
                    str(result.compared),
                    result.verdict.value,
                    "; ".join(part for part in (worst, result.note) if part),
                )
            )
        widths = [max(len(row[column]) for row in rows) for column in range(7)]
        lines = ["  ".join([*map(str.ljust, row, widths), row[-1]]).rstrip() for row in rows]
        return "\n".join([*lines, *self.notes])

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON values, without the evidence; NaN and infinity become strings."""
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
    """Judges one stage.

    Args:
        stage: stage name.
        errors: error of each image; None if it could not be computed.
        limit: limit of the errors.
        absent: whether the reference and the other model lack the stage.
    """
    present = [error for error in errors if error is not None]
    values = np.concatenate([np.zeros(0), *(error.values for error in present)])
    need = needed(values, limit.share)
    agrees = need is not None and need <= limit.tolerance  # NaN is not
    return _StageResult(
        stage=stage,
        verdict=Verdict.NOT_COMPARED if need is None else Verdict.AGREES if agrees else Verdict.DEPARTS,
        needed=need,
        limit=limit,
        beyond=float((~(values <= limit.tolerance)).mean()) if len(values) else 0.0,
        largest=float(np.max([error.largest for error in present], initial=0.0)),  # NaN if any is NaN
        compared=sum(error.compared for error in present),
        per_image=tuple(None if error is None else needed(error.values, limit.share) for error in errors),
        note=_remark(present, absent) if not agrees else "",
    )


def _remark(errors: Sequence[StageError], absent: Sequence[bool]) -> str:
    """The remark on a stage that does not agree."""
    where = [name for name, lacks in zip(("the reference", "the other"), absent, strict=True) if lacks]
    if where:
        return f"no such name in {' and '.join(where)}"
    if not errors:
        return "the boxes of its rows are missing"
    compared = [error for error in errors if len(error.values)]
    alone = sum(error.alone for error in compared)
    notes = dict.fromkeys(error.note for error in compared or errors if error.note)
    return "; ".join([*([f"{alone} without a partner"] if alone else []), *notes])


def needed(errors: np.ndarray, share: float) -> float | None:
    """The minimum tolerance of all but a share of the errors `[K]`; NaN if any is NaN, None if there are none."""
    if not len(errors):
        return None
    if np.isnan(errors).any():
        return math.nan
    return float(np.sort(errors)[len(errors) - 1 - int(share * len(errors))])


def _digits(value: float | None) -> str:
    """A number in two digits; empty for None."""
    return "" if value is None else "0" if value == 0 else f"{value:.1e}" if value < 0.01 else f"{value:.2g}"


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


_MAX_DRAWN = 20  # detections drawn per image
_MAP_WIDTH_PX = 240
_CALM = ((236, 239, 244), (129, 161, 193), (46, 80, 119))  # for maps of models that agree
_LOUD = ((0, 0, 0), (255, 0, 0), (255, 255, 0), (255, 255, 255))
_COLOURS = {Verdict.AGREES: "var(--good)", Verdict.DEPARTS: "var(--bad)", Verdict.NOT_COMPARED: "var(--pale)"}


def html_page(report: VerifyReport, names: tuple[str, str], metadata: ModelMetadata) -> str:
    """A self-contained HTML page: conclusion, table of stages, and the worst image with both models' detections.

    Args:
        report: report of `verify`.
        names: file names of the two models.
        metadata: metadata of the reference, for class names and the keypoint skeleton.
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
        parts.append(_evidence(report, report.worst, names, metadata))
    return page("maskrcnn verify", parts)


def _table(report: VerifyReport) -> str:
    heads = ("stage", "required", "allowed", "beyond", "largest", "compared", "verdict", *report.images, "remarks")
    return table(heads, map(_row, report.stages))


def _row(result: _StageResult) -> str:
    cells = [
        _digits(result.needed),
        f"{result.limit.tolerance:g}",
        f"{result.beyond:.1%}" if result.compared else "",
        _digits(result.largest) if result.compared else "",
        f"{result.compared}",
    ]
    verdict = f'<td style="color:{_COLOURS[result.verdict]}">{result.verdict.value}</td>'
    images = "".join(_image_cell(need, result.limit.tolerance) for need in result.per_image)
    numbers = "".join(f"<td>{cell}</td>" for cell in cells)
    return f'<tr><td>{result.stage}</td>{numbers}{verdict}{images}<td class="text">{text(result.note)}</td></tr>'


def _image_cell(need: float | None, tolerance: float) -> str:
    is_beyond = need is not None and not need <= tolerance
    style = ' style="background:#ffcdd2;color:#222"' if is_beyond else ""
    return f"<td{style}>{_digits(need)}</td>"


def _evidence(report: VerifyReport, worst: Evidence, names: tuple[str, str], metadata: ModelMetadata) -> str:
    images = "".join(
        image_tag(
            overlay(worst.image, _best(found), metadata.class_names, metadata.keypoint_skeleton, point_score=-np.inf),
            f"{name}: {len(found)} detections",
        )
        for name, found in zip(names, worst.detections, strict=True)
    )
    caption = f"The image with the earliest or largest difference; at most {_MAX_DRAWN} detections are drawn."
    section = f'<h2>{text(worst.name)}</h2><p>{caption}</p><div class="images large">{images}</div>'
    if worst.maps:
        largest = max(float(np.nan_to_num(values, posinf=0.0).max(initial=0.0)) for values in worst.maps.values())
        # Models that agree get muted colours, in which an allowed difference is pale.
        allowed = max((each.limit.tolerance for each in report.stages if each.stage in worst.maps), default=0.0)
        end = max(largest, allowed) if report.ok else largest
        colours = _CALM if report.ok else _LOUD
        maps = "".join(
            image_tag(_map_image(values, end, colours), f"{level}: {_digits(float(values.mean()))} on average")
            for level, values in worst.maps.items()
            if values.size
        )
        stops = ",".join(f"rgb{colour}" for colour in colours)
        section += (
            "<h2>Where the feature maps differ</h2><p>Mean difference over the channels, relative to the reference's "
            f'RMS: 0 <span class="bar" style="background:linear-gradient(to right,{stops})"></span> {_digits(end)}. '
            f'Allowed on average: {_digits(allowed)}; largest: {_digits(largest)}.</p><div class="images">{maps}</div>'
        )
    return section


def _best(detections: Detections) -> Detections:
    if len(detections) <= _MAX_DRAWN:
        return detections
    return detections.above(float(np.sort(detections.scores)[-_MAX_DRAWN]))


def _map_image(values: np.ndarray, end: float, colours: Sequence[tuple[int, int, int]]) -> Image.Image:
    """A map `[H, W]` in colours, evenly spaced from 0 to `end`; NaN and infinity get the last colour."""
    share = np.nan_to_num(values / max(end, 1e-12), nan=1.0, posinf=1.0).clip(0, 1)
    at = np.linspace(0, 1, len(colours))
    channels = [np.interp(share, at, channel) for channel in zip(*colours, strict=True)]
    image = Image.fromarray(np.stack(channels, axis=-1).round().astype(np.uint8))
    height = max(1, round(_MAP_WIDTH_PX * values.shape[0] / values.shape[1]))
    return image.resize((_MAP_WIDTH_PX, height), Image.Resampling.NEAREST)

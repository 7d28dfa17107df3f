"""A comparison by stages as one HTML file that needs nothing beside it."""

from __future__ import annotations

import numpy as np
from PIL import Image

from maskrcnn.draw import overlay
from maskrcnn.metadata import ModelMetadata
from maskrcnn.postprocess import Detections
from maskrcnn.runtime.html_parts import page, picture, table, text
from maskrcnn.runtime.verification.report import Evidence, StageResult, Verdict, VerifyReport, figure

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


def _row(result: StageResult) -> str:
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

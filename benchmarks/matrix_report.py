"""What the export matrix found: one result per cell, one row per model and kind of images."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
from matrix_cells import Cell, Kind, cell_feeds
from report import aligned

from maskrcnn.runtime.backend import Backend
from maskrcnn.runtime.verification.compare import EXACT, Difference, compare_outputs, merge


@dataclass(frozen=True, kw_only=True)
class Result:
    """How far two backends were apart in one cell."""

    model: str
    cell: Cell
    difference: Difference
    full: int  # images whose output had no row left, in the reference
    partly: int  # images whose output had some rows

    def to_dict(self) -> dict[str, Any]:
        """The result as JSON can hold it."""
        kind, size = self.cell.kind.value, list(self.cell.size_hw)
        place = {"model": self.model, "kind": kind, "batch": self.cell.batch, "size_hw": size}
        return {
            **place,
            "full": self.full,
            "partly": self.partly,
            "within": self.difference.within(EXACT),
            **_numbers(self.difference),
        }


@dataclass(frozen=True, kw_only=True)
class Row:
    """The cells of one model and one kind of images together."""

    model: str
    kind: Kind
    cells: int
    difference: Difference
    full: int
    partly: int
    worst: Result  # the cell that needs the most of the tolerance
    beyond: int  # cells that are outside of it

    @property
    def status(self) -> str:
        """What is wrong, or ok."""
        if self.beyond:
            return f"{self.beyond} of {self.cells} cells beyond the tolerance"
        missing = {
            Kind.ORDINARY: self.partly == 0 and "no output that is partly full",
            Kind.EMPTY: self.difference.images_without_detections == 0 and "no empty output",
            Kind.CROWDED: self.full == 0 and "no full output",
        }
        return missing[self.kind] or "ok"

    def to_dict(self) -> dict[str, Any]:
        """The row as JSON can hold it."""
        place = {
            "model": self.model,
            "kind": self.kind.value,
            "cells": self.cells,
            "full": self.full,
            "partly": self.partly,
        }
        verdict = {"worst": str(self.worst.cell), "beyond": self.beyond, "status": self.status}
        return {**place, **_numbers(self.difference), **verdict}


def compare_cell(model: str, reference: Backend, other: Backend, cell: Cell) -> Result:
    """The difference of two backends on the batches of a cell."""
    parts, full, partly = [], 0, 0
    for feeds in cell_feeds(cell):
        expected = reference(feeds)
        parts.append(compare_outputs(expected, other(feeds), EXACT))
        counts, rows = expected["num_detections"], expected["scores"].shape[1]
        full += int((counts == rows).sum())
        partly += int(((counts > 0) & (counts < rows)).sum())
    return Result(model=model, cell=cell, difference=merge(parts), full=full, partly=partly)


def summary(results: Sequence[Result]) -> list[Row]:
    """One row for each model and kind, in the order of the results."""
    rows = []
    for (model, kind), group in groupby(results, key=lambda result: (result.model, result.cell.kind)):
        found = list(group)
        rows.append(
            Row(
                model=model,
                kind=kind,
                cells=len(found),
                difference=merge([result.difference for result in found]),
                full=sum(result.full for result in found),
                partly=sum(result.partly for result in found),
                worst=max(found, key=lambda result: needed_share(result.difference)),
                beyond=sum(not result.difference.within(EXACT) for result in found),
            )
        )
    return rows


def needed_share(difference: Difference) -> float:
    """How much of `EXACT` a difference needs: above 1 it is outside; infinite for NaN and detections alone."""
    shares = (
        difference.box_px / EXACT.box_px,
        difference.score / EXACT.score,
        (difference.mask or 0.0) / EXACT.mask,
        (difference.mask_mean or 0.0) / EXACT.mask_mean,
    )
    points = difference.keypoints
    if points is not None:
        shares += (points.px / EXACT.keypoints.px, points.score / EXACT.keypoints.score)
        if not points.within(EXACT.keypoints):
            return math.inf
    if difference.unpaired or any(math.isnan(share) for share in shares):
        return math.inf
    return max(shares)


def table(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table."""
    head = [
        *("model", "kind", "cells", "images", "empty", "partly full", "full", "detections"),
        *("box px", "score", "mask", "mask mean", "keypoint px", "elsewhere", "unpaired", "worst cell", "status"),
    ]
    return aligned(head, [_columns(row) for row in rows])


def _columns(row: Row) -> list[str]:
    found = row.difference
    counts = (row.cells, found.images, found.images_without_detections, row.partly, row.full, found.detections)
    points = found.keypoints
    differences = (found.box_px, found.score, found.mask, found.mask_mean, points and points.px)
    return [
        *(row.model, row.kind.value),
        *(str(count) for count in counts),
        *("" if value is None else f"{value:.1e}" for value in differences),
        "" if points is None else f"{points.beyond} of {points.compared}",
        *(str(found.unpaired), str(row.worst.cell) if needed_share(found) else "", row.status),
    ]


def _numbers(difference: Difference) -> dict[str, Any]:
    """A difference's fields; NaN, which JSON does not have, as text."""
    return _without_nan(dataclasses.asdict(difference))


def _without_nan(values: dict[str, Any]) -> dict[str, Any]:
    inner = {name: _without_nan(value) if isinstance(value, dict) else value for name, value in values.items()}
    return {name: "NaN" if isinstance(v, float) and np.isnan(v) else v for name, v in inner.items()}

"""What COCO's evaluation measures of boxes, masks and keypoints, and the figures that it gives."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from maskrcnn.errors import UserError
from maskrcnn.keypoints import COCO_SIGMAS

KINDS = ("bbox", "segm", "keypoints")
KIND_NAMES = {"bbox": "box", "segm": "mask", "keypoints": "keypoint"}  # as tables and figures call them

# The metrics in pycocotools' order; values are in [0, 1], or -1 where nothing can be measured.
METRICS = (
    "AP",
    "AP50",
    "AP75",
    "AP_small",
    "AP_medium",
    "AP_large",
    "AR_1",
    "AR_10",
    "AR_100",
    "AR_small",
    "AR_medium",
    "AR_large",
)
_KEYPOINT_METRICS = (
    "AP",
    "AP50",
    "AP75",
    "AP_medium",
    "AP_large",
    "AR",
    "AR50",
    "AR75",
    "AR_medium",
    "AR_large",
)
SIGMAS = np.array(COCO_SIGMAS)  # of the 17 keypoints of a person, where annotations do not say what theirs are
_AREAS_PX = {"all": (0, 1e5**2), "small": (0, 32**2), "medium": (32**2, 96**2), "large": (96**2, 1e5**2)}


@dataclass(frozen=True, eq=False)
class Protocol:
    """The parameters of COCO's evaluation, with pycocotools' values."""

    kind: str  # of KINDS
    metrics: tuple[str, ...]
    area_names: tuple[str, ...]
    most_detections: tuple[int, ...]  # of one image and class, ascending

    @cached_property
    def iou_thresholds(self) -> np.ndarray:
        """`[T]`: 0.5, 0.55, … 0.95; of object keypoint similarity (OKS) where keypoints are measured."""
        return np.linspace(0.5, 0.95, 10)

    @cached_property
    def recall_thresholds(self) -> np.ndarray:
        """`[R]`: 0, 0.01, … 1."""
        return np.linspace(0.0, 1.0, 101)

    @cached_property
    def areas_px(self) -> np.ndarray:
        """`[A, 2]` least and largest area of each range, both included."""
        return np.array([_AREAS_PX[name] for name in self.area_names], np.float64)


_OBJECTS = (METRICS, ("all", "small", "medium", "large"), (1, 10, 100))
PROTOCOLS = {
    "bbox": Protocol("bbox", *_OBJECTS),
    "segm": Protocol("segm", *_OBJECTS),
    "keypoints": Protocol("keypoints", _KEYPOINT_METRICS, ("all", "medium", "large"), (20,)),
}


def protocol_of(kind: str) -> Protocol:
    """The parameters for "bbox", "segm" or "keypoints".

    Raises:
        UserError: for any other kind.
    """
    if kind not in PROTOCOLS:
        raise UserError(f"kind of evaluation {kind!r}", f"one of {', '.join(KINDS)}", "choose one of these")
    return PROTOCOLS[kind]


@dataclass(frozen=True, eq=False)
class Scores:
    """COCO's precision and recall, -1 where a class has no objects to find; T, R, A as in `Protocol`, K classes.

    The last axis M is the number of detections of one image and class that count.
    """

    protocol: Protocol
    precision: np.ndarray  # [T, R, K, A, M] float64
    recall: np.ndarray  # [T, K, A, M] float64, the highest that is reached
    scores: np.ndarray  # [T, R, K, A, M] float64, of the detections at which the recalls are reached

    def metrics(self) -> dict[str, float]:
        """The metrics over all classes, as pycocotools' `summarize` computes them."""
        return {name: self._metric(name) for name in self.protocol.metrics}

    def of_class(self, index: int) -> dict[str, float]:
        """The metrics of one class, by its index among the classes."""
        own = slice(index, index + 1)
        part = Scores(self.protocol, self.precision[:, :, own], self.recall[:, own], self.scores[:, :, own])
        return part.metrics()

    def _metric(self, name: str) -> float:
        threshold, area, most = _selection(name, self.protocol)
        values = self.precision if name.startswith("AP") else self.recall
        values = values[threshold]
        measured = values[..., area, most]
        measured = measured[measured > -1]
        return float(np.mean(measured)) if measured.size else -1.0


def _selection(name: str, protocol: Protocol) -> tuple[slice, int, int]:
    """Thresholds, area range and number of detections of a metric such as AP50, AP_small or AR_10."""
    suffix = name[2:].lstrip("_")
    threshold, area, most = slice(None), 0, len(protocol.most_detections) - 1
    if suffix in protocol.area_names:
        area = protocol.area_names.index(suffix)
    elif name[2:].startswith("_"):
        most = protocol.most_detections.index(int(suffix))
    elif suffix:
        at = int(np.argmin(np.abs(protocol.iou_thresholds - int(suffix) / 100)))
        threshold = slice(at, at + 1)
    return threshold, area, most


def table(metrics: dict[str, dict[str, float]]) -> str:
    """Metrics of several kinds as text, a column each; `metrics` by the columns' names."""
    names: dict[str, Any] = {name: None for values in metrics.values() for name in values}
    lines = [f"{'':10}" + "".join(f"{kind:>10}" for kind in metrics)]
    for name in names:
        cells = (f"{values[name]:10.4f}" if name in values else f"{'':10}" for values in metrics.values())
        lines.append(f"{name:10}" + "".join(cells))
    return "\n".join(lines)

"""Parameters and metrics of COCO's evaluation of boxes, masks and keypoints."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from maskrcnn.errors import UserError
from maskrcnn.keypoints import COCO_SIGMAS

KINDS = ("bbox", "segm", "keypoints")
KIND_NAMES = {"bbox": "box", "segm": "mask", "keypoints": "keypoint"}  # in tables and JSON

# The metrics in pycocotools' order; values are in [0, 1], or -1 without objects.
_AP = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large")
METRICS = (*_AP, "AR_1", "AR_10", "AR_100", "AR_small", "AR_medium", "AR_large")
_KEYPOINT_METRICS = ("AP", "AP50", "AP75", "AP_medium", "AP_large", "AR", "AR50", "AR75", "AR_medium", "AR_large")
SIGMAS = np.array(COCO_SIGMAS)  # default: the 17 keypoints of a person
_AREAS_PX = {"all": (0, 1e5**2), "small": (0, 32**2), "medium": (32**2, 96**2), "large": (96**2, 1e5**2)}


@dataclass(frozen=True, eq=False)
class Protocol:
    """The parameters of COCO's evaluation, with pycocotools' values."""

    kind: str  # of KINDS
    metrics: tuple[str, ...]
    area_names: tuple[str, ...]
    max_detections: tuple[int, ...]  # per image and class, ascending

    def remark(self) -> str:
        """A line about limits that differ from COCO's, or an empty text."""
        usual = PROTOCOLS[self.kind].max_detections
        if self.max_detections == usual:
            return ""
        return (
            f"{KIND_NAMES[self.kind]} metrics are not COCO's: up to {self.max_detections[-1]} detections per image and "
            f"class instead of {usual[-1]}"
        )

    @cached_property
    def iou_thresholds(self) -> np.ndarray:
        """`[T]`: 0.5, 0.55, … 0.95; thresholds of object keypoint similarity (OKS) for keypoints."""
        return np.linspace(0.5, 0.95, 10)

    @cached_property
    def recall_thresholds(self) -> np.ndarray:
        """`[R]`: 0, 0.01, … 1."""
        return np.linspace(0.0, 1.0, 101)

    @cached_property
    def areas_px(self) -> np.ndarray:
        """`[A, 2]` minimum and maximum area of each range, both included."""
        return np.array([_AREAS_PX[name] for name in self.area_names], np.float64)


COCO_MAX_DETECTIONS = (1, 10, 100)
_OBJECTS = (METRICS, ("all", "small", "medium", "large"), COCO_MAX_DETECTIONS)
PROTOCOLS = {
    "bbox": Protocol("bbox", *_OBJECTS),
    "segm": Protocol("segm", *_OBJECTS),
    "keypoints": Protocol("keypoints", _KEYPOINT_METRICS, ("all", "medium", "large"), (20,)),
}


def protocol_of(kind: str, max_detections: Sequence[int] = ()) -> Protocol:
    """The parameters of a kind: "bbox", "segm" or "keypoints".

    Args:
        kind: one of `KINDS`.
        max_detections: limits of detections per image and class, ascending (default: COCO's). Recall (AR) is measured
            at each limit, other metrics at the last; keypoints use only the last.

    Raises:
        UserError: for any other kind, or limits that are not positive and ascending.
    """
    if kind not in PROTOCOLS:
        raise UserError(f"kind of evaluation {kind!r}", f"one of {', '.join(KINDS)}", "choose one of these")
    protocol = PROTOCOLS[kind]
    limits = tuple(max_detections)
    if not limits or limits == COCO_MAX_DETECTIONS:
        return protocol
    if list(limits) != sorted(set(limits)) or limits[0] < 1:
        found = f"limits of detections {', '.join(map(str, limits))}"
        raise UserError(found, "positive numbers, each larger than the one before", "use, for example, 1,10,500")
    if kind == "keypoints":
        return replace(protocol, max_detections=limits[-1:])
    recalls = tuple(f"AR_{limit}" for limit in limits)
    return replace(protocol, metrics=(*_AP, *recalls, *METRICS[-3:]), max_detections=limits)


@dataclass(frozen=True, eq=False)
class Scores:
    """COCO's precision and recall of the classes with objects; -1 for area ranges without objects.

    Axes: T, R, A as in `Protocol`; C classes with objects; M `max_detections`.
    """

    protocol: Protocol
    categories: int  # K, with and without objects
    classes: np.ndarray  # [C] int64, ascending indices in the K categories
    precision: np.ndarray  # [T, R, C, A, M] float64
    recall: np.ndarray  # [T, C, A, M] float64, maximum recall
    scores: np.ndarray  # [T, R, C, A, M] float64, detection score at each recall

    def of_all_classes(self, name: str) -> np.ndarray:
        """Returns `precision`, `recall` or `scores` of all K categories as in pycocotools, -1 without objects."""
        values = getattr(self, name)
        axis = values.ndim - 3
        shape = (*values.shape[:axis], self.categories, *values.shape[axis + 1 :])
        found = np.full(shape, -1.0)
        np.moveaxis(found, axis, 0)[self.classes] = np.moveaxis(values, axis, 0)
        return found

    def metrics(self) -> dict[str, float]:
        """Metrics over all classes by name, as pycocotools' `summarize` computes them."""
        return {name: self._metric(name) for name in self.protocol.metrics}

    def of_class(self, index: int) -> dict[str, float]:
        """Metrics of the category of this index; -1 without objects."""
        own = slice(*np.searchsorted(self.classes, (index, index + 1)))
        parts = self.precision[:, :, own], self.recall[:, own], self.scores[:, :, own]
        return Scores(self.protocol, self.categories, self.classes[own], *parts).metrics()

    def _metric(self, name: str) -> float:
        threshold, area, limit = _selection(name, self.protocol)
        values = self.precision if name.startswith("AP") else self.recall
        values = values[threshold]
        measured = values[..., area, limit]
        measured = measured[measured > -1]
        return float(np.mean(measured)) if measured.size else -1.0


def _selection(name: str, protocol: Protocol) -> tuple[slice, int, int]:
    """Indices of thresholds, area range and `max_detections` of a metric such as AP50, AP_small or AR_10."""
    suffix = name[2:].lstrip("_")
    threshold, area, limit = slice(None), 0, len(protocol.max_detections) - 1
    if suffix in protocol.area_names:
        area = protocol.area_names.index(suffix)
    elif name[2:].startswith("_"):
        limit = protocol.max_detections.index(int(suffix))
    elif suffix:
        at = int(np.argmin(np.abs(protocol.iou_thresholds - int(suffix) / 100)))
        threshold = slice(at, at + 1)
    return threshold, area, limit


def table(metrics: dict[str, dict[str, float]]) -> str:
    """Metrics by column name as text, one column each."""
    names = dict.fromkeys(name for values in metrics.values() for name in values)
    lines = [f"{'':10}" + "".join(f"{kind:>10}" for kind in metrics)]
    for name in names:
        cells = (f"{values[name]:10.4f}" if name in values else f"{'':10}" for values in metrics.values())
        lines.append(f"{name:10}" + "".join(cells))
    return "\n".join(lines)

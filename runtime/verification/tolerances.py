"""Tolerances of each stage for two correct models, by the lower of their precisions."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from maskrcnn.errors import UserError
from maskrcnn.metadata import ModelMetadata
from maskrcnn.runtime.verification.compare import EXACT, HALF
from maskrcnn.stages import LEVELS

PEAK = 20.0  # measured: the largest error of a correct stage is some 7 times its RMS, one wrong pixel hundreds of times


@dataclass(frozen=True)
class Limit:
    """Limit of a stage's errors: dense stages have one per image, row stages one per row."""

    tolerance: float
    share: float = 0.0  # share of a row stage's errors that may be larger


@dataclass(frozen=True, kw_only=True)
class StageTolerances:
    """Limits of all stages, and of the pairing of rows."""

    name: str
    limits: dict[str, Limit]  # by stage, see `stage_kind`
    agreement: float  # maximum shift between two boxes whose rows are compared, relative to their size
    min_iou: float  # for pairs of proposals and of detections
    score: float  # score margin within which a partner may be missing, see `compare.at_edge`

    def limit(self, stage: str) -> Limit:
        """The limit of a stage of `maskrcnn.stages`, or of `images`."""
        return self.limits[stage_kind(stage)]


def stage_kind(stage: str) -> str:
    """The name of a stage without its level: `levels` for P2 … P6, `objectness` for `objectness_P2`."""
    name, _, level = stage.rpartition("_")
    return "levels" if stage in LEVELS else name if level in LEVELS else stage


# By stage: the limits in single precision, in half precision and with 8-bit integers; in a pair, the second number is
# the share of a row stage's errors that may be larger.
_LIMITS: dict[str, tuple[float | tuple[float, float], ...]] = {
    "images": (1e-6, 1e-6, 1e-6),
    "normalised": (1e-5, 5e-3, 2e-2),
    "levels": (2e-4, 0.1, 0.3),
    "objectness": (5e-4, 0.15, 0.4),
    "anchor_deltas": (5e-4, 0.15, 0.4),
    "proposals": ((1e-3, 0.01), (0.1, 0.25), (0.2, 0.45)),
    "box_features": ((1e-3, 0.005), (0.1, 0.05), (0.2, 0.1)),
    "class_logits": ((2e-3, 0.005), (0.15, 0.05), (0.4, 0.1)),
    "box_deltas": ((2e-3, 0.005), (0.15, 0.05), (0.3, 0.1)),
    "boxes": ((2e-3, 0.01), (0.1, 0.1), (0.2, 0.25)),
    "scores": ((5e-3, 0.01), (HALF.score, 0.05), (0.2, 0.1)),
    "labels": ((0.0, 0.01), (0.0, 0.1), (0.0, 0.2)),
    "mask_features": ((1e-3, 0.01), (0.1, 0.05), (0.2, 0.1)),
    "mask_logits": ((2e-3, 0.01), (0.15, 0.05), (0.3, 0.1)),
    "masks": ((2e-3, 0.01), (0.1, 0.05), (0.2, 0.1)),
    "keypoint_features": ((1e-3, 0.01), (0.1, 0.05), (0.2, 0.1)),
    "keypoint_logits": ((2e-3, 0.01), (0.15, 0.05), (0.4, 0.1)),
    "keypoints": ((2e-3, 0.05), (0.1, 0.2), (0.2, 0.3)),
}


def _limits(column: int) -> dict[str, Limit]:
    cells = {stage: row[column] for stage, row in _LIMITS.items()}
    return {stage: Limit(*cell) if isinstance(cell, tuple) else Limit(cell) for stage, cell in cells.items()}


# Measured with ONNX Runtime and OpenVINO against PyTorch, on a detector trained on drawn shapes and on random weights
# of both versions: 1.3e-5 at most in every stage. Deeper models amplify rounding, and a proposal or detection may
# change where two scores tie.
EXACT_STAGES = StageTolerances(
    name="exact", limits=_limits(0), agreement=5e-4, min_iou=EXACT.min_iou, score=EXACT.score
)
# Measured in bfloat16: 0.0016 normalised, 0.036 levels, 0.062 of the RPN, 0.034 box features, 0.065 box head outputs,
# 0.037 mask stages; 2 % of the trained detector's proposals had no partner, 13 % of a random one's. FP16 graphs: a
# tenth.
HALF_STAGES = StageTolerances(name="half", limits=_limits(1), agreement=4e-3, min_iou=HALF.min_iou, score=HALF.score)
# Measured with 8-bit integers: 0.2 levels, 0.25 of the RPN, 0.12 box features, 0.2 box head outputs, 0.13 mask stages;
# 9 % of the trained detector's proposals had no partner, 29 % of a random one's.
INT8_STAGES = StageTolerances(name="int8", limits=_limits(2), agreement=1e-2, min_iou=0.5, score=0.2)
_BY_NAME = {tolerances.name: tolerances for tolerances in (EXACT_STAGES, HALF_STAGES, INT8_STAGES)}


def tolerances_named(name: str) -> StageTolerances:
    """Returns the tolerances named "exact", "half" or "int8".

    Raises:
        UserError: for another name.
    """
    if name not in _BY_NAME:
        raise UserError(f"tolerance {name!r}", " or ".join(_BY_NAME), "choose one of these")
    return _BY_NAME[name]


def tolerances_for(models: Iterable[tuple[ModelMetadata, str]]) -> StageTolerances:
    """The tolerances for the lowest precision of the models.

    Args:
        models: metadata of each model, and the precision that its backend reports.
    """
    kinds = set()
    for metadata, precision in models:
        stamped = (metadata.stamp.get("weights"), metadata.stamp.get("execution"))
        for kind in (precision, metadata.precision, *stamped):
            kinds |= {part for part in str(kind or "").lower().split(", ") if part not in ("", "simulated")}
    if kinds <= {"fp32", "fp64"}:
        return EXACT_STAGES
    return HALF_STAGES if kinds <= {"fp32", "fp64", "tf32", "fp16", "bf16"} else INT8_STAGES

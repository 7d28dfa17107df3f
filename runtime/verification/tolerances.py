"""How far each stage of two sound models may lie apart, by the coarsest arithmetic of the two."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from maskrcnn.errors import UserError
from maskrcnn.metadata import ModelMetadata
from maskrcnn.runtime.verification.compare import EXACT, HALF
from maskrcnn.stages import LEVELS

PEAK = 20.0  # largest errors of sound stages were some 7 times their RMS; one wrong pixel is hundreds of times


@dataclass(frozen=True)
class Limit:
    """What a stage's figures may be: dense stages have one for each image, row stages one for each row."""

    tolerance: float
    share: float = 0.0  # of a row stage's figures, which may be larger


@dataclass(frozen=True, kw_only=True)
class StageTolerances:
    """Limits of all stages, and what counts as the same row."""

    name: str
    limits: dict[str, Limit]  # by stage; what exists for each level has one entry
    agreement: float  # what hangs on boxes is compared where they differ by at most this, relative to their size
    min_iou: float  # of proposals and detections that belong together
    score: float  # a detection this near to the edge of being reported may lack a partner

    def limit(self, stage: str) -> Limit:
        """The limit of a stage of `maskrcnn.stages`, or of `images`."""
        name, _, level = stage.rpartition("_")
        return self.limits["levels" if stage in LEVELS else name if level in LEVELS else stage]


def _limits(**values: float | tuple[float, float]) -> dict[str, Limit]:
    return {name: Limit(*value) if isinstance(value, tuple) else Limit(value) for name, value in values.items()}


# Measured on a detector trained on drawn shapes and on random ones of both versions, with ONNX Runtime and OpenVINO
# against PyTorch. Single precision needed 1.3e-5 at most, in every stage. Deeper models amplify rounding; and a
# proposal or detection may change where two scores tie.
EXACT_STAGES = StageTolerances(
    name="exact",
    limits=_limits(
        images=1e-6,
        normalised=1e-5,
        levels=2e-4,
        objectness=5e-4,
        anchor_deltas=5e-4,
        proposals=(1e-3, 0.01),
        box_features=(1e-3, 0.005),
        class_logits=(2e-3, 0.005),
        box_deltas=(2e-3, 0.005),
        boxes=(2e-3, 0.01),
        scores=(5e-3, 0.01),
        labels=(0.0, 0.01),
        mask_features=(1e-3, 0.01),
        mask_logits=(2e-3, 0.01),
        masks=(2e-3, 0.01),
        keypoint_features=(1e-3, 0.01),
        keypoint_logits=(2e-3, 0.01),
        keypoints=(2e-3, 0.05),
    ),
    agreement=5e-4,
    min_iou=EXACT.min_iou,
    score=EXACT.score,
)
# bfloat16 needed: 0.0016 normalised, 0.036 levels, 0.062 of the RPN, 0.034 box features, 0.065 the box head's results,
# 0.037 the masks' stages; 2 % of the trained detector's proposals had no partner, 13 % of a random one's. FP16 graphs
# needed a tenth of it.
HALF_STAGES = StageTolerances(
    name="half",
    limits=_limits(
        images=1e-6,
        normalised=5e-3,
        levels=0.1,
        objectness=0.15,
        anchor_deltas=0.15,
        proposals=(0.1, 0.25),
        box_features=(0.1, 0.05),
        class_logits=(0.15, 0.05),
        box_deltas=(0.15, 0.05),
        boxes=(0.1, 0.1),
        scores=(HALF.score, 0.05),
        labels=(0.0, 0.1),
        mask_features=(0.1, 0.05),
        mask_logits=(0.15, 0.05),
        masks=(0.1, 0.05),
        keypoint_features=(0.1, 0.05),
        keypoint_logits=(0.15, 0.05),
        keypoints=(0.1, 0.2),
    ),
    agreement=4e-3,
    min_iou=HALF.min_iou,
    score=HALF.score,
)
# 8-bit integers needed: 0.2 levels, 0.25 of the RPN, 0.12 box features, 0.2 the box head's results, 0.13 the masks'
# stages; 9 % of the trained detector's proposals had no partner, 29 % of a random one's.
INT8_STAGES = StageTolerances(
    name="int8",
    limits=_limits(
        images=1e-6,
        normalised=2e-2,
        levels=0.3,
        objectness=0.4,
        anchor_deltas=0.4,
        proposals=(0.2, 0.45),
        box_features=(0.2, 0.1),
        class_logits=(0.4, 0.1),
        box_deltas=(0.3, 0.1),
        boxes=(0.2, 0.25),
        scores=(0.2, 0.1),
        labels=(0.0, 0.2),
        mask_features=(0.2, 0.1),
        mask_logits=(0.3, 0.1),
        masks=(0.2, 0.1),
        keypoint_features=(0.2, 0.1),
        keypoint_logits=(0.4, 0.1),
        keypoints=(0.2, 0.3),
    ),
    agreement=1e-2,
    min_iou=0.5,
    score=0.2,
)
CLASSES = {tolerances.name: tolerances for tolerances in (EXACT_STAGES, HALF_STAGES, INT8_STAGES)}


def tolerances_named(name: str) -> StageTolerances:
    """The tolerances "exact", "half" or "int8".

    Raises:
        UserError: for another name.
    """
    if name not in CLASSES:
        raise UserError(f"tolerance {name!r}", " or ".join(CLASSES), "choose one of these")
    return CLASSES[name]


def tolerances_for(models: Iterable[tuple[ModelMetadata, str]]) -> StageTolerances:
    """The tolerances that the coarsest of the models needs.

    Args:
        models: metadata of each, and the precision of its arithmetic as its backend says it.
    """
    kinds = set()
    for metadata, precision in models:
        stamped = (metadata.stamp.get("weights"), metadata.stamp.get("execution"))
        for kind in (precision, metadata.precision, *stamped):
            kinds |= {part for part in str(kind or "").lower().split(", ") if part not in ("", "simulated")}
    if kinds <= {"fp32", "fp64"}:
        return EXACT_STAGES
    return HALF_STAGES if kinds <= {"fp32", "fp64", "tf32", "fp16", "bf16"} else INT8_STAGES

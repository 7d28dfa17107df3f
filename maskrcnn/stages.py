"""Names of the intermediate tensors of the detector, in order.

The PyTorch model records them under these names, and exported graphs use the same names for their values, so that two
models can be compared stage by stage. Shapes as in docs/contracts.md: R proposals, L rows with masks or keypoints.
"""

from __future__ import annotations

from typing import Any

LEVELS = ("P2", "P3", "P4", "P5", "P6")

STAGES = (
    "normalised",  # [N, 3, H, W]
    *LEVELS,  # [N, C, H_l, W_l]
    *(f"objectness_{level}" for level in LEVELS),  # [N, A_l] logits
    *(f"anchor_deltas_{level}" for level in LEVELS),  # [N, A_l, 4]
    "proposals",  # [N, R, 4] xyxy px
    "box_features",  # [N, R, C, 7, 7]
    "class_logits",  # [N, R, 1 + classes]
    "box_deltas",  # [N, R, 1 + classes, 4]
    "num_detections",
    "boxes",
    "scores",
    "labels",
    "mask_features",  # [N, L, C, 14, 14]
    "mask_logits",  # [N, L, 28, 28] of the detection's own class
    "masks",
    "keypoint_features",  # [N, L, C, 14, 14]
    "keypoint_logits",  # [N, L, K, 56, 56]
    "keypoints",
)

OF_MASKS = ("mask_features", "mask_logits", "masks")  # absent without a mask head
OF_KEYPOINTS = ("keypoint_features", "keypoint_logits", "keypoints")  # absent without a keypoint head


def record(stages: dict[str, Any] | None, **tensors: Any) -> None:
    """Add tensors to `stages`, if it is a dict."""
    if stages is not None:
        stages.update(tensors)

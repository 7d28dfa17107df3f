"""Names of the tensors on the way from images to detections, in their order.

PyTorch's model records them under these names, and an exported graph's values carry them, so two models can be
compared stage by stage. Shapes as in docs/architecture.md; R proposals, L rows that have a mask or keypoints computed.
"""

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

OF_MASKS = ("mask_features", "mask_logits", "masks")  # models without masks lack these
OF_KEYPOINTS = ("keypoint_features", "keypoint_logits", "keypoints")  # models without keypoints lack these


def record(stages: dict | None, **tensors) -> None:
    """Puts tensors into `stages`; without a dict they are not kept alive."""
    if stages is not None:
        stages.update(tensors)

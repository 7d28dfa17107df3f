"""Keypoint names, skeletons, mirrored counterparts and OKS sigmas."""

from __future__ import annotations

from maskrcnn.errors import UserError

# Keypoints, skeleton (numbered from 1) and OKS sigmas of COCO's category `person` (cocodataset.org/#keypoints-eval).
COCO_NAMES = (
    "nose",
    "left_eye",
    "right_eye",
    "left_ear",
    "right_ear",
    "left_shoulder",
    "right_shoulder",
    "left_elbow",
    "right_elbow",
    "left_wrist",
    "right_wrist",
    "left_hip",
    "right_hip",
    "left_knee",
    "right_knee",
    "left_ankle",
    "right_ankle",
)
COCO_SKELETON = (
    (16, 14),
    (14, 12),
    (17, 15),
    (15, 13),
    (12, 13),
    (6, 12),
    (7, 13),
    (6, 7),
    (6, 8),
    (7, 9),
    (8, 10),
    (9, 11),
    (2, 3),
    (1, 2),
    (1, 3),
    (2, 4),
    (3, 5),
    (4, 6),
    (5, 7),
)
COCO_SIGMAS = tuple(
    tenths / 10
    for tenths in (0.26, 0.25, 0.25, 0.35, 0.35, 0.79, 0.79, 0.72, 0.72, 0.62, 0.62, 1.07, 1.07, 0.87, 0.87, 0.89, 0.89)
)
USUAL_SIGMA = 0.05  # sigma of other keypoints; COCO's range from 0.025 (eyes) to 0.107 (hips)

_SIDES = {"left": "right", "right": "left", "l": "r", "r": "l"}


def sigmas_of(names: tuple[str, ...]) -> tuple[float, ...]:
    """OKS sigma of each keypoint: COCO's for COCO's names, otherwise `USUAL_SIGMA`."""
    return COCO_SIGMAS if tuple(names) == COCO_NAMES else (USUAL_SIGMA,) * len(names)


def mirrored(names: tuple[str, ...]) -> tuple[int, ...]:
    """Index of each keypoint's mirrored counterpart, its own index if it has none.

    Counterparts are names that differ in one part, separated by `_`, `-`, `.` or spaces: left and right, or l and r,
    ignoring case. Examples: left_eye and right_eye, Paw-L and Paw-R.
    """
    keys = {_parts(name): index for index, name in enumerate(names)}
    swapped = (tuple(_SIDES.get(part, part) for part in _parts(name)) for name in names)
    return tuple(keys.get(key, index) for index, key in enumerate(swapped))


def _parts(name: str) -> tuple[str, ...]:
    for separator in "-. ":
        name = name.replace(separator, "_")
    return tuple(name.lower().split("_"))


def check_skeleton(where: str, skeleton: tuple[tuple[int, ...], ...], count: int) -> None:
    """Check that each line joins two of the `count` keypoints, numbered from 1.

    Raises:
        UserError: if one does not.
    """
    for line in skeleton:
        if len(line) != 2 or not all(1 <= number <= count for number in line):
            raise UserError(
                f"{where} with a line {list(line)}",
                f"pairs of keypoint numbers from 1 to {count}",
                "number keypoints from 1, as a COCO category's `skeleton` does",
            )

"""The detector's outputs as detections in the original images, and as COCO results. Needs NumPy only.

Masks come as 28×28 probabilities in the frame of their box; `pasting` makes pixels or run lengths of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from maskrcnn.errors import UserError
from maskrcnn.imaging.paste import paste_mask, pasted_runs
from maskrcnn.imaging.run_lengths import strings_from_runs

# Masks [D, S, S], boxes [D, 4] xyxy px, (height, width) of the image and a threshold, to bool [D, height, width].
Paste = Callable[[np.ndarray, np.ndarray, tuple[int, int], float], np.ndarray]


@dataclass(frozen=True, eq=False)
class Detections:
    """What was found in one image, in pixels of the original image, by descending score."""

    boxes_xyxy_px: np.ndarray  # [D, 4] float32
    scores: np.ndarray  # [D] float32, 0–1
    labels: np.ndarray  # [D] int64, 1 … number of classes
    masks: np.ndarray | None  # [D, 28, 28] float32 probabilities in the box frame; None: without a mask head
    size_hw: tuple[int, int]  # of the original image
    paste: Paste | None = field(default=None, repr=False)  # instead of the CPU's, where a GPU is at hand
    # [D, K, 3] float32: x, y in the frame of the boxes (pixel j covers [j, j + 1]), and a score, the heat map's logit;
    # None: without a keypoint head.
    keypoints: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.scores)

    @property
    def has_masks(self) -> bool:
        """Whether the model that found them has a mask head."""
        return self.masks is not None

    @property
    def has_keypoints(self) -> bool:
        """Whether the model that found them has a keypoint head."""
        return self.keypoints is not None

    def above(self, score: float) -> Detections:
        """Only the detections of at least this score."""
        keep = self.scores >= score
        masks, keypoints = (None if rows is None else rows[keep] for rows in (self.masks, self.keypoints))
        kept = {"boxes_xyxy_px": self.boxes_xyxy_px[keep], "scores": self.scores[keep], "labels": self.labels[keep]}
        return replace(self, masks=masks, keypoints=keypoints, **kept)

    def full_masks(self, threshold: float = 0.5) -> np.ndarray:
        """Masks in the whole image, `[D, H, W]` bool: where the probability exceeds `threshold`.

        Raises:
            UserError: for a model without masks.
        """
        if self.paste is not None:
            return self.paste(self._own_masks(), self.boxes_xyxy_px, self.size_hw, threshold)
        full = np.zeros((len(self), *self.size_hw), bool)
        for slot, mask, box in zip(full, self._own_masks(), self.boxes_xyxy_px, strict=True):
            window, y0, x0 = paste_mask(mask, box, self.size_hw)
            height, width = window.shape
            slot[y0 : y0 + height, x0 : x0 + width] = window > threshold
        return full

    def rles(self, threshold: float = 0.5) -> list[dict[str, Any]]:
        """The same masks as COCO's compressed run lengths, without an image of any of them.

        Args:
            threshold: 0 or more.

        Returns:
            `{"size": [H, W], "counts": str}` for each detection.

        Raises:
            UserError: for a model without masks.
        """
        runs = pasted_runs(self._own_masks(), self.boxes_xyxy_px, self.size_hw, threshold)
        return [{"size": list(self.size_hw), "counts": counts} for counts in strings_from_runs(runs)]

    def _own_masks(self) -> np.ndarray:
        if self.masks is None:
            raise UserError(
                "detections without masks",
                "the outputs of a model with a mask head",
                "use a Mask R-CNN, or ask for boxes only",
            )
        return self.masks


def unpack(
    outputs: Mapping[str, np.ndarray],
    image_sizes: np.ndarray,
    original_sizes: Sequence[tuple[int, int]],
    *,
    paste: Paste | None = None,
) -> list[Detections]:
    """The detections of each image of a batch, without the padding rows and in pixels of the original images.

    Args:
        outputs: `num_detections` `[N]`, `boxes` `[N, D, 4]` xyxy in pixels of the resized images, `scores`
            and `labels` `[N, D]`, and where the model has them `masks` `[N, D, 28, 28]` and `keypoints`
            `[N, D, K, 3]`: x, y in pixels of the resized images, and a score.
        image_sizes: `[N, 2]` (height, width) of the resized images before padding.
        original_sizes: (height, width) of each original image.
        paste: what the detections paste their masks with; by default the CPU.

    Raises:
        UserError: when outputs and sizes are of different numbers of images.
    """
    numbers = {name: len(value) for name, value in outputs.items()}
    numbers |= {"image_sizes": len(image_sizes), "original_sizes": len(original_sizes)}
    if len(set(numbers.values())) > 1:
        raise UserError(
            "a batch of " + ", ".join(f"{number} {name}" for name, number in numbers.items()),
            "one entry for each image in every array",
            "pass the sizes of the same images that the detector was given",
        )
    unpacked = []
    for index, (height, width) in enumerate(original_sizes):
        kept = slice(int(outputs["num_detections"][index]))
        ratio_y, ratio_x = np.float32([height, width]) / np.asarray(image_sizes[index], np.float32)
        masks, keypoints = outputs.get("masks"), outputs.get("keypoints")
        unpacked.append(
            Detections(
                boxes_xyxy_px=np.asarray(outputs["boxes"][index][kept], np.float32)
                * np.float32([ratio_x, ratio_y, ratio_x, ratio_y]),
                scores=np.asarray(outputs["scores"][index][kept], np.float32),
                labels=np.asarray(outputs["labels"][index][kept], np.int64),
                masks=None if masks is None else np.asarray(masks[index][kept], np.float32),
                size_hw=(int(height), int(width)),
                paste=paste,
                keypoints=None
                if keypoints is None
                else np.asarray(keypoints[index][kept], np.float32) * np.float32([ratio_x, ratio_y, 1]),
            )
        )
    return unpacked


def coco_results(
    detections: Detections, image_id: int, category_ids: Sequence[int], *, with_masks: bool
) -> list[dict[str, Any]]:
    """The detections of one image in COCO's results format, one dictionary each.

    Where the model has a keypoint head, `keypoints` are x, y, 1 for each, as COCO's server takes them, and
    `keypoint_scores` what tells good from bad ones. The numbers are those of `Detections.keypoints`: nothing is
    shifted by half a pixel, as nothing is when annotations are read for training. What a model learnt is thus in
    the annotations' own frame, torchvision's way; COCO's similarity compares the two sets of numbers.

    Args:
        detections: in pixels of the original image.
        image_id: the dataset's id of the image.
        category_ids: the dataset's ids of labels 1, 2, ….
        with_masks: add `segmentation` to `bbox`.

    Raises:
        UserError: for a label that has no category, and for masks wanted of a model without them.
    """
    unknown = sorted({int(label) for label in detections.labels} - set(range(1, len(category_ids) + 1)))
    if unknown:
        raise UserError(
            f"detections of label(s) {', '.join(map(str, unknown))}",
            f"labels from 1 to {len(category_ids)}, the number of categories",
            "use the categories of the dataset that the model was trained on",
        )
    boxes = detections.boxes_xyxy_px.astype(np.float64)
    results = [
        {
            "image_id": int(image_id),
            "category_id": int(category_ids[int(label) - 1]),
            "bbox": [x0, y0, x1 - x0, y1 - y0],
            "score": float(score),
        }
        for (x0, y0, x1, y1), score, label in zip(boxes.tolist(), detections.scores, detections.labels, strict=True)
    ]
    if with_masks:
        for result, rle in zip(results, detections.rles(), strict=True):
            result["segmentation"] = rle
    if detections.keypoints is not None:
        for result, points in zip(results, detections.keypoints.astype(np.float64), strict=True):
            result["keypoints"] = [number for x, y, _ in points.tolist() for number in (x, y, 1)]
            result["keypoint_scores"] = points[:, 2].tolist()
    return results

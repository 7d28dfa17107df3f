"""Postprocessing: detections in the original images, and COCO results, in NumPy.

Masks are 28×28 probabilities in the frame of their box; `paste` converts them to pixels or run lengths.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from maskrcnn.errors import UserError, require_memory
from maskrcnn.imaging.paste import paste_mask, pasted_runs
from maskrcnn.imaging.run_lengths import Runs, strings_from_runs

_TILES_THRESHOLD = 0.5  # mask threshold of objects joined from tiles

# Masks [D, S, S], boxes [D, 4] xyxy px, (height, width) of the image and a threshold, to bool [D, height, width].
Paste = Callable[[np.ndarray, np.ndarray, tuple[int, int], float], np.ndarray]


@dataclass(frozen=True, eq=False)
class Detections:
    """Detections of one image, in pixels of the original image, by descending score."""

    boxes_xyxy_px: np.ndarray  # [D, 4] float32
    scores: np.ndarray  # [D] float32, 0–1
    labels: np.ndarray  # [D] int64, 1 … number of classes
    masks: np.ndarray | None  # [D, 28, 28] float32 probabilities in the box frame; None: without a mask head
    size_hw: tuple[int, int]  # size of the original image
    paste: Paste | None = field(default=None, repr=False)  # pastes masks on a GPU; None: on the CPU
    # [D, K, 3] float32: x, y in the frame of the boxes (pixel j covers [j, j + 1]), and the score, a logit of the heat
    # map; None: without a keypoint head.
    keypoints: np.ndarray | None = None
    class_names: tuple[str, ...] = field(default=(), repr=False)  # names of labels 1, 2, …; () if unknown
    category_ids: tuple[int, ...] = field(default=(), repr=False)  # dataset ids of labels 1, 2, …; () if unknown
    keypoint_skeleton: tuple[tuple[int, int], ...] = field(default=(), repr=False)  # pairs counted from 1
    name: str = ""  # name of the image: file, URL, or `video.mp4#12`; "" if unknown
    image: np.ndarray | None = field(default=None, repr=False)  # pixels [H, W, C] of the image, if kept
    # For objects joined from tiles, which have no `masks`: run lengths in the whole image at a threshold of 0.5.
    mask_runs: Runs | None = field(default=None, repr=False)

    def __len__(self) -> int:
        return len(self.scores)

    @property
    def has_masks(self) -> bool:
        """Whether the model has a mask head."""
        return self.masks is not None or self.mask_runs is not None

    @property
    def has_keypoints(self) -> bool:
        """Whether the model has a keypoint head."""
        return self.keypoints is not None

    def above(self, score: float) -> Detections:
        """Returns the detections with at least this score."""
        keep = self.scores >= score
        return replace(
            self,
            boxes_xyxy_px=self.boxes_xyxy_px[keep],
            scores=self.scores[keep],
            labels=self.labels[keep],
            masks=None if self.masks is None else self.masks[keep],
            keypoints=None if self.keypoints is None else self.keypoints[keep],
            mask_runs=None if self.mask_runs is None else self.mask_runs.chosen(keep),
        )

    def full_masks(self, threshold: float = 0.5) -> np.ndarray:
        """Returns masks in the whole image, bool `[D, H, W]`: set where the probability exceeds `threshold`.

        Raises:
            UserError: for a model without masks; for masks of a large scene that do not fit into memory.
        """
        if self.mask_runs is not None:
            height, width = self.size_hw
            what = f"{len(self)} masks of {width}×{height} px"
            require_memory(len(self) * float(height) * width, what, "use `rles` or `polygons`, which need no pixels")
            flat = np.zeros((len(self), width * height), bool)
            for pixels, spans in zip(flat, self.runs(threshold).spans(), strict=True):
                for start, stop in spans.tolist():
                    pixels[start:stop] = True
            return flat.reshape(-1, width, height).swapaxes(1, 2)
        if self.paste is not None:
            return self.paste(self.require_masks(), self.boxes_xyxy_px, self.size_hw, threshold)
        full = np.zeros((len(self), *self.size_hw), bool)
        for slot, mask, box in zip(full, self.require_masks(), self.boxes_xyxy_px, strict=True):
            window, y0, x0 = paste_mask(mask, box, self.size_hw)
            height, width = window.shape
            slot[y0 : y0 + height, x0 : x0 + width] = window > threshold
        return full

    def rles(self, threshold: float = 0.5) -> list[dict[str, Any]]:
        """Returns the masks of `full_masks` as COCO's compressed run lengths, without computing their pixels.

        Args:
            threshold: 0 or more.

        Returns:
            `{"size": [H, W], "counts": str}` per detection.

        Raises:
            UserError: for a model without masks.
        """
        return [{"size": list(self.size_hw), "counts": counts} for counts in strings_from_runs(self.runs(threshold))]

    def runs(self, threshold: float = 0.5) -> Runs:
        """Returns the same masks as run lengths; see `rles`."""
        if self.mask_runs is None:
            return pasted_runs(self.require_masks(), self.boxes_xyxy_px, self.size_hw, threshold)
        if threshold != _TILES_THRESHOLD:
            expected = f"{_TILES_THRESHOLD}, at which tiles are joined: probabilities are not kept"
            raise UserError(
                f"a mask threshold of {threshold:g} for objects joined from tiles", expected, "omit the threshold"
            )
        return self.mask_runs

    @property
    def names(self) -> list[str]:
        """The class name of each detection; "" if the class names are unknown."""
        return [self.class_names[label - 1] if self.class_names else "" for label in self.labels.tolist()]

    def polygons(self, threshold: float = 0.5) -> list[list[np.ndarray]]:
        """Outlines of the masks, see `maskrcnn.imaging.results.polygons`."""
        from maskrcnn.imaging.results import polygons

        return polygons(self, threshold)

    def to_coco(self, image_id: int = 0) -> list[dict[str, Any]]:
        """COCO results, see `coco_results`; without known category ids, labels are the category ids."""
        ids = self.category_ids or tuple(range(1, int(self.labels.max(initial=0)) + 1))
        return coco_results(self, image_id, ids, with_masks=self.has_masks)

    def to_dataframe(self) -> Any:
        """A pandas DataFrame, see `maskrcnn.imaging.results.to_dataframe`."""
        from maskrcnn.imaging.results import to_dataframe

        return to_dataframe(self)

    def to_supervision(self) -> Any:
        """A `supervision.Detections`, see `maskrcnn.imaging.results.to_supervision`."""
        from maskrcnn.imaging.results import to_supervision

        return to_supervision(self)

    def draw(self, image: np.ndarray | None = None, *, min_score: float = 0.5) -> Any:
        """The image (uint8 `[H, W, 3]` RGB) with boxes, class names, masks and keypoints, as a `PIL.Image.Image`.

        Args:
            image: the image of these detections (default: the one kept with them).
            min_score: minimum score of drawn detections.

        Raises:
            UserError: without an image.
        """
        from maskrcnn.imaging.draw import overlay

        image = self.image if image is None else image
        if image is None:
            raise UserError("detections without their image", "an image to draw on", "pass it: draw(image)")
        names = self.class_names or tuple(str(label) for label in range(1, int(self.labels.max(initial=0)) + 1))
        return overlay(image, self.above(min_score), names, self.keypoint_skeleton)

    def require_masks(self) -> np.ndarray:
        """`masks`; raises `UserError` for a model without a mask head."""
        if self.masks is None:
            raise UserError(
                "detections without masks",
                "the outputs of a model with a mask head",
                "use a Mask R-CNN, or request only boxes",
            )
        return self.masks


def unpack(
    outputs: Mapping[str, np.ndarray],
    image_sizes: np.ndarray,
    original_sizes: Sequence[tuple[int, int]],
    *,
    paste: Paste | None = None,
) -> list[Detections]:
    """Splits a batch's outputs into detections per image, in pixels of the original images, without padding rows.

    Args:
        outputs: `num_detections` `[N]`, `boxes` `[N, D, 4]` xyxy in pixels of the resized images, `scores` and
            `labels` `[N, D]`, and optionally `masks` `[N, D, 28, 28]` and `keypoints` `[N, D, K, 3]`: x, y in pixels of
            the resized images, and a score.
        image_sizes: `[N, 2]` (height, width) of the resized images before padding.
        original_sizes: (height, width) of each original image.
        paste: pastes masks on a GPU (default: on the CPU).

    Raises:
        UserError: if outputs and sizes differ in the number of images.
    """
    numbers = {name: len(value) for name, value in outputs.items()}
    numbers |= {"image_sizes": len(image_sizes), "original_sizes": len(original_sizes)}
    if len(set(numbers.values())) > 1:
        raise UserError(
            "a batch of " + ", ".join(f"{number} {name}" for name, number in numbers.items()),
            "one entry per image in every array",
            "pass the sizes of the images that the detector ran on",
        )
    unpacked = []
    for index, (height, width) in enumerate(original_sizes):
        kept = slice(int(outputs["num_detections"][index]))
        ratio_y, ratio_x = np.array([height, width], np.float32) / np.asarray(image_sizes[index], np.float32)
        masks, keypoints = outputs.get("masks"), outputs.get("keypoints")
        unpacked.append(
            Detections(
                boxes_xyxy_px=np.asarray(outputs["boxes"][index][kept], np.float32)
                * np.array([ratio_x, ratio_y, ratio_x, ratio_y], np.float32),
                scores=np.asarray(outputs["scores"][index][kept], np.float32),
                labels=np.asarray(outputs["labels"][index][kept], np.int64),
                masks=None if masks is None else np.asarray(masks[index][kept], np.float32),
                size_hw=(int(height), int(width)),
                paste=paste,
                keypoints=None
                if keypoints is None
                else np.asarray(keypoints[index][kept], np.float32) * np.array([ratio_x, ratio_y, 1], np.float32),
            )
        )
    return unpacked


def coco_results(
    detections: Detections, image_id: int, category_ids: Sequence[int], *, with_masks: bool
) -> list[dict[str, Any]]:
    """Converts the detections of one image to COCO's results format, one dictionary each.

    If the model has a keypoint head, `keypoints` are x, y, 1 for each, as required by COCO's evaluation server, and
    `keypoint_scores` their scores. The coordinates are those of `Detections.keypoints`: as in torchvision, they are not
    shifted by half a pixel, neither here nor when annotations are read for training, so both use the same frame.

    Args:
        detections: detections in pixels of the original image.
        image_id: dataset id of the image.
        category_ids: dataset ids of labels 1, 2, ….
        with_masks: add `segmentation` to `bbox`.

    Raises:
        UserError: for a label without category, and if masks are requested from a model without them.
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

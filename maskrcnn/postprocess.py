"""The detector's outputs as detections in the original images, and as COCO results. Needs NumPy only.

Masks come as 28×28 probabilities in the frame of their box and are pasted as torchvision's
`paste_masks_in_image` does: one pixel of zeros around the mask, the box grown in proportion and cut to whole
pixels, then linear interpolation. Only the part of a box that lies inside the image is ever computed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from maskrcnn.errors import UserError
from maskrcnn.preprocess import linear_taps

_PADDING_PX = 1  # zeros around a mask before pasting, torchvision's default


@dataclass(frozen=True, eq=False)
class Detections:
    """What was found in one image, in pixels of the original image, by descending score."""

    boxes_xyxy_px: np.ndarray  # [D, 4] float32
    scores: np.ndarray  # [D] float32, 0–1
    labels: np.ndarray  # [D] int64, 1 … number of classes
    masks: np.ndarray | None  # [D, 28, 28] float32 probabilities in the box frame; None: without a mask head
    size_hw: tuple[int, int]  # of the original image

    def __len__(self) -> int:
        return len(self.scores)

    @property
    def has_masks(self) -> bool:
        """Whether the model that found them has a mask head."""
        return self.masks is not None

    def above(self, score: float) -> Detections:
        """Only the detections of at least this score."""
        keep = self.scores >= score
        masks = None if self.masks is None else self.masks[keep]
        return Detections(self.boxes_xyxy_px[keep], self.scores[keep], self.labels[keep], masks, self.size_hw)

    def full_masks(self, threshold: float = 0.5) -> np.ndarray:
        """Masks in the whole image, `[D, H, W]` bool: where the probability exceeds `threshold`.

        Raises:
            UserError: for a model without masks.
        """
        full = np.zeros((len(self), *self.size_hw), bool)
        for slot, (window, y0, x0) in zip(full, self._windows(), strict=True):
            height, width = window.shape
            slot[y0 : y0 + height, x0 : x0 + width] = window > threshold
        return full

    def rles(self, threshold: float = 0.5) -> list[dict[str, Any]]:
        """The same masks as COCO's compressed run lengths, made from the boxes' windows alone.

        Returns:
            `{"size": [H, W], "counts": str}` for each detection.

        Raises:
            UserError: for a model without masks.
        """
        from pycocotools import mask as mask_api

        height, width = self.size_hw
        encoded = []
        for window, y0, x0 in self._windows():
            counts = _run_lengths(window > threshold, y0, x0, self.size_hw)
            rle = mask_api.frPyObjects({"size": [height, width], "counts": counts}, height, width)
            encoded.append({"size": [height, width], "counts": rle["counts"].decode("ascii")})
        return encoded

    def _windows(self) -> list[tuple[np.ndarray, int, int]]:
        if self.masks is None:
            raise UserError(
                "detections without masks",
                "the outputs of a model with a mask head",
                "use a Mask R-CNN, or ask for boxes only",
            )
        pairs = zip(self.masks, self.boxes_xyxy_px, strict=True)
        return [paste_mask(mask, box, self.size_hw) for mask, box in pairs]


def unpack(
    outputs: Mapping[str, np.ndarray],
    image_sizes: np.ndarray,
    original_sizes: Sequence[tuple[int, int]],
) -> list[Detections]:
    """The detections of each image of a batch, without the padding rows and in pixels of the original images.

    Args:
        outputs: `num_detections` `[N]`, `boxes` `[N, D, 4]` xyxy in pixels of the resized images, `scores`
            and `labels` `[N, D]`, and `masks` `[N, D, 28, 28]` where the model has them.
        image_sizes: `[N, 2]` (height, width) of the resized images before padding.
        original_sizes: (height, width) of each original image.

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
        masks = outputs.get("masks")
        unpacked.append(
            Detections(
                boxes_xyxy_px=np.asarray(outputs["boxes"][index][kept], np.float32)
                * np.float32([ratio_x, ratio_y, ratio_x, ratio_y]),
                scores=np.asarray(outputs["scores"][index][kept], np.float32),
                labels=np.asarray(outputs["labels"][index][kept], np.int64),
                masks=None if masks is None else np.asarray(masks[index][kept], np.float32),
                size_hw=(int(height), int(width)),
            )
        )
    return unpacked


def paste_mask(mask: np.ndarray, box_xyxy_px: np.ndarray, size_hw: tuple[int, int]) -> tuple[np.ndarray, int, int]:
    """The part of a pasted mask that lies inside the image.

    Args:
        mask: `[M, M]` float32 probabilities in the frame of the box.
        box_xyxy_px: `[4]` in pixels of the image; may lie partly or wholly outside it.
        size_hw: height and width of the image.

    Returns:
        The probabilities `[h, w]` float32 and the row and column of their first pixel in the image; outside
        this window they are zero. A box that does not touch the image gives `[0, 0]`, row 0, column 0.
    """
    x0, y0, x1, y1 = _grown_box(box_xyxy_px, mask.shape[-1])
    left, right = max(x0, 0), min(x1 + 1, size_hw[1])
    top, bottom = max(y0, 0), min(y1 + 1, size_hw[0])
    if left >= right or top >= bottom:
        return np.zeros((0, 0), np.float32), 0, 0
    padded = np.pad(np.asarray(mask, np.float32), _PADDING_PX)
    rows = _resizing_matrix(len(padded), y1 - y0 + 1, top - y0, bottom - y0)
    columns = _resizing_matrix(len(padded), x1 - x0 + 1, left - x0, right - x0)
    return rows @ padded @ columns.T, top, left


def coco_results(
    detections: Detections, image_id: int, category_ids: Sequence[int], *, with_masks: bool
) -> list[dict[str, Any]]:
    """The detections of one image in COCO's results format, one dictionary each.

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
    return results


def _grown_box(box_xyxy_px: np.ndarray, mask_size: int) -> tuple[int, int, int, int]:
    """The box of the padded mask in whole pixels, both ends included, in torchvision's float32 arithmetic."""
    corners = np.asarray(box_xyxy_px, np.float32).reshape(2, 2)
    scale = np.float32((mask_size + 2 * _PADDING_PX) / mask_size)
    half = (corners[1] - corners[0]) * np.float32(0.5) * scale
    centre = (corners[1] + corners[0]) * np.float32(0.5)
    # Conversion to integers cuts towards zero, so boxes beyond the upper or left border move inwards by up to
    # a pixel, in torchvision as here.
    (x0, y0), (x1, y1) = (centre - half).astype(np.int64).tolist(), (centre + half).astype(np.int64).tolist()
    return x0, y0, x1, y1


def _resizing_matrix(size_in: int, size_out: int, start: int, stop: int) -> np.ndarray:
    """`[stop - start, size_in]` float32: rows `start` to `stop` of linear resizing to `size_out` pixels."""
    low, high, weight = linear_taps(size_in, size_out, start, stop)
    rows = np.arange(stop - start)
    matrix = np.zeros((stop - start, size_in), np.float32)
    matrix[rows, low] = 1 - weight
    matrix[rows, high] += weight  # at the border both taps are the same pixel
    return matrix


def _run_lengths(window: np.ndarray, y0: int, x0: int, size_hw: tuple[int, int]) -> list[int]:
    """COCO's run lengths of an image that is `window` at (y0, x0) and False elsewhere.

    Runs go down the columns, from left to right, alternating from a (maybe empty) run of False.
    """
    image_height, image_width = size_hw
    height, width = window.shape
    columns = np.zeros((width, height + 1), bool)  # a False ends each column, so that edges come in pairs
    columns[:, :height] = window.T
    line = np.concatenate(([False], columns.ravel()))
    edges = np.flatnonzero(line[1:] != line[:-1])
    column, row = np.divmod(edges, height + 1)
    positions = (x0 + column) * image_height + y0 + row
    # A run that ends at the bottom and goes on at the top of the next column is one run.
    joined = np.flatnonzero(positions[1:] == positions[:-1])
    positions = np.delete(positions, np.concatenate([joined, joined + 1]))
    counts = np.diff(np.concatenate(([0], positions, [image_height * image_width])))
    return counts.tolist() if counts[-1] else counts[:-1].tolist()

"""Pictures of what the model is trained on, as it sees it."""

from __future__ import annotations

import numpy as np
import torch

from maskrcnn.config import ModelConfig
from maskrcnn.data.loader import Batch
from maskrcnn.draw import overlay
from maskrcnn.model.mask_targets import mask_targets
from maskrcnn.postprocess import Detections
from maskrcnn.training.logbook import Picture

_LABELLED = 1.0  # least visibility of a keypoint that is drawn


def pictures_of_samples(batch: Batch, model: ModelConfig, count: int) -> list[Picture]:
    """The first `count` images of a batch after augmentation, with each object as the losses get it."""
    owner = torch.arange(batch.boxes.shape[1]).expand(batch.boxes.shape[:2])
    # Padding has boxes without area; any box will do for it.
    rois = torch.where(batch.valid[..., None], batch.boxes, torch.arange(4) // 2)
    masks = mask_targets(batch.masks, batch.mask_frames, rois, owner, batch.image_sizes, 28, aligned=True)
    pictures = []
    for n in range(min(count, len(batch.images))):
        valid = batch.valid[n]
        height, width = batch.image_sizes[n].tolist()
        objects = Detections(
            boxes_xyxy_px=batch.boxes[n, valid].numpy(),
            scores=np.ones(int(valid.sum()), np.float32),
            labels=batch.labels[n, valid].numpy(),
            masks=masks[n, valid].numpy(),
            size_hw=(height, width),
            keypoints=batch.keypoints[n, valid].numpy() if model.has_keypoints else None,
        )
        pixels = batch.images[n, :, :height, :width].permute(1, 2, 0).round().clamp(0, 255).to(torch.uint8)
        picture = overlay(
            np.ascontiguousarray(pixels.numpy()),
            objects,
            model.class_names,
            model.keypoint_skeleton,
            point_score=_LABELLED,
        )
        pictures.append((f"sample-{n}", np.asarray(picture)))
    return pictures

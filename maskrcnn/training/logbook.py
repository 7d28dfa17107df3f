"""Records of a run in addition to its checkpoints: metrics per epoch, TensorBoard events, images."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from maskrcnn import runs
from maskrcnn.config import ModelConfig
from maskrcnn.files import atomic_path, check_target, make_folder
from maskrcnn.imaging.draw import overlay, save_drawing
from maskrcnn.imaging.postprocess import Detections
from maskrcnn.model.targets import mask_targets
from maskrcnn.training.loader import Batch

NamedImage = tuple[str, np.ndarray]  # name and pixels, uint8 [H, W, 3] RGB


class Logbook:
    """Writes `log.jsonl`, `pictures/*.png` and, if enabled and installed, TensorBoard events.

    `log.jsonl` has a line for each epoch, and one with the key `step` for every `log_every`-th optimizer step; events
    are written for every step. An epoch's records have the number of its last step.

    Args:
        run: folder of the run.
        tensorboard: write events to `tensorboard/` in this folder.
        log_every: steps between step lines; 0: none.
        first_step: step at which training continues; lines and events from this step on, which will be repeated, are
            discarded.
        first_epoch: epoch, from 1, that ends next; likewise.

    Raises:
        UserError: if the log cannot be written.
    """

    def __init__(self, run: Path, *, tensorboard: bool, log_every: int, first_step: int, first_epoch: int) -> None:
        self.run, self.log_every = run, log_every
        self.events: Any = None
        log = run / runs.LOG
        check_target(log)
        make_folder(run)
        if log.exists():
            lines = log.read_text(encoding="utf-8").splitlines(keepends=True)
            kept = [line for line in lines if _is_before(line, first_step, first_epoch)]
            if kept != lines:
                with atomic_path(log) as temporary:
                    temporary.write_text("".join(kept), encoding="utf-8")
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                return  # log.jsonl has the same metrics
            self.events = SummaryWriter(str(run / runs.EVENTS), purge_step=first_step)

    def step(self, step: int, epoch: int, metrics: dict[str, float]) -> None:
        """Record the metrics of an optimizer step; steps count from 0, epochs from 1."""
        if self.log_every and (step + 1) % self.log_every == 0:
            finite = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
            self._write({"step": step, "epoch": epoch, **finite})
        if self.events is not None:
            for name, value in metrics.items():
                self.events.add_scalar(f"train/{name}", value, step)

    def epoch(self, step: int, metrics: dict[str, Any]) -> None:
        """Record the metrics of an epoch that ended with this step."""
        self._write(metrics)
        if self.events is not None:
            for name, value in metrics.items():
                self.events.add_scalar(f"epoch/{name}", value, step)
            self.events.flush()

    def _write(self, line: dict[str, Any]) -> None:
        with open(self.run / runs.LOG, "a", encoding="utf-8") as log:
            log.write(json.dumps(line) + "\n")

    def images(self, step: int, images: Iterable[NamedImage]) -> None:
        """Write images under their names, replacing earlier ones."""
        folder = self.run / runs.PICTURES
        make_folder(folder)
        for name, pixels in images:
            save_drawing(Image.fromarray(pixels), folder / f"{name}.png")
            if self.events is not None:
                self.events.add_image(name, pixels, step, dataformats="HWC")

    def close(self) -> None:
        """Close the event file."""
        if self.events is not None:
            self.events.close()


def _is_before(line: str, step: int, epoch: int) -> bool:
    """Whether a line of the log is complete and from an earlier step or, for an epoch's line, an earlier epoch."""
    try:
        found = json.loads(line)
        return bool(found["step"] < step if "step" in found else found["epoch"] < epoch)
    except (ValueError, KeyError, TypeError):
        return False


def sample_images(batch: Batch, model: ModelConfig, count: int) -> list[NamedImage]:
    """The first `count` images of a batch after augmentation, with the objects as the losses receive them."""
    owner = torch.arange(batch.boxes.shape[1]).expand(batch.boxes.shape[:2])
    # Padded rows have empty boxes: replace them with an arbitrary valid one.
    rois = torch.where(batch.valid[..., None], batch.boxes, torch.arange(4) // 2)
    masks = mask_targets(batch.masks, batch.mask_frames, rois, owner, batch.image_sizes, 28, aligned=True)
    images = []
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
        pixels = batch.images[n, :, :height, :width].permute(1, 2, 0).clamp(0, 255)
        image = overlay(
            np.ascontiguousarray(pixels.numpy()),
            objects,
            model.class_names,
            model.keypoint_skeleton,
            point_score=1.0,  # minimum visibility of a drawn keypoint
            with_scores=False,
        )
        images.append((f"sample-{n}", np.asarray(image)))
    return images

"""What a run writes down beside its checkpoints: figures per epoch, TensorBoard events, pictures."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from maskrcnn import runs
from maskrcnn.config import ModelConfig
from maskrcnn.files import atomic_path, make_folder
from maskrcnn.imaging.draw import overlay
from maskrcnn.imaging.postprocess import Detections
from maskrcnn.model.targets import mask_targets
from maskrcnn.training.loader import Batch

Picture = tuple[str, np.ndarray]  # a name, and pixels uint8 [H, W, 3] RGB


class Logbook:
    """Writes `log.jsonl`, `pictures/*.png` and, where wanted and installed, TensorBoard events.

    Args:
        run: the run's folder.
        tensorboard: whether to write events to `tensorboard/` in it.
        first_step: the step that training goes on with; events from there on are discarded.
    """

    def __init__(self, run: Path, *, tensorboard: bool, first_step: int) -> None:
        self.run = run
        self.events: Any = None
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                return  # log.jsonl holds the same figures
            self.events = SummaryWriter(str(run / runs.EVENTS), purge_step=first_step)

    def step(self, step: int, figures: dict[str, float]) -> None:
        """Records the figures of an optimizer step."""
        if self.events is not None:
            for name, value in figures.items():
                self.events.add_scalar(f"train/{name}", value, step)

    def epoch(self, step: int, figures: dict[str, Any]) -> None:
        """Records the figures of an epoch, which ended with this step."""
        with open(self.run / runs.LOG, "a", encoding="utf-8") as log:
            log.write(json.dumps(figures) + "\n")
        if self.events is not None:
            for name, value in figures.items():
                self.events.add_scalar(f"epoch/{name}", value, step)
            self.events.flush()

    def pictures(self, step: int, pictures: Iterable[Picture]) -> None:
        """Keeps pictures under their names; a later one of the same name replaces it."""
        folder = self.run / runs.PICTURES
        make_folder(folder)
        for name, pixels in pictures:
            with atomic_path(folder / f"{name}.png") as draft:
                Image.fromarray(pixels).save(draft, format="PNG")
            if self.events is not None:
                self.events.add_image(name, pixels, step, dataformats="HWC")

    def close(self) -> None:
        """Ends the event file."""
        if self.events is not None:
            self.events.close()


# Pictures of what the model is trained on, as it sees it.

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


# Figures of a step, read without making the device wait.

_MOST_PENDING = 8  # steps that may be under way on the device before the host waits for the oldest


class Readout:
    """Hands out the figures of earlier steps once the device has computed them.

    On a GPU a step's figures are copied to the host asynchronously, and come out some steps later. On a CPU they
    come out at once.
    """

    def __init__(self) -> None:
        self._pending: deque[tuple[Any, list[str], Tensor, torch.cuda.Event | None]] = deque()

    def push(self, tag: Any, figures: dict[str, Tensor]) -> None:
        """Takes the scalars of a step; `tag` comes back with their values."""
        values = torch.stack([value.detach().float() for value in figures.values()])
        event = None
        if values.device.type == "cuda":
            host = torch.empty(values.shape, pin_memory=True)
            host.copy_(values, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
            values = host
        self._pending.append((tag, list(figures), values, event))

    def pop(self, *, wait: bool = False) -> list[tuple[Any, dict[str, float]]]:
        """Tags and figures of the steps that are done, in order; with `wait` of all steps pushed."""
        done = []
        while self._pending:
            tag, names, values, event = self._pending[0]
            if event is not None and not event.query():
                if not wait and len(self._pending) <= _MOST_PENDING:
                    break
                event.synchronize()
            self._pending.popleft()
            done.append((tag, dict(zip(names, values.tolist(), strict=True))))
        return done

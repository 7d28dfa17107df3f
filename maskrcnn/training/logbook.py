"""What a run writes down beside its checkpoints: figures per epoch, TensorBoard events, pictures."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from maskrcnn import runs
from maskrcnn.files import atomic_path, make_folder

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

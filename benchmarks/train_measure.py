"""What is measured of a training step besides its latency: synchronisations, stages, memory, and the data's rate."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from timing import percentile
from train_workload import AS_IT_IS, Work
from trainers import OurTrainer

from maskrcnn.config import TrainConfig, to_dict
from maskrcnn.data.coco import CocoDataset
from maskrcnn.data.loader import training_loader
from maskrcnn.data.samples import TrainingSamples
from maskrcnn.errors import UserError
from maskrcnn.files import write_json
from maskrcnn.model import detector

_CHILD = Path(__file__).with_name("train_memory.py")
_CHILD_TIMEOUT_S = 1800


def wait(device: torch.device) -> None:
    """Returns when the device has done everything that it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def synchronisations(run: Callable[[], Any], device: torch.device) -> int | None:
    """How often the host waits for the GPU during a call, by PyTorch's synchronisation debug mode; None on a CPU."""
    if device.type != "cuda":
        return None
    wait(device)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing cuda operation" in str(warning.message).lower() for warning in caught)


def stages_ms(trainer: OurTrainer, work: Work, repeat: int) -> dict[str, float]:
    """Where our step's time goes: median milliseconds of each of its stages, one after another.

    The device is waited for after each stage, so on a GPU their sum exceeds the step's latency.
    """
    marks: list[tuple[str, float]] = []

    def mark(name: str) -> None:
        wait(trainer.device)
        marks.append((name, time.perf_counter()))

    rounds: dict[str, list[float]] = {}
    with _marked(trainer, mark):
        for _ in range(repeat):
            marks.clear()
            mark("start")
            trainer.run(work)
            mark("averages and statistics")
            for (_, before), (name, after) in itertools.pairwise(marks):
                rounds.setdefault(name, []).append(1000 * (after - before))
    return {name: percentile(values, 50) for name, values in rounds.items()}


@contextmanager
def _marked(trainer: OurTrainer, mark: Callable[[str], None]) -> Iterator[None]:
    """Calls `mark` at the end of each stage of the trainer's step for the time of the context."""

    def marking(function: Callable, name: str, before: str | None = None) -> Callable:
        def wrapped(*arguments: Any, **named: Any) -> Any:
            if before:
                mark(before)
            result = function(*arguments, **named)
            mark(name)
            return result

        return wrapped

    model, optimizer = trainer.model, trainer.optimizer
    patches = [
        mock.patch.object(model, "features", marking(model.features, "backbone and FPN", "transfer and layout")),
        mock.patch.object(model.rpn, "forward", marking(model.rpn.forward, "RPN head")),
        mock.patch.object(detector, "rpn_losses", marking(detector.rpn_losses, "RPN losses")),
        mock.patch.object(model.rpn, "proposals", marking(model.rpn.proposals, "proposals")),
        mock.patch.object(detector, "roi_losses", marking(detector.roi_losses, "RoI heads and losses")),
        mock.patch.object(optimizer, "step", marking(optimizer.step, "optimizer", "backward and clipping")),
    ]
    with ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        yield


def pipeline_images_per_s(config: TrainConfig, seconds: float) -> float:
    """Images per second that our data loader delivers with `config.workers`, nothing else running.

    Measured from the second batch on, over whole batches, for about so many seconds.
    """
    dataset = CocoDataset.load(config.data, config.train_split)
    samples = TrainingSamples(dataset, config.model.preprocessing, augment=AS_IT_IS, seed=config.seed)
    loader, sampler = training_loader(samples, batch_size=config.batch_size, workers=config.workers, pin_memory=False)
    images, began = 0, None
    while True:
        for batch in loader:
            if isinstance(batch, UserError):
                raise batch
            now = time.perf_counter()
            if began is None:
                began = now
                continue
            images += len(batch.image_ids)
            if now - began > seconds:
                return images / (now - began)
        sampler.epoch += 1


def peak_memory_mb(config: TrainConfig, weights: Path, trainer: str, precision: str, steps: int) -> float | str:
    """Memory that a trainer takes in a process of its own, MB, or why it is not known.

    On a GPU the most that PyTorch has allocated; on a CPU how far the process's memory rises above what it was before
    the model was made.
    """
    with tempfile.TemporaryDirectory(prefix="maskrcnn-train-memory-") as folder:
        task = Path(folder) / "task.json"
        names = {"trainer": trainer, "weights": str(weights), "precision": precision, "steps": steps}
        write_json(task, {"config": to_dict(config), **names})
        command = [sys.executable, str(_CHILD), str(task)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=_CHILD_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            return f"more than {_CHILD_TIMEOUT_S} s"
    if done.returncode:
        return (done.stderr.strip().splitlines() or ["no output"])[-1]
    answer = json.loads(done.stdout.splitlines()[-1])
    return answer["peak_mb"] if answer["peak_mb"] is not None else "this system does not tell"

"""Peak memory of one trainer, in a process of its own: run by benchmarks/train.py with the path of a JSON task."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from resident import forget_peak, resident_mb
from trainers import TRAINERS, make_work

from maskrcnn.config import TrainConfig, from_dict
from maskrcnn.training.distributed import choose_device


def peak_mb(task: dict) -> float | None:
    """Runs the steps of a task and returns the memory they took."""
    config = from_dict(TrainConfig, task["config"])
    device = choose_device(config.device)
    on_gpu = device.type == "cuda"
    work = make_work(config, task["steps"], pinned=on_gpu)
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    else:
        forget_peak()
    before = resident_mb("VmRSS")
    trainer = TRAINERS[task["trainer"]](config, Path(task["weights"]), device, task["precision"])
    for number in range(task["steps"]):
        trainer.run(work[number % len(work)])
    if on_gpu:
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) / 1e6
    after = resident_mb("VmHWM")
    return None if before is None or after is None else after - before


if __name__ == "__main__":
    content = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    print(json.dumps({"peak_mb": peak_mb(content)}))

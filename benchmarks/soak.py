"""Memory of a process over many input shapes.

    python benchmarks/soak.py MODEL [--backend NAME] [--shapes 2000] [--sides 32,512] [--options '{"threads": 1}']
    python benchmarks/soak.py --train [--shapes 500] [--sides 64,512]

runs a model on generated images whose padded height and width change with every call, and prints the resident memory
at regular intervals. Steadily growing memory indicates a cache that grows with the shapes. `--train` instead runs
optimizer steps of the default model on the CPU. One process measures one backend: run the command once per backend.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from resources import resident_mb
from session import aligned

from maskrcnn.data.shapes import shapes_image
from maskrcnn.errors import report_errors

_ROWS = 8  # in the table
_DIVISOR = 32  # padded sides are multiples of this, px


def shapes_hw(count: int, low_px: int, high_px: int, seed: int = 0) -> Iterator[tuple[int, int]]:
    """Random padded sizes: multiples of 32 px from `low_px` to `high_px`."""
    sides = np.arange(low_px, high_px + 1, _DIVISOR)
    for height, width in np.random.default_rng(seed).choice(sides, (count, 2)):
        yield int(height), int(width)


def soak(
    call: Callable[[tuple[int, int]], None], sizes: Sequence[tuple[int, int]]
) -> Iterator[tuple[int, float, float]]:
    """Calls with each size; yields the number of calls, resident MB and mean milliseconds since the last row."""
    began, done = time.perf_counter(), 0
    marks = {1, 50, *np.linspace(0, len(sizes), _ROWS + 1).astype(int)[1:].tolist()}
    for number, size in enumerate(sizes, start=1):
        call(size)
        if number in marks:
            now = time.perf_counter()
            yield number, resident_mb("VmRSS") or 0.0, 1e3 * (now - began) / (number - done)
            began, done = now, number


def _inference(path: Path, backend: str | None, options: dict[str, object]) -> Callable[[tuple[int, int]], None]:
    from maskrcnn.runtime.detector import load_backend

    model = load_backend(path, backend, **options)

    def call(size_hw: tuple[int, int]) -> None:
        image = shapes_image(np.random.default_rng(size_hw), size_hw)[0]
        images = np.ascontiguousarray(image.transpose(2, 0, 1)[None], np.float32)
        model({"images": images, "image_sizes": np.array([size_hw], np.int64)})

    return call


def _training() -> Callable[[tuple[int, int]], None]:
    import torch

    from maskrcnn.config import TrainConfig, model_config
    from maskrcnn.model.detector import MaskRCNN
    from maskrcnn.training.loader import Batch
    from maskrcnn.training.optimizer import make_optimizer
    from maskrcnn.training.step import Step
    from maskrcnn.training.view import MASK_SIDE

    model = model_config("maskrcnn_resnet18_fpn_small", class_names=("shape",), category_ids=(1,))
    config = TrainConfig(model=model)
    network = MaskRCNN(model).to(memory_format=torch.channels_last).train()
    step = Step(network, make_optimizer(network, config), config, torch.device("cpu"), "fp32")

    def call(size_hw: tuple[int, int]) -> None:
        box = torch.tensor([[[4.0, 4.0, size_hw[1] - 4.0, size_hw[0] - 4.0]]])
        batch = Batch(
            images=torch.randint(256, (1, 3, *size_hw), dtype=torch.uint8),
            image_sizes=torch.tensor([size_hw]),
            boxes=box,
            labels=torch.ones(1, 1, dtype=torch.int64),
            valid=torch.ones(1, 1, dtype=torch.bool),
            masks=torch.full((1, 1, MASK_SIDE, MASK_SIDE), 255, dtype=torch.uint8),
            mask_frames=box,
            keypoints=torch.zeros(1, 1, 0, 3),
            seeds=torch.tensor([1]),
            image_ids=[1],
        )
        step.run([batch])

    return call


def main() -> None:
    """Parses the options, runs, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", type=Path, help="model file")
    parser.add_argument("--backend", help="backend of the model (default: the file's default backend)")
    parser.add_argument("--train", action="store_true", help="run training steps instead of inference")
    parser.add_argument("--shapes", type=int, default=2000, help="number of calls (default: 2000)")
    parser.add_argument("--sides", default="32,512", help="smallest and largest padded side, px (default: 32,512)")
    parser.add_argument("--options", default="{}", help="options of the backend as JSON")
    given = parser.parse_args()
    if given.train == (given.model is not None):
        parser.error("pass a model, or --train")
    low, high = (int(side) for side in given.sides.split(","))
    with report_errors():
        call = _training() if given.train else _inference(given.model, given.backend, json.loads(given.options))
        sizes = list(shapes_hw(given.shapes, low, high))
        print(f"{len(set(sizes))} different sizes in {len(sizes)} calls")
        print(aligned(["calls", "MB   ", "ms/call"], []))
        for number, mb, ms in soak(call, sizes):
            print(f"| {number:<5} | {mb:<5.0f} | {ms:.1f} |", flush=True)


if __name__ == "__main__":
    main()

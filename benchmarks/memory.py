"""Peak memory of one contender, measured in a process of its own.

    python benchmarks/memory.py '{"path": "model.onnx", "size_hw": [800, 1088]}'

opens the file, detects on generated images, and prints one line of JSON: the most memory that the process has held, the
part of it that was there before the file was opened (Python and libraries), and on a GPU the most that the process has
held there.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from resident import resident_mb

CALLS = 2
_LIMIT_S = 600
KEYS = ("host_mb", "host_before_mb", "device_mb")


def peak_memory(spec: dict[str, Any]) -> dict[str, float | None]:
    """Megabytes by `KEYS`, from a process of its own; None for what could not be measured.

    Args:
        spec: `path`, and optionally `backend` and `options` of `Detector.load`; or `peer` ("eager" or "onnx") with the
            checkpoint as `path`; `size_hw` and `batch` of the images.
    """
    command = [sys.executable, __file__, json.dumps(spec)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_LIMIT_S)
        return json.loads(done.stdout.splitlines()[-1])
    except (subprocess.TimeoutExpired, ValueError, IndexError):
        return dict.fromkeys(KEYS)


def _measured(spec: dict[str, Any]) -> dict[str, float | None]:
    """What `peak_memory` gives, measured in this very process."""
    images = [_image(spec["size_hw"], seed) for seed in range(spec.get("batch", 1))]
    opened, before = _open(spec, images)
    for _ in range(CALLS):
        for found in opened.detect(images):
            if found.has_masks:
                found.rles()
    return {"host_mb": _peak_mb(), "host_before_mb": before, "device_mb": _device_mb()}


def _open(spec: dict[str, Any], images: list[np.ndarray]) -> tuple[Any, float]:
    """The detector, and the memory that was held before it was opened, its library imported."""
    if spec.get("peer"):
        import tempfile

        from contenders import peer_contenders

        from maskrcnn.weights.checkpoint import load_checkpoint

        before = _peak_mb()
        model = load_checkpoint(Path(spec["path"]))
        with tempfile.TemporaryDirectory() as folder:
            peers = peer_contenders(model, Path(folder), images[0])
            return next(peer for peer in peers if peer.peer == spec["peer"]).open(), before
    from maskrcnn.runtime import Detector

    _import_library(Path(spec["path"]).suffix, spec.get("backend"))
    before = _peak_mb()
    return Detector.load(spec["path"], spec.get("backend"), **spec.get("options", {})), before


def _import_library(suffix: str, backend: str | None) -> None:
    """Imports what the backend will import, so that its memory is not counted as the model's."""
    import importlib

    from maskrcnn.runtime.detector import BACKENDS

    name = backend or BACKENDS[suffix][0]
    importlib.import_module({"torch": "maskrcnn.runtime.backends.torch"}.get(name, name))


def _image(size_hw: list[int], seed: int) -> np.ndarray:
    from maskrcnn.data.shapes import shapes_image

    return shapes_image(np.random.default_rng((0, seed)), tuple(size_hw))[0]


def _peak_mb() -> float:
    """The most that this process has held. Linux's rusage would begin with what the parent held before the start."""
    if (held := resident_mb("VmHWM")) is not None:
        return held
    import resource  # which Windows does not have

    # In bytes on macOS, and elsewhere in KiB.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def _device_mb() -> float | None:
    """What the driver says that this process holds; every library's part is in it, unlike in torch's own count."""
    command = ["nvidia-smi", "--query-compute-apps=pid,used_memory", "--format=csv,noheader,nounits"]
    try:
        lines = subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.splitlines()
    except (OSError, subprocess.TimeoutExpired):
        return None
    held = [line.partition(",") for line in lines]
    mine = [float(used) * 1.048576 for pid, _, used in held if pid.strip() == str(os.getpid())]
    return sum(mine) if mine else None


if __name__ == "__main__":
    print(json.dumps(_measured(json.loads(sys.argv[1]))))

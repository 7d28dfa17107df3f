"""Mask R-CNN from training data to the fastest engine a machine can run.

    import maskrcnn

    run = maskrcnn.train("shapes", epochs=4)
    model = maskrcnn.export(run.checkpoint)
    engine = maskrcnn.build_engine(model.path)
    print(maskrcnn.evaluate(engine.path, data="runs/shapes").metrics)
    print(maskrcnn.predict("photo.jpg", model=engine.path).detections[0])

Importing this package imports nothing heavy: PyTorch, ONNX Runtime and OpenVINO are imported by the functions that use
them, so that a deployment machine needs only the one it runs.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from maskrcnn.api.build_engine import build_engine, refit_engine
    from maskrcnn.api.data import check_data, convert
    from maskrcnn.api.evaluate import evaluate
    from maskrcnn.api.inspect import inspect, lint
    from maskrcnn.api.plugins import build_plugins
    from maskrcnn.api.predict import predict
    from maskrcnn.api.serving import triton, web
    from maskrcnn.api.train import find_learning_rate, train
    from maskrcnn.api.verify import verify
    from maskrcnn.errors import UserError
    from maskrcnn.runtime.detector import Detector

__version__ = "0.2.0"

# Read by ONNX Runtime when it is imported: no telemetry unless asked for. Its thread would also keep a forked process
# from ending (observed in 1.31 on Linux).
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

# Name → module. `maskrcnn.export` is a package that can be called, see export/__init__.py.
_LAZY = {
    "train": "maskrcnn.api.train",
    "find_learning_rate": "maskrcnn.api.train",
    "export": "maskrcnn.export",
    "build_engine": "maskrcnn.api.build_engine",
    "refit_engine": "maskrcnn.api.build_engine",
    "build_plugins": "maskrcnn.api.plugins",
    "triton": "maskrcnn.api.serving",
    "web": "maskrcnn.api.serving",
    "predict": "maskrcnn.api.predict",
    "evaluate": "maskrcnn.api.evaluate",
    "verify": "maskrcnn.api.verify",
    "inspect": "maskrcnn.api.inspect",
    "lint": "maskrcnn.api.inspect",
    "convert": "maskrcnn.api.data",
    "check_data": "maskrcnn.api.data",
    "Detector": "maskrcnn.runtime.detector",
    "UserError": "maskrcnn.errors",
}

__all__ = [
    "Detector",
    "UserError",
    "build_engine",
    "build_plugins",
    "check_data",
    "convert",
    "evaluate",
    "find_learning_rate",
    "inspect",
    "lint",
    "predict",
    "refit_engine",
    "train",
    "triton",
    "verify",
    "web",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(_LAZY[name])
    return module if name == "export" else getattr(module, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})

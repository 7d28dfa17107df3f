"""Files that take long to create; created once for all processes of a test run."""

import dataclasses
import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path

import onnx
from filelock import FileLock

from maskrcnn.config import ModelConfig, from_dict, to_dict
from maskrcnn.export import exporter
from maskrcnn.model.detector import MaskRCNN

_IN_TRAINING = ("rpn_candidates_per_level_training", "proposals_training")  # without effect on an exported model


def made_once(root: Path, name: str, make: Callable[[Path], object]) -> Path:
    """Returns the folder `name` in a folder shared by all processes; the first process that needs it calls `make`."""
    path, draft = root / name, root / f"{name}.draft"
    with FileLock(root / f"{name}.lock"):
        if not path.exists():
            shutil.rmtree(draft, ignore_errors=True)
            draft.mkdir()
            make(draft)
            draft.rename(path)
    return path


def tracing_once(root: Path) -> Callable[[MaskRCNN, int], onnx.ModelProto]:
    """Returns the exporter's `_trace`, which takes half a minute, but reuses models that another process has traced."""
    trace = exporter._trace

    def traced(model: MaskRCNN, opset: int) -> onnx.ModelProto:
        config = from_dict(ModelConfig, to_dict(model.config))  # with numbers as in a checkpoint
        config = dataclasses.replace(config, **dict.fromkeys(_IN_TRAINING, 1))
        text = f"{config} {opset} {sorted(name for name, part in model.named_modules() if part.training)}"
        key = hashlib.sha256(text.encode())
        for name, value in model.state_dict().items():
            key.update(name.encode() + value.contiguous().numpy().tobytes())
        made = made_once(root, key.hexdigest(), lambda folder: onnx.save(trace(model, opset), folder / "traced.onnx"))
        return onnx.load(made / "traced.onnx")

    return traced

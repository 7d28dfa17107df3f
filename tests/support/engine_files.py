"""Files of TensorRT engines: a placeholder for the plan, and the metadata that `build-engine` writes next to it."""

import dataclasses
import json
from pathlib import Path

from maskrcnn.runtime.engine_files import read_model

STAMP = {
    "target": "tensorrt",
    "precision": "fp16",
    "gpu": "NVIDIA H100 80GB HBM3",
    "compute_capability": "9.0",
    "tensorrt": "11.4.0.106",
    "plugins": "aot",
    "plugin_hash": "0" * 64,
    "hardware_compatibility": "none",
    "version_compatible": "no",
    "command": "maskrcnn build-engine --fp16 --target tensorrt",
}
PROFILE = {"batch": [1, 4, 8], "height": [96, 96, 160], "width": [96, 128, 160]}


def write_engine(path: Path, onnx_file: Path, profiles=(PROFILE,), **stamp: str) -> Path:
    """Writes `path` and its JSON for the model of an ONNX file; `stamp` replaces fields, None removes them."""
    _, metadata = read_model(onnx_file)
    fields = {**STAMP, "profiles": json.dumps(profiles), **stamp}
    metadata = dataclasses.replace(
        metadata, precision="fp16", stamp={key: value for key, value in fields.items() if value is not None}
    )
    path.write_bytes(b"a plan")
    path.with_name(path.name + ".json").write_text(metadata.to_json())
    return path

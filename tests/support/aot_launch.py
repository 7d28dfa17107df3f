"""Arguments of ahead-of-time plugins with numbers instead of TensorRT's symbols."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np

from maskrcnn.plugins import aot, contract

POOLING = {
    **{"output_size": 7, "sampling_ratio": 2, "aligned": 0, "min_level": 2},
    **{"canonical_level": 4, "canonical_size": 224.0, "level_epsilon": float(np.float32(1e-6))},
}
NMS = {"iou_threshold": 0.5, "max_output": 20}
TYPES = {"float32": "FLOAT", "float16": "HALF", "bfloat16": "BF16", "int32": "INT32"}  # NumPy name → TensorRT name
_ARITHMETIC = SimpleNamespace(max=max, min=min, cdiv=lambda a, b: -(-a // b))


def tensor(shape: Any, dtype: str, layout: str = "LINEAR") -> SimpleNamespace:
    """Describes a tensor; `layout` is a TensorRT format name."""
    name, form = SimpleNamespace(name=TYPES[dtype]), SimpleNamespace(name=layout)
    return SimpleNamespace(shape=shape, shape_expr=shape, dtype=name, format=form)


def launch_of(op: contract.Op, tensors: list[SimpleNamespace], attributes: dict[str, Any]) -> aot.Launch:
    """The kernel of a node, its grid and integer arguments."""
    (plugin,) = [plugin for plugin in aot.PLUGINS if plugin.op is op]
    return plugin.launch(_ARITHMETIC, tensors, attributes)

"""Which kernels TensorRT will ask of our ahead-of-time plugins for a graph.

Compiling them beforehand says what is wrong in words, where TensorRT would say that a plugin failed; and without
TensorRT it proves that they compile.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import onnx

from maskrcnn.export.shapes import tensor_types
from maskrcnn.plugins import aot_kernels, contract
from maskrcnn.plugins.aot import FEATURE_FORMATS
from maskrcnn.plugins.aot_kernels import Kernel

_TYPES = {  # ONNX's, ours and TensorRT's
    onnx.TensorProto.FLOAT: ("float32", "FP32"),
    onnx.TensorProto.FLOAT16: ("float16", "FP16"),
    onnx.TensorProto.BFLOAT16: ("bfloat16", "BF16"),
}
_LAYOUTS = {"LINEAR": aot_kernels.PLANES, "HWC": aot_kernels.HWC, "HWC8": aot_kernels.HWC8}


def kernels_of(flavour: onnx.ModelProto) -> list[Kernel]:
    """Every kernel that may become part of an engine: TensorRT chooses the memory layout while it builds.

    Args:
        flavour: of `tensorrt_flavour(…, aot=True)`.

    Raises:
        UserError: for nodes that the kernels cannot be compiled for.
    """
    known, found = tensor_types(flavour.graph), []
    for node in flavour.graph.node:
        if node.domain == contract.DOMAIN:
            found += [kernel for kernel in _kernels_of_node(node, known) if kernel not in found]
    return found


def _kernels_of_node(node: onnx.NodeProto, known: dict[str, onnx.TypeProto.Tensor]) -> Iterator[Kernel]:
    attributes = _attributes(node)
    if node.op_type == contract.BATCHED_NMS_KEEP.name:
        yield aot_kernels.nms_keep(attributes)
    elif node.op_type == contract.BATCHED_NMS_COMPACT.name:
        yield aot_kernels.nms_compact(attributes)
    elif node.op_type == contract.MULTILEVEL_ROI_ALIGN.name:
        feature = known[node.input[0]]
        dtype, wanted = _TYPES[feature.elem_type]
        channels = feature.shape.dim[1].dim_value or None if len(feature.shape.dim) > 1 else None
        for name, layout in FEATURE_FORMATS:
            if name == wanted:
                levels = len(node.input) - 1
                yield aot_kernels.roi_align(
                    attributes, num_levels=levels, dtype=dtype, layout=_LAYOUTS[layout], channels=channels
                ).kernel


def _attributes(node: onnx.NodeProto) -> dict[str, Any]:
    """Those of the contract."""
    names = contract.ALL_OPS[node.op_type].attributes
    return {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute if a.name in names}

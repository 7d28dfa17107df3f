"""What the value of each tensor of a graph depends on, and whether its size depends on values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum

import onnx

from maskrcnn.export.shapes import is_static
from maskrcnn.export.tensorrt_ops import DATA_DEPENDENT, HOST_OPS, SIZE_INPUTS

_SIZED_BY_VALUES = (*DATA_DEPENDENT, "Unique", "Compress")


class Origin(IntEnum):
    """What must be known to know a tensor's value; a later member includes the earlier ones."""

    GIVEN = 0  # nothing: an initializer, or a Constant node
    COMPUTED = 1  # constants alone
    SHAPE = 2  # the shapes of the model's inputs
    SHAPE_OF_DATA = 3  # the shape of something whose size depends on values
    INPUT = 4  # an integer input of the model, through arithmetic that the host can do
    DATA = 5  # anything the GPU computes


@dataclass
class Origins:
    """The analysis of one graph. Tensors that it does not know count as data."""

    values: dict[str, Origin] = field(default_factory=dict)
    sized_by_values: set[str] = field(default_factory=set)

    def of(self, name: str) -> Origin:
        """The origin of a tensor's value; of a left-out optional input, nothing."""
        return self.values.get(name, Origin.DATA) if name else Origin.GIVEN


def origins_of(
    graph: onnx.GraphProto, known: Mapping[str, onnx.TypeProto.Tensor], outer: Origins | None = None
) -> Origins:
    """Follows values from constants and inputs through a graph, whose nodes are in order.

    Args:
        graph: the main graph, or one inside a node.
        known: types and shapes by tensor name.
        outer: the analysis of the graph around it.
    """
    found = Origins(dict(outer.values) if outer else {}, set(outer.sized_by_values) if outer else set())
    integers = (onnx.TensorProto.INT32, onnx.TensorProto.INT64)
    for value in graph.input:
        is_integer = outer is None and value.type.tensor_type.elem_type in integers
        found.values[value.name] = Origin.INPUT if is_integer else Origin.DATA
    found.values.update({tensor.name: Origin.GIVEN for tensor in graph.initializer})
    for node in graph.node:
        origin, sized = _origin(node, found, known), _is_sized_by_values(node, found)
        for name in node.output:
            found.values[name] = origin
            if sized:
                found.sized_by_values.add(name)
    return found


def _origin(node: onnx.NodeProto, found: Origins, known: Mapping[str, onnx.TypeProto.Tensor]) -> Origin:
    if node.op_type == "Constant":
        return Origin.GIVEN
    if node.op_type in ("Shape", "Size"):
        if node.input[0] in found.sized_by_values:
            return Origin.SHAPE_OF_DATA
        return Origin.COMPUTED if is_static(known.get(node.input[0])) else Origin.SHAPE
    highest = max((found.of(name) for name in node.input), default=Origin.GIVEN)
    if highest <= Origin.COMPUTED:
        return Origin.COMPUTED
    return highest if node.op_type in HOST_OPS and not node.domain else Origin.DATA


def _is_sized_by_values(node: onnx.NodeProto, found: Origins) -> bool:
    if node.op_type in _SIZED_BY_VALUES:
        return True
    if node.op_type in ("Shape", "Size"):
        return False
    deciding = [node.input[k] for k in SIZE_INPUTS.get(node.op_type, ()) if k < len(node.input)]
    by_value = any(found.of(name) >= Origin.SHAPE_OF_DATA for name in deciding)
    return by_value or any(name in found.sized_by_values for name in node.input)

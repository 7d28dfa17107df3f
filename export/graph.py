"""Reading and editing ONNX graphs: indices, constants, inferred types and shapes, metadata."""

from __future__ import annotations

from collections import Counter, defaultdict

import numpy as np
import numpy.typing as npt
import onnx
from onnx import numpy_helper, shape_inference

from maskrcnn.metadata import KEY, ModelMetadata
from maskrcnn.plugins import contract


class Graph:
    """Indices of the main graph of a model by tensor name.

    Args:
        proto: the model; the editing methods change it in place.
    """

    def __init__(self, proto: onnx.ModelProto) -> None:
        self.graph = proto.graph
        self.constants = {tensor.name: tensor for tensor in self.graph.initializer}
        self.producers = {name: node for node in self.graph.node for name in node.output if name}
        self.consumers: dict[str, list[onnx.NodeProto]] = defaultdict(list)
        for node in self.graph.node:
            for name in dict.fromkeys(node.input):
                self.consumers[name].append(node)
        self.outputs = {value.name for value in self.graph.output}
        recorded = (*self.graph.value_info, *self.graph.output)
        self._types = {value.name: value.type.tensor_type.elem_type for value in recorded}

    def constant(self, name: str) -> np.ndarray | None:
        """Returns the value of an initializer, or None for any other tensor."""
        return self.value(name) if name in self.constants else None

    def value(self, name: str) -> np.ndarray:
        """Returns the value of an initializer."""
        return numpy_helper.to_array(self.constants[name])

    def makes_floats(self, node: onnx.NodeProto) -> bool:
        """Returns whether the graph records FLOAT as the type of a node's first output."""
        return self._types.get(node.output[0]) == onnx.TensorProto.FLOAT

    def only_consumer(self, name: str) -> onnx.NodeProto | None:
        """Returns the only node that reads a tensor; None if there are several, or if it is a graph output."""
        readers = self.consumers.get(name, [])
        return readers[0] if len(readers) == 1 and name not in self.outputs else None

    def add_constant(self, name: str, value: npt.ArrayLike) -> str:
        """Adds an initializer under an unused name, and returns the name."""
        tensor = numpy_helper.from_array(np.asarray(value), name)
        self.graph.initializer.append(tensor)
        self.constants[name] = self.graph.initializer[-1]
        return name

    def replace_constant(self, name: str, value: npt.ArrayLike) -> None:
        """Replaces the value and type of an initializer."""
        self.constants[name].CopyFrom(numpy_helper.from_array(np.asarray(value), name))

    def float_type(self, name: str) -> bool:
        """Returns whether the tensor is an initializer of type FLOAT."""
        return name in self.constants and self.constants[name].data_type == onnx.TensorProto.FLOAT


def copy_of(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Returns a deep copy of a model."""
    copied = onnx.ModelProto()
    copied.CopyFrom(proto)
    return copied


def sort_nodes(graph: onnx.GraphProto) -> None:
    """Sorts the nodes topologically, in place.

    Raises:
        ValueError: if the graph has a cycle or reads a tensor that nothing produces.
    """
    available = {value.name for value in (*graph.input, *graph.initializer)} | {""}
    waiting = list(graph.node)
    ordered: list[onnx.NodeProto] = []
    while waiting:
        later = []
        for node in waiting:
            if all(name in available for name in node.input):
                ordered.append(node)
                available.update(node.output)
            else:
                later.append(node)
        if len(later) == len(waiting):
            raise ValueError(
                f"found: a cycle or a tensor without a producer, at node {later[0].name}; expected: a directed "
                "acyclic graph"
            )
        waiting = later
    del graph.node[:]
    graph.node.extend(ordered)


def remove_unused_constants(graph: onnx.GraphProto) -> None:
    """Removes initializers that no node reads."""
    used = {name for node in graph.node for name in node.input} | {value.name for value in graph.output}
    kept = [tensor for tensor in graph.initializer if tensor.name in used]
    del graph.initializer[:]
    graph.initializer.extend(kept)


def op_counts(proto: onnx.ModelProto) -> Counter[str]:
    """Counts the nodes of the main graph by operator; custom ops are named `domain::Op`."""
    return Counter(f"{node.domain}::{node.op_type}" if node.domain else node.op_type for node in proto.graph.node)


def set_metadata(proto: onnx.ModelProto, metadata: ModelMetadata) -> None:
    """Replaces the model's metadata."""
    onnx.helper.set_model_props(proto, {KEY: metadata.to_json()})


# Shape letters of the contract that no input has, with the attribute that sets each (for a list: its first element).
_LENGTHS_BY_ATTRIBUTE = (("S", "output_size"), ("S", "pooled_shape"), ("M", "max_output"))


def with_shapes(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Returns a copy with inferred types and shapes, including the outputs of the custom ops.

    Without the functions ONNX cannot infer the custom ops' shapes; they are taken from the contract.
    """
    inferred = shape_inference.infer_shapes(proto, data_prop=True)
    graph = inferred.graph
    while _describe_plugin_outputs(graph, by_shape=True) or _describe_plugin_outputs(graph, by_shape=False):
        inferred = shape_inference.infer_shapes(inferred, data_prop=True)
        graph = inferred.graph
    return inferred


def tensor_types(graph: onnx.GraphProto) -> dict[str, onnx.TypeProto.Tensor]:
    """Returns type and shape of every tensor for which the graph records them, including initializers."""
    known = {v.name: v.type.tensor_type for v in (*graph.input, *graph.value_info, *graph.output)}
    for tensor in graph.initializer:
        known[tensor.name] = onnx.helper.make_tensor_type_proto(tensor.data_type, list(tensor.dims)).tensor_type
    return known


def is_static(kind: onnx.TypeProto.Tensor | None) -> bool:
    """Returns whether every dimension of a shape is a number."""
    return kind is not None and kind.HasField("shape") and all(d.HasField("dim_value") for d in kind.shape.dim)


def constants_of(graph: onnx.GraphProto) -> dict[str, onnx.TensorProto | onnx.AttributeProto]:
    """Returns every initializer and the value of every `Constant` node, by tensor name."""
    constants: dict[str, onnx.TensorProto | onnx.AttributeProto] = {t.name: t for t in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant" and node.attribute:
            attribute = node.attribute[0]
            constants[node.output[0]] = attribute.t if attribute.name == "value" else attribute
    return constants


def constant_value(constant: onnx.TensorProto | onnx.AttributeProto) -> np.ndarray:
    """Returns a value of `constants_of` as an array."""
    if isinstance(constant, onnx.TensorProto):
        return numpy_helper.to_array(constant)
    return np.asarray(onnx.helper.get_attribute_value(constant))


def _describe_plugin_outputs(graph: onnx.GraphProto, *, by_shape: bool) -> bool:
    """Records types and shapes of the custom ops' outputs; returns whether there were any to record.

    Args:
        graph: changed in place.
        by_shape: skip nodes whose input shapes are unknown; otherwise known types suffice.
    """
    known, new = tensor_types(graph), False
    outputs = {value.name: value for value in graph.output}
    for node in graph.node:
        op = contract.ALL_OPS.get(node.op_type) if node.domain == contract.DOMAIN else None
        if op is None or not all(name in known for name in node.input):
            continue
        if by_shape and not all(known[name].HasField("shape") for name in node.input):
            continue
        lengths = _lengths(op, node, known)
        for name, tensor in zip(node.output, op.outputs, strict=False):
            if name not in known or not known[name].HasField("shape"):
                kind = known[node.input[0]].elem_type
                if tensor.dtype != "float":  # "float" stands for the features' own type
                    kind = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(tensor.dtype))
                shape = [lengths.get(letter) if isinstance(letter, str) else letter for letter in tensor.shape]
                described = onnx.helper.make_tensor_value_info(name, kind, shape)
                (outputs[name] if name in outputs else graph.value_info.add()).CopyFrom(described)
                new = True
    return new


def _lengths(op: contract.Op, node: onnx.NodeProto, known: dict[str, onnx.TypeProto.Tensor]) -> dict[str, str | int]:
    """The value of each letter in the op's shapes at this node: a number or a symbol of the graph."""
    variadic = len(node.input) - len(op.inputs) + 1
    inputs = [tensor for tensor in op.inputs for _ in range(variadic if tensor.variadic else 1)]
    attributes = {a.name: a.ints[0] if a.ints else a.i for a in node.attribute}
    found: dict[str, str | int] = {}
    for tensor, name in zip(inputs, node.input, strict=False):
        for letter, dim in zip(tensor.shape, known[name].shape.dim, strict=False):
            if isinstance(letter, str) and (dim.dim_value or (dim.dim_param and letter not in found)):
                found[letter] = dim.dim_value or dim.dim_param  # prefer a number to a symbol
    return found | {k: attributes[v] for k, v in _LENGTHS_BY_ATTRIBUTE if v in attributes}

"""Reading and editing ONNX graphs: what every pass needs."""

from __future__ import annotations

from collections import Counter, defaultdict

import numpy as np
import onnx
from onnx import numpy_helper

from maskrcnn.metadata import KEY, ModelMetadata


class Graph:
    """Indices over the main graph of a model; edits go to the model itself.

    Args:
        proto: the model, which is changed in place. Nodes must be in topological order, as ONNX demands.
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
        """The value of an initializer, or None for anything else."""
        return numpy_helper.to_array(self.constants[name]) if name in self.constants else None

    def makes_floats(self, node: onnx.NodeProto) -> bool:
        """Whether a node's first result is in single precision, by the types that the graph records."""
        return self._types.get(node.output[0]) == onnx.TensorProto.FLOAT

    def only_consumer(self, name: str) -> onnx.NodeProto | None:
        """The one node that reads a value which is no output of the graph, or None."""
        readers = self.consumers.get(name, [])
        return readers[0] if len(readers) == 1 and name not in self.outputs else None

    def add_constant(self, name: str, value: np.ndarray) -> str:
        """Adds an initializer; one of the same name must not exist."""
        tensor = numpy_helper.from_array(np.asarray(value), name)
        self.graph.initializer.append(tensor)
        self.constants[name] = self.graph.initializer[-1]
        return name

    def replace_constant(self, name: str, value: np.ndarray) -> None:
        """Gives an initializer another value, and type."""
        self.constants[name].CopyFrom(numpy_helper.from_array(np.asarray(value), name))

    def float_type(self, name: str) -> bool:
        """Whether an initializer holds single-precision numbers."""
        return name in self.constants and self.constants[name].data_type == onnx.TensorProto.FLOAT


def copy_of(proto: onnx.ModelProto) -> onnx.ModelProto:
    """A model that can be changed without changing this one."""
    copied = onnx.ModelProto()
    copied.CopyFrom(proto)
    return copied


def sort_nodes(graph: onnx.GraphProto) -> None:
    """Puts nodes into an order in which every value is made before it is read."""
    made = {value.name for value in (*graph.input, *graph.initializer)} | {""}
    waiting = list(graph.node)
    ordered: list[onnx.NodeProto] = []
    while waiting:
        later = []
        for node in waiting:
            if all(name in made for name in node.input):
                ordered.append(node)
                made.update(node.output)
            else:
                later.append(node)
        if len(later) == len(waiting):
            raise ValueError(
                f"came: a graph with a cycle or a value nobody makes, at {later[0].name}; expected: neither"
            )
        waiting = later
    del graph.node[:]
    graph.node.extend(ordered)


def remove_unused_constants(graph: onnx.GraphProto) -> None:
    """Drops initializers that nothing reads."""
    used = {name for node in graph.node for name in node.input} | {value.name for value in graph.output}
    kept = [tensor for tensor in graph.initializer if tensor.name in used]
    del graph.initializer[:]
    graph.initializer.extend(kept)


def op_counts(proto: onnx.ModelProto) -> Counter[str]:
    """How often each operator occurs in the main graph; custom ops are named `domain::Op`."""
    return Counter(f"{node.domain}::{node.op_type}" if node.domain else node.op_type for node in proto.graph.node)


def set_metadata(proto: onnx.ModelProto, metadata: ModelMetadata) -> None:
    """Replaces the model's metadata."""
    onnx.helper.set_model_props(proto, {KEY: metadata.to_json()})

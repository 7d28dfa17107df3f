"""What is done to a graph as the exporter leaves it: norms folded, names readable, traces of the export removed."""

from __future__ import annotations

import numpy as np
import onnx

from maskrcnn.export.graph import Graph, remove_unused_constants

_WEIGHTED_OPS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_PREFIX = "model."  # of the wrapper that is exported


def tidy(proto: onnx.ModelProto) -> None:
    """Folds frozen norms, drops the exporter's notes, and names nodes and weights after the model's modules.

    The notes hold stack traces with the paths of the machine that exported, and are a hundredth of the file.
    """
    _drop_notes(proto.graph)
    _drop_prefix(proto.graph)
    fold_norms(proto)
    _name_nodes(proto.graph)


def _drop_notes(graph: onnx.GraphProto) -> None:
    for holder in (graph, *graph.node, *graph.value_info, *graph.initializer, *graph.input, *graph.output):
        if holder.metadata_props:
            del holder.metadata_props[:]
        holder.doc_string = ""


def _drop_prefix(graph: onnx.GraphProto) -> None:
    """Weights get the names that they have in a checkpoint, where no node has given its result such a name."""
    made = {name for node in graph.node for name in node.output}  # as "mean" by an average
    names = {tensor.name: _checkpoint_name(tensor.name) for tensor in graph.initializer}
    names = {old: new for old, new in names.items() if new not in made}
    for tensor in graph.initializer:
        tensor.name = names.get(tensor.name, tensor.name)
    for node in graph.node:
        for k, name in enumerate(node.input):
            node.input[k] = names.get(name, name)


def _checkpoint_name(name: str) -> str:
    return name.removeprefix(_PREFIX).replace(".weight_bias", ".bias")  # of a norm that the exporter folded


def _name_nodes(graph: onnx.GraphProto) -> None:
    """A node with a weight gets the module's name; the head that sees every level, numbered from the second on."""
    weights, seen = {tensor.name for tensor in graph.initializer}, {}
    biased = {node.input[0]: node.input[1] for node in graph.node if node.op_type == "Add"}
    for node in graph.node:
        if node.op_type in _WEIGHTED_OPS and len(node.input) > 1 and node.input[1] in weights:
            module = node.input[1].removesuffix(".weight")
            if node.op_type == "MatMul":  # its weight has been transposed, and lost the name; the bias has not
                module = biased.get(node.output[0], module).removesuffix(".bias")
            seen[module] = seen.get(module, 0) + 1
            node.name = module if seen[module] == 1 else f"{module}#{seen[module]}"


def fold_norms(proto: onnx.ModelProto) -> int:
    """Multiplies a frozen norm, `Mul` and `Add` with constants of each channel, into the convolution before it.

    Returns:
        how many were folded.
    """
    graph, gone = Graph(proto), []
    for node in list(proto.graph.node):
        if node.op_type != "Conv" or graph.constant(node.input[1]) is None:
            continue
        scaled = _reader(graph, node.output[0], "Mul")
        shifted = _reader(graph, scaled[0].output[0], "Add") if scaled else None
        if not shifted or len(graph.consumers[node.input[1]]) > 1:
            continue
        weight = graph.constant(node.input[1])
        scale, shift = (value.reshape(-1) for value in (scaled[1], shifted[1]))
        bias = graph.constant(node.input[2]) if len(node.input) > 2 else np.zeros(len(weight), weight.dtype)
        name = node.input[1].removesuffix(".weight")
        folded = graph.add_constant(f"{name}.folded.weight", weight * scale[:, None, None, None])
        graph.add_constant(f"{name}.folded.bias", bias * scale + shift)
        output = shifted[0].output[0]
        node.input[:] = [node.input[0], folded, f"{name}.folded.bias"]
        node.output[0] = output
        gone += [scaled[0], shifted[0]]
    for node in gone:
        proto.graph.node.remove(node)
    remove_unused_constants(proto.graph)
    for tensor in proto.graph.initializer:
        tensor.name = tensor.name.replace(".folded.", ".")
    for node in proto.graph.node:
        for k, name in enumerate(node.input):
            node.input[k] = name.replace(".folded.", ".")
    return len(gone) // 2


def _reader(graph: Graph, name: str, op_type: str) -> tuple[onnx.NodeProto, np.ndarray] | None:
    """The only reader of a value, if it is of this type, and its constant, if that has one value per channel."""
    node = graph.only_consumer(name)
    if node is None or node.op_type != op_type:
        return None
    constants = [
        value for value in (graph.constant(other) for other in node.input if other != name) if value is not None
    ]
    if len(constants) != 1 or constants[0].ndim not in (3, 4) or constants[0].shape[-2:] != (1, 1):
        return None
    return node, constants[0]

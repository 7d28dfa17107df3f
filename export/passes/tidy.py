"""Cleanup of a freshly traced graph: fold frozen norms, name nodes and weights, remove the exporter's annotations."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx

from maskrcnn.export.graph import Graph, remove_unused_constants

_WEIGHTED_OPS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_PREFIX = "model."  # attribute of the wrapper module that is traced


def tidy(proto: onnx.ModelProto) -> None:
    """Folds frozen norms, names nodes and weights after the model's modules, and removes annotations, in place.

    The annotations contain stack traces with local paths and are about 1 % of the file.
    """
    _drop_annotations(proto.graph)
    _name_weights(proto.graph)
    _fold_norms(proto)
    _name_nodes(proto.graph)


def _drop_annotations(graph: onnx.GraphProto) -> None:
    for holder in (graph, *graph.node, *graph.value_info, *graph.initializer, *graph.input, *graph.output):
        if holder.metadata_props:
            del holder.metadata_props[:]
        holder.doc_string = ""


def _name_weights(graph: onnx.GraphProto) -> None:
    """Gives weights their checkpoint names, unless a node's output already has that name."""
    outputs = {name for node in graph.node for name in node.output}  # e.g. "mean", from an average
    names = {tensor.name: _checkpoint_name(tensor.name) for tensor in graph.initializer}
    _rename_constants(graph, {old: new for old, new in names.items() if new not in outputs})


def _rename_constants(graph: onnx.GraphProto, names: dict[str, str]) -> None:
    for tensor in graph.initializer:
        tensor.name = names.get(tensor.name, tensor.name)
    for node in graph.node:
        for k, name in enumerate(node.input):
            node.input[k] = names.get(name, name)


def _checkpoint_name(name: str) -> str:
    return name.removeprefix(_PREFIX).replace(".weight_bias", ".bias")  # suffix of norms that the exporter folded


def _name_nodes(graph: onnx.GraphProto) -> None:
    """Names nodes with a weight after its module; nodes of a repeated module (RPN head) get #k from the second on."""
    weights = {tensor.name for tensor in graph.initializer}
    counts: Counter[str] = Counter()
    biased = {node.input[0]: node.input[1] for node in graph.node if node.op_type == "Add"}
    for node in graph.node:
        if node.op_type in _WEIGHTED_OPS and len(node.input) > 1 and node.input[1] in weights:
            module = node.input[1].removesuffix(".weight")
            if node.op_type == "MatMul":  # its transposed weight has lost the module's name, but the bias still has it
                module = biased.get(node.output[0], module).removesuffix(".bias")
            counts[module] += 1
            node.name = module if counts[module] == 1 else f"{module}#{counts[module]}"


def _fold_norms(proto: onnx.ModelProto) -> None:
    """Folds frozen norms, `Mul` and `Add` with per-channel constants, into the preceding convolution."""
    graph = Graph(proto)
    names: dict[str, str] = {}
    folded_nodes: list[onnx.NodeProto] = []
    for node in list(proto.graph.node):
        if node.op_type != "Conv" or graph.constant(node.input[1]) is None:
            continue
        scaled = _reader(graph, node.output[0], "Mul")
        shifted = _reader(graph, scaled[0].output[0], "Add") if scaled else None
        if not scaled or not shifted or len(graph.consumers[node.input[1]]) > 1:
            continue
        weight = graph.value(node.input[1])
        scale, shift = (value.reshape(-1) for value in (scaled[1], shifted[1]))
        bias = graph.constant(node.input[2]) if len(node.input) > 2 else np.zeros(len(weight), weight.dtype)
        name = node.input[1].removesuffix(".weight")
        folded = {"weight": weight * scale[:, None, None, None], "bias": bias * scale + shift}
        for part, value in folded.items():
            names[graph.add_constant(f"{name}.folded.{part}", value)] = f"{name}.{part}"
        node.input[:] = [node.input[0], *(f"{name}.folded.{part}" for part in folded)]
        node.output[0] = shifted[0].output[0]
        folded_nodes += [scaled[0], shifted[0]]
    for node in folded_nodes:
        proto.graph.node.remove(node)
    remove_unused_constants(proto.graph)
    _rename_constants(proto.graph, names)


def _reader(graph: Graph, name: str, op_type: str) -> tuple[onnx.NodeProto, np.ndarray] | None:
    """The only reader of a tensor, if it has this operator and a per-channel constant, and that constant."""
    node = graph.only_consumer(name)
    if node is None or node.op_type != op_type:
        return None
    constants = [
        value for value in (graph.constant(other) for other in node.input if other != name) if value is not None
    ]
    if len(constants) != 1 or constants[0].ndim not in (3, 4) or constants[0].shape[-2:] != (1, 1):
        return None
    return node, constants[0]

"""Mixed precision as a graph pass: `Cast` nodes in the graph define the precision for every runtime.

Convolutions and matrix products compute in half precision (FP16 or BF16), and so do operators whose features are all
in half precision: addition, multiplication, activations, pooling, resizing, RoIAlign. Everything else stays in single
precision: normalisation of pixels and of ConvNeXt's features, averages over a map, anchors, box coordinates, scores,
NMS, RoI coordinates, and the keypoint search in heat maps, which includes matrix products of two computed tensors. A
node whose weights or activations exceed the range of FP16 stays in single precision too. In a model with 8-bit
integers, quantisation reads half precision and dequantisation returns it, with scales of that type.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field

import ml_dtypes
import numpy as np
import onnx
from onnx import TensorProto

from maskrcnn.export.graph import Graph, copy_of, remove_unused_constants, sort_nodes
from maskrcnn.plugins import contract

HALF_TYPES = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}
_NUMPY = {"fp16": np.float16, "bf16": ml_dtypes.bfloat16}
# Operators that introduce half precision, with the positions of their feature and weight inputs.
COMPUTING = {"Conv": (0, 1, 2), "ConvTranspose": (0, 1, 2), "Gemm": (0, 1, 2), "MatMul": (0, 1)}
# Operators that propagate half precision if all their feature inputs have it; None means every input.
_PASSING: dict[str, tuple[int, ...] | None] = {
    **{"Add": (0, 1), "Concat": None, "Relu": (0,), "MaxPool": (0,), "Resize": (0,)},
    **{"Reshape": (0,), "Flatten": (0,), "Transpose": (0,), "Squeeze": (0,), "Unsqueeze": (0,), "Identity": (0,)},
    **{"GatherElements": (0,), "Slice": (0,)},
    **{"Mul": (0, 1), "Gelu": (0,), "HardSigmoid": (0,), "HardSwish": (0,), "Sigmoid": (0,)},
    **{"QuantizeLinear": (0, 1), "DequantizeLinear": (1,)},  # input 1 is the scale
}
_NOT_IN_BF16 = ("HardSwish",)  # rejected by TensorRT's importer, although the support matrix lists it
_ROI_ALIGN = contract.MULTILEVEL_ROI_ALIGN.name
_POOLING = (_ROI_ALIGN, contract.MULTILEVEL_ROI_POOL.name)
# Operators that compute new values; the others select or rearrange their inputs' values.
_ARITHMETIC = ("Add", "Mul", "Gelu", "HardSigmoid", "HardSwish", "Sigmoid", "DequantizeLinear", _ROI_ALIGN)
_MAX_FP16 = 65504.0
_BFLOAT16_OPSET = 22  # the first opset whose convolutions accept bfloat16
_MARGIN = 4.0  # allowed ratio of an activation on other images to its maximum on the observed images
_SHAPE_READERS = ("Shape", "Size")  # accept any type


@dataclass
class CastReport:
    """Nodes in half precision, and the reasons why the others stay in single precision."""

    precision: str
    half: Counter[str] = field(default_factory=Counter)  # number of nodes by operator
    kept: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))  # reason → node names
    casts: int = 0

    def text(self) -> str:
        """Report of a few lines."""
        operators = ", ".join(f"{count} {name}" for name, count in self.half.most_common())
        lines = [f"{self.precision}: {self.half.total()} nodes ({operators}); {self.casts} casts"]
        for reason, names in self.kept.items():
            named = "" if len(names) > 6 else f": {', '.join(names)}"
            lines.append(f"fp32: {len(names)} nodes, {reason}{named}")
        return "\n".join(lines)


RULE = "coordinates, scores and their arithmetic"


def to_half(
    proto: onnx.ModelProto, precision: str = "fp16", *, largest: Mapping[str, float] | None = None
) -> tuple[onnx.ModelProto, CastReport]:
    """Converts a copy of an exported model to half precision; its inputs and outputs keep their types.

    Args:
        proto: model written by `export_onnx`, in single precision.
        precision: "fp16" or "bf16".
        largest: maximum magnitude of each activation observed on images, by tensor name; see `largest_magnitudes`
            (default: assume that activations are in range). Not used for "bf16", which has the range of float32.

    Returns:
        The model and the report.
    """
    model = copy_of(proto)
    report = CastReport(precision)
    half = _choose(Graph(model), precision, largest or {}, report)
    _insert_casts(model, half, precision, report)
    remove_unused_constants(model.graph)
    sort_nodes(model.graph)
    for value in model.graph.value_info:
        if value.name in half and value.type.tensor_type.elem_type == TensorProto.FLOAT:
            value.type.tensor_type.elem_type = HALF_TYPES[precision]
    if precision == "bf16":  # from opset 20 to 22 the operators in use gained types and did not change otherwise
        for holder in (model, *model.functions):
            for entry in holder.opset_import:
                if entry.domain == "":
                    entry.version = max(entry.version, _BFLOAT16_OPSET)
    return model, report


def simulate_half(
    proto: onnx.ModelProto, precision: str = "fp16", *, largest: Mapping[str, float] | None = None
) -> onnx.ModelProto:
    """Returns a copy in single precision that rounds every value that `to_half` computes in half precision.

    It simulates a device with half-precision products and single-precision accumulation. ONNX Runtime's CPU
    provider runs consecutive layers of the `to_half` model in single precision, without rounding in between.

    Args:
        proto, precision, largest: as for `to_half`.
    """
    model: onnx.ModelProto = copy_of(proto)
    graph = Graph(model)
    half = _choose(graph, precision, largest or {}, CastReport(precision))
    rounded: dict[str, str] = {}

    def rounded_name(name: str) -> str:
        if name not in rounded:
            rounded[name] = f"{name}_rounded"
            if name in graph.constants:
                value = graph.value(name)
                graph.add_constant(rounded[name], value.astype(_NUMPY[precision]).astype(value.dtype))
            else:
                _add_rounding(model, name, rounded[name], HALF_TYPES[precision])
        return rounded[name]

    for node in list(model.graph.node):
        if node.output[0] in half:
            for name in dict.fromkeys(_feature_inputs(node) or ()):
                if name not in half and (name not in graph.constants or graph.float_type(name)):
                    node.input[:] = [rounded_name(name) if each == name else each for each in node.input]
            if node.op_type in COMPUTING or node.op_type in _ARITHMETIC:
                exact = f"{node.output[0]}_exact"
                _add_rounding(model, exact, node.output[0], HALF_TYPES[precision])
                node.output[0] = exact
    remove_unused_constants(model.graph)
    sort_nodes(model.graph)
    return model


def _add_rounding(model: onnx.ModelProto, name: str, rounded: str, kind: int) -> None:
    down = onnx.helper.make_node("Cast", [name], [f"{rounded}_half"], f"{rounded}/down", to=kind)
    up = onnx.helper.make_node("Cast", [f"{rounded}_half"], [rounded], f"{rounded}/up", to=TensorProto.FLOAT)
    model.graph.node.extend([down, up])


def _feature_inputs(node: onnx.NodeProto) -> list[str] | None:
    """The inputs that can be in half precision, or None if the rule keeps this operator in single precision."""
    if node.domain == contract.DOMAIN:
        return list(node.input[:-1]) if node.op_type in _POOLING else None
    if node.domain:
        return None
    places = COMPUTING.get(node.op_type, _PASSING.get(node.op_type, ()))
    if places == ():
        return None
    return [name for k, name in enumerate(node.input) if name and (places is None or k in places)]


def candidates(proto: onnx.ModelProto) -> list[str]:
    """Returns the names of the activations that `to_half` may convert, whose magnitudes `largest` must contain."""
    graph = Graph(proto)
    names: dict[str, None] = {}
    half = _choose(graph, "bf16", {}, CastReport("bf16"))
    for node in proto.graph.node:
        if node.output[0] in half:
            features = [name for name in _feature_inputs(node) or () if name not in graph.constants]
            names.update(dict.fromkeys((*features, node.output[0])))
    return list(names)


def _choose(graph: Graph, precision: str, largest: Mapping[str, float], report: CastReport) -> set[str]:
    """Returns the names of the tensors to compute in half precision, and records the decisions in the report."""
    half: set[str] = set()
    for node in graph.graph.node:
        features = None if _is_exempt(graph, node, precision) else _feature_inputs(node)
        if features is None:
            if graph.makes_floats(node):
                report.kept[RULE].append(node.name)
            continue
        carried = [name for name in features if name not in graph.constants]
        computes = node.op_type in (*COMPUTING, *_POOLING, "DequantizeLinear")
        if not computes and not (carried and all(name in half for name in carried)):
            continue  # its inputs are not features but indices, shapes or coordinates
        reason = _too_large(graph, node, features, largest) if precision == "fp16" else None
        if reason:
            report.kept[reason].append(node.name)
            continue
        half.add(node.output[0])
        report.half[node.op_type] += 1
    return half


def _is_exempt(graph: Graph, node: onnx.NodeProto, precision: str) -> bool:
    """Whether a node stays in single precision although its operator supports half precision."""
    if node.op_type == "Sigmoid":  # computes scores or masks, unless it is part of a swish, x · sigmoid(x)
        reader = graph.only_consumer(node.output[0])
        return reader is None or reader.op_type != "Mul" or node.input[0] not in reader.input
    if node.op_type == "MatMul":  # without a weight, it resamples heat maps, whose pixels rounding would make equal
        return not any(_is_weight(graph, name) for name in node.input)
    return precision == "bf16" and node.op_type in _NOT_IN_BF16


def _is_weight(graph: Graph, name: str) -> bool:
    source = graph.producers.get(name)
    return name in graph.constants or (
        source is not None and source.op_type == "DequantizeLinear" and source.input[0] in graph.constants
    )


def _too_large(graph: Graph, node: onnx.NodeProto, features: list[str], largest: Mapping[str, float]) -> str | None:
    """The reason why FP16 cannot represent a node's weights, inputs or output, or None."""
    for name in features:
        value = graph.constant(name)
        if value is not None and value.size and not np.abs(value).max() <= _MAX_FP16:
            return "weights beyond the range of FP16"
    carried = [name for name in features if name not in graph.constants]
    if any(not largest.get(name, 0.0) * _MARGIN <= _MAX_FP16 for name in (*carried, node.output[0])):
        return f"activations within a factor {_MARGIN:g} of the range of FP16, or beyond it"
    return None


def _insert_casts(model: onnx.ModelProto, half: set[str], precision: str, report: CastReport) -> None:
    graph, kind = Graph(model), HALF_TYPES[precision]
    integers = {node.output[0] for node in model.graph.node if node.op_type == "QuantizeLinear"}
    converted: dict[tuple[str, int], str] = {}

    def converted_name(name: str, to: int) -> str:
        if (name, to) not in converted:
            suffix = precision if to == kind else "fp32"
            converted[name, to] = f"{name}_{suffix}"
            if name in graph.constants:
                graph.add_constant(converted[name, to], graph.value(name).astype(_NUMPY[precision]))
            else:
                node = onnx.helper.make_node("Cast", [name], [converted[name, to]], f"{name}/to_{suffix}", to=to)
                model.graph.node.append(node)
                report.casts += 1
        return converted[name, to]

    for node in list(model.graph.node):
        features = set(_feature_inputs(node) or ()) if node.output[0] in half else set()
        for k, name in enumerate(node.input):
            if name in features and name not in half:
                if name not in graph.constants or graph.float_type(name):
                    node.input[k] = converted_name(name, kind)
            elif name in half - integers and name not in features and node.op_type not in _SHAPE_READERS:
                node.input[k] = converted_name(name, TensorProto.FLOAT)
    for value in model.graph.output:
        if value.name in half:
            raise AssertionError(f"{value.name} is in half precision; the rule keeps outputs in single precision")

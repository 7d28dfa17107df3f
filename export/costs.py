"""Multiply-accumulate operations of a model at a fixed input size, stage by stage."""

from __future__ import annotations

import math
from dataclasses import dataclass

import onnx
import onnx_ir
from onnxscript import optimizer

from maskrcnn.export.graph import Graph, copy_of, is_static, tensor_types, with_shapes
from maskrcnn.export.tensorrt.flavour import take_all_rows
from maskrcnn.stages import LEVELS

# Each stage is what its tensors need and no stage before it needed.
_STAGE_TENSORS = (
    ("backbone and FPN", LEVELS),
    ("RPN", ("proposals",)),
    ("box head", ("boxes",)),
    ("mask head", ("masks",)),
    ("keypoint head", ("keypoints",)),
)
_REST, _WHOLE = "other", "whole model"  # the latter where the graph does not name its stages
_LARGEST_SHAPE_CONSTANT = 1024  # elements; what is larger cannot decide a shape
_MOST_ROUNDS = 12  # of inferring and folding; each lets shapes get past one more obstacle, of which there are about 5


@dataclass(frozen=True)
class Costs:
    """Multiply-accumulates of one image; a floating-point operation is half of one."""

    size_hw: tuple[int, int]
    macs: dict[str, int]  # by stage
    uncounted: tuple[str, ...]  # nodes whose shapes could not be inferred

    @property
    def flops(self) -> int:
        """Floating-point operations of convolutions and matrix products."""
        return 2 * sum(self.macs.values())


def costs_of(proto: onnx.ModelProto, size_hw: tuple[int, int]) -> Costs | None:
    """Counts convolutions and matrix products for one image, the mask and keypoint heads for all rows of the output.

    Interpolation, NMS, RoIAlign and element-wise operations are left out, as is usual.

    Args:
        proto: a file with the input `images`, ours or another one's; it is not changed.
        size_hw: of the input, after resizing and padding, in pixels.

    Returns:
        None for models without such an input.
    """
    if not any(value.name == "images" and _rank(value) == 4 for value in proto.graph.input):
        return None
    fixed = _at_size(proto, size_hw)
    known, stages = tensor_types(fixed.graph), stages_by_node(fixed)
    macs: dict[str, int] = {}
    uncounted = []
    for position, node in enumerate(fixed.graph.node):
        if node.op_type not in COUNTED or node.domain:
            continue
        try:
            stage = stages[position]
            macs[stage] = macs.get(stage, 0) + COUNTED[node.op_type](node, known)
        except (KeyError, ValueError):
            uncounted.append(node.name or node.output[0])
    return Costs(size_hw, macs, tuple(uncounted))


def _rank(value: onnx.ValueInfoProto) -> int:
    return len(value.type.tensor_type.shape.dim)


def _at_size(proto: onnx.ModelProto, size_hw: tuple[int, int]) -> onnx.ModelProto:
    """A copy without weights and functions, in which all shapes are those of one image of that size."""
    fixed = copy_of(proto)
    del fixed.functions[:]
    take_all_rows(fixed.graph)
    for value in fixed.graph.input:
        lengths = (1, 3, *size_hw) if value.name == "images" else (1,)
        for dim, length in zip(value.type.tensor_type.shape.dim, lengths, strict=False):
            if not dim.HasField("dim_value"):
                dim.dim_value = length
    _weights_to_inputs(fixed.graph)
    unknown = -1
    for _ in range(_MOST_ROUNDS):
        _forget_shapes(fixed.graph)  # lengths that were unknown become numbers
        fixed = with_shapes(fixed)
        before, unknown = unknown, sum(not is_static(kind) for kind in tensor_types(fixed.graph).values())
        if unknown in (0, before):
            break
        model = onnx_ir.serde.deserialize_model(fixed)
        optimizer.fold_constants(model, onnx_shape_inference=True)
        fixed = onnx_ir.serde.serialize_model(model)
    return fixed


def _forget_shapes(graph: onnx.GraphProto) -> None:
    del graph.value_info[:]
    for value in graph.output:
        value.type.tensor_type.ClearField("shape")


def _weights_to_inputs(graph: onnx.GraphProto) -> None:
    """Spares the passes the weights, of which the shapes are enough."""
    small = []
    for tensor in graph.initializer:
        if math.prod(tensor.dims) > _LARGEST_SHAPE_CONSTANT:
            graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
        else:
            small.append(onnx.TensorProto.FromString(tensor.SerializeToString()))
    del graph.initializer[:]
    graph.initializer.extend(small)


def stages_by_node(proto: onnx.ModelProto) -> list[str]:
    """The stage of each node."""
    producers = Graph(proto).producers
    if not any(level in producers for level in LEVELS):
        return [_WHOLE] * len(proto.graph.node)
    stage_of: dict[str, str] = {}
    for stage, names in _STAGE_TENSORS:
        waiting = [name for name in names if name in producers]
        while waiting:
            name = waiting.pop()
            if name in producers and name not in stage_of:
                stage_of[name] = stage
                waiting += producers[name].input
    return [next((stage_of[name] for name in node.output if name in stage_of), _REST) for node in proto.graph.node]


def _shape(name: str, known: dict[str, onnx.TypeProto.Tensor]) -> tuple[int, ...]:
    """The lengths of a tensor.

    Raises:
        KeyError, ValueError: where they are not known.
    """
    kind = known[name]
    if not kind.HasField("shape") or not all(dim.HasField("dim_value") for dim in kind.shape.dim):
        raise ValueError(name)
    return tuple(dim.dim_value for dim in kind.shape.dim)


def _conv(node: onnx.NodeProto, known: dict[str, onnx.TypeProto.Tensor]) -> int:
    _, *per_output = _shape(node.input[1], known)  # [out, in / groups, kernel …]
    return math.prod(_shape(node.output[0], known)) * math.prod(per_output)


def _conv_transpose(node: onnx.NodeProto, known: dict[str, onnx.TypeProto.Tensor]) -> int:
    _, *per_input = _shape(node.input[1], known)  # [in, out / groups, kernel …]
    return math.prod(_shape(node.input[0], known)) * math.prod(per_input)


def _gemm(node: onnx.NodeProto, known: dict[str, onnx.TypeProto.Tensor]) -> int:
    rows = _shape(node.input[0], known)
    is_transposed = any(a.name == "transA" and a.i for a in node.attribute)
    return math.prod(_shape(node.output[0], known)) * rows[0 if is_transposed else 1]


def _matmul(node: onnx.NodeProto, known: dict[str, onnx.TypeProto.Tensor]) -> int:
    return math.prod(_shape(node.output[0], known)) * _shape(node.input[0], known)[-1]


COUNTED = {"Conv": _conv, "ConvTranspose": _conv_transpose, "Gemm": _gemm, "MatMul": _matmul}

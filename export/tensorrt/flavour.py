"""TensorRT flavour: a copy of the exported graph for TensorRT's ONNX parser, and the AOT kernels that it needs.

The parser looks up an operator only by name: first in its importers, then in the file's functions, then in the
registered plugins. The parser of TensorRT 11 tries the plugins first if the node has a `plugin_namespace` (sources of
onnx-tensorrt 10.1 and 11.0). Therefore the flavour has no functions, and its custom nodes name their plugins.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import onnx

from maskrcnn.errors import UserError
from maskrcnn.export.graph import constant_value, constants_of, copy_of, tensor_types, with_shapes
from maskrcnn.plugins import aot_kernels, contract
from maskrcnn.plugins.aot_kernels import Kernel

if TYPE_CHECKING:
    import onnx_ir

# The namespace equals the nodes' domain, the default of parsers from 10.10 on, and the prefix of
# "maskrcnn::BatchedNms", which `tensorrt.plugin.register` uses for a Python plugin.
PLUGIN_NAMESPACE = contract.DOMAIN
PLUGIN_VERSION = str(contract.VERSION)
PLUGIN_ATTRIBUTES = ("plugin_namespace", "plugin_version", "aot")  # node attributes in addition to the contract's

_GRID_SAMPLE_MODES = {b"linear": b"bilinear", b"cubic": b"bicubic"}  # opset 20 name → name before opset 20
_INTEGERS = (onnx.TensorProto.INT32, onnx.TensorProto.INT64)
_DESIGN_CELLS = 25 * 42  # cells of 32 × 32 px in an image of 800×1344, the design size of the TopK groups
_MIN_GROUPS = 3
_LOWEST = -65504.0  # minimum of half precision, below every relevant score and logit


def tensorrt_flavour(proto: onnx.ModelProto, *, aot: bool = False) -> onnx.ModelProto:
    """Returns a copy of an exported model for TensorRT's parser.

    The functions are removed and the custom nodes name their plugins. `LiveRows`, an optimisation for runtimes with
    data-dependent shapes, is replaced by its inputs. `Clip` of integers becomes `Min` and `Max`; TensorRT 10 and 11
    accept 64-bit integers in all other operators that the exporter writes. `TopK` over a long axis becomes a `TopK`
    per group and one over the group results. Constants are folded. Names of tensors and metadata are unchanged.

    Args:
        proto: file of this package; it is not changed.
        aot: select the ahead-of-time plugins of `plugins.aot` (`aot_impl` of `tensorrt.plugin`). Each is a single
            kernel, so `BatchedNms` becomes two nodes. If false, the network's flags select the kind of plugin; C++
            plugins ignore the attribute.

    Raises:
        UserError: if the model has functions that are not in the contract and therefore have no plugins.
    """
    foreign = sorted({function.name for function in proto.functions} - contract.OPS.keys())
    if foreign:
        raise UserError(
            f"a model with the function(s) {', '.join(foreign)}",
            f"only functions of {', '.join(contract.OPS)}",
            "inline the others first: onnx.inliner.inline_selected_functions",
        )
    flavour = copy_of(proto)
    del flavour.functions[:]
    take_all_rows(flavour.graph)
    known = tensor_types(flavour.graph)
    nodes = list(flavour.graph.node)
    nodes = [new for node in nodes for new in _without_integer_clip(node, known)]
    constants = constants_of(flavour.graph)
    nodes = [new for node in nodes for new in _topk_in_groups(node, known, constants)]
    if aot:
        nodes = [new for node in nodes for new in _without_batched_nms(node)]
    changed = onnx.GraphProto(node=nodes)  # copies the nodes, because `del` empties those of the graph
    del flavour.graph.node[:]
    flavour.graph.node.extend(changed.node)
    _rename_modes(flavour.graph)
    _name_plugins(flavour.graph, aot=aot)
    return _folded(with_shapes(flavour))


def take_all_rows(graph: onnx.GraphProto) -> None:
    """Replaces `LiveRows` with its inputs, and in all shapes its number of rows with that of the inputs, in place."""
    known = tensor_types(graph)
    for node in [n for n in graph.node if n.op_type == contract.LIVE_ROWS.name and n.domain == contract.DOMAIN]:
        boxes, live_boxes = known.get(node.input[0]), known.get(node.output[0])
        if boxes is not None and live_boxes is not None and live_boxes.shape.dim[1].dim_param:
            _set_length(graph, live_boxes.shape.dim[1].dim_param, boxes.shape.dim[1].dim_value)
        names = dict(zip(node.output, node.input, strict=False))
        for reader in graph.node:
            reader.input[:] = [names.get(name, name) for name in reader.input]
        graph.node.remove(node)


def _set_length(graph: onnx.GraphProto, symbol: str, length: int) -> None:
    """Substitutes a number for a symbol in all shapes; products such as `N*u0` keep their other factors."""
    word = re.compile(rf"\b{re.escape(symbol)}\b")
    for value in (*graph.value_info, *graph.output):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param and word.search(dim.dim_param):
                text = word.sub(str(length), dim.dim_param)
                dim.ClearField("dim_param")
                if text.isdigit():
                    dim.dim_value = int(text)
                else:
                    dim.dim_param = text


def _without_integer_clip(node: onnx.NodeProto, known: dict[str, onnx.TypeProto.Tensor]) -> Iterator[onnx.NodeProto]:
    """Yields the node, or for an integer `Clip` a `Max` with the lower bound and a `Min` with the upper bound."""
    kind = known.get(node.input[0]) if node.op_type == "Clip" and not node.domain else None
    if kind is None or kind.elem_type not in _INTEGERS:
        yield node
        return
    bounds = dict(zip(("Max", "Min"), list(node.input)[1:], strict=False))
    steps = [(op, bound) for op, bound in bounds.items() if bound] or [("Identity", "")]
    value = node.input[0]
    for number, (op, bound) in enumerate(steps, start=1):
        last = number == len(steps)
        result = node.output[0] if last else f"{node.output[0]}_from_below"
        inputs = [value, bound] if bound else [value]
        yield onnx.helper.make_node(op, inputs, [result], name=node.name if last else f"{node.name}_{op}")
        value = result


def _topk_in_groups(
    node: onnx.NodeProto,
    known: dict[str, onnx.TypeProto.Tensor],
    constants: dict[str, onnx.TensorProto | onnx.AttributeProto],
) -> Iterator[onnx.NodeProto]:
    """Yields the node, or for a `TopK` over a long axis of `[N, L]` a `TopK` per group (G groups) and a final one.

    The result is the same, including the order of equal values by index: the groups are consecutive parts of the
    axis. TensorRT processes the axis of a `TopK` serially (about 51 µs for 24,000 elements, ultralytics#25666), so the
    time falls from L to L / G + G · K, which is smallest for G = √(L / K).
    """
    kind = known.get(node.input[0]) if node.op_type == "TopK" else None
    constant = constants.get(node.input[1]) if kind is not None else None
    is_joined = node.input[0] == f"{node.output[0]}_all_best"  # already split: the second step
    if kind is None or constant is None or len(kind.shape.dim) != 2 or is_joined:
        yield node
        return
    k = int(constant_value(constant).reshape(-1)[0])
    groups = round(math.sqrt(_design_length(kind.shape.dim[1]) / k))
    if groups < _MIN_GROUPS:
        yield node
        return
    prefix = node.output[0]

    def step(op: str, inputs: Sequence[str], *outputs: str, **attributes: Any) -> onnx.NodeProto:
        names = [f"{prefix}_{name}" for name in outputs]
        return onnx.helper.make_node(op, inputs, names, name=names[0], **attributes)

    def given(name: str, values: Sequence[int]) -> onnx.NodeProto:
        return onnx.helper.make_node("Constant", [], [f"{prefix}_{name}"], name=f"{prefix}_{name}", value_ints=values)

    def own(*names: str) -> list[str]:
        return [f"{prefix}_{name}" for name in names]

    lowest = onnx.helper.make_tensor(f"{prefix}_lowest", kind.elem_type, [], [_LOWEST])
    yield onnx.helper.make_node("Constant", [], own("lowest"), name=f"{prefix}_lowest", value=lowest)
    for name, values in {
        "groups": [groups],
        "k": [k],
        "rounding": [groups - 1],
        "no_padding": [0, 0, 0],
        "as_before": [0, groups],
        "joined": [0, groups * k],
        "numbers": list(range(groups)),
        "column": [groups, 1],
    }.items():
        yield given(name, values)
    # Groups of equal length with at least K elements; the last one is padded.
    yield step("Shape", [node.input[0]], "length", start=1, end=2)
    yield step("Add", own("length", "rounding"), "rounded")
    yield step("Div", own("rounded", "groups"), "share")
    yield step("Max", own("share", "k"), "size")
    yield step("Mul", own("size", "groups"), "padded_length")
    yield step("Sub", own("padded_length", "length"), "padding")
    yield step("Concat", own("no_padding", "padding"), "pads", axis=0)
    yield step("Pad", [node.input[0], *own("pads", "lowest")], "padded")
    yield step("Concat", own("as_before", "size"), "shape", axis=0)
    yield step("Reshape", own("padded", "shape"), "grouped")
    yield step("TopK", own("grouped", "k"), "best", "place", axis=-1)
    # Convert indices in the group to indices along the axis.
    yield step("Mul", own("numbers", "size"), "first_in_row")
    yield step("Reshape", own("first_in_row", "column"), "first")
    yield step("Add", own("place", "first"), "index")
    yield step("Reshape", own("best", "joined"), "all_best")
    yield step("Reshape", own("index", "joined"), "all_index")
    yield onnx.helper.make_node("TopK", own("all_best", "k"), [node.output[0], *own("order")], name=node.name, axis=-1)
    yield onnx.helper.make_node(
        "GatherElements", own("all_index", "order"), [node.output[1]], name=f"{node.name}_index", axis=1
    )


def _design_length(dim: onnx.TensorShapeProto.Dimension) -> int:
    """The length of an axis in an image of 800×1344: a number, or the leading term of the exporter's expression."""
    if not dim.dim_param:
        return dim.dim_value
    term = re.match(r"(\d+)\*\w+\*\w+\b", dim.dim_param)  # number of elements per cell of 32 × 32 px
    return int(term[1]) * _DESIGN_CELLS if term else 0


def _without_batched_nms(node: onnx.NodeProto) -> Iterator[onnx.NodeProto]:
    """Yields the node, or for `BatchedNms` the nodes `BatchedNmsKeep` and `BatchedNmsCompact`."""
    if node.domain != contract.DOMAIN or node.op_type != contract.BATCHED_NMS.name:
        yield node
        return
    keep = f"{node.output[0]}_keep"
    steps = (
        (contract.BATCHED_NMS_KEEP, f"{node.name}_keep", node.input, [keep]),
        (contract.BATCHED_NMS_COMPACT, node.name, [keep], node.output),
    )
    for op, name, inputs, outputs in steps:
        step = onnx.helper.make_node(op.name, inputs, outputs, name=name, domain=contract.DOMAIN)
        step.attribute.extend(attribute for attribute in node.attribute if attribute.name in op.attributes)
        yield step


def _rename_modes(graph: onnx.GraphProto) -> None:
    """Gives `GridSample` the mode names from before opset 20: the parser treats unknown modes as nearest."""
    for node in graph.node:
        if node.op_type == "GridSample" and not node.domain:
            for attribute in node.attribute:
                if attribute.name == "mode":
                    attribute.s = _GRID_SAMPLE_MODES.get(attribute.s, attribute.s)


def _name_plugins(graph: onnx.GraphProto, *, aot: bool) -> None:
    """Adds the attributes that name the plugin to each custom node; the domain is kept for ONNX tools."""
    added = {"plugin_namespace": PLUGIN_NAMESPACE, "plugin_version": PLUGIN_VERSION, **({"aot": 1} if aot else {})}
    for node in graph.node:
        if node.domain == contract.DOMAIN:
            kept = [attribute for attribute in node.attribute if attribute.name not in PLUGIN_ATTRIBUTES]
            del node.attribute[:]
            node.attribute.extend([*kept, *(onnx.helper.make_attribute(k, v) for k, v in added.items())])


def _folded(proto: onnx.ModelProto) -> onnx.ModelProto:
    """The model after constant folding, without unused nodes, and with all constants as initializers."""
    import onnx_ir
    from onnx_ir.passes.common import LiftConstantsToInitializersPass, RemoveUnusedNodesPass
    from onnxscript import optimizer

    model = onnx_ir.serde.deserialize_model(proto)
    optimizer.fold_constants(model, onnx_shape_inference=False)
    _drop_empty_pads(model.graph)
    RemoveUnusedNodesPass()(model)
    LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    return onnx_ir.serde.serialize_model(model)


def _drop_empty_pads(graph: onnx_ir.Graph) -> None:
    """Removes `Pad` nodes without padding, which restored the rows that `LiveRows` had removed."""
    import onnx_ir

    for node in [n for n in graph if n.op_type == "Pad" and not n.domain and len(n.inputs) > 1]:
        data, pads, output = node.inputs[0], node.inputs[1], node.outputs[0]
        if data is None or pads is None or output.is_graph_output():
            continue
        value = onnx_ir.convenience.get_const_tensor(pads)
        if value is not None and not value.numpy().any():
            onnx_ir.convenience.replace_all_uses_with(output, data)
            graph.remove(node, safe=True)


# Kernels of the ahead-of-time plugins. Compiling them before TensorRT does gives readable error messages, and the check
# works without TensorRT.

_DTYPES: dict[int, str] = {
    onnx.TensorProto.FLOAT: "float32",
    onnx.TensorProto.FLOAT16: "float16",
    onnx.TensorProto.BFLOAT16: "bfloat16",
}


def kernels_of(flavour: onnx.ModelProto) -> list[Kernel]:
    """Returns every kernel that an engine may contain; TensorRT chooses the memory layout during the build.

    Args:
        flavour: result of `tensorrt_flavour(…, aot=True)`.

    Raises:
        UserError: if there is no kernel for a node.
    """
    known = tensor_types(flavour.graph)
    found: list[Kernel] = []
    for node in flavour.graph.node:
        if node.domain == contract.DOMAIN:
            found += [kernel for kernel in _kernels_of_node(node, known) if kernel not in found]
    return found


def _kernels_of_node(node: onnx.NodeProto, known: dict[str, onnx.TypeProto.Tensor]) -> Iterator[Kernel]:
    names = contract.ALL_OPS[node.op_type].attributes
    attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute if a.name in names}
    if node.op_type == contract.BATCHED_NMS_KEEP.name:
        yield aot_kernels.nms_keep(attributes)
    elif node.op_type == contract.BATCHED_NMS_COMPACT.name:
        yield aot_kernels.nms_compact(attributes)
    elif node.op_type == contract.MULTILEVEL_ROI_ALIGN.name:
        feature, levels = known[node.input[0]], len(node.input) - 1
        channels = feature.shape.dim[1].dim_value or None if len(feature.shape.dim) > 1 else None
        for dtype, layout in aot_kernels.FEATURE_FORMATS:
            if dtype == _DTYPES[feature.elem_type]:
                yield aot_kernels.roi_align(
                    attributes, num_levels=levels, dtype=dtype, layout=layout, channels=channels
                ).kernel

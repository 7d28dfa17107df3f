"""The exported graph as TensorRT's ONNX parser wants it.

The parser looks an operator up by its name alone: among its own importers, among the file's functions, among the
registered plugins; that of TensorRT 11 begins with the plugins where a node carries `plugin_namespace` (sources of
onnx-tensorrt 10.1 and 11.0). So the copy for TensorRT has no functions, and its nodes say which plugin they mean.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

import onnx
import onnx_ir
from onnx_ir.passes.common import LiftConstantsToInitializersPass, RemoveUnusedNodesPass
from onnxscript import optimizer

from maskrcnn.errors import UserError
from maskrcnn.export.graph import copy_of, tensor_types, with_shapes
from maskrcnn.plugins import aot_kernels, contract
from maskrcnn.plugins.aot import FEATURE_FORMATS
from maskrcnn.plugins.aot_kernels import Kernel

# Equal to the nodes' domain, where parsers from 10.10 on look when the attribute is missing, and the part of
# "maskrcnn::BatchedNms" before the colons, under which `tensorrt.plugin.register` files a Python plugin.
PLUGIN_NAMESPACE = contract.DOMAIN
PLUGIN_VERSION = str(contract.VERSION)
PLUGIN_ATTRIBUTES = ("plugin_namespace", "plugin_version", "aot")  # what a node has beside the contract's attributes

_FORMER_MODES = {b"linear": b"bilinear", b"cubic": b"bicubic"}  # of GridSample
_INTEGERS = (onnx.TensorProto.INT32, onnx.TensorProto.INT64)


def tensorrt_flavour(proto: onnx.ModelProto, *, aot: bool = False) -> onnx.ModelProto:
    """A copy of an exported model for TensorRT's parser.

    Functions are gone and our nodes name their plugins; `LiveRows`, which only saves work where shapes may depend on
    values, gives way to its inputs; what becomes constant is folded. 64-bit integers stay: TensorRT 10 and 11 take
    them in every operator that the exporter writes but `Clip`, which becomes `Min` and `Max`. Tensors keep their
    names, and the metadata are the original's.

    Args:
        proto: a file of ours; it is not changed.
        aot: for plugins whose kernels become part of the engine (`plugins.aot`; `aot_impl` of `tensorrt.plugin`). Each
            of those is one kernel, so `BatchedNms` becomes two nodes. Without it the parser takes what the network's
            flags prefer, and a C++ plugin does not look.

    Raises:
        UserError: for functions that are not in the contract, which no plugin would replace.
    """
    foreign = sorted({function.name for function in proto.functions} - contract.OPS.keys())
    if foreign:
        raise UserError(
            f"a model with the function(s) {', '.join(foreign)}",
            f"functions of {', '.join(contract.OPS)} alone",
            "inline the others first: onnx.inliner.inline_selected_functions",
        )
    flavour = copy_of(proto)
    del flavour.functions[:]
    take_all_rows(flavour.graph)
    _replace_integer_clips(flavour.graph)
    _name_modes(flavour.graph)
    if aot:
        _split_nms(flavour.graph)
    _name_plugins(flavour.graph, aot=aot)
    return _folded(with_shapes(flavour))


def take_all_rows(graph: onnx.GraphProto) -> None:
    """Replaces `LiveRows` by its inputs, and in the shapes its number of rows by theirs."""
    known = tensor_types(graph)
    for node in [n for n in graph.node if n.op_type == contract.LIVE_ROWS.name and n.domain == contract.DOMAIN]:
        boxes, live_boxes = known.get(node.input[0]), known.get(node.output[0])
        if boxes is not None and live_boxes is not None and live_boxes.shape.dim[1].dim_param:
            _fix_length(graph, live_boxes.shape.dim[1].dim_param, boxes.shape.dim[1].dim_value)
        _rename(graph, dict(zip(node.output, node.input, strict=False)))
        graph.node.remove(node)


def _fix_length(graph: onnx.GraphProto, symbol: str, length: int) -> None:
    """Writes a number for a symbol in all shapes; products such as `N*u0` keep their other factors."""
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


def _rename(graph: onnx.GraphProto, names: dict[str, str]) -> None:
    """Lets every reader of a tensor read another one."""
    for node in graph.node:
        for position, name in enumerate(node.input):
            node.input[position] = names.get(name, name)


def _replace_integer_clips(graph: onnx.GraphProto) -> None:
    """Integer `Clip` as `Max` with the lower bound, then `Min` with the upper: the support matrix has these."""
    known, nodes = tensor_types(graph), []
    for node in graph.node:
        kind = known.get(node.input[0]) if node.op_type == "Clip" and not node.domain else None
        nodes += [node] if kind is None or kind.elem_type not in _INTEGERS else _bounded(node)
    changed = onnx.GraphProto(node=nodes)  # copies, as clearing the graph would empty its own
    del graph.node[:]
    graph.node.extend(changed.node)


def _bounded(clip: onnx.NodeProto) -> Iterable[onnx.NodeProto]:
    bounds = dict(zip(("Max", "Min"), list(clip.input)[1:], strict=False))
    steps = [(op, bound) for op, bound in bounds.items() if bound] or [("Identity", "")]
    value = clip.input[0]
    for number, (op, bound) in enumerate(steps, start=1):
        last = number == len(steps)
        result = clip.output[0] if last else f"{clip.output[0]}_from_below"
        inputs = [value, bound] if bound else [value]
        yield onnx.helper.make_node(op, inputs, [result], name=clip.name if last else f"{clip.name}_{op}")
        value = result


def _name_modes(graph: onnx.GraphProto) -> None:
    """`GridSample`'s modes by their names of before opset 20: the parser takes those it does not know for nearest."""
    for node in graph.node:
        if node.op_type == "GridSample" and not node.domain:
            for attribute in node.attribute:
                if attribute.name == "mode" and attribute.s in _FORMER_MODES:
                    attribute.s = _FORMER_MODES[attribute.s]


def _split_nms(graph: onnx.GraphProto) -> None:
    """`BatchedNms` as `BatchedNmsKeep` and `BatchedNmsCompact`."""
    nodes = []
    for node in graph.node:
        is_nms = node.domain == contract.DOMAIN and node.op_type == contract.BATCHED_NMS.name
        nodes += _two_steps(node) if is_nms else [node]
    changed = onnx.GraphProto(node=nodes)
    del graph.node[:]
    graph.node.extend(changed.node)


def _two_steps(nms: onnx.NodeProto) -> Iterable[onnx.NodeProto]:
    keep = f"{nms.output[0]}_keep"
    steps = (
        (contract.BATCHED_NMS_KEEP, f"{nms.name}_keep", nms.input, [keep]),
        (contract.BATCHED_NMS_COMPACT, nms.name, [keep], nms.output),
    )
    for op, name, inputs, outputs in steps:
        step = onnx.helper.make_node(op.name, inputs, outputs, name=name, domain=contract.DOMAIN)
        step.attribute.extend(attribute for attribute in nms.attribute if attribute.name in op.attributes)
        yield step


def _name_plugins(graph: onnx.GraphProto, *, aot: bool) -> None:
    """Says on each of our nodes which plugin it means. The domain stays, for ONNX's own tools."""
    wanted = {"plugin_namespace": PLUGIN_NAMESPACE, "plugin_version": PLUGIN_VERSION, **({"aot": 1} if aot else {})}
    for node in graph.node:
        if node.domain == contract.DOMAIN:
            kept = [attribute for attribute in node.attribute if attribute.name not in PLUGIN_ATTRIBUTES]
            del node.attribute[:]
            node.attribute.extend([*kept, *(onnx.helper.make_attribute(k, v) for k, v in wanted.items())])


def _folded(proto: onnx.ModelProto) -> onnx.ModelProto:
    """The model with everything computed that depends on constants and fixed lengths alone."""
    model = onnx_ir.serde.deserialize_model(proto)
    optimizer.fold_constants(model, onnx_shape_inference=False)
    _drop_empty_pads(model.graph)
    RemoveUnusedNodesPass()(model)
    LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    return onnx_ir.serde.serialize_model(model)


def _drop_empty_pads(graph: onnx_ir.Graph) -> None:
    """Removes `Pad` nodes that add nothing: the rows that `LiveRows` left out are no longer missing."""
    for node in [n for n in graph if n.op_type == "Pad" and not n.domain and len(n.inputs) > 1]:
        pads, output = onnx_ir.convenience.get_const_tensor(node.inputs[1]), node.outputs[0]
        if pads is not None and not pads.numpy().any() and not output.is_graph_output():
            onnx_ir.convenience.replace_all_uses_with(output, node.inputs[0])
            graph.remove(node, safe=True)


# Which kernels TensorRT will ask of our ahead-of-time plugins for a graph.
#
# Compiling them beforehand says what is wrong in words, where TensorRT would say that a plugin failed; and without
# TensorRT it proves that they compile.

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

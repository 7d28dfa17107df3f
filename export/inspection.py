"""Model file inspection: tensors, operators, precision, size, cost, provenance and node placement, without running it.

The cost counts the multiply-accumulate operations (MACs) of convolutions and matrix products at a fixed input size,
by stage of the detector.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import onnx

from maskrcnn.errors import UserError
from maskrcnn.export.graph import Graph, copy_of, is_static, op_counts, tensor_types, with_shapes
from maskrcnn.export.tensorrt.flavour import take_all_rows
from maskrcnn.imaging.preprocess import Preprocessing, resized_size
from maskrcnn.metadata import KEY, ModelMetadata, check_complete, not_ours, safetensors_header
from maskrcnn.runtime.backends.base import TensorSpec, detector_specs
from maskrcnn.runtime.backends.onnxruntime_providers import oldest_onnxruntime
from maskrcnn.runtime.backends.placement import Placement, placements
from maskrcnn.runtime.engine_files import read_metadata
from maskrcnn.stages import LEVELS

_DEFAULT_IMAGE_HW = (480, 640)  # a common image size; resized and padded, it gives the default input size
_MAX_SHOWN_OPERATORS = 12
# Number formats by the names that ONNX, OpenVINO, safetensors and NumPy use.
_PRECISIONS = {
    **{"FLOAT": "fp32", "FLOAT16": "fp16", "BFLOAT16": "bf16", "DOUBLE": "fp64", "INT8": "int8", "UINT8": "uint8"},
    **{"f32": "fp32", "f16": "fp16", "bf16": "bf16", "i8": "int8", "u8": "uint8"},
    **{"F32": "fp32", "F16": "fp16", "BF16": "bf16", "I8": "int8", "U8": "uint8"},
    "float32": "fp32",
}
_INTEGERS = {"i64": "int64", "i32": "int32"}  # OpenVINO's types of indices and counts
_BUFFERS = ("running_mean", "running_var", "num_batches_tracked")  # buffers of batch norm, which are not parameters


@dataclass(frozen=True)
class _Costs:
    """MACs of one image."""

    size_hw: tuple[int, int]  # size of the network's input
    macs: dict[str, int]  # by stage
    uncounted: tuple[str, ...]  # nodes whose shapes could not be inferred

    @property
    def flops(self) -> int:
        """Floating-point operations; two per MAC."""
        return 2 * sum(self.macs.values())

    def lines(self) -> list[str]:
        """Lines of the report."""
        height, width = self.size_hw
        lines = [f"cost of one image of {width}×{height} px: {self.flops / 1e9:.2f} GFLOP"]
        lines += [f"    {stage}: {2 * macs / 1e9:.3f} GFLOP" for stage, macs in self.macs.items()]
        if self.uncounted:
            lines.append(f"    not counted, shape unknown: {', '.join(self.uncounted)}")
        return lines


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """Contents of a model file; a field is None or empty if this kind of file does not record it."""

    path: Path
    kind: str
    bytes: int
    metadata: ModelMetadata | None = None
    config: dict[str, Any] = field(default_factory=dict)  # checkpoints only
    versions: dict[str, str] = field(default_factory=dict)
    inputs: dict[str, str] = field(default_factory=dict)  # name → type and shape
    outputs: dict[str, str] = field(default_factory=dict)
    operators: dict[str, int] = field(default_factory=dict)
    weights: dict[str, tuple[int, int]] = field(default_factory=dict)  # precision → (parameters, bytes)
    computing: dict[str, dict[str, int]] = field(default_factory=dict)  # precision → convolutions, matrix products
    results: dict[str, int] = field(default_factory=dict)  # output type → nodes
    costs: _Costs | None = None
    remarks: tuple[str, ...] = ()  # information that could not be determined, and why
    placements: list[Placement] | None = None

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON values."""
        return {
            "path": str(self.path),
            "kind": self.kind,
            "bytes": self.bytes,
            "metadata": json.loads(self.metadata.to_json()) if self.metadata else None,
            "config": self.config,
            "versions": self.versions,
            "inputs": self.inputs,
            "outputs": self.outputs,
            "operators": self.operators,
            "weights": {k: {"parameters": count, "bytes": size} for k, (count, size) in self.weights.items()},
            "computing_nodes": self.computing,
            "nodes_by_result": self.results,
            "costs": self.costs and {**vars(self.costs), "flops": self.costs.flops},
            "onnxruntime": self.placements and [vars(placement) for placement in self.placements],
        }

    def text(self) -> str:
        """Report of about twenty lines."""
        lines = [f"{self.path}: {self.kind}, {_megabytes(self.bytes)}"]
        if self.metadata is not None:
            lines += _provenance(self.metadata)
        for key in ("name", "backbone", "neck", "pool_method"):
            lines += [f"{key}: {self.config[key]}"] if key in self.config else []
        lines += [f"written by: {_pairs(self.versions)}"] if self.versions else []
        lines += [f"input {name}: {what}" for name, what in self.inputs.items()]
        lines += [f"output {name}: {what}" for name, what in self.outputs.items()]
        if self.operators:
            shown = _pairs(dict(list(self.operators.items())[:_MAX_SHOWN_OPERATORS]))
            more = ", …" if len(self.operators) > _MAX_SHOWN_OPERATORS else ""
            lines.append(f"nodes: {sum(self.operators.values())} ({shown}{more})")
        for precision, (count, size) in self.weights.items():
            lines.append(f"weights in {precision}: {count:,} parameters, {_megabytes(size)}")
        for precision, operators in self.computing.items():
            lines.append(f"computing in {precision}: {_pairs(operators)}")
        lines += [f"nodes by result: {_pairs(self.results)}"] if self.results else []
        lines += self.costs.lines() if self.costs else []
        lines += self.remarks
        lines += [f"ONNX Runtime on {placement.text()}" for placement in self.placements or ()]
        return "\n".join(lines)


def inspect(path: Path, *, size_hw: tuple[int, int] | None = None, with_placement: bool = True) -> Inspection:
    """Reads a model file without running it and without torch.

    Args:
        path: ONNX file, OpenVINO engine (`.xml`), TensorRT engine (`.engine`) or checkpoint (`.safetensors`).
        size_hw: height and width in pixels of the network's input, for the cost (default: the size to which a
            640×480 image is resized and padded).
        with_placement: create a session with every provider of ONNX Runtime to find the placement of the nodes.

    Raises:
        UserError: if the file is of another kind or cannot be read.
    """
    others = {".xml": _inspect_openvino, ".engine": _inspect_tensorrt, ".safetensors": _inspect_checkpoint}
    if not path.is_file():
        raise UserError(f"no file {path}", "a model file", "check the path")
    if path.suffix == ".onnx":
        return _inspect_onnx(path, size_hw, with_placement=with_placement)
    if path.suffix not in others:
        raise UserError(f"{path}", f"a file that ends in .onnx, {', '.join(others)}", "pass one of these")
    if size_hw is not None:
        raise UserError(f"--size for {path.name}", "an ONNX file: the cost is computed from its graph", "omit --size")
    return others[path.suffix](path)


# ONNX files


def _inspect_onnx(path: Path, size_hw: tuple[int, int] | None, *, with_placement: bool) -> Inspection:
    try:
        proto = onnx.load(path)
    except Exception as error:  # protobuf's decode error has no stable base class
        raise not_ours(path, f"not an ONNX file ({error})") from error
    if not proto.ir_version:  # protobuf reads an empty file as a message without fields
        raise not_ours(path, "not an ONNX file: no IR version")
    text = {entry.key: entry.value for entry in proto.metadata_props}.get(KEY)
    metadata = None if text is None else ModelMetadata.from_json(text, path)
    preprocessing = metadata.preprocessing if metadata else Preprocessing()
    divisor = preprocessing.divisor
    if size_hw is not None and any(side < 1 or side % divisor for side in size_hw):
        raise UserError(
            f"size {size_hw[0]}x{size_hw[1]}", f"height and width that are multiples of {divisor}", "round it up"
        )
    if size_hw is None:
        height, width = resized_size(_DEFAULT_IMAGE_HW, preprocessing)
        size_hw = math.ceil(height / divisor) * divisor, math.ceil(width / divisor) * divisor
    opset = next((entry.version for entry in proto.opset_import if entry.domain in ("", "ai.onnx")), "unknown")
    functions = ", ".join(function.name for function in proto.functions)
    computing, results = _node_precisions(proto)
    costs: _Costs | None = None
    remarks: tuple[str, ...] = ()
    try:
        costs = costs_of(proto, size_hw)
    except ModuleNotFoundError:
        remarks = ("cost of one image: not counted; this requires `pip install onnxscript`",)
    return Inspection(
        path=path,
        kind=f"ONNX IR {proto.ir_version}, opset {opset}{_oldest_runtime(proto, opset)}"
        f"{f', functions {functions}' if functions else ''}",
        bytes=path.stat().st_size,
        metadata=metadata,
        inputs={value.name: _tensor_text(value.type.tensor_type) for value in proto.graph.input},
        outputs={value.name: _tensor_text(value.type.tensor_type) for value in proto.graph.output},
        operators=dict(op_counts(proto).most_common()),
        weights=_weights(
            (onnx.TensorProto.DataType.Name(tensor.data_type), tuple(tensor.dims)) for tensor in proto.graph.initializer
        ),
        computing=computing,
        results=results,
        costs=costs,
        remarks=remarks,
        placements=placements(path) if with_placement else None,
    )


def _node_precisions(proto: onnx.ModelProto) -> tuple[dict[str, dict[str, int]], dict[str, int]]:
    """Convolutions and matrix products by the type they compute in, and all nodes by their output type."""
    plain = copy_of(proto)
    del plain.functions[:]
    take_all_rows(plain.graph)
    plain = with_shapes(plain)
    known, producers = tensor_types(plain.graph), Graph(plain).producers
    computing: dict[str, Counter[str]] = {}
    results: Counter[str] = Counter()
    for node in plain.graph.node:
        kind = known.get(node.output[0])
        name = onnx.TensorProto.DataType.Name(kind.elem_type) if kind is not None else "unknown"
        result = _PRECISIONS.get(name, name.lower())
        results[result] += 1
        if node.op_type in _MACS and not node.domain:
            sources = {producers[name].op_type if name in producers else "" for name in node.input[:2]}
            # DequantizeLinear on both factors means 8-bit arithmetic; on one of them only 8-bit storage.
            precision = "int8" if sources == {"DequantizeLinear"} else result
            computing.setdefault(precision, Counter())[node.op_type] += 1
    return {k: dict(v.most_common()) for k, v in computing.items()}, dict(results.most_common())


def _weights(tensors: Iterable[tuple[str, Sequence[int]]]) -> dict[str, tuple[int, int]]:
    """Parameters and bytes by precision, from (type, shape) pairs; integer shapes and indices are not counted."""
    found: dict[str, tuple[int, int]] = {}
    for kind, shape in tensors:
        precision = _PRECISIONS.get(kind)
        if precision is not None:
            count, size = found.get(precision, (0, 0))
            bits = int("".join(filter(str.isdigit, precision)))
            found[precision] = count + math.prod(shape), size + math.prod(shape) * bits // 8
    return dict(sorted(found.items(), key=lambda item: -item[1][1]))


def _tensor_text(kind: onnx.TypeProto.Tensor) -> str:
    name = onnx.TensorProto.DataType.Name(kind.elem_type)
    lengths = [dim.dim_param or (str(dim.dim_value) if dim.HasField("dim_value") else "?") for dim in kind.shape.dim]
    return f"{_PRECISIONS.get(name, name.lower())} [{', '.join(lengths)}]"


# Cost

# A stage comprises the nodes that its tensors depend on and that no earlier stage contains.
_STAGE_TENSORS = (
    ("backbone and FPN", LEVELS),
    ("RPN", ("proposals",)),
    ("box head", ("boxes",)),
    ("mask head", ("masks",)),
    ("keypoint head", ("keypoints",)),
)
_MAX_SHAPE_ELEMENTS = 1024  # a larger constant does not determine a shape
_MAX_ROUNDS = 12  # rounds of shape inference and constant folding; the detector needs about 5


def costs_of(proto: onnx.ModelProto, size_hw: tuple[int, int]) -> _Costs | None:
    """Counts the MACs of convolutions and matrix products for one image.

    The mask and keypoint heads are counted for all rows of the output. Interpolation, NMS, RoIAlign and element-wise
    operations are not counted, as is usual.

    Args:
        proto: model with the input `images`, from this package or another source; it is not changed.
        size_hw: height and width of the input in pixels, after resizing and padding.

    Returns:
        The costs, or None if the model has no such input.

    Raises:
        ModuleNotFoundError: if onnxscript is not installed, as on a machine that only runs models.
    """
    if not any(value.name == "images" and len(value.type.tensor_type.shape.dim) == 4 for value in proto.graph.input):
        return None
    fixed = _at_size(proto, size_hw)
    known, stages = tensor_types(fixed.graph), stages_by_node(fixed)
    macs: dict[str, int] = {}
    uncounted = []
    for stage, node in zip(stages, fixed.graph.node, strict=True):
        if node.op_type not in _MACS or node.domain:
            continue
        try:
            macs[stage] = macs.get(stage, 0) + _MACS[node.op_type](node, known)
        except (KeyError, ValueError):
            uncounted.append(node.name or node.output[0])
    return _Costs(size_hw, macs, tuple(uncounted))


def stages_by_node(proto: onnx.ModelProto) -> list[str]:
    """Returns the stage name of each node; "whole model" if the graph does not name its stages."""
    producers = Graph(proto).producers
    if not any(level in producers for level in LEVELS):
        return ["whole model"] * len(proto.graph.node)
    stage_of: dict[str, str] = {}
    for stage, names in _STAGE_TENSORS:
        waiting = [name for name in names if name in producers]
        while waiting:
            name = waiting.pop()
            if name in producers and name not in stage_of:
                stage_of[name] = stage
                waiting += producers[name].input
    return [next((stage_of[name] for name in node.output if name in stage_of), "other") for node in proto.graph.node]


def _at_size(proto: onnx.ModelProto, size_hw: tuple[int, int]) -> onnx.ModelProto:
    """Returns a copy without weights and functions, with the shapes for one image of this size."""
    import onnx_ir
    from onnxscript import optimizer

    fixed: onnx.ModelProto = copy_of(proto)
    del fixed.functions[:]
    take_all_rows(fixed.graph)
    for value in fixed.graph.input:
        lengths = (1, 3, *size_hw) if value.name == "images" else (1,)
        for dim, length in zip(value.type.tensor_type.shape.dim, lengths, strict=False):
            if not dim.HasField("dim_value"):
                dim.dim_value = length
    _weights_to_inputs(fixed.graph)
    unknown = -1
    for _ in range(_MAX_ROUNDS):  # each round propagates shapes past one more node that computes a size
        del fixed.graph.value_info[:]
        for value in fixed.graph.output:
            value.type.tensor_type.ClearField("shape")
        fixed = with_shapes(fixed)
        before, unknown = unknown, sum(not is_static(kind) for kind in tensor_types(fixed.graph).values())
        if unknown in (0, before):
            break
        model = onnx_ir.serde.deserialize_model(fixed)
        optimizer.fold_constants(model, onnx_shape_inference=True)
        fixed = onnx_ir.serde.serialize_model(model)
    return fixed


def _weights_to_inputs(graph: onnx.GraphProto) -> None:
    """Replaces weights by graph inputs: their shapes are enough, and the passes run faster without the values."""
    small = []
    for tensor in graph.initializer:
        if math.prod(tensor.dims) > _MAX_SHAPE_ELEMENTS:
            graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
        else:
            small.append(onnx.TensorProto.FromString(tensor.SerializeToString()))
    del graph.initializer[:]
    graph.initializer.extend(small)


_Types = dict[str, onnx.TypeProto.Tensor]


def _shape(name: str, known: _Types) -> tuple[int, ...]:
    """A static shape; raises KeyError or ValueError if it is not known."""
    kind = known[name]
    if not is_static(kind):
        raise ValueError(name)
    return tuple(dim.dim_value for dim in kind.shape.dim)


def _conv(node: onnx.NodeProto, known: _Types) -> int:
    _, *per_output = _shape(node.input[1], known)  # [out, in / groups, kernel …]
    return math.prod(_shape(node.output[0], known)) * math.prod(per_output)


def _conv_transpose(node: onnx.NodeProto, known: _Types) -> int:
    _, *per_input = _shape(node.input[1], known)  # [in, out / groups, kernel …]
    return math.prod(_shape(node.input[0], known)) * math.prod(per_input)


def _gemm(node: onnx.NodeProto, known: _Types) -> int:
    rows = _shape(node.input[0], known)
    is_transposed = any(a.name == "transA" and a.i for a in node.attribute)
    return math.prod(_shape(node.output[0], known)) * rows[0 if is_transposed else 1]


def _matmul(node: onnx.NodeProto, known: _Types) -> int:
    return math.prod(_shape(node.output[0], known)) * _shape(node.input[0], known)[-1]


_MACS: dict[str, Callable[[onnx.NodeProto, _Types], int]] = {
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "Gemm": _gemm,
    "MatMul": _matmul,
}


# Engines and checkpoints


def _inspect_openvino(path: Path) -> Inspection:
    """An OpenVINO engine, from its XML file; the cost is not computed."""
    weights = path.with_suffix(".bin")
    if not weights.is_file():
        raise UserError(f"{path} without {weights.name}", "both files of an OpenVINO engine", "build it again")
    try:
        root = ElementTree.parse(path).getroot()
    except ElementTree.ParseError as error:
        raise not_ours(path, f"not XML ({error})") from error
    entry = root.find(f"rt_info/{KEY}")
    if entry is None or "value" not in entry.attrib:
        raise not_ours(path, "an XML file without maskrcnn's metadata")
    layers = list(root.iter("layer"))
    constants = [data.attrib for layer in layers if layer.get("type") == "Const" for data in layer.findall("data")]
    check_complete(weights, max((int(data.get("offset", 0)) + int(data["size"]) for data in constants), default=0))
    metadata = ModelMetadata.from_json(entry.attrib["value"], path)
    return Inspection(
        path=path,
        kind="OpenVINO engine",
        bytes=path.stat().st_size + weights.stat().st_size,
        metadata=metadata,
        inputs={layer.get("name", ""): _port_text(layer) for layer in layers if layer.get("type") == "Parameter"},
        outputs={  # without the outputs that keep coordinates in single precision, see runtime/build/openvino.py
            layer.get("output_names", ""): _port_text(layer)
            for layer in layers
            if layer.get("type") == "Result" and layer.get("output_names") in detector_specs(metadata)[1]
        },
        operators=dict(Counter(layer.get("type", "") for layer in layers).most_common()),
        weights=_weights(
            (data["element_type"], [int(length) for length in data["shape"].split(",") if length.strip()])
            for data in constants
        ),
    )


def _port_text(layer: ElementTree.Element) -> str:
    port = next(layer.iter("port"))
    lengths = [dim.text if dim.text != "-1" else "?" for dim in port.iter("dim")]
    kind = port.get("precision", "").lower()
    return f"{(_PRECISIONS | _INTEGERS).get(kind, kind)} [{', '.join(map(str, lengths))}]"


def _inspect_tensorrt(path: Path) -> Inspection:
    """A TensorRT engine, from its metadata file; only TensorRT can read the engine itself."""
    metadata = read_metadata(path)
    inputs, outputs = detector_specs(metadata)
    return Inspection(
        path=path,
        kind="TensorRT engine",
        bytes=path.stat().st_size,
        metadata=metadata,
        inputs={name: _spec_text(spec) for name, spec in inputs.items()},
        outputs={name: _spec_text(spec) for name, spec in outputs.items()},
    )


def _spec_text(spec: TensorSpec) -> str:
    lengths = ["?" if length is None else str(length) for length in spec.shape]
    return f"{_PRECISIONS.get(spec.dtype, spec.dtype)} [{', '.join(lengths)}]"


def _inspect_checkpoint(path: Path) -> Inspection:
    """A checkpoint, from the JSON header of the safetensors file."""
    header = safetensors_header(path)
    text = header.pop("__metadata__", {}).get(KEY)
    if text is None:
        raise not_ours(path, "safetensors without maskrcnn's header")
    try:
        contents = dict(json.loads(text))
    except (ValueError, TypeError) as error:
        raise not_ours(path, f"safetensors with a damaged header ({error})") from error
    tensors = {name: (entry["dtype"], entry["shape"]) for name, entry in header.items()}
    return Inspection(
        path=path,
        kind="checkpoint",
        bytes=path.stat().st_size,
        config=contents.get("config", {}),
        versions=contents.get("versions", {}),
        weights=_weights(pair for name, pair in tensors.items() if not name.endswith(_BUFFERS)),
    )


# Text


def _provenance(metadata: ModelMetadata) -> list[str]:
    classes = metadata.class_names
    names = ", ".join(classes[:5]) + (", …" if len(classes) > 5 else "")
    pre = metadata.preprocessing
    size = f"{pre.min_size_px} to {pre.max_size_px} px, multiples of {pre.divisor}"
    lines = [
        f"model: {metadata.model}, precision {metadata.precision}, contract {metadata.contract}",
        f"classes: {len(classes)} ({names}), {'with' if metadata.has_masks else 'without'} masks, "
        f"at most {metadata.detections} detections",
        f"preprocessing: {size}, {pre.channel_order}, mean {list(pre.mean)}, std {list(pre.std)}",
        *_inside(metadata),
        f"made from: SHA-256 {metadata.source_sha256 or 'not recorded'}",
        f"written by: {_pairs(metadata.versions) or 'not recorded'}",
    ]
    if metadata.has_keypoints:
        lines.insert(2, f"keypoints: {len(metadata.keypoint_names)} ({', '.join(metadata.keypoint_names)})")
    return lines + [f"stamp, {key}: {'; '.join(str(value).splitlines())}" for key, value in metadata.stamp.items()]


def _inside(metadata: ModelMetadata) -> list[str]:
    """Settings inside the graph, if recorded, and the model settings that were assumed."""
    if not metadata.anchor_sizes_px:
        return []
    sizes, ratios = (
        ", ".join(f"{value:g}" for value in values)
        for values in (metadata.anchor_sizes_px, metadata.anchor_aspect_ratios)
    )
    lines = [
        f"anchors: {sizes} px, ratios {ratios}; score threshold {metadata.score_threshold:g}, "
        f"NMS IoU {metadata.nms_iou:g}"
    ]
    return lines + ([f"assumed (not stated in the weights): {', '.join(metadata.assumed)}"] if metadata.assumed else [])


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB"


def _oldest_runtime(proto: onnx.ModelProto, opset: int | str) -> str:
    oldest = oldest_onnxruntime(proto.ir_version, opset) if isinstance(opset, int) else None
    return f" (ONNX Runtime {oldest} or newer)" if oldest else ""


def _pairs(values: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in values.items())

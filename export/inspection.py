"""What a model file is: tensors, operators, precision, size, cost, where it comes from, where it would run."""

from __future__ import annotations

import json
import math
import struct
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import onnx

from maskrcnn.errors import UserError
from maskrcnn.export.costs import COUNTED, Costs, costs_of
from maskrcnn.export.graph import Graph, copy_of, op_counts, tensor_types, with_shapes
from maskrcnn.export.placement import Placement, placements
from maskrcnn.export.tensorrt.flavour import take_all_rows
from maskrcnn.imaging.preprocess import Preprocessing, resized_size
from maskrcnn.metadata import KEY, ModelMetadata, not_ours
from maskrcnn.runtime.backends.base import TensorSpec, detector_specs
from maskrcnn.runtime.engine_files import engine_metadata

_PHOTO_HW = (480, 640)  # a common format of pictures, for the default input size
_SHOWN_OPERATORS = 12
# ONNX's, OpenVINO's, safetensors' and NumPy's names of number formats.
_PRECISIONS = {
    **{"FLOAT": "fp32", "FLOAT16": "fp16", "BFLOAT16": "bf16", "DOUBLE": "fp64", "INT8": "int8", "UINT8": "uint8"},
    **{"f32": "fp32", "f16": "fp16", "bf16": "bf16", "i8": "int8", "u8": "uint8"},
    **{"F32": "fp32", "F16": "fp16", "BF16": "bf16", "I8": "int8", "U8": "uint8"},
    "float32": "fp32",
}
_INTEGERS = {"i64": "int64", "i32": "int32"}  # OpenVINO's, of indices and counts: no weights
_BUFFERS = ("running_mean", "running_var", "num_batches_tracked")  # of batch norm: state, not parameters


@dataclass(frozen=True, kw_only=True)
class _Inspection:
    """Everything that was found out about a file; what a kind of file does not tell is None or empty."""

    path: Path
    kind: str
    bytes: int
    metadata: ModelMetadata | None = None
    config: dict[str, Any] = field(default_factory=dict)  # of a checkpoint
    versions: dict[str, str] = field(default_factory=dict)
    inputs: dict[str, str] = field(default_factory=dict)  # name: type and shape
    outputs: dict[str, str] = field(default_factory=dict)
    operators: dict[str, int] = field(default_factory=dict)
    weights: dict[str, tuple[int, int]] = field(default_factory=dict)  # precision: (parameters, bytes)
    computing: dict[str, dict[str, int]] = field(default_factory=dict)  # precision: convolutions and products
    results: dict[str, int] = field(default_factory=dict)  # nodes by what they make
    costs: Costs | None = None
    placements: list[Placement] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON holds it."""
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
        """A report of some twenty lines."""
        lines = [f"{self.path}: {self.kind}, {_megabytes(self.bytes)}"]
        if self.metadata is not None:
            lines += _provenance(self.metadata)
        for key in ("name", "backbone", "neck", "pool_method"):
            lines += [f"{key}: {self.config[key]}"] if key in self.config else []
        lines += [f"written by: {_pairs(self.versions)}"] if self.versions else []
        lines += [f"input {name}: {what}" for name, what in self.inputs.items()]
        lines += [f"output {name}: {what}" for name, what in self.outputs.items()]
        if self.operators:
            shown = _pairs(dict(list(self.operators.items())[:_SHOWN_OPERATORS]))
            more = ", …" if len(self.operators) > _SHOWN_OPERATORS else ""
            lines.append(f"nodes: {sum(self.operators.values())} ({shown}{more})")
        for precision, (count, size) in self.weights.items():
            lines.append(f"weights in {precision}: {count:,} parameters, {_megabytes(size)}")
        for precision, operators in self.computing.items():
            lines.append(f"computing in {precision}: {_pairs(operators)}")
        lines += [f"nodes by result: {_pairs(self.results)}"] if self.results else []
        lines += _cost_lines(self.costs) if self.costs else []
        lines += [f"ONNX Runtime on {placement.text()}" for placement in self.placements or ()]
        return "\n".join(lines)


def inspect(path: Path, *, size_hw: tuple[int, int] | None = None, with_placement: bool = True) -> _Inspection:
    """Looks into a model file without running it, and without torch.

    Args:
        path: an ONNX file, an OpenVINO engine (`.xml`), a TensorRT engine (`.engine`) or a checkpoint
            (`.safetensors`).
        size_hw: of the network's input, for the cost; by default what a picture of 640 × 480 becomes.
        with_placement: ask ONNX Runtime's providers, each of which makes a session.

    Raises:
        UserError: for other files, and for those that cannot be read.
    """
    others = {".xml": _inspect_engine, ".engine": _inspect_plan, ".safetensors": _inspect_checkpoint}
    if not path.is_file():
        raise UserError(f"no file {path}", "a model file", "check the path")
    if path.suffix == ".onnx":
        return _inspect_onnx(path, size_hw, with_placement=with_placement)
    if path.suffix not in others:
        raise UserError(f"{path}", f"a file that ends in .onnx, {', '.join(others)}", "name one of these")
    if size_hw is not None:
        raise UserError(f"--size for {path.name}", "an ONNX file, whose graph tells the cost", "leave --size out")
    return others[path.suffix](path)


def _inspect_onnx(path: Path, size_hw: tuple[int, int] | None, *, with_placement: bool) -> _Inspection:
    try:
        proto = onnx.load(path)
    except Exception as error:  # protobuf's decode error has no stable base class
        raise not_ours(path, f"not an ONNX file ({error})") from error
    text = {entry.key: entry.value for entry in proto.metadata_props}.get(KEY)
    metadata = None if text is None else ModelMetadata.from_json(text, path)
    preprocessing = metadata.preprocessing if metadata else Preprocessing()
    if size_hw is not None and any(side < 1 or side % preprocessing.divisor for side in size_hw):
        multiples = f"height and width that are multiples of {preprocessing.divisor}"
        raise UserError(f"size {size_hw[0]}x{size_hw[1]}", multiples, "round it up")
    opset = next((entry.version for entry in proto.opset_import if entry.domain in ("", "ai.onnx")), "unknown")
    functions = ", ".join(function.name for function in proto.functions)
    computing, results = _node_precisions(proto)
    return _Inspection(
        path=path,
        kind=f"ONNX, opset {opset}{f', functions {functions}' if functions else ''}",
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
        costs=costs_of(proto, size_hw or _default_size(preprocessing)),
        placements=placements(path) if with_placement else None,
    )


def _default_size(preprocessing: Preprocessing) -> tuple[int, int]:
    height, width = resized_size(_PHOTO_HW, preprocessing)
    divisor = preprocessing.divisor
    return math.ceil(height / divisor) * divisor, math.ceil(width / divisor) * divisor


def _node_precisions(proto: onnx.ModelProto) -> tuple[dict[str, dict[str, int]], dict[str, int]]:
    """Convolutions and matrix products by the type they compute in, and all nodes by the type they make."""
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
        made = _PRECISIONS.get(name, name.lower())
        results[made] += 1
        if node.op_type in COUNTED and not node.domain:
            sources = {producers[name].op_type if name in producers else "" for name in node.input[:2]}
            # Both factors from DequantizeLinear stand for arithmetic in 8 bits; one alone is only stored so.
            precision = "int8" if sources == {"DequantizeLinear"} else made
            computing.setdefault(precision, Counter())[node.op_type] += 1
    return {k: dict(v.most_common()) for k, v in computing.items()}, dict(results.most_common())


def _weights(tensors) -> dict[str, tuple[int, int]]:
    """Parameters and bytes by precision, of (type, shape) pairs; shapes and indices in integers do not count."""
    found: dict[str, tuple[int, int]] = {}
    for kind, shape in tensors:
        precision = _PRECISIONS.get(kind)
        if precision is not None:
            count, size = found.get(precision, (0, 0))
            bits = int("".join(filter(str.isdigit, precision)))
            found[precision] = count + math.prod(shape), size + math.prod(shape) * bits // 8
    return dict(sorted(found.items(), key=lambda item: -item[1][1]))


def _inspect_engine(path: Path) -> _Inspection:
    """An OpenVINO engine: what its XML says. Its graph is not costed."""
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
    constants = [layer.find("data").attrib for layer in layers if layer.get("type") == "Const"]
    metadata = ModelMetadata.from_json(entry.attrib["value"], path)
    return _Inspection(
        path=path,
        kind="OpenVINO engine",
        bytes=path.stat().st_size + weights.stat().st_size,
        metadata=metadata,
        inputs={layer.get("name", ""): _port_text(layer) for layer in layers if layer.get("type") == "Parameter"},
        outputs={  # without those that keep coordinates in single precision, see runtime/build/openvino.py
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


def _inspect_plan(path: Path) -> _Inspection:
    """A TensorRT engine: what the metadata beside it says. The plan itself only TensorRT can read."""
    metadata = engine_metadata(path)
    inputs, outputs = detector_specs(metadata)
    return _Inspection(
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


def _port_text(layer: ElementTree.Element) -> str:
    port = next(layer.iter("port"))
    lengths = [dim.text if dim.text != "-1" else "?" for dim in port.iter("dim")]
    kind = port.get("precision", "").lower()
    return f"{(_PRECISIONS | _INTEGERS).get(kind, kind)} [{', '.join(map(str, lengths))}]"


def _inspect_checkpoint(path: Path) -> _Inspection:
    """A checkpoint: the header of the safetensors file, which is JSON after its length in 8 bytes."""
    try:
        with open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(min(length, path.stat().st_size)))
        ours = json.loads(header.pop("__metadata__")[KEY])
        tensors = {name: (entry["dtype"], entry["shape"]) for name, entry in header.items()}
    except (struct.error, ValueError, KeyError, TypeError) as error:
        raise not_ours(path, f"not a checkpoint ({type(error).__name__})") from error
    return _Inspection(
        path=path,
        kind="checkpoint",
        bytes=path.stat().st_size,
        config=ours.get("config", {}),
        versions=ours.get("versions", {}),
        weights=_weights(pair for name, pair in tensors.items() if not name.endswith(_BUFFERS)),
    )


def _tensor_text(kind: onnx.TypeProto.Tensor) -> str:
    name = onnx.TensorProto.DataType.Name(kind.elem_type)
    lengths = [dim.dim_param or (str(dim.dim_value) if dim.HasField("dim_value") else "?") for dim in kind.shape.dim]
    return f"{_PRECISIONS.get(name, name.lower())} [{', '.join(lengths)}]"


def _provenance(metadata: ModelMetadata) -> list[str]:
    classes = metadata.class_names
    named = ", ".join(classes[:5]) + (", …" if len(classes) > 5 else "")
    pre = metadata.preprocessing
    size = f"{pre.min_size_px} to {pre.max_size_px} px, multiples of {pre.divisor}"
    lines = [
        f"model: {metadata.model}, precision {metadata.precision}, contract {metadata.contract}",
        f"classes: {len(classes)} ({named}), {'with' if metadata.has_masks else 'without'} masks, "
        f"{metadata.detections} detections at most",
        f"preprocessing: {size}, {pre.channel_order}, mean {list(pre.mean)}, std {list(pre.std)}",
        f"made from: SHA-256 {metadata.source_sha256 or 'not recorded'}",
        f"written by: {_pairs(metadata.versions) or 'not recorded'}",
    ]
    if metadata.has_keypoints:
        lines.insert(2, f"keypoints: {len(metadata.keypoint_names)} ({', '.join(metadata.keypoint_names)})")
    return lines + [f"stamp, {key}: {'; '.join(str(value).splitlines())}" for key, value in metadata.stamp.items()]


def _cost_lines(costs: Costs) -> list[str]:
    height, width = costs.size_hw
    lines = [f"cost of one image of {width}×{height} px: {costs.flops / 1e9:.2f} GFLOP"]
    lines += [f"    {stage}: {2 * macs / 1e9:.3f} GFLOP" for stage, macs in costs.macs.items()]
    if costs.uncounted:
        lines.append(f"    not counted, shape unknown: {', '.join(costs.uncounted)}")
    return lines


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB"


def _pairs(values: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in values.items())

"""Static 8-bit quantisation as a graph pass, with QuantizeLinear/DequantizeLinear nodes.

Convolutions and matrix products read 8-bit activations (uint8, one scale and zero point per tensor) and 8-bit weights
(int8, symmetric, one scale per output channel); additions of two feature maps read 8-bit activations. Biases are int32.
Nothing is quantised between a convolution and its ReLU, and a tensor is quantised for all of its readers or for none.
ONNX Runtime and OpenVINO fuse these nodes into integer kernels.

ONNX Runtime's quantiser is not used: it selects nodes by operator and would quantise additions of coordinates, and it
quantises before and after each ReLU or replaces the ReLU by an unsigned zero point, which has no symmetric form.
"""

from __future__ import annotations

import fnmatch
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import helper

from maskrcnn.data.images import read_image
from maskrcnn.errors import UserError
from maskrcnn.export.graph import Graph, copy_of, remove_unused_constants, sort_nodes
from maskrcnn.export.passes.precision import COMPUTING, CastReport, candidates
from maskrcnn.imaging.preprocess import batch_images
from maskrcnn.metadata import ModelMetadata
from maskrcnn.runtime.backends.onnxruntime import session_options

_CHANNEL_AXIS = {"Conv": 0, "ConvTranspose": 1}  # axis of the output channels in a weight
_MIN_SCALE = 1e-12
# Groups of layers for `keep`: patterns of layer names, in the syntax of fnmatch.
GROUPS = {
    "first": ("backbone.body.conv1", "backbone.body.0", "backbone.body.0.0"),  # ResNet, VGG, other backbones
    "last": (
        *("rpn.head.cls_logits*", "rpn.head.bbox_pred*", "roi_heads.box_predictor.*"),
        *("roi_heads.mask_predictor.mask_fcn_logits", "roi_heads.keypoint_predictor.*"),
    ),
    "heads": ("rpn.*", "roi_heads.*"),
    "backbone": ("backbone.body.*",),
    "fpn": ("backbone.fpn.*",),  # any neck
}
DEFAULT_KEEP = ("last",)
_MODULES = ("backbone.", "rpn.", "roi_heads.")  # prefixes of layer names


@dataclass
class QuantizationReport:
    """Quantised nodes and the layers left out."""

    quantized: Counter[str] = field(default_factory=Counter)  # number of nodes by operator
    kept: list[str] = field(default_factory=list)  # names of the layers left out
    images: int = 0  # number of calibration images
    casts: CastReport | None = None  # if the other nodes are in half precision

    def text(self) -> str:
        """Report of a few lines."""
        operators = ", ".join(f"{count} {name}" for name, count in self.quantized.most_common())
        layers = dict.fromkeys(name.partition("#")[0] for name in self.kept)  # the RPN head has a node per level
        left = f"left out: {', '.join(layers)}" if layers else "nothing left out"
        rest = f"\n{self.casts.text()}" if self.casts else ""
        return f"int8: {self.quantized.total()} nodes ({operators}), scales from {self.images} images\n{left}{rest}"


def to_int8(
    proto: onnx.ModelProto,
    activations: Mapping[str, tuple[float, float]],
    *,
    keep: Iterable[str] = DEFAULT_KEEP,
) -> tuple[onnx.ModelProto, QuantizationReport]:
    """Quantises a copy of an exported model to 8-bit integers; its inputs and outputs keep their types.

    Args:
        proto: model written by `export_onnx`, in single precision.
        activations: (minimum, maximum) of each activation by tensor name, from `activation_ranges`.
        keep: layers to leave in single precision: layer names, patterns such as `roi_heads.mask_head.*`, or the
            groups first, last, heads, backbone and fpn.

    Returns:
        The model and the report, in which the number of images is not set.

    Raises:
        UserError: if a name in `keep` matches no layer.
    """
    model = copy_of(proto)
    graph = Graph(model)
    chosen = _quantizable(graph, set(candidates(proto)))
    left_out = _left_out(chosen, keep)
    quantizer = _Quantizer(model, graph, activations)
    for node in chosen:
        if node.name in left_out:
            quantizer.leave_out(node)
        elif node.op_type in COMPUTING:
            quantizer.layer(node)
        else:
            quantizer.addition(node)
    quantizer.share()
    remove_unused_constants(model.graph)
    sort_nodes(model.graph)
    return model, quantizer.report


def symmetric(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Returns a copy with int8 activations with zero point 0 and unquantised biases, as TensorRT requires.

    The larger side of an activation's range sets its scale. A model without 8-bit integers is returned unchanged.
    """
    model: onnx.ModelProto = copy_of(proto)
    graph = Graph(model)
    parameters = {tuple(node.input[1:3]) for node in model.graph.node if node.op_type == "QuantizeLinear"}
    for scale_name, zero_point_name in parameters:
        scale, zero_point = graph.value(scale_name), graph.value(zero_point_name)
        if zero_point.dtype == np.uint8:
            side = max(int(zero_point), 255 - int(zero_point))
            graph.replace_constant(scale_name, np.float32(scale * side / 127))
            graph.replace_constant(zero_point_name, np.int8(0))
    for node in list(model.graph.node):
        integers = graph.constant(node.input[0]) if node.op_type == "DequantizeLinear" else None
        if integers is not None and integers.dtype == np.int32:
            graph.add_constant(node.output[0], integers.astype(np.float32) * graph.value(node.input[1]))
            model.graph.node.remove(node)
    remove_unused_constants(model.graph)
    return model


def with_half_scales(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Returns a copy whose scales are representable in FP16, and whose weights are rounded with these scales.

    `to_half` can then store the scales in FP16, as TensorRT requires where values between integer layers are in FP16.
    """
    model: onnx.ModelProto = copy_of(proto)
    graph = Graph(model)
    for node in model.graph.node:
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            continue
        scale = graph.value(node.input[1]).astype(np.float32)
        half = np.maximum(scale.astype(np.float16), np.finfo(np.float16).smallest_subnormal).astype(np.float32)
        weight = graph.constant(node.input[0])
        if weight is not None:
            axis = next(each.i for each in node.attribute if each.name == "axis")
            ratio = (scale / half).reshape([-1 if k == axis else 1 for k in range(weight.ndim)])
            graph.replace_constant(node.input[0], np.clip(np.rint(weight * ratio), -127, 127).astype(np.int8))
        graph.replace_constant(node.input[1], half)
    return model


def _quantizable(graph: Graph, features: set[str]) -> list[onnx.NodeProto]:
    """The layers with constant weights and the additions of two feature maps."""
    found = []
    for node in graph.graph.node:
        is_layer = node.op_type in COMPUTING and node.output[0] in features and graph.float_type(node.input[1])
        if is_layer or (node.op_type == "Add" and all(name in features for name in node.input)):
            found.append(node)
    return found


def _left_out(nodes: Sequence[onnx.NodeProto], keep: Iterable[str]) -> set[str]:
    names = [node.name for node in nodes]
    found = set()
    for wanted in keep:
        patterns = GROUPS.get(wanted, (wanted,))
        matched = {name for pattern in patterns for name in fnmatch.filter(names, pattern)}
        if not matched:
            if not any(name.startswith(_MODULES) for name in names):
                raise UserError(
                    "a file whose layers have no names, exported by an older version of maskrcnn",
                    "layers named after the model's modules",
                    "export the checkpoint again",
                )
            layers = ", ".join(sorted({node.name.partition("#")[0] for node in nodes if node.op_type in COMPUTING}))
            raise UserError(f"no layer {wanted!r}", f"{', '.join(GROUPS)}, or one of {layers}", "correct the name")
        found |= matched
    return found


class _Quantizer:
    """State of the quantisation of one model."""

    def __init__(self, model: onnx.ModelProto, graph: Graph, activations: Mapping[str, tuple[float, float]]) -> None:
        self.model, self.graph, self.activations = model, graph, activations
        self.report = QuantizationReport()
        self.scales: dict[str, float] = {}  # activation → scale
        self.done: set[str] = set()  # names of quantised nodes
        self.dequantized: dict[str, str] = {}  # activation, weight or bias → its dequantised tensor

    def layer(self, node: onnx.NodeProto) -> None:
        """Quantises a convolution or matrix product."""
        axis = self._channel_axis(node)
        source = node.input[0]
        node.input[0] = self._activation(source)
        node.input[1], scale = self._weight(node.input[1], axis)
        if len(node.input) > 2:
            node.input[2] = self._bias(node.input[2], self.scales[source] * scale)
        self._count(node)

    def addition(self, node: onnx.NodeProto) -> None:
        """Quantises an addition of two feature maps."""
        node.input[:] = [self._activation(name) for name in node.input]
        self._count(node)

    def leave_out(self, node: onnx.NodeProto) -> None:
        """Leaves a layer in single precision, but quantises its input if a quantised layer computes it.

        ONNX Runtime has no integer kernel for a layer whose output is not quantised.
        """
        self.report.kept.append(node.name)
        for name in node.input[:1] if node.op_type in COMPUTING else node.input:
            source = self.graph.producers.get(name)
            while source is not None and source.op_type in ("Relu", "Reshape", "MaxPool"):
                source = self.graph.producers.get(source.input[0])
            if source is not None and source.name in self.done:
                self._activation(name)

    def share(self) -> None:
        """Connects every reader of a quantised activation to the 8-bit tensor: fusion requires a single output type."""
        for name in self.scales:
            for reader in self.graph.consumers[name]:
                reader.input[:] = [self.dequantized[name] if each == name else each for each in reader.input]

    def _count(self, node: onnx.NodeProto) -> None:
        self.done.add(node.name)
        self.report.quantized[node.op_type] += 1

    def _channel_axis(self, node: onnx.NodeProto) -> int:
        if node.op_type in _CHANNEL_AXIS:
            return _CHANNEL_AXIS[node.op_type]
        transposed = any(each.name == "transB" and each.i for each in node.attribute)
        return 0 if transposed else 1

    def _activation(self, name: str) -> str:
        if name not in self.dequantized:
            low, high = self.activations[name]
            low, high = min(low, 0.0), max(high, 0.0)  # zero must be exact: padding is zero
            scale = max((high - low) / 255, _MIN_SCALE)
            zero_point = int(np.clip(round(-low / scale), 0, 255))
            self.scales[name] = scale
            self.graph.add_constant(f"{name}_scale", np.float32(scale))
            self.graph.add_constant(f"{name}_zero_point", np.uint8(zero_point))
            parameters = [f"{name}_scale", f"{name}_zero_point"]
            self._node("QuantizeLinear", [name, *parameters], f"{name}_quantized")
            self._node("DequantizeLinear", [f"{name}_quantized", *parameters], f"{name}_dequantized")
            self.dequantized[name] = f"{name}_dequantized"
        return self.dequantized[name]

    def _weight(self, name: str, axis: int) -> tuple[str, np.ndarray]:
        """The dequantised tensor of a weight, and its scale per channel `[C]`."""
        weight = self.graph.value(name)
        others = tuple(k for k in range(weight.ndim) if k != axis)
        scale = np.maximum(np.abs(weight).max(axis=others) / 127, _MIN_SCALE).astype(np.float32)
        if name not in self.dequantized:
            shape = [-1 if k == axis else 1 for k in range(weight.ndim)]
            integers = np.clip(np.rint(weight / scale.reshape(shape)), -127, 127).astype(np.int8)
            self.graph.add_constant(f"{name}_quantized", integers)
            self.graph.add_constant(f"{name}_scale", scale)
            self.graph.add_constant(f"{name}_zero_point", np.zeros(len(scale), np.int8))
            inputs = [f"{name}_quantized", f"{name}_scale", f"{name}_zero_point"]
            self._node("DequantizeLinear", inputs, f"{name}_dequantized", axis=axis)
            self.dequantized[name] = f"{name}_dequantized"
        return self.dequantized[name], scale

    def _bias(self, name: str, scale: np.ndarray) -> str:
        """The dequantised tensor of a bias; one per layer and activation, as it depends on the activation's scale."""
        bias = self.graph.value(name)
        steps = np.rint(bias.astype(np.float64) / scale)
        if np.abs(steps).max(initial=0) >= 2**31:
            return name  # overflow, in a channel whose weights are almost zero: keep the bias in single precision
        key = f"{name}_{len(self.dequantized)}"
        self.graph.add_constant(f"{key}_quantized", steps.astype(np.int32))
        self.graph.add_constant(f"{key}_scale", scale.astype(np.float32))
        self.graph.add_constant(f"{key}_zero_point", np.zeros(len(scale), np.int32))
        inputs = [f"{key}_quantized", f"{key}_scale", f"{key}_zero_point"]
        self._node("DequantizeLinear", inputs, f"{key}_dequantized", axis=0)
        self.dequantized[key] = f"{key}_dequantized"
        return self.dequantized[key]

    def _node(self, op_type: str, inputs: list[str], output: str, **attributes: Any) -> None:
        self.model.graph.node.append(helper.make_node(op_type, inputs, [output], output, **attributes))


# Activation statistics on images, for the scales of 8-bit integers and the range of FP16

_Feeds = dict[str, np.ndarray]


def feeds_from_files(paths: Sequence[Path], metadata: ModelMetadata) -> Iterator[_Feeds]:
    """Yields a batch of one preprocessed image for each file."""
    for path in paths:
        images, sizes = batch_images([read_image(path, metadata.preprocessing)], metadata.preprocessing)
        yield {"images": images, "image_sizes": sizes}


def activation_ranges(proto: onnx.ModelProto, feeds: Iterable[_Feeds]) -> dict[str, tuple[float, float]]:
    """Returns (minimum, maximum) of each activation that `to_int8` quantises, as means over the batches.

    The mean limits the influence of a single outlier.

    Args:
        proto: model in single precision.
        feeds: model inputs of each batch, by name.

    Raises:
        UserError: if an activation is not finite.
    """
    graph = Graph(proto)
    names: dict[str, None] = {}
    for node in _quantizable(graph, set(candidates(proto))):
        names.update(dict.fromkeys(name for name in node.input[:2] if name not in graph.constants))
    means = {name: extremes.mean(axis=0) for name, extremes in _observe(proto, feeds, list(names)).items()}
    return {name: (float(low), float(high)) for name, (low, high) in means.items()}


def largest_magnitudes(proto: onnx.ModelProto, feeds: Iterable[_Feeds]) -> dict[str, float]:
    """Returns the maximum magnitude over all batches of each activation that `to_half` may convert.

    Arguments and errors as for `activation_ranges`.
    """
    observed = _observe(proto, feeds, candidates(proto))
    return {name: float(np.abs(extremes).max(initial=0.0)) for name, extremes in observed.items()}


def _observe(proto: onnx.ModelProto, feeds: Iterable[_Feeds], names: Sequence[str]) -> dict[str, np.ndarray]:
    """Minimum and maximum of each tensor for each of the B batches, float32 `[B, 2]`."""
    model = copy_of(proto)
    del model.graph.output[:]
    for name in names:
        for op in ("ReduceMin", "ReduceMax"):
            model.graph.node.append(onnx.helper.make_node(op, [name], [f"{name}_{op}"], keepdims=0))
            model.graph.output.append(onnx.helper.make_empty_tensor_value_info(f"{name}_{op}"))
    written = model.SerializeToString()
    session = onnxruntime.InferenceSession(written, session_options(), providers=["CPUExecutionProvider"])
    rows = [session.run(None, each) for each in feeds]
    values = np.array(rows, np.float32).reshape(len(rows), len(names), 2)
    bad = [name for k, name in enumerate(names) if not np.isfinite(values[:, k]).all()]
    if bad:
        raise UserError(
            f"activations that are not finite in single precision, first {bad[0]}",
            "finite activations",
            "check the weights and the images",
        )
    return {name: values[:, k] for k, name in enumerate(names)}

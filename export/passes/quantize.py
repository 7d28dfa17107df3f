"""8-bit integers written into the graph: static quantisation with Q/DQ nodes.

Every convolution and matrix product reads 8-bit activations (one scale and zero point per tensor, uint8) and 8-bit
weights (one scale per output channel, int8, symmetric); so does the addition of two feature maps. Biases are int32.
Nothing is quantised between a convolution and its ReLU, and what is quantised for one reader is so for all. ONNX
Runtime and OpenVINO fuse this into integer kernels.

ONNX Runtime's own quantiser is not used: told operators it also takes additions of coordinates, and it either
quantises before and after each ReLU or drops the ReLU for an unsigned zero point, which no symmetric type can follow.
"""

from __future__ import annotations

import fnmatch
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnx import helper

from maskrcnn.data.images import read_image
from maskrcnn.errors import UserError
from maskrcnn.export.graph import Graph, copy_of, remove_unused_constants, sort_nodes
from maskrcnn.export.passes.precision import COMPUTING, candidates
from maskrcnn.imaging.preprocess import batch_images
from maskrcnn.metadata import ModelMetadata
from maskrcnn.runtime.backends.onnxruntime import session_options

_CHANNEL_AXIS = {"Conv": 0, "ConvTranspose": 1}  # of the output channels in a weight
_SMALLEST_SCALE = 1e-12
# Groups of layers by name, for `keep`. Patterns are matched as file names are.
GROUPS = {
    "first": ("backbone.body.conv1", "backbone.body.0", "backbone.body.0.0"),  # ResNet, VGG, the others
    "last": (
        *("rpn.head.cls_logits*", "rpn.head.bbox_pred*", "roi_heads.box_predictor.*"),
        *("roi_heads.mask_predictor.mask_fcn_logits", "roi_heads.keypoint_predictor.*"),
    ),
    "heads": ("rpn.*", "roi_heads.*"),
    "backbone": ("backbone.body.*",),
    "fpn": ("backbone.fpn.*",),  # whatever the neck
}
DEFAULT_KEEP = ("last",)
_MODULES = ("backbone.", "rpn.", "roi_heads.")  # with which every layer's name begins


@dataclass
class QuantizationReport:
    """What computes with 8-bit integers, and what was left out."""

    quantized: Counter[str] = field(default_factory=Counter)  # by operator
    kept: list[str] = field(default_factory=list)  # names of the layers that were left out
    images: int = 0  # that scales were taken from

    def text(self) -> str:
        """Some lines for a user."""
        operators = ", ".join(f"{count} {name}" for name, count in self.quantized.most_common())
        layers = dict.fromkeys(name.partition("#")[0] for name in self.kept)  # a head sees every level
        left = f"left out: {', '.join(layers)}" if layers else "nothing left out"
        return f"int8: {self.quantized.total()} nodes ({operators}), scales from {self.images} images\n{left}"


def values_to_observe(proto: onnx.ModelProto) -> list[str]:
    """The activations whose range `to_int8` needs."""
    graph = Graph(proto)
    features = set(candidates(proto))
    names = {}
    for node in _quantizable(graph, features):
        names.update(dict.fromkeys(name for name in node.input[:2] if name not in graph.constants))
    return list(names)


def ranges(observed: Mapping[str, np.ndarray]) -> dict[str, tuple[float, float]]:
    """The range of each activation: the mean over images of its extremes, so that one outlier does not stretch it.

    Args:
        observed: `[B, 2]` by name, as `observe` gives it.
    """
    return {name: tuple(seen.mean(axis=0).tolist()) for name, seen in observed.items()}


def to_int8(
    proto: onnx.ModelProto,
    activations: Mapping[str, tuple[float, float]],
    *,
    keep: Iterable[str] = DEFAULT_KEEP,
) -> tuple[onnx.ModelProto, QuantizationReport]:
    """A copy of an exported model that computes with 8-bit integers; inputs and outputs keep their types.

    Args:
        proto: a model that `export_onnx` wrote, in single precision.
        activations: range of each value of `values_to_observe`.
        keep: layers to leave in single precision: names, patterns such as `roi_heads.mask_head.*`, or the groups
            first, last, heads, backbone and fpn.

    Raises:
        UserError: for a layer in `keep` that the model does not have.
    """
    model = copy_of(proto)
    graph = Graph(model)
    chosen = _quantizable(graph, set(candidates(proto)))
    left_out = _left_out(chosen, keep)
    pass_ = _Pass(model, graph, activations)
    for node in chosen:
        if node.name in left_out:
            pass_.leave_out(node)
        elif node.op_type in COMPUTING:
            pass_.layer(node)
        else:
            pass_.addition(node)
    pass_.share()
    remove_unused_constants(model.graph)
    sort_nodes(model.graph)
    return model, pass_.report


def symmetric(proto: onnx.ModelProto) -> onnx.ModelProto:
    """A copy whose activations are int8 with zero point 0 and whose biases are not quantised, as TensorRT demands.

    The range of an activation is kept, its larger side decides the scale. A model without 8-bit integers comes back
    as it is.
    """
    model = copy_of(proto)
    graph = Graph(model)
    parameters = {tuple(node.input[1:3]) for node in model.graph.node if node.op_type == "QuantizeLinear"}
    for scale_name, zero_point_name in parameters:
        scale, zero_point = graph.constant(scale_name), graph.constant(zero_point_name)
        if zero_point.dtype == np.uint8:
            side = max(int(zero_point), 255 - int(zero_point))
            graph.replace_constant(scale_name, np.float32(scale * side / 127))
            graph.replace_constant(zero_point_name, np.int8(0))
    for node in list(model.graph.node):
        integers = graph.constant(node.input[0]) if node.op_type == "DequantizeLinear" else None
        if integers is not None and integers.dtype == np.int32:
            graph.add_constant(node.output[0], integers.astype(np.float32) * graph.constant(node.input[1]))
            model.graph.node.remove(node)
    remove_unused_constants(model.graph)
    return model


def _quantizable(graph: Graph, features: set[str]) -> list[onnx.NodeProto]:
    """Layers with constant weights, and additions of two feature maps."""
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
            _check_named(names)
            layers = ", ".join(sorted({node.name.partition("#")[0] for node in nodes if node.op_type in COMPUTING}))
            raise UserError(f"no layer {wanted!r}", f"{', '.join(GROUPS)}, or one of {layers}", "correct the name")
        found |= matched
    return found


def _check_named(names: Sequence[str]) -> None:
    """Refuses a file in which no layer has the name of a module: no group and no pattern would fit."""
    if not any(name.startswith(_MODULES) for name in names):
        raise UserError(
            "a file whose layers have no names, as older versions of maskrcnn exported it",
            "layers that are named after the model's modules",
            "export the checkpoint again",
        )


class _Pass:
    """One quantisation of one model."""

    def __init__(self, model: onnx.ModelProto, graph: Graph, activations: Mapping[str, tuple[float, float]]) -> None:
        self.model, self.graph, self.activations = model, graph, activations
        self.report = QuantizationReport()
        self.scales: dict[str, float] = {}  # of activations
        self.done: set[str] = set()  # names of quantised nodes
        self.made: dict[str, str] = {}  # activation or weight → its dequantised stand-in

    def layer(self, node: onnx.NodeProto) -> None:
        """A convolution or matrix product."""
        axis = self._channel_axis(node)
        source = node.input[0]
        node.input[0] = self._activation(source)
        node.input[1], scale = self._weight(node.input[1], axis)
        if len(node.input) > 2:
            node.input[2] = self._bias(node.input[2], self.scales[source] * scale)
        self._count(node)

    def addition(self, node: onnx.NodeProto) -> None:
        """An addition of two feature maps."""
        node.input[:] = [self._activation(name) for name in node.input]
        self._count(node)

    def leave_out(self, node: onnx.NodeProto) -> None:
        """A layer that stays in single precision. What quantised layers make for it is rounded all the same.

        A layer whose result is not quantised has no integer kernel in ONNX Runtime.
        """
        self.report.kept.append(node.name)
        for name in node.input[:1] if node.op_type in COMPUTING else node.input:
            maker = self.graph.producers.get(name)
            while maker is not None and maker.op_type in ("Relu", "Reshape", "MaxPool"):
                maker = self.graph.producers.get(maker.input[0])
            if maker is not None and maker.name in self.done:
                self._activation(name)

    def share(self) -> None:
        """All that read a quantised activation read the 8-bit one: a layer with two kinds of result is not fused."""
        for name in self.scales:
            for reader in self.graph.consumers[name]:
                reader.input[:] = [self.made[name] if each == name else each for each in reader.input]

    def _count(self, node: onnx.NodeProto) -> None:
        self.done.add(node.name)
        self.report.quantized[node.op_type] += 1

    def _channel_axis(self, node: onnx.NodeProto) -> int:
        if node.op_type in _CHANNEL_AXIS:
            return _CHANNEL_AXIS[node.op_type]
        transposed = any(each.name == "transB" and each.i for each in node.attribute)
        return 0 if transposed else 1

    def _activation(self, name: str) -> str:
        if name not in self.made:
            low, high = self.activations[name]
            low, high = min(low, 0.0), max(high, 0.0)  # zero must be exact: padding is zero
            scale = max((high - low) / 255, _SMALLEST_SCALE)
            zero_point = int(np.clip(round(-low / scale), 0, 255))
            self.scales[name] = scale
            self.graph.add_constant(f"{name}_scale", np.float32(scale))
            self.graph.add_constant(f"{name}_zero_point", np.uint8(zero_point))
            parameters = [f"{name}_scale", f"{name}_zero_point"]
            self._node("QuantizeLinear", [name, *parameters], f"{name}_quantized")
            self._node("DequantizeLinear", [f"{name}_quantized", *parameters], f"{name}_dequantized")
            self.made[name] = f"{name}_dequantized"
        return self.made[name]

    def _weight(self, name: str, axis: int) -> tuple[str, np.ndarray]:
        """The dequantised stand-in of a weight, and its scale per channel `[C]`."""
        weight = self.graph.constant(name)
        others = tuple(k for k in range(weight.ndim) if k != axis)
        scale = np.maximum(np.abs(weight).max(axis=others) / 127, _SMALLEST_SCALE).astype(np.float32)
        if name not in self.made:
            shape = [-1 if k == axis else 1 for k in range(weight.ndim)]
            integers = np.clip(np.rint(weight / scale.reshape(shape)), -127, 127).astype(np.int8)
            self.graph.add_constant(f"{name}_quantized", integers)
            self.graph.add_constant(f"{name}_scale", scale)
            self.graph.add_constant(f"{name}_zero_point", np.zeros(len(scale), np.int8))
            inputs = [f"{name}_quantized", f"{name}_scale", f"{name}_zero_point"]
            self._node("DequantizeLinear", inputs, f"{name}_dequantized", axis=axis)
            self.made[name] = f"{name}_dequantized"
        return self.made[name], scale

    def _bias(self, name: str, scale: np.ndarray) -> str:
        """The dequantised stand-in of a bias, of which there is one for each activation that the layer sees."""
        bias = self.graph.constant(name)
        steps = np.rint(bias.astype(np.float64) / scale)
        if np.abs(steps).max(initial=0) >= 2**31:
            return name  # a channel whose weights are next to nothing; its bias stays as it is
        key = f"{name}_{len(self.made)}"
        self.graph.add_constant(f"{key}_quantized", steps.astype(np.int32))
        self.graph.add_constant(f"{key}_scale", scale.astype(np.float32))
        self.graph.add_constant(f"{key}_zero_point", np.zeros(len(scale), np.int32))
        inputs = [f"{key}_quantized", f"{key}_scale", f"{key}_zero_point"]
        self._node("DequantizeLinear", inputs, f"{key}_dequantized", axis=0)
        self.made[key] = f"{key}_dequantized"
        return self.made[key]

    def _node(self, op_type: str, inputs: list[str], output: str, **attributes: int) -> None:
        self.model.graph.node.append(helper.make_node(op_type, inputs, [output], output, **attributes))


# Which values a graph's tensors take on images: the ground for 8-bit scales and for what FP16 can hold.

_Feeds = dict[str, np.ndarray]


def feeds_from_files(paths: Sequence[Path], metadata: ModelMetadata) -> Iterator[_Feeds]:
    """One batch of one image for each file, prepared as the model wants it."""
    for path in paths:
        images, sizes = batch_images([read_image(path)], metadata.preprocessing)
        yield {"images": images, "image_sizes": sizes}


def observe(proto: onnx.ModelProto, feeds: Iterable[_Feeds], names: Sequence[str]) -> dict[str, np.ndarray]:
    """The least and the largest number of each value, for each batch.

    Args:
        proto: a model in single precision.
        feeds: inputs by name.
        names: of float values in its main graph.

    Returns:
        for each name `[B, 2]` float32: minimum and maximum of each of the B batches.

    Raises:
        UserError: where a value is not finite.
    """
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


def largest_magnitudes(proto: onnx.ModelProto, feeds: Iterable[_Feeds], names: Sequence[str]) -> dict[str, float]:
    """The largest magnitude of each value over all batches."""
    return {name: float(np.abs(seen).max(initial=0.0)) for name, seen in observe(proto, feeds, names).items()}

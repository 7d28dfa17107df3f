"""8-bit quantisation: the Q/DQ nodes, their scales, and the difference in detections."""

from collections import Counter

import numpy as np
import onnx
import pytest
from onnx import helper

from maskrcnn.data.images import images_in
from maskrcnn.errors import UserError
from maskrcnn.export.graph import Graph
from maskrcnn.export.passes.quantize import (
    GROUPS,
    activation_ranges,
    feeds_from_files,
    symmetric,
    to_int8,
    with_half_scales,
)
from maskrcnn.export.tensorrt.flavour import tensorrt_flavour
from maskrcnn.export.tensorrt.lint import lint
from maskrcnn.export.variants import write_int8
from maskrcnn.runtime.backends.onnxruntime import OnnxRuntimeBackend
from maskrcnn.runtime.backends.openvino import OpenVinoBackend
from maskrcnn.runtime.engine_files import read_model
from maskrcnn.runtime.verification.compare import INT8
from maskrcnn.runtime.verification.inputs import compare_backends

LAYERS = ("Conv", "ConvTranspose", "Gemm")


@pytest.fixture(scope="module")
def feeds(onnx_file, shapes) -> list[dict[str, np.ndarray]]:
    return list(feeds_from_files(images_in(shapes / "train", 6), read_model(onnx_file)[1]))


@pytest.fixture(scope="module")
def activations(proto, feeds) -> dict[str, tuple[float, float]]:
    return activation_ranges(proto, feeds)


@pytest.fixture(scope="module")
def whole(proto, activations) -> onnx.ModelProto:
    return to_int8(proto, activations, keep=())[0]


def producer(graph: Graph, name: str) -> onnx.NodeProto:
    return graph.producers[name]


def test_every_layer_reads_integers_and_no_coordinate_does(whole, proto):
    graph = Graph(whole)
    for node in whole.graph.node:
        if node.op_type in LAYERS:
            assert {producer(graph, name).op_type for name in node.input} == {"DequantizeLinear"}, node.name
    quantized = {node.input[0] for node in whole.graph.node if node.op_type == "QuantizeLinear"}
    features = {node.output[0] for node in proto.graph.node if node.op_type in (*LAYERS, "Relu", "Add", "Resize")}
    makers = {name: producer(graph, name).op_type for name in quantized if name in graph.producers}
    assert set(makers.values()) <= {*LAYERS, "Relu", "Add", "Resize", "MaxPool", "Mul", "Reshape", "MultilevelRoiAlign"}
    assert [name for name, op in makers.items() if op == "Mul"] == ["normalised"]
    assert all(name in features for name, op in makers.items() if op == "Add")


def test_nothing_is_quantised_between_a_layer_and_its_relu(whole):
    graph = Graph(whole)
    relus = [node for node in whole.graph.node if node.op_type == "Relu"]
    assert relus and all(producer(graph, node.input[0]).op_type in (*LAYERS, "Add") for node in relus)


def test_weights_have_a_scale_for_each_output_channel(whole, proto):
    before, after = Graph(proto), Graph(whole)
    for layer, axis in (("backbone.body.layer2.0.conv1", 0), ("roi_heads.mask_predictor.conv5_mask", 1)):
        weight = before.constant(f"{layer}.weight")
        scale = after.constant(f"{layer}.weight_scale")
        integers = after.constant(f"{layer}.weight_quantized")
        assert scale.shape == (weight.shape[axis],) and integers.dtype == np.int8
        shape = [-1 if k == axis else 1 for k in range(4)]
        assert np.abs(integers * scale.reshape(shape) - weight).max() <= 0.5001 * scale.max()
        assert np.abs(integers).max() == 127  # the full range is used


def test_biases_are_int32_with_the_product_of_scales(whole):
    graph = Graph(whole)
    node = next(node for node in whole.graph.node if node.name == "backbone.body.layer1.0.conv1")
    activation, weight, bias = (producer(graph, name) for name in node.input)
    assert graph.constant(bias.input[0]).dtype == np.int32
    product = graph.constant(activation.input[1]) * graph.constant(weight.input[1])
    assert np.allclose(graph.constant(bias.input[1]), product)


def test_zero_is_exact_and_ranges_are_means_over_images(whole, activations, proto, feeds):
    graph = Graph(whole)
    each = [activation_ranges(proto, [one])["normalised"] for one in feeds]
    assert activations["normalised"] == pytest.approx(tuple(np.mean(each, axis=0)))
    scale, zero_point = graph.constant("normalised_scale"), graph.constant("normalised_zero_point")
    assert zero_point.dtype == np.uint8 and float(scale) * 255 == pytest.approx(np.ptp(activations["normalised"]))
    pooled = next(node.output[0] for node in proto.graph.node if node.op_type == "MaxPool")  # after a ReLU
    assert graph.constant(f"{pooled}_zero_point") == 0


@pytest.mark.parametrize("group", sorted(GROUPS))
def test_groups_can_be_left_out(proto, activations, group):
    whole = to_int8(proto, activations, keep=())[1].quantized.total()
    model, report = to_int8(proto, activations, keep=(group,))
    assert report.kept and report.quantized.total() + len(report.kept) == whole
    graph = Graph(model)
    kept = [node for node in model.graph.node if node.name in report.kept]
    assert all(node.input[1] in graph.constants for node in kept if node.op_type in LAYERS)


def test_an_unknown_layer_is_an_error_that_lists_the_layers(proto, activations):
    with pytest.raises(UserError, match=r"no layer 'backbone.body.conv9'\n  expected: .*backbone.body.conv1"):
        to_int8(proto, activations, keep=("backbone.body.conv9",))


def test_a_file_without_layer_names_is_an_error(proto, activations):
    nameless = onnx.ModelProto.FromString(proto.SerializeToString())
    for number, node in enumerate(nameless.graph.node):
        node.name = f"node_{number}"
    with pytest.raises(UserError, match=r"no names(.|\n)*fix:      export the checkpoint again"):
        to_int8(nameless, activations)


@pytest.mark.parametrize("form", ["as it is", "symmetric"])
def test_8_bit_integers_detect_the_same(tmp_path, onnx_file, proto, activations, feeds, form):
    model, _ = to_int8(proto, activations)
    model = symmetric(model) if form == "symmetric" else model
    path = tmp_path / "model.int8.onnx"
    onnx.save(model, path)
    reference = OnnxRuntimeBackend(onnx_file)
    for backend in (OnnxRuntimeBackend(path), OpenVinoBackend(path)):
        difference = compare_backends(reference, backend, INT8, feeds)
        assert difference.detections > 10
        assert difference.within(INT8), str(difference)


def test_an_8_bit_model_is_a_quarter_of_the_size(onnx_file, whole):
    assert len(whole.SerializeToString()) < 0.3 * onnx_file.stat().st_size


def test_the_symmetric_form_has_only_what_tensorrt_supports(whole):
    model = symmetric(whole)
    kinds = Counter(tensor.data_type for tensor in model.graph.initializer)
    assert not {onnx.TensorProto.UINT8, onnx.TensorProto.INT32} & set(kinds)
    graph = Graph(model)
    for node in model.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            zero_point = graph.constant(node.input[2])
            assert zero_point.dtype == np.int8 and not zero_point.any()
    onnx.checker.check_model(model, full_check=True)


def test_the_form_for_tensorrt_is_in_half_precision_between_integers(tmp_path, onnx_file, shapes):
    single = onnx.load(onnx_file)
    report, difference = write_int8(onnx_file, tmp_path / "int8.onnx", shapes / "train", limit=4, for_tensorrt=True)
    assert difference.within(INT8) and difference.detections > 10
    assert report.casts.text() in report.text()
    model = onnx.load(tmp_path / "int8.onnx")
    graph = Graph(model)
    kept = {name for names in report.casts.kept.values() for name in names}
    for node in model.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            scale = graph.value(node.input[1])
            is_input = node.op_type == "QuantizeLinear" and node.input[0] == "normalised"  # pixels, in FP32
            assert scale.dtype == (np.float32 if is_input else np.float16) and (scale > 0).all(), node.name
        if node.op_type in LAYERS and node.name not in kept:
            weight = producer(graph, node.input[1]) if node.input[1] in graph.producers else None
            assert weight is not None or graph.value(node.input[1]).dtype == np.float16, node.name
            if weight is not None:  # each weight is within half a step, which is exact in FP16
                steps = graph.value(weight.input[1]).astype(np.float64)
                shape = [-1 if k == weight.attribute[0].i else 1 for k in range(4 if "Conv" in node.op_type else 2)]
                exact = Graph(single).value(next(e for e in single.graph.node if e.name == node.name).input[1])
                error = np.abs(graph.value(weight.input[0]) * steps.reshape(shape) - exact)
                assert (error <= 0.51 * steps.reshape(shape) + 1e-3 * np.abs(exact)).all(), node.name
    assert lint(tensorrt_flavour(symmetric(model))).errors == []
    write_int8(onnx_file, tmp_path / "simulated.onnx", shapes / "train", limit=4, simulate=True)
    simulated = onnx.load(tmp_path / "simulated.onnx")
    scales = [Graph(simulated).value(n.input[1]) for n in simulated.graph.node if n.op_type == "DequantizeLinear"]
    assert all(scale.dtype == np.float32 and (scale == scale.astype(np.float16)).all() for scale in scales)
    rounded = [n for n in simulated.graph.node if n.op_type == "Cast" and n.attribute[0].i == onnx.TensorProto.FLOAT16]
    assert len(rounded) > len(kept) and read_model(tmp_path / "simulated.onnx")[1].precision == "int8"


def test_scales_smaller_than_those_of_half_precision_are_not_zero():
    weight = np.array([[1e-8, -2e-8], [0.5, 0.25]], np.float32)
    scale = np.abs(weight).max(axis=1) / np.float32(127)
    inputs = [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])]
    constants = {"q": np.rint(weight / scale[:, None]).astype(np.int8), "s": scale, "z": np.zeros(2, np.int8)}
    node = helper.make_node("DequantizeLinear", list(constants), ["w"], axis=0)
    tensors = [onnx.numpy_helper.from_array(value, name) for name, value in constants.items()]
    graph = helper.make_graph([node], "g", inputs, [helper.make_empty_tensor_value_info("w")], tensors)
    made = Graph(with_half_scales(helper.make_model(graph)))
    assert made.value("s").tolist() == [2.0**-24, np.float16(0.5 / 127)]
    assert made.value("q").tolist() == [[0, 0], [127, 64]]


def test_a_folder_without_images_is_an_error(tmp_path):
    with pytest.raises(UserError, match="no image in it"):
        images_in(tmp_path, 4)
    with pytest.raises(UserError, match="no folder"):
        images_in(tmp_path / "missing", 4)


def test_images_are_spread_over_the_folder(shapes):
    every = images_in(shapes / "train", 100)
    some = images_in(shapes / "train", 3)
    assert len(every) == 12
    assert some == [every[0], every[6], every[11]]

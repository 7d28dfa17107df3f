"""Half precision: which nodes, the difference in detections, and values beyond the range of FP16."""

from collections import Counter

import ml_dtypes
import numpy as np
import onnx
import pytest

from maskrcnn.export.graph import Graph, copy_of, tensor_types, with_shapes
from maskrcnn.export.passes.precision import RULE, simulate_half, to_half
from maskrcnn.export.passes.quantize import largest_magnitudes
from maskrcnn.runtime.backends.onnxruntime import OnnxRuntimeBackend
from maskrcnn.runtime.verification.compare import HALF
from maskrcnn.runtime.verification.inputs import compare_backends, validation_batches

FLOAT, FLOAT16, BFLOAT16 = onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16


@pytest.fixture(scope="module")
def half(proto):
    return to_half(proto, "fp16")


def types_of(model: onnx.ModelProto) -> dict[str, int]:
    """Element types of the main graph's tensors."""
    return {name: kind.elem_type for name, kind in tensor_types(with_shapes(model).graph).items()}


def test_layers_compute_in_half_and_coordinates_do_not(half):
    model, _ = half
    types = types_of(model)
    for node in model.graph.node:
        if node.op_type in ("Conv", "ConvTranspose", "Gemm"):
            assert {types[name] for name in (*node.input, *node.output)} == {FLOAT16}, node.name
        if node.op_type == "MultilevelRoiAlign":
            *features, rois = node.input
            assert {types[name] for name in features} == {FLOAT16} and types[rois] == FLOAT
        if node.op_type in ("Exp", "Sigmoid", "Softmax", "Div", "Clip"):
            assert FLOAT16 not in {types.get(name) for name in node.input}, node.name
        if node.op_type == "BatchedNms":
            assert types[node.input[0]] == FLOAT


def test_inputs_and_outputs_keep_their_types(proto, half):
    model, _ = half
    assert model.graph.input == proto.graph.input
    assert model.graph.output == proto.graph.output


def test_the_source_is_not_changed(onnx_file, proto):
    before = proto.SerializeToString()
    to_half(proto, "fp16")
    assert proto.SerializeToString() == before


def test_the_report_counts_every_layer_and_gives_reasons_for_the_others(proto, half):
    model, report = half
    counts = Counter(node.op_type for node in proto.graph.node)
    assert all(report.half[name] == counts[name] for name in ("Conv", "ConvTranspose", "Gemm", "Relu"))
    assert report.casts == Counter(n.op_type for n in model.graph.node)["Cast"] - counts["Cast"]
    assert list(report.kept) == [RULE] and "coordinates" in report.text()


def test_a_half_precision_file_is_half_as_large_and_detects_the_same(tmp_path, onnx_file, half):
    path = tmp_path / "model.fp16.onnx"
    onnx.save(half[0], path)
    assert path.stat().st_size < 0.55 * onnx_file.stat().st_size
    difference = compare_backends(OnnxRuntimeBackend(onnx_file), OnnxRuntimeBackend(path), HALF)
    assert difference.within(HALF) and difference.detections > 10
    assert difference.box_px > 0  # the arithmetic differs


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_the_simulation_rounds_every_layer(tmp_path, onnx_file, proto, precision):
    """Its stages contain only values of the half type, unlike those of the single-precision model."""
    simulated = tmp_path / "simulated.onnx"
    onnx.save(simulate_half(proto, precision), simulated)
    feeds = next(validation_batches(32))
    kind = {"fp16": np.float16, "bf16": ml_dtypes.bfloat16}[precision]
    names = ["P2", "P5", "box_features", "objectness_P3"]
    for path, is_rounded in ((simulated, True), (onnx_file, False)):
        for name, value in OnnxRuntimeBackend(path).stages(feeds, names).items():
            assert np.array_equal(value, value.astype(kind).astype(np.float32)) == is_rounded, name
    difference = compare_backends(OnnxRuntimeBackend(onnx_file), OnnxRuntimeBackend(simulated), HALF)
    assert difference.box_px > 0
    if precision == "fp16":
        assert difference.within(HALF), str(difference)


def scaled(proto: onnx.ModelProto, layer: str, factor: float, back: str | None = None) -> onnx.ModelProto:
    """The model with one layer's weights and bias multiplied, and the next one's weights divided."""
    model = copy_of(proto)
    graph = Graph(model)
    for name in (f"{layer}.weight", f"{layer}.bias"):
        graph.replace_constant(name, graph.constant(name) * np.float32(factor))
    if back:
        graph.replace_constant(f"{back}.weight", graph.constant(f"{back}.weight") / np.float32(factor))
    return model


FC6, FC7 = "roi_heads.box_head.fc6", "roi_heads.box_head.fc7"


def run(model: onnx.ModelProto, path) -> list[dict[str, np.ndarray]]:
    onnx.save(model, path)
    backend = OnnxRuntimeBackend(path)
    return [backend(feeds) for feeds in validation_batches(backend.metadata.preprocessing.divisor)]


def test_activations_beyond_fp16_stay_in_single_precision(tmp_path, proto):
    """ReLU preserves positive factors, so the scaled model has the same detections."""
    extreme = scaled(proto, FC6, 3e5, back=FC7)
    expected = run(proto, tmp_path / "fp32.onnx")
    blind = run(simulate_half(extreme, "fp16"), tmp_path / "blind.onnx")
    assert any(batch["num_detections"].any() for batch in expected)
    assert not any(batch["num_detections"].any() for batch in blind)  # all boxes are NaN

    largest = largest_magnitudes(extreme, validation_batches(32))
    careful, report = to_half(extreme, "fp16", largest=largest)
    kept = [name for reason, names in report.kept.items() if "range of FP16" in reason for name in names]
    assert {FC6, FC7} <= set(kept) and len(kept) < 8
    assert report.half["Conv"] == to_half(proto, "fp16")[1].half["Conv"]  # only the scaled layers
    assert all(FC6 not in name for name in types_of(careful) if name.endswith("_fp16"))
    simulated = simulate_half(extreme, "fp16", largest=largest)
    for a, b in zip(expected, run(simulated, tmp_path / "careful.onnx"), strict=True):
        assert all(np.isfinite(value).all() for value in b.values())
        assert np.abs(a["num_detections"] - b["num_detections"]).max() <= 1


def test_weights_beyond_fp16_stay_in_single_precision(proto):
    extreme = scaled(proto, "backbone.body.conv1", 1e6)
    _, report = to_half(extreme, "fp16")
    assert report.kept["weights beyond the range of FP16"] == ["backbone.body.conv1"]
    assert "backbone.body.conv1" in report.text()


def test_bfloat16_has_the_range_of_float32_and_needs_a_newer_opset(proto):
    extreme = scaled(proto, "backbone.body.conv1", 1e6)
    model, report = to_half(extreme, "bf16", largest={"normalised": 1e30})
    assert list(report.kept) == [RULE]
    assert next(entry.version for entry in model.opset_import if entry.domain == "") == 22
    assert types_of(model)["backbone.body.conv1.weight_bf16"] == BFLOAT16
    onnx.checker.check_model(model, full_check=True)


def test_largest_magnitudes_are_those_of_the_tensors(proto):
    feeds = next(validation_batches(32))
    observed = largest_magnitudes(proto, [feeds])
    mean, std = np.array([0.485, 0.456, 0.406]) * 255, np.array([0.229, 0.224, 0.225]) * 255
    height, width = feeds["image_sizes"][0]
    pixels = feeds["images"][0, :, :height, :width].transpose(1, 2, 0)
    assert observed["normalised"] == pytest.approx(np.abs((pixels - mean) / std).max(), rel=1e-5)
    assert 0 < observed["P2"] < 1e4

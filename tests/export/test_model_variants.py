"""Other backbones, necks and pooling methods: exported, in every precision, and for TensorRT."""

import numpy as np
import onnx
import pytest
from variants import EXPORTED

from maskrcnn.export.graph import op_counts
from maskrcnn.export.passes.precision import simulate_half, to_half
from maskrcnn.export.tensorrt.flavour import tensorrt_flavour
from maskrcnn.export.tensorrt.lint import lint
from maskrcnn.export.variants import write_half, write_int8
from maskrcnn.metadata import KEY, ModelMetadata
from maskrcnn.runtime.backends.onnxruntime import OnnxRuntimeBackend
from maskrcnn.runtime.backends.openvino import OpenVinoBackend
from maskrcnn.runtime.verification.compare import EXACT, HALF, INT8
from maskrcnn.runtime.verification.inputs import compare_backends, validation_batches
from maskrcnn.stages import LEVELS

QUICK = ("resnet_panet_pool",)  # exported in every run of the tests, the others with -m slow
VARIANTS = [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in EXPORTED]
POOLING = {"align": "maskrcnn::MultilevelRoiAlign", "pool": "maskrcnn::MultilevelRoiPool", "crop": "GridSample"}


@pytest.mark.parametrize("name", VARIANTS)
def test_the_file_agrees_with_pytorch(exported_variant, name):
    model, path, difference = exported_variant(name)
    assert difference.within(EXACT) and difference.detections > 10
    proto = onnx.load(path)
    counts = op_counts(proto)
    assert {method: counts[op] for method, op in POOLING.items()} == {
        method: 2 if method == model.config.pool_method else 0 for method in POOLING
    }
    functions = {function.name for function in proto.functions}
    assert functions == {op.partition("::")[2] for op in counts if op.startswith("maskrcnn::")}
    text = {entry.key: entry.value for entry in proto.metadata_props}[KEY]
    assert ModelMetadata.from_json(text, path).preprocessing == model.config.preprocessing
    layers = {node.name for node in proto.graph.node if node.op_type in ("Conv", "MatMul", "Gemm", "ConvTranspose")}
    assert {name.partition(".")[0] for name in layers} == {"backbone", "rpn", "roi_heads"}


@pytest.mark.parametrize("name", VARIANTS)
def test_the_flavour_has_no_findings_except_for_roi_pool(exported_variant, name):
    model, path, _ = exported_variant(name)
    for aot in (False, True):
        flavour = tensorrt_flavour(onnx.load(path), aot=aot)
        report = lint(flavour)
        assert report.warnings == []
        if model.config.pool_method == "pool":
            assert {(e.op, e.why) for e in report.errors} == {
                ("maskrcnn::MultilevelRoiPool", "has no plugin, and MaxRoiPool no importer")
            }
        else:
            assert report.errors == [], report.text()
    modes = [a.s for n in flavour.graph.node if n.op_type == "GridSample" for a in n.attribute if a.name == "mode"]
    assert modes == [b"bilinear"] * (2 if model.config.pool_method == "crop" else 0)


@pytest.mark.slow
def test_the_grid_sample_mode_linear_is_an_error(exported_variant):
    _, path, _ = exported_variant("vgg_fpn_crop")
    why = {finding.why for finding in lint(onnx.load(path)).errors if finding.op == "GridSample"}
    assert why == {"mode = linear; the parser supports nearest, bilinear, bicubic"}


@pytest.mark.parametrize("name", ["resnet_panet_pool", pytest.param("vgg_fpn_crop", marks=pytest.mark.slow)])
def test_openvino_agrees(exported_variant, name):
    _, path, _ = exported_variant(name)
    reference = OnnxRuntimeBackend(path, providers=["CPUExecutionProvider"])
    difference = compare_backends(reference, OpenVinoBackend(path), EXACT)
    assert difference.within(EXACT) and difference.detections > 10, str(difference)


@pytest.mark.parametrize("name", VARIANTS)
def test_every_layer_is_in_half_precision_and_normalisation_is_not(exported_variant, name, tmp_path):
    model, path, _ = exported_variant(name)
    proto = onnx.load(path)
    half, report = to_half(proto, "fp16")
    counts = op_counts(proto)
    for op in ("Conv", "MatMul", "Gelu", "HardSwish", "HardSigmoid", "Relu", POOLING["pool"]):
        assert report.half[op.rpartition("::")[2]] == counts[op], op
    assert report.half["Sigmoid"] == (8 if model.config.neck == "bifpn" else 0)  # only those of swish
    types = {v.name: v.type.tensor_type.elem_type for v in onnx.shape_inference.infer_shapes(half).graph.value_info}
    for node in half.graph.node:
        if node.op_type in ("GridSample", "LayerNormalization", "ReduceMean"):
            assert types[node.output[0]] == onnx.TensorProto.FLOAT, node.name


@pytest.mark.parametrize("name", VARIANTS)
def test_half_precision_changes_features_by_less_than_one_percent(exported_variant, name, tmp_path):
    _, path, _ = exported_variant(name)
    onnx.save(simulate_half(onnx.load(path), "fp16"), tmp_path / "half.onnx")
    feeds = next(validation_batches(32))
    single, half = (OnnxRuntimeBackend(p).stages(feeds, LEVELS) for p in (path, tmp_path / "half.onnx"))
    errors = {level: np.abs(single[level] - half[level]).mean() / single[level].std() for level in LEVELS}
    assert all(0 < error < 0.01 for error in errors.values()), errors


@pytest.mark.parametrize(
    ("name", "precision"),
    [
        ("resnet_panet_pool", "fp16"),
        ("resnet_panet_pool", "bf16"),
        pytest.param("convnext_panet_align", "fp16", marks=pytest.mark.slow),
    ],
)
def test_detections_in_half_precision(exported_variant, name, precision, tmp_path):
    _, path, _ = exported_variant(name)
    _, difference = write_half(path, tmp_path / "half.onnx", precision)
    assert difference.within(HALF) and difference.detections > 10


@pytest.mark.parametrize("name", ["resnet_panet_pool", pytest.param("convnext_panet_align", marks=pytest.mark.slow)])
def test_detections_with_8_bit_integers(exported_variant, name, shapes, tmp_path):
    _, path, _ = exported_variant(name)
    report, difference = write_int8(path, tmp_path / "int8.onnx", shapes / "train", limit=4)
    assert difference.within(INT8) and difference.detections > 10
    quantised = {node.name for node in onnx.load(tmp_path / "int8.onnx").graph.node if "dequantized" in node.input[0]}
    assert {f"backbone.fpn.{kind}_blocks.{k}.0" for kind in ("down", "fuse") for k in range(3)} <= quantised
    assert report.quantized["MatMul"] == (36 if name.startswith("convnext") else 0)

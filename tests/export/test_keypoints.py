"""Keypoints in exported files: the outputs, every precision, and the flavour for TensorRT."""

import numpy as np
import onnx
import onnxruntime
import pytest

from maskrcnn.data.images import images_in
from maskrcnn.export.exporter import OUTPUTS, check_graph
from maskrcnn.export.graph import copy_of, op_counts, tensor_types, with_shapes
from maskrcnn.export.inspection import inspect
from maskrcnn.export.passes.precision import simulate_half, to_half
from maskrcnn.export.passes.quantize import activation_ranges, feeds_from_files, symmetric, to_int8
from maskrcnn.export.tensorrt.flavour import tensorrt_flavour
from maskrcnn.export.tensorrt.lint import lint
from maskrcnn.runtime.backends.onnxruntime import OnnxRuntimeBackend
from maskrcnn.runtime.engine_files import read_model
from maskrcnn.runtime.verification.compare import HALF, INT8
from maskrcnn.runtime.verification.inputs import compare_backends

FLOAT, FLOAT16 = onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16
CPU = {"providers": ["CPUExecutionProvider"]}
# Operators that only the keypoint search in heat maps needs; TensorRT's support matrix lists them
# (export/tensorrt/operators.py).
SEARCH_OPS = {"Abs", "ArgMax", "Ceil", "Identity", "MatMul", "Reciprocal", "ReduceMax", "Round"}


@pytest.fixture(scope="module")
def proto(joint_onnx_file) -> onnx.ModelProto:
    return onnx.load(joint_onnx_file)


def feeds(batch: int, height: int, width: int, seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    sizes = np.array([[height - 9 * k, width - 5 * k] for k in range(batch)], np.int64)
    return {"images": rng.uniform(0, 255, (batch, 3, height, width)).astype(np.float32), "image_sizes": sizes}


def shapes_of(proto: onnx.ModelProto) -> dict[str, list]:
    return {v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in proto.graph.output}


def test_keypoints_are_an_output_with_or_without_masks(proto, pose_bands_file):
    assert list(shapes_of(proto)) == list(OUTPUTS)
    assert shapes_of(proto)["keypoints"] == ["N", 12, 5, 3]
    pose = onnx.load(pose_bands_file)
    assert list(shapes_of(pose)) == [name for name in OUTPUTS if name != "masks"]
    assert shapes_of(pose)["keypoints"] == ["N", 12, 5, 3]
    for each in (proto, pose):  # both heads share the rows and the pooled features
        counts = op_counts(each)
        assert counts["maskrcnn::MultilevelRoiAlign"] == 2 and counts["maskrcnn::LiveRows"] == 1


def test_the_keypoint_search_adds_only_operators_that_tensorrt_supports(proto, onnx_file, tmp_path):
    check_graph(proto, tmp_path / "x.onnx")
    assert set(op_counts(proto)) - set(op_counts(onnx.load(onnx_file))) <= SEARCH_OPS
    assert op_counts(proto)["MatMul"] == 2


def test_the_metadata_name_the_keypoints(joint_onnx_file, joint_model):
    metadata, config = read_model(joint_onnx_file)[1], joint_model.config
    assert metadata.has_keypoints and metadata.has_masks
    for name in ("keypoint_names", "keypoint_skeleton", "keypoint_sigmas"):
        assert getattr(metadata, name) == getattr(config, name)


@pytest.mark.parametrize("aot", [False, True])
def test_the_flavour_for_tensorrt_has_no_findings_and_all_rows(proto, pose_bands_file, aot):
    for original in (proto, onnx.load(pose_bands_file)):
        flavour = tensorrt_flavour(original, aot=aot)
        report = lint(flavour)
        assert not report.findings, report.text()
        assert shapes_of(flavour) == shapes_of(original)
        assert op_counts(flavour)["maskrcnn::LiveRows"] == 0


def test_the_flavour_detects_the_same(proto):
    flavour = copy_of(tensorrt_flavour(proto))
    flavour.functions.extend(proto.functions)
    data, names = feeds(2, 96, 128, seed=5), list(OUTPUTS)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    ours, theirs = (
        onnxruntime.InferenceSession(each.SerializeToString(), options, **CPU).run(names, data)
        for each in (flavour, proto)
    )
    assert ours[0].sum() > 5
    for name, mine, wanted in zip(names, ours, theirs, strict=True):
        np.testing.assert_allclose(mine, wanted, atol=1e-4, err_msg=name)


def test_in_half_precision_the_head_computes_and_the_search_does_not(proto, joint_onnx_file, tmp_path):
    model, report = to_half(proto)
    types = {name: kind.elem_type for name, kind in tensor_types(with_shapes(model).graph).items()}
    for node in model.graph.node:
        if node.name.startswith("roi_heads.keypoint_"):
            assert {types[name] for name in node.input} == {FLOAT16}, node.name
        if node.op_type in ("MatMul", "ArgMax", "ReduceMax", "Round", "Ceil"):
            assert {types[name] for name in node.input[:2]} <= {FLOAT, onnx.TensorProto.INT64}, node.name
    assert "MatMul" not in report.half and types["keypoints"] == FLOAT
    onnx.save(simulate_half(proto), tmp_path / "simulated.onnx")
    onnx.save(model, tmp_path / "half.onnx")
    for name in ("simulated", "half"):
        found = OnnxRuntimeBackend(tmp_path / f"{name}.onnx", **CPU)
        difference = compare_backends(OnnxRuntimeBackend(joint_onnx_file, **CPU), found, HALF)
        assert difference.within(HALF) and difference.keypoints.compared > 100, str(difference)
    assert not lint(tensorrt_flavour(model)).errors


def test_with_8_bit_integers_the_search_stays_in_single_precision(proto, joint_onnx_file, shapes, tmp_path):
    data = list(feeds_from_files(images_in(shapes / "train", 4), read_model(joint_onnx_file)[1]))
    model, report = to_int8(proto, activation_ranges(proto, data))
    assert "roi_heads.keypoint_predictor.kps_score_lowres" in report.kept  # like the other last layers
    assert "MatMul" not in report.quantized
    by_name = {node.output[0]: node.op_type for node in model.graph.node}
    head = next(node for node in model.graph.node if node.name == "roi_heads.keypoint_head.0")
    assert [by_name[name] for name in head.input[:2]] == ["DequantizeLinear"] * 2
    onnx.save(model, tmp_path / "int8.onnx")
    found, reference = (OnnxRuntimeBackend(path, **CPU) for path in (tmp_path / "int8.onnx", joint_onnx_file))
    difference = compare_backends(reference, found, INT8, data)
    assert difference.within(INT8) and difference.keypoints.compared > 50, str(difference)
    assert not lint(tensorrt_flavour(symmetric(model))).errors


def test_inspect_reports_keypoints_and_their_cost(joint_onnx_file, joint_model):
    report = inspect(joint_onnx_file, size_hw=(96, 128), with_placement=False)
    assert report.outputs["keypoints"] == "fp32 [N, 12, 5, 3]"
    assert "keypoints: 5 (head, left_hand, right_hand, left_foot, right_foot)" in report.text()
    head, last = joint_model.roi_heads.keypoint_head[0], joint_model.roi_heads.keypoint_predictor.kps_score_lowres
    convolutions = 12 * (14 * 14 * head.weight.numel() + 14 * 14 * last.weight.numel())
    search = 12 * 5 * (64 * 60 * 60 + 64 * 60 * 64)
    assert report.costs.macs["keypoint head"] == convolutions + search and not report.costs.uncounted

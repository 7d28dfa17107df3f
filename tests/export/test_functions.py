"""The ONNX functions in ONNX Runtime and in ONNX's reference evaluator, against the NumPy reference."""

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx.reference import ReferenceEvaluator

from maskrcnn.export import functions
from maskrcnn.plugins import contract, reference

OPSET = 20


def model_of(function: onnx.FunctionProto, op: contract.Op, inputs: dict, attributes: dict):
    """A model of one node of the custom op, with its function."""
    node = onnx.helper.make_node(
        op.name, list(inputs), [t.name for t in op.outputs], domain=contract.DOMAIN, **attributes
    )
    kinds = {
        "float32": onnx.TensorProto.FLOAT,
        "float": onnx.TensorProto.FLOAT,
        "int32": onnx.TensorProto.INT32,
        "int64": onnx.TensorProto.INT64,
    }
    graph = onnx.helper.make_graph(
        [node],
        op.name,
        [
            onnx.helper.make_tensor_value_info(name, kinds[str(value.dtype)], [None] * value.ndim)
            for name, value in inputs.items()
        ],
        [onnx.helper.make_tensor_value_info(t.name, kinds[t.dtype], [None] * len(t.shape)) for t in op.outputs],
    )
    return onnx.helper.make_model(
        graph,
        functions=[function],
        opset_imports=[
            onnx.helper.make_opsetid("", OPSET),
            onnx.helper.make_opsetid(contract.DOMAIN, contract.VERSION),
        ],
        ir_version=10,
    )


def run(model: onnx.ModelProto, inputs: dict, runtime: str) -> list[np.ndarray]:
    onnx.checker.check_model(model, full_check=True)
    if runtime == "onnx":
        return ReferenceEvaluator(model).run(None, inputs)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, inputs)


def roi_align_model(inputs: dict, *, output_size: int, sampling_ratio: int, aligned: bool):
    op = contract.MULTILEVEL_ROI_ALIGN
    attributes = {
        "output_size": output_size,
        "sampling_ratio": sampling_ratio,
        "aligned": int(aligned),
        "min_level": 2,
        "canonical_level": 4,
        "canonical_size": 224.0,
        "level_epsilon": 1e-6,
    }
    function = functions.multilevel_roi_align(len(inputs) - 1, aligned=aligned, min_level=2, opset=OPSET)
    return model_of(function, op, inputs, attributes)


def nms_model(inputs: dict, *, iou_threshold: float, max_output: int):
    attributes = {"iou_threshold": iou_threshold, "max_output": max_output}
    return model_of(functions.batched_nms(OPSET), contract.BATCHED_NMS, inputs, attributes)


@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize(
    ("batch", "count", "ratio", "runtime"),
    [
        *((batch, count, ratio, "onnxruntime") for batch, count in ((1, 30), (3, 7)) for ratio in (2, 0)),
        (2, 4, 2, "onnx"),  # onnx.reference treats a function attribute of 0 as missing
    ],
)
def test_roi_align_equals_the_reference(aligned, batch, count, ratio, runtime):
    rng = np.random.default_rng(0)
    inputs = {f"P{i + 2}": rng.normal(size=(batch, 3, 64 >> i, 48 >> i)).astype(np.float32) for i in range(4)}
    corners = rng.uniform(-20, 200, (batch, count, 2))
    rois = np.concatenate([corners, corners + np.exp(rng.uniform(0, 6.5, (batch, count, 2)))], axis=2)
    rois[0, 1], rois[0, 2, 2] = 0, rois[0, 2, 0]  # an unused row, and a RoI without width
    features = list(inputs.values())
    inputs["rois"] = rois.astype(np.float32)
    model = roi_align_model(inputs, output_size=5, sampling_ratio=ratio, aligned=aligned)
    pooled = run(model, inputs, runtime)[0]
    truth = reference.multilevel_roi_align(
        features, inputs["rois"], output_size=5, sampling_ratio=ratio, aligned=int(aligned)
    )
    np.testing.assert_allclose(pooled, truth, atol=1e-3)


@pytest.mark.parametrize("size", [7, 3])
@pytest.mark.parametrize(("batch", "count"), [(1, 40), (3, 9)])
def test_roi_pool_equals_the_reference(batch, count, size):
    """ONNX's reference evaluator has no MaxRoiPool."""
    rng = np.random.default_rng(3)
    inputs = {f"P{i + 2}": rng.normal(size=(batch, 3, 64 >> i, 48 >> i)).astype(np.float32) for i in range(4)}
    corners = rng.uniform(-20, 200, (batch, count, 2))
    rois = np.concatenate([corners, corners + np.exp(rng.uniform(0, 6.5, (batch, count, 2)))], axis=2)
    rois[:, 3:6] = np.round(rois[:, 3:6] / 4) * 4 + 2  # halves of a pixel, some of them negative
    rois[0, 1], rois[0, 2, 2] = 0, rois[0, 2, 0]  # an unused row, and a RoI without width
    features = list(inputs.values())
    inputs["rois"] = rois.astype(np.float32)
    levels = {"min_level": 2, "canonical_level": 4, "canonical_size": 224.0, "level_epsilon": 1e-6}
    function = functions.multilevel_roi_pool(4, min_level=2, opset=OPSET)
    model = model_of(function, contract.MULTILEVEL_ROI_POOL, inputs, {"pooled_shape": [size, size], **levels})
    pooled = run(model, inputs, "onnxruntime")[0]
    truth = reference.multilevel_roi_pool(features, inputs["rois"], pooled_shape=(size, size))
    np.testing.assert_array_equal(pooled, truth)


@pytest.mark.parametrize("runtime", ["onnxruntime", "onnx"])
@pytest.mark.parametrize("counts", [(0, 0), (1, 3), (5, 2)])
def test_live_rows_equal_the_reference(counts, runtime):
    rng = np.random.default_rng(1)
    inputs = {
        "boxes": rng.normal(size=(2, 5, 4)).astype(np.float32),
        "labels": rng.integers(0, 9, (2, 5)),
        "counts": np.array(counts, np.int32),
    }
    found = run(model_of(functions.live_rows(OPSET), contract.LIVE_ROWS, inputs, {}), inputs, runtime)
    truth = reference.live_rows(**inputs)
    assert found[0].shape == (2, max(1, *counts), 4)
    assert all(np.array_equal(a, b) for a, b in zip(found, truth, strict=True))


def test_roi_align_with_all_rois_at_one_level():
    inputs = {f"P{i + 2}": np.full((1, 1, 256 >> i, 256 >> i), float(i), np.float32) for i in range(4)}
    for side, level in ((10, 0), (120, 1), (300, 2), (600, 3)):
        inputs["rois"] = np.array([[[0, 0, side, side]] * 2], np.float32)
        model = roi_align_model(inputs, output_size=2, sampling_ratio=1, aligned=False)
        pooled = run(model, inputs, "onnxruntime")[0]
        assert pooled.shape == (1, 2, 1, 2, 2)
        assert pooled[0, 0, 0, 0, 0] == level


def nms_inputs(seed: int, batch: int = 3, count: int = 40) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    corners = rng.integers(0, 30, (batch, count, 2)).astype(np.float32)
    boxes = np.concatenate([corners, corners + rng.integers(0, 15, (batch, count, 2))], axis=2)
    return {
        "boxes": boxes.astype(np.float32),
        "groups": rng.integers(0, 4, (batch, count)).astype(np.int32),
        "counts": np.array([count, count // 2, 0][:batch], np.int32),
    }


@pytest.mark.parametrize("runtime", ["onnxruntime", "onnx"])
@pytest.mark.parametrize("max_output", [3, 40, 60])
@pytest.mark.parametrize("seed", range(3))
def test_nms_equals_the_reference(seed, max_output, runtime):
    inputs = nms_inputs(seed)
    model = nms_model(inputs, iou_threshold=0.4, max_output=max_output)
    indices, num = run(model, inputs, runtime)
    truth = reference.batched_nms(**inputs, iou_threshold=np.float32(0.4), max_output=max_output)
    np.testing.assert_array_equal(indices, truth[0])
    np.testing.assert_array_equal(num, truth[1])
    assert indices.dtype == num.dtype == np.int32


def test_functions_take_the_contracts_attributes_and_outputs():
    nms = functions.batched_nms(OPSET)
    assert list(nms.attribute) == list(contract.BATCHED_NMS.attributes)
    assert list(nms.input) == [t.name for t in contract.BATCHED_NMS.inputs]
    assert list(nms.output) == [t.name for t in contract.BATCHED_NMS.outputs]
    pool = functions.multilevel_roi_align(3, aligned=True, min_level=2, opset=OPSET)
    assert list(pool.attribute) == list(contract.MULTILEVEL_ROI_ALIGN.attributes)
    assert list(pool.input) == ["p0", "p1", "p2", "rois"]
    largest = functions.multilevel_roi_pool(2, min_level=2, opset=OPSET)
    assert list(largest.attribute) == list(contract.MULTILEVEL_ROI_POOL.attributes)
    assert list(largest.input) == ["p0", "p1", "rois"]


def test_op_names_are_not_standard_onnx_operators():
    standard = {schema.name for schema in onnx.defs.get_all_schemas() if schema.domain == ""}
    assert not standard & set(contract.OPS)

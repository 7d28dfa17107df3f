"""The exported file: its graph, its tensors, and its agreement with PyTorch."""

import numpy as np
import onnx
import pytest
import torch
from tiny import lively_model, tiny_config

from maskrcnn.errors import UserError
from maskrcnn.export import exporter
from maskrcnn.export.exporter import FORBIDDEN_OPS, OUTPUTS, check_graph, export_onnx
from maskrcnn.export.graph import op_counts
from maskrcnn.metadata import sha256_of
from maskrcnn.model.detector import MaskRCNN
from maskrcnn.plugins import contract
from maskrcnn.runtime.backends.onnxruntime import OnnxRuntimeBackend
from maskrcnn.runtime.backends.torch import TorchBackend
from maskrcnn.runtime.verification.compare import EXACT, compare_outputs

# Every operator that the main graph may hold. One that is new here must be checked against TensorRT's parser.
ALLOWED_OPS = {
    *("Add", "And", "Cast", "Clip", "Concat", "Conv", "ConvTranspose", "Div", "Exp", "Expand", "Floor"),
    *("Gather", "GatherElements", "GatherND", "Gemm", "Greater", "GreaterOrEqual", "Less", "LessOrEqual"),
    *(
        "MaxPool",
        "Min",
        "Mul",
        "Not",
        "Or",
        "Pad",
        "Range",
        "ReduceSum",
        "Relu",
        "Reshape",
        "Resize",
        "Shape",
    ),
    *("Sigmoid", "Slice", "Softmax", "Squeeze", "Sub", "TopK", "Transpose", "Unsqueeze", "Where"),
    *("maskrcnn::MultilevelRoiAlign", "maskrcnn::BatchedNms", "maskrcnn::LiveRows"),
}


@pytest.fixture(scope="module")
def proto(onnx_file) -> onnx.ModelProto:
    return onnx.load(onnx_file)


def test_the_main_graph_holds_only_operators_on_the_list(proto):
    counts = op_counts(proto)
    assert set(counts) <= ALLOWED_OPS
    assert counts["maskrcnn::MultilevelRoiAlign"] == counts["maskrcnn::BatchedNms"] == 2


def test_a_forbidden_operator_is_named(tmp_path, proto):
    bad = onnx.ModelProto()
    bad.CopyFrom(proto)
    bad.graph.node.append(onnx.helper.make_node("NonZero", ["images"], ["where"]))
    with pytest.raises(UserError, match="a main graph with NonZero"):
        check_graph(bad, tmp_path / "bad.onnx")
    assert not FORBIDDEN_OPS & ALLOWED_OPS


def test_inputs_and_outputs_follow_the_contract(proto):
    def tensors(values):
        return {
            v.name: (
                v.type.tensor_type.elem_type,
                [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim],
            )
            for v in values
        }

    kinds = onnx.TensorProto
    inputs = tensors(proto.graph.input)
    assert inputs["images"][0] == kinds.FLOAT
    assert inputs["images"][1][1] == 3
    assert all(isinstance(inputs["images"][1][axis], str) for axis in (0, 2, 3))
    assert inputs["image_sizes"] == (kinds.INT64, [inputs["images"][1][0], 2])
    batch = inputs["images"][1][0]
    assert tensors(proto.graph.output) == {
        "num_detections": (kinds.INT32, [batch]),
        "boxes": (kinds.FLOAT, [batch, 12, 4]),
        "scores": (kinds.FLOAT, [batch, 12]),
        "labels": (kinds.INT64, [batch, 12]),
        "masks": (kinds.FLOAT, [batch, 12, 28, 28]),
    }


def test_nodes_carry_exactly_the_contracts_attributes(proto):
    nodes = [node for node in proto.graph.node if node.domain == contract.DOMAIN]
    assert len(nodes) == 5
    for node in nodes:
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        op = contract.OPS[node.op_type]
        assert {name: type(value) for name, value in attributes.items()} == op.attributes
        assert len(node.output) == len(op.outputs)


def test_the_file_says_where_it_comes_from(onnx_file, checkpoint, model):
    metadata = OnnxRuntimeBackend(onnx_file).metadata
    assert metadata.class_names == model.config.class_names
    assert metadata.preprocessing == model.config.preprocessing
    assert metadata.source_sha256 == sha256_of(checkpoint)
    assert set(metadata.versions) == {"maskrcnn", "torch", "torchvision", "onnx"}


def feeds(batch: int, height: int, width: int, seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    sizes = np.stack([rng.integers(height // 2, height + 1, batch), rng.integers(width // 2, width + 1, batch)])
    return {
        "images": rng.uniform(0, 255, (batch, 3, height, width)).astype(np.float32),
        "image_sizes": sizes.T.astype(np.int64),
    }


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("size_hw", [(64, 96), (160, 128), (32, 32), (320, 224)])
def test_the_file_agrees_with_pytorch(onnx_file, model, batch, size_hw):
    data = feeds(batch, *size_hw, seed=batch)
    reference = TorchBackend(model, device="cpu")(data)
    difference = compare_outputs(reference, OnnxRuntimeBackend(onnx_file)(data), EXACT)
    assert difference.within(EXACT), str(difference)
    assert reference["num_detections"].sum() > 0


def test_version_2_exports_and_agrees(v2_onnx_file, v2_model):
    proto = onnx.load(v2_onnx_file)
    assert set(op_counts(proto)) <= ALLOWED_OPS
    assert [output.name for output in proto.graph.output] == [name for name in OUTPUTS if name != "keypoints"]
    data = feeds(2, 96, 128, seed=4)
    reference = TorchBackend(v2_model, device="cpu")(data)
    difference = compare_outputs(reference, OnnxRuntimeBackend(v2_onnx_file)(data), EXACT)
    assert difference.within(EXACT), str(difference)
    assert difference.detections > 10


def test_a_model_without_masks_exports_without_them(boxes_onnx_file, boxes_model):
    proto = onnx.load(boxes_onnx_file)
    assert [output.name for output in proto.graph.output] == ["num_detections", "boxes", "scores", "labels"]
    assert op_counts(proto)["maskrcnn::MultilevelRoiAlign"] == 1
    backend = OnnxRuntimeBackend(boxes_onnx_file)
    assert not backend.metadata.has_masks
    data = feeds(2, 96, 128, seed=4)
    reference = TorchBackend(boxes_model, device="cpu")(data)
    difference = compare_outputs(reference, backend(data), EXACT)
    assert difference.within(EXACT) and difference.mask is None and difference.detections > 0
    assert "masks" not in str(difference)


def test_unused_rows_are_zero(onnx_file):
    data = feeds(2, 96, 96, seed=1)
    data["image_sizes"][1] = 0  # an empty slot
    outputs = OnnxRuntimeBackend(onnx_file)(data)
    assert outputs["num_detections"][0] > 0
    assert outputs["num_detections"][1] == 0
    for name in ("boxes", "scores", "labels", "masks"):
        used = outputs["num_detections"][0]
        assert not outputs[name][0, used:].any()
        assert not outputs[name][1].any()


def test_what_stands_in_the_padding_does_not_matter(onnx_file):
    data = feeds(2, 96, 128, seed=3)
    data["image_sizes"][:] = [[70, 100], [96, 90]]
    zeroed = {name: value.copy() for name, value in data.items()}
    for image, (height, width) in zip(zeroed["images"], data["image_sizes"], strict=True):
        image[:, height:], image[:, :, width:] = 0, 0
    assert (zeroed["images"] != data["images"]).any()
    backend = OnnxRuntimeBackend(onnx_file)
    first, second = backend(data), backend(zeroed)
    assert first["num_detections"].min() > 0
    for name in first:
        np.testing.assert_array_equal(first[name], second[name])


def test_a_disagreeing_file_is_not_written(tmp_path, model, monkeypatch):
    original = exporter.functions.batched_nms

    def wrong(opset):
        function = original(opset)
        node = next(n for n in function.node if n.op_type == "TopK")
        next(a for a in node.attribute if a.name == "largest").i = 1
        return function

    monkeypatch.setattr(exporter.functions, "batched_nms", wrong)
    with pytest.raises(UserError, match="disagrees with PyTorch"):
        export_onnx(model, tmp_path / "out" / "model.onnx")
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("name", ["roi_heads.mask_predictor.mask_fcn_logits.bias", "backbone.body.conv1.weight"])
def test_nan_weights_are_refused(tmp_path, name):
    model = lively_model(tiny_config())
    with torch.no_grad():
        model.state_dict()[name].flatten()[0] = torch.nan
    with pytest.raises(UserError, match=rf"weights with NaN or infinity: 1 tensor\(s\), first {name}"):
        export_onnx(model, tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


def test_a_model_without_classes_is_refused(tmp_path):
    with pytest.raises(UserError, match="a model without classes"):
        export_onnx(MaskRCNN(tiny_config(class_names=(), category_ids=())), tmp_path / "none.onnx")
    assert not list(tmp_path.iterdir())

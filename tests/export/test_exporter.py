"""The exported file: its graph, its tensors, and its agreement with PyTorch."""

import numpy as np
import onnx
import pytest
import torch
from tiny import lively_model, tiny_config

from maskrcnn.errors import UserError
from maskrcnn.export import exporter
from maskrcnn.export.exporter import OUTPUTS, check_graph, export_onnx
from maskrcnn.export.graph import op_counts
from maskrcnn.metadata import sha256_of
from maskrcnn.model.detector import MaskRCNN
from maskrcnn.plugins import contract
from maskrcnn.runtime.backends.onnxruntime import OnnxRuntimeBackend
from maskrcnn.runtime.backends.torch import TorchBackend
from maskrcnn.runtime.verification.compare import EXACT, compare_outputs

# Operators allowed in the main graph. Before adding one, check that TensorRT's parser supports it.
ALLOWED_OPS = {
    *("Add", "And", "Cast", "Clip", "Concat", "Conv", "ConvTranspose", "Div", "Exp", "Expand", "Floor"),
    *("Gather", "GatherElements", "GatherND", "Gemm", "Greater", "GreaterOrEqual", "Less", "LessOrEqual"),
    *("MaxPool", "Min", "Mul", "Not", "Or", "Pad", "Range", "ReduceSum", "Relu", "Reshape", "Resize", "Shape"),
    *("Sigmoid", "Slice", "Softmax", "Squeeze", "Sub", "TopK", "Transpose", "Unsqueeze", "Where"),
    *("maskrcnn::MultilevelRoiAlign", "maskrcnn::BatchedNms", "maskrcnn::LiveRows"),
}


def test_the_main_graph_has_only_allowed_operators(proto):
    counts = op_counts(proto)
    assert set(counts) <= ALLOWED_OPS
    assert counts["maskrcnn::MultilevelRoiAlign"] == counts["maskrcnn::BatchedNms"] == 2


def test_a_forbidden_operator_is_named(tmp_path, proto):
    bad = onnx.ModelProto()
    bad.CopyFrom(proto)
    bad.graph.node.append(onnx.helper.make_node("NonZero", ["images"], ["where"]))
    with pytest.raises(UserError, match="a main graph with NonZero"):
        check_graph(bad, tmp_path / "bad.onnx")


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


def test_nodes_have_exactly_the_attributes_of_the_contract(proto):
    nodes = [node for node in proto.graph.node if node.domain == contract.DOMAIN]
    assert len(nodes) == 5
    for node in nodes:
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        op = contract.OPS[node.op_type]
        assert {name: type(value) for name, value in attributes.items()} == op.attributes
        assert len(node.output) == len(op.outputs)


def test_the_metadata_record_the_checkpoint_and_versions(onnx_file, checkpoint, model):
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


@pytest.mark.parametrize(("batch", "size_hw"), [(1, (64, 96)), (3, (160, 128)), (2, (32, 32)), (1, (320, 224))])
@pytest.mark.parametrize("kind", ["", "v2_", "boxes_", "joint_"], ids=["v1", "v2", "boxes", "keypoints"])
def test_the_file_agrees_with_pytorch(request, kind, batch, size_hw):
    model, path = (request.getfixturevalue(f"{kind}{name}") for name in ("model", "onnx_file"))
    data = feeds(batch, *size_hw, seed=batch)
    reference, backend = TorchBackend(model, device="cpu")(data), OnnxRuntimeBackend(path)
    difference = compare_outputs(reference, backend(data), EXACT)
    assert difference.within(EXACT), str(difference)
    assert reference["num_detections"].sum() > 0
    assert backend.metadata.has_masks == (kind != "boxes_") == ("masks" in str(difference))
    assert backend.metadata.has_keypoints == (kind == "joint_") == ("keypoints" in str(difference))
    assert kind != "joint_" or difference.keypoints.compared >= 5 * difference.detections


def test_version_2_has_the_same_operators_and_outputs(v2_onnx_file):
    proto = onnx.load(v2_onnx_file)
    assert set(op_counts(proto)) <= ALLOWED_OPS
    assert [output.name for output in proto.graph.output] == [name for name in OUTPUTS if name != "keypoints"]


def test_a_model_without_masks_exports_without_them(boxes_onnx_file):
    proto = onnx.load(boxes_onnx_file)
    assert [output.name for output in proto.graph.output] == ["num_detections", "boxes", "scores", "labels"]
    assert op_counts(proto)["maskrcnn::MultilevelRoiAlign"] == 1


def test_the_op_schemas_are_registered_during_the_export_only(onnx_file):
    """A registered schema would replace the types that the functions of the file give."""
    assert not onnx.defs.has("BatchedNms", domain=contract.DOMAIN)


@pytest.mark.parametrize("kind", ["", "joint_"], ids=["masks", "keypoints"])
def test_unused_rows_are_zero(request, kind):
    data = feeds(2, 96, 96, seed=1)
    data["image_sizes"][1] = 0  # an empty slot of the batch
    outputs = OnnxRuntimeBackend(request.getfixturevalue(f"{kind}onnx_file"))(data)
    used = outputs.pop("num_detections")
    assert used[0] > 0 and used[1] == 0
    assert kind != "joint_" or outputs["keypoints"][0, : used[0]].all()
    for name, value in outputs.items():
        assert not value[0, used[0] :].any() and not value[1].any(), name


def test_pixels_in_the_padding_have_no_effect(onnx_file):
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


def test_a_file_that_disagrees_with_pytorch_is_not_written(tmp_path, model, monkeypatch):
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

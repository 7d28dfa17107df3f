"""Readable names in exported files, folded norms, and no paths of the exporting machine."""

from pathlib import Path

import onnx
import torch

import maskrcnn
from maskrcnn.export.graph import Graph, op_counts
from maskrcnn.stages import OF_KEYPOINTS, OF_MASKS, STAGES


def test_no_path_of_the_exporting_machine_is_in_the_file(onnx_file):
    proto = onnx.load(onnx_file)
    written = proto.SerializeToString()
    for folder in (Path(maskrcnn.__file__).parent, Path(torch.__file__).parent, Path.home()):
        assert str(folder).encode() not in written
    assert [prop.key for prop in proto.metadata_props] == ["maskrcnn"]


def test_layers_and_weights_have_their_names_in_the_checkpoint(onnx_file, model):
    graph = Graph(onnx.load(onnx_file))
    weights = {name for name in model.state_dict() if name.endswith("conv1.weight") or "fc" in name}
    assert weights <= set(graph.constants)
    names = [node.name for node in graph.graph.node if node.op_type == "Conv"]
    assert "backbone.body.layer3.0.downsample.0" in names
    assert [name for name in names if name.startswith("rpn.head.cls_logits")] == [
        "rpn.head.cls_logits",
        *(f"rpn.head.cls_logits#{k}" for k in range(2, 6)),
    ]
    assert len(names) == len(set(names))


def test_every_stage_is_a_value_of_the_graph(onnx_file, boxes_onnx_file, joint_onnx_file):
    neither = (*OF_MASKS, *OF_KEYPOINTS)
    for path, missing in ((onnx_file, OF_KEYPOINTS), (boxes_onnx_file, neither), (joint_onnx_file, ())):
        made = {name for node in onnx.load(path).graph.node for name in node.output}
        assert set(STAGES) - made == set(missing)


def test_frozen_norms_are_folded_into_convolutions(pose_bands_file):
    proto = onnx.load(pose_bands_file)
    graph = Graph(proto)
    stem = next(node for node in graph.graph.node if node.name == "backbone.body.conv1")
    assert list(stem.input[1:]) == ["backbone.body.conv1.weight", "backbone.body.conv1.bias"]
    assert graph.only_consumer(stem.output[0]).op_type == "Relu"
    assert op_counts(proto)["BatchNormalization"] == 0

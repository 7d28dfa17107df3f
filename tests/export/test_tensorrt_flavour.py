"""The flavour for TensorRT's parser: same detections, no functions, nodes that name their plugins."""

import numpy as np
import onnx
import onnxruntime
import pytest
import two_step_nms

from maskrcnn.errors import UserError
from maskrcnn.export.graph import constants_of, copy_of, op_counts, tensor_types
from maskrcnn.export.tensorrt.flavour import PLUGIN_ATTRIBUTES, tensorrt_flavour
from maskrcnn.plugins import contract
from maskrcnn.stages import STAGES


@pytest.fixture(scope="module")
def flavour(proto) -> onnx.ModelProto:
    return tensorrt_flavour(proto)


def session(proto: onnx.ModelProto) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])


def with_functions(flavour: onnx.ModelProto, original: onnx.ModelProto) -> onnx.ModelProto:
    """A model that ONNX Runtime can run: the flavour's graph with the original's functions instead of plugins."""
    runnable = copy_of(flavour)
    runnable.functions.extend(original.functions)
    if "maskrcnn::BatchedNmsKeep" in op_counts(flavour):
        runnable.functions.extend(two_step_nms.functions(original.opset_import[0].version))
    onnx.checker.check_model(runnable, full_check=True)
    return runnable


def assert_same_outputs(original: onnx.ModelProto, flavour: onnx.ModelProto, batch: int, size_hw: tuple[int, int]):
    rng = np.random.default_rng(batch)
    feeds = {
        "images": rng.uniform(0, 255, (batch, 3, *size_hw)).astype(np.float32),
        "image_sizes": np.array([[size_hw[0] - 7 * k, size_hw[1]] for k in range(batch)]),
    }
    names = [output.name for output in original.graph.output]
    ours, theirs = (session(p).run(names, feeds) for p in (with_functions(flavour, original), original))
    for name, mine, wanted in zip(names, ours, theirs, strict=True):
        np.testing.assert_array_equal(mine, wanted, err_msg=name)
    return dict(zip(names, ours, strict=True))


@pytest.mark.parametrize(("batch", "size_hw"), [(1, (64, 96)), (3, (160, 128)), (2, (32, 32)), (1, (320, 224))])
def test_the_flavour_detects_the_same(proto, flavour, batch, size_hw):
    outputs = assert_same_outputs(proto, flavour, batch, size_hw)
    assert outputs["num_detections"].sum() > 0


@pytest.mark.parametrize(("batch", "size_hw"), [(1, (64, 96)), (3, (160, 128))])
def test_nms_in_two_nodes_detects_the_same(proto, batch, size_hw):
    flavour = tensorrt_flavour(proto, aot=True)
    before, after = op_counts(proto), op_counts(flavour)
    assert after["maskrcnn::BatchedNms"] == 0
    steps = ("maskrcnn::BatchedNmsKeep", "maskrcnn::BatchedNmsCompact")
    assert [after[step] for step in steps] == [before["maskrcnn::BatchedNms"]] * 2
    outputs = assert_same_outputs(proto, flavour, batch, size_hw)
    assert outputs["num_detections"].sum() > 0


def test_both_nodes_of_nms_have_the_attributes_and_shapes_of_batched_nms(proto):
    whole = {n.output[0]: n for n in proto.graph.node if n.op_type == "BatchedNms"}
    flavour = tensorrt_flavour(proto, aot=True)
    known, made = tensor_types(flavour.graph), {o: n for n in flavour.graph.node for o in n.output}
    for name, nms in whole.items():
        compact = made[name]
        keep = made[compact.input[0]]
        assert list(keep.input) == list(nms.input) and list(compact.output) == list(nms.output)
        assert keep.name != compact.name == nms.name
        assert known[keep.output[0]] == known[nms.input[1]]  # both are int32 [N, K]
        assert known[keep.output[0]].elem_type == onnx.TensorProto.INT32
        for node in (keep, compact):
            values = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
            wanted = {a.name: onnx.helper.get_attribute_value(a) for a in nms.attribute}
            assert all(values[name] == wanted[name] for name in contract.AOT_OPS[node.op_type].attributes)


def test_a_model_without_masks_has_a_flavour(boxes_onnx_file):
    proto = onnx.load(boxes_onnx_file)
    assert "masks" not in assert_same_outputs(proto, tensorrt_flavour(proto, aot=True), 2, (96, 128))


def test_the_original_is_not_changed(proto):
    before = proto.SerializeToString(deterministic=True)
    tensorrt_flavour(proto, aot=True)
    assert proto.SerializeToString(deterministic=True) == before


@pytest.mark.parametrize("aot", [False, True])
def test_nodes_name_their_plugins(proto, aot):
    flavour = tensorrt_flavour(proto, aot=aot)
    assert not flavour.functions
    nodes = [node for node in flavour.graph.node if node.domain == contract.DOMAIN]
    nms = {"BatchedNmsKeep", "BatchedNmsCompact"} if aot else {"BatchedNms"}
    assert {node.op_type for node in nodes} == {"MultilevelRoiAlign"} | nms
    for node in nodes:
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        wanted = {"plugin_namespace": b"maskrcnn", "plugin_version": b"1", **({"aot": 1} if aot else {})}
        assert {k: v for k, v in attributes.items() if k in PLUGIN_ATTRIBUTES} == wanted
        assert attributes.keys() - wanted.keys() == contract.ALL_OPS[node.op_type].attributes.keys()
    assert any(entry.domain == contract.DOMAIN for entry in flavour.opset_import)


@pytest.mark.parametrize("aot", [False, True])
def test_the_flavour_of_a_flavour_is_the_same(proto, aot):
    flavour = tensorrt_flavour(proto, aot=aot)
    again = tensorrt_flavour(flavour, aot=aot)
    assert [(n.op_type, list(n.attribute)) for n in again.graph.node] == [
        (n.op_type, list(n.attribute)) for n in flavour.graph.node
    ]


def test_all_rows_get_a_mask_and_nothing_is_padded_back(proto, flavour):
    before, after = op_counts(proto), op_counts(flavour)
    assert before["maskrcnn::LiveRows"] == 1 and after["maskrcnn::LiveRows"] == 0
    of_groups = sum(node.op_type == "Pad" and node.input[1].endswith("_pads") for node in flavour.graph.node)
    assert after["Pad"] == before["Pad"] - 1 + of_groups
    known = tensor_types(flavour.graph)
    assert [d.dim_value for d in known["mask_features"].shape.dim][1:] == [12, 16, 14, 14]
    assert [d.dim_value for d in known["mask_logits"].shape.dim][1:] == [12, 28, 28]


def test_every_tensor_has_a_type_and_sizes_are_constants(flavour):
    known, constants = tensor_types(flavour.graph), constants_of(flavour.graph)
    made = [name for node in flavour.graph.node for name in node.output]
    assert [name for name in made if name not in known] == []
    sized = [node.input[1] for node in flavour.graph.node if node.op_type in ("TopK", "Pad")]
    fixed = [name for name in sized if not name.endswith("_pads")]  # groups of an axis whose length is the image's
    assert len(fixed) >= 13 and all(name in constants for name in fixed)
    assert op_counts(flavour)["Constant"] == 0


def test_names_and_metadata_are_kept(proto, flavour):
    def names(model):
        return {name for node in model.graph.node for name in node.output} & set(STAGES)

    assert names(flavour) == names(proto) >= {"P2", "proposals", "class_logits", "mask_logits"}
    assert list(flavour.metadata_props) == list(proto.metadata_props)
    assert [v.name for v in flavour.graph.output] == [v.name for v in proto.graph.output]


def test_integer_clips_become_minimum_and_maximum():
    text = """<ir_version: 10, opset_import: ["": 20]>
    clips (int64[5] x, int64 low, int64 high, float[5] f, float top) =>
        (int64[5] both, int64[5] above, int64[5] below, int64[5] neither, float[5] g)
    {
        both = Clip(x, low, high)
        above = Clip(x, low)
        below = Clip(x, , high)
        neither = Clip(x)
        g = Clip(f, , top)
    }"""
    proto = onnx.parser.parse_model(text)
    flavour = tensorrt_flavour(proto)
    assert op_counts(flavour) == {"Max": 2, "Min": 2, "Identity": 1, "Clip": 1}
    feeds = {
        "x": np.arange(-2, 3),
        "low": np.array(-1),
        "high": np.array(1),
        "f": np.arange(5, dtype=np.float32),
        "top": np.array(2, np.float32),
    }
    for mine, wanted in zip(session(flavour).run(None, feeds), session(proto).run(None, feeds), strict=True):
        np.testing.assert_array_equal(mine, wanted)


def test_functions_without_a_plugin_are_refused(proto):
    other = copy_of(proto)
    other.functions[0].name = "Swirl"
    with pytest.raises(UserError, match=r"the function\(s\) Swirl"):
        tensorrt_flavour(other)


@pytest.mark.parametrize("length", [45, 400, 403])
def test_topk_over_a_long_axis_is_grouped_and_keeps_the_order_of_ties(length):
    proto = onnx.parser.parse_model(
        f'<ir_version: 9, opset_import: ["" : 20]> g (float[N,{length}] x) => (float[N,5] values, int64[N,5] index) '
        "<int64[1] k = {5}> { values, index = TopK(x, k) }"
    )
    grouped = tensorrt_flavour(proto)
    assert op_counts(grouped)["TopK"] == 2
    rows = np.random.default_rng(0).integers(0, 9, (200, length)).astype(np.float32)
    rows[0] = 0.0
    rows[1] = np.arange(length)
    for found, wanted in zip(
        session(grouped).run(None, {"x": rows}), session(proto).run(None, {"x": rows}), strict=True
    ):
        np.testing.assert_array_equal(found, wanted)


def test_topk_over_a_short_axis_stays_one():
    proto = onnx.parser.parse_model(
        '<ir_version: 9, opset_import: ["" : 20]> g (float[N,30] x) => (float[N,5] values, int64[N,5] index) '
        "<int64[1] k = {5}> { values, index = TopK(x, k) }"
    )
    assert op_counts(tensorrt_flavour(proto))["TopK"] == 1

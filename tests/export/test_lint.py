"""The lint: every rule on a graph that violates it, exported files without findings, torchvision's export with."""

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from peers import export_legacy, torchvision_from_config
from tiny import tiny_config
from typer.testing import CliRunner

from maskrcnn.cli import app
from maskrcnn.export.tensorrt import operators as table
from maskrcnn.export.tensorrt.flavour import tensorrt_flavour
from maskrcnn.export.tensorrt.lint import LintReport, lint
from maskrcnn.export.tensorrt.lint_rules import Origin, origins_of
from maskrcnn.plugins import contract

HEAD = '<ir_version: 10, opset_import: ["": 20, "maskrcnn": 1, "other": 1]>'


def parsed(body: str) -> onnx.ModelProto:
    return onnx.parser.parse_model(f"{HEAD} g {body}")


# Graph, operator and the beginning of the reason.
ERRORS = {
    "no importer": ("(float[4] x) => (float[n] y) { y = Unique(x) }", "Unique", "no importer"),
    "unknown here": (
        "(float[1,2,3,3] x) => (float[1,2,3,3] y) { y = LpPooling(x) }",
        "LpPooling",
        "no importer: not listed in",
    ),
    "type": ("(int32[4] x) => (int32[4] y) { y = Neg(x) z = Sqrt(x) }", "Sqrt", "type INT32; the parser supports"),
    "type of a cast": ("(float[4] x) => (int8[4] y) { y = Cast<to = 3>(x) }", "Cast", "type INT8; the parser supports"),
    "bool range": ("(bool[4] x) => (bool[n] y) { y, i = TopK(x, k) }", "TopK", "type BOOL"),
    "attribute": (
        "(float[1,1,4,4] x) => (float[1,1,2,2] y) { y = MaxPool<kernel_shape = [2, 2], dilations = [2, 1]>(x) }",
        "MaxPool",
        "dilations = [2, 1]; the parser supports 1",
    ),
    "indices": (
        "(float[1,1,4,4] x) => (float[1,1,2,2] y) { y, i = MaxPool<kernel_shape = [2, 2]>(x) }",
        "MaxPool",
        "more than 1 output",
    ),
    "pooling in one dimension": (
        "(float[1,1,4] x) => (float[1,1,2] y) { y = MaxPool<kernel_shape = [2]>(x) }",
        "MaxPool",
        "an input of 3 axes",
    ),
    "resize mode": (
        '(float[1,1,4,4] x) => (float[1,1,8,8] y) <float[4] s = {1.0, 1.0, 2.0, 2.0}> { y = Resize<mode = "linear", '
        'coordinate_transformation_mode = "half_pixel_symmetric">(x, , s) }',
        "Resize",
        "coordinate_transformation_mode = half_pixel_symmetric; the parser supports half_pixel,",
    ),
    "antialias": (
        "(float[1,1,4,4] x) => (float[1,1,8,8] y) <float[4] s = {1.0, 1.0, 2.0, 2.0}> "
        '{ y = Resize<mode = "linear", antialias = 1>(x, , s) }',
        "Resize",
        "antialias = 1",
    ),
    "unsorted": ("(float[9] x) => (float[3] y) <int64[1] k = {3}> { y, i = TopK<sorted = 0>(x, k) }", "TopK", "sorted"),
    "large K": (
        "(float[9999] x) => (float[4000] y) <int64[1] k = {4000}> { y, i = TopK(x, k) }",
        "TopK",
        "K = 4000; it must be below 3840",
    ),
    "scatter": (
        '(float[4] x, int64[1,1] i, float[1] u) => (float[4] y) { y = ScatterND<reduction = "add">(x, i, u) }',
        "ScatterND",
        "reduction = add; the parser supports none",
    ),
    "computed reduction axes": (
        "(float[2,3] x) => (float[2] y) <int64[1] a = {0}> { one = Constant<value_ints = [1]>() b = Add(a, one) "
        "y = ReduceSum<keepdims = 0>(x, b) }",
        "ReduceSum",
        "axes is computed in the graph",
    ),
    "axes from a shape": (
        "(float[n,1] x) => (float[n] y) { s = Shape<start = 0, end = 1>(x) y = Squeeze(x, s) }",
        "Squeeze",
        "axes is computed in the graph",
    ),
    "no axes": ("(float[n,1] x) => (float[n] y) { y = Squeeze(x) }", "Squeeze", "no axes, and an input of dynamic"),
    "zero point": (
        "(float[4] x) => (float[4] y) <float s = {0.5}, int8 z = {3}> { q = QuantizeLinear(x, s, z) "
        "y = DequantizeLinear(q, s, z) }",
        "QuantizeLinear",
        "a zero point that is not 0",
    ),
    "sparse constant": (
        '() => (string[1] y) { y = Constant<value_strings = ["a"]>() }',
        "Constant",
        "attribute value_st",
    ),
    "bytes in between": (
        "(uint8[4] x) => (float[4] y) { z = Identity(x) y = Cast<to = 1>(z) }",
        "Identity",
        "an intermediate tensor of type UINT8",
    ),
    "integers divided as floats": (
        "(int64[4] x) => (int64[4] y) <float c = {80.0}> { a = Cast<to = 1>(x) b = Div(a, c) f = Floor(b) "
        "y = Cast<to = 7>(f) }",
        "Floor",
        "the quotient of whole numbers, rounded down after a division in floating point",
    ),
    "other domain": ("(float[4] x) => (float[4] y) { y = other.Swirl(x) }", "other::Swirl", "no importer: a plugin"),
    "name of an ONNX op": (
        "(float[4] x) => (float[4] y) { y = maskrcnn.RoiAlign(x) }",
        "maskrcnn::RoiAlign",
        "a plugin with the name of ONNX's RoiAlign",
    ),
    "not in the contract": (
        "(float[4] x) => (float[4] y) { y = maskrcnn.Swirl(x) }",
        "maskrcnn::Swirl",
        "not in the con",
    ),
    "live rows": (
        "(float[1,4,4] b, int64[1,4] l, int32[1] c) => (float[1,n,4] y) { y, z = maskrcnn.LiveRows(b, l, c) }",
        "maskrcnn::LiveRows",
        "has no plugin",
    ),
}
WARNINGS = {
    "rows by value": (
        "(float[4] x) => (int64[1,n] y) { y = NonZero(x) }",
        "NonZero",
        "a data-dependent shape: the number of output rows",
    ),
    "nms": (
        "(float[1,4,4] b, float[1,1,4] s) => (int64[n,3] y) { y = NonMaxSuppression(b, s) }",
        "NonMaxSuppression",
        "a data-dependent shape: the number of output rows",
    ),
    "slice by value": (
        "(float[8] x) => (float[n] y) <int64[1] zero = {0}> { m, i = TopK(x, k) y = Slice(x, zero, i) }",
        "Slice",
        "a data-dependent shape: the size of the output",
    ),
    "range by value": (
        "(float[8] x) => (int64[n] y) <int64 zero = {0}, int64 one = {1}> { m = ArgMax<keepdims = 0>(x) "
        "y = Range(zero, m, one) }",
        "Range",
        "a data-dependent shape: the size of the output",
    ),
    "range by an input": (
        "(int64 m) => (int64[n] y) <int64 zero = {0}, int64 one = {1}> { y = Range(zero, m, one) }",
        "Range",
        "the size of the output depends on the values of an input",
    ),
    "dynamic K": (
        "(float[n] x) => (float[n] y) { k = Shape(x) y, i = TopK(x, k) }",
        "TopK",
        "K is not a constant",
    ),
    "double": ("(double[4] x) => (double[4] y) { y = Sqrt(x) }", "Sqrt", "DOUBLE becomes FLOAT"),
    "integer clip": ("(int64[4] x, int64 m) => (int64[4] y) { y = Clip(x, m) }", "Clip", "INT64 is supported by some"),
    "other domain": (
        "(float[4] x) => (float[4] y) { y = other.Relu(x) }",
        "other::Relu",
        "the parser ignores the domain",
    ),
    "their plugin": (
        "(float[4] x) => (float[4] y) { y = other.EfficientNMS_TRT(x) }",
        "other::EfficientNMS_TRT",
        "a TensorRT operator",
    ),
}


def described(findings, op: str) -> list[str]:
    return [finding.why for finding in findings if finding.op == op]


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name):
    body, op, why = ERRORS[name]
    assert any(text.startswith(why) for text in described(lint(parsed(body)).errors, op))


@pytest.mark.parametrize("name", WARNINGS)
def test_warnings(name):
    body, op, why = WARNINGS[name]
    report = lint(parsed(body))
    assert any(text.startswith(why) for text in described(report.warnings, op))
    assert not report.errors


@pytest.mark.parametrize(
    "body",
    [
        "(float[n,8] x) => (float[n,3] y) <int64[1] k = {3}> { y, i = TopK(x, k) }",
        "(float[n,8] x) => (float[n,8] y) { s = Shape(x) z = ConstantOfShape(s) y = Add(x, z) }",
        "(float[n,1] x) => (float[n] y) <int64[1] a = {1}> { y = Squeeze(x, a) }",
        "(float[2,1] x) => (float[2] y) { y = Squeeze(x) }",  # static shape
        "(uint8[4] x) => (float[4] y) { y = Cast<to = 1>(x) }",
        "(float[4] x) => (float[4] y) <float s = {0.5}, int8 z = {0}> { q = QuantizeLinear(x, s, z) "
        "y = DequantizeLinear(q, s, z) }",
        "(float[2,3] x) => (float[2] y) <int64[1] a = {1}> { y = ReduceSum<keepdims = 0>(x, a) }",
        "(float[n,3] x, bool[n,3] c) => (float[n,3] y) <float zero = {0.0}> { y = Where(c, x, zero) }",
    ],
)
def test_supported_graphs_have_no_findings(body):
    assert lint(parsed(body)).findings == ()


# Control flow


def branch(name: str, shape: list[int], value: float = 0.0) -> onnx.GraphProto:
    tensor = helper.make_tensor("value", TensorProto.FLOAT, shape, [value] * int(np.prod(shape)))
    node = helper.make_node("Constant", [], [name], value=tensor)
    return helper.make_graph([node], name, [], [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)])


def branching(then: onnx.GraphProto, other: onnx.GraphProto) -> onnx.ModelProto:
    node = helper.make_node("If", ["c"], ["y"], name="choice", then_branch=then, else_branch=other)
    condition = helper.make_tensor_value_info("c", TensorProto.BOOL, [])
    graph = helper.make_graph([node], "g", [condition], [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def test_branches_of_different_rank_are_an_error():
    report = lint(branching(branch("a", [2]), branch("b", [2, 1])))
    (error,) = report.errors
    assert (error.node, error.op, error.output, error.why) == ("choice", "If", "y", "branches of rank 1 and 2")
    assert described(report.warnings, "If") == ["control flow: both branches are built, one runs"]
    assert not lint(branching(branch("a", [2]), branch("b", [3]))).errors


def test_branches_whose_outputs_share_a_name_are_an_error():
    assert described(lint(branching(branch("a", [2]), branch("a", [2], 1.0))).errors, "If") == [
        "branches whose outputs have the same name"
    ]


def test_nodes_inside_a_branch_are_checked():
    inner = branch("a", [2])
    inner.node.append(helper.make_node("Unique", ["a"], ["u"], name="inside"))
    (error,) = lint(branching(inner, branch("b", [2]))).errors
    assert (error.node, error.graph) == ("inside", "choice/then_branch")


def loop(*, carried_grows: bool, scans: bool, steps: str) -> onnx.ModelProto:
    """A loop of `steps` iterations that adds or appends to a carried tensor, with or without scan outputs."""
    step = "Concat<axis = 0>(before, one)" if carried_grows else "Add(before, one)"
    outputs = "bool keep, float[n] after" + (", float[1] each" if scans else "")
    body = onnx.parser.parse_graph(
        f"""body (int64 i, bool go, float[n] before) => ({outputs})
        {{ keep = Identity(go) one = Constant<value_floats = [1.0]>() after = {step} each = Identity(one) }}"""
    )
    node = helper.make_node("Loop", [steps, "", "x"], ["y", "all"] if scans else ["y"], name="loop", body=body)
    graph = helper.make_graph(
        [helper.make_node("ArgMax", ["x"], ["most"], keepdims=0), node],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [3])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None])],
        [helper.make_tensor("four", TensorProto.INT64, [], [4])],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def test_loops_that_grow_are_an_error():
    assert described(lint(loop(carried_grows=True, scans=False, steps="four")).errors, "Loop") == [
        "a loop-carried tensor (before) that grows with each iteration"
    ]
    assert described(lint(loop(carried_grows=False, scans=True, steps="most")).errors, "Loop") == [
        "scan outputs of a loop whose number of iterations depends on values"
    ]
    report = lint(loop(carried_grows=False, scans=True, steps="four"))
    assert not report.errors and described(report.warnings, "Loop") == ["a loop, whose iterations run sequentially"]


# Custom ops of this package


def batched_nms(**changes) -> onnx.ModelProto:
    """A BatchedNms node of the flavour, with changed attributes or input types; None removes an attribute."""
    kinds = {"boxes": TensorProto.FLOAT, "groups": TensorProto.INT32, "counts": TensorProto.INT32}
    kinds.update({name: changes.pop(name) for name in list(changes) if name in kinds})
    shapes = {"boxes": [1, 8, 4], "groups": [1, 8], "counts": [1]}
    attributes = {"iou_threshold": 0.5, "max_output": 4, "plugin_namespace": "maskrcnn", "plugin_version": "1"}
    attributes = {k: v for k, v in {**attributes, **changes}.items() if v is not None}
    op = contract.BATCHED_NMS
    node = helper.make_node(op.name, list(kinds), ["indices", "num"], domain=contract.DOMAIN, **attributes)
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info(name, kind, shapes[name]) for name, kind in kinds.items()],
        [helper.make_tensor_value_info("num", TensorProto.INT32, [1])],
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid(contract.DOMAIN, 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def test_a_node_that_follows_the_contract_has_no_findings():
    assert lint(batched_nms()).findings == ()


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"max_output": None}, "no attribute max_output"),
        ({"max_output": 4.0}, "attribute max_output is float, not int"),
        ({"classes": 3}, "attribute classes is not in the contract"),
        ({"groups": TensorProto.INT64}, "input groups is INT64; the contract has INT32"),
        ({"aot": 1}, "aot = 1, but the op has no ahead-of-time plugin, which can only have one kernel"),
    ],
)
def test_a_violation_of_the_contract_is_an_error(changes, why):
    assert described(lint(batched_nms(**changes)).errors, "maskrcnn::BatchedNms") == [why]


def test_a_node_with_too_few_inputs_is_an_error():
    model = batched_nms()
    del model.graph.node[0].input[2]
    assert described(lint(model).errors, "maskrcnn::BatchedNms")[0].startswith("2 inputs and 2 outputs; the contract")


def test_a_node_without_a_namespace_is_a_warning():
    (warning,) = lint(batched_nms(plugin_namespace=None)).findings
    assert warning.why.startswith("plugin_namespace is missing; parsers before 10.10")


# Files


def test_the_flavour_of_an_exported_file_has_no_findings(onnx_file, boxes_onnx_file):
    for path in (onnx_file, boxes_onnx_file):
        for aot in (False, True):
            report = lint(tensorrt_flavour(onnx.load(path), aot=aot))
            assert report.findings == (), report.text()
            assert report.nodes > 400


def test_an_exported_file_itself_has_findings(onnx_file):
    proto = onnx.load(onnx_file)
    before = proto.SerializeToString(deterministic=True)
    report = lint(proto)
    assert proto.SerializeToString(deterministic=True) == before
    assert [error.op for error in report.errors] == ["maskrcnn::LiveRows"]
    functions = [f for f in report.warnings if f.why.startswith("a function in the file")]
    assert {finding.op.partition("::")[2] for finding in functions} == set(contract.OPS) - {"MultilevelRoiPool"}
    inside = [f for f in report.warnings if f.graph == "function MultilevelRoiAlign"]
    assert {finding.op for finding in inside} >= {"NonZero"}


def test_an_undocumented_opset_is_a_warning():
    for version, why in (
        (22, "opset 22 is documented for TensorRT 10.15, not for 10.1"),
        (8, "opset 8 is not documented"),
    ):
        model = parsed("(float[4] x) => (float[4] y) { y = Relu(x) }")
        model.opset_import[0].version = version
        assert [finding.why for finding in lint(model).findings] == [why]


@pytest.fixture(scope="module")
def legacy_file(tmp_path_factory) -> Path:
    """torchvision's Mask R-CNN, exported by PyTorch's tracing exporter."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("legacy") / "torchvision.onnx"
    image = np.random.default_rng(0).integers(0, 255, (96, 128, 3), dtype=np.uint8)
    export_legacy(torchvision_from_config(tiny_config(score_threshold=0.0)), image, path)
    return path


def test_findings_of_torchvisions_export(legacy_file):
    report = lint(onnx.load(legacy_file))
    assert described(report.errors, "Loop")[0].startswith("a loop-carried tensor")
    ops = {finding.op for finding in report.warnings}
    assert {"If", "NonZero", "NonMaxSuppression", "Loop", "TopK"} <= ops
    assert all(finding.node and finding.output for finding in report.findings)
    assert any(finding.graph.endswith("else_branch") for finding in report.warnings)  # which contains NMS


def test_the_report():
    report = lint(parsed(ERRORS["large K"][0]))
    text = report.text()
    assert text.splitlines()[0] == "1 nodes: 1 errors, 0 warnings"
    for part in ("error: 1 × TopK: K = 4000", "→ y", "fix: reduce K", f"source: {table.MATRIX}"):
        assert part in text
    assert json.loads(json.dumps(report.to_dict()))["errors"][0]["op"] == "TopK"
    many = LintReport(report.findings * 5, 5)
    assert "5 × TopK" in many.text() and "… and 2 more" in many.text()


def test_the_command_checks_the_flavour_of_exported_files_and_other_files_unchanged(onnx_file, legacy_file, tmp_path):
    ours = CliRunner().invoke(app, ["lint", str(onnx_file)])
    assert ours.exit_code == 0 and "its TensorRT flavour, with plugins" in ours.stdout
    out = tmp_path / "findings.json"
    other = CliRunner().invoke(app, ["lint", str(legacy_file), "--json", str(out)])
    assert other.exit_code == 1 and "as it is" in other.stdout
    assert json.loads(out.read_text())["flavour"] is False


# Table of operators and value origins


def test_the_table_is_consistent_with_onnx():
    own = {"ImageScaler", "ParametricSoftplus", "ScaledTanh"}  # of the parser or of an old ONNX version
    names = set(table.SUPPORTED) | table.UNSUPPORTED
    assert not set(table.SUPPORTED) & table.UNSUPPORTED
    assert {name for name in names if not onnx.defs.has(name)} <= own
    for rules in (table.ATTRIBUTES, table.CONSTANT_INPUTS, table.SIZE_INPUTS, table.RANKS, table.TYPED_INPUTS):
        assert set(rules) <= set(table.SUPPORTED)
    for name, rules in table.ATTRIBUTES.items():
        assert {rule.attribute for rule in rules} <= set(onnx.defs.get_schema(name).attributes)
    kinds = set(onnx.TensorProto.DataType.keys())
    assert all(entry.types <= kinds and entry.source for entry in table.SUPPORTED.values())


def test_origins_of_values():
    model = onnx.parser.parse_model(
        """<ir_version: 10, opset_import: ["": 20]>
        g (float[n,4] x, int64[2] sizes) => (float[n,4] y) <int64[1] two = {2}, int64 zero = {0}>
        {
            shape = Shape(x)
            n = Gather(shape, zero)
            fixed = Add(two, two)
            size = Gather(sizes, zero)
            largest = ReduceMax<keepdims = 0>(x)
            rows = Cast<to = 7>(largest)
            found = NonZero(x)
            count = Shape(found)
            mixed = Add(n, size)
            y = Identity(x)
        }"""
    )
    known = {v.name: v.type.tensor_type for v in onnx.shape_inference.infer_shapes(model).graph.value_info}
    known.update({v.name: v.type.tensor_type for v in model.graph.input})
    found = origins_of(model.graph, known)
    wanted = {
        "two": Origin.GIVEN,
        "fixed": Origin.COMPUTED,
        "shape": Origin.SHAPE,
        "n": Origin.SHAPE,
        "size": Origin.INPUT,
        "mixed": Origin.INPUT,
        "rows": Origin.DATA,
        "count": Origin.SHAPE_OF_DATA,
        "y": Origin.DATA,
    }
    assert {name: found.of(name) for name in wanted} == wanted
    assert found.sized_by_values == {"found"}

"""What the value of a tensor depends on."""

import onnx

from maskrcnn.export.tensorrt.lint_rules import Origin, origins_of


def test_values_are_followed_to_where_they_come_from():
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

"""The table of what TensorRT's parser takes, against ONNX's own schemas."""

import onnx

from maskrcnn.export.tensorrt import operators as table


def test_the_table_names_operators_that_exist_and_none_twice():
    own = {"ImageScaler", "ParametricSoftplus", "ScaledTanh"}  # of the parser, or of an old ONNX
    names = set(table.SUPPORTED) | table.UNSUPPORTED
    assert not set(table.SUPPORTED) & table.UNSUPPORTED
    assert {name for name in names if not onnx.defs.has(name)} <= own
    for rules in (table.ATTRIBUTES, table.CONSTANT_INPUTS, table.SIZE_INPUTS, table.RANKS, table.TYPED_INPUTS):
        assert set(rules) <= set(table.SUPPORTED)
    for name, rules in table.ATTRIBUTES.items():
        assert {rule.attribute for rule in rules} <= set(onnx.defs.get_schema(name).attributes)
    kinds = set(onnx.TensorProto.DataType.keys())
    assert all(entry.types <= kinds and entry.source for entry in table.SUPPORTED.values())

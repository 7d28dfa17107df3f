"""Configurations as text, and faults that the checks of tests/support/triton_rules.py find in configurations."""

import pytest
from google.protobuf.text_format import ParseError
from triton_rules import check_model, parse

from maskrcnn.runtime.serving.config import to_pbtxt


def test_text_is_parsed_to_the_same_values():
    config = {
        "name": 'a "name" with \\ and\nlines, tabs\t and ü',
        "max_batch_size": 3,
        "input": [{"name": "x", "dims": [1, -1]}, {"name": "y", "dims": [2], "reshape": {"shape": [2, 1]}}],
        "optimization": {"cuda": {"graphs": True}},
        "instance_group": [{"profile": ["0", "1"]}],
        "parameters": [{"key": "a", "value": {"string_value": "1"}}],
    }
    parsed = parse("# a comment\n" + to_pbtxt(config))
    assert parsed == {**config, "parameters": {"a": {"string_value": "1"}}}
    assert parse(to_pbtxt({"input": [{"reshape": {"shape": []}}]}))["input"] == [{"reshape": {}}]


def test_the_layout_of_the_text():
    text = to_pbtxt(
        {"name": "n", "input": [{"name": "x", "dims": [1, -1]}], "optimization": {"cuda": {"graphs": True}}}
    )
    assert text.splitlines() == [
        'name: "n"',
        "input {",
        '  name: "x"',
        "  dims: [ 1, -1 ]",
        "}",
        "optimization {",
        "  cuda {",
        "    graphs: true",
        "  }",
        "}",
    ]
    with pytest.raises(TypeError, match="no representation in the text format"):
        to_pbtxt({"name": None})


def test_fields_that_triton_does_not_have_are_errors():
    with pytest.raises(ParseError, match="nam"):
        parse('nam: "x"')


# Rules beyond the schema


@pytest.fixture
def model(tmp_path):
    """A valid configuration, and its folder."""
    (tmp_path / "1").mkdir()
    (tmp_path / "1" / "model.onnx").touch()
    tensor = {"name": "x", "data_type": "TYPE_FP32", "dims": [1, -1]}
    config = {
        "name": "m",
        "backend": "onnxruntime",
        "max_batch_size": 4,
        "input": [tensor],
        "output": [{**tensor, "name": "y"}],
        "instance_group": [{"count": 1}],
        "dynamic_batching": {"preferred_batch_size": [2, 4]},
    }
    check_model(config, tmp_path)
    return config, tmp_path


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_batch_size": -1},
        {"max_batch_size": 0},  # with dynamic batching
        {"instance_group": []},
        {"instance_group": [{"profile": ["0"]}]},
        {"dynamic_batching": {"preferred_batch_size": [5]}},
        {"backend": "tensorrt"},  # without its file
        {"input": [{"name": "x", "dims": []}]},
        {"input": [{"name": "x", "dims": [0]}]},
        {"input": [{"name": "x", "dims": [2], "reshape": {"shape": []}}]},
    ],
)
def test_models_that_triton_does_not_load(model, wrong):
    config, folder = model
    with pytest.raises(AssertionError):
        check_model(config | wrong, folder)

"""Configurations as text, and that what checks them finds faults."""

import copy

import pytest
from triton_rules import check_ensemble, check_model
from triton_schema import MESSAGES, NotThatFormat, parse

from maskrcnn.runtime.serving.config import Symbol, map_of, text_of

TENSOR = {"name": "x", "data_type": Symbol("TYPE_FP32"), "dims": [1, -1]}


def test_what_is_written_is_read_back():
    config = {
        "name": 'a "name" with \\ and\nlines, tabs\t and ü',
        "max_batch_size": 0,
        "input": [TENSOR, {**TENSOR, "reshape": {"shape": []}}],
        "optimization": {"cuda": {"graphs": True}},
        "instance_group": [{"profile": ["0", "1"]}],
        "parameters": map_of({"a": {"string_value": "1"}, "b": {"string_value": ""}}),
    }
    read = parse("# a remark\n" + text_of(config))
    assert read == {**config, "parameters": {"a": {"string_value": "1"}, "b": {"string_value": ""}}}


def test_the_text_of_a_message():
    text = text_of({"name": "n", "input": [TENSOR], "parameters": map_of({"k": {"string_value": "v"}})})
    assert text.splitlines() == [
        'name: "n"',
        "input {",
        '  name: "x"',
        "  data_type: TYPE_FP32",
        "  dims: [ 1, -1 ]",
        "}",
        "parameters {",
        '  key: "k"',
        "  value {",
        '    string_value: "v"',
        "  }",
        "}",
    ]
    with pytest.raises(TypeError, match="no value of a text format"):
        text_of({"name": None})


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ('nam: "x"', "no field 'nam' in ModelConfig"),
        ("name: x", "x is no string"),
        ('name: "x" name: "y"', "name twice"),
        ("max_batch_size: 1.5", "unreadable|is no int32"),
        ("max_batch_size: 3000000000", "is no int32"),
        ("max_batch_size: [ 1 ]", "a list for a single int32"),
        ("input { dims: [ 1 2 ] }", "',?2'? where"),
        ("input { data_type: TYPE_FLOAT }", "is no DataType"),
        ("input { name: 'x' }", "unreadable"),
        ("input { name: ", "is no string"),
        ("input {", "no field ''"),
        ("dynamic_batching { max_queue_delay_microseconds: -1 }", "is no uint64"),
        ('parameters { key: "a" }', "an entry of"),
        ('parameters { key: "a" value: "b" }', "where"),
        ("optimization { cuda { graphs: yes } }", "is no bool"),
        ("}", "no field"),
    ],
)
def test_the_checker_finds_bad_texts(text, complaint):
    with pytest.raises(NotThatFormat, match=complaint):
        parse(text)


def test_every_message_that_is_named_is_described():
    for fields in MESSAGES.values():
        for declared in fields.values():
            kind = declared.removeprefix("repeated ").removeprefix("map<string, ").removesuffix(">")
            assert kind in MESSAGES or kind[0].islower() or kind in ("DataType", "ModelInstanceGroup.Kind")


# Rules beyond the format


@pytest.fixture
def model(tmp_path):
    """A configuration that is right, and its folder."""
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
        {"backend": "tensorrt"},  # whose file is not there
        {"input": [{"name": "x", "dims": []}]},
        {"input": [{"name": "x", "dims": [0]}]},
        {"input": [{"name": "x", "dims": [2], "reshape": {"shape": []}}]},
    ],
)
def test_the_rules_find_what_triton_refuses(model, wrong):
    config, folder = model
    with pytest.raises(AssertionError):
        check_model(config | wrong, folder)


def test_the_rules_find_ensembles_that_do_not_fit(model):
    config, _ = model
    step = {"model_name": "m", "input_map": {"x": "a"}, "output_map": {"y": "b"}}
    ensemble = {
        "name": "e",
        "platform": "ensemble",
        "max_batch_size": 4,
        "input": [{**config["input"][0], "name": "a"}],
        "output": [{**config["output"][0], "name": "b"}],
        "ensemble_scheduling": {"step": [step]},
    }
    check_ensemble(ensemble, {"m": config})

    def refused(change):
        wrong = copy.deepcopy(ensemble)
        change(wrong)
        with pytest.raises(AssertionError):
            check_ensemble(wrong, {"m": config})

    refused(lambda e: e.update(max_batch_size=8))
    refused(lambda e: e["input"][0].update(data_type="TYPE_INT64"))
    refused(lambda e: e["output"][0].update(dims=[2, 2]))
    refused(lambda e: e["ensemble_scheduling"]["step"][0].update(input_map={"x": "nothing"}))
    refused(lambda e: e["ensemble_scheduling"]["step"][0].update(input_map={}))
    refused(lambda e: e["ensemble_scheduling"]["step"][0].update(output_map={"z": "b"}))
    refused(lambda e: e["output"].append({**config["output"][0], "name": "c"}))

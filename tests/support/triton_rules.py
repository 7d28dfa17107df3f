"""Configurations of a Triton repository, parsed by Triton's protobuf classes and checked by the rules of its core.

Sources of the rules: model_config_utils.cc of triton-inference-server/core, and the checks of the backends. The server
itself checks ensembles, in test_triton_real.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from google.protobuf import text_format
from tritonclient.grpc.model_config_pb2 import ModelConfig

Message = dict[str, Any]
PLATFORMS = {"onnxruntime": "model.onnx", "tensorrt": "model.plan", "openvino": "model.xml", "python": "model.py"}
_SIZES = {"TYPE_FP32": 4, "TYPE_INT32": 4, "TYPE_INT64": 8, "TYPE_UINT8": 1}


def parse(text: str) -> Message:
    """Parses a `config.pbtxt` to a dictionary of the fields that are set, and `max_batch_size`.

    Raises:
        google.protobuf.text_format.ParseError: if Triton could not parse it.
    """
    return {"max_batch_size": 0, **_fields(text_format.Parse(text, ModelConfig()))}


def _fields(message: Any) -> Message:
    found: Message = {}
    for field, value in message.ListFields():
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            found[field.name] = {key: _value(field.message_type.fields_by_name["value"], value[key]) for key in value}
        elif field.is_repeated:
            found[field.name] = [_value(field, each) for each in value]
        else:
            found[field.name] = _value(field, value)
    return found


def _value(field: Any, value: Any) -> Any:
    if field.message_type is not None:
        return _fields(value)
    return field.enum_type.values_by_number[value].name if field.enum_type is not None else value


def read_repository(root: Path) -> dict[str, Message]:
    """The configurations of a repository by model.

    Raises:
        AssertionError: for a model that Triton would not load.
    """
    configs = {}
    for folder in sorted(root.iterdir()):
        assert folder.is_dir(), f"{folder} is no model"
        config = parse((folder / "config.pbtxt").read_text())
        assert config["name"] == folder.name
        check_model(config, folder)
        configs[folder.name] = config
    return configs


def check_model(config: Message, folder: Path) -> None:
    """Checks one model."""
    is_ensemble = "ensemble_scheduling" in config
    versions = [path for path in folder.iterdir() if path.is_dir() and path.name.isdigit()]
    assert versions, f"{folder} has no version"
    assert all(not path.name.startswith("0") for path in versions)
    if is_ensemble:
        assert config["platform"] == "ensemble" and "backend" not in config and "instance_group" not in config
    else:
        file = PLATFORMS[config["backend"]]
        assert all((path / file).is_file() for path in versions), f"{folder} has no {file}"
        assert config["instance_group"]
        profiled = [group for group in config["instance_group"] if "profile" in group]
        assert not profiled or config["backend"] == "tensorrt"
    limit = config["max_batch_size"]
    assert limit >= 0
    for tensor in [*config["input"], *config["output"]]:
        _check_tensor(tensor, limit)
    if "dynamic_batching" in config:
        assert limit > 0
        assert all(1 <= size <= limit for size in config["dynamic_batching"].get("preferred_batch_size", []))
    for spec in config.get("optimization", {}).get("cuda", {}).get("graph_spec", []):
        assert 1 <= spec["batch_size"] <= limit
        assert set(spec["input"]) == {tensor["name"] for tensor in config["input"]}
    for sample in config.get("model_warmup", []):
        _check_warmup(sample, config, folder)


def _check_tensor(tensor: Message, limit: int) -> None:
    dims = tensor["dims"]
    assert dims and all(length == -1 or length >= 1 for length in dims), tensor
    if "reshape" in tensor:
        shape = tensor["reshape"].get("shape", [])
        assert shape or limit > 0, "an empty shape needs batching"
        assert dims.count(-1) == shape.count(-1) and _product(dims) == _product(shape), tensor


def _product(dims: list[int]) -> int:
    product = 1
    for length in dims:
        product *= abs(length)
    return product


def _check_warmup(sample: Message, config: Message, folder: Path) -> None:
    inputs = {tensor["name"]: tensor for tensor in config["input"]}
    assert set(sample["inputs"]) == set(inputs)
    assert sample["batch_size"] >= 1 and sample["batch_size"] <= max(1, config["max_batch_size"])
    for name, given in sample["inputs"].items():
        assert given["data_type"] == inputs[name]["data_type"]
        assert compatible(given["dims"], inputs[name]["dims"]) and -1 not in given["dims"]
        path = folder / "warmup" / given["input_data_file"]
        assert path.stat().st_size >= _product(given["dims"]) * _SIZES[given["data_type"]]


def compatible(dims: list[int], others: list[int]) -> bool:
    """Whether one tensor can have both shapes; -1 is any length."""
    return len(dims) == len(others) and all(-1 in pair or pair[0] == pair[1] for pair in zip(dims, others, strict=True))

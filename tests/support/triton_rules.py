"""What Triton's core and its backends demand of a configuration beyond its format.

Sources: model_config_utils.cc and ensemble_utils.cc of triton-inference-server/core, and the backends' own checks.
"""

from __future__ import annotations

from pathlib import Path

from triton_schema import Message, parse

PLATFORMS = {"onnxruntime": "model.onnx", "tensorrt": "model.plan", "openvino": "model.xml", "python": "model.py"}
_SIZES = {"TYPE_FP32": 4, "TYPE_INT32": 4, "TYPE_INT64": 8, "TYPE_UINT8": 1}


def read_repository(root: Path) -> dict[str, Message]:
    """The configuration of each model of a repository; every one must be loadable.

    Raises:
        AssertionError: for whatever Triton refuses.
    """
    configs = {}
    for folder in sorted(root.iterdir()):
        assert folder.is_dir(), f"{folder} is no model"
        config = parse((folder / "config.pbtxt").read_text())
        assert config["name"] == folder.name
        check_model(config, folder)
        configs[folder.name] = config
    for config in configs.values():
        if "ensemble_scheduling" in config:
            check_ensemble(config, configs)
    return configs


def check_model(config: Message, folder: Path) -> None:
    """What holds for each model by itself."""
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
        shape = tensor["reshape"]["shape"]
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
    """Whether two shapes may be the same tensor's: -1 is any length."""
    return len(dims) == len(others) and all(-1 in pair or pair[0] == pair[1] for pair in zip(dims, others, strict=True))


def full_dims(tensor: Message, limit: int) -> list[int]:
    """A tensor's shape with the dimension that Triton adds."""
    return ([-1] if limit > 0 else []) + tensor["dims"]


def check_ensemble(config: Message, configs: dict[str, Message]) -> None:
    """What holds between an ensemble and its steps: tensors of one name have one type and shape."""
    seen: dict[str, tuple[str, list[int], list[int]]] = {}

    def meet(name: str, tensor: Message, limit: int) -> None:
        own = tensor["data_type"], tensor["dims"], full_dims(tensor, limit)
        there = seen.setdefault(name, own)
        assert there[0] == own[0], f"{name} is {there[0]} and {own[0]}"
        assert compatible(there[1], own[1]) or compatible(there[2], own[2]), f"{name} is {there} and {own}"

    for tensor in [*config["input"], *config["output"]]:
        meet(tensor["name"], tensor, config["max_batch_size"])
    known = {tensor["name"] for tensor in config["input"]}
    for step in config["ensemble_scheduling"]["step"]:
        model = configs[step["model_name"]]
        limit = model["max_batch_size"]
        assert limit == 0 or limit >= config["max_batch_size"]
        inputs = {tensor["name"]: tensor for tensor in model["input"]}
        outputs = {tensor["name"]: tensor for tensor in model["output"]}
        assert set(step["input_map"]) == set(inputs), f"inputs of {model['name']}"
        assert set(step["output_map"]) <= set(outputs), f"outputs of {model['name']}"
        for name, tensor in step["input_map"].items():
            assert tensor in known, f"{tensor} comes from no step"
            meet(tensor, inputs[name], limit)
        for name, tensor in step["output_map"].items():
            assert tensor not in known, f"{tensor} comes from two steps"
            known.add(tensor)
            meet(tensor, outputs[name], limit)
    assert {tensor["name"] for tensor in config["output"]} <= known

"""A simulation of a Triton server for the repositories of the tests: ensembles of Python steps and a network.

Tensors between steps are checked against both configurations, with Triton's rules for batches and reshapes.
"""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
from triton_rules import Message, compatible, full_dims, read_repository

_STUB = Path(__file__).with_name("triton_stub.py")
_DTYPES = {"TYPE_UINT8": "uint8", "TYPE_INT32": "int32", "TYPE_INT64": "int64", "TYPE_FP32": "float32"}

Tensors = dict[str, np.ndarray]


class Refused(Exception):
    """An error response."""


class Server:
    """The newest version of each model of a repository."""

    def __init__(self, root: Path) -> None:
        self.root, self.configs = root, read_repository(root)
        self.imported_from: set[Path] = set()  # files of `import maskrcnn` in Python models

    def infer(self, name: str, inputs: Tensors) -> Tensors:
        """Returns the response to a request.

        Raises:
            Refused: with the text of the error.
        """
        config = self.configs[name]
        self._check(inputs, config["input"], config)
        outputs = self._ensemble(config, inputs) if "ensemble_scheduling" in config else self._run(config, inputs)
        self._check(outputs, config["output"], config)
        return outputs

    def warm_up(self, name: str) -> int:
        """Runs the warm-up requests of a model; returns their number."""
        config = self.configs[name]
        samples = config.get("model_warmup", [])
        for sample in samples:
            inputs = {}
            for tensor, given in sample["inputs"].items():
                dtype, dims = np.dtype(_DTYPES[given["data_type"]]), given["dims"]
                path = self.root / name / "warmup" / given["input_data_file"]
                value = np.fromfile(path, dtype, count=int(np.prod(dims))).reshape(dims)
                is_batched = config["max_batch_size"] > 0
                inputs[tensor] = np.stack([value] * sample["batch_size"]) if is_batched else value
            self.infer(name, inputs)
        return len(samples)

    def _ensemble(self, config: Message, inputs: Tensors) -> Tensors:
        known = dict(inputs)
        for step in config["ensemble_scheduling"]["step"]:
            given = {name: known[tensor] for name, tensor in step["input_map"].items()}
            made = self.infer(step["model_name"], given)
            known |= {tensor: made[name] for name, tensor in step["output_map"].items()}
        return {tensor["name"]: known[tensor["name"]] for tensor in config["output"]}

    def _run(self, config: Message, inputs: Tensors) -> Tensors:
        version = max(int(path.name) for path in (self.root / config["name"]).iterdir() if path.name.isdigit())
        folder = self.root / config["name"] / str(version)
        run = {"python": self._python, "onnxruntime": _onnxruntime, "openvino": _openvino}[config["backend"]]
        outputs = run(folder, config, inputs)
        return {tensor["name"]: self._reshaped(outputs[tensor["name"]], tensor, config) for tensor in config["output"]}

    def _python(self, folder: Path, config: Message, inputs: Tensors) -> Tensors:
        packages = sysconfig.get_paths()["purelib"]
        command = [sys.executable, "-S", "-I", str(_STUB), str(folder), json.dumps(config), packages]
        done = subprocess.run(command, input=pickle.dumps([inputs]), stdout=subprocess.PIPE, timeout=120, check=True)
        (answer,), origin = pickle.loads(done.stdout)
        self.imported_from.add(Path(origin))
        if isinstance(answer, str):
            raise Refused(answer)
        return answer

    @staticmethod
    def _reshaped(value: np.ndarray, tensor: Message, config: Message) -> np.ndarray:
        """An output in the shape that clients receive (InferenceResponse::Output::Reshape)."""
        if "reshape" not in tensor:
            return value
        leading = list(value.shape[:1]) if config["max_batch_size"] > 0 else []
        variable = [
            n for n, d in zip(value.shape[len(leading) :], tensor["reshape"].get("shape", []), strict=True) if d == -1
        ]
        return value.reshape([*leading, *(variable.pop(0) if d == -1 else d for d in tensor["dims"])])

    @staticmethod
    def _check(values: Tensors, tensors: list[Message], config: Message) -> None:
        limit = config["max_batch_size"]
        assert set(values) == {tensor["name"] for tensor in tensors}, config["name"]
        assert len({len(value) for value in values.values()}) == 1 or limit == 0
        for tensor in tensors:
            value = values[tensor["name"]]
            if limit and len(value) > limit:
                raise Refused(f"inference request batch-size must be <= {limit} for '{config['name']}'")
            wanted = "object" if tensor["data_type"] == "TYPE_STRING" else _DTYPES[tensor["data_type"]]
            assert value.dtype == wanted, f"{config['name']} {tensor['name']} {value.dtype}"
            assert compatible(list(value.shape), full_dims(tensor, limit)), f"{tensor} {value.shape}"


def _onnxruntime(folder: Path, config: Message, inputs: Tensors) -> Tensors:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    _check_exact(config, {node.name: node.shape for node in session.get_outputs()})
    names = [node.name for node in session.get_outputs()]
    return dict(zip(names, session.run(names, inputs), strict=True))


def _openvino(folder: Path, config: Message, inputs: Tensors) -> Tensors:
    from maskrcnn.runtime.backends.openvino import openvino_core

    core = openvino_core()
    model = core.read_model(folder / "model.xml")
    assert all(output.get_names() for output in model.outputs), "Triton wants names for all outputs"
    parameters = {key: entry["string_value"] for key, entry in config["parameters"].items()}
    options = {name: parameters[name] for name in ("PERFORMANCE_HINT", "NUM_STREAMS")}
    if parameters.get("HINT_BF16") == "YES":
        options["INFERENCE_PRECISION_HINT"] = "bf16"
    shapes = {output.get_any_name(): [_length(d) for d in output.get_partial_shape()] for output in model.outputs}
    _check_exact(config, shapes)
    request = core.compile_model(model, "CPU", options).create_infer_request()
    request.infer(inputs)
    return {tensor["name"]: request.get_tensor(tensor["name"]).data.copy() for tensor in config["output"]}


def _length(dimension) -> int | None:
    return None if dimension.is_dynamic else dimension.get_length()


def _check_exact(config: Message, shapes: dict[str, list]) -> None:
    """Output shapes of model and configuration must be equal, variable lengths included (CompareDimsSupported)."""
    for tensor in config["output"]:
        dims = tensor["reshape"].get("shape", []) if "reshape" in tensor else tensor["dims"]
        wanted = ([-1] if config["max_batch_size"] > 0 else []) + dims
        found = [length if isinstance(length, int) else -1 for length in shapes[tensor["name"]]]
        assert found == wanted, f"{tensor['name']}: {found} in the model, {wanted} in the configuration"

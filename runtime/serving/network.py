"""The network on a Triton server in the Python backend: runs the model file in maskrcnn's backends.

`maskrcnn triton` writes this file as the `model.py` of a model, like `pre.py`, with the model file and maskrcnn's
packages without PyTorch in the same folder. Inputs and outputs are those of the model file. The runtime (ONNX Runtime,
OpenVINO or TensorRT) must be installed in the server's Python.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

if not __name__.startswith("maskrcnn."):  # on a server, see pre.py
    sys.dont_write_bytecode = True  # see _NO_BYTECODE in triton.py
    sys.path.insert(0, str(Path(__file__).parent))

import triton_python_backend_utils as triton

from maskrcnn.errors import UserError
from maskrcnn.runtime.backends.onnxruntime_providers import GpuOptions
from maskrcnn.runtime.detector import load_backend


class TritonPythonModel:
    """Interface of Triton's Python backend; each instance is a separate process."""

    def initialize(self, args: dict[str, str]) -> None:
        """Loads the model file on the device that Triton chose for this instance.

        Raises:
            UserError: if it cannot be loaded here; Triton reports the message.
        """
        entries = json.loads(args["model_config"])["parameters"]
        parameters = {name: entry["string_value"] for name, entry in entries.items()}
        path = Path(__file__).with_name(parameters["file"])
        options: dict[str, Any] = {"threads": int(parameters["threads"])} if "threads" in parameters else {}
        device = int(args["model_instance_device_id"])
        if path.suffix == ".engine":
            options = {"device": device, "graphs": parameters["graphs"] == "yes"}
        elif path.suffix == ".onnx" and args["model_instance_kind"] == "GPU":
            options |= {"provider": "cuda", "gpu": GpuOptions(device=device)}
        elif path.suffix == ".onnx":
            options["provider"] = "cpu"
        self.network = load_backend(path, **options)
        self.inputs, self.outputs = (list(specs) for specs in self.network.describe())

    def execute(self, requests: list[Any]) -> list[Any]:
        """Returns a response for each request; requests with images of the same size run as one batch."""
        feeds = [
            {name: triton.get_input_tensor_by_name(request, name).as_numpy() for name in self.inputs}
            for request in requests
        ]
        groups: dict[tuple[int, ...], list[int]] = {}
        for number, feed in enumerate(feeds):
            groups.setdefault(feed["images"].shape[1:], []).append(number)
        responses: list[Any] = [None] * len(requests)
        for numbers in groups.values():
            for number, response in zip(numbers, self._run([feeds[n] for n in numbers]), strict=True):
                responses[number] = response
        return responses

    def _run(self, feeds: list[dict[str, np.ndarray]]) -> list[Any]:
        batch = feeds[0] if len(feeds) == 1 else {n: np.concatenate([feed[n] for feed in feeds]) for n in self.inputs}
        try:
            outputs = self.network(batch)
        except UserError as error:
            return [triton.InferenceResponse(error=triton.TritonError(str(error))) for _ in feeds]
        ends = np.cumsum([len(feed["images"]) for feed in feeds])[:-1]
        parts = {name: np.split(np.asarray(outputs[name]), ends) for name in self.outputs}
        return [
            triton.InferenceResponse([triton.Tensor(name, part[k]) for name, part in parts.items()])
            for k in range(len(feeds))
        ]

"""One Python model of a Triton server in a process of its own, with a stand-in for `triton_python_backend_utils`.

Run by `triton_server` as `python -S -I triton_stub.py VERSION_FOLDER CONFIG SITE_PACKAGES`: without site-packages'
.pth files, so that an installed maskrcnn is not found. Requests come pickled on standard input, responses go to
standard output.
"""

import importlib.util
import json
import pickle
import sys
import types


class Tensor:
    def __init__(self, name, array):
        self._name, self._array = name, array

    def name(self):
        return self._name

    def as_numpy(self):
        return self._array


class InferenceRequest:
    def __init__(self, inputs):
        self._inputs = inputs

    def inputs(self):
        return self._inputs


class TritonError:
    def __init__(self, message):
        self.text = message

    def message(self):
        return self.text


class InferenceResponse:
    def __init__(self, output_tensors=(), error=None):
        self.outputs, self.error = list(output_tensors), error


def get_input_tensor_by_name(request, name):
    return next((tensor for tensor in request.inputs() if tensor.name() == name), None)


def main(folder: str, config: str, packages: str) -> None:
    sys.path.append(packages)
    answers, sys.stdout = sys.stdout.buffer, sys.stderr
    backend = types.ModuleType("triton_python_backend_utils")
    for name in ("Tensor", "InferenceRequest", "InferenceResponse", "TritonError", "get_input_tensor_by_name"):
        setattr(backend, name, globals()[name])
    sys.modules["triton_python_backend_utils"] = backend
    sys.path.append(folder)  # as pb_stub.cc does
    spec = importlib.util.spec_from_file_location("1.model", f"{folder}/model.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    model = module.TritonPythonModel()
    model.initialize({"model_config": json.dumps(json.loads(config)), "model_version": "1"})
    given = pickle.load(sys.stdin.buffer)
    requests = [InferenceRequest([Tensor(*item) for item in inputs.items()]) for inputs in given]
    responses = model.execute(requests)
    told = [
        response.error.message()
        if response.error
        else {tensor.name(): tensor.as_numpy() for tensor in response.outputs}
        for response in responses
    ]
    origin = sys.modules["maskrcnn"].__file__
    pickle.dump((told, origin), answers)


if __name__ == "__main__":
    main(*sys.argv[1:])

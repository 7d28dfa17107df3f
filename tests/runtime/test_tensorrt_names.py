"""The backend through doubles of TensorRT's own classes: every name that it uses is one of theirs.

The doubles are made by `create_autospec` in a process with the real bindings (tests/support/tensorrt_rig), and refuse
names that the classes do not have. What they answer comes from the pretended TensorRT, on the pretended GPU.
"""

import pytest

pytest.importorskip("cuda.bindings.runtime")

_FLOW = """
from pathlib import Path
from unittest.mock import create_autospec

import numpy as np
import tensorrt as trt
import fake_cuda, fake_tensorrt
from maskrcnn.runtime.backends import tensorrt_engine, tensorrt_library
from maskrcnn.runtime.backends.tensorrt import TensorRtBackend
from maskrcnn.runtime.build.profiles import Profile, Span
from maskrcnn.runtime.gpu import memory

used = set()

def public(thing):
    return [name for name in dir(thing) if not name.startswith("_")]

def answering(function, name):
    def answer(*arguments, **named):
        used.add(name)
        return function(*arguments, **named)
    return answer

def double(real, pretended):
    made = create_autospec(real, instance=True, spec_set=True)
    for name in public(pretended):
        value = getattr(pretended, name)
        if callable(value):
            getattr(made, name).side_effect = answering(value, f"{{real.__name__}}.{{name}}")
        elif name not in ("contexts", "computed", "profile", "addresses"):
            setattr(made, name, value)
    return made

class Doubles(fake_tensorrt.Module):
    __version__ = trt.__version__
    TensorIOMode, DataType, ILogger = trt.TensorIOMode, trt.DataType, trt.ILogger
    ExecutionContextAllocationStrategy = trt.ExecutionContextAllocationStrategy

    def Runtime(self, logger):
        assert isinstance(logger, trt.ILogger)
        made = create_autospec(trt.Runtime, instance=True, spec_set=True)
        made.deserialize_cuda_engine.side_effect = answering(self._deserialize, "Runtime.deserialize_cuda_engine")
        self.loggers.append(logger)
        self.loaded.append(made)
        return made

    def as_engine(self, engine):
        return double(trt.ICudaEngine, engine)

    def as_context(self, context):
        return double(trt.IExecutionContext, context)

assert tensorrt_library.import_tensorrt() is trt
runtime = fake_cuda.FakeRuntime()
doubles = Doubles(runtime)
memory.import_runtime = lambda: runtime
memory.import_driver = lambda: runtime.driver
tensorrt_engine.import_tensorrt = lambda: doubles
any_size = Profile(Span(1, 1, 2), Span(32, 64, 96), Span(32, 96, 96))
path = fake_tensorrt.write_engine(
    Path({onnx!r}), Path({folder!r}) / "model.engine", [any_size], tensorrt=trt.__version__, version_compatible="yes"
)
backend = TensorRtBackend(path)
images = np.random.default_rng(0).uniform(0, 255, (1, 3, 64, 96)).astype(np.float32)
counts = [
    backend({{"images": images, "image_sizes": np.array([[64, 96]])}})["num_detections"].tolist() for _ in range(3)
]
doubles.refuses = True
refused = ""
try:
    backend({{"images": images[:, :, :32], "image_sizes": np.array([[32, 96]])}})
except Exception as error:
    refused = str(error)
tell({{
    "counts": counts,
    "launched": runtime.calls.count("cudaGraphLaunch"),
    "used": sorted(used),
    "refused": refused,
    "host_code": doubles.loaded[0].engine_host_code_allowed,
}})
"""


@pytest.fixture(scope="module")
def said(tmp_path_factory, onnx_file, each_tensorrt):
    return each_tensorrt.ask(_FLOW.format(onnx=str(onnx_file), folder=str(tmp_path_factory.mktemp("names"))))


def test_the_whole_way_of_an_engine_uses_tensorrts_names_alone(said):
    assert said["counts"][0][0] > 0 and said["counts"][0] == said["counts"][1] == said["counts"][2]
    assert said["launched"] == 2
    assert said["host_code"] is True
    assert said["used"] == [
        "ICudaEngine.create_execution_context",
        "ICudaEngine.get_tensor_dtype",
        "ICudaEngine.get_tensor_mode",
        "ICudaEngine.get_tensor_name",
        "ICudaEngine.get_tensor_shape",
        "IExecutionContext.execute_async_v3",
        "IExecutionContext.get_tensor_shape",
        "IExecutionContext.set_device_memory",
        "IExecutionContext.set_input_shape",
        "IExecutionContext.set_optimization_profile_async",
        "IExecutionContext.set_tensor_address",
        "Runtime.deserialize_cuda_engine",
    ]


def test_what_tensorrt_logs_is_in_the_error(said):
    assert "TensorRT refuses execute_async_v3" in said["refused"] and "enqueue: no luck" in said["refused"]

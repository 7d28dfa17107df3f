"""TensorRT's runtime classes, implemented by ONNX Runtime.

A plan is a JSON text that names an ONNX file. Contexts are as strict as TensorRT's documentation allows: a context must
not change after a graph captured it, its first run cannot be captured, and addresses must be aligned and allocated.
"""

from __future__ import annotations

import dataclasses
import json
from enum import Enum
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fake_cuda
import numpy as np
import onnxruntime

from maskrcnn.metadata import KEY, ModelMetadata
from maskrcnn.runtime.backends import tensorrt_engine
from maskrcnn.runtime.backends.onnxruntime import session_options
from maskrcnn.runtime.build import profiles as tensorrt_profiles
from maskrcnn.runtime.build.profiles import Profile

VERSION = "11.4.0.106"
SCRATCH = 4096  # bytes that a context requires


class TensorIOMode(Enum):
    NONE, INPUT, OUTPUT = range(3)


class ExecutionContextAllocationStrategy(Enum):
    STATIC, ON_PROFILE_CHANGE, USER_MANAGED = range(3)


class DataType(Enum):
    FLOAT, HALF, INT32, INT64 = range(4)


_TYPES = {"tensor(float)": DataType.FLOAT, "tensor(int64)": DataType.INT64, "tensor(int32)": DataType.INT32}
_NUMPY = {DataType.FLOAT: np.float32, DataType.INT64: np.int64, DataType.INT32: np.int32}


class Severity(Enum):
    INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)


class ILogger:
    """Base class of loggers."""

    Severity = Severity


class Context:
    """IExecutionContext."""

    def __init__(self, engine: Engine) -> None:
        self._engine, self._runtime = engine, engine._runtime
        self._scratch: tuple[int, int] | None = None
        self.profile: int | None = None
        self._shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self._runs = 0
        self._captured = False

    def set_device_memory(self, memory: int, size: int) -> None:
        self._change()
        assert size >= self._engine.device_memory_size_v2
        self._scratch = memory, size

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        self._change()
        self.profile = profile_index
        return 0 <= profile_index < self._engine.num_optimization_profiles

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self._change()
        assert self.profile is not None, "shapes are checked against a profile"
        self._shapes[name] = tuple(shape)
        images = shape if name == "images" else None
        return images is None or self._engine._profiles[self.profile].takes((images[0], images[2], images[3]))

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        assert set(self._shapes) == set(self._engine._inputs), "shapes follow from all inputs"
        if name in self._shapes:
            return self._shapes[name]
        return (self._shapes["images"][0], *self._engine._outputs[name].shape[1:])

    def set_tensor_address(self, name: str, memory: int) -> bool:
        self._change()
        if memory % 256:
            return False
        self.addresses[name] = memory
        return True

    def execute_async_v3(self, stream_handle: int) -> bool:
        engine, addresses = self._engine, dict(self.addresses)
        if engine._module.refuses:
            engine._module.say("enqueue: no luck")
            return False
        if self._runtime.is_capturing(stream_handle):
            assert self._runs, "the first run prepares what a capture cannot hold"
            if engine._module.refuses_capture:
                engine._module.say("a loop cannot be captured")
                return False
            self._captured = True
        self._runs += 1
        self._runtime.check(*self._scratch)
        shapes = dict(self._shapes)
        self._runtime.launch(stream_handle, lambda: engine._compute(shapes, addresses))
        return True

    def _change(self) -> None:
        assert not self._captured, "a graph holds this context as it was"


class Engine:
    """ICudaEngine."""

    device_memory_size_v2 = SCRATCH

    def __init__(self, module: Module, plan: dict[str, Any]) -> None:
        self._module, self._runtime = module, module.runtime
        self._profiles = tensorrt_profiles.from_json(plan["profiles"])
        providers = ["CPUExecutionProvider"]
        self._session = onnxruntime.InferenceSession(plan["onnx"], session_options(1), providers=providers)
        self._inputs = {node.name: node for node in self._session.get_inputs()}
        self._outputs = {node.name: node for node in self._session.get_outputs()}
        self.contexts: list[Context] = []
        self.computed = 0

    @property
    def num_io_tensors(self) -> int:
        return len(self._inputs) + len(self._outputs)

    @property
    def num_optimization_profiles(self) -> int:
        return len(self._profiles)

    def get_tensor_name(self, index: int) -> str:
        return [*self._inputs, *self._outputs][index]

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        modes = self._module.TensorIOMode
        return modes.INPUT if name in self._inputs else modes.OUTPUT

    def get_tensor_dtype(self, name: str) -> DataType:
        return getattr(self._module.DataType, self._type_of(name).name)

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        lengths = {**self._inputs, **self._outputs}[name].shape
        return tuple(length if isinstance(length, int) else -1 for length in lengths)

    def create_execution_context(self, strategy: Any) -> Context | None:
        assert strategy == self._module.ExecutionContextAllocationStrategy.USER_MANAGED
        if len(self.contexts) >= self._module.most_contexts:
            self._module.say("out of memory")
            return None
        self.contexts.append(Context(self))
        return self._module.as_context(self.contexts[-1])

    def _type_of(self, name: str) -> DataType:
        return _TYPES[{**self._inputs, **self._outputs}[name].type]

    def _compute(self, shapes: dict[str, tuple[int, ...]], addresses: dict[str, int]) -> None:
        self.computed += 1
        feeds = {
            name: self._runtime.array(addresses[name], shapes[name], _NUMPY[self._type_of(name)])
            for name in self._inputs
        }
        found = self._session.run(list(self._outputs), feeds)
        for name, value in zip(self._outputs, found, strict=True):
            self._runtime.array(addresses[name], value.shape, value.dtype)[...] = value


class Module:
    """The module `tensorrt`.

    Args:
        runtime: the GPU.
    """

    __version__ = VERSION
    TensorIOMode = TensorIOMode
    ExecutionContextAllocationStrategy = ExecutionContextAllocationStrategy
    DataType = DataType
    ILogger = ILogger

    def __init__(self, runtime: fake_cuda.FakeRuntime) -> None:
        self.runtime = runtime
        self.refuses = self.refuses_capture = False
        self.most_contexts = 1000
        self.engines: list[Engine] = []
        self.loaded: list[SimpleNamespace] = []  # runtimes
        self.loggers: list[Any] = []

    def Runtime(self, logger: Any) -> SimpleNamespace:
        made = SimpleNamespace(engine_host_code_allowed=False, deserialize_cuda_engine=self._deserialize)
        self.loggers.append(logger)
        self.loaded.append(made)
        return made

    def say(self, text: str) -> None:
        """Logs an error with the newest logger."""
        self.loggers[-1].log(self.ILogger.Severity.ERROR, text)

    def as_context(self, context: Context) -> Any:
        """The context that `create_execution_context` returns; doubles of the real class replace this method."""
        return context

    def as_engine(self, engine: Engine) -> Any:
        """The engine that `deserialize_cuda_engine` returns; doubles replace this method too."""
        return engine

    def _deserialize(self, data: bytes) -> Any:
        try:
            plan = json.loads(data)
        except ValueError:
            self.say("Version tag does not match")
            return None
        self.engines.append(Engine(self, plan))
        return self.as_engine(self.engines[-1])


def install(monkeypatch: Any, devices: int = 1) -> tuple[fake_cuda.FakeRuntime, Module]:
    """Replaces the real GPU and TensorRT for one test."""
    runtime = fake_cuda.FakeRuntime(devices)
    module = Module(runtime)
    fake_cuda.install(monkeypatch, runtime)
    monkeypatch.setattr(tensorrt_engine, "import_tensorrt", lambda: module)
    return runtime, module


def write_engine(onnx_path: Path, path: Path, profiles: list[Profile], **stamp: str) -> Path:
    """Writes both files of an engine for the simulated GPU and TensorRT; `stamp` replaces fields of its stamp."""
    session = onnxruntime.InferenceSession(str(onnx_path), session_options(1), providers=["CPUExecutionProvider"])
    metadata = ModelMetadata.from_json(session.get_modelmeta().custom_metadata_map[KEY], onnx_path)
    text = tensorrt_profiles.to_json(profiles)
    usual = {
        "target": "tensorrt",
        "gpu": fake_cuda.NAME.decode(),
        "compute_capability": ".".join(map(str, fake_cuda.CAPABILITY)),
        "tensorrt": VERSION,
        "plugins": "aot",
        "profiles": text,
        "hardware_compatibility": "none",
        "version_compatible": "no",
        "command": "maskrcnn build-engine model.onnx --fp32 --target tensorrt",
    }
    metadata = dataclasses.replace(metadata, stamp={**usual, **stamp})
    path.write_bytes(json.dumps({"onnx": str(onnx_path), "profiles": text}).encode())
    path.with_name(f"{path.name}.json").write_text(metadata.to_json(), encoding="utf-8")
    return path

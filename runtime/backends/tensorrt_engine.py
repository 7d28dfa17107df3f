"""TensorRT engines: loading and checking a plan, and execution contexts with their memory and CUDA graphs."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from maskrcnn.errors import UserError
from maskrcnn.metadata import ModelMetadata, not_ours
from maskrcnn.runtime.backends.base import Specs, TensorSpec, detector_specs
from maskrcnn.runtime.backends.tensorrt_library import (
    Log,
    PluginForm,
    check_stamp,
    import_tensorrt,
    listen,
    load_plugins,
)
from maskrcnn.runtime.build import profiles as tensorrt_profiles
from maskrcnn.runtime.build.messages import failure
from maskrcnn.runtime.build.profiles import Profile
from maskrcnn.runtime.engine_files import STAGE_PREFIX, metadata_path, read_engine
from maskrcnn.runtime.gpu.arrays import DeviceArray
from maskrcnn.runtime.gpu.images import ImageLoader
from maskrcnn.runtime.gpu.memory import BufferPool, Cuda, DeviceMemory, Graph, PooledBuffer, StagingBuffer

_REBUILD = "maskrcnn build-engine --fp16 --target tensorrt"
_DTYPES = {  # TensorRT type to NumPy type
    "FLOAT": "float32",
    "HALF": "float16",
    "INT64": "int64",
    "INT32": "int32",
    "UINT8": "uint8",
}


@dataclass(frozen=True)
class _LoadedPlan:
    """An engine in GPU memory; it creates execution contexts."""

    cuda: Cuda
    trt: Any  # the tensorrt module
    log: Log  # TensorRT's messages since the engine was loaded
    runtime: Any  # must live as long as the engine
    engine: Any
    metadata: ModelMetadata
    profiles: tuple[Profile, ...]
    inputs: Specs
    outputs: Specs

    def failure(self, what: str) -> UserError:
        """Returns the error for a failed TensorRT operation, with TensorRT's messages."""
        return failure(self.log.take(), what, "an engine that runs")

    def choose(self, shape: Shape) -> int:
        """Returns the profile for an input shape; see `profiles.choose`."""
        return tensorrt_profiles.choose(self.profiles, shape, rebuild=self._rebuild)

    def padded_shape(self, shape: Shape) -> Shape:
        """Returns the shape to pad a batch to; see `profiles.padded_shape`."""
        return tensorrt_profiles.padded_shape(self.profiles, shape, rebuild=self._rebuild)

    @property
    def _rebuild(self) -> str:
        return str(self.metadata.stamp.get("command") or _REBUILD)


def load_plan(path: Path, device: int) -> _LoadedPlan:
    """Loads an engine onto a GPU.

    Raises:
        UserError: if a file is missing or not an engine of this package, TensorRT or the GPU is missing, the stamp is
            for another machine, weights or a plugin library are missing, or TensorRT cannot load the plan.
    """
    metadata, plan = read_engine(path)
    trt = import_tensorrt()
    cuda = Cuda(device)
    if error := check_stamp(metadata, trt=trt, gpu=cuda.name, compute_capability=cuda.compute_capability):
        raise UserError(f"{path}: {error.found}", error.expected, error.fix)
    if metadata.stamp.get("plugins") == PluginForm.LIBRARY.value:  # ahead-of-time plugins are in the engine
        load_plugins(trt, PluginForm.LIBRARY, arch=cuda.arch)
    log = listen(trt)
    with cuda.active():
        runtime = trt.Runtime(log.logger)
        if metadata.stamp.get("version_compatible") == "yes":
            runtime.engine_host_code_allowed = True  # a version-compatible plan contains its own TensorRT runtime
        engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        raise failure(log.messages, f"{path}: TensorRT cannot load it", f"a plan of `{_REBUILD}`")
    inputs, outputs = _tensors(trt, engine, path)
    _check_contract({**inputs, **outputs}, metadata, path)
    profiles = tensorrt_profiles.from_json(str(metadata.stamp.get("profiles")))
    if len(profiles) != engine.num_optimization_profiles:
        raise not_ours(
            path, f"{engine.num_optimization_profiles} profiles, and {len(profiles)} in its {metadata_path(path).name}"
        )
    return _LoadedPlan(cuda, trt, log, runtime, engine, metadata, tuple(profiles), inputs, outputs)


def _tensors(trt: Any, engine: Any, path: Path) -> tuple[Specs, Specs]:
    """Inputs and outputs by name; a dimension that depends on the profile is None."""
    inputs: Specs = {}
    outputs: Specs = {}
    for index in range(engine.num_io_tensors):
        name = engine.get_tensor_name(index)
        kind = engine.get_tensor_dtype(name).name
        if kind not in _DTYPES:
            raise not_ours(path, f"a tensor {name} of type {kind}")
        shape = tuple(None if length < 0 else int(length) for length in engine.get_tensor_shape(name))
        is_input = engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT
        (inputs if is_input else outputs)[name] = TensorSpec(_DTYPES[kind], shape)
    return inputs, outputs


def _check_contract(tensors: Specs, metadata: ModelMetadata, path: Path) -> None:
    """Raises if the plan's tensors differ from its metadata, which then belongs to another file."""
    inputs, outputs = detector_specs(metadata)
    expected = {**inputs, **outputs}
    # An engine built for verification also has its stages as outputs.
    found = {name: spec for name, spec in tensors.items() if not name.startswith(STAGE_PREFIX)}
    differing = {name for name in expected.keys() | found.keys() if not _agree(found.get(name), expected.get(name))}
    if differing:
        raise not_ours(path, f"{', '.join(sorted(differing))} other than {metadata_path(path).name} says")


def _agree(found: TensorSpec | None, expected: TensorSpec | None) -> bool:
    """Whether two specs agree; a dynamic dimension agrees with any length."""
    if found is None or expected is None or found.dtype != expected.dtype or len(found.shape) != len(expected.shape):
        return False
    return all(None in pair or pair[0] == pair[1] for pair in zip(found.shape, expected.shape, strict=True))


# Execution
#
# A CUDA graph captures the state of a context, and TensorRT does not document what may change afterwards. Therefore
# each input shape has its own context with a fixed shape, profile and addresses. Contexts of one stream run one at a
# time and share their scratch memory, which is most of a context's memory.

_ALIGNMENT = 256  # bytes, of every address passed to TensorRT (IExecutionContext::setTensorAddress)
_CAPTURED_RUN = 2  # in the first run TensorRT initialises, which cannot be captured

Shape = tuple[int, int, int]  # images, height and width in pixels


@dataclass(frozen=True)
class _Slot:
    """Position of a tensor in a block of memory."""

    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


def _layout(tensors: Mapping[str, tuple[tuple[int, ...], str]]) -> tuple[dict[str, _Slot], int]:
    """Returns slots of tensors in one block, which one copy transfers, and the block's size in bytes."""
    slots: dict[str, _Slot] = {}
    end = 0
    for name, (shape, dtype) in tensors.items():
        slots[name] = _Slot(end, tuple(shape), np.dtype(dtype))
        end += -(-slots[name].nbytes // _ALIGNMENT) * _ALIGNMENT
    return slots, end


class Binding:
    """An execution context for one input shape, with its memory and its CUDA graph.

    Args:
        plan: the engine.
        shape: number, height and width of the images.
        contexts: owner of the stream and the shared memory.
        graphs: capture a graph on the second run and launch it from then on.

    Raises:
        UserError: if no profile fits the shape, or memory is insufficient.
    """

    def __init__(self, plan: _LoadedPlan, shape: Shape, contexts: ExecutionContexts, *, graphs: bool) -> None:
        self.plan, self.contexts, self.stream, self.graphs = plan, contexts, contexts.stream, graphs
        self.graph: Graph | None = None
        self.graph_refusal = ""  # why the engine cannot be captured
        self._runs = 0
        self._addresses: dict[str, int] = {}  # addresses set in the context
        self._borrowed: dict[str, DeviceArray] = {}  # callers' arrays that the run reads
        user_managed = plan.trt.ExecutionContextAllocationStrategy.USER_MANAGED
        profile = plan.choose(shape)
        self.context = plan.engine.create_execution_context(user_managed)
        if self.context is None:
            raise plan.failure("TensorRT creates no execution context")
        self.context.set_device_memory(contexts.scratch.address, contexts.scratch.nbytes)
        self._call_context("set_optimization_profile_async", profile, self.stream.address)
        inputs = {name: (_input_shape(spec, shape), spec.dtype) for name, spec in plan.inputs.items()}
        for name, (input_shape, _) in inputs.items():
            self._call_context("set_input_shape", name, input_shape)
        outputs = {name: (self._output_shape(name), spec.dtype) for name, spec in plan.outputs.items()}
        (self._inputs, input_bytes), (self._outputs, self._output_bytes) = _layout(inputs), _layout(outputs)
        self._input_memory = plan.cuda.memory(input_bytes)
        self._output_memory = plan.cuda.memory(self._output_bytes)
        self._pool = BufferPool(plan.cuda, self._output_bytes)

    def _output_shape(self, name: str) -> tuple[int, ...]:
        shape = tuple(int(length) for length in self.context.get_tensor_shape(name))
        if any(length < 0 for length in shape):
            raise self.plan.failure(f"TensorRT cannot infer the shape of {name}")
        return shape

    def _call_context(self, name: str, *arguments: Any) -> None:
        """Calls a method of the context that returns whether it succeeded."""
        if not getattr(self.context, name)(*arguments):
            raise self.plan.failure(f"TensorRT refuses {name}({', '.join(map(str, arguments))})")

    def put(self, name: str, value: np.ndarray | DeviceArray) -> None:
        """Sets an input.

        Args:
            name: name of the input.
            value: array on the host, padded with zeros if it is smaller, or on the GPU. An array on the GPU is read in
                place and must not change before the run ends. With a CUDA graph it is copied, as addresses are
                fixed, unless it is `input(name)`.
        """
        slot = self._inputs[name]
        address = self._input_memory.address + slot.offset
        if not isinstance(value, DeviceArray):
            staging = self.contexts.staging[name]
            staged = staging.reserve(slot.nbytes).array(slot.shape, slot.dtype)
            if value.shape != slot.shape:
                staged[...] = 0
            staged[tuple(slice(length) for length in value.shape)] = value
            staging.send(self.stream, address, slot.nbytes)
        else:
            if value.shape != slot.shape:
                found, expected = list(value.shape), list(slot.shape)
                raise ValueError(f"found: {name} {found} on the GPU; expected: {expected}; fix: bind its own shape")
            if not self.graphs and value.address % _ALIGNMENT == 0:
                address = value.address
            elif value.address != address:
                self.stream.copy(address, value.address, slot.nbytes)
            self._borrowed[name] = value
        self._set_address(name, address)

    def input(self, name: str) -> DeviceArray:
        """Returns the memory of an input; write to it on the contexts' stream before a run."""
        slot = self._inputs[name]
        self._set_address(name, self._input_memory.address + slot.offset)
        return self._view(slot, self._input_memory)

    def run(self, *, own_outputs: bool = False) -> dict[str, DeviceArray]:
        """Starts inference without waiting for it.

        Args:
            own_outputs: return outputs in new memory. Otherwise they are valid until the next run, and `fetch` copies
                them to the host.
        """
        self._runs += 1
        target = self._pool.acquire(self.stream) if own_outputs else self._output_memory
        written = self._output_memory if self.graphs else target
        for name, slot in self._outputs.items():
            self._set_address(name, written.address + slot.offset)
        if self.graphs and self._runs == _CAPTURED_RUN:
            self._capture()
        if self.graph is not None:
            self.graph.launch(self.stream)
        else:
            self._call_context("execute_async_v3", self.stream.address)
        if target is not written:
            self.stream.copy(target.address, written.address, self._output_bytes)
        return {name: self._view(slot, target) for name, slot in self._outputs.items()}

    def fetch(self, images: int | None = None) -> dict[str, np.ndarray]:
        """Copies the outputs of the last run to the host and waits for them.

        Args:
            images: number of images of the batch to return (default: all).
        """
        self.download()
        return self.downloaded(images)

    def download(self) -> None:
        """Starts copying the outputs to the host."""
        staged = self.contexts.staging["outputs"].reserve(self._output_bytes)
        self.stream.copy(staged.address, self._output_memory.address, self._output_bytes, "DeviceToHost")

    def downloaded(self, images: int | None = None) -> dict[str, np.ndarray]:
        """Waits for `download` and returns the outputs."""
        self.wait()
        staged = self.contexts.staging["outputs"].reserve(self._output_bytes)
        return {
            name: staged.array(slot.shape, slot.dtype, slot.offset)[:images].copy()
            for name, slot in self._outputs.items()
        }

    def wait(self) -> None:
        """Waits until the last run has ended."""
        self.stream.synchronize()
        self._borrowed.clear()

    def close(self) -> None:
        """Frees everything except outputs that callers hold."""
        if self.graph is not None:
            self.graph.close()
        self.context = self.graph = None
        self._input_memory.close()
        self._output_memory.close()

    def _capture(self) -> None:
        try:
            self.graph = self.stream.capture(lambda: self._call_context("execute_async_v3", self.stream.address))
        except Exception as error:  # from CUDA or TensorRT; the engine also runs without a graph
            self.graph_refusal = " ".join(str(error).split())
            self.graphs = False

    def _set_address(self, name: str, address: int) -> None:
        if self._addresses.get(name) != address:
            self._call_context("set_tensor_address", name, address)
            self._addresses[name] = address

    def _view(self, slot: _Slot, memory: DeviceMemory | PooledBuffer) -> DeviceArray:
        return DeviceArray(memory.address + slot.offset, slot.shape, slot.dtype, stream=self.stream, owner=memory)


class ExecutionContexts:
    """Execution contexts of an engine on one stream, one for each recent input shape. For one thread at a time.

    Args:
        plan: the engine.
        graphs: see `Binding`.
        shapes: number of input shapes to keep.
        loader: image loader for the stream, if images are resized on the GPU.
    """

    def __init__(self, plan: _LoadedPlan, *, graphs: bool, shapes: int, loader: ImageLoader | None = None) -> None:
        self.plan, self.graphs, self.shapes, self.loader = plan, graphs, shapes, loader
        self.stream = plan.cuda.stream()
        self.scratch = plan.cuda.memory(plan.engine.device_memory_size_v2)
        self.staging = {name: StagingBuffer(plan.cuda) for name in (*plan.inputs, "outputs")}
        self.bindings: OrderedDict[Shape, Binding] = OrderedDict()  # by last use, the most recent last

    def bind(self, shape: Shape) -> Binding:
        """Returns the binding for an input shape. A new binding replaces the least recently used one.

        Raises:
            UserError: as `Binding`.
        """
        if shape not in self.bindings:
            self.plan.choose(shape)  # raises before another binding is closed
            with self.plan.cuda.active():
                while len(self.bindings) >= self.shapes:
                    self.stream.synchronize()
                    self.bindings.popitem(last=False)[1].close()
                self.bindings[shape] = Binding(self.plan, shape, self, graphs=self.graphs)
        self.bindings.move_to_end(shape)
        return self.bindings[shape]

    def close(self) -> None:
        """Waits for running work and frees everything."""
        with self.plan.cuda.active():
            self.stream.synchronize()
            while self.bindings:
                self.bindings.popitem()[1].close()
            if self.loader is not None:
                self.loader.close()
            for staging in self.staging.values():
                staging.close()
            self.scratch.close()
            self.stream.close()


def _input_shape(spec: TensorSpec, shape: Shape) -> tuple[int, ...]:
    """`[N, 3, H, W]` for `images` and `[N, 2]` for `image_sizes`."""
    images, height, width = shape
    return (images, 3, height, width) if len(spec.shape) == 4 else (images, 2)

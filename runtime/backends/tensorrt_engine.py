"""Loading a TensorRT engine: its two files, the stamp, what its plugins need, and the tensors that it has."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from maskrcnn.errors import UserError
from maskrcnn.metadata import ModelMetadata, not_ours
from maskrcnn.runtime.backends.base import TensorSpec, detector_specs
from maskrcnn.runtime.backends.tensorrt_library import (
    Log,
    PluginForm,
    Weights,
    check_stamp,
    import_tensorrt,
    listen,
    load_plugins,
)
from maskrcnn.runtime.build import profiles as tensorrt_profiles
from maskrcnn.runtime.build.messages import failure
from maskrcnn.runtime.build.profiles import Profile
from maskrcnn.runtime.gpu.arrays import DeviceArray
from maskrcnn.runtime.gpu.memory import Cuda, DeviceMemory, Graph, Loan, MemoryPool, Staging
from maskrcnn.runtime.onnx_file import PREFIX

_REBUILD = "maskrcnn build-engine --fp16 --target tensorrt"
_DTYPES = {  # TensorRT's types, and NumPy's
    "FLOAT": "float32",
    "HALF": "float16",
    "INT64": "int64",
    "INT32": "int32",
    "UINT8": "uint8",
}


@dataclass(frozen=True)
class _LoadedPlan:
    """An engine in a GPU's memory, ready for execution contexts."""

    cuda: Cuda
    trt: Any  # the tensorrt module
    log: Log  # what TensorRT says since this was loaded
    runtime: Any  # which lives as long as the engine
    engine: Any
    metadata: ModelMetadata
    profiles: tuple[Profile, ...]
    inputs: dict[str, TensorSpec]
    outputs: dict[str, TensorSpec]

    def failure(self, what: str) -> UserError:
        """The error for something that TensorRT refused to do, by what it said."""
        return failure(self.log.take(), what, "an engine that runs")

    def choose(self, shape: tuple[int, int, int]) -> int:
        """The profile for so many images of this height and width; see `profiles.choose`."""
        return tensorrt_profiles.choose(self.profiles, shape, rebuild=self._rebuild)

    def roomy_shape(self, shape: tuple[int, int, int]) -> tuple[int, int, int]:
        """What to pad a batch to; see `profiles.roomy_shape`."""
        return tensorrt_profiles.roomy_shape(self.profiles, shape, rebuild=self._rebuild)

    @property
    def _rebuild(self) -> str:
        return str(self.metadata.stamp.get("command") or _REBUILD)


def metadata_path(path: Path) -> Path:
    """The second file of an engine: `model.engine.json` of `model.engine`."""
    return path.with_name(f"{path.name}.json")


def load_plan(path: Path, device: int) -> _LoadedPlan:
    """The engine of a file, on the GPU of this number.

    Raises:
        UserError: where a file is missing or not ours, TensorRT or the GPU is missing, the stamp names another machine,
            weights or a plugin library are not there, or TensorRT refuses the plan.
    """
    metadata, plan = read_engine(path)
    trt = import_tensorrt()
    cuda = Cuda(device)
    if error := check_stamp(metadata, trt=trt, gpu=cuda.name, compute_capability=cuda.compute_capability):
        raise UserError(f"{path}: {error.found}", error.expected, error.fix)
    if metadata.stamp.get("plugins") == PluginForm.LIBRARY.value:  # ahead-of-time plugins are in the engine
        major, minor = cuda.compute_capability
        load_plugins(trt, PluginForm.LIBRARY, arch=10 * major + minor)
    log = listen(trt)
    with cuda.active():
        runtime = trt.Runtime(log.logger)
        if metadata.stamp.get("version_compatible") == "yes":
            runtime.engine_host_code_allowed = True  # such a plan holds a runtime of the version it was built with
        engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        raise failure(log.messages, f"{path}: TensorRT loads no engine from it", f"a plan of `{_REBUILD}`")
    inputs, outputs = _tensors(trt, engine, path)
    _check_contract(inputs, outputs, metadata, path)
    profiles = tensorrt_profiles.from_json(str(metadata.stamp.get("profiles")))
    if len(profiles) != engine.num_optimization_profiles:
        raise not_ours(
            path, f"{engine.num_optimization_profiles} profiles, and {len(profiles)} in its {path.name}.json"
        )
    return _LoadedPlan(cuda, trt, log, runtime, engine, metadata, tuple(profiles), inputs, outputs)


def read_engine(path: Path) -> tuple[ModelMetadata, bytes]:
    """Both files of an engine: its metadata and the plan.

    Raises:
        UserError: where one is missing, the plan holds no weights, or the stamp was written for another plan.
    """
    missing = [each.name for each in (path, metadata_path(path)) if not each.is_file()]
    if missing:
        raise UserError(
            f"no file {' and '.join(missing)} in {path.parent}",
            f"both files of a TensorRT engine, {path.name} and {metadata_path(path).name}",
            f"check the path, or build it: `{_REBUILD}`",
        )
    metadata, plan = ModelMetadata.from_json(metadata_path(path).read_text(encoding="utf-8"), path), path.read_bytes()
    if metadata.stamp.get("refit") == Weights.STRIPPED.value:
        came, expected = f"{path}: an engine without its weights", "one that has got them"
        raise UserError(came, expected, f"put them in: `maskrcnn refit-engine {path.name} MODEL.onnx`")
    if metadata.stamp.get("plan_sha256", (found := hashlib.sha256(plan).hexdigest())) != found:
        raise not_ours(path, f"another plan than the one that {metadata_path(path).name} was written for")
    return metadata, plan


def _tensors(trt: Any, engine: Any, path: Path) -> tuple[dict[str, TensorSpec], dict[str, TensorSpec]]:
    """Inputs and outputs by name; a length that depends on the profile is None."""
    inputs: dict[str, TensorSpec] = {}
    outputs: dict[str, TensorSpec] = {}
    for index in range(engine.num_io_tensors):
        name = engine.get_tensor_name(index)
        kind = engine.get_tensor_dtype(name).name
        if kind not in _DTYPES:
            raise not_ours(path, f"a tensor {name} of type {kind}")
        shape = tuple(None if length < 0 else int(length) for length in engine.get_tensor_shape(name))
        is_input = engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT
        (inputs if is_input else outputs)[name] = TensorSpec(_DTYPES[kind], shape)
    return inputs, outputs


def _check_contract(
    inputs: Mapping[str, TensorSpec], outputs: Mapping[str, TensorSpec], metadata: ModelMetadata, path: Path
) -> None:
    """Refuses a plan whose tensors are not the detector's: its .json belongs to another file."""
    wanted_inputs, wanted_outputs = detector_specs(metadata)
    wanted = {**wanted_inputs, **wanted_outputs}
    # An engine that was built to look into it has its stages as further outputs.
    found = {name: spec for name, spec in {**inputs, **outputs}.items() if not name.startswith(PREFIX)}
    differing = {name for name in wanted.keys() | found.keys() if not _agree(found.get(name), wanted.get(name))}
    if differing:
        raise not_ours(path, f"{', '.join(sorted(differing))} other than {metadata_path(path).name} says")


def _agree(found: TensorSpec | None, wanted: TensorSpec | None) -> bool:
    """Whether a tensor is as the contract has it; where one of them leaves a length open, any is right."""
    if found is None or wanted is None or found.dtype != wanted.dtype or len(found.shape) != len(wanted.shape):
        return False
    return all(None in pair or pair[0] == pair[1] for pair in zip(found.shape, wanted.shape, strict=True))


# Running a TensorRT engine: execution contexts with their memory and graphs, one thread at a time.
#
# A CUDA graph is made of a context as it is, and TensorRT does not say what of the context may change afterwards. So
# each input shape has a context of its own, whose shape, profile and addresses stay; the contexts of a lane share its
# scratch memory, which is the large part of what a context needs, because only one of them runs at a time.

_ALIGNMENT = 256  # bytes, of every address that TensorRT gets (IExecutionContext::setTensorAddress)
_CAPTURED_AT = 2  # the run that is captured: the first one lets TensorRT prepare itself, which a graph cannot hold

Shape = tuple[int, int, int]  # images, height and width in pixels


@dataclass(frozen=True)
class _Slot:
    """Where a tensor lies in a block of memory."""

    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        """How much memory it takes."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


@dataclass(frozen=True)
class _Block:
    """Tensors one after the other in one block of memory, so that one copy moves all of them."""

    slots: dict[str, _Slot]
    nbytes: int

    @classmethod
    def of(cls, tensors: Mapping[str, tuple[tuple[int, ...], str]]) -> _Block:
        """The block for shapes and types by name."""
        slots, end = {}, 0
        for name, (shape, dtype) in tensors.items():
            slots[name] = _Slot(end, tuple(shape), np.dtype(dtype))
            end += -(-slots[name].nbytes // _ALIGNMENT) * _ALIGNMENT
        return cls(slots, end)


class Bound:
    """An engine with inputs of one shape.

    Args:
        plan: the engine.
        shape: of the images.
        lane: whose stream and memory it uses.
        graphs: capture a graph on the second run, and run that from then on.

    Raises:
        UserError: where no profile takes the shape, or memory is short.
    """

    def __init__(self, plan: _LoadedPlan, shape: Shape, lane: Lane, *, graphs: bool) -> None:
        profile = plan.choose(shape)
        self.plan, self.lane, self.stream, self.graphs = plan, lane, lane.stream, graphs
        self.graph: Graph | None = None
        self.why_no_graph = ""  # what the capture said, where the engine cannot be captured
        self._runs = 0
        self._aims: dict[str, int] = {}  # the context's addresses
        self._borrowed: dict[str, DeviceArray] = {}  # what it reads of others
        self.context = self._new_context(profile)
        inputs = {name: (_with_shape(spec, shape), spec.dtype) for name, spec in plan.inputs.items()}
        for name, (wanted, _) in inputs.items():
            self._do("set_input_shape", name, wanted)
        outputs = {name: (self._shape_of(name), spec.dtype) for name, spec in plan.outputs.items()}
        self.inputs, self.outputs = _Block.of(inputs), _Block.of(outputs)
        self._given = lane.cuda.memory(self.inputs.nbytes)
        self._found = lane.cuda.memory(self.outputs.nbytes)
        self._loans = MemoryPool(lane.cuda, self.outputs.nbytes)

    def _new_context(self, profile: int) -> Any:
        user_managed = self.plan.trt.ExecutionContextAllocationStrategy.USER_MANAGED
        self.context = self.plan.engine.create_execution_context(user_managed)
        if self.context is None:
            raise self.plan.failure("TensorRT makes no execution context")
        self.context.set_device_memory(self.lane.scratch.address, self.lane.scratch.nbytes)
        self._do("set_optimization_profile_async", profile, self.stream.address)
        return self.context

    def _shape_of(self, output: str) -> tuple[int, ...]:
        shape = tuple(int(length) for length in self.context.get_tensor_shape(output))
        if any(length < 0 for length in shape):
            raise self.plan.failure(f"TensorRT does not know the shape of {output} beforehand")
        return shape

    def _do(self, name: str, *arguments: Any) -> None:
        """Calls a function of the context that answers whether it worked."""
        if not getattr(self.context, name)(*arguments):
            raise self.plan.failure(f"TensorRT refuses {name}({', '.join(map(str, arguments))})")

    # Inputs

    def put(self, name: str, value: np.ndarray | DeviceArray) -> None:
        """Gives an input.

        Args:
            name: of the input.
            value: on the host, where a smaller array is filled up with zeros, or on the GPU. There it is read where it
                lies, and must not change before the run is over; but a graph, whose addresses are fixed, gets a copy of
                it, unless it is `input(name)`.
        """
        slot = self.inputs.slots[name]
        own = self._given.address + slot.offset
        if not isinstance(value, DeviceArray):
            self._send(name, slot, own, value)
        elif value.shape != slot.shape:
            came, expected = list(value.shape), list(slot.shape)
            raise ValueError(f"found: {name} {came} on the GPU; expected: {expected}; fix: bind the shape that it has")
        elif self.graphs or value.address % _ALIGNMENT:
            if value.address != own:
                self.stream.copy(own, value.address, slot.nbytes)
        else:
            own = value.address
        if isinstance(value, DeviceArray):
            self._borrowed[name] = value
        self._aim(name, own)

    def _send(self, name: str, slot: _Slot, target: int, value: np.ndarray) -> None:
        staging = self.lane.staging[name]
        staged = staging.room(slot.nbytes).array(slot.shape, slot.dtype)
        if value.shape != slot.shape:
            staged[...] = 0
        staged[tuple(slice(length) for length in value.shape)] = value
        staging.send(self.stream, target, slot.nbytes)

    def input(self, name: str) -> DeviceArray:
        """The memory that `name` is read from, to be written on the lane's stream before a run."""
        slot = self.inputs.slots[name]
        self._aim(name, self._given.address + slot.offset)
        return self._view(slot, self._given)

    # The run

    def run(self, *, lend: bool = False) -> dict[str, DeviceArray]:
        """Starts the engine on what was put in, without waiting for it.

        Args:
            lend: give the results memory of their own. Otherwise `fetch` copies them to the host, and the arrays hold
                them until the lane is used again.
        """
        self._runs += 1
        target = self._loans.lend(self.stream) if lend else self._found
        written = self._found if self.graphs else target
        for name, slot in self.outputs.slots.items():
            self._aim(name, written.address + slot.offset)
        if self.graphs and self._runs == _CAPTURED_AT:
            self._capture()
        if self.graph is not None:
            self.graph.launch(self.stream)
        else:
            self._do("execute_async_v3", self.stream.address)
        if target is not written:
            self.stream.copy(target.address, written.address, self.outputs.nbytes)
        return {name: self._view(slot, target) for name, slot in self.outputs.slots.items()}

    def fetch(self, images: int | None = None) -> dict[str, np.ndarray]:
        """The results of the newest run, which lent nothing, on the host; waits for them.

        Args:
            images: how many of the batch; by default all.
        """
        self.download()
        return self.downloaded(images)

    def downloaded(self, images: int | None = None) -> dict[str, np.ndarray]:
        """What `download` copies; waits for it."""
        self.wait()
        staged = self.lane.staging["outputs"].room(self.outputs.nbytes)
        return {
            name: staged.array(slot.shape, slot.dtype, slot.offset)[:images].copy()
            for name, slot in self.outputs.slots.items()
        }

    def download(self) -> None:
        """Starts copying the results to where `fetch` reads them."""
        staged = self.lane.staging["outputs"].room(self.outputs.nbytes)
        self.stream.copy(staged.address, self._found.address, self.outputs.nbytes, "DeviceToHost")

    def wait(self) -> None:
        """Waits until the newest run is over."""
        self.stream.synchronize()
        self._borrowed.clear()

    def close(self) -> None:
        """Gives back everything but what is lent."""
        if self.graph is not None:
            self.graph.close()
        self.context = self.graph = None
        self._given.close()
        self._found.close()

    def _capture(self) -> None:
        try:
            self.graph = self.stream.capture(lambda: self._do("execute_async_v3", self.stream.address))
        except Exception as error:  # of CUDA or of TensorRT, which runs the engine without a graph as well
            self.why_no_graph = " ".join(str(error).split())
            self.graphs = False

    def _aim(self, name: str, address: int) -> None:
        if self._aims.get(name) != address:
            self._do("set_tensor_address", name, address)
            self._aims[name] = address

    def _view(self, slot: _Slot, memory: DeviceMemory | Loan) -> DeviceArray:
        return DeviceArray(memory.address + slot.offset, slot.shape, slot.dtype, stream=self.stream, owner=memory)


class Lane:
    """One thread's way through an engine: a stream, scratch memory, and the newest shapes with their contexts.

    Args:
        plan: the engine.
        cuda: its GPU.
        graphs: as for `Bound`.
        shapes: how many to keep.
    """

    def __init__(self, plan: _LoadedPlan, cuda: Cuda, *, graphs: bool, shapes: int) -> None:
        self.plan, self.cuda, self.graphs, self.shapes = plan, cuda, graphs, shapes
        self.stream = cuda.stream()
        self.scratch = cuda.memory(plan.engine.device_memory_size_v2)
        self.staging = {name: Staging(cuda) for name in (*plan.inputs, "outputs")}
        self.bound: OrderedDict[Shape, Bound] = OrderedDict()  # the newest last

    def bind(self, shape: Shape) -> Bound:
        """The engine with inputs of this shape; the one not used for longest makes room.

        Raises:
            UserError: as `Bound`.
        """
        if shape not in self.bound:
            self.plan.choose(shape)  # what is refused costs no other shape its place
            with self.cuda.active():
                while len(self.bound) >= self.shapes:
                    self.stream.synchronize()
                    self.bound.popitem(last=False)[1].close()
                self.bound[shape] = Bound(self.plan, shape, self, graphs=self.graphs)
        self.bound.move_to_end(shape)
        return self.bound[shape]

    def close(self) -> None:
        """Gives everything back; waits for what is running."""
        with self.cuda.active():
            self.stream.synchronize()
            while self.bound:
                self.bound.popitem()[1].close()
            for each in (*self.staging.values(), self.scratch, self.stream):
                each.close()


def _with_shape(spec: TensorSpec, shape: Shape) -> tuple[int, ...]:
    """`images` `[N, 3, H, W]` and `image_sizes` `[N, 2]`."""
    images, height, width = shape
    return (images, 3, height, width) if len(spec.shape) == 4 else (images, 2)

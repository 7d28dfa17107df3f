"""Running a TensorRT engine: execution contexts with their memory and graphs, one thread at a time.

A CUDA graph is made of a context as it is, and TensorRT does not say what of the context may change afterwards. So each
input shape has a context of its own, whose shape, profile and addresses stay; the contexts of a lane share its scratch
memory, which is the large part of what a context needs, because only one of them runs at a time.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from maskrcnn.runtime.backend import TensorSpec
from maskrcnn.runtime.device.arrays import DeviceArray
from maskrcnn.runtime.device.memory import Cuda, DeviceMemory, Graph
from maskrcnn.runtime.device.pools import Loan, MemoryPool, Staging
from maskrcnn.runtime.trt.plan import LoadedPlan

ALIGNMENT = 256  # bytes, of every address that TensorRT gets (IExecutionContext::setTensorAddress)
_CAPTURED_AT = 2  # the run that is captured: the first one lets TensorRT prepare itself, which a graph cannot hold

Shape = tuple[int, int, int]  # images, height and width in pixels


@dataclass(frozen=True)
class Slot:
    """Where a tensor lies in a block of memory."""

    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        """How much memory it takes."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


@dataclass(frozen=True)
class Block:
    """Tensors one after the other in one block of memory, so that one copy moves all of them."""

    slots: dict[str, Slot]
    nbytes: int

    @classmethod
    def of(cls, tensors: Mapping[str, tuple[tuple[int, ...], str]]) -> Block:
        """The block for shapes and types by name."""
        slots, end = {}, 0
        for name, (shape, dtype) in tensors.items():
            slots[name] = Slot(end, tuple(shape), np.dtype(dtype))
            end += -(-slots[name].nbytes // ALIGNMENT) * ALIGNMENT
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

    def __init__(self, plan: LoadedPlan, shape: Shape, lane: Lane, *, graphs: bool) -> None:
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
        self.inputs, self.outputs = Block.of(inputs), Block.of(outputs)
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
            raise ValueError(f"came: {name} {came} on the GPU; expected: {expected}; do: bind the shape that it has")
        elif self.graphs or value.address % ALIGNMENT:
            if value.address != own:
                self.stream.copy(own, value.address, slot.nbytes)
        else:
            own = value.address
        if isinstance(value, DeviceArray):
            self._borrowed[name] = value
        self._aim(name, own)

    def _send(self, name: str, slot: Slot, target: int, value: np.ndarray) -> None:
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

    def _view(self, slot: Slot, memory: DeviceMemory | Loan) -> DeviceArray:
        return DeviceArray(memory.address + slot.offset, slot.shape, slot.dtype, stream=self.stream, owner=memory)


class Lane:
    """One thread's way through an engine: a stream, scratch memory, and the newest shapes with their contexts.

    Args:
        plan: the engine.
        cuda: its GPU.
        graphs: as for `Bound`.
        shapes: how many to keep.
    """

    def __init__(self, plan: LoadedPlan, cuda: Cuda, *, graphs: bool, shapes: int) -> None:
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

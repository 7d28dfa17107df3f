"""PyTorch's streams, events and CUDA graphs on a machine without a GPU, with detection of races.

Tensors are in host memory and report one GPU as their device. Operations run immediately, but each is attributed to the
GPU's current stream, and only events order the streams. Two uses of the same memory without an order are a race if one
of them writes. A capture records operations if its stream is on the tensors' GPU. It fills memory that they allocate
with an arbitrary value, restores other memory, and raises if a value is read. Graphs of one pool share memory.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

RUBBISH = 77


class Stream:
    """torch.cuda.Stream; its clock is the progress of every stream that its next operation waits for."""

    def __init__(self, gpu: Gpu, device: int) -> None:
        self.gpu, self.device = gpu, device
        self.clock: Counter[Stream] = Counter()

    def wait_event(self, event: Event) -> None:
        self.clock |= event.clock

    def wait_stream(self, other: Stream) -> None:
        self.clock |= other.clock


class Event:
    """torch.cuda.Event."""

    def __init__(self, gpu: Gpu) -> None:
        self.gpu = gpu
        self.clock: Counter[Stream] = Counter()

    def record(self, stream: Stream | None = None) -> None:
        self.clock = (stream or self.gpu.current[self.gpu.device_now]).clock.copy()

    def synchronize(self) -> None:
        self.gpu.host |= self.clock

    def elapsed_time(self, later: Event) -> float:
        return 1.5


class Graph:
    """torch.cuda.CUDAGraph."""

    def __init__(self, gpu: Gpu) -> None:
        self.gpu, self.pool = gpu, None
        self.work: list[tuple[Any, tuple, dict, list[Tensor]]] = []
        self.newest: tuple[Stream, int] | None = None  # stream and number of its last run

    def replay(self) -> None:
        with self.gpu.unwatched(), torch.no_grad():
            for function, arguments, named, made in self.work:
                self.gpu.note(function, arguments, named, made)
                found = tree_leaves(function(*arguments, **named))
                for place, value in zip(made, (each for each in found if isinstance(each, Tensor)), strict=True):
                    if place is not value and not self.gpu.alias(place, value):
                        place.copy_(value)
        stream = self.gpu.stream_of_tensors
        self.gpu.use(("pool", self.pool), stream, writes=True)
        self.newest = stream, stream.clock[stream]

    def __del__(self) -> None:
        if self.newest is not None:
            stream, number = self.newest
            if self.gpu.host[stream] < number:
                self.gpu.races.append("a graph that may be running is destroyed")


class Gpu(TorchDispatchMode):
    """Replaces `torch.cuda` within its context.

    Args:
        index: index of the GPU that all tensors report as their device.
    """

    def __init__(self, index: int) -> None:
        super().__init__()
        self.index, self.device_now = index, 0
        self.default = [Stream(self, device) for device in range(index + 1)]
        self.current = list(self.default)
        self.host: Counter[Stream] = Counter()  # what the host has waited for
        self.races: list[str] = []
        self.capture: Graph | None = None
        self.capture_stream: Stream | None = None
        self._new: set[int] = set()  # memory allocated during the capture
        self._before: dict[int, tuple[Tensor, Tensor]] = {}  # other memory that the capture writes, and its content
        self._own_capture_stream: Stream | None = None
        self._uses: dict[Any, tuple[dict[Stream, int], dict[Stream, int]]] = {}  # reads and writes
        self._kept: list[Any] = []  # keeps objects alive, so that addresses are not reused
        self._watching = True
        self._pools = itertools.count(1)

    def install(self, monkeypatch: Any) -> None:
        for name in (
            "Stream",
            "Event",
            "CUDAGraph",
            "stream",
            "current_stream",
            "graph",
            "graph_pool_handle",
            "device",
        ):
            monkeypatch.setattr(torch.cuda, name, getattr(self, f"_{name}"))
        monkeypatch.setattr(torch.cuda, "device_of", lambda tensor: self._device(tensor.device))

    @property
    def stream_of_tensors(self) -> Stream:
        """The stream of the tensors' operations."""
        return self.current[self.index]

    # Replacements of members of torch.cuda

    def _number(self, device: Any) -> int:
        return self.device_now if device is None else self.index

    def _Stream(self, device: Any = None) -> Stream:
        return Stream(self, self._number(device))

    def _Event(self, enable_timing: bool = False) -> Event:
        return Event(self)

    def _CUDAGraph(self) -> Graph:
        return Graph(self)

    def _current_stream(self, device: Any = None) -> Stream:
        return self.current[self._number(device)]

    def _graph_pool_handle(self) -> int:
        return next(self._pools)

    @contextmanager
    def _device(self, device: Any) -> Iterator[None]:
        before, self.device_now = self.device_now, self._number(device)
        try:
            yield
        finally:
            self.device_now = before

    @contextmanager
    def _stream(self, stream: Stream) -> Iterator[None]:
        before, self.current[stream.device] = self.current[stream.device], stream
        try:
            yield
        finally:
            self.current[stream.device] = before

    @contextmanager
    def _graph(
        self, graph: Graph, pool: Any = None, stream: Any = None, capture_error_mode: str = ""
    ) -> Iterator[None]:
        if stream is None:  # PyTorch uses one for the whole process
            self._own_capture_stream = stream = self._own_capture_stream or self._Stream()
        graph.pool = pool
        with self._stream(stream):
            self.capture, self.capture_stream, self._new, self._before = graph, stream, set(), {}
            try:
                yield
            finally:
                self.capture = None
        with self.unwatched(), torch.no_grad():
            for *_, made in graph.work:
                for value in made:
                    if value.untyped_storage().data_ptr() in self._new:
                        value.fill_(RUBBISH)
            for value, content in self._before.values():
                value.copy_(content)

    # Detection of races

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        named = kwargs or {}
        is_captured = self._watching and self.capture is not None and self.stream_of_tensors is self.capture_stream
        if is_captured:
            if function is torch.ops.aten._local_scalar_dense.default:
                raise RuntimeError("a value is read during a capture")
            self._keep_written(function, args, named)
        found = function(*args, **named)
        if self._watching:
            made = [value for value in tree_leaves(found) if isinstance(value, Tensor)]
            if is_captured:
                self.capture.work.append((function, args, named, made))
                self._kept += made
                read = [value for value in tree_leaves((args, named)) if isinstance(value, Tensor)]
                taken = [value for value in made if not any(self.alias(value, other) for other in read)]
                self._new |= {value.untyped_storage().data_ptr() for value in taken}
            else:
                self.note(function, args, named, made)
        return found

    def _keep_written(self, function: Any, args: tuple, named: dict) -> None:
        """Saves the content of memory that an operation writes and that was allocated before the capture."""
        parameters = function._schema.arguments
        given = [*zip(parameters, args, strict=False), *((p, named[p.name]) for p in parameters if p.name in named)]
        for parameter, value in given:
            # The schema of batch norm does not declare that it writes these.
            is_written = parameter.name in ("running_mean", "running_var") or (
                parameter.alias_info is not None and parameter.alias_info.is_write
            )
            for written in tree_leaves(value) if is_written else ():
                place = written.untyped_storage().data_ptr()
                if place not in self._new and place not in self._before:
                    whole = written.detach().as_strided(
                        (written.untyped_storage().nbytes() // written.itemsize,), (1,), 0
                    )
                    self._before[place] = whole, whole.clone()

    @contextmanager
    def unwatched(self) -> Iterator[None]:
        """Operations in this context are not attributed to a stream."""
        self._watching = False
        try:
            yield
        finally:
            self._watching = True

    def note(self, function: Any, arguments: tuple, named: dict, made: list[Tensor]) -> None:
        """Attributes an operation to the stream of the tensors."""
        stream = self.stream_of_tensors
        read = [value for value in tree_leaves((arguments, named)) if isinstance(value, Tensor)]
        if all(any(self.alias(value, other) for other in read) for value in made) and not function._schema.is_mutable:
            return  # a view
        for value in read:
            self.use(value.untyped_storage().data_ptr(), stream, writes=False, keep=value)
        for value in made:
            self.use(value.untyped_storage().data_ptr(), stream, writes=True, keep=value)

    def use(self, memory: Any, stream: Stream, *, writes: bool, keep: Any = None) -> None:
        """Records a use of memory, and a race if another use may not be complete."""
        self._kept.append(keep)
        stream.clock |= self.host
        reads, written = self._uses.setdefault(memory, ({}, {}))
        for others in (reads, written) if writes else (written,):
            if any(stream.clock[other] < number for other, number in others.items()):
                self.races.append(f"{memory} is {'written' if writes else 'read'} while it is in use")
        stream.clock[stream] += 1
        (written if writes else reads)[stream] = stream.clock[stream]

    @staticmethod
    def alias(one: Tensor, other: Tensor) -> bool:
        """Whether both use the same memory."""
        return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()

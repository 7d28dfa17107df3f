"""A simulated GPU in host memory: the functions of `cuda.bindings.runtime` and `.driver` that the package calls.

All work is deferred: copies and kernels wait in their stream until it is synchronised, so memory that is written or
freed too early gives wrong results or an error. Allocations are counted, addresses are checked, and tests can make any
function fail. Resources belong to the thread's current GPU; launching a kernel on a stream of another GPU is an error.
"""

from __future__ import annotations

import ctypes
import itertools
import threading
from collections import Counter, defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np
from cuda.bindings import driver as real_driver
from cuda.bindings import runtime as real

from maskrcnn.plugins.native import Kernels
from maskrcnn.runtime.gpu import memory

OK = real.cudaError_t.cudaSuccess
INVALID = real.cudaError_t.cudaErrorInvalidValue
NOT_WHILE_CAPTURING = real.cudaError_t.cudaErrorStreamCaptureUnsupported
NAME = b"NVIDIA Simulated"
CAPABILITY = (9, 0)
_ALIGNMENT = 256
_CONTEXTS = 0xC000  # first handle of the GPUs' primary contexts
_WITHOUT_CONTEXT = ("cudaGetDeviceCount", "cudaGetDeviceProperties", "cudaGetErrorString", "cudaSetDevice")
_DEFAULT_STREAMS = (1, 2)  # cudaStreamLegacy, cudaStreamPerThread: those of the thread's GPU


class Properties:
    """The fields of cudaDeviceProp that the package reads."""

    name = NAME
    major, minor = CAPABILITY


class PointerAttributes:
    """The fields of cudaPointerAttributes that the package reads."""

    def __init__(self, device: int) -> None:
        self.device = device


class FakeRuntime:
    """Replaces the module; enumerations and flags are the real ones.

    Args:
        devices: number of GPUs.
    """

    def __init__(self, devices: int = 1) -> None:
        self.devices = devices
        self.driver = FakeDriver(self)
        self.contexts: set[int] = set()  # GPUs with a primary context, which takes memory
        self.device_of: dict[int, int] = {}  # by handle or address: the GPU of the resource
        self.calls: list[str] = []
        self.failing: dict[str, tuple[Any, int]] = {}  # by function: status, and number of successful calls before
        self.memory: dict[int, tuple[Any, int, str]] = {}  # by address: its owner, bytes, "device" or "host"
        self.handles: dict[int, str] = {}  # open streams, events and graphs
        self.queues: dict[int, list[Callable[[], None]]] = defaultdict(list)
        self.captures: dict[int, list[Callable[[], None]]] = {}
        self.recorded: dict[int, tuple[int, int]] = {}  # by event: the stream, and the number of completed operations
        self.done: Counter[int] = Counter()  # by stream: number of completed operations
        self.graphs: dict[int, list[Callable[[], None]]] = {}
        self.threads = threading.local()
        self._numbers = itertools.count(0x1000)
        self._lock = threading.RLock()

    def __getattribute__(self, name: str) -> Any:
        found = object.__getattribute__(self, name)
        return self._watched(name, found) if name.startswith("cuda") and callable(found) else found

    def __getattr__(self, name: str) -> Any:
        value = getattr(real, name)
        if callable(value) and not isinstance(value, type):
            raise AssertionError(f"{name} is a function that the fake does not have")
        return value

    def _watched(self, name: str, function: Callable) -> Callable:
        def call(*arguments: Any) -> Any:
            with self._lock:
                self.calls.append(name)
                if name not in _WITHOUT_CONTEXT:
                    self.device()
                if name in self.failing:
                    status, before = self.failing[name]
                    if before == 0:
                        return status, None
                    self.failing[name] = status, before - 1
                return function(*arguments)

        return call

    # For tests

    @property
    def open(self) -> dict[str, int]:
        """Numbers of resources that have not been freed, by kind."""
        kinds = [kind for _, _, kind in self.memory.values()] + list(self.handles.values())
        return dict(Counter(kinds))

    @property
    def context(self) -> int:
        """The calling thread's context, 0 for none."""
        return getattr(self.threads, "context", 0)

    @context.setter
    def context(self, context: int) -> None:
        self.threads.context = context

    def device(self) -> int:
        """The calling thread's GPU; by default the first, as in the runtime."""
        if self.context == 0:
            self.contexts.add(0)
            self.context = _CONTEXTS
        return self.context - _CONTEXTS

    def launch(self, stream: int, work: Callable[[], None]) -> None:
        """Launches a kernel, which must be on its stream's GPU."""
        assert self.device() == self.device_of[stream], "cudaErrorInvalidResourceHandle"
        self.enqueue(stream, work)

    def enqueue(self, stream: int, work: Callable[[], None]) -> None:
        """Adds work to a stream or to its capture."""
        with self._lock:
            (self.captures[stream] if stream in self.captures else self.queues[stream]).append(work)

    def is_capturing(self, stream: int) -> bool:
        """Whether work on a stream is captured."""
        return stream in self.captures

    def check(self, address: int, nbytes: int, kind: str = "device") -> None:
        """Asserts that the bytes are inside one allocated block."""
        for start, (_, size, held) in self.memory.items():
            if start <= address and address + nbytes <= start + size:
                assert held == kind, f"{nbytes} bytes of {held} memory where {kind} memory was expected"
                return
        raise AssertionError(f"{nbytes} bytes at {address:#x} are in no block")

    def is_pinned(self, address: int) -> bool:
        """Whether an address is in memory of `cudaHostAlloc`."""
        return any(s <= address < s + size and kind == "host" for s, (_, size, kind) in self.memory.items())

    def array(self, address: int, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        """The present contents of device memory."""
        count = int(np.prod(shape)) * np.dtype(dtype).itemsize
        self.check(address, count)
        return np.ndarray(shape, dtype, (ctypes.c_byte * count).from_address(address))

    # Devices

    def cudaGetDeviceCount(self):
        return OK, self.devices

    def cudaSetDevice(self, device):
        if not 0 <= device < self.devices:
            return (real.cudaError_t.cudaErrorInvalidDevice,)
        self.contexts.add(device)
        self.context = _CONTEXTS + device
        return (OK,)

    def cudaGetDeviceProperties(self, device):
        return OK, Properties()

    def cudaGetErrorString(self, error):
        return OK, real.cudaGetErrorString(error)[1]

    # Memory

    def cudaMalloc(self, size):
        return OK, self._allocate(size, "device")

    def cudaHostAlloc(self, size, flags):
        assert flags == real.cudaHostAllocDefault
        return OK, self._allocate(size, "host")

    def cudaFree(self, devPtr):
        self._run_everything()  # as CUDA does
        return self._forget(devPtr, "device")

    def cudaFreeHost(self, ptr):
        return self._forget(ptr, "host")  # if freed too early, the work that still reads it fails

    def cudaPointerGetAttributes(self, ptr):
        return OK, PointerAttributes(self.device_of[ptr])

    def cudaMemcpyAsync(self, dst, src, count, kind, stream):
        kinds = real.cudaMemcpyKind
        sides = {
            kinds.cudaMemcpyHostToDevice: ("device", None),
            kinds.cudaMemcpyDeviceToHost: (None, "device"),
            kinds.cudaMemcpyDeviceToDevice: ("device", "device"),
        }[kind]

        # Pageable host memory is not tracked; pinned memory must exist until it has been read.
        held = [
            side or ("host" if self.is_pinned(each) else None) for each, side in zip((dst, src), sides, strict=True)
        ]

        def work() -> None:
            for address, side in zip((dst, src), held, strict=True):
                if side:
                    self.check(address, count, side)
            ctypes.memmove(dst, src, count)

        self.enqueue(self._queue(stream), work)
        return (OK,)

    def cudaMemsetAsync(self, devPtr, value, count, stream):
        def work() -> None:
            self.check(devPtr, count)
            ctypes.memset(devPtr, value, count)

        self.enqueue(self._queue(stream), work)
        return (OK,)

    # Streams and events

    def cudaStreamCreateWithFlags(self, flags):
        assert flags == real.cudaStreamNonBlocking
        return OK, real.cudaStream_t(self._open("stream"))

    def cudaStreamDestroy(self, stream):
        self._run(int(stream))
        return self._close(stream, "stream")

    def cudaStreamSynchronize(self, stream):
        if self.is_capturing(int(stream)):
            return (NOT_WHILE_CAPTURING,)
        self._run(self._queue(stream))
        return (OK,)

    def cudaEventCreateWithFlags(self, flags):
        assert flags in (real.cudaEventDefault, real.cudaEventDisableTiming)
        return OK, real.cudaEvent_t(self._open("event"))

    def cudaEventDestroy(self, event):
        return self._close(event, "event")

    def cudaEventRecord(self, event, stream):
        number = self._queue(stream)
        owner = self.device_of[number] if number in self.device_of else self.device()
        assert self.device_of[int(event)] == owner, "an event of another GPU"
        self.recorded[int(event)] = number, self.done[number] + len(self.queues[number])
        return (OK,)

    def cudaStreamWaitEvent(self, stream, event, flags):
        other, until = self.recorded[int(event)]
        self.enqueue(self._queue(stream), lambda: self._run(other, until))
        return (OK,)

    def cudaEventSynchronize(self, event):
        self._run(*self.recorded[int(event)])
        return (OK,)

    def cudaEventElapsedTime(self, start, end):
        return OK, 1.5

    # Graphs

    def cudaStreamBeginCapture(self, stream, mode):
        assert not self.is_capturing(int(stream))
        self.captures[int(stream)] = []
        return (OK,)

    def cudaStreamEndCapture(self, stream):
        work = self.captures.pop(int(stream))
        graph = self._open("graph")
        self.graphs[graph] = work
        return OK, real.cudaGraph_t(graph)

    def cudaGraphInstantiate(self, graph, flags):
        made = self._open("executable graph")
        self.graphs[made] = list(self.graphs[int(graph)])
        return OK, real.cudaGraphExec_t(made)

    def cudaGraphDestroy(self, graph):
        return self._close(graph, "graph")

    def cudaGraphExecDestroy(self, graphExec):
        return self._close(graphExec, "executable graph")

    def cudaGraphLaunch(self, graphExec, stream):
        assert self.handles[int(graphExec)] == "executable graph"
        for work in self.graphs[int(graphExec)]:
            self.enqueue(int(stream), work)
        return (OK,)

    # Internals

    def _allocate(self, size: int, kind: str) -> int:
        held = ctypes.create_string_buffer(b"\xa5" * (size + _ALIGNMENT), size + _ALIGNMENT)
        address = -(-ctypes.addressof(held) // _ALIGNMENT) * _ALIGNMENT
        self.memory[address] = held, size, kind
        self.device_of[address] = self.device()
        return address

    def _forget(self, address: int, kind: str) -> tuple:
        assert self.memory.pop(address)[2] == kind
        return (OK,)

    def _open(self, kind: str) -> int:
        number = next(self._numbers)
        self.handles[number] = kind
        self.device_of[number] = self.device()
        return number

    def _queue(self, stream: Any) -> int:
        """The number of a stream's queue: every GPU has its own default streams."""
        return int(stream) + (self.device() << 32 if int(stream) in _DEFAULT_STREAMS else 0)

    def _close(self, handle: Any, kind: str) -> tuple:
        assert self.handles.pop(int(handle)) == kind
        return (OK,)

    def _run(self, stream: int, until: int | None = None) -> None:
        while self.queues[stream] and (until is None or self.done[stream] < until):
            work = self.queues[stream].pop(0)
            self.done[stream] += 1
            work()

    def _run_everything(self) -> None:
        for stream in list(self.queues):
            self._run(stream)


class FakeDriver:
    """The module `cuda.bindings.driver` for the same GPUs.

    Args:
        runtime: the simulated runtime.
    """

    CUcontext = real_driver.CUcontext

    def __init__(self, runtime: FakeRuntime) -> None:
        self._runtime = runtime
        self.failing: dict[str, Any] = {}  # by function: the status

    def cuInit(self, Flags):
        return (real_driver.CUresult.CUDA_SUCCESS,)

    def cuDeviceGet(self, ordinal):
        return real_driver.CUresult.CUDA_SUCCESS, ordinal

    def cuDevicePrimaryCtxRetain(self, dev):
        if status := self.failing.get("cuDevicePrimaryCtxRetain"):
            return status, None
        self._runtime.contexts.add(dev)
        return real_driver.CUresult.CUDA_SUCCESS, self.CUcontext(_CONTEXTS + dev)

    def cuCtxGetCurrent(self):
        return real_driver.CUresult.CUDA_SUCCESS, self.CUcontext(self._runtime.context)

    def cuCtxSetCurrent(self, ctx):
        if status := self.failing.get("cuCtxSetCurrent"):
            return (status,)
        self._runtime.context = int(ctx)
        return (real_driver.CUresult.CUDA_SUCCESS,)


def install(monkeypatch: Any, runtime: FakeRuntime) -> None:
    """Replaces the real GPUs for one test."""
    monkeypatch.setattr(memory, "import_runtime", lambda: runtime)
    monkeypatch.setattr(memory, "import_driver", lambda: runtime.driver)


class DeferredKernels(Kernels):
    """The kernels compiled for the CPU; their work is deferred in the simulated GPU's streams."""

    runtime: FakeRuntime

    def resize_pad(self, *arguments: Any, stream: int, **named: Any) -> None:
        self.runtime.launch(stream, lambda: super(DeferredKernels, self).resize_pad(*arguments, **named))

    def paste_masks(self, *arguments: Any, stream: int, **named: Any) -> None:
        self.runtime.launch(stream, lambda: super(DeferredKernels, self).paste_masks(*arguments, **named))

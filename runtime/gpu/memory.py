"""GPU memory, streams, events and CUDA graphs through cuda-bindings (12.6 or newer).

Every object frees its resource when it is closed or garbage-collected. Any thread may create, use and free objects;
this does not change the thread's current GPU. CUDA errors that a user can fix are raised as `UserError`, others as
`RuntimeError` with CUDA's name.

CUDA works on the context that is current in the calling thread. This module sets and restores it with the driver API:
`cudaSetDevice` would create a context on GPU 0, which takes memory, if the caller had none, and would replace a context
that the caller created, as PyCUDA does.

Source: CUDA Runtime API; CUDA Driver API, context management.
"""

from __future__ import annotations

import ctypes
import importlib
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np

from maskrcnn.errors import UserError, missing_library

LEGACY_STREAM = 1  # cudaStreamLegacy, the default stream, used by libraries without a stream argument


def import_driver() -> Any:
    """Imports `cuda.bindings.driver`.

    Raises:
        UserError: if it is not installed.
    """
    return _import_bindings("driver")


def import_runtime() -> Any:
    """Imports `cuda.bindings.runtime`.

    Raises:
        UserError: if it is not installed.
    """
    return _import_bindings("runtime")


def _import_bindings(name: str) -> Any:
    try:
        return importlib.import_module(f"cuda.bindings.{name}")
    except ImportError as error:
        install = "pip install 'cuda-bindings>=12.6'"
        raise missing_library("cuda-bindings", "use a GPU's memory", install) from error


@contextmanager
def preserve_context() -> Iterator[None]:
    """Restores the calling thread's CUDA context afterwards, for libraries that leave another GPU current.

    Does nothing without cuda-bindings or a driver.
    """
    try:
        driver = import_driver()
        before = _current_context(driver)
    except (UserError, RuntimeError):  # the bindings load the driver's library at the first call
        driver = before = None
    try:
        yield
    finally:
        if driver is not None:
            driver.cuCtxSetCurrent(before)


def _current_context(driver: Any) -> Any:
    """The calling thread's context, or a null one if the driver is not initialised."""
    status, context = driver.cuCtxGetCurrent()
    return context if int(status) == 0 else driver.CUcontext(0)


class Cuda:
    """One GPU.

    Args:
        index: CUDA's index of the GPU.
        runtime: replaces the installed `cuda.bindings.runtime`.
        driver: replaces the installed `cuda.bindings.driver`.

    Raises:
        UserError: if cuda-bindings, the driver or the GPU is missing.
    """

    def __init__(self, index: int = 0, runtime: Any = None, driver: Any = None) -> None:
        self.runtime, self.driver = runtime or import_runtime(), driver or import_driver()
        self.index = index
        count = self.call("cudaGetDeviceCount")
        if not 0 <= index < count:
            raise UserError(f"GPU {index}", f"one of {count}, counted from 0", "choose another device")
        self.call("cuInit", 0)
        # The context shared by the runtime and all libraries on it. It is never released: the runtime does not either.
        self._context = self.call("cuDevicePrimaryCtxRetain", self.call("cuDeviceGet", index))
        properties = self.call("cudaGetDeviceProperties", index)
        self.name = properties.name.decode(errors="replace").rstrip("\0")
        self.compute_capability = (int(properties.major), int(properties.minor))

    @property
    def arch(self) -> int:
        """Compute capability as compilers write it: 90 for 9.0."""
        major, minor = self.compute_capability
        return 10 * major + minor

    @contextmanager
    def active(self) -> Iterator[None]:
        """Makes this the calling thread's current GPU, and restores its own context afterwards.

        Raises:
            RuntimeError: if CUDA is lost.
        """
        before = _current_context(self.driver)
        status = self.driver.cuCtxSetCurrent(self._context)[0]
        if int(status) != 0:
            raise RuntimeError(
                f"found: cuCtxSetCurrent returns {status.name}; expected: success; fix: restart the program"
            )
        try:
            yield
        finally:
            self.driver.cuCtxSetCurrent(before)

    def call(self, name: str, *arguments: Any) -> Any:
        """Calls a function of the runtime or the driver and returns its results without the status.

        Returns:
            None, one value, or a tuple of values.

        Raises:
            UserError: for an error that the user can fix.
            RuntimeError: for any other error.
        """
        module = self.runtime if name.startswith("cuda") else self.driver
        status, *values = getattr(module, name)(*arguments)
        if int(status) != 0:
            raise self._error(name, status, arguments)
        return values[0] if len(values) == 1 else tuple(values) or None

    def memory(self, nbytes: int) -> DeviceMemory:
        """Allocates uninitialised memory on the GPU."""
        return DeviceMemory(self, nbytes)

    def pinned(self, nbytes: int) -> _PinnedMemory:
        """Allocates pinned memory on the host."""
        return _PinnedMemory(self, nbytes)

    def stream(self) -> Stream:
        """Creates a stream that does not synchronise with the default stream."""
        return Stream(self)

    def event(self, *, timing: bool = False) -> Event:
        """Creates an event; `timing` allows `milliseconds`."""
        return Event(self, timing=timing)

    def _error(self, name: str, status: Any, arguments: tuple[Any, ...]) -> Exception:
        """Returns the error for a status of the runtime or the driver; both use the same numbers."""
        kinds = self.runtime.cudaError_t
        status = next((kind for kind in kinds if int(kind) == int(status)), kinds.cudaErrorUnknown)
        if status == kinds.cudaErrorMemoryAllocation:
            size = f"{arguments[0] / 1e6:.0f} MB" if name in ("cudaMalloc", "cudaHostAlloc") else "more memory"
            where = "of pinned host memory left" if name == "cudaHostAlloc" else f"left on GPU {self.index}"
            fix = "use smaller batches or images or fewer contexts, or stop other programs on it (`nvidia-smi`)"
            return UserError(f"no {size} {where}", "free memory", fix)
        if status in (kinds.cudaErrorNoDevice, kinds.cudaErrorInitializationError):
            return UserError(
                "no GPU that CUDA can use", "an NVIDIA GPU", "run it on a machine with a GPU; see `maskrcnn doctor`"
            )
        if status == kinds.cudaErrorInsufficientDriver:
            found = "no NVIDIA driver, or one older than the installed CUDA"
            return UserError(
                found, "a driver that supports it", "install a newer driver: https://www.nvidia.com/drivers"
            )
        text = self.runtime.cudaGetErrorString(status)[1].decode(errors="replace")
        fix = "see CUDA's list of errors"
        if status in (kinds.cudaErrorIllegalAddress, kinds.cudaErrorLaunchFailure):
            fix = "restart the program: this process can no longer use the GPU; compute-sanitizer finds the kernel"
        return RuntimeError(f"found: {name} returns {status.name} ({text}); expected: success; fix: {fix}")


class _Resource:
    """A CUDA resource that is freed once: by `close`, or when the object is garbage-collected."""

    def _own(self, cuda: Cuda, free: str, handle: Any) -> None:
        self.cuda = cuda
        self._finalizer = weakref.finalize(self, _free, cuda, free, handle)

    def close(self) -> None:
        """Frees the resource, which must not be used afterwards."""
        self._finalizer()

    @property
    def is_open(self) -> bool:
        """Whether the resource has not been freed."""
        return self._finalizer.alive


def _free(cuda: Cuda, function: str, handle: Any) -> None:
    """Frees a resource. Ignores errors: an earlier kernel's error, which every call repeats, was raised before."""
    with suppress(RuntimeError), cuda.active():  # without it, CUDA would create a context on GPU 0
        getattr(cuda.runtime, function)(handle)


class DeviceMemory(_Resource):
    """Memory on a GPU."""

    def __init__(self, cuda: Cuda, nbytes: int) -> None:
        self.nbytes = nbytes
        with cuda.active():
            self.address = int(cuda.call("cudaMalloc", max(nbytes, 1)))
        self._own(cuda, "cudaFree", self.address)


class _PinnedMemory(_Resource):
    """Page-locked host memory for asynchronous copies to and from the GPU."""

    def __init__(self, cuda: Cuda, nbytes: int) -> None:
        self.nbytes = nbytes
        with cuda.active():
            self.address = int(cuda.call("cudaHostAlloc", max(nbytes, 1), cuda.runtime.cudaHostAllocDefault))
        self._own(cuda, "cudaFreeHost", self.address)

    def array(self, shape: tuple[int, ...], dtype: Any, offset: int = 0) -> np.ndarray:
        """Returns a NumPy view, which keeps the memory alive.

        Args:
            shape: shape of the view.
            dtype: type of the elements.
            offset: offset of the first element, in bytes.

        Raises:
            ValueError: if the view exceeds the memory.
        """
        dtype = np.dtype(dtype)
        nbytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        if offset < 0 or offset + nbytes > self.nbytes:
            raise ValueError(
                f"found: bytes {offset} to {offset + nbytes}; expected: at most {self.nbytes}; fix: reserve more"
            )
        memory = (ctypes.c_byte * nbytes).from_address(self.address + offset)
        memory.owner = self
        return np.ndarray(shape, dtype, memory)


class Event(_Resource):
    """A CUDA event."""

    def __init__(self, cuda: Cuda, *, timing: bool = False) -> None:
        flags = cuda.runtime.cudaEventDefault if timing else cuda.runtime.cudaEventDisableTiming
        with cuda.active():
            self.handle = cuda.call("cudaEventCreateWithFlags", flags)
        self._own(cuda, "cudaEventDestroy", self.handle)

    def synchronize(self) -> None:
        """Waits until the work recorded before it is done."""
        self.cuda.call("cudaEventSynchronize", self.handle)

    def milliseconds(self, later: Event) -> float:
        """Returns the time to a later event; both must be done and created with `timing`."""
        return float(self.cuda.call("cudaEventElapsedTime", self.handle, later.handle))


class Graph(_Resource):
    """An instantiated CUDA graph."""

    def __init__(self, cuda: Cuda, captured: Any) -> None:
        try:
            self.handle = cuda.call("cudaGraphInstantiate", captured, 0)
        finally:
            cuda.call("cudaGraphDestroy", captured)
        self._own(cuda, "cudaGraphExecDestroy", self.handle)

    def launch(self, stream: Stream) -> None:
        """Launches the graph on a stream."""
        self.cuda.call("cudaGraphLaunch", self.handle, stream.handle)


class Stream(_Resource):
    """A CUDA stream."""

    def __init__(self, cuda: Cuda) -> None:
        with cuda.active():
            self.handle = cuda.call("cudaStreamCreateWithFlags", cuda.runtime.cudaStreamNonBlocking)
        self.address = int(self.handle)
        self._own(cuda, "cudaStreamDestroy", self.handle)

    def synchronize(self) -> None:
        """Waits until all work on the stream is done."""
        self.cuda.call("cudaStreamSynchronize", self.handle)

    def record(self, event: Event) -> Event:
        """Records the event after the work so far, and returns it."""
        self.cuda.call("cudaEventRecord", event.handle, self.handle)
        return event

    def wait(self, event: Event) -> None:
        """Makes later work wait for an event; the host does not wait."""
        self.cuda.call("cudaStreamWaitEvent", self.handle, event.handle, 0)

    def wait_for_stream(self, other: int) -> None:
        """Makes later work wait for the present work of another stream, given by its address."""
        with self.cuda.active():  # the default stream belongs to the thread's GPU
            event = self.cuda.event()
            self.cuda.call("cudaEventRecord", event.handle, self.cuda.runtime.cudaStream_t(other))
            self.wait(event)

    def hold_up_stream(self, other: int) -> None:
        """Makes another stream, given by its address, wait for the present work of this one."""
        with self.cuda.active():
            event = self.record(self.cuda.event())
            self.cuda.call("cudaStreamWaitEvent", self.cuda.runtime.cudaStream_t(other), event.handle, 0)

    def copy(self, target: int, source: int, nbytes: int, kind: str = "DeviceToDevice") -> None:
        """Copies bytes between addresses; `kind` is CUDA's name, such as "HostToDevice"."""
        kinds = self.cuda.runtime.cudaMemcpyKind
        self.cuda.call("cudaMemcpyAsync", target, source, nbytes, getattr(kinds, f"cudaMemcpy{kind}"), self.handle)

    def clear(self, target: int, nbytes: int) -> None:
        """Fills memory on the GPU with zeros."""
        self.cuda.call("cudaMemsetAsync", target, 0, nbytes, self.handle)

    def capture(self, work: Callable[[], None]) -> Graph:
        """Captures the work that a function puts on this stream, without running it.

        Raises:
            RuntimeError: if the work cannot be captured, for example because it waits for the GPU.
        """
        # Relaxed: in other modes, the capture is invalid if Python's garbage collector frees GPU memory meanwhile.
        mode = self.cuda.runtime.cudaStreamCaptureMode.cudaStreamCaptureModeRelaxed
        self.cuda.call("cudaStreamBeginCapture", self.handle, mode)
        try:
            work()
        except BaseException:  # end the capture and raise this error, not the one of ending it
            _, graph = self.cuda.runtime.cudaStreamEndCapture(self.handle)
            if graph is not None and int(graph):
                self.cuda.runtime.cudaGraphDestroy(graph)
            raise
        return Graph(self.cuda, self.cuda.call("cudaStreamEndCapture", self.handle))


class BufferPool:
    """GPU buffers of one size, which are reused after release.

    A released buffer may still be read by work on the default stream; the next write to it waits for that work. A
    holder that works on other streams must keep the buffer until these have finished.
    """

    def __init__(self, cuda: Cuda, nbytes: int) -> None:
        self.cuda, self.nbytes = cuda, nbytes
        self._free: deque[DeviceMemory] = deque()  # its methods are atomic: buffers return in any thread

    def acquire(self, stream: Stream) -> PooledBuffer:
        """Returns an uninitialised buffer to write on a stream."""
        try:
            memory = self._free.pop()
        except IndexError:
            return PooledBuffer(self._free, self.cuda.memory(self.nbytes))
        stream.wait_for_stream(LEGACY_STREAM)
        return PooledBuffer(self._free, memory)


class PooledBuffer:
    """A buffer of a `BufferPool`, to which it returns when this object is garbage-collected."""

    def __init__(self, pool: deque[DeviceMemory], memory: DeviceMemory) -> None:
        self.address, self.nbytes = memory.address, memory.nbytes
        weakref.finalize(self, pool.append, memory)


class GrowableBuffer:
    """GPU memory that grows to the largest size reserved."""

    def __init__(self, cuda: Cuda) -> None:
        self.cuda = cuda
        self._memory: DeviceMemory | None = None

    def reserve(self, nbytes: int) -> DeviceMemory:
        """Returns at least `nbytes` of memory, the same as before if it is large enough."""
        if self._memory is None or self._memory.nbytes < nbytes:
            self.close()  # CUDA frees memory once running work no longer reads it
            self._memory = self.cuda.memory(nbytes)
        return self._memory

    def close(self) -> None:
        """Frees the memory."""
        if self._memory is not None:
            self._memory.close()
            self._memory = None


class StagingBuffer:
    """Pinned memory through which arrays are copied to the GPU and back; it grows to the largest size reserved."""

    def __init__(self, cuda: Cuda) -> None:
        self.cuda = cuda
        self._memory: _PinnedMemory | None = None
        self._sent = cuda.event()
        self._is_sending = False

    def reserve(self, nbytes: int) -> _PinnedMemory:
        """Waits until the last `send` has finished and returns at least `nbytes` of memory."""
        if self._is_sending:
            self._sent.synchronize()
            self._is_sending = False
        if self._memory is None or self._memory.nbytes < nbytes:
            self._memory = self.cuda.pinned(nbytes)
        return self._memory

    def send(self, stream: Stream, target: int, nbytes: int, offset: int = 0) -> None:
        """Starts copying reserved memory to an address on the GPU."""
        if self._memory is None:
            raise ValueError("found: nothing to send; expected: reserved memory; fix: call reserve first")
        stream.copy(target, self._memory.address + offset, nbytes, "HostToDevice")
        stream.record(self._sent)
        self._is_sending = True

    def close(self) -> None:
        """Frees the memory; the buffer cannot be used afterwards."""
        if self._memory is not None:
            self._memory.close()
        self._sent.close()

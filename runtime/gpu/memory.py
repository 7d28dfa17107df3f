"""A GPU's memory, streams, events and graphs through cuda-bindings (12.6 or newer), in the few names that we need.

Every object frees what it holds when it is closed or no longer used. All of it may be made, used and freed in any
thread, whatever GPU that works on, and leaves the thread there. Errors of CUDA become sentences: those that a user
can mend are a `UserError`, the others a `RuntimeError` with CUDA's own name of it.

Source: CUDA Runtime API.
"""

from __future__ import annotations

import ctypes
import importlib
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Any

import numpy as np

from maskrcnn.errors import UserError, missing_library

# Which GPU is the calling thread's: ours for as long as we work on it, and afterwards what it was before.
#
# CUDA works on the context that is current in the calling thread. Ours is bound through the driver, and so is what was
# there before: going back with cudaSetDevice would make a context on GPU 0, with all the memory that this takes, for a
# caller who had none, and would replace the context of one who made his own, as PyCUDA does.
#
# Source: CUDA Driver API, context management; CUDA Runtime API, interactions with the CUDA Driver API.


def import_driver() -> Any:
    """The module `cuda.bindings.driver`.

    Raises:
        UserError: where it is not installed.
    """
    return _import_bindings("driver")


def _import_bindings(name: str) -> Any:
    """A module of `cuda.bindings`.

    Raises:
        UserError: where it is not installed.
    """
    try:
        return importlib.import_module(f"cuda.bindings.{name}")
    except ImportError as error:
        install = "pip install 'cuda-bindings>=12.6'"
        raise missing_library("cuda-bindings", "use a GPU's memory", install) from error


@contextmanager
def bound(driver: Any, context: Any) -> Iterator[None]:
    """Lets the calling thread work in a context of the driver, and then in its own again, if it had one.

    Raises:
        RuntimeError: where CUDA is lost.
    """
    before = _current(driver)
    status = driver.cuCtxSetCurrent(context)[0]
    if int(status) != 0:
        came = f"cuCtxSetCurrent answers {status.name}"
        raise RuntimeError(f"found: {came}; expected: success; fix: start the program anew")
    try:
        yield
    finally:
        driver.cuCtxSetCurrent(before)


@contextmanager
def as_before() -> Iterator[None]:
    """Whatever is done inside, the calling thread's GPU is afterwards the one that it was.

    For libraries that choose a GPU and leave it chosen. Without cuda-bindings or a driver nothing is done about it.
    """
    try:
        driver = import_driver()
        before = _current(driver)
    except (UserError, RuntimeError):  # the bindings look for the driver's library at the first call
        driver = before = None
    try:
        yield
    finally:
        if driver is not None:
            driver.cuCtxSetCurrent(before)


def _current(driver: Any) -> Any:
    """The calling thread's context, or a null one, as before the driver is initialised."""
    status, context = driver.cuCtxGetCurrent()
    return context if int(status) == 0 else driver.CUcontext(0)


LEGACY_STREAM = 1  # cudaStreamLegacy: the default stream, on which libraries work that know nothing of streams


def import_runtime() -> Any:
    """The module `cuda.bindings.runtime`.

    Raises:
        UserError: where it is not installed.
    """
    return _import_bindings("runtime")


class Cuda:
    """One GPU.

    Args:
        index: which, as CUDA counts them.
        runtime: instead of the installed `cuda.bindings.runtime`.
        driver: instead of the installed `cuda.bindings.driver`.

    Raises:
        UserError: without cuda-bindings, driver or GPU, or where there is no GPU of this index.
    """

    def __init__(self, index: int = 0, runtime: Any = None, driver: Any = None) -> None:
        self.runtime, self.driver = runtime or import_runtime(), driver or import_driver()
        self.index = index
        count = self.call("cudaGetDeviceCount")
        if not 0 <= index < count:
            raise UserError(f"GPU {index}", f"one of {count}, counted from 0", "name another device")
        self.call("cuInit", 0)
        # The context that the runtime and all libraries on it share; as the runtime does, it is kept until the end.
        self._context = self.call("cuDevicePrimaryCtxRetain", self.call("cuDeviceGet", index))
        properties = self.call("cudaGetDeviceProperties", index)
        self.name = properties.name.decode(errors="replace").rstrip("\0")
        self.compute_capability = (int(properties.major), int(properties.minor))

    def active(self) -> AbstractContextManager[None]:
        """Within it this is the calling thread's GPU, of which CUDA's functions speak, and what they make is there."""
        return bound(self.driver, self._context)

    def call(self, name: str, *arguments: Any) -> Any:
        """What a function of the runtime or the driver returns behind its status: nothing, a value or a tuple."""
        module = self.runtime if name.startswith("cuda") else self.driver
        status, *values = getattr(module, name)(*arguments)
        if int(status) != 0:
            raise self._error(name, status, arguments)
        return values[0] if len(values) == 1 else tuple(values) or None

    def memory(self, nbytes: int) -> DeviceMemory:
        """Memory on the GPU; its contents are arbitrary."""
        return DeviceMemory(self, nbytes)

    def pinned(self, nbytes: int) -> _PinnedMemory:
        """Memory of the host that the GPU reaches by itself."""
        return _PinnedMemory(self, nbytes)

    def stream(self) -> Stream:
        """A stream that the default stream does not hold up."""
        return Stream(self)

    def event(self, *, timing: bool = False) -> Event:
        """An event; with `timing` one that `milliseconds` can measure from and to."""
        return Event(self, timing=timing)

    def free_and_total(self) -> tuple[int, int]:
        """Bytes of its memory that are free, and all of them."""
        with self.active():
            return self.call("cudaMemGetInfo")

    def _error(self, name: str, status: Any, arguments: tuple) -> Exception:
        """The sentence for a status of the runtime, or of the driver, whose numbers are the same."""
        kinds = self.runtime.cudaError_t
        status = next((kind for kind in kinds if int(kind) == int(status)), kinds.cudaErrorUnknown)
        if status == kinds.cudaErrorMemoryAllocation:
            is_size = name in ("cudaMalloc", "cudaHostAlloc")
            wanted = f"{arguments[0] / 1e6:.0f} MB" if is_size else "more memory"
            where = "of pinned host memory" if name == "cudaHostAlloc" else f"on GPU {self.index}"
            remedy = "use smaller batches or images or fewer contexts, or close what else uses it (`nvidia-smi`)"
            return UserError(f"no {wanted} {where} left", "free memory", remedy)
        if status in (kinds.cudaErrorNoDevice, kinds.cudaErrorInitializationError):
            return UserError(
                "no GPU that CUDA can use", "an NVIDIA GPU", "run it where there is one; see `maskrcnn doctor`"
            )
        if status == kinds.cudaErrorInsufficientDriver:
            came = "no NVIDIA driver, or one older than the installed CUDA"
            return UserError(came, "a driver for it", "install a newer driver: https://www.nvidia.com/drivers")
        said = self.runtime.cudaGetErrorString(status)[1].decode(errors="replace")
        remedy = "see CUDA's list of errors"
        if status in (kinds.cudaErrorIllegalAddress, kinds.cudaErrorLaunchFailure):
            remedy = "start the program anew, as this process has lost the GPU; compute-sanitizer finds the kernel"
        return RuntimeError(f"found: {name} answers {status.name} ({said}); expected: success; fix: {remedy}")


class _Held:
    """Something of CUDA's that is given back once: on `close`, or when nobody holds the object any more."""

    def _hold(self, cuda: Cuda, free: str, handle: Any) -> None:
        self.cuda = cuda
        self._free = weakref.finalize(self, _give_back, cuda, free, handle)

    def close(self) -> None:
        """Gives it back; nothing may use it afterwards."""
        self._free()

    @property
    def is_open(self) -> bool:
        """Whether it has not been given back."""
        return self._free.alive


def _give_back(cuda: Cuda, free: str, handle: Any) -> None:
    """Ignores errors: one that a kernel made earlier is reported by every later call, and was raised where it was."""
    with suppress(RuntimeError), cuda.active():  # in a thread without a GPU the runtime would choose one, and take it
        getattr(cuda.runtime, free)(handle)


class DeviceMemory(_Held):
    """Memory on a GPU."""

    def __init__(self, cuda: Cuda, nbytes: int) -> None:
        self.nbytes = nbytes
        with cuda.active():
            self.address = int(cuda.call("cudaMalloc", max(nbytes, 1)))
        self._hold(cuda, "cudaFree", self.address)


class _PinnedMemory(_Held):
    """Memory of the host that is never moved, so that copies need no help of the processor."""

    def __init__(self, cuda: Cuda, nbytes: int) -> None:
        self.nbytes = nbytes
        with cuda.active():
            self.address = int(cuda.call("cudaHostAlloc", max(nbytes, 1), cuda.runtime.cudaHostAllocDefault))
        self._hold(cuda, "cudaFreeHost", self.address)

    def array(self, shape: tuple[int, ...], dtype: Any, offset: int = 0) -> np.ndarray:
        """A part of it as a NumPy array, which keeps the memory alive.

        Raises:
            ValueError: for a part that is not in it.
        """
        dtype = np.dtype(dtype)
        nbytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        if offset < 0 or offset + nbytes > self.nbytes:
            raise ValueError(
                f"found: bytes {offset} to {offset + nbytes}; expected: at most {self.nbytes}; fix: ask for less"
            )
        memory = (ctypes.c_byte * nbytes).from_address(self.address + offset)
        memory.owner = self
        return np.ndarray(shape, dtype, memory)


class Event(_Held):
    """A mark in a stream."""

    def __init__(self, cuda: Cuda, *, timing: bool = False) -> None:
        flags = cuda.runtime.cudaEventDefault if timing else cuda.runtime.cudaEventDisableTiming
        with cuda.active():
            self.handle = cuda.call("cudaEventCreateWithFlags", flags)
        self._hold(cuda, "cudaEventDestroy", self.handle)

    def synchronize(self) -> None:
        """Waits until the work before it is done."""
        self.cuda.call("cudaEventSynchronize", self.handle)

    def milliseconds(self, later: Event) -> float:
        """Time between two events made with `timing`, both done."""
        return float(self.cuda.call("cudaEventElapsedTime", self.handle, later.handle))


class Graph(_Held):
    """Work that was captured once and is started as a whole."""

    def __init__(self, cuda: Cuda, captured: Any) -> None:
        try:
            self.handle = cuda.call("cudaGraphInstantiate", captured, 0)
        finally:
            cuda.call("cudaGraphDestroy", captured)
        self._hold(cuda, "cudaGraphExecDestroy", self.handle)

    def launch(self, stream: Stream) -> None:
        """Starts it on a stream."""
        self.cuda.call("cudaGraphLaunch", self.handle, stream.handle)


class Stream(_Held):
    """Work in the order in which it is given."""

    def __init__(self, cuda: Cuda) -> None:
        with cuda.active():
            self.handle = cuda.call("cudaStreamCreateWithFlags", cuda.runtime.cudaStreamNonBlocking)
        self.address = int(self.handle)
        self._hold(cuda, "cudaStreamDestroy", self.handle)

    def synchronize(self) -> None:
        """Waits until all its work is done."""
        self.cuda.call("cudaStreamSynchronize", self.handle)

    def record(self, event: Event) -> Event:
        """Puts the event behind the work given so far."""
        self.cuda.call("cudaEventRecord", event.handle, self.handle)
        return event

    def wait(self, event: Event) -> None:
        """Later work begins after the event; the host does not wait."""
        self.cuda.call("cudaStreamWaitEvent", self.handle, event.handle, 0)

    def wait_for_stream(self, other: int) -> None:
        """Later work begins after what another stream, given by its address, has to do by now."""
        with self.cuda.active():  # the default stream is that of the thread's GPU
            event = self.cuda.event()
            self.cuda.call("cudaEventRecord", event.handle, self.cuda.runtime.cudaStream_t(other))
            self.wait(event)

    def hold_up_stream(self, other: int) -> None:
        """Lets another stream, given by its address, wait for what this one has to do by now."""
        with self.cuda.active():
            event = self.record(self.cuda.event())
            self.cuda.call("cudaStreamWaitEvent", self.cuda.runtime.cudaStream_t(other), event.handle, 0)

    def copy(self, target: int, source: int, nbytes: int, kind: str = "DeviceToDevice") -> None:
        """Copies bytes between addresses; `kind` as CUDA names it, "HostToDevice" for example."""
        kinds = self.cuda.runtime.cudaMemcpyKind
        self.cuda.call("cudaMemcpyAsync", target, source, nbytes, getattr(kinds, f"cudaMemcpy{kind}"), self.handle)

    def clear(self, target: int, nbytes: int) -> None:
        """Fills memory of the GPU with zeros."""
        self.cuda.call("cudaMemsetAsync", target, 0, nbytes, self.handle)

    def capture(self, work: Callable[[], None]) -> Graph:
        """The graph of what `work` puts on this stream, none of which is run.

        Raises:
            RuntimeError: where the work holds something that a graph cannot, such as waiting for the GPU.
        """
        # Relaxed: in the other modes memory that Python happens to free meanwhile would spoil the capture.
        mode = self.cuda.runtime.cudaStreamCaptureMode.cudaStreamCaptureModeRelaxed
        self.cuda.call("cudaStreamBeginCapture", self.handle, mode)
        try:
            work()
        except BaseException:  # the stream must leave its capture, whose own error would hide this one
            _, graph = self.cuda.runtime.cudaStreamEndCapture(self.handle)
            if graph is not None and int(graph):
                self.cuda.runtime.cudaGraphDestroy(graph)
            raise
        return Graph(self.cuda, self.cuda.call("cudaStreamEndCapture", self.handle))


# Memory that is used again: blocks on the GPU that are lent, and pinned memory that arrays pass through.


class MemoryPool:
    """Blocks of one size, lent to whoever wants results of their own, and lent again.

    A block that comes back may still be read by work that its borrower gave to the default stream: what is written
    into it next waits for that. A borrower who works on other streams keeps it until these have run.
    """

    def __init__(self, cuda: Cuda, nbytes: int) -> None:
        self.cuda, self.nbytes = cuda, nbytes
        self._free: deque[DeviceMemory] = deque()  # whose methods are atomic: blocks come back in any thread

    def lend(self, stream: Stream) -> Loan:
        """A block, to be written on a stream; its contents are arbitrary."""
        try:
            memory = self._free.pop()
        except IndexError:
            return Loan(self._free, self.cuda.memory(self.nbytes))
        stream.wait_for_stream(LEGACY_STREAM)
        return Loan(self._free, memory)


class Loan:
    """A block of a `MemoryPool`, which gets it back when nobody holds this object any more."""

    def __init__(self, pool: deque[DeviceMemory], memory: DeviceMemory) -> None:
        self.address, self.nbytes = memory.address, memory.nbytes
        weakref.finalize(self, pool.append, memory)


class Room:
    """Memory on the GPU that grows to the largest that was asked for."""

    def __init__(self, cuda: Cuda) -> None:
        self.cuda = cuda
        self._memory: DeviceMemory | None = None

    def at_least(self, nbytes: int) -> DeviceMemory:
        """So much memory, the same as before where that suffices."""
        if self._memory is None or self._memory.nbytes < nbytes:
            self.close()  # CUDA frees memory once nothing that was started reads it
            self._memory = self.cuda.memory(nbytes)
        return self._memory

    def close(self) -> None:
        """Gives the memory back."""
        if self._memory is not None:
            self._memory.close()
            self._memory = None


class Staging:
    """Pinned memory through which arrays go to the GPU and back; it grows to the largest."""

    def __init__(self, cuda: Cuda) -> None:
        self.cuda = cuda
        self._memory: _PinnedMemory | None = None
        self._sent = cuda.event()
        self._is_sending = False

    def room(self, nbytes: int) -> _PinnedMemory:
        """At least so much memory, once what was sent from it has arrived."""
        if self._is_sending:
            self._sent.synchronize()
            self._is_sending = False
        if self._memory is None or self._memory.nbytes < nbytes:
            self._memory = self.cuda.pinned(nbytes)
        return self._memory

    def send(self, stream: Stream, target: int, nbytes: int, offset: int = 0) -> None:
        """Copies from it to the GPU; `room` waits for that."""
        stream.copy(target, self._memory.address + offset, nbytes, "HostToDevice")
        stream.record(self._sent)
        self._is_sending = True

    def close(self) -> None:
        """Gives the memory back, and can be used no more."""
        if self._memory is not None:
            self._memory.close()
        self._sent.close()

"""Memory that is used again: blocks on the GPU that are lent, and pinned memory that arrays pass through."""

from __future__ import annotations

import weakref
from collections import deque

from maskrcnn.runtime.device.memory import LEGACY_STREAM, Cuda, DeviceMemory, PinnedMemory, Stream


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
        self._memory: PinnedMemory | None = None
        self._sent = cuda.event()
        self._is_sending = False

    def room(self, nbytes: int) -> PinnedMemory:
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

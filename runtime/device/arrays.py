"""Arrays on a GPU, of ours and of others: those of torch, CuPy and PyCUDA, and whatever speaks DLPack or has a
`__cuda_array_interface__`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from maskrcnn.errors import UserError
from maskrcnn.runtime.device import dlpack
from maskrcnn.runtime.device.dlpack import is_on_device
from maskrcnn.runtime.device.memory import LEGACY_STREAM, Cuda, Stream

__all__ = ["DeviceArray", "as_device_array", "is_on_device", "on_host"]


class DeviceArray:
    """An array in a GPU's memory, which other libraries take without a copy.

    `torch.from_dlpack(array)`, `cupy.from_dlpack(array)` and whatever reads `__cuda_array_interface__` get the memory
    itself. Its last axis is the fastest, and it has no gaps.

    Args:
        address: of the first element.
        shape: its lengths.
        dtype: of its elements, as NumPy names it.
        stream: which has written or will write it.
        owner: what keeps the memory, and what else it needs, alive.
    """

    device_type = dlpack.CUDA

    def __init__(self, address: int, shape: tuple[int, ...], dtype: Any, *, stream: Stream, owner: Any) -> None:
        self.address, self.shape, self.dtype = address, tuple(shape), np.dtype(dtype)
        self.stream, self.owner = stream, owner

    @property
    def nbytes(self) -> int:
        """How much memory it is."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize

    @property
    def ndim(self) -> int:
        """Its number of axes."""
        return len(self.shape)

    def __len__(self) -> int:
        return self.shape[0]

    def __repr__(self) -> str:
        return f"DeviceArray({self.dtype} {list(self.shape)} on GPU {self.stream.cuda.index})"

    def numpy(self) -> np.ndarray:
        """A copy on the host; waits for it."""
        found = np.empty(self.shape, self.dtype)
        with self.stream.cuda.active():
            self.stream.copy(found.ctypes.data, self.address, self.nbytes, "DeviceToHost")
            self.stream.synchronize()
        return found

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if copy is False:
            raise ValueError("came: copy=False; expected: a copy, as the array lies on a GPU; do: leave copy out")
        return self.numpy().astype(dtype or self.dtype, copy=False)

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        # Not every reader heeds a stream, so that there is none to heed: the host waits here.
        with self.stream.cuda.active():
            self.stream.synchronize()
        return {
            "shape": self.shape,
            "typestr": self.dtype.str,
            "data": (self.address, False),
            "version": 3,
            "strides": None,
            "stream": None,
        }

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.device_type, self.stream.cuda.index

    def __dlpack__(
        self,
        *,
        stream: int | None = None,
        max_version: tuple[int, int] | None = None,
        dl_device: tuple[int, int] | None = None,
        copy: bool | None = None,
    ) -> Any:
        """A capsule; the consumer's stream (None: the default one, -1: none) waits for what writes the array."""
        if copy or dl_device not in (None, self.__dlpack_device__()):
            raise BufferError("came: a copy, or another device; expected: this memory; do: copy what you get")
        if stream is None or stream >= 0:
            self.stream.hold_up_stream(stream or LEGACY_STREAM)
        device_type, device_id = self.__dlpack_device__()
        return dlpack.give(
            self.address, self.shape, self.dtype, device_type=device_type, device_id=device_id, owner=self
        )


def on_host(values: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Arrays by name, those on a GPU copied to the host."""
    return {name: value.numpy() if isinstance(value, DeviceArray) else value for name, value in values.items()}


def as_device_array(value: Any, cuda: Cuda, stream: Stream) -> DeviceArray:
    """Somebody's array on a GPU as one of ours, without a copy.

    Args:
        value: of any library; see the module.
        cuda: the GPU that it must lie on.
        stream: which is going to read it, and waits for what writes it, as far as its owner says what that is. An
            owner that says nothing is taken to work on the default stream.

    Raises:
        UserError: for an array elsewhere, with gaps, or of a type that NumPy lacks.
    """
    with cuda.active():  # torch gives its tensors to those alone who are on their GPU
        if isinstance(value, DeviceArray):
            return _from_ours(value, cuda, stream)
        if hasattr(value, "__dlpack__"):
            return _from_dlpack(value, cuda, stream)
        return _from_interface(value, cuda, stream)


def _from_ours(value: DeviceArray, cuda: Cuda, stream: Stream) -> DeviceArray:
    if value.stream.cuda.index != cuda.index:
        raise _elsewhere(value, value.stream.cuda.index, cuda)
    if value.stream is not stream:
        stream.wait(value.stream.record(cuda.event()))
    return DeviceArray(value.address, value.shape, value.dtype, stream=stream, owner=value)


def _from_dlpack(value: Any, cuda: Cuda, stream: Stream) -> DeviceArray:
    device_type, device_id = value.__dlpack_device__()
    if device_type not in dlpack.ON_GPU or device_id != cuda.index:
        raise _elsewhere(value, device_id if device_type in dlpack.ON_GPU else None, cuda)
    try:
        capsule = value.__dlpack__(stream=stream.address, max_version=(1, 0))
    except TypeError:  # makers of before DLPack 1.0 know no versions
        capsule = value.__dlpack__(stream=stream.address)
    taken = dlpack.Taken(capsule)
    seen = taken.seen
    if seen.dtype is None:
        raise UserError(_said(value), "a type that NumPy has", "convert it to float32")
    strides = None if seen.strides is None else tuple(step * seen.dtype.itemsize for step in seen.strides)
    _check_gaps(value, seen.shape, strides, seen.dtype)
    return DeviceArray(seen.address, seen.shape, seen.dtype, stream=stream, owner=taken)


def _from_interface(value: Any, cuda: Cuda, stream: Stream) -> DeviceArray:
    interface = value.__cuda_array_interface__
    shape, dtype = tuple(interface["shape"]), np.dtype(interface["typestr"])
    _check_gaps(value, shape, interface.get("strides"), dtype)
    address = interface["data"][0]
    attributes = cuda.call("cudaPointerGetAttributes", address) if address else None
    if attributes is not None and int(attributes.device) != cuda.index:
        raise _elsewhere(value, int(attributes.device), cuda)
    writer = interface.get("stream") if interface["version"] >= 3 else LEGACY_STREAM
    if writer is not None:  # with version 3 it says that there is nothing to wait for
        stream.wait_for_stream(int(writer))
    return DeviceArray(address, shape, dtype, stream=stream, owner=value)


def _check_gaps(value: Any, shape: tuple[int, ...], strides: Any, dtype: np.dtype) -> None:
    """Raises unless the elements lie one after the other; strides in bytes, None where they do."""
    expected = dtype.itemsize
    if 0 in shape:
        return
    for length, step in reversed(list(zip(shape, strides or (), strict=False))):
        if length > 1 and step != expected:
            remedy = "make it contiguous first: `.contiguous()` in torch, `cupy.ascontiguousarray`"
            raise UserError(
                f"{_said(value)} with gaps or another order of axes", "elements one after the other", remedy
            )
        expected *= length


def _said(value: Any) -> str:
    shape, dtype = getattr(value, "shape", None), getattr(value, "dtype", None)
    return f"an array of {type(value).__module__}.{type(value).__qualname__} ({dtype} {list(shape or ())})"


def _elsewhere(value: Any, index: int | None, cuda: Cuda) -> UserError:
    where = "not on a GPU" if index is None else f"on GPU {index}"
    return UserError(
        f"{_said(value)} {where}", f"one on GPU {cuda.index}", "move it there, or load the model on its GPU"
    )

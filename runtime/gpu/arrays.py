"""Arrays on a GPU, of ours and of others: those of torch, CuPy and PyCUDA, and whatever speaks DLPack or has a
`__cuda_array_interface__`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from maskrcnn.errors import UserError
from maskrcnn.runtime.gpu.memory import LEGACY_STREAM, Cuda, Stream

# DLPack, by which libraries pass arrays to each other without a copy: its structures, read and made with ctypes.
#
# Source: dlpack.h of DLPack 1.0, and the Python specification of `__dlpack__`.

CPU, CUDA, CUDA_HOST, CUDA_MANAGED = 1, 2, 3, 13  # DLDeviceType
_ON_GPU = (CUDA, CUDA_MANAGED)
_NAME, _VERSIONED_NAME = b"dltensor", b"dltensor_versioned"
_USED = {_NAME: b"used_dltensor", _VERSIONED_NAME: b"used_dltensor_versioned"}
_KINDS = {"i": 0, "u": 1, "f": 2, "b": 6}  # DLDataTypeCode, by NumPy's kind


def is_on_device(value: Any) -> bool:
    """Whether something is an array in a GPU's memory, of whatever library."""
    if isinstance(value, (np.ndarray, np.generic)):
        return False
    if hasattr(value, "__dlpack_device__"):
        return value.__dlpack_device__()[0] in _ON_GPU
    return hasattr(value, "__cuda_array_interface__")


class _Tensor(ctypes.Structure):
    """DLTensor."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


_DELETER = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


class _Managed(ctypes.Structure):
    """DLManagedTensor."""

    _fields_ = (("tensor", _Tensor), ("context", ctypes.c_void_p), ("deleter", _DELETER))


class _Versioned(ctypes.Structure):
    """DLManagedTensorVersioned."""

    _fields_ = (
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("context", ctypes.c_void_p),
        ("deleter", _DELETER),
        ("flags", ctypes.c_uint64),
        ("tensor", _Tensor),
    )


@dataclass(frozen=True)
class _Seen:
    """What a capsule holds."""

    address: int
    shape: tuple[int, ...]
    strides: tuple[int, ...] | None  # in elements; None: without gaps, the last axis fastest
    dtype: np.dtype | None  # None: a type that NumPy lacks
    device_type: int
    device_id: int


def _function(name: str, result: Any, *arguments: Any) -> Any:
    """A function of Python's on capsules; a prototype of our own, as those of `ctypes.pythonapi` are everybody's."""
    return ctypes.PYFUNCTYPE(result, *arguments)((name, ctypes.pythonapi))


_new = _function("PyCapsule_New", ctypes.py_object, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
_is_valid = _function("PyCapsule_IsValid", ctypes.c_int, ctypes.py_object, ctypes.c_char_p)
_pointer_in = _function("PyCapsule_GetPointer", ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)
_rename = _function("PyCapsule_SetName", ctypes.c_int, ctypes.py_object, ctypes.c_char_p)
# The same by the bare address of a dying capsule, to which no reference may be made.
_is_dying_valid = _function("PyCapsule_IsValid", ctypes.c_int, ctypes.c_void_p, ctypes.c_char_p)
_pointer_in_dying = _function("PyCapsule_GetPointer", ctypes.c_void_p, ctypes.c_void_p, ctypes.c_char_p)


# Taking


class Taken:
    """The contents of a capsule, which its maker gets back when this object dies.

    Args:
        capsule: of an object's `__dlpack__`; it is used up.

    Raises:
        ValueError: for something else, or a capsule that was taken before.
    """

    def __init__(self, capsule: Any) -> None:
        name = next((name for name in _USED if _is_valid(capsule, name)), None)
        if name is None:
            raise ValueError(f"found: {capsule!r}; expected: an unused DLPack capsule; fix: call __dlpack__ again")
        self._pointer = _pointer_in(capsule, name)
        kind = _Versioned if name == _VERSIONED_NAME else _Managed
        self._managed = ctypes.cast(self._pointer, ctypes.POINTER(kind)).contents
        self._deleter = self._managed.deleter
        _rename(capsule, _USED[name])
        self.seen = _read(self._managed.tensor)

    def __del__(self) -> None:
        if getattr(self, "_deleter", None):
            self._deleter(self._pointer)


def _read(tensor: _Tensor) -> _Seen:
    ndim = tensor.ndim
    kind = {code: name for name, code in _KINDS.items()}.get(tensor.code)
    known = kind is not None and tensor.lanes == 1 and tensor.bits % 8 == 0
    return _Seen(
        address=(tensor.data or 0) + tensor.byte_offset,
        shape=tuple(tensor.shape[:ndim]),
        strides=tuple(tensor.strides[:ndim]) if tensor.strides else None,
        dtype=np.dtype(f"{kind}{tensor.bits // 8}") if known else None,
        device_type=tensor.device_type,
        device_id=tensor.device_id,
    )


# Giving

_given: dict[int, tuple] = {}  # what consumers hold, by the address of its structure


@_DELETER
def _delete(pointer: int) -> None:
    _given.pop(pointer, None)


@ctypes.CFUNCTYPE(None, ctypes.c_void_p)
def _delete_capsule(capsule: int) -> None:
    """Of a capsule that dies: what nobody took is given back."""
    if _is_dying_valid(capsule, _NAME):
        _delete(_pointer_in_dying(capsule, _NAME))


def give(address: int, shape: tuple[int, ...], dtype: np.dtype, *, device_type: int, device_id: int, owner: Any) -> Any:
    """A capsule for `__dlpack__`.

    Args:
        address: of the first element; the array has no gaps, and its last axis is the fastest.
        shape: its lengths.
        dtype: a boolean, integer or floating-point type of NumPy.
        device_type: `CUDA` for example.
        device_id: which of them.
        owner: kept alive until the consumer is done.
    """
    lengths = (ctypes.c_int64 * len(shape))(*shape)
    managed = _Managed(deleter=_delete)
    managed.tensor = _Tensor(
        data=address,
        device_type=device_type,
        device_id=device_id,
        ndim=len(shape),
        code=_KINDS[dtype.kind],
        bits=8 * dtype.itemsize,
        lanes=1,
        shape=lengths,
    )
    pointer = ctypes.addressof(managed)
    _given[pointer] = (managed, lengths, owner)
    return _new(pointer, _NAME, ctypes.cast(_delete_capsule, ctypes.c_void_p))


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

    device_type = CUDA

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
            raise ValueError("found: copy=False; expected: a copy, as the array lies on a GPU; fix: leave copy out")
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
            raise BufferError("found: a copy, or another device; expected: this memory; fix: copy what you get")
        if stream is None or stream >= 0:
            self.stream.hold_up_stream(stream or LEGACY_STREAM)
        device_type, device_id = self.__dlpack_device__()
        return give(self.address, self.shape, self.dtype, device_type=device_type, device_id=device_id, owner=self)


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
    if device_type not in _ON_GPU or device_id != cuda.index:
        raise _elsewhere(value, device_id if device_type in _ON_GPU else None, cuda)
    try:
        capsule = value.__dlpack__(stream=stream.address, max_version=(1, 0))
    except TypeError:  # makers of before DLPack 1.0 know no versions
        capsule = value.__dlpack__(stream=stream.address)
    taken = Taken(capsule)
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

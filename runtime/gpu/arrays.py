"""GPU arrays: `DeviceArray`, and arrays of torch, CuPy, PyCUDA and other libraries, exchanged without a copy.

Arrays are exchanged by DLPack, whose C structures are declared here with ctypes, or by `__cuda_array_interface__`.

Source: dlpack.h of DLPack 1.0, and the Python specification of `__dlpack__`.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np

from maskrcnn.errors import UserError
from maskrcnn.runtime.gpu.memory import LEGACY_STREAM, Cuda, Stream

CPU, CUDA, _CUDA_MANAGED = 1, 2, 13  # DLDeviceType
_ON_GPU = (CUDA, _CUDA_MANAGED)
_NAME, _VERSIONED_NAME = b"dltensor", b"dltensor_versioned"
_USED = {_NAME: b"used_dltensor", _VERSIONED_NAME: b"used_dltensor_versioned"}
_KINDS = {"i": 0, "u": 1, "f": 2, "b": 6}  # NumPy kind to DLDataTypeCode


def is_on_device(value: Any) -> bool:
    """Whether a value is an array in GPU memory, of any library."""
    if isinstance(value, (np.ndarray, np.generic)):
        return False
    if hasattr(value, "__dlpack_device__"):
        return bool(value.__dlpack_device__()[0] in _ON_GPU)
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


def _function(name: str, result: Any, *arguments: Any) -> Any:
    """Returns a capsule function of Python's C API with its own prototype: `ctypes.pythonapi` shares prototypes."""
    return ctypes.PYFUNCTYPE(result, *arguments)((name, ctypes.pythonapi))


_new = _function("PyCapsule_New", ctypes.py_object, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
_is_valid = _function("PyCapsule_IsValid", ctypes.c_int, ctypes.py_object, ctypes.c_char_p)
_pointer_in = _function("PyCapsule_GetPointer", ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)
_rename = _function("PyCapsule_SetName", ctypes.c_int, ctypes.py_object, ctypes.c_char_p)
# The same functions with the capsule's address: a destructor must not create references to its capsule.
_is_dying_valid = _function("PyCapsule_IsValid", ctypes.c_int, ctypes.c_void_p, ctypes.c_char_p)
_pointer_in_dying = _function("PyCapsule_GetPointer", ctypes.c_void_p, ctypes.c_void_p, ctypes.c_char_p)


class ImportedTensor:
    """The contents of a DLPack capsule, released to its producer when this object is garbage-collected.

    Args:
        capsule: returned by `__dlpack__`; it is consumed.

    Raises:
        ValueError: if it is not a capsule, or has been consumed.
    """

    _deleter = None

    def __init__(self, capsule: Any) -> None:
        name = next((name for name in _USED if _is_valid(capsule, name)), None)
        if name is None:
            raise ValueError(f"found: {capsule!r}; expected: an unused DLPack capsule; fix: call __dlpack__ again")
        self._pointer = _pointer_in(capsule, name)
        kind = _Versioned if name == _VERSIONED_NAME else _Managed
        managed = ctypes.cast(self._pointer, ctypes.POINTER(kind)).contents
        self._deleter = managed.deleter
        _rename(capsule, _USED[name])
        tensor: _Tensor = managed.tensor
        kind_code = {code: name for name, code in _KINDS.items()}.get(tensor.code)
        is_known = kind_code is not None and tensor.lanes == 1 and tensor.bits % 8 == 0
        self.address: int = (tensor.data or 0) + tensor.byte_offset
        self.shape: tuple[int, ...] = tuple(tensor.shape[: tensor.ndim])
        self.dtype = np.dtype(f"{kind_code}{tensor.bits // 8}") if is_known else None  # None: not in NumPy
        self.device_type: int = tensor.device_type
        self.device_id: int = tensor.device_id
        # In elements; None: contiguous in row-major order.
        self.strides: tuple[int, ...] | None = tuple(tensor.strides[: tensor.ndim]) if tensor.strides else None

    def __del__(self) -> None:
        if self._deleter:  # may be a null pointer
            self._deleter(self._pointer)


_exported: dict[int, tuple[Any, ...]] = {}  # objects that consumers hold, by the structure's address


@_DELETER  # type: ignore[untyped-decorator]
def _delete(pointer: int) -> None:
    _exported.pop(pointer, None)


@ctypes.CFUNCTYPE(None, ctypes.c_void_p)  # type: ignore[untyped-decorator]
def _delete_capsule(capsule: int) -> None:
    """Destructor of a capsule: releases contents that were not consumed."""
    if _is_dying_valid(capsule, _NAME):
        _delete(_pointer_in_dying(capsule, _NAME))


def export_capsule(
    address: int, shape: tuple[int, ...], dtype: np.dtype[Any], *, device_type: int, device_id: int, owner: Any
) -> Any:
    """Creates a capsule to return from `__dlpack__`.

    Args:
        address: address of the first element of a contiguous row-major array.
        shape: shape of the array.
        dtype: a boolean, integer or floating-point type of NumPy.
        device_type: such as `CUDA`.
        device_id: index of the device.
        owner: object kept alive until the consumer releases the capsule.
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
    _exported[pointer] = (managed, lengths, owner)
    return _new(pointer, _NAME, ctypes.cast(_delete_capsule, ctypes.c_void_p))


class DeviceArray:
    """A contiguous array in GPU memory, shared with other libraries without a copy.

    `torch.from_dlpack(array)`, `cupy.from_dlpack(array)` and readers of `__cuda_array_interface__` use the same memory.

    Args:
        address: address of the first element.
        shape: shape of the array, in row-major order.
        dtype: NumPy type of the elements.
        stream: stream that writes the array.
        owner: object kept alive with the array, such as its memory.
    """

    device_type = CUDA

    def __init__(self, address: int, shape: tuple[int, ...], dtype: Any, *, stream: Stream, owner: Any) -> None:
        self.address, self.shape, self.dtype = address, tuple(shape), np.dtype(dtype)
        self.stream, self.owner = stream, owner

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return int(np.prod(self.shape, dtype=np.int64) * self.dtype.itemsize)

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    def __len__(self) -> int:
        return self.shape[0]

    def __repr__(self) -> str:
        return f"DeviceArray({self.dtype} {list(self.shape)} on GPU {self.stream.cuda.index})"

    def numpy(self) -> np.ndarray:
        """Returns a copy on the host."""
        values = np.empty(self.shape, self.dtype)
        with self.stream.cuda.active():
            self.stream.copy(values.ctypes.data, self.address, self.nbytes, "DeviceToHost")
            self.stream.synchronize()
        return values

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if copy is False:
            raise ValueError("found: copy=False; expected: a copy, as the array is on a GPU; fix: leave copy out")
        return self.numpy().astype(dtype or self.dtype, copy=False)

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        # Not every reader observes a stream, so the host waits here and none is given.
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
        """Returns a capsule; the consumer's stream (None: the default, -1: none) waits for writes to the array."""
        if copy or dl_device not in (None, self.__dlpack_device__()):
            raise BufferError("found: copy=True or another device; expected: neither; fix: copy the imported array")
        if stream is None or stream >= 0:
            self.stream.hold_up_stream(stream or LEGACY_STREAM)
        device_type, device_id = self.__dlpack_device__()
        return export_capsule(
            self.address, self.shape, self.dtype, device_type=device_type, device_id=device_id, owner=self
        )


def as_device_array(value: Any, cuda: Cuda, stream: Stream) -> DeviceArray:
    """Wraps a GPU array of any library, without a copy.

    Args:
        value: array with `__dlpack__` or `__cuda_array_interface__`.
        cuda: GPU that the array must be on.
        stream: stream that will read the array. It waits for the stream that writes the array, or for the default
            stream if the array names none.

    Raises:
        UserError: if the array is on another device, not contiguous, or of a type that NumPy lacks.
    """
    with cuda.active():  # torch exports a tensor only while its GPU is current
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
    except TypeError:  # before DLPack 1.0 there was no max_version
        capsule = value.__dlpack__(stream=stream.address)
    tensor = ImportedTensor(capsule)
    if tensor.dtype is None:
        raise UserError(_described(value), "a type that NumPy has", "convert it to float32")
    itemsize = tensor.dtype.itemsize
    strides = None if tensor.strides is None else tuple(step * itemsize for step in tensor.strides)
    _check_contiguous(value, tensor.shape, strides, itemsize)
    return DeviceArray(tensor.address, tensor.shape, tensor.dtype, stream=stream, owner=tensor)


def _from_interface(value: Any, cuda: Cuda, stream: Stream) -> DeviceArray:
    interface = value.__cuda_array_interface__
    shape, dtype = tuple(interface["shape"]), np.dtype(interface["typestr"])
    _check_contiguous(value, shape, interface.get("strides"), dtype.itemsize)
    address = interface["data"][0]
    attributes = cuda.call("cudaPointerGetAttributes", address) if address else None
    if attributes is not None and int(attributes.device) != cuda.index:
        raise _elsewhere(value, int(attributes.device), cuda)
    writer = interface.get("stream") if interface["version"] >= 3 else LEGACY_STREAM
    if writer is not None:  # version 3 without a stream: nothing to wait for
        stream.wait_for_stream(int(writer))
    return DeviceArray(address, shape, dtype, stream=stream, owner=value)


def _check_contiguous(value: Any, shape: tuple[int, ...], strides: tuple[int, ...] | None, itemsize: int) -> None:
    """Raises unless the array is contiguous; `strides` are in bytes, None if it is contiguous."""
    if 0 in shape:
        return
    for length, step in reversed(list(zip(shape, strides or (), strict=False))):
        if length > 1 and step != itemsize:
            raise UserError(
                f"{_described(value)} that is not contiguous",
                "a contiguous array",
                "make it contiguous first: `tensor.contiguous()`, `cupy.ascontiguousarray(array)`",
            )
        itemsize *= length


def _described(value: Any) -> str:
    shape, dtype = getattr(value, "shape", None), getattr(value, "dtype", None)
    return f"an array of {type(value).__module__}.{type(value).__qualname__} ({dtype} {list(shape or ())})"


def _elsewhere(value: Any, index: int | None, cuda: Cuda) -> UserError:
    where = "not on a GPU" if index is None else f"on GPU {index}"
    fix = "move it to that GPU, or load the model on the GPU of the array"
    return UserError(f"{_described(value)} {where}", f"one on GPU {cuda.index}", fix)

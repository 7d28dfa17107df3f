"""DLPack, by which libraries pass arrays to each other without a copy: its structures, read and made with ctypes.

Source: dlpack.h of DLPack 1.0, and the Python specification of `__dlpack__`.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

import numpy as np

CPU, CUDA, CUDA_HOST, CUDA_MANAGED = 1, 2, 3, 13  # DLDeviceType
ON_GPU = (CUDA, CUDA_MANAGED)
_NAME, _VERSIONED_NAME = b"dltensor", b"dltensor_versioned"
_USED = {_NAME: b"used_dltensor", _VERSIONED_NAME: b"used_dltensor_versioned"}
_KINDS = {"i": 0, "u": 1, "f": 2, "b": 6}  # DLDataTypeCode, by NumPy's kind


def is_on_device(value: Any) -> bool:
    """Whether something is an array in a GPU's memory, of whatever library."""
    if isinstance(value, (np.ndarray, np.generic)):
        return False
    if hasattr(value, "__dlpack_device__"):
        return value.__dlpack_device__()[0] in ON_GPU
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
class Seen:
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
            raise ValueError(f"came: {capsule!r}; expected: an unused DLPack capsule; do: call __dlpack__ again")
        self._pointer = _pointer_in(capsule, name)
        kind = _Versioned if name == _VERSIONED_NAME else _Managed
        self._managed = ctypes.cast(self._pointer, ctypes.POINTER(kind)).contents
        self._deleter = self._managed.deleter
        _rename(capsule, _USED[name])
        self.seen = _read(self._managed.tensor)

    def __del__(self) -> None:
        if getattr(self, "_deleter", None):
            self._deleter(self._pointer)


def _read(tensor: _Tensor) -> Seen:
    ndim = tensor.ndim
    kind = {code: name for name, code in _KINDS.items()}.get(tensor.code)
    known = kind is not None and tensor.lanes == 1 and tensor.bits % 8 == 0
    return Seen(
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

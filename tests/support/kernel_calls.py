"""The kernels called with NumPy arrays, wherever their memory is; nothing may be written beside a result."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from kernels_on_cpu import channels_last, name_of, single

from maskrcnn.plugins.native import Kernels, Pyramid

GUARD_BYTES, GUARD = 64, 0xA5  # around each result, and in it before the kernel runs
ALIGNMENT = 16  # bytes; four float32 are read at once
_LIBC = ctypes.CDLL(None)


class Memory(Protocol):
    """Where kernels find arrays; what was put there stays as long as this object."""

    stream: int

    def put(self, data: np.ndarray, shift: int) -> int:
        """The address of a copy of bytes; a multiple of ALIGNMENT, and `shift` more."""

    def take(self, address: int, size: int) -> np.ndarray:
        """So many bytes, once everything on the stream has run."""


class HostMemory:
    """Ordinary memory, for kernels that are compiled for the CPU; it ends where the array does.

    Reading behind an array ends the process, as closely as ALIGNMENT allows.
    """

    stream = 0

    def __init__(self) -> None:
        self._kept: dict[int, np.ndarray] = {}

    def put(self, data: np.ndarray, shift: int = 0) -> int:
        pages = -(-(data.size + shift + ALIGNMENT) // mmap.PAGESIZE)
        room = np.frombuffer(mmap.mmap(-1, (pages + 1) * mmap.PAGESIZE), np.uint8)
        end = pages * mmap.PAGESIZE
        refused = _LIBC.mprotect(ctypes.c_void_p(room.ctypes.data + end), ctypes.c_size_t(mmap.PAGESIZE), 0)
        assert refused == 0
        start = (end - data.size - shift) // ALIGNMENT * ALIGNMENT + shift
        values = room[start : start + data.size]
        values[:] = data
        self._kept[room.ctypes.data + start] = values
        return room.ctypes.data + start

    def take(self, address: int, size: int) -> np.ndarray:
        return self._kept[address][:size]


@dataclass(frozen=True)
class Device:
    """A library of kernels and the memory that it works on."""

    kernels: Kernels
    memory: Callable[[], Memory] = HostMemory


class _Arrays:
    """The arrays of one call."""

    def __init__(self, device: Device) -> None:
        self._memory = device.memory()
        self.stream = self._memory.stream

    def put(self, values: np.ndarray, shift: int = 0) -> int:
        return self._memory.put(np.ascontiguousarray(values).reshape(-1).view(np.uint8), shift)

    def room(self, shape: Sequence[int], dtype: np.dtype | type) -> Room:
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        start = self._memory.put(np.full(size + 2 * GUARD_BYTES, GUARD, np.uint8), 0)
        return Room(self._memory, start, size, tuple(shape), np.dtype(dtype))


@dataclass(frozen=True)
class Room:
    """Memory for a result."""

    memory: Memory
    start: int
    size: int
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def address(self) -> int:
        """Of the result."""
        return self.start + GUARD_BYTES

    def values(self) -> np.ndarray:
        """What the kernel wrote, and nothing but that."""
        data = self.memory.take(self.start, self.size + 2 * GUARD_BYTES)
        assert (data[:GUARD_BYTES] == GUARD).all(), "written before the result"
        assert (data[-GUARD_BYTES:] == GUARD).all(), "written behind the result"
        return data[GUARD_BYTES:-GUARD_BYTES].view(self.dtype).reshape(self.shape)


def roi_align(
    device: Device,
    features: Sequence[np.ndarray],
    rois: np.ndarray,
    *,
    layout: str = "NCHW",
    pitch: int = 0,
    float32_output: bool = False,
    shift: int = 0,
    **attributes: object,
) -> np.ndarray:
    """`MultilevelRoiAlign`: features `[N, C, H_l, W_l]` of one type, rois `[N, R, 4]`; the result as float32.

    `shift`: elements by which the features' addresses are past a multiple of ALIGNMENT.
    """
    arrays, kind = _Arrays(device), features[0].dtype
    batch, channels = features[0].shape[:2]
    pitch = pitch or channels
    laid = [channels_last(f, pitch) for f in features] if layout == "NHWC" else features
    size = int(attributes["output_size"])
    pooled = arrays.room((batch, rois.shape[1], channels, size, size), np.float32 if float32_output else kind)
    pyramid = Pyramid(
        addresses=[arrays.put(f, shift * kind.itemsize) for f in laid],
        heights=[f.shape[2] for f in features],
        widths=[f.shape[3] for f in features],
        batch=batch,
        channels=channels,
        dtype=name_of(features[0]),
        layout=layout,
        channel_pitch=pitch,
    )
    device.kernels.multilevel_roi_align(
        pyramid,
        arrays.put(rois.astype(np.float32)),
        rois.shape[1],
        pooled.address,
        output_dtype="float32" if float32_output else name_of(features[0]),
        stream=arrays.stream,
        **attributes,
    )
    return single(pooled.values())


def nms(
    device: Device,
    boxes: np.ndarray,
    groups: np.ndarray,
    counts: np.ndarray,
    *,
    iou_threshold: float,
    max_output: int,
) -> tuple[np.ndarray, np.ndarray]:
    """`BatchedNms`: boxes `[N, K, 4]`, groups `[N, K]`, counts `[N]`; the workspace holds anything but zeros before."""
    arrays = _Arrays(device)
    batch, num_boxes = groups.shape
    indices, num = arrays.room((batch, max_output), np.int32), arrays.room((batch,), np.int32)
    workspace = arrays.room((device.kernels.batched_nms_workspace(batch, num_boxes),), np.uint8)
    device.kernels.batched_nms(
        arrays.put(boxes.astype(np.float32)),
        arrays.put(groups.astype(np.int32)),
        arrays.put(counts.astype(np.int32)),
        batch=batch,
        num_boxes=num_boxes,
        iou_threshold=iou_threshold,
        max_output=max_output,
        workspace=workspace.address,
        indices=indices.address,
        num=num.address,
        stream=arrays.stream,
    )
    workspace.values()
    return indices.values(), num.values()


def paste(
    device: Device,
    masks: np.ndarray,
    boxes: np.ndarray,
    size_hw: tuple[int, int],
    threshold: float,
    *,
    by_columns: bool,
) -> np.ndarray:
    """Masks `[D, S, S]` pasted at boxes `[D, 4]`: bool `[D, H, W]`, or, `by_columns`, `[D, W, H]`."""
    arrays = _Arrays(device)
    lines, length = size_hw[::-1] if by_columns else size_hw
    bits = arrays.room((len(masks), lines, -(-length // 32)), np.uint32)
    device.kernels.paste_masks(
        arrays.put(masks),
        arrays.put(boxes.astype(np.float32)),
        bits.address,
        num_masks=len(masks),
        mask_size=masks.shape[1],
        dtype=masks.dtype.name,
        size_hw=size_hw,
        threshold=threshold,
        by_columns=by_columns,
        stream=arrays.stream,
    )
    pixels = np.unpackbits(bits.values().view(np.uint8), axis=-1, bitorder="little").astype(bool)
    assert not pixels[..., length:].any(), "bits past the end of a line are set"
    return pixels[..., :length]

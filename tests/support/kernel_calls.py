"""Calls of the kernels with NumPy arrays on a CPU or GPU; checks that nothing is written outside a result."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from kernels_on_cpu import channels_last, name_of, single

from maskrcnn.plugins.native import Kernels, Pyramid

GUARD_BYTES, GUARD = 64, 0xA5  # around each result, and its initial contents
ALIGNMENT = 16  # bytes; the size of four float32
_LIBC = ctypes.CDLL(None)


class Memory(Protocol):
    """Memory of a device; arrays stay valid as long as this object."""

    stream: int

    def put(self, data: np.ndarray, shift: int) -> int:
        """Copies bytes; returns their address, a multiple of ALIGNMENT plus `shift`."""

    def take(self, address: int, size: int) -> np.ndarray:
        """Reads `size` bytes after the stream has finished."""


class HostMemory:
    """Host memory for kernels compiled for the CPU.

    Each array ends at a protected page, up to ALIGNMENT, so that reading past its end ends the process.
    """

    stream = 0

    def __init__(self) -> None:
        self._kept: dict[int, np.ndarray] = {}

    def put(self, data: np.ndarray, shift: int = 0) -> int:
        pages = -(-(data.size + shift + ALIGNMENT) // mmap.PAGESIZE)
        buffer = np.frombuffer(mmap.mmap(-1, (pages + 1) * mmap.PAGESIZE), np.uint8)
        end = pages * mmap.PAGESIZE
        refused = _LIBC.mprotect(ctypes.c_void_p(buffer.ctypes.data + end), ctypes.c_size_t(mmap.PAGESIZE), 0)
        assert refused == 0
        start = (end - data.size - shift) // ALIGNMENT * ALIGNMENT + shift
        values = buffer[start : start + data.size]
        values[:] = data
        self._kept[buffer.ctypes.data + start] = values
        return buffer.ctypes.data + start

    def take(self, address: int, size: int) -> np.ndarray:
        return self._kept[address][:size]


@dataclass(frozen=True)
class Device:
    """A kernel library and the memory that it works on."""

    kernels: Kernels
    memory: Callable[[], Memory] = HostMemory


class _Arrays:
    """Arrays of one call."""

    def __init__(self, device: Device) -> None:
        self._memory = device.memory()
        self.stream = self._memory.stream

    def put(self, values: np.ndarray, shift: int = 0) -> int:
        return self._memory.put(np.ascontiguousarray(values).reshape(-1).view(np.uint8), shift)

    def result(self, shape: Sequence[int], dtype: np.dtype | type, fill: int = GUARD) -> _Result:
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        initial = np.full(size + 2 * GUARD_BYTES, GUARD, np.uint8)
        initial[GUARD_BYTES : GUARD_BYTES + size] = fill
        start = self._memory.put(initial, 0)
        return _Result(self._memory, start, size, tuple(shape), np.dtype(dtype))


@dataclass(frozen=True)
class _Result:
    """Guarded memory for a result."""

    memory: Memory
    start: int
    size: int
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def address(self) -> int:
        """Address of the result."""
        return self.start + GUARD_BYTES

    def values(self) -> np.ndarray:
        """Returns the result after checking the guards."""
        data = self.memory.take(self.start, self.size + 2 * GUARD_BYTES)
        assert (data[:GUARD_BYTES] == GUARD).all(), "written before the result"
        assert (data[-GUARD_BYTES:] == GUARD).all(), "written after the result"
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
    """Runs `MultilevelRoiAlign` on features `[N, C, H_l, W_l]` of one type and rois `[N, R, 4]`; returns float32.

    `shift`: offset in elements of the features' addresses from a multiple of ALIGNMENT.
    """
    arrays, kind = _Arrays(device), features[0].dtype
    batch, channels = features[0].shape[:2]
    pitch = pitch or channels
    laid = [channels_last(f, pitch) for f in features] if layout == "NHWC" else features
    size = int(attributes["output_size"])
    pooled = arrays.result((batch, rois.shape[1], channels, size, size), np.float32 if float32_output else kind)
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


def roi_align_gradient(
    device: Device,
    pooled: np.ndarray,
    rois: np.ndarray,
    sizes_hw: Sequence[tuple[int, int]],
    **attributes: object,
) -> np.ndarray:
    """The gradients of maps `[N, H_l, W_l, C]`, flattened and joined, from that of the result `[N, R, C, S, S]`."""
    arrays = _Arrays(device)
    batch, num_rois, channels = pooled.shape[:3]
    sizes = [batch * height * width * channels for height, width in sizes_hw]
    gradients = arrays.result((sum(sizes),), np.float32, fill=0)
    pyramid = Pyramid(
        addresses=[gradients.address + 4 * sum(sizes[:level]) for level in range(len(sizes))],
        heights=[height for height, _ in sizes_hw],
        widths=[width for _, width in sizes_hw],
        batch=batch,
        channels=channels,
        dtype="float32",
        layout="NHWC",
    )
    device.kernels.multilevel_roi_align_gradient(
        pyramid,
        arrays.put(rois.astype(np.float32)),
        num_rois,
        arrays.put(pooled),
        pooled_dtype=name_of(pooled),
        stream=arrays.stream,
        **attributes,
    )
    return gradients.values()


def nms(
    device: Device,
    boxes: np.ndarray,
    groups: np.ndarray,
    counts: np.ndarray,
    *,
    iou_threshold: float,
    max_output: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Runs `BatchedNms` on boxes `[N, K, 4]`, groups `[N, K]` and counts `[N]`, with a workspace of nonzero bytes."""
    arrays = _Arrays(device)
    batch, num_boxes = groups.shape
    indices, num = arrays.result((batch, max_output), np.int32), arrays.result((batch,), np.int32)
    workspace = arrays.result((device.kernels.batched_nms_workspace(batch, num_boxes),), np.uint8)
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
    """Pastes masks `[D, S, S]` at boxes `[D, 4]`; returns bool `[D, H, W]`, or `[D, W, H]` with `by_columns`."""
    arrays = _Arrays(device)
    lines, length = size_hw[::-1] if by_columns else size_hw
    bits = arrays.result((len(masks), lines, -(-length // 32)), np.uint32)
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


def resize_pad(
    device: Device,
    image: np.ndarray,
    resized_hw: tuple[int, int],
    padded_hw: tuple[int, int],
    *,
    swap_channels: bool = False,
) -> np.ndarray:
    """Resizes and pads an image uint8 `[H, W, 3]`; returns float32 `[3, padded height, padded width]`."""
    arrays = _Arrays(device)
    padded = arrays.result((3, *padded_hw), np.float32)
    device.kernels.resize_pad(
        arrays.put(image),
        image.shape[:2],
        padded.address,
        resized_hw=resized_hw,
        padded_hw=padded_hw,
        swap_channels=swap_channels,
        stream=arrays.stream,
    )
    return padded.values()

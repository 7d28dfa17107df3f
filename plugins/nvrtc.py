"""The kernels on a machine without nvcc: NVRTC, which is part of PyTorch, compiles each kernel at first use.

`NvrtcLibrary` has the functions of csrc/kernels.h. NVRTC compiles no host code, so they repeat the host part of
csrc/*/launch.cu: argument checks, and the selection of kernel and grid. Compiled kernels are kept in the cache of
`plugins.build`; compiling a kernel takes one to three seconds.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Sequence
from typing import Any

from maskrcnn.errors import UserError
from maskrcnn.plugins import aot_kernels, build
from maskrcnn.plugins.aot_kernels import Image, Kernel
from maskrcnn.plugins.interface import DTYPES, INVALID, LAYOUTS, MAX_LEVELS, RoiAlignParams
from maskrcnn.plugins.toolchain import Toolchain, find_driver_cuda, find_nvrtc

# Constants of the sources, with the same names.
_WARP, _MOST_BLOCKS, _MOST_ROWS, _MOST_PIXELS = 32, 0x7FFFFFFF, 65535, 1 << 24
_NMS_THREADS, _SCANNED = 1024, 4
_PASTE_THREADS, _PASTE_WARPS = 256, 8
_PIXELS_OF_BLOCK = 128
_PLANES_THREADS, _PLANES_OF_BLOCK, _TABLE_TAPS = 256, 64, 64
_BIN_THREADS, _LANE_BYTES, _TILE_BYTES, _MOST_BINS = 224, 16, 32 * 1024, 49
_MOST_ROW_ELEMENTS = 0x7FFFFFFF // 4
_TYPES = {DTYPES["float32"]: "float", DTYPES["float16"]: "maskrcnn::Half", DTYPES["bfloat16"]: "maskrcnn::BFloat16"}
_BYTES = {DTYPES["float32"]: 4, DTYPES["float16"]: 2, DTYPES["bfloat16"]: 2}

Grid = tuple[int, int, int]
# Starts a kernel: folder of its launch.cu, name with template arguments, blocks, threads per block, arguments, stream;
# returns 0 or CUDA's error code.
Launch = Callable[[str, str, Grid, int, Sequence[Any], int], int]


class NvrtcLibrary:
    """The C interface of csrc/kernels.h. Each function returns the same as in the compiled library.

    Args:
        launch: starts a kernel (`Gpu.launch`).

    Raises (each function):
        UserError: if NVRTC cannot compile a kernel.
    """

    def __init__(self, launch: Launch, error_string: Callable[[int], bytes]) -> None:
        self._launch = launch
        self._error_string = error_string

    def maskrcnn_multilevel_roi_align(self, params: RoiAlignParams, rois: int, pooled: int, stream: int) -> int:
        p = params
        if not _is_valid(p) or p.output_dtype not in (p.dtype, DTYPES["float32"]):
            return INVALID
        if 0 in (p.batch, p.num_rois, p.channels):
            return 0
        types = f"{_TYPES[p.dtype]}, {_TYPES[p.output_dtype]}"
        if p.layout == LAYOUTS["NCHW"]:
            kernel = f"planes_kernel<{types}, {'true' if p.sampling_ratio == 2 else 'false'}>"
            grid = (p.batch * p.num_rois, _ceil_div(p.channels, _PLANES_OF_BLOCK), 1)
            parts, threads = 1, _PLANES_THREADS
        else:
            wide, is_wide = _LANE_BYTES // _BYTES[p.dtype], _has_wide_pixels(p)
            lane = wide if is_wide else 1
            is_usual = is_wide and p.sampling_ratio == 2 and 2 * p.output_size <= _TABLE_TAPS
            kernel = f"channels_last_kernel<{types}, {lane}, {2 if is_usual else 0}>"
            bins_of_tile = min(_TILE_BYTES // (_WARP * lane * _BYTES[p.output_dtype]), _MOST_BINS)
            parts, threads = _ceil_div(p.output_size**2, bins_of_tile), _BIN_THREADS
            if p.batch * p.num_rois * parts > _MOST_BLOCKS:
                return INVALID
            grid = (p.batch * p.num_rois * parts, _ceil_div(p.channels, _WARP * lane), 1)
        arguments = (params, ctypes.c_void_p(rois), ctypes.c_void_p(pooled), ctypes.c_int(parts))
        return self._launch("multilevel_roi_align", kernel, grid, threads, arguments, stream)

    def maskrcnn_multilevel_roi_align_gradient(
        self, params: RoiAlignParams, rois: int, pooled: int, stream: int
    ) -> int:
        p = params
        if not _is_valid(p) or p.dtype != DTYPES["float32"] or p.layout != LAYOUTS["NHWC"]:
            return INVALID
        if 0 in (p.batch, p.num_rois, p.channels):
            return 0
        parts = _ceil_div(p.output_size**2, _MOST_BINS)
        if p.batch * p.num_rois * parts > _MOST_BLOCKS:
            return INVALID
        grid = (p.batch * p.num_rois * parts, _ceil_div(p.channels, _WARP), 1)
        arguments = (params, ctypes.c_void_p(rois), ctypes.c_void_p(pooled), ctypes.c_int(parts))
        kernel = f"gradient_kernel<{_TYPES[p.output_dtype]}>"
        return self._launch("multilevel_roi_align", kernel, grid, _BIN_THREADS, arguments, stream)

    def maskrcnn_batched_nms(
        self,
        boxes: int,
        groups: int,
        counts: int,
        batch: int,
        num_boxes: int,
        iou_threshold: float,
        max_output: int,
        workspace: int,
        indices: int,
        num: int,
        stream: int,
    ) -> int:
        most_boxes = 0x7FFFFFFF - _NMS_THREADS * _SCANNED
        if not (0 <= batch <= _MOST_ROWS and 0 <= num_boxes <= most_boxes and max_output >= 0):
            return INVALID
        if batch == 0:
            return 0
        op, pointer, integer = "batched_nms", ctypes.c_void_p, ctypes.c_int
        if num_boxes > 0 and max_output > 0:
            if not workspace:
                return INVALID
            arguments: list[Any] = [pointer(boxes), pointer(groups), pointer(counts), integer(num_boxes)]
            arguments += [ctypes.c_float(iou_threshold), integer(max_output), pointer(workspace)]
            buckets = min(max(num_boxes // 32, 1), 128)
            if code := self._launch(op, "keep_kernel", (buckets, batch, 1), _NMS_THREADS, arguments, stream):
                return code
        rows = num_boxes if max_output > 0 else 0
        arguments = [pointer(workspace), integer(rows), integer(max_output), pointer(indices), pointer(num)]
        return self._launch(op, "compact_kernel", (batch, 1, 1), _NMS_THREADS, arguments, stream)

    def maskrcnn_batched_nms_workspace(self, batch: int, num_boxes: int) -> int:
        return max(batch, 0) * max(num_boxes, 0) * 4

    def maskrcnn_paste_masks(
        self,
        masks: int,
        boxes: int,
        num_masks: int,
        mask_size: int,
        dtype: int,
        height: int,
        width: int,
        threshold: float,
        by_columns: int,
        bits: int,
        stream: int,
    ) -> int:
        has_sides = 0 <= height <= _MOST_PIXELS and 0 <= width <= _MOST_PIXELS and 1 <= mask_size <= 32767
        if num_masks < 0 or not has_sides or dtype not in (DTYPES["float32"], DTYPES["float16"]):
            return INVALID
        if 0 in (num_masks, height, width):
            return 0
        lines, length = (width, height) if by_columns else (height, width)
        words = _ceil_div(length, _WARP)
        grid = (_ceil_div(lines, _PASTE_WARPS), _ceil_div(words, _WARP), min(num_masks, _MOST_ROWS))
        arguments: list[Any] = [ctypes.c_void_p(masks), ctypes.c_void_p(boxes)]
        arguments += [ctypes.c_int(value) for value in (num_masks, mask_size, lines, length)]
        arguments += [ctypes.c_float(threshold), ctypes.c_int(by_columns), ctypes.c_void_p(bits)]
        return self._launch("mask_paste", f"paste_kernel<{_TYPES[dtype]}>", grid, _PASTE_THREADS, arguments, stream)

    def maskrcnn_resize_pad(
        self,
        image: int,
        height: int,
        width: int,
        padded: int,
        resized_height: int,
        resized_width: int,
        padded_height: int,
        padded_width: int,
        swap_channels: int,
        stream: int,
    ) -> int:
        sides = [(height, _MOST_PIXELS), (width, _MOST_PIXELS), (resized_height, padded_height)]
        sides += [(resized_width, padded_width), (padded_height, _MOST_PIXELS), (padded_width, _MOST_PIXELS)]
        if not all(1 <= side <= most for side, most in sides):
            return INVALID
        sizes = [(height, width), (resized_height, resized_width), (padded_height, padded_width)]
        arguments: list[Any] = [ctypes.c_void_p(image), *((ctypes.c_int * 2)(*size) for size in sizes)]
        arguments += [ctypes.c_bool(swap_channels), ctypes.c_void_p(padded)]
        grid = (_ceil_div(padded_width, _PIXELS_OF_BLOCK), min(padded_height, _MOST_ROWS), 1)
        return self._launch("resize_pad", "resize_kernel", grid, _PIXELS_OF_BLOCK, arguments, stream)

    def maskrcnn_error_string(self, code: int) -> bytes:
        return b"an argument outside what kernels.h allows" if code == INVALID else self._error_string(code)


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def _is_valid(p: RoiAlignParams) -> bool:
    """`is_valid` of csrc/multilevel_roi_align/launch.cu."""
    has_types = p.dtype in _TYPES and p.output_dtype in _TYPES
    is_last = p.layout == LAYOUTS["NHWC"]
    has_layout = p.layout in LAYOUTS.values() and (not is_last or p.channel_pitch >= p.channels)
    has_shape = 1 <= p.num_levels <= MAX_LEVELS and min(p.batch, p.num_rois, p.channels, p.sampling_ratio) >= 0
    has_grid = p.batch * p.num_rois <= _MOST_BLOCKS and _ceil_div(p.channels, _WARP) <= _MOST_ROWS
    if not (has_types and has_layout and has_shape and has_grid and 1 <= p.output_size <= 32767):
        return False
    has_maps = all(
        p.heights[level] >= 1
        and p.widths[level] >= 1
        and (not is_last or p.widths[level] * p.channel_pitch <= _MOST_ROW_ELEMENTS)
        for level in range(p.num_levels)
    )
    return has_maps and p.canonical_size > 0


def _has_wide_pixels(p: RoiAlignParams) -> bool:
    """Whether every pixel begins at a multiple of 16 bytes, so that a lane can read 16 bytes at once."""
    is_aligned = all((p.features[level] or 0) % _LANE_BYTES == 0 for level in range(p.num_levels))
    return is_aligned and p.channel_pitch % (_LANE_BYTES // _BYTES[p.dtype]) == 0


class Gpu:
    """Kernels of csrc/*/launch.cu, compiled for one generation of GPUs and started by the CUDA driver.

    Args:
        arch: compute capability of the GPU, 90 for 9.0.

    Raises:
        UserError: if there is no NVRTC.
    """

    def __init__(self, arch: int) -> None:
        self._toolchain = Toolchain(nvrtc=find_nvrtc(), gpus=(arch,), driver_cuda=find_driver_cuda())
        self._target = aot_kernels.architecture(self._toolchain)
        # Machine code runs only on its own generation, with any driver. PTX also runs on later generations, unless the
        # driver is older than NVRTC.
        self._image = Image.CUBIN if self._target // 10 == arch // 10 else Image.PTX
        self._functions: dict[tuple[str, str], Any] = {}
        self._lock = threading.Lock()

    def __str__(self) -> str:
        return f"compiled by {aot_kernels.compiler_name(self._toolchain)} for compute capability {self._target / 10}"

    def compile(self, op: str, name: str) -> tuple[bytes, str]:
        """Compiles a kernel of csrc/`op`/launch.cu, or reads it from the cache; returns its code and its symbol.

        Raises:
            UserError: if NVRTC fails.
        """
        source = build.SOURCES / op / "launch.cu"
        kernel = Kernel(source, op, {}, threads=0, expression=f"maskrcnn::{name}")
        return aot_kernels.compile_expression(kernel, arch=self._target, toolchain=self._toolchain, image=self._image)

    def prepare(self, op: str, name: str) -> Any:
        """Compiles and loads a kernel, once; returns the driver's handle.

        Raises:
            UserError: if NVRTC or the driver fails.
        """
        with self._lock:
            if (op, name) not in self._functions:
                self._functions[op, name] = _loaded(*self.compile(op, name))
            return self._functions[op, name]

    def launch(self, op: str, name: str, grid: Grid, threads: int, arguments: Sequence[Any], stream: int) -> int:
        """Starts a kernel on the GPU of the thread's context; see `Launch`."""
        from cuda.bindings import driver

        function = self.prepare(op, name)
        if code := _bind_context(arguments):
            return code
        addresses = (ctypes.c_void_p * len(arguments))(*map(ctypes.addressof, arguments))
        (status,) = driver.cuLaunchKernel(function, *grid, threads, 1, 1, 0, stream, ctypes.addressof(addresses), 0)
        return int(status)

    def error_string(self, code: int) -> bytes:
        """CUDA's message for an error code."""
        from cuda.bindings import driver

        status, text = driver.cuGetErrorString(driver.CUresult(code))
        return bytes(text) if int(status) == 0 else b"unknown error"


def _loaded(code: bytes, symbol: str) -> Any:
    """Loads the kernel for all contexts of the process; it is never unloaded, as CUDA graphs may use it."""
    from cuda.bindings import driver

    status, library = driver.cuLibraryLoadData(code, [], [], 0, [], [], 0)
    if int(status) == 0:
        status, kernel = driver.cuLibraryGetKernel(library, symbol.encode())
    if int(status):
        raise UserError(
            f"the CUDA driver does not load a kernel compiled by NVRTC ({status.name})",
            "a driver of CUDA 12 or newer that supports the GPU and NVRTC's version",
            "update the driver, or set MASKRCNN_KERNELS=off",
        )
    return driver.CUfunction(int(kernel))


def _bind_context(arguments: Sequence[Any]) -> int:
    """Binds the primary context of the arguments' GPU to a thread without a context, as the CUDA runtime would."""
    from cuda.bindings import driver

    status, context = driver.cuCtxGetCurrent()
    if int(status) or int(context):
        return int(status)
    attribute = driver.CUpointer_attribute.CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL
    pointer = next(argument.value for argument in arguments if isinstance(argument, ctypes.c_void_p))
    status, number = driver.cuPointerGetAttribute(attribute, pointer or 0)
    status, device = driver.cuDeviceGet(0 if int(status) else int(number))
    if int(status):
        return int(status)
    status, context = driver.cuDevicePrimaryCtxRetain(device)
    return int(status) or int(driver.cuCtxSetCurrent(context)[0])

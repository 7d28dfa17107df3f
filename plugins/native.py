"""Python binding of the compiled kernels: the C interface of `csrc/kernels.h` through ctypes.

Arguments are addresses in the memory of the device that the library was compiled for. Calls neither copy nor
synchronise; the caller keeps the memory alive until the stream has finished.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

SWITCH = "MASKRCNN_KERNELS"  # environment variable: "off", or the path of a library to use instead of the cached one
INTERFACE_VERSION = 1  # MASKRCNN_KERNELS_VERSION of kernels.h
MAX_LEVELS = 16
INVALID = -1  # MASKRCNN_INVALID
_DTYPES = {"float32": 0, "float16": 1, "bfloat16": 2}  # maskrcnn_dtype
_LAYOUTS = {"NCHW": 0, "NHWC": 1}  # maskrcnn_layout

_Address = ctypes.c_void_p


class _RoiAlignParams(ctypes.Structure):
    """`maskrcnn_roi_align_params`, field by field."""

    _fields_ = (
        ("features", _Address * MAX_LEVELS),
        ("heights", ctypes.c_int32 * MAX_LEVELS),
        ("widths", ctypes.c_int32 * MAX_LEVELS),
        *((name, ctypes.c_int32) for name in (
            "num_levels", "batch", "num_rois", "channels", "channel_pitch", "dtype", "layout", "output_dtype",
            "output_size", "sampling_ratio", "aligned", "min_level", "canonical_level",
        )),
        ("canonical_size", ctypes.c_float),
        ("level_epsilon", ctypes.c_float),
    )  # fmt: skip


@dataclass(frozen=True)
class Pyramid:
    """Feature maps in device memory, one address, height and width per level.

    A map is `[batch, channels, height, width]` in layout "NCHW" and `[batch, height, width, channel_pitch]` in layout
    "NHWC", of which the first `channels` are used.
    """

    addresses: Sequence[int]
    heights: Sequence[int]
    widths: Sequence[int]
    batch: int
    channels: int
    dtype: str  # float32, float16 or bfloat16
    layout: str = "NCHW"
    channel_pitch: int = 0  # 0 means `channels`


class Kernels:
    """A loaded kernel library.

    Methods raise ValueError for arguments outside `kernels.h`, without starting a kernel, and RuntimeError if CUDA
    fails to start one. Their `stream` is the address of a CUDA stream; 0 is the default stream.

    Args:
        path: `libmaskrcnn_kernels.so`, built by `maskrcnn build-plugins`.

    Raises:
        OSError: if the file cannot be loaded.
        ValueError: if the library has another version of the interface.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._library = ctypes.CDLL(str(path))
        version = self._library.maskrcnn_kernels_version()
        if version != INTERFACE_VERSION:
            raise ValueError(
                f"found: kernels of interface version {version} in {path}; expected: version {INTERFACE_VERSION}; "
                "fix: run `maskrcnn build-plugins --force`"
            )
        self._declare()

    def _declare(self) -> None:
        c, integer, number = self._library, ctypes.c_int32, ctypes.c_float
        c.maskrcnn_multilevel_roi_align.argtypes = [ctypes.POINTER(_RoiAlignParams), _Address, _Address, _Address]
        c.maskrcnn_batched_nms.argtypes = [
            _Address, _Address, _Address, integer, integer, number, integer, _Address, _Address, _Address, _Address,
        ]  # fmt: skip
        c.maskrcnn_batched_nms_workspace.argtypes = [integer, integer]
        c.maskrcnn_batched_nms_workspace.restype = ctypes.c_size_t
        c.maskrcnn_paste_masks.argtypes = [
            _Address, _Address, integer, integer, integer, integer, integer, number, integer, _Address, _Address,
        ]  # fmt: skip
        c.maskrcnn_resize_pad.argtypes = [_Address, integer, integer, _Address, *(5 * [integer]), _Address]
        c.maskrcnn_error_string.argtypes = [ctypes.c_int]
        c.maskrcnn_error_string.restype = ctypes.c_char_p

    def multilevel_roi_align(
        self,
        pyramid: Pyramid,
        rois: int,
        num_rois: int,
        pooled: int,
        *,
        output_dtype: str,
        output_size: int,
        sampling_ratio: int,
        aligned: bool,
        min_level: int = 2,
        canonical_level: int = 4,
        canonical_size: float = 224.0,
        level_epsilon: float = 1e-6,
        stream: int = 0,
    ) -> None:
        """Runs `MultilevelRoiAlign` of the contract.

        Args:
            pyramid: features.
            rois: address of float32 `[N, R, 4]` xyxy px.
            num_rois: R.
            pooled: address of the result, `output_dtype` `[N, R, C, S, S]`.
            output_dtype: type of the features, or "float32".
        """
        if len(pyramid.addresses) > MAX_LEVELS:
            raise ValueError(
                f"found: {len(pyramid.addresses)} levels; expected: at most {MAX_LEVELS}; "
                "fix: raise MASKRCNN_MAX_LEVELS in kernels.h"
            )
        params = _RoiAlignParams(
            num_levels=len(pyramid.addresses), batch=pyramid.batch, num_rois=num_rois, channels=pyramid.channels,
            channel_pitch=pyramid.channel_pitch or pyramid.channels, dtype=_DTYPES[pyramid.dtype],
            layout=_LAYOUTS[pyramid.layout], output_dtype=_DTYPES[output_dtype], output_size=output_size,
            sampling_ratio=sampling_ratio, aligned=int(aligned), min_level=min_level,
            canonical_level=canonical_level, canonical_size=canonical_size, level_epsilon=level_epsilon,
        )  # fmt: skip
        params.features[: len(pyramid.addresses)] = pyramid.addresses
        params.heights[: len(pyramid.heights)] = pyramid.heights
        params.widths[: len(pyramid.widths)] = pyramid.widths
        self._check(self._library.maskrcnn_multilevel_roi_align(ctypes.byref(params), rois, pooled, stream))

    def batched_nms_workspace(self, batch: int, num_boxes: int) -> int:
        """Returns the size in bytes of the workspace for `batched_nms`."""
        return int(self._library.maskrcnn_batched_nms_workspace(batch, num_boxes))

    def batched_nms(
        self,
        boxes: int,
        groups: int,
        counts: int,
        *,
        batch: int,
        num_boxes: int,
        iou_threshold: float,
        max_output: int,
        workspace: int,
        indices: int,
        num: int,
        stream: int = 0,
    ) -> None:
        """Runs `BatchedNms` of the contract.

        Args:
            boxes, groups, counts: addresses of `[N, K, 4]`, `[N, K]` and `[N]`; N is `batch` and K `num_boxes`.
            workspace: address of `batched_nms_workspace(N, K)` bytes.
            indices, num: addresses of the results `[N, M]` and `[N]`; M is `max_output`.
        """
        self._check(
            self._library.maskrcnn_batched_nms(
                boxes, groups, counts, batch, num_boxes, iou_threshold, max_output, workspace, indices, num, stream
            )
        )

    def paste_masks(
        self,
        masks: int,
        boxes: int,
        bits: int,
        *,
        num_masks: int,
        mask_size: int,
        dtype: str,
        size_hw: tuple[int, int],
        threshold: float = 0.5,
        by_columns: bool = False,
        stream: int = 0,
    ) -> None:
        """Pastes masks into the image, as one bit per pixel.

        Args:
            masks: address of the probabilities `[D, S, S]`, float32 or float16.
            boxes: address of float32 `[D, 4]` xyxy px of the image.
            bits: address of the result: uint32 `[D, H, ceil(W / 32)]`, or `[D, W, ceil(H / 32)]` with `by_columns`;
                bit b of word w is pixel 32 w + b.
            size_hw: H and W of the image.

        Source: torchvision's `paste_masks_in_image`, followed by a threshold.
        """
        height, width = size_hw
        self._check(
            self._library.maskrcnn_paste_masks(
                masks,
                boxes,
                num_masks,
                mask_size,
                _DTYPES[dtype],
                height,
                width,
                threshold,
                int(by_columns),
                bits,
                stream,
            )
        )

    def resize_pad(
        self,
        image: int,
        size_hw: tuple[int, int],
        padded: int,
        *,
        resized_hw: tuple[int, int],
        padded_hw: tuple[int, int],
        swap_channels: bool = False,
        stream: int = 0,
    ) -> None:
        """Resizes and pads one image as `batch_images` does, except for Pillow's resizing.

        Args:
            image: address of uint8 `[H, W, 3]`.
            size_hw: H and W.
            padded: address of the result, float32 `[3, padded height, padded width]`, 0–255, padded with zeros.
            resized_hw: size of the resized image, from `maskrcnn.imaging.preprocess.resized_size`.
            padded_hw: size of the result, not less than `resized_hw`.
            swap_channels: convert between RGB and BGR.
        """
        self._check(
            self._library.maskrcnn_resize_pad(
                image, *size_hw, padded, *resized_hw, *padded_hw, int(swap_channels), stream
            )
        )

    def _check(self, code: int) -> None:
        if code == 0:
            return
        reason = self._library.maskrcnn_error_string(code).decode()
        if code == INVALID:
            raise ValueError(
                f"found: {reason}; expected: arguments as described in csrc/kernels.h; fix: correct the arguments"
            )
        raise RuntimeError(
            f"found: CUDA error {code}, {reason}; expected: a started kernel; fix: see CUDA's list of errors"
        )


def kernels_for(arch: int) -> Kernels | None:
    """Returns the compiled kernels for a GPU, or None if there are none; the result is cached.

    Args:
        arch: compute capability of the GPU, 90 for 9.0.

    Raises:
        OSError: if the environment variable `MASKRCNN_KERNELS` names a file that cannot be loaded.
    """
    return _kernels(arch, os.environ.get(SWITCH, ""))


@functools.cache
def _kernels(arch: int, switch: str) -> Kernels | None:
    from maskrcnn.plugins.build import find_library  # imported late: other uses of this module do not need it

    if switch == "off":
        return None
    path = switch or find_library("kernels", arch)
    return Kernels(path) if path else None

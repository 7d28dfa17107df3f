"""The compiled kernels, called from Python: the C interface of `csrc/kernels.h` through ctypes.

Arguments are addresses, of memory of whatever device the library was compiled for; nothing is copied, and nothing is
waited for. Who calls keeps the memory alive until the stream has run.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

SWITCH = "MASKRCNN_KERNELS"  # environment: "off", or the path of a library to use instead of the cache's
INTERFACE_VERSION = 1  # MASKRCNN_KERNELS_VERSION of kernels.h
MAX_LEVELS = 16
INVALID = -1
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
    """Feature maps in memory, one address, height and width for each level.

    With layout "NCHW" a map is `[batch, channels, height, width]`; with "NHWC" it is
    `[batch, height, width, channel_pitch]`, of which the first `channels` count.
    """

    addresses: Sequence[int]
    heights: Sequence[int]
    widths: Sequence[int]
    batch: int
    channels: int
    dtype: str  # a key of DTYPES
    layout: str = "NCHW"
    channel_pitch: int = 0  # 0: channels


class Kernels:
    """One loaded library of kernels.

    Args:
        path: `libmaskrcnn_kernels.so`, which `maskrcnn build-plugins` makes.

    Raises:
        OSError: when the file cannot be loaded.
        ValueError: when it was compiled from sources of another interface.
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
        """`MultilevelRoiAlign` of the contract.

        Args:
            pyramid: the features.
            rois: address of float32 `[N, R, 4]` xyxy px.
            num_rois: R.
            pooled: address of the result, `output_dtype` `[N, R, C, S, S]`.
            output_dtype: the features' type, or "float32".

        Raises:
            ValueError: for arguments that `kernels.h` does not allow; nothing was started.
            RuntimeError: when CUDA refuses to start the kernel.
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
        """Bytes of workspace that `batched_nms` wants."""
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
        """`BatchedNms` of the contract: addresses of boxes `[N, K, 4]`, groups `[N, K]`, counts `[N]`, and of the
        results indices `[N, M]` and num `[N]`; N is `batch`, K `num_boxes`, M `max_output`.

        Raises:
            ValueError: for arguments that `kernels.h` does not allow; nothing was started.
            RuntimeError: when CUDA refuses to start a kernel.
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
        """Pastes masks `[D, S, S]` at boxes float32 `[D, 4]` xyxy px of the image, as one bit a pixel.

        Args:
            masks: address of the probabilities, float32 or float16.
            boxes: address of the boxes.
            bits: address of the result: uint32 `[D, H, ceil(W / 32)]`, or, `by_columns`, `[D, W, ceil(H / 32)]`; bit
                b of a word is pixel 32 · word + b.
            size_hw: H and W of the image.

        Raises:
            ValueError: for arguments that `kernels.h` does not allow; nothing was started.
            RuntimeError: when CUDA refuses to start the kernel.

        Source: torchvision's `paste_masks_in_image`, and a threshold.
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
        """One image of the detector's input: `batch_images`, but for Pillow's way of resizing.

        Args:
            image: address of uint8 `[H, W, 3]`.
            size_hw: H and W.
            padded: address of the result, float32 `[3, padded height, padded width]`, 0–255, zeros where no image is.
            resized_hw: size of the image in it, from `maskrcnn.imaging.preprocess.resized_size`.
            padded_hw: size of the result, at least that.
            swap_channels: write BGR for RGB.

        Raises:
            ValueError: for arguments that `kernels.h` does not allow; nothing was started.
            RuntimeError: when CUDA refuses to start the kernel.
        """
        self._check(
            self._library.maskrcnn_resize_pad(
                image, *size_hw, padded, *resized_hw, *padded_hw, int(swap_channels), stream
            )
        )

    def _check(self, code: int) -> None:
        if code == 0:
            return
        why = self._library.maskrcnn_error_string(code).decode()
        if code == INVALID:
            raise ValueError(
                f"found: {why}; expected: arguments as csrc/kernels.h describes them; fix: compare the two"
            )
        raise RuntimeError(
            f"found: CUDA error {code}, {why}; expected: a started kernel; fix: see CUDA's list of errors"
        )


def kernels_for(arch: int) -> Kernels | None:
    """The compiled kernels for a GPU, or None where there are none; looked for once in a process.

    Args:
        arch: its compute capability, 90 for 9.0.

    Raises:
        OSError: when the environment's `MASKRCNN_KERNELS` names a file that cannot be loaded.
    """
    return _kernels(arch, os.environ.get(SWITCH, ""))


@functools.cache
def _kernels(arch: int, switch: str) -> Kernels | None:
    from maskrcnn.plugins.build import find_library  # which other users of this module do not need

    if switch == "off":
        return None
    path = switch or find_library("kernels", arch)
    return Kernels(path) if path else None

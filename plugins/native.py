"""Python binding of the kernels: the C interface of `csrc/kernels.h`, in a compiled library or in `plugins.nvrtc`.

Arguments are addresses in the memory of the device that the library was compiled for. Calls neither copy nor
synchronise; the caller keeps the memory alive until the stream has finished.
"""

from __future__ import annotations

import ctypes
import functools
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from maskrcnn.plugins.interface import DTYPES, INTERFACE_VERSION, INVALID, LAYOUTS, MAX_LEVELS, Address, RoiAlignParams

if TYPE_CHECKING:
    from maskrcnn.plugins.nvrtc import NvrtcLibrary

SWITCH = "MASKRCNN_KERNELS"  # environment variable: "off", or the path of a library to use instead of the cached one


@dataclass(frozen=True)
class Pyramid:
    """Feature maps in device memory, one address, height and width per level.

    A map is `[batch, channels, height, width]` in layout "NCHW". In layout "NHWC" it is
    `[batch, height, width, channel_pitch]`, and the first `channels` elements of a pixel are used.
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
    """The kernels of a GPU.

    Methods raise ValueError for arguments outside `kernels.h`, without starting a kernel, and RuntimeError if CUDA
    fails to start one. Their `stream` is the address of a CUDA stream; 0 is the default stream.

    Args:
        library: path of `libmaskrcnn_kernels.so`, built by `maskrcnn build-plugins`; or kernels compiled by NVRTC.
        origin: text for users that says where the kernels come from (default: the path).

    Raises:
        OSError: if the file cannot be loaded.
        ValueError: if the library has another version of the interface.
    """

    def __init__(self, library: str | Path | NvrtcLibrary, *, origin: str = "") -> None:
        self.origin = origin or str(library)
        self._library: Any = _load(library) if isinstance(library, (str, Path)) else library

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
        params = _roi_align_params(
            pyramid, num_rois, output_dtype, output_size=output_size, sampling_ratio=sampling_ratio,
            aligned=int(aligned), min_level=min_level, canonical_level=canonical_level, canonical_size=canonical_size,
            level_epsilon=level_epsilon,
        )  # fmt: skip
        self._check(self._library.maskrcnn_multilevel_roi_align(params, rois, pooled, stream))

    def multilevel_roi_align_gradient(
        self,
        gradients: Pyramid,
        rois: int,
        num_rois: int,
        pooled: int,
        *,
        pooled_dtype: str,
        stream: int = 0,
        **attributes: float,
    ) -> None:
        """Adds the gradient of the features of `multilevel_roi_align`, in no fixed order.

        Args:
            gradients: float32 arrays in layout "NHWC", to which the gradient is added.
            rois: address of float32 `[N, R, 4]` xyxy px.
            num_rois: R.
            pooled: address of the result's gradient, `pooled_dtype` `[N, R, C, S, S]`.
            attributes: as for `multilevel_roi_align`.
        """
        params = _roi_align_params(gradients, num_rois, pooled_dtype, **attributes)
        self._check(self._library.maskrcnn_multilevel_roi_align_gradient(params, rois, pooled, stream))

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
                DTYPES[dtype],
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


def _roi_align_params(
    pyramid: Pyramid,
    num_rois: int,
    output_dtype: str,
    *,
    min_level: float = 2,
    canonical_level: float = 4,
    canonical_size: float = 224.0,
    level_epsilon: float = 1e-6,
    **attributes: float,
) -> RoiAlignParams:
    if len(pyramid.addresses) > MAX_LEVELS:
        raise ValueError(
            f"found: {len(pyramid.addresses)} levels; expected: at most {MAX_LEVELS}; "
            "fix: raise MASKRCNN_MAX_LEVELS in kernels.h"
        )
    params = RoiAlignParams(
        num_levels=len(pyramid.addresses), batch=pyramid.batch, num_rois=num_rois, channels=pyramid.channels,
        channel_pitch=pyramid.channel_pitch or pyramid.channels, dtype=DTYPES[pyramid.dtype],
        layout=LAYOUTS[pyramid.layout], output_dtype=DTYPES[output_dtype], min_level=min_level,
        canonical_level=canonical_level, canonical_size=canonical_size, level_epsilon=level_epsilon, **attributes,
    )  # fmt: skip
    params.features[: len(pyramid.addresses)] = pyramid.addresses
    params.heights[: len(pyramid.heights)] = pyramid.heights
    params.widths[: len(pyramid.widths)] = pyramid.widths
    return params


def _load(path: str | Path) -> ctypes.CDLL:
    library, integer, number = ctypes.CDLL(str(path)), ctypes.c_int32, ctypes.c_float
    version = library.maskrcnn_kernels_version()
    if version != INTERFACE_VERSION:
        raise ValueError(
            f"found: kernels of interface version {version} in {path}; expected: version {INTERFACE_VERSION}; "
            "fix: run `maskrcnn build-plugins --force`"
        )
    for roi_align in (library.maskrcnn_multilevel_roi_align, library.maskrcnn_multilevel_roi_align_gradient):
        roi_align.argtypes = [ctypes.POINTER(RoiAlignParams), Address, Address, Address]
    library.maskrcnn_batched_nms.argtypes = [
        Address, Address, Address, integer, integer, number, integer, Address, Address, Address, Address,
    ]  # fmt: skip
    library.maskrcnn_batched_nms_workspace.argtypes = [integer, integer]
    library.maskrcnn_batched_nms_workspace.restype = ctypes.c_size_t
    library.maskrcnn_paste_masks.argtypes = [
        Address, Address, integer, integer, integer, integer, integer, number, integer, Address, Address,
    ]  # fmt: skip
    library.maskrcnn_resize_pad.argtypes = [Address, integer, integer, Address, *(5 * [integer]), Address]
    library.maskrcnn_error_string.argtypes = [ctypes.c_int]
    library.maskrcnn_error_string.restype = ctypes.c_char_p
    return library


def kernels_for(arch: int) -> Kernels | None:
    """Returns the kernels for a GPU; the result is cached.

    These are the kernels that `maskrcnn build-plugins` has compiled; without them, NVRTC compiles each at first use.

    Args:
        arch: compute capability of the GPU, 90 for 9.0.

    Returns:
        None with `MASKRCNN_KERNELS=off`, without compiled kernels and NVRTC, or, after a warning, if NVRTC or the
        driver fails.

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
    return Kernels(path) if path else _kernels_by_nvrtc(arch)


def _kernels_by_nvrtc(arch: int) -> Kernels | None:
    from maskrcnn.errors import UserError
    from maskrcnn.plugins.nvrtc import Gpu, NvrtcLibrary
    from maskrcnn.plugins.toolchain import find_nvrtc

    if find_nvrtc() is None:
        return None
    try:
        gpu = Gpu(arch)
        gpu.prepare("batched_nms", "keep_kernel")  # shows whether NVRTC and the driver work; every model uses it
    except UserError as error:
        warnings.warn(f"the GPU kernels are not used, so inference is slower: {error}", stacklevel=2)
        return None
    return Kernels(NvrtcLibrary(gpu.launch, gpu.error_string), origin=str(gpu))

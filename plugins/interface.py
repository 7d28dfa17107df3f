"""Constants and the struct of the kernels' C interface, `csrc/kernels.h`."""

from __future__ import annotations

import ctypes

INTERFACE_VERSION = 2  # MASKRCNN_KERNELS_VERSION
MAX_LEVELS = 16
INVALID = -1  # MASKRCNN_INVALID
DTYPES = {"float32": 0, "float16": 1, "bfloat16": 2}  # maskrcnn_dtype
LAYOUTS = {"NCHW": 0, "NHWC": 1}  # maskrcnn_layout

Address = ctypes.c_void_p


class RoiAlignParams(ctypes.Structure):
    """`maskrcnn_roi_align_params`, field by field."""

    _fields_ = (
        ("features", Address * MAX_LEVELS),
        ("heights", ctypes.c_int32 * MAX_LEVELS),
        ("widths", ctypes.c_int32 * MAX_LEVELS),
        *((name, ctypes.c_int32) for name in (
            "num_levels", "batch", "num_rois", "channels", "channel_pitch", "dtype", "layout", "output_dtype",
            "output_size", "sampling_ratio", "aligned", "min_level", "canonical_level",
        )),
        ("canonical_size", ctypes.c_float),
        ("level_epsilon", ctypes.c_float),
    )  # fmt: skip

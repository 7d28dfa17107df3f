"""The kernels of the ahead-of-time plugins: which source file with which macros, and how many blocks of threads.

An engine gets each kernel compiled for exactly its node: attributes, feature type and memory layout are constants in
it, lengths are arguments. The files are csrc/*/aot.cu; they are compiled by `nvrtc.compile_kernel`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from maskrcnn.errors import UserError
from maskrcnn.plugins import contract
from maskrcnn.plugins.build import SOURCES

MOST_LEVELS = 16  # as MASKRCNN_MAX_LEVELS of csrc/kernels.h
_FEATURES = {"float32": "float", "float16": "maskrcnn::Half", "bfloat16": "maskrcnn::BFloat16"}
# As the kernels are written, which csrc/*/aot.cu asserts: threads of a block, bins of a channels-last block.
_POOLING_THREADS, _NMS_THREADS, _WARP, _BINS_OF_TILE = 256, 1024, 32, 64
_PLANES_OF_BLOCK = 64  # as csrc/multilevel_roi_align/launch.cu
_LANES_OF_CHANNELS = 4


@dataclass(frozen=True)
class Kernel:
    """One kernel for one node."""

    source: Path
    name: str
    defines: Mapping[str, str]
    threads: int  # of a block


@dataclass(frozen=True)
class Layout:
    """How feature maps lie in memory.

    Args:
        pitch_unit: 0 for planes `[N, C, H, W]`; else `[N, H, W, P]` with P the channels rounded up to a multiple of
            this, as TensorRT's HWC (1) and HWC8 (8).
    """

    pitch_unit: int

    @property
    def is_channels_last(self) -> bool:
        """Whether the channels of a pixel are neighbours."""
        return self.pitch_unit > 0


PLANES, HWC, HWC8 = Layout(0), Layout(1), Layout(8)


@dataclass(frozen=True)
class _Pooling:
    """The kernel of MultilevelRoiAlign with what its grid depends on."""

    kernel: Kernel
    parts: int  # blocks along x for each RoI
    channels_of_block: int  # blocks along y: so many channels each


def roi_align(
    attributes: Mapping[str, Any], *, num_levels: int, dtype: str, layout: Layout, channels: int | None
) -> _Pooling:
    """MultilevelRoiAlign for one node.

    Args:
        attributes: those of the contract.
        num_levels: 1 to `MOST_LEVELS`.
        dtype: of the features and the result: float32, float16 or bfloat16.
        layout: of the features.
        channels: C, or None where it is not known before the engine runs.

    Raises:
        UserError: for values outside the contract.
    """
    op = contract.MULTILEVEL_ROI_ALIGN
    values = checked(op, attributes)
    if not 1 <= num_levels <= MOST_LEVELS:
        came, expected = f"{op.name} with {num_levels} feature maps", f"1 to {MOST_LEVELS}"
        raise UserError(came, expected, "change the model's pyramid")
    bins = values["output_size"]
    fours = layout.pitch_unit % 4 == 0 or (channels is not None and channels % 4 == 0)
    lanes = _LANES_OF_CHANNELS if fours else 1
    channels_of_block = _WARP * lanes if layout.is_channels_last else _PLANES_OF_BLOCK
    parts = -(-bins * bins // _BINS_OF_TILE) if layout.is_channels_last else 1
    defines = {
        "MASKRCNN_THREADS": str(_POOLING_THREADS),
        "MASKRCNN_LEVELS": str(num_levels),
        "MASKRCNN_FEATURE": _FEATURES[dtype],
        "MASKRCNN_CHANNELS_LAST": str(int(layout.is_channels_last)),
        "MASKRCNN_PITCH_UNIT": str(layout.pitch_unit),
        "MASKRCNN_CHANNELS_OF_BLOCK": str(channels_of_block),
        "MASKRCNN_PARTS": str(parts),
        "MASKRCNN_BINS": str(bins),
        "MASKRCNN_RATIO": str(values["sampling_ratio"]),
        "MASKRCNN_ALIGNED": str(values["aligned"]),
        "MASKRCNN_MIN_LEVEL": f"({values['min_level']})",
        "MASKRCNN_CANONICAL_LEVEL": f"({values['canonical_level']})",
        "MASKRCNN_CANONICAL_SIZE": _float(values["canonical_size"]),
        "MASKRCNN_LEVEL_EPSILON": _float(values["level_epsilon"]),
    }
    source = SOURCES / "multilevel_roi_align" / "aot.cu"
    kernel = Kernel(source, "maskrcnn_multilevel_roi_align_aot", defines, _POOLING_THREADS)
    return _Pooling(kernel, parts, channels_of_block)


def nms_keep(attributes: Mapping[str, Any]) -> Kernel:
    """BatchedNmsKeep for one node, with the attributes of the contract."""
    values = checked(contract.BATCHED_NMS_KEEP, attributes)
    return _nms(
        "keep",
        MASKRCNN_KEEP="1",
        MASKRCNN_IOU_THRESHOLD=_float(values["iou_threshold"]),
        MASKRCNN_MAX_OUTPUT=str(values["max_output"]),
    )


def nms_compact(attributes: Mapping[str, Any]) -> Kernel:
    """BatchedNmsCompact for one node, with the attributes of the contract."""
    values = checked(contract.BATCHED_NMS_COMPACT, attributes)
    return _nms("compact", MASKRCNN_KEEP="0", MASKRCNN_MAX_OUTPUT=str(values["max_output"]))


def usual_kernels() -> list[Kernel]:
    """A kernel of each kind that engines of this package's models get: RoIAlign in each type and layout, and NMS."""
    pooling = {
        **{"output_size": 7, "sampling_ratio": 2, "aligned": 0, "min_level": 2},
        **{"canonical_level": 4, "canonical_size": 224.0, "level_epsilon": 1e-6},
    }
    kinds = [(dtype, layout) for dtype in _FEATURES for layout in (PLANES, HWC if dtype == "float32" else HWC8)]
    made = [roi_align(pooling, num_levels=4, dtype=dtype, layout=kind, channels=256) for dtype, kind in kinds]
    nms = {"iou_threshold": 0.7, "max_output": 1000}
    return [*(pool.kernel for pool in made), nms_keep(nms), nms_compact({"max_output": 1000})]


def _nms(name: str, **defines: str) -> Kernel:
    defines = {"MASKRCNN_THREADS": str(_NMS_THREADS), **defines}
    return Kernel(SOURCES / "batched_nms" / "aot.cu", f"maskrcnn_batched_nms_{name}_aot", defines, _NMS_THREADS)


# The least value of each attribute, and the greatest; kernels.h says the same of its arguments.
_LIMITS = {
    "output_size": (1, 32767),
    "sampling_ratio": (0, 32767),
    "aligned": (0, 1),
    "min_level": (-64, 64),
    "canonical_level": (-64, 64),
    "canonical_size": (2.0**-126, 2.0**127),
    "level_epsilon": (-1.0, 1.0),
    "iou_threshold": (-(2.0**127), 2.0**127),
    "max_output": (0, 2**31 - 1),
}


def checked(op: contract.Op, attributes: Mapping[str, Any]) -> dict[str, Any]:
    """The attributes as the contract's types.

    Args:
        op: one of `contract.AOT_OPS`.
        attributes: numbers, or arrays of one.

    Raises:
        UserError: where one is missing, unknown or outside what a kernel takes.
    """
    if attributes.keys() != op.attributes.keys():
        came = f"{op.name} with the attributes {', '.join(attributes) or 'none'}"
        raise UserError(came, ", ".join(op.attributes), "make the file with `maskrcnn export --tensorrt --aot`")
    values = {name: kind(np.asarray(attributes[name]).item()) for name, kind in op.attributes.items()}
    for name, value in values.items():
        least, most = _LIMITS[name]
        if not least <= value <= most:  # NaN as well
            raise UserError(f"{op.name} with {name} = {value}", f"{least} to {most}", "export the model again")
    return values


def _float(value: float) -> str:
    """A float32 literal that loses nothing."""
    return f"{float(np.float32(value)).hex()}f"

"""The one table of the custom ops: names, inputs, outputs, attributes.

The ONNX nodes, their function bodies, the NumPy reference and the TensorRT plugins are all tested against it.
Op names must not equal a standard ONNX op's: TensorRT's parser would take its own importer first.
"""

from __future__ import annotations

from dataclasses import dataclass

DOMAIN = "maskrcnn"
VERSION = 1


@dataclass(frozen=True)
class Tensor:
    """One input or output. `shape` uses the letters of docs/architecture.md; `dtype` is a NumPy name."""

    name: str
    dtype: str
    shape: tuple[str | int, ...]
    variadic: bool = False  # stands for one or more tensors, its name a prefix


@dataclass(frozen=True)
class Op:
    """One custom op. `attributes` maps each name to its Python type."""

    name: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    attributes: dict[str, type]
    doc: str


# The attributes that say at which level a RoI is pooled.
_LEVELS = ("min_level", "canonical_level", "canonical_size", "level_epsilon")

MULTILEVEL_ROI_ALIGN = Op(
    name="MultilevelRoiAlign",
    inputs=(
        Tensor("P", "float", ("N", "C", "H_l", "W_l"), variadic=True),
        Tensor("rois", "float32", ("N", "R", 4)),
    ),
    outputs=(Tensor("pooled", "float", ("N", "R", "C", "S", "S")),),
    attributes={
        "output_size": int,  # S
        "sampling_ratio": int,  # points per bin and axis; 0: ceil(RoI's side in pixels of its level / S)
        "aligned": int,  # 1: pixel centres at half-integers
        "min_level": int,  # exponent of the first level's stride
        "canonical_level": int,  # FPN equation 1: the level of a box of canonical_size
        "canonical_size": float,  # pixels
        "level_epsilon": float,  # added to the logarithm
    },
    doc="RoIAlign of each RoI at its own pyramid level.",
)

MULTILEVEL_ROI_POOL = Op(
    name="MultilevelRoiPool",
    inputs=MULTILEVEL_ROI_ALIGN.inputs,
    outputs=MULTILEVEL_ROI_ALIGN.outputs,
    attributes={
        "pooled_shape": list,  # S, S: as MaxRoiPool has it, to which a function can but pass it on
        **{name: MULTILEVEL_ROI_ALIGN.attributes[name] for name in _LEVELS},
    },
    doc="RoIPool of each RoI at its own pyramid level: the largest of the whole pixels of a bin. It has no plugin.",
)

BATCHED_NMS = Op(
    name="BatchedNms",
    inputs=(
        Tensor("boxes", "float32", ("N", "K", 4)),
        Tensor("groups", "int32", ("N", "K")),
        Tensor("counts", "int32", ("N",)),
    ),
    outputs=(Tensor("indices", "int32", ("N", "M")), Tensor("num", "int32", ("N",))),
    attributes={"iou_threshold": float, "max_output": int},
    doc="Greedy NMS inside each group of boxes that are sorted by descending score.",
)

LIVE_ROWS = Op(
    name="LiveRows",
    inputs=(
        Tensor("boxes", "float32", ("N", "D", 4)),
        Tensor("labels", "int64", ("N", "D")),
        Tensor("counts", "int32", ("N",)),
    ),
    outputs=(Tensor("live_boxes", "float32", ("N", "L", 4)), Tensor("live_labels", "int64", ("N", "L"))),
    attributes={},
    doc="The first L rows, L the largest count and at least 1; or all D rows, which is as right and has no plugin.",
)

OPS = {op.name: op for op in (MULTILEVEL_ROI_ALIGN, MULTILEVEL_ROI_POOL, BATCHED_NMS, LIVE_ROWS)}

# BatchedNms in two steps, for TensorRT's ahead-of-time plugins alone: each of those is one kernel. No exported file has
# these, and no function stands for them; `export.tensorrt.tensorrt_flavour(…, aot=True)` writes them.
BATCHED_NMS_KEEP = Op(
    name="BatchedNmsKeep",
    inputs=BATCHED_NMS.inputs,
    outputs=(Tensor("keep", "int32", ("N", "K")),),
    attributes=BATCHED_NMS.attributes,
    doc="1 where NMS keeps a box below its image's count, else 0; past the first max_output kept ones 0 is as right.",
)

BATCHED_NMS_COMPACT = Op(
    name="BatchedNmsCompact",
    inputs=BATCHED_NMS_KEEP.outputs,
    outputs=BATCHED_NMS.outputs,
    attributes={"max_output": int},
    doc="The rows that are kept, in order: at most max_output of them.",
)

# What ahead-of-time plugins exist for.
AOT_OPS = {op.name: op for op in (MULTILEVEL_ROI_ALIGN, BATCHED_NMS_KEEP, BATCHED_NMS_COMPACT)}

ALL_OPS = {**OPS, **AOT_OPS}

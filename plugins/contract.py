"""Contract of the custom ops: names, inputs, outputs and attributes.

Tests compare the ONNX nodes and functions, the NumPy reference and the TensorRT plugins with it. The name of an op must
differ from all standard ONNX operators, because TensorRT's parser prefers its own importers.
"""

from __future__ import annotations

from dataclasses import dataclass

DOMAIN = "maskrcnn"
VERSION = 1


@dataclass(frozen=True)
class Tensor:
    """An input or output."""

    name: str
    dtype: str  # NumPy name; "float" is the features' type
    shape: tuple[str | int, ...]  # letters of docs/contracts.md, or numbers
    variadic: bool = False  # one or more tensors, whose names start with `name`


@dataclass(frozen=True)
class Op:
    """A custom op."""

    name: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    attributes: dict[str, type]  # name → Python type
    doc: str


# Attributes that select the pyramid level of a RoI.
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
        "sampling_ratio": int,  # samples per bin and axis; 0: ceil(RoI side in pixels of its level / S)
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
        "pooled_shape": list,  # [S, S] as in MaxRoiPool: an ONNX function passes attributes unchanged
        **{name: MULTILEVEL_ROI_ALIGN.attributes[name] for name in _LEVELS},
    },
    doc="RoIPool of each RoI at its own pyramid level: the maximum over the pixels of a bin. It has no plugin.",
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
    doc="Greedy NMS within each group of boxes sorted by descending score.",
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
    doc="The first L rows, L = max(largest count, 1). Returning all D rows is equally valid. It has no plugin.",
)

OPS = {op.name: op for op in (MULTILEVEL_ROI_ALIGN, MULTILEVEL_ROI_POOL, BATCHED_NMS, LIVE_ROWS)}

# BatchedNms in two steps for TensorRT's ahead-of-time plugins, which have one kernel each. Only
# `export.tensorrt.flavour.tensorrt_flavour(…, aot=True)` writes these nodes; they have no ONNX functions.
BATCHED_NMS_KEEP = Op(
    name="BatchedNmsKeep",
    inputs=BATCHED_NMS.inputs,
    outputs=(Tensor("keep", "int32", ("N", "K")),),
    attributes=BATCHED_NMS.attributes,
    doc="1 for a box that NMS keeps, else 0. After the first max_output kept boxes of an image 0 is equally valid.",
)

BATCHED_NMS_COMPACT = Op(
    name="BatchedNmsCompact",
    inputs=BATCHED_NMS_KEEP.outputs,
    outputs=BATCHED_NMS.outputs,
    attributes={"max_output": int},
    doc="Indices of the kept rows in order, at most max_output.",
)

# Ops with ahead-of-time plugins.
AOT_OPS = {op.name: op for op in (MULTILEVEL_ROI_ALIGN, BATCHED_NMS_KEEP, BATCHED_NMS_COMPACT)}

ALL_OPS = {**OPS, **AOT_OPS}

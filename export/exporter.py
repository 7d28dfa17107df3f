"""Export of a PyTorch model to one ONNX file that every runtime can run.

The model is traced once and never edited. The file contains the custom op nodes together with their ONNX functions,
and is compared with PyTorch before it is kept.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
import onnxscript
import torch
from onnx.defs import OpSchema
from torch import Tensor, nn

from maskrcnn.config import ModelConfig
from maskrcnn.errors import UserError
from maskrcnn.export import functions
from maskrcnn.export.graph import op_counts, set_metadata
from maskrcnn.export.passes.tidy import tidy
from maskrcnn.export.variants import unmatched_hint, with_share
from maskrcnn.files import atomic_path
from maskrcnn.model import ops
from maskrcnn.model.detector import MaskRCNN
from maskrcnn.plugins import contract
from maskrcnn.runtime.backends.onnxruntime import OnnxRuntimeBackend
from maskrcnn.runtime.backends.torch import TorchBackend
from maskrcnn.runtime.verification.compare import EXACT, Difference
from maskrcnn.runtime.verification.inputs import compare_backends
from maskrcnn.runtime.verification.verify import with_stages
from maskrcnn.stages import OF_KEYPOINTS, OF_MASKS, STAGES
from maskrcnn.weights.checkpoint import metadata_of

OPSET = 20  # the first opset with every operator used here in its current form
_MIN_TORCH = (2, 10)  # the oldest PyTorch whose exporter was tested
OUTPUTS = ("num_detections", "boxes", "scores", "labels", "masks", "keypoints")  # masks and keypoints are optional
# Control flow and data-dependent shapes: TensorRT rejects them or is slow on them.
_FORBIDDEN_OPS = frozenset(
    {"If", "Loop", "Scan", "NonZero", "NonMaxSuppression", "Unique", "Compress", "SequenceConstruct"}
)


class _WithStages(nn.Module):
    """The model with outputs in the order of `OUTPUTS`, then the intermediate tensors, so that these get names."""

    def __init__(self, model: MaskRCNN) -> None:
        super().__init__()
        self.model = model
        config = model.config
        without = {*(() if config.has_masks else OF_MASKS), *(() if config.has_keypoints else OF_KEYPOINTS)}
        self.outputs = tuple(name for name in OUTPUTS if name not in without)
        self.names = (*self.outputs, *(name for name in STAGES if name not in {*OUTPUTS, *without}))

    def forward(self, images: Tensor, image_sizes: Tensor) -> tuple[Tensor, ...]:
        stages: dict[str, Tensor] = {}
        self.model(images, image_sizes, stages)
        return tuple(stages[name] for name in self.names)


def export_onnx(
    model: MaskRCNN,
    output: Path,
    *,
    source: Path | None = None,
    opset: int = OPSET,
    assumed: tuple[str, ...] = (),
    max_unmatched: float = 0.0,
) -> Difference:
    """Exports a model to ONNX and returns the difference between the file and PyTorch.

    Batch size, height and width stay dynamic. The comparison uses batch sizes and shapes other than the traced ones,
    among them an image without detections. If nothing is detected in any image, the preceding stages are compared.

    Args:
        model: detector of this package; it is not changed.
        output: path of the file to write; nothing is left there on failure.
        source: checkpoint of the model, whose hash is recorded in the file.
        opset: ONNX opset version, 20 or newer (default: 20).
        assumed: fields of the model that imported weights do not state; recorded in the file.
        max_unmatched: fraction of the detections, 0 to 1, that may lack a partner or differ by more than the tolerance.

    Raises:
        UserError: if the weights are not finite, the opset or PyTorch is too old, the graph contains a forbidden
            operator, or the file disagrees with PyTorch.
    """
    _check_versions(opset)
    _check_weights(model)
    model = model.eval()
    proto = _trace(model, opset)
    _add_functions(proto, model.config)
    metadata = metadata_of(model.config, source, assumed)
    metadata = dataclasses.replace(metadata, versions={**metadata.versions, "onnx": onnx.__version__})
    set_metadata(proto, metadata)
    check_graph(proto, output)
    output.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(output) as draft:
        onnx.save(proto, str(draft))
        onnx.checker.check_model(str(draft), full_check=True)
        reference, candidate = (
            TorchBackend(model, device="cpu"),
            OnnxRuntimeBackend(Path(draft), providers=["CPUExecutionProvider"]),
        )
        tolerance = with_share(EXACT, max_unmatched)
        difference = with_stages(compare_backends(reference, candidate, tolerance), reference, candidate)
        if not difference.within(tolerance):
            raise UserError(
                f"an ONNX file that disagrees with PyTorch; {difference}",
                str(tolerance),
                f"check the weights for NaN and extreme values{unmatched_hint(difference)}",
            )
    return difference


def _check_versions(opset: int) -> None:
    newest = onnx.defs.onnx_opset_version()
    if not OPSET <= opset <= newest:
        raise UserError(
            f"opset {opset}", f"{OPSET} to {newest}, the maximum of onnx {onnx.__version__}", f"use --opset {OPSET}"
        )
    found = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if found < _MIN_TORCH:
        oldest = ".".join(map(str, _MIN_TORCH))
        raise UserError(
            f"torch {torch.__version__}", f"{oldest} or newer", f"pip install 'torch>={oldest}' torchvision"
        )


def _check_weights(model: MaskRCNN) -> None:
    """Rejects NaN and infinity: no runtime would detect anything, so the comparison with PyTorch would pass."""
    if not model.config.class_names:
        raise UserError("a model without classes", "at least one class", "set class_names in its configuration")
    bad = [name for name, value in model.state_dict().items() if not value.isfinite().all()]
    if bad:
        raise UserError(
            f"weights with NaN or infinity: {len(bad)} tensor(s), first {bad[0]}",
            "finite weights",
            "export an earlier checkpoint, or train again with a lower --learning-rate",
        )


def check_graph(proto: onnx.ModelProto, path: Path) -> None:
    """Rejects a main graph with control flow or data-dependent shapes.

    Raises:
        UserError: lists the forbidden operators.
    """
    found = sorted(set(op_counts(proto)) & _FORBIDDEN_OPS)
    if found:
        raise UserError(
            f"{path}: a main graph with {', '.join(found)}",
            "no control flow and no data-dependent shapes",
            "implement that part of the model as a custom op",
        )


def _trace(model: MaskRCNN, opset: int) -> onnx.ModelProto:
    divisor = model.config.preprocessing.divisor
    # While tracing, no axis of any pyramid level may have length 1, which would be specialised to broadcasting.
    height, width = 6 * divisor, 10 * divisor
    images = torch.zeros(2, model.config.channels, height, width)
    sizes = torch.tensor([[height, width], [height - 5, width - 40]])
    dim = torch.export.Dim
    wrapped, batch = _WithStages(model), dim("N", min=1, max=4096)
    rows, columns = divisor * dim("rows", min=1, max=512), divisor * dim("columns", min=1, max=512)
    with _registered_schemas(), _quiet(), torch.no_grad():
        program = torch.onnx.export(
            wrapped,
            (images, sizes),
            dynamo=True,
            opset_version=opset,
            input_names=["images", "image_sizes"],
            output_names=list(wrapped.names),
            dynamic_shapes={"images": {0: batch, 2: rows, 3: columns}, "image_sizes": {0: batch}},
            custom_translation_table={
                torch.ops.maskrcnn.multilevel_roi_align.default: _roi_align_node,
                torch.ops.maskrcnn.multilevel_roi_pool.default: _roi_pool_node,
                torch.ops.maskrcnn.batched_nms.default: _nms_node,
                torch.ops.maskrcnn.live_rows.default: _live_rows_node,
                torch.ops.aten.div.Tensor_mode: _integer_division,
            },
            verbose=False,
        )
        assert program is not None  # only None without `dynamo`
        proto = program.model_proto
    del proto.graph.output[len(wrapped.outputs) :]
    tidy(proto)
    return proto


# Translations of the torch ops. torch.onnx.export derives an ONNX signature from the annotations: a parameter that is
# not `Any` would be restricted to that type.

_CUSTOM = onnxscript.values.Opset(contract.DOMAIN, contract.VERSION)
_LEVELS = {
    "canonical_level": ops.CANONICAL_LEVEL,
    "canonical_size": ops.CANONICAL_SIZE_PX,
    "level_epsilon": ops.LEVEL_EPSILON,
}


def _roi_align_node(
    features: Any, rois: Any, output_size: Any, sampling_ratio: Any, aligned: Any, min_level: Any
) -> Any:
    return _CUSTOM.MultilevelRoiAlign(
        *features,
        rois,
        output_size=output_size,
        sampling_ratio=sampling_ratio,
        aligned=int(aligned),
        min_level=min_level,
        **_LEVELS,
    )


def _roi_pool_node(features: Any, rois: Any, output_size: Any, min_level: Any) -> Any:
    return _CUSTOM.MultilevelRoiPool(
        *features, rois, pooled_shape=[output_size, output_size], min_level=min_level, **_LEVELS
    )


def _nms_node(boxes: Any, groups: Any, counts: Any, iou_threshold: Any, max_output: Any) -> Any:
    return _CUSTOM.BatchedNms(boxes, groups, counts, iou_threshold=iou_threshold, max_output=max_output)


def _live_rows_node(boxes: Any, labels: Any, counts: Any) -> Any:
    return _CUSTOM.LiveRows(boxes, labels, counts)


def _integer_division(dividend: Any, divisor: Any, rounding_mode: Any = None) -> Any:
    """Divides non-negative indices, for which rounding down equals ONNX's rounding towards zero.

    PyTorch's own translation divides in single precision and rounds down. If a compiler replaces the division by a
    multiplication with a rounded reciprocal, integer quotients are one too small.
    """
    assert rounding_mode == "floor" and dividend.dtype.is_integer(), "the model divides integers only, rounding down"
    return onnxscript.opset20.Div(dividend, divisor)


def _add_functions(proto: onnx.ModelProto, config: ModelConfig) -> None:
    """Adds the functions of the custom ops in the graph, and sets the required versions."""
    opset = next(entry.version for entry in proto.opset_import if entry.domain == "")
    used, levels = set(op_counts(proto)), len(config.strides_px)
    for function in (
        functions.multilevel_roi_align(levels, aligned=config.pool_aligned, min_level=2, opset=opset),
        functions.multilevel_roi_pool(levels, min_level=2, opset=opset),
        functions.batched_nms(opset),
        functions.live_rows(opset),
    ):
        if f"{contract.DOMAIN}::{function.name}" in used:
            proto.functions.append(function)
    if not any(entry.domain == contract.DOMAIN for entry in proto.opset_import):
        proto.opset_import.append(onnx.helper.make_opsetid(contract.DOMAIN, contract.VERSION))
    # The lowest IR version that the opset allows, so that older runtimes read the file; PyTorch writes a fixed one.
    proto.ir_version = onnx.helper.find_min_ir_version_for(proto.opset_import, ignore_unknown=True)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppresses the logging and warnings of torch.onnx.export; its errors are still raised."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnx_ir", "onnxscript")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


# ONNX schemas of the custom ops, which torch.onnx.export needs to write their nodes.

_ATTRIBUTE_TYPES = {
    int: OpSchema.AttrType.INT,
    float: OpSchema.AttrType.FLOAT,
    list: OpSchema.AttrType.INTS,
}
_FEATURE_TYPES = ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"]
_TYPES = {"float": "F", "float32": "tensor(float)", "int32": "tensor(int32)", "int64": "tensor(int64)"}


@contextlib.contextmanager
def _registered_schemas() -> Iterator[None]:
    """Registers the custom ops with `onnx` inside the context.

    Outside it the functions of the file define the ops. Shape inference prefers a registered schema, which cannot
    express the output type.
    """
    new = [op for op in contract.OPS.values() if not onnx.defs.has(op.name, domain=contract.DOMAIN)]
    for op in new:
        onnx.defs.register_schema(_schema(op))
    try:
        yield
    finally:
        for op in new:
            onnx.defs.deregister_schema(op.name, contract.VERSION, contract.DOMAIN)


def _schema(op: contract.Op) -> OpSchema:
    """The ONNX schema of an op of the contract.

    Only the last input of a schema can be variadic, so `P…, rois` is declared as one variadic input.
    """
    inputs = [_parameter(tensor) for tensor in op.inputs]
    if any(tensor.variadic for tensor in op.inputs[:-1]):
        inputs = [
            OpSchema.FormalParameter(
                "P_and_rois",
                "T",
                description="the levels, then rois",
                param_option=OpSchema.FormalParameterOption.Variadic,
                is_homogeneous=False,
            )
        ]
    variables = [("F", _FEATURE_TYPES, "type of features")]
    if inputs[0].type_str == "T":
        variables.append(("T", _FEATURE_TYPES, "features or rois"))
    used = {p.type_str for p in inputs} | {_TYPES[t.dtype] for t in op.outputs}
    return OpSchema(
        op.name,
        contract.DOMAIN,
        contract.VERSION,
        doc=op.doc,
        inputs=inputs,
        outputs=[_parameter(tensor) for tensor in op.outputs],
        type_constraints=[v for v in variables if v[0] in used],
        attributes=[
            OpSchema.Attribute(name, _ATTRIBUTE_TYPES[kind], required=True) for name, kind in op.attributes.items()
        ],
    )


def _parameter(tensor: contract.Tensor) -> OpSchema.FormalParameter:
    option = OpSchema.FormalParameterOption.Variadic if tensor.variadic else OpSchema.FormalParameterOption.Single
    shape = ", ".join(map(str, tensor.shape))
    return OpSchema.FormalParameter(tensor.name, _TYPES[tensor.dtype], description=f"[{shape}]", param_option=option)

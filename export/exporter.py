"""From a PyTorch model to one ONNX file that every runtime can run."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

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
from maskrcnn.files import atomic_path
from maskrcnn.model import ops
from maskrcnn.model.detector import MaskRCNN
from maskrcnn.plugins import contract
from maskrcnn.runtime.backends.onnxruntime import OnnxRuntimeBackend
from maskrcnn.runtime.backends.torch import TorchBackend
from maskrcnn.runtime.verification.compare import EXACT, Difference
from maskrcnn.runtime.verification.inputs import compare_backends
from maskrcnn.stages import OF_KEYPOINTS, OF_MASKS, STAGES
from maskrcnn.weights.checkpoint import metadata_of

# The contract's ops as ONNX schemas, so that the exporter can write them.

_ATTRIBUTE_TYPES = {
    int: OpSchema.AttrType.INT,
    float: OpSchema.AttrType.FLOAT,
    list: OpSchema.AttrType.INTS,
}
_FEATURE_TYPES = ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"]
_TYPES = {"float": "F", "float32": "tensor(float)", "int32": "tensor(int32)", "int64": "tensor(int64)"}


def _parameter(tensor: contract.Tensor) -> OpSchema.FormalParameter:
    option = OpSchema.FormalParameterOption.Variadic if tensor.variadic else OpSchema.FormalParameterOption.Single
    shape = ", ".join(map(str, tensor.shape))
    return OpSchema.FormalParameter(tensor.name, _TYPES[tensor.dtype], description=f"[{shape}]", param_option=option)


def schema(op: contract.Op) -> OpSchema:
    """The ONNX schema of one op of the contract.

    ONNX allows a variadic input in the last place only, so `P…, rois` is declared as one variadic input.
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


@contextmanager
def registered() -> Iterator[None]:
    """The ops are known to `onnx` inside this context.

    Not for longer: a schema cannot say what type comes out, whereas a file's own functions can, and shape
    inference prefers the schema.
    """
    new = [op for op in contract.OPS.values() if not onnx.defs.has(op.name, domain=contract.DOMAIN)]
    for op in new:
        onnx.defs.register_schema(schema(op))
    try:
        yield
    finally:
        for op in new:
            onnx.defs.deregister_schema(op.name, contract.VERSION, contract.DOMAIN)


OPSET = 20  # the first with every operator used here in its present form
_TORCH = (2, 10)  # the oldest whose exporter this was tried with
OUTPUTS = ("num_detections", "boxes", "scores", "labels", "masks", "keypoints")  # the last two where a model has them
# Control flow and data-dependent shapes: TensorRT rejects them or is slow on them.
FORBIDDEN_OPS = frozenset(
    {"If", "Loop", "Scan", "NonZero", "NonMaxSuppression", "Unique", "Compress", "SequenceConstruct"}
)


class _WithStages(nn.Module):
    """The model with its outputs in the order of `OUTPUTS`, then the tensors on the way, which so get their names."""

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


def export_onnx(model: MaskRCNN, output: Path, *, source: Path | None = None, opset: int = OPSET) -> Difference:
    """Writes `output` and returns how much it differs from PyTorch.

    Batch size, height and width stay dynamic. The file is compared with the model in PyTorch on batch sizes and
    shapes that it was not traced with, an image without detections among them, before it is kept.

    Args:
        model: any model of this package; it is not changed.
        output: the file to write; nothing is left there when this fails.
        source: the checkpoint, whose hash the file keeps.
        opset: of ONNX's operators, 20 or newer.

    Raises:
        UserError: for weights that are not finite, an opset or a PyTorch that is too old, when the graph holds an
            operator it must not, or when the file disagrees with PyTorch.
    """
    _check_versions(opset)
    _check_weights(model)
    model = model.eval()
    proto = _trace(model, opset)
    _add_functions(proto, model.config)
    metadata = metadata_of(model.config, source)
    metadata = dataclasses.replace(metadata, versions={**metadata.versions, "onnx": onnx.__version__})
    set_metadata(proto, metadata)
    check_graph(proto, output)
    output.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(output) as draft:
        onnx.save(proto, str(draft))
        onnx.checker.check_model(str(draft), full_check=True)
        difference = compare_backends(
            TorchBackend(model, device="cpu"),
            OnnxRuntimeBackend(Path(draft), providers=["CPUExecutionProvider"]),
            EXACT,
        )
        if not difference.within(EXACT):
            raise UserError(
                f"an ONNX file that disagrees with PyTorch; {difference}",
                str(EXACT),
                "check the weights for NaN and extreme values; report the model if they are sound",
            )
    return difference


def _check_versions(opset: int) -> None:
    newest = onnx.defs.onnx_opset_version()
    if not OPSET <= opset <= newest:
        raise UserError(
            f"opset {opset}", f"{OPSET} to {newest}, the newest of onnx {onnx.__version__}", f"use --opset {OPSET}"
        )
    found = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if found < _TORCH:
        oldest = ".".join(map(str, _TORCH))
        raise UserError(
            f"torch {torch.__version__}", f"{oldest} or newer", f"pip install 'torch>={oldest}' torchvision"
        )


def _check_weights(model: MaskRCNN) -> None:
    """Refuses weights with NaN or infinity: they detect nothing, in PyTorch as in any other runtime, and so agree."""
    if not model.config.class_names:
        raise UserError("a model without classes", "at least one", "give its configuration class_names")
    bad = [name for name, value in model.state_dict().items() if not value.isfinite().all()]
    if bad:
        raise UserError(
            f"weights with NaN or infinity: {len(bad)} tensor(s), first {bad[0]}",
            "finite weights",
            "export an earlier checkpoint, or train again with a lower --learning-rate",
        )


def check_graph(proto: onnx.ModelProto, path: Path) -> None:
    """Refuses a main graph with control flow or data-dependent shapes.

    Raises:
        UserError: naming the operators.
    """
    found = sorted(set(op_counts(proto)) & FORBIDDEN_OPS)
    if found:
        raise UserError(
            f"{path}: a main graph with {', '.join(found)}",
            "no control flow and no data-dependent shapes",
            "write the model's part that needs them as a custom op",
        )


def _trace(model: MaskRCNN, opset: int) -> onnx.ModelProto:
    divisor = model.config.preprocessing.divisor
    # No axis of any level may have length 1 while tracing: it would be taken for a broadcast one.
    height, width = 6 * divisor, 10 * divisor
    images = torch.zeros(2, 3, height, width)
    sizes = torch.tensor([[height, width], [height - 5, width - 40]])
    dim = torch.export.Dim
    wrapped, batch = _WithStages(model), dim("N", min=1, max=4096)
    rows, columns = divisor * dim("rows", min=1, max=512), divisor * dim("columns", min=1, max=512)
    with registered(), _quiet(), torch.no_grad():
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
            },
            verbose=False,
        )
        proto = program.model_proto
    del proto.graph.output[len(wrapped.outputs) :]
    tidy(proto)
    return proto


_CUSTOM = onnxscript.values.Opset(contract.DOMAIN, contract.VERSION)


_LEVELS = {
    "canonical_level": ops.CANONICAL_LEVEL,
    "canonical_size": ops.CANONICAL_SIZE_PX,
    "level_epsilon": ops.LEVEL_EPSILON,
}


def _roi_align_node(features, rois, output_size, sampling_ratio, aligned, min_level):
    return _CUSTOM.MultilevelRoiAlign(
        *features,
        rois,
        output_size=output_size,
        sampling_ratio=sampling_ratio,
        aligned=int(aligned),
        min_level=min_level,
        **_LEVELS,
    )


def _roi_pool_node(features, rois, output_size, min_level):
    return _CUSTOM.MultilevelRoiPool(
        *features, rois, pooled_shape=[output_size, output_size], min_level=min_level, **_LEVELS
    )


def _nms_node(boxes, groups, counts, iou_threshold, max_output):
    return _CUSTOM.BatchedNms(boxes, groups, counts, iou_threshold=iou_threshold, max_output=max_output)


def _live_rows_node(boxes, labels, counts):
    return _CUSTOM.LiveRows(boxes, labels, counts)


def _add_functions(proto: onnx.ModelProto, config: ModelConfig) -> None:
    """Adds the functions of the custom ops that the graph has."""
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


@contextlib.contextmanager
def _quiet():
    """Silences the exporter's chatter; its errors still come through as exceptions."""
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

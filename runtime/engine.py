"""Building CPU engines with OpenVINO from an exported ONNX file."""

from __future__ import annotations

import dataclasses
import os
import platform
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from maskrcnn.errors import UserError
from maskrcnn.files import folder_beside
from maskrcnn.metadata import KEY, ModelMetadata, sha256_of
from maskrcnn.runtime.onnxruntime_backend import OnnxRuntimeBackend
from maskrcnn.runtime.openvino_backend import OpenVinoBackend, import_openvino, openvino_core, read_onnx
from maskrcnn.runtime.verification.compare import EXACT, HALF, INT8, Difference
from maskrcnn.runtime.verification.validation import compare_backends


def build_openvino_engine(
    onnx_path: Path,
    output: Path,
    *,
    half: bool,
    reference: Path | None = None,
    batches: Sequence[dict[str, np.ndarray]] | None = None,
) -> tuple[ModelMetadata, Difference]:
    """Builds an engine, compares it with an ONNX file in ONNX Runtime, and keeps it if they agree.

    Args:
        onnx_path: a file written by `maskrcnn export --onnx`, in single precision or with 8-bit integers.
        output: where to write the `.xml`; the weights lie beside it in `.bin`.
        half: store weights in float16, and execute in bfloat16 where the CPU has it: all of a file in single
            precision, the layers that are left in single precision of one with 8-bit integers.
        reference: the ONNX file to compare with; by default the one that the engine is built from.
        batches: inputs to compare on; by default `validation_batches`.

    Raises:
        UserError: when the engine differs from the ONNX file by more than its precision explains; it is then
            kept beside `output` under the name `*.rejected.xml`.
    """
    openvino = import_openvino()
    model, metadata = read_onnx(onnx_path)
    if metadata.precision not in ("fp32", "int8"):
        came, expected = f"{onnx_path}: a file in {metadata.precision}", "one in single precision, or with int8"
        raise UserError(came, expected, "build from model.onnx with --fp16")
    core = openvino_core()
    has_bf16 = "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    execution = "bf16" if half and has_bf16 else "fp32"
    if execution == "bf16":
        keep_coordinates_in_fp32(model)
    weights = "int8" if metadata.precision == "int8" else "fp16" if half else "fp32"
    stamp = {**metadata.stamp, **_stamp(openvino, core, execution=execution, weights=weights)}
    source = sha256_of(reference or onnx_path)
    metadata = dataclasses.replace(metadata, precision=weights, source_sha256=source, stamp=stamp)
    tolerance = INT8 if weights == "int8" else HALF if half else EXACT
    with folder_beside(output, prefix=".engine-") as folder:
        draft = folder / output.name
        _save(openvino, model, metadata, draft, half=half)
        against = OnnxRuntimeBackend(reference or onnx_path, providers=["CPUExecutionProvider"])
        difference = compare_backends(against, OpenVinoBackend(draft), tolerance, batches)
        accepted = difference.within(tolerance)
        metadata.stamp["compared"] = str(difference)
        _save(openvino, model, metadata, draft, half=half)
        kept = output if accepted else output.with_suffix(".rejected.xml")
        # Weights first: an .xml without its .bin would be half an engine.
        os.replace(draft.with_suffix(".bin"), kept.with_suffix(".bin"))
        os.replace(draft, kept)
    if not accepted:
        raise UserError(
            f"engine that departs from {reference or onnx_path}: {difference}",
            str(tolerance),
            f"look at {kept} with `maskrcnn verify` and `maskrcnn evaluate`, or build with --fp32",
        )
    return metadata, difference


def _stamp(openvino, core, *, execution: str, weights: str) -> dict[str, str]:
    """What an engine says of the machine and the library that it was built on and with."""
    return {
        "target": "openvino",
        "execution": execution,
        "weights": weights,
        "cpu": core.get_property("CPU", "FULL_DEVICE_NAME"),
        "machine": platform.machine(),
        "openvino": openvino.get_version(),
    }


def _save(openvino, model, metadata: ModelMetadata, path: Path, *, half: bool) -> None:
    model.set_rt_info(metadata.to_json(), KEY)
    openvino.save_model(model, str(path), compress_to_fp16=half)


def keep_coordinates_in_fp32(model) -> None:
    """Keeps box coordinates in FP32 when the CPU executes in bfloat16.

    OpenVINO executes in bfloat16 what lies before a convolution or matrix product, and leaves the tail of the
    graph in FP32. RoI coordinates on their way into RoIAlign lie before one, and bfloat16 would move them by up
    to 4 pixels at 1000. As outputs of the graph they belong to the tail. Nothing reads these outputs.

    Nor may the two matrix products that look at a heat map between its cells get positions in bfloat16. What they are
    given is kept, by outputs that are a single number of each; they themselves stay in bfloat16, which rounds
    what they add to a map's best cell (`maskrcnn.model.heatmaps`).
    """
    from openvino import opset13

    tails = []
    for node in model.get_ordered_ops():
        if node.get_type_name() == "ROIAlign":
            tails.append(node.input_value(1))
        if node.get_type_name() == "Split" and node.get_output_element_type(0).is_real():
            tails += node.outputs()
        if node.get_type_name() == "MatMul" and all(_is_computed(value) for value in node.input_values()):
            given = [value for value in node.input_values() if value.get_node().get_type_name() != "MatMul"]
            axes = [list(range(len(value.get_partial_shape()))) for value in given]
            tails += [opset13.reduce_max(value, own).output(0) for value, own in zip(given, axes, strict=True)]
    model.add_outputs(tails)


def _is_computed(value) -> bool:
    """Whether an input of the model has a part in a value, as in features and not in weights."""
    waiting, seen = [value.get_node()], set()
    while waiting:
        node = waiting.pop()
        if node.get_type_name() == "Parameter":
            return True
        if node.get_name() not in seen:
            seen.add(node.get_name())
            waiting += [source.get_node() for source in node.input_values()]
    return False

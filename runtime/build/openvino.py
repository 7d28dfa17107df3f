"""Building OpenVINO engines for the CPU from an exported ONNX file."""

from __future__ import annotations

import dataclasses
import os
import platform
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from maskrcnn.errors import UserError
from maskrcnn.files import folder_beside
from maskrcnn.metadata import KEY, ModelMetadata, sha256_of
from maskrcnn.runtime.backends.base import Backend
from maskrcnn.runtime.backends.onnxruntime import OnnxRuntimeBackend
from maskrcnn.runtime.backends.openvino import OpenVinoBackend, openvino_core, read_openvino_model
from maskrcnn.runtime.build.gate import MAX_AP_LOSS
from maskrcnn.runtime.build.request import BuiltEngine, Comparison
from maskrcnn.runtime.verification.compare import EXACT, HALF, INT8
from maskrcnn.runtime.verification.inputs import compare_backends


def build_openvino_engine(
    onnx_path: Path,
    output: Path,
    *,
    half: bool,
    reference: Path | None = None,
    batches: Sequence[dict[str, np.ndarray]] | None = None,
    images: str = "drawn images",
    average_precision: Callable[[Backend], dict[str, tuple[float, float]]] | None = None,
) -> BuiltEngine:
    """Builds an engine, compares it with an ONNX file in ONNX Runtime, and keeps it if they agree.

    Args:
        onnx_path: file written by `maskrcnn export --onnx`, in single precision or with 8-bit integers.
        output: `.xml` file to write; the weights are written next to it as `.bin`.
        half: store weights in float16, and execute in bfloat16 if the CPU supports it: all layers of a file in single
            precision, the floating-point layers of a file with 8-bit integers.
        reference: ONNX file to compare with. Default: `onnx_path`.
        batches: inputs to compare on. Default: `validation_batches`.
        images: description of these inputs, for the report.
        average_precision: returns the metrics of the ONNX file and of the engine by name; a loss greater than the
            precision allows rejects the engine. Default: not compared.

    Raises:
        UserError: if the engine differs from the ONNX file by more than its precision explains; it is then kept next
            to `output` as `*.rejected.xml`.
    """
    core = openvino_core()
    from openvino import get_version

    model, metadata = read_openvino_model(core, onnx_path)
    if metadata.precision not in ("fp32", "int8"):
        raise UserError(
            f"{onnx_path}: a file in {metadata.precision}",
            "a file in single precision, or with 8-bit integers",
            "build from model.onnx with --fp16",
        )
    has_bf16 = "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    execution = "bf16" if half and has_bf16 else "fp32"
    if execution == "bf16":
        _keep_coordinates_in_fp32(model)
    weights = "int8" if metadata.precision == "int8" else "fp16" if half else "fp32"
    stamp = {
        **metadata.stamp,
        "target": "openvino",
        "execution": execution,
        "weights": weights,
        "cpu": core.get_property("CPU", "FULL_DEVICE_NAME"),
        "machine": platform.machine(),
        "openvino": get_version(),
    }
    reference = reference or onnx_path
    metadata = dataclasses.replace(metadata, precision=weights, source_sha256=sha256_of(reference), stamp=stamp)
    tolerance = INT8 if weights == "int8" else HALF if half else EXACT
    with folder_beside(output, prefix=".engine-") as folder:
        draft = folder / output.name
        _save(model, metadata, draft, half=half)
        against = OnnxRuntimeBackend(reference, providers=["CPUExecutionProvider"])
        engine = OpenVinoBackend(draft)
        comparison = Comparison(
            difference=compare_backends(against, engine, tolerance, batches),
            tolerance=tolerance,
            ap=average_precision(engine) if average_precision else {},
            max_ap_loss=MAX_AP_LOSS["bf16" if execution == "bf16" and weights == "fp16" else weights],
            images=images,
        )
        metadata.stamp["compared"] = str(comparison)
        metadata.stamp["bin_sha256"] = sha256_of(draft.with_suffix(".bin"))
        _save(model, metadata, draft, half=half)
        if sha256_of(draft.with_suffix(".bin")) != metadata.stamp["bin_sha256"]:  # a version that reorders weights
            del metadata.stamp["bin_sha256"]
            _save(model, metadata, draft, half=half)
        path = output if comparison.accepted else output.with_suffix(".rejected.xml")
        # Weights first: an .xml without its .bin would be half an engine.
        os.replace(draft.with_suffix(".bin"), path.with_suffix(".bin"))
        os.replace(draft, path)
    if not comparison.accepted:
        raise UserError(
            f"an engine that differs from {reference}: {comparison}",
            comparison.expected(),
            f"inspect {path} with `maskrcnn verify` and `maskrcnn evaluate`, or build with --fp32",
        )
    return BuiltEngine(path=path, metadata=metadata, comparison=comparison)


def _save(model: Any, metadata: ModelMetadata, path: Path, *, half: bool) -> None:
    from openvino import save_model

    model.set_rt_info(metadata.to_json(), KEY)
    save_model(model, str(path), compress_to_fp16=half)


def _keep_coordinates_in_fp32(model: Any) -> None:
    """Keeps box coordinates in FP32 when the CPU executes in bfloat16.

    OpenVINO executes operations before a convolution or matrix product in bfloat16, and leaves the tail of the graph in
    FP32. RoI coordinates, which precede such layers through RoIAlign, would move by up to 4 pixels at 1000. As unused
    graph outputs, they belong to the tail.

    The two matrix products that interpolate heat maps between their cells must not receive positions in bfloat16
    either. Outputs that reduce each of their inputs to a single number keep these in FP32; the products themselves stay
    in bfloat16, which rounds only what they add to the best cell of a map (`maskrcnn.model.roi_heads`).
    """
    from openvino import opset13

    tails = []
    for node in model.get_ordered_ops():
        if node.get_type_name() == "ROIAlign":
            tails.append(node.input_value(1))
        if node.get_type_name() == "Split" and node.get_output_element_type(0).is_real():
            tails += node.outputs()
        if node.get_type_name() == "MatMul" and all(_is_computed(value) for value in node.input_values()):
            inputs = [value for value in node.input_values() if value.get_node().get_type_name() != "MatMul"]
            axes = [list(range(len(value.get_partial_shape()))) for value in inputs]
            tails += [opset13.reduce_max(value, own).output(0) for value, own in zip(inputs, axes, strict=True)]
    model.add_outputs(tails)


def _is_computed(value: Any) -> bool:
    """Whether a value depends on an input of the model: true for features, false for weights."""
    waiting, seen = [value.get_node()], set()
    while waiting:
        node = waiting.pop()
        if node.get_type_name() == "Parameter":
            return True
        if node.get_name() not in seen:
            seen.add(node.get_name())
            waiting += [source.get_node() for source in node.input_values()]
    return False

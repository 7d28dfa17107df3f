"""Building CPU engines with OpenVINO from an exported ONNX file."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import platform
import tempfile
from pathlib import Path

from maskrcnn.errors import UserError
from maskrcnn.metadata import KEY, ModelMetadata, sha256_of
from maskrcnn.runtime.compare import EXACT, HALF, Difference
from maskrcnn.runtime.onnxruntime_backend import OnnxRuntimeBackend
from maskrcnn.runtime.openvino_backend import OpenVinoBackend, import_openvino, read_onnx
from maskrcnn.runtime.validation import compare_backends


def tensorrt_obstacle() -> UserError:
    """Why no TensorRT engine can be built: always something, as this version has no TensorRT builder yet."""
    if importlib.util.find_spec("tensorrt") is None:
        return UserError(
            "no Python package tensorrt on this machine",
            "TensorRT 10.9 or newer and an NVIDIA GPU; this version cannot build its engines yet even then",
            "`pip install 'maskrcnn[tensorrt]'` for later versions; now use --target openvino, "
            "or run the ONNX file in ONNX Runtime",
        )
    return UserError(
        "TensorRT is installed, but this version of maskrcnn has no TensorRT builder yet",
        "--target openvino, or the ONNX file in ONNX Runtime",
        "use --target openvino",
    )


def build_openvino_engine(onnx_path: Path, output: Path, *, half: bool) -> tuple[ModelMetadata, Difference]:
    """Builds an engine, compares it with the ONNX file in ONNX Runtime, and keeps it if they agree.

    Args:
        onnx_path: a file written by `maskrcnn export --onnx`.
        output: where to write the `.xml`; the weights lie beside it in `.bin`.
        half: store weights in float16, and execute in bfloat16 where the CPU has it.

    Raises:
        UserError: when the engine differs from the ONNX file by more than its precision explains; it is then
            kept beside `output` under the name `*.rejected.xml`.
    """
    openvino = import_openvino()
    model, metadata = read_onnx(onnx_path)
    core = openvino.Core()
    has_bf16 = "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    execution = "bf16" if half and has_bf16 else "fp32"
    if execution == "bf16":
        keep_coordinates_in_fp32(model)
    metadata = dataclasses.replace(
        metadata,
        precision="fp16" if half else "fp32",
        source_sha256=sha256_of(onnx_path),
        stamp={
            "target": "openvino",
            "execution": execution,
            "weights": "fp16" if half else "fp32",
            "cpu": core.get_property("CPU", "FULL_DEVICE_NAME"),
            "machine": platform.machine(),
            "openvino": openvino.get_version(),
        },
    )
    output.parent.mkdir(parents=True, exist_ok=True)
    tolerance = HALF if half else EXACT
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=".engine-") as folder:
        draft = Path(folder) / output.name
        _save(openvino, model, metadata, draft, half=half)
        reference = OnnxRuntimeBackend(onnx_path, providers=["CPUExecutionProvider"])
        difference = compare_backends(reference, OpenVinoBackend(draft), tolerance)
        accepted = difference.within(tolerance)
        metadata.stamp["compared"] = str(difference)
        _save(openvino, model, metadata, draft, half=half)
        kept = output if accepted else output.with_suffix(".rejected.xml")
        # Weights first: an .xml without its .bin would be half an engine.
        os.replace(draft.with_suffix(".bin"), kept.with_suffix(".bin"))
        os.replace(draft, kept)
    if not accepted:
        raise UserError(
            f"engine that departs from {onnx_path}: {difference}",
            f"at most boxes {tolerance.box_px} px, scores {tolerance.score}, masks {tolerance.mask_mean} on average, "
            f"and at most {tolerance.departing_share:.0%} of the detections beyond that or unpaired",
            f"look at {kept} with `maskrcnn evaluate`, or build with --fp32",
        )
    return metadata, difference


def _save(openvino, model, metadata: ModelMetadata, path: Path, *, half: bool) -> None:
    model.set_rt_info(metadata.to_json(), KEY)
    openvino.save_model(model, str(path), compress_to_fp16=half)


def keep_coordinates_in_fp32(model) -> None:
    """Keeps box coordinates in FP32 when the CPU executes in bfloat16.

    OpenVINO executes in bfloat16 what lies before a convolution or matrix product, and leaves the tail of the
    graph in FP32. RoI coordinates on their way into RoIAlign lie before one, and bfloat16 would move them by up
    to 4 pixels at 1000. As outputs of the graph they belong to the tail. Nothing reads these outputs.
    """
    tails = []
    for node in model.get_ordered_ops():
        if node.get_type_name() == "ROIAlign":
            tails.append(node.input_value(1))
        if node.get_type_name() == "Split" and node.get_output_element_type(0).is_real():
            tails += node.outputs()
    model.add_outputs(tails)

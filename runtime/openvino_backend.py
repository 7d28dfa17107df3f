"""OpenVINO as a backend: CPU engines written by `maskrcnn build-engine`, and ONNX files."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from maskrcnn.errors import UserError
from maskrcnn.metadata import KEY, ModelMetadata, not_ours
from maskrcnn.runtime.backend import Backend, TensorSpec, detector_specs, missing_library

_HINTS = {"fp32": "f32", "bf16": "bf16"}  # our names of precisions, and OpenVINO's


def import_openvino():
    """The openvino module.

    Raises:
        UserError: when it is not installed.
    """
    try:
        import openvino
    except ImportError as error:
        raise missing_library("openvino", "build and run CPU engines", "pip install openvino") from error
    return openvino


def read_onnx(path: Path):
    """An exported ONNX file as (OpenVINO model, metadata).

    OpenVINO knows neither model-local functions nor our ops, so the functions are inlined first.

    Raises:
        UserError: when the file is missing or not ours.
    """
    openvino = import_openvino()
    try:
        import onnx
        import onnx.inliner
    except ImportError as error:
        raise missing_library("onnx", f"read {path}", "pip install onnx") from error
    if not path.is_file():
        raise UserError(f"no file {path}", "an ONNX file", "check the path, or run `maskrcnn export --onnx`")
    try:
        model = onnx.load(path)
    except Exception as error:  # protobuf's decode error has no stable base class
        raise not_ours(path, f"not an ONNX file ({error})") from error
    text = {prop.key: prop.value for prop in model.metadata_props}.get(KEY)
    if text is None:
        raise not_ours(path, "an ONNX file without maskrcnn's metadata")
    metadata = ModelMetadata.from_json(text, path)
    inlined = onnx.shape_inference.infer_shapes(onnx.inliner.inline_local_functions(model))
    return openvino.Core().read_model(inlined.SerializeToString()), metadata


class OpenVinoBackend(Backend):
    """A model in OpenVINO on the CPU.

    Args:
        path: an engine's `.xml`, or an ONNX file.
        precision: of the arithmetic, "fp32" or "bf16"; by default what the engine's metadata says.
        threads: 0 leaves the choice to OpenVINO.
    """

    name = "OpenVINO"

    def __init__(self, path: Path, *, precision: str | None = None, threads: int = 0) -> None:
        openvino = import_openvino()
        core = openvino.Core()
        if path.suffix == ".onnx":
            model, self.metadata = read_onnx(path)
        else:
            model, self.metadata = _read_engine(core, path)
        self.precision = precision or _execution_precision(self.metadata)
        if self.precision not in _HINTS:
            raise UserError(f"precision {self.precision!r}", " or ".join(_HINTS), "choose one of these")
        options = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": _HINTS[self.precision],
        }
        if threads:
            options["INFERENCE_NUM_THREADS"] = threads
        self.compiled = core.compile_model(model, "CPU", options)
        self.request = self.compiled.create_infer_request()

    def describe(self) -> tuple[dict[str, TensorSpec], dict[str, TensorSpec]]:
        return detector_specs(self.metadata)

    def infer(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        self.request.infer(feeds, share_inputs=True)
        _, outputs = self.describe()
        return {name: self.request.get_tensor(name).data.copy() for name in outputs}


def _execution_precision(metadata: ModelMetadata) -> str:
    return metadata.stamp.get("execution", "fp32")


def _read_engine(core, path: Path):
    if not path.is_file() or not path.with_suffix(".bin").is_file():
        raise UserError(
            f"no engine {path} with its {path.with_suffix('.bin').name}",
            "both files of an OpenVINO engine",
            "build it: `maskrcnn build-engine --fp16 --target openvino`",
        )
    try:
        model = core.read_model(path)
        text = model.get_rt_info(KEY).astype(str)
    except RuntimeError as error:
        raise not_ours(path, f"not an engine of ours ({str(error)[:200]})") from error
    metadata = ModelMetadata.from_json(text, path)
    if _execution_precision(metadata) == "bf16" and "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        raise UserError(
            f"{path}: built for bfloat16 execution ({metadata.stamp.get('cpu', 'another CPU')}); this CPU has none",
            "a CPU with AVX512-BF16 or AMX",
            "rebuild here: `maskrcnn build-engine --fp16 --target openvino`",
        )
    return model, metadata

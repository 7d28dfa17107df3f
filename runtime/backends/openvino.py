"""OpenVINO as a backend: CPU engines written by `maskrcnn build-engine`, and ONNX files."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from maskrcnn.errors import UserError, missing_library
from maskrcnn.metadata import KEY, ModelMetadata, not_ours
from maskrcnn.runtime.backends.base import Backend, TensorSpec, detector_specs
from maskrcnn.runtime.onnx_file import check_portable, read_model

_cores: list = []  # of this process: none or one
_core_lock = threading.Lock()
_HINTS = {"fp32": "f32", "bf16": "bf16"}  # our names of precisions, and OpenVINO's


def _import_openvino():
    """The openvino module.

    Raises:
        UserError: when it is not installed.
    """
    try:
        import openvino
    except ImportError as error:
        raise missing_library("openvino", "build and run CPU engines", "pip install openvino") from error
    return openvino


def openvino_core():
    """The process's one `openvino.Core`.

    Each further one that compiles for the CPU gives the thread another signal stack and takes it away with its last
    model; when the older of two goes first, the thread is left with a stack that is gone, and the next signal with a
    handler (Ctrl-C, the end of a data loader's worker) is a segmentation fault. Seen in OpenVINO 2026.4.

    Raises:
        UserError: when OpenVINO is not installed.
    """
    openvino = _import_openvino()
    with _core_lock:
        if not _cores:
            _cores.append(openvino.Core())
        return _cores[0]


def _read_onnx(path: Path):
    """An exported ONNX file as (OpenVINO model, metadata).

    OpenVINO knows neither model-local functions nor our ops, so the functions are inlined first.

    Raises:
        UserError: when the file is missing, not ours, or the copy for TensorRT.
    """
    core = openvino_core()
    model, metadata = read_model(path)
    check_portable(model, path)
    import onnx.inliner

    inlined = onnx.shape_inference.infer_shapes(onnx.inliner.inline_local_functions(model))
    return core.read_model(inlined.SerializeToString()), metadata


class OpenVinoBackend(Backend):
    """A model in OpenVINO on the CPU. Threads may share it; one at a time computes.

    Args:
        path: an engine's `.xml`, or an ONNX file.
        precision: of the arithmetic, "fp32" or "bf16"; by default what the engine's metadata says.
        threads: 0 leaves the choice to OpenVINO.
    """

    name = "OpenVINO"

    def __init__(self, path: Path, *, precision: str | None = None, threads: int = 0) -> None:
        core = openvino_core()
        self.path = path
        model, self.metadata = _read(core, path)
        execution = precision or _execution_precision(self.metadata)
        if execution not in _HINTS:
            raise UserError(f"precision {execution!r}", " or ".join(_HINTS), "choose one of these")
        self.precision = _shown_precision(self.metadata, execution)
        options = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": _HINTS[execution],
        }
        if threads:
            options["INFERENCE_NUM_THREADS"] = threads
        self._options = options
        self._lock = threading.Lock()  # the tensors of a request are those of its last inference
        self._instrumented = None  # (names, request)
        self.compiled = core.compile_model(model, "CPU", options)
        self.request = self.compiled.create_infer_request()

    def describe(self) -> tuple[dict[str, TensorSpec], dict[str, TensorSpec]]:
        return detector_specs(self.metadata)

    def infer(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        _, outputs = self.describe()
        with self._lock:
            self.request.infer(feeds, share_inputs=True)
            return {name: self.request.get_tensor(name).data.copy() for name in outputs}

    def stages(self, feeds: dict[str, np.ndarray], names: Sequence[str]) -> dict[str, np.ndarray]:
        with self._lock:
            if self._instrumented is None or self._instrumented[0] != tuple(names):
                self._instrumented = tuple(names), self._instrumented_request(names)
            request = self._instrumented[1]
            request.infer(feeds, share_inputs=True)
            present = {name for output in request.model_outputs for name in output.get_names()}
            return {name: _array(request.get_tensor(name)) for name in names if name in present}

    def profiling_request(self):
        """An inference request of the same model that measures its layers (`request.profiling_info`)."""
        core = openvino_core()
        model, _ = _read(core, self.path)
        return core.compile_model(model, "CPU", {**self._options, "PERF_COUNT": True}).create_infer_request()

    def _instrumented_request(self, names: Sequence[str]):
        """An inference request of the same model, which has the named tensors among its outputs."""
        core = openvino_core()
        model, _ = _read(core, self.path)
        values = {name for node in model.get_ordered_ops() for out in node.outputs() for name in out.get_names()}
        outputs = {name for output in model.outputs for name in output.get_names()}
        model.add_outputs([name for name in names if name in values - outputs])
        return core.compile_model(model, "CPU", self._options).create_infer_request()


def _array(tensor) -> np.ndarray:
    """A copy of a tensor's values; bfloat16, whose bits OpenVINO shows as float16, in float32."""
    if tensor.get_element_type().to_string() != "bf16":
        return tensor.data.copy()
    return (tensor.data.view(np.uint16).astype(np.uint32) << 16).view(np.float32)


def _read(core, path: Path):
    """(OpenVINO model, metadata) of an engine or an ONNX file."""
    return _read_onnx(path) if path.suffix == ".onnx" else _read_engine(core, path)


def _execution_precision(metadata: ModelMetadata) -> str:
    return metadata.stamp.get("execution", "fp32")


def _shown_precision(metadata: ModelMetadata, execution: str) -> str:
    """What the graph's own casts or 8-bit integers are done in, and the rest where that is another type."""
    if "target" in metadata.stamp and metadata.precision != "int8":
        return execution  # the engine's weights have a type of their own
    if metadata.precision == "int8" and execution != "fp32":
        return f"int8, {execution}"
    return execution if metadata.precision == "fp32" else metadata.precision


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

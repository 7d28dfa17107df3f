"""OpenVINO backend: CPU engines of `maskrcnn build-engine`, and ONNX files."""

from __future__ import annotations

import os
import queue
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from maskrcnn.errors import UserError, check_range, missing_library, reason_of
from maskrcnn.machine import available_cpus, is_quota_bound
from maskrcnn.metadata import ModelMetadata, not_ours, sha256_of
from maskrcnn.runtime.backends.base import Backend, Specs, detector_specs, keep_for_ever
from maskrcnn.runtime.engine_files import check_portable, read_metadata, read_model

_cores: list[Any] = []  # the process's core, once created
_core_lock = threading.Lock()
# Kernels that a compiled model caches, about a hundred for each image size and number of detections. With OpenVINO's
# default of 5000, memory grows over hundreds of sizes (docs/results.md); without a cache, each call creates them again.
_CACHED_PRIMITIVES = 1000
_first_lock, _first_call = threading.Lock(), threading.Event()  # see `OpenVinoBackend.infer`
_HINTS = {"fp32": "f32", "bf16": "bf16"}  # OpenVINO's names of precisions


def openvino_core() -> Any:
    """Returns the `openvino.Core` of the process; there is only one.

    Each core that compiles for the CPU installs a signal stack in the thread and removes it with its last model. If the
    older of two cores is removed first, the thread keeps a freed stack, and the next signal with a handler (Ctrl-C, the
    end of a data loader's worker) causes a segmentation fault. Observed in OpenVINO 2026.4.

    Raises:
        UserError: if OpenVINO is not installed.
    """
    with _core_lock:
        try:
            with _without_telemetry():
                import openvino
        except ImportError as error:
            raise missing_library("openvino", "build and run CPU engines", "pip install openvino") from error
        if not _cores:
            core = openvino.Core()
            with suppress(RuntimeError):  # a version without the property
                core.set_property("CPU", {"CPU_RUNTIME_CACHE_CAPACITY": _CACHED_PRIMITIVES})
            _cores.append(core)
            if hasattr(os, "register_at_fork"):  # see `backends.base`
                os.register_at_fork(after_in_child=lambda: keep_for_ever(_cores[0]))
        return _cores[0]


@contextmanager
def _without_telemetry() -> Iterator[None]:
    """Makes OpenVINO's tools import their own stub instead of the package `openvino_telemetry`.

    That package sends statistics unless a file in the home folder forbids it, and its import fails for a user without a
    home folder. To use it, import it before this package.
    """
    name = "openvino_telemetry"
    if name in sys.modules:
        yield
        return
    sys.modules[name] = None  # type: ignore[assignment]  # its import fails
    try:
        yield
    finally:
        del sys.modules[name]


class OpenVinoBackend(Backend):
    """A model in OpenVINO on the CPU. Any number of threads may call it; `streams` calls run at the same time.

    Args:
        path: an engine's `.xml`, or an ONNX file.
        precision: precision of the arithmetic, "fp32" or "bf16" (default: from the engine's metadata).
        threads: number of threads of all streams; 0: OpenVINO's choice, at most the available CPUs.
        streams: number of calls that run at the same time; they share the weights and divide the threads.

    Raises:
        UserError: if OpenVINO is missing, or the file cannot be used.
    """

    name = "OpenVINO"

    def __init__(self, path: Path, *, precision: str | None = None, threads: int = 0, streams: int = 1) -> None:
        check_range("threads", threads, 0)
        check_range("streams", streams, 1)
        core = openvino_core()
        self.path = path
        model, self.metadata = read_openvino_model(core, path)
        execution = precision or _execution_precision(self.metadata)
        if execution not in _HINTS:
            raise UserError(f"precision {execution!r}", " or ".join(_HINTS), "choose one of these")
        self.precision = _shown_precision(self.metadata, execution)
        self._options: dict[str, Any] = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": _HINTS[execution],
        }
        if threads or is_quota_bound():  # OpenVINO respects CPU affinity, but not CPU quotas
            self._options["INFERENCE_NUM_THREADS"] = threads or available_cpus()
        if threads:  # by default OpenVINO pins threads to the first cores, which several processes would share
            self._options["ENABLE_CPU_PINNING"] = False
        if streams > 1:
            self._options["NUM_STREAMS"] = str(streams)
        self._lock = threading.Lock()  # protects the instrumented request
        self._instrumented: tuple[tuple[str, ...], Any] | None = None  # names, request
        self.compiled = core.compile_model(model, "CPU", self._options)
        # A request's tensors hold the results of its last inference, so one call at a time may use it.
        self._requests: queue.SimpleQueue[Any] = queue.SimpleQueue()
        for _ in range(streams):
            self._requests.put(self.compiled.create_infer_request())

    def describe(self) -> tuple[Specs, Specs]:
        return detector_specs(self.metadata)

    def infer(self, feeds: dict[str, Any]) -> dict[str, Any]:
        _, outputs = self.describe()
        # The first two calls of a process can deadlock: one thread initialises a static variable of OpenVINO's Python
        # module and waits for the GIL; the other holds the GIL and waits for the variable.
        if not _first_call.is_set():
            with _first_lock:
                found = self._infer(feeds, outputs)
                _first_call.set()
                return found
        return self._infer(feeds, outputs)

    def _infer(self, feeds: dict[str, Any], outputs: Specs) -> dict[str, Any]:
        request = self._requests.get()
        try:
            request.infer(feeds, share_inputs=True)
            return {name: request.get_tensor(name).data.copy() for name in outputs}
        finally:
            self._requests.put(request)

    def stages(self, feeds: dict[str, Any], names: Sequence[str]) -> dict[str, np.ndarray]:
        with self._lock:
            if self._instrumented is None or self._instrumented[0] != tuple(names):
                self._instrumented = tuple(names), self._instrumented_request(names)
            request = self._instrumented[1]
            request.infer(feeds, share_inputs=True)
            present = {name for output in request.model_outputs for name in output.get_names()}
            return {name: _array(request.get_tensor(name)) for name in names if name in present}

    def profiling_request(self) -> Any:
        """Returns an inference request that measures the model's layers (`request.profiling_info`)."""
        core = openvino_core()
        model, _ = read_openvino_model(core, self.path)
        return core.compile_model(model, "CPU", {**self._options, "PERF_COUNT": True}).create_infer_request()

    def _instrumented_request(self, names: Sequence[str]) -> Any:
        """Creates an inference request of the model with the named tensors as outputs."""
        core = openvino_core()
        model, _ = read_openvino_model(core, self.path)
        values = {name for node in model.get_ordered_ops() for out in node.outputs() for name in out.get_names()}
        outputs = {name for output in model.outputs for name in output.get_names()}
        model.add_outputs([name for name in names if name in values - outputs])
        return core.compile_model(model, "CPU", self._options).create_infer_request()


def _array(tensor: Any) -> np.ndarray:
    """Copies a tensor's values; converts bfloat16, which OpenVINO returns as bits of float16, to float32."""
    if tensor.get_element_type().to_string() != "bf16":
        return np.array(tensor.data)
    bits: np.ndarray = tensor.data.view(np.uint16).astype(np.uint32) << 16
    return bits.view(np.float32)


def _execution_precision(metadata: ModelMetadata) -> str:
    return str(metadata.stamp.get("execution", "fp32"))


def _shown_precision(metadata: ModelMetadata, execution: str) -> str:
    """Precision that the graph defines by casts or 8-bit integers, and the precision of the rest if it differs."""
    if "target" in metadata.stamp and metadata.precision != "int8":
        return execution  # the engine's weights are converted when it is loaded
    if metadata.precision == "int8" and execution != "fp32":
        return f"int8, {execution}"
    return execution if metadata.precision == "fp32" else metadata.precision


def read_openvino_model(core: Any, path: Path) -> tuple[Any, ModelMetadata]:
    """Reads an engine or an ONNX file; returns the OpenVINO model and the metadata."""
    if path.suffix == ".onnx":
        # OpenVINO supports neither model-local functions nor the custom ops: inline the functions first.
        model, metadata = read_model(path)
        check_portable(model, path)
        import onnx.inliner

        inlined = onnx.shape_inference.infer_shapes(onnx.inliner.inline_local_functions(model))
        return core.read_model(inlined.SerializeToString()), metadata
    if not path.is_file() or not path.with_suffix(".bin").is_file():
        raise UserError(
            f"no engine {path} with its {path.with_suffix('.bin').name}",
            "both files of an OpenVINO engine",
            "build it: `maskrcnn build-engine --fp16 --target openvino`",
        )
    metadata, weights = read_metadata(path), path.with_suffix(".bin")
    stated = metadata.stamp.get("bin_sha256")  # absent in older files
    if stated is not None and sha256_of(weights) != stated:
        raise UserError(
            f"{weights}: not the weights that {path.name} was written with",
            "the two files of one OpenVINO engine",
            "copy both again, or rebuild here: `maskrcnn build-engine --fp16 --target openvino`",
        )
    if _execution_precision(metadata) == "bf16" and "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        raise UserError(
            f"{path}: built for bfloat16 execution ({metadata.stamp.get('cpu', 'another CPU')}); this CPU has none",
            "a CPU with AVX512-BF16 or AMX",
            "rebuild here: `maskrcnn build-engine --fp16 --target openvino`",
        )
    try:
        return core.read_model(path), metadata
    except RuntimeError as error:
        raise not_ours(path, f"not an OpenVINO engine ({reason_of(error)})") from error

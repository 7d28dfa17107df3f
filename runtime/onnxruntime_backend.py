"""ONNX Runtime as a backend."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from maskrcnn.errors import UserError
from maskrcnn.metadata import KEY, ModelMetadata, not_ours
from maskrcnn.runtime.backend import Backend, TensorSpec, missing_library

_DTYPES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(int64)": "int64",
    "tensor(int32)": "int32",
    "tensor(uint8)": "uint8",
}


class OnnxRuntimeBackend(Backend):
    """An exported file in ONNX Runtime, whose inlined functions stand for the custom ops.

    Args:
        path: the ONNX file.
        providers: execution providers in order of preference; by default CUDA where it works, then CPU.
        threads: of the CPU provider; 0 leaves the choice to ONNX Runtime.
    """

    name = "ONNX Runtime"

    def __init__(self, path: Path, *, providers: list[str] | None = None, threads: int = 0) -> None:
        try:
            import onnxruntime
        except ImportError as error:
            raise missing_library("onnxruntime", f"run {path}", "pip install onnxruntime-gpu") from error
        if not path.is_file():
            raise UserError(f"no file {path}", "an ONNX file", "check the path, or run `maskrcnn export --onnx`")
        self.path = path
        self._instrumented: tuple[tuple[str, ...], onnxruntime.InferenceSession] | None = None
        options = self._options = session_options(threads)
        try:
            self.session = onnxruntime.InferenceSession(str(path), options, providers=providers or usable_providers())
        except Exception as error:  # ONNX Runtime's own exceptions share no public base
            raise UserError(
                f"{path}: not a model that ONNX Runtime loads ({str(error)[:200]})",
                "a file of `maskrcnn export --onnx` without --tensorrt",
                "export it again; what is in bfloat16 runs with --backend openvino",
            ) from error
        text = self.session.get_modelmeta().custom_metadata_map.get(KEY)
        if text is None:
            raise not_ours(path, "an ONNX file without maskrcnn's metadata")
        self.metadata = ModelMetadata.from_json(text, path)
        self.precision = self.metadata.precision
        if self.session.get_providers()[0] != "CPUExecutionProvider":
            self.name = f"ONNX Runtime {self.session.get_providers()[0].removesuffix('ExecutionProvider')}"

    def describe(self) -> tuple[dict[str, TensorSpec], dict[str, TensorSpec]]:
        return _specs(self.session.get_inputs()), _specs(self.session.get_outputs())

    def infer(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        names = [output.name for output in self.session.get_outputs()]
        return dict(zip(names, self.session.run(names, feeds), strict=True))

    def stages(self, feeds: dict[str, np.ndarray], names: Sequence[str]) -> dict[str, np.ndarray]:
        if self._instrumented is None or self._instrumented[0] != tuple(names):
            self._instrumented = tuple(names), self._instrumented_session(names)
        session = self._instrumented[1]
        present = [output.name for output in session.get_outputs() if output.name in names]
        return dict(zip(present, session.run(present, feeds), strict=True))

    def _instrumented_session(self, names: Sequence[str]):
        """A session of the same graph, which has the named tensors among its outputs."""
        import onnxruntime

        try:
            import onnx
        except ImportError as error:
            raise missing_library("onnx", f"look into {self.path}", "pip install onnx") from error
        model = onnx.load(self.path)
        outputs = {output.name for output in model.graph.output}
        values = {name for node in model.graph.node for name in node.output}
        # Without a type: ONNX Runtime infers it, and an FP16 graph has others than an FP32 one.
        model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name in values - outputs)
        providers = self.session.get_providers()
        return onnxruntime.InferenceSession(model.SerializeToString(), self._options, providers=providers)


def session_options(threads: int = 0):
    """Options of a session of any file; 0 threads leaves their number to ONNX Runtime."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3  # errors only; warnings name CUDA libraries a CPU machine lacks
    return options


def usable_providers() -> list[str]:
    """CUDA where its libraries and a GPU are there, and the CPU."""
    import onnxruntime

    devices = getattr(onnxruntime, "get_ep_devices", list)()
    has_cuda = any(device.ep_name == "CUDAExecutionProvider" for device in devices)
    return [*(["CUDAExecutionProvider"] if has_cuda else []), "CPUExecutionProvider"]


def _specs(nodes) -> dict[str, TensorSpec]:
    return {
        node.name: TensorSpec(
            _DTYPES.get(node.type, node.type),
            tuple(length if isinstance(length, int) else None for length in node.shape),
        )
        for node in nodes
    }

"""ONNX Runtime backend, on the CPU and on GPUs."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np

from maskrcnn.errors import UserError, check_range, missing_library, reason_of
from maskrcnn.imaging.postprocess import Paste
from maskrcnn.imaging.preprocess import batch_sizes
from maskrcnn.machine import available_cores
from maskrcnn.metadata import KEY, ModelMetadata
from maskrcnn.plugins.native import kernels_for
from maskrcnn.runtime.backends.base import Backend, Specs, TensorSpec
from maskrcnn.runtime.backends.onnxruntime_providers import (
    GpuOptions,
    Provider,
    best_provider,
    prepare,
    provider_chain,
    provider_named,
    too_new,
    unusable,
    with_one_nms_call,
)
from maskrcnn.runtime.backends.placement import RECORD, Placement, placement_in
from maskrcnn.runtime.engine_files import parse_metadata, read_model
from maskrcnn.runtime.gpu.arrays import DeviceArray, as_device_array, is_on_device
from maskrcnn.runtime.gpu.images import ImageLoader, MaskPaster, are_bytes, resizes_on_gpu
from maskrcnn.runtime.gpu.memory import BufferPool, Cuda, GrowableBuffer, preserve_context

_DTYPES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(int64)": "int64",
    "tensor(int32)": "int32",
    "tensor(uint8)": "uint8",
}
_ON_GPU = (Provider.CUDA.full_name, Provider.TENSORRT.full_name)


class _GpuBinding:
    """Inputs and outputs of a session in GPU memory. Any number of threads may use it.

    Args:
        cuda: the GPU.
        metadata: metadata of the model.
    """

    def __init__(self, cuda: Cuda, metadata: ModelMetadata) -> None:
        self.cuda, self.stream = cuda, cuda.stream()
        kernels = kernels_for(cuda.arch)
        self.preprocessing = metadata.preprocessing
        self.paste = MaskPaster(kernels, cuda) if kernels is not None and metadata.has_masks else None
        self.loader: ImageLoader | None = None
        if kernels is not None and resizes_on_gpu(metadata.preprocessing):
            self.loader = ImageLoader(kernels, cuda, metadata.preprocessing)
        self._images = GrowableBuffer(cuda)
        self._pools: dict[tuple[str, int], BufferPool] = {}  # by output name and size in bytes
        self._lock = threading.Lock()

    def infer(self, session: Any, outputs: Specs, feeds: dict[str, Any]) -> dict[str, Any]:
        """Runs a session; the outputs are on the GPU if `images` is."""
        return self._run(session, outputs, feeds, outputs_on_gpu=is_on_device(feeds["images"]))

    def run_images(
        self, session: Any, outputs: Specs, images: Sequence[np.ndarray], loader: ImageLoader
    ) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """Does the same as `Backend.run_images`, but resizes and pads the images on the GPU."""
        sizes, padded_hw = batch_sizes(images, self.preprocessing)
        image_sizes, shape = np.array(sizes, np.int64), (len(images), 3, *padded_hw)
        with self._lock, self.cuda.active():
            memory = self._images.reserve(4 * int(np.prod(shape)))
            batch = DeviceArray(memory.address, shape, np.float32, stream=self.stream, owner=memory)
            loader.fill(images, sizes, batch)
            feeds = {"images": batch, "image_sizes": image_sizes}
            return self._run(session, outputs, feeds, outputs_on_gpu=False), image_sizes

    def _run(self, session: Any, outputs: Specs, feeds: dict[str, Any], *, outputs_on_gpu: bool) -> dict[str, Any]:
        batch = len(feeds["images"])
        with self.cuda.active():  # ONNX Runtime changes the current GPU and does not restore it
            binding = session.io_binding()
            kept = [self._bind_input(binding, name, value) for name, value in feeds.items()]
            bind_outputs = self._bind_outputs if outputs_on_gpu else _bind_host_outputs
            found = bind_outputs(binding, outputs, batch)
            self.stream.synchronize()  # ONNX Runtime runs on its own streams
            session.run_with_iobinding(binding)
            binding.synchronize_outputs()
            kept.clear()
        return found

    def _bind_input(self, binding: Any, name: str, value: Any) -> Any:
        if not is_on_device(value):
            _bind_host_input(binding, name, value)
            return value
        array = as_device_array(value, self.cuda, self.stream)
        binding.bind_input(name, "cuda", self.cuda.index, array.dtype, array.shape, array.address)
        return array

    def _bind_outputs(self, binding: Any, specs: Specs, batch: int) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, spec in specs.items():
            shape = _with_batch(spec, batch)
            nbytes = int(np.prod(shape)) * np.dtype(spec.dtype).itemsize
            pool = self._pools.setdefault((name, nbytes), BufferPool(self.cuda, nbytes))
            buffer = pool.acquire(self.stream)
            array = DeviceArray(buffer.address, shape, spec.dtype, stream=self.stream, owner=buffer)
            binding.bind_output(name, "cuda", self.cuda.index, array.dtype, array.shape, array.address)
            found[name] = array
        return found


def gpu_binding(device: int, metadata: ModelMetadata) -> _GpuBinding | None:
    """Creates the binding for a GPU, or None if cuda-bindings is missing or newer than the driver."""
    try:
        cuda = Cuda(device)
    except UserError:
        return None
    return _GpuBinding(cuda, metadata)


def _bind_host_input(binding: Any, name: str, value: Any) -> None:
    """Binds an array in host memory; a GPU provider copies it."""
    binding.bind_cpu_input(name, np.ascontiguousarray(value))


def _bind_host_outputs(binding: Any, specs: Specs, batch: int) -> dict[str, Any]:
    """Binds all outputs to new arrays in host memory, and returns these."""
    found = {name: np.empty(_with_batch(spec, batch), spec.dtype) for name, spec in specs.items()}
    for name, array in found.items():
        binding.bind_output(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
    return found


def _with_batch(spec: TensorSpec, batch: int) -> tuple[int, ...]:
    """Shape of an output; only its batch dimension is dynamic."""
    return (batch, *(int(length or 0) for length in spec.shape[1:]))


class OnnxRuntimeBackend(Backend):
    """An ONNX file in ONNX Runtime, which inlines the functions of the custom ops.

    Any number of threads may call it. Inputs on the GPU are read without a copy, and outputs are written into
    preallocated memory. Without cuda-bindings a GPU provider accepts only arrays in host memory.

    Args:
        path: the ONNX file.
        provider: "cpu", "cuda" or "tensorrt"; an error if it does not work (default: CUDA if it works, else the CPU,
            with a remark if there is a GPU).
        gpu: options of the GPU providers.
        providers: ONNX Runtime's own names in order of preference, instead of `provider`.
        threads: number of threads of the CPU provider; 0: one per available core.

    Raises:
        UserError: if the file cannot be used, or the provider does not work here.
    """

    name = "ONNX Runtime"

    def __init__(
        self,
        path: Path,
        *,
        provider: str | None = None,
        gpu: GpuOptions | None = None,
        providers: list[str] | None = None,
        threads: int = 0,
    ) -> None:
        check_range("threads", threads, 0)
        try:
            import onnxruntime  # noqa: F401
        except ImportError as error:
            raise missing_library("onnxruntime", f"run {path}", "pip install onnxruntime-gpu") from error
        if not path.is_file():
            raise UserError(f"no file {path}", "an ONNX file", "check the path, or run `maskrcnn export --onnx`")
        self.path, self.gpu = path, gpu or GpuOptions()
        self._instrumented: tuple[tuple[str, ...], Any] | None = None
        self._threads, self._gpu_refusal = threads, ""
        self.session = self._session(provider, providers)
        # Read from the session: the onnx package may be missing.
        self.metadata = parse_metadata(self.session.get_modelmeta().custom_metadata_map.get(KEY), path, "an ONNX file")
        self.precision = self.metadata.precision
        first = self.session.get_providers()[0]
        if first != Provider.CPU.full_name:
            self.name = f"ONNX Runtime {first.removesuffix('ExecutionProvider')}"
        self._inputs, self._outputs = _specs(self.session.get_inputs()), _specs(self.session.get_outputs())
        self.bind_to(gpu_binding(self.gpu.device, self.metadata) if first in _ON_GPU else None)

    def _session(self, provider: str | None, providers: list[str] | None) -> Any:
        """Creates the session with `provider`, with `providers`, or by default with the best provider that works."""
        if provider is not None:
            return self._session_with(provider_named(provider))
        if providers is not None:
            self._options = session_options(self._threads)
            return self._open(providers)
        best = best_provider()
        if best is Provider.CPU:
            return self._session_with(best)
        try:
            return self._session_with(best)
        except UserError as error:  # often a missing CUDA library; if the file is wrong, the CPU raises the error again
            session = self._session_with(Provider.CPU)
            self._gpu_refusal = f"on the CPU, though there is a GPU: {error.found}; {error.fix}"
            return session

    def _session_with(self, provider: Provider) -> Any:
        prepare(provider)
        self._options = session_options(self._threads)
        if provider is Provider.CPU:
            return self._open(provider_chain(provider, self.gpu), can_fall_back=False)
        model, metadata = read_model(self.path)
        chain = provider_chain(provider, self.gpu, channels=metadata.preprocessing.channels)
        self._options.add_session_config_entry(RECORD, "1")
        try:
            session = self._open(chain, model=with_one_nms_call(model).SerializeToString(), can_fall_back=False)
        except UserError as error:
            raise unusable(provider, str(error.__cause__)) from error
        if provider.full_name not in session.get_providers():
            raise unusable(provider, f"it uses {', '.join(session.get_providers())} instead")
        return session

    def _open(self, providers: Sequence[Any], *, model: bytes | None = None, can_fall_back: bool = True) -> Any:
        """Creates the session of a model (default: of the file)."""
        import onnxruntime

        self._providers = list(providers)
        # By default ONNX Runtime prints an error and falls back to another provider.
        fallback = {} if can_fall_back else {"enable_fallback": 0}
        try:
            with _preserve_gpu(providers):
                return onnxruntime.InferenceSession(
                    model or str(self.path), self._options, providers=self._providers, **fallback
                )
        except Exception as error:  # ONNX Runtime's exceptions have no public base class
            if newer := too_new(self.path, str(error)):
                raise newer from error
            raise UserError(
                f"{self.path}: not a model that ONNX Runtime loads ({reason_of(error)})",
                "a file of `maskrcnn export --onnx` without --tensorrt",
                "export it again; a bfloat16 file runs with --backend openvino",
            ) from error

    def bind_to(self, gpu: _GpuBinding | None) -> None:
        """Binds inputs and outputs to GPU memory, or to host memory if `gpu` is None."""
        self._gpu_binding, self.takes_gpu_arrays = gpu, gpu is not None
        self.paste: Paste | None = None if gpu is None else gpu.paste

    def describe(self) -> tuple[Specs, Specs]:
        return self._inputs, self._outputs

    def infer(self, feeds: dict[str, Any]) -> dict[str, Any]:
        """Returns outputs on the host, or in new GPU memory if `images` is on the GPU."""
        if self._gpu_binding is not None:
            return self._gpu_binding.infer(self.session, self._outputs, feeds)
        binding = self.session.io_binding()
        for name, value in feeds.items():
            _bind_host_input(binding, name, value)
        found = _bind_host_outputs(binding, self._outputs, len(feeds["images"]))
        self.session.run_with_iobinding(binding)
        return found

    def run_images(self, images: Sequence[np.ndarray]) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """Does the same as `Backend.run_images`; resizes and pads on the GPU if there are compiled kernels."""
        gpu = self._gpu_binding
        if gpu is None or gpu.loader is None or not are_bytes(images):
            return super().run_images(images)
        return gpu.run_images(self.session, self._outputs, images, gpu.loader)

    def remarks(self) -> list[str]:
        if self._gpu_refusal:
            return [f"ONNX Runtime {self._gpu_refusal}"]
        placement = self.placement()
        return [f"ONNX Runtime on {placement.text()}"] if placement else []

    def placement(self) -> Placement | None:
        """Returns which nodes the GPU provider runs and which the CPU; None for the CPU provider."""
        first = self.session.get_providers()[0]
        return None if first == Provider.CPU.full_name else placement_in(self.session, first)

    def stages(self, feeds: dict[str, Any], names: Sequence[str]) -> dict[str, np.ndarray]:
        if self._instrumented is None or self._instrumented[0] != tuple(names):
            self._instrumented = tuple(names), self._instrumented_session(names)
        session = self._instrumented[1]
        present = [output.name for output in session.get_outputs() if output.name in names]
        with _preserve_gpu(session.get_providers()):
            return dict(zip(present, session.run(present, feeds), strict=True))

    def _instrumented_session(self, names: Sequence[str]) -> Any:
        """Creates a session of the same graph with the named tensors as outputs."""
        import onnxruntime

        try:
            import onnx
        except ImportError as error:
            raise missing_library(
                "onnx", f"read the intermediate tensors of {self.path}", "pip install onnx"
            ) from error
        model = onnx.load(self.path)
        outputs = {output.name for output in model.graph.output}
        values = {name for node in model.graph.node for name in node.output}
        # Without a type: ONNX Runtime infers it, as it differs between FP32 and FP16 graphs.
        model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name in values - outputs)
        with _preserve_gpu(self._providers):
            return onnxruntime.InferenceSession(model.SerializeToString(), self._options, providers=self._providers)


def session_options(threads: int = 0) -> Any:
    """Creates session options.

    The number of threads is always set (default: one per available core). Otherwise ONNX Runtime would create one
    thread per core of the machine and pin it, which ignores CPU quotas and prints one error per thread in a cpuset.
    """
    import onnxruntime

    if os.environ.get("ORT_DISABLE_TELEMETRY") == "1" and hasattr(onnxruntime, "disable_telemetry_events"):
        onnxruntime.disable_telemetry_events()  # where ONNX Runtime was imported before this package
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or available_cores()
    options.log_severity_level = 3  # errors only; without a GPU it warns of missing CUDA libraries
    return options


def usable_providers() -> list[str]:
    """Returns the full names of the CUDA provider, if it is usable, and of the CPU provider. Loads CUDA's libraries."""
    best = best_provider()
    prepare(best)
    return list(dict.fromkeys([best.full_name, Provider.CPU.full_name]))


def _preserve_gpu(providers: Sequence[Any]) -> AbstractContextManager[None]:
    """Restores the thread's current GPU, which ONNX Runtime changes if it uses one."""
    names = {each if isinstance(each, str) else each[0] for each in providers}
    return preserve_context() if names & set(_ON_GPU) else nullcontext()


def _specs(nodes: Sequence[Any]) -> Specs:
    return {
        node.name: TensorSpec(
            _DTYPES.get(node.type, node.type),
            tuple(length if isinstance(length, int) else None for length in node.shape),
        )
        for node in nodes
    }

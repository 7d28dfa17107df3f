"""ONNX Runtime as a backend, on the CPU and on GPUs."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np

from maskrcnn.errors import UserError, missing_library
from maskrcnn.imaging.preprocess import batch_sizes
from maskrcnn.metadata import KEY, ModelMetadata, not_ours
from maskrcnn.plugins.native import kernels_for
from maskrcnn.runtime.backends.base import Backend, TensorSpec
from maskrcnn.runtime.backends.onnxruntime_providers import (
    RECORD,
    GpuOptions,
    Placement,
    Provider,
    best_provider,
    placement_in,
    prepare,
    provider_chain,
    provider_named,
    unusable,
)
from maskrcnn.runtime.gpu.arrays import DeviceArray, as_device_array, is_on_device
from maskrcnn.runtime.gpu.images import ImageLoader, MaskPaster, resizes
from maskrcnn.runtime.gpu.memory import Cuda, MemoryPool, Room, as_before

# Inputs and outputs of an ONNX Runtime session, bound to memory of the host and of a GPU.


def _bind_host_input(binding: Any, name: str, value: Any) -> None:
    """Binds an array of the host; a GPU provider copies it."""
    binding.bind_cpu_input(name, np.ascontiguousarray(value))


def _bind_host_outputs(binding: Any, specs: Mapping[str, TensorSpec], batch: int) -> dict[str, np.ndarray]:
    """Binds all outputs to new arrays of the host, and returns these."""
    found = {name: np.empty(_with_batch(spec, batch), spec.dtype) for name, spec in specs.items()}
    for name, array in found.items():
        binding.bind_output(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
    return found


def gpu_binding(device: int, metadata: ModelMetadata) -> _GpuBinding | None:
    """The binding for a GPU, or None where cuda-bindings is not installed, or is newer than the driver."""
    try:
        cuda = Cuda(device)
    except UserError:
        return None
    return _GpuBinding(cuda, metadata)


class _GpuBinding:
    """A session's tensors on a GPU; any number of threads may use it.

    Args:
        cuda: the GPU.
        metadata: the model's.
    """

    def __init__(self, cuda: Cuda, metadata: ModelMetadata) -> None:
        self.cuda, self.stream = cuda, cuda.stream()
        major, minor = self.cuda.compute_capability
        kernels = kernels_for(10 * major + minor)
        self.preprocessing = metadata.preprocessing
        self.resizes = kernels is not None and resizes(metadata.preprocessing)
        self.paste = MaskPaster(kernels, self.cuda) if kernels is not None and metadata.has_masks else None
        self._loader = ImageLoader(kernels, self.cuda, metadata.preprocessing) if self.resizes else None
        self._images = Room(self.cuda)
        self._pools: dict[tuple[str, int], MemoryPool] = {}  # outputs by size, which follows from the batch's
        self._lock = threading.Lock()

    def infer(self, session: Any, outputs: Mapping[str, TensorSpec], feeds: Mapping[str, Any]) -> dict[str, Any]:
        """Runs a session; outputs are on the GPU where `images` is."""
        return self._run(session, outputs, feeds, lend=is_on_device(feeds["images"]))

    def run_images(
        self, session: Any, outputs: Mapping[str, TensorSpec], images: Sequence[np.ndarray]
    ) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """As `Backend.run_images`, with photos resized and padded on the GPU."""
        sizes, padded_hw = batch_sizes(images, self.preprocessing)
        image_sizes, shape = np.array(sizes, np.int64), (len(images), 3, *padded_hw)
        with self._lock, self.cuda.active():
            memory = self._images.at_least(4 * int(np.prod(shape)))
            batch = DeviceArray(memory.address, shape, np.float32, stream=self.stream, owner=memory)
            self._loader.fill(images, sizes, batch)
            feeds = {"images": batch, "image_sizes": image_sizes}
            return self._run(session, outputs, feeds, lend=False), image_sizes

    def _run(
        self, session: Any, outputs: Mapping[str, TensorSpec], feeds: Mapping[str, Any], *, lend: bool
    ) -> dict[str, Any]:
        batch = len(feeds["images"])
        with self.cuda.active():  # which ONNX Runtime chooses too, and leaves chosen
            binding = session.io_binding()
            kept = [self._bind_input(binding, name, value) for name, value in feeds.items()]
            found = self._bind_outputs(binding, outputs, batch) if lend else _bind_host_outputs(binding, outputs, batch)
            self.stream.synchronize()  # ONNX Runtime has streams of its own
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

    def _bind_outputs(self, binding: Any, specs: Mapping[str, TensorSpec], batch: int) -> dict[str, DeviceArray]:
        found = {name: self._new(name, _with_batch(spec, batch), spec.dtype) for name, spec in specs.items()}
        for name, array in found.items():
            binding.bind_output(name, "cuda", self.cuda.index, array.dtype, array.shape, array.address)
        return found

    def _new(self, name: str, shape: tuple[int, ...], dtype: Any) -> DeviceArray:
        nbytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
        pool = self._pools.setdefault((name, nbytes), MemoryPool(self.cuda, nbytes))
        loan = pool.lend(self.stream)
        return DeviceArray(loan.address, shape, dtype, stream=self.stream, owner=loan)


def _with_batch(spec: TensorSpec, batch: int) -> tuple[int, ...]:
    """The shape of an output, of which only the number of images is open."""
    return (batch, *(int(length) for length in spec.shape[1:]))


_DTYPES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(int64)": "int64",
    "tensor(int32)": "int32",
    "tensor(uint8)": "uint8",
}
_ON_GPU = (Provider.CUDA.full_name, Provider.TENSORRT.full_name)


class OnnxRuntimeBackend(Backend):
    """An exported file in ONNX Runtime, whose inlined functions stand for the custom ops.

    Inputs and outputs are bound, not passed: arrays on the GPU are read where they lie, and outputs are written into
    memory that is there already. Any number of threads may call it. Without cuda-bindings a GPU provider works on
    arrays of the host alone.

    Args:
        path: the ONNX file.
        provider: "cpu", "cuda" or "tensorrt", which must then work; by default CUDA where it works, else the CPU, with
            a remark where there is a GPU.
        gpu: how the GPU providers work.
        providers: instead, ONNX Runtime's own names in order of preference.
        threads: of the CPU provider; 0 leaves the choice to ONNX Runtime.

    Raises:
        UserError: for a file that cannot be used, or a provider that does not work here.
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
        try:
            import onnxruntime  # noqa: F401
        except ImportError as error:
            raise missing_library("onnxruntime", f"run {path}", "pip install onnxruntime-gpu") from error
        if not path.is_file():
            raise UserError(f"no file {path}", "an ONNX file", "check the path, or run `maskrcnn export --onnx`")
        self.path, self.gpu = path, gpu or GpuOptions()
        self._instrumented: tuple[tuple[str, ...], Any] | None = None
        self._threads, self._refusal = threads, ""
        self.session = self._session(provider, providers)
        text = self.session.get_modelmeta().custom_metadata_map.get(KEY)
        if text is None:
            raise not_ours(path, "an ONNX file without maskrcnn's metadata")
        self.metadata = ModelMetadata.from_json(text, path)
        self.precision = self.metadata.precision
        first = self.session.get_providers()[0]
        if first != Provider.CPU.full_name:
            self.name = f"ONNX Runtime {first.removesuffix('ExecutionProvider')}"
        self._inputs, self._outputs = _specs(self.session.get_inputs()), _specs(self.session.get_outputs())
        self._use(gpu_binding(self.gpu.device, self.metadata) if first in _ON_GPU else None)

    def _session(self, provider: str | None, providers: list[str] | None) -> Any:
        """The session by a provider that must work, by the best that does, or by ONNX Runtime's own choice."""
        if provider is not None:
            return self._session_by(provider_named(provider))
        if providers is not None:
            self._options = session_options(self._threads)
            return self._open(providers)
        best = best_provider()
        if best is Provider.CPU:
            return self._session_by(best)
        try:
            return self._session_by(best)
        except UserError as error:  # mostly a library that CUDA wants; what is wrong with the file is said once more
            found = self._session_by(Provider.CPU)
            self._refusal = f"on the CPU, though there is a GPU: {error.found}; {error.fix}"
            return found

    def _session_by(self, provider: Provider) -> Any:
        prepare(provider)
        self._options = session_options(self._threads)
        # Otherwise ONNX Runtime would print what fails and go on without it.
        chain, fallback = provider_chain(provider, self.gpu), {"enable_fallback": 0}
        if provider is Provider.CPU:
            return self._open(chain, **fallback)
        self._options.add_session_config_entry(RECORD, "1")
        try:
            session = self._open(chain, **fallback)
        except UserError as error:
            raise unusable(provider, str(error.__cause__)) from error
        if provider.full_name not in session.get_providers():
            raise unusable(provider, f"it uses {', '.join(session.get_providers())} instead")
        return session

    def _open(self, providers: list, **fallback: int) -> Any:
        import onnxruntime

        self._providers = providers
        try:
            with _gpu_kept(providers):
                return onnxruntime.InferenceSession(str(self.path), self._options, providers=providers, **fallback)
        except Exception as error:  # ONNX Runtime's own exceptions share no public base
            raise UserError(
                f"{self.path}: not a model that ONNX Runtime loads ({str(error)[:200]})",
                "a file of `maskrcnn export --onnx` without --tensorrt",
                "export it again; what is in bfloat16 runs with --backend openvino",
            ) from error

    def _use(self, on_gpu: _GpuBinding | None) -> None:
        self._on_gpu, self.takes_gpu_arrays = on_gpu, on_gpu is not None
        self.paste = on_gpu.paste if on_gpu is not None else None

    def describe(self) -> tuple[dict[str, TensorSpec], dict[str, TensorSpec]]:
        return self._inputs, self._outputs

    def infer(self, feeds: dict[str, Any]) -> dict[str, Any]:
        """Outputs by name, on the host, or, where `images` lies on the GPU, there, in memory of their own."""
        if self._on_gpu is not None:
            return self._on_gpu.infer(self.session, self._outputs, feeds)
        binding = self.session.io_binding()
        for name, value in feeds.items():
            _bind_host_input(binding, name, value)
        found = _bind_host_outputs(binding, self._outputs, len(feeds["images"]))
        self.session.run_with_iobinding(binding)
        return found

    def run_images(self, images: Sequence[np.ndarray]) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """As `Backend.run_images`; with a GPU and compiled kernels the photos are resized and padded there."""
        if self._on_gpu is None or not self._on_gpu.resizes:
            return super().run_images(images)
        return self._on_gpu.run_images(self.session, self._outputs, images)

    def remarks(self) -> list[str]:
        if self._refusal:
            return [f"ONNX Runtime {self._refusal}"]
        placement = self.placement()
        return [f"ONNX Runtime on {placement.text()}"] if placement else []

    def placement(self) -> Placement | None:
        """Which nodes the GPU provider left to the CPU; None on the CPU alone."""
        first = self.session.get_providers()[0]
        return None if first == Provider.CPU.full_name else placement_in(self.session, first)

    def stages(self, feeds: dict[str, np.ndarray], names: Sequence[str]) -> dict[str, np.ndarray]:
        if self._instrumented is None or self._instrumented[0] != tuple(names):
            self._instrumented = tuple(names), self._instrumented_session(names)
        session = self._instrumented[1]
        present = [output.name for output in session.get_outputs() if output.name in names]
        with _gpu_kept(session.get_providers()):
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
        with _gpu_kept(self._providers):
            return onnxruntime.InferenceSession(model.SerializeToString(), self._options, providers=self._providers)


def session_options(threads: int = 0):
    """Options of a session of any file; 0 threads leaves their number to ONNX Runtime."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3  # errors only; warnings name CUDA libraries a CPU machine lacks
    return options


def _gpu_kept(providers: Sequence[Any]) -> AbstractContextManager[None]:
    """Within it ONNX Runtime may leave the thread on its GPU, as it does."""
    names = [each if isinstance(each, str) else each[0] for each in providers]
    return as_before() if set(names) & set(_ON_GPU) else nullcontext()


def usable_providers() -> list[str]:
    """CUDA, prepared, where there is a GPU for it, and the CPU; ONNX Runtime's names, for a session of any file."""
    best = best_provider()
    prepare(best)
    return list(dict.fromkeys([best.full_name, Provider.CPU.full_name]))


def _specs(nodes) -> dict[str, TensorSpec]:
    return {
        node.name: TensorSpec(
            _DTYPES.get(node.type, node.type),
            tuple(length if isinstance(length, int) else None for length in node.shape),
        )
        for node in nodes
    }

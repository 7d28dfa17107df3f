"""Inputs and outputs of an ONNX Runtime session, bound to memory of the host and of a GPU."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from maskrcnn.errors import UserError
from maskrcnn.metadata import ModelMetadata
from maskrcnn.plugins.native import kernels_for
from maskrcnn.preprocess import batch_sizes
from maskrcnn.runtime.backend import TensorSpec
from maskrcnn.runtime.device.arrays import DeviceArray, as_device_array, is_on_device
from maskrcnn.runtime.device.images import ImageLoader, MaskPaster, resizes
from maskrcnn.runtime.device.memory import Cuda
from maskrcnn.runtime.device.pools import MemoryPool, Room


def bind_host_input(binding: Any, name: str, value: Any) -> None:
    """Binds an array of the host; a GPU provider copies it."""
    binding.bind_cpu_input(name, np.ascontiguousarray(value))


def bind_host_outputs(binding: Any, specs: Mapping[str, TensorSpec], batch: int) -> dict[str, np.ndarray]:
    """Binds all outputs to new arrays of the host, and returns these."""
    found = {name: np.empty(_with_batch(spec, batch), spec.dtype) for name, spec in specs.items()}
    for name, array in found.items():
        binding.bind_output(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
    return found


def gpu_binding(device: int, metadata: ModelMetadata) -> GpuBinding | None:
    """The binding for a GPU, or None where cuda-bindings is not installed, or is newer than the driver."""
    try:
        cuda = Cuda(device)
    except UserError:
        return None
    return GpuBinding(cuda, metadata)


class GpuBinding:
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
            found = self._bind_outputs(binding, outputs, batch) if lend else bind_host_outputs(binding, outputs, batch)
            self.stream.synchronize()  # ONNX Runtime has streams of its own
            session.run_with_iobinding(binding)
            binding.synchronize_outputs()
            kept.clear()
        return found

    def _bind_input(self, binding: Any, name: str, value: Any) -> Any:
        if not is_on_device(value):
            bind_host_input(binding, name, value)
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

"""TensorRT backend: runs engines of `maskrcnn build-engine --target tensorrt`, without PyTorch."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from queue import Empty, LifoQueue
from typing import Any

import numpy as np

from maskrcnn.errors import UserError
from maskrcnn.imaging.postprocess import Paste
from maskrcnn.imaging.preprocess import batch_images, batch_sizes
from maskrcnn.plugins.native import kernels_for
from maskrcnn.runtime.backends.base import Backend, Specs
from maskrcnn.runtime.backends.tensorrt_engine import Binding, ExecutionContexts, Shape, load_plan
from maskrcnn.runtime.gpu.arrays import as_device_array, is_on_device
from maskrcnn.runtime.gpu.images import ImageLoader, MaskPaster, are_bytes, resizes_on_gpu


class TensorRtBackend(Backend):
    """A TensorRT engine on one GPU. Any number of threads may call it.

    Args:
        path: path of the plan `X.engine`, with `X.engine.json` in the same folder.
        device: CUDA's index of the GPU.
        graphs: run each input shape as a CUDA graph from the second run on.
        contexts: number of calls that run at the same time, each with its own stream and memory. Other calls wait.
        shapes: number of input shapes for which each of them keeps execution contexts.

    Raises:
        UserError: if something is missing, or the engine was built for another machine.
    """

    name = "TensorRT"
    takes_gpu_arrays = True

    def __init__(
        self, path: Path, *, device: int = 0, graphs: bool = True, contexts: int = 1, shapes: int = 16
    ) -> None:
        if contexts < 1 or shapes < 1:
            raise UserError(f"contexts {contexts}, shapes {shapes}", "at least 1 of each", "leave them out")
        self.plan = load_plan(path, device)
        self.cuda = self.plan.cuda
        self.metadata = self.plan.metadata
        self.precision = self.metadata.precision
        self._graphs, self._max_contexts, self._shapes = graphs, contexts, shapes
        self._kernels = kernels_for(self.cuda.arch)
        self._resizes_on_gpu = self._kernels is not None and resizes_on_gpu(self.metadata.preprocessing)
        self._paster: MaskPaster | None = None
        if self._kernels is not None and self.metadata.has_masks:
            self._paster = MaskPaster(self._kernels, self.cuda)
        self.paste: Paste | None = self._paster
        self._contexts: list[ExecutionContexts] = []
        self._idle: LifoQueue[ExecutionContexts] = LifoQueue()  # last in, first out: most likely has the shape
        self._lock = threading.Lock()
        self._idle.put(self._new_contexts())

    def describe(self) -> tuple[Specs, Specs]:
        return self.plan.inputs, self.plan.outputs

    def infer(self, feeds: dict[str, Any]) -> dict[str, Any]:
        """Returns outputs on the host, or in new GPU memory if `images` is on the GPU.

        On return the GPU no longer uses the inputs, and the outputs are complete.
        """
        on_gpu = is_on_device(feeds["images"])
        with self.acquire() as contexts:
            binding = self._bind(contexts, feeds)
            outputs = binding.run(own_outputs=on_gpu)
            if not on_gpu:
                return binding.fetch()
            binding.wait()
            return outputs

    def infer_timed(self, feeds: dict[str, np.ndarray]) -> tuple[dict[str, np.ndarray], dict[str, float]]:
        """Returns outputs on the host, and milliseconds of `copy in`, `engine` and `copy out` on the GPU."""
        with self.acquire() as contexts:
            contexts.bind(_shape_of(feeds))  # creates an execution context for a new shape, which must not be timed
            marks = [self.cuda.event(timing=True) for _ in range(4)]
            contexts.stream.record(marks[0])
            binding = self._bind(contexts, feeds)
            contexts.stream.record(marks[1])
            binding.run()
            contexts.stream.record(marks[2])
            binding.download()
            contexts.stream.record(marks[3])
            outputs = binding.downloaded()
        parts = ("copy in", "engine", "copy out")
        return outputs, {part: a.milliseconds(b) for part, (a, b) in zip(parts, pairwise(marks), strict=True)}

    def run_images(self, images: Sequence[np.ndarray]) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """Does the same as `Backend.run_images`, but pads a batch that fits no profile to a larger shape that fits.

        Resizes and pads on the GPU if there are compiled kernels.
        """
        sizes, (height, width) = batch_sizes(images, self.metadata.preprocessing)
        image_sizes = np.array(sizes, np.int64)
        shape = self.plan.padded_shape((len(images), height, width))
        # The CPU does its part before it acquires a context.
        on_gpu = self._resizes_on_gpu and are_bytes(images)
        pixels = None if on_gpu else batch_images(images, self.metadata.preprocessing)[0]
        with self.acquire() as contexts:
            binding = contexts.bind(shape)
            if pixels is not None:
                binding.put("images", pixels)
            elif contexts.loader is not None:
                contexts.loader.fill(images, sizes, binding.input("images"))
            binding.put("image_sizes", image_sizes)
            binding.run()
            return binding.fetch(len(images)), image_sizes

    @contextmanager
    def acquire(self) -> Iterator[ExecutionContexts]:
        """Reserves a stream and its execution contexts for the calling thread; waits while all are in use.

        This allows inference without any copy: `binding = contexts.bind((batch, height, width))`, write
        `binding.input("images")` on `contexts.stream`, `binding.run()`, and read its outputs before the block ends.
        """
        contexts = self._take_contexts()
        try:
            with self.cuda.active():
                yield contexts
        finally:
            self._idle.put(contexts)

    def close(self) -> None:
        """Frees all memory. No call may be running, and the backend cannot be used afterwards."""
        for contexts in self._contexts:
            contexts.close()
        self._contexts.clear()
        if self._paster is not None:
            self._paster.close()
        self._paster = self.paste = None

    def remarks(self) -> list[str]:
        refusals = self.graph_refusals().items()
        return [f"no CUDA graph for {n} of {height}×{width}: {why}" for (n, height, width), why in refusals]

    def graph_refusals(self) -> dict[Shape, str]:
        """Returns input shapes that could not be captured as a CUDA graph, and why."""
        # Copies, because other threads may add contexts and bindings meanwhile.
        bindings = (item for contexts in list(self._contexts) for item in list(contexts.bindings.items()))
        return {shape: binding.graph_refusal for shape, binding in bindings if binding.graph_refusal}

    def _take_contexts(self) -> ExecutionContexts:
        with self._lock:
            with suppress(Empty):
                return self._idle.get_nowait()
            if len(self._contexts) < self._max_contexts:
                return self._new_contexts()
        return self._idle.get()

    def _new_contexts(self) -> ExecutionContexts:
        loader = None
        if self._kernels is not None and self._resizes_on_gpu:
            loader = ImageLoader(self._kernels, self.cuda, self.metadata.preprocessing)
        contexts = ExecutionContexts(self.plan, graphs=self._graphs, shapes=self._shapes, loader=loader)
        self._contexts.append(contexts)
        return contexts

    def _bind(self, contexts: ExecutionContexts, feeds: dict[str, Any]) -> Binding:
        """The binding for the feeds' shape, with the feeds as its inputs."""
        binding = contexts.bind(_shape_of(feeds))
        for name, value in feeds.items():
            on_gpu = is_on_device(value)
            binding.put(name, as_device_array(value, self.cuda, contexts.stream) if on_gpu else np.asarray(value))
        return binding


def _shape_of(feeds: dict[str, Any]) -> Shape:
    batch, _, height, width = feeds["images"].shape
    return batch, height, width

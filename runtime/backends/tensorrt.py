"""TensorRT as a backend: engines of `maskrcnn build-engine --target tensorrt`, without PyTorch."""

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
from maskrcnn.imaging.preprocess import batch_images, batch_sizes
from maskrcnn.plugins.native import kernels_for
from maskrcnn.runtime.backends.base import Backend, TensorSpec
from maskrcnn.runtime.backends.tensorrt_engine import Bound, Lane, Shape, load_plan
from maskrcnn.runtime.gpu.arrays import as_device_array, is_on_device
from maskrcnn.runtime.gpu.images import ImageLoader, MaskPaster, resizes

_SHAPES = 16  # input shapes whose contexts and graphs are kept, in each lane


class TensorRtBackend(Backend):
    """A TensorRT engine on one GPU; any number of threads may call it.

    Args:
        path: the plan, `X.engine`, beside its `X.engine.json`.
        device: the GPU, as CUDA counts them.
        graphs: run each input shape as a CUDA graph from its second run on.
        contexts: how many calls run at the same time, each with a stream and memory of its own; further ones wait.
        shapes: how many input shapes to keep ready, for each of them.

    Raises:
        UserError: where something is missing, or the engine was built for another machine.
    """

    name = "TensorRT"
    takes_gpu_arrays = True

    def __init__(
        self, path: Path, *, device: int = 0, graphs: bool = True, contexts: int = 1, shapes: int = _SHAPES
    ) -> None:
        if contexts < 1 or shapes < 1:
            raise UserError(f"contexts {contexts}, shapes {shapes}", "at least 1 of each", "leave them out")
        self.plan = load_plan(path, device)
        self.cuda = self.plan.cuda
        self.metadata = self.plan.metadata
        self.precision = self.metadata.precision
        self._options = {"graphs": graphs, "shapes": shapes}
        major, minor = self.cuda.compute_capability
        self._kernels = kernels_for(10 * major + minor)
        self._resizes = self._kernels is not None and resizes(self.metadata.preprocessing)
        if self._kernels is not None and self.metadata.has_masks:
            self.paste = MaskPaster(self._kernels, self.cuda)
        self._lanes: list[Lane] = []
        self._loaders: dict[Lane, ImageLoader] = {}
        self._idle: LifoQueue[Lane] = LifoQueue()  # the one used last first, whose shapes are the likeliest
        self._contexts = contexts
        self._lock = threading.Lock()
        self._idle.put(self._add_lane())

    def describe(self) -> tuple[dict[str, TensorSpec], dict[str, TensorSpec]]:
        return self.plan.inputs, self.plan.outputs

    def infer(self, feeds: dict[str, Any]) -> dict[str, Any]:
        """Outputs by name, on the host, or, where `images` lies on the GPU, there, in memory of their own.

        Either way the GPU is done with inputs and outputs when this returns.
        """
        lend = is_on_device(feeds["images"])
        with self.lane() as lane:
            bound = self._put(lane, feeds)
            outputs = bound.run(lend=lend)
            if not lend:
                return bound.fetch()
            bound.wait()
            return outputs

    def infer_timed(self, feeds: dict[str, np.ndarray]) -> tuple[dict[str, np.ndarray], dict[str, float]]:
        """Outputs for arrays of the host, and the milliseconds of `copy in`, `engine` and `copy out` on the GPU."""
        with self.lane() as lane:
            lane.bind(_shape_of(feeds))  # which may take long the first time
            marks = [self.cuda.event(timing=True) for _ in range(4)]
            lane.stream.record(marks[0])
            bound = self._put(lane, feeds)
            lane.stream.record(marks[1])
            bound.run()
            lane.stream.record(marks[2])
            bound.download()
            lane.stream.record(marks[3])
            found = bound.downloaded()
        parts = ("copy in", "engine", "copy out")
        return found, {part: a.milliseconds(b) for part, (a, b) in zip(parts, pairwise(marks), strict=True)}

    def run_images(self, images: Sequence[np.ndarray]) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """As `Backend.run_images`; a batch that no profile takes is padded to one that is larger.

        With compiled kernels the photos themselves go to the GPU, and are resized and padded there.
        """
        sizes, (height, width) = batch_sizes(images, self.metadata.preprocessing)
        image_sizes = np.array(sizes, np.int64)
        shape = self.plan.roomy_shape((len(images), height, width))
        # What the CPU has to do is done before the GPU is held.
        pixels = None if self._resizes else batch_images(images, self.metadata.preprocessing)[0]
        with self.lane() as lane:
            bound = lane.bind(shape)
            if pixels is None:
                self._loaders[lane].fill(images, sizes, bound.input("images"))
            else:
                bound.put("images", pixels)
            bound.put("image_sizes", image_sizes)
            bound.run()
            return bound.fetch(len(images)), image_sizes

    @contextmanager
    def lane(self) -> Iterator[Lane]:
        """A stream and contexts for the calling thread alone; waits where all are in use.

        This is the way without any copy: `bound = lane.bind((batch, height, width))`, write `bound.input("images")` on
        `lane.stream`, `bound.run()`, read what it returns, all before the block ends.
        """
        lane = self._take_lane()
        try:
            with self.cuda.active():
                yield lane
        finally:
            self._idle.put(lane)

    def close(self) -> None:
        """Gives all memory back; nothing may be running, and nothing can run afterwards."""
        for each in (*self._loaders.values(), *self._lanes, self.paste):
            if each is not None:
                each.close()
        self._lanes.clear()
        self._loaders.clear()
        self.paste = None

    def remarks(self) -> list[str]:
        refusals = self.graph_refusals().items()
        return [f"no CUDA graph for {n} of {height}×{width}: {why}" for (n, height, width), why in refusals]

    def graph_refusals(self) -> dict[tuple[int, int, int], str]:
        """Input shapes that run without a graph although one was wanted, and why."""
        bound = (entry for lane in self._lanes for entry in lane.bound.items())
        return {shape: each.why_no_graph for shape, each in bound if each.why_no_graph}

    def _take_lane(self) -> Lane:
        with self._lock:
            with suppress(Empty):
                return self._idle.get_nowait()
            if len(self._lanes) < self._contexts:
                return self._add_lane()
        return self._idle.get()

    def _add_lane(self) -> Lane:
        lane = Lane(self.plan, self.cuda, **self._options)
        self._lanes.append(lane)
        if self._resizes:
            self._loaders[lane] = ImageLoader(self._kernels, self.cuda, self.metadata.preprocessing)
        return lane

    def _put(self, lane: Lane, feeds: dict[str, Any]) -> Bound:
        """The engine with the feeds given to it."""
        bound = lane.bind(_shape_of(feeds))
        for name, value in feeds.items():
            on_device = is_on_device(value)
            bound.put(name, as_device_array(value, self.cuda, lane.stream) if on_device else np.asarray(value))
        return bound


def _shape_of(feeds: dict[str, Any]) -> Shape:
    batch, _, height, width = feeds["images"].shape
    return batch, height, width

"""A model on a GPU as CUDA graphs, one for each input shape: the whole model is started at once.

That is possible because nothing in the model waits for the GPU and no shape depends on a value. It pays where starting
some thousand kernels takes the host longer than running them takes the GPU: small batches, half precision.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

Outputs = dict[str, Tensor]
Run = Callable[[Tensor, Tensor], Outputs]
_WARM_UPS = 2  # runs on a side stream before the capture, in which libraries choose their kernels


class GraphedModel:
    """A function of images and their sizes, captured at the second call with a shape.

    It may be called on any stream, also on several, as long as one call follows the other.

    Args:
        run: the model, or what `torch.compile` made of it; its tensors are on one GPU.
        shapes: how many graphs to keep; the one not used for longest goes.
    """

    def __init__(self, run: Run, *, shapes: int = 8) -> None:
        self.run, self.shapes = run, shapes
        self._calls: OrderedDict[tuple, Run | None] = OrderedDict()  # by shape, the newest last; None: seen once
        self._pool: tuple | None = None  # memory that the graphs share, as only one runs and its results are copied
        self._side: torch.cuda.Stream | None = None  # where all are captured; on others they would not share memory
        self._done: torch.cuda.Event | None = None  # behind the newest use of the graphs' memory, on whatever stream

    def __call__(self, images: Tensor, image_sizes: Tensor) -> Outputs:
        """The outputs, in memory of their own.

        Args:
            images: `[N, 3, H, W]` on the GPU.
            image_sizes: `[N, 2]` on the GPU.
        """
        key = tuple(images.shape), images.dtype
        if key not in self._calls:
            self._make_room()
            self._calls[key] = None
            return self.run(images, image_sizes)
        self._calls.move_to_end(key)
        with self._in_turn(images.device):
            replay = self._calls[key]
            if replay is None:
                replay = self._calls[key] = self._capture(images, image_sizes)
            return {name: value.clone() for name, value in replay(images, image_sizes).items()}

    @property
    def captured(self) -> int:
        """How many shapes have a graph."""
        return sum(replay is not None for replay in self._calls.values())

    def _make_room(self) -> None:
        while len(self._calls) >= self.shapes:
            if self._done is not None:
                self._done.synchronize()  # it may be running, and its inputs are freed with it
            self._calls.popitem(last=False)

    @contextmanager
    def _in_turn(self, device: torch.device) -> Iterator[None]:
        """What is started within begins after what was started in here before, though it be on another stream."""
        stream = torch.cuda.current_stream(device)
        if self._done is None:
            self._done = torch.cuda.Event()
        else:
            stream.wait_event(self._done)
        try:
            yield
        finally:
            self._done.record(stream)

    def _capture(self, images: Tensor, image_sizes: Tensor) -> Run:
        """What copies its arguments to where the graph reads them, and starts it."""
        given = images.clone(memory_format=torch.preserve_format), image_sizes.clone()
        self._side = self._side or torch.cuda.Stream(images.device)
        self._side.wait_stream(torch.cuda.current_stream(images.device))
        with torch.cuda.stream(self._side):
            for _ in range(_WARM_UPS):
                self.run(*given)
        torch.cuda.current_stream(images.device).wait_stream(self._side)
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        # PyTorch's own stream for it is on whatever GPU was the first to capture. Other threads may allocate meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._side, capture_error_mode="thread_local"):
            found = self.run(*given)

        def replay(images: Tensor, image_sizes: Tensor) -> Outputs:
            given[0].copy_(images)
            given[1].copy_(image_sizes)
            graph.replay()
            return found

        return replay

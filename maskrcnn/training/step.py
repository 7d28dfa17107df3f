"""One optimizer step, which neither synchronises with the device nor branches on a value."""

from __future__ import annotations

import contextlib
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from maskrcnn.config import LossConfig, TrainConfig
from maskrcnn.errors import UserError
from maskrcnn.model.detector import MaskRCNN
from maskrcnn.model.losses import CountMean
from maskrcnn.training.distributed import Processes
from maskrcnn.training.loader import Batch, collate
from maskrcnn.training.optimizer import AveragedWeights
from maskrcnn.training.samples import Sample, TrainingSamples

# By default, oneDNN keeps 1024 compiled primitives, enough for about 25 image sizes; multi-scale training fills that. A
# step uses about 100 of them, at most half of which depend on the size; without any, a step takes 1.5 times as long.
# Read when oneDNN is first used.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "256")

_EAGER_STEPS = 2  # steps with a shape before its capture, in which libraries select their kernels
_MAX_GRAPHS = 16
_MAX_PENDING = 8  # steps queued on the device before the host waits for the oldest
AUTOCAST = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class _Losses(nn.Module):
    """The losses as a module's forward, as required by `DistributedDataParallel`."""

    def __init__(self, model: MaskRCNN, loss: LossConfig, processes: Processes) -> None:
        super().__init__()
        self.model, self.loss, self.processes = model, loss, processes

    def forward(
        self, images: Tensor, image_sizes: Tensor, truth: dict[str, Tensor], mean_count: CountMean | None = None
    ) -> dict[str, Tensor]:
        return self.model.losses(images, image_sizes, truth, self.loss, mean_count or self.processes.mean)


class Step:
    """Forward, backward, clipping and update for one batch of images.

    A step with a non-finite loss or gradient changes neither weights, nor optimizer state, nor batch norm statistics.
    This is decided on the device and reported in the metrics.

    Args:
        model: in training mode.
        optimizer: fused, see `maskrcnn.training.optimizer.make_optimizer`.
        config: configuration of the run.
        device: device of the model.
        precision: "fp32", "bf16" or "fp16".
        processes: processes that train together.
        averaged: moving average to update, if any.
    """

    def __init__(
        self,
        model: MaskRCNN,
        optimizer: Optimizer,
        config: TrainConfig,
        device: torch.device,
        precision: str,
        processes: Processes | None = None,
        averaged: AveragedWeights | None = None,
    ) -> None:
        self.model, self.optimizer, self.config = model, optimizer, config
        self.device, self.autocast_dtype, self.averaged = device, AUTOCAST[precision], averaged
        self.processes = processes or Processes()
        self.losses: nn.Module = _Losses(model, config.loss, self.processes)
        if self.processes.world_size > 1:
            self.losses = DistributedDataParallel(
                self.losses, device_ids=[device.index] if device.type == "cuda" else None, gradient_as_bucket_view=True
            )
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        norms = (m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm))
        self.statistics = [b for norm in norms if norm.training for b in norm.buffers()]
        self.graphs = StepGraphs(self._take, optimizer, device) if config.cuda_graphs else None

    def run(self, parts: Sequence[Batch]) -> dict[str, Tensor]:
        """Take the step; with `config.cuda_graphs`, as a CUDA graph if captured, see `StepGraphs`.

        Several parts, of equally many images, give the same step as one batch: each loss is divided by its count over
        all parts, which a forward pass without gradients finds first. Batch norm statistics remain those of each part.

        Args:
            parts: gradient accumulation steps of the batch, on any device.

        Returns:
            scalars on the device, equal in every process: each loss over all parts and processes, their sum `loss`,
            `gradient_norm` before clipping, `finite`, 1 if the step was taken and 0 if it was skipped, and
            `nonfinite_part`, the first part whose loss is not finite (parts of the first process first), else -1.
            Scalars of a graph are overwritten by the next step.
        """
        return self._take(parts) if self.graphs is None else self.graphs.run(parts[0])

    def _take(self, parts: Sequence[Batch]) -> dict[str, Tensor]:
        before = [statistic.clone() for statistic in self.statistics]
        counts = self._mean_counts(parts) if len(parts) > 1 else None
        self.optimizer.zero_grad(set_to_none=True)
        found: list[dict[str, Tensor]] = []
        for number, part in enumerate(parts, start=1):
            with self._without_exchange(number < len(parts)):
                losses = self._losses_of(self.losses, part, None if counts is None else _replay(counts))
                total = torch.stack(list(losses.values())).sum()
                self.scaler.scale(total / len(parts)).backward()
            found.append({name: value.detach() for name, value in {"loss": total, **losses}.items()})
        values = torch.stack([torch.stack(list(each.values())) for each in found]).float()  # [parts, losses]
        values = self.processes.stacked(values)
        metrics = dict(zip(found[0], values.mean(dim=0).unbind(), strict=True))
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        # An infinite loss may have a finite gradient; with a nonfinite gradient, fp16's scaler also skips the step.
        gradients[0].add_(torch.where(torch.isfinite(metrics["loss"]), 0.0, torch.nan))
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.get_total_norm(gradients)
        if self.config.clip_gradient_norm:
            nn.utils.clip_grads_with_norm_(self.parameters, self.config.clip_gradient_norm, norm)
        finite = torch.isfinite(norm)
        self._update(finite)
        for statistic, old in zip(self.statistics, before, strict=True):
            statistic.copy_(torch.where(finite, statistic, old))
        if self.averaged is not None:
            self.averaged.update(finite)
        is_bad = ~torch.isfinite(values[:, 0])
        first_bad = torch.where(is_bad.any(), is_bad.int().argmax(), -1)
        return {**metrics, "gradient_norm": norm, "finite": finite, "nonfinite_part": first_bad}

    def _losses_of(self, losses: nn.Module, part: Batch, mean_count: CountMean | None = None) -> dict[str, Tensor]:
        part = part.to(self.device)
        images = part.images.contiguous(memory_format=torch.channels_last)
        with torch.autocast(self.device.type, dtype=self.autocast_dtype, enabled=self.autocast_dtype is not None):
            found: dict[str, Tensor] = losses(images, part.image_sizes, part.truth(), mean_count)
        return found

    @torch.no_grad()
    def _mean_counts(self, parts: Sequence[Batch]) -> list[Tensor]:
        """The counts that the losses are divided by, in the order of their use, averaged over all parts."""
        statistics = [statistic.clone() for statistic in self.statistics]
        whole = self.losses.module if isinstance(self.losses, DistributedDataParallel) else self.losses
        counts: list[list[Tensor]] = []

        def kept(count: Tensor) -> Tensor:
            counts[-1].append(count)
            return count

        for part in parts:
            counts.append([])
            self._losses_of(whole, part, kept)
            for statistic, old in zip(self.statistics, statistics, strict=True):
                statistic.copy_(old)
        mean = torch.stack([torch.stack(own) for own in counts]).mean(dim=0)
        return list(self.processes.mean(mean).unbind())

    def _without_exchange(self, more_parts: bool) -> AbstractContextManager[None]:
        """Defers the exchange of gradients between processes until the last part."""
        if more_parts and isinstance(self.losses, DistributedDataParallel):
            return self.losses.no_sync()
        return contextlib.nullcontext()

    def _update(self, finite: Tensor) -> None:
        if self.scaler.is_enabled():
            self.scaler.step(self.optimizer)
            self.scaler.update()
            return
        if self.device.type == "mps":  # its fused optimizers cannot skip a step
            if bool(finite):
                self.optimizer.step()
            return
        # The fused optimizers read these attributes, which GradScaler sets too, and skip the step on the device.
        vars(self.optimizer).update(grad_scale=None, found_inf=(~finite).float())
        self.optimizer.step()


@dataclass
class _GraphedShape:
    """Buffers and graph for one batch shape."""

    inputs: Batch  # on the device
    steps: int = 0  # steps before the capture
    graph: torch.cuda.CUDAGraph | None = None
    metrics: dict[str, Tensor] = field(default_factory=dict)  # overwritten at each replay

    def load(self, batch: Batch) -> None:
        """Copy a batch to the inputs."""
        for name, value in vars(batch).items():
            if isinstance(value, Tensor):
                place = getattr(self.inputs, name)
                if place.shape == value.shape:
                    place.copy_(value, non_blocking=True)
                else:
                    place.zero_()[:, : value.shape[1]].copy_(value, non_blocking=True)
        self.inputs.image_ids = batch.image_ids


class StepGraphs:
    """Runs steps as CUDA graphs, one per batch shape, captured at the third step with that shape.

    A step launches several thousand kernels; if launching takes longer than running them (small images, small batches),
    a graph is faster. Capture is possible because a step never synchronises and none of its shapes depends on a value.
    The number of objects is padded to a power of two, so that batches of images of one size share few graphs. The first
    16 shapes get a graph each, others none; their memory is shared.

    Args:
        take: the step on parts of a batch; its tensors are on one GPU.
        optimizer: fused; reads its learning rates from the device during steps.
        device: the GPU.
    """

    def __init__(
        self, take: Callable[[Sequence[Batch]], dict[str, Tensor]], optimizer: Optimizer, device: torch.device
    ) -> None:
        self._take, self._optimizer, self._device = take, optimizer, device
        self._shapes: dict[tuple[Any, ...], _GraphedShape] = {}
        self._rates = [torch.zeros((), device=device) for _ in optimizer.param_groups]
        self._pool: Any = None  # one graph runs at a time
        self._side: torch.cuda.Stream | None = (
            None  # stream of all captures: graphs of different streams share no memory
        )

    def run(self, batch: Batch) -> dict[str, Tensor]:
        """Takes a step; returns metrics as in `Step.run`.

        Args:
            batch: batch on any device.
        """
        objects = max(8, 1 << (batch.valid.shape[1] - 1).bit_length())
        key = (tuple(batch.images.shape), batch.images.dtype, objects)
        shape = self._shapes.get(key)
        if shape is None:
            if len(self._shapes) == _MAX_GRAPHS:
                return self._take([batch])
            shape = self._shapes[key] = _GraphedShape(_inputs_like(batch, objects, self._device))
        shape.load(batch)
        if shape.steps < _EAGER_STEPS:
            shape.steps += 1
            return self._take([shape.inputs])
        for rate, group in zip(self._rates, self._optimizer.param_groups, strict=True):
            rate.fill_(group["lr"])
        if shape.graph is None:
            shape.graph, shape.metrics = self._capture(shape.inputs)
        shape.graph.replay()
        return shape.metrics

    @property
    def captured(self) -> int:
        """Number of shapes that have a graph."""
        return sum(shape.graph is not None for shape in self._shapes.values())

    def _capture(self, inputs: Batch) -> tuple[torch.cuda.CUDAGraph, dict[str, Tensor]]:
        self._side = self._side or torch.cuda.Stream(self._device)
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        # Other threads (of the data loader) may allocate page-locked memory at the same time.
        with self._rates_from_device(), torch.cuda.graph(
            graph, pool=self._pool, stream=self._side, capture_error_mode="thread_local"
        ):  # fmt: skip
            metrics = self._take([inputs])
        return graph, metrics

    @contextlib.contextmanager
    def _rates_from_device(self) -> Iterator[None]:
        """Passes the optimizer its learning rates as tensors: numbers would be constants in the graph."""
        groups = self._optimizer.param_groups
        before = [dict(group) for group in groups]
        for group, rate in zip(groups, self._rates, strict=True):
            group.update({"lr": rate} | ({"capturable": True} if "capturable" in group else {}))
        try:
            yield
        finally:
            for group, old in zip(groups, before, strict=True):
                group.update(old)


def _inputs_like(batch: Batch, objects: int, device: torch.device) -> Batch:
    """A batch of the same shape on a device, for a number of objects per image."""
    values = {name: value for name, value in vars(batch).items() if isinstance(value, Tensor)}
    for name, value in values.items():
        per_object = name not in ("images", "image_sizes", "seeds")
        sizes = (len(value), objects, *value.shape[2:]) if per_object else value.shape
        values[name] = torch.zeros(sizes, dtype=value.dtype, device=device)
    return Batch(**values, image_ids=batch.image_ids)


@torch.no_grad()
def validation_losses(
    model: MaskRCNN, samples: TrainingSamples, indices: Sequence[int], *, batch_size: int, loss: LossConfig
) -> dict[str, float]:
    """Sums of the losses over samples, each image counted with the mean of its batch, in single precision.

    Args:
        model: in evaluation mode.
        samples: not augmented; the seed and epoch 0 determine the sampled anchors and RoIs.
        indices: samples to use.
        batch_size: images per batch.
        loss: matching, sampling and loss constants.

    Raises:
        UserError: if an image cannot be read.
    """
    device = next(model.parameters()).device
    sums: dict[str, float] = {}
    for start in range(0, len(indices), batch_size):
        chunk = [samples[0, index] for index in indices[start : start + batch_size]]
        for error in chunk:
            if isinstance(error, UserError):
                raise error
        batch = collate([each for each in chunk if isinstance(each, Sample)], samples.preprocessing.divisor).to(device)
        for name, value in model.losses(batch.images, batch.image_sizes, batch.truth(), loss).items():
            sums[name] = sums.get(name, 0.0) + float(value) * len(chunk)
    return sums


def _replay(counts: list[Tensor]) -> CountMean:
    """A `mean_count` that returns these counts one after another."""
    left = iter(counts)
    return lambda count: next(left)


class PendingMetrics:
    """Queue of step metrics that are read once the device has computed them.

    On a GPU the metrics are copied to the host asynchronously and become available some steps later; on a CPU
    immediately.
    """

    def __init__(self) -> None:
        self._pending: deque[tuple[Any, list[str], Tensor, torch.cuda.Event | None]] = deque()

    def push(self, tag: Any, metrics: dict[str, Tensor]) -> None:
        """Queue the scalars of a step; `tag` is returned with their values."""
        values = torch.stack([value.detach().float() for value in metrics.values()])
        event = None
        if values.device.type == "cuda":
            host = torch.empty(values.shape, pin_memory=True)
            host.copy_(values, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
            values = host
        self._pending.append((tag, list(metrics), values, event))

    def pop(self, *, wait: bool = False) -> list[tuple[Any, dict[str, float]]]:
        """Tags and metrics of the finished steps, in order; with `wait`, of all queued steps."""
        done = []
        while self._pending:
            tag, names, values, event = self._pending[0]
            if event is not None and not event.query():
                if not wait and len(self._pending) <= _MAX_PENDING:
                    break
                event.synchronize()
            self._pending.popleft()
            done.append((tag, dict(zip(names, values.tolist(), strict=True))))
        return done

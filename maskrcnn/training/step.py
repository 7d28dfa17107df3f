"""One optimizer step. Nothing in it synchronises with the device or branches on a value."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from maskrcnn.config import LossConfig, TrainConfig
from maskrcnn.model.detector import MaskRCNN
from maskrcnn.training.distributed import Processes
from maskrcnn.training.loader import Batch
from maskrcnn.training.optimizer import AveragedWeights

_MAX_PENDING = 8  # steps queued on the device before the host waits for the oldest
AUTOCAST = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class _Losses(nn.Module):
    """The losses as the forward of a module, as `DistributedDataParallel` requires."""

    def __init__(self, model: MaskRCNN, loss: LossConfig, processes: Processes) -> None:
        super().__init__()
        self.model, self.loss, self.processes = model, loss, processes

    def forward(self, images: Tensor, image_sizes: Tensor, truth: dict[str, Tensor]) -> dict[str, Tensor]:
        return self.model.losses(images, image_sizes, truth, self.loss, self.processes.mean)


class Step:
    """Forward, backward, clipping and update for one batch of images.

    A step with a non-finite loss or gradient changes neither weights, nor optimizer state, nor batch norm statistics.
    This is decided on the device and reported in the metrics.

    Args:
        model: in training mode.
        optimizer: fused, see `maskrcnn.training.optimizer.make_optimizer`.
        config: of the run.
        device: of the model.
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
        self.losses: nn.Module = _Losses(model, config.loss, processes or Processes())
        if processes is not None and processes.world_size > 1:
            self.losses = DistributedDataParallel(
                self.losses, device_ids=[device.index] if device.type == "cuda" else None, gradient_as_bucket_view=True
            )
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        norms = (m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm))
        self.statistics = [b for norm in norms if norm.training for b in norm.buffers()]

    def run(self, parts: Sequence[Batch]) -> dict[str, Tensor]:
        """Take the step.

        Args:
            parts: gradient accumulation steps of the batch, on any device.

        Returns:
            scalars on the device: each loss averaged over the parts, their sum `loss`, `gradient_norm` before clipping,
            and `finite`, 1 if the step was taken and 0 if it was skipped.
        """
        before = [statistic.clone() for statistic in self.statistics]
        self.optimizer.zero_grad(set_to_none=True)
        metrics: dict[str, Tensor] = {}
        for number, part in enumerate(parts, start=1):
            with self._without_exchange(number < len(parts)):
                losses = self._losses_of(part)
                total = torch.stack(list(losses.values())).sum() / len(parts)
                self.scaler.scale(total).backward()
            for name, value in {"loss": total * len(parts), **losses}.items():
                metrics[name] = metrics.get(name, 0) + value.detach() / len(parts)
        self.scaler.unscale_(self.optimizer)
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        if self.config.clip_gradient_norm:
            nn.utils.clip_grads_with_norm_(self.parameters, self.config.clip_gradient_norm, norm)
        finite = torch.isfinite(metrics["loss"]) & torch.isfinite(norm)
        self._update(finite)
        for statistic, old in zip(self.statistics, before, strict=True):
            statistic.copy_(torch.where(finite, statistic, old))
        if self.averaged is not None:
            self.averaged.update()
        return {**metrics, "gradient_norm": norm, "finite": finite}

    def _losses_of(self, part: Batch) -> dict[str, Tensor]:
        part = part.to(self.device)
        images = part.images.contiguous(memory_format=torch.channels_last)
        with torch.autocast(self.device.type, dtype=self.autocast_dtype, enabled=self.autocast_dtype is not None):
            return self.losses(images, part.image_sizes, part.truth())

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
        # The fused optimizers read these attributes, which GradScaler sets too, and skip the step on the device.
        vars(self.optimizer).update(grad_scale=None, found_inf=(~finite).float())
        self.optimizer.step()


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
        """Tags and metrics of the finished steps, in order; with `wait` of all steps pushed."""
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

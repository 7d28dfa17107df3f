"""One optimizer step. Nothing in it waits for the device or branches on a value."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from maskrcnn.config import LossConfig, TrainConfig
from maskrcnn.model.detector import MaskRCNN
from maskrcnn.training.distributed import Processes
from maskrcnn.training.loader import Batch
from maskrcnn.training.optimizer import AveragedWeights

AUTOCAST = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class _Losses(nn.Module):
    """The losses as a module's forward, which is what `DistributedDataParallel` wraps."""

    def __init__(self, model: MaskRCNN, loss: LossConfig, processes: Processes) -> None:
        super().__init__()
        self.model, self.loss, self.processes = model, loss, processes

    def forward(self, images: Tensor, image_sizes: Tensor, truth: dict[str, Tensor]) -> dict[str, Tensor]:
        return self.model.losses(images, image_sizes, truth, self.loss, self.processes.share)


class Step:
    """Forward, backward, clipping and update for one batch of images.

    A step whose loss or gradient is not finite changes nothing: neither weights, nor the optimizer's state, nor
    batch-norm statistics. That is decided on the device; the caller learns it from the figures.

    Args:
        model: in training mode.
        optimizer: fused, see `maskrcnn.training.optimizer.make_optimizer`.
        config: of the run.
        device: of the model.
        precision: "fp32", "bf16" or "fp16".
        processes: those that train together.
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
        self.device, self.kind, self.averaged = device, AUTOCAST[precision], averaged
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
        """Takes the step.

        Args:
            parts: the batch, in parts that are computed one after another; on any device.

        Returns:
            scalars on the device: each loss as a mean over the parts, their sum `loss`, `gradient_norm` before
            clipping, and `finite`, 1 where the step was taken and 0 where it was skipped.
        """
        before = [statistic.clone() for statistic in self.statistics]
        self.optimizer.zero_grad(set_to_none=True)
        figures: dict[str, Tensor] = {}
        for number, part in enumerate(parts, start=1):
            with self._gradients_stay_here(number < len(parts)):
                losses = self._losses_of(part)
                total = torch.stack(list(losses.values())).sum() / len(parts)
                self.scaler.scale(total).backward()
            for name, value in {"loss": total * len(parts), **losses}.items():
                figures[name] = figures.get(name, 0) + value.detach() / len(parts)
        self.scaler.unscale_(self.optimizer)
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        if self.config.clip_gradient_norm:
            nn.utils.clip_grads_with_norm_(self.parameters, self.config.clip_gradient_norm, norm)
        finite = torch.isfinite(figures["loss"]) & torch.isfinite(norm)
        self._update(finite)
        for statistic, old in zip(self.statistics, before, strict=True):
            statistic.copy_(torch.where(finite, statistic, old))
        if self.averaged is not None:
            self.averaged.update()
        return {**figures, "gradient_norm": norm, "finite": finite}

    def _losses_of(self, part: Batch) -> dict[str, Tensor]:
        part = part.to(self.device)
        images = part.images.contiguous(memory_format=torch.channels_last)
        with torch.autocast(self.device.type, dtype=self.kind, enabled=self.kind is not None):
            return self.losses(images, part.image_sizes, part.truth())

    def _gradients_stay_here(self, wanted: bool):
        """Puts off the exchange of gradients between processes where more parts are to come."""
        distributed = isinstance(self.losses, DistributedDataParallel)
        return self.losses.no_sync() if wanted and distributed else contextlib.nullcontext()

    def _update(self, finite: Tensor) -> None:
        if self.scaler.is_enabled():
            self.scaler.step(self.optimizer)
            self.scaler.update()
            return
        # The fused optimizers take these attributes, as GradScaler sets them, and then leave everything as it was.
        self.optimizer.grad_scale, self.optimizer.found_inf = None, (~finite).float()
        self.optimizer.step()

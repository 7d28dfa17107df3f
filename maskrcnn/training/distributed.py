"""Distributed training: the processes started by `torchrun`, and the choice of device, precision and workers.

`torchrun … -m maskrcnn train` passes each process its rank in the environment.
"""

from __future__ import annotations

import datetime
import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from maskrcnn.errors import UserError
from maskrcnn.machine import available_cpus

_LAUNCH = "launch with `torchrun --nproc-per-node N -m maskrcnn train …`, or unset WORLD_SIZE"
_TIMEOUT = datetime.timedelta(hours=2)  # the other processes wait while one scores an evaluation


@dataclass(frozen=True)
class Processes:
    """This process among all training processes."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_size: int = 1  # processes on this machine
    objects: Any = None  # process group that exchanges Python objects

    @property
    def is_first(self) -> bool:
        """Whether this process prints and writes files."""
        return self.rank == 0

    def mean(self, count: Tensor) -> Tensor:
        """Mean of a count over all processes."""
        if self.world_size == 1:
            return count
        total = count.detach().clone()
        dist.all_reduce(total)
        return total / self.world_size

    def stacked(self, values: Tensor) -> Tensor:
        """Rows `[N, …]` of all processes by rank, `[world_size · N, …]`, in every process."""
        if self.world_size == 1:
            return values
        rows = [torch.empty_like(values) for _ in range(self.world_size)]
        dist.all_gather(rows, values)
        return torch.cat(rows)

    def gather(self, value: Any) -> list[Any]:
        """Values of all processes by rank, in every process."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.objects)
        return values

    def from_first(self, value: Any) -> Any:
        """Value of the first process, in every process."""
        return self.gather(value if self.is_first else None)[0]

    def wait(self) -> None:
        """Wait for all processes."""
        if self.world_size > 1:
            dist.barrier(group=self.objects)


@contextmanager
def joined(device: str) -> Iterator[Processes]:
    """Join the processes started by `torchrun`; without it, use only this process.

    Release models wrapped for several processes before the block ends.

    Args:
        device: "auto", "cpu", "cuda" or "mps"; GPUs communicate by NCCL, CPUs by gloo.

    Raises:
        UserError: if the environment of `torchrun` is incomplete or malformed, and for several processes on "mps".
    """
    world_size = _number("WORLD_SIZE", at_least=1)
    if world_size == 1:
        yield Processes()
        return
    if device == "mps":
        raise UserError(f"--device mps in {world_size} processes", "one process", "start it without torchrun")
    missing = [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise UserError(
            f"WORLD_SIZE={world_size} in the environment, without {', '.join(missing)}",
            "all variables set by torchrun",
            _LAUNCH,
        )
    local_rank, rank, local_size = _number("LOCAL_RANK"), _number("RANK"), _number("LOCAL_WORLD_SIZE", at_least=1)
    _number("MASTER_PORT")
    if rank >= world_size:
        raise UserError(f"RANK={rank}, WORLD_SIZE={world_size}", "0 ≤ RANK < WORLD_SIZE", _LAUNCH)
    gpu = device != "cpu" and torch.cuda.is_available()
    if gpu:
        torch.cuda.set_device(local_rank % torch.cuda.device_count())
    dist.init_process_group("nccl" if gpu else "gloo", timeout=_TIMEOUT)
    objects = dist.new_group(backend="gloo", timeout=_TIMEOUT) if gpu else None
    processes = Processes(
        rank=dist.get_rank(),
        world_size=world_size,
        local_rank=local_rank,
        local_size=local_size,
        objects=objects,
    )
    try:
        yield processes
        processes.wait()  # a process that exits early would disconnect the others
    finally:
        # A gloo thread that releases a tensor during interpreter shutdown aborts the process. The group ends its
        # threads when it is no longer referenced; wrapped models reference it in cycles.
        gc.collect()
        dist.destroy_process_group()


def _number(name: str, *, at_least: int = 0) -> int:
    """A variable of torchrun; `at_least` if it is not set."""
    text = os.environ.get(name, str(at_least))
    if not text.isdecimal() or int(text) < at_least:
        raise UserError(f"{name}={text} in the environment", f"a whole number, at least {at_least}", _LAUNCH)
    return int(text)


def choose_device(name: str, local_rank: int = 0) -> torch.device:
    """Device for "auto" (a CUDA GPU if present, else the CPU), "cpu", "cuda" or "mps" (an Apple GPU).

    Args:
        name: requested device.
        local_rank: rank of this process on its machine; each process uses its own GPU.

    Raises:
        UserError: if the requested device is unavailable, or there are fewer GPUs than processes.
    """
    if name == "mps":
        if not torch.backends.mps.is_available():
            raise UserError("--device mps", "an Apple GPU that torch can use", "use cpu, or cuda on an NVIDIA GPU")
        return torch.device("mps")
    available = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "cuda" and not available:
        raise UserError("--device cuda", "a CUDA GPU that torch can use", "see `maskrcnn doctor`, or use cpu")
    if name == "cpu" or not available:
        return torch.device("cpu")
    if local_rank >= available:
        raise UserError(
            f"process {local_rank + 1} on a machine with {available} GPU(s)",
            "one GPU per process",
            f"start torchrun with --nproc-per-node {available}",
        )
    return torch.device("cuda", local_rank)


def choose_workers(workers: int, processes: int = 1) -> int:
    """Number of data loading processes; -1 uses the remaining available CPUs, 1 to 8.

    Args:
        workers: -1, 0 or more.
        processes: training processes on this machine.
    """
    if workers >= 0:
        return workers
    return max(1, min(8, available_cpus() // processes - 1))


def choose_precision(name: str, device: torch.device) -> str:
    """Precision "fp32", "bf16" or "fp16"; "auto" is bf16 if the processor supports it, otherwise fp32."""
    if name not in ("auto", "fp32", "bf16", "fp16"):
        raise UserError(f"precision {name!r}", "auto, fp32, bf16 or fp16", "set --precision to one of them")
    if name != "auto":
        if name == "fp16" and device.type == "mps":
            raise UserError("--precision fp16 on an Apple GPU", "fp32 or bf16", "its optimizers do not scale gradients")
        return name
    if device.type == "mps":
        return "fp32"
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    features = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return "bf16" if features.get("amx_bf16") or features.get("avx512_bf16") else "fp32"

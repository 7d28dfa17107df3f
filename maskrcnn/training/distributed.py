"""One process or many: everything that training must know of the others.

`torchrun … -m maskrcnn train` starts the processes and tells each its number in the environment.
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

# One process scores an evaluation while the others wait.
_PATIENCE = datetime.timedelta(hours=2)


@dataclass(frozen=True)
class Processes:
    """This process among all that train together."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_size: int = 1  # processes on this machine
    objects: Any = None  # the group that exchanges Python objects

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that prints and writes files."""
        return self.rank == 0

    def share(self, count: Tensor) -> Tensor:
        """The mean of a count over all processes."""
        if self.world_size == 1:
            return count
        total = count.detach().clone()
        dist.all_reduce(total)
        return total / self.world_size

    def gather(self, value: Any) -> list[Any]:
        """Every process's value, in the order of the processes, in every process."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.objects)
        return values

    def from_first(self, value: Any) -> Any:
        """The first process's value, in every process."""
        return self.gather(value if self.is_first else None)[0]

    def wait(self) -> None:
        """Returns once every process is here."""
        if self.world_size > 1:
            dist.barrier(group=self.objects)


@contextmanager
def joined(device: str) -> Iterator[Processes]:
    """The processes that `torchrun` started; this one alone where it started none.

    Let go of models that were wrapped for several processes before the block ends.

    Args:
        device: "auto", "cpu" or "cuda": GPUs talk by NCCL, CPUs by gloo.

    Raises:
        UserError: when the environment names processes but not where to meet.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size == 1:
        yield Processes()
        return
    missing = [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise UserError(
            f"WORLD_SIZE={world_size} in the environment, without {', '.join(missing)}",
            "all of what torchrun sets",
            "start with `torchrun --nproc-per-node N -m maskrcnn train …`, or unset WORLD_SIZE",
        )
    local_rank = int(os.environ["LOCAL_RANK"])
    gpu = device != "cpu" and torch.cuda.is_available()
    if gpu:
        torch.cuda.set_device(local_rank % torch.cuda.device_count())
    dist.init_process_group("nccl" if gpu else "gloo", timeout=_PATIENCE)
    objects = dist.new_group(backend="gloo", timeout=_PATIENCE) if gpu else None
    processes = Processes(
        rank=dist.get_rank(),
        world_size=world_size,
        local_rank=local_rank,
        local_size=int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
        objects=objects,
    )
    try:
        yield processes
        processes.wait()  # or one that is done would cut off those that are not
    finally:
        # A gloo thread that lets go of a tensor that Python knows while Python ends aborts the process. The group ends
        # its threads when nothing holds it any more, and a wrapped model does, in cycles.
        gc.collect()
        dist.destroy_process_group()


# Where training runs and in which arithmetic.


def choose_device(name: str, local_rank: int = 0) -> torch.device:
    """The device for "auto", "cpu" or "cuda".

    Args:
        name: what was asked for.
        local_rank: number of this process on its machine; with several GPUs each process has its own.

    Raises:
        UserError: when CUDA is asked for and there is none, or fewer GPUs than processes.
    """
    available = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "cuda" and not available:
        raise UserError("--device cuda", "a CUDA GPU that torch can use", "see `maskrcnn doctor`, or use cpu")
    if name == "cpu" or not available:
        return torch.device("cpu")
    if local_rank >= available:
        raise UserError(
            f"process {local_rank + 1} of this machine, which has {available} GPU(s)",
            "a GPU for each process",
            f"start torchrun with --nproc-per-node {available}",
        )
    return torch.device("cuda", local_rank)


def choose_workers(wanted: int, processes: int = 1) -> int:
    """Data loading processes: as many as wanted, or for -1 the cores beside the training ones, 1 to 8.

    Args:
        wanted: -1, 0 or more.
        processes: training processes on this machine.
    """
    if wanted >= 0:
        return wanted
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(8, cores // processes - 1))


def choose_precision(name: str, device: torch.device) -> str:
    """ "fp32", "bf16" or "fp16"; for "auto" bfloat16 where the processor multiplies in it, else "fp32"."""
    if name not in ("auto", "fp32", "bf16", "fp16"):
        raise UserError(f"precision {name!r}", "auto, fp32, bf16 or fp16", "set --precision to one of them")
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    features = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return "bf16" if features.get("amx_bf16") or features.get("avx512_bf16") else "fp32"

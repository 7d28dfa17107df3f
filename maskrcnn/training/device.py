"""Where training runs and in which arithmetic."""

from __future__ import annotations

import os

import torch

from maskrcnn.errors import UserError


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

"""GPU memory for `kernel_calls`, allocated by PyTorch."""

from __future__ import annotations

import numpy as np
import torch


def architecture() -> int:
    """Compute capability of the current GPU, 90 for 9.0."""
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor


class GpuMemory:
    """Arrays on the current CUDA device; kernels run on PyTorch's current stream."""

    def __init__(self, device: str = "cuda") -> None:
        self._device = device
        self._kept: dict[int, torch.Tensor] = {}

    @property
    def stream(self) -> int:
        """Address of the stream."""
        return torch.cuda.current_stream().cuda_stream if self._device == "cuda" else 0

    def put(self, data: np.ndarray, shift: int = 0) -> int:
        """See `kernel_calls.Memory`."""
        room = torch.empty(data.size + 64 + shift, dtype=torch.uint8, device=self._device)
        start = -room.data_ptr() % 64 + shift
        tensor = room[start : start + data.size]
        tensor.copy_(torch.from_numpy(data))
        address = room.data_ptr() + start
        self._kept[address] = tensor
        return address

    def take(self, address: int, size: int) -> np.ndarray:
        """See `kernel_calls.Memory`; synchronises the stream."""
        return self._kept[address][:size].cpu().numpy()

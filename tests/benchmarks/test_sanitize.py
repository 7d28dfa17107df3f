"""The program that runs under compute-sanitizer, with the kernels compiled for the CPU."""

import ctypes

import kernels_on_cpu
import numpy as np
import pytest
import sanitize

from maskrcnn.plugins.native import Kernels


class CpuMemory:
    """Ordinary memory, kept as long as this object."""

    def __init__(self) -> None:
        self.kept: list[np.ndarray] = []

    def put(self, values: np.ndarray) -> int:
        self.kept.append(np.array(values, order="C"))
        return self.kept[-1].ctypes.data

    def room(self, size: int) -> int:
        return self.put(np.full(max(size, 1), 0xA5, np.uint8))

    def take(self, address: int, shape: tuple[int, ...], dtype: type) -> np.ndarray:
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        return np.frombuffer(ctypes.string_at(address, size), dtype).reshape(shape)


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    if kernels_on_cpu.compiler() is None:
        pytest.skip("no C++ compiler")
    return Kernels(kernels_on_cpu.build(tmp_path_factory.mktemp("kernels"), MASKRCNN_NMS_THREADS=128))


def test_every_kernel_is_exercised(kernels):
    lines = []
    sanitize.exercise(kernels, CpuMemory(), lines.append)
    assert {line.split()[0] for line in lines} == {"RoIAlign", "NMS", "paste"}


def test_a_wrong_result_ends_the_exercise(kernels, monkeypatch):
    right = Kernels.batched_nms
    monkeypatch.setattr(Kernels, "batched_nms", lambda *a, **k: right(*a, **{**k, "iou_threshold": 0.9}))
    with pytest.raises(AssertionError):
        sanitize.exercise(kernels, CpuMemory(), lambda line: None)


def test_what_a_tool_finds_is_kept(tmp_path):
    tool = tmp_path / "compute-sanitizer"
    tool.write_text('#!/bin/sh\necho "ERROR SUMMARY: 3 errors ($2)"\nexit $4\n')
    tool.chmod(0o755)
    assert not sanitize.sanitize("memcheck", tmp_path, str(tool))
    assert "3 errors (memcheck)" in (tmp_path / "sanitizer-memcheck.txt").read_text()

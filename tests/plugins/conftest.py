"""Fixtures of the plugin tests: the TensorRT rig, the plugin library for each set of headers, and the kernels."""

import kernels_on_cpu
import kernels_on_gpu
import nvrtc_on_cpu
import plugin_library
import pytest
import torch
from kernel_calls import Device
from kernel_maths import Maths
from tensorrt_rig import rig

from maskrcnn.plugins.build import build_library, find_library, obstacle
from maskrcnn.plugins.native import Kernels
from maskrcnn.plugins.nvrtc import Gpu, NvrtcLibrary
from maskrcnn.plugins.toolchain import find_toolchain


@pytest.fixture(scope="session")
def tensorrt_rig(tmp_path_factory) -> dict[str, str]:
    """The environment for `rig.run`; skips the test if the rig is not available."""
    if reason := rig.obstacle():
        pytest.skip(reason)
    return rig.prepare(tmp_path_factory.mktemp("tensorrt-rig"))


@pytest.fixture(scope="session", params=plugin_library.header_folders() or [None], ids=str)
def library(request, tmp_path_factory) -> plugin_library.Library:
    """The plugins with kernels for the CPU, for each available version of TensorRT's headers."""
    if reason := plugin_library.obstacle():
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("plugins")
    return plugin_library.Library(plugin_library.build(folder, request.param), folder, request.param)


@pytest.fixture(scope="session")
def cpu(kernels_for_cpu) -> Device:
    """The kernels compiled for the CPU."""
    return Device(Kernels(kernels_for_cpu))


@pytest.fixture(scope="session")
def maths(tmp_path_factory) -> Maths:
    """The arithmetic functions of the kernels."""
    if kernels_on_cpu.compiler() is None:
        pytest.skip("no C++ compiler")
    return Maths(tmp_path_factory.mktemp("maths"))


@pytest.fixture(scope="session")
def gpu() -> Device:
    """The kernels on a GPU, from the cache or compiled, which takes a minute."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA GPU")
    arch = kernels_on_gpu.architecture()
    path = find_library("kernels", arch)
    if path is None:
        toolchain = find_toolchain()
        if missing := obstacle("kernels", toolchain):
            pytest.skip(f"{missing}")
        path = build_library("kernels", arch=(), toolchain=toolchain)
    return Device(Kernels(path), kernels_on_gpu.GpuMemory)


@pytest.fixture(scope="session")
def launcher(shared, kernels_for_cpu) -> nvrtc_on_cpu.Launcher:
    """The kernels compiled for the CPU one by one."""
    return nvrtc_on_cpu.Launcher(shared("nvrtc", nvrtc_on_cpu.Launcher))


@pytest.fixture(scope="session")
def nvrtc(launcher) -> Device:
    """The kernels as NVRTC's are chosen and started, on the CPU."""
    return Device(Kernels(NvrtcLibrary(launcher.launch, lambda code: b"")))


@pytest.fixture(scope="session")
def gpu_nvrtc() -> Device:
    """The kernels compiled by NVRTC, on a GPU."""
    gpu = Gpu(kernels_on_gpu.architecture())
    return Device(Kernels(NvrtcLibrary(gpu.launch, gpu.error_string)), kernels_on_gpu.GpuMemory)


DEVICES = ["cpu", "gpu"] if torch.cuda.is_available() else ["cpu"]


@pytest.fixture(scope="session", params=DEVICES)
def device(request) -> Device:
    """The kernels on the CPU, and on a GPU if there is one."""
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="session", params=[*DEVICES, "nvrtc", *(["gpu_nvrtc"] if torch.cuda.is_available() else [])])
def any_device(request) -> Device:
    """Those of `device`, and the kernels of NVRTC."""
    return request.getfixturevalue(request.param)

"""The calling thread's current GPU is preserved, on simulated GPUs that refuse kernels of another than the current."""

import gc

import numpy as np
import pytest

real_driver = pytest.importorskip("cuda.bindings.driver")

import fake_cuda  # noqa: E402
import fake_tensorrt  # noqa: E402

from maskrcnn.data.shapes import shapes_image  # noqa: E402
from maskrcnn.errors import UserError  # noqa: E402
from maskrcnn.runtime import Detector  # noqa: E402
from maskrcnn.runtime.backends import tensorrt as tensorrt_backend  # noqa: E402
from maskrcnn.runtime.build.profiles import Profile, Span  # noqa: E402
from maskrcnn.runtime.gpu.arrays import DeviceArray, as_device_array  # noqa: E402
from maskrcnn.runtime.gpu.memory import (  # noqa: E402
    LEGACY_STREAM,
    BufferPool,
    Cuda,
    import_driver,
    preserve_context,
)

ANY = Profile(Span(1, 1, 8), Span(32, 96, 384), Span(32, 96, 384))
NONE, OF_GPU_0, OWN = 0, 0xC000, 0xABC000  # contexts: none yet, torch's, PyCUDA's own
BEFORE = pytest.mark.parametrize("before", [NONE, OF_GPU_0, OWN])


@pytest.fixture
def runtime() -> fake_cuda.FakeRuntime:
    return fake_cuda.FakeRuntime(devices=2)


def array_on(cuda: Cuda, values: np.ndarray) -> DeviceArray:
    memory, staged, stream = cuda.memory(values.nbytes), cuda.pinned(values.nbytes), cuda.stream()
    staged.array(values.shape, values.dtype)[...] = values
    with cuda.active():
        stream.copy(memory.address, staged.address, values.nbytes, "HostToDevice")
    return DeviceArray(memory.address, values.shape, values.dtype, stream=stream, owner=(memory, staged))


@BEFORE
def test_resources_are_created_and_freed_on_their_gpu(runtime, before):
    runtime.context = before
    cuda = Cuda(1, runtime, runtime.driver)
    made = [cuda.memory(8), cuda.pinned(8), cuda.event(), cuda.stream()]
    assert {runtime.device_of[number] for number in (*runtime.memory, *runtime.handles)} == {1}
    del made
    gc.collect()
    assert runtime.open == {} and runtime.context == before
    assert runtime.contexts == {1}, "another GPU's context takes memory there"


@BEFORE
def test_arrays_are_exported_from_any_thread(runtime, before):
    runtime.context = before
    cuda, values = Cuda(1, runtime, runtime.driver), np.arange(6, dtype=np.float32)
    array = array_on(cuda, values)
    assert array.numpy().tolist() == values.tolist()
    assert array.__cuda_array_interface__["data"] == (array.address, False)
    capsule = array.__dlpack__(stream=None, max_version=(1, 0))
    assert as_device_array(array, cuda, cuda.stream()).address == array.address
    assert (runtime.context, runtime.contexts) == (before, {1})
    del capsule


def test_the_default_stream_is_that_of_the_arrays_gpu(runtime):
    cuda, runtime.context = Cuda(1, runtime, runtime.driver), OF_GPU_0
    array = array_on(cuda, np.ones(4, np.float32))
    found = runtime.array(array.address, (4,), np.float32)
    capsule = array.__dlpack__(stream=None, max_version=(1, 0))
    runtime.cudaStreamSynchronize(LEGACY_STREAM)  # that of GPU 0, which waits for nothing
    assert found.tolist() != [1] * 4
    with cuda.active():
        runtime.cudaStreamSynchronize(LEGACY_STREAM)
    assert found.tolist() == [1] * 4
    pool, stream = BufferPool(cuda, 4), cuda.stream()
    address = pool.acquire(stream).address
    with cuda.active():
        runtime.cudaMemsetAsync(address, 1, 4, LEGACY_STREAM)
    pool.acquire(stream)
    stream.synchronize()
    assert runtime.array(address, (1,), np.int32).tolist() == [0x01010101]
    del capsule


def test_errors_preserve_the_context(runtime):
    cuda, runtime.context = Cuda(1, runtime, runtime.driver), OWN
    with pytest.raises(ZeroDivisionError), cuda.active():
        assert runtime.device() == 1
        runtime.cudaSetDevice(0)  # as another library might
        raise ZeroDivisionError
    assert runtime.context == OWN
    memory = cuda.memory(8)
    runtime.driver.failing["cuCtxSetCurrent"] = real_driver.CUresult.CUDA_ERROR_DEINITIALIZED
    with pytest.raises(RuntimeError, match="cuCtxSetCurrent returns CUDA_ERROR_DEINITIALIZED"), cuda.active():
        pass
    memory.close()  # as at the end of a program


def test_a_context_that_cannot_be_created(runtime):
    runtime.driver.failing["cuDevicePrimaryCtxRetain"] = real_driver.CUresult.CUDA_ERROR_OUT_OF_MEMORY
    with pytest.raises(UserError, match="no more memory left on GPU 1"):
        Cuda(1, runtime, runtime.driver)
    runtime.driver.failing["cuDevicePrimaryCtxRetain"] = real_driver.CUresult.CUDA_ERROR_DEVICE_UNAVAILABLE
    with pytest.raises(RuntimeError, match="cuDevicePrimaryCtxRetain returns cudaErrorDevicesUnavailable"):
        Cuda(1, runtime, runtime.driver)


@BEFORE
def test_changes_by_other_libraries_are_undone(runtime, monkeypatch, before):
    fake_cuda.install(monkeypatch, runtime)
    runtime.context = before
    with preserve_context():
        runtime.cudaSetDevice(1)
    assert runtime.context == before


def test_without_a_driver_nothing_is_undone(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "cuda.bindings.driver", None)
    with pytest.raises(UserError, match="no Python package cuda-bindings"):
        import_driver()
    with preserve_context():
        pass


@BEFORE
@pytest.mark.parametrize("graphs", [True, False])
def test_an_engine_preserves_the_context(tmp_path, onnx_file, kernels_for_cpu, monkeypatch, before, graphs):
    runtime, _ = fake_tensorrt.install(monkeypatch, devices=2)
    made = fake_cuda.DeferredKernels(kernels_for_cpu)
    made.runtime = runtime
    monkeypatch.setattr(tensorrt_backend, "kernels_for", lambda arch: made)
    path = fake_tensorrt.write_engine(onnx_file, tmp_path / "model.fp32.engine", [ANY])
    runtime.context = before
    detector = Detector.load(path, device=1, graphs=graphs, shapes=1)
    assert runtime.context == before
    for size in ((120, 171), (96, 96), (96, 96)):
        found = detector.detect([shapes_image(np.random.default_rng(1), size)[0]])[0]
        assert len(found.full_masks()) == len(found)
        assert runtime.context == before
    images = array_on(detector.backend.cuda, np.full((1, 3, 64, 96), 99, np.float32))
    outputs = detector.backend({"images": images, "image_sizes": np.array([[64, 96]])})
    assert outputs["boxes"].numpy().shape[0] == 1 and runtime.context == before
    assert set(runtime.device_of.values()) == {1}
    del images, outputs
    detector.backend.close()
    gc.collect()
    assert (runtime.open, runtime.context, runtime.contexts) == ({}, before, {1})

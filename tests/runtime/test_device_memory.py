"""GPU memory, streams, events and graphs, on a simulated GPU that defers all work."""

import gc
import inspect

import numpy as np
import pytest

real = pytest.importorskip("cuda.bindings.runtime")
real_driver = pytest.importorskip("cuda.bindings.driver")

import fake_cuda  # noqa: E402

from maskrcnn.errors import UserError  # noqa: E402
from maskrcnn.runtime.gpu.memory import LEGACY_STREAM, BufferPool, Cuda, GrowableBuffer, StagingBuffer  # noqa: E402


@pytest.fixture
def runtime() -> fake_cuda.FakeRuntime:
    return fake_cuda.FakeRuntime()


@pytest.fixture
def cuda(runtime) -> Cuda:
    return Cuda(0, runtime, runtime.driver)


def pinned_with(cuda: Cuda, values: np.ndarray):
    memory = cuda.pinned(values.nbytes)
    memory.array(values.shape, values.dtype)[...] = values
    return memory


@pytest.mark.parametrize(
    ("pretended", "module", "most"), [(fake_cuda.FakeRuntime, real, 20), (fake_cuda.FakeDriver, real_driver, 4)]
)
def test_the_simulated_functions_have_cudas_signatures(pretended, module, most):
    names = [name for name in dir(pretended) if name.startswith("cu")]
    assert len(names) > most
    for name in names:
        wanted = inspect.signature(getattr(module, name)).parameters
        found = inspect.signature(getattr(pretended, name)).parameters
        assert list(found)[1:] == list(wanted), name


def test_the_gpu_is_described(cuda):
    assert (cuda.name, cuda.compute_capability) == ("NVIDIA Simulated", (9, 0))


def test_a_captured_copy_is_replayed(cuda, runtime):
    values = np.arange(6, dtype=np.float32)
    staged, memory, stream = pinned_with(cuda, values), cuda.memory(24), cuda.stream()
    stream.copy(memory.address, staged.address, 24, "HostToDevice")
    graph = stream.capture(lambda: stream.copy(staged.address, memory.address, 24, "DeviceToHost"))
    stream.synchronize()
    staged.array((6,), np.float32)[...] = 0
    graph.launch(stream)
    stream.synchronize()
    assert staged.array((6,), np.float32).tolist() == values.tolist()
    for held in (graph, stream, memory, staged):
        held.close()
    assert runtime.open == {}


def test_resources_are_freed_once(cuda, runtime):
    stream = cuda.stream()
    held = [cuda.memory(10), cuda.pinned(10), cuda.event(timing=True), stream, stream.capture(lambda: None)]
    assert runtime.open == {"device": 1, "host": 1, "event": 1, "stream": 1, "executable graph": 1}
    held[0].close()
    held[0].close()  # the second time does nothing, or the simulated GPU would complain
    assert not held[0].is_open and held[1].is_open
    view = held[1].array((2,), np.int32)
    del held, stream
    gc.collect()
    assert runtime.open == {"host": 1}, "an array keeps its memory"
    view[:] = 3
    del view
    gc.collect()
    assert runtime.open == {}


def test_a_view_must_lie_within_pinned_memory(cuda):
    memory = cuda.pinned(16)
    assert memory.array((0, 4), np.float32).shape == (0, 4)
    assert memory.array((2,), np.float32, 8).nbytes == 8
    with pytest.raises(ValueError, match="bytes 12 to 20; expected: at most 16"):
        memory.array((2,), np.float32, 12)


def test_work_waits_for_events_and_other_streams(cuda, runtime):
    first, second, memory = cuda.stream(), cuda.stream(), cuda.memory(4)
    one, two = pinned_with(cuda, np.int32([1])), pinned_with(cuda, np.int32([2]))
    first.copy(memory.address, one.address, 4, "HostToDevice")
    second.wait(first.record(cuda.event()))
    second.copy(memory.address, two.address, 4, "HostToDevice")
    second.synchronize()
    assert runtime.array(memory.address, (1,), np.int32).tolist() == [2]
    first.copy(memory.address, one.address, 4, "HostToDevice")
    second.wait_for_stream(first.address)
    second.copy(two.address, memory.address, 4, "DeviceToHost")
    second.synchronize()
    assert two.array((1,), np.int32).tolist() == [1]
    first.clear(memory.address, 4)
    first.hold_up_stream(second.address)
    second.copy(two.address, memory.address, 4, "DeviceToHost")
    second.synchronize()
    assert two.array((1,), np.int32).tolist() == [0]


def test_events_measure_time(cuda):
    stream = cuda.stream()
    start, end = stream.record(cuda.event(timing=True)), stream.record(cuda.event(timing=True))
    end.synchronize()
    assert start.milliseconds(end) == 1.5


def test_a_capture_that_fails_leaves_the_stream_usable(cuda, runtime):
    stream = cuda.stream()
    with pytest.raises(RuntimeError, match=r"cudaStreamSynchronize returns cudaErrorStreamCaptureUnsupported \("):
        stream.capture(stream.synchronize)
    assert runtime.open == {"stream": 1}
    stream.synchronize()


@pytest.mark.parametrize(
    ("function", "status", "call", "message"),
    [
        ("cudaMalloc", "cudaErrorMemoryAllocation", lambda c: c.memory(3_000_000), "no 3 MB left on GPU 0"),
        ("cudaHostAlloc", "cudaErrorMemoryAllocation", lambda c: c.pinned(2_000_000), "no 2 MB of pinned host memory"),
        (
            "cudaGraphInstantiate",
            "cudaErrorMemoryAllocation",
            lambda c: c.stream().capture(list),
            "no more memory left on",
        ),
    ],
)
def test_out_of_memory_is_a_user_error(cuda, runtime, function, status, call, message):
    runtime.failing[function] = getattr(real.cudaError_t, status), 0
    with pytest.raises(UserError, match=message):
        call(cuda)
    gc.collect()
    assert runtime.open == {}


@pytest.mark.parametrize(
    ("status", "message"),
    [("cudaErrorNoDevice", "no GPU that CUDA can use"), ("cudaErrorInsufficientDriver", "no NVIDIA driver, or one")],
)
def test_a_machine_without_gpu_is_a_user_error(runtime, status, message):
    runtime.failing["cudaGetDeviceCount"] = getattr(real.cudaError_t, status), 0
    with pytest.raises(UserError, match=message):
        Cuda(0, runtime, runtime.driver)


def test_other_errors_keep_cudas_name(cuda, runtime):
    stream = cuda.stream()
    runtime.failing["cudaStreamSynchronize"] = real.cudaError_t.cudaErrorIllegalAddress, 0
    with pytest.raises(RuntimeError, match=r"cudaErrorIllegalAddress \(an illegal memory access .* compute-sanitizer"):
        stream.synchronize()


def test_a_missing_gpu_and_missing_bindings(runtime, monkeypatch):
    with pytest.raises(UserError, match="GPU 1\n  expected: one of 1, counted from 0"):
        Cuda(1, runtime, runtime.driver)
    monkeypatch.setitem(__import__("sys").modules, "cuda.bindings.runtime", None)
    with pytest.raises(UserError, match=r"no Python package cuda-bindings[\s\S]*pip install 'cuda-bindings"):
        Cuda()


def test_the_real_bindings_without_a_driver():
    if real.cudaGetDeviceCount()[0] == real.cudaError_t.cudaSuccess:
        pytest.skip("there is a GPU")
    with pytest.raises(UserError, match=r"no NVIDIA driver|no GPU"):
        Cuda()


def test_a_pooled_buffer_is_reused_after_the_default_streams_work(cuda, runtime):
    pool, stream = BufferPool(cuda, 4), cuda.stream()
    first, second = pool.acquire(stream), pool.acquire(stream)
    address = first.address
    assert address != second.address
    reader = pinned_with(cuda, np.int32([7]))
    runtime.array(address, (1,), np.int32)[...] = 5
    # A consumer reads it on the default stream and releases it.
    default = runtime.cudaStream_t(LEGACY_STREAM)
    runtime.cudaMemcpyAsync(reader.address, address, 4, runtime.cudaMemcpyKind.cudaMemcpyDeviceToHost, default)
    del first
    again = pool.acquire(stream)
    assert again.address == address
    stream.clear(again.address, 4)
    stream.synchronize()
    assert reader.array((1,), np.int32).tolist() == [5]
    del pool, again, second
    gc.collect()
    assert "device" not in runtime.open


def test_staging_is_not_overwritten_before_it_was_read(cuda, runtime):
    staging, stream, target = StagingBuffer(cuda), cuda.stream(), cuda.memory(8)
    for value, place in ((1, 0), (2, 4)):
        staging.reserve(4).array((1,), np.int32)[...] = value
        staging.send(stream, target.address + place, 4)
    stream.synchronize()
    assert runtime.array(target.address, (2,), np.int32).tolist() == [1, 2]
    small = staging.reserve(4)
    assert staging.reserve(2) is small
    assert staging.reserve(100).nbytes == 100


def test_a_buffer_grows(cuda, runtime):
    buffer, stream = GrowableBuffer(cuda), cuda.stream()
    small = buffer.reserve(4)
    stream.clear(small.address, 4)
    assert buffer.reserve(3) is small
    assert buffer.reserve(400).nbytes == 400
    assert runtime.open["device"] == 1
    stream.synchronize()

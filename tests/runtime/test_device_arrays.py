"""Exchange of GPU arrays with other libraries by DLPack and `__cuda_array_interface__`."""

import gc
import weakref
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("cuda.bindings.runtime")

import fake_cuda

from maskrcnn.errors import UserError
from maskrcnn.runtime.gpu.arrays import (
    CPU,
    CUDA,
    DeviceArray,
    ImportedTensor,
    as_device_array,
    export_capsule,
    is_on_device,
)
from maskrcnn.runtime.gpu.memory import LEGACY_STREAM, Cuda

NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


@pytest.fixture
def runtime() -> fake_cuda.FakeRuntime:
    return fake_cuda.FakeRuntime(devices=2)


@pytest.fixture
def cuda(runtime) -> Cuda:
    return Cuda(0, runtime, runtime.driver)


def array_of(cuda: Cuda, values: np.ndarray, kind: type = DeviceArray):
    """An array on the GPU; the copy of its values is pending on its stream."""
    memory, staged, stream = cuda.memory(values.nbytes), cuda.pinned(values.nbytes), cuda.stream()
    staged.array(values.shape, values.dtype)[...] = values
    stream.copy(memory.address, staged.address, values.nbytes, "HostToDevice")
    return kind(memory.address, values.shape, values.dtype, stream=stream, owner=(memory, staged))


class OnCpu(DeviceArray):
    """An array that reports the host as its device, where the simulated GPU's memory is, for torch and NumPy."""

    device_type = CPU


VALUES = np.arange(12, dtype=np.float32).reshape(3, 4)


def test_attributes_of_an_array(cuda):
    array = array_of(cuda, VALUES)
    assert (array.shape, array.dtype, array.nbytes, array.ndim, len(array)) == ((3, 4), np.float32, 48, 2, 3)
    assert repr(array) == "DeviceArray(float32 [3, 4] on GPU 0)"
    assert is_on_device(array) and not is_on_device(VALUES) and not is_on_device(torch.zeros(1))


def test_an_array_is_copied_to_the_host(cuda):
    array = array_of(cuda, VALUES)
    assert array.numpy().tolist() == VALUES.tolist()
    assert np.asarray(array, np.float64).dtype == np.float64
    with pytest.raises(ValueError, match="expected: a copy"):
        np.array(array, copy=False)


def test_the_interface_waits_for_the_array(cuda, runtime):
    array = array_of(cuda, VALUES)
    interface = array.__cuda_array_interface__
    assert interface == {
        "shape": (3, 4),
        "typestr": "<f4",
        "data": (array.address, False),
        "version": 3,
        "strides": None,
        "stream": None,
    }
    assert runtime.array(array.address, (3, 4), np.float32).tolist() == VALUES.tolist()


@pytest.mark.parametrize("library", [torch, np])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.int64, np.int32, np.uint8])
def test_dlpack_shares_the_memory(cuda, runtime, library, dtype):
    array = array_of(cuda, VALUES.astype(dtype), OnCpu)
    array.stream.synchronize()
    taken = library.from_dlpack(array)
    address = taken.ctypes.data if library is np else taken.data_ptr()
    assert address == array.address
    del array
    gc.collect()
    assert "device" in runtime.open
    assert np.asarray(taken).tolist() == VALUES.tolist() and np.asarray(taken).dtype == dtype
    del taken
    gc.collect()
    assert "device" not in runtime.open


@pytest.mark.parametrize(("stream", "held_up"), [(None, LEGACY_STREAM), (1, 1), (2, 2), (77, 77), (-1, None)])
def test_a_consumers_stream_waits_for_writes(cuda, runtime, stream, held_up):
    array = array_of(cuda, VALUES)
    capsule = array.__dlpack__(stream=stream, max_version=(1, 0))
    found = runtime.array(array.address, (3, 4), np.float32)
    for consumer in (LEGACY_STREAM, 2, 77):
        runtime.cudaStreamSynchronize(runtime.cudaStream_t(consumer))
        if consumer == held_up:
            assert found.tolist() == VALUES.tolist()
            break
        assert found.tolist() != VALUES.tolist()
    array.stream.synchronize()
    assert array.__dlpack_device__() == (2, 0)
    del array, found
    assert "device" in runtime.open  # the capsule keeps it
    del capsule
    gc.collect()
    assert "device" not in runtime.open


def test_dlpack_refuses_copies_and_other_devices(cuda):
    array = array_of(cuda, VALUES)
    with pytest.raises(BufferError, match="expected: neither"):
        array.__dlpack__(copy=True)
    with pytest.raises(BufferError, match="another device"):
        array.__dlpack__(dl_device=(1, 0))


def test_a_capsule_is_imported_once():
    tensor = torch.arange(6).reshape(2, 3)
    for version in (None, (1, 0)):
        capsule = tensor.__dlpack__(max_version=version)
        taken = ImportedTensor(capsule)
        assert (taken.address, taken.shape, taken.dtype) == (tensor.data_ptr(), (2, 3), np.int64)
        assert (taken.device_type, taken.strides) == (CPU, (3, 1))
        with pytest.raises(ValueError, match="an unused DLPack capsule"):
            ImportedTensor(capsule)
    with pytest.raises(ValueError, match="found: 5; expected: an unused"):
        ImportedTensor(5)
    assert ImportedTensor(torch.zeros(2, dtype=torch.bfloat16).__dlpack__()).dtype is None


class Owner:
    """Memory of an array, to which a weak reference can be made."""


@pytest.mark.parametrize("is_imported", [True, False])
def test_the_owner_of_a_capsule_is_released_with_it(is_imported):
    owner = Owner()
    released = weakref.ref(owner)
    address, dtype = VALUES.ctypes.data, VALUES.dtype
    capsule = export_capsule(address, (3, 4), dtype, device_type=CUDA, device_id=0, owner=owner)
    del owner
    holder = ImportedTensor(capsule) if is_imported else capsule
    del capsule
    gc.collect()
    assert released() is not None
    del holder
    gc.collect()
    assert released() is None


# Arrays of others


@dataclass
class DlpackArray:
    """An array of a library with DLPack, such as torch and CuPy."""

    array: DeviceArray
    device: tuple[int, int] = (CUDA, 0)
    knows_versions: bool = True
    asked: list[dict[str, Any]] = field(default_factory=list)

    def __dlpack_device__(self):
        return self.device

    def __dlpack__(self, **named):
        if "max_version" in named and not self.knows_versions:
            raise TypeError("unexpected keyword")
        self.asked.append(named)
        self.array.stream.hold_up_stream(named["stream"])
        a = self.array
        return export_capsule(a.address, a.shape, a.dtype, device_type=CUDA, device_id=0, owner=self)


@dataclass
class InterfaceArray:
    """An array of a library without DLPack, such as PyCUDA."""

    interface: dict[str, Any]

    @property
    def __cuda_array_interface__(self):
        return self.interface


def interface_of(array: DeviceArray, **changes: Any) -> dict[str, Any]:
    usual = {"shape": array.shape, "typestr": array.dtype.str, "data": (array.address, False), "version": 2}
    return usual | changes


def read(array: DeviceArray) -> list:
    return array.numpy().tolist()


@pytest.mark.parametrize("knows_versions", [True, False])
def test_dlpack_arrays_are_read_in_place(cuda, runtime, knows_versions):
    theirs, stream = DlpackArray(array_of(cuda, VALUES), knows_versions=knows_versions), cuda.stream()
    ours = as_device_array(theirs, cuda, stream)
    assert ours.address == theirs.array.address and ours.stream is stream
    assert [named["stream"] for named in theirs.asked] == [stream.address]
    assert read(ours) == VALUES.tolist()
    del theirs
    gc.collect()
    assert "device" in runtime.open
    del ours
    gc.collect()
    assert "device" not in runtime.open


@pytest.mark.parametrize("names_its_stream", [True, False])
def test_the_stream_of_an_interface_is_waited_for(cuda, names_its_stream):
    theirs, stream = array_of(cuda, VALUES), cuda.stream()
    if names_its_stream:
        interface = interface_of(theirs, version=3, stream=theirs.stream.address)
    else:
        interface = interface_of(theirs)
        theirs.stream.hold_up_stream(LEGACY_STREAM)  # as if the default stream had written it
    ours = as_device_array(InterfaceArray(interface), cuda, stream)
    assert ours.address == theirs.address and read(ours) == VALUES.tolist()


def test_an_interface_that_is_ready_is_not_waited_for(cuda, runtime):
    theirs = array_of(cuda, VALUES)
    runtime.calls.clear()
    as_device_array(InterfaceArray(interface_of(theirs, version=3, stream=None)), cuda, cuda.stream())
    assert "cudaStreamWaitEvent" not in runtime.calls


def test_arrays_of_ours_pass_between_streams(cuda):
    first, stream = array_of(cuda, VALUES), cuda.stream()
    assert read(as_device_array(first, cuda, stream)) == VALUES.tolist()
    assert as_device_array(first, cuda, first.stream).address == first.address


@pytest.mark.parametrize(
    ("strides", "shape", "message"),
    [
        ((4, 12), (3, 4), "that is not contiguous"),
        ((32, 4), (3, 4), "that is not contiguous"),
        ((16, 4), (3, 4), None),
        ((99, 4), (1, 4), None),  # the stride of an axis of length 1 does not matter
        ((99, 99), (0, 4), None),  # nor that of an empty array
    ],
)
def test_arrays_must_be_contiguous(cuda, strides, shape, message):
    theirs = array_of(cuda, VALUES)
    plain = InterfaceArray(interface_of(theirs, shape=shape, strides=strides))
    if message is None:
        assert as_device_array(plain, cuda, cuda.stream()).shape == shape
        return
    with pytest.raises(UserError, match=rf"{message}[\s\S]*contiguous"):
        as_device_array(plain, cuda, cuda.stream())


def test_arrays_elsewhere_are_refused(cuda, runtime):
    stream, other = cuda.stream(), Cuda(1, runtime, runtime.driver)
    with pytest.raises(UserError, match=r"torch\.Tensor .* not on a GPU\n  expected: one on GPU 0"):
        as_device_array(torch.zeros(2), cuda, stream)
    with pytest.raises(UserError, match="on GPU 1"):
        as_device_array(array_of(other, VALUES), cuda, stream)
    with pytest.raises(UserError, match="on GPU 1"):
        as_device_array(DlpackArray(array_of(cuda, VALUES), device=(CUDA, 1)), cuda, stream)
    with pytest.raises(UserError, match="on GPU 0\n  expected: one on GPU 1"):  # as reported by the simulated driver
        as_device_array(InterfaceArray(interface_of(array_of(cuda, VALUES))), other, other.stream())


class BfloatArray:
    """A torch tensor of bfloat16 that says it lies on a GPU."""

    def __dlpack_device__(self):
        return CUDA, 0

    def __dlpack__(self, **named):
        return torch.zeros(2, dtype=torch.bfloat16).__dlpack__()


def test_a_type_that_numpy_lacks_is_refused(cuda):
    with pytest.raises(UserError, match=r"BfloatArray[\s\S]*a type that NumPy has"):
        as_device_array(BfloatArray(), cuda, cuda.stream())


# On a real GPU


@NEEDS_GPU
def test_arrays_share_memory_with_torch():
    cuda = Cuda()
    stream, tensor = cuda.stream(), torch.arange(12.0, device="cuda").reshape(3, 4)
    ours = as_device_array(tensor, cuda, stream)
    assert ours.address == tensor.data_ptr() and read(ours) == tensor.tolist()
    memory = cuda.memory(48)
    written = DeviceArray(memory.address, (3, 4), np.float32, stream=stream, owner=memory)
    stream.copy(memory.address, ours.address, 48)
    for back in (torch.from_dlpack(written), torch.as_tensor(written, device="cuda")):
        assert back.data_ptr() == memory.address and torch.equal(back, tensor)
    with pytest.raises(UserError, match="contiguous"):
        as_device_array(tensor.T, cuda, stream)


@NEEDS_GPU
def test_arrays_share_memory_with_cupy():
    cupy = pytest.importorskip("cupy")
    cuda = Cuda()
    theirs = cupy.arange(12, dtype=cupy.float32).reshape(3, 4)
    ours = as_device_array(theirs, cuda, cuda.stream())
    assert ours.address == theirs.data.ptr and read(ours) == theirs.tolist()
    assert cupy.from_dlpack(ours).data.ptr == ours.address


@NEEDS_GPU
def test_arrays_share_memory_with_pycuda():
    gpuarray = pytest.importorskip("pycuda.gpuarray")
    driver = pytest.importorskip("pycuda.driver")
    driver.init()
    context = driver.Device(0).retain_primary_context()  # the one that CUDA's runtime and torch use
    context.push()
    try:
        cuda = Cuda()
        theirs = gpuarray.to_gpu(VALUES)
        ours = as_device_array(theirs, cuda, cuda.stream())
        assert ours.address == int(theirs.gpudata) and read(ours) == VALUES.tolist()
        assert (theirs * 2).get().tolist() == (2 * VALUES).tolist()
    finally:
        context.pop()

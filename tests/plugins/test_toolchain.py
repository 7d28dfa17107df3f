"""Discovery of compilers, headers and GPUs, and the description of missing parts."""

import sys
from types import SimpleNamespace

import pytest
from bare_machine import add_nvcc, add_program, strip

from maskrcnn.errors import UserError
from maskrcnn.plugins import toolchain
from maskrcnn.plugins.toolchain import Toolchain, find_toolchain


@pytest.fixture
def programs(monkeypatch, tmp_path):
    """The only folder on PATH of an otherwise bare machine."""
    return strip(monkeypatch, tmp_path)


def test_a_bare_machine_has_nothing_and_lists_the_missing_parts(programs):
    found = find_toolchain()
    assert found == Toolchain()
    assert [absence.what for absence in found.absences] == [
        *("nvcc", "C++ compiler", "CUDA headers", "TensorRT headers", "NVRTC", "NVIDIA GPU"),
    ]
    for absence in found.absences:
        assert str(absence) == f"no {absence.what}, for {absence.enables}; to get it: {absence.remedy}"


def test_parts_that_are_found_are_not_missing(programs):
    add_nvcc(programs / "nvcc")
    compiler = add_program(programs / "g++", "exit 0")
    found = find_toolchain()
    assert found.nvcc == toolchain.Nvcc(programs / "nvcc", "13.0.88", (80, 90, 120))
    assert found.host_compiler == compiler
    assert {absence.what for absence in found.absences} == {"CUDA headers", "TensorRT headers", "NVRTC", "NVIDIA GPU"}


@pytest.mark.parametrize("variable", ["CUDA_HOME", "CUDA_PATH"])
def test_nvcc_and_headers_of_a_toolkit_that_a_variable_names(programs, monkeypatch, tmp_path, variable):
    root = tmp_path / "cuda-12"
    nvcc = add_nvcc(root / "bin" / "nvcc", "12.4.131")
    (root / "include").mkdir()
    (root / "include" / "cuda_runtime_api.h").touch()
    monkeypatch.setenv(variable, str(root))
    found = find_toolchain()
    assert (found.nvcc.path, found.nvcc.version, found.cuda_headers) == (nvcc, "12.4.131", root / "include")


@pytest.mark.parametrize(("folder", "is_found"), [("cu13", True), ("cuda_nvcc", True), ("nccl", False)])
def test_nvcc_of_a_pip_package(programs, tmp_path, folder, is_found):
    nvcc = add_nvcc(tmp_path / "nvidia" / folder / "bin" / "nvcc")
    sys.modules["nvidia"].__spec__.submodule_search_locations.append(str(tmp_path / "nvidia"))
    found = toolchain.find_nvcc()
    assert (found and found.path) == (nvcc if is_found else None)


def test_a_broken_nvcc_is_skipped(programs, monkeypatch, tmp_path):
    add_program(programs / "nvcc", "echo broken; exit 127")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    nvcc = add_nvcc(tmp_path / "bin" / "nvcc")
    assert toolchain.find_nvcc().path == nvcc


@pytest.mark.parametrize("variable", ["NVCC_CCBIN", "CUDAHOSTCXX", "CXX"])
def test_the_host_compiler_that_a_variable_names_goes_first(programs, monkeypatch, variable):
    add_program(programs / "g++", "exit 0")
    wanted = add_program(programs / "g++-12", "exit 0")
    monkeypatch.setenv(variable, "g++-12")
    assert toolchain.find_host_compiler() == wanted


@pytest.mark.parametrize(
    "text",
    [
        "#define NV_TENSORRT_MAJOR 10\n#define NV_TENSORRT_MINOR 9\n#define NV_TENSORRT_PATCH 0 //!< patch",
        "#define TRT_MAJOR_ENTERPRISE 10\n#define TRT_MINOR_ENTERPRISE 9\n#define TRT_PATCH_ENTERPRISE 0\n"
        "#define NV_TENSORRT_MAJOR TRT_MAJOR_ENTERPRISE",
    ],
)
def test_tensorrt_headers(programs, monkeypatch, tmp_path, text):
    folder = tmp_path / "include"
    folder.mkdir()
    assert toolchain.find_tensorrt_headers() is None
    (folder / "NvInfer.h").touch()
    monkeypatch.setenv("TensorRT_ROOT", str(tmp_path))
    assert toolchain.find_tensorrt_headers() == toolchain.TensorRtHeaders(folder, "unknown version")
    (folder / "NvInferVersion.h").write_text(text)
    assert find_toolchain().tensorrt == toolchain.TensorRtHeaders(folder, "10.9.0")
    monkeypatch.delenv("TensorRT_ROOT")
    assert find_toolchain(tensorrt_include=folder).tensorrt.version == "10.9.0"


def test_a_named_folder_without_headers_is_an_error(programs, tmp_path):
    with pytest.raises(UserError, match=r"no NvInfer\.h in .*\n.*TensorRT's headers\n.*libnvinfer-headers-dev"):
        find_toolchain(tensorrt_include=tmp_path)


def test_gpus_by_nvidia_smi(programs):
    add_program(programs / "nvidia-smi", '[ "$1" = --query-gpu=compute_cap ] && printf "9.0\\n8.9\\n12.0\\n9.0\\n"')
    assert toolchain.find_gpus() == (89, 90, 120)
    add_program(programs / "nvidia-smi", 'echo "[N/A]"')
    assert toolchain.find_gpus() == ()
    add_program(programs / "nvidia-smi", "exit 9")
    assert toolchain.find_gpus() == ()


class Driver:
    """cuda.bindings.driver on a machine with two GPUs; functions return the status first, like the real ones."""

    CUdevice_attribute = SimpleNamespace(
        CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR=0, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR=1
    )
    status = 0

    def cuInit(self, flags):
        return (self.status,)

    def cuDeviceGetCount(self):
        return (0, 2)

    def cuDeviceGet(self, number):
        return (0, f"device {number}")

    def cuDeviceGetAttribute(self, attribute, device):
        return (0, {"device 0": (12, 0), "device 1": (8, 9)}[device][attribute])

    def cuDriverGetVersion(self):
        return (0, 13020)


def test_gpus_by_the_driver(programs, monkeypatch):
    driver = Driver()
    monkeypatch.setitem(sys.modules, "cuda.bindings", SimpleNamespace(driver=driver))
    assert (toolchain.find_gpus(), toolchain.find_driver_cuda()) == ((89, 120), (13, 2))
    driver.status = 100  # CUDA_ERROR_NO_DEVICE
    add_program(programs / "nvidia-smi", "echo 8.6")
    assert toolchain.find_gpus() == (86,)


def test_cuda_bindings_has_the_functions_in_use():
    driver = pytest.importorskip("cuda.bindings.driver", exc_type=ImportError)
    assert all(hasattr(driver, name) for name in vars(Driver) if name.startswith("cu"))
    names = vars(Driver.CUdevice_attribute)
    assert all(hasattr(driver.CUdevice_attribute, name) for name in names)


def test_nvrtc_of_this_machine():
    nvrtc = pytest.importorskip("cuda.bindings.nvrtc", exc_type=ImportError)
    try:
        nvrtc.nvrtcVersion()
    except Exception as error:
        pytest.skip(f"NVRTC does not load: {error}")
    found = toolchain.find_nvrtc()
    assert float(found.version) >= 12 and 90 in found.architectures


def test_an_nvrtc_that_does_not_load_is_missing(programs, monkeypatch):
    def version():
        raise RuntimeError("libnvrtc.so.13: cannot open shared object file")

    monkeypatch.setitem(sys.modules, "cuda.bindings", SimpleNamespace(nvrtc=SimpleNamespace(nvrtcVersion=version)))
    assert toolchain.find_nvrtc() is None

"""csrc/CMakeLists.txt builds the libraries, and TensorRT loads them."""

import ctypes
import shutil
import subprocess
from pathlib import Path

import plugin_library
import pytest
from tensorrt_rig import rig

from maskrcnn.plugins import build, native, toolchain

LIBRARIES = ("kernels", "plugins", "plugins_register")


def run(*command: str) -> subprocess.CompletedProcess:
    return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=600)


@pytest.fixture(scope="module")
def configured(tmp_path_factory):
    """Configures a build; skips the test if a requirement is missing."""
    nvcc = toolchain.find_nvcc()
    if shutil.which("cmake") is None or nvcc is None or not plugin_library.header_folders():
        pytest.skip("no cmake, nvcc or TensorRT headers (set TENSORRT_INCLUDE_DIR)")

    def configure(*definitions: str) -> tuple[Path, subprocess.CompletedProcess]:
        folder = tmp_path_factory.mktemp("cmake")
        compiler = f"-DCMAKE_CUDA_COMPILER={nvcc.path}"
        return folder, run("cmake", "-S", str(plugin_library.CSRC), "-B", str(folder), compiler, *definitions)

    return configure


def test_the_libraries_are_built_and_loaded(configured, tensorrt_rig):
    headers = plugin_library.header_folders()[0]
    architecture = 90 if 90 in toolchain.find_nvcc().architectures else max(toolchain.find_nvcc().architectures)
    folder, done = configured(f"-DTENSORRT_INCLUDE_DIR={headers}", f"-DCMAKE_CUDA_ARCHITECTURES={architecture}")
    assert done.returncode == 0, done.stdout
    done = run("cmake", "--build", str(folder))
    assert done.returncode == 0, done.stdout
    for name in LIBRARIES[:2]:
        library = ctypes.CDLL(str(folder / f"libmaskrcnn_{name}.so"))
        assert library.maskrcnn_kernels_version() == native.INTERFACE_VERSION
    version = rig.ask("import tensorrt; tell(tensorrt.__version__)", env=tensorrt_rig)
    if toolchain.find_tensorrt_headers(headers).version.partition(".")[0] == version.partition(".")[0]:
        code = f"""
import ctypes
import tensorrt as trt
ctypes.CDLL({str(folder / "libmaskrcnn_plugins_register.so")!r})
creators = trt.get_plugin_registry().all_creators
tell(sorted(creator.name for creator in creators if creator.plugin_namespace == "maskrcnn"))
"""
        assert rig.ask(code, env=tensorrt_rig) == ["BatchedNms", "MultilevelRoiAlign"]


def test_the_default_is_every_common_gpu(configured):
    _, done = configured("-DMASKRCNN_BUILD_PLUGINS=OFF")
    assert done.returncode == 0, done.stdout
    (line,) = [line for line in done.stdout.splitlines() if "-- maskrcnn: CUDA" in line]
    known = toolchain.find_nvcc().architectures
    chosen = [int(word.removesuffix("-real")) for word in line.rpartition(" ")[2].split(";")]
    assert chosen == sorted(set(build.COMMON_ARCHITECTURES) & set(known))
    assert line.endswith(f";{chosen[-1]}")  # the newest also as PTX


def test_missing_headers_are_named(configured, tmp_path):
    _, done = configured(f"-DTENSORRT_INCLUDE_DIR={tmp_path}")
    assert done.returncode != 0
    for words in ("found: no NvInferRuntime.h in", "expected: the headers of TensorRT 10", "fix: pass -DTensorRT_ROOT"):
        assert words in done.stdout

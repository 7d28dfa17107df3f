"""Toolchain discovery: compilers and headers for the plugins, and the GPUs to compile for.

A missing part is None in `Toolchain`, not an error; `absences` lists what it is needed for and how to install it.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from maskrcnn.errors import UserError

_HEADER_FOLDERS = (
    "/usr/include/x86_64-linux-gnu",
    "/usr/include/aarch64-linux-gnu",
    "/usr/include",
    "/usr/local/include",
    "/usr/local/tensorrt/include",
    "/usr/local/cuda/include",
    "/opt/tensorrt/include",
)
_CUDA_FOLDERS = ("/usr/local/cuda", "/usr")


@dataclass(frozen=True)
class Nvcc:
    """CUDA's compiler."""

    path: Path
    version: str  # e.g. 13.0.88
    architectures: tuple[int, ...]  # supported; 90 is compute capability 9.0


@dataclass(frozen=True)
class Nvrtc:
    """CUDA's run-time compiler, a library that needs neither the CUDA toolkit nor a host compiler."""

    version: str  # e.g. 13.2
    architectures: tuple[int, ...]


@dataclass(frozen=True)
class TensorRtHeaders:
    """TensorRT's C++ headers."""

    folder: Path  # contains NvInfer.h
    version: str  # e.g. 11.0.0; "unknown version" if the headers do not define it


@dataclass(frozen=True)
class Absence:
    """A missing part, what it is needed for and how to install it."""

    what: str
    enables: str
    remedy: str

    def __str__(self) -> str:
        return f"no {self.what}, for {self.enables}; to get it: {self.remedy}"


NVCC = Absence(
    "nvcc",
    "compiling the plugin libraries",
    "`pip install nvidia-cuda-nvcc` (CUDA 13), or the CUDA toolkit: https://developer.nvidia.com/cuda-downloads",
)
NVRTC = Absence(
    "NVRTC",
    "the kernels on a GPU without nvcc, and those of ahead-of-time plugins",
    "`pip install cuda-bindings nvidia-cuda-nvrtc`",
)
HOST_COMPILER = Absence("C++ compiler", "compiling the plugin libraries: nvcc calls it", "`apt install g++`")
_CUDA_HEADERS = Absence(
    "CUDA headers", "compiling the plugin libraries", "`pip install nvidia-cuda-runtime` (CUDA 13), or the CUDA toolkit"
)
TENSORRT_HEADERS = Absence(
    "TensorRT headers",
    "compiling libmaskrcnn_plugins, the C++ plugins for trtexec, Triton and C++",
    "`apt install libnvinfer-headers-dev` from NVIDIA, or TensorRT_ROOT set to TensorRT's folder",
)
GPU = Absence(
    "NVIDIA GPU", "compiling for exactly this machine", "an NVIDIA GPU and its driver: https://www.nvidia.com/drivers"
)


@dataclass(frozen=True, kw_only=True)
class Toolchain:
    """Result of `find_toolchain`; None for what is missing."""

    nvcc: Nvcc | None = None
    nvrtc: Nvrtc | None = None
    host_compiler: Path | None = None
    cuda_headers: Path | None = None  # folder with cuda_runtime_api.h
    tensorrt: TensorRtHeaders | None = None
    gpus: tuple[int, ...] = ()  # distinct compute capabilities; 90 is 9.0
    driver_cuda: tuple[int, int] | None = None  # newest CUDA version that the driver supports

    @property
    def absences(self) -> list[Absence]:
        """Missing parts, in the order of installation."""
        found = {
            NVCC: self.nvcc,
            HOST_COMPILER: self.host_compiler,
            _CUDA_HEADERS: self.cuda_headers,
            TENSORRT_HEADERS: self.tensorrt,
            NVRTC: self.nvrtc,
            GPU: self.gpus,
        }
        return [absence for absence, what in found.items() if not what]


def find_toolchain(*, tensorrt_include: Path | None = None) -> Toolchain:
    """Finds compilers, headers and GPUs of this machine, in about a second.

    Args:
        tensorrt_include: folder of TensorRT's headers (default: search the usual folders).

    Raises:
        UserError: if `tensorrt_include` contains no headers.
    """
    nvcc = find_nvcc()
    return Toolchain(
        nvcc=nvcc,
        nvrtc=find_nvrtc(),
        host_compiler=find_host_compiler(),
        cuda_headers=find_cuda_headers(nvcc),
        tensorrt=find_tensorrt_headers(tensorrt_include),
        gpus=find_gpus(),
        driver_cuda=find_driver_cuda(),
    )


def find_nvcc() -> Nvcc | None:
    """Returns the first working nvcc on PATH, in CUDA_HOME, CUDA_PATH, the usual CUDA folders or a pip package."""
    on_path = shutil.which("nvcc")
    roots = [*_cuda_roots(), *_wheel_folders()]
    for path in [*([Path(on_path)] if on_path else []), *(root / "bin" / "nvcc" for root in roots)]:
        described = _output(str(path), "--version")
        version = re.search(r"V(\d+(?:\.\d+)+)", described or "")
        if version:
            listed = _output(str(path), "--list-gpu-arch") or ""
            return Nvcc(path, version[1], tuple(sorted({int(n) for n in re.findall(r"compute_(\d+)\b", listed)})))
    return None


def find_nvrtc() -> Nvrtc | None:
    """Returns the NVRTC that cuda-bindings loads."""
    try:
        from cuda.bindings import nvrtc

        status, major, minor = nvrtc.nvrtcVersion()
        listed, architectures = nvrtc.nvrtcGetSupportedArchs()
    except Exception:  # ImportError, or an error of the bindings if the library is missing or does not load
        return None
    if status != nvrtc.nvrtcResult.NVRTC_SUCCESS or listed != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        return None
    return Nvrtc(f"{major}.{minor}", tuple(sorted(architectures)))


def find_host_compiler() -> Path | None:
    """Returns the C++ compiler for nvcc: from NVCC_CCBIN, CUDAHOSTCXX or CXX, or g++, c++ or clang++."""
    wanted = [os.environ[name] for name in ("NVCC_CCBIN", "CUDAHOSTCXX", "CXX") if os.environ.get(name)]
    for name in [*wanted, "g++", "c++", "clang++"]:
        if path := shutil.which(name):
            return Path(path)
    return None


def find_cuda_headers(nvcc: Nvcc | None) -> Path | None:
    """Returns the folder of cuda_runtime_api.h, preferably nvcc's own."""
    own = [nvcc.path.resolve().parents[1]] if nvcc else []
    roots = [*own, *_cuda_roots(), *_wheel_folders()]
    return next((root / "include" for root in roots if (root / "include" / "cuda_runtime_api.h").is_file()), None)


def find_tensorrt_headers(folder: Path | None = None) -> TensorRtHeaders | None:
    """Returns the folder and version of NvInfer.h.

    Args:
        folder: folder to search (default: those of TensorRT_ROOT and TENSORRT_ROOT, then the usual ones).

    Raises:
        UserError: if `folder` contains no headers.
    """
    roots = [os.environ[name] for name in ("TensorRT_ROOT", "TENSORRT_ROOT") if os.environ.get(name)]
    folders = [folder] if folder else [*(f"{root}/include" for root in roots), *roots, *_HEADER_FOLDERS]
    for candidate in map(Path, folders):
        if (candidate / "NvInfer.h").is_file():
            return TensorRtHeaders(candidate, _tensorrt_version(candidate / "NvInferVersion.h"))
    if folder:
        raise UserError(
            f"no NvInfer.h in {folder}",
            "the folder that contains TensorRT's headers",
            f"pass their include folder; to install them: {TENSORRT_HEADERS.remedy}",
        )
    return None


def _tensorrt_version(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    # Depending on the version, the macros are NV_TENSORRT_… or TRT_…_ENTERPRISE.
    numbers = dict(re.findall(r"#define (?:NV_TENSORRT|TRT)_(MAJOR|MINOR|PATCH)\w* (\d+)", text))
    return ".".join(numbers[part] for part in ("MAJOR", "MINOR", "PATCH") if part in numbers) or "unknown version"


def find_gpus() -> tuple[int, ...]:
    """Returns the distinct compute capabilities of the GPUs, from the driver or else nvidia-smi."""
    try:
        found = set(_gpus_of_driver())
    except Exception:  # no cuda-bindings, or no driver, for which the bindings raise several types
        text = _output("nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader") or ""
        found = {int(major + minor) for major, minor in re.findall(r"^(\d+)\.(\d)$", text, flags=re.MULTILINE)}
    return tuple(sorted(found))


def find_driver_cuda() -> tuple[int, int] | None:
    """Returns the newest CUDA version that the driver supports, which limits the PTX that it can read."""
    try:
        from cuda.bindings import driver

        number = int(_value(driver.cuDriverGetVersion()))  # 13020 is 13.2
    except Exception:  # as in find_gpus
        return None
    return number // 1000, number % 1000 // 10


def _gpus_of_driver() -> Iterator[int]:
    from cuda.bindings import driver

    _value(driver.cuInit(0))  # creates no context and allocates no GPU memory
    names = driver.CUdevice_attribute
    for number in range(_value(driver.cuDeviceGetCount())):
        device = _value(driver.cuDeviceGet(number))
        major = _value(driver.cuDeviceGetAttribute(names.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, device))
        minor = _value(driver.cuDeviceGetAttribute(names.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, device))
        yield 10 * major + minor


def _value(returned: tuple[Any, ...]) -> Any:
    """The value that a driver function returned after its status."""
    if int(returned[0]) != 0:
        raise RuntimeError(str(returned[0]))
    return returned[1] if len(returned) > 1 else None


def _cuda_roots() -> list[Path]:
    named = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), *_CUDA_FOLDERS]
    return [Path(root) for root in named if root]


def _wheel_folders() -> list[Path]:
    """Folders of CUDA in NVIDIA's pip packages: nvidia/cu13, or for CUDA 12 one per component."""
    spec = importlib.util.find_spec("nvidia")
    parents = spec.submodule_search_locations if spec else None
    return sorted(folder for parent in parents or () for folder in Path(parent).glob("cu*") if folder.is_dir())


def _output(*command: str) -> str | None:
    """Standard output of a program, or None if it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=60)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout if done.returncode == 0 else None

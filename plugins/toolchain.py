"""What a machine has to compile the plugins with: compilers, headers, and the GPUs to compile for.

Nothing here is needed to run a model. Nothing here raises because something is absent: a `Toolchain` has None in its
place, and `absences` says for each what it would be good for and how to get it.
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
    version: str  # as 13.0.88
    architectures: tuple[int, ...]  # that it compiles for; 90 is compute capability 9.0


@dataclass(frozen=True)
class _Nvrtc:
    """CUDA's compiler as a library, which needs neither a toolkit nor a host compiler."""

    version: str  # as 13.2
    architectures: tuple[int, ...]


@dataclass(frozen=True)
class TensorRtHeaders:
    """TensorRT's C++ headers."""

    folder: Path  # that holds NvInfer.h
    version: str  # as 11.0.0; "unknown version" where the headers do not say it


@dataclass(frozen=True)
class Absence:
    """Something that is missing."""

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
    "NVRTC", "compiling the kernels of ahead-of-time plugins", "`pip install cuda-bindings nvidia-cuda-nvrtc`"
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
    """Everything that `find_toolchain` looked for; None for what is missing."""

    nvcc: Nvcc | None = None
    nvrtc: _Nvrtc | None = None
    host_compiler: Path | None = None
    cuda_headers: Path | None = None  # the folder that holds cuda_runtime_api.h
    tensorrt: TensorRtHeaders | None = None
    gpus: tuple[int, ...] = ()  # compute capabilities, each once: 90 is 9.0
    driver_cuda: tuple[int, int] | None = None  # the newest CUDA that the driver knows

    @property
    def absences(self) -> list[Absence]:
        """What is missing, in the order in which one would get it."""
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
    """Looks at what this machine has, in about a second.

    Args:
        tensorrt_include: the folder of TensorRT's headers; by default they are searched where they usually are.

    Raises:
        UserError: when `tensorrt_include` is given and holds no headers.
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
    """The first nvcc that answers: on PATH, in CUDA_HOME, CUDA_PATH, CUDA's usual folders, or from a wheel."""
    on_path = shutil.which("nvcc")
    roots = [*_cuda_roots(), *_wheel_folders()]
    for path in [*([Path(on_path)] if on_path else []), *(root / "bin" / "nvcc" for root in roots)]:
        described = _output(str(path), "--version")
        version = re.search(r"V(\d+(?:\.\d+)+)", described or "")
        if version:
            listed = _output(str(path), "--list-gpu-arch") or ""
            return Nvcc(path, version[1], tuple(sorted({int(n) for n in re.findall(r"compute_(\d+)\b", listed)})))
    return None


def find_nvrtc() -> _Nvrtc | None:
    """NVRTC as cuda-bindings finds it."""
    try:
        from cuda.bindings import nvrtc

        status, major, minor = nvrtc.nvrtcVersion()
        listed, architectures = nvrtc.nvrtcGetSupportedArchs()
    except Exception:  # ImportError, or what the bindings raise where the library is missing or does not load
        return None
    if status != nvrtc.nvrtcResult.NVRTC_SUCCESS or listed != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        return None
    return _Nvrtc(f"{major}.{minor}", tuple(sorted(architectures)))


def find_host_compiler() -> Path | None:
    """The C++ compiler for nvcc to call: what NVCC_CCBIN, CUDAHOSTCXX or CXX say, else the usual names."""
    wanted = [os.environ[name] for name in ("NVCC_CCBIN", "CUDAHOSTCXX", "CXX") if os.environ.get(name)]
    for name in [*wanted, "g++", "c++", "clang++"]:
        if path := shutil.which(name):
            return Path(path)
    return None


def find_cuda_headers(nvcc: Nvcc | None) -> Path | None:
    """The folder of cuda_runtime_api.h: the compiler's own, else any."""
    own = [nvcc.path.resolve().parents[1]] if nvcc else []
    roots = [*own, *_cuda_roots(), *_wheel_folders()]
    return next((root / "include" for root in roots if (root / "include" / "cuda_runtime_api.h").is_file()), None)


def find_tensorrt_headers(folder: Path | None = None) -> TensorRtHeaders | None:
    """NvInfer.h and its version: in a folder, else in that of TensorRT_ROOT or TENSORRT_ROOT, else where it usually is.

    Raises:
        UserError: when a folder is given and holds no headers.
    """
    roots = [os.environ[name] for name in ("TensorRT_ROOT", "TENSORRT_ROOT") if os.environ.get(name)]
    folders = [folder] if folder else [*(f"{root}/include" for root in roots), *roots, *_HEADER_FOLDERS]
    for candidate in map(Path, folders):
        if (candidate / "NvInfer.h").is_file():
            return TensorRtHeaders(candidate, _tensorrt_version(candidate / "NvInferVersion.h"))
    if folder:
        came, expected = f"no NvInfer.h in {folder}", "the folder that holds TensorRT's headers"
        raise UserError(came, expected, f"name their include folder; to get them: {TENSORRT_HEADERS.remedy}")
    return None


def _tensorrt_version(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    # By version, the numbers stand behind NV_TENSORRT_… or behind TRT_…_ENTERPRISE.
    numbers = dict(re.findall(r"#define (?:NV_TENSORRT|TRT)_(MAJOR|MINOR|PATCH)\w* (\d+)", text))
    return ".".join(numbers[part] for part in ("MAJOR", "MINOR", "PATCH") if part in numbers) or "unknown version"


def find_gpus() -> tuple[int, ...]:
    """The compute capabilities of the GPUs, each once: by the driver's library, else by nvidia-smi."""
    try:
        found = set(_gpus_of_driver())
    except Exception:  # no cuda-bindings, or no driver, which the bindings say by several types
        text = _output("nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader") or ""
        found = {int(major + minor) for major, minor in re.findall(r"^(\d+)\.(\d)$", text, flags=re.MULTILINE)}
    return tuple(sorted(found))


def find_driver_cuda() -> tuple[int, int] | None:
    """The newest version of CUDA that the driver knows, which decides what PTX it reads."""
    try:
        from cuda.bindings import driver

        number = _value(driver.cuDriverGetVersion())  # 13020 is 13.2
    except Exception:  # as for the GPUs
        return None
    return number // 1000, number % 1000 // 10


def _gpus_of_driver() -> Iterator[int]:
    from cuda.bindings import driver

    _value(driver.cuInit(0))  # makes no context and takes no GPU memory
    names = driver.CUdevice_attribute
    for number in range(_value(driver.cuDeviceGetCount())):
        device = _value(driver.cuDeviceGet(number))
        major = _value(driver.cuDeviceGetAttribute(names.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, device))
        minor = _value(driver.cuDeviceGetAttribute(names.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, device))
        yield 10 * major + minor


def _value(answer: tuple[Any, ...]) -> Any:
    """What a function of the driver returned behind its status."""
    if int(answer[0]) != 0:
        raise RuntimeError(str(answer[0]))
    return answer[1] if len(answer) > 1 else None


def _cuda_roots() -> list[Path]:
    named = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), *_CUDA_FOLDERS]
    return [Path(root) for root in named if root]


def _wheel_folders() -> list[Path]:
    """The folders in which NVIDIA's wheels put CUDA: nvidia/cu13, or for CUDA 12 one for each component."""
    spec = importlib.util.find_spec("nvidia")
    parents = spec.submodule_search_locations if spec else None
    return sorted(folder for parent in parents or () for folder in Path(parent).glob("cu*") if folder.is_dir())


def _output(*command: str) -> str | None:
    """What a program prints, or None where it does not run or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=60)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout if done.returncode == 0 else None

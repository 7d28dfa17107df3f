"""TensorRT's Python package, the plugins in its registry, and whether an engine fits this machine.

TensorRT is imported inside functions, and handed on as `trt`: nothing here needs it before an engine is built or run.
"""

from __future__ import annotations

import importlib.util
import re
import threading
import weakref
from collections import deque
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from maskrcnn.errors import UserError
from maskrcnn.metadata import ModelMetadata
from maskrcnn.plugins import build, contract
from maskrcnn.plugins import build as cache
from maskrcnn.plugins.build import Library

OLDEST = (10, 9)  # the first with ahead-of-time plugins that the ONNX parser finds
_INSTALL = "`pip install '.[tensorrt]'` in the clone, which downloads TensorRT from NVIDIA; see docs/tensorrt.md"
OLDEST_ARCH = 80  # of AMPERE_PLUS engines, whose ahead-of-time kernels must run on each of their GPUs


class PluginForm(str, Enum):
    """How the custom ops get into an engine."""

    AOT = "aot"  # their kernels are part of it; it needs nothing where it runs
    LIBRARY = "library"  # they stay in libmaskrcnn_plugins.so, which is loaded before the engine


class Hardware(str, Enum):
    """On which GPUs an engine runs: the names of TensorRT's HardwareCompatibilityLevel, in lower case."""

    NONE = "none"  # the model of GPU that it was built on
    SAME_COMPUTE_CAPABILITY = "same_compute_capability"
    AMPERE_PLUS = "ampere_plus"  # compute capability 8.0 and newer


class Weights(str, Enum):
    """What an engine holds of the weights."""

    FIXED = "fixed"
    REFITTABLE = "refittable"  # others can take their place later
    STRIPPED = "stripped"  # none: the same ones are put in where it is used


@dataclass(frozen=True)
class Gpu:
    """A GPU as the driver describes it."""

    name: str
    compute_capability: tuple[int, int]

    @property
    def arch(self) -> int:
        """The compute capability as compilers write it: 90 for 9.0."""
        major, minor = self.compute_capability
        return 10 * major + minor


def import_tensorrt() -> Any:
    """The tensorrt module.

    Raises:
        UserError: when it is missing, older than 10.9, or cannot load its libraries.
    """
    oldest = ".".join(map(str, OLDEST))
    if importlib.util.find_spec("tensorrt") is None:
        raise UserError("no Python package tensorrt", f"TensorRT {oldest} or newer", _INSTALL)
    try:
        import tensorrt
    except Exception as error:  # ImportError and OSError for missing libraries, anything from a half-removed package
        raise UserError(
            f"the Python package tensorrt, which cannot be loaded ({_first_line(error)})",
            f"TensorRT {oldest} or newer with its libraries",
            f"install it anew: {_INSTALL}",
        ) from error
    if not hasattr(tensorrt, "__version__") or not hasattr(tensorrt, "Builder"):
        came = f"a module tensorrt that is not NVIDIA's ({getattr(tensorrt, '__file__', None)})"
        raise UserError(came, f"TensorRT {oldest} or newer", f"remove it, then {_INSTALL}")
    if version_of(tensorrt)[:2] < OLDEST:
        raise UserError(f"TensorRT {tensorrt.__version__}", f"{oldest} or newer", f"update it: {_INSTALL}")
    return tensorrt


def version_of(trt: Any) -> tuple[int, ...]:
    """The version in numbers: (11, 4, 0, 106) for 11.4.0.106."""
    return _numbers(trt.__version__)


def find_gpu(device: int = 0) -> Gpu:
    """A GPU of this machine, asked of the driver; no context is made on it.

    Raises:
        UserError: without cuda-bindings, without a driver, and where there is no such GPU.
    """
    try:
        from cuda.bindings import driver
    except ImportError as error:
        raise UserError("no Python package cuda-bindings", "cuda-bindings, to find the GPU", _INSTALL) from error
    try:
        _value(driver.cuInit(0))
        handle = _value(driver.cuDeviceGet(device))
        name = _value(driver.cuDeviceGetName(256, handle)).split(b"\0")[0].decode(errors="replace")
        kinds = driver.CUdevice_attribute
        major = _value(driver.cuDeviceGetAttribute(kinds.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, handle))
        minor = _value(driver.cuDeviceGetAttribute(kinds.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, handle))
    except Exception as error:  # the bindings say that there is no driver by several types
        raise UserError(
            f"no NVIDIA GPU {device} on this machine ({_first_line(error)})",
            "a GPU that the NVIDIA driver shows",
            "see `maskrcnn doctor`; without a GPU use --target openvino, or run the ONNX file",
        ) from error
    return Gpu(name, (major, minor))


def tensorrt_obstacle(device: int = 0) -> UserError | None:
    """Why no TensorRT engine can be built or run here, with everything that is missing, or None."""
    missing = []
    for look in (import_tensorrt, lambda: find_gpu(device)):
        try:
            look()
        except UserError as error:
            missing.append(error)
    if not missing:
        return None
    parts = zip(*((error.found, error.expected, error.fix) for error in missing), strict=True)
    return UserError(*("; ".join(dict.fromkeys(part)) for part in parts))


# Plugins


def plugin_hash(form: PluginForm) -> str:
    """A hash of the sources of the plugins in one form, which an engine's stamp holds."""
    if form is PluginForm.AOT:
        return cache.sources_hash(cache.SOURCES.rglob("aot.cu"))
    return cache.sources_hash(build.source_files(Library.PLUGINS))


def load_plugins(
    trt: Any,
    form: PluginForm,
    *,
    arch: int | None = None,
    image: Any = None,
    library: Path | None = None,
) -> Path | None:
    """Puts the plugins into TensorRT's registry; a second call finds them there.

    To run an engine with ahead-of-time plugins this is not needed.

    Args:
        trt: the tensorrt module.
        form: which plugins.
        arch: compute capability to compile ahead-of-time kernels for, 90 for 9.0, or that the library must run on;
            by default what this machine's GPUs have.
        image: for ahead-of-time kernels, see `plugins.aot.register`.
        library: the plugin library; by default that of the cache for this TensorRT.

    Returns:
        the plugin library, None for ahead-of-time plugins.

    Raises:
        UserError: where the plugins cannot be compiled, found or loaded, and where the other form has been loaded in
            this process: both have `MultilevelRoiAlign`.
    """
    if form is PluginForm.AOT:
        from maskrcnn.plugins import aot

        aot.register(arch=arch, image=image)
        return None
    path = library or build.find_library(Library.PLUGINS, arch, tensorrt=trt.__version__)
    if path is None or not path.is_file():
        wanted = f"{Library.PLUGINS.file_name} of the present sources for TensorRT {trt.__version__} in the cache"
        raise UserError(
            f"no plugin library {path or wanted}",
            "the compiled plugins that the engine calls",
            "`maskrcnn build-plugins --form library`",
        )
    if not _is_loaded(trt):
        _load_library(trt, path)
    return path


def _is_loaded(trt: Any) -> bool:
    """Whether the library's plugins are in the registry.

    Raises:
        UserError: where the ahead-of-time plugins are.
    """
    registry, version = trt.get_plugin_registry(), str(contract.VERSION)
    if registry.get_creator(contract.BATCHED_NMS.name, version, contract.DOMAIN) is not None:
        return True
    if registry.get_creator(contract.MULTILEVEL_ROI_ALIGN.name, version, contract.DOMAIN) is None:
        return False
    raise UserError(
        "the ahead-of-time plugins are registered in this process",
        "either these or the plugin library in one process",
        "load engines with the plugin library in a process of their own",
    )


def _load_library(trt: Any, path: Path) -> None:
    # None where it cannot be loaded, or where a plugin of it is there already; the library logs its own reason.
    handle = trt.get_plugin_registry().load_library(str(path.resolve()))
    if handle is None or not _is_loaded(trt):
        raise UserError(
            f"{path}: TensorRT {trt.__version__} does not load it",
            "a library compiled for this TensorRT, CUDA and GPU",
            "compile it here: `maskrcnn build-plugins --form library --force`",
        )


# Stamps


def check_stamp(
    metadata: ModelMetadata, *, trt: Any, gpu: str, compute_capability: tuple[int, int]
) -> UserError | None:
    """Whether an engine fits this machine, by what its stamp says.

    The kernels of ahead-of-time plugins are in the engine, so newer sources of them do not matter to it.

    Args:
        metadata: of the engine.
        trt: the tensorrt module.
        gpu: name of the GPU, as the driver gives it.
        compute_capability: of the GPU, (9, 0) for 9.0.

    Returns:
        None, or an error that names the field that differs, both values, and the command that rebuilds.
    """
    stamp = metadata.stamp
    if stamp.get("target") != "tensorrt":
        return UserError(
            f"an engine for {stamp.get('target', 'nothing that its stamp names')}", "one for TensorRT", _rebuild(stamp)
        )
    if stamp.get("refit") == Weights.STRIPPED.value:
        return UserError(
            "an engine that was built without its weights",
            "one that has got them",
            "put them in: `maskrcnn refit-engine ENGINE MODEL.onnx --output NEW.engine`",
        )
    for field, (wanted, here) in _needs(stamp, version_of(trt), gpu, compute_capability).items():
        if wanted != here:
            return UserError(
                f"an engine built for {field} {wanted}; here is {here}", f"{field} {here}", _rebuild(stamp)
            )
    return None


def _needs(
    stamp: dict[str, Any], version: tuple[int, ...], gpu: str, capability: tuple[int, int]
) -> dict[str, tuple[str, str]]:
    """What must be equal: by the name of the field the engine's value, and that of this machine."""
    needs = {}
    built = _numbers(stamp.get("tensorrt", ""))
    here = ".".join(map(str, version))
    is_portable = stamp.get("version_compatible") == "yes" and built <= version
    if not is_portable:
        needs["tensorrt"] = (str(stamp.get("tensorrt")), here)
    dotted = ".".join(map(str, capability))
    level = stamp.get("hardware_compatibility", Hardware.NONE.value)
    if level == Hardware.AMPERE_PLUS.value:
        is_new = 10 * capability[0] + capability[1] >= OLDEST_ARCH
        needs["compute_capability"] = (dotted if is_new else "8.0 and newer", dotted)
    else:
        needs["compute_capability"] = (str(stamp.get("compute_capability")), dotted)
    if level == Hardware.NONE.value:
        needs["gpu"] = (str(stamp.get("gpu")), gpu)
    if stamp.get("plugins") == PluginForm.LIBRARY.value:
        needs["plugin_hash"] = (str(stamp.get("plugin_hash")), plugin_hash(PluginForm.LIBRARY))
    return needs


def _rebuild(stamp: dict[str, Any]) -> str:
    return f"rebuild it here: `{stamp.get('command') or 'maskrcnn build-engine --fp16 --target tensorrt'}`"


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version)[:4])


def _value(answer: tuple[Any, ...]) -> Any:
    """What a function of the driver returned behind its status."""
    if int(answer[0]) != 0:
        raise RuntimeError(str(answer[0]))
    return answer[1] if len(answer) > 1 else None


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:200]


# What TensorRT says, of which one logger keeps the warnings and errors for as long as the process lives.
#
# TensorRT takes a logger wherever it makes something, but what it says outside of that goes to the first one that it
# ever got. Were that freed with the engine that it was made for, TensorRT would call into memory that is no logger any
# more.

_KEPT = 500  # messages; a build that fails says why at its end


@dataclass(frozen=True)
class Message:
    """One message; `severity` as TensorRT names it."""

    severity: str
    text: str


class Log:
    """What TensorRT says from some moment on.

    Args:
        logger: for TensorRT's constructors.
    """

    def __init__(self, logger: Any) -> None:
        self.logger = logger
        self.restart()

    def restart(self) -> None:
        """Leaves out what has been said so far."""
        self._start = self.logger.record.count

    @property
    def messages(self) -> list[Message]:
        """Warnings and errors, the newest `_KEPT` of them, of all threads: TensorRT builds in several."""
        return [said.message for said in self.logger.record.since(self._start)]

    def take(self) -> list[Message]:
        """Those of the calling thread, which are forgotten then; where it has none, those of all.

        For what TensorRT does in the calling thread, so that errors of other engines and of earlier runs do not count.
        """
        return self.logger.record.take(self._start) or self.messages


@dataclass
class _Said:
    number: int
    thread: int
    message: Message
    is_taken: bool = False


class _Record:
    """The newest messages, numbered; any thread may add to it."""

    def __init__(self) -> None:
        self.count = 0
        self._kept: deque[_Said] = deque(maxlen=_KEPT)
        # Reentrant, as TensorRT says something, too, when Python frees an object of its amid these lines.
        self._lock = threading.RLock()

    def add(self, message: Message) -> None:
        with self._lock:
            self._kept.append(_Said(self.count, threading.get_ident(), message))
            self.count += 1

    def since(self, start: int) -> list[_Said]:
        with self._lock:
            kept = list(self._kept)
        return [said for said in kept if said.number >= start and not said.is_taken]

    def take(self, start: int) -> list[Message]:
        mine = [said for said in self.since(start) if said.thread == threading.get_ident()]
        for said in mine:
            said.is_taken = True
        return [said.message for said in mine]


# By module. Python keeps a module that was imported, and so its logger, which TensorRT refers to. Only those that play
# TensorRT in tests are freed, and weak keys let their loggers go with them.
_LOGGERS: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()
_LOGGERS_LOCK = threading.Lock()


def listen(trt: Any) -> Log:
    """What TensorRT says from now on, but for information and verbose messages.

    Args:
        trt: the tensorrt module.
    """
    with _LOGGERS_LOCK:
        if trt not in _LOGGERS:
            _LOGGERS[trt] = _new_logger(trt)
        return Log(_LOGGERS[trt])


def _new_logger(trt: Any) -> Any:
    base, severity = trt.ILogger, trt.ILogger.Severity  # and not `trt`, which the class would keep alive
    ignored = (severity.VERBOSE, severity.INFO)  # hundreds of thousands of them

    class RecordingLogger(base):
        def __init__(self) -> None:
            base.__init__(self)  # the bindings want it called by name
            self.record = _Record()

        def log(self, severity: Any, msg: str) -> None:
            if severity not in ignored:
                self.record.add(Message(severity.name, msg))

    return RecordingLogger()

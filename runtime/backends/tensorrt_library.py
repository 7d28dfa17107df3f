"""TensorRT's Python package, its logger, the plugins in its registry, and the compatibility of engines.

TensorRT is imported only when an engine is built or run, and passed as `trt`.
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

from maskrcnn.errors import UserError, reason_of
from maskrcnn.metadata import ModelMetadata
from maskrcnn.plugins import build, contract
from maskrcnn.plugins.build import Library

OLDEST = (10, 9)  # first version with an ONNX parser that finds ahead-of-time plugins
OLDEST_ARCH = 80  # lowest compute capability for AMPERE_PLUS engines
_INSTALL = "`pip install '.[tensorrt]'` in the clone, which downloads TensorRT from NVIDIA; see docs/tensorrt.md"


class PluginForm(str, Enum):
    """How an engine contains the custom ops."""

    AOT = "aot"  # the engine contains their kernels and needs no other file
    LIBRARY = "library"  # in libmaskrcnn_plugins.so, which is loaded before the engine


class Hardware(str, Enum):
    """GPUs that an engine runs on: TensorRT's HardwareCompatibilityLevel in lower case."""

    NONE = "none"  # the GPU model it was built on
    SAME_COMPUTE_CAPABILITY = "same_compute_capability"
    AMPERE_PLUS = "ampere_plus"  # compute capability 8.0 and newer


class Weights(str, Enum):
    """How an engine contains the weights."""

    FIXED = "fixed"
    REFITTABLE = "refittable"  # can be replaced later
    STRIPPED = "stripped"  # no weights; they are added before use


@dataclass(frozen=True)
class Gpu:
    """Properties of a GPU, from the driver."""

    name: str
    compute_capability: tuple[int, int]

    @property
    def arch(self) -> int:
        """Compute capability as compilers write it: 90 for 9.0."""
        major, minor = self.compute_capability
        return 10 * major + minor


def import_tensorrt() -> Any:
    """Imports the tensorrt module.

    Raises:
        UserError: if it is missing, older than 10.9, or cannot load its libraries.
    """
    oldest = ".".join(map(str, OLDEST))
    if importlib.util.find_spec("tensorrt") is None:
        raise UserError("no Python package tensorrt", f"TensorRT {oldest} or newer", _INSTALL)
    try:
        import tensorrt
    except Exception as error:  # ImportError or OSError for missing libraries, other errors from a half-removed package
        raise UserError(
            f"the Python package tensorrt, which cannot be loaded ({reason_of(error)})",
            f"TensorRT {oldest} or newer with its libraries",
            f"reinstall it: {_INSTALL}",
        ) from error
    if not hasattr(tensorrt, "__version__") or not hasattr(tensorrt, "Builder"):
        found = f"a module tensorrt that is not NVIDIA's ({getattr(tensorrt, '__file__', None)})"
        raise UserError(found, f"TensorRT {oldest} or newer", f"remove it, then {_INSTALL}")
    if version_of(tensorrt)[:2] < OLDEST:
        raise UserError(f"TensorRT {tensorrt.__version__}", f"{oldest} or newer", f"update it: {_INSTALL}")
    return tensorrt


def version_of(trt: Any) -> tuple[int, ...]:
    """Returns the version as numbers: (11, 4, 0, 106) for 11.4.0.106."""
    return _numbers(trt.__version__)


def find_gpu(device: int = 0) -> Gpu:
    """Describes a GPU of this machine with the driver API, without creating a context.

    Raises:
        UserError: if cuda-bindings, the driver or the GPU is missing.
    """
    try:
        from cuda.bindings import driver
    except ImportError as error:
        raise UserError("no Python package cuda-bindings", "cuda-bindings, to find the GPU", _INSTALL) from error
    try:
        _value(driver.cuInit(0))
        handle = _value(driver.cuDeviceGet(device))
        name: bytes = _value(driver.cuDeviceGetName(256, handle))
        kinds = driver.CUdevice_attribute
        major = _value(driver.cuDeviceGetAttribute(kinds.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, handle))
        minor = _value(driver.cuDeviceGetAttribute(kinds.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, handle))
    except Exception as error:  # without a driver the bindings raise several types
        raise UserError(
            f"no NVIDIA GPU {device} on this machine ({reason_of(error)})",
            "a GPU that the NVIDIA driver shows",
            "see `maskrcnn doctor`; without a GPU use --target openvino, or run the ONNX file",
        ) from error
    return Gpu(name.split(b"\0")[0].decode(errors="replace"), (major, minor))


def find_gpus() -> tuple[Gpu, ...]:
    """Describes the NVIDIA GPUs of this machine; empty without a driver."""
    found: list[Gpu] = []
    try:
        while True:
            found.append(find_gpu(len(found)))
    except UserError:
        return tuple(found)


def tensorrt_obstacle(device: int = 0) -> UserError | None:
    """Returns an error that lists what is missing to build or run TensorRT engines here, or None."""
    errors = []
    for check in (import_tensorrt, lambda: find_gpu(device)):
        try:
            check()
        except UserError as error:
            errors.append(error)
    if not errors:
        return None
    parts = zip(*((error.found, error.expected, error.fix) for error in errors), strict=True)
    return UserError(*("; ".join(dict.fromkeys(part)) for part in parts))


# Plugins


def plugin_hash(form: PluginForm) -> str:
    """Returns the hash of the plugins' sources, as stored in an engine's stamp."""
    if form is PluginForm.AOT:
        return build.sources_hash(build.SOURCES.rglob("aot.cu"))
    return build.sources_hash(build.source_files(Library.PLUGINS))


def load_plugins(
    trt: Any,
    form: PluginForm,
    *,
    arch: int | None = None,
    image: Any = None,
    library: Path | None = None,
) -> Path | None:
    """Registers the plugins with TensorRT, once per process.

    An engine with ahead-of-time plugins runs without this.

    Args:
        trt: the tensorrt module.
        form: form of the plugins.
        arch: compute capability to compile ahead-of-time kernels for, or that the library must support: 90 for 9.0
            (default: those of this machine's GPUs).
        image: image of ahead-of-time kernels, see `plugins.aot.register`.
        library: path of the plugin library (default: from the cache, for this TensorRT version).

    Returns:
        Path of the plugin library, None for ahead-of-time plugins.

    Raises:
        UserError: if the plugins cannot be compiled, found or loaded, or the other form, which also defines
            `MultilevelRoiAlign`, is registered in this process.
    """
    if form is PluginForm.AOT:
        from maskrcnn.plugins import aot

        aot.register(arch=arch, image=image)
        return None
    path = library or build.find_library(Library.PLUGINS, arch, tensorrt=trt.__version__)
    if path is None or not path.is_file():
        cached = f"{Library.PLUGINS.file_name} of the present sources for TensorRT {trt.__version__} in the cache"
        raise UserError(
            f"no plugin library {path or cached}",
            "the compiled plugins that the engine calls",
            "`maskrcnn build-plugins --form library`",
        )
    if _is_loaded(trt):
        return path
    # None if it cannot be loaded, or one of its plugins is registered already; the library logs the reason.
    handle = trt.get_plugin_registry().load_library(str(path.resolve()))
    if handle is None or not _is_loaded(trt):
        raise UserError(
            f"{path}: TensorRT {trt.__version__} cannot load it",
            "a library compiled for this TensorRT, CUDA and GPU",
            "compile it here: `maskrcnn build-plugins --form library --force`",
        )
    return path


def _is_loaded(trt: Any) -> bool:
    """Whether the library's plugins are registered.

    Raises:
        UserError: if the ahead-of-time plugins are registered.
    """
    registry, version = trt.get_plugin_registry(), str(contract.VERSION)
    if registry.get_creator(contract.BATCHED_NMS.name, version, contract.DOMAIN) is not None:
        return True
    if registry.get_creator(contract.MULTILEVEL_ROI_ALIGN.name, version, contract.DOMAIN) is None:
        return False
    raise UserError(
        "the ahead-of-time plugins are registered in this process",
        "only one form of the plugins per process",
        "load engines with the plugin library in another process",
    )


# Stamps


def check_stamp(
    metadata: ModelMetadata, *, trt: Any, gpu: str, compute_capability: tuple[int, int]
) -> UserError | None:
    """Checks an engine's stamp against this machine.

    The engine contains the kernels of ahead-of-time plugins, so changes to their sources do not matter.

    Args:
        metadata: metadata of the engine.
        trt: the tensorrt module.
        gpu: name of the GPU, from the driver.
        compute_capability: compute capability of the GPU, (9, 0) for 9.0.

    Returns:
        None if the engine runs here, or an error with the differing field, both values, and the rebuild command.
    """
    stamp = metadata.stamp
    rebuild = f"rebuild it here: `{stamp.get('command') or 'maskrcnn build-engine --fp16 --target tensorrt'}`"
    if stamp.get("target") != "tensorrt":
        return UserError(f"an engine for {stamp.get('target', 'an unknown target')}", "one for TensorRT", rebuild)
    if stamp.get("refit") == Weights.STRIPPED.value:
        return UserError(
            "an engine built without its weights",
            "an engine with weights",
            "add them: `maskrcnn refit-engine ENGINE MODEL.onnx --output NEW.engine`",
        )
    for field, (built, here) in _requirements(stamp, version_of(trt), gpu, compute_capability).items():
        if built != here:
            return UserError(f"an engine built for {field} {built}; here is {here}", f"{field} {here}", rebuild)
    return None


def _requirements(
    stamp: dict[str, Any], version: tuple[int, ...], gpu: str, capability: tuple[int, int]
) -> dict[str, tuple[str, str]]:
    """Fields that must be equal, by name, with the engine's value and this machine's value."""
    fields: dict[str, tuple[str, str]] = {}
    is_portable = stamp.get("version_compatible") == "yes" and _numbers(stamp.get("tensorrt", "")) <= version
    if not is_portable:
        fields["tensorrt"] = (str(stamp.get("tensorrt")), ".".join(map(str, version)))
    here = ".".join(map(str, capability))
    level = stamp.get("hardware_compatibility", Hardware.NONE.value)
    if level == Hardware.AMPERE_PLUS.value:
        is_supported = 10 * capability[0] + capability[1] >= OLDEST_ARCH
        fields["compute_capability"] = (here if is_supported else "8.0 and newer", here)
    else:
        fields["compute_capability"] = (str(stamp.get("compute_capability")), here)
    if level == Hardware.NONE.value:
        fields["gpu"] = (str(stamp.get("gpu")), gpu)
    if stamp.get("plugins") == PluginForm.LIBRARY.value:
        fields["plugin_hash"] = (str(stamp.get("plugin_hash")), plugin_hash(PluginForm.LIBRARY))
    return fields


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version)[:4])


def _value(result: tuple[Any, ...]) -> Any:
    """Returns the value that a driver function returned after its status."""
    if int(result[0]) != 0:
        raise RuntimeError(str(result[0]))
    return result[1] if len(result) > 1 else None


# TensorRT's messages
#
# TensorRT takes a logger for each object that it creates, but sends other messages to the first logger it received. If
# that logger were freed with its engine, TensorRT would call into freed memory. Therefore one logger per process
# records all warnings and errors.

_MAX_MESSAGES = 500  # kept; a failed build logs its reason last


@dataclass(frozen=True)
class Message:
    """A message; `severity` is TensorRT's name."""

    severity: str
    text: str


class Log:
    """TensorRT's messages since this object was created.

    Args:
        logger: logger to pass to TensorRT's constructors.
    """

    def __init__(self, logger: Any) -> None:
        self.logger = logger
        self.restart()

    def restart(self) -> None:
        """Discards the messages so far."""
        self._start = self.logger.record.count

    @property
    def messages(self) -> list[Message]:
        """The newest 500 warnings and errors of all threads: TensorRT builds in several threads."""
        return [entry.message for entry in self.logger.record.since(self._start)]

    def take(self) -> list[Message]:
        """Removes and returns the messages of the calling thread; if it has none, returns those of all threads.

        Use it after a call in this thread: it excludes errors of other engines and of earlier runs.
        """
        return self.logger.record.take(self._start) or self.messages


@dataclass
class _Entry:
    number: int
    thread: int
    message: Message
    is_taken: bool = False


class _Record:
    """The newest messages, numbered; any thread may add to it."""

    def __init__(self) -> None:
        self.count = 0
        self._entries: deque[_Entry] = deque(maxlen=_MAX_MESSAGES)
        # Reentrant: TensorRT also logs if Python frees a TensorRT object while the lock is held.
        self._lock = threading.RLock()

    def add(self, message: Message) -> None:
        with self._lock:
            self._entries.append(_Entry(self.count, threading.get_ident(), message))
            self.count += 1

    def since(self, start: int) -> list[_Entry]:
        with self._lock:
            entries = list(self._entries)
        return [entry for entry in entries if entry.number >= start and not entry.is_taken]

    def take(self, start: int) -> list[Message]:
        mine = [entry for entry in self.since(start) if entry.thread == threading.get_ident()]
        for entry in mine:
            entry.is_taken = True
        return [entry.message for entry in mine]


# Logger by module. Python keeps an imported module, and so its logger, which TensorRT uses. Tests replace the module;
# weak keys free the loggers of replaced modules.
_LOGGERS: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()
_LOGGERS_LOCK = threading.Lock()


def listen(trt: Any) -> Log:
    """Starts a log of TensorRT's warnings and errors.

    Args:
        trt: the tensorrt module.
    """
    with _LOGGERS_LOCK:
        if trt not in _LOGGERS:
            _LOGGERS[trt] = _new_logger(trt)
        return Log(_LOGGERS[trt])


def _new_logger(trt: Any) -> Any:
    base, severity = trt.ILogger, trt.ILogger.Severity  # the class must not refer to `trt` and keep it alive
    ignored = (severity.VERBOSE, severity.INFO)  # hundreds of thousands of messages

    class RecordingLogger(base):  # type: ignore[misc, valid-type]
        def __init__(self) -> None:
            base.__init__(self)  # TensorRT's bindings require this form of the call
            self.record = _Record()

        def log(self, severity: Any, msg: str) -> None:
            if severity not in ignored:
                self.record.add(Message(severity.name, msg))

    return RecordingLogger()

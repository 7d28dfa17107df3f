"""Building a TensorRT plan from an ONNX graph: network, settings, profiles, timing cache, progress.

The same source works on TensorRT 10.9 and 11: every network is strongly typed (a flag in 10, the only kind in 11), so
the graph alone determines the precision of each operation.

CUDA graphs need no builder settings: no shape of the graph depends on a value, and auxiliary streams are captured with
the main one. They work best with profiles of one shape, and without auxiliary streams if contexts share a GPU.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeVar

from maskrcnn.errors import UserError, reason_of
from maskrcnn.files import atomic_path
from maskrcnn.metadata import ModelMetadata
from maskrcnn.plugins import aot, build
from maskrcnn.runtime.backends.base import detector_specs
from maskrcnn.runtime.backends.tensorrt_library import Gpu, Log, Weights, listen
from maskrcnn.runtime.build.messages import failure, parsing_failure
from maskrcnn.runtime.build.profiles import Profile
from maskrcnn.runtime.build.request import BuildRequest, Progress
from maskrcnn.runtime.engine_files import STAGE_PREFIX

_Result = TypeVar("_Result")
_POLL_S = 0.1  # maximum delay of the main thread's reaction to Ctrl-C
_GIGABYTE = 1 << 30
_DTYPES = {"float32": "FLOAT", "int64": "INT64", "int32": "INT32"}  # TensorRT's names of NumPy types


def build_plan(
    trt: Any,
    graph: bytes,
    metadata: ModelMetadata,
    request: BuildRequest,
    *,
    progress: Progress,
    timing_cache: Path | None = None,
    plugin_library: Path | None = None,
    stop: threading.Event | None = None,
) -> tuple[Any, tuple[str, ...]]:
    """Builds a plan. The plugins must be in the registry, see `load_plugins`.

    Args:
        trt: the tensorrt module.
        graph: content of an ONNX file for TensorRT's parser.
        metadata: metadata of the model.
        request: profiles and settings; its paths are not read.
        progress: receives the builder's phases as tasks, from the builder's threads.
        timing_cache: file of layer timings, read before and written after the build, even if the build fails.
        plugin_library: library to embed in version-compatible engines, as they may be loaded elsewhere.
        stop: ends the build once it is set.

    Returns:
        the plan (a TensorRT buffer) and TensorRT's warnings.

    Raises:
        UserError: with the cause, if the parser or the builder fails, or if the inputs and outputs of the graph do not
            match the detector contract.
    """
    log = listen(trt)
    aot.faults.clear()
    try:
        builder = trt.Builder(log.logger)
    except TypeError as error:  # raised by the bindings without a builder
        raise failure(log.messages, f"TensorRT has no builder here ({error})", "TensorRT with its libraries") from error
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log.logger)
    if not parser.parse(graph):
        if aot.faults:
            raise _plugin_fault(aot.faults[0])
        raise parsing_failure(parser, log.messages, request.stage_of)
    _check_contract(network, metadata)
    config = builder.create_builder_config()
    _configure(trt, config, request, plugin_library)
    _add_profiles(builder, config, request.profiles(metadata.preprocessing), metadata.preprocessing.channels, log)
    if timing_cache is not None:
        _load_timings(config, timing_cache)
        log.restart()  # TensorRT logs an incompatible cache as an error
    with ExitStack() as phases:
        monitor = _make_monitor(trt, progress, stop or threading.Event(), phases)
        config.progress_monitor = monitor
        try:
            plan = builder.build_serialized_network(network, config)
        finally:
            if timing_cache is not None:
                _save_timings(config, timing_cache)
    if monitor.fault is not None:
        raise monitor.fault
    if plan is None and aot.faults:
        raise _plugin_fault(aot.faults[0])
    if plan is None:
        raise failure(log.messages, "TensorRT built no engine", "a plan")
    return plan, tuple(m.text for m in log.messages if m.severity == "WARNING")


def _plugin_fault(error: Exception) -> UserError:
    """The error for an exception of an ahead-of-time plugin during a build."""
    if isinstance(error, UserError):
        return error
    found = f"an ahead-of-time plugin that failed during the build: {type(error).__name__}: {reason_of(error)}"
    fix = "use the plugin library (`maskrcnn build-plugins --form library`, then --plugin-library), and report this"
    refusal = UserError(found, "a compiled kernel", fix)
    refusal.__cause__ = error
    return refusal


def _check_contract(network: Any, metadata: ModelMetadata) -> None:
    """Compares the inputs and outputs of a parsed network with the detector contract (docs/contracts.md)."""
    inputs, outputs = detector_specs(metadata)
    parsed = (
        [network.get_input(index) for index in range(network.num_inputs)],
        [network.get_output(index) for index in range(network.num_outputs)],
    )
    for kind, specs, tensors in zip(("inputs", "outputs"), (inputs, outputs), parsed, strict=True):
        expected = {name: _DTYPES[spec.dtype] for name, spec in specs.items()}
        # Stages that were made outputs are not part of the contract.
        found = {tensor.name: tensor.dtype.name for tensor in tensors if not tensor.name.startswith(STAGE_PREFIX)}
        if found != expected:
            raise UserError(
                f"a network with the {kind} {_listed(found)}",
                _listed(expected),
                "export the model again, and build from that file",
            )


def _listed(types: dict[str, str]) -> str:
    return ", ".join(f"{name} {kind}" for name, kind in types.items())


def _configure(trt: Any, config: Any, request: BuildRequest, plugin_library: Path | None) -> None:
    flags = {
        trt.BuilderFlag.TF32: request.tf32,  # on by default in TensorRT
        trt.BuilderFlag.VERSION_COMPATIBLE: request.version_compatible,
        trt.BuilderFlag.REFIT: request.weights is Weights.REFITTABLE,
        trt.BuilderFlag.STRIP_PLAN: request.weights is Weights.STRIPPED,
        trt.BuilderFlag.REFIT_IDENTICAL: request.weights is Weights.STRIPPED,
    }
    for flag, is_set in flags.items():
        (config.set_flag if is_set else config.clear_flag)(flag)
    if request.workspace_gb is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, int(request.workspace_gb * _GIGABYTE))
    if request.optimization_level is not None:
        config.builder_optimization_level = request.optimization_level
    if request.aux_streams is not None:
        config.max_aux_streams = request.aux_streams
    config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.__members__[request.hardware.name]
    if request.version_compatible and plugin_library is not None:
        config.plugins_to_serialize = [str(plugin_library.resolve())]


def _add_profiles(builder: Any, config: Any, profiles: Sequence[Profile], channels: int, log: Log) -> None:
    for profile in profiles:
        corners = [profile.corner(which) for which in ("min", "opt", "max")]
        added = builder.create_optimization_profile()
        try:
            added.set_shape("images", *((batch, channels, height, width) for batch, height, width in corners))
            added.set_shape("image_sizes", *((batch, 2) for batch, _, _ in corners))
            is_added = config.add_optimization_profile(added) >= 0
        except ValueError as error:  # raised by the bindings for shapes that contradict each other
            found = f"the profile {profile} ({error})"
            raise UserError(found, "a profile that TensorRT accepts", "choose another --batch and --size") from error
        if not is_added:
            what = f"TensorRT rejects the profile {profile}"
            raise failure(log.messages, what, "MIN ≤ OPT ≤ MAX, within the network's own limits")


# Progress and interruption


def _make_monitor(trt: Any, progress: Progress, stop: threading.Event, phases: ExitStack) -> Any:
    """Makes a `trt.IProgressMonitor` that reports phases as tasks and ends the build once `stop` is set.

    An exception of `progress` must not propagate through TensorRT's code, which would end the process: it stops the
    build and is stored as the monitor's `fault`.

    Args:
        trt: the tensorrt module.
        progress: receives the phases; nested ones are indented.
        stop: see `build_plan`.
        phases: closes the tasks of a build that ends early.
    """

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)  # the bindings require the call by name
            self.fault: BaseException | None = None
            self._open: dict[str, _Phase] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            def start() -> None:
                parent = self._open.get(parent_phase or "")
                depth = parent.depth + 1 if parent else 0
                self._open[phase_name] = phases.enter_context(_Phase(progress, phase_name, depth, num_steps))

            self._guard(start)

        def step_complete(self, phase_name: str, step: int) -> bool:
            if phase_name in self._open:
                self._guard(lambda: self._open[phase_name].complete(step))
            return not stop.is_set()

        def phase_finish(self, phase_name: str) -> None:
            if phase_name in self._open:
                self._guard(lambda: self._open.pop(phase_name).close())

        def _guard(self, call: Callable[[], None]) -> None:
            try:
                call()
            except BaseException as error:
                self.fault = self.fault or error
                stop.set()

    return Monitor()


class _Phase(ExitStack):
    """A phase of the builder as an open task."""

    def __init__(self, progress: Progress, name: str, depth: int, steps: int) -> None:
        super().__init__()
        self.depth = depth
        self._done = 0
        self._advance = self.enter_context(progress.task(f"{'  ' * depth}{name}", steps))

    def complete(self, step: int) -> None:
        """Reports a step, counted from 0."""
        self._advance(step + 1 - self._done)
        self._done = step + 1


def run_stoppable(work: Callable[[threading.Event], _Result]) -> _Result:
    """Runs `work` in another thread; Ctrl-C sets the event passed to it and waits until it returns.

    TensorRT builds inside one long call that releases the GIL, so Ctrl-C would otherwise take effect only at its end;
    TensorRT polls the progress monitor after every step.

    Raises:
        UserError: after Ctrl-C.
        Exception: raised by `work`.
    """
    begin, stop, done = threading.Event(), threading.Event(), threading.Event()
    results: list[_Result] = []
    errors: list[BaseException] = []

    def run() -> None:
        begin.wait()  # until the main thread handles Ctrl-C
        try:
            results.append(work(stop))
        except BaseException as error:
            errors.append(error)
        finally:
            done.set()

    threading.Thread(target=run, name="tensorrt-build", daemon=True).start()
    was_interrupted = False
    while True:
        # Not Thread.join: before Python 3.13, Ctrl-C in it marks a running thread as ended (bpo-45274).
        try:
            begin.set()
            while not done.wait(_POLL_S):
                pass
            break
        except KeyboardInterrupt:
            was_interrupted = True
            stop.set()
    if was_interrupted:
        raise UserError(
            "a build that was stopped by Ctrl-C",
            "a build that completes, in several minutes; --optimization-level 0 to 2 builds faster",
            "run it again: the measurements so far are in the timing cache",
        ) from (errors[0] if errors else None)
    if errors:
        raise errors[0]
    return results[0]


# The timing cache: measured times of layer implementations, which make later builds faster.


def timing_path(trt: Any, gpu: Gpu) -> Path:
    """The timing cache of this TensorRT version and GPU, in `tensorrt` next to the cache of compiled plugins."""
    name = re.sub(r"[^a-z0-9]+", "-", gpu.name.lower()).strip("-")
    return build.folder().parent / "tensorrt" / f"timing-{trt.__version__}-sm{gpu.arch}-{name}.cache"


def _load_timings(config: Any, path: Path) -> None:
    """Sets the entries of a file; none if the file is missing or of another version or GPU."""
    for content in (_content(path), b""):
        timing = config.create_timing_cache(content)
        if timing is not None and config.set_timing_cache(timing, ignore_mismatch=False):
            return


def _save_timings(config: Any, path: Path) -> None:
    """Writes the entries, merged with those written by concurrent builds in the meantime."""
    timing = config.get_timing_cache()
    if timing is None:
        return
    if content := _content(path):
        others = config.create_timing_cache(content)
        if others is not None:
            timing.combine(others, ignore_mismatch=False)
    with atomic_path(path) as draft:
        draft.write_bytes(timing.serialize())


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""

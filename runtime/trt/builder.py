"""A TensorRT plan from a graph for TensorRT's parser: network, profiles, settings, build.

The same source works on TensorRT 10.9 and 11: every network is strongly typed, which 10 wants to be told and 11 always
does, so the graph alone decides what is computed in which precision.

CUDA graphs need nothing of the builder: no shape of our graph depends on a value, and auxiliary streams are captured
with the main one. A profile of one shape, and no auxiliary streams where several contexts share a GPU, suit them best.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from maskrcnn.errors import UserError
from maskrcnn.metadata import ModelMetadata
from maskrcnn.runtime.backend import detector_specs
from maskrcnn.runtime.trt.library import Hardware, PluginForm, Weights
from maskrcnn.runtime.trt.log import Log, listen
from maskrcnn.runtime.trt.messages import StageOf, failure, parsing_failure
from maskrcnn.runtime.trt.profiles import Profile, set_shapes
from maskrcnn.runtime.trt.progress import Progress, Silent, make_monitor
from maskrcnn.runtime.trt.timing import attach, save
from maskrcnn.runtime.verification.staged_graph import PREFIX

LEVELS = range(6)  # of optimisation; TensorRT's default is 3
_GIGABYTE = 1 << 30
_DTYPES = {"float32": "FLOAT", "int64": "INT64", "int32": "INT32"}  # NumPy's names, and TensorRT's of the same types


@dataclass(frozen=True, kw_only=True)
class BuildOptions:
    """How an engine is built; every default is TensorRT's own but TF32, which changes results."""

    plugins: PluginForm = PluginForm.AOT
    tf32: bool = False  # let products of float32 round their factors to 10 bits
    workspace_gb: float | None = None  # most scratch memory of a layer; by default all that the GPU has
    optimization_level: int | None = None
    aux_streams: int | None = None  # for branches that run side by side
    hardware: Hardware = Hardware.NONE
    version_compatible: bool = False
    weights: Weights = Weights.FIXED

    def __post_init__(self) -> None:
        if self.optimization_level is not None and self.optimization_level not in LEVELS:
            came = f"--optimization-level {self.optimization_level}"
            raise UserError(came, "0 to 5", "leave it out, or use 5 for the most thorough search")
        if self.workspace_gb is not None and not self.workspace_gb > 0:
            raise UserError(f"--workspace {self.workspace_gb:g}", "gigabytes, more than 0", "leave it out")
        if self.aux_streams is not None and self.aux_streams < 0:
            raise UserError(f"--aux-streams {self.aux_streams}", "0 or more", "leave it out")

    def text(self) -> str:
        """What differs from the defaults, as the stamp holds it."""
        default = asdict(BuildOptions())
        changed = {name: value for name, value in asdict(self).items() if value != default[name]}
        return ", ".join(f"{name}={getattr(value, 'value', value)}" for name, value in changed.items()) or "defaults"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A serialised engine and what was noticed on the way."""

    data: Any  # bytes, or TensorRT's own buffer of them
    warnings: tuple[str, ...]


def build_plan(
    trt: Any,
    graph: bytes,
    metadata: ModelMetadata,
    profiles: Sequence[Profile],
    options: BuildOptions,
    *,
    timing_cache: Path | None = None,
    plugin_library: Path | None = None,
    progress: Progress | None = None,
    stop: threading.Event | None = None,
    stage_of: StageOf = lambda node: "",
) -> Plan:
    """Builds a plan. The plugins must be in the registry, see `load_plugins`.

    Args:
        trt: the tensorrt module.
        graph: an ONNX file for TensorRT's parser, its bytes.
        metadata: of the model.
        profiles: at least one.
        options: how to build.
        timing_cache: a file to read measurements from, and to put new ones into, even when the build fails.
        plugin_library: which version-compatible engines carry with them, as they may be loaded elsewhere.
        progress: is told of the phases.
        stop: ends the build when it is set.
        stage_of: see `parsing_failure`.

    Raises:
        UserError: where the parser or the builder refuses, saying why, and for a graph of other inputs and outputs.
    """
    log = listen(trt)
    builder = _builder(trt, log)
    network = _network(trt, builder, log, graph, stage_of)
    check_network(trt, network, metadata)
    config = builder.create_builder_config()
    configure(trt, config, options, plugin_library)
    _add_profiles(builder, config, profiles, log)
    if timing_cache is not None:
        attach(config, timing_cache)
        log.restart()  # a cache that does not fit is an error to TensorRT alone
    monitor = make_monitor(trt, progress or Silent(), stop or threading.Event())
    config.progress_monitor = monitor
    try:
        data = builder.build_serialized_network(network, config)
    finally:
        if timing_cache is not None:
            save(config, timing_cache)
    if monitor.fault is not None:
        raise monitor.fault
    if data is None:
        raise failure(log.messages, "TensorRT built no engine", "a plan")
    return Plan(data=data, warnings=tuple(m.text for m in log.messages if m.severity == "WARNING"))


def configure(trt: Any, config: Any, options: BuildOptions, plugin_library: Path | None = None) -> None:
    """Writes options into a builder's configuration."""
    flags = {
        trt.BuilderFlag.TF32: options.tf32,  # which TensorRT sets by itself
        trt.BuilderFlag.VERSION_COMPATIBLE: options.version_compatible,
        trt.BuilderFlag.REFIT: options.weights is Weights.REFITTABLE,
        trt.BuilderFlag.STRIP_PLAN: options.weights is Weights.STRIPPED,
        trt.BuilderFlag.REFIT_IDENTICAL: options.weights is Weights.STRIPPED,
    }
    for flag, is_set in flags.items():
        (config.set_flag if is_set else config.clear_flag)(flag)
    if options.workspace_gb is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, int(options.workspace_gb * _GIGABYTE))
    if options.optimization_level is not None:
        config.builder_optimization_level = options.optimization_level
    if options.aux_streams is not None:
        config.max_aux_streams = options.aux_streams
    config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.__members__[options.hardware.name]
    if options.version_compatible and plugin_library is not None:
        config.plugins_to_serialize = [str(plugin_library.resolve())]


def check_network(trt: Any, network: Any, metadata: ModelMetadata) -> None:
    """Compares a parsed network's inputs and outputs with the detector contract (docs/architecture.md).

    Raises:
        UserError: naming what differs.
    """
    inputs, outputs = detector_specs(metadata)
    found = (
        [network.get_input(index) for index in range(network.num_inputs)],
        [network.get_output(index) for index in range(network.num_outputs)],
    )
    for kind, specs, tensors in zip(("inputs", "outputs"), (inputs, outputs), found, strict=True):
        wanted = {name: _DTYPES[spec.dtype] for name, spec in specs.items()}
        # Stages that are shown as outputs are no part of the contract.
        there = {tensor.name: tensor.dtype.name for tensor in tensors if not tensor.name.startswith(PREFIX)}
        if there != wanted:
            raise UserError(
                f"a network with the {kind} {_listed(there)}",
                _listed(wanted),
                "export the model again, and build from that file",
            )


def _builder(trt: Any, log: Log) -> Any:
    try:
        builder = trt.Builder(log.logger)
    except TypeError as error:  # the bindings' way to say that there is none
        raise failure(log.messages, f"TensorRT has no builder here ({error})", "TensorRT with its libraries") from error
    return builder


def _network(trt: Any, builder: Any, log: Log, graph: bytes, stage_of: StageOf) -> Any:
    """The network of a graph. 11 ignores the flag."""
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log.logger)
    if not parser.parse(graph):
        raise parsing_failure(parser, log.messages, stage_of)
    return network


def _add_profiles(builder: Any, config: Any, profiles: Sequence[Profile], log: Log) -> None:
    for profile in profiles:
        made = builder.create_optimization_profile()
        try:
            set_shapes(made, profile)
            is_added = config.add_optimization_profile(made) >= 0
        except ValueError as error:  # which the bindings raise for shapes out of order
            raise UserError(f"the profile {profile} ({error})", "one that TensorRT takes", "choose others") from error
        if not is_added:
            raise failure(
                log.messages, f"TensorRT does not take the profile {profile}", "MIN ≤ OPT ≤ MAX of the network's"
            )


def _listed(kinds: dict[str, str]) -> str:
    return ", ".join(f"{name} {kind}" for name, kind in kinds.items())

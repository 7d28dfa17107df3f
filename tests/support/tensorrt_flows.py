"""Ways through building TensorRT plans, run inside the rig's processes over doubles of the real classes.

Each flow returns what JSON holds, which the tests look at; a `UserError` is told by its three parts.
"""

from __future__ import annotations

import _thread
import contextlib
import dataclasses
import gc
import signal
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import onnx
import tensorrt as real
from tensorrt_doubles import GPU, PlanBackend, Trt, answers, double_of

from maskrcnn.errors import UserError
from maskrcnn.metadata import ModelMetadata
from maskrcnn.runtime.backends import tensorrt_library
from maskrcnn.runtime.backends.tensorrt_library import Hardware, PluginForm, Weights
from maskrcnn.runtime.build import refit as tensorrt_refit
from maskrcnn.runtime.build.network import BuildOptions, build_plan, run_stoppable
from maskrcnn.runtime.build.profiles import parsed_profiles
from maskrcnn.runtime.build.request import Order, Surroundings
from maskrcnn.runtime.onnx_file import read_model

FLOWS: dict[str, Callable[[Flow], Any]] = {}


def flow(function: Callable[[Flow], Any]) -> Callable[[Flow], Any]:
    """Puts a function among the flows."""
    FLOWS[function.__name__] = function
    return function


@dataclasses.dataclass(frozen=True)
class Flow:
    """What a flow has to work with."""

    folder: Path  # empty
    reference: Path  # ONNX file in single precision
    graph: Path  # for the parser, in FP16, with the plugin library
    aot_graph: Path  # the same with ahead-of-time plugins
    images: Path  # of a dataset whose annotations are beside it

    @property
    def metadata(self) -> ModelMetadata:
        return read_model(self.graph)[1]

    def plan(self, trt: Trt, options: BuildOptions | None = None, **named: Any) -> Any:
        """Builds a plan of two profiles."""
        profiles = parsed_profiles("1,2:4:8", "coco", self.metadata.preprocessing)
        given = (self.graph.read_bytes(), self.metadata, profiles, options or BuildOptions())
        return build_plan(trt, *given, **named)

    def order(self, **changes: Any) -> Order:
        """For a small engine."""
        values = {
            "graph": self.graph,
            "reference": self.reference,
            "output": self.folder / "model.fp16.engine",
            "precision": "fp16",
            "profiles": parsed_profiles("2", "96x128", self.metadata.preprocessing),
            "options": BuildOptions(plugins=PluginForm.LIBRARY),
            "timing_cache": self.folder / "timing.cache",
            "command": "maskrcnn build-engine model.onnx --fp16 --target tensorrt",
            **changes,
        }
        return Order(**values)

    def around(self, trt: Trt, profiles: Any, told: list[str] | None = None, **changes: Any) -> Surroundings:
        """With engines that ONNX Runtime runs."""
        tell = told.append if told is not None else lambda what: None
        opened = lambda path: PlanBackend(path, profiles)  # noqa: E731
        return Surroundings(**{"trt": trt, "gpu": GPU, "open_engine": opened, "tell": tell, **changes})


def run(**paths: str) -> dict[str, Any]:
    """Of all flows so far what they returned under `value`, or an error's parts, or a crash's traceback."""
    folder, results = Path(paths.pop("folder")), {}
    for name in FLOWS:
        (folder / name).mkdir()
        given = Flow(folder=folder / name, **{key: Path(path) for key, path in paths.items()})
        try:
            results[name] = {"value": FLOWS[name](given)}
        except UserError as error:
            results[name] = {"error": [error.found, error.expected, error.fix]}
        except BaseException:
            results[name] = {"crash": traceback.format_exc()}
    return results


def _settings(trt: Trt) -> dict[str, Any]:
    """What was written into the builder's configuration."""
    names = ("builder_optimization_level", "max_aux_streams", "plugins_to_serialize", "hardware_compatibility_level")
    written = {name: getattr(trt.config, name) for name in names}
    plain = {name: value for name, value in written.items() if not isinstance(value, mock.NonCallableMock)}
    plain["hardware_compatibility_level"] = plain["hardware_compatibility_level"].name
    pools = [[call.args[0].name, call.args[1]] for call in trt.config.set_memory_pool_limit.call_args_list]
    return {"flags": trt.flags, "pools": pools, **plain}


# The builder


@flow
def plain_build(given: Flow) -> Any:
    trt, phases = Trt(), []

    class Told:
        def started(self, phase, parent, steps):
            phases.append(["started", phase, parent, steps])

        def completed(self, phase, step):
            phases.append(["completed", phase, step])

        def finished(self, phase):
            phases.append(["finished", phase])

    def during(trt: Trt) -> None:
        monitor = trt.config.progress_monitor
        assert isinstance(monitor, real.IProgressMonitor)
        monitor.phase_start("Building", None, 2)
        monitor.phase_start("Tactics", "Building", 5)
        assert monitor.step_complete("Tactics", 0) is True
        monitor.phase_finish("Tactics")
        monitor.phase_finish("Building")
        trt.say("WARNING", "a warning")
        trt.say("VERBOSE", "not for anybody")

    trt.during = during
    made = given.plan(trt, progress=Told(), timing_cache=given.folder / "timing.cache")
    return {
        "plan": made.data.decode(),
        "warnings": made.warnings,
        "typed": trt.network_flags == 1 << int(real.NetworkDefinitionCreationFlag.STRONGLY_TYPED),
        "graph": trt.graph == given.graph.read_bytes(),
        "profiles": [[call.args for call in added.set_shape.call_args_list] for added in trt.added],
        "phases": phases,
        "timing": (given.folder / "timing.cache").read_text(),
        **_settings(trt),
    }


@flow
def every_option(given: Flow) -> Any:
    trt, library = Trt(), given.folder / "libmaskrcnn_plugins.so"
    options = BuildOptions(
        plugins=PluginForm.LIBRARY,
        tf32=True,
        workspace_gb=1.5,
        optimization_level=5,
        aux_streams=0,
        hardware=Hardware.SAME_COMPUTE_CAPABILITY,
        version_compatible=True,
        weights=Weights.REFITTABLE,
    )
    given.plan(trt, options, plugin_library=library)
    return {"text": options.text(), "library": str(library), **_settings(trt)}


@flow
def stripped_build(given: Flow) -> Any:
    trt = Trt()
    given.plan(trt, BuildOptions(weights=Weights.STRIPPED, hardware=Hardware.AMPERE_PLUS))
    return _settings(trt)


@flow
def no_builder(given: Flow) -> Any:
    return given.plan(real)


@flow
def parser_refuses_a_node(given: Flow) -> Any:
    trt = Trt()
    node = next(node for node in onnx.load(given.graph).graph.node if node.op_type == "Resize")
    trt.refuse(
        code="UNSUPPORTED_NODE_ATTR", desc="no\n such mode", node=214, node_name=node.name, node_operator="Resize"
    )
    for number in range(4):
        trt.refuse(code="INVALID_NODE", desc=f"more {number}")
    return given.plan(trt, stage_of={node.name: "backbone and FPN"}.get)


@flow
def parser_has_no_plugin(given: Flow) -> Any:
    trt = Trt()
    trt.refuse(desc="Assertion failed: creator: Plugin not found", node_name="nms", node_operator="BatchedNms")
    return given.plan(trt)


@flow
def parser_is_out_of_memory(given: Flow) -> Any:
    trt = Trt()
    trt.refuse(code="MEM_ALLOC_FAILED", desc="bad_alloc")
    return given.plan(trt)


@flow
def parser_says_nothing(given: Flow) -> Any:
    trt = Trt()
    answers(trt.parser, "parse", lambda model: trt.say("ERROR", "weights lie elsewhere") or False)
    return given.plan(trt)


@flow
def other_outputs(given: Flow) -> Any:
    model = onnx.load(given.graph)
    del model.graph.output[-1]
    metadata = given.metadata
    profiles = parsed_profiles("1", "coco", metadata.preprocessing)
    return build_plan(Trt(), model.SerializeToString(), metadata, profiles, BuildOptions())


def _fails_with(*texts: str) -> Callable[[Flow], Any]:
    def failing(given: Flow) -> Any:
        trt = Trt(plan_of=lambda graph: None, during=lambda trt: [trt.say("ERROR", text) for text in texts])
        return given.plan(trt)

    return failing


# TensorRT's messages, as reports of users cite them.
FLOWS |= {
    "no_kernel_image": _fails_with(
        "1: [x.cpp::execute::1] Error Code 1: Cuda Runtime (no kernel image is available for execution on the device)"
    ),
    "out_of_memory": _fails_with("2: [virtualMemoryBuffer.cpp] Error Code 2: OutOfMemory (Requested size was 9.)"),
    "no_workspace": _fails_with(
        "Error Code 4: Internal Error (Could not find any implementation for node Conv_1 due to insufficient "
        "workspace. See verbose log for requested sizes.)"
    ),
    "no_implementation": _fails_with("Error Code 10: Could not find any implementation for node {Foreign}."),
    "unknown_gpu": _fails_with("Error Code 9: API Usage Error (Target GPU SM 120 is not supported by this release.)"),
    "old_driver": _fails_with("CUDA initialization failure with error: 35. Please check your CUDA installation"),
    "says_nothing": _fails_with(),
    "says_something_new": _fails_with("Error Code 99: the moon is full", "Error Code 99: the moon is full"),
}


@flow
def interrupted(given: Flow) -> Any:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore Ctrl-C
    seen = []

    def during(trt: Trt) -> None:
        _thread.interrupt_main()
        deadline = time.monotonic() + 60
        while trt.config.progress_monitor.step_complete("Building", len(seen)) and time.monotonic() < deadline:
            seen.append(threading.current_thread() is threading.main_thread())
            time.sleep(0.01)

    trt = Trt(plan_of=lambda graph: None, during=during)
    timing = given.folder / "timing.cache"
    with contextlib.suppress(UserError):
        run_stoppable(lambda stop: given.plan(trt, stop=stop, timing_cache=timing))
        return "went on"
    assert seen and not any(seen) and timing.read_text() == "new"
    return run_stoppable(lambda stop: given.plan(trt, stop=stop))


@flow
def progress_breaks(given: Flow) -> Any:
    class Broken:
        def started(self, *_):
            raise OSError("the terminal is gone")

        completed = finished = started

    def during(trt: Trt) -> None:
        trt.config.progress_monitor.phase_start("Building", None, 2)
        assert trt.config.progress_monitor.step_complete("Building", 0) is False

    try:
        given.plan(Trt(plan_of=lambda graph: None, during=during), progress=Broken())
    except OSError as error:
        return str(error)


@flow
def timing_cache_of_two(given: Flow) -> Any:
    path = given.folder / "timing.cache"
    path.write_bytes(b"old")

    def other_build(trt: Trt) -> None:
        path.write_bytes(b"meanwhile;old")

    given.plan(Trt(during=other_build), timing_cache=path)
    return path.read_text()


@flow
def timing_caches_that_do_not_fit(given: Flow) -> Any:
    found = []
    for content in (b"broken", b"other-gpu"):
        path = given.folder / content.decode()
        path.write_bytes(content)
        trt = Trt()
        given.plan(trt, timing_cache=path)
        found.append([len(trt.timing), path.read_text()])
    return found


@flow
def profile_is_refused(given: Flow) -> Any:
    trt = Trt()
    answers(
        trt.config, "add_optimization_profile", lambda profile: trt.say("ERROR", "kMAX dimensions in profile 0") or -1
    )
    return given.plan(trt)


@flow
def shape_is_refused(given: Flow) -> Any:
    trt = Trt()

    def refusing() -> Any:
        profile = double_of(real.IOptimizationProfile)
        answers(profile, "set_shape", mock.Mock(side_effect=ValueError("Shape provided for min is inconsistent")))
        return profile

    answers(trt.builder, "create_optimization_profile", refusing)
    return given.plan(trt)


@flow
def builds_and_loads_one_after_the_other(given: Flow) -> Any:
    """TensorRT tells the logger of the first build what it says during the others."""
    texts = iter(("first", "second"))
    trt = Trt(during=lambda trt: trt.say("WARNING", next(texts)))
    warnings = []
    for _ in range(2):
        warnings.append(given.plan(trt).warnings)
        gc.collect()
    try:
        tensorrt_refit.refitted(trt, b"broken", b"")
    except UserError as error:
        return {"warnings": warnings, "came": error.found}


# Plugins, in the real registry


@flow
def library_is_missing(given: Flow) -> Any:
    return tensorrt_library.load_plugins(real, PluginForm.LIBRARY, library=given.folder / "none.so")


@flow
def library_is_none(given: Flow) -> Any:
    library = given.folder / "libmaskrcnn_plugins.so"
    library.write_bytes(b"no library")
    return tensorrt_library.load_plugins(real, PluginForm.LIBRARY, library=library)


@flow
def plugins_in_the_registry(given: Flow) -> Any:
    names = lambda: sorted(c.name for c in real.get_plugin_registry().all_creators if c.plugin_namespace == "maskrcnn")  # noqa: E731
    before = names()
    first = tensorrt_library.load_plugins(real, PluginForm.AOT, arch=80)
    second = tensorrt_library.load_plugins(real, PluginForm.AOT, arch=90)
    library = given.folder / "libmaskrcnn_plugins.so"
    library.write_bytes(b"")
    try:
        tensorrt_library.load_plugins(real, PluginForm.LIBRARY, library=library)
    except UserError as error:
        return {"before": before, "after": names(), "returned": [first, second], "came": error.found}

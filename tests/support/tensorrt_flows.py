"""Builds of TensorRT plans, run inside the rig's processes with doubles of the real classes.

Each flow returns JSON values for the tests; a `UserError` becomes its three parts.
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
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import onnx
import tensorrt as real
from tensorrt_doubles import GPU, PlanBackend, Trt, answers, double_of

from maskrcnn.api.progress import Progress
from maskrcnn.errors import UserError
from maskrcnn.metadata import ModelMetadata
from maskrcnn.plugins import aot
from maskrcnn.runtime.backends import tensorrt_library
from maskrcnn.runtime.backends.tensorrt_library import Hardware, PluginForm, Weights
from maskrcnn.runtime.build import refit as tensorrt_refit
from maskrcnn.runtime.build import tensorrt as tensorrt_build
from maskrcnn.runtime.build.network import build_plan, run_stoppable
from maskrcnn.runtime.build.request import BuildRequest
from maskrcnn.runtime.engine_files import read_model

FLOWS: dict[str, Callable[[Flow], Any]] = {}


def flow(function: Callable[[Flow], Any]) -> Callable[[Flow], Any]:
    """Registers a flow."""
    FLOWS[function.__name__] = function
    return function


@dataclasses.dataclass(frozen=True)
class Flow:
    """The files of a flow."""

    folder: Path  # empty
    reference: Path  # ONNX file in single precision
    graph: Path  # graph for the parser, in FP16, with the plugin library
    aot_graph: Path  # the same with ahead-of-time plugins
    images: Path  # images of a dataset; the annotations are in the same folder

    @property
    def metadata(self) -> ModelMetadata:
        return read_model(self.graph)[1]

    def plan(self, trt: Any, *, progress: Progress | None = None, stop: Any = None, **changes: Any) -> Any:
        """Builds a plan; the timing cache of the request is passed on."""
        request = self.request(**{"plugins": PluginForm.AOT, "batch": "1,2:4:8", "size": "coco", **changes})
        given = {"timing_cache": changes.get("timing_cache"), "plugin_library": self.folder / "libmaskrcnn_plugins.so"}
        graph = self.graph.read_bytes()
        return build_plan(trt, graph, self.metadata, request, progress=progress or Progress(), stop=stop, **given)

    def request(self, **changes: Any) -> BuildRequest:
        """A small engine."""
        values = {
            "graph": self.graph,
            "model": self.reference,
            "output": self.folder / "model.fp16.engine",
            "precision": "fp16",
            "batch": "2",
            "size": "96x128",
            "plugins": PluginForm.LIBRARY,
            "timing_cache": self.folder / "timing.cache",
            **changes,
        }
        return BuildRequest(**values)


class Recorded(Progress):
    """Records all calls."""

    def __init__(self) -> None:
        self.titles: list[str] = []
        self.steps: list[list[Any]] = []

    @contextlib.contextmanager
    def task(self, title: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
        self.titles.append(title)
        self.steps.append(["started", title, total])
        yield lambda steps: self.steps.append(["advanced", title, steps])
        self.steps.append(["finished", title])


@contextlib.contextmanager
def machine(trt: Trt, *, plugins: bool = False) -> Iterator[tuple[Any, list[PlanBackend]]]:
    """A machine with this TensorRT and a GPU; ONNX Runtime runs its engines.

    Args:
        trt: the double.
        plugins: register the plugins as usual.

    Yields:
        The mock of `load_plugins` (None with `plugins`), and the engines that were opened.
    """
    opened: list[PlanBackend] = []

    def open_engine(path: Path) -> PlanBackend:
        opened.append(PlanBackend(path))
        return opened[-1]

    load = None
    with contextlib.ExitStack() as patches:
        patches.enter_context(mock.patch.object(tensorrt_library, "tensorrt_obstacle", lambda: None))
        patches.enter_context(mock.patch.object(tensorrt_library, "import_tensorrt", lambda: trt))
        for module in (tensorrt_build, tensorrt_refit):
            patches.enter_context(mock.patch.object(module, "import_tensorrt", lambda: trt))
            patches.enter_context(mock.patch.object(module, "find_gpu", lambda: GPU))
            patches.enter_context(mock.patch.object(module, "TensorRtBackend", open_engine))
        if not plugins:
            patches.enter_context(mock.patch.object(tensorrt_refit, "load_plugins", autospec=True))
            load = mock.patch.object(tensorrt_build, "load_plugins", autospec=True, return_value=None)
            load = patches.enter_context(load)
        yield load, opened


def run(**paths: str) -> dict[str, Any]:
    """Runs all flows; returns for each the result under `value`, the parts of an error, or a traceback."""
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
    """The settings of the builder's configuration."""
    names = ("builder_optimization_level", "max_aux_streams", "plugins_to_serialize", "hardware_compatibility_level")
    written = {name: getattr(trt.config, name) for name in names}
    plain = {name: value for name, value in written.items() if not isinstance(value, mock.NonCallableMock)}
    plain["hardware_compatibility_level"] = plain["hardware_compatibility_level"].name
    pools = [[call.args[0].name, call.args[1]] for call in trt.config.set_memory_pool_limit.call_args_list]
    return {"flags": trt.flags, "pools": pools, **plain}


# The builder


@flow
def plain_build(given: Flow) -> Any:
    trt, progress = Trt(), Recorded()

    def during(trt: Trt) -> None:
        monitor = trt.config.progress_monitor
        assert isinstance(monitor, real.IProgressMonitor)
        monitor.phase_start("Building", None, 2)
        monitor.phase_start("Tactics", "Building", 5)
        assert monitor.step_complete("Tactics", 0) is True
        monitor.phase_finish("Tactics")
        monitor.phase_finish("Building")
        trt.say("WARNING", "a warning")
        trt.say("VERBOSE", "not a warning")

    trt.during = during
    plan, warnings = given.plan(trt, progress=progress, timing_cache=given.folder / "timing.cache")
    return {
        "plan": plan.decode(),
        "warnings": warnings,
        "typed": trt.network_flags == 1 << int(real.NetworkDefinitionCreationFlag.STRONGLY_TYPED),
        "graph": trt.graph == given.graph.read_bytes(),
        "profiles": [[call.args for call in added.set_shape.call_args_list] for added in trt.added],
        "phases": progress.steps,
        "timing": (given.folder / "timing.cache").read_text(),
        **_settings(trt),
    }


@flow
def every_option(given: Flow) -> Any:
    trt = Trt()
    options = {
        "plugins": PluginForm.LIBRARY,
        "tf32": True,
        "workspace_gb": 1.5,
        "optimization_level": 5,
        "aux_streams": 0,
        "hardware": Hardware.SAME_COMPUTE_CAPABILITY,
        "version_compatible": True,
        "weights": Weights.REFITTABLE,
    }
    given.plan(trt, **options)
    settings, library = given.request(**options).settings(), str(given.folder / "libmaskrcnn_plugins.so")
    return {"text": settings, "library": library, **_settings(trt)}


@flow
def stripped_build(given: Flow) -> Any:
    trt = Trt()
    given.plan(trt, weights=Weights.STRIPPED, hardware=Hardware.AMPERE_PLUS)
    return _settings(trt)


@flow
def failing_plugin(given: Flow) -> Any:
    aot.faults.append(ValueError("of an earlier build"))
    trt = Trt(lambda graph: None)
    trt.during = lambda trt: aot.faults.append(OSError("the disk is full"))
    return given.plan(trt)


@flow
def failing_compiler(given: Flow) -> Any:
    trt = Trt(lambda graph: None)
    trt.during = lambda trt: aot.faults.append(UserError("NVRTC fails", "a kernel", "update it"))
    return given.plan(trt)


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
    return build_plan(Trt(), model.SerializeToString(), given.metadata, given.request(), progress=Progress())


def _fails_with(*texts: str) -> Callable[[Flow], Any]:
    def failing(given: Flow) -> Any:
        trt = Trt(plan_of=lambda graph: None, during=lambda trt: [trt.say("ERROR", text) for text in texts])
        return given.plan(trt)

    return failing


# Messages of TensorRT, as quoted in issues.
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
    class Broken(Progress):
        def task(self, title: str, total: int | None = None) -> Any:
            raise OSError("the terminal is gone")

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
    """TensorRT sends the messages of later builds to the logger of the first one."""
    texts = iter(("first", "second"))
    trt = Trt(during=lambda trt: trt.say("WARNING", next(texts)))
    warnings = []
    for _ in range(2):
        warnings.append(given.plan(trt)[1])
        gc.collect()
    try:
        tensorrt_refit.refit_plan(trt, b"broken", b"")
    except UserError as error:
        return {"warnings": warnings, "found": error.found}


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
        return {"before": before, "after": names(), "returned": [first, second], "found": error.found}

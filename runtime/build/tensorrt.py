"""Building TensorRT engines: a plan, its stamp, and the comparison with the ONNX file before the engine is kept."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from maskrcnn.errors import UserError
from maskrcnn.files import check_target, folder_beside, write_json
from maskrcnn.metadata import ModelMetadata, sha256_of
from maskrcnn.plugins.aot_kernels import Image, compiler_name, image_for
from maskrcnn.plugins.toolchain import Toolchain, find_toolchain
from maskrcnn.runtime.backends.base import Backend
from maskrcnn.runtime.backends.tensorrt import TensorRtBackend
from maskrcnn.runtime.backends.tensorrt_library import (
    OLDEST_ARCH,
    Gpu,
    Hardware,
    PluginForm,
    Weights,
    find_gpu,
    import_tensorrt,
    load_plugins,
    plugin_hash,
)
from maskrcnn.runtime.build.gate import Feeds, check_gate_images, gate, stage_report
from maskrcnn.runtime.build.network import build_plan, run_stoppable, timing_path
from maskrcnn.runtime.build.profiles import to_json
from maskrcnn.runtime.build.refit import metadata_with_weights, refit_plan
from maskrcnn.runtime.build.request import (
    SUFFIX,
    BuildRequest,
    BuiltEngine,
    Progress,
    metadata_of_other_plan,
    move_engine,
    write_engine,
    write_metadata,
)
from maskrcnn.runtime.engine_files import read_model, staged_graph


def build_tensorrt_engine(request: BuildRequest, progress: Progress) -> BuiltEngine:
    """Builds an engine, compares it with the ONNX file in ONNX Runtime, and keeps it if they agree.

    Raises:
        UserError: if TensorRT fails, and if the engine differs from the ONNX file by more than its precision explains.
            The engine is then kept next to `output` as `*.rejected.engine`, and the text names the first stage that
            differs.
    """
    check_target(request.output)
    check_gate_images(request)
    build = _Build(request, progress)
    plan, warnings = build.plan(build.graph, request)
    with folder_beside(request.output, prefix=".engine-") as folder:
        draft = write_engine(folder / request.output.name, plan, build.metadata)
        runnable = draft
        if request.weights is Weights.STRIPPED:
            metadata = metadata_with_weights(build.metadata, build.trt)
            with progress.task("restoring the weights for the comparison"):
                complete = refit_plan(
                    build.trt,
                    bytes(plan),
                    build.graph,
                    version_compatible=request.version_compatible,
                    stage_of=request.stage_of,
                )
            runnable = write_engine(folder / f"complete{SUFFIX}", complete, metadata)
        engine = TensorRtBackend(runnable)
        comparison = gate(engine, request, request.profiles(build.metadata.preprocessing), progress)
        build.metadata.stamp["compared"] = str(comparison)
        build.metadata.stamp["plan_sha256"] = sha256_of(draft)
        write_metadata(draft, build.metadata)
        if not comparison.accepted:
            kept = move_engine(draft, request.output.with_suffix(f".rejected{SUFFIX}"))
            stage = build.first_difference(engine, folder, kept)
            raise UserError(
                f"an engine that differs from {request.model}: {comparison}\n{stage}",
                comparison.expected(),
                f"inspect {kept} with `maskrcnn evaluate`, or build with --fp32",
            )
        move_engine(draft, request.output)
    return BuiltEngine(path=request.output, metadata=build.metadata, comparison=comparison, warnings=warnings)


class _Build:
    """One build: the request, and the machine it runs on. The graph is kept in memory: its file may be overwritten."""

    def __init__(self, request: BuildRequest, progress: Progress) -> None:
        self.request, self.progress = request, progress
        self.trt, gpu = import_tensorrt(), find_gpu()
        self.metadata = _stamped(request, self.trt, gpu)
        self.graph = request.graph.read_bytes()
        self._library = _load_plugins(request, self.trt, gpu)
        self._timing_cache = request.timing_cache or timing_path(self.trt, gpu)

    def plan(self, graph: bytes, request: BuildRequest) -> tuple[Any, tuple[str, ...]]:
        """Builds the plan of a graph, see `build_plan`; Ctrl-C stops the build."""
        with self.progress.task("building"):
            return run_stoppable(
                lambda stop: build_plan(
                    self.trt,
                    graph,
                    self.metadata,
                    request,
                    progress=self.progress,
                    timing_cache=self._timing_cache,
                    plugin_library=self._library,
                    stop=stop,
                )
            )

    def first_difference(self, engine: Backend, folder: Path, kept: Path) -> str:
        """Names the first stage that differs, using a second engine that is built with the stages as outputs.

        Args:
            engine: the rejected engine.
            folder: folder for the second engine.
            kept: path of the rejected engine; the report of all stages is written next to it.
        """

        def open_stages(names: Sequence[str]) -> Callable[[Feeds], Feeds]:
            graph, shown = staged_graph(self.graph, names)
            plan, _ = self.plan(graph, dataclasses.replace(self.request, weights=Weights.FIXED))
            metadata = metadata_of_other_plan(self.metadata, weights=Weights.FIXED.value)
            staged = TensorRtBackend(write_engine(folder / f"staged{SUFFIX}", plan, metadata))
            return lambda feeds: {shown[name]: value for name, value in staged(feeds).items() if name in shown}

        profiles = self.request.profiles(self.metadata.preprocessing)
        try:
            with self.progress.task("locating the stage that differs, using an engine with the stages as outputs"):
                report = stage_report(engine, open_stages, self.request.model, profiles)
        except UserError as error:
            return f"its stages could not be compared: {error.found}"
        stages = kept.with_suffix(".stages.json")
        write_json(stages, report.to_dict())
        return f"{report.conclusion()}\nall stages: {stages}"


def _stamped(request: BuildRequest, trt: Any, gpu: Gpu) -> ModelMetadata:
    """The metadata of the engine, except for the result of the comparison."""
    _, metadata = read_model(request.graph)
    source = sha256_of(request.model)
    earlier = dict(metadata.stamp)
    kept = earlier.pop("casts", None) or earlier.pop("quantization", None) or "everything"
    stamp = {
        **earlier,
        "target": "tensorrt",
        "precision": request.precision,
        "gpu": gpu.name,
        "compute_capability": ".".join(map(str, gpu.compute_capability)),
        "tensorrt": trt.__version__,
        "plugins": request.plugins.value,
        "plugin_hash": plugin_hash(request.plugins),
        "onnx_sha256": source,
        "profiles": to_json(request.profiles(metadata.preprocessing)),
        "hardware_compatibility": request.hardware.value,
        "version_compatible": "yes" if request.version_compatible else "no",
        "refit": request.weights.value,
        "options": request.settings(),
        "kept_fp32": kept,
        "command": request.command(),
    }
    return dataclasses.replace(metadata, precision=request.precision, source_sha256=source, stamp=stamp)


def _require_ptx(toolchain: Toolchain) -> None:
    """Refuses a compiler whose PTX this driver cannot read: the engine must run here for the comparison."""
    if (toolchain.nvrtc or toolchain.nvcc) and image_for(toolchain) is Image.CUBIN:
        driver = ".".join(map(str, toolchain.driver_cuda or ()))
        raise UserError(
            f"--hardware-compatible ampere_plus with {compiler_name(toolchain)} and a driver for CUDA {driver}",
            "a driver at least as new as the compiler: kernels for several GPU generations are PTX, which it compiles",
            "update the driver, install an older nvidia-cuda-nvrtc, or use --plugin-library",
        )


def _load_plugins(request: BuildRequest, trt: Any, gpu: Gpu) -> Path | None:
    """Registers the plugins; returns the plugin library, if they are in one."""
    if request.plugins is PluginForm.LIBRARY:
        return load_plugins(trt, request.plugins, arch=gpu.arch)
    if request.hardware is Hardware.AMPERE_PLUS:
        # Machine code would run on only one GPU generation.
        _require_ptx(find_toolchain())
        return load_plugins(trt, request.plugins, arch=OLDEST_ARCH, image=Image.PTX)
    return load_plugins(trt, request.plugins)

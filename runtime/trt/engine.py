"""Building TensorRT engines: a plan, its stamp, and the gate that it must pass before it is kept."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from maskrcnn.errors import UserError
from maskrcnn.files import check_target, folder_beside, write_json
from maskrcnn.metadata import ModelMetadata, sha256_of
from maskrcnn.plugins.nvrtc import Image
from maskrcnn.runtime.backend import Backend
from maskrcnn.runtime.onnx_file import read_model
from maskrcnn.runtime.trt.builder import BuildOptions, Plan, build_plan
from maskrcnn.runtime.trt.gate import Feeds, Instrumented, gate, stage_report
from maskrcnn.runtime.trt.library import OLDEST_ARCH, Hardware, PluginForm, Weights, load_plugins, plugin_hash
from maskrcnn.runtime.trt.orders import (
    SUFFIX,
    Built,
    Order,
    Surroundings,
    keep_engine,
    of_another_plan,
    write_engine,
    write_metadata,
)
from maskrcnn.runtime.trt.profiles import to_json
from maskrcnn.runtime.trt.progress import run_stoppable
from maskrcnn.runtime.trt.refit import refitted, with_weights
from maskrcnn.runtime.trt.timing import timing_path
from maskrcnn.runtime.verification.staged_graph import staged_graph


def build_tensorrt_engine(order: Order, around: Surroundings) -> Built:
    """Builds an engine, compares it with the ONNX file in ONNX Runtime, and keeps it if they agree.

    Raises:
        UserError: where TensorRT refuses something, and where the engine departs by more than its precision explains.
            It then lies beside `output` under the name `*.rejected.engine`, and the text names the first stage that
            departs.
    """
    check_target(order.output)
    order.images.check()
    job = _Job(order, around)
    plan = job.plan(job.graph, order.options)
    with folder_beside(order.output, prefix=".engine-") as folder:
        draft = write_engine(folder / order.output.name, plan.data, job.metadata)
        tried = draft
        if order.options.weights is Weights.STRIPPED:
            whole = with_weights(job.metadata, around.trt)
            tried = write_engine(folder / f"whole{SUFFIX}", job.with_weights(plan), whole)
        engine = around.open_engine(tried)
        result = gate(engine, order.reference, order.profiles, order.precision, order.images, around.tell)
        job.metadata.stamp["compared"] = result.text()
        job.metadata.stamp["plan_sha256"] = sha256_of(draft)
        write_metadata(draft, job.metadata)
        if not result.accepted:
            kept = keep_engine(draft, order.output.with_suffix(f".rejected{SUFFIX}"))
            found = job.departure(engine, folder, kept)
            raise UserError(
                f"an engine that departs from {order.reference}: {result.text()}\n{found}",
                result.expected(),
                f"look at {kept} with `maskrcnn evaluate`, or build with --fp32",
            )
        keep_engine(draft, order.output)
    return Built(metadata=job.metadata, result=result, warnings=plan.warnings)


class _Job:
    """An order while it is carried out. Its graph is in memory: the file may be written again meanwhile."""

    def __init__(self, order: Order, around: Surroundings) -> None:
        self.order, self.around = order, around
        self.metadata = stamped(order, around)
        self.graph = order.graph.read_bytes()
        self.library = _plugins(order.options, around)
        self._timing = order.timing_cache or timing_path(around.trt, around.gpu)

    def plan(self, graph: bytes, options: BuildOptions) -> Plan:
        """Builds; Ctrl-C ends it."""

        def build(stop: threading.Event) -> Plan:
            return build_plan(
                self.around.trt,
                graph,
                self.metadata,
                self.order.profiles,
                options,
                timing_cache=self._timing,
                plugin_library=self.library,
                progress=self.around.progress,
                stop=stop,
                stage_of=self.around.stage_of,
            )

        self.around.tell("building")
        return run_stoppable(build)

    def with_weights(self, plan: Plan) -> bytes:
        """A stripped plan as it is used."""
        self.around.tell("putting the weights back, to compare")
        return refitted(
            self.around.trt,
            bytes(plan.data),
            self.graph,
            version_compatible=self.order.options.version_compatible,
            stage_of=self.around.stage_of,
        )

    def departure(self, engine: Backend, folder: Path, kept: Path) -> str:
        """Which stage departs first, from an engine that has the stages as outputs; it is built for this.

        What was found of every stage lies beside the refused engine afterwards.
        """

        def show(names: Sequence[str]) -> Callable[[Feeds], Feeds]:
            graph, shown = staged_graph(self.graph, names)
            options = dataclasses.replace(self.order.options, weights=Weights.FIXED)
            plan, metadata = self.plan(graph, options), of_another_plan(self.metadata, refit=options.weights.value)
            backend = self.around.open_engine(write_engine(folder / f"staged{SUFFIX}", plan.data, metadata))
            return lambda feeds: {shown[name]: value for name, value in backend(feeds).items() if name in shown}

        self.around.tell("looking for the stage that departs, in an engine with stages as outputs")
        try:
            report = stage_report(Instrumented(engine, show), self.order.reference, self.order.profiles)
        except UserError as error:
            return f"its stages could not be compared: {error.came}"
        stages = kept.with_suffix(".stages.json")
        write_json(stages, report.to_dict())
        return f"{report.conclusion()}\nall stages: {stages}"


def stamped(order: Order, around: Surroundings) -> ModelMetadata:
    """What the engine says of itself, but for how it was compared."""
    _, metadata = read_model(order.graph)
    source = sha256_of(order.reference)
    options, earlier = order.options, dict(metadata.stamp)
    kept = earlier.pop("casts", None) or earlier.pop("quantization", None) or "everything"
    stamp = {
        **earlier,
        "target": "tensorrt",
        "precision": order.precision,
        "gpu": around.gpu.name,
        "compute_capability": ".".join(map(str, around.gpu.compute_capability)),
        "tensorrt": around.trt.__version__,
        "plugins": options.plugins.value,
        "plugin_hash": plugin_hash(options.plugins),
        "onnx_sha256": source,
        "profiles": to_json(order.profiles),
        "hardware_compatibility": options.hardware.value,
        "version_compatible": "yes" if options.version_compatible else "no",
        "refit": options.weights.value,
        "options": options.text(),
        "kept_fp32": kept,
        "command": order.command,
    }
    return dataclasses.replace(metadata, precision=order.precision, source_sha256=source, stamp=stamp)


def _plugins(options: BuildOptions, around: Surroundings) -> Path | None:
    """Registers the plugins; the library, where that is their form."""
    if options.plugins is PluginForm.LIBRARY:
        return load_plugins(around.trt, options.plugins, arch=around.gpu.arch)
    if options.hardware is Hardware.AMPERE_PLUS:
        # Machine code would run on one generation alone.
        return load_plugins(around.trt, options.plugins, arch=OLDEST_ARCH, image=Image.PTX)
    return load_plugins(around.trt, options.plugins)

"""Whole engines, built, compared and refitted; see tensorrt_flows.py.

A plan is an ONNX file here: ONNX Runtime runs it as the engine, and faults of TensorRT are simulated by changing it.
"""

from __future__ import annotations

import io
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import onnx
import tensorrt as real
from faults import initializer
from tensorrt_doubles import GPU, Trt, answers, runnable
from tensorrt_flows import FLOWS, Flow, Recorded, flow, machine

from maskrcnn.api.progress import Progress
from maskrcnn.cli import app
from maskrcnn.cli.console import console
from maskrcnn.errors import UserError
from maskrcnn.metadata import sha256_of
from maskrcnn.plugins.toolchain import Nvrtc, Toolchain
from maskrcnn.runtime.backends import tensorrt_library
from maskrcnn.runtime.backends.tensorrt_library import Hardware, PluginForm, Weights
from maskrcnn.runtime.build import tensorrt as tensorrt_build
from maskrcnn.runtime.build.refit import refit_plan, refit_tensorrt_engine
from maskrcnn.runtime.build.request import BuildRequest
from maskrcnn.runtime.build.tensorrt import build_tensorrt_engine

FLOWS.clear()  # the flows of tensorrt_flows.py run in another process


def _build(trt: Trt, request: BuildRequest, progress: Progress | None = None) -> Any:
    with machine(trt) as (load, _):
        built = build_tensorrt_engine(request, progress or Progress())
    assert load.call_args == mock.call(trt, request.plugins, arch=90)
    return built


def _files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@flow
def engine_that_agrees(given: Flow) -> Any:
    annotations = given.images.parent / "annotations" / f"instances_{given.images.name}.json"
    request, progress = (
        given.request(
            batch="1,2",
            size="64x96:96x128:128x160",
            gate_images=given.images,
            gate_annotations=annotations,
            gate_max_images=2,
        ),
        Recorded(),
    )
    with machine(Trt(runnable(given.reference))) as (_, opened):
        built = build_tensorrt_engine(request, progress)
    written = json.loads((given.folder / "model.fp16.engine.json").read_text())
    return {
        "files": _files(given.folder),
        "stamp": built.metadata.stamp,
        "same": written["stamp"] == built.metadata.stamp,
        "precision": written["precision"],
        "source": written["source_sha256"] == sha256_of(given.reference),
        "plan": built.metadata.stamp["plan_sha256"] == sha256_of(request.output),
        "titles": progress.titles,
        "shapes": opened[0].shapes,
        "ap": list(built.comparison.ap),
    }


def _wrong(plan: bytes) -> bytes:
    model = onnx.load_from_string(plan)
    initializer(model, lambda name, _: name.endswith("box_predictor.bbox_pred.bias_fp16"), lambda bias: bias + 8)
    return model.SerializeToString()


@flow
def engine_that_departs(given: Flow) -> Any:
    """TensorRT changes a bias of the box head, also in the engine with stages."""

    def wrong(graph: bytes) -> bytes:
        return _wrong(runnable(given.reference)(graph))

    (given.folder / "model.fp16.engine").write_text("the one before")
    try:
        _build(Trt(wrong), given.request(batch="1", size="96x128:96x128:160x160"))
    except UserError as error:
        kept = (given.folder / "model.fp16.engine").read_text()
        return {"files": _files(given.folder), "kept": kept, "parts": [error.found, error.expected, error.fix]}


@flow
def stripped_engine_that_departs(given: Flow) -> Any:
    trt = Trt(lambda graph: _wrong(runnable(given.reference)(graph)))
    try:
        _build(trt, given.request(batch="1", size="96x128:96x128:160x160", weights=Weights.STRIPPED))
    except UserError as error:
        stamp = json.loads((given.folder / "model.fp16.rejected.engine.json").read_text())["stamp"]
        return {"found": error.found, "stamp": stamp["refit"], "hash": "plan_sha256" in stamp}


@flow
def engine_whose_stages_do_not_build(given: Flow) -> Any:
    plans = iter([lambda graph: _wrong(runnable(given.reference)(graph)), lambda graph: None])
    return _build(Trt(lambda graph: next(plans)(graph)), given.request())


@flow
def engine_without_weights(given: Flow) -> Any:
    trt = Trt(runnable(given.reference))
    built = _build(trt, given.request(weights=Weights.STRIPPED))
    refused = tensorrt_library.check_stamp(
        built.metadata, trt=trt, gpu=GPU.name, compute_capability=GPU.compute_capability
    )
    serialized = [call.args[0].name for call in trt.serialization.clear_flag.call_args_list]
    return {
        "refit": trt.refit == [given.graph.read_bytes()],
        "cleared": serialized,
        "stamp": built.metadata.stamp["refit"],
        "fix": refused.fix,
        "host_code": trt.runtime.engine_host_code_allowed,
    }


@flow
def engine_for_more_gpus(given: Flow) -> Any:
    """With the real `load_plugins`; the kernels are for the oldest of these GPUs."""
    request = given.request(graph=given.aot_graph, plugins=PluginForm.AOT, hardware=Hardware.AMPERE_PLUS)
    trt = Trt(runnable(given.reference))
    with mock.patch("maskrcnn.plugins.aot.register", autospec=True) as register, machine(trt, plugins=True):
        built = build_tensorrt_engine(request, Progress())
    named = register.call_args.kwargs
    return {"arch": named["arch"], "image": named["image"].value, "stamp": built.metadata.stamp["plugins"]}


@flow
def engine_for_more_gpus_with_an_old_driver(given: Flow) -> Any:
    request = given.request(graph=given.aot_graph, plugins=PluginForm.AOT, hardware=Hardware.AMPERE_PLUS)
    toolchain = Toolchain(nvrtc=Nvrtc("13.2", (80, 90)), driver_cuda=(13, 0))
    with mock.patch.object(tensorrt_build, "find_toolchain", lambda: toolchain), machine(Trt(), plugins=True):
        return build_tensorrt_engine(request, Progress())


def _refit(given: Flow, trt: Trt, target: Path, name: str) -> tuple[Any, dict[str, Any]]:
    """Puts weights into an engine; returns the engine and the stamp in its file."""
    with machine(trt):
        built = refit_tensorrt_engine(target, given.request(output=given.folder / name), Progress())
    return built, json.loads(built.path.with_name(f"{name}.json").read_text())["stamp"]


@flow
def engine_with_other_weights(given: Flow) -> Any:
    trt = Trt(runnable(given.reference))
    first = _build(trt, given.request(weights=Weights.REFITTABLE)).path
    # A plan that differs from the first, as with other weights.
    trt.plan_of = lambda graph: runnable(given.reference)(graph) + b"\x32\x00"
    built, stamp = _refit(given, trt, first, "new.engine")
    kept = [call.args[0].name for call in trt.serialization.set_flag.call_args_list]
    return {
        "files": _files(given.folder),
        "stamp": stamp,
        "set": kept,
        "can_remain": hasattr(real.SerializationFlag, "INCLUDE_REFIT"),
        "compared": built.comparison.accepted and str(built.comparison),
        "hashes": [sha256_of(path) for path in (first, given.folder / "new.engine")],
    }


@flow
def engine_that_gets_weights_once_more(given: Flow) -> Any:
    """With a TensorRT that has INCLUDE_REFIT."""
    trt = Trt(runnable(given.reference))
    trt.SerializationFlag = SimpleNamespace(EXCLUDE_WEIGHTS="EXCLUDE_WEIGHTS", INCLUDE_REFIT="INCLUDE_REFIT")
    _build(trt, given.request(weights=Weights.REFITTABLE))
    kinds = []
    for old, new in (("model.fp16.engine", "second.engine"), ("second.engine", "third.engine")):
        kinds.append(_refit(given, trt, given.folder / old, new)[1]["refit"])
    return kinds


@flow
def engine_that_gets_weights_but_once(given: Flow) -> Any:
    """With a TensorRT that lacks INCLUDE_REFIT, as 10.9 does."""
    trt = Trt(runnable(given.reference))
    trt.SerializationFlag = SimpleNamespace(EXCLUDE_WEIGHTS="EXCLUDE_WEIGHTS")
    first = _build(trt, given.request(weights=Weights.REFITTABLE)).path
    _, stamp = _refit(given, trt, first, "new.engine")
    flags = trt.serialization.set_flag.call_args_list
    try:
        _refit(given, trt, given.folder / "new.engine", "third.engine")
    except UserError as error:
        return {"stamp": stamp["refit"], "flags": len(flags), "found": error.found}


@flow
def refit_of_a_broken_plan(given: Flow) -> Any:
    return refit_plan(Trt(), b"broken", b"")


@flow
def refit_without_some_weights(given: Flow) -> Any:
    trt = Trt()
    made = trt.Refitter

    def refitter(engine: Any, logger: Any) -> Any:
        found = made(engine, logger)
        answers(found, "refit_cuda_engine", lambda: False)
        answers(found, "get_missing_weights", lambda: ["conv1.weight", "conv2.weight"])
        return found

    trt.Refitter = refitter
    return refit_plan(trt, b"plan", b"graph")


@flow
def refit_that_the_parser_refuses(given: Flow) -> Any:
    trt = Trt()
    trt.refuse(code="REFIT_FAILED", desc="weights of another size", node_name="conv1", node_operator="Conv")
    return refit_plan(trt, b"plan", b"graph")


@flow
def image_outside_all_profiles(given: Flow) -> Any:
    request = given.request(batch="1", size="64x64", gate_images=given.images)
    return _build(Trt(runnable(given.reference)), request)


# The command line


def _commands(given: Flow, trt: Trt, *commands: list[str]) -> dict[str, Any]:
    """Runs commands in the flow's folder; returns their output and the files that they write."""
    shutil.copy(given.reference, given.folder / "model.onnx")
    printed, folder = io.StringIO(), os.getcwd()
    cache = mock.patch.dict(os.environ, {"MASKRCNN_CACHE": str(given.folder.parent / "cache")})
    with machine(trt), cache, mock.patch.object(console, "_file", printed):
        os.chdir(given.folder)
        try:
            for command in commands:
                app(command, standalone_mode=False)
        finally:
            os.chdir(folder)
    return {"printed": printed.getvalue(), "files": _files(given.folder)}


@flow
def command_that_builds(given: Flow) -> Any:
    trt = Trt(runnable(given.reference))
    command = ["build-engine", "--fp16", "model.onnx", "--batch", "1,2", "--size", "96x128", "--workspace", "2"]
    result = _commands(given, trt, [*command, "--gate-images", str(given.images), "--gate-max-images", "1"])
    stamp = json.loads((given.folder / "model.fp16.engine.json").read_text())["stamp"]
    return {**result, "stamp": stamp, "aot": trt.graph == (given.folder / "model.fp16.tensorrt.onnx").read_bytes()}


@flow
def command_in_tf32(given: Flow) -> Any:
    trt = Trt(runnable(given.reference))
    result = _commands(
        given, trt, ["build-engine", "--fp32", "--tf32", "model.onnx", "--size", "96x128", "--output", "exact.engine"]
    )
    metadata = json.loads((given.folder / "exact.engine.json").read_text())
    command = metadata["stamp"]["command"]
    return {**result, "precision": metadata["precision"], "flag": trt.flags["TF32"], "command": command}


@flow
def commands_that_refit(given: Flow) -> Any:
    trt = Trt(runnable(given.reference))
    build = ["build-engine", "--fp16", "model.onnx", "--size", "96x128", "--strip-weights"]
    refit = ["refit-engine", "model.fp16.engine", "model.onnx", "--output", "whole.engine"]
    result = _commands(given, trt, build, refit)
    return {**result, "stamp": json.loads((given.folder / "whole.engine.json").read_text())["stamp"]}

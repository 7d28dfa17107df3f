"""Ways through building, comparing and refitting whole engines; see tensorrt_flows.py.

A plan is an ONNX file here, so ONNX Runtime plays the engine, and what TensorRT might get wrong is planted into it.
"""

from __future__ import annotations

import contextlib
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
from tensorrt_doubles import GPU, PlanBackend, Trt, answers, runnable
from tensorrt_flows import FLOWS, Flow, flow

from maskrcnn import cli
from maskrcnn.api import build_engine
from maskrcnn.errors import UserError
from maskrcnn.runtime.backends import tensorrt as tensorrt_backend
from maskrcnn.runtime.backends import tensorrt_library
from maskrcnn.runtime.backends.tensorrt_library import Hardware, PluginForm, Weights
from maskrcnn.runtime.build import refit as tensorrt_refit
from maskrcnn.runtime.build import tensorrt as tensorrt_engine
from maskrcnn.runtime.build.gate import GateImages
from maskrcnn.runtime.build.network import BuildOptions
from maskrcnn.runtime.build.profiles import from_json, parsed_profiles
from maskrcnn.runtime.build.request import Order, Refit

FLOWS.clear()  # those of plans run in another process


def _build(given: Flow, trt: Trt, order: Order, **changes: Any) -> tuple[Any, list[str]]:
    told: list[str] = []
    with mock.patch.object(tensorrt_engine, "load_plugins", autospec=True, return_value=None) as load:
        built = tensorrt_engine.build_tensorrt_engine(order, given.around(trt, order.profiles, told, **changes))
    assert load.call_args == mock.call(trt, order.options.plugins, arch=90)
    return built, told


def _files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@flow
def engine_that_agrees(given: Flow) -> Any:
    annotations = given.images.parent / "annotations" / f"instances_{given.images.name}.json"
    opened: list[PlanBackend] = []
    order = given.order(
        profiles=parsed_profiles("1,2", "64x96:96x128:128x160", given.metadata.preprocessing),
        images=GateImages(folder=given.images, annotations=annotations, limit=2),
    )

    def open_engine(path: Path) -> PlanBackend:
        opened.append(PlanBackend(path, order.profiles))
        return opened[-1]

    built, told = _build(given, Trt(runnable(given.reference)), order, open_engine=open_engine)
    written = json.loads((given.folder / "model.fp16.engine.json").read_text())
    return {
        "files": _files(given.folder),
        "stamp": built.metadata.stamp,
        "same": written["stamp"] == built.metadata.stamp,
        "precision": written["precision"],
        "source": written["source_sha256"] == tensorrt_engine.sha256_of(given.reference),
        "plan": built.metadata.stamp["plan_sha256"] == tensorrt_engine.sha256_of(order.output),
        "told": told,
        "shapes": opened[0].shapes,
        "ap": list(built.result.ap),
    }


def _wrong(plan: bytes) -> bytes:
    model = onnx.load_from_string(plan)
    initializer(model, lambda name, _: name.endswith("box_predictor.bbox_pred.bias_fp16"), lambda bias: bias + 8)
    return model.SerializeToString()


@flow
def engine_that_departs(given: Flow) -> Any:
    """What TensorRT makes of the graph has another bias in the box head, and so has the engine with stages."""

    def wrong(graph: bytes) -> bytes:
        return _wrong(runnable(given.reference)(graph))

    order = given.order(profiles=parsed_profiles("1", "96x128:96x128:160x160", given.metadata.preprocessing))
    (given.folder / "model.fp16.engine").write_text("the one before")
    try:
        _build(given, Trt(wrong), order)
    except UserError as error:
        kept = (given.folder / "model.fp16.engine").read_text()
        return {"files": _files(given.folder), "kept": kept, "parts": [error.found, error.expected, error.fix]}


@flow
def stripped_engine_that_departs(given: Flow) -> Any:
    trt = Trt(lambda graph: _wrong(runnable(given.reference)(graph)))
    profiles = parsed_profiles("1", "96x128:96x128:160x160", given.metadata.preprocessing)
    options = BuildOptions(plugins=PluginForm.LIBRARY, weights=Weights.STRIPPED)
    try:
        _build(given, trt, given.order(profiles=profiles, options=options))
    except UserError as error:
        stamp = json.loads((given.folder / "model.fp16.rejected.engine.json").read_text())["stamp"]
        return {"came": error.found, "stamp": stamp["refit"], "hash": "plan_sha256" in stamp}


@flow
def engine_whose_stages_do_not_build(given: Flow) -> Any:
    plans = iter([lambda graph: _wrong(runnable(given.reference)(graph)), lambda graph: None])
    return _build(given, Trt(lambda graph: next(plans)(graph)), given.order())


@flow
def engine_without_weights(given: Flow) -> Any:
    trt = Trt(runnable(given.reference))
    order = given.order(options=BuildOptions(plugins=PluginForm.LIBRARY, weights=Weights.STRIPPED))
    built, _ = _build(given, trt, order)
    refused = tensorrt_library.check_stamp(
        built.metadata, trt=trt, gpu=GPU.name, compute_capability=GPU.compute_capability
    )
    serialized = [call.args[0].name for call in trt.serialization.clear_flag.call_args_list]
    return {
        "refit": trt.refit == [given.graph.read_bytes()],
        "cleared": serialized,
        "stamp": built.metadata.stamp["refit"],
        "do": refused.fix,
        "host_code": trt.runtime.engine_host_code_allowed,
    }


@flow
def engine_for_more_gpus(given: Flow) -> Any:
    """With the plugins' real registration, whose kernels are for the oldest of these GPUs."""
    trt = Trt(runnable(given.reference))
    options = BuildOptions(hardware=Hardware.AMPERE_PLUS)
    order = given.order(graph=given.aot_graph, options=options)
    with mock.patch("maskrcnn.plugins.aot.register", autospec=True) as register:
        built = tensorrt_engine.build_tensorrt_engine(order, given.around(trt, order.profiles))
    named = register.call_args.kwargs
    return {"arch": named["arch"], "image": named["image"].value, "stamp": built.metadata.stamp["plugins"]}


def _refit(given: Flow, trt: Trt, target: Path, name: str) -> tuple[Any, dict[str, Any]]:
    """Puts weights into an engine; what was built, and what is written beside the plan."""
    order = Refit(target=target, graph=given.graph, reference=given.reference, output=given.folder / name)
    with mock.patch.object(tensorrt_refit, "load_plugins", autospec=True):
        built = tensorrt_refit.refit_tensorrt_engine(order, given.around(trt, given.order().profiles))
    return built, json.loads(order.output.with_name(f"{name}.json").read_text())["stamp"]


@flow
def engine_with_other_weights(given: Flow) -> Any:
    trt = Trt(runnable(given.reference))
    order = given.order(options=BuildOptions(plugins=PluginForm.LIBRARY, weights=Weights.REFITTABLE))
    _build(given, trt, order)
    # Another plan than before, as other weights would make it.
    trt.plan_of = lambda graph: runnable(given.reference)(graph) + b"\x32\x00"
    built, stamp = _refit(given, trt, order.output, "new.engine")
    kept = [call.args[0].name for call in trt.serialization.set_flag.call_args_list]
    return {
        "files": _files(given.folder),
        "stamp": stamp,
        "set": kept,
        "can_remain": hasattr(real.SerializationFlag, "INCLUDE_REFIT"),
        "compared": built.result.accepted and built.result.text(),
        "hashes": [tensorrt_engine.sha256_of(path) for path in (order.output, given.folder / "new.engine")],
    }


@flow
def engine_that_gets_weights_once_more(given: Flow) -> Any:
    """With a TensorRT that has the flag for this."""
    trt = Trt(runnable(given.reference))
    trt.SerializationFlag = SimpleNamespace(EXCLUDE_WEIGHTS="EXCLUDE_WEIGHTS", INCLUDE_REFIT="INCLUDE_REFIT")
    order = given.order(options=BuildOptions(plugins=PluginForm.LIBRARY, weights=Weights.REFITTABLE))
    _build(given, trt, order)
    kinds = []
    for old, new in (("model.fp16.engine", "second.engine"), ("second.engine", "third.engine")):
        kinds.append(_refit(given, trt, given.folder / old, new)[1]["refit"])
    return kinds


@flow
def engine_that_gets_weights_but_once(given: Flow) -> Any:
    """With a TensorRT as old as 10.9."""
    trt = Trt(runnable(given.reference))
    trt.SerializationFlag = SimpleNamespace(EXCLUDE_WEIGHTS="EXCLUDE_WEIGHTS")
    order = given.order(options=BuildOptions(plugins=PluginForm.LIBRARY, weights=Weights.REFITTABLE))
    _build(given, trt, order)
    _, stamp = _refit(given, trt, order.output, "new.engine")
    flags = trt.serialization.set_flag.call_args_list
    try:
        _refit(given, trt, given.folder / "new.engine", "third.engine")
    except UserError as error:
        return {"stamp": stamp["refit"], "flags": len(flags), "came": error.found}


@flow
def refit_of_a_broken_plan(given: Flow) -> Any:
    return tensorrt_refit.refitted(Trt(), b"broken", b"")


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
    return tensorrt_refit.refitted(trt, b"plan", b"graph")


@flow
def refit_that_the_parser_refuses(given: Flow) -> Any:
    trt = Trt()
    trt.refuse(code="REFIT_FAILED", desc="weights of another size", node_name="conv1", node_operator="Conv")
    return tensorrt_refit.refitted(trt, b"plan", b"graph")


@flow
def image_outside_all_profiles(given: Flow) -> Any:
    order = given.order(
        profiles=parsed_profiles("1", "64x64", given.metadata.preprocessing), images=GateImages(folder=given.images)
    )
    return _build(given, Trt(runnable(given.reference)), order)


# The command line


def _commands(given: Flow, trt: Trt, *commands: list[str]) -> dict[str, Any]:
    """What a user sees of commands in the flow's folder, with doubles in the place of TensorRT and the GPU."""
    shutil.copy(given.reference, given.folder / "model.onnx")

    def open_engine(path: Path) -> PlanBackend:
        stamp = json.loads(path.with_name(f"{path.name}.json").read_text())["stamp"]
        return PlanBackend(path, from_json(stamp["profiles"]))

    patches = (
        mock.patch.dict(os.environ, {"MASKRCNN_CACHE": str(given.folder.parent / "cache")}),
        mock.patch.object(build_engine, "tensorrt_obstacle", autospec=True, return_value=None),
        mock.patch.object(build_engine, "import_tensorrt", autospec=True, return_value=trt),
        mock.patch.object(build_engine, "find_gpu", autospec=True, return_value=GPU),
        mock.patch.object(tensorrt_backend, "TensorRtBackend", open_engine),
        mock.patch.object(tensorrt_engine, "load_plugins", autospec=True, return_value=None),
        mock.patch.object(cli.console.console, "_file", io.StringIO()),
    )
    with contextlib.ExitStack() as stack:
        stack.callback(os.chdir, os.getcwd())
        os.chdir(given.folder)
        for patch in patches:
            stack.enter_context(patch)
        for command in commands:
            cli.app(command, standalone_mode=False)
        return {"printed": cli.console.console._file.getvalue(), "files": _files(given.folder)}


@flow
def command_that_builds(given: Flow) -> Any:
    trt = Trt(runnable(given.reference))
    command = ["build-engine", "--fp16", "model.onnx", "--batch", "1,2", "--size", "96x128", "--workspace", "2"]
    said = _commands(given, trt, [*command, "--gate-images", str(given.images), "--gate-max-images", "1"])
    stamp = json.loads((given.folder / "model.fp16.engine.json").read_text())["stamp"]
    return {**said, "stamp": stamp, "aot": trt.graph == (given.folder / "model.fp16.tensorrt.onnx").read_bytes()}


@flow
def command_in_tf32(given: Flow) -> Any:
    trt = Trt(runnable(given.reference))
    said = _commands(
        given, trt, ["build-engine", "--fp32", "--tf32", "model.onnx", "--size", "96x128", "--output", "exact.engine"]
    )
    metadata = json.loads((given.folder / "exact.engine.json").read_text())
    command = metadata["stamp"]["command"]
    return {**said, "precision": metadata["precision"], "flag": trt.flags["TF32"], "command": command}


@flow
def commands_that_refit(given: Flow) -> Any:
    trt = Trt(runnable(given.reference))
    build = ["build-engine", "--fp16", "model.onnx", "--size", "96x128", "--strip-weights"]
    refit = ["refit-engine", "model.fp16.engine", "model.onnx", "--output", "whole.engine"]
    said = _commands(given, trt, build, refit)
    return {**said, "stamp": json.loads((given.folder / "whole.engine.json").read_text())["stamp"]}

"""Adding weights to a TensorRT engine that was built without them, or replacing those of a refittable engine."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from maskrcnn.errors import UserError
from maskrcnn.files import folder_beside
from maskrcnn.metadata import ModelMetadata, sha256_of
from maskrcnn.runtime.backends.tensorrt import TensorRtBackend
from maskrcnn.runtime.backends.tensorrt_library import (
    PluginForm,
    Weights,
    find_gpu,
    import_tensorrt,
    listen,
    load_plugins,
)
from maskrcnn.runtime.build.gate import check_gate_images, gate
from maskrcnn.runtime.build.messages import failure, parsing_failure
from maskrcnn.runtime.build.profiles import from_json
from maskrcnn.runtime.build.request import (
    SUFFIX,
    BuildRequest,
    BuiltEngine,
    Progress,
    metadata_of_other_plan,
    move_engine,
    write_engine,
)
from maskrcnn.runtime.engine_files import read_metadata, read_model

_REFITTED = "refitted"  # value of the stamp entry `refit`, in addition to `Weights`: weights can be replaced again
_REMAIN_REFITTABLE = "INCLUDE_REFIT"  # a SerializationFlag that TensorRT 10.16 has and 10.9 lacks


def refit_tensorrt_engine(engine: Path, request: BuildRequest, progress: Progress) -> BuiltEngine:
    """Adds the weights of a graph to an engine, compares it with the ONNX file, and keeps it if they agree.

    Args:
        engine: built with refittable or stripped weights; it is not changed.
        request: the ONNX file, the graph made from it in the precision of the engine, the output, and images to compare
            on. Profiles and settings are taken from the engine.
        progress: receives the steps.

    Raises:
        UserError: see `check_refittable` and `refit_plan`; also if the refitted engine differs from the ONNX file.
    """
    check_gate_images(request)
    trt, gpu = import_tensorrt(), find_gpu()
    metadata = metadata_with_weights(check_refittable(engine, request.model), trt)
    source = sha256_of(request.model)
    metadata = dataclasses.replace(metadata, source_sha256=source)
    stamp = metadata.stamp
    stamp["onnx_sha256"] = source
    if stamp["plugins"] == PluginForm.LIBRARY.value:
        load_plugins(trt, PluginForm.LIBRARY, arch=gpu.arch)
    with progress.task("adding the weights"):
        plan = refit_plan(
            trt,
            engine.read_bytes(),
            request.graph.read_bytes(),
            version_compatible=stamp["version_compatible"] == "yes",
            remains_refittable=stamp["refit"] == _REFITTED,
            stage_of=request.stage_of,
        )
    with folder_beside(request.output, prefix=".engine-") as folder:
        draft = write_engine(folder / request.output.name, plan, metadata)
        request = dataclasses.replace(request, precision=stamp["precision"])
        comparison = gate(TensorRtBackend(draft), request, from_json(stamp["profiles"]), progress)
        stamp["compared"], stamp["plan_sha256"] = str(comparison), sha256_of(draft)
        write_engine(draft, plan, metadata)
        path = request.output if comparison.accepted else request.output.with_suffix(f".rejected{SUFFIX}")
        move_engine(draft, path)
    if not comparison.accepted:
        raise UserError(
            f"a refitted engine that differs from {request.model}: {comparison}",
            comparison.expected(),
            f"build an engine from {request.model}; the rejected engine is {path}",
        )
    return BuiltEngine(path=path, metadata=metadata, comparison=comparison)


def refit_plan(
    trt: Any,
    plan: bytes,
    graph: bytes,
    *,
    version_compatible: bool = False,
    remains_refittable: bool = False,
    stage_of: Callable[[str], str] = lambda node: "",
) -> bytes:
    """Returns a plan with the weights of a graph. The plugins it calls must be in the registry.

    Args:
        trt: the tensorrt module.
        plan: plan that was built refittable, or without its weights.
        graph: content of an ONNX file for TensorRT's parser: the one that the plan was built from, or, for a refittable
            plan, one of the same model with other weights. A stripped plan with other weights gives wrong results.
        version_compatible: whether the plan was built version-compatible, and contains host code.
        remains_refittable: whether weights of the result can be replaced again.
        stage_of: see `parsing_failure`.

    Raises:
        UserError: with the cause, if TensorRT rejects the plan or the weights.
    """
    log = listen(trt)
    runtime = trt.Runtime(log.logger)
    runtime.engine_host_code_allowed = version_compatible
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        raise failure(log.messages, "TensorRT does not load the engine to refit", "a plan for this machine")
    refitter = trt.Refitter(engine, log.logger)
    parser = trt.OnnxParserRefitter(refitter, log.logger)
    if not parser.refit_from_bytes(graph):
        raise parsing_failure(parser, log.messages, stage_of)
    if not refitter.refit_cuda_engine():
        names = list(refitter.get_missing_weights())
        missing = f", {len(names)} are missing, first {names[0]}" if names else ""
        raise failure(log.messages, f"TensorRT rejects the weights{missing}", "all weights of the engine")
    config = engine.create_serialization_config()
    config.clear_flag(trt.SerializationFlag.EXCLUDE_WEIGHTS)
    if remains_refittable:
        config.set_flag(getattr(trt.SerializationFlag, _REMAIN_REFITTABLE))
    data = engine.serialize_with_config(config)
    if data is None:
        raise failure(log.messages, "TensorRT does not serialize the refitted engine", "a plan")
    return bytes(data)


def metadata_with_weights(metadata: ModelMetadata, trt: Any) -> ModelMetadata:
    """The metadata of a stripped or refittable engine once it has its weights, before it is compared."""
    is_stripped = metadata.stamp["refit"] == Weights.STRIPPED.value  # accepts only its own weights
    is_fixed = is_stripped or not hasattr(trt.SerializationFlag, _REMAIN_REFITTABLE)
    return metadata_of_other_plan(metadata, weights=Weights.FIXED.value if is_fixed else _REFITTED)


def check_refittable(engine: Path, model: Path) -> ModelMetadata:
    """Returns the metadata of an engine that can receive the weights of an ONNX file in single precision.

    Raises:
        UserError: if a file is missing, the engine's weights are fixed, the ONNX file belongs to another model, or
            the engine is stripped and the weights of the ONNX file differ from its own.
    """
    if not engine.is_file() or engine.suffix != SUFFIX:
        raise UserError(f"no engine {engine}", "both files of a TensorRT engine", "correct the path")
    metadata = read_metadata(engine)
    weights, precision = metadata.stamp.get("refit"), metadata.stamp.get("precision")
    if weights not in (Weights.REFITTABLE.value, Weights.STRIPPED.value, _REFITTED) or precision == "int8":
        what = "8-bit scales, which are not weights" if precision == "int8" else "fixed weights"
        raise UserError(
            f"{engine}: an engine with {what}",
            "an engine built with --refit or --strip-weights, in any precision but int8",
            "build it again from the ONNX file",
        )
    _, source = read_model(model)
    if (source.model, source.detections, source.class_names) != (
        metadata.model,
        metadata.detections,
        metadata.class_names,
    ):
        raise UserError(
            f"{model}: {source.model} of {len(source.class_names)} classes",
            f"{metadata.model} of {len(metadata.class_names)} classes, as {engine}",
            "pass an export of the same model, or build an engine from this one",
        )
    is_same = metadata.stamp.get("onnx_sha256") == sha256_of(model)
    if weights == Weights.STRIPPED.value and not is_same:
        raise UserError(
            f"{model}, whose weights differ from those that {engine} was built from",
            "the ONNX file of the engine, as a stripped engine is correct with its own weights only",
            "pass that file; to replace weights, build with --refit",
        )
    return metadata

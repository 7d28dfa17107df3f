"""Putting weights into an engine that was built to take them: stripped of its own, or to be given others."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from maskrcnn.errors import UserError
from maskrcnn.files import folder_beside
from maskrcnn.metadata import ModelMetadata, sha256_of
from maskrcnn.runtime.onnx_file import read_model
from maskrcnn.runtime.trt.gate import gate
from maskrcnn.runtime.trt.library import PluginForm, Weights, load_plugins
from maskrcnn.runtime.trt.log import listen
from maskrcnn.runtime.trt.messages import StageOf, failure, parsing_failure
from maskrcnn.runtime.trt.orders import (
    SUFFIX,
    Built,
    Refit,
    Surroundings,
    keep_engine,
    of_another_plan,
    write_engine,
)
from maskrcnn.runtime.trt.plan import metadata_path
from maskrcnn.runtime.trt.profiles import from_json

_REFITTED = "refitted"  # in a stamp's `refit`, beside the values of `Weights`: it can be done again
_REMAIN_REFITTABLE = "INCLUDE_REFIT"  # of SerializationFlag; TensorRT 10.9 does not have it, 10.16 does


def refitted(
    trt: Any,
    plan: bytes,
    graph: bytes,
    *,
    version_compatible: bool = False,
    remains_refittable: bool = False,
    stage_of: StageOf = lambda node: "",
) -> bytes:
    """A plan with the weights of a graph in it. What plugins it calls must be in the registry.

    Args:
        trt: the tensorrt module.
        plan: built refittable, or without its weights.
        graph: an ONNX file for TensorRT's parser: the one that the plan was built from, or one of the same model with
            other weights, for a plan that is refittable. A stripped plan with other weights computes anything.
        version_compatible: whether the plan was built so, and holds code that has to run.
        remains_refittable: whether other weights can be put into the result, see `can_remain_refittable`.
        stage_of: see `parsing_failure`.

    Raises:
        UserError: where TensorRT refuses the plan or the weights, saying why.
    """
    log = listen(trt)
    runtime = trt.Runtime(log.logger)
    runtime.engine_host_code_allowed = version_compatible
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        raise failure(log.messages, "TensorRT does not load the engine to be refitted", "a plan for this machine")
    refitter = trt.Refitter(engine, log.logger)
    parser = trt.OnnxParserRefitter(refitter, log.logger)
    if not parser.refit_from_bytes(graph):
        raise parsing_failure(parser, log.messages, stage_of)
    if not refitter.refit_cuda_engine():
        what = f"TensorRT does not take the weights{_missing(refitter)}"
        raise failure(log.messages, what, "all weights of the engine")
    config = engine.create_serialization_config()
    config.clear_flag(trt.SerializationFlag.EXCLUDE_WEIGHTS)
    if remains_refittable:
        config.set_flag(getattr(trt.SerializationFlag, _REMAIN_REFITTABLE))
    data = engine.serialize_with_config(config)
    if data is None:
        raise failure(log.messages, "TensorRT does not serialise the refitted engine", "a plan")
    return bytes(data)


def _missing(refitter: Any) -> str:
    names = list(refitter.get_missing_weights())
    return f", {len(names)} are missing, first {names[0]}" if names else ""


def can_remain_refittable(trt: Any) -> bool:
    """Whether this TensorRT can write a plan with new weights so that it takes others again."""
    return hasattr(trt.SerializationFlag, _REMAIN_REFITTABLE)


def with_weights(metadata: ModelMetadata, trt: Any) -> ModelMetadata:
    """The metadata of a stripped or refittable engine that has got weights, but for how it was compared."""
    was_stripped = metadata.stamp["refit"] == Weights.STRIPPED.value  # which takes its own weights alone
    is_fixed = was_stripped or not can_remain_refittable(trt)
    return of_another_plan(metadata, refit=Weights.FIXED.value if is_fixed else _REFITTED)


def check_refittable(target: Path, reference: Path) -> ModelMetadata:
    """The metadata of an engine that takes the weights of an ONNX file in single precision.

    Raises:
        UserError: where a file is missing, the engine takes no weights or no others than its own, and for another
            model.
    """
    described = metadata_path(target)
    if not target.is_file() or not described.is_file():
        raise UserError(f"no {target} with {described.name}", "both files of an engine", "check the path")
    metadata = ModelMetadata.from_json(described.read_text(encoding="utf-8"), target)
    kind, precision = metadata.stamp.get("refit"), metadata.stamp.get("precision")
    if kind not in (Weights.REFITTABLE.value, Weights.STRIPPED.value, _REFITTED) or precision == "int8":
        what = "8-bit scales, which are no weights" if precision == "int8" else "weights that are fixed"
        raise UserError(
            f"{target}: an engine with {what}",
            "one that was built with --refit or --strip-weights, in any precision but int8",
            "build it again from the ONNX file",
        )
    _, source = read_model(reference)
    if (source.model, source.detections, source.class_names) != (
        metadata.model,
        metadata.detections,
        metadata.class_names,
    ):
        came = f"{reference}: {source.model} of {len(source.class_names)} classes"
        expected = f"{metadata.model} of {len(metadata.class_names)} classes, as {target}"
        raise UserError(came, expected, "name an export of the same model, or build an engine for this one")
    is_same = metadata.stamp.get("onnx_sha256") == sha256_of(reference)
    if kind == Weights.STRIPPED.value and not is_same:
        raise UserError(
            f"{reference}, with other weights than {target} was built from",
            "the same file, as a stripped engine is right for its own weights alone",
            "name that file; for other weights build with --refit",
        )
    return metadata


def refit_tensorrt_engine(order: Refit, around: Surroundings) -> Built:
    """Puts the weights of a graph into an engine, compares it with the ONNX file, and keeps it if they agree.

    Raises:
        UserError: as `check_refittable` and `refitted`, and where the engine departs.
    """
    order.images.check()
    metadata = with_weights(check_refittable(order.target, order.reference), around.trt)
    source = sha256_of(order.reference)
    metadata = dataclasses.replace(metadata, source_sha256=source)
    stamp = metadata.stamp
    stamp["onnx_sha256"] = source
    if stamp["plugins"] == PluginForm.LIBRARY.value:
        load_plugins(around.trt, PluginForm.LIBRARY, arch=around.gpu.arch)
    around.tell("putting the weights in")
    is_portable = stamp["version_compatible"] == "yes"
    plan = refitted(
        around.trt,
        order.target.read_bytes(),
        order.graph.read_bytes(),
        version_compatible=is_portable,
        remains_refittable=stamp["refit"] == _REFITTED,
        stage_of=around.stage_of,
    )
    with folder_beside(order.output, prefix=".engine-") as folder:
        draft = write_engine(folder / order.output.name, plan, metadata)
        profiles = from_json(stamp["profiles"])
        result = gate(
            around.open_engine(draft), order.reference, profiles, stamp["precision"], order.images, around.tell
        )
        stamp["compared"], stamp["plan_sha256"] = result.text(), sha256_of(draft)
        write_engine(draft, plan, metadata)
        kept = order.output if result.accepted else order.output.with_suffix(f".rejected{SUFFIX}")
        keep_engine(draft, kept)
    if not result.accepted:
        raise UserError(
            f"a refitted engine that departs from {order.reference}: {result.text()}",
            result.expected(),
            f"build an engine from {order.reference}; what was refused is {kept}",
        )
    return Built(metadata=metadata, result=result, warnings=())

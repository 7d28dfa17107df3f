"""What building an engine takes and gives: orders, their surroundings, and the two files of an engine.

`model.fp16.engine` is the plan alone, as trtexec and Triton take it; `model.fp16.engine.json` beside it is the model's
metadata with the stamp.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from maskrcnn.metadata import ModelMetadata
from maskrcnn.runtime.backend import Backend
from maskrcnn.runtime.trt.builder import BuildOptions
from maskrcnn.runtime.trt.gate import GateImages, GateResult
from maskrcnn.runtime.trt.library import Gpu
from maskrcnn.runtime.trt.messages import StageOf
from maskrcnn.runtime.trt.plan import metadata_path
from maskrcnn.runtime.trt.profiles import Profile
from maskrcnn.runtime.trt.progress import Progress

SUFFIX = ".engine"
_OF_ONE_PLAN = ("plan_sha256", "compared")  # fields of the stamp


@dataclass(frozen=True, kw_only=True)
class Order:
    """What is to be built."""

    graph: Path  # the ONNX file for TensorRT's parser
    reference: Path  # the ONNX file in single precision that it was made from
    output: Path  # ends in .engine
    precision: str  # of the arithmetic: fp32, tf32, fp16, bf16 or int8
    profiles: Sequence[Profile]
    options: BuildOptions = field(default_factory=BuildOptions)
    images: GateImages = field(default_factory=GateImages)
    command: str = ""  # that builds it again
    timing_cache: Path | None = None  # by default that of this TensorRT and GPU


@dataclass(frozen=True, kw_only=True)
class Refit:
    """Weights that are to be put into an engine."""

    target: Path  # the engine; it stays as it is
    graph: Path  # as an `Order`'s, of the same model in the same precision
    reference: Path
    output: Path
    images: GateImages = field(default_factory=GateImages)


@dataclass(frozen=True, kw_only=True)
class Surroundings:
    """What an order is carried out with."""

    trt: Any  # the tensorrt module
    gpu: Gpu
    open_engine: Callable[[Path], Backend]  # as `tensorrt_backend.TensorRtBackend`
    progress: Progress | None = None
    tell: Callable[[str], None] = lambda what: None  # what is being done
    stage_of: StageOf = lambda node: ""


@dataclass(frozen=True, kw_only=True)
class Built:
    """An engine that was kept."""

    metadata: ModelMetadata
    result: GateResult
    warnings: tuple[str, ...]  # of TensorRT's


def of_another_plan(metadata: ModelMetadata, *, refit: str) -> ModelMetadata:
    """The metadata for a plan of the same model and settings that has not been compared yet.

    Args:
        metadata: of the plan that there is.
        refit: what can be done to the weights of the other one.
    """
    kept = {name: value for name, value in metadata.stamp.items() if name not in _OF_ONE_PLAN}
    return dataclasses.replace(metadata, stamp={**kept, "refit": refit})


def write_engine(path: Path, plan: Any, metadata: ModelMetadata) -> Path:
    """Writes the two files of an engine; `plan` is bytes, or TensorRT's own buffer."""
    path.write_bytes(plan)
    write_metadata(path, metadata)
    return path


def write_metadata(engine: Path, metadata: ModelMetadata) -> None:
    """Writes the second file of an engine."""
    metadata_path(engine).write_text(metadata.to_json() + "\n", encoding="utf-8")


def keep_engine(draft: Path, path: Path) -> Path:
    """Moves both files; the one that is loaded by its name comes last."""
    os.replace(metadata_path(draft), metadata_path(path))
    os.replace(draft, path)
    return path

"""The value objects of an engine build, and the files of a TensorRT engine.

`model.fp16.engine` contains only the plan, as trtexec and Triton read it; `model.fp16.engine.json` next to it contains
the model's metadata with the stamp.
"""

from __future__ import annotations

import dataclasses
import math
import os
import shlex
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from maskrcnn.errors import UserError, check_range
from maskrcnn.imaging.preprocess import Preprocessing
from maskrcnn.metadata import ModelMetadata
from maskrcnn.runtime.backends.tensorrt_library import Hardware, PluginForm, Weights
from maskrcnn.runtime.build.profiles import Profile, parse_profiles
from maskrcnn.runtime.engine_files import metadata_path
from maskrcnn.runtime.verification.compare import Difference, Tolerance

SUFFIX = ".engine"
_SETTINGS = (  # fields whose values the stamp's entry `options` lists
    *("plugins", "tf32", "workspace_gb", "optimization_level", "aux_streams"),
    *("hardware", "version_compatible", "weights"),
)
_PLAN_FIELDS = ("plan_sha256", "compared")  # stamp entries that describe one plan, not the model and its settings


class Progress(Protocol):
    """Receives messages and the steps of a build, from any thread; see `maskrcnn.api.progress.Progress`."""

    def message(self, text: str) -> None:
        """Receives one line of plain text."""

    def task(self, title: str, total: int | None = None) -> AbstractContextManager[Callable[[int], None]]:
        """Encloses a part of the work; yields a function to call with the number of completed steps."""


@dataclass(frozen=True, kw_only=True)
class BuildRequest:
    """Parameters of an engine build, or of adding weights to an engine.

    Every default of a TensorRT setting is TensorRT's own, except TF32, which changes results.
    """

    model: Path  # exported ONNX file in single precision, with which the engine is compared
    graph: Path  # ONNX file for TensorRT's parser, made from `model`
    output: Path  # ends in .engine, or .xml for OpenVINO
    precision: str  # fp32, tf32, fp16, bf16 or int8
    calibration: Path | None = None  # calibration images for int8
    calibration_images: int = 64
    keep: Sequence[str] = ()  # layers that int8 leaves in floating point
    batch: str = "1"  # see `parse_profiles`
    size: str = "coco"
    plugins: PluginForm = PluginForm.AOT
    tf32: bool = False  # round the factors of float32 products to 10 bits
    workspace_gb: float | None = None  # limit of a layer's scratch memory; None: all of the GPU's memory
    optimization_level: int | None = None  # 0 to 5
    aux_streams: int | None = None  # streams for branches that run concurrently
    hardware: Hardware = Hardware.NONE
    version_compatible: bool = False
    weights: Weights = Weights.FIXED
    timing_cache: Path | None = None  # None: the cache of this TensorRT version and GPU
    gate_images: Path | None = None  # folder of images to compare on, in addition to drawn ones
    gate_annotations: Path | None = None  # COCO annotations of images in the folder: AP is compared too
    gate_max_images: int = 16  # limit for the folder; AP uses all annotated images
    stage_of: Callable[[str], str] = lambda node: ""  # detector stage of a node of `graph`, "" if unknown

    def __post_init__(self) -> None:
        check_range("calibration_images", self.calibration_images, 1)
        check_range("gate_max_images", self.gate_max_images, 1)
        if self.optimization_level is not None and self.optimization_level not in range(6):
            found = f"--optimization-level {self.optimization_level}"
            raise UserError(found, "0 to 5", "drop it, or use 5 for the most thorough search")
        if self.workspace_gb is not None and not 0 < self.workspace_gb < math.inf:
            raise UserError(f"--workspace {self.workspace_gb:g}", "gigabytes, more than 0", "drop it")
        if self.aux_streams is not None and self.aux_streams < 0:
            raise UserError(f"--aux-streams {self.aux_streams}", "0 or more", "drop it")
        if self.gate_annotations is not None and self.gate_images is None:
            found = f"--gate-annotations {self.gate_annotations} without --gate-images"
            raise UserError(found, "the folder of the annotated images", "add --gate-images FOLDER")
        if self.version_compatible and self.plugins is PluginForm.AOT:
            found = "--version-compatible with ahead-of-time plugins, which other versions of TensorRT may not run"
            raise UserError(found, "--plugin-library as well", "add --plugin-library, or drop --version-compatible")

    @property
    def compared_images(self) -> str:
        """Description of the images that the engine is compared on."""
        return "drawn images" if self.gate_images is None else f"drawn images and {self.gate_images}"

    def profiles(self, preprocessing: Preprocessing) -> list[Profile]:
        """The optimization profiles of `batch` and `size`."""
        return parse_profiles(self.batch, self.size, preprocessing)

    def settings(self) -> str:
        """The TensorRT settings that differ from the defaults, for the stamp."""
        fields = {field.name: field for field in dataclasses.fields(self)}
        changed = {name: getattr(self, name) for name in _SETTINGS if getattr(self, name) != fields[name].default}
        return ", ".join(f"{name}={getattr(value, 'value', value)}" for name, value in changed.items()) or "defaults"

    def tensorrt_options(self, *, with_paths: bool = True) -> list[str]:
        """The command-line options for TensorRT that differ from the defaults.

        Args:
            with_paths: include options whose values are local paths.
        """
        values: dict[str, Any] = {
            "--tf32": self.tf32 and self.precision not in ("fp32", "tf32"),
            "--batch": self.batch != BuildRequest.batch and self.batch,
            "--size": self.size != BuildRequest.size and self.size,
            "--plugin-library": self.plugins is PluginForm.LIBRARY,
            "--workspace": self.workspace_gb,
            "--optimization-level": self.optimization_level,
            "--aux-streams": self.aux_streams,
            "--version-compatible": self.version_compatible,
            "--hardware-compatible": self.hardware is not Hardware.NONE and self.hardware.value,
            "--refit": self.weights is Weights.REFITTABLE,
            "--strip-weights": self.weights is Weights.STRIPPED,
        }
        if with_paths:
            values["--timing-cache"] = self.timing_cache
            values["--gate-images"] = self.gate_images
            values["--gate-annotations"] = self.gate_annotations
        words: list[str] = []
        for option, value in values.items():
            if value is not None and value is not False:
                words += [option] if value is True else [option, str(value)]
        return words

    def command(self) -> str:
        """The command line that rebuilds the TensorRT engine; paths are shortened to file names."""
        words = ["maskrcnn", "build-engine", self.model.name, f"--{self.precision}"]
        if self.calibration is not None:
            words += [self.calibration.name, *(word for name in self.keep for word in ("--keep", name))]
            if self.calibration_images != BuildRequest.calibration_images:
                words += ["--calibration-images", str(self.calibration_images)]
        words += ["--target", "tensorrt"]
        if self.output.name != f"{self.model.stem}.{self.precision}{SUFFIX}":
            words += ["--output", self.output.name]
        return shlex.join([*words, *self.tensorrt_options(with_paths=False)])


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Difference between an engine and its ONNX file, and the difference that is accepted."""

    difference: Difference
    tolerance: Tolerance
    ap: dict[str, tuple[float, float]] = dataclasses.field(default_factory=dict)  # name: (ONNX file, engine)
    max_ap_loss: float = 0.0
    images: str = "drawn images"  # images used for the comparison

    @property
    def accepted(self) -> bool:
        """Whether the engine may be kept."""
        losses = [reference - engine for reference, engine in self.ap.values()]
        return self.difference.within(self.tolerance) and all(loss <= self.max_ap_loss for loss in losses)

    def __str__(self) -> str:
        aps = "".join(f"; {name} {engine:.4f}, ONNX file {ref:.4f}" for name, (ref, engine) in self.ap.items())
        return f"{self.difference}{aps}"

    def summary(self) -> str:
        """One line for an engine that was accepted."""
        good = "OK: " if self.difference.detections else ""
        aps = "".join(f"; {name} {engine:.4f}, was {ref:.4f}" for name, (ref, engine) in self.ap.items())
        return f"{good}{self.difference.summary('the ONNX file')}, on {self.images}{aps}"

    def expected(self) -> str:
        """The limits, for an error text."""
        return f"{self.tolerance}" + (f", AP at most {self.max_ap_loss:g} lower" if self.ap else "")


@dataclass(frozen=True, kw_only=True)
class BuiltEngine:
    """An engine that agreed with its ONNX file and was kept."""

    path: Path
    metadata: ModelMetadata
    comparison: Comparison
    warnings: tuple[str, ...] = ()  # from TensorRT


def metadata_of_other_plan(metadata: ModelMetadata, *, weights: str) -> ModelMetadata:
    """The metadata of another plan of the same model and settings, before that plan is compared.

    Args:
        metadata: metadata of the present plan.
        weights: stamp entry `refit` of the other plan.
    """
    stamp = {name: value for name, value in metadata.stamp.items() if name not in _PLAN_FIELDS}
    return dataclasses.replace(metadata, stamp={**stamp, "refit": weights})


def write_engine(path: Path, plan: Any, metadata: ModelMetadata) -> Path:
    """Writes both files of an engine; `plan` is bytes, or a TensorRT buffer."""
    path.write_bytes(plan)
    write_metadata(path, metadata)
    return path


def write_metadata(engine: Path, metadata: ModelMetadata) -> None:
    """Writes the metadata file of an engine."""
    metadata_path(engine).write_text(metadata.to_json() + "\n", encoding="utf-8")


def move_engine(draft: Path, path: Path) -> Path:
    """Moves both files of an engine; the plan last, because engines are loaded by its path."""
    os.replace(metadata_path(draft), metadata_path(path))
    os.replace(draft, path)
    return path

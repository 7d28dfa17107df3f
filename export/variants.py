"""Files derived from an exported ONNX file: half precision, 8-bit integers, and the copy for TensorRT's parser.

Files in half precision or with 8-bit integers are compared with the exported file before they are kept.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from maskrcnn.data.images import images_in
from maskrcnn.errors import UserError
from maskrcnn.export.graph import set_metadata
from maskrcnn.export.passes.precision import HALF_TYPES, CastReport, simulate_half, to_half
from maskrcnn.export.passes.quantize import (
    DEFAULT_KEEP,
    QuantizationReport,
    activation_ranges,
    feeds_from_files,
    largest_magnitudes,
    symmetric,
    to_int8,
    with_half_scales,
)
from maskrcnn.export.tensorrt.flavour import tensorrt_flavour
from maskrcnn.export.tensorrt.lint import LintReport, lint
from maskrcnn.files import atomic_path
from maskrcnn.metadata import ModelMetadata, sha256_of
from maskrcnn.runtime.backends.base import Backend
from maskrcnn.runtime.backends.onnxruntime import OnnxRuntimeBackend
from maskrcnn.runtime.backends.openvino import OpenVinoBackend
from maskrcnn.runtime.engine_files import check_portable, read_model
from maskrcnn.runtime.verification.compare import HALF, INT8, Difference, Tolerance, compare_outputs, merge
from maskrcnn.runtime.verification.inputs import validation_batches
from maskrcnn.runtime.verification.verify import with_stages

_Tensors = dict[str, np.ndarray]  # inputs or outputs by name
_CALIBRATION_IMAGES = 64
COMPARED_IMAGES = 8


def write_half(
    source: Path,
    output: Path,
    precision: str,
    *,
    images: Path | None = None,
    limit: int = _CALIBRATION_IMAGES,
    simulate: bool = False,
    max_unmatched: float = 0.0,
) -> tuple[CastReport, Difference]:
    """Writes a half-precision file and compares it with its source.

    The comparison covers a simulation of a device that rounds after every layer (see `simulate_half`) and the file
    itself in a runtime that supports it.

    Args:
        source: file written by `export_onnx`.
        output: path of the file to write.
        precision: "fp16" or "bf16"; ONNX Runtime has no kernels for bf16, OpenVINO does.
        images: folder of images; activations near the limit of FP16 on these images or on drawn shapes stay in single
            precision.
        limit: maximum number of images from the folder.
        simulate: write the simulation instead, which any runtime runs.
        max_unmatched: fraction of the detections that may lack a partner or differ by more than the tolerance; used if
            it is larger than the fraction in the tolerance.

    Returns:
        The nodes in half precision, and the difference between the simulation and the source.

    Raises:
        UserError: if the source is not a single-precision file of this package, or if the difference exceeds the
            tolerance; the rejected file is then kept next to `output` as `*.rejected.onnx`.
    """
    if precision not in HALF_TYPES:
        raise UserError(f"precision {precision!r}", " or ".join(HALF_TYPES), "pass one of these")
    proto, metadata = single_precision(source)
    batches = list(validation_batches(metadata.preprocessing.divisor, metadata.preprocessing.channels))
    observed = [] if images is None else feeds_from_files(images_in(images, limit), metadata)
    largest = largest_magnitudes(proto, itertools.chain(batches, observed))
    if images is not None:
        batches += feeds_from_files(images_in(images, COMPARED_IMAGES), metadata)
    model, report = to_half(proto, precision, largest=largest)
    simulated = simulate_half(proto, precision, largest=largest)
    for each, name in ((model, precision), (simulated, f"{precision}, simulated")):
        _describe(each, metadata, source, name, {"casts": report.text()})
    tolerance = with_share(HALF, max_unmatched)
    reference = _outputs_of(source, batches)
    difference = _compare(simulated, output, source, OnnxRuntimeBackend, tolerance, reference)
    if simulate:
        _save(simulated, output)
    else:
        backend = OnnxRuntimeBackend if precision == "fp16" else OpenVinoBackend
        _compare(model, output, source, backend, tolerance, reference)
        _save(model, output)
    return report, difference


def write_int8(
    source: Path,
    output: Path,
    calibration: Path,
    *,
    keep: Sequence[str] = DEFAULT_KEEP,
    limit: int = _CALIBRATION_IMAGES,
    for_tensorrt: bool = False,
    simulate: bool = False,
    max_unmatched: float = 0.0,
) -> tuple[QuantizationReport, Difference]:
    """Writes an 8-bit file and compares it with its source.

    Args:
        source: file written by `export_onnx`.
        output: path of the file to write.
        calibration: folder of images that represent the data at inference.
        keep: layers to leave in single precision, see `to_int8`.
        limit: maximum number of images from the folder.
        for_tensorrt: write and compare the form that `write_tensorrt` requires: symmetric quantisation, and FP16 for
            the remaining layers by the rule of `to_half`.
        simulate: write the simulation of that form instead, which any runtime runs.
        max_unmatched: as for `write_half`.

    Returns:
        The quantised nodes, and the difference between the file and the source; with `for_tensorrt` or `simulate`, the
        difference of a simulated device that rounds after every layer.

    Raises:
        UserError: as for `write_half`, and if the folder has no images.
    """
    proto, metadata = single_precision(source)
    paths = images_in(calibration, limit)
    activations = activation_ranges(proto, feeds_from_files(paths, metadata))
    model, report = to_int8(proto, activations, keep=keep)
    report.images = len(paths)
    batches = list(feeds_from_files(images_in(calibration, COMPARED_IMAGES), metadata))
    tolerance, reference = with_share(INT8, max_unmatched), _outputs_of(source, batches)
    compared = [model]
    if for_tensorrt or simulate:
        drawn = validation_batches(metadata.preprocessing.divisor, metadata.preprocessing.channels)
        largest = largest_magnitudes(proto, itertools.chain(drawn, feeds_from_files(paths, metadata)))
        rounded = with_half_scales(symmetric(model))
        model, report.casts = to_half(rounded, largest=largest)
        compared = [model, simulate_half(rounded, largest=largest)]
    for each in compared:
        _describe(each, metadata, source, "int8", {"quantization": report.text()})
        difference = _compare(each, output, source, OnnxRuntimeBackend, tolerance, reference)
    _save(compared[-1] if simulate else model, output)
    return report, difference


def write_tensorrt(source: Path, output: Path, *, aot: bool = False) -> LintReport:
    """Writes a copy for TensorRT's parser, see `tensorrt_flavour`.

    Args:
        source: file of this package in any precision. Write an 8-bit source with `for_tensorrt`; any other 8-bit
            source is made symmetric here, without a comparison.
        output: path of the file to write.
        aot: see `tensorrt_flavour`.

    Returns:
        The lint report of the copy.

    Raises:
        UserError: if the source is not a file of this package.
    """
    proto, _ = read_model(source)
    flavour = tensorrt_flavour(symmetric(proto), aot=aot)
    _save(flavour, output)
    return lint(flavour)


def single_precision(source: Path) -> tuple[onnx.ModelProto, ModelMetadata]:
    """Reads an exported single-precision file and its metadata.

    Raises:
        UserError: if the file is not of this package, is a copy for TensorRT, or has another precision.
    """
    proto, metadata = read_model(source)
    check_portable(proto, source)
    if metadata.precision != "fp32":
        raise UserError(
            f"{source}: a file in {metadata.precision}", "a single-precision file", "pass the file it was made from"
        )
    return proto, metadata


def _describe(
    model: onnx.ModelProto, metadata: ModelMetadata, source: Path, precision: str, stamp: dict[str, Any]
) -> None:
    """Records precision, report and the source's hash in the metadata, next to the hash of the checkpoint."""
    stamp = {**metadata.stamp, **stamp, "onnx_sha256": sha256_of(source)}
    set_metadata(model, dataclasses.replace(metadata, precision=precision, stamp=stamp))


def with_share(tolerance: Tolerance, max_unmatched: float) -> Tolerance:
    """Returns a tolerance that accepts at least this share of unmatched detections."""
    return dataclasses.replace(tolerance, departing_share=max(tolerance.departing_share, max_unmatched))


def unmatched_hint(difference: Difference) -> str:
    """Returns a hint on how to accept a difference from a few tied boxes; empty for any other difference."""
    share = math.ceil(difference.unmatched_share * 1e4) / 1e4
    return f"; if only a few tied boxes differ, accept them with --max-unmatched {share:g}" if 0 < share < 0.5 else ""


def _outputs_of(source: Path, batches: Iterable[_Tensors]) -> list[tuple[_Tensors, _Tensors]]:
    """The inputs and outputs of the source for each batch."""
    backend = OnnxRuntimeBackend(source, providers=["CPUExecutionProvider"])
    return [(feeds, backend(feeds)) for feeds in batches]


def _compare(
    model: onnx.ModelProto,
    output: Path,
    source: Path,
    backend: Callable[[Path], Backend],
    tolerance: Tolerance,
    reference: Sequence[tuple[_Tensors, _Tensors]],
) -> Difference:
    """Returns the difference between a model and its source; if it is too large, saves a `*.rejected.onnx`."""
    with tempfile.TemporaryDirectory(prefix="maskrcnn-") as folder:
        draft = Path(folder) / output.name
        onnx.save(model, str(draft))
        onnx.checker.check_model(str(draft), full_check=True)
        candidate = backend(draft)
        difference = merge([compare_outputs(outputs, candidate(feeds), tolerance) for feeds, outputs in reference])
        if not difference.detections:
            whole = OnnxRuntimeBackend(source, providers=["CPUExecutionProvider"])
            difference = with_stages(difference, whole, candidate)
    if not difference.within(tolerance):
        rejected = output.with_suffix(".rejected.onnx")
        _save(model, rejected)
        raise UserError(
            f"a graph that differs from {source}: {difference}",
            str(tolerance),
            f"locate the difference with `maskrcnn verify {source} {rejected}`, or leave more layers in single "
            f"precision{unmatched_hint(difference)}",
        )
    return difference


def _save(model: onnx.ModelProto, path: Path) -> None:
    with atomic_path(path) as draft:
        onnx.save(model, str(draft))

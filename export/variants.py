"""Files made from an exported file: in half precision, with 8-bit integers, or for TensorRT's parser."""

from __future__ import annotations

import dataclasses
import itertools
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import onnx

from maskrcnn.data.images import images_in
from maskrcnn.errors import UserError
from maskrcnn.export.graph import set_metadata
from maskrcnn.export.passes.precision import HALF_TYPES, CastReport, candidates, simulate_half, to_half
from maskrcnn.export.passes.quantize import (
    DEFAULT_KEEP,
    QuantizationReport,
    feeds_from_files,
    largest_magnitudes,
    observe,
    ranges,
    symmetric,
    to_int8,
    values_to_observe,
)
from maskrcnn.export.tensorrt.flavour import tensorrt_flavour
from maskrcnn.export.tensorrt.lint import LintReport, lint
from maskrcnn.files import atomic_path
from maskrcnn.metadata import ModelMetadata, sha256_of
from maskrcnn.runtime.backends.base import Backend
from maskrcnn.runtime.backends.onnxruntime import OnnxRuntimeBackend
from maskrcnn.runtime.backends.openvino import OpenVinoBackend
from maskrcnn.runtime.onnx_file import check_portable, read_model
from maskrcnn.runtime.verification.compare import HALF, INT8, Difference, Tolerance, compare_outputs, merge
from maskrcnn.runtime.verification.inputs import validation_batches

_Outputs = dict[str, np.ndarray]  # and inputs, by name
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
) -> tuple[CastReport, Difference]:
    """Writes a file that computes in half precision, and compares it with the one that it is made from.

    What is compared is the arithmetic of a device that rounds after every layer, see `simulate_half`; the file itself
    must agree as well in a runtime that takes it.

    Args:
        source: a file that `export_onnx` wrote.
        output: the file to write.
        precision: "fp16", or "bf16", which ONNX Runtime has no kernels for; OpenVINO runs that one.
        images: a folder of images; activations that come near the end of FP16's range on them, or on drawn shapes,
            stay in single precision.
        limit: images to take from the folder, at most.
        simulate: write the simulation instead, which any runtime runs.

    Returns:
        which nodes are in half precision, and how far its arithmetic departs.

    Raises:
        UserError: for a source that is not ours or not in single precision, and where the result departs by more
            than half precision explains; it then lies beside `output` under the name `*.rejected.onnx`.
    """
    if precision not in HALF_TYPES:
        raise UserError(f"precision {precision!r}", " or ".join(HALF_TYPES), "choose one of these")
    proto, metadata = single_precision(source)
    batches = list(validation_batches(metadata.preprocessing.divisor))
    observed = [] if images is None else feeds_from_files(images_in(images, limit), metadata)
    largest = largest_magnitudes(proto, itertools.chain(batches, observed), candidates(proto))
    if images is not None:
        batches += feeds_from_files(images_in(images, COMPARED_IMAGES), metadata)
    model, report = to_half(proto, precision, largest=largest)
    simulated = simulate_half(proto, precision, largest=largest)
    for each, name in ((model, precision), (simulated, f"{precision}, simulated")):
        _describe(each, metadata, source, name, {"casts": report.text()})
    wanted = _detections_of(source, batches)
    difference = _compare(simulated, output, source, OnnxRuntimeBackend, HALF, wanted)
    if simulate:
        _keep(simulated, output)
    else:
        backend = OnnxRuntimeBackend if precision == "fp16" else OpenVinoBackend
        _compare(model, output, source, backend, HALF, wanted)
        _keep(model, output)
    return report, difference


def write_int8(
    source: Path,
    output: Path,
    calibration: Path,
    *,
    keep: Sequence[str] = DEFAULT_KEEP,
    limit: int = _CALIBRATION_IMAGES,
    for_tensorrt: bool = False,
) -> tuple[QuantizationReport, Difference]:
    """Writes a file that computes with 8-bit integers, and compares it with the one that it is made from.

    Args:
        source: a file that `export_onnx` wrote.
        output: the file to write.
        calibration: a folder of images like those to be seen later.
        keep: layers to leave in single precision, see `to_int8`.
        limit: images to take from the folder, at most.
        for_tensorrt: write, and compare, the symmetric form that `write_tensorrt` needs.

    Raises:
        UserError: as `write_half`, and for a folder without images.
    """
    proto, metadata = single_precision(source)
    paths = images_in(calibration, limit)
    observed = observe(proto, feeds_from_files(paths, metadata), values_to_observe(proto))
    model, report = to_int8(proto, ranges(observed), keep=keep)
    report.images = len(paths)
    model = symmetric(model) if for_tensorrt else model
    _describe(model, metadata, source, "int8", {"quantization": report.text()})
    batches = feeds_from_files(images_in(calibration, COMPARED_IMAGES), metadata)
    difference = _compare(model, output, source, OnnxRuntimeBackend, INT8, _detections_of(source, batches))
    _keep(model, output)
    return report, difference


def write_tensorrt(source: Path, output: Path, *, aot: bool = False) -> LintReport:
    """Writes a copy for TensorRT's parser, see `tensorrt_flavour`.

    Args:
        source: a file of ours, in any precision. With 8-bit integers it should be made with `for_tensorrt`: another
            one gets its symmetric form here, which nothing has been compared with.
        output: the file to write.
        aot: see `tensorrt_flavour`.

    Returns:
        what the lint says of the copy.

    Raises:
        UserError: for a source that is not ours.
    """
    proto, _ = read_model(source)
    flavour = tensorrt_flavour(symmetric(proto), aot=aot)
    _keep(flavour, output)
    return lint(flavour)


def single_precision(source: Path) -> tuple[onnx.ModelProto, ModelMetadata]:
    """An exported file and its metadata.

    Raises:
        UserError: for a file that is not ours, a copy for TensorRT, or one in another precision.
    """
    proto, metadata = read_model(source)
    check_portable(proto, source)
    if metadata.precision != "fp32":
        raise UserError(
            f"{source}: a file in {metadata.precision}", "one in single precision", "name the file it was made from"
        )
    return proto, metadata


def _describe(model: onnx.ModelProto, metadata: ModelMetadata, source: Path, precision: str, stamp: dict) -> None:
    """Writes what was done into the file's metadata; the source stays the checkpoint."""
    stamp = {**metadata.stamp, **stamp, "onnx_sha256": sha256_of(source)}
    set_metadata(model, dataclasses.replace(metadata, precision=precision, stamp=stamp))


def _detections_of(source: Path, batches: Iterable[_Outputs]) -> list[tuple[_Outputs, _Outputs]]:
    """Feeds, and what the source makes of them."""
    reference = OnnxRuntimeBackend(source, providers=["CPUExecutionProvider"])
    return [(feeds, reference(feeds)) for feeds in batches]


def _compare(
    model: onnx.ModelProto,
    output: Path,
    source: Path,
    backend: type[Backend],
    tolerance: Tolerance,
    wanted: Sequence[tuple[_Outputs, _Outputs]],
) -> Difference:
    """The difference of a model from its source; one that departs is kept beside `output` and refused."""
    rejected = output.with_suffix(".rejected.onnx")
    with tempfile.TemporaryDirectory(prefix="maskrcnn-") as folder:
        draft = Path(folder) / output.name
        onnx.save(model, str(draft))
        onnx.checker.check_model(str(draft), full_check=True)
        candidate = backend(draft)
        difference = merge([compare_outputs(outputs, candidate(feeds), tolerance) for feeds, outputs in wanted])
    if not difference.within(tolerance):
        _keep(model, rejected)
        raise UserError(
            f"a graph that departs from {source}: {difference}",
            str(tolerance),
            f"look where with `maskrcnn verify {source} {rejected}`, or leave more layers in single precision",
        )
    return difference


def _keep(model: onnx.ModelProto, path: Path) -> None:
    with atomic_path(path) as draft:
        onnx.save(model, str(draft))

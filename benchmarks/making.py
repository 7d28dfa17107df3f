"""The files of the ResNet-50 workload: exported, cast, quantised and built as the commands do it, or why one is not.

A file that cannot be made costs its own rows alone, which say why. One that was put aside for departing from the ONNX
file is measured all the same: with random weights that is what to expect, and the benchmark says "inexact" of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import numpy as np
from contenders import Absent, Artefacts
from PIL import Image
from session import Progress

from maskrcnn.errors import UserError
from maskrcnn.model.detector import MaskRCNN
from maskrcnn.runtime.backends.tensorrt_library import tensorrt_obstacle

# The second file of an engine; an .xml without its .bin would be half an engine, so this one is moved first.
_BESIDE = {".xml": lambda path: path.with_suffix(".bin"), ".engine": lambda path: path.with_name(f"{path.name}.json")}


@dataclass(frozen=True, kw_only=True)
class Order:
    """What is to be made, and of what."""

    model: MaskRCNN
    checkpoint: Path  # its file; the others will lie beside it
    pool: Sequence[np.ndarray]  # images to take 8-bit scales from
    sizes_hw: Sequence[tuple[int, int]]  # that a TensorRT engine has profiles for
    batches: Sequence[int]  # likewise
    gpu_only: bool = False  # leave out what is made for the CPU

    def file(self, suffix: str) -> Path:
        """One of the files."""
        return self.checkpoint.with_suffix(suffix)


@dataclass(frozen=True)
class Step:
    """How one file is made."""

    text: str  # what is being done
    path: Path
    make: Callable[[], str]  # returns how far the file departs
    backends: tuple[str, ...]  # of its rows
    precision: str
    keeps_rejected: bool = True  # take a file that was put aside for departing


def make_files(order: Order, progress: Progress) -> tuple[Artefacts, list[str]]:
    """Everything that this machine can run, and how far each file departs."""
    made: list[Path] = []
    seconds: dict[Path, float] = {}
    absent: list[Absent] = []
    notes: list[str] = []
    for step in _steps(order, progress):
        progress.say(step.text)
        began = perf_counter()
        told, error = _tried(step)
        if error is None:
            seconds[step.path] = perf_counter() - began
        else:
            progress.say(f"{step.path.name}: {told}")
        if error is None or (step.keeps_rejected and _take_rejected(step.path)):
            made.append(step.path)
            notes.append(told)
        else:
            absent += [Absent(step.path.name, backend, step.precision, error) for backend in step.backends]
    return _artefacts(order.checkpoint, made, absent, seconds), notes


def _tried(step: Step) -> tuple[str, Exception | None]:
    """How far a file departs, or why it was not made; and in that case the error."""
    for left in (step.path, _rejected(step.path)):  # by an earlier run
        left.unlink(missing_ok=True)
    try:
        return _one_line(step.make()), None
    except Exception as error:  # whatever one library raises must not cost the other files
        error = _without_folder(error, step.path.parent)
        return _one_line(error.found if isinstance(error, UserError) else str(error)), error


def _artefacts(checkpoint: Path, made: list[Path], absent: list[Absent], seconds: dict[Path, float]) -> Artefacts:
    found = {suffix: tuple(path for path in made if path.suffix == suffix) for suffix in (".onnx", ".xml", ".engine")}
    return Artefacts(
        checkpoint=checkpoint,
        onnx=found[".onnx"],
        engines=found[".xml"],
        others=found[".engine"],
        absent=tuple(absent),
        complete=False,
        seconds=seconds,
    )


def _steps(order: Order, progress: Progress) -> list[Step]:
    """In the order in which one needs the other."""
    exported, integers = order.file(".onnx"), order.file(".int8.onnx")
    half_xml, integer_xml = order.file(".fp16.xml"), order.file(".int8.xml")
    plain = ("ONNX Runtime",) if order.gpu_only else ("ONNX Runtime", "OpenVINO")
    for_gpu = [
        Step("exporting to ONNX", exported, lambda: _export(order), plain, "fp32"),
        # What is put aside here may be the simulation of the arithmetic, whose latency means nothing.
        Step("casting to FP16", order.file(".fp16.onnx"), lambda: _cast(order), ("ONNX Runtime CUDA",), "fp16", False),
        Step(
            "building the TensorRT engine",
            order.file(".fp16.engine"),
            lambda: _build_tensorrt(order, progress),
            ("TensorRT",),
            "fp16",
        ),
    ]
    for_cpu = [
        Step("quantising", integers, lambda: _quantize(order), ("ONNX Runtime",), "int8"),
        Step(
            "building the OpenVINO engine",
            half_xml,
            lambda: _build_openvino(order, exported, half_xml),
            ("OpenVINO engine",),
            "bf16",
        ),
        Step(
            "building the 8-bit engine",
            integer_xml,
            lambda: _build_openvino(order, integers, integer_xml),
            ("OpenVINO engine",),
            "int8",
        ),
    ]
    return for_gpu if order.gpu_only else for_gpu + for_cpu


def _export(order: Order) -> str:
    from maskrcnn.export.exporter import export_onnx

    difference = export_onnx(order.model, order.file(".onnx"), source=order.checkpoint)
    return f"ONNX file compared with PyTorch: {difference}"


def _cast(order: Order) -> str:
    """Where ONNX Runtime's CUDA provider works; its CPU provider would compute in FP32 and convert to and fro."""
    from maskrcnn.export.variants import write_half

    exported, half = _needed(order.file(".onnx")), order.file(".fp16.onnx")
    if obstacle := cuda_obstacle(exported):
        raise obstacle
    return f"half-precision file compared with the ONNX file: {write_half(exported, half, 'fp16')[1]}"


def cuda_obstacle(onnx: Path) -> UserError | None:
    """Why ONNX Runtime's CUDA provider cannot run an ONNX file here, or None."""
    from maskrcnn.runtime.backends.onnxruntime import OnnxRuntimeBackend
    from maskrcnn.runtime.backends.onnxruntime_providers import Provider, best_provider

    if best_provider() is not Provider.CUDA:  # without trying, of which ONNX Runtime would print why it fails
        came = "no GPU that ONNX Runtime's CUDA provider can use"
        return UserError(came, "an NVIDIA GPU, and onnxruntime-gpu with its libraries", "see `maskrcnn doctor`")
    try:
        OnnxRuntimeBackend(onnx, provider=Provider.CUDA.value)
    except UserError as error:
        return error
    return None


def _build_tensorrt(order: Order, progress: Progress) -> str:
    """As `maskrcnn build-engine --fp16 --target tensorrt` does, one profile for each batch and size."""
    from maskrcnn.api.build_engine import TensorRtChoice, run_build_engine
    from maskrcnn.api.export import Int8Options
    from maskrcnn.runtime.engine_files import engine_metadata

    exported, engine = _needed(order.file(".onnx")), order.file(".fp16.engine")
    if obstacle := tensorrt_obstacle():  # before the graph is made, which nothing would run
        raise obstacle
    batch, size = ",".join(map(str, order.batches)), ",".join(f"{height}x{width}" for height, width in order.sizes_hw)
    run_build_engine(
        progress.console,
        exported,
        precision="fp16",
        int8=Int8Options(),
        target="tensorrt",
        output=engine,
        tensorrt=TensorRtChoice(batch=batch, size=size, given=("--batch", batch, "--size", size)),
    )
    return f"{engine.name} compared with the ONNX file: {engine_metadata(engine).stamp['compared']}"


def _quantize(order: Order) -> str:
    from maskrcnn.export.variants import write_int8

    pictures = order.checkpoint.with_name("calibration")
    pictures.mkdir(exist_ok=True)
    for k, image in enumerate(order.pool):
        Image.fromarray(image).save(pictures / f"{k}.png")
    _, difference = write_int8(_needed(order.file(".onnx")), order.file(".int8.onnx"), pictures)
    return f"8-bit file compared with the ONNX file: {difference}"


def _build_openvino(order: Order, onnx: Path, engine: Path) -> str:
    from maskrcnn.runtime.build.openvino import build_openvino_engine

    _, difference = build_openvino_engine(_needed(onnx), engine, half=True, reference=order.file(".onnx"))
    return f"{engine.name} compared with the ONNX file: {difference}"


def _needed(path: Path) -> Path:
    """A file of an earlier step."""
    if not path.is_file():
        raise UserError(f"no file {path}", "the step before", "see the row of that file")
    return path


def _take_rejected(path: Path) -> bool:
    """Gives a file that was put aside for departing too far its own name; the table will say how far it departs."""
    rejected = _rejected(path)
    if not rejected.is_file():
        return False
    if beside := _BESIDE.get(path.suffix):
        beside(rejected).replace(beside(path))
    rejected.replace(path)
    return True


def _rejected(path: Path) -> Path:
    return path.with_suffix(f".rejected{path.suffix}")


def _without_folder(error: Exception, folder: Path) -> Exception:
    """An error that names the files alone: nobody will find the folder, which is temporary."""
    if not isinstance(error, UserError):
        return error
    return UserError(*(text.replace(f"{folder}/", "") for text in (error.found, error.expected, error.fix)))


def _one_line(text: str) -> str:
    return " ".join(text.split())

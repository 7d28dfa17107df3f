"""The contenders of a benchmark: every model file on every backend, and torchvision's models."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peers import TorchvisionDetector, TorchvisionOnnxDetector, export_legacy, torchvision_from_config

from maskrcnn import runs
from maskrcnn.errors import UserError
from maskrcnn.metadata import sha256_of
from maskrcnn.model.detector import MaskRCNN
from maskrcnn.runtime.backends.onnxruntime_providers import Provider, best_provider
from maskrcnn.runtime.backends.tensorrt_library import tensorrt_obstacle
from maskrcnn.runtime.detector import Detector
from maskrcnn.training.trainer import choose_precision
from maskrcnn.weights.checkpoint import SUFFIX, metadata_of

_LEGACY_EXPORT = "torchvision legacy export"


@dataclass(frozen=True, kw_only=True)
class Contender:
    """A model on a backend: one row of the table per size and batch size."""

    model: str  # file name, or the name of torchvision's model
    backend: str
    precision: str  # as known before opening; see `precision_of`
    open: Callable[[], Any]  # returns a Detector, or a peer with its methods; raises if it cannot run
    is_reference: bool = False  # the others' detections are compared with it
    peer: str = ""  # "eager" or "onnx": the denominator of the ratios
    largest_batch: int | None = None
    file: Path | None = None
    build_s: float | None = None  # time to make the file
    spec: dict[str, Any] | None = None  # arguments of `resources.detector_peak`

    def file_mb(self) -> float | None:
        """Size of the file, including OpenVINO's separate weights."""
        if self.file is None or not self.file.is_file():
            return None
        weights = self.file.with_suffix(".bin")
        beside = weights.stat().st_size if self.file.suffix == ".xml" and weights.is_file() else 0
        return (self.file.stat().st_size + beside) / 1e6

    def fingerprint(self) -> list[Any]:
        """What the results depend on, as far as files show it."""
        stat = self.file.stat() if self.file is not None and self.file.is_file() else None
        return [self.model, self.backend, self.precision, [stat.st_size, stat.st_mtime_ns] if stat else None]


@dataclass(frozen=True, kw_only=True)
class Artefacts:
    """The files of one model."""

    checkpoint: Path | None = None
    onnx: tuple[Path, ...] = ()
    engines: tuple[Path, ...] = ()  # OpenVINO's .xml
    others: tuple[Path, ...] = ()  # TensorRT engines, and files of unknown kinds
    absent: tuple[Contender, ...] = ()  # files that could not be made, see `unavailable`
    complete: bool = True  # add rows for files a run usually has
    build_s: Mapping[Path, float] = field(default_factory=dict)  # time to make each file


def newest_artefacts() -> Artefacts:
    """Find the newest run's best checkpoint and the files made from it.

    Raises:
        UserError: if there is no run.
    """
    checkpoint = runs.newest_checkpoint()
    folder = checkpoint.parent
    return Artefacts(
        checkpoint=checkpoint,
        onnx=tuple(sorted(_kept(folder, "*.onnx"), key=_is_variant)),
        engines=_kept(folder, "*.xml"),
        others=_kept(folder, "*.engine"),
    )


def _kept(folder: Path, pattern: str) -> tuple[Path, ...]:
    """Files of a run, without rejected ones and graphs for TensorRT's parser."""
    return tuple(path for path in sorted(folder.glob(pattern)) if not {".rejected", ".tensorrt"} & set(path.suffixes))


def given_artefacts(paths: Sequence[Path]) -> Artefacts:
    """Sort the files of the command line.

    Raises:
        UserError: if a file does not exist, or for more than one checkpoint.
    """
    for path in paths:
        if not path.is_file():
            raise UserError(f"no file {path}", "a checkpoint, an ONNX file or an engine", "check the path")
    checkpoints = [path for path in paths if path.suffix == SUFFIX]
    if len(checkpoints) > 1:
        raise UserError(f"{len(checkpoints)} checkpoints", "at most one: the source of the other files", "pass one")
    known = (SUFFIX, ".onnx", ".xml")
    return Artefacts(
        checkpoint=checkpoints[0] if checkpoints else None,
        onnx=tuple(path for path in paths if path.suffix == ".onnx"),
        engines=tuple(path for path in paths if path.suffix == ".xml"),
        others=tuple(path for path in paths if path.suffix not in known),
        complete=False,
    )


def our_contenders(artefacts: Artefacts, *, compiled: bool = False) -> list[Contender]:
    """Return a contender for every file on every backend that can run it, the reference first.

    Args:
        artefacts: the files.
        compiled: also run the checkpoint with `torch.compile`, which takes minutes.
    """
    found = []
    if artefacts.checkpoint:
        found += _of_checkpoint(artefacts.checkpoint, compiled=compiled)
    for path in artefacts.onnx:
        found += _of_onnx(path, artefacts.checkpoint)
    found += [_of_engine(path, artefacts.onnx) for path in artefacts.engines]
    for path in artefacts.others:
        backend = "TensorRT" if path.suffix == ".engine" else path.suffix.removeprefix(".")
        found.append(_of_file(path, backend, None, ""))
    found += artefacts.absent
    if artefacts.complete:
        found += _missing(artefacts)
    if found and not artefacts.checkpoint:
        found[0] = replace(found[0], is_reference=True)
    return [replace(each, build_s=artefacts.build_s.get(each.file)) for each in found]


def runs_on_gpu(contender: Contender) -> bool:
    """Whether the contender runs on a GPU if there is one: not in OpenVINO, nor in an ONNX Runtime without CUDA."""
    if contender.backend == "ONNX Runtime":
        return best_provider() is Provider.CUDA
    return "OpenVINO" not in contender.backend


def _of_checkpoint(path: Path, *, compiled: bool) -> list[Contender]:
    device = "CUDA" if torch.cuda.is_available() else "CPU"
    half = "fp16" if device == "CUDA" else "bf16"

    def open_half() -> Detector:
        if device == "CPU" and choose_precision("auto", torch.device("cpu")) != "bf16":
            raise UserError("this CPU has no bfloat16 instructions", "AVX512-BF16 or AMX", "use a CPU that has them")
        return Detector.load(path, precision=half)

    def contender(mode: str, options: dict[str, Any], **changes: Any) -> Contender:
        values = {
            "model": path.name,
            "backend": f"PyTorch {device}{mode}",
            "precision": options.get("precision", "fp32"),
            "open": lambda: Detector.load(path, **options),
            "file": path,
            "spec": {"path": str(path), "options": options},
        }
        return Contender(**values | changes)

    found = [contender("", {}, is_reference=True), contender("", {"precision": half}, open=open_half)]
    if device == "CUDA":
        found.append(contender(", CUDA graphs", {"precision": half, "graphs": True}))
    if compiled:
        found += [contender(", compiled", {"precision": each, "compile": True}) for each in ("fp32", half)]
    if device == "CPU":
        no_gpu = UserError("no CUDA GPU that PyTorch can use", "an NVIDIA GPU", "see `maskrcnn doctor`")
        found.append(unavailable(path.name, "PyTorch CUDA", "fp16", no_gpu))
    return found


def _of_file(
    path: Path,
    backend: str,
    key: str | None,
    precision: str,
    *,
    source: Path | None = None,
    options: dict[str, str] | None = None,
    command: str = "maskrcnn export --onnx",
) -> Contender:
    """A file on a backend, by its key in `BACKENDS`; None: the file's default backend."""

    def open_file() -> Detector:
        detector = Detector.load(path, key, **(options or {}))
        _check_source(path, detector, source, command)
        return detector

    spec = {"path": str(path), "backend": key, "options": options or {}}
    return Contender(model=path.name, backend=backend, precision=precision, open=open_file, file=path, spec=spec)


def _of_onnx(path: Path, source: Path | None) -> list[Contender]:
    """An exported file on the runtimes for its precision, which is part of its name, such as model.fp16.onnx."""
    named = [suffix.removeprefix(".") for suffix in path.suffixes[:-1]]
    precision = next((name for name in named if name in ("fp16", "bf16", "int8")), "fp32")
    found = []
    if precision != "bf16":  # ONNX Runtime has no bfloat16 kernels
        found.append(_of_file(path, "ONNX Runtime", "onnxruntime", precision, source=source))
    if precision in ("fp32", "bf16"):
        options = {"precision": "fp32"} if precision == "fp32" else {}
        found.append(_of_file(path, "OpenVINO", "openvino", precision, source=source, options=options))
    return found


def _is_variant(path: Path) -> bool:
    """Whether an ONNX file was made from another one, such as model.int8.onnx from model.onnx."""
    return len(path.suffixes) > 1


def _of_engine(path: Path, onnx: Sequence[Path]) -> Contender:
    """An engine, built from the only exported file if there is one; its metadata names precision and source."""
    exported = [each for each in onnx if not _is_variant(each)]
    source = exported[0] if len(exported) == 1 else None
    return _of_file(path, "OpenVINO engine", None, "", source=source, command="maskrcnn build-engine --fp16")


def precision_of(detector: Any) -> str:
    """Precision of an opened detector, with the type of its weights if it differs."""
    backend = getattr(detector, "backend", None)
    if backend is None:
        return "fp32"  # a peer
    weights = backend.metadata.stamp.get("weights", backend.precision)
    is_same = backend.precision.startswith(weights)
    return backend.precision if is_same else f"{backend.precision}, {weights} weights"


def backend_of(detector: Any, named: str) -> str:
    """Backend name of an opened detector; for ONNX Runtime with the provider, unless it is the CPU."""
    name = getattr(getattr(detector, "backend", None), "name", named)
    return name if name.startswith(named) else named


def _check_source(path: Path, detector: Detector, source: Path | None, command: str) -> None:
    """Refuse a file made from other weights: its results do not belong in the table."""
    made_from = detector.metadata.source_sha256
    if source is not None and made_from and made_from != sha256_of(source):
        raise UserError(
            f"{path.name} was not made from the present {source.name}",
            "files of one model",
            f"run `{command}`",
        )


def _missing(artefacts: Artefacts) -> list[Contender]:
    """Rows for files that have not been made."""
    found = []
    if not artefacts.onnx:
        error = UserError("no ONNX file in the run", "an export", "run `maskrcnn export --onnx`")
        found += [unavailable("model.onnx", backend, "fp32", error) for backend in ("ONNX Runtime", "OpenVINO")]
    if not artefacts.engines:
        error = UserError("no engine in the run", "an engine", "run `maskrcnn build-engine --fp16`")
        found.append(unavailable("model.fp16.xml", "OpenVINO engine", "bf16", error))
    if not artefacts.others:
        command = "run `maskrcnn build-engine --fp16 --target tensorrt`"
        error = tensorrt_obstacle() or UserError("no TensorRT engine in the run", "an engine", command)
        found.append(unavailable("model.engine", "TensorRT", "fp16", error))
    return found


def unavailable(model: str, backend: str, precision: str, error: Exception) -> Contender:
    """A contender that cannot be opened: its row shows the error."""

    def refuse() -> Any:
        raise error

    return Contender(model=model, backend=backend, precision=precision, open=refuse)


def peer_contenders(
    model: MaskRCNN, folder: Path, example: np.ndarray, checkpoint: Path | None = None, *, compiled: bool = False
) -> list[Contender]:
    """Return torchvision's model with our weights: eager, exported, and optionally with `torch.compile`.

    Args:
        model: our model.
        folder: folder for the exported file.
        example: image for the tracing exporter.
        checkpoint: file of `model`; without it memory cannot be measured.
        compiled: add the model with `torch.compile`.
    """
    metadata = metadata_of(model.config)

    def peer() -> Any:
        theirs = torchvision_from_config(model.config)
        theirs.load_state_dict(model.state_dict())
        return theirs

    def exported() -> TorchvisionOnnxDetector:
        path = folder / "torchvision.onnx"
        export_legacy(peer(), example, path)
        return TorchvisionOnnxDetector(path, metadata)

    def spec(name: str) -> dict[str, Any] | None:
        return {"path": str(checkpoint), "peer": name} if checkpoint else None

    device = "CUDA" if torch.cuda.is_available() else "CPU"
    with_compile = Contender(
        model="torchvision",
        backend=f"PyTorch {device}, compiled",
        precision="fp32",
        open=lambda: TorchvisionDetector(torch.compile(peer()), metadata),
        peer="compiled",
    )
    return [
        *([with_compile] if compiled else []),
        Contender(
            model="torchvision",
            backend=f"PyTorch {device}",
            precision="fp32",
            open=lambda: TorchvisionDetector(peer(), metadata),
            peer="eager",
            spec=spec("eager"),
        ),
        Contender(
            model=_LEGACY_EXPORT,
            backend="ONNX Runtime",
            precision="fp32",
            open=exported,
            peer="onnx",
            largest_batch=1,
            file=folder / "torchvision.onnx",
            spec=spec("onnx"),
        ),
    ]

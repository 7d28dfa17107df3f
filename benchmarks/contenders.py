"""What a benchmark compares: every model file on every backend, and torchvision, or why one cannot run."""

from __future__ import annotations

import json
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
from maskrcnn.runtime.backends.tensorrt_library import tensorrt_obstacle
from maskrcnn.runtime.detector import Detector
from maskrcnn.training.trainer import choose_precision
from maskrcnn.weights.checkpoint import SUFFIX, metadata_of

_LEGACY_EXPORT = "torchvision legacy export"


@dataclass(frozen=True, kw_only=True)
class Contender:
    """One row of the table for each batch size."""

    model: str  # the file's name, or what torchvision's is called
    backend: str
    precision: str  # where it cannot be opened; what was opened tells its own
    open: Callable[[], Any]  # a Detector, or a peer with the same methods; raises where it cannot run
    is_reference: bool = False  # every other one is compared with this
    peer: str = ""  # "eager" or "onnx": what the ratios refer to
    largest_batch: int | None = None
    file: Path | None = None  # that it runs
    seconds: float | None = None  # that making the file took
    spec: dict[str, Any] | None = None  # how benchmarks/memory.py opens it

    def file_mb(self) -> float | None:
        """Size of the file, with the weights that lie beside it."""
        if self.file is None or not self.file.is_file():
            return None
        weights = self.file.with_suffix(".bin")
        beside = weights.stat().st_size if self.file.suffix == ".xml" and weights.is_file() else 0
        return (self.file.stat().st_size + beside) / 1e6

    def build_s(self) -> float | None:
        """What making the file took, where that is known."""
        return self.seconds

    def fingerprint(self) -> list[Any]:
        """What its results depend on, as far as files tell."""
        stat = self.file.stat() if self.file is not None and self.file.is_file() else None
        return [self.model, self.backend, self.precision, [stat.st_size, stat.st_mtime_ns] if stat else None]


@dataclass(frozen=True)
class Absent:
    """A row for a file that could not be made."""

    model: str  # the file's name
    backend: str
    precision: str
    error: Exception


@dataclass(frozen=True, kw_only=True)
class Artefacts:
    """The files of one model."""

    checkpoint: Path | None = None
    onnx: tuple[Path, ...] = ()
    engines: tuple[Path, ...] = ()  # OpenVINO's .xml
    others: tuple[Path, ...] = ()  # TensorRT's engines, and files that no backend of ours runs
    absent: tuple[Absent, ...] = ()
    complete: bool = True  # whether to say what else is missing
    seconds: Mapping[Path, float] = field(default_factory=dict)  # that making a file took


def newest_artefacts() -> Artefacts:
    """The newest run's best checkpoint and what was made of it.

    Raises:
        UserError: where there is no run.
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
    """Files of a run that are there to be run: none that was put aside, and no graph for TensorRT's parser."""
    return tuple(path for path in sorted(folder.glob(pattern)) if not {".rejected", ".tensorrt"} & set(path.suffixes))


def given_artefacts(paths: Sequence[Path]) -> Artefacts:
    """The files named on the command line.

    Raises:
        UserError: for a file that does not exist, and for two checkpoints.
    """
    for path in paths:
        if not path.is_file():
            raise UserError(f"no file {path}", "a checkpoint, an ONNX file or an engine", "check the path")
    checkpoints = [path for path in paths if path.suffix == SUFFIX]
    if len(checkpoints) > 1:
        raise UserError(
            f"{len(checkpoints)} checkpoints", "at most one, which the other files were made from", "name one"
        )
    known = (SUFFIX, ".onnx", ".xml")
    return Artefacts(
        checkpoint=checkpoints[0] if checkpoints else None,
        onnx=tuple(path for path in paths if path.suffix == ".onnx"),
        engines=tuple(path for path in paths if path.suffix == ".xml"),
        others=tuple(path for path in paths if path.suffix not in known),
        complete=False,
    )


def our_contenders(artefacts: Artefacts, *, compiled: bool = False) -> list[Contender]:
    """Every file on every backend that can run it; the first that is no failure is the reference.

    Args:
        artefacts: the files.
        compiled: the checkpoint by `torch.compile` too, which takes minutes.
    """
    found = []
    if artefacts.checkpoint:
        found += _of_checkpoint(artefacts.checkpoint, compiled=compiled)
    for path in artefacts.onnx:
        found += _of_onnx(path, artefacts.checkpoint)
    found += [_of_engine(path, artefacts.onnx) for path in artefacts.engines]
    found += [_of_other(path) for path in artefacts.others]
    found += [_absent(each.model, each.backend, each.precision, each.error) for each in artefacts.absent]
    if artefacts.complete:
        found += _missing(artefacts)
    if found and not artefacts.checkpoint:
        found[0] = replace(found[0], is_reference=True)
    return [replace(each, seconds=artefacts.seconds.get(each.file)) for each in found]


def on_gpu(contenders: Sequence[Contender]) -> list[Contender]:
    """Those that a GPU may run: all but OpenVINO's."""
    return [each for each in contenders if "OpenVINO" not in each.backend]


def _of_other(path: Path) -> Contender:
    """A TensorRT engine, or a file that no backend runs."""
    is_engine = path.suffix == ".engine"
    return _of_file(path, "TensorRT" if is_engine else path.suffix.removeprefix("."), None, "")


def _of_checkpoint(path: Path, *, compiled: bool) -> list[Contender]:
    device = "CUDA" if torch.cuda.is_available() else "CPU"
    half = "fp16" if device == "CUDA" else "bf16"

    def open_half() -> Detector:
        if device == "CPU" and choose_precision("auto", torch.device("cpu")) != "bf16":
            raise UserError("this CPU has no bfloat16 instructions", "AVX512-BF16 or AMX", "use a CPU that has them")
        return Detector.load(path, precision=half)

    found = [
        Contender(
            model=path.name,
            backend=f"PyTorch {device}",
            precision="fp32",
            open=lambda: Detector.load(path),
            is_reference=True,
            file=path,
            spec={"path": str(path)},
        ),
        Contender(
            model=path.name,
            backend=f"PyTorch {device}",
            precision=half,
            open=open_half,
            file=path,
            spec={"path": str(path), "options": {"precision": half}},
        ),
    ]
    ways = [("CUDA graphs", {"precision": half, "graphs": True})] if device == "CUDA" else []
    ways += [("compiled", {"precision": precision, "compile": True}) for precision in ("fp32", half) if compiled]
    for way, options in ways:
        found.append(
            Contender(
                model=path.name,
                backend=f"PyTorch {device}, {way}",
                precision=options["precision"],
                open=lambda options=options: Detector.load(path, **options),
                file=path,
                spec={"path": str(path), "options": options},
            )
        )
    if device == "CPU":
        no_gpu = UserError("no CUDA GPU that PyTorch can use", "an NVIDIA GPU", "see `maskrcnn doctor`")
        found.append(_absent(path.name, "PyTorch CUDA", "fp16", no_gpu))
    return found


def _of_file(
    path: Path,
    backend: str,
    key: str | None,
    precision: str,
    *,
    source: Path | None = None,
    options: dict[str, str] | None = None,
) -> Contender:
    def open_file() -> Detector:
        detector = Detector.load(path, key, **(options or {}))
        _check_source(path, detector, source, "maskrcnn export --onnx")
        return detector

    spec = {"path": str(path), "backend": key, "options": options or {}}
    return Contender(model=path.name, backend=backend, precision=precision, open=open_file, file=path, spec=spec)


def _of_onnx(path: Path, source: Path | None) -> list[Contender]:
    """An exported file on the runtimes that take its precision, which its name tells, as model.fp16.onnx does."""
    named = [suffix.removeprefix(".") for suffix in path.suffixes[:-1]]
    precision = next((name for name in named if name in ("fp16", "bf16", "int8")), "fp32")
    found = []
    if precision != "bf16":  # ONNX Runtime has no kernels for it
        found.append(_of_file(path, "ONNX Runtime", "onnxruntime", precision, source=source))
    if precision in ("fp32", "bf16"):
        options = {"precision": "fp32"} if precision == "fp32" else {}
        found.append(_of_file(path, "OpenVINO", "openvino", precision, source=source, options=options))
    return found


def _is_variant(path: Path) -> bool:
    """Whether an ONNX file was made from another one, as model.int8.onnx from model.onnx."""
    return len(path.suffixes) > 1


def _of_engine(path: Path, onnx: Sequence[Path]) -> Contender:
    """An engine; its metadata tells the precision, and the ONNX file that it was built from."""
    exported = [each for each in onnx if not _is_variant(each)]
    source = exported[0] if len(exported) == 1 else None

    def open_engine() -> Detector:
        detector = Detector.load(path)
        _check_source(path, detector, source, "maskrcnn build-engine --fp16")
        return detector

    spec = {"path": str(path)}
    return Contender(model=path.name, backend="OpenVINO engine", precision="", open=open_engine, file=path, spec=spec)


def precision_of(detector: Any) -> str:
    """The arithmetic of an opened detector, and the weights' type where that is another."""
    backend = getattr(detector, "backend", None)
    if backend is None:
        return "fp32"  # a peer
    weights = backend.metadata.stamp.get("weights", backend.precision)
    is_told = backend.precision.startswith(weights)
    return backend.precision if is_told else f"{backend.precision}, {weights} weights"


def backend_of(detector: Any, named: str) -> str:
    """What runs an opened detector: as it was named, and of ONNX Runtime the provider too, where it is not the CPU."""
    name = getattr(getattr(detector, "backend", None), "name", named)
    return name if name.startswith(named) else named


def _check_source(path: Path, detector: Detector, source: Path | None, command: str) -> None:
    """Refuses a file made from other weights: its numbers would not belong in the table."""
    made_from = detector.metadata.source_sha256
    if source is not None and made_from and made_from != sha256_of(source):
        raise UserError(
            f"{path.name} was not made from the present {source.name}",
            "files of one model",
            f"run `{command}`",
        )


def _missing(artefacts: Artefacts) -> list[Contender]:
    """Rows for what would be in the table if it had been made."""
    found = []
    if not artefacts.onnx:
        error = UserError("no ONNX file in the run", "an export", "run `maskrcnn export --onnx`")
        found += [_absent("model.onnx", backend, "fp32", error) for backend in ("ONNX Runtime", "OpenVINO")]
    if not artefacts.engines:
        error = UserError("no engine in the run", "an engine", "run `maskrcnn build-engine --fp16`")
        found.append(_absent("model.fp16.xml", "OpenVINO engine", "bf16", error))
    if not artefacts.others:
        command = "run `maskrcnn build-engine --fp16 --target tensorrt`"
        error = tensorrt_obstacle() or UserError("no TensorRT engine in the run", "an engine", command)
        found.append(_absent("model.engine", "TensorRT", "fp16", error))
    return found


def _absent(model: str, backend: str, precision: str, error: Exception) -> Contender:
    def refuse() -> Any:
        raise error

    return Contender(model=model, backend=backend, precision=precision, open=refuse)


def peer_contenders(
    model: MaskRCNN, folder: Path, example: np.ndarray, checkpoint: Path | None = None, *, compiled: bool = False
) -> list[Contender]:
    """torchvision's model with the weights of ours, eager and exported, and by `torch.compile` where asked for.

    Args:
        model: ours.
        folder: where the export may be written.
        example: image that the exporter traces.
        checkpoint: the file of `model`, for benchmarks/memory.py.
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
    by_compiler = Contender(
        model="torchvision",
        backend=f"PyTorch {device}, compiled",
        precision="fp32",
        open=lambda: TorchvisionDetector(torch.compile(peer()), metadata),
        peer="compiled",
    )
    return [
        *([by_compiler] if compiled else []),
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


def validation_split(checkpoint: Path | None) -> tuple[Path, str] | None:
    """The dataset and the split that a run was validated on, as its configuration says."""
    path = checkpoint.with_name(runs.CONFIG) if checkpoint else None
    if path is None or not path.is_file():
        return None
    config = json.loads(path.read_text(encoding="utf-8"))
    return Path(config["data"]), config["val_split"]

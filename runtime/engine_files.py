"""Engine files on a disk, and whether this machine runs each: for `maskrcnn doctor` and `maskrcnn inspect`.

Nothing is loaded: an engine's metadata says what it was built for.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

from maskrcnn.errors import UserError
from maskrcnn.metadata import KEY, ModelMetadata, not_ours
from maskrcnn.runtime.backends.tensorrt_engine import metadata_path
from maskrcnn.runtime.backends.tensorrt_library import Gpu, check_stamp

# What an OpenVINO engine's XML says of itself, read without OpenVINO.


def metadata_of_xml(path: Path) -> ModelMetadata:
    """The metadata of an engine, on any machine: whether it runs here is not asked.

    Raises:
        UserError: for a file that is no XML, or not ours.
    """
    try:
        entry = ElementTree.parse(path).getroot().find(f"rt_info/{KEY}")
    except ElementTree.ParseError as error:
        raise not_ours(path, f"no XML ({error})") from error
    if entry is None:
        raise not_ours(path, "an OpenVINO model without maskrcnn's metadata")
    return ModelMetadata.from_json(entry.get("value", ""), path)


_REJECTED = ".rejected"  # in the name of an engine that departed from its ONNX file when it was built


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What engines depend on."""

    gpus: tuple[Gpu, ...] = ()
    tensorrt: str | None = None  # version
    openvino: str | None = None  # version
    cpu: str = ""  # as OpenVINO names it
    has_bfloat16: bool = False  # whether OpenVINO executes in it here


@dataclass(frozen=True)
class Fit:
    """What an engine is, and whether it runs."""

    path: Path
    described: str  # in a few words
    error: UserError | None = None  # why it does not run here, and what to do
    remark: str = ""  # what to know although it does


def find_engines(places: Iterable[Path]) -> list[Path]:
    """Engines among files and below folders: TensorRT's plans and OpenVINO's models that are ours.

    Raises:
        UserError: for a place that does not exist, or a file that is no engine.
    """
    found: list[Path] = []
    for place in places:
        if place.is_dir():
            found += _below(place)
        elif not place.exists():
            raise UserError(f"no file or folder {place}", "engines, or folders with engines", "check the path")
        elif place.suffix not in (".engine", ".xml"):
            raise UserError(f"{place}: no engine", "a file .engine or .xml", "look into others with `maskrcnn inspect`")
        else:
            found.append(place)
    return list(dict.fromkeys(found))


def engine_metadata(path: Path) -> ModelMetadata:
    """What an engine's own metadata says: of an OpenVINO engine inside its `.xml`, of a TensorRT engine beside it.

    Raises:
        UserError: where there is none, or it cannot be read.
    """
    if path.suffix == ".xml":
        return metadata_of_xml(path)
    beside = metadata_path(path)
    if not beside.is_file():
        came, expected = f"no {beside.name} beside {path}", "both files of a TensorRT engine"
        raise UserError(came, expected, "copy both, or build it again: `maskrcnn build-engine --fp16`")
    return ModelMetadata.from_json(beside.read_text(encoding="utf-8"), beside)


def fit(path: Path, machine: Machine) -> Fit:
    """Whether a machine runs an engine, by the engine's stamp."""
    try:
        metadata = engine_metadata(path)
    except UserError as error:
        return Fit(path, "cannot be used", error)
    if _REJECTED in path.suffixes:
        came = f"rejected when it was built ({metadata.stamp.get('compared', 'it departed from its ONNX file')})"
        return Fit(path, metadata.precision, UserError(came, "an engine that agrees", "see `maskrcnn verify`"))
    if path.suffix == ".xml":
        return _fit_openvino(path, metadata, machine)
    return Fit(path, f"TensorRT {metadata.precision}", _tensorrt_obstacle(metadata, machine))


def _below(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.suffix == ".engine" or _is_our_xml(path))


def _is_our_xml(path: Path) -> bool:
    if path.suffix != ".xml" or not path.is_file():
        return False
    with open(path, "rb") as file:  # rt_info stands at the end
        file.seek(max(0, path.stat().st_size - (1 << 16)))
        return f"<{KEY} ".encode() in file.read()


def _tensorrt_obstacle(metadata: ModelMetadata, machine: Machine) -> UserError | None:
    """Why none of the GPUs runs it."""
    if machine.tensorrt is None:
        version = metadata.stamp.get("tensorrt", "unknown")
        came, expected = f"an engine for TensorRT {version}, and no TensorRT here", f"TensorRT {version}"
        return UserError(came, expected, f"`pip install tensorrt=={version}`, or run the ONNX file it was built from")
    if not machine.gpus:
        return UserError("an engine for an NVIDIA GPU, and none here", "a GPU", "run the ONNX file it was built from")
    trt = SimpleNamespace(__version__=machine.tensorrt)
    errors = [
        check_stamp(metadata, trt=trt, gpu=gpu.name, compute_capability=gpu.compute_capability) for gpu in machine.gpus
    ]
    return None if None in errors else errors[0]


def _fit_openvino(path: Path, metadata: ModelMetadata, machine: Machine) -> Fit:
    stamp = metadata.stamp
    described = f"OpenVINO {metadata.precision}, executed in {stamp.get('execution', 'fp32')}"
    rebuild = "rebuild it here: `maskrcnn build-engine --fp16 --target openvino`"
    if not path.with_suffix(".bin").is_file():
        came = f"no {path.with_suffix('.bin').name} beside it"
        return Fit(path, described, UserError(came, "both files of an OpenVINO engine", "copy both"))
    if machine.openvino is None:
        return Fit(path, described, UserError("no OpenVINO here", "OpenVINO", "`pip install 'openvino>=2025.3'`"))
    if stamp.get("execution") == "bf16" and not machine.has_bfloat16:
        came = "built for bfloat16, which this CPU does not have"
        return Fit(path, described, UserError(came, "a CPU with AVX512-BF16 or AMX", rebuild))
    built_on = stamp.get("cpu", "")
    remark = f"built and compared on {built_on}" if built_on and built_on != machine.cpu else ""
    return Fit(path, described, remark=remark)

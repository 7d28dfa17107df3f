"""Model and engine files: the only reader of their metadata.

Metadata is read from the file itself, without the library that runs it: an ONNX file's properties, an OpenVINO model's
`rt_info`, and the `.json` file next to a TensorRT engine.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING
from xml.etree import ElementTree

from maskrcnn.errors import UserError, missing_library
from maskrcnn.metadata import KEY, ModelMetadata, check_complete, not_ours
from maskrcnn.plugins import contract

if TYPE_CHECKING:
    import onnx

STAGE_PREFIX = "stage."  # prefix of outputs added by `staged_graph`; the tensor itself keeps the stage's name
_RT_INFO_BYTES = 1 << 16  # the end of an OpenVINO model's XML, where `rt_info` is


def metadata_path(engine: Path) -> Path:
    """Returns the path of a TensorRT engine's metadata: `model.engine.json` for `model.engine`."""
    return engine.with_name(f"{engine.name}.json")


def read_metadata(path: Path) -> ModelMetadata:
    """Reads the metadata of an ONNX file, an OpenVINO engine (`.xml`) or a TensorRT engine (`.engine`).

    Works on any machine; does not check whether the engine runs there.

    Raises:
        UserError: if a file is missing, cannot be read or was not written by maskrcnn.
    """
    if path.suffix == ".onnx":
        return read_model(path)[1]
    if path.suffix == ".xml":
        try:
            root = ElementTree.parse(path).getroot()
        except ElementTree.ParseError as error:
            raise not_ours(path, f"no XML ({error})") from error
        entry = root.find(f"rt_info/{KEY}")
        metadata = parse_metadata(None if entry is None else entry.get("value", ""), path, "an OpenVINO model")
        if path.with_suffix(".bin").is_file():
            constants = [data.attrib for data in root.iterfind(".//layer[@type='Const']/data")]
            ends = [int(data.get("offset", 0)) + int(data["size"]) for data in constants]
            check_complete(path.with_suffix(".bin"), max(ends, default=0))
        return metadata
    beside = metadata_path(path)
    if not beside.is_file():
        raise UserError(
            f"no {beside.name} beside {path}",
            "both files of a TensorRT engine",
            "copy both, or build it again: `maskrcnn build-engine --fp16`",
        )
    return ModelMetadata.from_json(beside.read_bytes(), beside)


def parse_metadata(text: str | None, path: Path, kind: str) -> ModelMetadata:
    """Parses the metadata found in a file.

    Args:
        text: JSON, or None if the file has no such entry.
        path: the file, for errors.
        kind: description of the file, for errors: "an ONNX file".

    Raises:
        UserError: if there is no metadata, or it cannot be read.
    """
    if text is None:
        raise not_ours(path, f"{kind} without maskrcnn's metadata")
    return ModelMetadata.from_json(text, path)


def read_engine(path: Path) -> tuple[ModelMetadata, bytes]:
    """Reads both files of a TensorRT engine in order to run it.

    Returns:
        The metadata and the plan.

    Raises:
        UserError: if a file is missing, the plan has no weights, or the metadata belongs to another plan.
    """
    beside = metadata_path(path)
    if missing := [each.name for each in (path, beside) if not each.is_file()]:
        raise UserError(
            f"no file {' and '.join(missing)} in {path.parent}",
            f"both files of a TensorRT engine, {path.name} and {beside.name}",
            "check the path, or build it: `maskrcnn build-engine --fp16 --target tensorrt`",
        )
    metadata, plan = ModelMetadata.from_json(beside.read_bytes(), path), path.read_bytes()
    if metadata.stamp.get("refit") == "stripped":
        raise UserError(
            f"{path}: an engine without its weights",
            "an engine with weights",
            f"add them: `maskrcnn refit-engine {path.name} MODEL.onnx`",
        )
    sha256 = hashlib.sha256(plan).hexdigest()
    if metadata.stamp.get("plan_sha256", sha256) != sha256:
        raise not_ours(path, f"not the plan that {beside.name} was written for")
    return metadata, plan


def find_engines(places: Iterable[Path]) -> list[Path]:
    """Finds engines among files and below folders: TensorRT's plans, and OpenVINO models written by maskrcnn.

    Raises:
        UserError: if a place does not exist, or a file is not an engine.
    """
    found: list[Path] = []
    for place in places:
        if place.is_dir():
            found += sorted(path for path in place.rglob("*") if path.suffix == ".engine" or _is_our_xml(path))
        elif not place.exists():
            raise UserError(f"no file or folder {place}", "engines, or folders with engines", "check the path")
        elif place.suffix not in (".engine", ".xml"):
            raise UserError(
                f"{place}: not an engine", "an .engine or .xml file", "inspect other files with `maskrcnn inspect`"
            )
        else:
            found.append(place)
    return list(dict.fromkeys(found))


def _is_our_xml(path: Path) -> bool:
    if path.suffix != ".xml" or not path.is_file():
        return False
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - _RT_INFO_BYTES))
        return f"<{KEY} ".encode() in file.read()


# ONNX files


def read_model(path: Path) -> tuple[onnx.ModelProto, ModelMetadata]:
    """Reads an exported ONNX file.

    Returns:
        The model and its metadata.

    Raises:
        UserError: if the file is missing, was not written by maskrcnn, or has another version of the custom ops.
    """
    try:
        import onnx
    except ImportError as error:
        raise missing_library("onnx", f"read {path}", "pip install onnx") from error
    if not path.is_file():
        raise UserError(f"no file {path}", "an ONNX file", "check the path, or run `maskrcnn export --onnx`")
    try:
        model = onnx.load(path)
    except Exception as error:  # protobuf's decode error has no stable base class
        raise not_ours(path, f"not an ONNX file ({error})") from error
    metadata = parse_metadata({prop.key: prop.value for prop in model.metadata_props}.get(KEY), path, "an ONNX file")
    versions = {entry.version for entry in model.opset_import if entry.domain == contract.DOMAIN}
    if not versions <= {contract.VERSION}:
        raise UserError(
            f"{path}: {contract.DOMAIN} operators of version {', '.join(map(str, versions))}",
            f"version {contract.VERSION}",
            "export the model again with this version of maskrcnn",
        )
    return model, metadata


def check_portable(model: onnx.ModelProto, path: Path) -> None:
    """Raises unless the custom ops have function bodies; the copy of a model for TensorRT has none.

    Raises:
        UserError: lists the operators without a body.
    """
    bodies = {(function.domain, function.name) for function in model.functions}
    bare = {n.op_type for n in model.graph.node if n.domain == contract.DOMAIN and (n.domain, n.op_type) not in bodies}
    if bare:
        raise UserError(
            f"{path}: {', '.join(sorted(bare))} without bodies in standard operators, which only TensorRT can run",
            "a file of `maskrcnn export --onnx` without --tensorrt",
            "pass the file that this one was made from",
        )


def staged_graph(graph: bytes, names: Sequence[str]) -> tuple[bytes, dict[str, str]]:
    """Adds intermediate tensors to a graph's outputs, in float32.

    Args:
        graph: content of an ONNX file with tensor types and shapes, as written by `export.tensorrt.tensorrt_flavour`.
        names: tensor names, see `maskrcnn.stages`; names that the graph lacks are ignored.

    Returns:
        The file, and the tensor of each output, including the original outputs.
    """
    import onnx

    model = onnx.load_from_string(graph)
    float32 = onnx.TensorProto.FLOAT
    outputs = {value.name for value in model.graph.output}
    known = {value.name: value for value in model.graph.value_info}
    shown = {name: name for name in names if name in outputs}
    for name in names:
        if name in outputs or name not in known:
            continue
        output = f"{STAGE_PREFIX}{name}"
        shown[output] = name
        model.graph.node.append(onnx.helper.make_node("Cast", [name], [output], name=output, to=float32))
        shape = [dim.dim_value or dim.dim_param or None for dim in known[name].type.tensor_type.shape.dim]
        model.graph.output.append(onnx.helper.make_tensor_value_info(output, float32, shape))
    return model.SerializeToString(), shown

"""Reading the ONNX files that this package wrote, by their metadata."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from maskrcnn.errors import UserError
from maskrcnn.metadata import KEY, ModelMetadata, not_ours
from maskrcnn.plugins import contract
from maskrcnn.runtime.backend import missing_library

if TYPE_CHECKING:
    import onnx


def read_model(path: Path) -> tuple[onnx.ModelProto, ModelMetadata]:
    """An exported ONNX file, and what it says of itself.

    Raises:
        UserError: when the file is missing, is not ours, or was written for another version of our tensors or ops.
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
    text = {prop.key: prop.value for prop in model.metadata_props}.get(KEY)
    if text is None:
        raise not_ours(path, "an ONNX file without maskrcnn's metadata")
    versions = {entry.version for entry in model.opset_import if entry.domain == contract.DOMAIN}
    if not versions <= {contract.VERSION}:
        raise UserError(
            f"{path}: operators {contract.DOMAIN} of version {', '.join(map(str, versions))}",
            f"version {contract.VERSION}",
            "export the model again with this version of maskrcnn",
        )
    return model, ModelMetadata.from_json(text, path)


def check_portable(model: onnx.ModelProto, path: Path) -> None:
    """Refuses the copy for TensorRT, whose nodes have no bodies in standard operators.

    Raises:
        UserError: naming the operators without body.
    """
    bodies = {(function.domain, function.name) for function in model.functions}
    bare = {n.op_type for n in model.graph.node if n.domain == contract.DOMAIN and (n.domain, n.op_type) not in bodies}
    if bare:
        raise UserError(
            f"{path}: {', '.join(sorted(bare))} without bodies in standard operators, as TensorRT's parser wants it",
            "a file of `maskrcnn export --onnx` without --tensorrt",
            "name the file that this one was made from",
        )

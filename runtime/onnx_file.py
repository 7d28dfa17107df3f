"""Reading the ONNX files that this package wrote, by their metadata."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from maskrcnn.errors import UserError, missing_library
from maskrcnn.metadata import KEY, ModelMetadata, not_ours
from maskrcnn.plugins import contract

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


# A graph that shows the tensors on the way from images to detections as outputs of its own, in float32.

PREFIX = "stage."  # before the stage's name, as the tensor itself keeps it


def staged_graph(graph: bytes, names: Sequence[str]) -> tuple[bytes, dict[str, str]]:
    """A copy of a graph with further outputs.

    Args:
        graph: an ONNX file that says types and shapes of its tensors, as `export.tensorrt.tensorrt_flavour` does.
        names: of tensors, see `maskrcnn.stages`; those that the graph lacks are left out.

    Returns:
        the file, and for each output the tensor that it shows; those that are outputs anyway are among them.
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
        shown[f"{PREFIX}{name}"] = name
        made = known[name].type.tensor_type
        model.graph.node.append(
            onnx.helper.make_node("Cast", [name], [f"{PREFIX}{name}"], name=f"{PREFIX}{name}", to=float32)
        )
        shape = [dim.dim_value or dim.dim_param or None for dim in made.shape.dim]
        model.graph.output.append(onnx.helper.make_tensor_value_info(f"{PREFIX}{name}", float32, shape))
    return model.SerializeToString(), shown

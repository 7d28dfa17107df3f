"""A graph that shows the tensors on the way from images to detections as outputs of its own, in float32."""

from __future__ import annotations

from collections.abc import Sequence

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

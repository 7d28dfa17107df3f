"""Faults that an export can have, inserted into the graph of a correct ONNX file."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx

from maskrcnn.metadata import KEY
from maskrcnn.stages import STAGES

Change = Callable[[onnx.ModelProto], None]
IMAGENET_MEAN = (123.675, 116.28, 103.53)


def plant(source: Path, target: Path, *changes: Change) -> Path:
    """Writes `source` with changes to `target`."""
    model = onnx.load(source)
    for change in changes:
        change(model)
    onnx.save(model, target)
    return target


def initializer(model: onnx.ModelProto, fits: Callable[[str, np.ndarray], bool], change) -> None:
    """Applies `change` to the only initializer for which `fits` is true."""
    (found,) = [x for x in model.graph.initializer if fits(x.name, onnx.numpy_helper.to_array(x))]
    values = np.ascontiguousarray(change(onnx.numpy_helper.to_array(found)))
    found.CopyFrom(onnx.numpy_helper.from_array(values, found.name))


def wrong_mean(model: onnx.ModelProto) -> None:
    """Changes the red channel's mean from 0.485 to 0.5."""
    initializer(
        model,
        lambda _, values: values.size == 3 and np.allclose(values.ravel(), IMAGENET_MEAN),
        lambda mean: mean + np.array([3.8, 0, 0], np.float32).reshape(mean.shape),
    )


def swapped_channels(model: onnx.ModelProto) -> None:
    """Makes the first convolution read BGR."""
    weight = next(node for node in model.graph.node if node.op_type == "Conv").input[1]
    initializer(model, lambda name, _: name == weight, lambda values: values[:, ::-1])


def shifted_roi_align(model: onnx.ModelProto) -> None:
    """Changes RoIAlign's pixel model, which shifts boxes by half a pixel."""
    other = {b"output_half_pixel": b"half_pixel", b"half_pixel": b"output_half_pixel"}
    nodes = [node for function in model.functions for node in function.node if node.op_type == "RoiAlign"]
    assert nodes
    for node in nodes:
        (mode,) = [a for a in node.attribute if a.name == "coordinate_transformation_mode"]
        mode.s = other[mode.s]


def nms_threshold(which: int, value: float) -> Change:
    """Changes the IoU threshold of the NMS of proposals (0) or of detections (1)."""

    def change(model: onnx.ModelProto) -> None:
        node = [node for node in model.graph.node if node.op_type == "BatchedNms"][which]
        (threshold,) = [a for a in node.attribute if a.name == "iou_threshold"]
        threshold.f = value

    return change


def transposed(stage: str) -> Change:
    """Transposes the last two axes of a stage."""

    def change(model: onnx.ModelProto) -> None:
        (node,) = [node for node in model.graph.node if stage in node.output]
        node.output[list(node.output).index(stage)] = f"{stage}_upright"
        swap = onnx.helper.make_node("Transpose", [f"{stage}_upright"], [stage], perm=[0, 1, 3, 2])
        model.graph.node.insert(list(model.graph.node).index(node) + 1, swap)

    return change


def bias_of(layer: str, index: int, value: float) -> Change:
    """Changes one element of a layer's bias."""

    def changed(bias: np.ndarray) -> np.ndarray:
        bias = bias.copy()
        bias[index] = value
        return bias

    return lambda model: initializer(model, lambda name, _: name.endswith(f"{layer}.bias"), changed)


def metadata(**changes) -> Change:
    """Changes fields of the metadata."""

    def change(model: onnx.ModelProto) -> None:
        (entry,) = [entry for entry in model.metadata_props if entry.key == KEY]
        entry.value = json.dumps(json.loads(entry.value) | changes)

    return change


def preprocessing(**changes) -> Change:
    """Changes the preprocessing in the metadata, but not the graph."""

    def change(model: onnx.ModelProto) -> None:
        (entry,) = [entry for entry in model.metadata_props if entry.key == KEY]
        metadata(preprocessing=json.loads(entry.value)["preprocessing"] | changes)(model)

    return change


def nameless(model: onnx.ModelProto) -> None:
    """Removes the names of intermediate tensors, as in files of older versions."""
    outputs = {output.name for output in model.graph.output}
    for node in model.graph.node:
        for names in (node.input, node.output):
            for place, name in enumerate(names):
                if name in STAGES and name not in outputs:
                    names[place] = f"value_{name}"

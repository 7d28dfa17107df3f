"""The `config.pbtxt` of the steps around a network in a Triton repository, and of the ensemble that joins them.

A client of the ensemble sends image files and gets detections in pixels of the original images.
"""

from __future__ import annotations

from maskrcnn.runtime.backend import detector_specs
from maskrcnn.runtime.serving.models import Served
from maskrcnn.runtime.serving.network import TYPES, Message
from maskrcnn.runtime.serving.options import Serving, batch_limit, names_of, sizes
from maskrcnn.runtime.serving.pbtxt import Symbol, map_of

Tensors = dict[str, tuple[str, list[int]]]  # by name, type and shape without the first dimension

_IMAGE: Tensors = {"image": ("str", [1])}
_INPUTS: Tensors = {"images": ("float32", [3, -1, -1]), "image_sizes": ("int64", [2])}
_SIZES: Tensors = {"image_sizes": ("int64", [2]), "original_sizes": ("int64", [2])}


def pre_config(served: Served, serving: Serving, name: str) -> Message:
    """The configuration of the step that decodes, resizes and pads (`pre.py`)."""
    config = _step(name, batch_limit(served, serving), serving, _IMAGE, _INPUTS | _SIZES)
    if allowed := sizes(served, serving):
        text = ",".join("{}:{}x{}:{}".format(*size) for size in allowed)
        config["parameters"] = map_of({"sizes": {"string_value": text}})
    return config


def post_config(served: Served, serving: Serving, name: str) -> Message:
    """The configuration of the step that makes detections of the network's outputs (`post.py`)."""
    inputs, outputs = _network_outputs(served, serving) | _SIZES, _detections(served, serving)
    config = _step(name, batch_limit(served, serving), serving, inputs, outputs)
    return {**config, "parameters": map_of({"min_score": {"string_value": f"{serving.min_score:g}"}})}


def ensemble_config(served: Served, serving: Serving, name: str) -> Message:
    """The configuration of the ensemble."""
    names, detections = names_of(name), _detections(served, serving)
    # The network's boxes are not the ensemble's: those are in the original image.
    found = {tensor: f"network_{tensor}" for tensor in _network_outputs(served, serving)}
    steps = [
        (names["pre"], _same(_IMAGE), _same(_INPUTS | _SIZES)),
        (names["network"], _same(_INPUTS), found),
        (names["post"], found | _same(_SIZES), _same(detections)),
    ]
    return {
        "name": name,
        "platform": "ensemble",
        "max_batch_size": batch_limit(served, serving),
        "input": _described(_IMAGE),
        "output": _described(detections),
        "ensemble_scheduling": {
            "step": [
                {"model_name": part, "model_version": -1, "input_map": map_of(taken), "output_map": map_of(given)}
                for part, taken, given in steps
            ]
        },
    }


def _step(name: str, limit: int, serving: Serving, inputs: Tensors, outputs: Tensors) -> Message:
    return {
        "name": name,
        "backend": "python",
        "max_batch_size": limit,
        "input": _described(inputs),
        "output": _described(outputs),
        "instance_group": [{"count": serving.step_instances, "kind": Symbol("KIND_CPU")}],
    }


def _described(tensors: Tensors) -> list[Message]:
    return [{"name": name, "data_type": TYPES[kind], "dims": dims} for name, (kind, dims) in tensors.items()]


def _same(tensors: Tensors) -> dict[str, str]:
    """A map for tensors whose names in a step are those in the ensemble."""
    return {name: name for name in tensors}


def _network_outputs(served: Served, serving: Serving) -> Tensors:
    """The network's outputs that the step after it needs."""
    _, specs = detector_specs(served.metadata)
    wanted = {name: spec for name, spec in specs.items() if name != "masks" or serving.masks != "none"}
    return {name: (spec.dtype, list(spec.shape[1:]) or [1]) for name, spec in wanted.items()}


def _detections(served: Served, serving: Serving) -> Tensors:
    """What a client gets of each image: rows, of which `num_detections` are used."""
    rows = served.metadata.detections
    outputs: Tensors = {
        "num_detections": ("int32", [1]),
        "boxes": ("float32", [rows, 4]),
        "scores": ("float32", [rows]),
        "labels": ("int64", [rows]),
        "class_names": ("str", [rows]),
        "image_size": ("int64", [2]),
    }
    if served.metadata.has_masks and serving.masks != "none":
        outputs["masks"] = ("str", [rows]) if serving.masks == "rle" else ("uint8", [-1, -1, -1])
    if served.metadata.has_keypoints:
        outputs["keypoints"] = ("float32", [rows, len(served.metadata.keypoint_names), 3])
    return outputs

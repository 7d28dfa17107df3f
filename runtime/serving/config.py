"""The `config.pbtxt` of a network in a Triton repository.

Field names and meanings: ModelConfig in model_config.proto of triton-inference-server/common. What Triton's backends do
with them is said here where it decided something.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from maskrcnn.imaging.preprocess import resized_size
from maskrcnn.runtime.backends.base import TensorSpec, detector_specs
from maskrcnn.runtime.serving.models import Served, Serving, Size, batch_limit, names_of, sizes

# Protocol buffers in their text format, which Triton's configurations are written in.
#
# A message is a dictionary of its fields; a repeated field is a list, of messages or of plain values. Source:
# protobuf.dev/reference/protobuf/textformat-spec.

_ESCAPES = {"\\": "\\\\", '"': '\\"', "\n": "\\n", "\r": "\\r", "\t": "\\t"}


class Symbol(str):
    """A value of an enumeration, which is written without quotes."""


def text_of(message: Mapping[str, Any]) -> str:
    """The text of a message, a field a line; fields in the dictionary's order."""
    return "".join(f"{line}\n" for line in _lines(message))


def map_of(values: Mapping[Any, Any]) -> list[dict[str, Any]]:
    """A `map<…>` field: entries with `key` and `value`."""
    return [{"key": key, "value": value} for key, value in values.items()]


def _lines(message: Mapping[str, Any]) -> Iterator[str]:
    for name, value in message.items():
        if isinstance(value, (list, tuple)) and not any(isinstance(part, Mapping) for part in value):
            yield f"{name}: [ {', '.join(map(_scalar, value))} ]" if value else f"{name}: [ ]"
            continue
        for part in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(part, Mapping):
                yield f"{name} {{"
                yield from (f"  {line}" for line in _lines(part))
                yield "}"
            else:
                yield f"{name}: {_scalar(part)}"


def _scalar(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, Symbol):
        return value
    if isinstance(value, str):
        return '"' + "".join(_ESCAPES.get(character, character) for character in value) + '"'
    if isinstance(value, (int, float)):
        return repr(value)
    raise TypeError(f"{value!r} is no value of a text format")


TYPES = {  # by our name of a type, Triton's
    "uint8": Symbol("TYPE_UINT8"),
    "int32": Symbol("TYPE_INT32"),
    "int64": Symbol("TYPE_INT64"),
    "float32": Symbol("TYPE_FP32"),
    "str": Symbol("TYPE_STRING"),
}
_SEEN_HW = ((480, 640), (640, 480))  # images that a server is warmed up with: COCO's most frequent sizes

Message = dict[str, Any]
Warmup = tuple[int, Size]  # batch; height and width


def network_config(served: Served, serving: Serving, name: str, warmup: Sequence[Warmup]) -> Message:
    """The configuration of a model file.

    Args:
        served: the model file.
        serving: how it is served.
        name: of the model on the server.
        warmup: batches that each instance sees before it takes requests; files as `image_file` and `size_file` name
            them lie in the model's folder `warmup`.

    Raises:
        UserError: as `batch_limit`.
    """
    limit = batch_limit(served, serving)
    is_batched = served.is_batched_by_triton
    inputs, outputs = detector_specs(served.metadata)
    config: Message = {
        "name": name,
        "backend": served.backend,
        "max_batch_size": limit if is_batched else 0,
        "input": [_tensor(name, spec, is_batched=is_batched) for name, spec in inputs.items()],
        "output": [_tensor(name, spec, is_batched=is_batched) for name, spec in outputs.items()],
        "instance_group": [_instances(served, serving)],
    }
    if is_batched:
        config["dynamic_batching"] = _batching(served, serving, limit)
    config |= _tuning(served, serving, limit)
    if warmup:
        config["model_warmup"] = [_warmup(batch, size, is_batched=is_batched) for batch, size in warmup]
    return config


def warmup_batches(served: Served, serving: Serving) -> list[Warmup]:
    """Batches as the server will see them: those that profiles are made for, or single photographs."""
    if serving.pad_to:
        seen = [(1, size) for size in serving.pad_to]
    elif served.profiles:
        limit = batch_limit(served, serving)
        seen = [(min(p.batch.best, limit), (p.height.best, p.width.best)) for p in served.profiles]
    else:
        seen = [(1, _network_size(served, size)) for size in _SEEN_HW]
    return sorted(set(seen))


def image_file(size: Size) -> str:
    """The name of the file with the pixels of a warm-up image."""
    return "images_{}x{}".format(*size)


def size_file(size: Size) -> str:
    """The name of the file with its height and width."""
    return "image_sizes_{}x{}".format(*size)


def _network_size(served: Served, image_hw: Size) -> Size:
    preprocessing = served.metadata.preprocessing
    height, width = resized_size(image_hw, preprocessing)
    return tuple(-(-side // preprocessing.divisor) * preprocessing.divisor for side in (height, width))


def _tensor(name: str, spec: TensorSpec, *, is_batched: bool) -> Message:
    """An input or output; where Triton batches, it adds the first dimension itself."""
    shape = [-1 if length is None else length for length in spec.shape]
    dims = shape[1:] if is_batched else shape
    described = {"name": name, "data_type": TYPES[spec.dtype]}
    if len(shape) > 1:
        return {**described, "dims": dims}
    # [N] has no dimension left for an image, but Triton wants one: clients and other models see [N, 1].
    return {**described, "dims": [*dims, 1], "reshape": {"shape": dims}}


def _instances(served: Served, serving: Serving) -> Message:
    # TensorRT runs on GPUs alone, the server's OpenVINO on CPUs alone.
    kind = {"tensorrt": "gpu", "openvino": "cpu"}.get(served.backend, serving.kind)
    group: Message = {"count": serving.instances, "kind": Symbol(f"KIND_{kind.upper()}")}
    if len(served.profiles) > 1:
        group["profile"] = [str(number) for number in range(len(served.profiles))]
    return group


def _batching(served: Served, serving: Serving, limit: int) -> Message:
    # Triton's manual advises against preferred sizes, except where a model is fastest at certain ones.
    best = sorted({p.batch.best for p in served.profiles if 1 < p.batch.best <= limit})
    preferred = {"preferred_batch_size": best} if best else {}
    return {**preferred, "max_queue_delay_microseconds": serving.queue_delay_us}


def _tuning(served: Served, serving: Serving, limit: int) -> Message:
    if served.backend == "tensorrt":
        return _cuda_graphs(served, serving, limit) if serving.has_cuda_graphs else {}
    chosen = _openvino_options(served, serving) if served.backend == "openvino" else _onnxruntime_options(serving)
    return {"parameters": map_of({key: {"string_value": value} for key, value in chosen.items()})}


def _onnxruntime_options(serving: Serving) -> dict[str, str]:
    # cuDNN's exhaustive search, the default, begins anew at every size of image: 1 is its heuristic. Arenas that double
    # whenever they grow waste memory on changing sizes: 1 lets them grow by what is asked. Triton calls this place of
    # them deprecated, but its defaults override those of the new one, `execution_accelerators`.
    chosen = {"cudnn_conv_algo_search": "1", "arena_extend_strategy": "1"}
    return chosen | ({"intra_op_thread_count": str(serving.threads)} if serving.threads else {})


def _openvino_options(served: Served, serving: Serving) -> dict[str, str]:
    is_single = serving.instances == 1
    chosen = {"PERFORMANCE_HINT": "LATENCY" if is_single else "THROUGHPUT", "NUM_STREAMS": str(serving.instances)}
    if served.metadata.stamp.get("execution") == "bf16":
        chosen["HINT_BF16"] = "YES"
    return chosen | ({"INFERENCE_NUM_THREADS": str(serving.threads)} if serving.threads else {})


def _cuda_graphs(served: Served, serving: Serving, limit: int) -> Message:
    """A graph for each size and batch that an engine is made for; other requests run without one."""
    at = serving.pad_to or sorted({(p.height.best, p.width.best) for p in served.profiles})
    batches = sorted({1, limit, *(p.batch.best for p in served.profiles if p.batch.best <= limit)})
    specs = [
        {"batch_size": batch, "input": map_of({"images": {"dim": [3, *size]}, "image_sizes": {"dim": [2]}})}
        for size in at
        for batch in batches
        if any(profile.takes((batch, *size)) for profile in served.profiles)
    ]
    return {"optimization": {"cuda": {"graphs": True, "graph_spec": specs}}}


def _warmup(batch: int, size: Size, *, is_batched: bool) -> Message:
    """Requests that an instance runs as one batch; where Triton does not batch, one request that holds it."""
    leading = [] if is_batched else [batch]
    inputs = {
        "images": {"data_type": TYPES["float32"], "dims": [*leading, 3, *size], "input_data_file": image_file(size)},
        "image_sizes": {"data_type": TYPES["int64"], "dims": [*leading, 2], "input_data_file": size_file(size)},
    }
    name = "{} of {}x{}".format(batch, *size)
    return {"name": name, "batch_size": batch if is_batched else 1, "inputs": map_of(inputs), "count": 1}


# The `config.pbtxt` of the steps around a network in a Triton repository, and of the ensemble that joins them.
#
# A client of the ensemble sends image files and gets detections in pixels of the original images.

_Tensors = dict[str, tuple[str, list[int]]]  # by name, type and shape without the first dimension

_IMAGE: _Tensors = {"image": ("str", [1])}
_INPUTS: _Tensors = {"images": ("float32", [3, -1, -1]), "image_sizes": ("int64", [2])}
_SIZES: _Tensors = {"image_sizes": ("int64", [2]), "original_sizes": ("int64", [2])}


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


def _step(name: str, limit: int, serving: Serving, inputs: _Tensors, outputs: _Tensors) -> Message:
    return {
        "name": name,
        "backend": "python",
        "max_batch_size": limit,
        "input": _described(inputs),
        "output": _described(outputs),
        "instance_group": [{"count": serving.step_instances, "kind": Symbol("KIND_CPU")}],
    }


def _described(tensors: _Tensors) -> list[Message]:
    return [{"name": name, "data_type": TYPES[kind], "dims": dims} for name, (kind, dims) in tensors.items()]


def _same(tensors: _Tensors) -> dict[str, str]:
    """A map for tensors whose names in a step are those in the ensemble."""
    return {name: name for name in tensors}


def _network_outputs(served: Served, serving: Serving) -> _Tensors:
    """The network's outputs that the step after it needs."""
    _, specs = detector_specs(served.metadata)
    wanted = {name: spec for name, spec in specs.items() if name != "masks" or serving.masks != "none"}
    return {name: (spec.dtype, list(spec.shape[1:]) or [1]) for name, spec in wanted.items()}


def _detections(served: Served, serving: Serving) -> _Tensors:
    """What a client gets of each image: rows, of which `num_detections` are used."""
    rows = served.metadata.detections
    outputs: _Tensors = {
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

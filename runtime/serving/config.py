"""The `config.pbtxt` files of a Triton repository: the network, pre- and postprocessing steps, and their ensemble.

The fields are defined by ModelConfig in model_config.proto of triton-inference-server/common. A client of the ensemble
sends image files and receives detections in pixels of the original images.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from maskrcnn.imaging.preprocess import resized_size
from maskrcnn.runtime.backends.base import TensorSpec, detector_specs
from maskrcnn.runtime.serving.models import ServedModel, ServingOptions, Size, batch_limit, model_names, size_ranges

Message = dict[str, Any]  # fields of a protobuf message; a list for a repeated field
Warmup = tuple[int, Size]  # batch; height and width
_Tensors = dict[str, tuple[str, list[int]]]  # by name: type, and shape without the batch


class _EnumName(str):
    """A value of an enumeration, written without quotes."""


_TYPES = {  # NumPy type to Triton type
    "uint8": _EnumName("TYPE_UINT8"),
    "int32": _EnumName("TYPE_INT32"),
    "int64": _EnumName("TYPE_INT64"),
    "float32": _EnumName("TYPE_FP32"),
    "str": _EnumName("TYPE_STRING"),
}
_USUAL_SIZES_HW = ((480, 640), (640, 480))  # of warm-up images: the most frequent sizes in COCO
_IMAGE: _Tensors = {"image": ("str", [1])}
_SIZES: _Tensors = {"image_sizes": ("int64", [2]), "original_sizes": ("int64", [2])}
_ESCAPES = {"\\": "\\\\", '"': '\\"', "\n": "\\n", "\r": "\\r", "\t": "\\t"}


def to_pbtxt(message: Mapping[str, Any]) -> str:
    """Returns a message in the protobuf text format, one field per line.

    Source: protobuf.dev/reference/protobuf/textformat-spec.
    """
    return "".join(f"{line}\n" for line in _lines(message))


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
    if isinstance(value, _EnumName):
        return value
    if isinstance(value, str):
        return '"' + "".join(_ESCAPES.get(character, character) for character in value) + '"'
    if isinstance(value, (int, float)):
        return repr(value)
    raise TypeError(f"{value!r} has no representation in the text format")


def _map_entries(values: Mapping[Any, Any]) -> list[Message]:
    """A `map<…>` field."""
    return [{"key": key, "value": value} for key, value in values.items()]


def network_config(model: ServedModel, options: ServingOptions, name: str, warmup: Sequence[Warmup]) -> Message:
    """Returns the configuration of a model file.

    Args:
        model: the model file.
        options: serving options.
        name: name of the model on the server.
        warmup: batches that each instance runs before it accepts requests, from `image_file` and `size_file` in the
            model's folder `warmup`.

    Raises:
        UserError: as `batch_limit`.
    """
    limit = batch_limit(model, options)
    is_batched = model.is_batched_by_triton
    inputs, outputs = detector_specs(model.metadata)
    config: Message = {
        "name": name,
        "backend": model.backend,
        "max_batch_size": limit if is_batched else 0,
        "input": [_tensor(name, spec, is_batched=is_batched) for name, spec in inputs.items()],
        "output": [_tensor(name, spec, is_batched=is_batched) for name, spec in outputs.items()],
        "instance_group": [_instances(model, options)],
    }
    if is_batched:
        # Triton's manual recommends preferred sizes only for models that are faster at certain sizes.
        tuned = sorted({p.batch.opt for p in model.profiles if 1 < p.batch.opt <= limit})
        preferred = {"preferred_batch_size": tuned} if tuned else {}
        config["dynamic_batching"] = {**preferred, "max_queue_delay_microseconds": options.queue_delay_us}
    if model.backend == "tensorrt":
        config |= _cuda_graphs(model, options, limit) if options.cuda_graphs else {}
    elif model.backend == "openvino":
        config["parameters"] = _parameters(_openvino_parameters(model, options))
    elif model.backend == "python":
        config["parameters"] = _parameters(_python_parameters(model, options))
    else:
        config["parameters"] = _parameters(_ort_parameters(options))
    if warmup:
        channels = model.metadata.preprocessing.channels
        config["model_warmup"] = [_warmup(batch, (channels, *size), is_batched=is_batched) for batch, size in warmup]
    return config


def warmup_batches(model: ServedModel, options: ServingOptions) -> list[Warmup]:
    """Returns batches to warm up the network: the optimal shapes of its profiles, or single images."""
    if options.pad_to:
        batches = [(1, size) for size in options.pad_to]
    elif model.profiles:
        limit = batch_limit(model, options)
        batches = [(min(p.batch.opt, limit), (p.height.opt, p.width.opt)) for p in model.profiles]
    else:
        batches = [(1, _padded_size(model, size)) for size in _USUAL_SIZES_HW]
    return sorted(set(batches))


def image_file(size: Size) -> str:
    """The name of the file with the pixels of a warm-up image."""
    return "images_{}x{}".format(*size)


def size_file(size: Size) -> str:
    """The name of the file with the height and width of a warm-up image."""
    return "image_sizes_{}x{}".format(*size)


def _padded_size(model: ServedModel, image_hw: Size) -> Size:
    divisor = model.metadata.preprocessing.divisor
    height, width = resized_size(image_hw, model.metadata.preprocessing)
    return -(-height // divisor) * divisor, -(-width // divisor) * divisor


def _tensor(name: str, spec: TensorSpec, *, is_batched: bool) -> Message:
    """An input or output. Where Triton batches, it adds the first dimension itself."""
    shape = [-1 if length is None else length for length in spec.shape]
    dims = shape[1:] if is_batched else shape
    tensor = {"name": name, "data_type": _TYPES[spec.dtype]}
    if len(shape) > 1:
        return {**tensor, "dims": dims}
    # Triton requires a dimension after the batch: clients and other models see [N] as [N, 1].
    return {**tensor, "dims": [*dims, 1], "reshape": {"shape": dims}}


def _instances(model: ServedModel, options: ServingOptions) -> Message:
    kind = model.kind or options.kind
    group: Message = {"count": options.instances, "kind": _EnumName(f"KIND_{kind.upper()}")}
    if model.backend == "tensorrt" and len(model.profiles) > 1:
        group["profile"] = [str(number) for number in range(len(model.profiles))]
    return group


def _ort_parameters(options: ServingOptions) -> dict[str, str]:
    # By default cuDNN's exhaustive search runs again for every image size; 1 selects its heuristic. By default arenas
    # double, which wastes memory with varying sizes; 1 extends them by the requested amount. Triton documents these
    # parameters as deprecated, but their defaults override `execution_accelerators`, their replacement.
    parameters = {"cudnn_conv_algo_search": "1", "arena_extend_strategy": "1"}
    return parameters | ({"intra_op_thread_count": str(options.threads)} if options.threads else {})


def _openvino_parameters(model: ServedModel, options: ServingOptions) -> dict[str, str]:
    is_single = options.instances == 1
    parameters = {"PERFORMANCE_HINT": "LATENCY" if is_single else "THROUGHPUT", "NUM_STREAMS": str(options.instances)}
    if model.metadata.stamp.get("execution") == "bf16":
        parameters["HINT_BF16"] = "YES"
    return parameters | ({"INFERENCE_NUM_THREADS": str(options.threads)} if options.threads else {})


def _python_parameters(model: ServedModel, options: ServingOptions) -> dict[str, str]:
    """Parameters of `network.py`: the model's file, and options of its backend."""
    parameters = {"file": next(iter(model.files))}
    if model.path.suffix == ".engine":
        parameters["graphs"] = "yes" if options.cuda_graphs else "no"
    return parameters | ({"threads": str(options.threads)} if options.threads else {})


def _parameters(values: dict[str, str]) -> list[Message]:
    return _map_entries({key: {"string_value": value} for key, value in values.items()})


def _cuda_graphs(model: ServedModel, options: ServingOptions, limit: int) -> Message:
    """CUDA graphs for each tuned size, at the tuned batches, 1 and the limit, where a profile accepts these."""
    sizes = options.pad_to or sorted({(p.height.opt, p.width.opt) for p in model.profiles})
    batches = sorted({1, limit, *(p.batch.opt for p in model.profiles if p.batch.opt <= limit)})
    channels = model.metadata.preprocessing.channels
    specs = [
        {
            "batch_size": batch,
            "input": _map_entries({"images": {"dim": [channels, *size]}, "image_sizes": {"dim": [2]}}),
        }
        for size in sizes
        for batch in batches
        if any(profile.takes((batch, *size)) for profile in model.profiles)
    ]
    return {"optimization": {"cuda": {"graphs": True, "graph_spec": specs}}}


def _warmup(batch: int, shape: tuple[int, int, int], *, is_batched: bool) -> Message:
    """Requests that an instance runs as one batch, or one request with the whole batch if Triton does not batch."""
    leading, size = [] if is_batched else [batch], shape[1:]
    inputs = {
        "images": {"data_type": _TYPES["float32"], "dims": [*leading, *shape], "input_data_file": image_file(size)},
        "image_sizes": {"data_type": _TYPES["int64"], "dims": [*leading, 2], "input_data_file": size_file(size)},
    }
    name = "{} of {}x{}".format(batch, *size)
    return {"name": name, "batch_size": batch if is_batched else 1, "inputs": _map_entries(inputs), "count": 1}


# The steps before and after the network, and the ensemble


def _network_inputs(model: ServedModel) -> _Tensors:
    return {"images": ("float32", [model.metadata.preprocessing.channels, -1, -1]), "image_sizes": ("int64", [2])}


def pre_config(model: ServedModel, options: ServingOptions, name: str) -> Message:
    """Returns the configuration of the step that decodes, resizes and pads (`pre.py`)."""
    config = _step(name, batch_limit(model, options), options, _IMAGE, _network_inputs(model) | _SIZES)
    if ranges := size_ranges(model, options):
        text = ",".join("{}:{}x{}:{}".format(*each) for each in ranges)
        config["parameters"] = _parameters({"sizes": text})
    return config


def post_config(model: ServedModel, options: ServingOptions, name: str) -> Message:
    """Returns the configuration of the step that computes detections from the network's outputs (`post.py`)."""
    inputs, outputs = _network_outputs(model, options) | _SIZES, _detections(model, options)
    config = _step(name, batch_limit(model, options), options, inputs, outputs)
    return {**config, "parameters": _parameters({"min_score": str(options.min_score)})}


def ensemble_config(model: ServedModel, options: ServingOptions, name: str) -> Message:
    """Returns the configuration of the ensemble of pre, network and post."""
    names, detections = model_names(name), _detections(model, options)
    # The network's outputs are renamed: its boxes are in the resized image, those of the ensemble in the original one.
    renamed = {tensor: f"network_{tensor}" for tensor in _network_outputs(model, options)}
    steps = [
        (names["pre"], _same_names(_IMAGE), _same_names(_network_inputs(model) | _SIZES)),
        (names["network"], _same_names(_network_inputs(model)), renamed),
        (names["post"], renamed | _same_names(_SIZES), _same_names(detections)),
    ]
    return {
        "name": name,
        "platform": "ensemble",
        "max_batch_size": batch_limit(model, options),
        "input": _tensors(_IMAGE),
        "output": _tensors(detections),
        "ensemble_scheduling": {
            "step": [
                {
                    "model_name": part,
                    "model_version": -1,
                    "input_map": _map_entries(inputs),
                    "output_map": _map_entries(outputs),
                }
                for part, inputs, outputs in steps
            ]
        },
    }


def _step(name: str, limit: int, options: ServingOptions, inputs: _Tensors, outputs: _Tensors) -> Message:
    return {
        "name": name,
        "backend": "python",
        "max_batch_size": limit,
        "input": _tensors(inputs),
        "output": _tensors(outputs),
        "instance_group": [{"count": options.step_instances, "kind": _EnumName("KIND_CPU")}],
    }


def _tensors(tensors: _Tensors) -> list[Message]:
    return [{"name": name, "data_type": _TYPES[kind], "dims": dims} for name, (kind, dims) in tensors.items()]


def _same_names(tensors: _Tensors) -> dict[str, str]:
    """Maps tensors that have the same name in a step and in the ensemble."""
    return {name: name for name in tensors}


def _network_outputs(model: ServedModel, options: ServingOptions) -> _Tensors:
    """The outputs of the network that the step after it uses."""
    _, specs = detector_specs(model.metadata)
    return {
        name: (spec.dtype, [-1 if length is None else length for length in spec.shape[1:]] or [1])
        for name, spec in specs.items()
        if name != "masks" or options.masks != "none"
    }


def _detections(model: ServedModel, options: ServingOptions) -> _Tensors:
    """The outputs for one image: rows for detections; the first `num_detections` are valid."""
    rows = model.metadata.detections
    outputs: _Tensors = {
        "num_detections": ("int32", [1]),
        "boxes": ("float32", [rows, 4]),
        "scores": ("float32", [rows]),
        "labels": ("int64", [rows]),
        "class_names": ("str", [rows]),
        "image_size": ("int64", [2]),
    }
    if model.metadata.has_masks and options.masks != "none":
        outputs["masks"] = ("str", [rows]) if options.masks == "rle" else ("uint8", [-1, -1, -1])
    if model.metadata.has_keypoints:
        outputs["keypoints"] = ("float32", [rows, len(model.metadata.keypoint_names), 3])
    return outputs

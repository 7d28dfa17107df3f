"""Which values a graph's tensors take on images: the ground for 8-bit scales and for what FP16 can hold."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime

from maskrcnn.data.images import read_image
from maskrcnn.errors import UserError
from maskrcnn.export.graph import copy_of
from maskrcnn.metadata import ModelMetadata
from maskrcnn.preprocess import batch_images
from maskrcnn.runtime.onnxruntime_backend import session_options

Feeds = dict[str, np.ndarray]


def feeds_from_files(paths: Sequence[Path], metadata: ModelMetadata) -> Iterator[Feeds]:
    """One batch of one image for each file, prepared as the model wants it."""
    for path in paths:
        images, sizes = batch_images([read_image(path)], metadata.preprocessing)
        yield {"images": images, "image_sizes": sizes}


def observe(proto: onnx.ModelProto, feeds: Iterable[Feeds], names: Sequence[str]) -> dict[str, np.ndarray]:
    """The least and the largest number of each value, for each batch.

    Args:
        proto: a model in single precision.
        feeds: inputs by name.
        names: of float values in its main graph.

    Returns:
        for each name `[B, 2]` float32: minimum and maximum of each of the B batches.

    Raises:
        UserError: where a value is not finite.
    """
    model = copy_of(proto)
    del model.graph.output[:]
    for name in names:
        for op in ("ReduceMin", "ReduceMax"):
            model.graph.node.append(onnx.helper.make_node(op, [name], [f"{name}_{op}"], keepdims=0))
            model.graph.output.append(onnx.helper.make_empty_tensor_value_info(f"{name}_{op}"))
    written = model.SerializeToString()
    session = onnxruntime.InferenceSession(written, session_options(), providers=["CPUExecutionProvider"])
    rows = [session.run(None, each) for each in feeds]
    values = np.array(rows, np.float32).reshape(len(rows), len(names), 2)
    bad = [name for k, name in enumerate(names) if not np.isfinite(values[:, k]).all()]
    if bad:
        raise UserError(
            f"activations that are not finite in single precision, first {bad[0]}",
            "finite activations",
            "check the weights and the images",
        )
    return {name: values[:, k] for k, name in enumerate(names)}


def largest_magnitudes(proto: onnx.ModelProto, feeds: Iterable[Feeds], names: Sequence[str]) -> dict[str, float]:
    """The largest magnitude of each value over all batches."""
    return {name: float(np.abs(seen).max(initial=0.0)) for name, seen in observe(proto, feeds, names).items()}

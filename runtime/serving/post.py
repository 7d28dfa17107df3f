"""Postprocessing on a Triton server: converts the network's outputs to detections in the original images.

`maskrcnn triton` writes this file as the `model.py` of a model, like `pre.py`. Outputs have as many rows as the
network's outputs; rows after `num_detections` are zero or empty.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

if not __name__.startswith("maskrcnn."):  # on a server, see pre.py
    sys.dont_write_bytecode = True  # see _NO_BYTECODE in triton.py
    sys.path.insert(0, str(Path(__file__).parent))

import triton_python_backend_utils as triton

from maskrcnn.errors import UserError
from maskrcnn.imaging.postprocess import Detections, unpack
from maskrcnn.metadata import ModelMetadata


class TritonPythonModel:
    """Interface of Triton's Python backend; each instance is a separate process."""

    def initialize(self, args: dict[str, str]) -> None:
        """Reads the model's metadata from this file's folder, and the outputs from the configuration."""
        path = Path(__file__).with_name("metadata.json")
        metadata = ModelMetadata.from_json(path.read_text(encoding="utf-8"), path)
        config = json.loads(args["model_config"])
        self.class_names, self.rows = metadata.class_names, metadata.detections
        self.keypoints = len(metadata.keypoint_names)
        self.min_score = float(config["parameters"]["min_score"]["string_value"])
        self.inputs = [tensor["name"] for tensor in config["input"]]
        self.masks = next((tensor["data_type"] for tensor in config["output"] if tensor["name"] == "masks"), None)

    def execute(self, requests: list[Any]) -> list[Any]:
        """Returns a response for each request."""
        return [self._respond(request) for request in requests]

    def _respond(self, request: Any) -> Any:
        tensors = {name: triton.get_input_tensor_by_name(request, name).as_numpy() for name in self.inputs}
        image_sizes, original = tensors.pop("image_sizes"), tensors.pop("original_sizes")
        tensors["num_detections"] = tensors["num_detections"].ravel()  # [N, 1] on the server
        try:
            found = unpack(tensors, image_sizes, [(int(height), int(width)) for height, width in original])
        except UserError as error:
            return triton.InferenceResponse(error=triton.TritonError(str(error)))
        outputs = self._outputs([detections.above(self.min_score) for detections in found])
        return triton.InferenceResponse([triton.Tensor(name, value) for name, value in outputs.items()])

    def _outputs(self, found: list[Detections]) -> dict[str, np.ndarray]:
        names = [[self.class_names[label - 1] for label in each.labels] for each in found]
        outputs = {
            "num_detections": np.array([[len(each)] for each in found], np.int32),
            "boxes": self._rows([each.boxes_xyxy_px for each in found], (4,), np.float32),
            "scores": self._rows([each.scores for each in found], (), np.float32),
            "labels": self._rows([each.labels for each in found], (), np.int64),
            "class_names": self._texts(names),
            "image_size": np.array([each.size_hw for each in found], np.int64),
        }
        if self.masks == "TYPE_STRING":
            outputs["masks"] = self._texts([[rle["counts"] for rle in each.rles()] for each in found])
        elif self.masks is not None:
            outputs["masks"] = bits([each.full_masks() for each in found])
        if self.keypoints:
            keypoints = [each.keypoints for each in found if each.keypoints is not None]
            outputs["keypoints"] = self._rows(keypoints, (self.keypoints, 3), np.float32)
        return outputs

    def _rows(self, values: list[np.ndarray], shape: tuple[int, ...], dtype: type) -> np.ndarray:
        array: np.ndarray = np.zeros((len(values), self.rows, *shape), dtype)
        for row, value in zip(array, values, strict=True):
            row[: len(value)] = value
        return array

    def _texts(self, values: list[list[str]]) -> np.ndarray:
        array = np.full((len(values), self.rows), b"", object)
        for row, texts in zip(array, values, strict=True):
            row[: len(texts)] = [text.encode("utf-8", "backslashreplace") for text in texts]
        return array


def bits(masks: list[np.ndarray]) -> np.ndarray:
    """Packs the masks of several images: eight pixels of a row per byte, the first pixel in the highest bit.

    Args:
        masks: `[D, H, W]` bool of each image.

    Returns:
        `[N, max D, max H, ceil(max W / 8)]` uint8, padded with zeros; each dimension is at least 1.
    """
    depth, height, width = (max(1, *(mask.shape[axis] for mask in masks)) for axis in range(3))
    packed = np.zeros((len(masks), depth, height, -(-width // 8)), np.uint8)
    for slot, mask in zip(packed, masks, strict=True):
        rows = np.packbits(mask, axis=2)
        slot[: rows.shape[0], : rows.shape[1], : rows.shape[2]] = rows
    return packed

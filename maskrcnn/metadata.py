"""What a model file says of itself, the same in a checkpoint, an ONNX file and an engine. Needs NumPy only."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from maskrcnn.errors import UserError
from maskrcnn.imaging.preprocess import Preprocessing

KEY = "maskrcnn"  # under which the JSON is stored in safetensors, ONNX and OpenVINO files
CONTRACT = 1  # version of the tensors' names and meanings, see docs/architecture.md


@dataclass(frozen=True, kw_only=True)
class ModelMetadata:
    """Everything that preprocessing, postprocessing and provenance need."""

    model: str  # name of the architecture
    class_names: tuple[str, ...]  # of labels 1, 2, …
    category_ids: tuple[int, ...]  # the dataset's ids of labels 1, 2, …
    preprocessing: Preprocessing
    detections: int  # rows of the outputs
    has_masks: bool = True  # whether `masks` is among the outputs; files of before Faster R-CNN do not say
    keypoint_names: tuple[str, ...] = ()  # of the rows of `keypoints`; (): no such output, as in older files
    keypoint_skeleton: tuple[tuple[int, int], ...] = ()  # lines between keypoints, counted from 1 as COCO does
    keypoint_sigmas: tuple[float, ...] = ()  # of each, relative to the object's size, for COCO's similarity (OKS)
    precision: str = "fp32"  # of weights and arithmetic in this file
    source_sha256: str = ""  # of the file this one was made from
    versions: dict[str, str] = field(default_factory=dict)  # of the software that wrote it
    stamp: dict[str, Any] = field(default_factory=dict)  # engines: hardware, runtime, how it was verified
    contract: int = CONTRACT

    @property
    def has_keypoints(self) -> bool:
        """Whether `keypoints` is among the outputs."""
        return bool(self.keypoint_names)

    def to_json(self) -> str:
        """The JSON that `from_json` reads."""
        values = dataclasses.asdict(self)
        values["preprocessing"] = self.preprocessing.to_dict()
        return json.dumps(values, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str, path: Path) -> ModelMetadata:
        """The metadata of a file.

        Raises:
            UserError: when the text is not ours or was written for another contract.
        """
        try:
            values = json.loads(text)
            found = values["contract"]
            if found != CONTRACT:
                raise UserError(
                    f"{path}: contract version {found}",
                    f"version {CONTRACT}",
                    "export the model again with this version of maskrcnn",
                )
            values["preprocessing"] = Preprocessing.from_dict(values["preprocessing"])
            for key in ("class_names", "category_ids"):
                values[key] = tuple(values[key])
            for key in ("keypoint_names", "keypoint_sigmas"):
                values[key] = tuple(values.get(key, ()))
            values["keypoint_skeleton"] = tuple(tuple(pair) for pair in values.get("keypoint_skeleton", ()))
            return cls(**values)
        except (ValueError, KeyError, TypeError) as error:
            raise not_ours(path, f"metadata that cannot be read ({error})") from error


def not_ours(path: Path, what: str) -> UserError:
    """The error for a file that maskrcnn did not write."""
    return UserError(
        f"{path}: {what}",
        "a file written by maskrcnn train, export or build-engine",
        "make one with `maskrcnn export --onnx` (torchvision weights: `--weights FILE --model NAME`)",
    )


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()

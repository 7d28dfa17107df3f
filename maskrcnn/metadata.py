"""Metadata of model files, the same in a checkpoint, an ONNX file and an engine. NumPy only."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from maskrcnn.errors import UserError
from maskrcnn.imaging.preprocess import Preprocessing

KEY = "maskrcnn"  # key of the JSON in safetensors, ONNX and OpenVINO files
CONTRACT = 1  # version of tensor names and semantics, see docs/contracts.md


@dataclass(frozen=True, kw_only=True)
class ModelMetadata:
    """Preprocessing, postprocessing and provenance of a model file."""

    model: str  # name of the architecture
    class_names: tuple[str, ...]  # of labels 1, 2, …
    category_ids: tuple[int, ...]  # the dataset's ids of labels 1, 2, …
    preprocessing: Preprocessing
    detections: int  # rows of the outputs
    has_masks: bool = True  # whether `masks` is an output; absent in older files
    keypoint_names: tuple[str, ...] = ()  # (): no output `keypoints`, as in older files
    keypoint_skeleton: tuple[tuple[int, int], ...] = ()  # lines between keypoints, numbered from 1 as in COCO
    keypoint_sigmas: tuple[float, ...] = ()  # OKS sigmas
    # Settings of postprocessing inside the graph; empty or None in older files.
    anchor_sizes_px: tuple[float, ...] = ()
    anchor_aspect_ratios: tuple[float, ...] = ()
    score_threshold: float | None = None
    nms_iou: float | None = None
    recommended_threshold: float | None = None  # minimum score of shown detections
    assumed: tuple[str, ...] = ()  # fields of the model that imported weights did not state
    precision: str = "fp32"  # precision of weights and computation
    source_sha256: str = ""  # the source file
    versions: dict[str, str] = field(default_factory=dict)  # software that wrote the file
    stamp: dict[str, Any] = field(default_factory=dict)  # engines: hardware, runtime, how it was verified
    contract: int = CONTRACT

    @property
    def has_keypoints(self) -> bool:
        """Whether `keypoints` is among the outputs."""
        return bool(self.keypoint_names)

    def to_json(self) -> str:
        """JSON for `from_json`."""
        values = dataclasses.asdict(self)
        values["preprocessing"] = self.preprocessing.to_dict()
        return json.dumps(values, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str | bytes, path: Path) -> ModelMetadata:
        """Parse the metadata of a file.

        Raises:
            UserError: if the text is not metadata of maskrcnn, or has another contract version.
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
            if not isinstance(values.get("stamp", {}), dict):
                raise TypeError("its stamp is not a mapping")
            values["preprocessing"] = Preprocessing.from_dict(values["preprocessing"])
            for key in ("class_names", "category_ids"):
                values[key] = tuple(values[key])
            for key in ("keypoint_names", "keypoint_sigmas", "anchor_sizes_px", "anchor_aspect_ratios", "assumed"):
                values[key] = tuple(values.get(key, ()))
            values["keypoint_skeleton"] = tuple(tuple(pair) for pair in values.get("keypoint_skeleton", ()))
            return cls(**values)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise not_ours(path, f"metadata that cannot be read ({error})") from error


def not_ours(path: Path, what: str) -> UserError:
    """Error for a file that maskrcnn did not write."""
    return UserError(
        f"{path}: {what}",
        "a file written by maskrcnn train, export or build-engine",
        "create one with `maskrcnn export --onnx` (torchvision weights: `--weights FILE --model NAME`)",
    )


def check_complete(path: Path, expected_bytes: int) -> None:
    """Rejects a truncated file, as left by a full disk or an interrupted copy."""
    found = path.stat().st_size
    if found < expected_bytes:
        raise UserError(f"{path}: {found} bytes", f"at least {expected_bytes} bytes of tensors", "copy the file again")


def safetensors_header(path: Path) -> dict[str, Any]:
    """Reads the JSON header of a safetensors file, which follows its length in 8 bytes.

    Returns:
        Type, shape and offsets of each tensor by name, and texts by name as `__metadata__` if present.

    Raises:
        UserError: if the file is of another kind, or truncated.
    """
    with open(path, "rb") as file:
        start = file.read(8)
        if not start:
            raise UserError(f"{path}: an empty file, not a checkpoint", "a complete file", "copy or download it again")
        length = int.from_bytes(start, "little")
        text = file.read(min(length, path.stat().st_size))
    if text[:1] != b"{":
        raise not_ours(path, "not a checkpoint, and no safetensors")
    check_complete(path, 8 + length)
    try:
        header = dict(json.loads(text))
        entries = [entry for name, entry in header.items() if name != "__metadata__"]
        end = max((int(entry["data_offsets"][1]) for entry in entries), default=0)
        complete = all({"dtype", "shape"} <= entry.keys() for entry in entries)
        complete &= isinstance(header.get("__metadata__", {}), dict)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise not_ours(path, f"not a checkpoint, safetensors with a damaged header ({error})") from error
    if not complete:
        raise not_ours(path, "not a checkpoint, safetensors with a damaged header")
    check_complete(path, 8 + length + end)
    return header


def hash_of_text(text: str) -> bytes:
    """SHA-256 digest of a text, which may be a file name with bytes that are not UTF-8."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()


def sha256_of(path: Path) -> str:
    """SHA-256 of a file in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()

"""Reading and writing checkpoints.

A checkpoint is one safetensors file with the weights, and the model configuration as JSON in its header. Files of other
programs are read by `maskrcnn.weights.files`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import safetensors
import torch
import torchvision
from safetensors.torch import save
from torch import Tensor

from maskrcnn import __version__
from maskrcnn.config import ModelConfig, from_dict, to_dict
from maskrcnn.errors import UserError
from maskrcnn.files import atomic_path
from maskrcnn.keypoints import sigmas_of
from maskrcnn.metadata import KEY, ModelMetadata, not_ours, safetensors_header, sha256_of
from maskrcnn.model.detector import MaskRCNN

SUFFIX = ".safetensors"


def versions() -> dict[str, str]:
    """Versions of the software that determines the results."""
    return {"maskrcnn": __version__, "torch": torch.__version__, "torchvision": torchvision.__version__}


def write_tensors(path: Path, tensors: dict[str, Tensor], header: dict[str, Any]) -> None:
    """Write tensors and a JSON header to `path` atomically."""
    tensors = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    with atomic_path(path) as temporary:
        Path(temporary).write_bytes(save(tensors, metadata={KEY: json.dumps(header)}))


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read the tensors and the header written by `write_tensors`.

    Raises:
        UserError: if the file is missing, is not safetensors, or has no header of maskrcnn.
    """
    tensors, header = read_safetensors(path)
    if header is None:
        raise not_ours(path, "safetensors without maskrcnn's header")
    return tensors, header


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """Read the tensors of any safetensors file, and maskrcnn's header if it has one.

    Raises:
        UserError: if the file is missing or not safetensors.
    """
    if not path.is_file():
        raise UserError(f"no file {path}", "a checkpoint", "check the path, or train one: `maskrcnn train`")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            header = (file.metadata() or {}).get(KEY)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return tensors, None if header is None else json.loads(header)
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        safetensors_header(path)  # raises the specific error, if it can be determined
        raise not_ours(path, f"not a checkpoint, and no safetensors ({error})") from error


def save_checkpoint(path: Path, model: MaskRCNN, **extra: Any) -> None:
    """Write the weights and configuration of a model; `extra` is stored in the header."""
    header = {"config": to_dict(model.config), "versions": versions(), **extra}
    write_tensors(path, model.state_dict(), header)


def load_checkpoint(path: Path) -> MaskRCNN:
    """Load the model of a checkpoint, in evaluation mode on the CPU.

    Raises:
        UserError: if the file is not a checkpoint, or its weights do not fit its configuration.
    """
    tensors, header = read_tensors(path)
    model = MaskRCNN(config_of(header, path))
    load_weights(model, tensors, path)
    return model.eval()


def config_of(header: dict[str, Any], path: Path) -> ModelConfig:
    """Configuration in the header of a checkpoint.

    Raises:
        UserError: if the file is the state of a run, or has fields that this version does not know.
    """
    config = header.get("config", {})
    if not config or "model" in config:
        raise UserError(
            f"{path}: not a checkpoint but the state of a run",
            "a checkpoint, such as best.safetensors or last.safetensors",
            "use one of those; a run is continued with `maskrcnn train --resume FOLDER`",
        )
    return from_dict(ModelConfig, config)


def load_weights(model: MaskRCNN, tensors: dict[str, Tensor], source: Path | str) -> None:
    """Load a state dict that must have the names and shapes of the model's own.

    Raises:
        UserError: with the first tensors that are missing, unexpected, or of another shape.
    """
    counter = "num_batches_tracked"  # unused, and absent with frozen batch norm
    own = model.state_dict()
    missing = sorted(name for name in set(own) - set(tensors) if not name.endswith(counter))
    unexpected = sorted(name for name in set(tensors) - set(own) if not name.endswith(counter))
    shapes = [
        f"{name} {list(tensors[name].shape)} instead of {list(own[name].shape)}"
        for name in own
        if name in tensors and tensors[name].shape != own[name].shape
    ]
    if missing or unexpected or shapes:
        problems = [
            f"{len(names)} {problem} (first: {', '.join(names[:3])})"
            for names, problem in ((missing, "missing"), (unexpected, "unexpected"), (shapes, "of another shape"))
            if names
        ]
        raise UserError(
            f"{source}: tensors that do not fit {model.config.name} with {model.config.num_classes} classes: "
            + "; ".join(problems),
            "a state dict of this architecture and class count",
            "choose the right architecture with --model",
        )
    model.load_state_dict(tensors, strict=False)


def metadata_of(config: ModelConfig, source: Path | None = None, assumed: tuple[str, ...] = ()) -> ModelMetadata:
    """Metadata of files exported from this model; `assumed` are fields that the imported weights did not state."""
    keypoints: dict[str, Any] = {}
    if config.has_keypoints:
        keypoints = {
            "keypoint_names": config.keypoint_names,
            "keypoint_skeleton": config.keypoint_skeleton,
            "keypoint_sigmas": config.keypoint_sigmas or sigmas_of(config.keypoint_names),
        }
    return ModelMetadata(
        model=config.name,
        class_names=config.class_names,
        category_ids=config.category_ids,
        preprocessing=config.preprocessing,
        detections=config.detections,
        has_masks=config.has_masks,
        **keypoints,
        anchor_sizes_px=config.anchor_sizes_px,
        anchor_aspect_ratios=config.anchor_aspect_ratios,
        score_threshold=config.score_threshold,
        nms_iou=config.nms_iou,
        recommended_threshold=config.recommended_threshold or None,
        assumed=assumed,
        source_sha256=sha256_of(source) if source else "",
        versions=versions(),
    )

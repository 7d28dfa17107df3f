"""Reading and writing weights.

A checkpoint is one safetensors file: the weights, and the model configuration as JSON in its header. No reader
unpickles arbitrary objects: `torch.load` is restricted to tensors, `read_model_zoo` to NumPy arrays.
"""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Callable
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
from maskrcnn.metadata import KEY, ModelMetadata, not_ours, sha256_of
from maskrcnn.model.detector import MaskRCNN
from maskrcnn.weights.detectron2 import PICKLE_SUFFIX, is_detectron2, read_model_zoo

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
    tensors, header = _read_safetensors(path)
    if header is None:
        raise not_ours(path, "safetensors without maskrcnn's header")
    return tensors, header


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
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
    except (safetensors.SafetensorError, OSError) as error:
        raise not_ours(path, f"not a checkpoint ({error})") from error


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
            "name one of those; a run is continued with `maskrcnn train --resume FOLDER`",
        )
    return from_dict(ModelConfig, config)


def load_weights(model: MaskRCNN, tensors: dict[str, Tensor], source: Path | str) -> None:
    """Load a state dict that must have the names and shapes of the model's own.

    Raises:
        UserError: naming the first tensors that are missing, unexpected, or of another shape.
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
            "name the right architecture with --model",
        )
    model.load_state_dict(tensors, strict=False)


def read_state_dict(path: Path) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """Read a state dict; older torchvision names are updated, Detectron2's are left as they are.

    Args:
        path: a `.safetensors` file, a `.pkl` file of Detectron2's model zoo, or a file of torch.save.

    Returns:
        the tensors, and maskrcnn's header if the file is a checkpoint.

    Raises:
        UserError: if the file is missing or contains anything but tensors.
    """
    if path.suffix == SUFFIX:
        tensors, header = _read_safetensors(path)
    else:
        tensors, header = read_model_zoo(path) if path.suffix == PICKLE_SUFFIX else _read_pickled(path), None
    if not is_detectron2(tensors):
        tensors = {_current_name(name): value for name, value in tensors.items()}
    return tensors, header


def _read_pickled(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a file of torch.save; nothing else is unpickled."""
    if not path.is_file():
        raise UserError(f"no file {path}", "a torchvision state dict", "check the path given with --weights")
    try:
        values = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise UserError(
            f"{path}: not a state dict of plain tensors ({str(error).splitlines()[0][:120]})",
            "a file written by torch.save(model.state_dict(), …)",
            "save the state dict alone, without optimizer or model objects",
        ) from error
    if isinstance(values, dict) and isinstance(values.get("model"), dict):
        values = values["model"]  # files of torchvision's reference scripts and of Detectron2
    if not isinstance(values, dict) or not all(isinstance(v, Tensor) for v in values.values()):
        raise UserError(
            f"{path}: a {type(values).__name__} that does not map names to tensors",
            "a state dict",
            "save it with torch.save(model.state_dict(), FILE)",
        )
    return values


# Former torchvision names and their replacements.
_RENAMED: tuple[tuple[re.Pattern[str], str | Callable[[re.Match[str]], str]], ...] = (
    (re.compile(r"(rpn\.head\.conv)\.(weight|bias)"), r"\1.0.0.\2"),
    (re.compile(r"(backbone\.fpn\.(?:inner|layer)_blocks\.\d+)\.(weight|bias)"), r"\1.0.\2"),
    (
        re.compile(r"roi_heads\.mask_head\.mask_fcn(\d+)\.(weight|bias)"),
        lambda found: f"roi_heads.mask_head.{int(found[1]) - 1}.0.{found[2]}",
    ),
)


def _current_name(name: str) -> str:
    """Current name of a tensor that torchvision has renamed."""
    for pattern, present in _RENAMED:
        if found := pattern.fullmatch(name):
            return present(found) if callable(present) else found.expand(present)
    return name


def metadata_of(config: ModelConfig, source: Path | None = None) -> ModelMetadata:
    """Metadata of files exported from this model."""
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
        source_sha256=sha256_of(source) if source else "",
        versions=versions(),
    )

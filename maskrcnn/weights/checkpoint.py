"""Reading and writing weights.

A checkpoint is one safetensors file: the weights, and in its header the model's configuration as JSON. Nothing
here unpickles arbitrary objects: torch's reader admits tensors alone, ours (`pickles.py`) NumPy arrays.
"""

from __future__ import annotations

import json
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
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
from maskrcnn.weights.detectron2 import is_detectron2
from maskrcnn.weights.pickles import SUFFIX as PICKLE_SUFFIX
from maskrcnn.weights.pickles import read_pickle

SUFFIX = ".safetensors"


def versions() -> dict[str, str]:
    """Versions of what decides the numbers."""
    return {"maskrcnn": __version__, "torch": torch.__version__, "torchvision": torchvision.__version__}


def write_tensors(path: Path, tensors: dict[str, Tensor], header: dict[str, Any]) -> None:
    """Writes tensors and a JSON header to `path`, all or nothing."""
    tensors = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    with atomic_path(path) as temporary:
        Path(temporary).write_bytes(save(tensors, metadata={KEY: json.dumps(header)}))


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the header that `write_tensors` wrote.

    Raises:
        UserError: when the file is missing, is not safetensors, or is not ours.
    """
    tensors, header = _read_safetensors(path)
    if header is None:
        raise not_ours(path, "safetensors without maskrcnn's header")
    return tensors, header


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """The tensors of any safetensors file, and our header where it has one.

    Raises:
        UserError: when the file is missing or not safetensors.
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
    """Writes a model's weights and configuration; `extra` is kept in the header."""
    header = {"config": to_dict(model.config), "versions": versions(), **extra}
    write_tensors(path, model.state_dict(), header)


def load_checkpoint(path: Path) -> MaskRCNN:
    """The model of a checkpoint, in evaluation mode on the CPU.

    Raises:
        UserError: when the file is no checkpoint of ours or its weights do not fit its configuration.
    """
    tensors, header = read_tensors(path)
    model = MaskRCNN(config_of(header, path))
    load_weights(model, tensors, path)
    return model.eval()


def config_of(header: dict[str, Any], path: Path) -> ModelConfig:
    """The configuration in a checkpoint's header.

    Raises:
        UserError: when the file is the state of a run, or of a version whose fields are not known.
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
    """Loads a state dict whose names and shapes must be the model's own.

    Raises:
        UserError: naming the first tensors that are missing, left over, or of another shape.
    """
    counter = "num_batches_tracked"  # frozen batch norm saves none, and nothing reads it
    own = model.state_dict()
    missing = sorted(name for name in set(own) - set(tensors) if not name.endswith(counter))
    left_over = sorted(name for name in set(tensors) - set(own) if not name.endswith(counter))
    shapes = [
        f"{name} {list(tensors[name].shape)} instead of {list(own[name].shape)}"
        for name in own
        if name in tensors and tensors[name].shape != own[name].shape
    ]
    if missing or left_over or shapes:
        problems = [
            f"{len(found)} {what} (first: {', '.join(found[:3])})"
            for found, what in ((missing, "missing"), (left_over, "left over"), (shapes, "of another shape"))
            if found
        ]
        raise UserError(
            f"{source}: tensors that do not fit {model.config.name} with {model.config.num_classes} classes: "
            + "; ".join(problems),
            "a state dict of this architecture and class count",
            "name the right architecture with --model",
        )
    model.load_state_dict(tensors, strict=False)


def read_state_dict(path: Path) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """A state dict from a file, with the older torchvision names brought up to date and Detectron2's as they are.

    Args:
        path: a `.safetensors` file, a `.pkl` file of NumPy arrays as Detectron2's model zoo has them, or what
            torch.save wrote.

    Returns:
        the tensors, and our header where the file is a checkpoint of ours.

    Raises:
        UserError: when the file is missing or holds anything but tensors.
    """
    if path.suffix == SUFFIX:
        tensors, header = _read_safetensors(path)
    else:
        tensors, header = _read_arrays(path) if path.suffix == PICKLE_SUFFIX else _read_pickled(path), None
    if not is_detectron2(tensors):
        tensors = {_current_name(name): value for name, value in tensors.items()}
    return tensors, header


def _read_pickled(path: Path) -> dict[str, Tensor]:
    """The tensors that torch.save wrote; nothing else is unpickled."""
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
        values = values["model"]  # torchvision's reference scripts and Detectron2 keep it there
    if not isinstance(values, dict) or not all(isinstance(v, Tensor) for v in values.values()):
        raise UserError(
            f"{path}: a {type(values).__name__} that is not names → tensors",
            "a state dict",
            "save it with torch.save(model.state_dict(), FILE)",
        )
    return values


def _read_arrays(path: Path) -> dict[str, Tensor]:
    """The arrays of a pickle of Detectron2's model zoo as tensors."""
    values = read_pickle(path)
    arrays = values.get("model") if isinstance(values, dict) else None
    if not isinstance(arrays, dict) or not all(_is_numeric(value) for value in arrays.values()):
        keys = f" with {', '.join(map(str, list(values)[:3]))}" if isinstance(values, dict) else ""
        raise UserError(
            f"{path}: a pickled {type(values).__name__}{keys}",
            "a dict whose entry 'model' holds names → arrays, as files of Detectron2's model zoo have it",
            "use a detector of Detectron2's model zoo; backbones alone and Detectron's first version are others",
        )
    return {name: torch.tensor(value) for name, value in arrays.items()}


def _is_numeric(value: Any) -> bool:
    return isinstance(value, (np.ndarray, np.number)) and value.dtype.kind in "fiu"


# Names that torchvision once gave, and their present form.
_RENAMED = (
    (re.compile(r"(rpn\.head\.conv)\.(weight|bias)"), r"\1.0.0.\2"),
    (re.compile(r"(backbone\.fpn\.(?:inner|layer)_blocks\.\d+)\.(weight|bias)"), r"\1.0.\2"),
    (
        re.compile(r"roi_heads\.mask_head\.mask_fcn(\d+)\.(weight|bias)"),
        lambda found: f"roi_heads.mask_head.{int(found[1]) - 1}.0.{found[2]}",
    ),
)


def _current_name(name: str) -> str:
    """The present name of a tensor that torchvision once called otherwise."""
    for pattern, present in _RENAMED:
        if found := pattern.fullmatch(name):
            return present(found) if callable(present) else found.expand(present)
    return name


def metadata_of(config: ModelConfig, source: Path | None = None) -> ModelMetadata:
    """The metadata that files made from this model carry."""
    return ModelMetadata(
        model=config.name,
        class_names=config.class_names,
        category_ids=config.category_ids,
        preprocessing=config.preprocessing,
        detections=config.detections,
        has_masks=config.has_masks,
        **_keypoint_metadata(config),
        source_sha256=sha256_of(source) if source else "",
        versions=versions(),
    )


def _keypoint_metadata(config: ModelConfig) -> dict[str, Any]:
    """What metadata say of keypoints; nothing of a model without a keypoint head."""
    if not config.has_keypoints:
        return {}
    return {
        "keypoint_names": config.keypoint_names,
        "keypoint_skeleton": config.keypoint_skeleton,
        "keypoint_sigmas": config.keypoint_sigmas or sigmas_of(config.keypoint_names),
    }

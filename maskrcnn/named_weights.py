"""Torchvision's weights by name: members of its enumerations, whose files torch.hub downloads once and keeps."""

from __future__ import annotations

import http.client
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import torch
import torchvision
from torchvision.models import WeightsEnum

from maskrcnn.config import ModelConfig
from maskrcnn.errors import UserError


def named_weights(name: str, config: ModelConfig | None) -> WeightsEnum:
    """The member of torchvision's enumerations that a name stands for.

    Args:
        name: of a member for the detector or the backbone (`COCO_V1`), or one in full.
        config: of the model that the weights are for.

    Raises:
        UserError: for an unknown name.
    """
    members: dict[str, WeightsEnum] = {}
    for architecture in (config.backbone, config.name) if config else ():
        if architecture in torchvision.models.list_models():  # of ours, some have no counterpart there
            members |= torchvision.models.get_model_weights(architecture).__members__
    if name in members:
        return members[name]
    try:
        return torchvision.models.get_weight(name)
    except (ValueError, KeyError) as error:
        raise UserError(
            f"weights {name!r}: no file, and no weights of torchvision's" + (f" for {config.name}" if config else ""),
            f"a file, or one of {', '.join(members)}" if members else "a file",
            "check the path or the name given with --weights",
        ) from error


def pixels_of(weights: WeightsEnum) -> dict[str, Any]:
    """Mean and deviation of the pixels that weights were trained on, where they are not the usual.

    `VGG16_Weights.IMAGENET1K_FEATURES`, which come from Caffe, are such.
    """
    given = getattr(weights.transforms, "keywords", {})
    return {name: tuple(given[name]) for name in ("mean", "std") if name in given}


def downloaded(weights: WeightsEnum) -> Path:
    """The file of torchvision's weights in torch.hub's folder, where it is downloaded to if need be.

    Raises:
        UserError: where it is not there and cannot be downloaded.
    """
    path = Path(torch.hub.get_dir()) / "checkpoints" / Path(urlparse(weights.url).path).name
    if not path.is_file():
        try:
            weights.get_state_dict(progress=True, check_hash=True, map_location="cpu", weights_only=True)
        except (OSError, http.client.HTTPException, RuntimeError) as error:  # RuntimeError: another hash
            raise UserError(
                f"{weights!r}: {weights.url} cannot be downloaded ({error})",
                f"the network, or that file as {path}",
                "download it elsewhere, and put it there or name it with --weights FILE",
            ) from error
    return path

"""Short runs of recipes: small images, narrow heads, and random weights instead of published weights."""

from pathlib import Path

import torch
import torchvision

from maskrcnn.config import model_config
from maskrcnn.model.detector import MaskRCNN
from maskrcnn.settings import read_settings, with_sections
from maskrcnn.weights.torchvision import coco_labels

BATCH, SIDE_PX = 2, 64
# Settings for the narrowest layers after the backbone.
NARROW = {
    "fpn_channels": 16,
    "box_head_channels": 16,
    "mask_head_channels": [16],
    "keypoint_head_channels": [16],
    "rpn_candidates_per_level": 30,
    "rpn_candidates_per_level_training": 30,
    "proposals": 20,
    "proposals_training": 30,
}
# Options of `maskrcnn train`.
SMALL = [
    *("--epochs", "1", "--batch-size", str(BATCH), "--min-size", str(SIDE_PX), "--max-size", str(SIDE_PX)),
    *("--workers", "0", "--pictures", "1", "--no-tensorboard", "--device", "cpu", "--precision", "fp32"),
    *("--set", f"augment.shorter_sides_px=[{SIDE_PX}]"),
    *(word for name, value in NARROW.items() for word in ("--set", f"model.{name}={value}")),
]


def settings_of(path: Path) -> tuple[dict, tuple[str, str]]:
    """The settings of a recipe, and the splits that it names."""
    settings = with_sections(read_settings(path))
    return settings, (settings.pop("train_split", "train"), settings.pop("val_split", "val"))


def put_weights(settings: dict, folder: Path) -> None:
    """Writes the weights that a recipe names to `folder`, or to torch.hub's download folder below it.

    Args:
        settings: settings of the recipe.
        folder: the working directory; the environment variable TORCH_HOME must be `folder / "torch"`.
    """
    spec, model = settings.get("weights", ""), settings["model"]["name"]
    backbone = model.split("_", 1)[1].split("_fpn")[0]
    if not spec:
        return
    if spec.endswith(".pth"):
        torch.save(_classifier(backbone).state_dict(), folder / spec)
        return
    is_detector = spec.startswith("COCO")
    url = torchvision.models.get_model_weights(model if is_detector else backbone)[spec].url
    path = folder / "torch" / "hub" / "checkpoints" / url.rsplit("/", 1)[1]
    path.parent.mkdir(parents=True)
    torch.save(_detector_state(model) if is_detector else _classifier(backbone).state_dict(), path)


def _classifier(name: str) -> torch.nn.Module:
    """A random classifier with features of about the same magnitude for any number of blocks."""
    if name.startswith("resnet"):
        return torchvision.models.get_model(name, weights=None, zero_init_residual=True)
    model = torchvision.models.get_model(name, weights=None)
    model.classifier = torch.nn.Identity()  # half a gigabyte that detectors do not use
    return model


def _detector_state(name: str) -> dict[str, torch.Tensor]:
    """A random narrow detector for COCO's 90 classes, with frozen batch norm, which has no `num_batches_tracked`."""
    classes = {"class_names": coco_labels(), "category_ids": tuple(range(1, 91))}
    narrow = {key: tuple(value) if isinstance(value, list) else value for key, value in NARROW.items()}
    state = MaskRCNN(model_config(name, **narrow, **classes)).state_dict()
    quiet = {key: torch.zeros_like(value) for key, value in state.items() if key.endswith("bn3.weight")}
    return {key: value for key, value in (state | quiet).items() if not key.endswith("num_batches_tracked")}

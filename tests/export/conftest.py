"""Exported files of other models, shared by the session."""

import functools
import pickle
from pathlib import Path

import onnx
import pytest
import torch
from tiny import TINY_POSE, lively_model, tiny_config
from variants import variant_model

from maskrcnn.export.exporter import export_onnx
from maskrcnn.model.detector import MaskRCNN
from maskrcnn.weights.checkpoint import load_weights, save_checkpoint


@pytest.fixture(scope="module")
def proto(onnx_file) -> onnx.ModelProto:
    return onnx.load(onnx_file)


@pytest.fixture(scope="session")
def exported_variant(shared):
    """Maps a name of `EXPORTED` to (model, file, difference between the two)."""

    @functools.cache
    def exported(name: str):
        def make(folder):
            difference = export_onnx(variant_model(name), folder / "model.onnx")
            (folder / "difference.pickle").write_bytes(pickle.dumps(difference))

        folder = shared(name, make)
        difference = pickle.loads((folder / "difference.pickle").read_bytes())
        return variant_model(name), folder / "model.onnx", difference

    return exported


@pytest.fixture(scope="session")
def pose_bands_file(shared) -> Path:
    """Export of a model of four bands with keypoints, without masks and with frozen norms, beside its checkpoint.

    One model has all of these, as each export takes half a minute.
    """

    def make(folder: Path) -> None:
        changes = {"channels": 4, "class_names": ("bright", "dark"), "category_ids": (1, 2), "has_masks": False}
        tensors = lively_model(tiny_config(**changes, **TINY_POSE)).state_dict()
        torch.manual_seed(0)
        for name, value in tensors.items():
            if "bn" in name and name.endswith("weight"):
                value.uniform_(0.9, 1.1)
            if "bn" in name and name.endswith("bias"):
                value.normal_(std=0.05)
        tensors["roi_heads.box_predictor.cls_score.weight"] /= 2  # scores of nearly 1 would tie
        model = MaskRCNN(tiny_config(frozen_batch_norm=True, **changes, **TINY_POSE))
        load_weights(model, tensors, "a lively model")
        save_checkpoint(folder / "best.safetensors", model)
        assert export_onnx(model, folder / "model.onnx", source=folder / "best.safetensors").detections > 10

    return shared("pose_bands", make) / "model.onnx"

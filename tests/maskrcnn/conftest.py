"""Narrow models, and a folder with a run."""

import shutil

import pytest
import torchvision
from tiny import narrow_model

from maskrcnn import runs


@pytest.fixture
def narrow_resnet(monkeypatch):
    """Models of ResNet-18 are narrow, so that training them and writing their state is fast."""
    monkeypatch.setattr(torchvision.models, "get_model", narrow_model)


@pytest.fixture
def road(tmp_path, checkpoint, onnx_file):
    """A run with a checkpoint and an exported file in the present folder."""
    folder = tmp_path / "runs" / "train-1"
    folder.mkdir(parents=True)
    shutil.copy(checkpoint, folder / runs.BEST)
    shutil.copy(onnx_file, folder / runs.ONNX)
    return folder

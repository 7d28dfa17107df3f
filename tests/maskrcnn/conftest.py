"""The command line in a folder of its own."""

import shutil
import sys

import pytest
import torchvision
from tiny import narrow_model

from maskrcnn import cli, runs


@pytest.fixture
def narrow_resnet(monkeypatch):
    """Models of ResNet-18 are narrow, so that training them and writing their state is fast."""
    monkeypatch.setattr(torchvision.models, "get_model", narrow_model)


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """Runs a command line in an empty folder; returns (exit code, standard output, standard error)."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["maskrcnn", *map(str, arguments)])
        monkeypatch.setattr(cli.console, "_file", None)
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            cli.main()
            raise SystemExit(0)
        out, err = capsys.readouterr()
        return stopped.value.code or 0, out, err

    return call


@pytest.fixture
def road(tmp_path, checkpoint, onnx_file):
    """A run with a checkpoint and an exported file in the present folder."""
    folder = tmp_path / "runs" / "train-1"
    folder.mkdir(parents=True)
    shutil.copy(checkpoint, folder / runs.BEST)
    shutil.copy(onnx_file, folder / runs.ONNX)
    return folder

"""A small detector and a small dataset, made once for all tests."""

from pathlib import Path

import kernels_on_cpu
import pytest
import torch
from tiny import TINY_V2, lively_model, tiny_config

from maskrcnn.checkpoint import save_checkpoint
from maskrcnn.data.shapes import generate_shapes
from maskrcnn.model.detector import MaskRCNN


@pytest.fixture(scope="session")
def model() -> MaskRCNN:
    return lively_model(tiny_config())


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory, model) -> Path:
    path = tmp_path_factory.mktemp("checkpoint") / "best.safetensors"
    save_checkpoint(path, model)
    return path


@pytest.fixture(scope="session")
def onnx_file(tmp_path_factory, checkpoint) -> Path:
    from maskrcnn.checkpoint import load_checkpoint
    from maskrcnn.export.exporter import export_onnx

    path = tmp_path_factory.mktemp("export") / "model.onnx"
    export_onnx(load_checkpoint(checkpoint), path, source=checkpoint)
    return path


@pytest.fixture(scope="session")
def boxes_model() -> MaskRCNN:
    """A Faster R-CNN, which has no masks."""
    return lively_model(tiny_config(has_masks=False))


@pytest.fixture(scope="session")
def boxes_onnx_file(tmp_path_factory, boxes_model) -> Path:
    """Its export, beside its checkpoint `best.safetensors`."""
    from maskrcnn.export.exporter import export_onnx

    folder = tmp_path_factory.mktemp("boxes")
    save_checkpoint(folder / "best.safetensors", boxes_model)
    export_onnx(boxes_model, folder / "model.onnx", source=folder / "best.safetensors")
    return folder / "model.onnx"


@pytest.fixture(scope="session")
def v2_model() -> MaskRCNN:
    """A model of version 2, with batch norm in its heads as it would be after training."""
    model = lively_model(tiny_config(**TINY_V2))
    with torch.no_grad():
        for norm in (m for m in model.roi_heads.modules() if isinstance(m, torch.nn.BatchNorm2d)):
            norm.running_mean.normal_(std=0.1)
            norm.running_var.uniform_(0.5, 2)
    return model


@pytest.fixture(scope="session")
def v2_onnx_file(tmp_path_factory, v2_model) -> Path:
    from maskrcnn.export.exporter import export_onnx

    path = tmp_path_factory.mktemp("v2") / "model.onnx"
    export_onnx(v2_model, path)
    return path


@pytest.fixture(scope="session")
def shapes(tmp_path_factory) -> Path:
    return generate_shapes(tmp_path_factory.mktemp("data") / "shapes", train_images=12, val_images=6, size_px=96)


@pytest.fixture(scope="session")
def kernels_for_cpu(tmp_path_factory) -> Path:
    """The library of the CUDA kernels, compiled for the CPU."""
    if kernels_on_cpu.compiler() is None:
        pytest.skip("no C++ compiler")
    return kernels_on_cpu.build(tmp_path_factory.mktemp("kernels"))

"""Models of four bands and of 12 bits, the same in every backend."""

import numpy as np
import onnx
import pytest
import torch
from bands import write_band_dataset
from tiny import lively_model, tiny_config

from maskrcnn.api.serving import triton
from maskrcnn.data.coco import CocoDataset
from maskrcnn.export.exporter import export_onnx
from maskrcnn.export.tensorrt.flavour import tensorrt_flavour
from maskrcnn.export.tensorrt.lint import lint
from maskrcnn.export.variants import write_half
from maskrcnn.imaging.preprocess import Preprocessing
from maskrcnn.model.backbone import inflated
from maskrcnn.model.detector import MaskRCNN
from maskrcnn.runtime import Detector
from maskrcnn.runtime.evaluation.evaluate import detect_records
from maskrcnn.runtime.verification.compare import HALF
from maskrcnn.weights.checkpoint import save_checkpoint
from maskrcnn.weights.finetuning import finetuning_tensors
from maskrcnn.weights.torchvision import starting_weights


@pytest.fixture(scope="module", params=["four-bands", pytest.param("12-bit", marks=pytest.mark.slow)])
def exported(request, tmp_path_factory):
    """A dataset, and a checkpoint and an ONNX file for it."""
    root = write_band_dataset(tmp_path_factory.mktemp(request.param) / "data", request.param, {"val": 4})
    if request.param == "four-bands":
        path = request.getfixturevalue("pose_bands_file")
    else:
        pixels = Preprocessing(min_size_px=96, max_size_px=160, pixel_range=(0, 4095))
        model = lively_model(tiny_config(preprocessing=pixels, class_names=("bright", "dark"), category_ids=(1, 2)))
        path = root / "model.onnx"
        save_checkpoint(path.with_name("best.safetensors"), model)
        assert export_onnx(model, path, source=path.with_name("best.safetensors")).detections > 10
    return CocoDataset.load(root, "val"), path.with_name("best.safetensors"), path


def test_every_backend_reads_and_detects_the_same(exported):
    dataset, checkpoint, model = exported
    found = {}
    for path, backend in ((checkpoint, "torch"), (model, "onnxruntime"), (model, "openvino")):
        detector = Detector.load(path, backend)
        assert detector.preprocessing == Detector.load(checkpoint).preprocessing
        found[backend], _ = detect_records(detector, dataset.images)
        assert not detector.notes.counts
    reference = [(entry["image_id"], entry["category_id"]) for entry in found["torch"]]
    assert len(reference) > 10
    for results in found.values():
        assert [(entry["image_id"], entry["category_id"]) for entry in results] == reference
        np.testing.assert_allclose(
            [entry["bbox"] for entry in results], [entry["bbox"] for entry in found["torch"]], atol=0.05
        )


def test_half_precision_and_tensorrt_take_the_channels(exported, tmp_path):
    _, _, model = exported
    _, difference = write_half(model, tmp_path / "half.onnx", "fp16")
    assert difference.within(HALF)
    assert lint(tensorrt_flavour(onnx.load(model))).errors == []


def test_a_triton_repository_has_the_channels(exported, tmp_path):
    _, _, model = exported
    triton(model, tmp_path / "models", name="bands")
    channels = Detector.load(model).preprocessing.channels
    for part in ("bands_network", "bands_pre"):
        text = (tmp_path / "models" / part / "config.pbtxt").read_text()
        assert f"dims: [ {channels}, -1, -1 ]" in text.replace("[", "[ ").replace("]", " ]").replace("  ", " ")


def test_inflated_weights_keep_the_response_to_grey():
    weight = torch.randn(8, 3, 7, 7, generator=torch.Generator().manual_seed(0))
    for channels in (1, 2, 4, 12):
        other = inflated(weight, channels)
        assert other.shape == (8, channels, 7, 7)
        torch.testing.assert_close(other.sum(dim=1), weight.sum(dim=1))
    torch.testing.assert_close(inflated(weight, 4)[:, :3], weight * 0.75)


def test_weights_of_rgb_start_a_model_of_four_bands(checkpoint):
    model = MaskRCNN(tiny_config(channels=4))
    tensors, changes = finetuning_tensors(model, starting_weights(str(checkpoint)))
    model.load_state_dict(tensors)
    assert "adapted to 4 channels" in "\n".join(changes.lines())
    assert model.backbone.body["conv1"].weight.shape[1] == 4

"""One exported file per architecture agrees with PyTorch for every batch size, shape and kind of image.

The session's exported files are used, with another last layer: unmodified, a tiny model fills every output. The full
matrix, with models of real size, is in test_matrix_full.py.
"""

import copy

import export_matrix
import onnx
import pytest
from export_matrix import (
    Kind,
    Result,
    cells,
    for_pixels_of,
    tell_kinds_apart,
)
from tiny import tiny_config

from maskrcnn.export.exporter import export_onnx
from maskrcnn.model.detector import MaskRCNN
from maskrcnn.runtime.backends.onnxruntime import OnnxRuntimeBackend
from maskrcnn.runtime.backends.torch import TorchBackend
from maskrcnn.runtime.verification.compare import EXACT
from maskrcnn.weights.checkpoint import load_weights
from maskrcnn.weights.detectron2 import CONVENTIONS

SIZES_HW = ((96, 128), (224, 128), (64, 1344))  # a small image, a portrait, and one with a long side
FITTED = tuple(f"roi_heads.box_predictor.cls_score.{part}" for part in ("weight", "bias"))


@pytest.fixture(scope="session")
def detectron2_model(model) -> MaskRCNN:
    """The tiny model with Detectron2's conventions, the first layer scaled to its pixels."""
    found = MaskRCNN(tiny_config(**CONVENTIONS))
    load_weights(found, for_pixels_of(found.config, model.state_dict()), "the tiny model")
    return found.eval()


@pytest.fixture(scope="session")
def detectron2_onnx_file(tmp_path_factory, detectron2_model):
    path = tmp_path_factory.mktemp("detectron2") / "model.onnx"
    export_onnx(detectron2_model, path)
    return path


def with_last_layer(path, model, output):
    """Copy an exported file with the last layer of `model`."""
    proto, weights = onnx.load(path), model.state_dict()
    found = {tensor.name: tensor for tensor in proto.graph.initializer if tensor.name in FITTED}
    assert set(found) == set(FITTED)
    for name, tensor in found.items():
        assert list(tensor.dims) == list(weights[name].shape)
        tensor.CopyFrom(onnx.numpy_helper.from_array(weights[name].numpy(), name))
    onnx.save(proto, output)
    return output


VARIANTS = ("resnet_panet_pool", "mobilenet_bifpn_crop")


@pytest.fixture(
    params=[
        pytest.param("joint_", id="keypoints"),  # which has every head; the others in fewer cells: test_exporter.py
        pytest.param("", id="v1", marks=pytest.mark.slow),
        *(
            pytest.param(name, id=name.rstrip("_"), marks=pytest.mark.slow)
            for name in ("v2_", "boxes_", "detectron2_", *VARIANTS)
        ),
    ],
)
def model_and_file(request):
    """A tiny model of each architecture and its exported file."""
    if request.param in VARIANTS:
        return request.getfixturevalue("exported_variant")(request.param)[:2]
    return tuple(request.getfixturevalue(f"{request.param}{kind}") for kind in ("model", "onnx_file"))


def test_every_cell_agrees(model_and_file, tmp_path):
    model = copy.deepcopy(model_and_file[0])
    tell_kinds_apart(model.eval(), SIZES_HW, images=2)
    path = with_last_layer(model_and_file[1], model, tmp_path / "model.onnx")
    exported = OnnxRuntimeBackend(path, providers=["CPUExecutionProvider"], threads=1)
    results = export_matrix.compare_model("m", TorchBackend(model, device="cpu"), exported, cells((1, 2, 5), SIZES_HW))
    assert len(results) == 27
    assert {str(result.cell): str(result.difference) for result in results if not within(result)} == {}
    # There are outputs of every kind, whatever so small a model finds in an image.
    assert sum(result.full for result in results) > 0
    assert sum(result.partly for result in results) > 0
    empty = [result.difference for result in results if result.cell.kind is Kind.EMPTY]
    assert sum(difference.images_without_detections for difference in empty) >= 12  # each slot


def within(result: Result) -> bool:
    return result.difference.within(EXACT)

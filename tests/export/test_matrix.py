"""One file of each architecture agrees with PyTorch for every batch size, shape and kind of image.

The session's exported files are used, with another last layer: as it is made, a tiny model fills every output.
"""

import copy

import matrix
import onnx
import pytest
from matrix_cells import cells
from matrix_models import for_pixels_of, tell_kinds_apart
from matrix_report import summary, table
from tiny import tiny_config

from maskrcnn.checkpoint import load_weights
from maskrcnn.detectron2 import CONVENTIONS
from maskrcnn.export.exporter import export_onnx
from maskrcnn.model.detector import MaskRCNN
from maskrcnn.runtime.compare import EXACT
from maskrcnn.runtime.onnxruntime_backend import OnnxRuntimeBackend
from maskrcnn.runtime.torch_backend import TorchBackend

SIZES_HW = ((96, 128), (224, 128), (64, 1344))  # all smaller than 200 px on one side; portrait; one long side
TAUGHT = tuple(f"roi_heads.box_predictor.cls_score.{part}" for part in ("weight", "bias"))


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
    """A copy of an exported file, in which the classes' scores are those of `model`."""
    proto, weights = onnx.load(path), model.state_dict()
    found = {tensor.name: tensor for tensor in proto.graph.initializer if tensor.name in TAUGHT}
    assert set(found) == set(TAUGHT)
    for name, tensor in found.items():
        assert list(tensor.dims) == list(weights[name].shape)
        tensor.CopyFrom(onnx.numpy_helper.from_array(weights[name].numpy(), name))
    onnx.save(proto, output)
    return output


@pytest.mark.parametrize("name", ["", "v2_", "boxes_", "detectron2_"], ids=["v1", "v2", "boxes", "detectron2"])
def test_every_cell_agrees(name, request, tmp_path):
    model = copy.deepcopy(request.getfixturevalue(f"{name}model"))
    tell_kinds_apart(model.eval(), SIZES_HW)
    path = with_last_layer(request.getfixturevalue(f"{name}onnx_file"), model, tmp_path / "model.onnx")
    backends = TorchBackend(model, device="cpu"), OnnxRuntimeBackend(path, providers=["CPUExecutionProvider"])
    results = matrix.compare_model(name, *backends, cells((1, 2, 5), SIZES_HW))
    assert len(results) == 27
    for result in results:
        assert result.difference.within(EXACT), f"{result.cell}: {result.difference}"
    ordinary, empty, crowded = summary(results)
    print(table([ordinary, empty, crowded]))

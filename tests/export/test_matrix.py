"""One exported file per architecture agrees with PyTorch for every batch size, shape and kind of image.

The session's exported files are used, with another last layer: unmodified, a tiny model fills every output. The full
matrix, with models of real size, is in test_matrix_full.py.
"""

import copy
import json
import re

import export_matrix
import numpy as np
import onnx
import pytest
from export_matrix import (
    Cell,
    Kind,
    Result,
    cell_feeds,
    cells,
    compare_cell,
    draw_image,
    for_pixels_of,
    matrix_model,
    needed_share,
    summary,
    table,
    tell_kinds_apart,
    variant_config,
)
from tiny import lively_model, tiny_config

from maskrcnn.config import NECKS, POOL_METHODS
from maskrcnn.errors import UserError
from maskrcnn.export.exporter import export_onnx
from maskrcnn.model.detector import MaskRCNN
from maskrcnn.runtime.backends.onnxruntime import OnnxRuntimeBackend
from maskrcnn.runtime.backends.torch import TorchBackend
from maskrcnn.runtime.verification.compare import EXACT, Difference
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


# The inputs


@pytest.mark.parametrize("kind", Kind)
@pytest.mark.parametrize("batch", [1, 2, 5])
def test_a_cells_batches_have_its_size(kind, batch):
    feeds = list(cell_feeds(Cell(kind, batch, (64, 96))))
    assert len(feeds) == (2 if kind is Kind.EMPTY and batch == 1 else 1)
    for one in feeds:
        assert one["images"].shape == (batch, 3, 64, 96) and one["images"].dtype == np.float32
        assert one["image_sizes"].shape == (batch, 2)
        for image, (height, width) in zip(one["images"], one["image_sizes"], strict=True):
            assert not image[:, height:].any() and not image[:, :, width:].any()  # padding


def test_empty_cells_have_grey_images_and_empty_slots():
    for batch in (1, 2, 5):
        feeds = list(cell_feeds(Cell(Kind.EMPTY, batch, (64, 96))))
        sizes = [tuple(size) for one in feeds for size in one["image_sizes"].tolist()]
        assert {(0, 0), (64, 96)} == set(sizes)
        assert set(np.unique(np.concatenate([one["images"] for one in feeds]))) == {0, 128}


def test_cells_of_other_batch_sizes_have_other_images_and_crowds_have_more_edges():
    first, second, third = (
        next(cell_feeds(Cell(Kind.ORDINARY, batch, (160, 192))))["images"].tobytes() for batch in (1, 2, 5)
    )
    assert first not in second and second not in third
    edges = {
        kind: np.mean([np.abs(np.diff(draw_image(kind, (160, 192), k).astype(int), axis=1)).mean() for k in range(4)])
        for kind in Kind
    }
    assert edges[Kind.EMPTY] == 0 < edges[Kind.ORDINARY] < edges[Kind.CROWDED]


# The table


def result(kind=Kind.ORDINARY, batch=1, full=0, partly=1, **changes) -> Result:
    values = {"images": 1, "detections": 3, "box_px": 0.1, "score": 1e-4, "mask": 1e-3, "mask_mean": 1e-4}
    values |= {"unpaired": 0, "departing": 0, "images_without_detections": 0}
    difference = Difference(**values | changes)
    return Result(model="m", cell=Cell(kind, batch, (64, 96)), difference=difference, full=full, partly=partly)


def test_a_row_has_the_largest_differences_and_names_the_worst_cell():
    (row,) = summary([result(score=1e-3), result(batch=2, box_px=0.4), result(batch=5)])
    assert (row.difference.box_px, row.difference.score, row.difference.detections) == (0.4, 1e-3, 9)
    assert str(row.worst.cell) == "N=2, 64×96"
    assert row.status == "ok" and row.cells == 3
    assert "| N=2, 64×96 | ok" in table([row]) and "4.0e-01" in table([row])


@pytest.mark.parametrize("change", [{"box_px": 0.6, "departing": 1}, {"unpaired": 1}, {"score": float("nan")}])
def test_one_cell_beyond_the_tolerance_spoils_its_row(change):
    (row,) = summary([result(), result(batch=2, **change), result(batch=5)])
    assert row.status == "1 of 3 cells beyond the tolerance"
    assert str(row.worst.cell) == "N=2, 64×96"
    assert needed_share(row.difference) > 1
    assert all(value == value for value in row.to_dict().values())  # no NaN: JSON has none


def test_a_row_without_outputs_of_its_kind_proves_nothing():
    rows = summary(
        [
            result(partly=0, detections=0, images_without_detections=1),
            result(Kind.EMPTY),
            result(Kind.CROWDED, full=0),
        ]
    )
    assert [row.status for row in rows] == ["no output that is partly full", "no empty output", "no full output"]


def test_another_model_is_beyond_the_tolerance(model):
    other = TorchBackend(lively_model(model.config, seed=1), device="cpu")
    found = compare_cell("m", TorchBackend(model, device="cpu"), other, Cell(Kind.CROWDED, 2, (96, 128)))
    assert found.full == 2 and not within(found)
    assert summary([found])[0].status == "1 of 1 cells beyond the tolerance"


# The command


def test_the_command_writes_rows_cells_and_machine(tmp_path, monkeypatch, capsys):
    found = [result(), result(Kind.EMPTY, images_without_detections=1), result(Kind.CROWDED, full=1)]
    monkeypatch.setattr(export_matrix, "export_and_compare", lambda extent, progress: found)
    assert export_matrix.main(["--quick", "--model", "maskrcnn_resnet34_fpn", "--json", str(tmp_path / "m.json")]) == 0
    content = json.loads((tmp_path / "m.json").read_text(encoding="utf-8"))
    assert [extent["model"] for extent in content["models"]] == ["maskrcnn_resnet34_fpn"]
    assert [row["kind"] for row in content["rows"]] == ["ordinary", "empty", "crowded"]
    assert len(content["cells"]) == 3 and content["environment"]["versions"]["torch"]
    assert "| crowded" in capsys.readouterr().out


def test_the_exit_code_tells_of_a_cell_beyond_and_of_a_model_that_cannot_be_exported(monkeypatch, capsys):
    monkeypatch.setattr(export_matrix, "export_and_compare", lambda extent, progress: [result(unpaired=1)])
    assert export_matrix.main(["--quick"]) == 1

    def refused(extent, progress):
        raise UserError("weights with NaN", "finite weights", "train again")

    monkeypatch.setattr(export_matrix, "export_and_compare", refused)
    assert export_matrix.main(["--quick"]) == 1
    assert "fasterrcnn_resnet18_fpn could not be exported: weights with NaN" in capsys.readouterr().out


def test_a_wrong_model_is_refused_before_anything_is_computed():
    for wrong in ("maskrcnn_resnet19_fpn", "maskrcnn_resnet18_fpn:panet+warp"):
        with pytest.raises(UserError, match=re.escape(f"model '{wrong}'")):
            export_matrix.main(["--model", "maskrcnn_resnet18_fpn", "--model", wrong])


def test_the_whole_matrix_has_every_architecture():
    configs = [variant_config(extent.model) for extent in export_matrix.FULL]
    traits = {(c.has_masks, c.head_batch_norm, c.pool_aligned, c.backbone) for c in configs}
    assert {trait[:2] for trait in traits} == {(True, False), (True, True), (False, False), (False, True)}
    assert (True, False, True, "resnet50") in traits and (True, False, False, "resnet50") in traits
    assert {c.neck for c in configs} == set(NECKS) and {c.pool_method for c in configs} == set(POOL_METHODS)
    for extent in export_matrix.FULL:
        assert extent.batches == (1, 2, 5)
        assert any(max(size) < 200 for size in extent.sizes_hw) and any(1344 in size for size in extent.sizes_hw)
        assert {height < width for height, width in extent.sizes_hw} == {True, False}


@pytest.mark.parametrize(
    ("variant", "fields"),
    [
        pytest.param("detectron2", {"pool_aligned": True}, marks=pytest.mark.slow),
        ("bifpn+crop", {"neck": "bifpn", "pool_method": "crop"}),
    ],
)
def test_a_model_of_the_matrix_is_made_from_its_name(variant, fields):
    found = matrix_model(f"maskrcnn_resnet18_fpn_small:{variant}", [(64, 96)], proposals=50)
    assert {name: getattr(found.config, name) for name in fields} == fields
    assert found.config.proposals == 50 and not found.training
    reference = TorchBackend(found, device="cpu")
    slots = compare_cell("m", reference, reference, Cell(Kind.EMPTY, 2, (64, 96)))
    assert slots.difference.images_without_detections == 2  # even grey is background to it
    assert compare_cell("m", reference, reference, Cell(Kind.CROWDED, 1, (64, 96))).difference.detections > 0

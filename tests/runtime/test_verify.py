"""Comparing stage by stage: correct models agree, and each planted fault is found at its stage."""

import dataclasses
import json
import math

import faults
import numpy as np
import onnx
import pytest

from maskrcnn.data.shapes import shapes_image
from maskrcnn.errors import UserError
from maskrcnn.export.passes.precision import to_half
from maskrcnn.imaging.preprocess import RESIZES, Preprocessing
from maskrcnn.runtime.backends.base import Backend, stages_of
from maskrcnn.runtime.detector import load_backend
from maskrcnn.runtime.verification.inputs import Batch, drawn_batches, feedings
from maskrcnn.runtime.verification.report import Verdict
from maskrcnn.runtime.verification.verify import JUDGED, check_comparable, verify
from maskrcnn.stages import LEVELS, OF_KEYPOINTS, OF_MASKS

CPU = {"providers": ["CPUExecutionProvider"]}
STAGES_OF_MASKS = [stage for stage in JUDGED if stage not in OF_KEYPOINTS]  # of a model with masks alone


@pytest.fixture(scope="module")
def reference(checkpoint):
    return load_backend(checkpoint, device="cpu")


@pytest.fixture
def planted(tmp_path, onnx_file):
    """Makes a backend of the exported file with faults."""

    def load(*changes):
        return load_backend(faults.plant(onnx_file, tmp_path / "planted.onnx", *changes), **CPU)

    return load


def one_image() -> list[Batch]:
    return [Batch(("shapes",), (shapes_image(np.random.default_rng(5), (120, 150))[0],))]


def test_an_exported_file_agrees_in_every_stage(reference, onnx_file):
    report = verify(reference, load_backend(onnx_file, **CPU), drawn_batches())
    assert report.ok and report.first_departure is None, report.table()
    assert report.tolerances == "exact"
    assert [result.stage for result in report.stages] == STAGES_OF_MASKS
    assert all(result.verdict is Verdict.AGREES and result.compared for result in report.stages), report.table()
    assert report.images == ("shapes 1", "shapes 2", "shapes 3", "empty slot", "grey")
    # Of an image that is all padding, only the padding is compared.
    empty = report.images.index("empty slot")
    compared = {result.stage for result in report.stages if result.per_image[empty] is not None}
    assert compared == {"normalised"}


@pytest.mark.parametrize("half", [False, True])
def test_an_engine_agrees_by_the_tolerances_of_its_precision(request, reference, half):
    engine = request.getfixturevalue("half_openvino_engine" if half else "openvino_engine")
    report = verify(reference, load_backend(engine), drawn_batches())
    assert report.ok, report.table()
    assert report.tolerances == ("half" if half else "exact")
    assert all(result.compared for result in report.stages)
    if half:  # the precision really is lower
        assert report.result("P2").needed > 1e-5


def test_a_half_precision_graph_agrees(tmp_path, reference, onnx_file):
    model, _ = to_half(onnx.load(onnx_file))
    faults.metadata(precision="fp16")(model)
    onnx.save(model, tmp_path / "half.onnx")
    report = verify(reference, load_backend(tmp_path / "half.onnx", **CPU), drawn_batches())
    assert report.ok and report.tolerances == "half", report.table()
    assert all(result.compared for result in report.stages)
    assert 1e-5 < report.result("P2").needed < 0.02


def test_a_bfloat16_graph_is_compared_in_bfloat16(run, tmp_path, onnx_file):
    """OpenVINO runs it, and shows bfloat16 as float16 of the same bits."""
    model, _ = to_half(onnx.load(onnx_file), "bf16")
    faults.metadata(precision="bf16")(model)
    onnx.save(model, tmp_path / "bf16.onnx")
    _, out, err = run("verify", onnx_file, "bf16.onnx", "--json", "found.json")
    assert not err and "OpenVINO bf16" in out
    found = json.loads((tmp_path / "found.json").read_text())
    needed = {stage["stage"]: stage["needed"] for stage in found["stages"]}
    assert 1e-5 < needed["P2"] < 0.1 and found["tolerances"] == "half", out


def test_a_model_without_masks_has_no_stages_of_masks(boxes_model, boxes_onnx_file):
    reference = load_backend(boxes_onnx_file.with_name("best.safetensors"), device="cpu")
    report = verify(reference, load_backend(boxes_onnx_file, **CPU), one_image())
    assert report.ok, report.table()
    assert not {result.stage for result in report.stages} & set(OF_MASKS)


@pytest.mark.parametrize(
    ("change", "first"),
    [
        (faults.preprocessing(channel_order="BGR"), "images"),
        (faults.wrong_mean, "normalised"),
        (faults.swapped_channels, "P2"),
        (faults.nms_threshold(0, 0.3), "proposals"),
        (faults.shifted_roi_align, "box_features"),
        (faults.bias_of("cls_score", 1, 0.5), "class_logits"),
        (faults.bias_of("box_predictor.bbox_pred", 5, 0.5), "box_deltas"),
        (faults.nms_threshold(1, 0.1), "boxes"),
        (faults.transposed("mask_logits"), "mask_logits"),
        (faults.transposed("masks"), "masks"),
    ],
)
def test_a_planted_fault_is_found_at_its_stage(reference, planted, change, first):
    report = verify(reference, planted(change), drawn_batches())
    assert report.first_departure == first, report.table()
    assert not report.ok
    assert report.conclusion().startswith(f"first departure: {first}, most on ")


def test_a_fault_in_the_heads_does_not_affect_earlier_stages(reference, planted):
    report = verify(reference, planted(faults.transposed("mask_logits")), one_image())
    departing = [result.stage for result in report.stages if result.verdict is Verdict.DEPARTS]
    assert departing == ["mask_logits", "masks"]


def test_rows_after_a_fault_are_compared_where_boxes_agree(reference, planted):
    report = verify(reference, planted(faults.nms_threshold(0, 0.6)), drawn_batches())
    assert report.first_departure == "proposals"
    assert "without a partner" in report.result("proposals").note
    for stage in ("box_features", "class_logits", "box_deltas"):
        assert report.result(stage).verdict is Verdict.AGREES, report.table()
        assert report.result(stage).compared > 20


def test_another_resize_rule_departs_only_at_the_images(reference, planted):
    report = verify(reference, planted(faults.preprocessing(min_size_px=64)), one_image())
    departing = [result.stage for result in report.stages if result.verdict is Verdict.DEPARTS]
    assert departing == ["images"]
    assert report.result("images").note == "3×64×80 instead of 3×96×120"
    assert "reference's size" in " ".join(report.notes)


def test_another_rounding_of_sides_has_the_same_shared_size():
    floored, rounded = (Preprocessing(min_size_px=96, max_size_px=160, resize=name) for name in RESIZES)
    image = np.zeros((100, 135, 3), np.uint8)
    pair = feedings(floored, rounded)
    assert [feeding.own_feeds([image])["image_sizes"].tolist() for feeding in pair] == [[[96, 129]], [[96, 130]]]
    assert [feeding.shared_feeds([image])["image_sizes"].tolist() for feeding in pair] == [[[96, 129]]] * 2


def test_a_size_replaces_both_resize_rules(reference, planted):
    report = verify(reference, planted(faults.preprocessing(min_size_px=64)), one_image(), size_px=32)
    assert report.ok, report.table()
    assert report.result("images").compared == 3 * 32 * 40


def test_files_without_stage_names_are_compared_by_their_outputs(reference, planted):
    report = verify(reference, planted(faults.nameless), one_image())
    assert report.ok
    assert report.result("boxes").verdict is Verdict.AGREES
    skipped = [result for result in report.stages if result.verdict is Verdict.NOT_COMPARED]
    compared = {"images", "boxes", "scores", "labels", "masks"}
    assert {result.stage for result in skipped} == set(STAGES_OF_MASKS) - compared
    assert skipped[0].note == "no such name in the other"
    assert report.conclusion().endswith(f"; {len(skipped)} not compared")
    assert "the other has no stage names" in " ".join(report.notes)


def test_images_without_detections_are_no_departure(planted):
    silent = faults.bias_of("cls_score", 0, 1e3)
    report = verify(planted(silent), planted(silent), one_image())
    assert report.ok
    assert report.result("boxes").verdict is Verdict.NOT_COMPARED
    assert "nothing was detected on any image" in " ".join(report.notes)
    assert report.result("class_logits").verdict is Verdict.AGREES


def test_detections_on_one_side_only_depart(reference, planted):
    report = verify(reference, planted(faults.bias_of("cls_score", 0, 1e3)), one_image())
    assert report.result("boxes").verdict is Verdict.DEPARTS
    assert report.result("boxes").needed == math.inf
    json.dumps(report.to_dict(), allow_nan=False)


def test_nan_departs_and_is_written_as_text(reference, planted):
    report = verify(reference, planted(faults.bias_of("mask_fcn_logits", slice(None), np.nan)), one_image())
    assert report.first_departure == "mask_logits"
    assert math.isnan(report.result("mask_logits").needed)
    (row,) = [row for row in report.to_dict()["stages"] if row["stage"] == "mask_logits"]
    assert row["needed"] == "nan" and row["per_image"] == ["nan"]


def test_the_worst_image_is_kept_as_evidence(reference, planted):
    report = verify(reference, planted(faults.swapped_channels), drawn_batches())
    worst = report.worst
    assert worst.name == report.images[report.result("P2").worst_image]
    assert tuple(worst.maps) == LEVELS
    assert worst.maps["P2"].mean() > 0.01
    assert all(found.size_hw == worst.image.shape[:2] for found in worst.detections)


def test_models_of_different_tasks_are_refused(reference):
    metadata = reference.metadata
    with pytest.raises(UserError, match="of 3 and of 2 classes"):
        check_comparable(metadata, dataclasses.replace(metadata, class_names=("a", "b"), category_ids=(1, 2)))
    with pytest.raises(UserError, match="with masks and one without"):
        check_comparable(metadata, dataclasses.replace(metadata, has_masks=False))
    with pytest.raises(UserError, match="no images"):
        verify(reference, reference, [])


def test_a_backend_without_stages_is_an_error(reference):
    class Opaque(Backend):
        name, metadata = "Opaque", reference.metadata

        def describe(self):
            return reference.describe()

        def infer(self, feeds):
            return reference.infer(feeds)

    with pytest.raises(UserError, match="a model in Opaque"):
        stages_of(Opaque(), {}, ["P2"])


# The command


def test_the_command_succeeds_on_images_of_a_folder(run, onnx_file, shapes):
    options = ("--images", shapes / "val", "--max-images", 2, "--json", "found.json", "--report", "found.html")
    code, out, err = run("verify", onnx_file, onnx_file, *options)
    assert code == 0, err
    assert "stages agree within 'exact'; boxes differ by ≤ 0 px; scores differ by ≤ 0" in out
    assert "verdict" not in out  # the table is for --verbose, and for models that differ
    with open("found.json") as file:
        found = json.load(file)
    assert found["ok"] is True and found["first_departure"] is None
    assert found["reference"] == str(onnx_file)
    assert len(found["images"]) == 2 and found["images"][0].endswith(".png")
    assert {"stage", "verdict", "needed", "tolerance", "per_image"} <= found["stages"][0].keys()


def test_the_command_fails_where_a_stage_departs_and_writes_both_reports(run, tmp_path, onnx_file):
    faults.plant(onnx_file, tmp_path / "bad.onnx", faults.shifted_roi_align)
    code, out, err = run("verify", onnx_file, "bad.onnx", "--json", "found.json", "--report", "found.html")
    assert code == 1 and not err
    assert "first departure: box_features" in out and "half" not in out.split("first departure")[0]
    assert json.loads((tmp_path / "found.json").read_text())["first_departure"] == "box_features"
    page = (tmp_path / "found.html").read_text()
    assert page.count("data:image/png;base64,") == 2 + len(LEVELS)
    assert "http" not in page and "RoIAlign 7 × 7" in page


def test_the_command_takes_other_tolerances(run, tmp_path, onnx_file):
    faults.plant(onnx_file, tmp_path / "near.onnx", faults.bias_of("mask_fcn_logits", slice(None), 0.02))
    assert run("verify", onnx_file, "near.onnx")[0] == 1
    assert run("verify", onnx_file, "near.onnx", "--tolerance", "int8")[0] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("missing.onnx",), "no file missing.onnx"),
        (("ONNX", "--images", "empty"), "empty: no image in it"),
        (("ONNX", "--images", "nowhere"), "no file or folder nowhere"),
        (("BOXES",), "with masks and one without"),
    ],
)
def test_models_that_cannot_be_compared_are_an_error(run, tmp_path, onnx_file, boxes_onnx_file, arguments, message):
    (tmp_path / "empty").mkdir()
    paths = {"ONNX": onnx_file, "BOXES": boxes_onnx_file}
    code, _, err = run("verify", onnx_file, *(paths.get(argument, argument) for argument in arguments))
    assert code == 1
    assert err.startswith("Error: ") and message in err

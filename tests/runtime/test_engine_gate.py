"""The comparison of an engine with its ONNX file, and the differences that are accepted."""

import dataclasses
from pathlib import Path

import numpy as np
import onnx
import pytest
from command_line import MessageLog

from maskrcnn.api.progress import Progress
from maskrcnn.errors import UserError
from maskrcnn.runtime.backends.onnxruntime import OnnxRuntimeBackend
from maskrcnn.runtime.build.gate import MAX_AP_LOSS, PaddedBackend, check_gate_images, gate, padded_feeds
from maskrcnn.runtime.build.profiles import parse_profiles
from maskrcnn.runtime.build.refit import refit_tensorrt_engine
from maskrcnn.runtime.build.request import BuildRequest, Comparison
from maskrcnn.runtime.build.tensorrt import build_tensorrt_engine
from maskrcnn.runtime.engine_files import STAGE_PREFIX, staged_graph
from maskrcnn.runtime.verification.compare import EXACT, HALF, TOLERANCES, Difference
from maskrcnn.runtime.verification.inputs import batches_of_shapes
from maskrcnn.stages import OF_KEYPOINTS, STAGES

FINE = Difference(
    images=4,
    detections=10,
    box_px=0.01,
    score=0.001,
    mask=0.01,
    mask_mean=0.001,
    unpaired=0,
    departing=0,
    images_without_detections=0,
)


@pytest.fixture(scope="module")
def backend(onnx_file):
    return OnnxRuntimeBackend(onnx_file, providers=["CPUExecutionProvider"], threads=1)


def request_of(model, **options):
    values = {"graph": model, "output": model.with_suffix(".engine"), "precision": "fp16", **options}
    return BuildRequest(model=model, **values)


@pytest.fixture
def profiles(backend):
    return parse_profiles("3", "128x160", backend.metadata.preprocessing)


def test_drawn_batches_have_the_requested_shapes_small_images_and_an_empty_slot():
    one, two, three = batches_of_shapes([(1, 64, 96), (2, 32, 32), (3, 96, 64)])
    assert one["images"].shape == (1, 3, 64, 96) and one["image_sizes"].tolist() == [[64, 96]]
    assert two["image_sizes"].tolist() == [[32, 32], [24, 22]]
    assert three["image_sizes"].tolist() == [[96, 64], [72, 43], [0, 0]]
    assert three["images"][0].any() and not three["images"][2].any()
    assert not three["images"][1, :, 72:].any() and not three["images"][1, :, :, 43:].any()


def test_padding_does_not_change_what_is_detected(backend, profiles):
    (feeds,) = batches_of_shapes([(2, 96, 128)])
    fitted = PaddedBackend(backend, profiles)(feeds)
    padded = np.pad(feeds["images"], [(0, 0), (0, 0), (0, 32), (0, 32)])
    plain = backend({"images": padded, "image_sizes": feeds["image_sizes"]})
    assert plain["num_detections"].sum() > 0
    for name, value in plain.items():
        np.testing.assert_allclose(fitted[name], value, atol=1e-3, err_msg=name)


def test_one_by_one_gives_the_same(backend, profiles):
    (feeds,) = batches_of_shapes([(3, 128, 160)])
    together, single = (PaddedBackend(backend, profiles, one_by_one=alone)(feeds) for alone in (False, True))
    for name, value in together.items():
        np.testing.assert_allclose(single[name], value, atol=1e-3, err_msg=name)


def test_a_batch_that_fits_is_not_copied_and_a_larger_one_is_rejected(profiles):
    (feeds,) = batches_of_shapes([(3, 128, 160)])
    assert padded_feeds(feeds, profiles) is feeds
    (large,) = batches_of_shapes([(1, 160, 160)])
    with pytest.raises(UserError, match=r"a batch of 1 image\(s\) of 160×160"):
        padded_feeds(large, profiles)


def test_stages_are_padded_like_the_outputs(backend, profiles):
    (feeds,) = batches_of_shapes([(1, 96, 128)])
    stages = PaddedBackend(backend, profiles).stages(feeds, ("normalised", "P2", "proposals"))
    assert stages["normalised"].shape == (1, 3, 128, 160) and stages["P2"].shape[:1] == (1,)


def test_the_onnx_file_itself_is_accepted_in_every_precision(backend, onnx_file, profiles):
    for precision in TOLERANCES:
        result = gate(backend, request_of(onnx_file, precision=precision), profiles, Progress())
        assert result.accepted and result.difference.images == 3 and result.difference.box_px < 1e-2
        assert result.expected() == str(TOLERANCES[precision])


def test_a_comparison_without_detections_says_so(backend, onnx_file, profiles, monkeypatch):
    def nothing(self, feeds):
        return {name: np.zeros_like(value) for name, value in infer(self, feeds).items()}

    infer, log = OnnxRuntimeBackend.infer, MessageLog()
    gate(backend, request_of(onnx_file), profiles, log)
    assert log.lines == []
    monkeypatch.setattr(OnnxRuntimeBackend, "infer", nothing)
    gate(backend, request_of(onnx_file), profiles, log)
    assert len(log.lines) == 1 and "no detection in the 3 images compared" in log.lines[0]


def test_ap_may_fall_a_little_and_rise_by_any_amount():
    def result(reference, engine):
        ap = {"box_ap": (0.5, 0.5), "mask_ap": (reference, engine)}
        return Comparison(difference=FINE, tolerance=HALF, ap=ap, max_ap_loss=MAX_AP_LOSS["fp16"])

    assert result(0.4, 0.396).accepted and result(0.4, 0.9).accepted
    refused = result(0.4, 0.394)
    assert not refused.accepted
    assert "mask_ap 0.3940, ONNX file 0.4000" in str(refused) and "AP at most 0.005 lower" in refused.expected()


def test_a_difference_beyond_the_tolerance_is_rejected_regardless_of_the_ap():
    far = dataclasses.replace(FINE, box_px=1.0, departing=1)
    assert not Comparison(difference=far, tolerance=EXACT, max_ap_loss=1.0).accepted


def test_annotations_need_their_images():
    with pytest.raises(UserError, match=r"--gate-annotations gt\.json without --gate-images"):
        request_of(Path("model.onnx"), gate_annotations=Path("gt.json"))


def test_unreadable_images_and_annotations_are_found_before_a_build(tmp_path, shapes):
    model, val = tmp_path / "model.onnx", shapes / "val"
    check_gate_images(
        request_of(model, gate_images=val, gate_annotations=shapes / "annotations" / "instances_val.json")
    )
    for options, text in (
        ({"gate_images": tmp_path}, "no image in it"),
        ({"gate_images": val, "gate_annotations": tmp_path / "gt.json"}, "gt.json"),
    ):
        request = request_of(model, **options)
        with pytest.raises(UserError, match=text):  # before the model is read
            build_tensorrt_engine(request, Progress())
        with pytest.raises(UserError, match=text):
            refit_tensorrt_engine(tmp_path / "m.engine", request, Progress())


def test_stages_become_outputs_in_float32(graphs):
    graph = Path(graphs["graph"]).read_bytes()
    staged, shown = staged_graph(graph, STAGES)
    before, after = (onnx.load_from_string(each) for each in (graph, staged))
    assert {stage for stage in STAGES if f"{STAGE_PREFIX}{stage}" in shown} | {"boxes", "masks"} <= set(shown.values())
    assert set(STAGES) - set(shown.values()) == set(OF_KEYPOINTS)
    added = after.graph.output[len(before.graph.output) :]
    assert {value.name for value in added} == {name for name in shown if name.startswith(STAGE_PREFIX)}
    assert {value.type.tensor_type.elem_type for value in added} == {onnx.TensorProto.FLOAT}
    half = {value.name: value.type.tensor_type.elem_type for value in before.graph.value_info}
    assert half["P2"] == onnx.TensorProto.FLOAT16  # so the cast matters

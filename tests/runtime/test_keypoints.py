"""Keypoints in every backend against PyTorch, stage by stage, and in half precision."""

import dataclasses
import math

import faults
import numpy as np
import onnx
import pytest
import torch
from tiny import TINY_POSE, lively_model, tiny_config

from maskrcnn.errors import UserError
from maskrcnn.model.roi_heads import keypoints_from_heatmaps
from maskrcnn.runtime.backends.openvino import OpenVinoBackend
from maskrcnn.runtime.backends.torch import TorchBackend
from maskrcnn.runtime.build.openvino import build_openvino_engine
from maskrcnn.runtime.detector import Detector, load_backend
from maskrcnn.runtime.verification.compare import (
    EXACT,
    HALF,
    KeypointTolerance,
    compare_keypoints,
    compare_outputs,
    merge_keypoints,
)
from maskrcnn.runtime.verification.inputs import compare_backends, drawn_batches, validation_batches
from maskrcnn.runtime.verification.report import Verdict
from maskrcnn.runtime.verification.stage_errors import Side, image_errors
from maskrcnn.runtime.verification.tolerances import EXACT_STAGES
from maskrcnn.runtime.verification.verify import JUDGED, check_comparable, verify
from maskrcnn.stages import OF_KEYPOINTS, OF_MASKS

CPU = {"providers": ["CPUExecutionProvider"]}
LIMIT = KeypointTolerance(px=1.0, score=0.1, share=0.25)


@pytest.fixture(scope="module")
def reference(joint_onnx_file):
    return load_backend(joint_onnx_file.with_name("best.safetensors"), device="cpu")


@pytest.fixture(scope="module")
def half_engine(tmp_path_factory, joint_onnx_file):
    path = tmp_path_factory.mktemp("half") / "model.fp16.xml"
    build_openvino_engine(joint_onnx_file, path, half=True)
    return path


# Every backend


def test_onnx_runtime_and_openvino_agree_with_pytorch(reference, joint_onnx_file):
    for backend in (load_backend(joint_onnx_file, **CPU), OpenVinoBackend(joint_onnx_file)):
        assert list(backend.describe()[1])[-2:] == ["masks", "keypoints"]
        difference = compare_backends(reference, backend, EXACT)
        assert difference.within(EXACT) and difference.keypoints.compared > 100, str(difference)
        assert difference.keypoints.beyond == 0


def test_a_detector_gives_keypoints_in_pixels_of_the_image(joint_onnx_file, reference):
    images = [image for batch in drawn_batches() for image in batch.images if image.size]
    for found, wanted in zip(
        Detector.load(joint_onnx_file, "onnxruntime", **CPU).detect(images),
        Detector(reference).detect(images),
        strict=True,
    ):
        assert found.keypoints.shape == (len(found), 5, 3) and found.keypoints.dtype == np.float32
        inside = np.concatenate([found.boxes_xyxy_px[:, None, :2], found.boxes_xyxy_px[:, None, 2:]], axis=1)
        assert (found.keypoints[..., :2] >= inside[:, :1] - 1e-3).all()
        assert (found.keypoints[..., :2] <= inside[:, 1:] + 1.01).all()  # a box is searched in whole pixels
        assert len(found) == len(wanted)


def test_an_engine_in_half_precision_searches_heat_maps_in_float32(half_engine):
    """Both sides search the engine's own maps, so that only the search can differ."""
    engine = load_backend(half_engine)
    distances = []
    for feeds in validation_batches(32):
        found = engine.stages(feeds, ("keypoint_logits", "boxes", "num_detections", "keypoints"))
        rows = found["keypoint_logits"].shape[1]
        logits, boxes = (torch.from_numpy(found[name][:, :rows]) for name in ("keypoint_logits", "boxes"))
        wanted = keypoints_from_heatmaps(logits.float(), boxes).numpy()
        for n, count in enumerate(found["num_detections"]):
            distances.append(np.abs(wanted[n, :count] - found["keypoints"][n, :count])[..., :2].max(axis=-1).ravel())
    distances = np.concatenate(distances)
    assert len(distances) > 100
    # Positions in bfloat16 would be off by tenths of a pixel nearly everywhere.
    assert (distances < 1e-3).mean() > 0.97
    assert engine.metadata.has_keypoints


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_pytorch_in_half_precision_searches_heat_maps_in_float32(reference, joint_onnx_file, precision):
    half = load_backend(joint_onnx_file.with_name("best.safetensors"), device="cpu", precision=precision)
    difference = compare_backends(reference, half, HALF)
    assert difference.within(HALF) and difference.keypoints.compared > 50, str(difference)
    for feeds in validation_batches(32):
        found = half.stages(feeds, ("keypoint_logits", "boxes", "num_detections", "keypoints"))
        logits, rows = torch.from_numpy(found["keypoint_logits"]), found["keypoint_logits"].shape[1]
        wanted = keypoints_from_heatmaps(logits, torch.from_numpy(found["boxes"][:, :rows])).numpy()
        for n, count in enumerate(found["num_detections"]):
            np.testing.assert_array_equal(found["keypoints"][n, :count], wanted[n, :count])


def test_half_precision_finds_nearly_the_same(reference, half_engine):
    difference = compare_backends(reference, load_backend(half_engine), HALF)
    assert difference.within(HALF) and difference.keypoints.compared > 50, str(difference)
    assert difference.keypoints.largest_px > 0  # the arithmetic differs


# Verification


def test_an_exported_file_agrees_in_every_stage(reference, joint_onnx_file):
    report = verify(reference, load_backend(joint_onnx_file, **CPU), drawn_batches())
    assert report.ok, report.table()
    assert [result.stage for result in report.stages] == list(JUDGED)
    assert all(result.verdict is Verdict.AGREES and result.compared for result in report.stages), report.table()
    # Keypoints are counted one by one.
    assert report.result("keypoints").compared == 5 * report.result("masks").compared


def test_an_engine_agrees_by_the_tolerances_of_its_precision(reference, half_engine):
    report = verify(reference, load_backend(half_engine), drawn_batches())
    assert report.ok and report.tolerances == "half", report.table()
    # Features pooled by both heads are one tensor, which an engine returns under the first of its names.
    assert [report.result(stage).compared > 0 for stage in OF_KEYPOINTS] == [False, True, True], report.table()
    assert report.result("mask_features").compared


def exchanged(model: onnx.ModelProto) -> None:
    """x and y of keypoints change places."""
    _behind(model, "keypoints", "Gather", [np.array([1, 0, 2])], axis=3)


def half_a_pixel_off(model: onnx.ModelProto) -> None:
    _behind(model, "keypoints", "Add", [np.array([0.5, 0.5, 0], np.float32)])


def other_order(model: onnx.ModelProto) -> None:
    """The second and the third keypoint change places."""
    _behind(model, "keypoint_logits", "Gather", [np.array([0, 2, 1, 3, 4])], axis=2)


def _behind(model: onnx.ModelProto, name: str, op: str, constants: list[np.ndarray], **attributes) -> None:
    (node,) = [node for node in model.graph.node if name in node.output]
    node.output[list(node.output).index(name)] = f"{name}_sound"
    names = [f"{name}_fault_{k}" for k in range(len(constants))]
    tensors = [onnx.numpy_helper.from_array(value, own) for value, own in zip(constants, names, strict=True)]
    model.graph.initializer.extend(tensors)
    made = onnx.helper.make_node(op, [f"{name}_sound", *names], [name], **attributes)
    model.graph.node.insert(list(model.graph.node).index(node) + 1, made)


@pytest.mark.parametrize(
    ("change", "departing"),
    [
        (exchanged, ["keypoints"]),
        (half_a_pixel_off, ["keypoints"]),
        (other_order, ["keypoint_logits", "keypoints"]),
    ],
)
def test_a_planted_fault_is_found_where_it_is(tmp_path, reference, joint_onnx_file, change, departing):
    planted = load_backend(faults.plant(joint_onnx_file, tmp_path / "planted.onnx", change), **CPU)
    report = verify(reference, planted, drawn_batches())
    assert [r.stage for r in report.stages if r.verdict is Verdict.DEPARTS] == departing, report.table()
    assert report.conclusion().startswith(f"first departure: {departing[0]}")
    if change is not half_a_pixel_off:  # within the tolerance of a comparison of files
        assert not compare_backends(reference, planted, EXACT).within(EXACT)


def test_models_of_other_keypoints_are_not_compared(joint_model, reference):
    metadata = reference.metadata
    with pytest.raises(UserError, match="models of 5 and of 4 keypoints"):
        check_comparable(metadata, dataclasses.replace(metadata, keypoint_names=metadata.keypoint_names[:4]))
    with pytest.raises(UserError, match="models of 5 and of 0 keypoints"):
        check_comparable(metadata, dataclasses.replace(metadata, keypoint_names=()))


def test_a_model_of_keypoints_alone_has_no_stages_of_masks():
    backend = TorchBackend(lively_model(tiny_config(has_masks=False, **TINY_POSE)), device="cpu")
    stages = {result.stage for result in verify(backend, backend, drawn_batches()).stages}
    assert stages >= set(OF_KEYPOINTS) and not stages & set(OF_MASKS)


# Comparison


def points(*rows) -> np.ndarray:
    return np.array(rows, np.float32)[None]


def test_a_share_of_keypoints_may_lie_elsewhere_but_never_be_nan():
    sound = points(*[(10 * k, 5, 3) for k in range(8)])
    moved = sound.copy()
    moved[0, :2, 0] += 40
    found = compare_keypoints(sound, moved, LIMIT)
    assert (found.compared, found.beyond, found.px, found.largest_px) == (8, 2, 0, 40)
    assert found.within(LIMIT) and not found.within(dataclasses.replace(LIMIT, share=0.1))
    moved[0, 2, 1] -= 2
    assert not compare_keypoints(sound, moved, LIMIT).within(LIMIT)
    for place in (0, 2):
        bad = sound.copy()
        bad[0, 0, place] = math.nan
        assert not compare_keypoints(sound, bad, LIMIT).within(LIMIT)


def test_scores_are_compared_relative_to_the_reference():
    sound = points((0, 0, 20), (0, 0, -0.1))
    other = points((0, 0, 21.9), (0, 0, -0.19))
    found = compare_keypoints(sound, other, LIMIT)
    assert found.beyond == 0 and found.score == pytest.approx(0.095, rel=1e-4)
    assert compare_keypoints(sound, points((0, 0, 22.1), (0, 0, -0.1)), LIMIT).beyond == 1
    assert not found.within(dataclasses.replace(LIMIT, score=0.05))  # compared with a wider one


def test_differences_of_several_batches_add_up():
    parts = [compare_keypoints(points((0, 0, 1)), points((d, 0, 1)), LIMIT) for d in (0.5, 3.0)]
    found = merge_keypoints([*parts, None])
    assert (found.compared, found.beyond, found.px, found.largest_px) == (2, 1, 0.5, 3.0)
    assert merge_keypoints([None, None]) is None
    nothing = compare_keypoints(np.zeros((0, 5, 3)), np.zeros((0, 5, 3)), LIMIT)
    assert nothing.compared == 0 and nothing.within(LIMIT)


def outputs_with(keypoints: np.ndarray) -> dict[str, np.ndarray]:
    """Two detections far from one another, in three rows."""
    boxes = np.array([[[0, 0, 20, 40], [50, 50, 90, 90], [0, 0, 0, 0]]], np.float32)
    return {
        "num_detections": np.array([2], np.int32),
        "boxes": boxes,
        "scores": np.array([[0.9, 0.8, 0]], np.float32),
        "labels": np.array([[1, 1, 0]]),
        "keypoints": keypoints,
    }


def test_keypoints_are_compared_pair_by_pair_whatever_the_order():
    keypoints = np.array([[[[5, 5, 3], [6, 30, 2]], [[60, 60, 4], [80, 81, 5]], [[0, 0, 0], [0, 0, 0]]]], np.float32)
    first = outputs_with(keypoints)
    mixed = {name: value if value.ndim == 1 else value[:, [1, 0, 2]] for name, value in first.items()}
    found = compare_outputs(first, mixed, EXACT)
    assert found.within(EXACT) and (found.keypoints.compared, found.keypoints.largest_px) == (4, 0)
    wrong = {**first, "keypoints": keypoints[:, [1, 0, 2]]}
    assert not compare_outputs(first, wrong, EXACT).within(EXACT)
    with pytest.raises(UserError, match=r"expected: .*'keypoints'"):
        compare_outputs(first, {name: value for name, value in first.items() if name != "keypoints"}, EXACT)
    side, other = (Side({}, each, dict(each)) for each in (first, wrong))
    error = image_errors(side, other, 0, EXACT_STAGES)["keypoints"]
    assert error.compared == 4 and error.largest == 74
    np.testing.assert_allclose(error.values.max(), 74 / math.sqrt(20 * 40))

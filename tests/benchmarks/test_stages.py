"""Time of a model by stage."""

import numpy as np
import onnxruntime
import pytest
import stages

from maskrcnn.errors import UserError


@pytest.mark.parametrize(
    ("name", "operator", "stage"),
    [
        ("backbone.body.layer1.0.conv2", "Conv", "backbone"),
        ("fused backbone.fpn.layer_blocks.0.0", "FusedConv", "FPN"),
        ("rpn.head.cls_logits#3/WithoutBiases", "Convolution", "RPN head"),
        ("roi_heads.mask_predictor.conv5_mask", "ConvTranspose", "mask head"),
        ("roi_heads.keypoint_predictor.kps_score_lowres", "ConvTranspose", "keypoint head"),
        ("pooled_0__2", "ROIAlign", "RoIAlign"),
        ("node_topk__1", "TopK", "TopK and NMS"),
        ("node_mul_7", "Mul", stages.REST),
    ],
)
def test_nodes_belong_to_stages(name, operator, stage):
    assert stages.stage_of(name, operator) == stage


def test_every_runtime_splits_a_call(onnx_file, openvino_engine):
    images = stages.images_of_size((96, 128), None, None)[0]
    for path in (onnx_file, openvino_engine):
        split = stages.split_of(path, images[:2], repeat=2)
        layers = ("backbone", "FPN", "RPN head", "box head", "mask head", "RoIAlign", "TopK and NMS", stages.REST)
        assert set(split.stages_ms) == {*layers, *stages.OUTSIDE}
        assert all(split.stages_ms[stage] > 0 for stage in layers), split
        assert split.model in stages.table([split]) and split.total_ms > 0


def test_the_timed_call_and_the_profile_use_the_same_provider(onnx_file, monkeypatch):
    calls, sessions = [], []
    load, session = stages.Detector.load, onnxruntime.InferenceSession
    monkeypatch.setattr(
        stages.Detector, "load", lambda *given, **options: calls.append(options) or load(*given, **options)
    )
    monkeypatch.setattr(
        onnxruntime,
        "InferenceSession",
        lambda *given, providers, **more: (
            sessions.append([each if isinstance(each, str) else each[0] for each in providers])
            or session(*given, providers=providers, **more)
        ),
    )
    stages.split_of(onnx_file, [np.zeros((64, 64, 3), np.uint8)], repeat=1)
    assert calls == [{"provider": "cpu"}]  # not the fastest one available
    assert sessions == [["CPUExecutionProvider"]] * 2


@pytest.mark.parametrize(
    ("provider", "why"),
    [("cuda", "not how long the GPU took"), ("tensorrt", "one node"), ("rocm", "provider 'rocm'")],
)
def test_providers_without_a_profile_are_refused_before_loading(onnx_file, monkeypatch, provider, why):
    monkeypatch.setattr(stages.Detector, "load", lambda *given, **options: pytest.fail("it was opened"))
    with pytest.raises(UserError, match=why):
        stages.main([str(onnx_file), "--size", "64x64", "--provider", provider])


def test_a_stage_missing_in_one_file_takes_no_time():
    splits = [stages.Split("a", "b", 3.0, {"FPN": 1.0, head: 1.0}) for head in ("mask head", "keypoint head")]
    lines = stages.table(splits).splitlines()
    assert [line.split(" | ")[0] for line in lines[2:5]] == ["| FPN", "| mask head", "| keypoint head"]
    assert lines[3].endswith("| 1.0 ms, 50% | 0.0 ms, 0% |")


def test_a_checkpoint_has_no_profile(checkpoint):
    with pytest.raises(UserError, match="PyTorch has no profile"):
        stages.split_of(checkpoint, [np.zeros((64, 64, 3), np.uint8)], repeat=1)


def test_the_model_is_not_replaced_by_the_results(onnx_file, monkeypatch):
    monkeypatch.setattr(stages.Detector, "load", lambda *given, **options: pytest.fail("it was opened"))
    with pytest.raises(UserError, match="a file that the command reads"):
        stages.main([str(onnx_file), "--size", "64x64", "--json", str(onnx_file)])

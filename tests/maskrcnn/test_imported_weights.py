"""Weights of torchvision models with settings of their own: what is asked for, said and checked."""

import copy
import re
from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from command_line import MessageLog, expect_error
from peers import calibrate
from tiny import TINY_POSE, lively_model, tiny_config
from torchvision.models.detection import MaskRCNN as TorchvisionMaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor

from maskrcnn.api.export import export
from maskrcnn.config import MODELS, model_config
from maskrcnn.data.shapes import shapes_image
from maskrcnn.errors import UserError
from maskrcnn.export import exporter, variants
from maskrcnn.imaging.preprocess import PRESETS, Preprocessing
from maskrcnn.model.detector import MaskRCNN
from maskrcnn.runtime import Detector
from maskrcnn.runtime.backends.onnxruntime import OnnxRuntimeBackend
from maskrcnn.runtime.backends.torch import TorchBackend
from maskrcnn.runtime.verification.compare import EXACT, pair_boxes
from maskrcnn.runtime.verification.inputs import compare_backends
from maskrcnn.runtime.verification.verify import with_stages
from maskrcnn.weights.checkpoint import load_checkpoint, save_checkpoint
from maskrcnn.weights.foreign import architecture_of, fields_of
from maskrcnn.weights.torchvision import continued_model, load_detector

SIZES = ((8,), (16,), (32,), (64,), (128,))


@pytest.fixture(scope="module")
def images() -> list[np.ndarray]:
    rng = np.random.default_rng(1)
    return [shapes_image(rng, size)[0] for size in ((120, 160), (97, 131))]


@pytest.fixture(scope="module")
def theirs(images) -> TorchvisionMaskRCNN:
    """A model of torchvision with anchors, sizes, thresholds and a mask head of its own."""
    torch.manual_seed(0)
    body = resnet_fpn_backbone(backbone_name="resnet18", weights=None, norm_layer=torch.nn.BatchNorm2d)
    model = TorchvisionMaskRCNN(
        body,
        min_size=96,
        max_size=120,
        rpn_anchor_generator=AnchorGenerator(SIZES, ((0.5, 1.0, 2.0),) * 5),
        box_score_thresh=0.15,
        box_nms_thresh=0.4,
        box_detections_per_img=30,
        rpn_pre_nms_top_n_test=100,
        rpn_post_nms_top_n_test=100,
        box_head=TwoMLPHead(256 * 49, 64),
        box_predictor=FastRCNNPredictor(64, 4),
        mask_head=MaskRCNNHeads(256, (32,), 1),
        mask_predictor=MaskRCNNPredictor(32, 32, 4),
    )
    calibrate(model, images)
    return model.eval()


@pytest.fixture(scope="module")
def weights_file(theirs, tmp_path_factory):
    """Its checkpoint, as a training script on several GPUs saves it."""
    path = tmp_path_factory.mktemp("theirs") / "model_25.pth"
    wrapped = {f"module.{name}": value for name, value in theirs.state_dict().items()}
    torch.save({"model": wrapped, "optimizer": {"state": {}}, "epoch": 25}, path)
    return path


OPTIONS = ("--min-size", 96, "--max-size", 120, "--anchor-sizes", "8,16,32,64,128", "--class-names", "a,b,c")
PROPOSALS = ("model.proposals=100", "model.rpn_candidates_per_level=100")
THRESHOLDS = ("model.score_threshold=0.15", "model.nms_iou=0.4", "model.detections=30", *PROPOSALS)


def test_with_its_settings_the_file_detects_what_torchvision_does(run, theirs, weights_file, images, tmp_path):
    sets = [word for setting in THRESHOLDS for word in ("--set", setting)]
    code, out, err = run("export", "--onnx", "--weights", weights_file, *OPTIONS, *sets, "--output", "m.onnx")
    assert code == 0, err
    assert "model_25.pth: took the entry 'model'; left out optimizer, epoch" in out
    assert "stripped module. from" in out
    said = next(line for line in out.splitlines() if line.startswith("assumed"))
    assert "pixels RGB, mean 0.485, 0.456, 0.406" in said and "ratios 0.5, 1, 2" in said
    assert "images" not in said and "classes" not in said and "threshold" not in said
    detector = Detector.load(tmp_path / "m.onnx")
    for image, found in zip(images, detector.detect(images), strict=True):
        with torch.no_grad():
            expected = theirs([torch.from_numpy(image).permute(2, 0, 1).float() / 255])[0]
        assert len(found) == len(expected["boxes"]) > 5
        pairs = pair_boxes(found.boxes_xyxy_px, expected["boxes"].numpy(), 0.5)
        assert len(pairs.unpaired_first) == 0
        np.testing.assert_allclose(
            found.boxes_xyxy_px[pairs.first], expected["boxes"].numpy()[pairs.second], rtol=0, atol=0.05
        )
    metadata = detector.metadata
    assert metadata.class_names == ("a", "b", "c") and metadata.score_threshold == 0.15
    assert metadata.anchor_sizes_px == (8, 16, 32, 64, 128)
    assert "preprocessing.mean" in metadata.assumed and "anchor_sizes_px" not in metadata.assumed
    code, out, _ = run("inspect", "m.onnx")
    assert "anchors: 8, 16, 32, 64, 128 px, ratios 0.5, 1, 2; score threshold 0.15, NMS IoU 0.4" in out
    assert "assumed (not stated in the weights): anchor_aspect_ratios, preprocessing.channel_order" in out
    code, out, _ = run("verify", "m.onnx", "m.onnx")
    assert code == 0 and "the weights of the reference do not record anchor_aspect_ratios" in out


def test_what_the_file_cannot_tell_is_said_with_how_to_change_it(weights_file):
    lines = load_detector(weights_file).messages()
    assert "maskrcnn_resnet18_fpn: 3 classes, batch norm epsilon 1e-05" in lines
    assert lines[-1] == (
        "assumed, the file does not state it: anchors 32, 64, 128, 256, 512 px, ratios 0.5, 1, 2; images 800/1333 px; "
        "pixels RGB, mean 0.485, 0.456, 0.406, std 0.229, 0.224, 0.225; score threshold 0.05; NMS IoU 0.5; "
        "100 detections; classes class_1 … class_3; change with --anchor-sizes, --min-size, --max-size, "
        "--class-names, --set model.FIELD=VALUE"
    )


def test_a_checkpoint_of_this_package_leaves_nothing_to_assume(checkpoint):
    loaded = load_detector(checkpoint, settings={"detections": 5, "preprocessing": {"min_size_px": 64}})
    assert loaded.assumed == () and not any("assumed" in line for line in loaded.messages())
    config, saved = loaded.model.config, load_checkpoint(checkpoint).config
    assert (config.detections, config.preprocessing.min_size_px) == (5, 64)
    assert (config.anchor_sizes_px, config.preprocessing.max_size_px) == (saved.anchor_sizes_px, 160)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"anchor_aspect_ratios": (0.5, 2.0)}, r"3 anchors in each cell, and a model with 2.*0\.5, 2\.0"),
        ({"class_names": ("a", "b")}, "weights of 3 classes, and 2 class names"),
        ({"mask_head_channels": (256, 256)}, r"1 missing|2 missing \(first: roi_heads\.mask_head\.1"),
        ({"anchor_sizes_px": (8, 16)}, "5 values, one for each"),
        ({"anchor_size": 3}, r"unknown field\(s\) anchor_size"),
    ],
)
def test_settings_that_the_tensors_contradict_are_refused(weights_file, settings, words):
    with pytest.raises(UserError, match=words):
        load_detector(weights_file, settings=settings)


def test_keypoint_names_are_as_many_as_the_heat_maps(tmp_path):
    save_checkpoint(tmp_path / "w.safetensors", MaskRCNN(tiny_config(**TINY_POSE)))
    other = {"keypoint_names": ("a", "b"), "keypoint_skeleton": (), "keypoint_sigmas": ()}
    with pytest.raises(UserError, match="weights of 5 keypoints, and 2 keypoint names"):
        load_detector(tmp_path / "w.safetensors", settings=other)


def test_class_names_come_from_a_list_or_a_file_with_or_without_background(run, weights_file, tmp_path):
    (tmp_path / "names.txt").write_text("\ufeff__background__\ncat\r\nhot dog\n\nüx\n", encoding="utf-8")
    assert (
        load_detector(weights_file, settings={"class_names": ("background", "a", "b", "c")}).model.config.num_classes
        == 3
    )
    command = ("export", "--onnx", "--weights", weights_file, "--output", "m.onnx", "--class-names")
    expect_error(run(*command, "a,b,c,d"), "weights of 3 classes, and 4 class names", "--class-names FILE")
    expect_error(run(*command, "gone.txt"), "no file gone.txt")
    (tmp_path / "bad.txt").write_bytes(b"\xff\xfe\x00")
    expect_error(run(*command, "bad.txt"), "bad.txt", "UTF-8")


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (("runs/train-1/model.onnx", "--min-size", 64, "--precision", "fp16"), ("in which they are fixed",)),
        (("runs/train-1/model.onnx", "--class-names", "a", "--precision", "fp16"), ("(class_names)",)),
        (("--set", "epochs=3"), ("--set epochs", "--set model.FIELD=VALUE")),
        (("--max-unmatched", 2), ("--max-unmatched 2", "from 0 to 1")),
        (("--detectron2-config", "config.yaml"), ("--detectron2-config without --weights",)),
        (("--weights", "runs/train-1/best.safetensors", "--detectron2-config", "c.yaml"), ("weights of Detectron2",)),
    ],
)
def test_options_that_contradict(run, road, arguments, parts):
    expect_error(run("export", "--onnx", *arguments), *parts)


def test_architectures_are_told_by_their_tensors():
    for name in MODELS:
        config = model_config(name, class_names=("a",))
        with torch.device("meta"):
            tensors = MaskRCNN(config).state_dict()
        is_told = re.search(r"resne(x)?t", name) and not name.endswith("_small")
        assert architecture_of(tensors) == (name if is_told else architecture_of(tensors)), name
        assert all(getattr(config, field) == value for field, value in fields_of(tensors).items()), name


# Starting a training

CROP = {"pool_method": "crop", "pool_aligned": True, "detections": 7}
CAFFE = Preprocessing(**PRESETS["caffe"], min_size_px=96, max_size_px=160)


@pytest.mark.usefixtures("narrow_resnet")
def test_settings_replace_single_fields_of_the_checkpoint_that_training_starts_from(run, shapes, tmp_path):
    saved = tiny_config(**CROP, preprocessing=CAFFE)
    save_checkpoint(tmp_path / "w.safetensors", lively_model(saved))
    words = (
        "--weights",
        "w.safetensors",
        "--min-size",
        64,
        "--set",
        "model.nms_iou=0.4",
        "--set",
        "model.detections=9",
    )
    code, _, err = run("train", "--data", shapes, *words, "--epochs", 1, "--workers", 0, "--pictures", 0)
    assert code == 0, err
    config = load_checkpoint(tmp_path / "runs" / "train-1" / "last.safetensors").config
    assert (config.pool_method, config.pool_aligned, config.anchor_sizes_px) == ("crop", True, saved.anchor_sizes_px)
    assert (config.nms_iou, config.detections) == (0.4, 9)
    pixels = config.preprocessing
    assert (pixels.channel_order, pixels.mean, pixels.std) == ("BGR", CAFFE.mean, CAFFE.std)
    assert (pixels.min_size_px, pixels.max_size_px) == (64, 107)  # the maximum follows, in torchvision's proportion


def test_another_architecture_replaces_the_fields_in_which_the_two_differ():
    saved = model_config("fasterrcnn_resnet50_fpn", class_names=("a",), preprocessing=CAFFE, **CROP)
    values = continued_model(saved, {"name": "maskrcnn_resnet50_fpn", "pool_aligned": False})
    assert values["name"] == "maskrcnn_resnet50_fpn" and values["has_masks"] is True
    assert (values["pool_method"], values["pool_aligned"], values["detections"]) == ("crop", False, 7)
    assert values["preprocessing"]["channel_order"] == "BGR" and "class_names" not in values


# Comparing with PyTorch


def with_bias(proto, model):
    """A traced model with the bias of the class scores of another."""
    name = "roi_heads.box_predictor.cls_score.bias"
    bias = next(value for value in proto.graph.initializer if value.name == name)
    bias.CopyFrom(onnx.numpy_helper.from_array(model.state_dict()[name].numpy(), name))
    return proto


def test_without_detections_the_stages_before_them_are_compared(tmp_path, model, monkeypatch):
    tiny, trace = model, exporter._trace
    model = copy.deepcopy(tiny)
    model.roi_heads.box_predictor.cls_score.bias.data[0] += 1e3  # everything is background
    # Tracing takes half a minute; the tiny model is traced already.
    monkeypatch.setattr(exporter, "_trace", lambda given, opset: with_bias(trace(tiny, opset), given))
    save_checkpoint(tmp_path / "w.safetensors", model)
    messages = MessageLog()
    export(tmp_path / "w.safetensors", output=tmp_path / "m.onnx", progress=messages)
    said = next(line for line in messages.lines if line.startswith("compared with PyTorch"))
    assert "no detections on 7 images, so boxes and masks were not compared" in said
    assert "stages compared instead: 21, from images to box_deltas" in said
    proto = onnx.load(tmp_path / "m.onnx")
    weight = next(value for value in proto.graph.initializer if value.name == "rpn.head.cls_logits.weight")
    weight.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(weight) + 0.5, weight.name))
    onnx.save(proto, tmp_path / "spoilt.onnx")
    backends = TorchBackend(model, device="cpu"), OnnxRuntimeBackend(tmp_path / "spoilt.onnx")
    found = with_stages(compare_backends(*backends, EXACT), *backends)
    assert not found.within(EXACT) and "first departure: objectness_P2" in str(found)


def test_a_stated_share_of_tied_boxes_is_accepted_and_said(run, road, monkeypatch):
    strict = replace(EXACT, score=1e-12)  # which a few boxes exceed in half precision
    monkeypatch.setattr(variants, "HALF", strict)
    command = ("export", road / "model.onnx", "--onnx", "--precision", "fp16", "--output", "half.onnx")
    expect_error(run(*command), "a graph that differs from")
    code, out, err = run(*command, "--max-unmatched", 1)
    assert code == 0, err
    assert re.search(r"tolerated: [\d.]+% of the detections are unmatched or differ by more, --max-unmatched 1 ", out)

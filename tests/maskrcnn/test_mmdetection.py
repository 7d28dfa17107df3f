"""mmdetection's checkpoints: names, the configuration in them, and that the model detects what mmdetection's would."""

import numpy as np
import pytest
import torch
from mmdetection_model import CONFIG_2, CONFIG_3, OF_CONFIG_2, PlainMmdetection, Settings, lively_tensors

from maskrcnn.data.shapes import shapes_image
from maskrcnn.errors import UserError
from maskrcnn.runtime.verification.compare import EXACT, compare_outputs
from maskrcnn.weights.foreign import coco_classes
from maskrcnn.weights.mmdetection import from_mmdetection
from maskrcnn.weights.torchvision import load_detector

NAMES = ("cat", "dog", "hot dog")
META_2 = {"mmdet_version": "2.25.0", "config": CONFIG_2, "CLASSES": NAMES, "epoch": 12, "env_info": "…"}
META_3 = {"mmengine_version": "0.7.4", "cfg": CONFIG_3, "dataset_meta": {"classes": NAMES, "palette": [(1, 2, 3)]}}


class HistoryBuffer:
    """An object of the trainer's log."""


@pytest.mark.parametrize(
    ("meta", "settings", "gain"),
    [(META_2, OF_CONFIG_2, 0.02), (META_3, Settings(), 1.0), ({}, Settings(), 1.0)],
    ids=["2", "3", "without a configuration"],
)
def test_the_model_detects_what_mmdetections_would(tmp_path, meta, settings, gain):
    tensors = lively_tensors(gain)
    content = {"meta": meta, "state_dict": tensors, "optimizer": {}, "message_hub": {"loss": HistoryBuffer()}}
    torch.save(content, tmp_path / "epoch_12.pth")
    loaded = load_detector(tmp_path / "epoch_12.pth", settings={"candidates": 3000})
    config = loaded.model.config
    assert config.name == "maskrcnn_resnet50_fpn"
    assert config.class_names == (NAMES if meta else ("class_1", "class_2", "class_3"))
    assert bool(loaded.assumed) == (not meta)
    rng = np.random.default_rng(3)
    for height, width in ((96, 128), (83, 70)):
        image = shapes_image(rng, (height, width))[0]
        batch = np.zeros((1, 3, -(-height // 32) * 32, -(-width // 32) * 32), np.float32)
        channels = image if config.preprocessing.channel_order == "RGB" else image[:, :, ::-1]
        batch[0, :, :height, :width] = channels.transpose(2, 0, 1)
        with torch.no_grad():
            expected = PlainMmdetection(tensors, settings).detect(image)
            ours = loaded.model(torch.from_numpy(batch), torch.tensor([[height, width]]))
        ours = {name: value.numpy() for name, value in ours.items()}
        found = compare_outputs(expected, ours, EXACT, score_threshold=settings.score)
        assert found.within(EXACT) and found.detections > 10, str(found)


def test_the_configuration_of_version_2_is_read_without_running_it():
    config = from_mmdetection(lively_tensors(), "zoo", META_2).config
    pixels = config.preprocessing
    assert (pixels.channel_order, pixels.min_size_px, pixels.max_size_px) == ("BGR", 96, 128)
    np.testing.assert_allclose(255 * np.array(pixels.mean), [103.53, 116.28, 123.675], rtol=1e-6)
    assert config.stride_in_1x1 and config.anchor_sizes_px == (16, 32, 64, 128, 256)
    assert (config.score_threshold, config.nms_iou, config.detections) == (0.2, 0.3, 40)


def test_classes_have_cocos_ids_if_they_have_its_names():
    tensors = lively_tensors()
    for name, rows in (("bbox_head.fc_cls", 81), ("bbox_head.fc_reg", 320), ("mask_head.conv_logits", 80)):
        for kind in ("weight", "bias"):
            old = tensors[f"roi_head.{name}.{kind}"]
            tensors[f"roi_head.{name}.{kind}"] = torch.zeros(rows, *old.shape[1:])
    names, ids = coco_classes()
    config = from_mmdetection(tensors, "zoo", {"CLASSES": names}).config
    assert (config.class_names, config.category_ids) == (names, ids)


@pytest.mark.parametrize(
    ("changes", "meta", "words"),
    [
        ({"neck.fpn_convs.4.conv.weight": 1}, {}, "tensor neck.fpn_convs.4.conv.weight, unknown"),
        ({"roi_head.bbox_head.0.fc_cls.weight": 1}, {}, "tensor roi_head.bbox_head.0.fc_cls.weight, unknown"),
        ({"bbox_head.fc_cls.weight": 1}, {}, "tensor bbox_head.fc_cls.weight of mmdetection 1"),
        (
            {"backbone.layer2.0.conv2_offset.weight": 1, "roi_head.bbox_head.fc_cls.weight": None},
            {},
            "without roi_heads",
        ),
        ({}, {"CLASSES": ("a", "b")}, "2 class names in its meta, and tensors of 3 classes"),
        ({}, {"cfg": "model = dict(type='CascadeRCNN')"}, "model.type 'CascadeRCNN'"),
        ({}, {"cfg": CONFIG_3.replace("scales=[8]", "scales=[4, 8]")}, r"anchors with the scales \[4, 8\]"),
    ],
)
def test_other_models_are_refused(changes, meta, words):
    tensors = lively_tensors()
    for name, value in changes.items():
        if value is None:
            del tensors[name]
        else:
            tensors[name] = torch.zeros(value)
    with pytest.raises(UserError, match=rf"zoo: .*{words}"):
        from_mmdetection(tensors, "zoo", meta)

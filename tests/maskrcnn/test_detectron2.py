"""Detectron2's weights: their names, their conventions, and that the model detects what Detectron2's would."""

import dataclasses
import math
import pickle
from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from command_line import MessageLog
from detectron2_model import SMALL, ZOO, PlainDetectron2, Settings, Sizes, layout, lively_tensors
from tiny import tiny_config
from torch import Tensor

from maskrcnn.config import ModelConfig, from_dict, model_config
from maskrcnn.data.shapes import shapes_image
from maskrcnn.errors import UserError
from maskrcnn.imaging.preprocess import Preprocessing, batch_images
from maskrcnn.model.detector import MaskRCNN
from maskrcnn.model.rpn import cell_anchors, grid_anchors
from maskrcnn.runtime.verification.compare import EXACT, Difference, compare_outputs
from maskrcnn.weights.checkpoint import load_weights
from maskrcnn.weights.detectron2 import CONVENTIONS, from_detectron2, is_detectron2
from maskrcnn.weights.finetuning import finetuning_tensors
from maskrcnn.weights.foreign import coco_classes
from maskrcnn.weights.torchvision import continued_model, load_detector, model_changes, starting_weights

FASTER = Sizes(classes=3, fpn=16, box=32, mask=())
PIXELS = {"min_size_px": 96, "max_size_px": 150}


def empty(depth: int, sizes: Sizes = ZOO) -> dict[str, Tensor]:
    """Tensors of the right names and shapes, without memory behind them."""
    return {name: torch.empty(shape, device="meta") for name, shape in layout(depth, sizes).items()}


@pytest.fixture(scope="module")
def tensors() -> dict[str, Tensor]:
    """A small Mask R-CNN on ResNet-50."""
    return lively_tensors(50)


@pytest.fixture(scope="module")
def zoo_file(tmp_path_factory):
    """A small Mask R-CNN on ResNet-18, in a file as the model zoo has them, old buffers included."""
    content = {name: value.numpy() for name, value in lively_tensors(18).items()}
    content |= {"pixel_mean": np.float32([103.53, 116.28, 123.675]).reshape(3, 1, 1)}
    content |= {"pixel_std": np.ones((3, 1, 1), np.float32)}
    for level in range(5):
        cells = cell_anchors(32 * 2**level, (0.5, 1, 2), rounded=False).numpy()
        content[f"proposal_generator.anchor_generator.cell_anchors.{level}"] = cells
    path = tmp_path_factory.mktemp("zoo") / "model_final.pkl"
    path.write_bytes(pickle.dumps({"model": content, "__author__": "Detectron2 Model Zoo"}, protocol=2))
    return path


# Names and values


@pytest.mark.parametrize(("depth", "count"), [(18, 142), (34, 222), (50, 307), (101, 562)])
def test_the_published_layout_gives_our_tensors(depth, count):
    found, config, *_ = from_detectron2(empty(depth), "zoo")
    assert len(found) == count
    with torch.device("meta"):
        ours = MaskRCNN(config).state_dict()
    assert config.name == f"maskrcnn_resnet{depth}_fpn"
    assert {name: value.shape for name, value in found.items()} == {name: value.shape for name, value in ours.items()}


def test_a_few_names_by_hand():
    shapes = layout(50)
    assert shapes["backbone.bottom_up.res2.0.shortcut.weight"] == (256, 64, 1, 1)
    assert shapes["backbone.bottom_up.res5.2.conv2.norm.running_var"] == (512,)
    assert shapes["roi_heads.box_head.fc1.weight"] == (1024, 12544)
    assert shapes["roi_heads.box_predictor.cls_score.weight"] == (81, 1024)
    given = {name: torch.zeros(1) for name in shapes}
    given["backbone.bottom_up.res4.5.conv3.norm.bias"] += 7
    given = {name: value.expand(shapes[name]) for name, value in given.items()}
    found, *_ = from_detectron2(given, "zoo")
    assert [name for name, value in found.items() if (value == 7).all()] == ["backbone.body.layer3.5.bn3.bias"]


def test_the_configuration_is_detectron2s():
    _, config, *_ = from_detectron2(empty(50), "zoo")
    plain = model_config("maskrcnn_resnet50_fpn")
    differing = {f.name for f in dataclasses.fields(config) if getattr(config, f.name) != getattr(plain, f.name)}
    assert differing == {*CONVENTIONS, "class_names", "category_ids"} - {"batch_norm_epsilon"}
    np.testing.assert_allclose(255 * np.array(config.preprocessing.mean), [123.675, 116.28, 103.53], rtol=1e-6)
    np.testing.assert_allclose(255 * np.array(config.preprocessing.std), 1)
    assert (config.score_threshold, config.nms_iou, config.rpn_nms_iou, config.detections) == (0.05, 0.5, 0.7, 100)


def test_coco_has_80_classes_whose_ids_have_gaps():
    names, ids = coco_classes()
    assert len(names) == len(set(ids)) == 80 and list(ids) == sorted(ids)
    table = dict(zip(ids, names, strict=True))
    assert set(range(1, 91)) - set(ids) == {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}
    assert (table[1], table[13], table[44], table[67], table[90]) == (
        *("person", "stop sign", "bottle", "dining table", "toothbrush"),
    )
    _, config, *_ = from_detectron2(empty(50), "zoo")
    assert (config.class_names, config.category_ids) == (names, ids)
    _, config, *_ = from_detectron2(empty(50, SMALL), "zoo")
    assert (config.class_names, config.category_ids) == (("class_1", "class_2", "class_3"), (1, 2, 3))


def test_background_moves_to_the_front_and_channels_turn_round(tensors):
    given = dict(tensors)
    given["roi_heads.box_predictor.cls_score.bias"] = torch.tensor([1.0, 2.0, 3.0, -9.0])  # background last
    given["roi_heads.box_predictor.bbox_pred.bias"] = torch.arange(12.0)
    given["roi_heads.mask_head.predictor.bias"] = torch.tensor([4.0, 5.0, 6.0])
    found, *_ = from_detectron2(given, "zoo")
    assert found["roi_heads.box_predictor.cls_score.bias"].tolist() == [-9, 1, 2, 3]
    assert found["roi_heads.box_predictor.bbox_pred.bias"].tolist() == [0, 0, 0, 0, *range(12)]
    assert found["roi_heads.mask_predictor.mask_fcn_logits.bias"].tolist() == [0, 4, 5, 6]
    stem = found["backbone.body.conv1.weight"]
    assert torch.equal(stem[:, 0], given["backbone.bottom_up.stem.conv1.weight"][:, 2])
    assert torch.equal(stem[:, 1], given["backbone.bottom_up.stem.conv1.weight"][:, 1])


def test_a_faster_rcnn_and_trained_batch_norm_are_recognised():
    given = empty(101, FASTER)
    given["backbone.bottom_up.stem.conv1.norm.num_batches_tracked"] = torch.tensor(3)
    _, config, *_ = from_detectron2(given, "zoo")
    assert config.name == "fasterrcnn_resnet101_fpn"
    assert not config.has_masks and not config.frozen_batch_norm


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"roi_heads.box_predictor.bbox_pred.weight": (4, 32)}, r"4 rows of .*shared by all classes"),
        ({"roi_heads.mask_head.predictor.weight": (1, 16, 1, 1)}, "1 rows of .*shared by all classes"),
        ({"roi_heads.box_predictor.bbox_pred.weight": (16, 32)}, r"16 rows of \S+, for 3 classes"),
        ({"backbone.fpn_lateral2.norm.weight": (16,)}, "tensor backbone.fpn_lateral2.norm.weight"),
        ({"roi_heads.box_head.conv1.weight": (16, 16, 3, 3)}, "tensor roi_heads.box_head.conv1.weight"),
        ({"roi_heads.keypoint_head.score_lowres.weight": (16, 17, 4, 4)}, "tensor roi_heads.keypoint_head"),
        ({"roi_heads.box_head.0.fc1.weight": (32, 784)}, "tensor roi_heads.box_head.0.fc1.weight"),
        ({"roi_heads.box_predictor.cls_score.weight": None}, "without roi_heads.box_predictor.cls_score.weight"),
        ({"backbone.bottom_up.res4.6.conv1.weight": (1,)}, r"a ResNet with \(3, 4, 7, 3\) blocks of 3 convolutions"),
    ],
)
def test_other_architectures_are_refused(changes, text):
    given = empty(50, SMALL) | {name: torch.empty(shape or 0, device="meta") for name, shape in changes.items()}
    for name in (name for name, shape in changes.items() if shape is None):
        del given[name]
    with pytest.raises(UserError, match=rf"zoo: .*{text}"):
        from_detectron2(given, "zoo")


def anchor_buffers(sizes: tuple[float, ...], ratios: tuple[float, ...], *, added: float = 0.0) -> dict[str, Tensor]:
    """The buffers of older files."""
    name = "proposal_generator.anchor_generator.cell_anchors"
    grown = torch.tensor([0, 0, added, added])
    return {
        f"{name}.{level}": cell_anchors(size, ratios, rounded=bool(added)) + grown for level, size in enumerate(sizes)
    }


def test_buffers_of_older_files_state_anchors_and_pixels():
    plain = from_detectron2(lively_tensors(18), "zoo")
    assert "anchor_sizes_px" in plain.unstated and "preprocessing.mean" in plain.unstated
    own = anchor_buffers((8, 16, 32, 64, 128), (0.4, 1.0, 2.5))
    own |= {
        "pixel_mean": torch.tensor([123.675, 116.28, 103.53]).view(3, 1, 1),
        "pixel_std": torch.full((3, 1, 1), 58.0),
    }
    found = from_detectron2(lively_tensors(18) | own, "zoo")
    assert found.config.anchor_sizes_px == (8, 16, 32, 64, 128) and found.config.anchor_aspect_ratios == (0.4, 1.0, 2.5)
    assert "anchor_sizes_px" not in found.unstated
    np.testing.assert_allclose(255 * np.array(found.config.preprocessing.mean), [123.675, 116.28, 103.53], rtol=1e-5)
    np.testing.assert_allclose(255 * np.array(found.config.preprocessing.std), 58, rtol=1e-5)
    first = "backbone.body.conv1.weight"  # the mean is RGB's, so the weights are already
    assert torch.equal(found.tensors[first].flip(1), plain.tensors[first])


@pytest.mark.parametrize(
    ("buffers", "text"),
    [
        ({"pixel_mean": torch.zeros(4)}, "pixel_mean of 4 channels"),
        (anchor_buffers((8,) * 6, (0.5, 1, 2)), "anchors on 6 levels"),
        (anchor_buffers((8, 8), (0.5, 1)) | anchor_buffers((8,), (1, 2)), "other aspect ratios on each level"),
        (
            {"proposal_generator.anchor_generator.cell_anchors.0": torch.tensor([[-8.0, -8, 8, 8], [-4.0, -4, 4, 4]])},
            "anchors of several sizes on a level",
        ),
    ],
)
def test_anchors_that_no_model_here_has_are_refused(buffers, text):
    with pytest.raises(UserError, match=text):
        from_detectron2(empty(50, SMALL) | buffers, "zoo")


def test_anchors_that_were_rounded_once_do_no_harm():
    old = anchor_buffers(ModelConfig().anchor_sizes_px, (0.5, 1, 2), added=1)
    config = from_detectron2(empty(50, SMALL) | old, "zoo").config
    assert config.anchor_sizes_px == ModelConfig().anchor_sizes_px and not config.anchors_rounded


# Conventions


def test_anchors_by_hand():
    first = cell_anchors(32, (0.5, 1.0, 2.0), rounded=False)[0].tolist()
    half_w, half_h = 32 * math.sqrt(2) / 2, 32 / math.sqrt(2) / 2
    assert first == pytest.approx([-half_w, -half_h, half_w, half_h])
    # 96 px of height are 3 rows at P5 and 2 at P6, which torchvision's rule lays 48 px apart.
    feature, images, cells = torch.zeros(1, 1, 2, 3), torch.zeros(1, 3, 96, 160), torch.zeros(1, 4)
    assert grid_anchors(cells, feature, images, 64)[-1].tolist() == [128, 64, 128, 64]
    assert grid_anchors(cells, feature, images)[-1].tolist() == [106, 48, 106, 48]


@pytest.mark.parametrize("backbone", ["resnet50", "resnet18"])
def test_the_stride_is_where_it_was(backbone):
    with torch.device("meta"):
        config = tiny_config(backbone=backbone, stride_in_1x1=True)
        body = MaskRCNN(config).backbone.body
        plain = MaskRCNN(replace(config, stride_in_1x1=False)).backbone.body
    for stage in (2, 3, 4):
        blocks = getattr(body, f"layer{stage}")
        assert (blocks[0].conv1.stride, blocks[0].conv2.stride) == ((2, 2), (1, 1))
        assert (blocks[1].conv1.stride, blocks[1].conv2.stride) == ((1, 1), (1, 1))
        assert (getattr(plain, f"layer{stage}")[0].conv1.stride == (2, 2)) == (backbone == "resnet18")
    assert body.layer1[0].conv1.stride == (1, 1)


def model_of(config: ModelConfig, values: dict[str, Tensor]) -> MaskRCNN:
    model = MaskRCNN(config)
    load_weights(model, values, "weights")
    return model.eval()


@pytest.fixture(scope="module")
def pictures() -> list[np.ndarray]:
    rng = np.random.default_rng(3)
    return [shapes_image(rng, size)[0] for size in ((201, 333), (180, 97))]


@pytest.fixture(scope="module")
def plain_outputs(tensors, pictures) -> list[dict[str, np.ndarray]]:
    """What Detectron2 would find, in the form of our outputs."""
    plain, outputs = PlainDetectron2(tensors, *PIXELS.values()), []
    for picture in pictures:
        with torch.no_grad():
            found = plain.detect(picture)
        assert found["pairs"] > 20 and len(found["scores"].unique()) > 20  # or the comparison would say little
        outputs.append(as_outputs(found))
    return outputs


def as_outputs(found: dict[str, Tensor]) -> dict[str, np.ndarray]:
    """Detections of the plain model in the form of our outputs."""
    outputs = {name: found[name][None].numpy() for name in ("boxes", "scores", "masks")}
    count = np.array([len(found["scores"])], np.int32)
    return outputs | {"num_detections": count, "labels": found["classes"][None].numpy() + 1}


def differences(config: ModelConfig, values, pictures, plain_outputs) -> list[Difference]:
    config = replace(config, candidates=3000, preprocessing=replace(config.preprocessing, **PIXELS))
    model, found = model_of(config, values), []
    for picture, expected in zip(pictures, plain_outputs, strict=True):
        images, sizes = batch_images([picture], config.preprocessing)
        with torch.no_grad():
            ours = model(torch.from_numpy(images), torch.from_numpy(sizes))
        found.append(compare_outputs(expected, {name: value.numpy() for name, value in ours.items()}, EXACT))
    return found


def test_the_model_detects_what_detectron2_would(tensors, pictures, plain_outputs):
    values, config, *_ = from_detectron2(tensors, "zoo")
    for difference in differences(config, values, pictures, plain_outputs):
        assert difference.within(EXACT), str(difference)
        assert difference.detections > 20


@pytest.mark.parametrize(
    "convention",
    [
        *("stride_in_1x1", "anchors_rounded", "anchor_strides_px", "pool_aligned", "pool_sampling_ratio"),
        *("mean", "std", "resize"),
    ],
)
def test_without_any_one_convention_it_does_not(tensors, pictures, plain_outputs, convention):
    values, config, *_ = from_detectron2(tensors, "zoo")
    if hasattr(config, convention):
        config = replace(config, **{convention: getattr(ModelConfig(), convention)})
    else:
        value = getattr(Preprocessing(), convention)
        value = tuple(reversed(value)) if convention == "mean" else value  # torchvision's is the same colour
        config = replace(config, preprocessing=replace(config.preprocessing, **{convention: value}))
    found = differences(config, values, pictures, plain_outputs)
    assert not all(difference.within(EXACT) for difference in found)


# Configurations beside the weights

OWN = Settings(
    anchor_px=16.0,
    ratios=(0.4, 1.0, 2.5),
    is_bgr=False,
    mean=(120.0, 110.0, 100.0),
    std=(57.0, 58.0, 59.0),
    stride_in_1x1=False,
    score=0.2,
    nms=0.3,
    detections=40,
    box_weights=(20.0, 20.0, 10.0, 10.0),
)
BASE_YAML = """
MODEL:
  ANCHOR_GENERATOR: {SIZES: [[16], [32], [64], [128], [256]], ASPECT_RATIOS: [[0.5, 1.0, 2.0]]}
  PIXEL_MEAN: [120.0, 110.0, 100.0]
  PIXEL_STD: !!python/tuple [57.0, 58.0, 59.0]
  RESNETS: {STRIDE_IN_1X1: False}
  ROI_HEADS: {SCORE_THRESH_TEST: 0.7, NMS_THRESH_TEST: 0.3, NUM_CLASSES: 3}
  ROI_BOX_HEAD: {BBOX_REG_WEIGHTS: "(20.0, 20.0, 10.0, 10.0)", POOLER_TYPE: ROIAlignV2, POOLER_SAMPLING_RATIO: 0}
INPUT: {FORMAT: RGB, MIN_SIZE_TEST: 96, MAX_SIZE_TEST: 150, MIN_SIZE_TRAIN: (640, 800)}
"""
OWN_YAML = """
_BASE_: base/Base.yaml
MODEL:
  ANCHOR_GENERATOR: {ASPECT_RATIOS: [[0.4, 1.0, 2.5]]}
  ROI_HEADS: {SCORE_THRESH_TEST: 0.2}
TEST: {DETECTIONS_PER_IMAGE: 40}
"""


def test_a_configuration_states_what_the_weights_cannot(tensors, pictures, tmp_path):
    given = dict(tensors)
    given["backbone.bottom_up.stem.conv1.weight"] = 57 * tensors["backbone.bottom_up.stem.conv1.weight"]
    torch.save({"model": given}, tmp_path / "model_final.pth")
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "Base.yaml").write_text(BASE_YAML)
    (tmp_path / "config.yaml").write_text(OWN_YAML)
    loaded = load_detector(tmp_path / "model_final.pth", settings={"candidates": 3000})
    assert loaded.assumed == ("class_names",)
    plain = PlainDetectron2(given, 96, 150, OWN)
    for picture in pictures:
        images, sizes = batch_images([picture], loaded.model.config.preprocessing)
        with torch.no_grad():
            expected = plain.detect(picture)
            ours = loaded.model(torch.from_numpy(images), torch.from_numpy(sizes))
        found = compare_outputs(
            as_outputs(expected),
            {name: value.numpy() for name, value in ours.items()},
            EXACT,
            score_threshold=0.2,
        )
        assert found.within(EXACT) and 10 < found.detections <= 40, str(found)


def test_a_resnext_computes_with_its_own_conventions(tmp_path):
    sizes = replace(SMALL, groups=32, width=8)
    given = lively_tensors(101, sizes)
    plain = PlainDetectron2(given, 64, 100, Settings(stride_in_1x1=False, std=(57.375, 57.12, 58.395)))
    found, config, unstated, _ = from_detectron2(given, "zoo")
    assert (config.name, config.backbone) == ("maskrcnn_resnext101_32x8d_fpn", "resnext101_32x8d")
    assert "anchor_sizes_px" in unstated
    image = torch.rand(1, 3, 64, 96) * 255
    model = model_of(config, found)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (plain.settings.mean, plain.settings.std))
    with torch.no_grad():
        expected = plain.features((image.flip(1) - mean) / std)
        ours = model.features(image, torch.tensor([[64, 96]]))
    for one, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3 * float(other.abs().max()))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("MODEL: {ROI_HEADS: {NUM_CLASSES: 7}}", r"MODEL\.ROI_HEADS\.NUM_CLASSES 7, and zoo with 3"),
        ("MODEL: {RESNETS: {NUM_GROUPS: 32}}", r"MODEL\.RESNETS\.NUM_GROUPS 32, and zoo with 1"),
        (
            "MODEL: {ANCHOR_GENERATOR: {SIZES: [[32, 64]]}}",
            r"MODEL\.ANCHOR_GENERATOR\.SIZES .*\n.*one size on each of 5 levels",
        ),
        (
            "MODEL: {ROI_HEADS: {NAME: CascadeROIHeads}}",
            r"MODEL\.ROI_HEADS\.NAME 'Cascade.*\n.*Standard",
        ),
        ("MODEL: {PIXEL_MEAN: [1, 2]}", r"MODEL\.PIXEL_MEAN 2 numbers\n  expected: 3"),
        ("TEST: {DETECTIONS_PER_IMAGE: many}", r"TEST\.DETECTIONS_PER_IMAGE 'many'\n  expected: of type int"),
        ("INPUT: {MIN_SIZE_TEST: 0}", r"INPUT\.MIN_SIZE_TEST 0"),
        ("- a list", "list instead of settings"),
        ("a: [", "not YAML"),
        ("a: !!python/object/apply:os.system ['true']", "not YAML"),
    ],
)
def test_configurations_that_do_not_fit_are_refused(tmp_path, text, words):
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(UserError, match=rf"config\.yaml: {words}"):
        from_detectron2(empty(18, SMALL), "zoo", tmp_path / "config.yaml")


def test_a_base_that_is_not_there_is_said(tmp_path):
    (tmp_path / "config.yaml").write_text("_BASE_: ../Base-RCNN-FPN.yaml\nINPUT: {MIN_SIZE_TEST: 640}")
    found = from_detectron2(empty(18, SMALL), "zoo", tmp_path / "config.yaml")
    assert "its _BASE_ ../Base-RCNN-FPN.yaml was not read" in found.notes[0]
    assert found.config.preprocessing.min_size_px == 640
    assert "preprocessing.max_size_px" in found.unstated and "preprocessing.min_size_px" not in found.unstated


# Files


def test_a_file_of_the_model_zoo_tells_its_architecture(zoo_file):
    loaded, path, *_ = load_detector(zoo_file)
    assert path == zoo_file and loaded.config.name == "maskrcnn_resnet18_fpn" and not loaded.training
    assert loaded.config.preprocessing.resize == "pillow"
    same, *_ = load_detector(zoo_file, "maskrcnn_resnet18_fpn")
    assert same.config == loaded.config
    with pytest.raises(UserError, match=r"a checkpoint of maskrcnn_resnet18_fpn .* options that contradict it"):
        load_detector(zoo_file, "maskrcnn_resnet50_fpn")


def test_a_file_of_torch_save_is_the_same(zoo_file, tmp_path):
    torch.save({"model": lively_tensors(18), "optimizer": {"state": {}}, "iteration": 5}, tmp_path / "model.pth")
    ours, theirs = load_detector(tmp_path / "model.pth")[0], load_detector(zoo_file)[0]
    assert ours.config == theirs.config
    for name, value in theirs.state_dict().items():
        assert torch.equal(value, ours.state_dict()[name]), name


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ({"conv1_w": np.zeros(3)}, "tensor conv1_w, unknown"),  # a backbone of Detectron's
        ({"blobs": {"conv1_w": np.zeros(3)}}, "tensor conv1_w, unknown"),
        ([1, 2], "a list that holds no weights"),
        ({"model": {"a": "text"}}, "a dict with model that holds no weights"),
        ({"model": {"a": np.array([None])}}, "a dict with model that holds no weights"),
        ({"model": {"stem.conv1.weight": np.zeros(3)}}, "tensor stem.conv1.weight, unknown"),
        ({"model": {"roi_heads.box_head.fc1.weight": np.zeros(3)}}, "a model without backbone.body.conv1.weight"),
    ],
)
def test_other_pickles_are_refused(tmp_path, content, text):
    (tmp_path / "w.pkl").write_bytes(pickle.dumps(content))
    with pytest.raises(UserError, match=rf"w\.pkl: .*{text}"):
        load_detector(tmp_path / "w.pkl")


def test_names_tell_the_two_layouts_apart():
    assert not is_detectron2(["backbone.body.conv1.weight", "rpn.head.conv.0.0.weight", "roi_heads.mask_head.0.0.bias"])
    assert is_detectron2(["roi_heads.box_head.fc1.bias", "backbone.bottom_up.stem.conv1.weight"])


def test_a_missing_file_is_said_so(tmp_path):
    with pytest.raises(UserError, match=r"no file .*w\.pkl"):
        load_detector(tmp_path / "w.pkl")


def test_training_starts_with_the_model_of_the_weights(zoo_file):
    weights = starting_weights(zoo_file)
    sizes = {"min_size_px": 64, "max_size_px": 99}
    given = {"name": "maskrcnn_resnet18_fpn", "pool_sampling_ratio": 1, "preprocessing": sizes}
    values = continued_model(weights.config, given)
    config = from_dict(ModelConfig, values | {"class_names": ("a", "b", "c"), "category_ids": (1, 2, 3)})
    changed = replace(config, **model_changes(weights, config))
    assert changed.stride_in_1x1 and changed.pool_aligned and changed.anchor_strides_px == (4, 8, 16, 32, 64)
    assert changed.pool_sampling_ratio == 1  # asked for
    pixels = changed.preprocessing
    assert (pixels.min_size_px, pixels.resize, pixels.std) == (64, "pillow", CONVENTIONS["preprocessing"].std)
    model = MaskRCNN(changed)
    values, summary = finetuning_tensors(model, weights)
    load_weights(model, values, weights.source)
    assert len(summary.reset) == 6 and not summary.added and not summary.dropped
    assert torch.equal(model.roi_heads.box_head.fc7.bias, lively_tensors(18)["roi_heads.box_head.fc2.bias"])


@pytest.mark.slow
def test_one_call_exports_a_file_of_the_model_zoo(zoo_file, tmp_path):
    from maskrcnn.api.export import export
    from maskrcnn.metadata import KEY, ModelMetadata

    messages = MessageLog()
    export(weights=str(zoo_file), output=tmp_path / "model.onnx", progress=messages)  # raises if PyTorch disagrees
    assert "maskrcnn_resnet18_fpn: 3 classes, batch norm epsilon 1e-05" in messages.lines
    proto = onnx.load(tmp_path / "model.onnx")
    nodes = [node for node in proto.graph.node if node.op_type == "MultilevelRoiAlign"]
    ratios = [a.i for node in nodes for a in node.attribute if a.name == "sampling_ratio"]
    assert ratios == [0, 0]
    text = next(entry.value for entry in proto.metadata_props if entry.key == KEY)
    metadata = ModelMetadata.from_json(text, tmp_path / "model.onnx")
    assert metadata.preprocessing == CONVENTIONS["preprocessing"]

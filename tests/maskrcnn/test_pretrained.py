"""Weights to start from: what of them is taken, what starts anew, and torchvision's weights by name."""

import functools
from dataclasses import replace
from urllib.error import URLError

import pytest
import torch
import torchvision
from safetensors.torch import save_file
from tiny import TINY_POSE, tiny_config
from torchvision.models.detection import (
    FasterRCNN_ResNet50_FPN_V2_Weights,
    KeypointRCNN_ResNet50_FPN_Weights,
    MaskRCNN_ResNet50_FPN_Weights,
)
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

from maskrcnn.config import MODELS, model_config
from maskrcnn.errors import UserError
from maskrcnn.imaging.preprocess import PRESETS
from maskrcnn.keypoints import COCO_NAMES, COCO_SKELETON
from maskrcnn.model.detector import MaskRCNN
from maskrcnn.training.trainer import Trainer
from maskrcnn.weights.checkpoint import load_weights, save_checkpoint
from maskrcnn.weights.finetuning import finetuning_tensors
from maskrcnn.weights.torchvision import coco_labels, load_detector, model_changes, starting_weights

BOX_PREDICTOR = tuple(f"roi_heads.box_predictor.{n}" for n in ("cls_score.weight", "cls_score.bias"))
BOX_PREDICTOR += tuple(f"roi_heads.box_predictor.{n}" for n in ("bbox_pred.weight", "bbox_pred.bias"))
HEAT_MAPS = tuple(f"roi_heads.keypoint_predictor.kps_score_lowres.{n}" for n in ("weight", "bias"))
MASK_LOGITS = tuple(f"roi_heads.mask_predictor.mask_fcn_logits.{n}" for n in ("weight", "bias"))


@functools.cache
def torchvision_weights(classes: int = 4, backbone: str = "resnet18") -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    body = resnet_fpn_backbone(backbone_name=backbone, weights=None, norm_layer=torch.nn.BatchNorm2d)
    return torchvision.models.detection.MaskRCNN(body, num_classes=classes).state_dict()


def test_a_torchvision_state_dict_loads_and_tells_its_classes(tmp_path):
    weights = torchvision_weights()
    torch.save(weights, tmp_path / "w.pth")
    model = load_detector(tmp_path / "w.pth", "maskrcnn_resnet18_fpn").model
    assert model.config.class_names == ("class_1", "class_2", "class_3")
    assert model.config.category_ids == (1, 2, 3)
    for name, value in weights.items():
        assert torch.equal(value, model.state_dict()[name]), name


def test_coco_weights_get_cocos_names(tmp_path):
    torch.save({"model": torchvision_weights(91)}, tmp_path / "w.pth")
    model = load_detector(tmp_path / "w.pth", "maskrcnn_resnet18_fpn").model
    assert model.config.class_names[0] == "person"
    assert model.config.class_names[89] == "toothbrush"
    assert model.config.category_ids[89] == 90


def frozen(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The state dict as a model with frozen batch norm saves it."""
    return {name: value for name, value in weights.items() if not name.endswith("num_batches_tracked")}


@pytest.mark.parametrize(("classes", "is_frozen", "epsilon"), [(91, True, 0.0), (91, False, 1e-5), (4, True, 1e-5)])
def test_batch_norm_epsilon_is_the_one_that_torchvision_would_use(tmp_path, classes, is_frozen, epsilon):
    weights = torchvision_weights(classes)
    torch.save(frozen(weights) if is_frozen else weights, tmp_path / "w.pth")
    model = load_detector(tmp_path / "w.pth", "maskrcnn_resnet18_fpn").model
    assert {m.eps for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)} == {epsilon}
    chosen = load_detector(tmp_path / "w.pth", "maskrcnn_resnet18_fpn", batch_norm_epsilon=1e-3).model
    assert chosen.config.batch_norm_epsilon == 1e-3


def test_older_torchvision_names_load(tmp_path):
    weights = torchvision_weights()
    renamed = {}
    for name, value in weights.items():
        old = name.replace("rpn.head.conv.0.0.", "rpn.head.conv.")
        for part in ("inner_blocks", "layer_blocks"):
            for level in range(4):
                old = old.replace(f"fpn.{part}.{level}.0.", f"fpn.{part}.{level}.")
        for layer in range(4):
            old = old.replace(f"mask_head.{layer}.0.", f"mask_head.mask_fcn{layer + 1}.")
        renamed[old] = value
    assert set(renamed) != set(weights)
    torch.save(renamed, tmp_path / "old.pth")
    model = load_detector(tmp_path / "old.pth", "maskrcnn_resnet18_fpn").model
    assert torch.equal(model.state_dict()["roi_heads.mask_head.3.0.weight"], weights["roi_heads.mask_head.3.0.weight"])


def test_weights_of_another_architecture_are_refused(tmp_path):
    torch.save(torchvision_weights(), tmp_path / "w.pth")
    with pytest.raises(UserError, match="do not fit maskrcnn_resnet34_fpn"):
        load_detector(tmp_path / "w.pth", "maskrcnn_resnet34_fpn")


# Fine-tuning


def other_model(**changes) -> MaskRCNN:
    """A model of the tiny checkpoint's architecture with other initial values."""
    torch.manual_seed(99)
    return MaskRCNN(tiny_config(**changes))


def start(model: MaskRCNN, weights):
    """Loads weights for fine-tuning; returns what was done and the names of the tensors that kept their values."""
    before = {name: value.clone() for name, value in model.state_dict().items()}
    tensors, taken = finetuning_tensors(model, weights)
    load_weights(model, tensors, weights.source)
    after = model.state_dict()
    expected = {name: value for name, value in weights.tensors.items() if name in after}
    kept = {n for n in after if n not in expected or not torch.equal(after[n], expected[n])}
    assert all(torch.equal(after[name], before[name]) for name in kept)
    return taken, {name for name in kept if not name.endswith("num_batches_tracked")}


def test_the_same_classes_reset_nothing(checkpoint):
    taken, kept = start(other_model(), starting_weights(checkpoint))
    assert not kept and not taken.reset and not taken.added and not taken.dropped
    assert "the same 3 classes" in taken.lines()[0]


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        (("one", "two"), "they know 3 classes, this model 2"),
        (("circle", "square", "triangle"), "label 2 is 'rectangle' to them and 'square' here"),
        (("triangle", "circle", "rectangle"), "label 1 is 'circle' to them and 'triangle' here"),
    ],
)
def test_other_classes_reset_what_depends_on_them_and_nothing_else(checkpoint, names, reason):
    model = other_model(class_names=names, category_ids=tuple(range(1, len(names) + 1)))
    taken, kept = start(model, starting_weights(checkpoint))
    assert set(taken.reset) == kept == {*BOX_PREDICTOR, *MASK_LOGITS}
    assert not taken.added and not taken.dropped
    assert reason in taken.lines()[0]
    assert all(name in taken.lines()[1] for name in taken.reset)


def test_classes_without_names_are_taken_for_the_models(tmp_path, checkpoint):
    weights = starting_weights(checkpoint)
    save_file(weights.tensors, tmp_path / "anonymous.safetensors")
    taken, kept = start(other_model(class_names=("a", "b", "c")), starting_weights(tmp_path / "anonymous.safetensors"))
    assert not kept and not taken.reset
    assert "have no names" in taken.lines()[0]


def test_cocos_90_classes_are_not_those_of_another_dataset_of_90(tmp_path):
    torch.save({"model": torchvision_weights(91), "epoch": 25}, tmp_path / "reference.pth")
    config = model_config("maskrcnn_resnet18_fpn", class_names=tuple(f"c{k}" for k in range(90)))
    weights = starting_weights(tmp_path / "reference.pth", config)
    taken, kept = start(MaskRCNN(config), weights)
    assert set(taken.reset) == kept == {*BOX_PREDICTOR, *MASK_LOGITS}
    assert "label 1 is 'person' to them and 'c0' here" in taken.lines()[0]


def test_a_mask_model_starts_from_faster_rcnn_with_a_new_mask_head(tmp_path, checkpoint):
    boxes_only = other_model(has_masks=False)
    save_checkpoint(tmp_path / "boxes.safetensors", boxes_only)
    model = other_model()
    taken, kept = start(model, starting_weights(tmp_path / "boxes.safetensors"))
    mask_head = {name for name in model.state_dict() if name.startswith("roi_heads.mask_")}
    assert set(taken.added) == kept == mask_head
    assert not taken.reset and not taken.dropped
    assert "roi_heads.mask_head (2 tensors), roi_heads.mask_predictor (4 tensors)" in taken.lines()[1]


def test_faster_rcnn_starts_from_a_mask_model_without_its_mask_head(checkpoint):
    taken, kept = start(other_model(has_masks=False), starting_weights(checkpoint))
    assert not kept and not taken.reset and not taken.added
    assert len(taken.dropped) == 6 and all(name.startswith("roi_heads.mask_") for name in taken.dropped)
    assert "not in this model, left out: roi_heads.mask_head (2 tensors)" in taken.lines()[1]


def test_other_keypoints_reset_their_heat_maps_and_nothing_else(tmp_path):
    saved = MaskRCNN(tiny_config(**TINY_POSE))
    torch.nn.init.ones_(saved.roi_heads.keypoint_predictor.kps_score_lowres.bias)  # it starts as zeros
    save_checkpoint(tmp_path / "pose.safetensors", saved)
    weights, names = starting_weights(tmp_path / "pose.safetensors"), TINY_POSE["keypoint_names"]
    taken, kept = start(other_model(**TINY_POSE), weights)
    assert not kept and not taken.reset and "they find the same 5 keypoints" in taken.lines()[0]
    for other, reason in (
        (names[:4], "they find 5 keypoints, this model 4"),
        ((names[0], names[2], names[1], *names[3:]), "one is 'left_hand' to them and 'right_hand' here"),
    ):
        changes = {**TINY_POSE, "keypoint_names": other, "keypoint_skeleton": (), "keypoint_sigmas": ()}
        taken, kept = start(other_model(**changes), weights)
        assert set(taken.reset) == kept == {*HEAT_MAPS}
        assert reason in taken.lines()[0] and HEAT_MAPS[0] in taken.lines()[1]


def test_a_pose_model_starts_from_a_mask_model_and_the_other_way_round(tmp_path, checkpoint):
    joint = other_model(**TINY_POSE)
    taken, kept = start(joint, starting_weights(checkpoint))
    head = {name for name in joint.state_dict() if name.startswith("roi_heads.keypoint_")}
    assert set(taken.added) == kept == head and len(head) == 4 and not taken.reset and not taken.keypoints
    save_checkpoint(tmp_path / "joint.safetensors", joint)
    taken, kept = start(other_model(), starting_weights(tmp_path / "joint.safetensors"))
    assert not kept and set(taken.dropped) == head
    assert "left out: roi_heads.keypoint_head (2 tensors)" in taken.lines()[1]


def test_a_mismatch_anywhere_else_is_an_error(checkpoint):
    model = other_model(fpn_channels=24, class_names=("one",))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(UserError, match=r"of another shape \(first: backbone\.fpn"):
        start(model, starting_weights(checkpoint))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_batch_norm_goes_on_as_in_the_model_that_saved_the_weights(tmp_path, checkpoint):
    config = tiny_config()
    assert model_changes(starting_weights(checkpoint), config) == {
        "frozen_batch_norm": False,
        "batch_norm_epsilon": 1e-5,
    }
    saved = MaskRCNN(tiny_config(frozen_batch_norm=True, batch_norm_epsilon=0.0))
    save_checkpoint(tmp_path / "frozen.safetensors", saved)
    weights = starting_weights(tmp_path / "frozen.safetensors")
    changes = model_changes(weights, config)
    assert changes == {"frozen_batch_norm": True, "batch_norm_epsilon": 0.0}
    _, kept = start(MaskRCNN(replace(config, **changes)), weights)
    assert not kept


# Weights by name


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """torch.hub's folder of checkpoints, empty; a download fails as it does without a network."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)

    def refuse(*arguments, **options):
        raise URLError("no route to host")

    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    folder = tmp_path / "torch" / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return folder


def test_without_a_network_the_error_names_file_place_and_flag(hub):
    with pytest.raises(UserError) as caught:
        starting_weights("COCO_V1", model_config("maskrcnn_resnet50_fpn"))
    for part in (
        "https://download.pytorch.org/models/maskrcnn_resnet50_fpn_coco-bf2d0c1e.pth",
        "no route to host",
        str(hub / "maskrcnn_resnet50_fpn_coco-bf2d0c1e.pth"),
        "--weights FILE",
    ):
        assert part in str(caught.value)
    assert not list(hub.iterdir())


@pytest.mark.parametrize(
    ("name", "architecture", "file"),
    [
        ("DEFAULT", "maskrcnn_resnet50_fpn", "maskrcnn_resnet50_fpn_coco-bf2d0c1e.pth"),
        ("COCO_V1", "maskrcnn_resnet50_fpn_v2", "maskrcnn_resnet50_fpn_v2_coco-73cbd019.pth"),
        ("COCO_V1", "fasterrcnn_resnet50_fpn", "fasterrcnn_resnet50_fpn_coco-258fb6c6.pth"),
        ("DEFAULT", "fasterrcnn_resnet50_fpn_v2", "fasterrcnn_resnet50_fpn_v2_coco-dd69338a.pth"),
        ("COCO_V1", "keypointrcnn_resnet50_fpn", "keypointrcnn_resnet50_fpn_coco-fc266e95.pth"),
        ("COCO_LEGACY", "keypointrcnn_resnet50_fpn", "keypointrcnn_resnet50_fpn_coco-9f466800.pth"),
        ("IMAGENET1K_V2", "maskrcnn_resnet50_fpn", "resnet50-11ad3fa6.pth"),
        ("IMAGENET1K_V1", "fasterrcnn_resnet101_fpn", "resnet101-63fe2227.pth"),
        ("DEFAULT", "maskrcnn_resnet18_fpn_small", "resnet18-f37072fd.pth"),
        ("FasterRCNN_ResNet50_FPN_V2_Weights.COCO_V1", "maskrcnn_resnet50_fpn_v2", "fasterrcnn_resnet50_fpn_v2_coco"),
    ],
)
def test_a_name_means_the_weights_of_the_architecture_or_of_its_backbone(hub, name, architecture, file):
    with pytest.raises(UserError, match=file):
        starting_weights(name, model_config(architecture))


@pytest.mark.parametrize("name", ["COCO_V9", "ResNet50_Weights.COCO_V9", "NoSuch_Weights.COCO_V1", "IMAGENET1K_V2"])
def test_an_unknown_name_lists_the_known(hub, name):
    with pytest.raises(
        UserError, match=r"neither a file nor torchvision weights for maskrcnn_resnet18_fpn\n.*IMAGENET1K_V1"
    ):
        starting_weights(name, model_config("maskrcnn_resnet18_fpn"))


def test_a_path_that_is_not_there_is_no_name(hub, tmp_path):
    for path in ("gone.pth", tmp_path / "gone", "gone.safetensors"):
        with pytest.raises(UserError, match=r"no file .*gone"):
            starting_weights(path, model_config("maskrcnn_resnet18_fpn"))


def test_a_backbone_by_name_is_read_from_the_cache_and_fills_the_body_alone(hub):
    torch.manual_seed(5)
    resnet = torchvision.models.resnet18()
    torch.save(resnet.state_dict(), hub / "resnet18-f37072fd.pth")
    weights = starting_weights("IMAGENET1K_V1", tiny_config())
    assert weights.is_backbone and weights.source == "ResNet18_Weights.IMAGENET1K_V1"
    model = other_model()
    taken, kept = start(model, weights)
    assert torch.equal(model.backbone.body.layer4[1].conv2.weight, resnet.layer4[1].conv2.weight)
    assert torch.equal(model.backbone.body.bn1.running_var, resnet.bn1.running_var)
    assert kept <= set(taken.added) and not taken.reset and not taken.dropped
    assert not any(name.startswith("backbone.body") for name in taken.added)
    assert taken.lines()[1].startswith("not in these weights, starting anew: backbone.fpn (16 tensors), rpn.head (6 t")
    assert model_changes(weights, tiny_config()) == {"frozen_batch_norm": True, "batch_norm_epsilon": 1e-5}
    assert not model_changes(weights, tiny_config(head_batch_norm=True))["frozen_batch_norm"]


def test_a_backbone_of_another_depth_is_an_error(tmp_path):
    torch.save(torchvision.models.resnet34().state_dict(), tmp_path / "r34.pth")
    with pytest.raises(UserError, match=r"unexpected \(first: backbone\.body\.layer"):
        start(other_model(), starting_weights(tmp_path / "r34.pth"))


def test_coco_v1_by_name_is_read_from_the_cache(hub):
    file = hub / MaskRCNN_ResNet50_FPN_Weights.COCO_V1.url.rpartition("/")[2]
    made = frozen(torchvision_weights(91, "resnet50"))
    torch.save(made, file)
    loaded, path, *_ = load_detector("COCO_V1", "maskrcnn_resnet50_fpn")
    assert path == file
    assert loaded.config.class_names[:2] == ("person", "bicycle")
    assert loaded.config.batch_norm_epsilon == 0
    assert torch.equal(loaded.state_dict()["rpn.head.conv.0.0.weight"], made["rpn.head.conv.0.0.weight"])
    config = model_config("maskrcnn_resnet50_fpn", class_names=("cat", "dog"))
    weights = starting_weights("DEFAULT", config)
    changes = model_changes(weights, config)
    assert changes == {"frozen_batch_norm": True, "batch_norm_epsilon": 0.0}
    model = MaskRCNN(replace(config, **changes))
    taken, kept = start(model, weights)
    assert set(taken.reset) == kept == {*BOX_PREDICTOR, *MASK_LOGITS}
    assert model.backbone.body.bn1.eps == 0


@functools.cache
def keypoint_weights() -> dict[str, torch.Tensor]:
    """Random weights of torchvision's keypoint model."""
    builder = torchvision.models.detection.keypointrcnn_resnet50_fpn
    return builder(weights=None, weights_backbone=None, num_classes=2).state_dict()


@pytest.mark.parametrize(("name", "epsilon"), [("COCO_V1", 0.0), ("COCO_LEGACY", 1e-5)])
def test_cocos_keypoints_by_name_are_read_from_the_cache(hub, name, epsilon):
    theirs = keypoint_weights()  # of both names: the name alone tells which epsilon is theirs
    torch.save(frozen(theirs), hub / KeypointRCNN_ResNet50_FPN_Weights[name].url.rpartition("/")[2])
    model, *_ = load_detector(name, "keypointrcnn_resnet50_fpn")
    config = model.config
    assert (config.class_names, config.category_ids, config.batch_norm_epsilon) == (("person",), (1,), epsilon)
    assert (config.keypoint_names, config.keypoint_skeleton) == (COCO_NAMES, COCO_SKELETON)
    assert all(torch.equal(model.state_dict()[tensor], value) for tensor, value in frozen(theirs).items())
    config = model_config("keypointrcnn_resnet50_fpn", class_names=("person",))
    assert model_changes(starting_weights(name, config), config)["batch_norm_epsilon"] == epsilon


def test_keypoints_that_are_not_cocos_have_numbers_for_names(tmp_path):
    body = resnet_fpn_backbone(backbone_name="resnet18", weights=None, norm_layer=torch.nn.BatchNorm2d)
    theirs = torchvision.models.detection.KeypointRCNN(body, num_classes=2, num_keypoints=3)
    torch.save(theirs.state_dict(), tmp_path / "w.pth")
    config = load_detector(tmp_path / "w.pth", "keypointrcnn_resnet18_fpn").model.config
    assert config.keypoint_names == ("keypoint_1", "keypoint_2", "keypoint_3") and config.keypoint_skeleton == ()


def test_every_model_that_torchvision_has_too_has_names_for_its_weights():
    shared = set(MODELS) & set(torchvision.models.list_models(module=torchvision.models.detection))
    both_versions = {f"{f}_resnet50_fpn{v}" for f in ("maskrcnn", "fasterrcnn") for v in ("", "_v2")}
    assert shared == {*both_versions, "keypointrcnn_resnet50_fpn"}
    assert FasterRCNN_ResNet50_FPN_V2_Weights.COCO_V1.meta["categories"][1:] == list(coco_labels())


# Whole detectors


def test_a_checkpoint_knows_its_architecture(checkpoint, model):
    loaded, path, *_ = load_detector(checkpoint)
    assert path == checkpoint and loaded.config == model.config and not loaded.training
    with pytest.raises(UserError, match=r"a checkpoint of maskrcnn_resnet18_fpn_small .* options that contradict it"):
        load_detector(checkpoint, "maskrcnn_resnet50_fpn")


def test_weights_that_do_not_tell_their_architecture_need_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    strange = {name.replace("layer1", "stage1"): value for name, value in torchvision_weights().items()}
    save_file(strange, "w.safetensors")
    for spec in ("COCO_V1", "w.safetensors"):
        with pytest.raises(UserError, match=rf"--weights {spec} without --model"):
            load_detector(spec)


def caffe_backbone(name: str) -> dict[str, torch.Tensor]:
    """A state dict as the converted files hold it: torchvision's names without a classifier and without counters."""
    weights = torchvision.models.get_model(name).state_dict()
    left_out = ("fc.", "classifier.")
    return {k: v for k, v in weights.items() if not k.startswith(left_out) and not k.endswith("num_batches_tracked")}


@pytest.mark.parametrize(
    ("backbone", "arguments", "strides"),
    [("resnet50", [], True), ("vgg16", ["--min-size", 96], False)],  # a size leaves the pixels to the weights
)
def test_caffes_backbones_choose_caffes_pixels_by_their_name(
    run, shapes, tmp_path, monkeypatch, backbone, arguments, strides
):
    configs = []
    monkeypatch.setattr(Trainer, "fit", lambda self, *functions: configs.append(self) or {})
    weights = caffe_backbone(backbone)
    torch.save(weights, tmp_path / f"{backbone}_caffe.pth")
    command = ("train", "--data", shapes, "--model", f"fasterrcnn_{backbone}_fpn", "--device", "cpu", "--workers", 0)
    command += ("--set", "model.fpn_channels=16", "--set", "model.box_head_channels=16")
    code, out, err = run(*command, "--weights", f"{backbone}_caffe.pth", *arguments)
    assert code == 0, err
    model = configs[0].config.model
    assert {name: getattr(model.preprocessing, name) for name in PRESETS["caffe"]} == PRESETS["caffe"]
    assert model.stride_in_1x1 is strides
    assert f"{backbone}_caffe.pth: from Caffe, judging by its name" in out
    first = "conv1.weight" if strides else "0.weight"
    given = weights[first if strides else f"features.{first}"]
    assert torch.equal(configs[0].model.state_dict()[f"backbone.body.{first}"].cpu(), given)
    code, _, err = run(*command, "--weights", f"{backbone}_caffe.pth", "--set", "model.preprocessing=imagenet")
    assert code == 0, err
    assert configs[1].config.model.preprocessing.channel_order == "RGB"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (
            {
                "session": 1,
                "model": {"RCNN_base.0.weight": torch.zeros(64, 3, 7, 7), "RCNN_cls_score.bias": torch.ones(21)},
            },
            r"a Faster R-CNN of faster-rcnn.pytorch .*no feature pyramid\n.*\n.*resnet101_caffe.pth",
        ),
        (
            {"fpn.C1.0.weight": torch.zeros(64, 3, 7, 7), "rpn.conv_shared.weight": torch.zeros(512, 256, 3, 3)},
            r"Matterport's Mask R-CNN .*\n.*\n.*--weights COCO_V1",
        ),
    ],
)
def test_models_of_older_repositories_are_refused_by_name(tmp_path, content, words):
    torch.save(content, tmp_path / "old.pth")
    with pytest.raises(UserError, match=words):
        starting_weights(tmp_path / "old.pth")


def test_a_backbone_alone_is_no_detector(tmp_path):
    torch.save(torchvision.models.resnet18().state_dict(), tmp_path / "w.pth")
    with pytest.raises(UserError, match=r"no tensor roi_heads\.box_predictor"):
        load_detector(tmp_path / "w.pth", "maskrcnn_resnet18_fpn")

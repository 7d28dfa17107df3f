"""Checkpoints and torchvision state dicts."""

import os
import pickle

import pytest
import torch
import torchvision
from tiny import tiny_config

from maskrcnn.checkpoint import (
    load_checkpoint,
    load_torchvision,
    metadata_of,
    read_state_dict,
    save_checkpoint,
)
from maskrcnn.config import ModelConfig, from_dict, to_dict
from maskrcnn.errors import UserError
from maskrcnn.metadata import ModelMetadata
from maskrcnn.model.detector import MaskRCNN


def torchvision_weights(classes: int = 4) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return torchvision.models.get_model(
        "maskrcnn_resnet50_fpn", weights=None, weights_backbone=None, num_classes=classes
    ).state_dict()


def test_a_checkpoint_comes_back_equal(tmp_path, model):
    path = tmp_path / "model.safetensors"
    save_checkpoint(path, model, figures={"mask_ap": 0.5})
    loaded = load_checkpoint(path)
    assert loaded.config == model.config
    for name, value in model.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[name]), name
    assert not loaded.training


def test_configurations_survive_json():
    config = tiny_config()
    assert from_dict(ModelConfig, to_dict(config)) == config
    with pytest.raises(UserError, match=r"unknown field.* wings"):
        from_dict(ModelConfig, {**to_dict(config), "wings": 2})


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", os.urandom(4096)])
def test_a_file_that_is_no_checkpoint_is_refused(tmp_path, content):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(UserError, match="not a checkpoint"):
        load_checkpoint(path)


def test_a_missing_checkpoint_is_named(tmp_path):
    with pytest.raises(UserError, match=r"no file .*gone\.safetensors"):
        load_checkpoint(tmp_path / "gone.safetensors")


def test_safetensors_given_as_weights_are_checked_like_checkpoints(tmp_path):
    with pytest.raises(UserError, match=r"no file .*gone\.safetensors"):
        read_state_dict(tmp_path / "gone.safetensors")
    (tmp_path / "bad.safetensors").write_bytes(b"nothing of the kind")
    with pytest.raises(UserError, match="not a checkpoint"):
        read_state_dict(tmp_path / "bad.safetensors")


def test_foreign_safetensors_are_refused(tmp_path):
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(1)}, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match="without maskrcnn's header"):
        load_checkpoint(tmp_path / "a.safetensors")


def test_weights_of_another_class_count_name_the_tensors(tmp_path, model):
    path = tmp_path / "model.safetensors"
    save_checkpoint(path, model)
    other = MaskRCNN(tiny_config(class_names=("one",), category_ids=(1,)))
    from maskrcnn.checkpoint import load_weights, read_tensors

    with pytest.raises(UserError, match=r"of another shape \(first: roi_heads\.box_predictor") as caught:
        load_weights(other, read_tensors(path)[0], path)
    assert "[4, 32] instead of [2, 32]" in str(caught.value)


def test_a_torchvision_state_dict_loads_and_tells_its_classes(tmp_path):
    weights = torchvision_weights()
    torch.save(weights, tmp_path / "w.pth")
    model = load_torchvision(tmp_path / "w.pth", "maskrcnn_resnet50_fpn")
    assert model.config.class_names == ("class_1", "class_2", "class_3")
    assert model.config.category_ids == (1, 2, 3)
    for name, value in weights.items():
        assert torch.equal(value, model.state_dict()[name]), name


def test_coco_weights_get_cocos_names(tmp_path):
    torch.save({"model": torchvision_weights(91)}, tmp_path / "w.pth")
    model = load_torchvision(tmp_path / "w.pth", "maskrcnn_resnet50_fpn")
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
    model = load_torchvision(tmp_path / "w.pth", "maskrcnn_resnet50_fpn")
    assert {m.eps for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)} == {epsilon}
    chosen = load_torchvision(tmp_path / "w.pth", "maskrcnn_resnet50_fpn", batch_norm_epsilon=1e-3)
    assert chosen.config.batch_norm_epsilon == 1e-3


def test_frozen_weights_of_coco_give_torchvisions_features(tmp_path):
    from torchvision.models.detection._utils import overwrite_eps
    from torchvision.ops import FrozenBatchNorm2d

    torch.manual_seed(1)
    backbone = torchvision.models.detection.backbone_utils.resnet_fpn_backbone(
        backbone_name="resnet18", weights=None, norm_layer=FrozenBatchNorm2d, trainable_layers=0
    )
    theirs = torchvision.models.detection.MaskRCNN(backbone, num_classes=91).eval()
    for name, value in theirs.state_dict().items():
        if name.endswith("running_var"):
            value.uniform_(1e-5, 4e-5)  # so small that the epsilon decides
        if name.endswith(("bn1.weight", "bn2.weight", "downsample.1.weight")):
            value *= 2e-3
    overwrite_eps(theirs, 0.0)
    torch.save(theirs.state_dict(), tmp_path / "w.pth")
    ours = load_torchvision(tmp_path / "w.pth", "maskrcnn_resnet18_fpn")
    image = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        expected = theirs.backbone(image)
        found = ours.backbone(image)
    for level, feature in expected.items():
        torch.testing.assert_close(found[level], feature, rtol=1e-3, atol=1e-4 * float(feature.abs().max()))


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
    model = load_torchvision(tmp_path / "old.pth", "maskrcnn_resnet50_fpn")
    assert torch.equal(model.state_dict()["roi_heads.mask_head.3.0.weight"], weights["roi_heads.mask_head.3.0.weight"])


def test_weights_of_another_architecture_are_refused(tmp_path):
    torch.save(torchvision_weights(), tmp_path / "w.pth")
    with pytest.raises(UserError, match="do not fit maskrcnn_resnet18_fpn"):
        load_torchvision(tmp_path / "w.pth", "maskrcnn_resnet18_fpn")


def test_a_classifier_is_no_detector(tmp_path):
    torch.save(torchvision.models.resnet18().state_dict(), tmp_path / "w.pth")
    with pytest.raises(UserError, match=r"no tensor roi_heads\.box_predictor"):
        load_torchvision(tmp_path / "w.pth", "maskrcnn_resnet18_fpn")


class Trap:
    """Unpickling this would create a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_a_pickle_with_code_is_refused_and_not_run(tmp_path):
    trap = tmp_path / "sprung"
    with open(tmp_path / "w.pth", "wb") as file:
        pickle.dump({"model": Trap(trap)}, file)
    torch.save({"model": Trap(trap)}, tmp_path / "zip.pth")
    for name in ("w.pth", "zip.pth"):
        with pytest.raises(UserError, match="not a state dict of plain tensors"):
            read_state_dict(tmp_path / name)
    assert not trap.exists()


def test_an_object_that_is_no_state_dict_is_refused(tmp_path):
    torch.save([1, 2, 3], tmp_path / "w.pth")
    with pytest.raises(UserError, match="a list that is not names"):
        read_state_dict(tmp_path / "w.pth")


def test_metadata_survives_json_and_guards_its_contract(tmp_path, model):
    metadata = metadata_of(model.config)
    path = tmp_path / "x.onnx"
    assert ModelMetadata.from_json(metadata.to_json(), path) == metadata
    with pytest.raises(UserError, match="contract version 7"):
        ModelMetadata.from_json(metadata.to_json().replace('"contract": 1', '"contract": 7'), path)
    with pytest.raises(UserError, match="metadata that cannot be read"):
        ModelMetadata.from_json("{}", path)

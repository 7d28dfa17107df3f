"""Checkpoints, and state dicts in files."""

import json
import os

import pytest
import torch
from tiny import tiny_config

from maskrcnn.config import ModelConfig, from_dict, to_dict
from maskrcnn.errors import UserError
from maskrcnn.metadata import ModelMetadata
from maskrcnn.model.detector import MaskRCNN
from maskrcnn.weights.checkpoint import load_checkpoint, metadata_of, save_checkpoint, write_tensors


def test_a_checkpoint_comes_back_equal(tmp_path, model):
    path = tmp_path / "model.safetensors"
    save_checkpoint(path, model, metrics={"mask_ap": 0.5})
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


def test_foreign_safetensors_are_refused(tmp_path):
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(1)}, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match="without maskrcnn's header"):
        load_checkpoint(tmp_path / "a.safetensors")


def test_weights_of_another_class_count_name_the_tensors(tmp_path, model):
    path = tmp_path / "model.safetensors"
    save_checkpoint(path, model)
    other = MaskRCNN(tiny_config(class_names=("one",), category_ids=(1,)))
    from maskrcnn.weights.checkpoint import load_weights, read_tensors

    with pytest.raises(UserError, match=r"of another shape \(first: roi_heads\.box_predictor") as caught:
        load_weights(other, read_tensors(path)[0], path)
    assert "[4, 32] instead of [2, 32]" in str(caught.value)


def test_metadata_survives_json_and_guards_its_contract(tmp_path, model):
    metadata = metadata_of(model.config)
    path = tmp_path / "x.onnx"
    assert ModelMetadata.from_json(metadata.to_json(), path) == metadata
    with pytest.raises(UserError, match="contract version 7"):
        ModelMetadata.from_json(metadata.to_json().replace('"contract": 1', '"contract": 7'), path)
    with pytest.raises(UserError, match="metadata that cannot be read"):
        ModelMetadata.from_json("{}", path)


def test_metadata_of_before_faster_rcnn_means_masks(tmp_path, model):
    values = json.loads(metadata_of(model.config).to_json())
    assert values.pop("has_masks") is True
    assert ModelMetadata.from_json(json.dumps(values), tmp_path / "x.onnx").has_masks
    boxes_only = metadata_of(tiny_config(has_masks=False))
    assert not ModelMetadata.from_json(boxes_only.to_json(), tmp_path / "x.onnx").has_masks


def test_a_configuration_of_before_the_variants_still_loads(tmp_path, model):
    path = tmp_path / "old.safetensors"
    newer = {"head_batch_norm", "rpn_convolutions", "box_head_convolutions", "has_masks"}
    newer |= {"neck", "bifpn_repeats", "pool_method"}
    config = {name: value for name, value in to_dict(model.config).items() if name not in newer}
    write_tensors(path, model.state_dict(), {"config": config})
    assert load_checkpoint(path).config == model.config


def test_the_state_of_a_run_is_no_checkpoint(tmp_path, model):
    path = tmp_path / "state.safetensors"
    write_tensors(path, {"model.x": torch.zeros(1)}, {"config": {"model": to_dict(model.config)}})
    with pytest.raises(UserError, match=r"the state of a run[\s\S]*best\.safetensors"):
        load_checkpoint(path)

"""Preprocessing by name: what becomes of a pixel, and where the choice is kept."""

import numpy as np
import pytest
import torch
from tiny import tiny_config

from maskrcnn.config import changed
from maskrcnn.data.coco import CocoDataset
from maskrcnn.errors import UserError
from maskrcnn.imaging.preprocess import PRESETS, Preprocessing, batch_images, with_preset
from maskrcnn.metadata import ModelMetadata
from maskrcnn.model.detector import MaskRCNN
from maskrcnn.settings import assignments, merged, with_sections
from maskrcnn.training.recipe import training_config
from maskrcnn.training.samples import TrainingSamples
from maskrcnn.weights.checkpoint import load_checkpoint, metadata_of, save_checkpoint

SIZES = {"min_size_px": 32, "max_size_px": 64}
CAFFE = Preprocessing(**PRESETS["caffe"], **SIZES)


def test_a_pixel_in_caffes_way_by_hand():
    image = np.full((32, 32, 3), (10, 20, 30), np.uint8)  # RGB
    images, sizes = batch_images([image], CAFFE)
    model = MaskRCNN(tiny_config(preprocessing=CAFFE))
    found = model.normalise(torch.from_numpy(images), torch.from_numpy(sizes))[0, :, 5, 5]
    assert found.tolist() == pytest.approx([30 - 102.9801, 20 - 115.9465, 10 - 122.7717], abs=1e-4)


def test_padding_is_zero_after_the_mean_is_taken_off():
    images, sizes = batch_images([np.full((32, 50, 3), 200, np.uint8)], CAFFE)
    normalised = MaskRCNN(tiny_config(preprocessing=CAFFE)).normalise(torch.from_numpy(images), torch.from_numpy(sizes))
    assert images.shape[3] == 64 and not normalised[..., 50:].any() and normalised[..., :50].all()


def test_the_usual_preset_changes_nothing():
    assert Preprocessing(**PRESETS["imagenet"]) == Preprocessing()


def test_training_samples_are_in_the_models_order(shapes):
    dataset = CocoDataset.load(shapes, "train")
    rgb, bgr = (
        TrainingSamples(dataset, Preprocessing(**PRESETS[name], **SIZES), seed=1)[0, 3].image
        for name in ("imagenet", "caffe")
    )
    np.testing.assert_array_equal(bgr, rgb[::-1])
    assert not np.array_equal(bgr, rgb)


def test_a_checkpoint_and_the_metadata_of_other_files_keep_it(tmp_path):
    model = MaskRCNN(tiny_config(preprocessing=CAFFE))
    save_checkpoint(tmp_path / "m.safetensors", model)
    config = load_checkpoint(tmp_path / "m.safetensors").config
    assert config.preprocessing == CAFFE
    text = metadata_of(config).to_json()
    assert ModelMetadata.from_json(text, tmp_path / "m.onnx").preprocessing == CAFFE


@pytest.mark.parametrize("texts", [["model.preprocessing=caffe"], ["model.preprocessing.preset=caffe"]])
def test_a_setting_names_it_beside_other_settings(shapes, texts):
    settings = with_sections(assignments([*texts, "model.fpn_channels=32"]))
    settings = merged(settings, {"model": {"preprocessing": {"min_size_px": 64}}})  # as --min-size makes it
    dataset = CocoDataset.load(shapes, "train")
    found = training_config(dataset, dataset, settings).model
    assert found.preprocessing.channel_order == "BGR" and found.preprocessing.std == (1 / 255,) * 3
    assert found.preprocessing.mean == pytest.approx([102.9801 / 255, 115.9465 / 255, 122.7717 / 255])
    assert (found.preprocessing.min_size_px, found.fpn_channels) == (64, 32)


def test_a_name_alone_will_do_in_python(shapes):
    dataset = CocoDataset.load(shapes, "train")
    found = training_config(dataset, dataset, {"model": {"preprocessing": "caffe"}}).model.preprocessing
    assert found.channel_order == "BGR"
    assert changed(tiny_config(), {"preprocessing": "caffe"}).preprocessing.std == (1 / 255,) * 3


def test_what_stands_beside_a_preset_counts_more():
    found = with_preset({"preset": "caffe", "mean": (0.4, 0.5, 0.6)})
    assert found == {**PRESETS["caffe"], "mean": (0.4, 0.5, 0.6)}


def test_another_preset_is_refused():
    with pytest.raises(UserError, match=r"preprocessing 'tensorflow'\n  expected: one of imagenet, caffe"):
        with_preset("tensorflow")

"""Models with other backbones, necks and pooling methods for export tests.

Together they include every backbone family, neck and method. Training tests, which are faster, cover combinations.
"""

import functools

import torch
from tiny import lively_model, tiny_config

from maskrcnn.imaging.preprocess import PRESETS, Preprocessing
from maskrcnn.model.detector import MaskRCNN

CAFFE = Preprocessing(**PRESETS["caffe"], min_size_px=96, max_size_px=160)
EXPORTED = {
    "resnet_panet_pool": {"neck": "panet", "pool_method": "pool"},
    "mobilenet_bifpn_crop": {
        "backbone": "mobilenet_v3_large",
        "batch_norm_epsilon": 1e-3,
        "neck": "bifpn",
        "bifpn_repeats": 1,
        "pool_method": "crop",
    },
    "vgg_fpn_crop": {
        "backbone": "vgg16_bn",
        "frozen_batch_norm": True,
        "pool_method": "crop",
        "pool_aligned": True,
        "preprocessing": CAFFE,
    },
    "convnext_panet_align": {"backbone": "convnext_tiny", "neck": "panet"},
}


@functools.cache
def variant_model(name: str) -> MaskRCNN:
    """A model of `EXPORTED` that detects objects in drawn shapes."""
    config = tiny_config(**EXPORTED[name])
    model = lively_model(config)
    if config.preprocessing == CAFFE:  # otherwise pixels, 57 times as large, would saturate all scores
        with torch.no_grad():
            model.backbone.body["0"].weight /= 57
    return model

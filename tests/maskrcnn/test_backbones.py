"""Every backbone: its maps, names and norms, and ImageNet's weights for it."""

import copy
from dataclasses import replace

import pytest
import torch
import torchvision
from tiny import lively_model, tiny_config

from maskrcnn.config import BACKBONES, MODELS, OTHER_BACKBONES, RESNETS, model_config
from maskrcnn.errors import UserError
from maskrcnn.imaging.preprocess import Preprocessing
from maskrcnn.model.backbone import Backbone, FoldedBatchNorm2d, FoldedConv2d
from maskrcnn.model.detector import MaskRCNN
from maskrcnn.model.inference import inference_copy
from maskrcnn.training.optimizer import freeze_stages, parameter_groups
from maskrcnn.weights.checkpoint import load_weights
from maskrcnn.weights.finetuning import finetuning_tensors
from maskrcnn.weights.torchvision import model_changes, starting_weights

CHANNELS = {
    "vgg16": (128, 256, 512, 512),
    "vgg16_bn": (128, 256, 512, 512),
    "mobilenet_v3_large": (24, 40, 112, 960),
    "convnext_tiny": (96, 192, 384, 768),
}


def backbone(name: str, **changes) -> Backbone:
    torch.manual_seed(0)
    return Backbone(tiny_config(backbone=name, **changes))


@pytest.mark.parametrize("name", BACKBONES)
def test_the_maps_have_strides_4_to_64(name):
    with torch.device("meta"):  # shapes alone
        found = backbone(name)
        maps = found.body(torch.empty(1, 3, 128, 160))
        pyramid = found(torch.empty(1, 3, 128, 160))
    assert [tuple(x.shape[2:]) for x in maps.values()] == [(32, 40), (16, 20), (8, 10), (4, 5)]
    if name in CHANNELS:
        assert tuple(x.shape[1] for x in maps.values()) == CHANNELS[name]
    assert list(pyramid) == ["0", "1", "2", "3", "pool"]
    assert [tuple(x.shape[1:]) for x in pyramid.values()] == [(16, 128 >> k, 160 >> k) for k in range(2, 6)] + [
        (16, 2, 3)
    ]


@pytest.mark.parametrize("name", OTHER_BACKBONES)
def test_a_classifiers_layers_and_names(name):
    with torch.device("meta"):
        theirs = {k.removeprefix("features."): v for k, v in torchvision.models.get_model(name).state_dict().items()}
        ours = backbone(name).body.state_dict()
    body = {k: v.shape for k, v in theirs.items() if not k.startswith("classifier.")}
    assert {k: v.shape for k, v in ours.items()} == body


@pytest.mark.parametrize("name", ["vgg16_bn", "mobilenet_v3_large", "convnext_tiny"])
def test_the_last_map_is_what_the_classifier_pools(name):
    classifier = torchvision.models.get_model(name).features.eval()
    found = backbone(name, batch_norm_epsilon=1e-3 if name.startswith("mobile") else 1e-5).eval()
    found.body.load_state_dict(classifier.state_dict())
    images = torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        torch.testing.assert_close(list(found.body(images).values())[-1], classifier(images))


def test_convnexts_maps_are_normed():
    found = backbone("convnext_tiny")
    with torch.no_grad():
        maps = found.body(torch.rand(1, 3, 64, 64))
        normed = [norm(10 * x + 3) for norm, x in zip(found.norms, maps.values(), strict=True)]
    for each in normed:
        torch.testing.assert_close(each.mean(dim=1), torch.zeros_like(each[:, 0]), atol=1e-4, rtol=0)
        torch.testing.assert_close(each.var(dim=1, unbiased=False), torch.ones_like(each[:, 0]), atol=1e-2, rtol=0)
    with_neck, seen = found(torch.rand(1, 3, 64, 64)), []
    found.fpn.register_forward_pre_hook(lambda _, inputs: seen.extend(inputs[0].values()))
    found(torch.rand(1, 3, 64, 64))
    assert len(with_neck) == 5 and all(abs(x.mean()) < 1e-5 for x in seen)


def lively(found: Backbone) -> Backbone:
    """The same with norms that do something."""
    rng = torch.Generator().manual_seed(1)
    for module in found.modules():
        if isinstance(module, torch.nn.BatchNorm2d | FoldedBatchNorm2d):
            module.weight.data.uniform_(0.5, 1.5, generator=rng)
            module.bias.data.normal_(std=0.1, generator=rng)
            module.running_mean.normal_(std=0.1, generator=rng)
            module.running_var.uniform_(0.5, 2.0, generator=rng)
    return found


@pytest.mark.parametrize("name", ["vgg16_bn", "mobilenet_v3_large"])
def test_frozen_norms_are_computed_in_the_convolutions(name):
    plain = lively(backbone(name, batch_norm_epsilon=1e-3)).eval().double()
    frozen = backbone(name, batch_norm_epsilon=1e-3, frozen_batch_norm=True).double()
    frozen.load_state_dict(plain.state_dict(), strict=False)
    norms = [m for m in frozen.modules() if isinstance(m, FoldedBatchNorm2d)]
    owners = [m.norm for m in frozen.modules() if isinstance(m, FoldedConv2d)]
    assert len(norms) > 10 and {id(norm) for norm in norms} == {id(norm) for norm in owners}
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in frozen.modules())
    images = torch.rand(1, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        for expected, found in zip(plain(images).values(), frozen.train()(images).values(), strict=True):
            torch.testing.assert_close(found, expected)
    twin = copy.deepcopy(frozen)
    assert {id(m.norm) for m in twin.modules() if isinstance(m, FoldedConv2d)}.isdisjoint(map(id, norms))


@pytest.mark.parametrize(
    "name", [pytest.param("vgg16_bn", marks=pytest.mark.slow), "mobilenet_v3_large", "convnext_tiny"]
)
def test_copies_for_inference_compute_the_same(name):
    model = lively_model(tiny_config(backbone=name, neck="bifpn", bifpn_repeats=1))
    images, sizes = torch.rand(2, 3, 64, 96) * 255, torch.tensor([[64, 96]] * 2)
    with torch.no_grad():
        whole, single, half = (
            each.features(images, sizes)
            for each in (model, inference_copy(model), inference_copy(model, torch.float16))
        )
    for expected, same, close in zip(whole, single, half, strict=True):
        torch.testing.assert_close(same, expected, atol=1e-3, rtol=1e-3)
        assert close.dtype == torch.float16
        assert (close.float() - expected).abs().mean() < 0.03 * expected.std()


@pytest.mark.parametrize("name", ["vgg16", "convnext_tiny"])
def test_without_batch_norm_freezing_it_changes_nothing(name):
    free, frozen = backbone(name), backbone(name, frozen_batch_norm=True)
    assert list(free.state_dict()) == list(frozen.state_dict())
    assert not any(isinstance(m, FoldedConv2d) for m in frozen.modules())


@pytest.mark.parametrize("name", ["resnet18", *OTHER_BACKBONES])
def test_five_stages_are_frozen_from_the_first(name):
    with torch.device("meta"):
        model = MaskRCNN(tiny_config(backbone=name))
    assert freeze_stages(model, 5) == []
    layers = [layer for stage in model.backbone.stages for layer in stage]
    with_weights = {key.split(".")[0] for key in model.backbone.body.state_dict()}
    assert len(model.backbone.stages) == 5 and len(set(layers)) == len(layers) and with_weights <= set(layers)
    freeze_stages(model, 2)
    first = {layer for stage in model.backbone.stages[:3] for layer in stage}
    for key, parameter in model.backbone.body.named_parameters():
        assert parameter.requires_grad == (key.split(".")[0] not in first), key
    assert all(p.requires_grad for k, p in model.named_parameters() if not k.startswith("backbone.body."))
    freeze_stages(model, 0)
    assert not any(p.requires_grad for p in model.backbone.body.parameters())


def test_convnexts_scales_of_layers_do_not_decay():
    with torch.device("meta"):
        model = MaskRCNN(tiny_config(backbone="convnext_tiny"))
    decayed, free = parameter_groups(model, 1e-4)
    scales = {id(p) for name, p in model.named_parameters() if name.endswith("layer_scale")}
    assert len(scales) == 18 and scales <= {id(p) for p in free["params"]}
    assert all(p.dim() > 1 for p in decayed["params"])


# Names and configurations


def test_every_backbone_has_a_named_model_with_and_without_masks():
    for name in (*RESNETS, *OTHER_BACKBONES):
        config = model_config(f"maskrcnn_{name}_fpn")
        assert config.backbone == name and config.has_masks and config.neck == "fpn"
    without = {f"fasterrcnn_{name}_fpn" for name in (*RESNETS, *OTHER_BACKBONES)} - set(MODELS)
    assert without == {"fasterrcnn_mobilenet_v3_large_fpn"}  # torchvision's of that name is another model
    assert model_config("maskrcnn_mobilenet_v3_large_fpn").batch_norm_epsilon == 1e-3


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"backbone": "resnet19"}, r"model\.backbone 'resnet19'\n  expected: one of resnet18, .*vgg16"),
        ({"neck": "nasfpn"}, r"model\.neck 'nasfpn'\n  expected: one of fpn, panet, bifpn"),
        ({"pool_method": "warp"}, r"model\.pool_method 'warp'\n  expected: one of align, pool, crop"),
        ({"bifpn_repeats": 0}, r"model\.bifpn_repeats 0\n  expected: at least 1"),
    ],
)
def test_what_there_is_not_is_refused(changes, text):
    with pytest.raises(UserError, match=text):
        tiny_config(**changes)


# ImageNet's weights


@pytest.mark.parametrize(
    ("name", "is_frozen", "epsilon"),
    [
        ("vgg16_bn", True, 1e-5),
        ("mobilenet_v3_large", True, 1e-3),
        ("convnext_tiny", False, 1e-5),
    ],
)
def test_a_classifiers_file_fills_the_backbone_alone(tmp_path, name, is_frozen, epsilon):
    torch.manual_seed(3)
    # The classifier's own layers are the larger part; small ones of the same names stand for them.
    saved = {f"features.{k}": torch.randn_like(v) if v.is_floating_point() else v for k, v in body_of(name).items()}
    torch.save({**saved, "classifier.0.weight": torch.ones(2), "classifier.0.bias": torch.ones(2)}, tmp_path / "w.pth")
    config = tiny_config(backbone=name)
    weights = starting_weights(tmp_path / "w.pth", config)
    assert weights.is_backbone and weights.class_count == 0
    changes = model_changes(weights, config)
    assert changes == {"frozen_batch_norm": is_frozen, "batch_norm_epsilon": epsilon}
    model = MaskRCNN(replace(config, **changes))
    tensors, taken = finetuning_tensors(model, weights)
    model.load_state_dict(tensors, strict=False)
    for key, value in model.backbone.body.state_dict().items():
        assert torch.equal(value, saved[f"features.{key}"]), key
    assert not any(key.startswith("backbone.body.") for key in taken.added) and not taken.dropped
    assert any(key.startswith("backbone.norms.") for key in taken.added) == (name == "convnext_tiny")


def body_of(name: str) -> dict[str, torch.Tensor]:
    return backbone(name).body.state_dict()


def test_another_classifiers_file_is_refused(tmp_path):
    saved = {f"features.{k}": v for k, v in body_of("mobilenet_v3_large").items()}
    torch.save({**saved, "classifier.0.weight": torch.ones(2)}, tmp_path / "w.pth")
    model = MaskRCNN(tiny_config(backbone="convnext_tiny"))
    tensors, _ = finetuning_tensors(model, starting_weights(tmp_path / "w.pth"))
    with pytest.raises(UserError, match=r"unexpected \(first: backbone\.body\."):
        load_weights(model, tensors, "w.pth")


def test_weights_by_name_bring_the_pixels_that_they_were_trained_on(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    features = torchvision.models.VGG16_Weights.IMAGENET1K_FEATURES
    for each in (features, torchvision.models.VGG16_Weights.IMAGENET1K_V1):
        torch.save(
            {"features.0.weight": torch.ones(1), "classifier.0.weight": torch.ones(1)},
            folder / each.url.rpartition("/")[2],
        )
    config = model_config("maskrcnn_vgg16_fpn", preprocessing=Preprocessing(min_size_px=600))
    changes = model_changes(starting_weights("IMAGENET1K_FEATURES", config), config)
    found = changes["preprocessing"]
    assert (found.mean, found.std) == ((0.48235, 0.45882, 0.40784), (1 / 255,) * 3) and found.min_size_px == 600
    own = replace(config, preprocessing=replace(config.preprocessing, std=(0.5, 0.5, 0.5)))
    assert "preprocessing" not in model_changes(starting_weights("IMAGENET1K_FEATURES", own), own)
    assert "preprocessing" not in model_changes(starting_weights("IMAGENET1K_V1", config), config)

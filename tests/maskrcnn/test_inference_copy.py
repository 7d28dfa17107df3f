"""Models as they are run: norms folded, half-precision weights by the rule, and graphs by shape."""

import pytest
import torch
from tiny import TINY_V2, lively_model, tiny_config

from maskrcnn.model.detector import MaskRCNN
from maskrcnn.model.inference import GraphedModel, inference_copy
from maskrcnn.runtime.verification.compare import EXACT, HALF, compare_outputs

NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
VARIANTS = {
    "plain": {},
    "frozen": {"frozen_batch_norm": True},
    "v2": TINY_V2,
    "bifpn": {"neck": "bifpn"},
    "mobilenet": {"backbone": "mobilenet_v3_large"},
    "vgg": {"backbone": "vgg16_bn", "neck": "panet"},
    "convnext": {"backbone": "convnext_tiny"},
}
# Random weights make more of bfloat16's eight bits the deeper a model is.
MARKED = {name: [pytest.mark.slow] * (name == "vgg") for name in VARIANTS}
HALF_CASES = [
    *(pytest.param(name, torch.float16, marks=MARKED[name]) for name in VARIANTS),
    *((name, torch.bfloat16) for name in ("plain", "frozen")),
]


def a_batch(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    images = torch.rand(2, 3, 96, 128, generator=torch.Generator().manual_seed(seed)) * 255
    return images, torch.tensor([[96, 128], [90, 100]])


def outputs(model: MaskRCNN, stages: dict | None = None) -> dict:
    with torch.inference_mode():
        return {name: value.numpy() for name, value in model(*a_batch(), stages).items()}


def norms_in(model: MaskRCNN) -> list[torch.nn.Module]:
    return [module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)]


@pytest.fixture(scope="module", params=[pytest.param(name, marks=MARKED[name]) for name in VARIANTS])
def variant(request) -> MaskRCNN:
    model = lively_model(tiny_config(**VARIANTS[request.param]))
    with torch.no_grad():
        for norm in norms_in(model.roi_heads):  # as it would be after training
            norm.running_mean.normal_(std=0.1)
            norm.running_var.uniform_(0.5, 2)
    return model


def test_folded_norms_change_nothing_but_rounding(variant):
    before = {name: value.clone() for name, value in variant.state_dict().items()}
    copied = inference_copy(variant)
    difference = compare_outputs(outputs(variant), outputs(copied), EXACT)
    assert difference.within(EXACT) and difference.detections > 10, str(difference)
    assert not norms_in(copied)
    assert not any(parameter.requires_grad for parameter in copied.parameters())
    for name, value in variant.state_dict().items():
        assert torch.equal(value, before[name]), f"the model itself changed: {name}"


@pytest.mark.parametrize(("variant", "dtype"), HALF_CASES, indirect=["variant"])
def test_half_precision_keeps_the_detections(variant, dtype):
    difference = compare_outputs(outputs(variant), outputs(inference_copy(variant, dtype)), HALF)
    assert difference.within(HALF) and difference.detections > 10, str(difference)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_is_in_half_precision_follows_the_rule(variant, dtype):
    found: dict[str, torch.Tensor] = {}
    made = inference_copy(variant, dtype)
    given = outputs(made, found)
    for module in made.modules():
        if isinstance(module, (torch.nn.Conv2d, torch.nn.ConvTranspose2d, torch.nn.Linear)):
            assert {parameter.dtype for parameter in module.parameters()} == {dtype}
    features = [found[name] for name in ("P2", "P6")]
    assert {value.dtype for value in features} == {dtype}
    single = ("normalised", "objectness_P2", "anchor_deltas_P2", "proposals", "class_logits", "box_deltas", "boxes")
    assert {found[name].dtype for name in (*single, "scores", "mask_logits", "masks")} == {torch.float32}
    assert {name: str(value.dtype) for name, value in given.items()} == {
        "num_detections": "int32",
        "boxes": "float32",
        "scores": "float32",
        "labels": "int64",
        "masks": "float32",
    }


def test_statistics_beyond_half_precision_survive():
    model = lively_model(tiny_config())
    norm = model.backbone.body["bn1"]
    with torch.no_grad():  # the same function with a variance that FP16 cannot hold
        norm.weight *= (1e8 / (norm.running_var + norm.eps)).sqrt()
        norm.running_var.fill_(1e8 - norm.eps)
    difference = compare_outputs(outputs(model), outputs(inference_copy(model, torch.float16)), HALF)
    assert difference.within(HALF) and difference.detections > 10, str(difference)


def test_the_whole_model_compiles_without_a_break(model):
    torch.compiler.reset()
    compiled = torch.compile(inference_copy(model, torch.bfloat16), backend="eager", fullgraph=True)
    with torch.inference_mode():
        found = {name: value.numpy() for name, value in compiled(*a_batch()).items()}
    difference = compare_outputs(outputs(model), found, HALF)
    assert difference.within(HALF) and difference.detections > 10, str(difference)


# Graphs


@NEEDS_GPU
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_graphs_on_a_gpu_compute_what_the_model_computes(model, dtype):
    made = inference_copy(model, dtype).cuda().to(memory_format=torch.channels_last)
    graphed = GraphedModel(made)
    kept = []
    with torch.inference_mode():
        for seed in range(4):
            images, sizes = (value.cuda() for value in a_batch(seed))
            images = images.contiguous(memory_format=torch.channels_last)
            kept.append((graphed(images, sizes), made(images, sizes)))
        assert graphed.captured == 1
        for found, wanted in kept:
            for name, value in wanted.items():
                torch.testing.assert_close(found[name], value)

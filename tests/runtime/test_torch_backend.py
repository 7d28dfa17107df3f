"""PyTorch as a backend: precisions, compiled, with graphs, and arrays of several libraries."""

import dataclasses

import numpy as np
import pytest
import torch
from fake_torch_cuda import Gpu

from maskrcnn.data.shapes import shapes_image
from maskrcnn.errors import UserError
from maskrcnn.imaging.preprocess import batch_images, batch_sizes
from maskrcnn.plugins.native import Kernels
from maskrcnn.runtime import Detector
from maskrcnn.runtime.backends import torch as torch_backend
from maskrcnn.runtime.backends.torch import TorchBackend
from maskrcnn.runtime.detector import load_backend
from maskrcnn.runtime.verification.compare import EXACT, HALF
from maskrcnn.runtime.verification.inputs import compare_backends

NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
NEEDS_TWO_GPUS = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two GPUs")


def feeds(batch: int = 2, seed: int = 0) -> dict[str, np.ndarray]:
    images = np.random.default_rng(seed).uniform(0, 255, (batch, 3, 64, 96)).astype(np.float32)
    return {"images": images, "image_sizes": np.array([[64, 91]] * batch, np.int64)}


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_agrees(checkpoint, precision):
    reference, half = (load_backend(checkpoint, device="cpu", precision=p) for p in ("fp32", precision))
    assert (half.name, half.precision) == ("PyTorch", precision)
    difference = compare_backends(reference, half, HALF)
    assert difference.within(HALF) and difference.detections > 10, str(difference)
    kinds = {name: value.dtype for name, value in half.stages(feeds(), ["P2", "boxes"]).items()}
    assert kinds["boxes"] == np.float32 and kinds["P2"] == (np.float16 if precision == "fp16" else np.float32)


def test_half_precision_leaves_the_given_model_alone(model):
    TorchBackend(model, device="cpu", precision="bf16")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert TorchBackend(model, device="cpu").model is model


def test_compiled_code_agrees(checkpoint, monkeypatch):
    monkeypatch.setattr(torch_backend, "COMPILER", "aot_eager")  # the default one compiles for minutes on a CPU
    torch.compiler.reset()
    reference = load_backend(checkpoint, device="cpu")
    compiled = load_backend(checkpoint, device="cpu", compile=True)
    assert compiled.name == "PyTorch, compiled"
    for seed in range(2):
        found, wanted = compiled(feeds(seed=seed)), reference(feeds(seed=seed))
        assert found["num_detections"].tolist() == wanted["num_detections"].tolist()
        for name, value in wanted.items():
            np.testing.assert_allclose(found[name], value, atol=1e-3, err_msg=name)
    assert compiled.stages(feeds(), ["P2"])["P2"].shape == (2, 16, 16, 24)


def test_a_timed_run_gives_the_same(checkpoint):
    backend = load_backend(checkpoint, device="cpu")
    found, parts = backend.infer_timed(feeds())
    assert parts == {}
    for name, value in backend(feeds()).items():
        np.testing.assert_array_equal(found[name], value)


def test_options_that_do_not_exist_are_refused(checkpoint):
    with pytest.raises(UserError, match="precision 'fp8'\nexpected: fp32 or bf16 or fp16"):
        load_backend(checkpoint, precision="fp8")
    with pytest.raises(UserError, match="CUDA graphs on cpu\nexpected: a GPU"):
        load_backend(checkpoint, device="cpu", graphs=True)


def test_tensors_of_the_host_are_inputs_too(checkpoint):
    backend = load_backend(checkpoint, device="cpu")
    found = backend({name: torch.from_numpy(value) for name, value in feeds().items()})
    for name, value in backend(feeds()).items():
        assert isinstance(found[name], np.ndarray)
        np.testing.assert_array_equal(found[name], value)
    with pytest.raises(UserError, match="images float64"):
        backend({name: torch.from_numpy(value).double() for name, value in feeds().items()})


@pytest.mark.parametrize("order", ["RGB", "BGR"])
@pytest.mark.parametrize("with_kernels", [False, True])
def test_photos_are_resized_by_torch_and_by_the_kernels_as_by_numpy(model, kernels_for_cpu, order, with_kernels):
    backend = TorchBackend(model, device="cpu")
    settings = dataclasses.replace(backend.metadata.preprocessing, channel_order=order)
    backend.metadata = dataclasses.replace(backend.metadata, preprocessing=settings)
    if with_kernels:
        backend._kernels = Kernels(kernels_for_cpu)
    images = [shapes_image(np.random.default_rng(seed), (150 + 70 * seed, 200))[0] for seed in range(2)]
    images[1] = images[1][:, ::-1]
    wanted, _ = batch_images(images, settings)
    found = backend._batch(images, *batch_sizes(images, settings))
    assert found.is_contiguous(memory_format=torch.channels_last)
    np.testing.assert_allclose(found.numpy(), wanted, atol=2e-2)


def test_masks_are_pasted_by_the_kernels_as_by_numpy(model, kernels_for_cpu):
    backend = TorchBackend(model, device="cpu")
    backend._kernels = Kernels(kernels_for_cpu)
    found = Detector(backend).detect([shapes_image(np.random.default_rng(1), (120, 171))[0]])[0]
    assert len(found) > 3 and found.paste is None
    wanted = found.full_masks(0.4)
    np.testing.assert_array_equal(backend._paste(found.masks, found.boxes_xyxy_px, found.size_hw, 0.4), wanted)


@pytest.mark.parametrize("call", ["infer", "infer_timed", "run_images", "stages", "_paste"])
def test_every_call_works_on_the_models_gpu(model, monkeypatch, call):
    pretended = Gpu(1)
    pretended.install(monkeypatch)
    backend, seen = TorchBackend(model, device="cpu"), []
    wanted = backend.infer(feeds())
    backend.device = torch.device("cuda", 1)  # where the pretended GPU says that the tensors are
    outputs = {name: torch.from_numpy(value) for name, value in wanted.items()}
    image = shapes_image(np.random.default_rng(1), (64, 96))[0]

    def note(*arguments):
        seen.append(pretended.device_now)
        return outputs

    def paste(kernels, masks, *arguments, **named):
        seen.append(pretended.device_now)
        return torch.zeros(len(masks), 64, 3, dtype=torch.int32)

    monkeypatch.setattr(backend, "_run", note)
    monkeypatch.setattr(backend, "model", note)
    monkeypatch.setattr(backend, "_batch", note)
    monkeypatch.setattr(torch_backend.cuda_ops, "paste_masks", paste)
    monkeypatch.setattr(torch_backend, "_to_device", lambda value, device: torch.as_tensor(value))
    arguments = {
        "infer": (feeds(),),
        "infer_timed": (feeds(),),
        "run_images": ([image],),
        "stages": (feeds(), ["boxes"]),
        "_paste": (np.zeros((2, 28, 28), np.float32), np.zeros((2, 4), np.float32), (64, 96), 0.5),
    }[call]
    getattr(backend, call)(*arguments)
    assert seen and set(seen) == {1} and pretended.device_now == 0


@NEEDS_TWO_GPUS
@pytest.mark.parametrize("graphs", [False, True])
def test_a_model_on_the_second_gpu_agrees_with_the_cpu(checkpoint, monkeypatch, graphs):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setenv("MASKRCNN_KERNELS", "off")  # for Triton's NMS
    reference, backend = (
        load_backend(checkpoint, device="cpu"),
        load_backend(checkpoint, device="cuda:1", graphs=graphs),
    )
    for _ in range(4):
        difference = compare_backends(reference, backend, EXACT)
        assert difference.within(EXACT) and difference.detections > 10, str(difference)
    assert torch.cuda.current_device() == 0


@NEEDS_GPU
def test_a_gpu_without_a_number_is_the_one_that_was_current(checkpoint):
    assert load_backend(checkpoint, device="cuda").device == torch.device("cuda", torch.cuda.current_device())


@NEEDS_GPU
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"graphs": True},
        {"precision": "fp16"},
        {"precision": "fp16", "graphs": True},
        {"precision": "bf16", "graphs": True},
        {"precision": "fp16", "graphs": True, "compile": True},
    ],
    ids=str,
)
def test_a_gpu_agrees_with_the_cpu(checkpoint, options, monkeypatch):
    torch.compiler.reset()
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    reference, backend = load_backend(checkpoint, device="cpu"), load_backend(checkpoint, device="cuda", **options)
    tolerance = HALF if "precision" in options else EXACT
    for _ in range(3):  # from the second time on with graphs
        difference = compare_backends(reference, backend, tolerance)
        assert difference.within(tolerance) and difference.detections > 10, str(difference)
    images = [shapes_image(np.random.default_rng(seed), (150 + 70 * seed, 200))[0] for seed in range(2)]
    found, wanted = Detector(backend).detect(images), Detector(reference).detect(images)
    assert [abs(len(a) - len(b)) <= 2 for a, b in zip(found, wanted, strict=True)] == [True, True]
    _, parts = backend.infer_timed(feeds())
    assert list(parts) == ["copy in", "engine", "copy out"] and min(parts.values()) > 0


@NEEDS_GPU
def test_a_gpus_tensors_give_tensors_there(checkpoint):
    backend = load_backend(checkpoint, device="cuda", graphs=True)
    kept = [backend({name: torch.from_numpy(v).cuda() for name, v in feeds(seed=s).items()}) for s in range(3)]
    for seed, found in enumerate(kept):
        assert all(value.is_cuda for value in found.values())
        for name, value in backend(feeds(seed=seed)).items():
            np.testing.assert_allclose(found[name].cpu().numpy(), value, atol=1e-3)

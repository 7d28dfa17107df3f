"""PyTorch backend: precisions, compiled, with graphs, and arrays of several libraries."""

import dataclasses

import numpy as np
import pytest
import torch
from fake_torch_cuda import Gpu

from maskrcnn.data.shapes import shapes_image
from maskrcnn.errors import UserError
from maskrcnn.imaging.preprocess import Preprocessing, batch_images, batch_sizes
from maskrcnn.runtime import Detector
from maskrcnn.runtime.backends import torch as torch_backend
from maskrcnn.runtime.backends.torch import TorchBackend, resize_batch
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
    with pytest.raises(UserError, match="precision 'fp8'\n  expected: fp32 or bf16 or fp16"):
        load_backend(checkpoint, precision="fp8")
    with pytest.raises(UserError, match="CUDA graphs on cpu\n  expected: a GPU"):
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
def test_torch_resizes_images_as_numpy(order):
    settings = Preprocessing(min_size_px=96, max_size_px=160, channel_order=order)
    images = [shapes_image(np.random.default_rng(seed), (150 + 70 * seed, 200))[0] for seed in range(2)]
    images[1] = images[1][:, ::-1]
    expected, _ = batch_images(images, settings)
    found = resize_batch(images, *batch_sizes(images, settings), settings, torch.device("cpu"))
    np.testing.assert_allclose(found.numpy(), expected, atol=2e-2)


@pytest.mark.parametrize("call", ["infer", "infer_timed", "run_images", "stages"])
def test_every_call_works_on_the_models_gpu(model, monkeypatch, call):
    pretended = Gpu(1)
    pretended.install(monkeypatch)
    devices = []

    class Recording(torch.nn.Module):
        """A model that records the current GPU."""

        def forward(self, *arguments):
            devices.append(pretended.device_now)
            return {"boxes": torch.zeros(1, 4)}

    backend = TorchBackend(model, device="cpu", compile=False)
    backend.device = torch.device("cuda", 1)  # where the pretended GPU says that the tensors are
    backend.model = Recording()
    monkeypatch.setattr(backend, "_run", backend.model)
    monkeypatch.setattr(torch_backend, "_to_device", lambda value, device: torch.as_tensor(value))
    monkeypatch.setattr(torch_backend, "resize_batch", lambda *arguments: torch.zeros(1, 3, 64, 96))
    arguments = {
        "infer": (feeds(),),
        "infer_timed": (feeds(),),
        "run_images": ([np.zeros((64, 96, 3), np.uint8)],),
        "stages": (feeds(), ["boxes"]),
    }[call]
    getattr(backend, call)(*arguments)
    assert devices == [1] and pretended.device_now == 0


@NEEDS_TWO_GPUS
@pytest.mark.parametrize("graphs", [False, True])
def test_a_model_on_the_second_gpu_agrees_with_the_cpu(checkpoint, monkeypatch, graphs):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
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
    for ours, theirs in zip(found, wanted, strict=True):
        assert abs(len(ours) - len(theirs)) <= 2
        on_cpu = dataclasses.replace(ours, paste=None)
        np.testing.assert_array_equal(ours.full_masks(0.4), on_cpu.full_masks(0.4))
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

"""ONNX Runtime's default provider, and the fallback to the CPU if CUDA does not work."""

from types import SimpleNamespace

import numpy as np
import pytest

onnxruntime = pytest.importorskip("onnxruntime")

from maskrcnn.errors import UserError  # noqa: E402
from maskrcnn.runtime.backends import onnxruntime_providers as providers  # noqa: E402
from maskrcnn.runtime.backends.onnxruntime_providers import GpuOptions, Provider  # noqa: E402
from maskrcnn.runtime.detector import load_backend  # noqa: E402


def feeds() -> dict[str, np.ndarray]:
    images = np.random.default_rng(0).uniform(0, 255, (2, 3, 64, 96)).astype(np.float32)
    return {"images": images, "image_sizes": np.array([[64, 91]] * 2, np.int64)}


@pytest.mark.parametrize(
    ("listed", "compiled", "gpus", "best"),
    [
        (["CPU"], ["CUDA", "CPU"], (90,), Provider.CUDA),  # as onnxruntime-gpu is on a machine with a GPU
        (["CPU"], ["CUDA", "CPU"], (), Provider.CPU),
        (["CPU"], ["CPU"], (90,), Provider.CPU),
        (["CPU", "CUDA"], ["CPU"], (), Provider.CUDA),  # a provider that was registered
    ],
)
def test_the_best_provider_is_cuda_where_there_is_a_gpu(monkeypatch, listed, compiled, gpus, best):
    devices = [SimpleNamespace(ep_name=f"{name}ExecutionProvider") for name in listed]
    monkeypatch.setattr(onnxruntime, "get_ep_devices", lambda: devices, raising=False)
    available = [f"{name}ExecutionProvider" for name in compiled]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: available)
    monkeypatch.setattr(providers, "find_gpus", lambda: gpus)
    assert providers.best_provider() is best
    monkeypatch.delattr(onnxruntime, "get_ep_devices")  # older than 1.22
    if "CUDA" in compiled:
        assert providers.best_provider() is best


@pytest.fixture
def broken_cuda(monkeypatch):
    """An ONNX Runtime with a GPU but without CUDA's libraries, which records the providers of each call."""
    real, asked = onnxruntime.InferenceSession, []
    available = ["CUDAExecutionProvider", "CPUExecutionProvider"]

    def open_session(path, options, providers, **fallback):
        names = [each if isinstance(each, str) else each[0] for each in providers]
        asked.append((names, fallback))
        if broken_cuda.raises and names != ["CPUExecutionProvider"]:
            raise RuntimeError("libcudnn.so.9: cannot open shared object file")
        return real(path, options, providers=["CPUExecutionProvider"])

    broken_cuda = SimpleNamespace(raises=False, asked=asked)
    monkeypatch.setattr(onnxruntime, "InferenceSession", open_session)
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: available)
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: None, raising=False)
    monkeypatch.setattr(providers, "find_gpus", lambda: (90,))
    return broken_cuda


@pytest.mark.parametrize(
    ("raises", "why"), [(False, "it uses CPUExecutionProvider instead"), (True, "libcudnn.so.9: cannot open")]
)
def test_a_gpu_that_stays_unused_is_reported(onnx_file, broken_cuda, raises, why):
    broken_cuda.raises = raises
    backend = load_backend(onnx_file, threads=1)
    assert backend.name == "ONNX Runtime" and backend.placement() is None
    (remark,) = backend.remarks()
    assert remark.startswith("ONNX Runtime on the CPU, though there is a GPU: ")
    assert why in remark and "pip install 'onnxruntime-gpu[cuda,cudnn]'" in remark
    assert broken_cuda.asked[0] == (["CUDAExecutionProvider", "CPUExecutionProvider"], {"enable_fallback": 0})
    assert backend(feeds())["num_detections"].shape == (2,)
    assert backend.stages(feeds(), ["boxes"])["boxes"].shape[0] == 2
    with pytest.raises(UserError, match="ONNX Runtime without CUDAExecutionProvider"):
        load_backend(onnx_file, provider="cuda")
    assert load_backend(onnx_file, provider="cpu").remarks() == []


def test_a_file_that_no_provider_loads(tmp_path, broken_cuda, capsys):
    (tmp_path / "bad.onnx").write_bytes(b"no model")
    for provider in (None, "cpu"):
        with pytest.raises(UserError, match="not a model that ONNX Runtime loads"):
            load_backend(tmp_path / "bad.onnx", provider=provider)
    assert capsys.readouterr().out == ""


def test_a_session_on_a_gpu_preserves_the_context(onnx_file, monkeypatch):
    pytest.importorskip("cuda.bindings.runtime")
    import fake_cuda

    runtime, real = fake_cuda.FakeRuntime(devices=2), onnxruntime.InferenceSession
    fake_cuda.install(monkeypatch, runtime)

    class OnGpu(real):
        def __init__(self, path, options, providers, **fallback) -> None:
            super().__init__(path, options, providers=["CPUExecutionProvider"])
            runtime.cudaSetDevice(1)

        def get_providers(self):
            return ["CUDAExecutionProvider", "CPUExecutionProvider"]

        def run(self, *arguments):
            runtime.cudaSetDevice(1)
            return super().run(*arguments)

    monkeypatch.setattr(onnxruntime, "InferenceSession", OnGpu)
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: None, raising=False)
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    backend = load_backend(onnx_file, provider="cuda", gpu=GpuOptions(device=1))
    assert runtime.context == 0 and runtime.contexts == {1}
    backend.stages(feeds(), ["boxes"])
    assert runtime.context == 0

"""ONNX Runtime's providers: options, selection, binding of inputs and outputs, and node placement."""

import importlib.util
import mmap
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from maskrcnn.data.shapes import shapes_image
from maskrcnn.errors import UserError
from maskrcnn.export.functions import batched_nms
from maskrcnn.plugins import reference
from maskrcnn.runtime import Detector
from maskrcnn.runtime.backends import onnxruntime as onnxruntime_binding
from maskrcnn.runtime.backends.onnxruntime import OnnxRuntimeBackend
from maskrcnn.runtime.backends.onnxruntime_providers import (
    GpuOptions,
    Provider,
    provider_chain,
    with_one_nms_call,
)
from maskrcnn.runtime.backends.placement import RECORD, Placement, placement_in
from maskrcnn.runtime.build.profiles import Profile, Span
from maskrcnn.runtime.detector import backend_spec, load_backend
from maskrcnn.runtime.verification.compare import EXACT
from maskrcnn.runtime.verification.inputs import compare_backends

NEEDS_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


def feeds(batch: int = 2, seed: int = 0) -> dict[str, np.ndarray]:
    images = np.random.default_rng(seed).uniform(0, 255, (batch, 3, 64, 96)).astype(np.float32)
    return {"images": images, "image_sizes": np.array([[64, 91]] * batch, np.int64)}


# Options


def test_what_a_user_chooses_reaches_the_provider(tmp_path, monkeypatch):
    monkeypatch.setenv("MASKRCNN_CACHE", str(tmp_path))
    (name, options), rest = provider_chain(Provider.CUDA, GpuOptions(device=1, memory_limit_gb=1.5, tf32=True))
    assert (name, rest) == ("CUDAExecutionProvider", ("CPUExecutionProvider", {}))
    assert (options["device_id"], options["gpu_mem_limit"], options["use_tf32"]) == ("1", "1610612736", "1")
    usual = provider_chain(Provider.CUDA, GpuOptions(search="exhaustive"))[0][1]
    assert (usual["cudnn_conv_algo_search"], usual["use_tf32"]) == ("EXHAUSTIVE", "0") and "gpu_mem_limit" not in usual
    profile = Profile(Span(1, 2, 4), Span(224, 800, 1344), Span(256, 1088, 1376))
    chain = provider_chain(Provider.TENSORRT, GpuOptions(profile=profile, memory_limit_gb=2), channels=4)
    assert [name for name, _ in chain] == ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"]
    options = chain[0][1]
    assert options["trt_engine_cache_path"] == str(tmp_path / "onnxruntime-tensorrt")
    assert options["trt_max_workspace_size"] == "2147483648" and options["trt_fp16_enable"] == "0"
    assert options["trt_profile_min_shapes"] == "images:1x4x224x256,image_sizes:1x2"
    assert options["trt_profile_max_shapes"] == "images:4x4x1344x1376,image_sizes:4x2"
    other = provider_chain(Provider.TENSORRT, GpuOptions(cache=tmp_path / "elsewhere"))[0][1]
    assert other["trt_engine_cache_path"] == str(tmp_path / "elsewhere") and "trt_profile_min_shapes" not in other


def nms_model(threshold: float, max_output: int) -> onnx.ModelProto:
    """A model of BatchedNms alone, with its function."""
    node = onnx.helper.make_node(
        "BatchedNms", ["boxes", "groups", "counts"], ["indices", "num"], domain="maskrcnn",
        iou_threshold=threshold, max_output=max_output,
    )  # fmt: skip
    tensors = [
        onnx.helper.make_tensor_value_info(name, kind, shape)
        for name, kind, shape in (
            ("boxes", onnx.TensorProto.FLOAT, ["N", "K", 4]), ("groups", onnx.TensorProto.INT32, ["N", "K"]),
            ("counts", onnx.TensorProto.INT32, ["N"]), ("indices", onnx.TensorProto.INT32, ["N", max_output]),
            ("num", onnx.TensorProto.INT32, ["N"]),
        )
    ]  # fmt: skip
    opsets = [onnx.helper.make_opsetid("", 20), onnx.helper.make_opsetid("maskrcnn", 1)]
    graph = onnx.helper.make_graph([node], "nms", tensors[:3], tensors[3:])
    return onnx.helper.make_model(graph, opset_imports=opsets, functions=[batched_nms(20)], ir_version=9)


@pytest.mark.parametrize("groups", [1, 5, 80])
def test_boxes_of_groups_laid_apart_are_kept_as_by_one_class_per_group(groups):
    rng = np.random.default_rng(groups)
    corners = rng.integers(0, 300, (2, 400, 2))  # whole pixels, so that shifting rounds nothing
    boxes = np.concatenate([corners, corners + rng.integers(80, 160, corners.shape)], axis=-1).astype(np.float32)
    boxes[0, 7], boxes[1, 3, 2], boxes[1, 4] = np.nan, np.inf, -boxes[1, 4, [2, 3, 0, 1]]
    group_of = rng.integers(0, groups, (2, 400)).astype(np.int32)
    counts = np.array([400, 333], np.int32)
    model = nms_model(0.5, 300)
    expected = reference.batched_nms(boxes, group_of, counts, iou_threshold=0.5, max_output=300)
    feeds = {"boxes": boxes, "groups": group_of, "counts": counts}
    for each in (model, with_one_nms_call(onnx.ModelProto.FromString(model.SerializeToString()))):
        onnx.checker.check_model(each, full_check=True)
        session = onnxruntime.InferenceSession(each.SerializeToString(), providers=["CPUExecutionProvider"])
        indices, num = session.run(None, feeds)
        np.testing.assert_array_equal(num, expected[1])
        np.testing.assert_array_equal(indices, expected[0])
    assert 50 < num[1] < counts[1]


def test_a_file_with_one_nms_call_detects_the_same(onnx_file, tmp_path):
    path = tmp_path / "one.onnx"
    onnx.save(with_one_nms_call(onnx.load(onnx_file)), path)
    (scores,) = [
        node.input[1] for each in onnx.load(path).functions for node in each.node if node.op_type == "NonMaxSuppression"
    ]
    assert scores == "nms_scores"
    one, usual = (OnnxRuntimeBackend(file, providers=["CPUExecutionProvider"]) for file in (path, onnx_file))
    difference = compare_backends(usual, one, EXACT)
    assert difference.within(EXACT) and difference.detections > 10


@pytest.mark.parametrize(("provider", "library"), [(Provider.CUDA, "cuda"), (Provider.TENSORRT, "tensorrt")])
def test_the_installed_provider_knows_every_option(tmp_path, provider, library):
    folder = Path(importlib.util.find_spec("onnxruntime").origin).parent / "capi"
    path = folder / f"libonnxruntime_providers_{library}.so"
    if not path.is_file():
        pytest.skip(f"an ONNX Runtime without {path.name}")
    span = Span(1, 1, 1)
    everything = GpuOptions(memory_limit_gb=1, cache=tmp_path, profile=Profile(span, span, span))
    named = provider_chain(provider, everything)[0][1]
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        missing = [name for name in named if content.find(name.encode() + b"\0") < 0]
        assert content.find(b"trt_or_cuda_no_such_option\0") < 0
    assert not missing


@pytest.mark.parametrize(
    ("options", "message"),
    [({"search": "best"}, "search 'best'\n  expected: one of heuristic"), ({"memory_limit_gb": 0}, "more than 0")],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        GpuOptions(**options)


# Choosing a provider


def test_an_onnxruntime_for_cpus_says_what_to_install(onnx_file, monkeypatch):
    import onnxruntime

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(UserError, match=r"an ONNX Runtime without CUDAExecutionProvider[\s\S]*pip install"):
        load_backend(onnx_file, provider="cuda")


def test_a_provider_may_be_named_with_the_backend(onnx_file):
    assert (backend_spec(None, None, None), backend_spec("torch", None, None)) == (None, "torch")
    assert (
        backend_spec(None, "cuda", None) == "onnxruntime:cuda"
        and backend_spec("openvino", "cpu", None) == "openvino:cpu"
    )
    assert load_backend(onnx_file, "onnxruntime:cpu").session.get_providers() == ["CPUExecutionProvider"]
    with pytest.raises(UserError, match="provider 'gpu'"):
        load_backend(onnx_file, "onnxruntime:gpu")
    with pytest.raises(UserError, match="a provider for"):
        load_backend(onnx_file, "openvino:cpu")


def test_only_onnxruntime_has_providers(onnx_file, checkpoint):
    for path, backend in ((onnx_file, "openvino"), (checkpoint, None)):
        with pytest.raises(UserError, match="a provider for"):
            load_backend(path, backend, provider="cuda")


# Placement


def test_a_session_tells_what_its_provider_took(onnx_file):
    import onnxruntime

    from maskrcnn.runtime.backends.onnxruntime import session_options

    options = session_options(1)
    options.add_session_config_entry(RECORD, "1")
    session = onnxruntime.InferenceSession(str(onnx_file), options, providers=["CPUExecutionProvider"])
    found = placement_in(session, "CPUExecutionProvider")
    assert found.taken["Conv"] > 20 and not found.left
    assert load_backend(onnx_file, provider="cpu").placement() is None


def test_nodes_left_to_the_cpu_are_named():
    def part(name: str, *ops: str) -> SimpleNamespace:
        nodes = [SimpleNamespace(op_type=op, name=f"{op}_{k}") for k, op in enumerate(ops)]
        return SimpleNamespace(ep_name=f"{name}ExecutionProvider", get_nodes=lambda: nodes)

    parts = [part("Tensorrt", "Conv", "Conv"), part("CUDA", "TopK"), part("CPU", "NonMaxSuppression")]
    session = SimpleNamespace(get_provider_graph_assignment_info=lambda: parts)
    found = placement_in(session, "TensorrtExecutionProvider")
    assert found.text() == (
        "Tensorrt: 2 of 4 nodes; CUDA: 1; left to the CPU: NonMaxSuppression 1 (NonMaxSuppression_0)"
    )
    assert Placement("CUDAExecutionProvider", {"Conv": 2}).text() == "CUDA: all 2 nodes"
    assert "ONNX Runtime 1.31 or newer" in placement_in(SimpleNamespace(), "CUDAExecutionProvider").text()


# Binding


def test_outputs_are_written_into_new_memory_each_time(onnx_file):
    backend = load_backend(onnx_file, provider="cpu", threads=1)
    names = [output.name for output in backend.session.get_outputs()]
    found = [backend(feeds(seed=seed)) for seed in range(3)]
    for seed, outputs in enumerate(found):
        wanted = dict(zip(names, backend.session.run(names, feeds(seed=seed)), strict=True))
        for name, value in wanted.items():
            np.testing.assert_array_equal(outputs[name], value, err_msg=name)


def test_inputs_need_not_be_contiguous(onnx_file):
    backend = load_backend(onnx_file, provider="cpu", threads=1)
    given = feeds()
    wide = np.concatenate([given["images"], given["images"]], axis=3)[..., :96]
    assert not wide.flags.c_contiguous
    for name, value in backend(given).items():
        np.testing.assert_array_equal(backend({**given, "images": wide})[name], value)


class SimulatedGpuSession:
    """A session on the CPU whose bindings accept the simulated GPU's memory, which is the host's, as CUDA's."""

    def __init__(self, session: Any, runtime: Any, index: int) -> None:
        self.session, self.runtime, self.index, self.devices = session, runtime, index, []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.session, name)

    def io_binding(self) -> Any:
        binding, devices = self.session.io_binding(), self.devices

        class Binding:
            bind_cpu_input = staticmethod(binding.bind_cpu_input)
            synchronize_outputs = staticmethod(binding.synchronize_outputs)
            real = binding

            @staticmethod
            def bind_input(name, device, index, *rest):
                devices.append((name, device, index))
                binding.bind_input(name, "cpu", 0, *rest)

            @staticmethod
            def bind_output(name, device, index, *rest):
                devices.append((name, device, index))
                binding.bind_output(name, "cpu", 0, *rest)

        return Binding

    def run_with_iobinding(self, binding: Any) -> None:
        self.runtime.cudaSetDevice(self.index)  # as ONNX Runtime does at the start of a run
        self.session.run_with_iobinding(binding.real)


@pytest.fixture
def load_on_gpu(kernels_for_cpu, monkeypatch):
    """Loads a file as if its provider were CUDA, on the simulated GPU."""
    pytest.importorskip("cuda.bindings.runtime")
    import fake_cuda

    runtime = fake_cuda.FakeRuntime(devices=2)
    kernels = fake_cuda.DeferredKernels(kernels_for_cpu)
    kernels.runtime = runtime
    fake_cuda.install(monkeypatch, runtime)
    monkeypatch.setattr(onnxruntime_binding, "kernels_for", lambda arch: kernels)

    def load(path: Path, index: int = 0) -> Any:
        backend = load_backend(path, provider="cpu", threads=1)
        backend.session = SimulatedGpuSession(backend.session, runtime, index)
        backend.bind_to(onnxruntime_binding.gpu_binding(index, backend.metadata))
        return backend

    return load


@pytest.mark.parametrize(("file", "last"), [("onnx_file", "masks"), ("joint_onnx_file", "keypoints")])
def test_gpu_arrays_are_bound_in_place(load_on_gpu, request, file, last):
    from maskrcnn.runtime.gpu.arrays import DeviceArray
    from maskrcnn.runtime.gpu.memory import Cuda

    path = request.getfixturevalue(file)
    backend, reference = load_on_gpu(path), load_backend(path, provider="cpu", threads=1)
    kept = []
    for seed in range(3):
        given = feeds(seed=seed)
        cuda = Cuda(0)
        memory, staged = cuda.memory(given["images"].nbytes), cuda.pinned(given["images"].nbytes)
        staged.array(given["images"].shape, np.float32)[...] = given["images"]
        stream = cuda.stream()
        stream.copy(memory.address, staged.address, memory.nbytes, "HostToDevice")  # waited for by the backend
        images = DeviceArray(memory.address, given["images"].shape, np.float32, stream=stream, owner=(memory, staged))
        kept.append(backend({**given, "images": images}))
        del images, memory, staged
    for seed, outputs in enumerate(kept):
        for name, value in reference(feeds(seed=seed)).items():
            assert isinstance(outputs[name], DeviceArray)
            np.testing.assert_array_equal(outputs[name].numpy(), value, err_msg=name)
    assert ("images", "cuda", 0) in backend.session.devices and (last, "cuda", 0) in backend.session.devices
    for name, value in backend(feeds()).items():  # arrays of the host stay there
        np.testing.assert_array_equal(value, reference(feeds())[name])


def test_the_threads_context_is_preserved(load_on_gpu, onnx_file):
    backend = load_on_gpu(onnx_file, 1)
    runtime = backend.session.runtime
    for before in (0, 0xC000):  # no context yet, and one on GPU 0
        runtime.context = before
        image = shapes_image(np.random.default_rng(1), (150, 200))[0]
        Detector(backend).detect([image])[0].full_masks()
        backend(feeds())
        assert runtime.context == before
    assert set(runtime.device_of.values()) == runtime.contexts == {1}


def test_without_cuda_bindings_only_host_arrays_are_bound(monkeypatch):
    from maskrcnn.runtime.gpu import memory as device_memory

    def missing() -> None:
        raise UserError("no Python package cuda-bindings", "it", "install it")

    monkeypatch.setattr(device_memory, "import_runtime", missing)
    assert onnxruntime_binding.gpu_binding(0, None) is None


def test_images_are_resized_and_masks_pasted_on_the_gpu(load_on_gpu, onnx_file):
    backend = load_on_gpu(onnx_file)
    images = [shapes_image(np.random.default_rng(seed), (150 + 70 * seed, 200))[0] for seed in range(3)]
    found = Detector(backend).detect(images)
    wanted = Detector(load_backend(onnx_file, provider="cpu", threads=1)).detect(images)
    assert sum(len(each) for each in wanted) > 3
    for ours, theirs in zip(found, wanted, strict=True):
        np.testing.assert_allclose(ours.boxes_xyxy_px, theirs.boxes_xyxy_px, atol=1e-2)
        assert (ours.full_masks() != theirs.full_masks()).mean() < 1e-3
        assert ours.paste is backend.paste


@NEEDS_CUDA
def test_onnxruntime_on_the_gpu_agrees_with_the_cpu(onnx_file):
    from maskrcnn.runtime.verification.compare import EXACT
    from maskrcnn.runtime.verification.inputs import compare_backends

    try:
        backend = load_backend(onnx_file, provider="cuda")
    except UserError as error:
        pytest.skip(str(error))
    difference = compare_backends(load_backend(onnx_file, provider="cpu"), backend, EXACT)
    assert difference.within(EXACT), str(difference)
    assert backend.placement().taken["Conv"] > 20
    given = {name: torch.from_numpy(value).cuda() for name, value in feeds().items()}
    on_device, on_host = backend(given), backend(feeds())
    for name, value in on_host.items():
        np.testing.assert_allclose(torch.from_dlpack(on_device[name]).cpu().numpy(), value, atol=1e-4)

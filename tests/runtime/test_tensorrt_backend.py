"""TensorRT backend on a simulated GPU, with ONNX Runtime behind TensorRT's interface (tests/support)."""

import gc
import hashlib
import threading

import numpy as np
import onnx
import pytest

pytest.importorskip("cuda.bindings.runtime")

import fake_cuda
import fake_tensorrt

from maskrcnn.data.shapes import shapes_image
from maskrcnn.errors import UserError
from maskrcnn.imaging.preprocess import batch_images
from maskrcnn.runtime import Detector
from maskrcnn.runtime.backends import tensorrt as tensorrt_backend
from maskrcnn.runtime.build.profiles import Profile, Span
from maskrcnn.runtime.detector import load_backend
from maskrcnn.runtime.gpu.arrays import DeviceArray
from maskrcnn.runtime.verification.compare import EXACT
from maskrcnn.runtime.verification.inputs import compare_backends

ANY = Profile(Span(1, 1, 8), Span(32, 96, 384), Span(32, 96, 384))


@pytest.fixture
def machine(monkeypatch):
    """The simulated GPU and TensorRT."""
    monkeypatch.setenv("MASKRCNN_KERNELS", "off")
    return fake_tensorrt.install(monkeypatch)


@pytest.fixture
def runtime(machine):
    return machine[0]


@pytest.fixture
def trt(machine):
    return machine[1]


@pytest.fixture
def engine(tmp_path, onnx_file):
    return fake_tensorrt.write_engine(onnx_file, tmp_path / "model.fp32.engine", [ANY])


@pytest.fixture(scope="module")
def reference(onnx_file):
    return load_backend(onnx_file, threads=1)


def feeds(batch: int = 2, height: int = 64, width: int = 96, seed: int = 0) -> dict[str, np.ndarray]:
    images = np.random.default_rng(seed).uniform(0, 255, (batch, 3, height, width)).astype(np.float32)
    return {"images": images, "image_sizes": np.array([[height, width - 5]] * batch, np.int64)}


def assert_equal(found, wanted):
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        np.testing.assert_array_equal(np.asarray(found[name]), value, err_msg=name)


def on_gpu(backend, given: dict[str, np.ndarray]) -> dict[str, DeviceArray]:
    """Arrays in the simulated GPU's memory."""
    found, stream = {}, backend.cuda.stream()
    for name, values in given.items():
        memory, staged = backend.cuda.memory(values.nbytes), backend.cuda.pinned(values.nbytes)
        staged.array(values.shape, values.dtype)[...] = values
        stream.copy(memory.address, staged.address, values.nbytes, "HostToDevice")
        stream.synchronize()
        found[name] = DeviceArray(memory.address, values.shape, values.dtype, stream=stream, owner=memory)
    return found


# What it computes


def test_an_engine_is_a_backend_like_the_others(engine, machine, checkpoint):
    backend = load_backend(engine)
    assert (backend.name, backend.precision) == ("TensorRT", "fp32")
    difference = compare_backends(load_backend(checkpoint, device="cpu"), backend, EXACT)
    assert difference.within(EXACT), str(difference)
    assert difference.detections > 10


@pytest.mark.parametrize("graphs", [True, False])
def test_every_run_of_a_shape_is_right_with_and_without_graphs(engine, runtime, reference, graphs):
    backend = load_backend(engine, graphs=graphs)
    for seed in range(4):
        assert_equal(backend(feeds(seed=seed)), reference(feeds(seed=seed)))
    assert runtime.calls.count("cudaGraphLaunch") == (3 if graphs else 0)  # captured on the second run


@pytest.mark.parametrize("graphs", [True, False])
def test_arrays_on_the_gpu_give_arrays_on_the_gpu(engine, machine, reference, graphs):
    backend = load_backend(engine, graphs=graphs)
    kept = []
    for seed in range(4):
        given = on_gpu(backend, feeds(seed=seed))
        if seed == 2:
            given["image_sizes"] = feeds(seed=seed)["image_sizes"]  # one of them on the host
        kept.append(backend(given))
        assert all(isinstance(value, DeviceArray) for value in kept[-1].values())
    for seed, found in enumerate(kept):  # no run writes over an earlier one's results
        assert_equal(found, reference(feeds(seed=seed)))
    addresses = {found["boxes"].address for found in kept}
    assert len(addresses) == 4
    del kept, found
    assert backend(on_gpu(backend, feeds()))["boxes"].address in addresses  # memory is reused


def test_a_timed_run_gives_the_same_and_its_parts(engine, machine, reference):
    backend = load_backend(engine)
    for seed in range(3):
        found, parts = backend.infer_timed(feeds(seed=seed))
        assert_equal(found, reference(feeds(seed=seed)))
        assert parts == {"copy in": 1.5, "engine": 1.5, "copy out": 1.5}  # the simulated GPU's constant


def test_without_graphs_inputs_are_read_in_place(engine, runtime, trt):
    backend = load_backend(engine, graphs=False)
    given = on_gpu(backend, feeds())
    backend(given)
    runtime.calls.clear()
    found = backend(given)
    assert "cudaMemcpyAsync" not in runtime.calls
    assert trt.engines[0].contexts[-1].addresses["images"] == given["images"].address
    assert trt.engines[0].contexts[-1].addresses["boxes"] == found["boxes"].address


def test_with_graphs_the_engines_own_input_is_not_copied(engine, runtime, reference):
    backend = load_backend(engine)
    backend(feeds())
    with backend.acquire() as contexts:
        binding = contexts.bind((2, 64, 96))
        binding.put("image_sizes", feeds(seed=3)["image_sizes"])
        images = binding.input("images")
        runtime.array(images.address, images.shape, images.dtype)[...] = feeds(seed=3)["images"]
        runtime.calls.clear()
        binding.put("images", images)
        outputs = binding.run()
        assert "cudaMemcpyAsync" not in runtime.calls and "cudaGraphLaunch" in runtime.calls
        assert_equal({name: value.numpy() for name, value in outputs.items()}, reference(feeds(seed=3)))


def test_a_misaligned_array_is_copied(engine, machine, reference):
    backend = load_backend(engine, graphs=False)
    values = feeds()["images"]
    wide = np.concatenate([np.zeros(16, np.float32), values.ravel()])
    memory = on_gpu(backend, {"images": wide})["images"]
    shifted = DeviceArray(memory.address + 64, values.shape, values.dtype, stream=memory.stream, owner=memory)
    found = backend({**feeds(), "images": shifted})
    assert_equal(found, reference(feeds()))


def test_a_batch_is_padded_to_what_a_profile_takes(tmp_path, onnx_file, machine, reference):
    fixed = Profile(Span(4, 4, 4), Span(160, 160, 160), Span(160, 160, 160))
    path = fake_tensorrt.write_engine(onnx_file, tmp_path / "fixed.engine", [fixed])
    images = [shapes_image(np.random.default_rng(seed), (300, 200 + 50 * seed))[0] for seed in range(3)]
    backend = load_backend(path)
    nothing = np.full((4, 3, 160, 160), np.nan, np.float32)  # must not remain where the next batch has no image
    with backend.acquire() as contexts:
        contexts.bind((4, 160, 160)).put("images", nothing)
    found, sizes = backend.run_images(images)
    pixels, wanted_sizes = batch_images(images, reference.metadata.preprocessing)
    padded = np.zeros((4, 3, 160, 160), np.float32)
    padded[:3, :, : pixels.shape[2], : pixels.shape[3]] = pixels
    assert pixels.shape != padded.shape
    wanted = reference({"images": padded, "image_sizes": np.concatenate([wanted_sizes, [[0, 0]]])})
    assert wanted["num_detections"].tolist()[3:] == [0]
    assert_equal(found, {name: value[:3] for name, value in wanted.items()})
    np.testing.assert_array_equal(sizes, wanted_sizes)
    with pytest.raises(UserError, match=r"a batch of 5 image\(s\) of 160×\d+, outside[\s\S]*batch 4 of 160×160"):
        Detector.load(path).detect(images[:1] * 5)


# Profiles and shapes


def test_each_shape_runs_in_the_profile_that_fits_best(tmp_path, onnx_file, machine, trt, reference):
    one = Profile(Span(1, 1, 1), Span(64, 64, 64), Span(96, 96, 96))
    path = fake_tensorrt.write_engine(onnx_file, tmp_path / "two.engine", [ANY, one])
    backend = load_backend(path)
    for batch in (1, 2):
        assert_equal(backend(feeds(batch)), reference(feeds(batch)))
    assert [context.profile for context in trt.engines[0].contexts] == [1, 0]
    with pytest.raises(
        UserError, match=r"a batch of 1 image\(s\) of 416×96[\s\S]*384[\s\S]*build-engine model.onnx --fp32"
    ):
        backend(feeds(1, height=416))
    assert len(trt.engines[0].contexts) == 2


def test_the_least_recently_used_shapes_are_dropped(engine, machine, runtime, trt, reference):
    backend = load_backend(engine, shapes=2)
    open_with_two = None
    for number, width in enumerate((64, 96, 64, 64, 128, 64, 160, 96)):
        assert_equal(backend(feeds(1, width=width)), reference(feeds(1, width=width)))
        if number == 1:
            open_with_two = runtime.open["device"]
    assert runtime.open["device"] == open_with_two
    assert runtime.open.get("executable graph", 0) == 0  # that of 64 was dropped with it
    assert len(trt.engines[0].contexts) == 5


def test_results_on_the_gpu_outlive_their_shape(engine, machine, reference):
    backend = load_backend(engine, shapes=1)
    found = backend(on_gpu(backend, feeds()))
    backend(feeds(1))
    assert_equal(found, reference(feeds()))


# Several at a time


def test_threads_share_an_engine(engine, runtime, trt, reference):
    backend = load_backend(engine, contexts=2)
    found: dict[int, dict] = {}
    inside, both = threading.Barrier(2, timeout=30), []

    def work(number: int) -> None:
        with backend.acquire() as contexts:
            inside.wait()  # so that both are in use at once
            both.append(contexts)
        for seed in range(number, 12, 4):
            found[seed] = backend(feeds(seed=seed))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(found) == list(range(12))
    for seed, outputs in found.items():
        assert_equal(outputs, reference(feeds(seed=seed)))
    assert len(set(both)) == 2
    with backend.acquire() as first, backend.acquire() as second:
        assert {first, second} == set(both)


# Images and masks on the GPU


@pytest.fixture
def detector_with_kernels(engine, machine, runtime, kernels_for_cpu, monkeypatch):
    made = fake_cuda.DeferredKernels(kernels_for_cpu)
    made.runtime = runtime
    monkeypatch.setattr(tensorrt_backend, "kernels_for", lambda arch: made if arch == 90 else None)
    return Detector.load(engine)


def test_images_are_resized_on_the_gpu(detector_with_kernels, runtime, reference):
    images = [shapes_image(np.random.default_rng(seed), (150 + 70 * seed, 200))[0] for seed in range(3)]
    images[1] = images[1][::-1, ::-1]  # images need not be contiguous
    for _ in range(2):
        found, wanted = detector_with_kernels.detect(images), Detector(reference).detect(images)
        assert sum(len(each) for each in wanted) > 3
        for ours, theirs in zip(found, wanted, strict=True):
            np.testing.assert_array_equal(ours.labels, theirs.labels)
            np.testing.assert_allclose(ours.boxes_xyxy_px, theirs.boxes_xyxy_px, atol=1e-2)
            np.testing.assert_allclose(ours.masks, theirs.masks, atol=1e-3)


def test_masks_are_pasted_on_the_gpu(detector_with_kernels, runtime, monkeypatch):
    from maskrcnn.runtime.gpu import images as gpu_images

    image = shapes_image(np.random.default_rng(1), (120, 171))[0]
    found = detector_with_kernels.detect([image])[0]
    on_cpu = type(found)(found.boxes_xyxy_px, found.scores, found.labels, found.masks, found.size_hw)
    runtime.calls.clear()
    assert len(found) > 3
    np.testing.assert_array_equal(found.full_masks(), on_cpu.full_masks())
    assert runtime.calls.count("cudaStreamSynchronize") == 1
    monkeypatch.setattr(gpu_images, "MAX_BITS_BYTES", 2 * 120 * 6 * 4)  # two masks at a time
    np.testing.assert_array_equal(found.full_masks(0.3), on_cpu.full_masks(0.3))
    some = found.above(float(np.sort(found.scores)[-2]))
    assert some.paste is found.paste and some.full_masks().shape == (2, 120, 171)
    assert found.above(2.0).full_masks().shape == (0, 120, 171)
    assert found.rles() == on_cpu.rles()


def test_pillows_resizing_stays_on_the_cpu(tmp_path, onnx_file, machine, runtime, kernels_for_cpu, monkeypatch):
    import dataclasses
    import json

    path = fake_tensorrt.write_engine(onnx_file, tmp_path / "d2.engine", [ANY])
    described = path.with_name("d2.engine.json")
    values = json.loads(described.read_text())
    values["preprocessing"]["resize"] = "pillow"
    described.write_text(json.dumps(values))
    made = fake_cuda.DeferredKernels(kernels_for_cpu)
    made.runtime = runtime
    monkeypatch.setattr(tensorrt_backend, "kernels_for", lambda arch: made)
    monkeypatch.setattr(made, "resize_pad", None)
    backend = load_backend(path)
    image = shapes_image(np.random.default_rng(1), (120, 171))[0]
    wanted = load_backend(onnx_file, threads=1)
    wanted.metadata = dataclasses.replace(wanted.metadata, preprocessing=backend.metadata.preprocessing)
    assert_equal(backend.run_images([image])[0], wanted.run_images([image])[0])


# Memory


def test_close_frees_everything(detector_with_kernels, runtime, trt):
    backend = detector_with_kernels.backend
    image = shapes_image(np.random.default_rng(1), (120, 171))[0]
    detector_with_kernels.detect([image])[0].full_masks()
    for _ in range(3):
        kept = backend(on_gpu(backend, feeds()))
        backend(feeds())
    backend.close()
    del kept
    gc.collect()
    assert runtime.open == {}


def test_a_garbage_collected_backend_frees_everything(engine, runtime):
    backend = load_backend(engine)
    backend(feeds())
    backend(feeds())
    assert runtime.open["executable graph"] == 1
    del backend
    gc.collect()
    assert runtime.open == {}


def test_a_run_that_fails_leaves_the_engine_usable(engine, runtime, trt, reference):
    backend = load_backend(engine)
    trt.refuses = True
    with pytest.raises(UserError, match=r"TensorRT refuses execute_async_v3[\s\S]*no luck"):
        backend(feeds())
    trt.refuses = False
    for _ in range(3):
        assert_equal(backend(feeds()), reference(feeds()))


def test_an_engine_that_cannot_be_captured_runs_without_a_graph(engine, runtime, trt, reference):
    backend = load_backend(engine)
    trt.refuses_capture = True
    for _ in range(3):
        assert_equal(backend(feeds()), reference(feeds()))
    assert "a loop cannot be captured" in backend.graph_refusals()[2, 64, 96]
    assert runtime.open.get("graph", 0) == 0 and "cudaGraphLaunch" not in runtime.calls


def test_too_little_memory_says_what_to_do(engine, runtime, trt):
    backend = load_backend(engine)
    trt.most_contexts = 0
    with pytest.raises(UserError, match=r"creates no execution context[\s\S]*too little free memory"):
        backend(feeds())
    runtime.failing["cudaMalloc"] = fake_cuda.real.cudaError_t.cudaErrorMemoryAllocation, 0
    with pytest.raises(UserError, match="left on GPU 0"):
        load_backend(engine)


# Files that do not fit


@pytest.mark.parametrize(
    ("stamp", "message"),
    [
        ({"gpu": "NVIDIA Other"}, "gpu NVIDIA Other; here is NVIDIA Simulated"),
        ({"compute_capability": "8.6"}, "compute_capability 8.6; here is 9.0"),
        ({"tensorrt": "10.9.0.34"}, "tensorrt 10.9.0.34; here is 11.4.0.106"),
        ({"target": "openvino"}, "an engine for openvino"),
    ],
)
def test_an_engine_for_another_machine_is_refused(tmp_path, onnx_file, machine, stamp, message):
    path = fake_tensorrt.write_engine(onnx_file, tmp_path / "model.engine", [ANY], **stamp)
    with pytest.raises(UserError, match=rf"model\.engine: .*{message}[\s\S]*rebuild it here: `maskrcnn build-engine"):
        load_backend(path)


def test_missing_files_are_named(tmp_path, engine):
    with pytest.raises(UserError, match=r"no file no\.engine and no\.engine\.json[\s\S]*build-engine"):
        load_backend(tmp_path / "no.engine")
    engine.with_name(f"{engine.name}.json").unlink()
    with pytest.raises(UserError, match=r"no file model\.fp32\.engine\.json in"):
        load_backend(engine)


def test_files_that_do_not_belong_together_are_refused(tmp_path, engine, boxes_onnx_file, machine):
    boxes = fake_tensorrt.write_engine(boxes_onnx_file, tmp_path / "boxes.engine", [ANY])
    engine.write_bytes(boxes.read_bytes())
    with pytest.raises(UserError, match=r"masks other than model\.fp32\.engine\.json says"):
        load_backend(engine)
    engine.write_bytes(b"no plan")
    with pytest.raises(UserError, match=r"TensorRT cannot load it[\s\S]*another version of TensorRT"):
        load_backend(engine)


def test_a_plan_of_another_json_is_refused(tmp_path, onnx_file, machine):
    path = fake_tensorrt.write_engine(onnx_file, tmp_path / "a.engine", [ANY], plan_sha256="0" * 64)
    with pytest.raises(UserError, match=r"not the plan that a\.engine\.json was written for"):
        load_backend(path)
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    load_backend(fake_tensorrt.write_engine(onnx_file, path, [ANY], plan_sha256=found))


def test_an_engine_without_weights_is_refused(tmp_path, onnx_file, machine):
    path = fake_tensorrt.write_engine(onnx_file, tmp_path / "a.engine", [ANY], refit="stripped")
    with pytest.raises(UserError, match=r"without its weights[\s\S]*maskrcnn refit-engine a\.engine MODEL\.onnx"):
        load_backend(path)


def test_an_engine_may_have_stages_as_outputs(tmp_path, onnx_file, machine, reference):
    model = onnx.load(onnx_file)
    (masks,) = [value for value in model.graph.output if value.name == "masks"]
    model.graph.node.append(onnx.helper.make_node("Neg", ["masks"], ["stage.masks"]))
    shown = onnx.ValueInfoProto()
    shown.CopyFrom(masks)
    shown.name = "stage.masks"
    model.graph.output.append(shown)
    onnx.save(model, tmp_path / "staged.onnx")
    path = fake_tensorrt.write_engine(tmp_path / "staged.onnx", tmp_path / "staged.engine", [ANY])
    found, wanted = load_backend(path)(feeds()), reference(feeds())
    np.testing.assert_array_equal(found.pop("stage.masks"), -wanted["masks"])
    assert_equal(found, wanted)


def test_profiles_must_match_the_plan(tmp_path, onnx_file, machine):
    path = fake_tensorrt.write_engine(onnx_file, tmp_path / "a.engine", [ANY])
    path.write_bytes(fake_tensorrt.write_engine(onnx_file, tmp_path / "b.engine", [ANY, ANY]).read_bytes())
    with pytest.raises(UserError, match=r"2 profiles, and 1 in its a\.engine\.json"):
        load_backend(path)


def test_a_model_without_masks_runs(tmp_path, boxes_onnx_file, machine):
    path = fake_tensorrt.write_engine(boxes_onnx_file, tmp_path / "boxes.engine", [ANY])
    assert set(load_backend(path)(feeds())) == {"num_detections", "boxes", "scores", "labels"}


@pytest.mark.parametrize("graphs", [True, False])
def test_a_model_with_keypoints_runs(tmp_path, joint_onnx_file, machine, graphs):
    path = fake_tensorrt.write_engine(joint_onnx_file, tmp_path / "joint.engine", [ANY])
    backend, wanted = load_backend(path, graphs=graphs), load_backend(joint_onnx_file, threads=1)
    for seed in range(3):
        assert_equal(backend(feeds(seed=seed)), wanted(feeds(seed=seed)))
        assert_equal(backend(on_gpu(backend, feeds(seed=seed))), wanted(feeds(seed=seed)))
    assert backend.describe()[1]["keypoints"].shape[1:] == (12, 5, 3)


def test_a_version_compatible_plan_may_use_its_own_runtime(tmp_path, onnx_file, trt):
    path = fake_tensorrt.write_engine(
        onnx_file, tmp_path / "a.engine", [ANY], tensorrt="10.9.0.34", version_compatible="yes"
    )
    load_backend(path)
    assert trt.loaded[-1].engine_host_code_allowed


def test_a_plugin_library_is_loaded_first(tmp_path, onnx_file, machine, monkeypatch):
    from maskrcnn.runtime.backends import tensorrt_engine
    from maskrcnn.runtime.backends.tensorrt_library import PluginForm, plugin_hash

    loaded = []
    monkeypatch.setattr(tensorrt_engine, "load_plugins", lambda trt, form, *, arch: loaded.append((form, arch)))
    stamp = {"plugins": "library", "plugin_hash": plugin_hash(PluginForm.LIBRARY)}
    load_backend(fake_tensorrt.write_engine(onnx_file, tmp_path / "a.engine", [ANY], **stamp))
    assert loaded == [(PluginForm.LIBRARY, 90)]


@pytest.mark.parametrize("options", [{"contexts": 0}, {"shapes": 0}])
def test_options_out_of_range_are_refused(engine, machine, options):
    with pytest.raises(UserError, match="at least 1 of each"):
        load_backend(engine, **options)


def test_without_tensorrt_or_a_gpu_the_error_says_so(engine, monkeypatch):
    monkeypatch.undo()
    with pytest.raises(UserError, match=r"no Python package tensorrt|NVIDIA|GPU"):
        load_backend(engine)

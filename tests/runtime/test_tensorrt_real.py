"""Engines on a real TensorRT and GPU: built, compared, run, replayed. Run with `pytest -m tensorrt`."""

import json
import subprocess
import sys
import threading

import numpy as np
import onnx
import pytest
from faults import initializer

from maskrcnn.api.progress import Progress
from maskrcnn.data.images import images_in, read_image
from maskrcnn.errors import UserError
from maskrcnn.export import variants
from maskrcnn.files import write_json
from maskrcnn.imaging.postprocess import coco_results
from maskrcnn.plugins import build
from maskrcnn.plugins.toolchain import find_toolchain
from maskrcnn.runtime import Detector
from maskrcnn.runtime.backends.tensorrt import TensorRtBackend
from maskrcnn.runtime.backends.tensorrt_library import Weights, find_gpu, tensorrt_obstacle
from maskrcnn.runtime.build.gate import gate
from maskrcnn.runtime.build.refit import refit_tensorrt_engine
from maskrcnn.runtime.build.request import BuildRequest
from maskrcnn.runtime.build.tensorrt import build_tensorrt_engine
from maskrcnn.runtime.verification.inputs import batches_of_shapes

pytestmark = pytest.mark.tensorrt


@pytest.fixture(scope="module", autouse=True)
def gpu():
    if obstacle := tensorrt_obstacle():
        pytest.skip(obstacle.found)
    return find_gpu()


@pytest.fixture(scope="module")
def graph_of(gpu, onnx_file, tmp_path_factory):
    """Writes the graph of a precision, once."""
    folder, made = tmp_path_factory.mktemp("graphs"), {}

    def graph(precision):
        if precision not in made:
            source = onnx_file
            if precision in ("fp16", "bf16"):
                source = folder / f"{precision}.onnx"
                variants.write_half(onnx_file, source, precision)
            made[precision] = folder / f"{precision}.tensorrt.onnx"
            assert not variants.write_tensorrt(source, made[precision], aot=True).errors
        return made[precision]

    return graph


@pytest.fixture(scope="module")
def build_engine(graph_of, onnx_file, tmp_path_factory):
    """Builds an engine of one profile from 64×96 to 128×160, batch 1 to 4."""
    timing = tmp_path_factory.mktemp("timing") / "timing.cache"

    def build(folder, precision="fp16", **changes):
        values = {
            "graph": graph_of(precision),
            "model": onnx_file,
            "output": folder / f"model.{precision}.engine",
            "precision": precision,
            "batch": "1:2:4",
            "size": "64x96:96x128:160x160",
            "timing_cache": timing,
            **changes,
        }
        built = build_tensorrt_engine(BuildRequest(**values), Progress())
        return built, built.path

    return build


@pytest.fixture(scope="module")
def engine(build_engine, tmp_path_factory):
    """The file of an engine in FP16."""
    return build_engine(tmp_path_factory.mktemp("engine"))[1]


@pytest.fixture(scope="module")
def detections_as_truth(onnx_file, shapes, tmp_path_factory):
    """Detections of the ONNX file as annotations: its AP is near 1, and the AP of an engine measures the agreement."""
    detector, folder = Detector.load(onnx_file, providers=["CPUExecutionProvider"]), shapes / "val"
    metadata, images, annotations = detector.metadata, [], []
    for number, path in enumerate(images_in(folder, 100), start=1):
        pixels = read_image(path)
        images.append({"id": number, "file_name": path.name, "height": pixels.shape[0], "width": pixels.shape[1]})
        (found,) = detector.detect([pixels])
        for result in coco_results(found, number, metadata.category_ids, with_masks=True):
            area = result["bbox"][2] * result["bbox"][3]
            if area > 16:
                annotations.append({**result, "id": len(annotations) + 1, "area": area, "iscrowd": 0})
    categories = [
        {"id": each, "name": name} for each, name in zip(metadata.category_ids, metadata.class_names, strict=True)
    ]
    path = tmp_path_factory.mktemp("truth") / "detections.json"
    write_json(path, {"images": images, "annotations": annotations, "categories": categories})
    return {"gate_images": folder, "gate_annotations": path}


def feeds_of(*shapes):
    return list(batches_of_shapes(shapes))


def assert_same(first, second):
    for name, value in first.items():
        np.testing.assert_array_equal(second[name], value, err_msg=name)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_an_engine_of_each_precision_passes_the_gate(build_engine, tmp_path, precision):
    built, path = build_engine(tmp_path, precision)
    assert built.comparison.accepted and built.comparison.difference.detections > 0
    detector = Detector.load(path)
    assert detector.metadata.precision == precision and detector.backend.name == "TensorRT"


def test_tf32_passes_by_the_tolerance_of_half_precision(build_engine, graph_of, tmp_path):
    built, _ = build_engine(tmp_path, "tf32", graph=graph_of("fp32"), tf32=True)
    assert built.comparison.accepted


def test_the_ap_of_an_engine_is_that_of_the_onnx_file(engine, onnx_file, detections_as_truth):
    backend = TensorRtBackend(engine)
    values = {"graph": onnx_file, "output": engine, "precision": "fp16", **detections_as_truth}
    result = gate(backend, BuildRequest(model=onnx_file, **values), backend.plan.profiles, Progress())
    reference, found = result.ap["box_ap"]
    assert reference > 0.8 and found > reference - 0.05


def test_a_graph_gives_what_the_engine_gives(engine):
    backends = [TensorRtBackend(engine, graphs=graphs) for graphs in (True, False)]
    for feeds in feeds_of((1, 96, 128), (2, 96, 128), (4, 160, 160)):
        wanted = backends[1](feeds)
        for _ in range(4):  # the first runs without a graph, the second captures it
            assert_same(wanted, backends[0](feeds))
    assert backends[0].graph_refusals() == {}


def test_an_engine_gives_the_same_every_time_and_whatever_it_saw_before(engine):
    backend = TensorRtBackend(engine)
    first, other = feeds_of((2, 96, 128), (3, 64, 96))
    wanted = backend(first)
    for _ in range(3):
        backend(other)
        assert_same(wanted, backend(first))


def test_threads_get_their_own_results(engine):
    backend = TensorRtBackend(engine, contexts=2)
    batches = feeds_of((1, 96, 128), (2, 64, 96), (3, 128, 96), (1, 160, 160))
    wanted, found = [backend(feeds) for feeds in batches], [None] * len(batches)

    def run(index):
        for _ in range(5):
            found[index] = backend(batches[index])

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(batches))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for first, second in zip(wanted, found, strict=True):
        assert_same(first, second)


def test_images_of_any_size_are_padded_to_a_profile(engine, onnx_file):
    images = [np.random.default_rng(0).integers(0, 255, (*size, 3), np.uint8) for size in ((50, 70), (200, 90))]
    for image in images:
        detections = [Detector.load(path).detect([image])[0] for path in (onnx_file, engine)]
        assert abs(len(detections[0]) - len(detections[1])) <= 3


def test_a_batch_outside_all_profiles_is_refused(engine):
    (feeds,) = feeds_of((5, 96, 128))
    with pytest.raises(UserError, match=r"a batch of 5 image\(s\) of 96×128"):
        TensorRtBackend(engine)(feeds)


def test_an_engine_for_another_gpu_is_refused(engine, tmp_path):
    copy = tmp_path / engine.name
    copy.write_bytes(engine.read_bytes())
    values = json.loads(engine.with_name(f"{engine.name}.json").read_text())
    values["stamp"]["gpu"] = "NVIDIA Abacus"
    write_json(tmp_path / f"{engine.name}.json", values)
    with pytest.raises(UserError, match="built for gpu NVIDIA Abacus"):
        TensorRtBackend(copy)


def test_a_wrong_engine_is_set_aside_and_its_stage_is_named(build_engine, graph_of, tmp_path):
    model = onnx.load(graph_of("fp16"))
    initializer(model, lambda name, _: name.endswith("box_predictor.bbox_pred.bias_fp16"), lambda bias: bias + 8)
    onnx.save(model, tmp_path / "wrong.onnx")
    with pytest.raises(UserError, match="first departure: box_deltas"):
        build_engine(tmp_path, graph=tmp_path / "wrong.onnx")
    assert (tmp_path / "model.fp16.rejected.engine").is_file() and not (tmp_path / "model.fp16.engine").exists()


@pytest.mark.parametrize("weights", [Weights.REFITTABLE, Weights.STRIPPED])
def test_weights_are_put_into_an_engine(build_engine, graph_of, onnx_file, tmp_path, weights):
    built, path = build_engine(tmp_path, weights=weights)
    assert built.comparison.accepted
    if weights is Weights.STRIPPED:
        with pytest.raises(UserError, match="without its weights"):
            TensorRtBackend(path)
    values = {"graph": graph_of("fp16"), "output": tmp_path / "new.engine", "precision": "fp16"}
    assert refit_tensorrt_engine(path, BuildRequest(model=onnx_file, **values), Progress()).comparison.accepted
    assert TensorRtBackend(tmp_path / "new.engine").metadata.stamp["refit"] != "stripped"


def test_each_shape_runs_in_its_own_profile(build_engine, tmp_path):
    _, path = build_engine(tmp_path, batch="1,2", size="64x96,128x160")
    backend = TensorRtBackend(path)
    for feeds in feeds_of((1, 64, 96), (2, 128, 160), (1, 128, 160), (2, 64, 96)):
        assert len(backend(feeds)["scores"]) == len(feeds["images"])


def command_line(*arguments):
    """Runs `maskrcnn build-engine` in another process, as the two forms of plugins share a name."""
    words = ("build-engine", *map(str, arguments), "--fp16", "--target", "tensorrt")
    done = subprocess.run([sys.executable, "-m", "maskrcnn", *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("options", [(), ("--version-compatible",)])
def test_an_engine_with_the_plugin_library(onnx_file, tmp_path, options):
    if missing := build.obstacle(build.Library.PLUGINS, find_toolchain()):
        pytest.skip(str(missing))
    options = ("--plugin-library", *options, "--size", "96x128", "--output", tmp_path / "library.engine")
    printed = command_line(onnx_file, *options)
    assert "plugins: library" in printed and "differ from the ONNX file's by" in printed


def test_the_command_line(gpu, onnx_file, tmp_path):
    command_line(onnx_file, "--batch", "1,2", "--size", "96x128", "--output", tmp_path / "model.engine")
    stamp = json.loads((tmp_path / "model.engine.json").read_text())["stamp"]
    assert stamp["gpu"] == gpu.name and stamp["plugins"] == "aot"
    assert TensorRtBackend(tmp_path / "model.engine").metadata.stamp == stamp


def test_torchs_tensors_go_in_and_out_without_a_copy_on_the_host(engine):
    torch = pytest.importorskip("torch")
    backend, plain = TensorRtBackend(engine), TensorRtBackend(engine, graphs=False)
    batches, kept = feeds_of((2, 96, 128), (2, 96, 128), (3, 64, 96)), []
    for feeds in batches * 3:
        given = {name: torch.from_numpy(value).cuda() for name, value in feeds.items()}
        kept.append({name: torch.from_dlpack(value) for name, value in backend(given).items()})
        assert_same(plain(feeds), {name: torch.from_dlpack(v).cpu().numpy() for name, v in plain(given).items()})
        del given
    for feeds, found in zip(batches * 3, kept, strict=True):  # no run wrote over earlier results
        assert_same(plain(feeds), {name: value.cpu().numpy() for name, value in found.items()})


def test_the_engines_own_input_is_written_and_its_outputs_read_in_place(engine):
    torch = pytest.importorskip("torch")
    backend = TensorRtBackend(engine)
    (feeds,) = feeds_of((2, 96, 128))
    wanted = backend(feeds)
    for _ in range(3):
        with backend.acquire() as contexts:
            binding = contexts.bind((2, 96, 128))
            torch.from_dlpack(binding.input("images")).copy_(torch.from_numpy(feeds["images"]))
            torch.cuda.synchronize()
            binding.put("image_sizes", feeds["image_sizes"])
            assert_same(wanted, {name: value.numpy() for name, value in binding.run().items()})


def test_memory_comes_back(engine):
    torch = pytest.importorskip("torch")
    backend = TensorRtBackend(engine, shapes=2)
    batches = feeds_of((1, 64, 96), (2, 96, 128), (4, 160, 160), (3, 128, 96))
    for feeds in batches * 2:
        backend(feeds)
    free, _ = torch.cuda.mem_get_info()
    for feeds in batches * 10:
        backend(feeds)
    assert torch.cuda.mem_get_info()[0] > free - (64 << 20)  # what CUDA keeps for itself varies
    backend.close()
    assert torch.cuda.mem_get_info()[0] >= free

"""Every backend: the same detections, the same checks, and foreign files."""

import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import onnx
import pytest

from maskrcnn.data.coco import CocoDataset
from maskrcnn.data.shapes import shapes_image
from maskrcnn.errors import UserError
from maskrcnn.export.inspection import inspect
from maskrcnn.metadata import KEY
from maskrcnn.runtime import Detector
from maskrcnn.runtime.backends.base import detector_specs
from maskrcnn.runtime.build.openvino import build_openvino_engine
from maskrcnn.runtime.detector import load_backend
from maskrcnn.runtime.engine_files import read_metadata
from maskrcnn.runtime.evaluation.evaluate import detect_records, evaluate, names_line, score_kinds
from maskrcnn.runtime.evaluation.protocol import METRICS
from maskrcnn.runtime.verification.compare import EXACT, HALF
from maskrcnn.runtime.verification.inputs import compare_backends


@pytest.fixture(scope="module", params=["torch", "onnxruntime", "openvino", "engine"])
def backend(request, checkpoint, onnx_file, openvino_engine):
    kinds = {
        "torch": lambda: load_backend(checkpoint, device="cpu"),
        "onnxruntime": lambda: load_backend(onnx_file),
        "openvino": lambda: load_backend(onnx_file, "openvino"),
        "engine": lambda: load_backend(openvino_engine),
    }
    return kinds[request.param]()


def feeds(batch: int = 2) -> dict[str, np.ndarray]:
    images = np.random.default_rng(0).uniform(0, 255, (batch, 3, 64, 96)).astype(np.float32)
    return {"images": images, "image_sizes": np.array([[64, 96]] * batch, np.int64)}


def test_every_backend_agrees_with_pytorch(backend, checkpoint):
    difference = compare_backends(load_backend(checkpoint, device="cpu"), backend, EXACT)
    assert difference.within(EXACT), str(difference)
    assert difference.detections > 10
    assert difference.images_without_detections > 0


def test_outputs_have_the_contracts_names_types_and_shapes(backend):
    outputs = backend(feeds())
    _, specs = detector_specs(backend.metadata)
    assert set(outputs) == set(specs)
    for name, spec in specs.items():
        assert str(outputs[name].dtype) == spec.dtype, name
        assert outputs[name].shape == (2, *spec.shape[1:]), name


def test_threads_share_a_backend_and_each_gets_its_own_detections(backend):
    rng = np.random.default_rng(3)
    given = [{**feeds(1), "images": rng.uniform(0, 255, (1, 3, 64, 96)).astype(np.float32)} for _ in range(4)]
    alone = [backend(each) for each in given]
    assert len({float(each["scores"].sum()) for each in alone}) == len(given)
    with ThreadPoolExecutor(4) as pool:
        for found in (pool.map(backend, given * 6), pool.map(backend, given * 6)):
            for number, outputs in enumerate(found):
                for name, values in alone[number % len(given)].items():
                    np.testing.assert_allclose(outputs[name], values, atol=1e-3, err_msg=name)


def test_an_image_that_overflows_has_no_detections_and_leaves_the_other_alone(backend):
    alone, both = feeds(1), feeds()
    both["images"][:1], both["images"][1] = alone["images"], 3e38
    outputs, expected = backend(both), backend(alone)
    assert outputs["num_detections"].tolist() == [expected["num_detections"][0], 0]
    for name, values in outputs.items():
        assert not values[1].any(), name
        np.testing.assert_allclose(values[0], expected[name][0], atol=1e-2, err_msg=name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": np.zeros((2, 3, 64, 96), np.uint8)}, r"images uint8"),
        ({"images": np.zeros((2, 1, 64, 96), np.float32)}, r"expected: images float32 \[None, 3"),
        ({"images": np.zeros((2, 3, 60, 96), np.float32)}, "images of 60×96\n  expected: multiples of 32"),
        ({"images": np.zeros((1, 3, 64, 96), np.float32)}, "1 images with 2 sizes"),
        ({"images": np.zeros((0, 3, 64, 96), np.float32)}, "0 images with 2 sizes"),
        ({"extra": np.zeros(1)}, "inputs .*extra"),
    ],
)
def test_wrong_feeds_are_refused_before_inference(backend, change, message):
    with pytest.raises(UserError, match=message):
        backend({**feeds(), **change})


class OnGpu:
    """Attributes of a GPU array of any library."""

    shape, dtype = (2, 3, 64, 96), np.dtype("float32")

    def __dlpack_device__(self):
        return 2, 0

    def __len__(self):
        return 2


def test_arrays_on_a_gpu_are_refused_where_the_model_is_not(backend):
    with pytest.raises(UserError, match="arrays on a GPU\n  expected: arrays in host memory"):
        backend({**feeds(), "images": OnGpu()})


def test_a_detector_returns_boxes_in_the_original_image(onnx_file):
    image = shapes_image(np.random.default_rng(4), (300, 200))[0]
    detector = Detector.load(onnx_file)
    alone = detector.detect([image])[0]
    assert len(alone) > 0
    assert alone.size_hw == (300, 200)
    assert alone.boxes_xyxy_px[:, 2].max() <= 200
    assert alone.boxes_xyxy_px[:, 3].max() <= 300
    assert alone.full_masks().shape == (len(alone), 300, 200)


def test_evaluation_scores_all_metrics_and_writes_coco_results(onnx_file, shapes):
    dataset = CocoDataset.load(shapes, "val")
    done = []
    found = evaluate(Detector.load(onnx_file), dataset, batch_size=4, progress=done.append)
    assert sum(done) == found.images == 6
    assert set(found.box) == set(found.mask) == set(METRICS)
    assert {r["image_id"] for r in found.results} <= {record.id for record in dataset.images}
    assert json.loads(json.dumps(found.results))[0]["segmentation"]["size"] == [96, 96]


@pytest.mark.parametrize("kind", ["torch", "onnxruntime", "openvino", "engine"])
def test_a_model_without_masks_runs_in_every_backend(kind, tmp_path, boxes_onnx_file, shapes):
    path = boxes_onnx_file.with_name("best.safetensors") if kind == "torch" else boxes_onnx_file
    if kind == "engine":
        path = tmp_path / "model.fp32.xml"
        build_openvino_engine(boxes_onnx_file, path, half=False)
    backend = load_backend(path, "openvino") if kind == "openvino" else load_backend(path)
    assert set(backend(feeds())) == {"num_detections", "boxes", "scores", "labels"}
    dataset = CocoDataset.load(shapes, "val")
    found = evaluate(Detector(backend), dataset)
    assert found.mask is None
    assert set(found.summary()) == {"box_ap"}
    assert found.table().split("\n")[0].split() == ["box"]
    assert len(found.results) > 0 and "segmentation" not in found.results[0]


def test_results_of_parts_of_a_dataset_score_like_the_whole(onnx_file, shapes):
    dataset = CocoDataset.load(shapes, "val")
    detector = Detector.load(onnx_file)
    whole = evaluate(detector, dataset)
    parts = [detect_records(detector, dataset.images[start::2], batch_size=1)[0] for start in (1, 0)]
    assert all(parts) and detect_records(detector, dataset.images[:0])[0] == []
    scored = score_kinds(dataset, parts[0] + parts[1], ("bbox", "segm"))
    assert scored.box == whole.box and scored.mask == whole.mask
    assert scored.summary() == whole.summary() and scored.table() == whole.table()
    assert score_kinds(dataset, parts[0], ("bbox",)).mask is None


def test_a_model_of_other_classes_is_refused(onnx_file, shapes, tmp_path):
    root = shutil.copytree(shapes, tmp_path / "other")
    path = root / "annotations" / "instances_val.json"
    content = json.loads(path.read_text())
    content["categories"].append({"id": 17, "name": "star"})
    path.write_text(json.dumps(content))
    detector = Detector.load(onnx_file)
    with pytest.raises(UserError, match=r"3 classes without category id\(s\) \[17\]"):
        evaluate(detector, CocoDataset.load(root, "val"))
    content["categories"] = [{"id": 1, "name": " Circle"}, {"id": 2, "name": "box"}, {"id": 3, "name": "triangle"}]
    path.write_text(json.dumps(content))
    line = names_line(detector, CocoDataset.load(root, "val")) or ""
    assert "1 of 3 classes" in line and "(category id 2: 'rectangle', 'box')" in line
    assert names_line(detector, CocoDataset.load(shapes, "val")) is None


@pytest.mark.parametrize(
    ("backend", "options", "words"),
    [
        ("onnxruntime", {"threads": -1}, "threads -1\n  expected: at least 0"),
        ("openvino", {"threads": -1}, "threads -1\n  expected: at least 0"),
        ("openvino", {"streams": 0}, "streams 0\n  expected: at least 1"),  # every call would wait for ever
    ],
)
def test_numbers_of_threads_out_of_range_are_refused(onnx_file, backend, options, words):
    with pytest.raises(UserError, match=words):
        load_backend(onnx_file, backend, **options)


def test_an_engine_that_was_cut_short_is_told_by_every_reader(half_openvino_engine, tmp_path):
    for suffix in (".xml", ".bin"):
        shutil.copy(half_openvino_engine.with_suffix(suffix), tmp_path / f"m{suffix}")
    with open(tmp_path / "m.bin", "r+b") as file:
        file.truncate(1000)
    for read in (read_metadata, Detector.load, inspect):
        with pytest.raises(UserError, match=r"m\.bin: 1000 bytes"):
            read(tmp_path / "m.xml")


def test_a_half_precision_engine_is_kept_when_it_agrees(tmp_path, onnx_file):
    path = tmp_path / "model.fp16.xml"
    built = build_openvino_engine(onnx_file, path, half=True)
    assert built.comparison.difference.within(HALF)
    assert built.metadata.precision == "fp16"
    full = onnx_file.stat().st_size
    assert path.with_suffix(".bin").stat().st_size < 0.6 * full
    loaded = load_backend(path)
    assert loaded.metadata.stamp["compared"] == str(built.comparison.difference)
    assert loaded.metadata.class_names == ("circle", "rectangle", "triangle")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.fp16.bin", "model.fp16.xml"]


def test_weights_of_another_engine_are_refused(tmp_path, half_openvino_engine):
    path = tmp_path / "model.xml"
    path.write_bytes(half_openvino_engine.read_bytes())
    content = bytearray(half_openvino_engine.with_suffix(".bin").read_bytes())
    path.with_suffix(".bin").write_bytes(content)
    load_backend(path)
    content[len(content) // 2] ^= 1
    path.with_suffix(".bin").write_bytes(content)
    with pytest.raises(UserError, match=r"model\.bin: not the weights that model\.xml was written with"):
        load_backend(path)


def test_an_engine_that_differs_is_set_aside(tmp_path, onnx_file, monkeypatch):
    from maskrcnn.runtime.build import openvino as engine

    monkeypatch.setattr(engine, "HALF", engine.dataclasses.replace(HALF, mask_mean=0.0, box_px=0.0))
    path = tmp_path / "model.fp16.xml"
    with pytest.raises(UserError, match=r"engine that differs from .*tolerance needed"):
        build_openvino_engine(onnx_file, path, half=True)
    assert not path.exists()
    assert (tmp_path / "model.fp16.rejected.xml").exists()


def test_an_engine_for_bfloat16_needs_a_cpu_with_it(tmp_path, half_openvino_engine, monkeypatch):
    import openvino

    path = tmp_path / "model.fp16.xml"
    path.with_suffix(".bin").symlink_to(half_openvino_engine.with_suffix(".bin"))
    text = half_openvino_engine.read_text().replace(
        "&quot;execution&quot;: &quot;fp32&quot;", "&quot;execution&quot;: &quot;bf16&quot;"
    )
    path.write_text(text)
    real = openvino.Core.get_property

    def without_bf16(self, device, name):
        return ["FP32"] if name == "OPTIMIZATION_CAPABILITIES" else real(self, device, name)

    monkeypatch.setattr(openvino.Core, "get_property", without_bf16)
    with pytest.raises(UserError, match=r"built for bfloat16 execution .* this CPU has none"):
        load_backend(path)


def foreign_onnx(path, metadata=None):
    value = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])
    out = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1])
    graph = onnx.helper.make_graph([onnx.helper.make_node("Relu", ["x"], ["y"])], "g", [value], [out])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)
    if metadata:
        onnx.helper.set_model_props(model, {KEY: metadata})
    onnx.save(model, path)
    return path


def test_signals_are_handled_after_openvino_models_are_gone(onnx_file):
    """With two cores the thread would keep the freed signal stack of the first."""
    code = """
import os, pathlib, signal, sys
from maskrcnn.runtime.backends.openvino import OpenVinoBackend
first, second = (OpenVinoBackend(pathlib.Path(sys.argv[1])) for _ in range(2))
del first
del second
signal.signal(signal.SIGUSR1, lambda *_: print("handled"))
os.kill(os.getpid(), signal.SIGUSR1)
"""
    ended = subprocess.run([sys.executable, "-c", code, str(onnx_file)], capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (0, "handled\n"), ended.stderr


@pytest.mark.parametrize("backend_name", ["onnxruntime", "openvino"])
def test_a_foreign_onnx_file_is_refused(tmp_path, backend_name):
    path = foreign_onnx(tmp_path / "foreign.onnx")
    with pytest.raises(UserError, match="without maskrcnn's metadata"):
        load_backend(path, backend_name)
    path.write_bytes(b"nonsense")
    with pytest.raises(UserError, match=r"foreign\.onnx: not a"):
        load_backend(path, backend_name)
    with pytest.raises(UserError, match="no file"):
        load_backend(tmp_path / "missing.onnx", backend_name)


def test_a_contract_of_another_version_is_refused(tmp_path):
    path = foreign_onnx(tmp_path / "old.onnx", json.dumps({"contract": 99}))
    with pytest.raises(UserError, match="contract version 99"):
        load_backend(path)


def test_a_foreign_engine_is_refused(tmp_path):
    (tmp_path / "m.xml").write_text("<net/>")
    with pytest.raises(UserError, match=r"no engine .* with its m\.bin"):
        load_backend(tmp_path / "m.xml")
    (tmp_path / "m.bin").write_bytes(b"")
    with pytest.raises(UserError, match="without maskrcnn's metadata"):
        load_backend(tmp_path / "m.xml")


def test_files_and_backends_that_do_not_go_together(tmp_path, onnx_file):
    with pytest.raises(UserError, match=r"a file of kind '\.pth'"):
        load_backend(tmp_path / "weights.pth")
    with pytest.raises(UserError, match=r"backend 'torch' for .*\n  expected: onnxruntime or openvino"):
        load_backend(onnx_file, "torch")
    with pytest.raises(UserError, match=r"backend 'onnxruntime' for .*model\.engine\n  expected: tensorrt"):
        load_backend(tmp_path / "model.engine", "onnxruntime")


@pytest.mark.parametrize(
    ("kind", "options", "words"),
    [
        (
            "onnx",
            {"device": "cpu"},
            "provider, gpu, providers, threads\n  fix:      ONNX Runtime chooses the device by",
        ),
        ("onnx", {"backend": "openvino", "thread": 1}, "precision, threads, streams\n  fix:      leave it out"),
        ("checkpoint", {"threads": 1}, "precision, device, compile, graphs\n  fix:      leave it out"),
    ],
)
def test_an_option_of_another_backend_is_refused(checkpoint, onnx_file, kind, options, words):
    with pytest.raises(
        UserError, match=f"option (device|threads?) for .*\n  expected: options of this backend: {words}"
    ):
        load_backend(onnx_file if kind == "onnx" else checkpoint, **options)


def test_a_precision_that_openvino_does_not_have(onnx_file):
    with pytest.raises(UserError, match="precision 'fp8'\n  expected: fp32 or bf16"):
        load_backend(onnx_file, "openvino", precision="fp8")


@pytest.mark.parametrize(("library", "kind"), [("onnxruntime", "onnxruntime"), ("openvino", "openvino")])
def test_a_missing_library_says_how_to_install_it(onnx_file, monkeypatch, library, kind):
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(UserError, match=f"no Python package {library}[\\s\\S]*pip install {library}"):
        load_backend(onnx_file, kind)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.parametrize("kind", ["torch", "onnxruntime", "openvino"])
def test_a_forked_process_gets_an_error_and_ends(kind, checkpoint, onnx_file):
    """In a process of its own, as the tests' one has threads that must not be forked."""
    program = f"""
import os, signal, sys
import numpy as np
from maskrcnn import Detector, UserError
detector = Detector.load({str(checkpoint if kind == "torch" else onnx_file)!r}, {kind!r})
images = [np.zeros((64, 96, 3), np.uint8)]
detector.detect(images)
if os.fork():
    _, status = os.wait()
    detector.detect(images)  # the parent goes on
    sys.exit(os.waitstatus_to_exitcode(status))
signal.alarm(20)
try:
    detector.detect(images)
except UserError as error:
    assert "forked" in error.found and "spawn" in error.fix
    del detector  # must not wait either
    try:
        Detector.load({str(checkpoint if kind == "torch" else onnx_file)!r}, {kind!r}).detect(images)
    except UserError as error:  # of PyTorch, if it has threads
        assert "forked" in error.found and "spawn" in error.fix
    sys.exit(7)  # nor must the end of the process
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 7, done.stderr


@pytest.mark.parametrize(("field", "version"), [("IR version", 99), ("opset", 60)])
def test_a_file_newer_than_onnx_runtime_names_both_versions(onnx_file, tmp_path, field, version):
    model = onnx.load(onnx_file)
    if field == "opset":
        model.opset_import[0].version = version
    else:
        model.ir_version = version
    path = tmp_path / "newer.onnx"
    path.write_bytes(model.SerializeToString())
    with pytest.raises(
        UserError, match=rf"newer\.onnx: ONNX {field} {version}; ONNX Runtime \S+ reads up to \d+"
    ) as found:
        load_backend(path)
    assert "pip install -U onnxruntime" in found.value.fix


def test_an_export_has_the_lowest_ir_version_and_inspect_names_the_oldest_runtime(onnx_file):
    from maskrcnn.export.inspection import inspect

    model = onnx.load(onnx_file)
    assert (model.ir_version, model.opset_import[0].version) == (9, 20)
    assert inspect(onnx_file).kind.startswith("ONNX IR 9, opset 20 (ONNX Runtime 1.17 or newer)")

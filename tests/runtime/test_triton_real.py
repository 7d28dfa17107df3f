"""Repositories on NVIDIA's real server, with the network in the Python backend: results, faults, versions, load."""

import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import psutil
import pytest
import triton_server
import yaml
from PIL import Image
from triton_server import Server, encoded, infer

from maskrcnn.data.shapes import shapes_image
from maskrcnn.runtime import Detector
from maskrcnn.runtime.engine_files import read_model
from maskrcnn.runtime.serving.models import ServingOptions, served_model
from maskrcnn.runtime.serving.triton import write_repository

pytestmark = pytest.mark.skipif(triton_server.obstacle() is not None, reason=str(triton_server.obstacle()))
SERVING_PAGE = (Path(__file__).parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")
SIZES_HW = ((120, 150), (90, 61), (200, 130))


def add(repository, name, path, **options):
    """Adds a model of one thread, so that sums are in one order, to a repository."""
    settings = ServingOptions(**{"step_instances": 1, "threads": 1, **options})
    write_repository(repository, [(name, served_model(path, network="python"))], settings)


def client_of(server, kind="grpc"):
    module = pytest.importorskip(f"tritonclient.{kind}")
    options = {"concurrency": 1} if kind == "http" else {}
    return module, module.InferenceServerClient(getattr(server, kind), **options)


def wait_until(is_done, timeout=180):
    deadline = time.monotonic() + timeout
    while not is_done():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def no_proxy():
    return {**os.environ, "no_proxy": "127.0.0.1", "NO_PROXY": "127.0.0.1"}


@pytest.fixture(scope="module")
def images():
    rng = np.random.default_rng(5)
    return [shapes_image(rng, size)[0] for size in SIZES_HW]


@pytest.fixture(scope="module")
def models(onnx_file, openvino_engine, boxes_onnx_file, joint_onnx_file):
    return {"masks": onnx_file, "openvino": openvino_engine, "boxes": boxes_onnx_file, "poses": joint_onnx_file}


@pytest.fixture(scope="module")
def detectors(models):
    return {name: Detector.load(path, threads=1) for name, path in models.items()}


@pytest.fixture(scope="module")
def lowest_score(detectors, images):
    """Halves the detections of the first image."""
    return float(np.median(detectors["openvino"].detect(images[:1])[0].scores))


@pytest.fixture(scope="module")
def repository(tmp_path_factory, models, lowest_score):
    folder = tmp_path_factory.mktemp("triton") / "repository"
    add(folder, "masks", models["masks"], step_instances=2)
    add(folder, "openvino", models["openvino"], masks="none", min_score=lowest_score)
    add(folder, "boxes", models["boxes"])
    add(folder, "poses", models["poses"], masks="bits")
    add(folder, "padded", models["masks"], pad_to=((128, 128),), max_batch=4)
    return folder


@pytest.fixture(scope="module")
def server(tmp_path_factory, repository):
    flags = ("--model-control-mode=explicit", "--load-model=*")
    running = Server(repository, tmp_path_factory.mktemp("server"), *flags)
    yield running
    running.kill()


def assert_as_detected(answer, detected, metadata, *, atol=0.0):
    """`atol`: of boxes in pixels, and of scores; 0 also compares masks and keypoints, without a difference."""
    rows = answer["boxes"].shape[1]
    assert len(detected) == len(answer["boxes"])
    for n, found in enumerate(detected):
        used = answer["num_detections"][n, 0]
        assert used == len(found)
        assert tuple(answer["image_size"][n]) == found.size_hw
        np.testing.assert_allclose(answer["boxes"][n, :used], found.boxes_xyxy_px, rtol=0, atol=atol)
        np.testing.assert_allclose(answer["scores"][n, :used], found.scores, rtol=0, atol=atol)
        np.testing.assert_array_equal(answer["labels"][n, :used], found.labels)
        names = [metadata.class_names[label - 1].encode() for label in found.labels]
        assert answer["class_names"][n].tolist() == names + [b""] * (rows - used)
        assert not answer["boxes"][n, used:].any() and not answer["scores"][n, used:].any()
        if "masks" in answer and not atol:
            assert_same_masks(answer["masks"][n], found)
        if "keypoints" in answer and not atol:
            np.testing.assert_array_equal(answer["keypoints"][n, :used], found.keypoints)
            assert not answer["keypoints"][n, used:].any()


def assert_same_masks(masks, found):
    """Compares masks as run lengths or as bits."""
    if masks.dtype == object:
        assert masks[: len(found)].tolist() == [rle["counts"].encode() for rle in found.rles()]
        return
    height, width = found.size_hw
    pixels = np.unpackbits(masks, axis=2).astype(bool)
    np.testing.assert_array_equal(pixels[: len(found), :height, :width], found.full_masks())
    assert not pixels[len(found) :].any() and not pixels[:, height:].any() and not pixels[:, :, width:].any()


# Results


@pytest.mark.parametrize("kind", ["http", "grpc"])
@pytest.mark.parametrize("name", ["masks", "openvino", "boxes", "poses"])
def test_detections_equal_those_of_the_detector(server, detectors, lowest_score, images, name, kind):
    module, client = client_of(server, kind)
    detector = detectors[name]
    outputs = {"masks": {"masks"}, "openvino": set(), "boxes": set(), "poses": {"masks", "keypoints"}}[name]
    for batch in (images[:1], images):
        answer = infer(module, client, name, [encoded(image) for image in batch])
        detected = detector.detect(batch)
        if name == "openvino":
            every, detected = detected, [found.above(lowest_score) for found in detected]
            assert len(batch) > 1 or len(detected[0]) < len(every[0])
        assert sum(map(len, detected)) > len(batch)
        assert_as_detected(answer, detected, detector.metadata)
        assert set(answer) & {"masks", "keypoints"} == outputs
    client.close()


def test_what_the_server_says_about_a_model(server):
    _, client = client_of(server, "http")
    metadata = client.get_model_metadata("masks")
    assert metadata["platform"] == "ensemble" and metadata["versions"] == ["1"]
    assert metadata["inputs"] == [{"name": "image", "datatype": "BYTES", "shape": [-1, 1]}]
    outputs = {output["name"]: (output["datatype"], output["shape"]) for output in metadata["outputs"]}
    assert outputs == {
        "num_detections": ("INT32", [-1, 1]),
        "boxes": ("FP32", [-1, 12, 4]),
        "scores": ("FP32", [-1, 12]),
        "labels": ("INT64", [-1, 12]),
        "class_names": ("BYTES", [-1, 12]),
        "image_size": ("INT64", [-1, 2]),
        "masks": ("BYTES", [-1, 12]),
    }
    config = client.get_model_config("masks_network")
    assert config["backend"] == "python" and config["max_batch_size"] == 8 and "dynamic_batching" in config


def counts_of(client, model):
    """Images and batches that a model has run."""
    (stats,) = client.get_inference_statistics(model, as_json=True)["model_stats"]
    return np.array([int(stats["inference_count"]), int(stats["execution_count"])])


def test_warm_up_and_batches_across_requests(server, images):
    """Requests that wait while the network is busy are run as one batch."""
    module, client = client_of(server)
    assert counts_of(client, "padded_network").tolist() == [1, 1]  # the one size to pad to
    file = encoded(images[2][:80, :80])
    alone = infer(module, client, "padded", [file])
    assert counts_of(client, "padded_network").tolist() == [2, 2]
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda _: infer(module, client, "padded", [file]), range(32)))
    images_run, batches = counts_of(client, "padded_network") - 2
    assert images_run == 32 and batches < 32
    for answer in answers:
        np.testing.assert_allclose(answer["boxes"], alone["boxes"], rtol=0, atol=1e-3)
        np.testing.assert_allclose(answer["scores"], alone["scores"], rtol=0, atol=1e-5)


# Faults


def error_of(module, client, name, files) -> str:
    with pytest.raises(module.InferenceServerException) as caught:
        infer(module, client, name, files)
    return caught.value.message()


def test_requests_that_cannot_be_answered(server, images):
    for kind in ("http", "grpc"):
        module, client = client_of(server, kind)
        text = error_of(module, client, "masks", [encoded(images[0]), b"no image"])
        assert "image 1 of the request is not an image" in text and "fix:" in text
        assert "batch-size must be <= 4" in error_of(module, client, "padded", [encoded(images[0])] * 5)
        text = error_of(module, client, "padded", [encoded(images[0][:60])])
        assert "images of 64x160 after resizing" in text and "at most 128x128" in text


def test_a_broken_image_fails_its_own_request_only(server, detectors, images):
    module, client = client_of(server)
    good, detector = encoded(images[0]), detectors["masks"]
    detected = detector.detect(images[:1])
    files = [good, good[: len(good) // 2], good, b""] * 4
    with ThreadPoolExecutor(8) as pool:
        answers = [pool.submit(infer, module, client, "masks", [file]) for file in files]
    for answer, file in zip(answers, files, strict=True):
        if file is good:
            assert_as_detected(answer.result(), detected, detector.metadata, atol=1e-3)
        else:
            assert "expected:" in answer.exception().message()


def test_sixteen_clients_at_once(server, detectors, images):
    names = ["masks", "boxes", "poses"]
    expected = {name: [detectors[name].detect([image]) for image in images] for name in names}
    files = [encoded(image) for image in images]

    def work(number):
        module, client = client_of(server, "http" if number % 2 else "grpc")
        for turn in range(6):
            name, k = names[(number + turn) % len(names)], (number // 3 + turn) % len(images)
            answer = infer(module, client, name, [files[k]])
            assert_as_detected(answer, expected[name][k], detectors[name].metadata, atol=1e-3)
        client.close()

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(work, range(16)))


def test_a_killed_step_is_found_by_the_probe_and_comes_back(server, detectors, images):
    """Triton 24.06 and newer do not start a step again, and stay ready."""
    module, client = client_of(server)
    deployment = next(yaml.safe_load_all(code_of_page("yaml", "livenessProbe")))
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    probe = [word.replace("localhost:8000", server.http) for word in container["livenessProbe"]["exec"]["command"]]

    def probed():
        return subprocess.run(probe, capture_output=True, env=no_proxy(), timeout=60).returncode

    detected = detectors["masks"].detect(images[:1])
    for step in ("masks_network", "masks_post"):
        assert probed() == 0
        killed = server.steps(step)
        for process in killed:
            process.kill()
        assert killed
        wait_until(lambda killed=killed: all(process.status() == psutil.STATUS_ZOMBIE for process in killed))
        assert "is not healthy" in error_of(module, client, "masks", [encoded(images[0])])
        assert client.is_server_ready() and probed() != 0
        client.unload_model(step)
        wait_until(lambda step=step: not client.is_model_ready(step))
        client.load_model(step)
        answer = infer(module, client, "masks", [encoded(images[0])])
        assert_as_detected(answer, detected, detectors["masks"].metadata)


def test_models_that_cannot_be_loaded(server, repository, onnx_file):
    module, client = client_of(server)

    def refused(name):
        with pytest.raises(module.InferenceServerException) as caught:
            client.load_model(name)
        return caught.value.message()

    add(repository, "broken", onnx_file)
    network = repository / "broken_network" / "1" / "model.onnx"
    network.write_bytes(network.read_bytes()[:1000])
    text = refused("broken_network")
    assert "not a model that ONNX Runtime loads" in text and "export it again" in text

    network.unlink()
    assert "an ONNX file" in refused("broken_network")

    metadata = repository / "broken_pre" / "1" / "metadata.json"
    metadata.write_text(metadata.read_text().replace('"contract": 1', '"contract": 2'))
    text = refused("broken_pre")
    assert "contract version 2" in text and "expected: version 1" in text


def test_unload_and_load(server, detectors, images):
    module, client = client_of(server)
    client.unload_model("boxes")
    wait_until(lambda: not client.is_model_ready("boxes"))
    assert "boxes" in error_of(module, client, "boxes", [encoded(images[0])])
    client.load_model("boxes")
    answer = infer(module, client, "boxes", [encoded(images[0])])
    assert_as_detected(answer, detectors["boxes"].detect(images[:1]), detectors["boxes"].metadata)


# Clients of the documentation


def code_of_page(language: str, containing: str) -> str:
    (found,) = [text for text in re.findall(rf"```{language}\n(.*?)```", SERVING_PAGE, re.DOTALL) if containing in text]
    return found.replace("model_onnx", "masks")


@pytest.fixture
def photo(tmp_path, images):
    Image.fromarray(images[0]).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def test_the_client_in_python(server, detectors, photo, images):
    program = code_of_page("python", "tritonclient").replace("localhost:8000", server.http)
    done = subprocess.run([sys.executable, "-c", program, str(photo)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    detector = detectors["masks"]
    (found,) = detector.detect(images[:1])
    names = [detector.metadata.class_names[label - 1] for label in found.labels]
    assert [line.split()[0] for line in lines] == names and len(names) > 0
    assert [int(line.split()[-1]) for line in lines] == [mask.sum() for mask in found.full_masks()]


@pytest.mark.skipif(not all(map(shutil.which, ("bash", "curl"))), reason="no bash or curl")
def test_the_client_with_curl(server, detectors, photo, images):
    program = code_of_page("bash", "curl").replace("localhost:8000", server.http)
    command = ["bash", "-c", program, "client", str(photo)]
    done = subprocess.run(command, env=no_proxy(), capture_output=True, timeout=60)
    outputs = {output["name"]: output["data"] for output in json.loads(done.stdout)["outputs"]}
    (found,) = detectors["masks"].detect(images[:1])
    assert outputs["num_detections"] == [len(found)]
    np.testing.assert_allclose(outputs["scores"][: len(found)], found.scores, rtol=1e-6)


# Versions and the end


def test_a_new_version_while_requests_run_and_shutdown(tmp_path, onnx_file, images, monkeypatch):
    copy = shutil.copyfile

    def slow_copy(source, target):
        """So that the server looks for changes while the version is being written."""
        time.sleep(2 * target.name.endswith(".onnx"))
        copy(source, target)

    repository = tmp_path / "repository"
    add(repository, "det", onnx_file)
    other, _ = read_model(onnx_file)
    other.doc_string = "another"
    onnx.save(other, tmp_path / "other.onnx")
    server = Server(repository, tmp_path, "--model-control-mode=poll", "--repository-poll-secs=1")
    try:
        module, client = client_of(server)
        detector = Detector.load(onnx_file, threads=1)
        detected = detector.detect(images[:1])
        done = threading.Event()

        def work():
            count = 0
            while not done.is_set():
                assert_as_detected(infer(module, client, "det", [encoded(images[0])]), detected, detector.metadata)
                count += 1
            return count

        with ThreadPoolExecutor(4) as pool:
            workers = [pool.submit(work) for _ in range(4)]
            time.sleep(1)
            monkeypatch.setattr(shutil, "copyfile", slow_copy)
            add(repository, "det", tmp_path / "other.onnx")
            parts = ("det_pre", "det_network", "det_post")
            for part in ("det", *parts):
                wait_until(lambda part=part: list(client.get_model_metadata(part).versions) == ["2"])
            wait_until(lambda: all(len(server.steps(part)) == 1 for part in parts))
            time.sleep(2)  # so that the server looks for changes again
            done.set()
        assert all(worker.result() > 0 for worker in workers)
        log = server.log.read_text()
        assert [log.count(f'loading: {part}:{version}"') for part in parts for version in (1, 2)] == [1] * 6
        steps = [process for part in parts for process in server.steps(part)]
        assert server.stop() == 0
        assert not psutil.wait_procs(steps, timeout=10)[1]
    finally:
        server.kill()

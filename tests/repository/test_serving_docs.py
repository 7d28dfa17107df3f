"""docs/serving.md: its YAML is consistent, and its clients work."""

import base64
import io
import json
import os
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from triton_server import Server

from maskrcnn.data.shapes import shapes_image
from maskrcnn.runtime import Detector
from maskrcnn.runtime.serving.models import ServingOptions, served_model
from maskrcnn.runtime.serving.triton import default_name, write_repository

TEXT = (Path(__file__).parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL)


def block(language: str, containing: str) -> str:
    (found,) = [text for text in blocks(language) if containing in text]
    return found


@pytest.fixture(scope="module")
def objects():
    """YAML documents by kind; those without a kind are values of a chart."""
    documents = [document for text in blocks("yaml") for document in yaml.safe_load_all(text)]
    assert len(documents) == 6
    return {document.get("kind", "values"): document for document in documents}


@pytest.fixture(scope="module")
def photo(tmp_path_factory):
    path = tmp_path_factory.mktemp("photo") / "photo.png"
    Image.fromarray(shapes_image(np.random.default_rng(2), (110, 140))[0]).save(path)
    return path


# Kubernetes


def test_the_objects_fit_together(objects):
    deployment, service, scaler = (objects[kind] for kind in ("Deployment", "Service", "HorizontalPodAutoscaler"))
    pod = deployment["spec"]["template"]
    labels = pod["metadata"]["labels"]
    assert deployment["spec"]["selector"]["matchLabels"] == labels == service["spec"]["selector"]
    assert objects["PodMonitor"]["spec"]["selector"]["matchLabels"] == labels
    target = scaler["spec"]["scaleTargetRef"]
    assert (target["kind"], target["name"]) == ("Deployment", deployment["metadata"]["name"])
    assert target["apiVersion"] == deployment["apiVersion"]
    (metric,) = scaler["spec"]["metrics"]
    (rule,) = objects["values"]["rules"]["custom"]
    assert metric["pods"]["metric"]["name"] == rule["name"]["as"]
    assert "nv_inference_queue_duration_us" in rule["metricsQuery"] and "\n" not in rule["metricsQuery"]


def test_the_pod_is_whole(objects):
    spec = objects["Deployment"]["spec"]["template"]["spec"]
    (container,) = spec["containers"]
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert ports == {"http": 8000, "grpc": 8001, "metrics": 8002}
    probes = [container[name]["httpGet"] for name in ("startupProbe", "readinessProbe", "livenessProbe")]
    assert all(probe["port"] in ports for probe in probes)
    assert [probe["path"] for probe in probes] == ["/v2/health/ready", "/v2/health/ready", "/v2/health/live"]
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in spec["volumes"]}
    mounts = {mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounts == {"/models", "/dev/shm"} and "--model-repository=/models" in container["args"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 1
    (monitored,) = objects["PodMonitor"]["spec"]["podMetricsEndpoints"]
    assert monitored["port"] in ports
    assert {port["name"]: port["port"] for port in objects["Service"]["spec"]["ports"]} == ports


def test_kserve_takes_the_repository(objects):
    model = objects["InferenceService"]["spec"]["predictor"]["model"]
    assert model["modelFormat"] == {"name": "triton"} and model["protocolVersion"] == "v2"
    assert model["resources"]["limits"]["nvidia.com/gpu"] == 1
    images = {model["image"], objects["Deployment"]["spec"]["template"]["spec"]["containers"][0]["image"]}
    assert len(images) == 1


def test_one_version_of_triton_is_named():
    assert len(set(re.findall(r"\b(?:tritonserver|triton):(\d\d\.\d\d)", TEXT))) == 1


# Clients


@pytest.fixture(scope="module")
def server(tmp_path_factory, onnx_file):
    root = tmp_path_factory.mktemp("repository")
    name = default_name(Path("model.onnx"))
    assert name in block("python", "tritonclient") and f"/{name}/" in block("bash", "curl")
    write_repository(root, [(name, served_model(onnx_file))], ServingOptions())
    return Server(root)


class Client:
    """The part of tritonclient.http that the page uses, with the simulated server."""

    server: Server

    class InferInput:
        def __init__(self, name, shape, datatype):
            self.name, self.shape, self.datatype = name, tuple(shape), datatype

        def set_data_from_numpy(self, data):
            assert self.datatype == "BYTES" and data.dtype == object and data.shape == self.shape
            self.data = data

    class InferenceServerClient:
        def __init__(self, url):
            assert ":" in url

        def infer(self, model, inputs):
            answer = Client.server.infer(model, {tensor.name: tensor.data for tensor in inputs})
            return types.SimpleNamespace(as_numpy=answer.__getitem__)


def test_the_client_in_python(server, photo, onnx_file, monkeypatch, capsys):
    module = types.ModuleType("tritonclient.http")
    module.InferInput, module.InferenceServerClient = Client.InferInput, Client.InferenceServerClient
    package = types.ModuleType("tritonclient")
    package.http = module
    Client.server = server
    monkeypatch.setitem(sys.modules, "tritonclient", package)
    monkeypatch.setitem(sys.modules, "tritonclient.http", module)
    monkeypatch.setattr(sys, "argv", ["client", str(photo)])
    exec(compile(block("python", "tritonclient"), "client", "exec"), {})
    lines = capsys.readouterr().out.splitlines()
    detector = Detector.load(onnx_file)
    (found,) = detector.detect([np.array(Image.open(photo))])
    names = [detector.metadata.class_names[label - 1] for label in found.labels]
    assert [line.split()[0] for line in lines] == names and len(names) > 0
    areas = [mask.sum() for mask in found.full_masks()]
    assert [int(line.split()[-1]) for line in lines] == areas


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
def test_the_request_of_curl(photo, tmp_path):
    """The request of curl follows Triton's protocol (extension_binary_data.md)."""
    curl = tmp_path / "curl"
    save_words = f'for word in "$@"; do echo "$word"; done > "{tmp_path}/words"'
    curl.write_text(f'#!/bin/sh\ncat > "{tmp_path}/body"\n{save_words}\n')
    curl.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-c", block("bash", "curl"), "client", str(photo)], env=environment, capture_output=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    body, words = (tmp_path / "body").read_bytes(), (tmp_path / "words").read_text()
    length = int(re.search(r"Inference-Header-Content-Length: (\d+)", words)[1])
    (given,) = json.loads(body[:length])["inputs"]
    data = photo.read_bytes()
    assert body[length:] == len(data).to_bytes(4, "little") + data
    assert given["parameters"]["binary_data_size"] == len(data) + 4
    assert (given["name"], given["shape"], given["datatype"]) == ("image", [1, 1], "BYTES")


def test_the_inputs_for_perf_analyzer(photo, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["images", str(photo), str(photo)])
    exec(compile(block("python", "images.json"), "images", "exec"), {})
    entries = json.loads((tmp_path / "images.json").read_text())["data"]
    content = base64.b64decode(entries[1]["image"]["content"]["b64"])
    assert int.from_bytes(content[:4], "little") == len(content) - 4
    assert Image.open(io.BytesIO(content[4:])).size == (140, 110)
    assert len(entries) == 2 and entries[0]["image"]["shape"] == [1]

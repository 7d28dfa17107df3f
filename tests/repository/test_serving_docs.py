"""docs/serving.md: its YAML is consistent. Its clients run in tests/runtime/test_triton_real.py."""

import base64
import io
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from maskrcnn.data.shapes import shapes_image

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
    probes = [container[name]["httpGet"] for name in ("startupProbe", "readinessProbe")]
    assert all(probe == {"path": "/v2/health/ready", "port": "http"} for probe in probes)
    assert "localhost:8000" in container["livenessProbe"]["exec"]["command"][-1]  # run in test_triton_real.py
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


# Measuring


def test_the_inputs_for_perf_analyzer(photo, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["images", str(photo), str(photo)])
    exec(compile(block("python", "images.json"), "images", "exec"), {})
    entries = json.loads((tmp_path / "images.json").read_text())["data"]
    content = base64.b64decode(entries[1]["image"]["content"]["b64"])
    assert int.from_bytes(content[:4], "little") == len(content) - 4
    assert Image.open(io.BytesIO(content[4:])).size == (140, 110)
    assert len(entries) == 2 and entries[0]["image"]["shape"] == [1]

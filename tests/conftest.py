"""A small detector and a small dataset, made once for all tests."""

import functools
import gc
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

# Before torch is imported, which reads it then: processes that test side by side share the cores.
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:
    share = (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.environ.setdefault("OMP_NUM_THREADS", str(max(share, 1)))

# Simulated GPUs run no kernels; tests of the kernels set it to others.
os.environ.setdefault("MASKRCNN_KERNELS", "" if shutil.which("nvidia-smi") else "off")

import kernels_on_cpu
import pytest
import torch
import typer.main
from hypothesis import settings
from shared_files import made_once, tracing_once
from tiny import TINY_POSE, TINY_V2, keypoints_in, lively_model, tiny_config

from maskrcnn import cli
from maskrcnn.data.poses import generate_poses
from maskrcnn.data.shapes import generate_shapes
from maskrcnn.model.detector import MaskRCNN
from maskrcnn.weights.checkpoint import save_checkpoint

# Drawn cases are the same in every run; `pytest --hypothesis-profile=search` draws others.
settings.register_profile("fixed", derandomize=True)
settings.register_profile("search", print_blob=True)
settings.load_profile("fixed")


def pytest_collection_finish():
    """Exempts what imports and collection have made from garbage collections, which it makes a second long."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def shared_root(tmp_path_factory) -> Path:
    """The folder of what all test processes share."""
    root = tmp_path_factory.getbasetemp()
    root = (root.parent if "PYTEST_XDIST_WORKER" in os.environ else root) / "shared"
    root.mkdir(exist_ok=True)
    return root


@pytest.fixture(scope="session")
def shared(shared_root) -> Callable[[str, Callable[[Path], object]], Path]:
    """Makes a folder of files that take long to make, once for all test processes; tests must not change them."""
    return functools.partial(made_once, shared_root)


@pytest.fixture(scope="session", autouse=True)
def traced_once(shared_root):
    """Traces each model, which takes half a minute, once for all test processes."""
    from maskrcnn.export import exporter

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exporter, "_trace", tracing_once(shared_root))
        yield


@pytest.fixture(scope="session", autouse=True)
def commands_made_once():
    """The commands of the command line, which typer makes anew for each call, in a tenth of a second."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(typer.main, "get_command", functools.cache(typer.main.get_command))
        yield


def export_beside_checkpoint(model: MaskRCNN, folder: Path) -> None:
    from maskrcnn.export.exporter import export_onnx

    save_checkpoint(folder / "best.safetensors", model)
    export_onnx(model, folder / "model.onnx", source=folder / "best.safetensors")


@pytest.fixture(scope="session")
def model() -> MaskRCNN:
    return lively_model(tiny_config())


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory, model) -> Path:
    path = tmp_path_factory.mktemp("checkpoint") / "best.safetensors"
    save_checkpoint(path, model)
    return path


@pytest.fixture(scope="session")
def onnx_file(shared, checkpoint) -> Path:
    from maskrcnn.export.exporter import export_onnx
    from maskrcnn.weights.checkpoint import load_checkpoint

    def make(folder: Path) -> None:
        export_onnx(load_checkpoint(checkpoint), folder / "model.onnx", source=checkpoint)

    return shared("masks", make) / "model.onnx"


@pytest.fixture(scope="session")
def openvino_engine(shared, onnx_file) -> Path:
    """OpenVINO's engine in single precision."""
    from maskrcnn.runtime.build.openvino import build_openvino_engine

    def make(folder: Path) -> None:
        build_openvino_engine(onnx_file, folder / "model.fp32.xml", half=False)

    return shared("openvino", make) / "model.fp32.xml"


@pytest.fixture(scope="session")
def half_openvino_engine(shared, onnx_file) -> Path:
    """OpenVINO's engine in half precision."""
    from maskrcnn.runtime.build.openvino import build_openvino_engine

    def make(folder: Path) -> None:
        build_openvino_engine(onnx_file, folder / "model.fp16.xml", half=True)

    return shared("half_openvino", make) / "model.fp16.xml"


@pytest.fixture(scope="session")
def boxes_model() -> MaskRCNN:
    """A Faster R-CNN, which has no masks."""
    return lively_model(tiny_config(has_masks=False))


@pytest.fixture(scope="session")
def boxes_onnx_file(shared, boxes_model) -> Path:
    """Its export, beside its checkpoint `best.safetensors`."""
    return shared("boxes", lambda folder: export_beside_checkpoint(boxes_model, folder)) / "model.onnx"


@pytest.fixture(scope="session")
def v2_model() -> MaskRCNN:
    """A model of version 2, with batch norm in its heads as it would be after training."""
    model = lively_model(tiny_config(**TINY_V2))
    with torch.no_grad():
        for norm in (m for m in model.roi_heads.modules() if isinstance(m, torch.nn.BatchNorm2d)):
            norm.running_mean.normal_(std=0.1)
            norm.running_var.uniform_(0.5, 2)
    return model


@pytest.fixture(scope="session")
def v2_onnx_file(shared, v2_model) -> Path:
    from maskrcnn.export.exporter import export_onnx

    return shared("v2", lambda folder: export_onnx(v2_model, folder / "model.onnx")) / "model.onnx"


@pytest.fixture(scope="session")
def joint_model() -> MaskRCNN:
    """Masks and keypoints."""
    return lively_model(tiny_config(**TINY_POSE))


@pytest.fixture(scope="session")
def joint_onnx_file(shared, joint_model) -> Path:
    """Its export, beside its checkpoint `best.safetensors`."""
    return shared("joint", lambda folder: export_beside_checkpoint(joint_model, folder)) / "model.onnx"


@pytest.fixture(scope="session")
def stick_figures(tmp_path_factory) -> Path:
    """Stick figures, with masks and keypoints."""
    return generate_poses(tmp_path_factory.mktemp("data") / "stick_figures", train_images=12, val_images=6, size_px=96)


@pytest.fixture(scope="session")
def shapes(tmp_path_factory) -> Path:
    return generate_shapes(tmp_path_factory.mktemp("data") / "shapes", train_images=12, val_images=6, size_px=96)


@pytest.fixture(scope="session")
def poses(tmp_path_factory, shapes) -> Path:
    """The drawn shapes, each with the tiny models' five keypoints in its box; every third object has none."""
    folder = tmp_path_factory.mktemp("data") / "poses"
    shutil.copytree(shapes, folder)
    for path in (folder / "annotations").iterdir():
        content = json.loads(path.read_text())
        skeleton = [list(line) for line in TINY_POSE["keypoint_skeleton"]]
        for category in content["categories"]:
            category |= {"keypoints": list(TINY_POSE["keypoint_names"]), "skeleton": skeleton}
        for number, annotation in enumerate(content["annotations"]):
            annotation |= keypoints_in(annotation["bbox"], count=5 if number % 3 else 0)
        path.write_text(json.dumps(content))
    return folder


@pytest.fixture(scope="session")
def kernels_for_cpu(shared) -> Path:
    """The library of the CUDA kernels, compiled for the CPU."""
    if kernels_on_cpu.compiler() is None:
        pytest.skip("no C++ compiler")
    return shared("kernels", kernels_on_cpu.build) / "libmaskrcnn_kernels.so"


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """Runs a command line in an empty folder; returns (exit code, standard output, standard error)."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["maskrcnn", *map(str, arguments)])
        monkeypatch.setattr(cli.console, "_file", None)
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            cli.main()
            raise SystemExit(0)
        out, err = capsys.readouterr()
        return stopped.value.code or 0, out, err

    return call

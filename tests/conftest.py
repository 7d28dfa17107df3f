"""A small detector and a small dataset, made once for all tests."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

# Before torch is imported, which reads it then: processes that test side by side share the cores.
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:
    share = (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.environ.setdefault("OMP_NUM_THREADS", str(max(share, 1)))

# Simulated GPUs run no kernels; tests of the kernels set it to others.
os.environ.setdefault("MASKRCNN_KERNELS", "" if shutil.which("nvidia-smi") else "off")

import kernels_on_cpu
import onnx
import pytest
import torch
from filelock import FileLock
from hypothesis import settings
from tiny import TINY_POSE, TINY_V2, keypoints_in, lively_model, tiny_config

from maskrcnn.data.poses import generate_poses
from maskrcnn.data.shapes import generate_shapes
from maskrcnn.model.detector import MaskRCNN
from maskrcnn.weights.checkpoint import save_checkpoint

# Drawn cases are the same in every run; `pytest --hypothesis-profile=search` draws others.
settings.register_profile("fixed", derandomize=True)
settings.register_profile("search", print_blob=True)
settings.load_profile("fixed")


@pytest.fixture(scope="session")
def shared(tmp_path_factory) -> Callable[[str, Callable[[Path], object]], Path]:
    """Makes a folder of files that take long to make, once for all test processes; tests must not change them."""
    root = tmp_path_factory.getbasetemp()
    root = (root.parent if "PYTEST_XDIST_WORKER" in os.environ else root) / "shared"
    root.mkdir(exist_ok=True)

    def folder(name: str, make: Callable[[Path], object]) -> Path:
        path, draft = root / name, root / f"{name}.draft"
        with FileLock(root / f"{name}.lock"):
            if not path.exists():
                shutil.rmtree(draft, ignore_errors=True)
                draft.mkdir()
                make(draft)
                draft.rename(path)
        return path

    return folder


@pytest.fixture(scope="session", autouse=True)
def traced_once(shared):
    """Traces each model, which takes half a minute, once for all test processes."""
    from maskrcnn.export import exporter

    trace = exporter._trace

    def traced(model: MaskRCNN, opset: int) -> onnx.ModelProto:
        text = f"{model.config} {opset} {sorted(name for name, part in model.named_modules() if part.training)}"
        key = hashlib.sha256(text.encode())
        for name, value in model.state_dict().items():
            key.update(name.encode() + value.contiguous().numpy().tobytes())
        made = shared(key.hexdigest(), lambda folder: onnx.save(trace(model, opset), folder / "traced.onnx"))
        return onnx.load(made / "traced.onnx")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exporter, "_trace", traced)
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
def pose_model() -> MaskRCNN:
    """Keypoints without masks."""
    return lively_model(tiny_config(has_masks=False, **TINY_POSE))


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

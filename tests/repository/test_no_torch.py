"""A deployment machine needs no torch: the runtime imports without it and every other large library."""

import subprocess
import sys
from pathlib import Path

import pytest

BLOCKED = ("torch", "torchvision", "onnx", "onnxruntime", "openvino", "tensorrt", "PIL", "pycocotools")

PROGRAM = """
import importlib.abc, sys

class Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}} (blocked)", name=name)

sys.meta_path.insert(0, Blocker())
{statement}
loaded = sorted(name for name in {blocked!r} if name in sys.modules)
assert not loaded, loaded
"""


def run_blocked(statement: str, blocked: tuple[str, ...] = BLOCKED) -> subprocess.CompletedProcess:
    """Runs a statement in a Python where the blocked libraries cannot be imported."""
    program = PROGRAM.format(blocked=blocked, statement=statement)
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)


def test_the_block_works():
    for name in BLOCKED:
        done = run_blocked(f"import {name}")
        assert done.returncode != 0 and f"No module named '{name}' (blocked)" in done.stderr


def test_runtime_imports():
    done = run_blocked("import maskrcnn.runtime")
    assert done.returncode == 0, done.stderr


def test_light_modules_import():
    names = (
        "errors",
        "files",
        "metadata",
        "imaging.preprocess",
        "imaging.postprocess",
        "runtime.doctor",
        "plugins.contract",
    )
    done = run_blocked("import " + ", ".join(f"maskrcnn.{name}" for name in names))
    assert done.returncode == 0, done.stderr


def test_an_exported_model_is_evaluated_without_torch(onnx_file, shapes):
    command = ["evaluate", str(onnx_file), "--data", str(shapes)]
    done = run_blocked(
        f"from maskrcnn.cli import app; app({command}, standalone_mode=False)", ("torch", "torchvision", "openvino")
    )
    assert done.returncode == 0, done.stderr
    assert "AP50" in done.stdout


_ENGINE = """
import sys
sys.path.insert(0, {support!r})
import fake_tensorrt, numpy
from pathlib import Path
from maskrcnn.runtime import Detector
from maskrcnn.runtime.build.profiles import Profile, Span

class Patch:
    setattr = staticmethod(setattr)

fake_tensorrt.install(Patch)
size = Span(32, 96, 192)
profile = Profile(Span(1, 1, 1), size, size)
path = fake_tensorrt.write_engine(Path({onnx!r}), Path({folder!r}) / "model.engine", [profile])
detector = Detector.load(path)
image = numpy.random.default_rng(0).integers(0, 255, (90, 120, 3), numpy.uint8)
print(*(len(detector.detect([image])[0]) for _ in range(2)))
"""


def test_an_engine_runs_without_torch(onnx_file, tmp_path):
    pytest.importorskip("cuda.bindings.runtime")
    support = str(Path(__file__).resolve().parents[1] / "support")
    program = _ENGINE.format(support=support, onnx=str(onnx_file), folder=str(tmp_path))
    done = run_blocked(program, ("torch", "torchvision", "onnx", "openvino", "PIL", "pycocotools"))
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.split()
    assert first == second and int(first) > 0


def test_an_exported_model_is_verified_without_torch(onnx_file):
    command = ["verify", str(onnx_file), str(onnx_file)]
    done = run_blocked(
        f"from maskrcnn.cli import app; app({command}, standalone_mode=False)", ("torch", "torchvision", "openvino")
    )
    assert done.returncode == 0, done.stderr
    assert "stages agree within 'exact'" in done.stdout

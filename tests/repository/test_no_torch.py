"""A deployment machine needs no torch: the runtime imports without it and every other large library."""

import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distribution, packages_distributions
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

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


def run_blocked(
    statement: str, blocked: tuple[str, ...] = BLOCKED, *, limit_s: float = 120
) -> subprocess.CompletedProcess:
    """Runs a statement in a Python where the blocked libraries cannot be imported."""
    program = PROGRAM.format(blocked=blocked, statement=statement)
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=limit_s)


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


def installed_by(requirements: Path) -> set[str]:
    """The distributions that a requirements file installs, with those that these need, as far as they are installed."""
    lines = [line.partition("#")[0] for line in requirements.read_text(encoding="utf-8").splitlines()]
    found: set[str] = set()
    wanted = [re.match(r"[\w.-]+", line)[0].lower().replace("_", "-") for line in lines if line.strip()]
    while wanted:
        name = wanted.pop()
        try:
            needs = distribution(name).requires or []
        except PackageNotFoundError:  # another name of the same library, or of another platform
            needs = []
            wanted += [f"{name}-gpu"] if name == "onnxruntime" else []
        needed = {re.match(r"[\w.-]+", need)[0].lower().replace("_", "-") for need in needs if "extra ==" not in need}
        found.add(name)
        wanted += sorted(needed - found)
    return found


_RUNTIME_COMMANDS = """
from maskrcnn.cli import app
for command in {commands!r}:
    app(command, standalone_mode=False)
from maskrcnn import Detector
from maskrcnn.data.images import read_image
(found,) = Detector.load({model!r}).detect([read_image({photo!r})])
print(len(found), "detections")
"""


def test_the_runtime_needs_only_its_requirements(onnx_file, shapes, tmp_path):
    """With every other installed library blocked."""
    root = Path(__file__).resolve().parents[2]
    allowed = {*installed_by(root / "requirements-runtime.txt"), "maskrcnn"}
    assert not allowed & {"torch", "openvino", "matplotlib"}
    blocked = tuple(
        name
        for name, owners in packages_distributions().items()
        if not (name.startswith("_") or allowed & {owner.lower().replace("_", "-") for owner in owners})
    )
    assert {"torch", "matplotlib", "safetensors"} <= set(blocked)
    Image.fromarray(np.full((70, 90, 3), 90, np.uint8)).save(tmp_path / "photo.png")
    model, photo = str(onnx_file), str(tmp_path / "photo.png")
    commands = [
        ["predict", photo, "--model", model, "--output", str(tmp_path / "out")],
        ["evaluate", model, "--data", str(shapes)],
        ["verify", model, model],
        ["inspect", model],
    ]
    done = run_blocked(_RUNTIME_COMMANDS.format(commands=commands, model=model, photo=photo), blocked, limit_s=600)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "cost of one image: not counted; this requires `pip install onnxscript`" in done.stdout
    assert "AP50" in done.stdout and done.stdout.rstrip().endswith("detections")
    assert (tmp_path / "out" / "photo.png").exists()


def test_a_command_without_its_library_names_what_to_install():
    program = "import sys; sys.argv = ['maskrcnn', 'train']; from maskrcnn.cli import main; main()"
    done = run_blocked(program, ("torch", "torchvision"))
    assert done.returncode == 1
    assert "no Python package torch" in done.stderr and "`pip install torch torchvision`" in done.stderr

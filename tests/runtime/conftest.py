"""TensorRT's real classes for the tests of building: in the rig's processes, in each version that there is."""

import json
import os
from dataclasses import dataclass
from pathlib import Path

import chromium
import pytest
from tensorrt_rig import rig

SUPPORT = Path(__file__).parents[1] / "support"
# Folders with other versions: pip install --no-deps --target FOLDER 'tensorrt-cu13-bindings==10.16.*'
# 'tensorrt-lean-cu13-libs==10.16.*'
OTHERS = [Path(folder) for folder in os.environ.get("TENSORRT_BINDINGS", "").split(os.pathsep) if folder]


@dataclass(frozen=True)
class EachTensorRt:
    """One version of TensorRT's bindings."""

    env: dict[str, str]

    def ask(self, code: str, *, timeout: float = 300.0):
        """The one value that code tells, which finds the modules of tests/support."""
        return rig.ask(f"import sys\nsys.path.insert(0, {str(SUPPORT)!r})\n{code}", env=self.env, timeout=timeout)

    def flows(self, module: str, paths: dict[str, str]) -> dict:
        """What the flows of a module said, each under its name."""
        given = json.dumps(paths)
        code = f"import json, {module}\nfrom tensorrt_flows import run\ntell(run(**json.loads({given!r})))"
        return self.ask(code)


@pytest.fixture(scope="session", params=[None, *OTHERS], ids=lambda folder: folder.name if folder else "installed")
def each_tensorrt(request, tmp_path_factory) -> EachTensorRt:
    """The installed bindings, and those of the folders in TENSORRT_BINDINGS."""
    if reason := rig.obstacle(request.param):
        pytest.skip(reason)
    return EachTensorRt(rig.prepare(tmp_path_factory.mktemp("tensorrt"), request.param))


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """Chromium with one page."""
    if chromium.EXECUTABLE is None:
        pytest.skip("no Chromium")
    running = chromium.Browser(tmp_path_factory.mktemp("browser"))
    yield running
    running.close()


@pytest.fixture(scope="session")
def graphs(tmp_path_factory, onnx_file) -> dict[str, str]:
    """A model in FP16 for TensorRT's parser, in both forms of the plugins."""
    from maskrcnn.export import variants

    folder = tmp_path_factory.mktemp("graphs")
    variants.write_half(onnx_file, folder / "half.onnx", "fp16")
    for name, aot in (("graph", False), ("aot_graph", True)):
        report = variants.write_tensorrt(folder / "half.onnx", folder / f"{name}.onnx", aot=aot)
        assert not report.findings, report.text()
    return {name: str(folder / f"{name}.onnx") for name in ("graph", "aot_graph")}


@pytest.fixture(scope="session")
def flow_paths(graphs, onnx_file, shapes) -> dict[str, str]:
    """What flows work with (tests/support/tensorrt_flows.py)."""
    return {**graphs, "reference": str(onnx_file), "images": str(shapes / "val")}


@pytest.fixture
def value(results):
    """Maps a flow's name to what it gave."""

    def of(name):
        assert "value" in results[name], results[name].get("crash") or results[name]
        return results[name]["value"]

    return of


@pytest.fixture
def error(results):
    """Maps a flow's name to the error that it ended with."""

    def of(name):
        assert "error" in results[name], results[name].get("crash") or results[name]
        return results[name]["error"]

    return of

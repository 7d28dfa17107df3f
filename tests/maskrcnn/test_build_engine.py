"""`maskrcnn build-engine --target tensorrt` where there is no TensorRT, and what it refuses anywhere."""

import io
import json
from pathlib import Path
from types import SimpleNamespace

import onnx
import pytest
from command_line import expect_error
from rich.console import Console

from maskrcnn.api import build_engine
from maskrcnn.api.export import Int8Options
from maskrcnn.errors import UserError
from maskrcnn.export import variants
from maskrcnn.export.tensorrt.lint import Finding, LintReport, Severity, lint
from maskrcnn.plugins import build, contract, toolchain
from maskrcnn.plugins import build as cache
from maskrcnn.plugins.toolchain import Nvcc, TensorRtHeaders, Toolchain, find_nvcc, find_nvrtc
from maskrcnn.runtime.onnx_file import read_model


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    """Where compiled kernels are kept."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def no_tensorrt(monkeypatch, kernels):
    """A machine without, whatever this one has."""
    missing = UserError("no Python package tensorrt", "TensorRT 10.9 or newer", "`pip install '.[tensorrt]'`")
    monkeypatch.setattr(build_engine, "tensorrt_obstacle", lambda: missing)
    monkeypatch.setenv("MASKRCNN_CACHE", str(kernels))


def test_everything_before_tensorrts_own_part_is_done(run, road, tmp_path, kernels):
    result = run("build-engine", "--fp16", "--target", "tensorrt", "--batch", "1,4")
    graph = road / "model.fp16.tensorrt.onnx"
    expect_error(result, f"{graph.relative_to(tmp_path)} is what its parser gets", "no Python package", "pip install")
    out = result[1]
    assert "profiles: batch 1 of 32–160×32–160, tuned for 1 of 96×128; batch 4" in out
    assert "compared with single precision: " in out and ": 0 errors, 0 warnings" in out
    proto = onnx.load(graph)
    assert not lint(proto).findings and not proto.functions
    nodes = [node for node in proto.graph.node if node.domain == contract.DOMAIN]
    assert {node.op_type for node in nodes} == set(contract.AOT_OPS)
    assert any(tensor.data_type == onnx.TensorProto.FLOAT16 for tensor in proto.graph.initializer)
    left = {path.name for path in road.iterdir()}
    assert left == {"best.safetensors", "model.onnx", "model.fp16.tensorrt.onnx"}
    if find_nvrtc() or find_nvcc():
        assert "8 kernels of the plugins compiled by " in out
        assert len(list((kernels / "plugins").glob("*/*.ptx"))) == 8


def test_the_other_precisions_and_the_library(run, road, shapes):
    for words, name, has_aot in (
        (("--tf32", "--plugin-library"), "model.tf32.tensorrt.onnx", False),
        (("--fp32",), "model.fp32.tensorrt.onnx", True),
        (("--bf16",), "model.bf16.tensorrt.onnx", True),
        (("--int8", shapes / "train", "--calibration-images", 4), "model.int8.tensorrt.onnx", True),
    ):
        expect_error(run("build-engine", *words, "--target", "tensorrt"), f"{name} is what its parser gets")
        operators = {node.op_type for node in onnx.load(road / name).graph.node}
        assert ("BatchedNmsKeep" in operators) == has_aot and ("BatchedNms" in operators) != has_aot


def test_ap_of_the_rounded_graph_is_told(run, road, shapes):
    gate = ("--gate-images", shapes / "val", "--gate-annotations", shapes / "annotations" / "instances_val.json")
    code, out, _ = run("build-engine", "--fp16", "--target", "tensorrt", *gate)
    assert code == 1
    for kind in ("box_ap", "mask_ap"):
        assert f"{kind} 0." in out
    assert "with fp16's rounding" in out and "in single precision (ONNX Runtime)" in out


def test_auto_builds_for_the_cpu_and_says_what_that_leaves_out(run, road):
    code, out, err = run("build-engine", "--fp16", "--batch", "1,4", "--refit")
    assert code == 0, err
    assert "no Python package tensorrt; building the CPU engine with OpenVINO" in out
    assert "for TensorRT alone, so without effect: --batch 1,4 --refit" in out
    assert (road / "model.fp16.xml").is_file()


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (("--fp16", "--bf16"), ("--fp16 and --bf16", "drop all but one")),
        (("--fp16", "--refit", "--strip-weights"), ("--refit and --strip-weights",)),
        (("--fp16", "--optimization-level", "6"), ("--optimization-level 6", "0 to 5")),
        (("--fp16", "--workspace", "0"), ("--workspace 0",)),
        (("--fp16", "--aux-streams", "-1"), ("--aux-streams -1",)),
        (("--fp16", "--batch", "none", "--target", "tensorrt"), ("--batch none",)),
        (("--fp16", "--size", "100x100", "--target", "tensorrt"), ("multiples of 32",)),
        (("--fp16", "--output", "model.xml", "--target", "tensorrt"), ("ends in .engine",)),
        (("--fp16", "--output", "model.engine", "--target", "openvino"), ("ends in .xml",)),
        (("--fp16", "--batch", "4", "--target", "openvino"), ("--batch 4 for OpenVINO",)),
        (("--bf16", "--target", "openvino"), ("--bf16 for OpenVINO", "use --fp16")),
        (("--tf32",), ("--tf32 for OpenVINO",)),
        (("--fp16", "--gate-annotations", "gt.json"), ("--gate-annotations gt.json without --gate-images",)),
        (("--fp16", "--gate-images", "none", "--target", "tensorrt"), ("no folder none",)),
    ],
)
def test_options_that_cannot_be_leave_nothing_behind(run, road, arguments, parts):
    before = sorted(road.iterdir())
    expect_error(run("build-engine", *arguments), *parts)
    assert sorted(road.iterdir()) == before


def test_a_graph_with_lint_errors_is_not_given_to_tensorrt(run, road, monkeypatch):
    words = {"node": "a", "op": "Swirl", "output": "c", "graph": "", "why": "no importer", "remedy": "e", "source": "f"}
    found = LintReport(findings=(Finding(severity=Severity.ERROR, **words),), nodes=1)
    monkeypatch.setattr(variants, "lint", lambda proto: found)
    result = run("build-engine", "--fp32", "--target", "tensorrt")
    expect_error(result, "1 node(s) of", "without lint errors")
    assert "1 × Swirl: no importer" in result[1]
    assert not (road / "model.fp32.tensorrt.onnx").exists()


# The plugin library


@pytest.fixture
def library_said(monkeypatch, tmp_path):
    """What is printed of the plugin library, by the installed TensorRT and the headers; both may be missing."""

    def said(installed, headers):
        def import_tensorrt():
            if installed is None:
                raise UserError("no Python package tensorrt", "TensorRT", "install it")
            return SimpleNamespace(__version__=installed)

        found = TensorRtHeaders(Path("include"), headers) if headers else None
        compilers = {"nvcc": Nvcc(Path("nvcc"), "13.0.88", (80, 90)), "nvrtc": None, "host_compiler": Path("g++")}
        here = Toolchain(**compilers, tensorrt=found, gpus=(90,))
        monkeypatch.setenv("MASKRCNN_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(toolchain, "find_toolchain", lambda: here)
        monkeypatch.setattr(build_engine, "import_tensorrt", import_tensorrt)
        monkeypatch.setattr(build, "build_library", lambda kind, **_: f"compiled for {headers}")
        console = Console(file=io.StringIO(), width=1000)
        build_engine._find_library(console)
        return console.file.getvalue()

    return said


def put_library(version):
    sources = cache.sources_hash(build.source_files(build.Library.PLUGINS))
    record = {"library": "plugins", "architectures": [90], "sources": sources, "tensorrt": version}
    return cache.store(record, build.Library.PLUGINS.file_name, lambda path: path.touch())


def test_a_library_is_for_the_tensorrt_that_is_to_load_it(library_said):
    assert "compiled for 11.0.0" in library_said("11.4.0.106", "11.0.0")
    assert "compiled for 10.9.0" in library_said(None, "10.9.0")
    assert "no TensorRT" in library_said(None, None)
    said = library_said("10.9.0.34", "11.0.0")
    assert "headers in include are of TensorRT 11.0.0, and 10.9.0.34 is installed" in said and "build-plugins" in said
    for_10, for_11 = put_library("10.16.1"), put_library("11.0.0")
    for installed, headers, path in (
        ("10.9.0.34", "11.0.0", for_10),
        ("11.4.0.106", "10.9.0", for_11),
        (None, "10.9.0", for_10),
        (None, "11.0.0", for_11),
        ("11.4.0.106", None, for_11),
    ):
        assert library_said(installed, headers) == f"plugin library: {path}\n"


# The stamp's command


@pytest.mark.parametrize(
    ("precision", "int8", "output", "words"),
    [
        ("fp16", Int8Options(), "m.fp16.engine", "--fp16 --target tensorrt --refit"),
        ("fp16", Int8Options(images=8), "m.fp16.engine", "--fp16 --target tensorrt --refit"),
        ("fp16", Int8Options(), "other.engine", "--fp16 --target tensorrt --output other.engine --refit"),
        ("int8", Int8Options(calibration=Path("photos")), "m.int8.engine", "--int8 photos --target tensorrt --refit"),
        (
            "int8",
            Int8Options(calibration=Path("data/photos"), images=8, keep=("box_head",)),
            "engines/small.engine",
            "--int8 photos --keep box_head --calibration-images 8 --target tensorrt --output small.engine --refit",
        ),
    ],
)
def test_the_command_that_builds_an_engine_again_names_what_is_not_the_default(precision, int8, output, words):
    choice = build_engine.TensorRtChoice(given=("--refit",))
    found = build_engine._command(Path("runs/m.onnx"), Path("runs") / output, precision, int8, choice)
    assert found == f"maskrcnn build-engine m.onnx {words}"


# refit-engine


@pytest.fixture
def engine(road, tmp_path):
    """A refittable engine's two files; the plan is none."""
    _, metadata = read_model(road / "model.onnx")
    metadata.stamp.update(target="tensorrt", precision="fp32", refit="refittable", plugins="aot", profiles="[]")
    path = road / "model.fp32.engine"
    path.write_bytes(b"a plan")
    path.with_name("model.fp32.engine.json").write_text(metadata.to_json())
    return path


def change_stamp(engine, **changes):
    described = engine.with_name(f"{engine.name}.json")
    values = json.loads(described.read_text())
    values["stamp"].update(changes)
    described.write_text(json.dumps(values))


def test_a_refit_without_tensorrt_says_what_is_missing(run, road, engine):
    result = run("refit-engine", engine, road / "model.onnx", "--output", road / "new.engine")
    expect_error(result, "no Python package tensorrt", "pip install")
    assert not (road / "new.engine").exists()


@pytest.mark.parametrize(
    ("changes", "came"),
    [
        ({"refit": "fixed"}, "an engine with weights that are fixed"),
        ({"precision": "int8"}, "an engine with 8-bit scales"),
        ({"refit": "stripped", "onnx_sha256": "another"}, "with other weights than"),
    ],
)
def test_engines_that_take_no_weights(run, road, engine, changes, came):
    change_stamp(engine, **changes)
    expect_error(run("refit-engine", engine, road / "model.onnx", "--output", "new.engine"), came)


def test_refits_that_cannot_be(run, road, engine, boxes_onnx_file, tmp_path):
    onnx_file = road / "model.onnx"
    expect_error(run("refit-engine", engine, onnx_file, "--output", engine), "another file that ends in .engine")
    expect_error(run("refit-engine", engine, onnx_file, "--output", "new.onnx"), "another file that ends in .engine")
    expect_error(run("refit-engine", "none.engine", onnx_file, "--output", "new.engine"), "both files of an engine")
    other = onnx.load(boxes_onnx_file)
    (entry,) = [entry for entry in other.metadata_props if entry.key == "maskrcnn"]
    entry.value = json.dumps({**json.loads(entry.value), "class_names": ["one"], "category_ids": [1]})
    onnx.save(other, tmp_path / "other.onnx")
    expect_error(run("refit-engine", engine, tmp_path / "other.onnx", "--output", "new.engine"), "of 1 classes")

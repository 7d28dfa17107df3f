"""`maskrcnn build-engine` and `maskrcnn refit-engine` on a machine without TensorRT, and invalid options."""

import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import onnx
import pytest
from command_line import expect_error

from maskrcnn.api import build_engine
from maskrcnn.api.progress import Progress
from maskrcnn.errors import UserError
from maskrcnn.export import variants
from maskrcnn.export.tensorrt.lint import Finding, LintReport, Severity, lint
from maskrcnn.plugins import build, contract, toolchain
from maskrcnn.plugins import build as cache
from maskrcnn.plugins.toolchain import Nvcc, TensorRtHeaders, Toolchain, find_nvcc, find_nvrtc
from maskrcnn.runtime.backends import tensorrt_library
from maskrcnn.runtime.backends.tensorrt_library import Weights
from maskrcnn.runtime.build.request import BuildRequest
from maskrcnn.runtime.engine_files import read_model


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    """The cache folder of compiled kernels."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def no_tensorrt(monkeypatch, kernels):
    """A machine without TensorRT."""
    missing = UserError("no Python package tensorrt", "TensorRT 10.9 or newer", "`pip install '.[tensorrt]'`")
    monkeypatch.setattr(tensorrt_library, "tensorrt_obstacle", lambda: missing)
    monkeypatch.setenv("MASKRCNN_CACHE", str(kernels))


def test_the_graph_for_tensorrt_is_written_without_tensorrt(run, road, tmp_path, kernels):
    result = run("build-engine", "--fp16", "--target", "tensorrt", "--batch", "1,4")
    graph = road / "model.fp16.tensorrt.onnx"
    expect_error(
        result,
        f"the graph for TensorRT's parser is written: {graph.relative_to(tmp_path)}",
        "no Python package",
        "pip install",
    )
    out = result[1]
    assert "profiles: batch 1 of 32–160×32–160, tuned for 1 of 96×128; batch 4" in out
    assert "differ from single precision's" in out and ": 0 errors, 0 warnings" in out
    proto = onnx.load(graph)
    assert not lint(proto).findings and not proto.functions
    nodes = [node for node in proto.graph.node if node.domain == contract.DOMAIN]
    assert {node.op_type for node in nodes} == set(contract.AOT_OPS)
    assert any(tensor.data_type == onnx.TensorProto.FLOAT16 for tensor in proto.graph.initializer)
    files = {path.name for path in road.iterdir()}
    assert files == {"best.safetensors", "model.onnx", "model.fp16.tensorrt.onnx"}
    if find_nvrtc() or find_nvcc():
        assert "8 plugin kernels compiled by " in out
        assert len(list((kernels / "plugins").glob("*/*.ptx"))) == 8


def test_other_precisions_and_the_plugin_library(run, road, shapes, tmp_path):
    for words, name, has_aot in (
        (("--tf32", "--plugin-library"), "model.tf32.tensorrt.onnx", False),
        (("--fp32",), "model.fp32.tensorrt.onnx", True),
        (("--bf16",), "model.bf16.tensorrt.onnx", True),
        (("--int8", shapes / "train", "--calibration-images", 4), "model.int8.tensorrt.onnx", True),
    ):
        expect_error(
            run("build-engine", *words, "--target", "tensorrt"),
            f"parser is written: {(road / name).relative_to(tmp_path)}",
        )
        operators = {node.op_type for node in onnx.load(road / name).graph.node}
        assert ("BatchedNmsKeep" in operators) == has_aot and ("BatchedNms" in operators) != has_aot


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_ap_of_the_rounded_graph_is_reported(run, road, shapes, precision):
    gate = ("--gate-images", shapes / "val", "--gate-annotations", shapes / "annotations" / "instances_val.json")
    gate += ("--gate-max-images", 2)
    words = ("--fp16",) if precision == "fp16" else ("--int8", shapes / "train", "--calibration-images", 4)
    code, out, _ = run("build-engine", *words, "--target", "tensorrt", *gate)
    assert code == 1
    for kind in ("box_ap", "mask_ap"):
        assert f"{kind} 0." in out
    assert f"with {precision} rounding" in out and "in single precision (ONNX Runtime)" in out


def test_a_checkpoint_is_exported_first_and_compared_on_the_users_images(run, road, shapes):
    (road / "model.onnx").unlink()
    gate = ("--gate-images", shapes / "val", "--gate-annotations", shapes / "annotations" / "instances_val.json")
    gate += ("--gate-max-images", 2)
    code, out, err = run("build-engine", road / "best.safetensors", "--fp16", *gate)
    assert code == 0, err
    assert (road / "model.onnx").is_file() and (road / "model.fp16.xml").is_file()
    assert f"on drawn images and {shapes / 'val'}; box_ap 0." in out and "mask_ap" in out
    written = (road / "model.onnx").stat().st_mtime_ns
    assert build_engine._exported(road / "best.safetensors", Progress()) == road / "model.onnx"
    assert (road / "model.onnx").stat().st_mtime_ns == written  # made from this checkpoint already


def test_auto_builds_the_newest_export_for_the_cpu_and_lists_the_options_without_effect(run, road):
    code, out, err = run("build-engine", "--fp16", "--batch", "1,4", "--refit")
    assert code == 0, err
    assert "no Python package tensorrt; building the CPU engine with OpenVINO" in out
    assert "options of TensorRT only, without effect: --batch 1,4 --refit" in out
    assert (road / "model.fp16.xml").is_file() and (road / "model.fp16.bin").is_file()


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
        (("--fp16", "--hardware-compatible", "all"), ("--hardware-compatible all", "ampere_plus")),
        (("--fp16", "--version-compatible"), ("--version-compatible with ahead", "add --plugin-library")),
        (("--fp16", "--keep", "fpn"), ("--keep without --int8",)),
    ],
)
def test_invalid_options_leave_no_files(run, road, arguments, parts):
    before = sorted(road.iterdir())
    expect_error(run("build-engine", *arguments), *parts)
    assert sorted(road.iterdir()) == before


def test_a_graph_with_lint_errors_is_an_error(run, road, monkeypatch):
    words = {"node": "a", "op": "Swirl", "output": "c", "graph": "", "why": "no importer", "remedy": "e", "source": "f"}
    found = LintReport(findings=(Finding(severity=Severity.ERROR, **words),), nodes=1)
    monkeypatch.setattr(variants, "lint", lambda proto: found)
    result = run("build-engine", "--fp32", "--target", "tensorrt")
    expect_error(result, "1 node(s) of", "without lint errors")
    assert "1 × Swirl: no importer" in result[1]
    assert not (road / "model.fp32.tensorrt.onnx").exists()


# The plugin library


@pytest.fixture
def library_message(monkeypatch, road, tmp_path):
    """Returns a function from the versions of TensorRT and its headers (or None) to the message about the library."""

    class Messages(Progress):
        def message(self, text):
            if text.startswith("plugin library: "):
                self.text = text

    def write_variant(source, target, **_):
        shutil.copy(source, target)
        return [], LintReport(findings=(), nodes=1)

    def message(installed, headers):
        def import_tensorrt():
            if installed is None:
                raise UserError("no Python package tensorrt", "TensorRT", "install it")
            return SimpleNamespace(__version__=installed)

        found = TensorRtHeaders(Path("include"), headers) if headers else None
        compilers = {"nvcc": Nvcc(Path("nvcc"), "13.0.88", (80, 90)), "nvrtc": None, "host_compiler": Path("g++")}
        here = Toolchain(**compilers, tensorrt=found, gpus=(90,))
        monkeypatch.setenv("MASKRCNN_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(toolchain, "find_toolchain", lambda: here)
        monkeypatch.setattr(tensorrt_library, "import_tensorrt", import_tensorrt)
        monkeypatch.setattr(build, "build_library", lambda kind, **_: f"compiled for {headers}")
        monkeypatch.setattr(build_engine, "write_variant", write_variant)
        progress = Messages()
        options = {"precision": "fp32", "target": "tensorrt", "plugin_library": True, "progress": progress}
        with pytest.raises(UserError, match="no Python package tensorrt"):
            build_engine.build_engine(road / "model.onnx", **options)
        return progress.text

    return message


def put_library(version):
    sources = cache.sources_hash(build.source_files(build.Library.PLUGINS))
    record = {"library": "plugins", "architectures": [90], "sources": sources, "tensorrt": version}
    return cache.store(record, build.Library.PLUGINS.file_name, lambda path: path.touch())


def test_the_plugin_library_is_for_the_installed_tensorrt(library_message):
    assert "compiled for 11.0.0" in library_message("11.4.0.106", "11.0.0")
    assert "compiled for 10.9.0" in library_message(None, "10.9.0")
    assert "no TensorRT" in library_message(None, None)
    message = library_message("10.9.0.34", "11.0.0")
    assert (
        "headers in include are of TensorRT 11.0.0, and 10.9.0.34 is installed" in message
        and "build-plugins" in message
    )
    for_10, for_11 = put_library("10.16.1"), put_library("11.0.0")
    for installed, headers, path in (
        ("10.9.0.34", "11.0.0", for_10),
        ("11.4.0.106", "10.9.0", for_11),
        (None, "10.9.0", for_10),
        (None, "11.0.0", for_11),
        ("11.4.0.106", None, for_11),
    ):
        assert library_message(installed, headers) == f"plugin library: {path}"


# The command in the stamp


@pytest.mark.parametrize(
    ("changes", "output", "words"),
    [
        ({}, "m.fp16.engine", "--fp16 --target tensorrt --refit"),
        ({"calibration_images": 8}, "m.fp16.engine", "--fp16 --target tensorrt --refit"),
        ({}, "other.engine", "--fp16 --target tensorrt --output other.engine --refit"),
        (
            {"precision": "int8", "calibration": Path("photos"), "gate_images": Path("photos")},
            "m.int8.engine",
            "--int8 photos --target tensorrt --refit",
        ),
        (
            {
                "precision": "int8",
                "calibration": Path("data/photos"),
                "calibration_images": 8,
                "keep": ("box_head",),
                "batch": "1,4",
                "workspace_gb": 2.0,
            },
            "engines/small.engine",
            "--int8 photos --keep box_head --calibration-images 8 --target tensorrt --output small.engine --batch 1,4 "
            "--workspace 2.0 --refit",
        ),
    ],
)
def test_the_command_of_an_engine_names_the_options_that_are_not_the_default(changes, output, words):
    request = BuildRequest(
        model=Path("runs/m.onnx"),
        graph=Path("m.tensorrt.onnx"),
        output=Path("runs") / output,
        weights=Weights.REFITTABLE,
        **{"precision": "fp16", **changes},
    )
    assert request.command() == f"maskrcnn build-engine m.onnx {words}"


# The Python API


def test_the_python_function_returns_what_the_command_prints(road, capsys):
    result = build_engine.build_engine(road / "model.onnx", target="openvino")
    assert result.path == road / "model.fp16.xml" and result.backend == "openvino" and result.precision == "fp16"
    assert result.comparison.accepted and str(result.comparison.difference) == result.difference
    assert json.loads(json.dumps(result.to_dict()))["path"] == str(result.path)
    assert result.lines()[0].startswith("OK: boxes differ from the ONNX file's by ≤ ")
    assert f"compared with ONNX Runtime: {result.difference}" in "\n".join(result.lines(verbose=True))
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({"precision": "fp8"}, "precision fp8"),
        ({"target": "cpu"}, "--target cpu"),
        ({"target": "openvino", "batch": 4}, "--batch 4 for OpenVINO"),
        ({"workspace": math.inf}, "--workspace inf"),
        ({"precision": "int8"}, "int8 without calibration images"),
        ({"calibration": "photos"}, "calibration images with fp16"),
    ],
)
def test_invalid_arguments_of_the_python_function(road, options, found):
    with pytest.raises(UserError, match=found):
        build_engine.build_engine(road / "model.onnx", **options)


# refit-engine


@pytest.fixture
def engine(road, tmp_path):
    """Both files of a refittable engine, without a real plan."""
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


def test_a_refit_without_tensorrt_is_an_error(run, road, engine):
    result = run("refit-engine", engine, road / "model.onnx", "--output", road / "new.engine")
    expect_error(result, "no Python package tensorrt", "pip install")
    assert not (road / "new.engine").exists()


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"refit": "fixed"}, "an engine with fixed weights"),
        ({"precision": "int8"}, "an engine with 8-bit scales"),
        ({"refit": "stripped", "onnx_sha256": "another"}, "whose weights differ from those that"),
    ],
)
def test_engines_without_refittable_weights(run, road, engine, changes, found):
    change_stamp(engine, **changes)
    expect_error(run("refit-engine", engine, road / "model.onnx", "--output", "new.engine"), found)


def test_invalid_refits(run, road, engine, boxes_onnx_file, tmp_path):
    onnx_file = road / "model.onnx"
    expect_error(run("refit-engine", engine, onnx_file, "--output", engine), "another file that ends in .engine")
    expect_error(run("refit-engine", engine, onnx_file, "--output", "new.onnx"), "another file that ends in .engine")
    expect_error(
        run("refit-engine", "none.engine", onnx_file, "--output", "new.engine"), "both files of a TensorRT engine"
    )
    other = onnx.load(boxes_onnx_file)
    (entry,) = [entry for entry in other.metadata_props if entry.key == "maskrcnn"]
    entry.value = json.dumps({**json.loads(entry.value), "class_names": ["one"], "category_ids": [1]})
    onnx.save(other, tmp_path / "other.onnx")
    expect_error(run("refit-engine", engine, tmp_path / "other.onnx", "--output", "new.engine"), "of 1 classes")

"""`maskrcnn export` and `build-engine` beyond single precision, and what they refuse."""

import faults
import numpy as np
import onnx
import pytest
import torch
from command_line import expect_error

from maskrcnn import runs
from maskrcnn.api.export import export
from maskrcnn.errors import UserError
from maskrcnn.export import variants
from maskrcnn.metadata import sha256_of
from maskrcnn.runtime import Detector
from maskrcnn.runtime.backends.onnxruntime import OnnxRuntimeBackend
from maskrcnn.runtime.verification.compare import EXACT


def test_every_precision_has_a_file_of_its_own(run, road, shapes):
    for precision, name, words in (  # fp16: the test below
        ("bf16", "model.bf16.onnx", "bf16: "),
        ("int8", "model.int8.onnx", "left out: rpn.head.cls_logits"),
    ):
        options = ("--calibration", shapes / "train", "--calibration-images", 3)
        code, out, err = run("--verbose", "export", road / "model.onnx", "--precision", precision, *options)
        assert code == 0, err
        assert words in out and (road / name).is_file()
    assert not [path for path in road.iterdir() if path.name.startswith(".")]


def test_a_checkpoint_exports_straight_to_half_precision(run, road):
    code, out, err = run("export", "--onnx", "--precision", "fp16")
    assert code == 0, err
    assert "differ from PyTorch's" in out and "differ from single precision's" in out
    metadata = OnnxRuntimeBackend(road / "model.fp16.onnx").metadata
    assert metadata.precision == "fp16" and metadata.source_sha256 == sha256_of(road / runs.BEST)
    assert "Conv" in metadata.stamp["casts"]


def test_a_file_for_tensorrt_and_its_lint(run, road):
    code, out, err = run("export", road / "model.onnx", "--onnx", "--precision", "fp16", "--tensorrt", "--aot")
    assert code == 0, err
    made = road / "model.fp16.tensorrt.onnx"
    proto = onnx.load(made)
    assert not proto.functions and "0 errors" in out
    plugins = [node for node in proto.graph.node if node.domain == "maskrcnn"]
    assert plugins and all(any(a.name == "aot" and a.i == 1 for a in node.attribute) for node in plugins)
    assert run("lint", made)[0] == 0


def test_an_8_bit_engine_runs(run, road, shapes):
    code, out, err = run("build-engine", "--int8", shapes / "train", "--calibration-images", 3, "--keep", "heads")
    assert code == 0, err
    assert "weights int8" in out
    detector = Detector.load(road / "model.int8.xml")
    assert detector.backend.precision.startswith("int8")
    assert len(detector.detect([np.zeros((80, 100, 3), np.uint8)])) == 1


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (("--precision", "int8"), ("--precision int8 without --calibration", "add --calibration FOLDER")),
        (("--precision", "int8", "--calibration", "empty"), ("empty: no image in it",)),
        (("--precision", "int8", "--calibration", "missing"), ("no folder missing",)),
        (("--precision", "int8", "--calibration", "shapes", "--keep", "neck"), ("no layer 'neck'", "heads")),
        (("--precision", "fp32", "--simulate"), ("--simulate with --precision fp32",)),
        (("--aot",), ("--aot without --tensorrt",)),
        (("--precision", "fp16", "--keep", "last"), ("--keep with --precision fp16", "drop --keep")),
        (("--tensorrt", "--calibration", "shapes"), ("--calibration with --precision fp32",)),
        (("--opset", "20"), ("--opset with",)),
        ((), ("an ONNX file in single precision already",)),
        (("--output", "other.onnx"), ("an ONNX file in single precision already",)),
        (
            ("--precision", "fp16", "--output", "runs/train-1/model.onnx"),
            ("that the command reads",),
        ),
    ],
)
def test_exports_that_cannot_be_leave_nothing_behind(run, road, shapes, tmp_path, arguments, parts):
    (tmp_path / "empty").mkdir()
    (tmp_path / "shapes").symlink_to(shapes / "train")
    before = {path: path.stat().st_mtime_ns for path in road.iterdir()}
    expect_error(run("export", road / "model.onnx", "--onnx", *arguments), *parts)
    assert {path: path.stat().st_mtime_ns for path in road.iterdir()} == before


def test_an_unknown_precision(run, road):
    code, _, err = run("export", "--onnx", "--precision", "fp8")
    assert code == 2 and "'fp8' is not one of 'fp32', 'fp16', 'bf16', 'int8'" in " ".join(err.replace("│", " ").split())
    with pytest.raises(UserError, match="--precision fp8\n  expected: fp32, fp16, bf16, int8"):
        export(road / "model.onnx", precision="fp8")


def test_an_opset_that_is_too_old_or_too_new(run, road):
    before = sorted(road.iterdir())
    for opset in (0, 17, 999):
        expect_error(run("export", "--onnx", "--opset", opset), f"opset {opset}", "20 to ", "use --opset 20")
    assert sorted(road.iterdir()) == before


def test_a_pytorch_that_is_too_old(run, road, monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.4.1+cpu")
    expect_error(run("export", "--onnx"), "torch 2.4.1+cpu", "2.10 or newer")


def test_operators_of_another_contract(run, road):
    proto = onnx.load(road / "model.onnx")
    next(entry for entry in proto.opset_import if entry.domain == "maskrcnn").version = 2
    onnx.save(proto, road / "other.onnx")
    for command in (("export", "--onnx", "--precision", "fp16"), ("build-engine", "--fp16")):
        expect_error(run(command[0], road / "other.onnx", *command[1:]), "maskrcnn operators of version 2", "version 1")


def test_the_copy_for_tensorrt_is_no_source(run, road):
    assert run("export", road / "model.onnx", "--onnx", "--tensorrt")[0] == 0
    copy = road / "model.tensorrt.onnx"
    for command in (
        ("export", copy, "--onnx", "--precision", "fp16"),
        ("build-engine", copy, "--fp16"),
        ("verify", road / "model.onnx", copy),
    ):
        expect_error(run(*command), "MultilevelRoiAlign without bodies", "pass the file that this one was made from")


def test_what_is_refused_in_between_is_kept_and_named(run, road, monkeypatch):
    """The folder in which a checkpoint's export lies for a moment is gone when the error is read."""
    monkeypatch.setattr(variants, "HALF", EXACT)
    monkeypatch.setattr(variants, "largest_magnitudes", lambda *_: {})
    code, _, err = run("export", "--onnx", "--precision", "bf16", "--tensorrt")
    assert code == 1 and ".export-" not in err
    rejected = "runs/train-1/model.bf16.tensorrt.rejected.onnx"
    assert (road / "model.bf16.tensorrt.rejected.onnx").is_file()
    assert f"maskrcnn verify runs/train-1/{runs.BEST} {rejected}" in err


def test_variants_are_no_source_for_variants(run, road):
    half = faults.plant(road / "model.onnx", road / "model.fp16.onnx", faults.metadata(precision="fp16"))
    expect_error(run("export", half, "--onnx", "--precision", "bf16"), "a file in fp16", "a single-precision file")
    expect_error(run("build-engine", half, "--fp16"), "a file in fp16")
    assert runs.newest_onnx().name == "model.onnx"  # though it is older

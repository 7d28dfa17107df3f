"""Providers and precisions on the command line, and what a backend has to remark."""

from command_line import expect_error

from maskrcnn import runs
from maskrcnn.runtime.backends.onnxruntime import OnnxRuntimeBackend


def test_predict_and_evaluate_take_a_provider(run, road, shapes, tmp_path, monkeypatch):
    monkeypatch.setattr(OnnxRuntimeBackend, "remarks", lambda self: ["ONNX Runtime on [CUDA]: all 7 nodes"])
    code, out, err = run("predict", shapes / "val" / "000000.png", "--model", road / runs.ONNX, "--provider", "cpu")
    assert code == 0, err
    assert "[CUDA]: all 7 nodes" in out and (tmp_path / "predictions" / "results.json").is_file()
    code, out, err = run("evaluate", road / runs.ONNX, "--data", shapes, "--provider", "cpu")
    assert code == 0, err
    assert "in ONNX Runtime fp32 on 6 images" in out and "[CUDA]: all 7 nodes" in out


def test_a_wrong_provider_is_refused(run, road, shapes):
    image = shapes / "val" / "000000.png"
    wrong = run("predict", image, "--model", road / runs.ONNX, "--provider", "gpu")
    expect_error(wrong, "provider 'gpu'", "cpu, cuda, tensorrt")
    elsewhere = run("predict", image, "--model", road / runs.ONNX, "--backend", "openvino", "--provider", "cuda")
    expect_error(elsewhere, "a provider for", "in openvino")
    for_engines = run("predict", image, "--model", road / runs.BEST, "--provider", "cuda")
    expect_error(for_engines, "backend 'onnxruntime'", "torch")


def test_a_checkpoint_runs_in_the_precision_that_is_named(run, road, shapes):
    code, out, err = run("evaluate", road / runs.BEST, "--data", shapes, "--precision", "bf16")
    assert code == 0, err
    assert "in PyTorch bf16 on 6 images" in " ".join(out.split())
    code, out, err = run("predict", shapes / "val" / "000000.png", "--model", road / runs.BEST, "--precision", "bf16")
    assert code == 0, err


def test_a_precision_is_refused_where_a_file_has_its_own(run, road, shapes):
    image = shapes / "val" / "000000.png"
    for more in ((), ("--backend", "openvino"), ("--provider", "cpu")):
        wrong = run("predict", image, "--model", road / runs.ONNX, "--precision", "fp16", *more)
        expect_error(wrong, "precision fp16 for", "maskrcnn export --precision")
    expect_error(run("predict", image, "--model", road / runs.BEST, "--precision", "int4"), "int4", "fp32 or bf16")

"""`maskrcnn inspect`: the report on each kind of model file."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from engine_files import write_engine
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from maskrcnn.cli import app
from maskrcnn.errors import UserError
from maskrcnn.export.inspection import costs_of, inspect
from maskrcnn.metadata import KEY, sha256_of
from maskrcnn.runtime.backends.placement import placements
from maskrcnn.weights.checkpoint import load_checkpoint

HEAD = '<ir_version: 10, opset_import: ["": 20]>'


@pytest.fixture(scope="module")
def report(onnx_file):
    return inspect(onnx_file, size_hw=(96, 128), with_placement=False)


def test_tensors_operators_and_origin(report, onnx_file, checkpoint, model):
    assert report.inputs["image_sizes"] == "int64 [N, 2]"
    assert report.outputs["masks"] == "fp32 [N, 12, 28, 28]"
    proto = onnx.load(onnx_file)
    assert sum(report.operators.values()) == len(proto.graph.node)
    assert report.operators["maskrcnn::MultilevelRoiAlign"] == 2
    assert report.metadata.source_sha256 == sha256_of(checkpoint)
    text = report.text()
    for part in (
        "ONNX IR 9, opset 20 (ONNX Runtime 1.17 or newer), functions MultilevelRoiAlign, BatchedNms, LiveRows",
        "model: maskrcnn_resnet18_fpn_small, precision fp32, contract 1",
        "classes: 3 (circle, rectangle, triangle), with masks, at most 12 detections",
        "preprocessing: 96 to 160 px, multiples of 32, RGB",
        f"SHA-256 {report.metadata.source_sha256}",
        f"torch {torch.__version__}",
    ):
        assert part in text


def test_parameters_equal_the_models_except_for_folded_norms(report, model):
    (count, size), norms = report.weights["fp32"], 0
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            norms += 2 * module.num_features
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert parameters - norms <= count <= parameters + norms
    assert size == 4 * count and set(report.weights) == {"fp32"}
    assert set(report.computing) == {"fp32"} and report.computing["fp32"]["Gemm"] == 4
    assert {"fp32", "int64", "bool", "int32"} <= set(report.results)


def test_operations_equal_the_counts_of_pytorch(report, model):
    images, sizes = torch.rand(1, 3, 96, 128) * 255, torch.tensor([[96, 128]])
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        outputs = model(images, sizes)
    rows = int(outputs["num_detections"].max())  # PyTorch runs the mask head on the used rows only
    counts = {name: sum(values.values()) for name, values in counter.get_flop_counts().items()}
    costs, name = report.costs, type(model).__name__
    assert costs.uncounted == ()
    assert 2 * costs.macs["backbone and FPN"] == counts[f"{name}.backbone"]
    assert 2 * costs.macs["RPN"] == counts[f"{name}.rpn"]
    masks = counts[f"{name}.roi_heads.mask_head"] + counts[f"{name}.roi_heads.mask_predictor"]
    assert 0 < rows <= 12
    assert 2 * costs.macs["mask head"] * rows == masks * 12
    assert 2 * costs.macs["box head"] == counts[f"{name}.roi_heads"] - masks
    assert "cost of one image of 128×96 px: 0.92 GFLOP" in report.text()


def test_operations_of_the_backbone_and_rpn_grow_with_the_image(onnx_file, report):
    small, large = (costs_of(onnx.load(onnx_file), (64 * k, 128 * k)) for k in (1, 2))  # P6 has an integer size in both
    for stage in ("backbone and FPN", "RPN"):
        assert large.macs[stage] == 4 * small.macs[stage]
    for stage in ("box head", "mask head"):
        assert large.macs[stage] == small.macs[stage] == report.costs.macs[stage]


def test_operations_of_a_graph_typed_by_hand():
    proto = onnx.parser.parse_model(
        f"""{HEAD} g (float[N,3,H,W] images, float[8,3,3,3] w, float[8,4,2,2] t, float[5,40] m) => (float[N,A] y)
        {{
            a = Conv<pads = [1, 1, 1, 1]>(images, w)
            b = ConvTranspose<strides = [2, 2], group = 2>(a, t)
            c = GlobalAveragePool(b)
            d = Flatten(c)
            e = Concat<axis = 1>(d, d, d, d, d)
            f = Gemm<transB = 1>(e, m)
            y = MatMul(f, m)
        }}"""
    )
    costs = costs_of(proto, (4, 6))
    assert costs.uncounted == ()
    conv, transposed, gemm, matmul = 24 * 8 * 27, 24 * 8 * 4 * 4, 40 * 5, 5 * 40
    assert costs.macs == {"whole model": conv + transposed + gemm + matmul}


def test_costs_need_an_input_named_images():
    proto = onnx.parser.parse_model(f"{HEAD} g (float[2,3] x, float[3,4] w) => (float[2,4] y) {{ y = MatMul(x, w) }}")
    assert costs_of(proto, (32, 32)) is None


def test_a_layer_with_dequantized_activations_alone_computes_in_single_precision(tmp_path):
    proto = onnx.parser.parse_model(
        f"""{HEAD} g (float[1,2,4,4] x) => (float[1,2,4,4] y)
        <float[2,2,1,1] w = {{1, 2, 3, 4}}, float s = {{0.5}}, int8 z = {{0}}>
        {{
            quantised = QuantizeLinear(x, s, z)
            around = DequantizeLinear(quantised, s, z)
            y = Conv(around, w)
        }}"""
    )
    path = tmp_path / "kept.onnx"
    onnx.save(proto, path)
    assert inspect(path, with_placement=False).computing == {"fp32": {"Conv": 1}}


def test_precision_is_read_off_the_graph(tmp_path):
    proto = onnx.parser.parse_model(
        f"""{HEAD} g (float[1,2,4,4] x) => (float[1,2,4,4] y)
        <float16[2,2,1,1] h = {{1, 2, 3, 4}}, float s = {{0.5}}, int8 z = {{0}}, int8[2,2,1,1] q = {{1, 2, 3, 4}}>
        {{
            low = Cast<to = 10>(x)
            half = Conv(low, h)
            back = Cast<to = 1>(half)
            quantised = QuantizeLinear(back, s, z)
            around = DequantizeLinear(quantised, s, z)
            weight = DequantizeLinear(q, s, z)
            y = Conv(around, weight)
        }}"""
    )
    path = tmp_path / "mixed.onnx"
    onnx.save(proto, path)
    found = inspect(path, with_placement=False)
    assert found.computing == {"fp16": {"Conv": 1}, "int8": {"Conv": 1}}
    assert found.weights["fp16"] == (4, 8) and found.weights["int8"] == (5, 5)  # one of them is the zero point
    assert found.results == {"fp32": 4, "fp16": 2, "int8": 1}
    assert found.metadata is None and found.costs is None


def test_a_tensorrt_engine_is_described_by_the_metadata_beside_it(tmp_path, onnx_file):
    path = write_engine(tmp_path / "m.engine", onnx_file)
    found = inspect(path)
    assert (found.kind, found.bytes, found.metadata.precision) == ("TensorRT engine", path.stat().st_size, "fp16")
    assert found.inputs == {"images": "fp32 [?, 3, ?, ?]", "image_sizes": "int64 [?, 2]"}
    assert found.outputs["masks"] == "fp32 [?, 12, 28, 28]" and found.outputs["num_detections"] == "int32 [?]"
    assert "stamp, gpu: NVIDIA H100 80GB HBM3" in found.text() and "stamp, profiles: " in found.text()
    path.with_name("m.engine.json").unlink()
    with pytest.raises(UserError, match=r"no m\.engine\.json beside"):
        inspect(path)


# Placement


@pytest.fixture
def one_provider(monkeypatch):
    """Makes ONNX Runtime list a single provider, so that one subprocess is started."""
    return lambda name: monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [name])


@pytest.fixture
def at_start(monkeypatch, tmp_path):
    """Runs code at the start of every Python subprocess."""

    def install(code: str) -> None:
        (tmp_path / "sitecustomize.py").write_text(code)
        monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)

    return install


def test_the_cpu_provider_takes_every_node(onnx_file):
    found = {p.provider: p for p in placements(onnx_file)}
    assert found.keys() == set(onnxruntime.get_available_providers())
    cpu = found["CPUExecutionProvider"]
    assert cpu.why_not == "" and cpu.left == {} and sum(cpu.taken.values()) > 500
    assert cpu.text() == f"CPU: all {sum(cpu.taken.values())} nodes"
    for other in found.values():  # a provider that is not usable gives a reason
        assert other.taken or other.why_not


def test_a_provider_that_crashes_gets_a_reason(onnx_file, one_provider, at_start):
    one_provider("CPUExecutionProvider")
    at_start("import os; os.abort()")
    (found,) = placements(onnx_file)
    assert found.why_not.startswith("its process ended without a result: ")


@pytest.mark.skipif(torch.cuda.is_available(), reason="the CUDA provider works here")
def test_a_missing_library_is_named(onnx_file, one_provider, at_start):
    one_provider("CUDAExecutionProvider")
    at_start("import sys; print('error: libcublas.so.13: cannot open shared object file', file=sys.stderr)")
    (found,) = placements(onnx_file)
    assert found.why_not == "cannot be used here: libcublas.so.13: cannot open shared object file"


# Other files


def test_a_checkpoint(checkpoint, model):
    found = inspect(checkpoint)
    assert found.kind == "checkpoint" and found.config["name"] == model.config.name
    assert found.weights == {
        "fp32": (sum(p.numel() for p in model.parameters()), 4 * sum(p.numel() for p in model.parameters()))
    }
    assert "backbone: resnet18" in found.text()


def engine(path: Path, metadata: str) -> Path:
    """An OpenVINO engine with one input, one weight and two outputs, one of which is not the detector's."""
    result = '<layer id="{k}" name="r{k}" type="Result" output_names="{name}"><input><port precision="FP32">'
    result += "<dim>-1</dim><dim>12</dim><dim>4</dim></port></input></layer>"
    layers = [
        '<layer id="0" name="images" type="Parameter"><output><port id="0" precision="FP32">'
        "<dim>-1</dim><dim>3</dim><dim>-1</dim><dim>-1</dim></port></output></layer>",
        '<layer id="1" name="w" type="Const"><data element_type="f16" shape="2, 3, 1, 1" size="12"/></layer>',
        *(result.format(k=k, name=name) for k, name in enumerate(("boxes", "x1"), start=2)),
    ]
    quoted = metadata.replace('"', "&quot;")
    path.write_text(
        f'<net><layers>{"".join(layers)}</layers><rt_info><{KEY} value="{quoted}"/></rt_info></net>', encoding="utf-8"
    )
    path.with_suffix(".bin").write_bytes(bytes(12))
    return path


def test_an_openvino_engine(report, tmp_path):
    found = inspect(engine(tmp_path / "model.fp16.xml", report.metadata.to_json()))
    assert found.metadata == report.metadata
    assert found.inputs == {"images": "fp32 [?, 3, ?, ?]"} and found.outputs == {"boxes": "fp32 [?, 12, 4]"}
    assert found.weights == {"fp16": (6, 12)} and found.operators == {"Result": 2, "Parameter": 1, "Const": 1}
    (tmp_path / "model.fp16.bin").unlink()
    with pytest.raises(UserError, match=r"without model\.fp16\.bin"):
        inspect(tmp_path / "model.fp16.xml")


@pytest.mark.parametrize("name", ["model.onnx", "model.xml", "model.safetensors"])
def test_other_files_are_refused(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(b"\x08\x00\x00\x00\x00\x00\x00\x00 not a model <")
    path.with_suffix(".bin").write_bytes(b"")
    with pytest.raises(UserError, match="a file written by maskrcnn"):
        inspect(path)


def test_files_that_were_cut_short_are_refused(report, tmp_path, checkpoint):
    whole = checkpoint.read_bytes()
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(whole[:-1])
    with pytest.raises(UserError, match=rf"(?s){len(whole) - 1} bytes\b.*\bat least {len(whole)} bytes"):
        inspect(cut)
    cut.write_bytes(whole[:500])  # within the header
    with pytest.raises(UserError, match=r"(?s)500 bytes\b.*copy the file again"):
        inspect(cut)
    with pytest.raises(UserError, match="500 bytes"):
        load_checkpoint(cut)
    cut.write_bytes(b"")
    with pytest.raises(UserError, match="an empty file"):
        inspect(cut)
    path = engine(tmp_path / "model.xml", report.metadata.to_json())
    path.with_suffix(".bin").write_bytes(bytes(11))
    with pytest.raises(UserError, match=r"(?s)model\.bin: 11 bytes\b.*\bat least 12 bytes"):
        inspect(path)


def test_unusable_arguments_are_errors(tmp_path, onnx_file, checkpoint):
    with pytest.raises(UserError, match="no file"):
        inspect(tmp_path / "none.onnx")
    (tmp_path / "model.pb").touch()
    with pytest.raises(UserError, match=r"ends in \.onnx, \.xml, \.engine, \.safetensors"):
        inspect(tmp_path / "model.pb")
    with pytest.raises(UserError, match="multiples of 32"):
        inspect(onnx_file, size_hw=(100, 128))
    with pytest.raises(UserError, match="omit --size"):
        inspect(checkpoint, size_hw=(96, 128))


def test_the_command_prints_and_writes_the_report(onnx_file, tmp_path):
    out = tmp_path / "model.json"
    done = CliRunner().invoke(app, ["inspect", str(onnx_file), "--size", "96x128", "--json", str(out)])
    assert done.exit_code == 0, done.output
    assert "128×96 px" in done.stdout and "ONNX Runtime on CPU: all" in done.stdout
    values = json.loads(out.read_text())
    assert values["costs"]["size_hw"] == [96, 128] and values["metadata"]["detections"] == 12
    assert [p["provider"] for p in values["onnxruntime"]] == onnxruntime.get_available_providers()
    wrong = CliRunner().invoke(app, ["inspect", str(onnx_file), "--size", "large"])
    assert isinstance(wrong.exception, UserError) and "HEIGHTxWIDTH" in str(wrong.exception)


def test_torch_is_not_needed():
    names = ("export.inspection", "export.tensorrt.lint", "export.tensorrt.flavour", "cli.inspect")
    modules = ", ".join(f"maskrcnn.{name}" for name in names)
    code = f"import sys; import {modules}; sys.exit('torch' in sys.modules or 'openvino' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0


def test_costs_do_not_change_the_model(onnx_file):
    proto = onnx.load(onnx_file)
    before = proto.SerializeToString(deterministic=True)
    costs_of(proto, (64, 64))
    assert proto.SerializeToString(deterministic=True) == before
    assert np.isfinite(onnx.numpy_helper.to_array(proto.graph.initializer[0])).all()

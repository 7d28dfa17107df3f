"""Engine files: their metadata, where they are found, and whether a machine runs them."""

import dataclasses

import pytest
from engine_files import PROFILE, STAMP, write_engine

from maskrcnn.errors import UserError
from maskrcnn.runtime.backends.tensorrt_library import Gpu
from maskrcnn.runtime.doctor import engine_finding, report
from maskrcnn.runtime.engine_files import find_engines, read_metadata

H100 = Gpu(STAMP["gpu"], (9, 0))
L40S = Gpu("NVIDIA L40S", (8, 9))
DEVICES = ["GPU Arc (FP16)", "CPU Xeon 8481C (BF16 FP32)"]
FACTS = {"tensorrt": {"version": STAMP["tensorrt"]}, "openvino": {"version": "2026.4", "devices": DEVICES}}


def restamped(path, target, **stamp):
    """Copies an OpenVINO engine with another stamp."""
    metadata = read_metadata(path)
    other = dataclasses.replace(metadata, stamp={**metadata.stamp, **stamp}).to_json()
    text = path.read_text().replace(quoted(metadata.to_json()), quoted(other))
    assert quoted(other) in text
    target.write_text(text)
    target.with_suffix(".bin").write_bytes(path.with_suffix(".bin").read_bytes())
    return target


def quoted(text):
    return text.replace("&", "&amp;").replace('"', "&quot;")


def check(path, facts=FACTS, gpus=(H100,)):
    """What the doctor finds out about an engine, without its kind and precision."""
    found = engine_finding(path, facts, gpus)
    assert found.component == f"engine {path}" and found.is_enough == ("fits this machine" in found.found)
    return found.found.partition(": ")[2]


def test_every_kind_of_file_has_the_same_metadata(tmp_path, onnx_file, half_openvino_engine):
    plan = write_engine(tmp_path / "m.engine", onnx_file)
    files = [dataclasses.replace(read_metadata(path), stamp={}) for path in (onnx_file, half_openvino_engine, plan)]
    assert len({metadata.class_names for metadata in files}) == 1
    assert [metadata.precision for metadata in files] == ["fp32", "fp16", "fp16"]


def test_engines_are_found_below_folders(tmp_path, onnx_file, half_openvino_engine):
    run = tmp_path / "runs" / "train-1"
    run.mkdir(parents=True)
    plan = write_engine(run / "model.fp16.engine", onnx_file)
    ours = restamped(half_openvino_engine, run / "model.xml")
    (run / "other.xml").write_text("<net><rt_info></rt_info></net>")
    (run / "model.onnx").touch()
    assert find_engines([tmp_path]) == [plan, ours]
    assert find_engines([plan, tmp_path / "runs", ours]) == [plan, ours]
    assert find_engines([run / "other.xml"]) == [run / "other.xml"]  # a named file is always checked
    with pytest.raises(UserError, match="no file or folder"):
        find_engines([tmp_path / "none"])
    with pytest.raises(UserError, match=r"model\.onnx: not an engine"):
        find_engines([run / "model.onnx"])


def test_a_tensorrt_engine_fits_where_it_was_built(tmp_path, onnx_file):
    path = write_engine(tmp_path / "m.engine", onnx_file)
    assert engine_finding(path, FACTS, (H100,)).found == "TensorRT fp16: fits this machine"
    assert check(path, gpus=(L40S, H100)) == "fits this machine"  # one of the GPUs is enough


@pytest.mark.parametrize(
    ("tensorrt", "gpus", "found"),
    [
        (None, (H100,), "an engine for TensorRT 11.4.0.106, and no TensorRT here"),
        ("11.4.0.106", (), "an engine for an NVIDIA GPU, and none here"),
        ("10.16.0.1", (H100,), "an engine built for tensorrt 11.4.0.106; here is 10.16.0.1"),
        ("11.4.0.106", (L40S,), "an engine built for compute_capability 9.0; here is 8.9"),
        (
            "11.4.0.106",
            (Gpu("NVIDIA H200", (9, 0)),),
            "an engine built for gpu NVIDIA H100 80GB HBM3; here is NVIDIA H200",
        ),
    ],
)
def test_the_difference_is_named(tmp_path, onnx_file, tensorrt, gpus, found):
    path = write_engine(tmp_path / "m.engine", onnx_file)
    facts = {"tensorrt": {"version": tensorrt} if tensorrt else {}}
    assert check(path, facts, gpus) == found
    assert "what to do: " in report([engine_finding(path, facts, gpus)])


def test_a_portable_engine_fits_more(tmp_path, onnx_file):
    stamp = {"version_compatible": "yes", "hardware_compatibility": "ampere_plus"}
    path = write_engine(tmp_path / "m.engine", onnx_file, [PROFILE], **stamp)
    assert check(path, {"tensorrt": {"version": "11.9.0.0"}}, (L40S,)) == "fits this machine"


def test_files_that_are_no_engines(tmp_path, onnx_file):
    path = write_engine(tmp_path / "m.engine", onnx_file)
    path.with_name("m.engine.json").unlink()
    assert check(path) == f"no m.engine.json beside {path}"
    (tmp_path / "other.xml").write_text("<net></net>")
    assert "without maskrcnn's metadata" in check(tmp_path / "other.xml")
    rejected = write_engine(tmp_path / "m.rejected.engine", onnx_file, compared="9 detections")
    assert check(rejected) == "rejected when it was built (9 detections)"


def test_an_openvino_engine(tmp_path, half_openvino_engine):
    cpu = read_metadata(half_openvino_engine).stamp["cpu"]

    def machine(name: str, capabilities: str) -> dict:
        return {"openvino": {"version": "2026.4", "devices": [f"CPU {name} ({capabilities})"]}}

    here = machine(cpu, "BF16 FP32")
    found = engine_finding(half_openvino_engine, here, ())
    assert found.found.startswith("OpenVINO fp16, executed in ") and found.found.endswith(": fits this machine")
    assert check(half_openvino_engine) == f"fits this machine (built and compared on {cpu})"
    assert engine_finding(half_openvino_engine, {}, ()).remedy == "`pip install 'openvino>=2025.3'`"
    half = restamped(half_openvino_engine, tmp_path / "half.xml", execution="bf16")
    assert check(half, here) == "fits this machine"
    without = machine(cpu, "FP32")
    assert "built for bfloat16" in check(half, without)
    assert (
        check(restamped(half_openvino_engine, tmp_path / "single.xml", execution="fp32"), without)
        == "fits this machine"
    )
    half.with_suffix(".bin").unlink()
    assert check(half, here) == "no half.bin next to it"

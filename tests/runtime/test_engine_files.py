"""Engine files, and whether a machine runs them."""

import dataclasses

import pytest
from engine_files import PROFILE, STAMP, write_engine

from maskrcnn.errors import UserError
from maskrcnn.runtime.backends.tensorrt_library import Gpu
from maskrcnn.runtime.build.openvino import build_openvino_engine
from maskrcnn.runtime.engine_files import Machine, find_engines, fit, metadata_of_xml

H100 = Gpu(STAMP["gpu"], (9, 0))
L40S = Gpu("NVIDIA L40S", (8, 9))
GPU_BOX = Machine(gpus=(H100,), tensorrt=STAMP["tensorrt"], openvino="2026.4", cpu="Xeon", has_bfloat16=True)


@pytest.fixture(scope="module")
def openvino_engine(tmp_path_factory, onnx_file):
    path = tmp_path_factory.mktemp("openvino") / "model.fp16.xml"
    metadata, _ = build_openvino_engine(onnx_file, path, half=True)
    return path, metadata


def restamped(path, target, **stamp):
    """A copy of an OpenVINO engine with another stamp."""
    metadata = metadata_of_xml(path)
    other = dataclasses.replace(metadata, stamp={**metadata.stamp, **stamp}).to_json()
    text = path.read_text().replace(quoted(metadata.to_json()), quoted(other))
    assert quoted(other) in text
    target.write_text(text)
    target.with_suffix(".bin").write_bytes(path.with_suffix(".bin").read_bytes())
    return target


def quoted(text):
    return text.replace("&", "&amp;").replace('"', "&quot;")


def test_engines_are_found_below_folders(tmp_path, onnx_file, openvino_engine):
    run = tmp_path / "runs" / "train-1"
    run.mkdir(parents=True)
    plan = write_engine(run / "model.fp16.engine", onnx_file)
    ours = restamped(openvino_engine[0], run / "model.xml")
    (run / "other.xml").write_text("<net><rt_info></rt_info></net>")
    (run / "model.onnx").touch()
    assert find_engines([tmp_path]) == [plan, ours]
    assert find_engines([plan, tmp_path / "runs", ours]) == [plan, ours]
    assert find_engines([run / "other.xml"]) == [run / "other.xml"]  # what is named is looked into
    with pytest.raises(UserError, match="no file or folder"):
        find_engines([tmp_path / "none"])
    with pytest.raises(UserError, match=r"model\.onnx: no engine"):
        find_engines([run / "model.onnx"])


def test_a_tensorrt_engine_fits_where_it_was_built(tmp_path, onnx_file):
    found = fit(write_engine(tmp_path / "m.engine", onnx_file), GPU_BOX)
    assert (found.described, found.error) == ("TensorRT fp16", None)
    two = dataclasses.replace(GPU_BOX, gpus=(L40S, H100))
    assert fit(found.path, two).error is None  # one of the GPUs is enough


@pytest.mark.parametrize(
    ("machine", "came"),
    [
        ({"tensorrt": None}, "an engine for TensorRT 11.4.0.106, and no TensorRT here"),
        ({"gpus": ()}, "an engine for an NVIDIA GPU, and none here"),
        ({"tensorrt": "10.16.0.1"}, "an engine built for tensorrt 11.4.0.106; here is 10.16.0.1"),
        ({"gpus": (L40S,)}, "an engine built for compute_capability 9.0; here is 8.9"),
        ({"gpus": (Gpu("NVIDIA H200", (9, 0)),)}, "an engine built for gpu NVIDIA H100 80GB HBM3; here is NVIDIA H200"),
    ],
)
def test_what_differs_is_named(tmp_path, onnx_file, machine, came):
    path = write_engine(tmp_path / "m.engine", onnx_file)
    found = fit(path, dataclasses.replace(GPU_BOX, **machine))
    assert found.error.found == came and found.error.fix


def test_a_portable_engine_fits_more(tmp_path, onnx_file):
    stamp = {"version_compatible": "yes", "hardware_compatibility": "ampere_plus"}
    path = write_engine(tmp_path / "m.engine", onnx_file, [PROFILE], **stamp)
    assert fit(path, dataclasses.replace(GPU_BOX, gpus=(L40S,), tensorrt="11.9.0.0")).error is None


def test_files_that_are_no_engines(tmp_path, onnx_file):
    path = write_engine(tmp_path / "m.engine", onnx_file)
    path.with_name("m.engine.json").unlink()
    assert fit(path, GPU_BOX).error.found == f"no m.engine.json beside {path}"
    (tmp_path / "other.xml").write_text("<net></net>")
    assert "without maskrcnn's metadata" in fit(tmp_path / "other.xml", GPU_BOX).error.found
    rejected = write_engine(tmp_path / "m.rejected.engine", onnx_file, compared="9 detections")
    assert fit(rejected, GPU_BOX).error.found == "rejected when it was built (9 detections)"


def test_an_openvino_engine(tmp_path, openvino_engine):
    path, metadata = openvino_engine
    machine = dataclasses.replace(GPU_BOX, cpu=metadata.stamp["cpu"])
    found = fit(path, machine)
    assert found.error is None and found.remark == "" and found.described.startswith("OpenVINO fp16, executed in ")
    assert fit(path, GPU_BOX).remark == f"built and compared on {metadata.stamp['cpu']}"
    assert fit(path, dataclasses.replace(machine, openvino=None)).error.fix == "`pip install 'openvino>=2025.3'`"
    half = restamped(path, tmp_path / "half.xml", execution="bf16")
    assert fit(half, machine).error is None
    without = dataclasses.replace(machine, has_bfloat16=False)
    assert "built for bfloat16" in fit(half, without).error.found
    assert fit(restamped(path, tmp_path / "single.xml", execution="fp32"), without).error is None
    half.with_suffix(".bin").unlink()
    assert fit(half, machine).error.found == "no half.bin beside it"

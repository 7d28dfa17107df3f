"""What `maskrcnn doctor` says of CUDA, of compiled plugins and of engine files."""

import pytest
from command_line import expect_error
from engine_files import STAMP, write_engine

from maskrcnn.cli import doctor as cli_doctor
from maskrcnn.errors import UserError
from maskrcnn.plugins import build
from maskrcnn.plugins import build as cache
from maskrcnn.plugins.build import Library
from maskrcnn.runtime.backends.tensorrt_library import Gpu
from maskrcnn.runtime.doctor import Finding, report

H100 = Gpu(STAMP["gpu"], (9, 0))
T4 = Gpu("Tesla T4", (7, 5))


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """Sets the GPUs, the driver's CUDA and what libraries say of themselves; the cache of plugins is empty."""
    monkeypatch.setenv("MASKRCNN_CACHE", str(tmp_path / "cache"))

    def make(gpus=(), cuda=None, **facts):
        monkeypatch.setattr(cli_doctor, "find_gpus", lambda: tuple(gpus))
        monkeypatch.setattr(cli_doctor, "find_driver_cuda", lambda: cuda)
        monkeypatch.setattr(cli_doctor, "library_facts", lambda name: facts.get(name, {}))

    make()
    return make


def store_library(kind, architectures, *, sources=None, **record):
    """Puts a library into the cache, as `build_library` does."""
    wanted = {
        "library": kind.value,
        "architectures": list(architectures),
        "sources": sources or cache.sources_hash(build.source_files(kind)),
        **record,
    }
    return cache.store(wanted, kind.file_name, lambda path: path.write_text("a library"))


def test_each_library_and_the_gpus_that_run_it(machine):
    assert cli_doctor.library_findings() == []
    machine([H100, T4])
    path = store_library(Library.PLUGINS, [80, 90], tensorrt="11.4.0")
    (found,) = cli_doctor.library_findings()
    assert found.component == "libmaskrcnn_plugins.so" and not found.is_enough
    assert found.found == f"for sm_80 sm_90, TensorRT 11.4.0 at {path}; does not run on Tesla T4"
    assert found.remedy == "`maskrcnn build-plugins --arch 75`"
    machine([H100])
    (found,) = cli_doctor.library_findings()
    assert found.is_enough and found.found.endswith(str(path))


def test_libraries_of_other_sources_are_counted(machine):
    store_library(Library.KERNELS, [90], sources="0" * 64)
    store_library(Library.KERNELS, [80], sources="1" * 64)
    cache.store({"kernel": "batched_nms"}, "kernel.cubin", lambda path: path.write_text("machine code"))
    (found,) = cli_doctor.library_findings()
    assert (found.component, found.found[:29]) == ("older plugins", "2 compiled from other sources")


@pytest.mark.parametrize(
    ("cuda", "tensorrt", "found"),
    [
        ((13, 2), "11.4.0.106", "13.2"),
        ((12, 8), "10.16.0", "12.8"),
        ((12, 8), None, "12.8"),
        ((12, 8), "11.4.0.106", "12.8, too old for TensorRT 11.4.0.106, which needs CUDA 13"),
        (None, "11.4.0.106", None),
    ],
)
def test_cuda_of_the_driver(machine, cuda, tensorrt, found):
    machine(cuda=cuda, tensorrt={"version": tensorrt} if tensorrt else {})
    (finding,) = cli_doctor.cuda_findings()
    assert finding.found == found
    assert finding.is_enough == ("too old" not in (found or ""))
    assert "nvidia.com/drivers" in finding.remedy


def test_gpus_are_asked_for_until_there_is_none(monkeypatch):
    def find_gpu(device):
        if device < 2:
            return (H100, T4)[device]
        raise UserError("no GPU 2", "a GPU", "see doctor")

    monkeypatch.setattr(cli_doctor, "find_gpu", find_gpu)
    assert cli_doctor.find_gpus() == (H100, T4)


def test_engines_that_fit_and_others(machine, tmp_path, onnx_file):
    devices = ["GPU Arc (FP16)", "CPU Xeon 8481C (BF16 FP32)"]
    machine([H100], tensorrt={"version": STAMP["tensorrt"]}, openvino={"version": "2026.4", "devices": devices})
    here = cli_doctor._machine()
    assert (here.cpu, here.has_bfloat16, here.openvino) == ("Xeon 8481C", True, "2026.4")
    good = write_engine(tmp_path / "good.engine", onnx_file)
    bad = write_engine(tmp_path / "bad.engine", onnx_file, tensorrt="10.9.0.1", command="maskrcnn build-engine --fp16")
    fine, other = cli_doctor.engine_findings([good, bad])
    assert fine == Finding(f"engine {good}", "TensorRT fp16: fits this machine", "inference", "nothing to do")
    text = report([other])
    assert "an engine built for tensorrt 10.9.0.1; here is 11.4.0.106" in text
    assert "what to do: rebuild it here: `maskrcnn build-engine --fp16`" in text
    assert cli_doctor.engine_findings([]) == []


def test_the_command(run, road, onnx_file, monkeypatch, tmp_path):
    monkeypatch.setattr("maskrcnn.runtime.doctor.diagnose", lambda groups: [f for group in groups for f in group()])
    write_engine(road / "model.fp16.engine", onnx_file)
    other = write_engine(tmp_path / "other.engine", onnx_file)
    code, out, _ = run("doctor", other)
    assert code == 0
    for path in ("runs/train-1/model.fp16.engine", str(other)):
        assert f"engine {path}" in out
    assert "CUDA of the driver" in out
    expect_error(run("doctor", "nowhere"), "no file or folder nowhere")

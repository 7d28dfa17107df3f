"""`maskrcnn doctor`: a report of the machine, whatever is missing or broken."""

import os

import numpy as np
import onnx
import pytest
from bare_machine import add_nvcc, strip
from command_line import expect_error
from engine_files import STAMP, write_engine

from maskrcnn.plugins import build
from maskrcnn.plugins.build import Library
from maskrcnn.runtime import doctor
from maskrcnn.runtime.backends.tensorrt_library import Gpu
from maskrcnn.runtime.doctor import Finding, diagnose, library_findings, plugin_findings, probe, report

H100 = Gpu(STAMP["gpu"], (9, 0))
T4 = Gpu("Tesla T4", (7, 5))
LIBRARIES = {
    *("torch", "torchvision", "CUDA GPU (torch)", "NVIDIA driver", "onnx", "onnxscript", "ONNX Runtime"),
    *("ONNX Runtime on CUDA", "ONNX Runtime on TensorRT", "OpenVINO", "TensorRT (Python)", "cuda-python", "PyCUDA"),
    "pycocotools",
}
MACHINE = {"cache", "shared memory", "Python", "platform", "CPU"}
TOOLS = {"c++", "cc", "cmake", "nvcc", "NVRTC", "TensorRT headers", "compiled plugins", "CUDA of the driver"}


@pytest.fixture(autouse=True)
def empty_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("MASKRCNN_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def bare_machine(monkeypatch, tmp_path):
    """A machine with Python and nothing else; returns the only folder of PATH."""
    programs = strip(monkeypatch, tmp_path)
    monkeypatch.setattr(doctor, "probe", lambda name: {"error": "No module", "missing": True})
    return programs


@pytest.fixture
def library(tmp_path, monkeypatch):
    """Writes a module that the probes import instead of the installed one."""

    def write(name: str, source: str) -> None:
        (tmp_path / f"{name}.py").write_text(source)
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    return write


def by_component(findings: list[Finding]) -> dict[str, Finding]:
    return {finding.component: finding for finding in findings}


def test_this_machine(run, monkeypatch):
    import torch

    found = diagnose()
    monkeypatch.setattr(doctor, "diagnose", lambda engines: found)  # once, as it starts a process for each library
    code, out, err = run("doctor")
    assert code == 0 and out.strip() == report(found).strip(), err
    findings = by_component(found)
    assert set(findings) == MACHINE | LIBRARIES | TOOLS
    assert all(finding.enables and finding.remedy for finding in findings.values())
    assert findings["torch"].found.startswith(torch.__version__)
    assert findings["pycocotools"].found and findings["Python"].found and findings["CPU"].found
    assert "CPU " in findings["OpenVINO"].found and "FP32" in findings["OpenVINO"].found
    assert (findings["CUDA GPU (torch)"].found is not None) == torch.cuda.is_available()


def test_a_bare_machine(bare_machine):
    findings = by_component(diagnose())
    assert set(findings) == MACHINE | LIBRARIES | TOOLS
    assert {name for name, finding in findings.items() if finding.found is None} == LIBRARIES | TOOLS
    text = report(list(findings.values()))
    for name in LIBRARIES | TOOLS:
        assert findings[name].enables in text and findings[name].remedy in text
    for command in ("pip install 'torch>=2.10'", "pip install 'openvino>=2025.3'", "pip install cmake"):
        assert command in text
    assert "unusable" not in text


def test_compilers_are_found(bare_machine):
    add_nvcc(bare_machine / "nvcc")
    assert by_component(diagnose())["nvcc"].found == f"13.0.88 at {bare_machine / 'nvcc'}"


def test_a_report_is_a_table():
    text = report([Finding("torch", "2.10", "training", "x"), Finding("nvcc", None, "plugins", "install it")])
    assert text.splitlines() == [
        "torch  2.10",
        "nvcc   missing",
        "         would enable: plugins",
        "         to get it: install it",
    ]
    assert report([]) == ""


def test_an_error_in_a_check_costs_that_check(bare_machine, monkeypatch):
    def broken():
        raise RuntimeError("no such thing")

    monkeypatch.setattr(doctor.platform, "platform", broken)
    findings = by_component(diagnose())
    assert findings["doctor"].found == "a check failed (RuntimeError: no such thing)"
    assert set(findings) > LIBRARIES | TOOLS


@pytest.mark.parametrize(
    ("source", "error"),
    [
        ("raise RuntimeError('libfoo.so.3 is too old')", "RuntimeError: libfoo.so.3 is too old"),
        ("import a_part_that_is_not_there", "No module named 'a_part_that_is_not_there'"),
        ("import os; os.abort()", "its process ended with -6"),
        ("import sys; sys.exit(3)", "its process ended with 3"),
        ("import os; os._exit(0)", "no reason given"),
        ("import time; time.sleep(60)", "no answer within 3 s"),
        ("def", "SyntaxError"),
    ],
)
@pytest.mark.skipif(os.name != "posix", reason="exit codes of signals")
def test_a_broken_library(library, monkeypatch, source, error):
    library("onnxscript", source)
    monkeypatch.setattr(doctor, "TIMEOUT_S", 3.0)
    finding = by_component(library_findings({"onnxscript": probe("onnxscript")}, None))["onnxscript"]
    assert finding.found is None
    assert f"(installed but unusable: {error}" in finding.remedy


def test_a_missing_library(library):
    library("pycuda", "raise ModuleNotFoundError('No module named pycuda', name='pycuda')")
    assert probe("pycuda") == {"error": "No module named pycuda", "missing": True}


def test_a_library_that_prints(library):
    library("onnxscript", "print('hello'); print('{', end=''); __version__ = '0.9'")
    assert probe("onnxscript") == {"version": "0.9"}


def test_facts_before_a_crash_are_kept(library):
    library(
        "tensorrt",
        "import os\n__version__ = '11.4'\nclass Logger:\n    ERROR = 1\n    def __init__(self, level): pass\n"
        "def Builder(logger): os.abort()",
    )
    facts = {"tensorrt": probe("tensorrt")}
    for driver, reason in ((None, "there is no NVIDIA driver"), ("H100", "its process ended with -6")):
        found = by_component(library_findings(facts, driver))["TensorRT (Python)"].found
        assert found == f"11.4, cannot build here: {reason}"


def test_a_folder_in_the_working_directory_is_no_library(tmp_path, monkeypatch):
    (tmp_path / "onnxscript").mkdir()
    (tmp_path / "onnxscript" / "__init__.py").write_text("__version__ = 'mine'")
    monkeypatch.chdir(tmp_path)
    assert probe("onnxscript").get("version") != "mine"


def test_a_listed_provider_may_be_unusable():
    fallen = "ONNX Runtime fell back to the CPU"
    runtime = {"version": "1.31", "providers": {"CUDAExecutionProvider": fallen, "CPUExecutionProvider": ""}}

    def findings(driver: str | None) -> dict[str, Finding]:
        return by_component(library_findings({"onnxruntime": runtime}, driver))

    without_driver = findings(None)
    assert without_driver["ONNX Runtime on CUDA"].found is None
    assert "listed but unusable: there is no NVIDIA driver" in without_driver["ONNX Runtime on CUDA"].remedy
    assert "listed" not in without_driver["ONNX Runtime on TensorRT"].remedy
    remedy = findings("H100")["ONNX Runtime on CUDA"].remedy
    assert f"[cuda,cudnn]>=1.23' (the provider is listed but unusable: {fallen})" in remedy
    runtime["lacks"] = "libcudnn.so.9: cannot open shared object file"
    assert "unusable: libcudnn.so.9: cannot" in findings("H100")["ONNX Runtime on CUDA"].remedy
    runtime["providers"]["CUDAExecutionProvider"] = ""
    assert findings("H100")["ONNX Runtime on CUDA"].found == "can be created"


def test_the_model_for_trying_providers():
    import onnxruntime

    model = doctor.tiny_model()
    onnx.checker.check_model(onnx.load_from_string(model), full_check=True)
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    assert session.run(None, {"x": np.float32([3])}) == [3]


def test_cpu_of_x86_and_arm_and_unknown(tmp_path):
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor\t: 0\nmodel name\t: Xeon 8481C\nflags\t\t: fpu avx2 amx_bf16\npower management:\n")
    assert doctor.cpu_description(cpuinfo).startswith(f"Xeon 8481C, {os.cpu_count()} logical cores")
    cpuinfo.write_text("processor\t: 0\nFeatures\t: fp asimd bf16 i8mm\n")
    assert doctor.cpu_description(cpuinfo).endswith(": asimd bf16 i8mm")
    assert "logical cores" in doctor.cpu_description(tmp_path / "none")


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="no affinity")
def test_the_cpus_that_a_container_grants(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1})
    assert "64 logical cores, 2 of them available" in doctor.cpu_description(tmp_path / "none")


@pytest.mark.parametrize(("sizes_mb", "is_enough"), [((64, 64), False), ((16_000, 15_000), True), (None, False)])
def test_the_shared_memory_of_a_container(sizes_mb, is_enough):
    finding = doctor.shared_memory_finding(sizes_mb)
    assert finding.is_enough == is_enough
    assert "--shm-size" in finding.remedy
    assert finding.found == (sizes_mb and f"{sizes_mb[0]} MB, {sizes_mb[1]} MB free")


def test_an_old_tensorrt_is_not_enough():
    facts = {"tensorrt": {"version": "10.3.0.26", "builder": True}}
    found = by_component(library_findings(facts, "H100"))["TensorRT (Python)"]
    assert (found.found, found.is_enough) == ("10.3.0.26, which is too old", False)
    assert report([found]).splitlines()[1:] == [
        f"{'':21}needed for: TensorRT engines on NVIDIA GPUs",
        f"{'':21}what to do: pip install -U 'tensorrt>=10.9' (downloads from pypi.nvidia.com)",
    ]
    facts["tensorrt"]["version"] = "10.16.1.0"
    assert by_component(library_findings(facts, "H100"))["TensorRT (Python)"].is_enough


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
def test_cuda_of_the_driver(monkeypatch, cuda, tensorrt, found):
    monkeypatch.setattr(doctor.tools, "find_driver_cuda", lambda: cuda)
    finding = doctor.cuda_finding({"tensorrt": {"version": tensorrt}} if tensorrt else {})
    assert finding.found == found
    assert finding.is_enough == ("too old" not in (found or ""))
    assert "nvidia.com/drivers" in finding.remedy


# Compiled plugins


def store_library(kind, architectures, *, sources=None, **record):
    """Puts a library into the cache, as `build_library` does."""
    wanted = {
        "library": kind.value,
        "architectures": list(architectures),
        "sources": sources or build.sources_hash(build.source_files(kind)),
        **record,
    }
    return build.store(wanted, kind.file_name, lambda path: path.write_text("a library"))


def test_each_library_and_the_gpus_that_run_it():
    assert plugin_findings([]) == []
    path = store_library(Library.PLUGINS, [80, 90], tensorrt="11.4.0")
    (found,) = plugin_findings([H100, T4])
    assert found.component == "libmaskrcnn_plugins.so" and not found.is_enough
    assert found.found == f"for sm_80 sm_90, TensorRT 11.4.0 at {path}; does not run on Tesla T4"
    assert found.remedy == "`maskrcnn build-plugins --arch 75`"
    (found,) = plugin_findings([H100])
    assert found.is_enough and found.found.endswith(str(path))


def test_libraries_of_other_sources_are_counted():
    store_library(Library.KERNELS, [90], sources="0" * 64)
    store_library(Library.KERNELS, [80], sources="1" * 64)
    build.store({"kernel": "batched_nms"}, "kernel.cubin", lambda path: path.write_text("machine code"))
    (found,) = plugin_findings([])
    assert (found.component, found.found[:29]) == ("older plugins", "2 compiled from other sources")


# The command


def test_the_command(run, road, onnx_file, monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "probe", lambda name: {"missing": True})
    write_engine(road / "model.fp16.engine", onnx_file)
    other = write_engine(tmp_path / "other.engine", onnx_file)
    code, out, _ = run("doctor", other)
    assert code == 0
    for path in ("runs/train-1/model.fp16.engine", str(other)):
        assert f"engine {path}" in out
    assert "CUDA of the driver" in out and "    to get it: `maskrcnn build-plugins`" in out
    expect_error(run("doctor", "nowhere"), "no file or folder nowhere")

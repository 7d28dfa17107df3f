"""The doctor answers whatever is missing or broken."""

import os

import numpy as np
import pytest

from maskrcnn.runtime import doctor
from maskrcnn.runtime.doctor import Finding, diagnose, report

COMPONENTS = {
    *("Python", "platform", "CPU", "torch", "torchvision", "CUDA GPU (torch)", "NVIDIA driver", "onnx"),
    *("onnxscript", "ONNX Runtime", "ONNX Runtime on CUDA", "ONNX Runtime on TensorRT", "OpenVINO"),
    *("TensorRT (Python)", "cuda-python", "PyCUDA", "c++", "cc", "cmake"),
    "pycocotools",
}


@pytest.fixture
def nothing_installed(monkeypatch):
    """A machine with Python and nothing else."""
    monkeypatch.setattr(doctor, "_facts_of", lambda name: {"error": "No module", "missing": True})
    monkeypatch.setattr(doctor.shutil, "which", lambda *_, **__: None)
    monkeypatch.setattr(doctor, "_first_line", lambda *_, **__: None)


@pytest.fixture
def library(tmp_path, monkeypatch):
    """Puts a module of the given source before the installed ones, in the processes that probe."""

    def write(name: str, source: str) -> None:
        (tmp_path / f"{name}.py").write_text(source)
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    return write


def by_component(findings: list[Finding]) -> dict[str, Finding]:
    return {finding.component: finding for finding in findings}


def test_this_machine():
    import torch

    findings = by_component(diagnose())
    assert set(findings) == COMPONENTS
    assert all(finding.enables and finding.remedy for finding in findings.values())
    assert findings["torch"].found.startswith(torch.__version__)
    assert findings["pycocotools"].found and findings["Python"].found and findings["CPU"].found
    assert "CPU " in findings["OpenVINO"].found and "FP32" in findings["OpenVINO"].found
    assert (findings["CUDA GPU (torch)"].found is not None) == torch.cuda.is_available()


def test_a_bare_machine(nothing_installed):
    findings = by_component(diagnose())
    assert set(findings) == COMPONENTS
    missing = {name for name, finding in findings.items() if finding.found is None}
    assert missing == COMPONENTS - {"Python", "platform", "CPU"}
    text = report(list(findings.values()))
    for name in missing:
        assert findings[name].enables in text and findings[name].remedy in text
    for command in ("pip install 'torch>=2.10'", "pip install 'openvino>=2025.3'", "pip install cmake"):
        assert command in text
    assert "unusable" not in text


def test_a_report_is_a_table():
    text = report([Finding("torch", "2.10", "training", "x"), Finding("nvcc", None, "plugins", "install it")])
    assert text.splitlines() == [
        "torch  2.10",
        "nvcc   missing",
        "         would enable: plugins",
        "         to get it: install it",
    ]
    assert report([]) == ""


def test_an_error_in_a_check_costs_that_check(nothing_installed, monkeypatch):
    def broken():
        raise RuntimeError("no such thing")

    monkeypatch.setattr(doctor, "_machine", broken)
    findings = by_component(diagnose())
    assert findings["doctor"].found == "a check failed (RuntimeError: no such thing)"
    assert COMPONENTS - {"Python", "platform", "CPU"} < set(findings)


def test_more_groups_are_reported_too(nothing_installed):
    def broken():
        raise OSError("no cache")

    more = Finding("compiled plugins", "/cache", "speed", "x")
    found = diagnose([lambda: [more], broken])
    assert more in found and {finding.component for finding in found} == COMPONENTS | {"compiled plugins", "doctor"}


@pytest.mark.parametrize(
    ("source", "error"),
    [
        ("raise RuntimeError('libfoo.so.3 is too old')", "RuntimeError: libfoo.so.3 is too old"),
        ("import a_part_that_is_not_there", "No module named 'a_part_that_is_not_there'"),
        ("import os; os.abort()", "its process ended with -6"),
        ("import sys; sys.exit(3)", "its process ended with 3"),
        ("import os; os._exit(0)", "no reason given"),
        ("import time; time.sleep(60)", "no answer within 2 s"),
        ("def", "SyntaxError"),
    ],
)
@pytest.mark.skipif(os.name != "posix", reason="exit codes of signals")
def test_a_broken_library(library, monkeypatch, source, error):
    library("onnxscript", source)
    monkeypatch.setattr(doctor, "TIMEOUT_S", 2.0)
    facts = doctor._facts_of("onnxscript")
    finding = doctor._library("onnxscript", facts, "export", "pip install onnxscript")
    assert finding.found is None
    assert f"pip install onnxscript (installed but unusable: {error}" in finding.remedy


def test_a_missing_library(library):
    library("pycuda", "raise ModuleNotFoundError('No module named pycuda', name='pycuda')")
    assert doctor._facts_of("pycuda") == {"error": "No module named pycuda", "missing": True}


def test_a_library_that_prints_nonsense(library):
    library("onnxscript", "print('hello'); print('{', end=''); __version__ = '0.9'")
    assert doctor._facts_of("onnxscript") == {"version": "0.9"}


def test_what_was_learnt_before_a_crash_is_kept(library):
    library(
        "tensorrt",
        "import os\n__version__ = '11.4'\nclass Logger:\n    ERROR = 1\n    def __init__(self, level): pass\n"
        "def Builder(logger): os.abort()",
    )
    facts = {"tensorrt": doctor._facts_of("tensorrt"), "cuda-python": {}, "pycuda": {}}
    assert doctor._tensorrt(facts, None)[0].found == "11.4, cannot build here: there is no NVIDIA driver"
    assert "its process ended with" in doctor._tensorrt(facts, "H100")[0].found


def test_a_folder_in_the_current_directory_is_no_library(tmp_path, monkeypatch):
    (tmp_path / "onnxscript").mkdir()
    (tmp_path / "onnxscript" / "__init__.py").write_text("__version__ = 'mine'")
    monkeypatch.chdir(tmp_path)
    assert doctor._facts_of("onnxscript").get("version") != "mine"


def test_listed_providers_are_not_taken_for_usable_ones():
    fallen = "ONNX Runtime fell back to the CPU"
    facts = {
        "onnx": {},
        "onnxscript": {},
        "onnxruntime": {
            "version": "1.31",
            "providers": {"CUDAExecutionProvider": fallen, "CPUExecutionProvider": ""},
        },
    }
    findings = by_component(doctor._onnx(facts, None))
    assert findings["ONNX Runtime on CUDA"].found is None
    assert "listed but unusable: there is no NVIDIA driver" in findings["ONNX Runtime on CUDA"].remedy
    assert "listed" not in findings["ONNX Runtime on TensorRT"].remedy
    findings = by_component(doctor._onnx(facts, "H100"))
    assert f"[cuda,cudnn]>=1.23' (the provider is listed but unusable: {fallen})" in (
        findings["ONNX Runtime on CUDA"].remedy
    )
    facts["onnxruntime"]["lacks"] = "libcudnn.so.9: cannot open shared object file"
    assert "unusable: libcudnn.so.9: cannot" in by_component(doctor._onnx(facts, "H100"))["ONNX Runtime on CUDA"].remedy
    facts["onnxruntime"]["providers"]["CUDAExecutionProvider"] = ""
    assert by_component(doctor._onnx(facts, "H100"))["ONNX Runtime on CUDA"].found == "can be created"


def test_the_model_that_providers_are_tried_with():
    import onnx
    import onnxruntime

    onnx.checker.check_model(onnx.load_from_string(doctor._tiny_model()), full_check=True)
    session = onnxruntime.InferenceSession(doctor._tiny_model(), providers=["CPUExecutionProvider"])
    assert session.run(None, {"x": np.float32([3])}) == [3]


def test_cpu_of_x86_and_arm_and_unknown(tmp_path):
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor\t: 0\nmodel name\t: Xeon 8481C\nflags\t\t: fpu avx2 amx_bf16\npower management:\n")
    assert doctor._cpu(str(cpuinfo)) == f"Xeon 8481C, {os.cpu_count()} logical cores: avx2 amx_bf16"
    cpuinfo.write_text("processor\t: 0\nFeatures\t: fp asimd bf16 i8mm\n")
    assert doctor._cpu(str(cpuinfo)).endswith(": asimd bf16 i8mm")
    assert "logical cores" in doctor._cpu(str(tmp_path / "none"))


def test_an_old_tensorrt_is_not_enough():
    facts = {"tensorrt": {"version": "10.3.0.26", "builder": True}, "cuda-python": {}, "pycuda": {}}
    found = doctor._tensorrt(facts, "H100")[0]
    assert (found.found, found.is_enough) == ("10.3.0.26, which is too old", False)
    assert report([found]).splitlines()[1:] == [
        f"{'':21}needed for: TensorRT engines on NVIDIA GPUs",
        f"{'':21}what to do: pip install -U 'tensorrt>=10.9' (downloads from pypi.nvidia.com)",
    ]
    facts["tensorrt"]["version"] = "10.16.1.0"
    assert doctor._tensorrt(facts, "H100")[0].is_enough


def test_what_a_library_says_of_itself(library):
    library("onnxscript", "__version__ = '0.9'")
    assert doctor.library_facts("onnxscript") == {"version": "0.9"}
    library("onnxscript", "raise ModuleNotFoundError('No module named onnxscript', name='onnxscript')")
    assert doctor.library_facts("onnxscript") == {}

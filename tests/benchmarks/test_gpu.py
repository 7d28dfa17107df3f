"""The checks that need a GPU, and the kernel exercise of compute-sanitizer with kernels compiled for the CPU."""

import ctypes
import dataclasses
import json
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import exercise
import gpu
import kernels_on_cpu
import numpy as np
import pytest
import run
import torch

from maskrcnn.plugins.native import Kernels


def test_without_a_gpu_nothing_is_written(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([str(tmp_path / "out")]) == 0
    assert "no CUDA GPU" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("check", "outcome", "why"),
    [
        (gpu.Check("fine", ("-c", "print('{out}')")), "passed", None),
        (gpu.Check("broken", ("-c", "raise SystemExit('no luck')")), "failed", "no luck"),
        (gpu.Check("slow", ("-c", "import time; time.sleep(60)"), limit_s=1), "failed", "stopped after 1 s"),
        (gpu.Check("lacking", ("-c", ""), ("no_such_package",)), "left out", "no package no_such_package"),
        (gpu.Check("tested", ("-c", "print('1 passed, 2 skipped')", "pytest")), "passed", None),
        (gpu.Check("skipped", ("-c", "print('2 skipped in 0.1s')", "pytest")), "left out", "2 skipped in 0.1s"),
    ],
)
def test_outcomes(tmp_path, check, outcome, why):
    found = gpu.run_check(check, tmp_path)
    assert (found["outcome"], found.get("why")) == (outcome, why)


def test_a_failed_check_fails_the_command(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "environment", dict)
    monkeypatch.setattr(gpu, "checks", lambda: [gpu.Check("a", ("-c", "")), gpu.Check("b", ("-c", "1/0"))])
    assert gpu.main([str(tmp_path), "--only", "a"]) == 0
    assert gpu.main([str(tmp_path), "--skip", "b"]) == 0
    assert gpu.main([str(tmp_path)]) == 1
    assert (tmp_path / "gpu.json").is_file()


def test_a_spent_budget_leaves_the_remaining_checks_out(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "environment", dict)
    monkeypatch.setattr(gpu, "MIN_S", 299)
    monkeypatch.setattr(gpu, "checks", lambda: [gpu.Check("a", ("-c", "import time; time.sleep(2)")),
                                                gpu.Check("b", ("-c", "1/0"))])  # fmt: skip
    assert gpu.main([str(tmp_path), "--budget-s", "300"]) == 0
    found = json.loads((tmp_path / "gpu.json").read_text())["checks"]
    assert [(each["name"], each["outcome"]) for each in found] == [("a", "passed"), ("b", "left out")]


def test_a_check_stopped_by_the_budget_is_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "environment", dict)
    monkeypatch.setattr(gpu, "MIN_S", 0)
    monkeypatch.setattr(gpu, "checks", lambda: [gpu.Check("a", ("-c", "import time; time.sleep(60)"))])
    assert gpu.main([str(tmp_path), "--budget-s", "0.5"]) == 0
    (found,) = json.loads((tmp_path / "gpu.json").read_text())["checks"]
    assert found["outcome"] == "left out" and "the time budget was spent" in found["why"]


class CpuMemory:
    """Host memory in place of a GPU's, for kernels compiled for the CPU."""

    def __init__(self) -> None:
        self.kept: list[np.ndarray] = []

    def upload(self, values: np.ndarray) -> int:
        self.kept.append(np.array(values, order="C"))
        return self.kept[-1].ctypes.data

    def allocate(self, size: int) -> int:
        return self.upload(np.full(max(size, 1), 0xA5, np.uint8))

    def download(self, address: int, shape: tuple[int, ...], dtype: type) -> np.ndarray:
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        return np.frombuffer(ctypes.string_at(address, size), dtype).reshape(shape)


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    if kernels_on_cpu.compiler() is None:
        pytest.skip("no C++ compiler")
    return Kernels(kernels_on_cpu.build(tmp_path_factory.mktemp("kernels"), MASKRCNN_NMS_THREADS=128))


@pytest.mark.slow
def test_exercise_calls_every_kernel(kernels):
    lines = []
    exercise.exercise_kernels(kernels, CpuMemory(), lines.append)
    assert {line.split()[0] for line in lines} == {"RoIAlign", "NMS", "paste"}


def test_exercise_stops_at_a_wrong_result(kernels_for_cpu, monkeypatch):
    right = Kernels.batched_nms
    monkeypatch.setattr(Kernels, "batched_nms", lambda *a, **k: right(*a, **{**k, "iou_threshold": 0.9}))
    with pytest.raises(AssertionError):
        exercise.exercise_kernels(Kernels(kernels_for_cpu), CpuMemory(), lambda line: None)


def test_output_of_a_sanitizer_tool_is_written(tmp_path, monkeypatch):
    tool = tmp_path / "compute-sanitizer"
    tool.write_text('#!/bin/sh\necho "ERROR SUMMARY: 3 errors ($2)"\nexit $4\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert exercise.run_under("memcheck", tmp_path / "found.txt") == 1
    assert "3 errors (memcheck)" in (tmp_path / "found.txt").read_text()


def test_full_size_exercise_stays_inside_its_arrays(kernels_for_cpu, monkeypatch):
    monkeypatch.setattr(exercise, "_SIZE_HW", (64, 96))
    monkeypatch.setattr(exercise, "_CHANNELS", 8)
    memory = CpuMemory()
    exercise.launch_at_full_size(Kernels(kernels_for_cpu), memory)
    pooled = memory.kept[4]  # after the four maps
    assert pooled.nbytes == 1000 * 8 * 7 * 7 * 2 and not (pooled == 0xA5).all()


def test_files_that_cannot_be_imported_do_not_hide_failed_tests(tmp_path):
    options = (
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "--continue-on-collection-errors",
        f"--rootdir={tmp_path}",
    )
    check = gpu.Check("tests", (*options, "-c", "/dev/null", str(tmp_path)))
    (tmp_path / "test_a.py").write_text("import no_such_package\n")
    (tmp_path / "test_b.py").write_text("def test_b(): pass\n")
    assert gpu.run_check(check, tmp_path)["outcome"] == "passed"
    (tmp_path / "test_b.py").write_text("def test_b(absent_fixture): pass\n")
    assert gpu.run_check(check, tmp_path)["outcome"] == "failed"
    (tmp_path / "test_b.py").write_text("def test_b(): assert False\n")
    assert gpu.run_check(check, tmp_path)["outcome"] == "failed"


def test_the_checks_are_commands_that_exist_and_fit_in_the_time_of_their_call():
    for check in gpu.checks():
        script, *options = check.command
        assert check.limit_s < 600 and (
            not script.endswith(".py") or (Path(gpu.__file__).parents[1] / script).is_file()
        )
        if script == "benchmarks/run.py":
            run.parse(options)
    for call in (1, 2):
        assert sum(check.limit_s for check in gpu.checks() if call in check.calls) <= gpu.CALL_S


def test_dry_run_starts_the_checks_in_order_and_archives_their_output(tmp_path, capsys, monkeypatch):
    out, names = tmp_path / "out", ["memcheck", "environment", "build-plugins"]
    checks = [dataclasses.replace(check, limit_s=120) for check in gpu.checks() if check.name in names]
    monkeypatch.setattr(gpu, "checks", lambda: checks)
    assert gpu.main([str(out), "--dry-run", "--only", *names]) == 0
    with tarfile.open(tmp_path / "out.tar.gz") as content:
        assert {"gpu.json", "environment.json", "memcheck.txt", "build-plugins.txt"} <= set(content.getnames())
        found = json.load(content.extractfile("gpu.json"))["checks"]
    assert [(each["name"], each["outcome"]) for each in found] == [
        ("environment", "passed"), ("build-plugins", "passed"), ("memcheck", "passed")
    ]  # fmt: skip
    assert "to carry" in capsys.readouterr().out


def test_dry_run_refuses_a_call_that_takes_too_long_and_a_check_that_does_not_start(tmp_path, capsys, monkeypatch):
    broken = gpu.Check("broken", ("-c", "import openvino"), limit_s=600, calls=(1,))
    monkeypatch.setattr(gpu, "checks", lambda: [broken])
    assert gpu.main([str(tmp_path / "out"), "--dry-run"]) == 1
    printed = capsys.readouterr().out
    assert "call 1: the limits sum to 600 s" in printed and "broken  failed" in printed


def test_an_uninstalled_checkout_and_wheels_are_importable(tmp_path):
    wheels, folder = tmp_path / "wheels", tmp_path / "site"
    wheels.mkdir(), folder.mkdir()
    with zipfile.ZipFile(wheels / "carried_part-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("carried_part/__init__.py", "")
    script = (
        f"import gpu, pathlib, subprocess, sys; v = gpu.use_checkout(pathlib.Path({str(folder)!r}), "
        f"pathlib.Path({str(wheels)!r}), ['openvino']); code = 'import carried_part, maskrcnn.plugins.reference, "
        "maskrcnn.runtime.doctor as d; print(d.__file__); import openvino'; "
        "sys.exit(subprocess.run([sys.executable, '-c', code], env=v).returncode)"
    )
    # Without .pth files, hence without the installed package; its dependencies are on the path.
    paths = os.pathsep.join([str(Path(gpu.__file__).parent), *(p for p in sys.path if p.endswith("site-packages"))])
    python = Path(sys.base_prefix) / "bin" / "python3"
    done = subprocess.run(
        [python, "-c", script], env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True
    )
    assert str(folder / "maskrcnn" / "runtime") in done.stdout
    assert "ModuleNotFoundError: import of openvino halted" in done.stderr

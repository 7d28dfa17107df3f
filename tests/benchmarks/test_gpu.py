"""The command that runs what needs a GPU."""

import json

import gpu
import pytest
import run
import torch


def test_without_a_gpu_it_says_so_and_writes_nothing(tmp_path, capsys, monkeypatch):
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
    found = gpu.run(check, tmp_path)
    assert (found["outcome"], found.get("why")) == (outcome, why)


def test_a_failed_check_fails_the_command(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "environment", dict)
    monkeypatch.setattr(gpu, "checks", lambda: [gpu.Check("a", ("-c", "")), gpu.Check("b", ("-c", "1/0"))])
    assert gpu.main([str(tmp_path), "--only", "a"]) == 0
    assert gpu.main([str(tmp_path), "--skip", "b"]) == 0
    assert gpu.main([str(tmp_path)]) == 1
    assert (tmp_path / "gpu.json").is_file()


def test_a_spent_budget_leaves_the_rest_out(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "environment", dict)
    monkeypatch.setattr(gpu, "LEAST_S", 1)
    monkeypatch.setattr(gpu, "checks", lambda: [gpu.Check("a", ("-c", "import time; time.sleep(2)")),
                                                gpu.Check("b", ("-c", "1/0"))])  # fmt: skip
    assert gpu.main([str(tmp_path), "--budget-s", "2.9"]) == 0
    found = json.loads((tmp_path / "gpu.json").read_text())["checks"]
    assert [(each["name"], each["outcome"]) for each in found] == [("a", "passed"), ("b", "left out")]


def test_a_check_that_the_budget_cuts_off_has_not_failed(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "environment", dict)
    monkeypatch.setattr(gpu, "LEAST_S", 0)
    monkeypatch.setattr(gpu, "checks", lambda: [gpu.Check("a", ("-c", "import time; time.sleep(60)"))])
    assert gpu.main([str(tmp_path), "--budget-s", "0.5"]) == 0
    (found,) = json.loads((tmp_path / "gpu.json").read_text())["checks"]
    assert found["outcome"] == "left out" and "the time budget was spent" in found["why"]


def test_what_is_promised_is_checked():
    checks = {check.name: check for check in gpu.checks()}
    assert "tensorrt" in checks["tensorrt"].packages
    assert checks["tensorrt"].command[-3:] == ("-m", "tensorrt", "tests")
    for batch in (1, 8, 16):
        script, *options = checks[f"latency-{batch}"].command
        given = run.parse(options)
        assert script == "benchmarks/run.py" and given.workload == "resnet50" and given.gpu_only
        assert (given.size, given.batch) == ([(800, 1344)], (batch,))
        assert given.output.name == f"latency-{batch}" and given.repeat
    assert all(check.limit_s < 600 for check in checks.values())


def test_the_files_that_it_runs_exist():
    scripts = [check.command[0] for check in gpu.checks() if check.command[0].endswith(".py")]
    assert scripts and all((gpu.ROOT / script).is_file() for script in scripts)

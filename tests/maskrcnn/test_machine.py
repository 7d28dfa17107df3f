"""CPUs that a process may use."""

import math
import os

import pytest

from maskrcnn import machine


@pytest.mark.parametrize(
    ("own", "files", "quota"),
    [
        ("0::/", {"cpu.max": "150000 100000\n"}, 1.5),
        ("0::/", {"cpu.max": "max 100000\n"}, math.inf),
        ("0::/pod/app", {"pod/cpu.max": "200000 100000", "pod/app/cpu.max": "max 100000"}, 2),  # a parent's limit
        ("0::/pod/app", {"cpu.max": "300000 100000"}, 3),  # mounted as the root of a container
        (
            "4:cpu,cpuacct:/x",
            {"cpu,cpuacct/x/cpu.cfs_quota_us": "50000", "cpu,cpuacct/x/cpu.cfs_period_us": "100000"},
            0.5,
        ),
        ("4:cpuacct,cpu:/", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, math.inf),
        ("5:memory:/x\nnonsense\n", {"memory/x/cpu.max": "100000 100000"}, math.inf),
        ("0::/", {"cpu.max": "nonsense"}, math.inf),
    ],
)
def test_the_quota_of_the_control_groups(tmp_path, own, files, quota):
    (tmp_path / "own").write_text(own)
    for name, text in files.items():
        path = tmp_path / "mount" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert machine.cpu_quota(tmp_path / "mount", tmp_path / "own") == quota


@pytest.mark.parametrize(("quota", "expected"), [(math.inf, 6), (2.5, 3), (0.2, 1), (40, 6)])
def test_cpus_are_bounded_by_affinity_and_quota(monkeypatch, quota, expected):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(2, 8)), raising=False)
    monkeypatch.setattr(machine, "cpu_quota", lambda: quota)
    assert machine.available_cpus() == expected
    assert 1 <= machine.available_cores() <= expected

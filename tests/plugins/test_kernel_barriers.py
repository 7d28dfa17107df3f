"""Each barrier of the kernels is necessary: without it the emulated GPU gives results that depend on the order of
threads, or ends the process with a message."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import kernel_probe
import pytest
from kernels_on_cpu import CSRC, ORDERS, build

BARRIER = re.compile(r"__syncthreads\(\);")
SMALL = {"MASKRCNN_NMS_THREADS": 128, "MASKRCNN_NMS_KEPT": 3}


def kernel_of(op: str) -> Path:
    """The source that contains an op's barriers, relative to csrc."""
    return Path(op) / "kernel.cuh"


def barriers() -> list[tuple[str, int]]:
    """(op, index) of every barrier."""
    counts = {op: len(BARRIER.findall((CSRC / kernel_of(op)).read_text())) for op in kernel_probe.PROBES}
    return [(op, number) for op, count in counts.items() for number in range(count)]


def probe(op: str, csrc: Path, folder: Path, rest: Path) -> tuple[int, list[str]]:
    """Compiles and runs an op; returns the exit status and a hash of the results for each order of threads."""
    library = build(folder, csrc=csrc, sources=[f"{op}/launch.cu"], beside=rest, optimise=0, **SMALL)
    command = [sys.executable, kernel_probe.__file__, str(library), op]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    return done.returncode, [line.split()[1] for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def intact(kernels_for_cpu, tmp_path_factory) -> dict[str, str]:
    """Hash of the unchanged kernels of each op."""
    hashes = {}
    for op in kernel_probe.PROBES:
        status, found = probe(op, CSRC, tmp_path_factory.mktemp(op), kernels_for_cpu)
        assert status == 0 and len(found) == len(ORDERS) and len(set(found)) == 1
        hashes[op] = found[0]
    return hashes


@pytest.mark.parametrize(("op", "number"), barriers())
def test_a_kernel_without_a_barrier_is_caught(intact, kernels_for_cpu, tmp_path, op, number):
    csrc = tmp_path / "csrc"
    shutil.copytree(CSRC, csrc)
    source = csrc / kernel_of(op)
    text = source.read_text()
    place = list(BARRIER.finditer(text))[number]
    source.write_text(text[: place.start()] + text[place.end() :])
    status, found = probe(op, csrc, tmp_path, kernels_for_cpu)
    assert status != 0 or set(found) != {intact[op]}

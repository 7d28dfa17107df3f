"""Libraries: the compiler's command, the cache, concurrent builds, and finding them without a compiler."""

import ctypes
import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from bare_machine import WRITE_ARGUMENTS, add_nvcc, add_program

from maskrcnn.errors import UserError
from maskrcnn.plugins import build, native
from maskrcnn.plugins.build import build_library, cached_library, find_library
from maskrcnn.plugins.toolchain import Nvcc, TensorRtHeaders, Toolchain, find_toolchain

KNOWN = (80, 86, 90, 120)
posix = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="libraries are built on Linux")
pytestmark = posix


@pytest.fixture(autouse=True)
def cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("MASKRCNN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "plugins"


@pytest.fixture
def toolchain(tmp_path) -> Toolchain:
    """A toolchain with an nvcc that writes its arguments instead of a library."""
    nvcc = Nvcc(add_nvcc(tmp_path / "bin" / "nvcc", body=WRITE_ARGUMENTS), "13.0.88", KNOWN)
    headers = TensorRtHeaders(tmp_path / "include", "11.0.0")
    return Toolchain(nvcc=nvcc, host_compiler=Path("/usr/bin/g++"), tensorrt=headers)


@pytest.fixture
def sources(monkeypatch, tmp_path) -> Path:
    """A copy of the sources that a test may change."""
    shutil.copytree(build.SOURCES, tmp_path / "csrc")
    monkeypatch.setattr(build, "SOURCES", tmp_path / "csrc")
    return tmp_path / "csrc"


def calls(toolchain: Toolchain) -> int:
    """Number of runs of the compiler."""
    path = toolchain.nvcc.path.with_name("calls")
    return len(path.read_text().splitlines()) if path.exists() else 0


def sources_in(words: list[str]) -> set[str]:
    """Sources among the arguments of the compiler, relative to csrc."""
    paths = [Path(word) for word in words if word.startswith(str(build.SOURCES))]
    return {path.relative_to(build.SOURCES).as_posix() for path in paths}


def test_the_command(toolchain, tmp_path):
    words = build_library("kernels", arch=(90, 80), toolchain=toolchain).read_text().splitlines()
    codes = [words[i + 1] for i, word in enumerate(words) if word == "-gencode"]
    assert codes == ["arch=compute_80,code=sm_80", "arch=compute_90,code=sm_90", "arch=compute_90,code=compute_90"]
    assert words[words.index("-ccbin") + 1] == "/usr/bin/g++"
    compiled = sources_in(words)
    assert {"multilevel_roi_align/launch.cu", "batched_nms/launch.cu", "errors.cu"} <= compiled
    assert not [name for name in compiled if not name.endswith(".cu") or name.endswith("aot.cu")]
    words = build_library("plugins", arch=(90,), toolchain=toolchain).read_text().splitlines()
    assert words[words.index("-isystem") + 1] == str(tmp_path / "include")
    sources = {"multilevel_roi_align/launch.cu", "multilevel_roi_align/plugin.cpp", "batched_nms/plugin.cpp"}
    assert sources <= sources_in(words)


def test_a_library_is_compiled_once(toolchain, cache_folder):
    assert cached_library("kernels", arch=(90,), toolchain=toolchain) is None
    first = build_library("kernels", arch=(90,), toolchain=toolchain)
    assert first.parent.parent == cache_folder and first.name == "libmaskrcnn_kernels.so"
    assert build_library("kernels", arch=(90,), toolchain=toolchain) == first
    assert cached_library("kernels", arch=(90,), toolchain=toolchain) == first
    assert calls(toolchain) == 1
    assert build_library("kernels", arch=(90,), toolchain=toolchain, force=True) == first
    assert calls(toolchain) == 2
    assert [path.name for path in cache_folder.iterdir()] == [first.parent.name]


def test_a_change_of_any_dependency_makes_another_library(toolchain, sources):
    first = build_library("plugins", arch=(90,), toolchain=toolchain)
    newer = replace(toolchain, nvcc=replace(toolchain.nvcc, version="13.2.1"))
    other_headers = replace(toolchain, tensorrt=replace(toolchain.tensorrt, version="10.9.0"))
    other_host = replace(toolchain, host_compiler=Path("/usr/bin/clang++"))
    made = {first, build_library("plugins", arch=(80, 90), toolchain=toolchain)}
    made |= {build_library("plugins", arch=(90,), toolchain=other) for other in (newer, other_headers, other_host)}
    for name in ("batched_nms/kernel.cuh", "tensorrt/library.cpp", "errors.cu"):
        path = sources / name
        path.write_text(path.read_text() + "// changed\n")
        made.add(build_library("plugins", arch=(90,), toolchain=toolchain))
    assert len(made) == 8
    (sources / "README.md").write_text("changed")
    (sources / "batched_nms" / "aot.cu").write_text("// changed")
    assert build_library("plugins", arch=(90,), toolchain=toolchain) in made


def test_the_registering_library_is_built_beside_the_plugins(toolchain, tmp_path):
    path = build_library("plugins", arch=(90,), toolchain=toolchain)
    words = path.with_name("libmaskrcnn_plugins_register.so").read_text().splitlines()
    assert "-DMASKRCNN_REGISTER_WHEN_LOADED" in words
    assert "WHEN_LOADED" in (build.SOURCES / "tensorrt" / "register.cpp").read_text()
    copied = build_library("plugins", arch=(90,), toolchain=toolchain, out=tmp_path / "out")
    assert copied == tmp_path / "out" / "libmaskrcnn_plugins.so" and copied.read_bytes() == path.read_bytes()
    assert {p.name for p in (tmp_path / "out").iterdir()} == {copied.name, "libmaskrcnn_plugins_register.so"}


def test_a_compiler_that_fails(toolchain, cache_folder):
    lines = "; ".join(f"echo line {number} >&2" for number in range(100))
    nvcc = add_nvcc(toolchain.nvcc.path, body=f"{lines}; exit 3")
    with pytest.raises(UserError) as caught:
        build_library("kernels", arch=(90,), toolchain=toolchain)
    assert caught.value.found.startswith(f"{nvcc} failed with code 3 on libmaskrcnn_kernels.so:\n")
    assert "line 99" in caught.value.found and "line 70" not in caught.value.found
    assert list(cache_folder.iterdir()) == []
    with pytest.raises(UserError, match="failed with code 0"):
        build_library(
            "kernels", arch=(90,), toolchain=replace(toolchain, nvcc=replace(toolchain.nvcc, path=true(nvcc)))
        )


def true(nvcc: Path) -> Path:
    """A compiler that succeeds without writing a file."""
    return add_program(nvcc.with_name("true"), "exit 0")


@pytest.mark.parametrize(
    ("kind", "missing", "sentence"),
    [
        ("kernels", "nvcc", "no nvcc on this machine"),
        ("kernels", "host_compiler", r"no C\+\+ compiler on this machine"),
        ("plugins", "tensorrt", "no TensorRT headers on this machine"),
    ],
)
def test_a_missing_requirement(toolchain, kind, missing, sentence):
    lacking = replace(toolchain, **{missing: None})
    assert str(build.obstacle(kind, lacking)) in map(str, lacking.absences)
    with pytest.raises(UserError, match=f"{sentence}\n.*\n  fix: "):
        build_library(kind, arch=(90,), toolchain=lacking)
    assert build.obstacle(kind, toolchain) is None


def test_architectures(toolchain):
    assert build.architectures(toolchain, (90, 80, 90)) == (80, 90)
    assert build.architectures(toolchain) == (80, 86, 90, 120)  # the common ones that nvcc supports
    assert build.architectures(replace(toolchain, gpus=(86, 90))) == (86, 90)
    assert build.architectures(replace(toolchain, gpus=(103,))) == (90,)  # newer than nvcc: PTX
    with pytest.raises(UserError, match="architecture 75, 121\n  expected: some of 80, 86, 90, 120"):
        build.architectures(toolchain, (75, 80, 121))


@pytest.mark.parametrize(
    ("compiled_for", "arch", "runs"),
    [((80,), 86, True), ((86,), 80, False), ((80,), 90, True), ((75, 90), 86, False), ((90,), 120, True)],
)
def test_which_gpus_run_a_library(compiled_for, arch, runs):
    assert build.runs_on(compiled_for, arch) == runs


def test_a_library_is_found_without_a_compiler(toolchain, sources):
    assert find_library("kernels", 90) is None
    old = build_library("kernels", arch=(80,), toolchain=toolchain)
    assert find_library("kernels") == find_library("kernels", 80) == find_library("kernels", 90) == old
    assert find_library("plugins", 80) is find_library("kernels", 75) is None
    exact = build_library("kernels", arch=(80, 90), toolchain=toolchain)
    assert find_library("kernels", 90) == exact
    build_library("kernels", arch=(86,), toolchain=toolchain)
    assert find_library("kernels", 90) == exact  # although a newer one would run too
    path = sources / "device.h"
    path.write_text(path.read_text() + "\n")
    assert find_library("kernels", 90) is None


def test_plugins_are_found_by_the_major_version_of_tensorrt(toolchain):
    older = replace(toolchain, tensorrt=replace(toolchain.tensorrt, version="10.9.0"))
    for_10 = build_library("plugins", arch=(90,), toolchain=older)
    assert find_library("plugins", 90) == find_library("plugins", 90, tensorrt="10.16.1.11") == for_10
    assert find_library("plugins", 90, tensorrt="11.4.0.106") is None
    for_11 = build_library("plugins", arch=(80,), toolchain=toolchain)
    assert find_library("plugins", 90, tensorrt="11.4.0.106") == for_11
    assert find_library("plugins", 90, tensorrt="10.16.1.11") == for_10


def test_foreign_folders_in_the_cache_are_ignored(toolchain, cache_folder):
    path = build_library("kernels", arch=(90,), toolchain=toolchain)
    for name, text in (("a", "{"), ("b", "{}"), ("c", json.dumps({"library": "kernels"}))):
        (cache_folder / name).mkdir()
        (cache_folder / name / build.RECORD).write_text(text)
    assert find_library("kernels", 90) == path
    path.unlink()
    assert find_library("kernels", 90) is None
    assert build_library("kernels", arch=(90,), toolchain=toolchain) == path and path.is_file()


def test_concurrent_builds(toolchain, cache_folder, tmp_path):
    add_nvcc(toolchain.nvcc.path, body=f"sleep 0.4; {WRITE_ARGUMENTS}")
    code = (
        "from pathlib import Path\n"
        "from maskrcnn.plugins import build\n"
        "from maskrcnn.plugins.toolchain import Nvcc, Toolchain\n"
        f"nvcc = Nvcc(Path({str(toolchain.nvcc.path)!r}), '13.0.88', {KNOWN})\n"
        "found = Toolchain(nvcc=nvcc, host_compiler=Path('/usr/bin/g++'))\n"
        "print(build.build_library('kernels', arch=(90,), toolchain=found))\n"
    )
    running = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(3)]
    paths = {process.communicate()[0].strip() for process in running}
    assert [process.returncode for process in running] == [0, 0, 0]
    (path,) = paths
    assert Path(path).read_text().splitlines()[0] == "-shared"
    assert [entry.name for entry in cache_folder.iterdir()] == [Path(path).parent.name]


def test_a_cache_that_cannot_be_written(toolchain, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("MASKRCNN_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match="cannot be created"):
        build_library("kernels", arch=(90,), toolchain=toolchain)
    assert find_library("kernels", 90) is None

    def refuse(**_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setenv("MASKRCNN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(build.tempfile, "mkdtemp", refuse)
    with pytest.raises(UserError, match=r"cannot be written to .Permission denied(.|\n)*fix:      set MASKRCNN_CACHE"):
        build_library("kernels", arch=(90,), toolchain=toolchain)


def test_the_kernels_compiled_by_nvcc():
    toolchain = find_toolchain()
    if missing := build.obstacle("kernels", toolchain):
        pytest.skip(f"{missing}")
    newest = max(toolchain.nvcc.architectures)
    path = build_library("kernels", arch=(newest,), toolchain=toolchain)
    library = ctypes.CDLL(str(path))  # loads without a GPU: the CUDA runtime is linked statically
    declared = re.findall(r"MASKRCNN_EXPORT\b[^;]*?\b(maskrcnn_\w+)\(", (build.SOURCES / "kernels.h").read_text())
    assert {"maskrcnn_batched_nms", "maskrcnn_multilevel_roi_align"} <= set(declared)
    assert all(hasattr(library, name) for name in declared)
    assert library.maskrcnn_kernels_version() == native.INTERFACE_VERSION
    assert find_library("kernels", newest) == path

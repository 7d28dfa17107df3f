"""`maskrcnn build-plugins`: what is compiled, what is left out and why; and the plugins in `maskrcnn doctor`."""

import sys
from types import SimpleNamespace

import pytest
from bare_machine import WRITE_ARGUMENTS, add_nvcc, add_program, strip
from command_line import expect_error

from maskrcnn.api.plugins import build_plugins
from maskrcnn.errors import UserError
from maskrcnn.plugins.aot_kernels import usual_kernels
from maskrcnn.runtime import doctor

KERNELS, PLUGINS, REGISTER = (f"libmaskrcnn_{name}.so" for name in ("kernels", "plugins", "plugins_register"))
AOT = "ahead-of-time kernels"
pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="libraries are built on Linux")


@pytest.fixture
def programs(monkeypatch, tmp_path):
    """All of PATH on a machine that has nothing, and a cache that has nothing."""
    monkeypatch.setenv("MASKRCNN_CACHE", str(tmp_path / "cache"))
    return strip(monkeypatch, tmp_path)


@pytest.fixture
def toolkit(programs):
    """With nvcc, which writes its arguments instead of what it is asked for, and a host compiler."""
    add_program(programs / "g++", "exit 0")
    add_nvcc(programs / "nvcc", architectures="75 80 90 120", body=f"PATH=/usr/bin:/bin; {WRITE_ARGUMENTS}")
    return programs


@pytest.fixture
def headers(tmp_path):
    folder = tmp_path / "TensorRT" / "include"
    folder.mkdir(parents=True)
    (folder / "NvInfer.h").touch()
    (folder / "NvInferVersion.h").write_text("#define NV_TENSORRT_MAJOR 11\n#define NV_TENSORRT_MINOR 1\n")
    return folder


def rows(out: str) -> dict[str, str]:
    """The table: what it says behind each name."""
    names = (KERNELS, PLUGINS, AOT)
    return {
        name: line.removeprefix(name).strip() for line in out.splitlines() for name in names if line.startswith(name)
    }


def test_a_machine_with_nothing(run, programs):
    result = run("build-plugins")
    expect_error(result, "Error: no nvcc; no NVRTC\n", "pip install nvidia-cuda-nvcc", "nvidia-cuda-nvrtc")
    table = rows(result[1])
    assert set(table) == {KERNELS, PLUGINS, AOT}
    assert all(text.startswith("left out") and "to get it: " in text for text in table.values())
    assert "as there is no GPU here" in result[1]


def test_everything(run, toolkit, headers, tmp_path):
    code, out, err = run("build-plugins", "--tensorrt-include", headers, "--out", tmp_path / "out")
    assert code == 0, err
    table = rows(out)
    assert all(text.startswith(("built in", "compiled in")) for text in table.values())
    assert "nvcc 13.0.88 at" in out and "TensorRT headers 11.1 in" in out
    assert "sm_75 sm_80 sm_90 sm_120" in table[KERNELS] and str(tmp_path / "out" / PLUGINS) in table[PLUGINS]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {KERNELS, PLUGINS, REGISTER}
    assert f"{8 * 4} as ptx by nvcc 13.0.88" in table[AOT]
    code, out, err = run("build-plugins", "--tensorrt-include", headers)
    assert code == 0 and all(text.startswith("from the cache") for text in rows(out).values())
    code, out, err = run("build-plugins", "--tensorrt-include", headers, "--force", "--arch", "90")
    assert all(text.startswith(("built in", "compiled in")) for text in rows(out).values())
    code, out, err = run("build-plugins", "--tensorrt-include", headers, "--arch", "90")
    assert all(text.startswith("from the cache") for text in rows(out).values())


def test_everything_that_can_be_compiled_is(run, toolkit):
    code, out, err = run("build-plugins", "--arch", "80, 90")
    assert code == 0, err
    table = rows(out)
    assert table[KERNELS].startswith("built in") and "sm_80 sm_90" in table[KERNELS]
    assert table[PLUGINS].startswith("left out") and "no TensorRT headers; to get it: `apt install" in table[PLUGINS]


@pytest.mark.parametrize(
    ("form", "names", "missing"),
    [("kernels", {KERNELS}, None), ("library", {KERNELS, PLUGINS}, "TensorRT headers"), ("aot", {AOT}, None)],
)
def test_a_named_form_must_compile(run, toolkit, form, names, missing):
    result = run("build-plugins", "--form", form, "--arch", "90")
    assert set(rows(result[1])) == names
    if missing:
        expect_error(result, f"no {missing}\n", "trtexec, Triton")
        assert rows(result[1])[KERNELS].startswith("built in")  # the rest is built all the same
    else:
        assert result[0] == 0, result[2]


def test_without_nvcc_the_kernels_of_aot_plugins_are_compiled_by_nvrtc(run, monkeypatch, tmp_path):
    real = pytest.importorskip("cuda.bindings.nvrtc", exc_type=ImportError)
    try:
        real.nvrtcVersion()
    except Exception as error:
        pytest.skip(f"NVRTC does not load: {error}")
    strip(monkeypatch, tmp_path)
    monkeypatch.setenv("MASKRCNN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(sys.modules, "cuda.bindings", SimpleNamespace(nvrtc=real))
    code, out, err = run("build-plugins", "--arch", "80,90")
    assert code == 0, err
    table = rows(out)
    assert table[KERNELS].startswith("left out") and table[PLUGINS].startswith("left out")
    assert table[AOT].startswith("compiled in") and "16 as ptx by NVRTC" in table[AOT] and "sm_80 sm_90" in table[AOT]
    expect_error(run("build-plugins", "--form", "library"), "no nvcc")


def test_the_gpu_of_this_machine(run, toolkit):
    add_program(toolkit / "nvidia-smi", "echo 9.0")
    code, out, err = run("build-plugins", "--arch", "native")
    assert code == 0, err
    table = rows(out)
    assert "GPU: sm_90" in out and "  sm_90  " in table[KERNELS] and table[AOT].endswith("sm_90")


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (("--arch", "native"), ("--arch native without a GPU", "--arch 80,90")),
        (("--arch", "ninety"), ("--arch ninety", "for example --arch 80,90")),
        (("--arch", "50"), ("architecture 50", "75, 80, 90, 120")),
        (("--tensorrt-include", "nowhere"), ("no NvInfer.h in nowhere", "libnvinfer-headers-dev")),
    ],
)
def test_invalid_options(run, toolkit, options, parts):
    expect_error(run("build-plugins", *options), *parts)


def test_a_compiler_that_fails_is_quoted(run, toolkit):
    add_nvcc(toolkit / "nvcc", body="echo 'kernel.cuh(3): error: expected a ;'; exit 2")
    expect_error(run("build-plugins"), "failed with code 2", "kernel.cuh(3): error: expected a ;")


def test_the_doctor_lists_compilers_and_compiled_plugins(run, toolkit, monkeypatch):
    monkeypatch.setattr(doctor, "probe", lambda name: {"missing": True})
    found = {finding.component: finding for finding in doctor.diagnose()}
    assert found["nvcc"].found == f"13.0.88 at {toolkit / 'nvcc'}"
    assert [found[name].found for name in ("NVRTC", "TensorRT headers", "compiled plugins")] == [None] * 3
    assert found["compiled plugins"].remedy == "`maskrcnn build-plugins`"
    assert run("build-plugins", "--form", "kernels")[0] == 0
    assert {finding.component: finding for finding in doctor.diagnose()}["compiled plugins"].found.endswith(KERNELS)


def test_each_kernel_that_is_compiled_is_of_another_kind():
    kinds = {(kernel.name, *sorted(kernel.defines.items())) for kernel in usual_kernels()}
    assert len(kinds) == len(usual_kernels()) == 8


def test_an_unknown_form_is_an_error(run, toolkit):
    code, _, err = run("build-plugins", "--form", "wheel")
    assert code == 2 and "--form" in err and "'wheel'" in err
    with pytest.raises(UserError, match="--form wheel"):
        build_plugins("wheel")


def test_the_python_function(toolkit):
    result = build_plugins("kernels", arch="90")
    assert list(result.built) == [KERNELS] and result.built[KERNELS].startswith("built in") and not result.left_out
    assert "nvcc 13.0.88" in result.compilers

"""Compatibility of TensorRT, GPU, plugins and engines, and the errors if they do not fit."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from maskrcnn.errors import UserError
from maskrcnn.imaging.preprocess import Preprocessing
from maskrcnn.metadata import ModelMetadata
from maskrcnn.plugins import build as cache
from maskrcnn.plugins.build import Library
from maskrcnn.runtime.backends import tensorrt_library
from maskrcnn.runtime.backends.tensorrt_library import Gpu, PluginForm, check_stamp, plugin_hash

TRT = SimpleNamespace(__version__="11.4.0.106")
HERE = {"trt": TRT, "gpu": "NVIDIA H200", "compute_capability": (9, 0)}
STAMP = {
    "target": "tensorrt",
    "gpu": "NVIDIA H200",
    "compute_capability": "9.0",
    "tensorrt": "11.4.0.106",
    "plugins": "aot",
    "plugin_hash": "of another version",
    "hardware_compatibility": "none",
    "version_compatible": "no",
    "command": "maskrcnn build-engine m.onnx --fp16 --target tensorrt",
}


def refusal(**changes) -> UserError | None:
    """The error for an engine with this stamp; None if it fits."""
    metadata = ModelMetadata(
        model="m",
        class_names=("a",),
        category_ids=(1,),
        preprocessing=Preprocessing(),
        detections=100,
        stamp={key: value for key, value in {**STAMP, **changes}.items() if value is not None},
    )
    return check_stamp(metadata, **HERE)


def test_an_engine_for_this_machine_fits():
    assert refusal() is None
    # The kernels are in the engine, so changes of their sources do not matter.
    assert refusal(plugin_hash=None) is None


@pytest.mark.parametrize(
    ("field", "value", "here"),
    [
        ("tensorrt", "11.3.0.99", "11.4.0.106"),
        ("tensorrt", "10.16.1.11", "11.4.0.106"),
        ("gpu", "NVIDIA H100 PCIe", "NVIDIA H200"),
        ("compute_capability", "8.9", "9.0"),
    ],
)
def test_the_field_that_differs_is_named_with_both_values_and_the_command(field, value, here):
    error = refusal(**{field: value})
    assert error.found == f"an engine built for {field} {value}; here is {here}"
    assert error.expected == f"{field} {here}"
    assert error.fix == "rebuild it here: `maskrcnn build-engine m.onnx --fp16 --target tensorrt`"


def test_a_library_of_other_sources_does_not_fit():
    error = refusal(plugins="library")
    assert "plugin_hash of another version" in error.found
    assert refusal(plugins="library", plugin_hash=plugin_hash(PluginForm.LIBRARY)) is None


@pytest.mark.parametrize("built", ["11.4.0.106", "11.0.0.1", "10.9.0.34", "11.4.1.0", "12.0.0.1"])
def test_a_version_compatible_engine_runs_in_the_same_and_later_versions(built):
    error = refusal(version_compatible="yes", tensorrt=built)
    if built in ("11.4.1.0", "12.0.0.1"):
        assert f"built for tensorrt {built}" in error.found
    else:
        assert error is None


def test_hardware_compatible_engines():
    same = {"hardware_compatibility": "same_compute_capability", "gpu": "NVIDIA GH200"}
    assert refusal(**same) is None
    assert "compute_capability 8.9" in refusal(**same, compute_capability="8.9").found
    newer = {"hardware_compatibility": "ampere_plus", "gpu": "NVIDIA A10", "compute_capability": "8.6"}
    assert refusal(**newer) is None


def test_an_ampere_plus_engine_on_an_older_gpu():
    metadata = SimpleNamespace(stamp={**STAMP, "hardware_compatibility": "ampere_plus"})
    error = check_stamp(metadata, trt=TRT, gpu="Tesla T4", compute_capability=(7, 5))
    assert error.found == "an engine built for compute_capability 8.0 and newer; here is 7.5"


def test_other_targets_and_missing_weights():
    assert "an engine for openvino" in refusal(target="openvino").found
    assert "maskrcnn refit-engine" in refusal(refit="stripped").fix
    assert refusal(refit="refitted") is None
    without_command = refusal(gpu="another", command=None)
    assert "maskrcnn build-engine --fp16 --target tensorrt" in without_command.fix


def test_hashes_of_the_two_forms():
    hashes = {plugin_hash(form) for form in PluginForm}
    assert len(hashes) == 2 and {len(each) for each in hashes} == {64}
    assert Gpu("x", (12, 0)).arch == 120


def test_versions_are_compared_as_numbers():
    assert tensorrt_library.version_of(SimpleNamespace(__version__="10.16.1.11")) > (10, 9)
    assert tensorrt_library.version_of(TRT) == (11, 4, 0, 106)


def test_the_cached_library_for_this_tensorrt_is_loaded(monkeypatch, tmp_path):
    monkeypatch.setenv("MASKRCNN_CACHE", str(tmp_path))
    record = {"library": "plugins", "architectures": [90], "sources": plugin_hash(PluginForm.LIBRARY)}
    made = {
        version: cache.store({**record, "tensorrt": version}, Library.PLUGINS.file_name, lambda path: path.touch())
        for version in ("10.16.1", "11.0.0")
    }
    for version, wanted in (("10.9.0.34", "10.16.1"), ("11.4.0.106", "11.0.0")):
        registry = SimpleNamespace(get_creator=lambda *_: "loaded before")
        trt = SimpleNamespace(__version__=version, get_plugin_registry=lambda registry=registry: registry)
        assert tensorrt_library.load_plugins(trt, PluginForm.LIBRARY, arch=90) == made[wanted]
    trt.__version__ = "12.0.0.1"
    with pytest.raises(UserError, match=r"of the present sources for TensorRT 12\.0\.0\.1 in the cache"):
        tensorrt_library.load_plugins(trt, PluginForm.LIBRARY, arch=90)


def import_with(tmp_path: Path, source: str | None) -> str:
    """Output of `import_tensorrt` in a Python whose module `tensorrt` has this source."""
    if source is not None:
        (tmp_path / "tensorrt.py").write_text(source)
    code = f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
from maskrcnn.runtime.backends.tensorrt_library import import_tensorrt
print(import_tensorrt().__version__)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    return done.stdout + done.stderr


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("__version__ = '10.8.0.43'\nclass Builder: pass", "TensorRT 10.8.0.43"),
        ("__version__ = '10.9.0.34'\nclass Builder: pass", "10.9.0.34"),
        ("raise ImportError('libnvinfer.so.11: cannot open shared object file')", "libnvinfer.so.11: cannot open"),
        ("raise OSError('a driver is missing')", "cannot be loaded (a driver is missing)"),
        ("models = []", "a module tensorrt that is not NVIDIA's"),
    ],
)
def test_a_tensorrt_that_cannot_be_used_is_described(tmp_path, source, said):
    assert said in import_with(tmp_path, source)


def test_the_real_bindings_are_accepted(each_tensorrt):
    code = "from maskrcnn.runtime.backends.tensorrt_library import import_tensorrt\ntell(import_tensorrt().__version__)"
    assert each_tensorrt.ask(code).split(".")[0] in ("10", "11")


def test_everything_missing_is_reported_at_once(monkeypatch):
    def missing(what):
        def fail(*_):
            raise UserError(f"no {what}", f"a {what}", f"get a {what}")

        return fail

    monkeypatch.setattr(tensorrt_library, "import_tensorrt", missing("library"))
    monkeypatch.setattr(tensorrt_library, "find_gpu", missing("GPU"))
    error = tensorrt_library.tensorrt_obstacle()
    assert (error.found, error.fix) == ("no library; no GPU", "get a library; get a GPU")
    monkeypatch.setattr(tensorrt_library, "find_gpu", lambda device: Gpu("x", (9, 0)))
    assert tensorrt_library.tensorrt_obstacle().found == "no library"
    monkeypatch.setattr(tensorrt_library, "import_tensorrt", lambda: TRT)
    assert tensorrt_library.tensorrt_obstacle() is None


def test_a_machine_without_a_gpu(monkeypatch):
    driver = pytest.importorskip("cuda.bindings.driver")
    monkeypatch.setattr(driver, "cuInit", lambda flags: (driver.CUresult.CUDA_ERROR_NO_DEVICE,))
    with pytest.raises(UserError, match="no NVIDIA GPU 0 on this machine"):
        tensorrt_library.find_gpu()


def test_a_gpu_is_described_by_the_driver(monkeypatch):
    driver = pytest.importorskip("cuda.bindings.driver")
    fine, kinds = driver.CUresult.CUDA_SUCCESS, driver.CUdevice_attribute
    numbers = {
        kinds.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: 12,
        kinds.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: 0,
    }
    monkeypatch.setattr(driver, "cuInit", lambda flags: (fine,))
    monkeypatch.setattr(driver, "cuDeviceGet", lambda index: (fine, index))
    monkeypatch.setattr(driver, "cuDeviceGetName", lambda length, device: (fine, b"NVIDIA RTX\0\0"))
    monkeypatch.setattr(driver, "cuDeviceGetAttribute", lambda kind, device: (fine, numbers[kind]))
    assert tensorrt_library.find_gpu(1) == Gpu("NVIDIA RTX", (12, 0))


def test_gpus_are_counted_until_there_is_none(monkeypatch):
    gpus = (Gpu("H100", (9, 0)), Gpu("T4", (7, 5)))

    def find_gpu(device):
        if device < len(gpus):
            return gpus[device]
        raise UserError("no GPU 2", "a GPU", "see doctor")

    monkeypatch.setattr(tensorrt_library, "find_gpu", find_gpu)
    assert tensorrt_library.find_gpus() == gpus

"""The TensorRT rig: real bindings and registry, and visible errors of its processes."""

import importlib.util
import subprocess

import plugin_library
import pytest
from tensorrt_rig import rig

from maskrcnn.runtime import doctor


def test_the_bindings_and_the_registry_are_tensorrts(tensorrt_rig):
    code = """
import tensorrt as trt
library = trt.get_plugin_registry()
tell({
    "version": trt.__version__,
    "module": trt.IPluginRegistry.__module__,
    "same": trt.get_builder_plugin_registry(trt.EngineCapability.STANDARD) is not None,
    "creators": [creator.name for creator in library.all_creators],
    "flags": sorted(trt.BuilderFlag.__members__),
})
"""
    found = rig.ask(code, env=tensorrt_rig)
    assert found["version"].startswith("11.") and found["module"] == "tensorrt_bindings.tensorrt" and found["same"]
    assert "CaskConvolutionRunnerWeightsTransformerPlugin" in found["creators"]  # from the lean library
    assert "TF32" in found["flags"] and "FP16" not in found["flags"]


def test_numbers_of_the_enumerations_are_those_of_the_headers(tensorrt_rig):
    code = """
import tensorrt as trt
def numbers(kind):
    return {name: int(member) for name, member in kind.__members__.items()}
tell({"types": numbers(trt.DataType), "formats": numbers(trt.TensorFormat), "fields": numbers(trt.PluginFieldType)})
"""
    found = rig.ask(code, env=tensorrt_rig)
    names = {"float32": "FLOAT", "float16": "HALF", "bfloat16": "BF16"}
    for name, number in plugin_library.TYPES.items():
        assert found["types"][names.get(name, name.upper())] == number
    for name, number in plugin_library.FORMATS.items():
        assert found["formats"][name] == number
    for name, number in plugin_library.FIELD_TYPES.items():
        assert found["fields"][name.upper()] == number


def test_there_is_no_builder_and_a_runtime_without_a_driver_ends_only_its_process(tensorrt_rig):
    code = """
import tensorrt as trt
logger = trt.Logger(trt.Logger.ERROR)
try:
    trt.Builder(logger)
except TypeError as error:
    tell(str(error))
trt.Runtime(logger)
tell("still here")
"""
    answer = rig.run(code, env=tensorrt_rig)
    assert "nullptr" in answer.told[0]
    assert answer.told[1:] == ["still here"] or "CUDA" in answer.printed


def test_a_python_plugin_registers(tensorrt_rig):
    code = """
import tensorrt as trt
import tensorrt.plugin as trtp

@trtp.register("rig::AddOne")
def add_one(x: trtp.TensorDesc, amount: int, share: float) -> trtp.TensorDesc:
    return x.like()

creator = trt.get_plugin_registry().get_creator("AddOne", "1", "rig")
tell([[field.name, field.type.name] for field in creator.field_names])
"""
    assert rig.ask(code, env=tensorrt_rig) == [["amount", "INT64"], ["share", "FLOAT64"]]


@pytest.mark.parametrize(
    ("code", "printed"),
    [
        ("raise ValueError('seen')", "ValueError: seen"),
        ("import os; print('last words', flush=True); os.abort()", "last words"),
        ("import tensorrt; tensorrt.NoSuchName", "has no attribute 'NoSuchName'"),
    ],
)
def test_errors_of_the_process_are_reported(tensorrt_rig, code, printed):
    with pytest.raises(AssertionError, match=printed):
        rig.ask(f"tell(1)\n{code}", env=tensorrt_rig)


def test_a_hanging_process_is_terminated(tensorrt_rig):
    with pytest.raises(subprocess.TimeoutExpired):
        rig.run("import time; time.sleep(60)", env=tensorrt_rig, timeout=1)


def test_missing_bindings_are_reported(tmp_path):
    if reason := rig.obstacle():
        pytest.skip(reason)
    assert "holds no tensorrt_bindings" in rig.obstacle(tmp_path)


def test_the_doctor_finds_the_bindings_only_inside_the_rig(tensorrt_rig, monkeypatch):
    if importlib.util.find_spec("tensorrt") is None:
        assert doctor.probe("tensorrt").get("missing")
    for name, value in tensorrt_rig.items():
        monkeypatch.setenv(name, value)
    facts = doctor.probe("tensorrt")
    assert facts["version"].startswith("11.") and "nullptr" in facts["error"]

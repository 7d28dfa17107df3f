"""The TensorRT rig holds TensorRT's real bindings."""

import importlib.util

import plugin_library
from tensorrt_rig import rig

from maskrcnn.runtime import doctor


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


def test_the_doctor_finds_the_bindings_only_inside_the_rig(tensorrt_rig, monkeypatch):
    if importlib.util.find_spec("tensorrt") is None:
        assert doctor.probe("tensorrt").get("missing")
    for name, value in tensorrt_rig.items():
        monkeypatch.setenv(name, value)
    facts = doctor.probe("tensorrt")
    assert facts["version"].startswith("11.") and "nullptr" in facts["error"]

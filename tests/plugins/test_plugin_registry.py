"""The plugin library in TensorRT's registry: loading, listing, and creating the plugins of an exported file."""

import json
import re
import shutil

import onnx
import plugin_library
import pytest
from tensorrt_rig import rig

from maskrcnn.export.tensorrt.flavour import (
    PLUGIN_ATTRIBUTES,
    PLUGIN_NAMESPACE,
    PLUGIN_VERSION,
    tensorrt_flavour,
)
from maskrcnn.plugins import contract
from maskrcnn.plugins.toolchain import find_tensorrt_headers

PLUGINS = (contract.MULTILEVEL_ROI_ALIGN, contract.BATCHED_NMS)
BEFORE = f"""
import json

import numpy as np
import tensorrt as trt

registry = trt.get_plugin_registry()

def ours():
    return sorted(c.name for c in registry.all_creators if c.plugin_namespace == "{PLUGIN_NAMESPACE}")

def creator(name):
    return registry.get_creator(name, "{PLUGIN_VERSION}", "{PLUGIN_NAMESPACE}")

def create(name, attributes):
    # Attributes in the form that the ONNX parser passes.
    kinds = {{int: (np.int32, trt.PluginFieldType.INT32), float: (np.float32, trt.PluginFieldType.FLOAT32)}}
    fields = [
        trt.PluginField(name, np.array([value], kinds[type(value)][0]), kinds[type(value)][1])
        for name, value in attributes.items()
    ]
    return creator(name).create_plugin("node", trt.PluginFieldCollection(fields), trt.TensorRTPhase.BUILD)
"""


def ask(code: str, tensorrt_rig: dict[str, str], **values: object):
    """Runs code after `BEFORE` with `values` as globals, and returns the value that it tells."""
    given = "\n".join(f"{name} = json.loads({json.dumps(json.dumps(value))})" for name, value in values.items())
    return rig.ask(f"{BEFORE}\n{given}\n{code}", env=tensorrt_rig)


@pytest.fixture(scope="session")
def rig_version(tensorrt_rig) -> str:
    """Version of TensorRT in the rig."""
    return rig.ask("import tensorrt; tell(tensorrt.__version__)", env=tensorrt_rig)


@pytest.fixture
def path(library, rig_version) -> str:
    """The library, if it was compiled for the TensorRT version of the rig."""
    headers = find_tensorrt_headers(library.headers)
    if headers.version.partition(".")[0] != rig_version.partition(".")[0]:
        pytest.skip(f"headers of TensorRT {headers.version}, a rig of {rig_version}")
    return str(library.path)


def test_creators_and_fields_are_those_of_the_contract(tensorrt_rig, path):
    code = """
assert registry.load_library(path) is not None
tell({name: [[f.name, f.type.name, f.size] for f in creator(name).field_names] for name in ours()})
"""
    kinds = {int: "INT32", float: "FLOAT32"}
    wanted = {op.name: [[name, kinds[kind], 1] for name, kind in op.attributes.items()] for op in PLUGINS}
    assert ask(code, tensorrt_rig, path=path) == wanted


def test_the_plugins_of_an_exported_file_are_created(tensorrt_rig, path, onnx_file):
    nodes = [node for node in tensorrt_flavour(onnx.load(onnx_file)).graph.node if node.domain == contract.DOMAIN]
    requests = []
    for node in nodes:
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        assert [attributes[name] for name in PLUGIN_ATTRIBUTES[:2]] == [b"maskrcnn", b"1"]
        requests.append([node.op_type, {n: v for n, v in attributes.items() if n not in PLUGIN_ATTRIBUTES}])
    code = """
registry.load_library(path)
made = [create(*one) for one in requests]
builds = [plugin.get_capability_interface(trt.PluginCapabilityType.BUILD) for plugin in made]
cores = [plugin.get_capability_interface(trt.PluginCapabilityType.CORE) for plugin in made]
assert all(plugin.get_capability_interface(trt.PluginCapabilityType.RUNTIME) for plugin in made)
tell([
    [core.plugin_name, core.plugin_version, core.plugin_namespace, build.num_outputs, build.metadata_string]
    for core, build in zip(cores, builds)
])
"""
    made = ask(code, tensorrt_rig, path=path, requests=requests)
    assert {name for name, *_ in made} == {op.name for op in PLUGINS} and len(made) == 4
    for (op, attributes), (name, version, namespace, outputs, text) in zip(requests, made, strict=True):
        assert (name, version, namespace) == (op, PLUGIN_VERSION, PLUGIN_NAMESPACE)
        assert outputs == len(contract.OPS[op].outputs)
        described = dict(entry.split("=") for entry in text.split(","))
        assert described.keys() == attributes.keys()
        assert {n: float(v) for n, v in described.items()} == pytest.approx(attributes, rel=1e-6)


@pytest.mark.parametrize(
    ("op", "attributes", "found"),
    [
        ("BatchedNms", {"iou_threshold": 0.5}, "no attribute max_output"),
        ("BatchedNms", {"iou_threshold": 2.0, "max_output": 5}, "iou_threshold = 2"),
        ("BatchedNms", {"iou_threshold": 1, "max_output": 5}, "iou_threshold of plugin field type 5"),
        ("MultilevelRoiAlign", {"output_size": 7, "sampling_ratio": 2, "aligned": 5}, "aligned = 5"),
    ],
)
def test_invalid_attributes_return_null_and_report_the_reason(tensorrt_rig, path, op, attributes, found):
    values = f"path, op, attributes = json.loads({json.dumps(json.dumps([path, op, attributes]))})"
    code = f"{BEFORE}\n{values}\nregistry.load_library(path)\ntell(create(op, attributes) is None)"
    answer = rig.run(code, env=tensorrt_rig)
    assert answer.told == [True] and answer.returncode == 0
    assert f"maskrcnn::{op}\nfound: " in answer.printed and found in answer.printed and "\nfix: " in answer.printed


def test_the_library_can_be_deregistered_and_loaded_again(tensorrt_rig, path):
    code = """
handle = registry.load_library(path)
twice = registry.load_library(path) is None
registry.deregister_library(handle)
gone = ours()
registry.load_library(path)
tell([twice, gone, ours(), create("BatchedNms", {"iou_threshold": 0.5, "max_output": 3}) is not None])
"""
    assert ask(code, tensorrt_rig, path=path) == [True, [], sorted(op.name for op in PLUGINS), True]


def test_the_registering_library_registers_when_it_is_loaded(tensorrt_rig, path, library, tmp_path):
    source = [plugin_library.CSRC / "tensorrt" / "register.cpp"]
    output = tmp_path / "libmaskrcnn_plugins_register.so"
    plugin_library.compile_library(output, library.headers, source, "-DMASKRCNN_REGISTER_WHEN_LOADED")
    code = "import ctypes\nctypes.CDLL(register)\ntell(ours())"
    answer = rig.run(f"{BEFORE}\nregister = {str(output)!r}\n{code}", env=tensorrt_rig)
    assert answer.told == [[]]
    assert "libmaskrcnn_plugins.so\nexpected: a library that TensorRT loads" in answer.printed
    shutil.copy(path, tmp_path / "libmaskrcnn_plugins.so")
    assert ask(code, tensorrt_rig, register=str(output)) == sorted(op.name for op in PLUGINS)


def test_a_library_for_another_version_is_refused(tensorrt_rig, library, rig_version, tmp_path):
    headers = tmp_path / "include"
    shutil.copytree(library.headers, headers, ignore=shutil.ignore_patterns("impl"))
    version = headers / "NvInferVersion.h"
    text, count = re.subn(r"(#define \w+_MAJOR\w* )\d+", r"\g<1>99", version.read_text(), count=1)
    assert count == 1
    version.write_text(text)
    other = plugin_library.build(tmp_path, headers)
    code = f"registry.load_library({str(other)!r})\ntell(ours())"
    answer = rig.run(f"{BEFORE}\n{code}", env=tensorrt_rig)
    assert answer.told == [[]] and answer.returncode == 0
    major = rig_version.partition(".")[0]
    assert f"found: a library compiled for TensorRT 99, loaded by TensorRT {major}" in answer.printed

"""Ahead-of-time plugins in TensorRT's registry: the builder gets what the contract and the kernels define."""

import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import onnx
import pytest
from aot_launch import POOLING, TYPES, launch_of, tensor
from tensorrt_rig import rig

from maskrcnn.errors import UserError
from maskrcnn.export.graph import tensor_types
from maskrcnn.export.tensorrt.flavour import PLUGIN_ATTRIBUTES, tensorrt_flavour
from maskrcnn.plugins import aot, contract
from maskrcnn.plugins.toolchain import find_toolchain


@pytest.fixture(scope="module")
def with_compiler():
    found = find_toolchain()
    if found.nvrtc is None and found.nvcc is None:
        pytest.skip("neither NVRTC nor nvcc")


@pytest.fixture(autouse=True)
def cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("MASKRCNN_CACHE", str(tmp_path))


@pytest.fixture(scope="module")
def with_plugins(tensorrt_rig, with_compiler):
    """Runs code in a process with registered plugins and `build_double`, and returns the value that it tells."""
    support = Path(rig.__file__).parent
    before = (
        f"import sys; sys.path.insert(0, {str(support)!r})\n"
        "from maskrcnn.plugins import aot\naot.register(arch=90)\n"
        "import tensorrt as trt, build_double as double\n"
    )
    return lambda code: rig.ask(before + code, env=tensorrt_rig)


def test_the_registered_creators_are_the_contract(with_plugins):
    found = with_plugins(
        "aot.register(arch=80)  # a second time changes nothing\n"
        "creators = [c for c in trt.get_plugin_registry().all_creators if c.plugin_namespace == 'maskrcnn']\n"
        "tell([[c.name, c.plugin_version, c.interface_info.kind,\n"
        "       [[f.name, f.type.name] for f in c.field_names]] for c in creators])"
    )
    field_types = {int: "INT32", float: "FLOAT32"}
    assert found == [
        [op.name, "1", "PLUGIN CREATOR_V3QUICK", [[name, field_types[kind]] for name, kind in op.attributes.items()]]
        for op in contract.AOT_OPS.values()
    ]


@pytest.mark.parametrize("layout", ["LINEAR", "HWC", "HWC8"])
def test_tensorrt_gets_the_launch_of_the_kernel(with_plugins, layout):
    """TensorRT's symbolic lengths give the same launch as numbers."""
    dtype = {"LINEAR": "float16", "HWC": "float32", "HWC8": "bfloat16"}[layout]
    for num_levels, channels, attributes in ((4, 256, POOLING), (2, 6, {**POOLING, "output_size": 14})):
        shapes = [[2, channels, 200 >> level, 304 >> level] for level in range(num_levels)]
        inputs = [(shape, TYPES[dtype]) for shape in shapes] + [([2, 1000, 4], "FLOAT")]
        unknown = {i: [0, 2, 3] for i in range(num_levels)} | {num_levels: [0]}
        answer = with_plugins(
            f"tell(double.build('MultilevelRoiAlign', {attributes}, {inputs}, layout={layout!r}, dynamic={unknown}))"
        )
        descs = [*(tensor(shape, dtype, layout) for shape in shapes), tensor([2, 1000, 4], "float32")]
        launch = launch_of(contract.MULTILEVEL_ROI_ALIGN, descs, attributes)
        size = attributes["output_size"]
        assert answer["types"] == [TYPES[dtype]] and answer["shapes"] == [[2, 1000, channels, size, size]]
        assert_launched(answer, launch)
        layouts = ["LINEAR", "HWC"] if dtype == "float32" else ["LINEAR", "HWC8"]
        assert [combination[0] for combination in answer["combinations"]] == [[TYPES[dtype], each] for each in layouts]
        for combination in answer["combinations"]:
            kind, form = combination[0]
            assert combination == [[kind, form]] * num_levels + [["FLOAT", "LINEAR"], [kind, "LINEAR"]]


def test_an_exception_while_a_kernel_is_compiled_is_kept(with_plugins):
    """TensorRT itself logs its text only."""
    inputs = [([1, 8, 16, 16], "FLOAT"), ([1, 3, 4], "FLOAT")]
    kept = with_plugins(
        "from maskrcnn.plugins import aot_kernels\n"
        "def compile_kernel(*given, **options): raise OSError('the disk is full')\n"
        "aot_kernels.compile_kernel = compile_kernel\n"
        f"try: double.build('MultilevelRoiAlign', {POOLING}, {inputs})\n"
        "except OSError: tell([repr(fault) for fault in aot.faults])"
    )
    assert kept == ["OSError('the disk is full')"]


def assert_launched(answer, launch: aot.Launch) -> None:
    assert answer["kernel"] == launch.kernel.name and answer["has_entry"]
    assert answer["defines"] == dict(launch.kernel.defines)
    assert answer["grid"] == [*launch.grid, 1] and answer["block"] == [launch.kernel.threads, 1, 1]
    assert answer["shared_mem"] == 0 and answer["arguments"] == list(launch.arguments)


def test_channels_that_are_known_only_at_run_time(with_plugins):
    inputs = [([1, 8, 16, 16], "FLOAT"), ([1, 3, 4], "FLOAT")]
    answer = with_plugins(
        f"tell(double.build('MultilevelRoiAlign', {POOLING}, {inputs}, layout='HWC', dynamic={{0: [1]}}))"
    )
    assert answer["defines"]["MASKRCNN_CHANNELS_OF_BLOCK"] == "32" and answer["arguments"][2] == 8


def test_every_node_of_an_exported_file_builds(with_plugins, onnx_file):
    flavour = tensorrt_flavour(onnx.load(onnx_file), aot=True)
    known, names = tensor_types(flavour.graph), {1: "FLOAT", 6: "INT32"}
    lengths = {"batch": 2}
    nodes, calls = [n for n in flavour.graph.node if n.domain == contract.DOMAIN], []
    assert {node.op_type for node in nodes} == contract.AOT_OPS.keys()
    for node in nodes:
        values = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute if a.name not in PLUGIN_ATTRIBUTES}
        inputs = [(numbers(known[name], lengths), names[known[name].elem_type]) for name in node.input]
        calls.append([node.op_type, values, inputs])
    code = f"import json\ntell([double.build(*call) for call in json.loads({json.dumps(json.dumps(calls))})])"
    for node, answer in zip(nodes, with_plugins(code), strict=True):
        assert answer["shapes"] == [numbers(known[name], lengths) for name in node.output]
        assert answer["types"] == [names[known[name].elem_type] for name in node.output]
        assert answer["has_entry"]


def numbers(kind: onnx.TypeProto.Tensor, lengths: dict[str, int]) -> list[int]:
    """A shape with a number for each symbol: from `lengths`, a product of them, or 16."""
    return [d.dim_value or number_of(d.dim_param, lengths) for d in kind.shape.dim]


def number_of(symbol: str, lengths: dict[str, int]) -> int:
    product = re.fullmatch(r"(\d+)\*(\w+)|(\w+)\*(\d+)", symbol.replace(" ", ""))
    if product is None:
        return lengths.get(symbol, 16)
    factor, name = product[1] or product[4], product[2] or product[3]
    return int(factor) * lengths.get(name, 16)


def test_a_registered_library_with_the_same_ops_is_an_error(tensorrt_rig, with_compiler):
    message = rig.ask(
        "import numpy as np, tensorrt as trt\n"
        "class Creator(trt.IPluginCreatorV3One):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.name, self.plugin_namespace, self.plugin_version = 'MultilevelRoiAlign', 'maskrcnn', '1'\n"
        "        self.field_names = trt.PluginFieldCollection([])\n"
        "creator = Creator()\n"
        "assert trt.get_plugin_registry().register_creator(creator, 'maskrcnn')\n"
        "from maskrcnn.errors import UserError\n"
        "from maskrcnn.plugins import aot\n"
        "try:\n"
        "    aot.register(arch=90)\n"
        "except UserError as error:\n"
        "    tell(str(error))",
        env=tensorrt_rig,
    )
    assert message.startswith("maskrcnn::MultilevelRoiAlign is registered already, by a plugin library\n")


def test_without_tensorrt(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(UserError, match=r"cannot be imported (.|\n)*TensorRT 10\.9 or newer(.|\n)*pip install"):
        aot.register(arch=90)


def test_with_a_tensorrt_that_is_too_old(monkeypatch):
    plugin = SimpleNamespace(register=print)
    monkeypatch.setitem(sys.modules, "tensorrt", SimpleNamespace(__version__="10.7.0", plugin=plugin))
    monkeypatch.setitem(sys.modules, "tensorrt.plugin", plugin)
    with pytest.raises(UserError, match=r"TensorRT 10\.7\.0, whose Python plugins cannot be compiled ahead of time"):
        aot.register(arch=90)

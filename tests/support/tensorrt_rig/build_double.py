"""The calls that TensorRT's builder makes to an ahead-of-time plugin, for a process of the rig.

The plugin, its creator and NVIDIA's glue code are real. The builder is emulated: lengths and their arithmetic are
numbers with a flag whether the builder knows them.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import tensorrt as trt
from tensorrt.plugin import _tensor

from maskrcnn.plugins import aot_kernels


class Length:
    """A length of a shape, or an expression of lengths."""

    def __init__(self, value: int, *, is_known: bool = True) -> None:
        self.value, self.is_known = value, is_known

    def is_constant(self) -> bool:
        return self.is_known

    def get_constant_value(self) -> int:
        assert self.is_known, "the builder does not know this length"
        return self.value


class Arithmetic:
    """`IExprBuilder`, with the operations of TensorRT's `DimensionOperation`."""

    def constant(self, value: int) -> Length:
        return Length(value)

    def operation(self, kind: Any, first: Length, second: Length) -> Length:
        a, b = first.value, second.value
        results = {
            "SUM": lambda: a + b,
            "SUB": lambda: a - b,
            "PROD": lambda: a * b,
            "MAX": lambda: max(a, b),
            "MIN": lambda: min(a, b),
            "FLOOR_DIV": lambda: a // b,
            "CEIL_DIV": lambda: -(-a // b),
        }
        return Length(results[kind.name](), is_known=first.is_known and second.is_known)


class Lengths(list):
    """`DimsExprs`, created with a number of empty elements."""

    def __init__(self, count: int) -> None:
        super().__init__([None] * count)


class Argument:
    """The object that passes a number to the builder; 32-bit integers only."""

    def __init__(self, expression: Any) -> None:
        assert isinstance(expression, _tensor.SymInt32)
        self.value = expression._expr.value


class Arguments:
    """`ISymExprs`."""

    def __init__(self) -> None:
        self.values: dict[int, int] = {}
        self.nbSymExprs = 0

    def __setitem__(self, place: int, argument: Argument) -> None:
        self.values[place] = argument.value


trt.IDimensionExpr, trt.DimsExprs, _tensor.SymExprImpl = Length, Lengths, Argument


def fields_of(attributes: dict[str, int | float]) -> tuple[list[trt.PluginField], list[np.ndarray]]:
    """Plugin fields of 32-bit numbers, as from TensorRT's ONNX parser, and the arrays that they point to."""
    arrays = [np.array([v], np.float32 if isinstance(v, float) else np.int32) for v in attributes.values()]
    kinds = [trt.PluginFieldType.FLOAT32 if a.dtype == np.float32 else trt.PluginFieldType.INT32 for a in arrays]
    return [trt.PluginField(*field) for field in zip(attributes, arrays, kinds, strict=True)], arrays


def create(name: str, attributes: dict[str, int | float]) -> Any:
    """Creates the plugin of a node as the parser does for `aot = 1`.

    The parser iterates over the creator's fields, not the node's attributes (onnx-tensorrt's `loadFields`), and
    NVIDIA's glue code passes them by position.
    """
    creator = trt.get_plugin_registry().get_creator(name, "1", "maskrcnn")
    fields, _arrays = fields_of({field.name: attributes[field.name] for field in creator.field_names})
    request = trt.QuickPluginCreationRequest.STRICT_AOT
    return creator.create_plugin(name, "maskrcnn", trt.PluginFieldCollection(fields), trt.TensorRTPhase.BUILD, request)


def described(shape: list[int], kind: trt.DataType, dynamic: list[int]) -> trt.DynamicPluginTensorDesc:
    """The builder's description of a tensor; dynamic axes are -1."""
    tensor = trt.DynamicPluginTensorDesc()
    desc = trt.PluginTensorDesc()
    desc.dims = [-1 if axis in dynamic else length for axis, length in enumerate(shape)]
    desc.type, desc.format = kind, trt.TensorFormat.LINEAR
    tensor.desc, tensor.min, tensor.opt, tensor.max = desc, shape, shape, shape
    return tensor


def with_format(tensor: trt.DynamicPluginTensorDesc, kind: trt.DataType, layout: trt.TensorFormat) -> None:
    """Sets the type and format that the builder has chosen."""
    desc = tensor.desc
    desc.type, desc.format = kind, layout
    tensor.desc = desc


def build(
    name: str,
    attributes: dict[str, int | float],
    inputs: list[tuple[list[int], str]],
    *,
    layout: str = "LINEAR",
    dynamic: dict[int, list[int]] | None = None,
) -> dict[str, Any]:
    """Returns everything that a plugin provides during the build of an engine.

    Args:
        name: name of the op.
        attributes: attributes of the node.
        inputs: shape and TensorRT type of each input.
        layout: format of the first input in the combination to choose.
        dynamic: dynamic axes by input.
    """
    dynamic = dynamic or {}
    shapes, kinds = [shape for shape, _ in inputs], [getattr(trt.DataType, kind) for _, kind in inputs]
    lengths = [
        [Length(n, is_known=axis not in dynamic.get(i, [])) for axis, n in enumerate(shape)]
        for i, shape in enumerate(shapes)
    ]
    plugin = create(name, attributes)
    results = plugin.get_output_data_types(kinds, [len(shape) for shape in shapes])
    output_shapes = [[length.value for length in s] for s in plugin.get_output_shapes(lengths, [], Arithmetic())]
    tensors = [
        described(shape, kind, dynamic.get(i, [])) for i, (shape, kind) in enumerate(zip(shapes, kinds, strict=True))
    ]
    tensors += [described(shape, kind, []) for shape, kind in zip(output_shapes, results, strict=True)]
    flat = plugin.get_supported_format_combinations(tensors, len(inputs))
    combinations = [
        [(d.type.name, d.format.name) for d in flat[i : i + len(tensors)]] for i in range(0, len(flat), len(tensors))
    ]
    (chosen,) = [c for c in combinations if c[0] == (kinds[0].name, layout)]
    for tensor, (kind, form) in zip(tensors, chosen, strict=True):
        with_format(tensor, getattr(trt.DataType, kind), getattr(trt.TensorFormat, form))
    compiled = _compiled_kernels()
    plugin = plugin.clone()
    plugin.configure_plugin(tensors[: len(inputs)], tensors[len(inputs) :])
    plugin.set_tactic(0)
    launch, arguments = SimpleNamespace(), Arguments()
    plugin.get_launch_params(lengths, tensors, len(inputs), launch, arguments, Arithmetic())
    descs = [tensor.desc for tensor in tensors]
    kernel_name, code = plugin.get_kernel(descs[: len(inputs)], descs[len(inputs) :])
    return {
        "types": [kind.name for kind in results],
        "shapes": output_shapes,
        "combinations": combinations,
        "chosen": chosen,
        "kernel": kernel_name,
        "code": code[:64].decode(errors="replace"),
        "has_entry": f".entry {kernel_name}(" in code.decode(errors="replace"),
        "source": str(compiled[-1].source),
        "defines": dict(compiled[-1].defines),
        "grid": [launch.grid_x.value, launch.grid_y.value, launch.grid_z.value],
        "block": [launch.block_x.value, launch.block_y.value, launch.block_z.value],
        "shared_mem": launch.shared_mem.value,
        "arguments": [arguments.values[place] for place in range(arguments.nbSymExprs)],
    }


def _compiled_kernels() -> list[Any]:
    """Returns a list to which every compiled kernel is added from now on."""
    kernels, compile_kernel = [], aot_kernels.compile_kernel

    def recorded(kernel: Any, **options: Any) -> bytes:
        kernels.append(kernel)
        return compile_kernel(kernel, **options)

    aot_kernels.compile_kernel = recorded
    return kernels

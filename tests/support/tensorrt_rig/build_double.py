"""What TensorRT's builder asks of an ahead-of-time plugin, in its order; for a process of the rig.

The plugin, its creator and NVIDIA's glue between them and our functions are real. The builder is not, so lengths and
their arithmetic, which it would hand in, are numbers here that know whether the builder would know them.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import tensorrt as trt
from tensorrt.plugin import _tensor

from maskrcnn.plugins import aot, nvrtc


class Length:
    """One length of a shape, or what was computed from lengths."""

    def __init__(self, value: int, *, is_known: bool = True) -> None:
        self.value, self.is_known = value, is_known

    def is_constant(self) -> bool:
        return self.is_known

    def get_constant_value(self) -> int:
        assert self.is_known, "the builder does not know this length"
        return self.value


class Arithmetic:
    """The part of `IExprBuilder`; it counts as TensorRT's documentation of `DimensionOperation` says."""

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
    """Stands for `DimsExprs`, which is made of a number of places to fill."""

    def __init__(self, count: int) -> None:
        super().__init__([None] * count)


class Argument:
    """Stands for the object that carries a number to the builder; it takes 32-bit integers alone."""

    def __init__(self, expression: Any) -> None:
        assert isinstance(expression, _tensor.SymInt32)
        self.value = expression._expr.value


class Arguments:
    """Stands for `ISymExprs`."""

    def __init__(self) -> None:
        self.values: dict[int, int] = {}
        self.nbSymExprs = 0

    def __setitem__(self, place: int, argument: Argument) -> None:
        self.values[place] = argument.value


trt.IDimensionExpr, trt.DimsExprs, _tensor.SymExprImpl = Length, Lengths, Argument


def fields_of(attributes: dict[str, int | float]) -> tuple[list[trt.PluginField], list[np.ndarray]]:
    """Plugin fields of 32-bit numbers, as TensorRT's ONNX parser makes them; and what they point to."""
    arrays = [np.array([v], np.float32 if isinstance(v, float) else np.int32) for v in attributes.values()]
    kinds = [trt.PluginFieldType.FLOAT32 if a.dtype == np.float32 else trt.PluginFieldType.INT32 for a in arrays]
    return [trt.PluginField(*field) for field in zip(attributes, arrays, kinds, strict=True)], arrays


def create(name: str, attributes: dict[str, int | float]) -> Any:
    """The plugin for a node, by the creator that the parser finds, in the form that `aot = 1` asks for.

    The parser goes through the creator's fields, not through the node's attributes (onnx-tensorrt's `loadFields`), and
    NVIDIA's glue hands them on by position.
    """
    creator = trt.get_plugin_registry().get_creator(name, "1", "maskrcnn")
    fields, _arrays = fields_of({field.name: attributes[field.name] for field in creator.field_names})
    request = trt.QuickPluginCreationRequest.STRICT_AOT
    return creator.create_plugin(name, "maskrcnn", trt.PluginFieldCollection(fields), trt.TensorRTPhase.BUILD, request)


def described(shape: list[int], kind: trt.DataType, dynamic: list[int]) -> trt.DynamicPluginTensorDesc:
    """A tensor as the builder describes it: -1 for the axes whose lengths differ from run to run."""
    tensor = trt.DynamicPluginTensorDesc()
    desc = trt.PluginTensorDesc()
    desc.dims = [-1 if axis in dynamic else length for axis, length in enumerate(shape)]
    desc.type, desc.format = kind, trt.TensorFormat.LINEAR
    tensor.desc, tensor.min, tensor.opt, tensor.max = desc, shape, shape, shape
    return tensor


def with_format(tensor: trt.DynamicPluginTensorDesc, kind: trt.DataType, layout: trt.TensorFormat) -> None:
    """Gives a tensor the type and format that the builder has chosen."""
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
    """Everything that a plugin answers while an engine is built.

    Args:
        name: of the op.
        attributes: of the node.
        inputs: shape and type (TensorRT's name) of each.
        layout: of the first input in the combination to choose.
        dynamic: by input, the axes whose lengths the builder does not know.
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
    """A list to which every kernel that is compiled from now on is added."""
    seen, compile_kernel = [], nvrtc.compile_kernel

    def recorded(kernel: Any, **options: Any) -> bytes:
        seen.append(kernel)
        return compile_kernel(kernel, **options)

    aot.nvrtc.compile_kernel = recorded
    return seen

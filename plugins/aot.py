"""Ahead-of-time (AOT) Python plugins for TensorRT: the custom ops with kernels that become part of the engine.

Running such an engine needs no plugin library and no Python; building it needs neither the CUDA toolkit nor TensorRT's
headers. The graph must be the AOT flavour: `maskrcnn export --tensorrt --aot`.

`tensorrt.plugin` requires functions with one named argument per tensor and checks the names at registration, but
RoIAlign has one feature map per pyramid level. Therefore the functions here accept any number of tensors, and their
`__signature__` declares four levels. TensorRT calls them with the tensors of the node.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from maskrcnn.errors import UserError
from maskrcnn.plugins import aot_kernels, contract
from maskrcnn.plugins.aot_kernels import Image, Kernel
from maskrcnn.plugins.toolchain import Toolchain, find_toolchain

_MIN_TENSORRT = "10.9"  # release notes: first version with AOT plugins that the ONNX parser imports
_LEVELS = 4  # feature maps in the registered signature
_TYPES = {"float32": "FP32", "float16": "FP16", "bfloat16": "BF16"}  # names of tensorrt.plugin
_DTYPES = {"FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16"}  # members of tensorrt.DataType
# Arrays of one element: given `int`, the bindings of TensorRT 10 call int() on an array, which NumPy 2.4 rejects.
_ATTRIBUTE_TYPES = {int: npt.NDArray[np.int32], float: npt.NDArray[np.float32]}


@dataclass(frozen=True)
class _Target:
    """How the kernels are compiled."""

    toolchain: Toolchain
    arch: int
    image: Image


@dataclass(frozen=True)
class Launch:
    """A kernel with its grid and integer arguments, which are numbers or TensorRT's symbolic lengths."""

    kernel: Kernel
    grid: tuple[Any, Any]  # blocks along x and y
    arguments: tuple[Any, ...]


@dataclass(frozen=True)
class _Plugin:
    """One op as a plugin.

    The functions take `tensorrt`, `tensorrt.plugin`, tensors (`TensorDesc`) and attributes by name.
    """

    op: contract.Op
    outputs: Callable[[Any, Any, Sequence[Any], Mapping[str, Any]], tuple[Any, ...]]
    formats: Callable[[int], list[tuple[str, str]]]  # number of inputs → comma-separated types and formats
    launch: Callable[[Any, Sequence[Any], Mapping[str, Any]], Launch]


# Exceptions of plugins in the latest build. TensorRT logs only their text, and builds no engine.
faults: list[Exception] = []
_target: _Target | None = None  # from the latest `register`; the plugins themselves are registered once


def register(*, arch: int | None = None, image: Image | None = None, toolchain: Toolchain | None = None) -> _Target:
    """Registers the plugins with TensorRT in this process, before an engine is built; may be called again.

    Args:
        arch: compute capability to compile for, 90 for 9.0 (default: the newest that every GPU of this machine runs).
        image: format of the kernels (default: PTX, or CUBIN if the driver is older than the compiler).
        toolchain: compiler to use (default: the one found on this machine).

    Raises:
        UserError: if TensorRT is missing or too old, there is no compiler, `arch` is needed, or a plugin library has
            registered the same ops.
    """
    global _target
    tensorrt, trtp = _import_tensorrt()
    toolchain = toolchain or find_toolchain()
    image = image or aot_kernels.image_for(toolchain)
    target = _Target(toolchain, aot_kernels.architecture(toolchain, arch, image), image)
    for plugin in PLUGINS:
        _register(tensorrt, trtp, plugin)
    _target = target
    return target


def _import_tensorrt() -> tuple[Any, Any]:
    expected = f"TensorRT {_MIN_TENSORRT} or newer"
    fix = f"pip install 'tensorrt>={_MIN_TENSORRT}', or use the plugin library: `maskrcnn build-plugins --form library`"
    try:
        import tensorrt
        import tensorrt.plugin as trtp
    except ImportError as error:
        raise UserError(f"TensorRT's Python plugins cannot be imported ({error})", expected, fix) from error
    if not hasattr(trtp, "aot_impl"):
        found = f"TensorRT {tensorrt.__version__}, whose Python plugins cannot be compiled ahead of time"
        raise UserError(found, expected, fix)
    return tensorrt, trtp


def _register(tensorrt: Any, trtp: Any, plugin: _Plugin) -> None:
    """Registers one plugin, unless it is registered already."""
    name = f"{contract.DOMAIN}::{plugin.op.name}"
    if hasattr(getattr(trtp.op, contract.DOMAIN, None), plugin.op.name):
        return
    registry = tensorrt.get_plugin_registry()
    if registry.get_creator(plugin.op.name, str(contract.VERSION), contract.DOMAIN) is not None:
        raise UserError(
            f"{name} is registered already, by a plugin library",
            "either the library or the ahead-of-time plugins in one process",
            "do not load libmaskrcnn_plugins in this process",
        )
    trtp.register(name)(_describe(tensorrt, trtp, plugin))
    trtp.autotune(name)(_tune(trtp, plugin))
    trtp.aot_impl(name)(_implement(trtp, plugin))


# The three functions of a plugin


def _describe(tensorrt: Any, trtp: Any, plugin: _Plugin) -> Callable[..., Any]:
    """Creates the function that returns types and shapes of the outputs."""

    def describe(*tensors: Any, **attributes: Any) -> Any:
        outputs = plugin.outputs(tensorrt, trtp, tensors, aot_kernels.checked(plugin.op, attributes))
        return outputs[0] if len(outputs) == 1 else outputs

    count = len(plugin.op.outputs)
    returned = trtp.TensorDesc if count == 1 else tuple.__class_getitem__((trtp.TensorDesc,) * count)
    arguments = _tensor_names(plugin.op, trtp.TensorDesc)
    arguments |= {name: _ATTRIBUTE_TYPES[kind] for name, kind in plugin.op.attributes.items()}
    return _with_signature(describe, arguments, returned=returned)


def _tune(trtp: Any, plugin: _Plugin) -> Callable[..., Any]:
    """Creates the function that returns the supported combinations of types and formats."""

    def tune(*tensors: Any) -> Any:  # the inputs and a tuple of the outputs
        formats = plugin.formats(len(tensors) - 1)
        # The network is strongly typed, so only combinations with the first tensor's type are returned. If no kernel
        # has that type, all combinations are returned, and TensorRT rejects the node; for an empty list, NVIDIA's glue
        # code would declare the type supported.
        own = _TYPES.get(_DTYPES.get(tensors[0].dtype.name, ""))
        matching = [each for each in formats if each[0].partition(",")[0] == own]
        return [trtp.AutoTuneCombination(types, layouts) for types, layouts in matching or formats]

    return _with_signature(tune, [*_tensor_names(plugin.op), "outputs"])


def _implement(trtp: Any, plugin: _Plugin) -> Callable[..., Any]:
    """Creates the function that returns name and code of the kernel, its grid and its integer arguments."""

    def implement(*arguments: Any) -> Any:  # the inputs, the attributes, a tuple of the outputs, the tactic
        tensors = [argument for argument in arguments if isinstance(argument, trtp.TensorDesc)]
        values = arguments[len(tensors) : -2]
        # The parser and `tensorrt.plugin.op` pass attributes in the order of the creator's fields, which is the order
        # in the contract; `checked` raises if there are too few.
        named = dict(zip(plugin.op.attributes, values, strict=False))
        return _compiled(trtp, plugin.launch(trtp, tensors, named))

    returned = tuple[str, bytes, trtp.KernelLaunchParams, trtp.SymIntExprs]
    names = [*_tensor_names(plugin.op), *plugin.op.attributes, "outputs", "tactic"]
    return _with_signature(implement, names, returned=returned)


def _compiled(trtp: Any, launch: Launch) -> tuple[str, bytes, Any, Any]:
    assert _target is not None  # TensorRT calls the functions after `register` only
    kernel = launch.kernel
    code = aot_kernels.compile_kernel(kernel, arch=_target.arch, toolchain=_target.toolchain, image=_target.image)
    grid = trtp.KernelLaunchParams(grid_x=launch.grid[0], grid_y=launch.grid[1], block_x=kernel.threads)
    return kernel.name, code, grid, trtp.SymIntExprs.from_tuple([trtp.SymInt32(value) for value in launch.arguments])


def _tensor_names(op: contract.Op, annotation: Any = inspect.Parameter.empty) -> dict[str, Any]:
    """Argument names of the inputs; a variadic input becomes `_LEVELS` arguments."""
    names: list[str] = []
    for tensor in op.inputs:
        names += [f"{tensor.name}{number}" for number in range(_LEVELS)] if tensor.variadic else [tensor.name]
    return dict.fromkeys(names, annotation)


def _with_signature(
    function: Callable[..., Any],
    arguments: Sequence[str] | Mapping[str, Any],
    *,
    returned: Any = inspect.Signature.empty,
) -> Callable[..., Any]:
    """Wraps a function: sets its `__signature__` to these arguments, and adds its exceptions to `faults`."""

    def recording(*given: Any, **named: Any) -> Any:
        try:
            return function(*given, **named)
        except Exception as error:
            faults.append(error)
            raise

    annotations = arguments if isinstance(arguments, Mapping) else dict.fromkeys(arguments, inspect.Parameter.empty)
    parameters = [
        inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=annotation)
        for name, annotation in annotations.items()
    ]
    recording.__signature__ = inspect.Signature(parameters, return_annotation=returned)  # type: ignore[attr-defined]
    return recording


# MultilevelRoiAlign; its inputs are the feature maps and rois


def _pooled(tensorrt: Any, trtp: Any, tensors: Sequence[Any], attributes: Mapping[str, Any]) -> tuple[Any, ...]:
    features, rois = tensors[0], tensors[-1]
    size = attributes["output_size"]
    shape = (rois.shape_expr[0], rois.shape_expr[1], features.shape_expr[1], size, size)
    return (trtp.from_shape_expr(shape, dtype=features.dtype),)


def _pooling_formats(inputs: int) -> list[tuple[str, str]]:
    combinations = []
    for dtype, layout in aot_kernels.FEATURE_FORMATS:
        kind = _TYPES[dtype]
        types, layouts = [kind] * (inputs - 1) + ["FP32", kind], [layout] * (inputs - 1) + ["LINEAR"] * 2
        combinations.append((", ".join(types), ", ".join(layouts)))
    return combinations


def _pooling_launch(trtp: Any, tensors: Sequence[Any], attributes: Mapping[str, Any]) -> Launch:
    *features, rois = tensors
    known_channels = int(features[0].shape[1])  # -1 if known only at run time
    pooling = aot_kernels.roi_align(
        attributes,
        num_levels=len(features),
        dtype=_DTYPES[features[0].dtype.name],
        layout=features[0].format.name,
        channels=known_channels if known_channels >= 0 else None,
    )
    batch, num_rois = rois.shape_expr[0], rois.shape_expr[1]
    channels = features[0].shape_expr[1]
    sizes = [feature.shape_expr[axis] for feature in features for axis in (2, 3)]
    blocks = trtp.max(batch * num_rois * pooling.parts, 1)
    groups = trtp.max(trtp.cdiv(channels, pooling.channels_of_block), 1)
    return Launch(pooling.kernel, (blocks, groups), (batch, num_rois, channels, *sizes))


# BatchedNms in two steps


def _keep(tensorrt: Any, trtp: Any, tensors: Sequence[Any], attributes: Mapping[str, Any]) -> tuple[Any, ...]:
    boxes = tensors[0]
    return (trtp.from_shape_expr((boxes.shape_expr[0], boxes.shape_expr[1]), dtype=tensorrt.int32),)


def _keep_launch(trtp: Any, tensors: Sequence[Any], attributes: Mapping[str, Any]) -> Launch:
    batch, num_boxes = tensors[0].shape_expr[0], tensors[0].shape_expr[1]
    # As in buckets_for of csrc/batched_nms/kernel.cuh; the kernel works with any number of buckets.
    buckets = trtp.min(trtp.max(num_boxes // 32, 1), 128)
    return Launch(aot_kernels.nms_keep(attributes), (buckets, trtp.max(batch, 1)), (batch, num_boxes))


def _kept_rows(tensorrt: Any, trtp: Any, tensors: Sequence[Any], attributes: Mapping[str, Any]) -> tuple[Any, ...]:
    batch = tensors[0].shape_expr[0]
    indices = trtp.from_shape_expr((batch, attributes["max_output"]), dtype=tensorrt.int32)
    return indices, trtp.from_shape_expr((batch,), dtype=tensorrt.int32)


def _compact_launch(trtp: Any, tensors: Sequence[Any], attributes: Mapping[str, Any]) -> Launch:
    batch, num_boxes = tensors[0].shape_expr[0], tensors[0].shape_expr[1]
    return Launch(aot_kernels.nms_compact(attributes), (trtp.max(batch, 1), 1), (batch, num_boxes))


def _linear(types: str) -> Callable[[int], list[tuple[str, str]]]:
    return lambda inputs: [(types, "LINEAR")]


PLUGINS = (
    _Plugin(contract.MULTILEVEL_ROI_ALIGN, _pooled, _pooling_formats, _pooling_launch),
    _Plugin(contract.BATCHED_NMS_KEEP, _keep, _linear("FP32, INT32, INT32, INT32"), _keep_launch),
    _Plugin(contract.BATCHED_NMS_COMPACT, _kept_rows, _linear("INT32, INT32, INT32"), _compact_launch),
)

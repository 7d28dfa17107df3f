"""The ops as TensorRT's ahead-of-time Python plugins: their kernels become part of the engine.

An engine built with them needs no plugin library and no Python where it runs; building it needs neither a compiler's
toolkit nor TensorRT's headers. The graph must be the flavour for them: `maskrcnn export --tensorrt --aot`.

`tensorrt.plugin` wants functions with one named argument for each tensor, and compares the names when a function is
registered. RoIAlign has as many feature maps as the model has levels, so the functions here take any number, and tell
`inspect` the signature that is wanted, with four levels: TensorRT itself calls them with the tensors that a node has.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from maskrcnn.errors import UserError
from maskrcnn.plugins import aot_kernels, contract, nvrtc
from maskrcnn.plugins.aot_kernels import Kernel, Layout
from maskrcnn.plugins.toolchain import Toolchain, find_toolchain

OLDEST = "10.9"  # whose release notes announce ahead-of-time plugins and their import by the ONNX parser
_LEVELS = 4  # in the signature that is registered

# What RoIAlign's features may be: TensorRT's names of type and format. HWC8 is for 16-bit numbers, HWC for float32.
FEATURE_FORMATS = (
    ("FP32", "LINEAR"),
    ("FP16", "LINEAR"),
    ("BF16", "LINEAR"),
    ("FP32", "HWC"),
    ("FP16", "HWC8"),
    ("BF16", "HWC8"),
)
_LAYOUTS = {"LINEAR": aot_kernels.PLANES, "HWC": aot_kernels.HWC, "HWC8": aot_kernels.HWC8}
# Arrays of one number. Where int is declared, the bindings of TensorRT 10 call int with such an array, which NumPy 2.4
# refuses.
_ATTRIBUTE_TYPES = {int: npt.NDArray[np.int32], float: npt.NDArray[np.float32]}
_DTYPES = {"FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16"}  # TensorRT's members: ours


@dataclass(frozen=True)
class _Target:
    """What the kernels are compiled with and for."""

    toolchain: Toolchain
    arch: int
    image: nvrtc.Image


@dataclass(frozen=True)
class Launch:
    """A kernel with its grid and its integer arguments: numbers, or TensorRT's symbols for lengths."""

    kernel: Kernel
    grid: tuple[Any, Any]  # blocks along x and y
    arguments: tuple[Any, ...]


@dataclass(frozen=True)
class _Plugin:
    """One op: its contract, and what TensorRT asks about it.

    The functions get `tensorrt.plugin` and tensors of it (`TensorDesc`), and attributes by name.
    """

    op: contract.Op
    outputs: Callable[[Any, Any, Sequence[Any], Mapping[str, Any]], tuple[Any, ...]]
    formats: Callable[[int], list[tuple[str, str]]]  # of a number of inputs: types and formats, joined by commas
    launch: Callable[[Any, Sequence[Any], Mapping[str, Any]], Launch]


_target: _Target | None = None  # of the newest call of `register`; TensorRT keeps what was registered first


def register(
    *, arch: int | None = None, image: nvrtc.Image | None = None, toolchain: Toolchain | None = None
) -> _Target:
    """Registers the plugins with TensorRT, in this process. Call it before an engine is built; again if need be.

    Args:
        arch: compute capability to compile for, 90 for 9.0; by default what every GPU of this machine runs.
        image: what to give TensorRT; by default PTX, unless the driver is too old to read the compiler's.
        toolchain: what to compile with; by default what there is.

    Raises:
        UserError: without TensorRT, with one that is too old, without a compiler, where `arch` is needed, and when a
            plugin library has registered the same ops.
    """
    global _target
    tensorrt, trtp = _import_tensorrt()
    found = toolchain or find_toolchain()
    image = image or nvrtc.image_for(found)
    target = _Target(found, nvrtc.architecture(found, arch, image), image)
    for plugin in PLUGINS:
        _register(tensorrt, trtp, plugin)
    _target = target
    return target


def _import_tensorrt() -> tuple[Any, Any]:
    do = f"pip install 'tensorrt>={OLDEST}', or use the plugin library: `maskrcnn build-plugins --form library`"
    try:
        import tensorrt
        import tensorrt.plugin as trtp
    except ImportError as error:
        came = f"TensorRT's Python plugins cannot be imported ({error})"
        raise UserError(came, f"TensorRT {OLDEST} or newer", do) from error
    if not hasattr(trtp, "aot_impl"):
        came = f"TensorRT {tensorrt.__version__}, whose Python plugins cannot be compiled ahead of time"
        raise UserError(came, f"TensorRT {OLDEST} or newer", do)
    return tensorrt, trtp


def _register(tensorrt: Any, trtp: Any, plugin: _Plugin) -> None:
    """Registers one plugin, unless this process has done so."""
    name = f"{contract.DOMAIN}::{plugin.op.name}"
    if hasattr(getattr(trtp.op, contract.DOMAIN, None), plugin.op.name):
        return
    registry = tensorrt.get_plugin_registry()
    if registry.get_creator(plugin.op.name, str(contract.VERSION), contract.DOMAIN) is not None:
        raise UserError(
            f"{name} is registered already, by a plugin library",
            "either the library or the ahead-of-time plugins in one process",
            "do not load libmaskrcnn_plugins here",
        )
    trtp.register(name)(_describe(tensorrt, trtp, plugin))
    trtp.autotune(name)(_tune(trtp, plugin))
    trtp.aot_impl(name)(_implement(trtp, plugin))


# The three functions of a plugin


def _describe(tensorrt: Any, trtp: Any, plugin: _Plugin) -> Callable[..., Any]:
    """Types and shapes of the outputs."""

    def describe(*tensors: Any, **attributes: Any) -> Any:
        outputs = plugin.outputs(tensorrt, trtp, tensors, aot_kernels.checked(plugin.op, attributes))
        return outputs[0] if len(outputs) == 1 else outputs

    count = len(plugin.op.outputs)
    returned = trtp.TensorDesc if count == 1 else tuple[(trtp.TensorDesc,) * count]
    arguments = _tensor_names(plugin.op, trtp.TensorDesc)
    arguments |= {name: _ATTRIBUTE_TYPES[kind] for name, kind in plugin.op.attributes.items()}
    return _with_signature(describe, arguments, returned=returned)


def _tune(trtp: Any, plugin: _Plugin) -> Callable[..., Any]:
    """The combinations of types and formats that there are kernels for."""

    def tune(*tensors: Any) -> Any:  # the inputs, then a tuple of the outputs
        return [trtp.AutoTuneCombination(types, formats) for types, formats in plugin.formats(len(tensors) - 1)]

    return _with_signature(tune, [*_tensor_names(plugin.op), "outputs"])


def _implement(trtp: Any, plugin: _Plugin) -> Callable[..., Any]:
    """Name and code of the kernel, its grid, and its integer arguments."""

    def implement(*arguments: Any) -> Any:  # the inputs, the attributes, a tuple of the outputs, the tactic
        tensors = [argument for argument in arguments if isinstance(argument, trtp.TensorDesc)]
        values = arguments[len(tensors) : -2]
        # In the order of the creator's fields, which the parser and `tensorrt.plugin.op` keep to, and which is the
        # contract's; if there are too few, `checked` says so.
        named = dict(zip(plugin.op.attributes, values, strict=False))
        launch = plugin.launch(trtp, tensors, named)
        return _compiled(trtp, launch)

    returned = tuple[str, bytes, trtp.KernelLaunchParams, trtp.SymIntExprs]
    names = [*_tensor_names(plugin.op), *plugin.op.attributes, "outputs", "tactic"]
    return _with_signature(implement, names, returned=returned)


def _compiled(trtp: Any, launch: Launch) -> tuple[str, bytes, Any, Any]:
    kernel = launch.kernel
    code = nvrtc.compile_kernel(kernel, arch=_target.arch, toolchain=_target.toolchain, image=_target.image)
    grid = trtp.KernelLaunchParams(grid_x=launch.grid[0], grid_y=launch.grid[1], block_x=kernel.threads)
    return kernel.name, code, grid, trtp.SymIntExprs.from_tuple([trtp.SymInt32(value) for value in launch.arguments])


def _tensor_names(op: contract.Op, annotation: Any = inspect.Parameter.empty) -> dict[str, Any]:
    """The inputs as arguments; a variadic one stands for `_LEVELS`."""
    names = []
    for tensor in op.inputs:
        names += [f"{tensor.name}{number}" for number in range(_LEVELS)] if tensor.variadic else [tensor.name]
    return dict.fromkeys(names, annotation)


def _with_signature(
    function: Callable[..., Any],
    arguments: Sequence[str] | Mapping[str, Any],
    *,
    returned: Any = inspect.Signature.empty,
) -> Callable[..., Any]:
    """The function, which tells `inspect` that it has these arguments."""
    annotations = arguments if isinstance(arguments, Mapping) else dict.fromkeys(arguments, inspect.Parameter.empty)
    parameters = [
        inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=annotation)
        for name, annotation in annotations.items()
    ]
    function.__signature__ = inspect.Signature(parameters, return_annotation=returned)
    return function


# MultilevelRoiAlign: the feature maps, then rois


def _pooled(tensorrt: Any, trtp: Any, tensors: Sequence[Any], attributes: Mapping[str, Any]) -> tuple[Any, ...]:
    features, rois = tensors[0], tensors[-1]
    size = attributes["output_size"]
    shape = (rois.shape_expr[0], rois.shape_expr[1], features.shape_expr[1], size, size)
    return (trtp.from_shape_expr(shape, dtype=features.dtype),)


def _pooling_formats(inputs: int) -> list[tuple[str, str]]:
    return [
        (", ".join([dtype] * (inputs - 1) + ["FP32", dtype]), ", ".join([layout] * (inputs - 1) + ["LINEAR"] * 2))
        for dtype, layout in FEATURE_FORMATS
    ]


def _pooling_launch(trtp: Any, tensors: Sequence[Any], attributes: Mapping[str, Any]) -> Launch:
    *features, rois = tensors
    known_channels = int(features[0].shape[1])  # -1: not before the engine runs
    pooling = aot_kernels.roi_align(
        attributes,
        num_levels=len(features),
        dtype=_DTYPES[features[0].dtype.name],
        layout=_layout_of(features[0]),
        channels=known_channels if known_channels >= 0 else None,
    )
    batch, num_rois = rois.shape_expr[0], rois.shape_expr[1]
    channels = features[0].shape_expr[1]
    sizes = [feature.shape_expr[axis] for feature in features for axis in (2, 3)]
    blocks = trtp.max(batch * num_rois * pooling.parts, 1)
    groups = trtp.max(trtp.cdiv(channels, pooling.channels_of_block), 1)
    return Launch(pooling.kernel, (blocks, groups), (batch, num_rois, channels, *sizes))


def _layout_of(feature: Any) -> Layout:
    return _LAYOUTS[feature.format.name]


# BatchedNms in two steps


def _keep(tensorrt: Any, trtp: Any, tensors: Sequence[Any], attributes: Mapping[str, Any]) -> tuple[Any, ...]:
    boxes = tensors[0]
    return (trtp.from_shape_expr((boxes.shape_expr[0], boxes.shape_expr[1]), dtype=tensorrt.int32),)


def _keep_launch(trtp: Any, tensors: Sequence[Any], attributes: Mapping[str, Any]) -> Launch:
    batch, num_boxes = tensors[0].shape_expr[0], tensors[0].shape_expr[1]
    # As buckets_for of csrc/batched_nms/kernel.cuh; the kernel takes any number.
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

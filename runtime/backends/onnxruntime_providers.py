"""ONNX Runtime's execution providers: selection and options.

Source: ONNX Runtime's documentation of the CUDA and TensorRT execution providers. All options are strings.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING

from maskrcnn.errors import UserError, reason_of
from maskrcnn.files import cache_folder, make_folder
from maskrcnn.plugins import contract
from maskrcnn.plugins.toolchain import find_gpus
from maskrcnn.runtime.build.profiles import Profile

if TYPE_CHECKING:
    import onnx

_SUFFIX = "ExecutionProvider"
_CPU, _CUDA, _TENSORRT = f"CPU{_SUFFIX}", f"CUDA{_SUFFIX}", f"Tensorrt{_SUFFIX}"
_GIGABYTE = 1 << 30


class Provider(str, Enum):
    """Execution provider."""

    CPU = "cpu"
    CUDA = "cuda"
    TENSORRT = "tensorrt"

    @property
    def full_name(self) -> str:
        """ONNX Runtime's name."""
        return {"cpu": _CPU, "cuda": _CUDA, "tensorrt": _TENSORRT}[self.value]


# How cuDNN's convolution algorithms are chosen: by a heuristic from the shape, by timing all of them for each new image
# size, or always the default algorithm.
_SEARCHES = ("heuristic", "exhaustive", "default")


@dataclass(frozen=True, kw_only=True)
class GpuOptions:
    """Options of the GPU providers. The graph defines the precision."""

    device: int = 0
    memory_limit_gb: float | None = None  # limit of CUDA's arena, and of TensorRT's workspace
    search: str = "heuristic"  # search of cuDNN's algorithms: heuristic, exhaustive or default
    tf32: bool = False  # round the inputs of float32 convolutions and matrix products to 10 bits
    cache: Path | None = None  # folder of TensorRT's engines and timings (default: below $MASKRCNN_CACHE)
    profile: Profile | None = None  # shapes of TensorRT's engine (default: it is rebuilt for new shapes)

    def __post_init__(self) -> None:
        if self.search not in _SEARCHES:
            raise UserError(f"search {self.search!r}", f"one of {', '.join(_SEARCHES)}", "leave it out")
        if self.memory_limit_gb is not None and not self.memory_limit_gb > 0:
            raise UserError(f"memory limit {self.memory_limit_gb:g} GB", "more than 0", "leave it out")


def provider_named(name: str) -> Provider:
    """Returns a provider by name.

    Raises:
        UserError: for an unknown name.
    """
    try:
        return Provider(name)
    except ValueError as error:
        known = ", ".join(each.value for each in Provider)
        raise UserError(f"provider {name!r}", f"one of {known}", "leave it out for the best that works here") from error


def provider_chain(provider: Provider, options: GpuOptions, *, channels: int = 3) -> list[tuple[str, dict[str, str]]]:
    """Returns providers with their options, by preference. Nodes that a provider does not support go to the next.

    Args:
        provider: the preferred provider.
        options: options of the GPU providers.
        channels: number of channels of the model's images, for the shapes of TensorRT's engine.

    Raises:
        UserError: if the cache folder cannot be created.
    """
    chain: list[tuple[str, dict[str, str]]] = [(_CPU, {})]
    if provider is not Provider.CPU:
        chain.insert(0, (_CUDA, _cuda_options(options)))
    if provider is Provider.TENSORRT:
        chain.insert(0, (_TENSORRT, _tensorrt_options(options, channels)))
    return chain


def best_provider() -> Provider:
    """Returns CUDA if this ONNX Runtime has it and there is a GPU, else the CPU. CUDA may still fail when used."""
    import onnxruntime

    # Devices of compiled-in or registered providers, usually only the CPU's; new in ONNX Runtime 1.22.
    devices = onnxruntime.get_ep_devices() if hasattr(onnxruntime, "get_ep_devices") else []
    if any(device.ep_name == _CUDA for device in devices):
        return Provider.CUDA
    has_cuda = _CUDA in onnxruntime.get_available_providers() and bool(find_gpus())
    return Provider.CUDA if has_cuda else Provider.CPU


def prepare(provider: Provider) -> None:
    """Loads the CUDA libraries that pip installed; call it before a session is created.

    Raises:
        UserError: if this ONNX Runtime was compiled without the provider.
    """
    import onnxruntime

    if provider is Provider.CPU:
        return
    if provider.full_name not in onnxruntime.get_available_providers():
        raise UserError(
            f"an ONNX Runtime without {provider.full_name}",
            "onnxruntime-gpu",
            "`pip uninstall onnxruntime`, then `pip install 'onnxruntime-gpu[cuda,cudnn]'`; see `maskrcnn doctor`",
        )
    if hasattr(onnxruntime, "preload_dlls"):
        onnxruntime.preload_dlls()


_ONE_CLASS = """
<domain: "maskrcnn", opset_import: ["": {opset}]>
OneClass (boxes, groups_long, num_groups, live, order_score, never) => (apart, nms_scores)
{{
    second_axis = Constant<value_ints = [1]>()
    third_axis = Constant<value_ints = [2]>()
    nearest = Constant<value_float = 1.0e6>()
    nought = Constant<value_float = 0.0>()
    pixel = Constant<value_float = 1.0>()
    distance = Abs(boxes)
    is_near = LessOrEqual(distance, nearest)
    near = Where(is_near, boxes, nought)
    high = ReduceMax<keepdims = 0>(near)
    low = ReduceMin<keepdims = 0>(near)
    extent = Sub(high, low)
    pitch = Add(extent, pixel)
    group_number = Cast<to = 1>(num_groups)
    root = Sqrt(group_number)
    whole_root = Ceil(root)
    side = Cast<to = 7>(whole_root)
    row = Div(groups_long, side)
    first_of_row = Mul(row, side)
    column = Sub(groups_long, first_of_row)
    row_deep = Unsqueeze(row, third_axis)
    column_deep = Unsqueeze(column, third_axis)
    steps = Concat<axis = 2>(column_deep, row_deep, column_deep, row_deep)
    steps_float = Cast<to = 1>(steps)
    shift = Mul(steps_float, pitch)
    apart = Add(boxes, shift)
    live_wide = Unsqueeze(live, second_axis)
    nms_scores = Where(live_wide, order_score, never)
}}"""


# Values in the function of BatchedNms that are used only with one class per group (maskrcnn.export.functions).
_OF_ONE_CLASS_PER_GROUP = {
    *("all_groups", "group_column", "groups_wide", "own_group", "live_wide", "member", "nms_scores"),
}


def with_one_nms_call(model: onnx.ModelProto) -> onnx.ModelProto:
    """Replaces the groups of `BatchedNms` by one class of shifted boxes, in place; returns the model.

    ONNX Runtime's CUDA kernel of NonMaxSuppression processes one class after the other and waits for the GPU after
    each. This function shifts the groups into a square grid, which keeps the coordinates small: the rounding error is
    2^-24 · √groups · (extent of all boxes), 0.0005 px for 80 groups in 1344 px. The result can differ only for boxes
    with an overlap that close to the threshold. torchvision also shifts boxes, along one line.
    """
    import onnx

    for function in model.functions:
        if (function.domain, function.name) != (contract.DOMAIN, contract.BATCHED_NMS.name):
            continue
        opset = next(entry.version for entry in function.opset_import if entry.domain in ("", "ai.onnx"))
        apart = onnx.parser.parse_function(_ONE_CLASS.format(opset=opset)).node
        nodes = {name: node for node in function.node for name in node.output}
        nodes["selected"].input[0] = "apart"
        kept = [node for node in function.node if node.output[0] not in _OF_ONE_CLASS_PER_GROUP]
        position = kept.index(nodes["selected"])
        del function.node[:]
        function.node.extend([*kept[:position], *apart, *kept[position:]])
    return model


# First ONNX Runtime version that supports an IR version and an opset. Source: table of ONNX versions in its
# documentation, for the versions that exported files may have.
_FIRST_TO_READ = {(9, 20): "1.17", (10, 21): "1.18", (10, 22): "1.21"}


def oldest_onnxruntime(ir_version: int, opset: int) -> str | None:
    """Returns the oldest ONNX Runtime that reads a file of these versions; None if it is not known."""
    return next((name for (ir, op), name in _FIRST_TO_READ.items() if ir_version <= ir and opset <= op), None)


def too_new(path: Path, reason: str) -> UserError | None:
    """Returns the error for a file that is newer than ONNX Runtime; None if loading failed for another reason.

    Args:
        path: the ONNX file.
        reason: ONNX Runtime's message.
    """
    import onnxruntime

    ir = re.search(r"IR version: (\d+), max supported IR version: (\d+)", reason)
    opset = re.search(r"Opset (\d+) is under development.*till opset (\d+)", reason, re.DOTALL)
    if found := ir or opset:
        what = "IR version" if ir else "opset"
        return UserError(
            f"{path}: ONNX {what} {found[1]}; ONNX Runtime {onnxruntime.__version__} reads up to {found[2]}",
            f"an ONNX Runtime that reads {what} {found[1]}; see `maskrcnn inspect {path}`",
            "`pip install -U onnxruntime` (onnxruntime-gpu on a GPU), or make a file for older runtimes from the "
            "checkpoint: `maskrcnn export --onnx` without --opset (IR version 9, opset 20: ONNX Runtime 1.17)",
        )
    return None


def unusable(provider: Provider, reason: str) -> UserError:
    """Returns the error for a requested provider that does not work here."""
    expected = "a GPU, its driver, and the CUDA and cuDNN that onnxruntime-gpu was compiled for"
    if provider is Provider.TENSORRT:
        expected += ", and TensorRT of the major version that it was compiled for"
    return UserError(
        f"ONNX Runtime without {provider.full_name}: {reason_of(reason)}",
        expected,
        "see `maskrcnn doctor`; `pip install 'onnxruntime-gpu[cuda,cudnn]'` installs CUDA's libraries",
    )


def _cuda_options(options: GpuOptions) -> dict[str, str]:
    found = {
        "device_id": str(options.device),
        "arena_extend_strategy": "kSameAsRequested",  # the default, powers of two, wastes up to half of it
        "cudnn_conv_algo_search": options.search.upper(),
        "cudnn_conv_use_max_workspace": "1",
        "do_copy_in_default_stream": "1",
        "use_tf32": "1" if options.tf32 else "0",
    }
    if options.memory_limit_gb is not None:
        found["gpu_mem_limit"] = str(int(options.memory_limit_gb * _GIGABYTE))
    return found


def _tensorrt_options(options: GpuOptions, channels: int) -> dict[str, str]:
    folder = options.cache or cache_folder() / "onnxruntime-tensorrt"
    make_folder(folder)
    found = {
        "device_id": str(options.device),
        "trt_fp16_enable": "0",  # the graph defines the precision
        "trt_engine_cache_enable": "1",
        "trt_engine_cache_path": str(folder),
        "trt_timing_cache_enable": "1",
        "trt_timing_cache_path": str(folder),
    }
    if options.memory_limit_gb is not None:
        found["trt_max_workspace_size"] = str(int(options.memory_limit_gb * _GIGABYTE))
    if options.profile is not None:
        for which in ("min", "opt", "max"):
            batch, height, width = options.profile.corner(which)
            found[f"trt_profile_{which}_shapes"] = f"images:{batch}x{channels}x{height}x{width},image_sizes:{batch}x2"
    return found

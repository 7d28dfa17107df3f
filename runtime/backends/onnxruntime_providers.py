"""ONNX Runtime's execution providers by name, with the options that our models want.

Option names as in the documentation of the CUDA and TensorRT execution providers; both take their values as text.
"""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from maskrcnn.errors import UserError
from maskrcnn.files import make_folder
from maskrcnn.plugins.toolchain import find_gpus
from maskrcnn.runtime.build.profiles import Profile

_SUFFIX = "ExecutionProvider"
_CPU, _CUDA, _TENSORRT = f"CPU{_SUFFIX}", f"CUDA{_SUFFIX}", f"Tensorrt{_SUFFIX}"
_GIGABYTE = 1 << 30


class Provider(str, Enum):
    """What computes."""

    CPU = "cpu"
    CUDA = "cuda"
    TENSORRT = "tensorrt"

    @property
    def full_name(self) -> str:
        """As ONNX Runtime calls it."""
        return {"cpu": _CPU, "cuda": _CUDA, "tensorrt": _TENSORRT}[self.value]


class _ConvolutionSearch(str, Enum):
    """How cuDNN's algorithm for each convolution is found."""

    HEURISTIC = "heuristic"  # guessed from the shape
    EXHAUSTIVE = "exhaustive"  # all are timed, for every new image size anew
    DEFAULT = "default"  # one that always works


@dataclass(frozen=True, kw_only=True)
class GpuOptions:
    """How the GPU providers work; the precision is the graph's."""

    device: int = 0
    memory_limit_gb: float | None = None  # of CUDA's arena, and of the scratch memory of TensorRT's layers
    search: str = "heuristic"  # a value of ConvolutionSearch
    tf32: bool = False  # let convolutions and products of float32 round their factors to 10 bits
    cache: Path | None = None  # for TensorRT's engines and timings; by default below $MASKRCNN_CACHE
    profile: Profile | None = None  # of the shapes that TensorRT is to take; by default those that come, with a rebuild

    def __post_init__(self) -> None:
        known = [each.value for each in _ConvolutionSearch]
        if self.search not in known:
            raise UserError(f"search {self.search!r}", f"one of {', '.join(known)}", "leave it out")
        if self.memory_limit_gb is not None and not self.memory_limit_gb > 0:
            raise UserError(f"memory limit {self.memory_limit_gb:g} GB", "more than 0", "leave it out")


def provider_named(name: str) -> Provider:
    """The provider for a user's word.

    Raises:
        UserError: for another word.
    """
    try:
        return Provider(name)
    except ValueError as error:
        known = ", ".join(each.value for each in Provider)
        raise UserError(f"provider {name!r}", f"one of {known}", "leave it out for the best that works here") from error


def provider_chain(provider: Provider, options: GpuOptions) -> list[tuple[str, dict[str, str]]]:
    """Providers with their options in order of preference: what one does not take goes to the next.

    Raises:
        UserError: where the cache's folder cannot be made.
    """
    chain: list[tuple[str, dict[str, str]]] = [(_CPU, {})]
    if provider is not Provider.CPU:
        chain.insert(0, (_CUDA, _cuda_options(options)))
    if provider is Provider.TENSORRT:
        chain.insert(0, (_TENSORRT, _tensorrt_options(options)))
    return chain


def best_provider() -> Provider:
    """CUDA where this ONNX Runtime has it and there is a GPU, else the CPU. Whether it works shows when it is used."""
    import onnxruntime

    # ONNX Runtime lists devices of the providers that are compiled into it or registered, mostly the CPU's alone.
    devices = getattr(onnxruntime, "get_ep_devices", list)()
    if any(device.ep_name == _CUDA for device in devices):
        return Provider.CUDA
    has_cuda = _CUDA in onnxruntime.get_available_providers() and bool(find_gpus())
    return Provider.CUDA if has_cuda else Provider.CPU


def prepare(provider: Provider) -> None:
    """What has to be before a session is made: CUDA's libraries, as pip installs them, are loaded.

    Raises:
        UserError: where this ONNX Runtime was compiled without the provider.
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


def unusable(provider: Provider, reason: str) -> UserError:
    """The error for a provider that was asked for and does not work here."""
    needs = "a GPU, its driver, and the CUDA and cuDNN that onnxruntime-gpu was compiled for"
    if provider is Provider.TENSORRT:
        needs += ", and TensorRT of the major version that it was compiled for"
    return UserError(
        f"ONNX Runtime without {provider.full_name}: {' '.join(reason.split())[:300]}",
        needs,
        "see `maskrcnn doctor`; `pip install 'onnxruntime-gpu[cuda,cudnn]'` brings CUDA's libraries",
    )


def _cuda_options(options: GpuOptions) -> dict[str, str]:
    found = {
        "device_id": str(options.device),
        "arena_extend_strategy": "kSameAsRequested",  # powers of two waste up to half for activations of this size
        "cudnn_conv_algo_search": options.search.upper(),
        "cudnn_conv_use_max_workspace": "1",
        "do_copy_in_default_stream": "1",
        "use_tf32": _flag(options.tf32),
    }
    if options.memory_limit_gb is not None:
        found["gpu_mem_limit"] = str(int(options.memory_limit_gb * _GIGABYTE))
    return found


def _tensorrt_options(options: GpuOptions) -> dict[str, str]:
    folder = options.cache or _cache_folder()
    make_folder(folder)
    found = {
        "device_id": str(options.device),
        "trt_fp16_enable": "0",  # the graph says what is computed in which precision
        "trt_engine_cache_enable": "1",
        "trt_engine_cache_path": str(folder),
        "trt_timing_cache_enable": "1",
        "trt_timing_cache_path": str(folder),
    }
    if options.memory_limit_gb is not None:
        found["trt_max_workspace_size"] = str(int(options.memory_limit_gb * _GIGABYTE))
    if options.profile is not None:
        for theirs, ours in (("min", "least"), ("opt", "best"), ("max", "greatest")):
            batch, height, width = options.profile.corner(ours)
            found[f"trt_profile_{theirs}_shapes"] = f"images:{batch}x3x{height}x{width},image_sizes:{batch}x2"
    return found


def _cache_folder() -> Path:
    """`onnxruntime-tensorrt` in $MASKRCNN_CACHE, by default in ~/.cache/maskrcnn."""
    root = os.environ.get("MASKRCNN_CACHE")
    return (Path(root) if root else Path.home() / ".cache" / "maskrcnn") / "onnxruntime-tensorrt"


def _flag(value: bool) -> str:
    return "1" if value else "0"


# Which nodes of a model an ONNX Runtime session gave to a provider, and which it left to the CPU.
#
# A node that a GPU provider does not take runs on the CPU, and its tensors travel there and back.

RECORD = "session.record_ep_graph_assignment_info"  # the entry of a session's options that makes it remember
_EXAMPLES = 8
_RECORD_SUFFIX = "ExecutionProvider"
_CPU_PROVIDER = f"CPU{_RECORD_SUFFIX}"


@dataclass(frozen=True)
class Placement:
    """What one provider does with the nodes of a model, functions inlined."""

    provider: str
    taken: dict[str, int] = field(default_factory=dict)  # nodes by operator
    left: dict[str, int] = field(default_factory=dict)  # those that the CPU gets instead
    left_names: tuple[str, ...] = ()  # of the first few
    why_not: str = ""  # why the provider cannot be used here, or cannot be asked
    elsewhere: dict[str, int] = field(default_factory=dict)  # nodes by other providers, as CUDA behind TensorRT

    def text(self) -> str:
        """One line."""
        name = self.provider.removesuffix(_RECORD_SUFFIX)
        if self.why_not:
            return f"{name}: {self.why_not}"
        taken, left = sum(self.taken.values()), sum(self.left.values())
        total = taken + left + sum(self.elsewhere.values())
        if taken == total:
            return f"{name}: all {taken} nodes"
        parts = [f"{name}: {taken} of {total} nodes"]
        parts += [f"{other.removesuffix(_RECORD_SUFFIX)}: {count}" for other, count in self.elsewhere.items()]
        if left:
            operators = ", ".join(f"{op} {count}" for op, count in self.left.items())
            parts.append(f"left to the CPU: {operators} ({', '.join(self.left_names)})")
        return "; ".join(parts)


def placement_in(session: Any, provider: str) -> Placement:
    """What a provider took of a session's model; the session was made with `RECORD` set to "1"."""
    if not hasattr(session, "get_provider_graph_assignment_info"):
        return Placement(provider, why_not="this version of ONNX Runtime does not tell; 1.31 does")
    taken, left, elsewhere, names = Counter(), Counter(), Counter(), []
    for part in session.get_provider_graph_assignment_info():
        for node in part.get_nodes():
            if part.ep_name == provider:
                taken[node.op_type] += 1
            elif part.ep_name == _CPU_PROVIDER:
                left[node.op_type] += 1
                names.append(node.name)
            else:
                elsewhere[part.ep_name] += 1
    return Placement(
        provider,
        dict(taken.most_common()),
        dict(left.most_common()),
        tuple(names[:_EXAMPLES]),
        elsewhere=dict(elsewhere),
    )

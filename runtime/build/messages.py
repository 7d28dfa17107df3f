"""Error texts for failures of TensorRT: the cause and the fix, from its log messages and parser errors.

TensorRT's functions return None or False and log the reason; its parser also keeps a list of errors.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from maskrcnn.errors import UserError, reason_of
from maskrcnn.plugins import contract
from maskrcnn.runtime.backends.tensorrt_library import Message

_MAX_ERRORS = 3  # per error text


@dataclass(frozen=True)
class _Cause:
    pattern: str  # regular expression, case-insensitive
    found: str
    fix: str


# In descending order of specificity: the first that matches any error is reported.
_CAUSES = (
    _Cause(
        r"SM \d+ is not supported",
        "a GPU that this version of TensorRT does not support",
        "install a version that supports it: newer versions drop old GPUs, older versions lack new ones",
    ),
    _Cause(
        r"no kernel image is available",
        "kernels that were not compiled for this GPU",
        "with the plugin library: `maskrcnn build-plugins --form library --force` on this machine; otherwise build the "
        "engine here, with a TensorRT and a CUDA that support this GPU",
    ),
    _Cause(
        r"CUDA initialization failure|driver version is insufficient|CUDA driver version",
        "an NVIDIA driver that is missing or older than this TensorRT needs",
        "update the driver (https://www.nvidia.com/drivers), or install TensorRT for its CUDA; see `maskrcnn doctor`",
    ),
    _Cause(
        r"insufficient workspace",
        "a workspace limit that leaves a layer without an implementation",
        "raise --workspace, or drop it",
    ),
    _Cause(
        r"out of memory|OutOfMemory|insufficient memory|alloc\w* fail|fail\w* to alloc|cudaErrorMemoryAllocation",
        "too little free memory on the GPU",
        "stop other processes on it (`nvidia-smi` lists them), or build with smaller --batch and --size",
    ),
    _Cause(
        r"Version tag does not match|serialization version|expecting library version",
        "a plan of another version of TensorRT",
        "build the engine with the TensorRT version that loads it, or with --version-compatible",
    ),
    _Cause(
        r"incompatible device|expecting compute|not compatible with this hardware",
        "a plan for another GPU",
        "build the engine on this machine, or with --hardware-compatible",
    ),
    _Cause(
        r"plugin.*not (?:be )?found|could not (?:find|create) .*plugin|invalid plugin creator|"
        r"cannot find plugin|getPluginCreator|getCreator",
        "a custom op whose plugin is not in TensorRT's registry",
        "use `maskrcnn build-engine`, which registers them; for the library, `maskrcnn build-plugins --form library`",
    ),
    _Cause(
        r"could not find any implementation for node",
        "a layer for which TensorRT has no implementation under these settings",
        "drop --version-compatible, --hardware-compatible and --optimization-level, or raise --workspace",
    ),
    _Cause(
        r"kMAX dimensions|optimization profile|IOptimizationProfile|profile \d+",
        "an optimization profile that the network does not support",
        "choose another --batch and --size",
    ),
)

# Fixes of parser errors, by error code.
_BY_CODE = {
    "MEM_ALLOC_FAILED": "free memory and build again",
    "MODEL_DESERIALIZE_FAILED": "export the model again: the file is damaged",
}
_BY_PREFIX = {
    "UNSUPPORTED": "use another version of TensorRT, preferably the newest; `maskrcnn lint FILE` shows known limits",
    "INVALID": "export the model again with this version of maskrcnn, and build from that file",
}
_REPORT = "report this with the file that `build-engine` wrote for TensorRT; until then run the ONNX file"


def failure(messages: Iterable[Message], what: str, expected: str) -> UserError:
    """Returns the error for a failed TensorRT call, with the cause found in its log.

    Args:
        messages: TensorRT's log messages during the call.
        what: the failure, such as "TensorRT built no engine".
        expected: what the call should have returned.
    """
    texts = list(dict.fromkeys(message.text for message in messages if "ERROR" in message.severity))
    log = "".join(f"\n  {reason_of(text)}" for text in texts[-_MAX_ERRORS:]) or " TensorRT logged no reason"
    cause = _cause_of(texts)
    if cause is None:
        return UserError(f"{what}:{log}", expected, _REPORT)
    return UserError(f"{what}, because of {cause.found}:{log}", expected, cause.fix)


def parsing_failure(parser: Any, messages: Iterable[Message], stage_of: Callable[[str], str]) -> UserError:
    """Returns the error for a graph that TensorRT's ONNX parser (or refitter) rejects: nodes, stages, and the fix.

    Args:
        parser: has `num_errors` and `get_error`.
        messages: TensorRT's log messages during the call.
        stage_of: returns the detector stage of a node name, "" if unknown.
    """
    errors = [parser.get_error(index) for index in range(parser.num_errors)]
    if not errors:
        return failure(messages, "TensorRT's ONNX parser rejects the graph", "a graph that it parses")
    lines = [f"\n  {_described(error, stage_of)}" for error in errors[:_MAX_ERRORS]]
    more = f"\n  and {len(errors) - _MAX_ERRORS} more" if len(errors) > _MAX_ERRORS else ""
    return UserError(
        f"{len(errors)} error(s) of TensorRT's ONNX parser:{''.join(lines)}{more}",
        "a graph that this version of TensorRT parses",
        _fix_of(errors[0]),
    )


def _described(error: Any, stage_of: Callable[[str], str]) -> str:
    name, op = error.node_name(), error.node_operator()
    stage = stage_of(name) if name else ""
    place = f" in the {stage}" if stage else ""
    node = f"node {error.node()}, {name or 'without name'} ({op}){place}: " if op or name else ""
    return f"{node}{_code_of(error)}: {reason_of(error.desc())}"


def _code_of(error: Any) -> str:
    """The code, such as UNSUPPORTED_NODE; parsed from the text because `name` of these codes fails in TensorRT 10.9."""
    return str(error.code()).rpartition(".")[2]


def _fix_of(error: Any) -> str:
    code, op = _code_of(error), error.node_operator()
    if op in contract.ALL_OPS:
        return (
            f"{op} is an op of maskrcnn, and its plugin was not found or rejected the node: use `maskrcnn "
            "build-engine`, which writes the graph itself, and see the messages above"
        )
    if cause := _cause_of([error.desc()]):
        return cause.fix
    by_prefix = (text for prefix, text in _BY_PREFIX.items() if code.startswith(prefix))
    return _BY_CODE.get(code) or next(by_prefix, _REPORT)


def _cause_of(texts: list[str]) -> _Cause | None:
    for cause in _CAUSES:
        if any(re.search(cause.pattern, text, re.IGNORECASE) for text in texts):
            return cause
    return None

"""What TensorRT says while it parses, builds and loads, in words that tell what to do.

Its functions answer with None or False and tell the reason to a logger; its parser keeps a list of errors besides.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from maskrcnn.errors import UserError
from maskrcnn.plugins import contract
from maskrcnn.runtime.trt.log import Message

_SHOWN = 3  # errors
_LONGEST = 400  # characters of a message that are shown
StageOf = Callable[[str], str]  # of a node's name: what it belongs to, as "box head"; "" where that is not known


@dataclass(frozen=True)
class _Cause:
    pattern: str  # in TensorRT's message, whatever the case
    came: str
    do: str


# In the order in which they are looked for: the first that any error matches tells most.
_CAUSES = (
    _Cause(
        r"SM \d+ is not supported",
        "a GPU that this version of TensorRT does not know",
        "install a version for it: newer ones leave out old GPUs, older ones do not know new ones",
    ),
    _Cause(
        r"no kernel image is available",
        "kernels that were not compiled for this GPU",
        "with the plugin library: `maskrcnn build-plugins --form library --force` on this machine; else build the "
        "engine here, with a TensorRT and a CUDA that know this GPU",
    ),
    _Cause(
        r"CUDA initialization failure|driver version is insufficient|CUDA driver version",
        "an NVIDIA driver that is missing or older than this TensorRT needs",
        "update the driver (https://www.nvidia.com/drivers), or install TensorRT for its CUDA; see `maskrcnn doctor`",
    ),
    _Cause(
        r"insufficient workspace",
        "a workspace limit that leaves a layer without an implementation",
        "raise --workspace, or leave it out",
    ),
    _Cause(
        r"out of memory|OutOfMemory|insufficient memory|alloc\w* fail|fail\w* to alloc|cudaErrorMemoryAllocation",
        "too little free memory on the GPU",
        "end what else uses it (`nvidia-smi` lists it), or build with smaller --batch and --size",
    ),
    _Cause(
        r"Version tag does not match|serialization version|expecting library version",
        "a plan of another version of TensorRT",
        "build the engine with the version that loads it, or with --version-compatible",
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
        "leave out --version-compatible, --hardware-compatible and --optimization-level, or give more --workspace",
    ),
    _Cause(
        r"kMAX dimensions|optimization profile|IOptimizationProfile|profile \d+",
        "an optimisation profile that the network cannot have",
        "choose other --batch and --size",
    ),
)

# What to do about an error of the parser, by the names of its codes.
_BY_CODE = {
    "MEM_ALLOC_FAILED": "free memory, and build again",
    "MODEL_DESERIALIZE_FAILED": "export the model again: the file is damaged",
}
_BY_PREFIX = {
    "UNSUPPORTED": "use another version of TensorRT, the newest if you can; `maskrcnn lint FILE` shows known limits",
    "INVALID": "export the model again with this version of maskrcnn, and build from that file",
}
_REPORT = "report this with the file that `build-engine` wrote for TensorRT, and run the ONNX file meanwhile"


def errors_in(messages: Iterable[Message]) -> list[str]:
    """The texts of the errors, without repetition."""
    found = [message.text for message in messages if "ERROR" in message.severity]
    return list(dict.fromkeys(found))


def failure(messages: Iterable[Message], what: str, expected: str) -> UserError:
    """The error for something that TensorRT did not do, by what it said.

    Args:
        messages: what it said; see `log.listen`.
        what: did not happen, as "TensorRT built no engine".
        expected: what would have been right.
    """
    texts = errors_in(messages)
    told = "".join(f"\n  {_shortened(text)}" for text in texts[-_SHOWN:]) or " TensorRT told no reason"
    cause = _cause_of(texts)
    if cause is None:
        return UserError(f"{what}:{told}", expected, _REPORT)
    return UserError(f"{what}, because of {cause.came}:{told}", expected, cause.do)


def parsing_failure(parser: Any, messages: Iterable[Message], stage_of: StageOf = lambda node: "") -> UserError:
    """The error for a graph that TensorRT's ONNX parser (or refitter) refuses: each node, its stage, what to do.

    Args:
        parser: with `num_errors` and `get_error`.
        messages: what it said; see `log.listen`.
        stage_of: which stage of the detector a node of the graph belongs to.
    """
    errors = [parser.get_error(index) for index in range(parser.num_errors)]
    if not errors:
        return failure(messages, "TensorRT's ONNX parser refuses the graph", "a graph that it takes")
    lines = [f"\n  {_described(error, stage_of)}" for error in errors[:_SHOWN]]
    more = f"\n  and {len(errors) - _SHOWN} more" if len(errors) > _SHOWN else ""
    return UserError(
        f"{len(errors)} error(s) of TensorRT's ONNX parser:{''.join(lines)}{more}",
        "a graph that this version of TensorRT takes",
        _remedy(errors[0]),
    )


def _described(error: Any, stage_of: StageOf) -> str:
    name, op = error.node_name(), error.node_operator()
    stage = stage_of(name) if name else ""
    place = f" in the {stage}" if stage else ""
    where = f"node {error.node()}, {name or 'without name'} ({op}){place}: " if op or name else ""
    return f"{where}{_code_of(error)}: {_shortened(error.desc())}"


def _code_of(error: Any) -> str:
    """As UNSUPPORTED_NODE; read from the text, as `name` of these codes is a method in 10.9 that cannot be called."""
    return str(error.code()).rpartition(".")[2]


def _remedy(error: Any) -> str:
    code, op = _code_of(error), error.node_operator()
    if op in contract.ALL_OPS:
        return (
            f"{op} is an op of maskrcnn, and its plugin was not found or refused the node: use `maskrcnn build-engine` "
            "with a graph that it made itself, and see the messages above"
        )
    if cause := _cause_of([error.desc()]):
        return cause.do
    by_prefix = (text for prefix, text in _BY_PREFIX.items() if code.startswith(prefix))
    return _BY_CODE.get(code) or next(by_prefix, _REPORT)


def _cause_of(texts: list[str]) -> _Cause | None:
    for cause in _CAUSES:
        if any(re.search(cause.pattern, text, re.IGNORECASE) for text in texts):
            return cause
    return None


def _shortened(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} …"

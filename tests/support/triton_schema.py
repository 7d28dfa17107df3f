"""Triton's configurations, read and checked: the text format, and the fields of ModelConfig that we write.

Names, types and numbers of the fields are those of model_config.proto in triton-inference-server/common.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

# By message, its fields: a plain type, an enumeration or a message, after `repeated`, or `map<key, value>`.
MESSAGES: dict[str, dict[str, str]] = {
    "ModelConfig": {
        "name": "string",
        "platform": "string",
        "backend": "string",
        "max_batch_size": "int32",
        "input": "repeated ModelInput",
        "output": "repeated ModelOutput",
        "optimization": "ModelOptimizationPolicy",
        "dynamic_batching": "ModelDynamicBatching",
        "ensemble_scheduling": "ModelEnsembling",
        "instance_group": "repeated ModelInstanceGroup",
        "default_model_filename": "string",
        "parameters": "map<string, ModelParameter>",
        "model_warmup": "repeated ModelWarmup",
    },
    "ModelInput": {
        "name": "string",
        "data_type": "DataType",
        "dims": "repeated int64",
        "reshape": "ModelTensorReshape",
        "optional": "bool",
    },
    "ModelOutput": {
        "name": "string",
        "data_type": "DataType",
        "dims": "repeated int64",
        "reshape": "ModelTensorReshape",
        "label_filename": "string",
    },
    "ModelTensorReshape": {"shape": "repeated int64"},
    "ModelOptimizationPolicy": {"cuda": "ModelOptimizationPolicy.Cuda"},
    "ModelOptimizationPolicy.Cuda": {
        "graphs": "bool",
        "graph_spec": "repeated ModelOptimizationPolicy.Cuda.GraphSpec",
    },
    "ModelOptimizationPolicy.Cuda.GraphSpec": {
        "batch_size": "int32",
        "input": "map<string, ModelOptimizationPolicy.Cuda.GraphSpec.Shape>",
    },
    "ModelOptimizationPolicy.Cuda.GraphSpec.Shape": {"dim": "repeated int64"},
    "ModelDynamicBatching": {
        "preferred_batch_size": "repeated int32",
        "max_queue_delay_microseconds": "uint64",
    },
    "ModelEnsembling": {"step": "repeated ModelEnsembling.Step"},
    "ModelEnsembling.Step": {
        "model_name": "string",
        "model_version": "int64",
        "input_map": "map<string, string>",
        "output_map": "map<string, string>",
    },
    "ModelInstanceGroup": {
        "count": "int32",
        "kind": "ModelInstanceGroup.Kind",
        "gpus": "repeated int32",
        "profile": "repeated string",
    },
    "ModelParameter": {"string_value": "string"},
    "ModelWarmup": {
        "name": "string",
        "batch_size": "uint32",
        "inputs": "map<string, ModelWarmup.Input>",
        "count": "uint32",
    },
    "ModelWarmup.Input": {
        "data_type": "DataType",
        "dims": "repeated int64",
        "zero_data": "bool",
        "random_data": "bool",
        "input_data_file": "string",
    },
}
ENUMS = {
    "DataType": {"TYPE_BOOL", "TYPE_UINT8", "TYPE_INT32", "TYPE_INT64", "TYPE_FP16", "TYPE_FP32", "TYPE_STRING"},
    "ModelInstanceGroup.Kind": {"KIND_AUTO", "KIND_GPU", "KIND_CPU", "KIND_MODEL"},
}
_BITS = {"int32": (-(2**31), 2**31), "int64": (-(2**63), 2**63), "uint32": (0, 2**32), "uint64": (0, 2**64)}
_TOKEN = re.compile(
    r'\s+|#[^\n]*|(?P<string>"(?:[^"\\\n]|\\.)*")|(?P<word>[A-Za-z_][\w.]*|-?\d+)|(?P<mark>[{}\[\]:,;])'
)
_ESCAPES = {"\\n": "\n", "\\r": "\r", "\\t": "\t", '\\"': '"', "\\\\": "\\"}

Message = dict[str, Any]


class NotThatFormat(AssertionError):
    """A text that Triton would not read."""


def parse(text: str) -> Message:
    """The ModelConfig in a text: fields by name, repeated ones as lists, maps as dictionaries.

    Raises:
        NotThatFormat: for bad syntax, unknown fields, values of another type, and fields given twice.
    """
    return _message(_Tokens(text), "ModelConfig", end="")


class _Tokens:
    def __init__(self, text: str) -> None:
        self.found: list[tuple[str, str]] = []
        position = 0
        while position < len(text):
            match = _TOKEN.match(text, position)
            if match is None:
                raise NotThatFormat(f"unreadable from {text[position : position + 30]!r}")
            position = match.end()
            if match.lastgroup:
                self.found.append((match.lastgroup, match[match.lastgroup]))
        self.found.append(("end", ""))
        self.place = 0

    def peek(self) -> str:
        return self.found[self.place][1]

    def take(self, *wanted: str) -> tuple[str, str]:
        kind, value = self.found[self.place]
        if wanted and value not in wanted:
            raise NotThatFormat(f"{value!r} where {' or '.join(wanted)} should be")
        self.place += 1
        return kind, value


def _message(tokens: _Tokens, name: str, *, end: str) -> Message:
    fields, found = MESSAGES[name], {}
    while tokens.peek() != end:
        kind, field = tokens.take()
        if kind != "word" or field not in fields:
            raise NotThatFormat(f"no field {field!r} in {name}")
        for value in _values(tokens, fields[field]):
            _add(found, field, value, fields[field], name)
        while tokens.peek() in (",", ";"):
            tokens.take()
    tokens.take(end)
    return found


def _values(tokens: _Tokens, declared: str) -> Iterator[Any]:
    """The value behind a field's name; several of a repeated field in brackets."""
    kind = declared.removeprefix("repeated ")
    is_message = kind in MESSAGES or kind.startswith("map<")
    if tokens.peek() == ":" or not is_message:
        tokens.take(":")
    if tokens.peek() != "[":
        yield _value(tokens, kind)
        return
    if kind == declared and not kind.startswith("map<"):
        raise NotThatFormat(f"a list for a single {kind}")
    tokens.take("[")
    yield []  # so that an empty list counts as given
    while tokens.peek() != "]":
        yield _value(tokens, kind)
        if tokens.peek() != "]":
            tokens.take(",")
    tokens.take("]")


def _add(found: Message, field: str, value: Any, declared: str, message: str) -> None:
    if declared.startswith(("repeated ", "map<")):
        empty: Any = [] if declared.startswith("repeated ") else {}
        held = found.setdefault(field, empty)
        if value == [] and not isinstance(value, dict):
            return
        held.append(value) if isinstance(held, list) else held.update([value])
    elif field in found:
        raise NotThatFormat(f"{field} twice in {message}")
    else:
        found[field] = value


def _value(tokens: _Tokens, kind: str) -> Any:
    if kind.startswith("map<"):
        return _entry(tokens, *kind.removeprefix("map<").removesuffix(">").split(", "))
    if kind in MESSAGES:
        tokens.take("{")
        return _message(tokens, kind, end="}")
    return _plain(*tokens.take(), kind)


def _entry(tokens: _Tokens, key_kind: str, value_kind: str) -> tuple[Any, Any]:
    tokens.take("{")
    held: Message = {}
    while tokens.peek() != "}":
        _, part = tokens.take("key", "value")
        (held[part],) = _values(tokens, key_kind if part == "key" else value_kind)
    tokens.take("}")
    if set(held) != {"key", "value"}:
        raise NotThatFormat(f"an entry of {sorted(held)}")
    return held["key"], held["value"]


def _plain(token: str, text: str, kind: str) -> Any:
    if kind == "string" and token == "string":
        return re.sub(r"\\.", lambda match: _ESCAPES[match[0]], text[1:-1])
    if kind == "bool" and text in ("true", "false"):
        return text == "true"
    if kind in _BITS and re.fullmatch(r"-?\d+", text):
        low, high = _BITS[kind]
        if low <= int(text) < high:
            return int(text)
    if kind in ENUMS and text in ENUMS[kind]:
        return text
    raise NotThatFormat(f"{text} is no {kind}")

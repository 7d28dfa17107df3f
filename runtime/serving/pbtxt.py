"""Protocol buffers in their text format, which Triton's configurations are written in.

A message is a dictionary of its fields; a repeated field is a list, of messages or of plain values. Source:
protobuf.dev/reference/protobuf/textformat-spec.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

_ESCAPES = {"\\": "\\\\", '"': '\\"', "\n": "\\n", "\r": "\\r", "\t": "\\t"}


class Symbol(str):
    """A value of an enumeration, which is written without quotes."""


def text_of(message: Mapping[str, Any]) -> str:
    """The text of a message, a field a line; fields in the dictionary's order."""
    return "".join(f"{line}\n" for line in _lines(message))


def map_of(values: Mapping[Any, Any]) -> list[dict[str, Any]]:
    """A `map<…>` field: entries with `key` and `value`."""
    return [{"key": key, "value": value} for key, value in values.items()]


def _lines(message: Mapping[str, Any]) -> Iterator[str]:
    for name, value in message.items():
        if isinstance(value, (list, tuple)) and not any(isinstance(part, Mapping) for part in value):
            yield f"{name}: [ {', '.join(map(_scalar, value))} ]" if value else f"{name}: [ ]"
            continue
        for part in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(part, Mapping):
                yield f"{name} {{"
                yield from (f"  {line}" for line in _lines(part))
                yield "}"
            else:
                yield f"{name}: {_scalar(part)}"


def _scalar(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, Symbol):
        return value
    if isinstance(value, str):
        return '"' + "".join(_ESCAPES.get(character, character) for character in value) + '"'
    if isinstance(value, (int, float)):
        return repr(value)
    raise TypeError(f"{value!r} is no value of a text format")

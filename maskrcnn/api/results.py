"""Base class of the results of `maskrcnn.api`."""

from __future__ import annotations

import dataclasses
from enum import Enum
from html import escape
from pathlib import Path
from typing import Any


class Result:
    """Base of the frozen dataclasses that API functions return.

    Fields with `repr=False` (arrays, models) are attributes only: neither printed nor part of `to_dict()`.
    """

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON-serialisable values: paths as text, enumerations as their value."""
        fields = dataclasses.fields(self)  # type: ignore[arg-type]
        return {field.name: _plain(getattr(self, field.name)) for field in fields if field.repr}

    def __str__(self) -> str:
        lines = [f"{name}: {_text(value)}" for name, value in self.to_dict().items() if value not in (None, [], {}, "")]
        return "\n".join([type(self).__name__, *(f"  {line}" for line in lines)])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr style='text-align:left'><th>{escape(name)}</th><td>{escape(_text(value))}</td></tr>"
            for name, value in self.to_dict().items()
            if value not in (None, [], {}, "")
        )
        return f"<table><caption>{type(self).__name__}</caption>{rows}</table>"


def _plain(value: Any) -> Any:
    if isinstance(value, Result):
        return value.to_dict()
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4f}"
    if isinstance(value, dict):
        return ", ".join(f"{name} {_text(item)}" for name, item in value.items())
    if isinstance(value, list):
        return ", ".join(map(_text, value))
    return str(value)

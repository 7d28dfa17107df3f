"""Values of dataclass fields: as YAML, JSON and the command line give them, and as the fields hold them."""

from __future__ import annotations

import dataclasses
import typing
from typing import Any

from maskrcnn.errors import UserError
from maskrcnn.preprocess import Preprocessing, with_preset

_LISTS = {int: "whole numbers", float: "numbers", str: "words"}  # what a list holds, in an error
_FORMS = {int: "[8, 11]", float: "[0.5, 2.0]", str: "[cat, dog]"}  # of a list, where the default is an empty one


def typed(kind: type, values: dict[str, Any], *, where: str = "") -> dict[str, Any]:
    """Values of some fields of a dataclass, each of its field's type; sections stay dictionaries.

    Lists become tuples, and whole numbers floats where asked for. Where a list of numbers is wanted, `8,11` is the
    list that it means, and a number alone is a list of one, unless the default has several: it might mean each of
    them. A section of which nothing is said is empty, and the name of a preset gives way to its fields.

    Args:
        kind: the dataclass.
        values: by the fields' names, any of them.
        where: what an error puts before a field's name.

    Raises:
        UserError: for fields that the dataclass does not have, and values of the wrong type.
    """
    types = typing.get_type_hints(kind)
    fields = {each.name: each for each in dataclasses.fields(kind)}
    unknown = sorted(str(name) for name in values if name not in fields)
    if unknown:
        raise UserError(
            f"{kind.__name__} with unknown field(s) {', '.join(unknown)}",
            f"fields among {', '.join(fields)}",
            "correct the name; a file of another version of maskrcnn is read by that version",
        )
    return {name: _value(f"{where}{name}", types[name], value, fields[name].default) for name, value in values.items()}


def _value(name: str, kind: Any, value: Any, default: Any = None) -> Any:
    if dataclasses.is_dataclass(kind):
        return _section(name, kind, value)
    if typing.get_origin(kind) is tuple:
        return _several(name, typing.get_args(kind)[0], value, default)
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        came = f"{name} {value!r} of type {type(value).__name__}"
        raise UserError(came, kind.__name__, "write a value of that type; in YAML 1e-4 is a string, 1.0e-4 a number")
    return value


def _section(name: str, kind: type, value: Any) -> Any:
    if isinstance(value, kind):
        return value
    value = with_preset(value) if kind is Preprocessing else value
    if value is None:  # all its lines are comments
        return {}
    if not isinstance(value, dict):
        raise UserError(
            f"{name} {value!r}",
            f"a section: fields of {kind.__name__} with their values",
            f"write {name}.FIELD=VALUE with --set, and in YAML `{name.rpartition('.')[2]}:` with indented lines below",
        )
    return typed(kind, value, where=f"{name}.")


def _several(name: str, inner: Any, value: Any, default: Any) -> tuple:
    """A list's values.

    Args:
        name: for errors.
        inner: type of each value.
        value: a list, `8,11`, or a number alone.
        default: of the field.
    """
    several = isinstance(default, tuple) and len(default) > 1
    if isinstance(value, str) and inner in (int, float):
        try:
            value = tuple(inner(part) for part in value.split(",") if part.strip())
        except ValueError as error:
            raise _no_list(name, inner, value, default) from error
    elif type(value) in (int, float) and inner in (int, float) and not several:
        value = (value,)
    if not isinstance(value, (list, tuple)):
        raise _no_list(name, inner, value, default)
    return tuple(_value(f"{name}[{number}]", inner, item) for number, item in enumerate(value))


def _no_list(name: str, inner: Any, value: Any, default: Any) -> UserError:
    form = f"[{', '.join(map(str, default))}]" if default else _FORMS.get(inner, "[[1, 2], [2, 3]]")
    return UserError(
        f"{name} {value!r}",
        f"a list of {_LISTS.get(inner, 'lists')}, as {form}",
        f"write it in such brackets, also where there is one value only; --set '{name}={form}'",
    )

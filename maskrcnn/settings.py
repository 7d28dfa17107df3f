"""Settings from YAML, JSON and the command line, converted to the types of dataclass fields."""

from __future__ import annotations

import dataclasses
import types
import typing
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from maskrcnn.errors import UserError, did_you_mean
from maskrcnn.imaging.preprocess import Preprocessing, with_preset

_LISTS = {int: "integers", float: "numbers", str: "strings"}  # element types in errors
_FORMS = {int: "[8, 11]", float: "[0.5, 2.0]", str: "[cat, dog]"}  # examples for fields with an empty default


def typed(kind: type, values: dict[str, Any], *, where: str = "") -> dict[str, Any]:
    """Convert values to the types of a dataclass's fields; sections stay dictionaries.

    Lists become tuples and integers become floats where required. For a list of numbers, `8,11` is accepted, and a
    single number becomes a list of one unless the default has several values. An empty section (None) becomes {}, and
    the name of a preset becomes its fields.

    Args:
        kind: the dataclass.
        values: values of any of its fields, by name.
        where: prefix of field names in errors.

    Raises:
        UserError: for unknown fields and values of the wrong type.
    """
    kinds = typing.get_type_hints(kind)
    fields = {each.name: each for each in dataclasses.fields(kind)}
    unknown = sorted(str(name) for name in values if name not in fields)
    if unknown:
        raise UserError(
            f"{kind.__name__} with unknown field(s) {', '.join(unknown)}",
            f"fields among {', '.join(fields)}",
            f"correct the name{did_you_mean(unknown[0], fields)}; a file of another version of maskrcnn is read by "
            "that version",
        )
    return {name: _value(f"{where}{name}", kinds[name], value, fields[name].default) for name, value in values.items()}


def _value(name: str, kind: Any, value: Any, default: Any = None) -> Any:
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        return _section(name, kind, value)
    if typing.get_origin(kind) is tuple:
        return _several(name, typing.get_args(kind)[0], value, default)
    if isinstance(kind, types.UnionType):  # the name of a preset, or values
        kind = str if isinstance(value, str) else next(each for each in typing.get_args(kind) if each is not str)
    if typing.get_origin(kind) is dict:
        if not isinstance(value, dict):
            found = f"{name} {value!r} of type {type(value).__name__}"
            raise UserError(found, "values by name", f"for example --set '{name}={{cat: 2.0, dog: 1.0}}'")
        return {str(key): _value(f"{name}.{key}", typing.get_args(kind)[1], item) for key, item in value.items()}
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        found = f"{name} {value!r} of type {type(value).__name__}"
        raise UserError(found, kind.__name__, "use a value of that type; in YAML, 1e-4 is a string, 1.0e-4 a number")
    return value


def _section(name: str, kind: type, value: Any) -> Any:
    if isinstance(value, kind):
        return value
    value = with_preset(value) if kind is Preprocessing else value
    if value is None:  # in YAML, a section with only comments
        return {}
    if not isinstance(value, dict):
        raise UserError(
            f"{name} {value!r}",
            f"a section: fields of {kind.__name__} with their values",
            f"write {name}.FIELD=VALUE with --set, and in YAML `{name.rpartition('.')[2]}:` with indented lines below",
        )
    return typed(kind, value, where=f"{name}.")


def _several(name: str, inner: Any, value: Any, default: Any) -> tuple:
    """Convert the values of a list.

    Args:
        name: for errors.
        inner: type of each value.
        value: a list, `8,11`, or a single number.
        default: default of the field.
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
        f"write it in brackets, even for a single value: --set '{name}={form}'",
    )


def recipes() -> dict[str, Path]:
    """The installed recipes, by name."""
    spec = find_spec("maskrcnn.configs")
    folder = Path(spec.origin).parent if spec and spec.origin else Path()
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def read_settings(path: Path) -> dict[str, Any]:
    """Read settings from a YAML file, from the `config.json` of a run, or from a recipe given by its name.

    Raises:
        UserError: if the file is missing, is not YAML or contains no mapping.
    """
    if not path.exists():  # configs/finetune.yaml of a clone is the recipe finetune elsewhere
        known = recipes()
        if path.stem not in known or path.parent.name not in ("", "configs"):
            expected = f"a YAML file of settings, or a recipe: {', '.join(known)}"
            raise UserError(f"--config {path}: No such file or directory", expected, "check --config")
        path = known[path.stem]
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}", "a YAML file of settings", "check --config") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not YAML ({error})", "a YAML file of settings", "correct the file") from error
    if not isinstance(values, dict):
        raise UserError(f"{path}: {type(values).__name__}", "a mapping of settings", "use lines such as `epochs: 12`")
    return values


def assignments(texts: list[str]) -> dict[str, Any]:
    """Nested settings from `section.field=value` strings; values are parsed as YAML.

    Raises:
        UserError: for a string without `=` or a value that is not YAML.
    """
    result: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not all(name.split(".")):
            raise UserError(f"--set {text}", "section.field=value", "for example --set model.detections=300")
        try:
            given = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise UserError(f"--set {text}", "a YAML value", "quote it or correct it") from error
        for part in reversed(name.split(".")):
            given = {part: given}
        result = merged(result, with_sections(given))
    return result


def with_sections(settings: dict[str, Any]) -> dict[str, Any]:
    """Replace preset names by the sections they stand for: `model: NAME`, `preprocessing: caffe`.

    This allows merging with other settings of the same section.

    Raises:
        UserError: for an unknown preset.
    """
    result, model = dict(settings), settings.get("model")
    if isinstance(model, str):
        result["model"] = {"name": model}
    elif isinstance(model, dict) and "preprocessing" in model:
        result["model"] = {**model, "preprocessing": with_preset(model["preprocessing"])}
    return result


def require_changes_of_a_run(settings: dict[str, Any]) -> None:
    """Raises a UserError unless these settings, all typed, can change a run that has begun.

    Weights and model come from the run's checkpoint; new values would have no effect.
    """
    if "weights" in settings:
        raise UserError(
            f"--resume with the weights {settings['weights']!r}",
            "no --weights: a run continues from its own weights",
            "omit --weights, or start a new run from those weights without --resume",
        )
    if "name" in settings.get("model", {}):
        raise UserError(
            f"--resume with the model {settings['model']['name']!r}",
            "no model: a run keeps its own model",
            "omit it, or start a new run of that model without --resume",
        )


def merged(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """Merge two settings recursively; the second takes precedence."""
    result = dict(first)
    for name, value in second.items():
        both = isinstance(value, dict) and isinstance(result.get(name), dict)
        result[name] = merged(result[name], value) if both else value
    return result

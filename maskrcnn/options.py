"""Settings of a run from the command line and from YAML: one dataclass stands behind both."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from maskrcnn.errors import UserError
from maskrcnn.preprocess import with_preset


def with_settings(kind: type) -> Callable[[Callable], Callable]:
    """A decorator that gives a command an option for each field of a dataclass that has a help text.

    The command gets those that the user gave as a dictionary `settings`.
    """

    def decorate(command: Callable) -> Callable:
        own = [p for name, p in inspect.signature(command, eval_str=True).parameters.items() if name != "settings"]
        types = typing.get_type_hints(kind)
        fields = [f for f in dataclasses.fields(kind) if "help" in f.metadata]
        made = [_parameter(f, types[f.name]) for f in fields]

        @functools.wraps(command)
        def with_dictionary(**values: Any) -> Any:
            given = {f.name: values.pop(f.name) for f in fields}
            return command(**values, settings={name: value for name, value in given.items() if value is not None})

        with_dictionary.__signature__ = inspect.Signature(own + made)  # type: ignore[attr-defined]
        with_dictionary.__annotations__ = {p.name: p.annotation for p in own + made}
        return with_dictionary

    return decorate


def _parameter(setting: dataclasses.Field, kind: Any) -> inspect.Parameter:
    choices = setting.metadata["choices"]
    text = setting.metadata["help"] + (f" One of {', '.join(choices)}." if choices else "")
    if setting.default not in ("", ()):
        text += f" Default {setting.default}."
    option = typer.Option(help=text, show_default=False)
    shown = kind if kind in (int, float, bool) else str
    return inspect.Parameter(
        setting.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[shown | None, option]
    )


def read_settings(path: Path) -> dict[str, Any]:
    """The settings of a YAML file, or of the JSON that a run keeps (which is YAML too).

    Raises:
        UserError: when the file is missing, is not YAML or holds no mapping.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}", "a YAML file of settings", "check --config") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not YAML ({error})", "a YAML file of settings", "correct the file") from error
    if not isinstance(values, dict):
        raise UserError(f"{path}: {type(values).__name__}", "a mapping of settings", "write `epochs: 12` and the like")
    return values


def assignments(texts: list[str]) -> dict[str, Any]:
    """Nested settings from `section.field=value` texts; values are read as YAML.

    Raises:
        UserError: for a text without `=` or a value that is not YAML.
    """
    made: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not all(name.split(".")):
            raise UserError(f"--set {text}", "section.field=value", "write for example --set model.detections=300")
        try:
            given = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise UserError(f"--set {text}", "a value that is YAML", "quote it or correct it") from error
        for part in reversed(name.split(".")):
            given = {part: given}
        made = merged(made, with_sections(given))
    return made


def with_sections(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings in which a name that stands for a section has become one: `model: NAME`, `preprocessing: caffe`.

    Only sections can be merged with what other files and options say of the same section, and only the fields of a
    preset count more than what was said before it.

    Raises:
        UserError: for a preset that there is not.
    """
    made, model = dict(settings), settings.get("model")
    if isinstance(model, str):
        made["model"] = {"name": model}
    elif isinstance(model, dict) and "preprocessing" in model:
        made["model"] = {**model, "preprocessing": with_preset(model["preprocessing"])}
    return made


def require_changes_of_a_run(settings: dict[str, Any]) -> None:
    """Raises a UserError unless these settings, all typed, can change a run that has begun.

    Weights and model are what it has learnt; given anew they would not be taken.
    """
    if "weights" in settings:
        raise UserError(
            f"--resume with the weights {settings['weights']!r}",
            "the weights that the run has already",
            "leave --weights out, or start a new run from those weights: --weights without --resume",
        )
    if "name" in settings.get("model", {}):
        raise UserError(
            f"--resume with the model {settings['model']['name']!r}",
            "the model that the run has already",
            "leave it out, or start a new run of that model without --resume",
        )


def merged(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """Both settings; where both have one the second's counts, section by section."""
    made = dict(first)
    for name, value in second.items():
        both = isinstance(value, dict) and isinstance(made.get(name), dict)
        made[name] = merged(made[name], value) if both else value
    return made

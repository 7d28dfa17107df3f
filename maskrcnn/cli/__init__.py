"""The command line: one file per command, which parses options, calls `maskrcnn.api`, and prints.

Heavy libraries are imported inside the commands, so that `maskrcnn --help` answers at once.
"""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from maskrcnn import __version__, errors
from maskrcnn.cli import (
    benchmark,
    build_engine,
    build_plugins,
    data,
    doctor,
    evaluate,
    export,
    inspect,
    predict,
    train,
    triton,
    verify,
    web,
)
from maskrcnn.cli.console import console, verbosity

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Mask R-CNN from training data to FP16 engines.",
)
app.command()(train.train)
app.command()(export.export)
app.command("build-engine")(build_engine.build_engine)
app.command("refit-engine")(build_engine.refit_engine)
app.command()(predict.predict)
app.command()(evaluate.evaluate)
app.command()(verify.verify)
app.command()(inspect.inspect)
app.command()(inspect.lint)
# The benchmark program parses its own options, including --help.
app.command(add_help_option=False, context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(
    benchmark.benchmark
)
app.command("build-plugins")(build_plugins.build_plugins)
app.command()(triton.triton)
app.command()(web.web)
app.command()(doctor.doctor)
app.add_typer(data.data_app, name="data")


def main() -> None:
    """Runs the command line. Errors are printed as three lines, with exit code 1."""
    with errors.report_errors(lambda: verbosity["verbose"]):
        sys.argv[1:] = map(_with_home, sys.argv[1:])
        app()


def _with_home(word: str) -> str:
    """Expands `~/` to the home folder in an argument; shells do not expand it after `--option=` and in quotes."""
    option, value = word.split("=", 1) if word.startswith("--") and "=" in word else ("", word)
    return f"{option}{'=' * bool(option)}{os.path.expanduser(value)}" if value.startswith("~/") else word


@app.callback(invoke_without_command=True)
def _global_options(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only.")] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Print every comparison, and the traceback of errors.")
    ] = False,
) -> None:
    verbosity["verbose"] = verbose
    console.quiet = quiet
    if version:
        print(__version__)
        raise typer.Exit()

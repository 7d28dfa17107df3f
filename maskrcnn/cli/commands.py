"""`maskrcnn doctor`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from maskrcnn.cli.console import console


def doctor(
    places: Annotated[list[Path] | None, typer.Argument(help="Engines, or folders with some, besides runs/.")] = None,
) -> None:
    """Versions, devices, compilers, plugins and engines of this machine, and what each missing one would enable."""
    from maskrcnn.cli.doctor import run_doctor

    run_doctor(console, places or ())

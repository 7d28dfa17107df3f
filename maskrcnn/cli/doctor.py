"""`maskrcnn doctor`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from maskrcnn import runs
from maskrcnn.cli.console import console, show


def doctor(
    places: Annotated[
        list[Path] | None, typer.Argument(help="Engine or folder of engines to check, besides runs/; repeatable.")
    ] = None,
) -> None:
    """Report versions, devices, compilers, plugins and engines, and what missing components would enable."""
    from maskrcnn.runtime.doctor import diagnose, report
    from maskrcnn.runtime.engine_files import find_engines

    engines = find_engines([*(places or ()), *([runs.FOLDER] if runs.FOLDER.is_dir() else [])])
    with console.status("inspecting this machine"):
        findings = diagnose(engines)
    show(report(findings))

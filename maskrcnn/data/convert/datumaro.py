"""Formats that the library Datumaro reads, by way of its COCO exporter."""

from __future__ import annotations

import importlib
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from maskrcnn.data.convert.coco_splits import open_coco
from maskrcnn.data.convert.source import Faults, Options, Source
from maskrcnn.errors import UserError, missing_library, reason_of

PREFIX = "datumaro:"  # of kinds, followed by Datumaro's name of the format, or "auto"


def open_datumaro(root: Path, options: Options, faults: Faults, *, format_name: str) -> Source:
    """Opens a dataset of any format that Datumaro imports with instances.

    Datumaro writes a copy with images to a temporary folder, which is removed with the source.

    Args:
        root: the dataset.
        options: `sets` are the subsets to take.
        faults: counts what the reader repairs.
        format_name: Datumaro's name of the format; "auto": detected.

    Raises:
        UserError: where the library is missing, or cannot read the dataset.
    """
    try:
        library: Any = importlib.import_module("datumaro.components.dataset")
    except ImportError as error:
        raise missing_library("datumaro", f"convert {PREFIX}{format_name}", "pip install datumaro") from error
    folder = tempfile.TemporaryDirectory(prefix="datumaro-")
    try:
        dataset = library.Dataset.import_from(str(root), None if format_name == "auto" else format_name)
        dataset.export(folder.name, "coco_instances", save_media=True)
    except Exception as error:  # its importers raise exceptions of many libraries
        reasons: list[BaseException] = [error]
        while reasons[-1].__cause__ is not None:
            reasons.append(reasons[-1].__cause__)
        raise UserError(
            f"{root}: Datumaro cannot read it as {format_name}: {'; '.join(map(reason_of, reasons))}",
            "a dataset of a format that Datumaro imports",
            f"name its format: datum detect {root} lists those that fit",
        ) from error
    source = open_coco(Path(folder.name), options, faults)
    read = source.read

    def read_while_there(entry: Any, _kept: Any = folder) -> Any:  # holds the folder as long as the source
        return read(entry)

    return replace(source, read=read_while_there)

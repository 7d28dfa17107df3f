"""Options shared by several commands."""

from __future__ import annotations

from typing import Annotated

import typer

from maskrcnn.errors import UserError

_BACKEND = "Backend"


def range_from_text(text: str | None) -> tuple[float, ...] | None:
    """Parses LOW,HIGH.

    Raises:
        UserError: for anything else.
    """
    if text is None:
        return None
    try:
        low, high = (float(part) for part in text.split(","))
    except ValueError as error:
        raise UserError(f"--pixel-range {text}", "two numbers", "write it as --pixel-range 0,4095") from error
    return low, high


BackendName = Annotated[
    str | None,
    typer.Option(
        help="Backend: torch, onnxruntime, openvino or tensorrt (default: the first that can run the file).",
        rich_help_panel=_BACKEND,
    ),
]
PixelRange = Annotated[
    str | None,
    typer.Option(
        metavar="LOW,HIGH",
        help="Sample values to map to black and white, for images of more than 8 bits (default: the model's range).",
        rich_help_panel="Images",
    ),
]
TileSize = Annotated[
    int | None,
    typer.Option(
        "--tile",
        metavar="PX",
        help="Side of the tiles to divide larger images into, such as 1024 (default: whole images).",
        rich_help_panel="Images",
    ),
]
TileOverlap = Annotated[
    float,
    typer.Option(
        "--overlap", help="Overlap of neighbouring tiles, as a share of their side.", rich_help_panel="Images"
    ),
]
ExifRule = Annotated[
    str,
    typer.Option(
        help="EXIF orientation: auto (from the annotated sizes), upright or stored.", rich_help_panel="Images"
    ),
]
ProviderName = Annotated[
    str | None,
    typer.Option(
        help="Execution provider of ONNX Runtime: cpu, cuda or tensorrt (default: the best that works).",
        rich_help_panel=_BACKEND,
    ),
]
PrecisionName = Annotated[
    str | None,
    typer.Option(help="Precision of PyTorch: fp32, bf16 or fp16 (default: fp32).", rich_help_panel=_BACKEND),
]
Overwrite = Annotated[
    bool,
    typer.Option(
        "--overwrite",
        help="Replace output files that this command did not write; input files are never replaced.",
        rich_help_panel="Output",
    ),
]

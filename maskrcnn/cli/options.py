"""Options that several commands share."""

from __future__ import annotations

from typing import Annotated

import typer

_BACKEND = "Backend"

BackendName = Annotated[
    str | None,
    typer.Option(
        help="Backend: torch, onnxruntime, openvino or tensorrt (default: the first that runs this kind of file).",
        rich_help_panel=_BACKEND,
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
        help="Replace output files that this command did not write; never a file that it reads.",
        rich_help_panel="Output",
    ),
]

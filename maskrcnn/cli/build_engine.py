"""`maskrcnn build-engine` and `maskrcnn refit-engine`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from maskrcnn.api.build_engine import BATCH, GATE_IMAGES, SIZE, Target
from maskrcnn.api.export import CALIBRATION_IMAGES
from maskrcnn.cli.console import ConsoleProgress, show, verbosity
from maskrcnn.cli.options import Overwrite
from maskrcnn.errors import UserError

_PRECISION, _ENGINE, _INT8 = "Precision (one is required)", "Engine", "8-bit integers"
_PROFILES, _TENSORRT, _GATE = "TensorRT: shapes", "TensorRT: settings", "Comparison with the ONNX file"


def _option(panel: str, *names: str, **options: Any) -> Any:
    return typer.Option(*names, rich_help_panel=panel, **options)


_GateImages = Annotated[
    Path | None,
    _option(_GATE, "--gate-images", help="Folder of images to compare on, in addition to drawn images."),
]
_GateAnnotations = Annotated[
    Path | None,
    _option(_GATE, "--gate-annotations", help="COCO annotations of these images, to compare AP as well."),
]
_GateMaxImages = Annotated[
    int,
    _option(
        _GATE, "--gate-max-images", min=1, help="Maximum number of images to compare on; AP uses all annotated images."
    ),
]


def build_engine(
    model: Annotated[
        Path | None,
        typer.Argument(help="ONNX file in fp32, or a checkpoint, which is exported first (default: newest export)."),
    ] = None,
    fp16: Annotated[bool, _option(_PRECISION, "--fp16", help="Half precision (16 bits).")] = False,
    fp32: Annotated[bool, _option(_PRECISION, "--fp32", help="Single precision.")] = False,
    bf16: Annotated[
        bool, _option(_PRECISION, "--bf16", help="Use bfloat16, 16 bits with the range of fp32; TensorRT only.")
    ] = False,
    int8: Annotated[
        Path | None,
        _option(
            _PRECISION,
            "--int8",
            metavar="CALIBRATION_DIR",
            help="Use 8-bit integers, with scales from a folder of images.",
        ),
    ] = None,
    tf32: Annotated[
        bool,
        _option(
            _PRECISION,
            "--tf32",
            help="Use TF32: products of 10-bit mantissas; also in fp32 layers of other precisions; TensorRT only.",
        ),
    ] = False,
    target: Annotated[
        Target, _option(_ENGINE, help="Library to build for; auto: TensorRT if available, else OpenVINO.")
    ] = Target.AUTO,
    output: Annotated[
        Path | None, _option(_ENGINE, help="Engine to write, .engine or .xml (default: next to the ONNX file).")
    ] = None,
    calibration_images: Annotated[
        int, _option(_INT8, min=1, help="Maximum number of calibration images.")
    ] = CALIBRATION_IMAGES,
    keep: Annotated[
        list[str] | None,
        _option(
            _INT8,
            help="Layers to leave unquantized: first, last, heads, backbone, fpn, or layer names; repeatable "
            "(default: last).",
        ),
    ] = None,
    batch: Annotated[
        str, _option(_PROFILES, help="Batch sizes: 1,4,8 makes three profiles, 1:4:8 a range tuned for 4.")
    ] = BATCH,
    size: Annotated[
        str,
        _option(
            _PROFILES,
            help="Image sizes in px, comma-separated: HEIGHTxWIDTH, a range MIN:OPT:MAX of such sizes, coco (range of "
            "the resized images), landscape, portrait.",
        ),
    ] = SIZE,
    plugin_library: Annotated[
        bool,
        _option(
            _TENSORRT,
            "--plugin-library",
            help="Use the plugins of libmaskrcnn_plugins.so instead of compiling them into the engine.",
        ),
    ] = False,
    workspace: Annotated[
        float | None, _option(_TENSORRT, metavar="GB", help="Scratch memory limit per layer, GB (default: all memory).")
    ] = None,
    optimization_level: Annotated[
        int | None, _option(_TENSORRT, help="Optimization level, 0 (fast build) to 5 (default: TensorRT's, 3).")
    ] = None,
    aux_streams: Annotated[
        int | None,
        _option(_TENSORRT, help="Maximum number of auxiliary streams; 0: one stream (default: TensorRT's choice)."),
    ] = None,
    version_compatible: Annotated[
        bool, _option(_TENSORRT, "--version-compatible", help="Support later TensorRT versions; slower.")
    ] = False,
    hardware_compatible: Annotated[
        str | None,
        _option(
            _TENSORRT,
            metavar="LEVEL",
            help="Support more GPUs: same_compute_capability or ampere_plus; slower (default: this GPU model).",
        ),
    ] = None,
    refit: Annotated[
        bool, _option(_TENSORRT, "--refit", help="Allow the weights to be replaced by `maskrcnn refit-engine`.")
    ] = False,
    strip_weights: Annotated[
        bool, _option(_TENSORRT, "--strip-weights", help="Omit the weights; `maskrcnn refit-engine` puts them back.")
    ] = False,
    timing_cache: Annotated[
        Path | None, _option(_TENSORRT, help="Timing cache file (default: one for this machine in the cache folder).")
    ] = None,
    gate_images: _GateImages = None,
    gate_annotations: _GateAnnotations = None,
    gate_max_images: _GateMaxImages = GATE_IMAGES,
    overwrite: Overwrite = False,
) -> None:
    """Build the fastest engine for this machine, and compare it with the ONNX file before keeping it."""
    from maskrcnn.api.build_engine import build_engine as run

    flags = {"fp16": fp16, "fp32": fp32, "bf16": bf16, "int8": int8 is not None}
    chosen = [name for name, is_set in flags.items() if is_set] or (["tf32"] if tf32 else [])
    if len(chosen) != 1:
        found = " and ".join(f"--{name}" for name in chosen) or "no precision"
        fix = "drop all but one" if chosen else "add --fp16"
        raise UserError(found, "one of --fp16, --fp32, --bf16, --int8, --tf32", fix)
    result = run(
        model,
        precision=chosen[0],  # type: ignore[arg-type]
        target=target,
        output=output,
        calibration=int8,
        calibration_images=calibration_images,
        keep=keep or (),
        tf32=tf32,
        batch=batch,
        size=size,
        plugin_library=plugin_library,
        workspace=workspace,
        optimization_level=optimization_level,
        aux_streams=aux_streams,
        version_compatible=version_compatible,
        hardware_compatible=hardware_compatible,
        refit=refit,
        strip_weights=strip_weights,
        timing_cache=timing_cache,
        gate_images=gate_images,
        gate_annotations=gate_annotations,
        gate_max_images=gate_max_images,
        overwrite=overwrite,
        progress=ConsoleProgress(),
    )
    show("\n".join(result.lines(verbose=verbosity["verbose"])))


def refit_engine(
    engine: Annotated[Path, typer.Argument(help="TensorRT engine built with --refit or --strip-weights.")],
    model: Annotated[Path, typer.Argument(help="ONNX file in fp32 with the weights.")],
    output: Annotated[Path, typer.Option(help="Engine to write.")],
    gate_images: _GateImages = None,
    gate_annotations: _GateAnnotations = None,
    gate_max_images: _GateMaxImages = GATE_IMAGES,
    overwrite: Overwrite = False,
) -> None:
    """Put weights into a TensorRT engine, and compare it with their ONNX file before keeping it."""
    from maskrcnn.api.build_engine import refit_engine as run

    result = run(
        engine,
        model,
        output=output,
        gate_images=gate_images,
        gate_annotations=gate_annotations,
        gate_max_images=gate_max_images,
        overwrite=overwrite,
        progress=ConsoleProgress(),
    )
    show("\n".join(result.lines(verbose=verbosity["verbose"])))

"""The options of `maskrcnn build-engine` and `maskrcnn refit-engine`; the work is in cli_engine.py."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from maskrcnn.errors import UserError

# Panels of the help: what every engine has, and what only TensorRT's have.
_ENGINE, _TENSORRT, _GATE = "Engine", "TensorRT", "Comparison with the ONNX file (TensorRT)"
_BATCH, _SIZE = "1", "coco"


class _Target(str, Enum):
    """What an engine is built for."""

    AUTO = "auto"
    TENSORRT = "tensorrt"
    OPENVINO = "openvino"


class _Compatible(str, Enum):
    """The GPUs beside this machine's own model that an engine runs on."""

    SAME_COMPUTE_CAPABILITY = "same_compute_capability"
    AMPERE_PLUS = "ampere_plus"


def _engine(*names: str, **options: Any) -> Any:
    return typer.Option(*names, rich_help_panel=_ENGINE, **options)


def _tensorrt(*names: str, **options: Any) -> Any:
    return typer.Option(*names, rich_help_panel=_TENSORRT, **options)


def _gate(*names: str, **options: Any) -> Any:
    return typer.Option(*names, rich_help_panel=_GATE, **options)


_GateFolder = Annotated[Path | None, _gate("--gate-images", help="Folder of images to compare on, too.")]
_GateAnnotations = Annotated[
    Path | None, _gate("--gate-annotations", help="COCO annotations of these images: AP may not fall either.")
]
_GateMost = Annotated[int, _gate("--gate-max-images", min=1, help="Most images to take; AP takes all annotated ones.")]


def build_engine(
    model: Annotated[Path | None, typer.Argument(help="ONNX file; default: the newest export.")] = None,
    fp16: Annotated[bool, _engine("--fp16", help="Half precision.")] = False,
    fp32: Annotated[bool, _engine("--fp32", help="Single precision.")] = False,
    bf16: Annotated[bool, _engine("--bf16", help="Half precision with FP32's range; TensorRT.")] = False,
    int8: Annotated[
        Path | None, _engine("--int8", metavar="CALIBRATION_DIR", help="8-bit integers, scales from these images.")
    ] = None,
    tf32: Annotated[
        bool, _engine("--tf32", help="Alone, or for what stays in FP32: products of 10 bits; TensorRT.")
    ] = False,
    calibration_images: Annotated[int, _engine(min=1, help="Most images to take from CALIBRATION_DIR.")] = 64,
    keep: Annotated[list[str] | None, _engine(help="With --int8: as for export.")] = None,
    target: Annotated[_Target, _engine(help="auto: TensorRT where it can be, else OpenVINO.")] = _Target.AUTO,
    output: Annotated[Path | None, _engine(help="Default: beside the ONNX file.")] = None,
    batch: Annotated[str, _tensorrt(help="Images: 1,4,8 makes three profiles, 1:4:8 a range tuned for 4.")] = _BATCH,
    size: Annotated[
        str,
        _tensorrt(help="HxW, MIN:OPT:MAX of such, coco (what resizing gives), landscape, portrait; several: commas."),
    ] = _SIZE,
    plugin_library: Annotated[
        bool, _tensorrt("--plugin-library", help="Leave the plugins in libmaskrcnn_plugins.so.")
    ] = False,
    workspace: Annotated[float | None, _tensorrt(metavar="GB", help="Most scratch memory; default all.")] = None,
    optimization_level: Annotated[int | None, _tensorrt(help="0 (fast build) to 5; TensorRT's default is 3.")] = None,
    aux_streams: Annotated[int | None, _tensorrt(help="For branches side by side; 0: one stream.")] = None,
    version_compatible: Annotated[
        bool, _tensorrt("--version-compatible", help="Runs in later versions of TensorRT; slower.")
    ] = False,
    hardware_compatible: Annotated[_Compatible | None, _tensorrt(help="Runs on other GPUs, too; slower.")] = None,
    refit: Annotated[bool, _tensorrt("--refit", help="Other weights can be put in later.")] = False,
    strip_weights: Annotated[bool, _tensorrt("--strip-weights", help="Leave the weights out.")] = False,
    timing_cache: Annotated[Path | None, _tensorrt(help="Default: one for this machine in the cache.")] = None,
    gate_images: _GateFolder = None,
    gate_annotations: _GateAnnotations = None,
    gate_max_images: _GateMost = 16,
) -> None:
    """Builds the fastest engine for this machine and compares it with the ONNX file."""
    from maskrcnn.api.build_engine import TensorRtChoice, run_build_engine
    from maskrcnn.api.export import Int8Options
    from maskrcnn.cli.console import console
    from maskrcnn.runtime.backends.tensorrt_library import Hardware, PluginForm, Weights
    from maskrcnn.runtime.build.gate import GateImages
    from maskrcnn.runtime.build.network import BuildOptions

    precision = _precision({"fp16": fp16, "fp32": fp32, "bf16": bf16, "int8": int8 is not None}, tf32=tf32)
    if keep and int8 is None:
        raise UserError("--keep without --int8", "--int8 CALIBRATION_DIR", "drop --keep")
    if refit and strip_weights:
        raise UserError("--refit and --strip-weights", "one of them", "for other weights than its own: --refit")
    options = BuildOptions(
        plugins=PluginForm.LIBRARY if plugin_library else PluginForm.AOT,
        tf32=tf32,
        workspace_gb=workspace,
        optimization_level=optimization_level,
        aux_streams=aux_streams,
        hardware=Hardware(hardware_compatible.value) if hardware_compatible else Hardware.NONE,
        version_compatible=version_compatible,
        weights=Weights.REFITTABLE if refit else Weights.STRIPPED if strip_weights else Weights.FIXED,
    )
    given = {
        "--tf32": tf32 and precision not in ("fp32", "tf32"),
        "--batch": batch if batch != _BATCH else None,
        "--size": size if size != _SIZE else None,
        "--plugin-library": plugin_library,
        "--workspace": workspace,
        "--optimization-level": optimization_level,
        "--aux-streams": aux_streams,
        "--version-compatible": version_compatible,
        "--hardware-compatible": hardware_compatible and hardware_compatible.value,
        "--refit": refit,
        "--strip-weights": strip_weights,
    }
    paths = {"--timing-cache": timing_cache, "--gate-images": gate_images, "--gate-annotations": gate_annotations}
    run_build_engine(
        console,
        model,
        precision=precision,
        int8=Int8Options(calibration=int8, keep=tuple(keep or ()), images=calibration_images),
        target=target.value,
        output=output,
        tensorrt=TensorRtChoice(
            batch=batch,
            size=size,
            options=options,
            images=GateImages(folder=gate_images, annotations=gate_annotations, limit=gate_max_images),
            timing_cache=timing_cache,
            given=_words(given),
            given_paths=_words(paths),
        ),
    )


def refit_engine(
    engine: Annotated[Path, typer.Argument(help="A TensorRT engine built with --refit or --strip-weights.")],
    model: Annotated[Path, typer.Argument(help="ONNX file in single precision, with the weights.")],
    output: Annotated[Path, typer.Option(help="The engine with these weights.")],
    gate_images: _GateFolder = None,
    gate_annotations: _GateAnnotations = None,
    gate_max_images: _GateMost = 16,
) -> None:
    """Puts weights into a TensorRT engine and compares it with the ONNX file that they come from."""
    from maskrcnn.api.build_engine import run_refit_engine
    from maskrcnn.cli.console import console
    from maskrcnn.runtime.build.gate import GateImages

    images = GateImages(folder=gate_images, annotations=gate_annotations, limit=gate_max_images)
    run_refit_engine(console, engine, model, output=output, images=images)


def _precision(flags: Mapping[str, bool], *, tf32: bool) -> str:
    """The one that is asked for; --tf32 alone, or with --fp32, is one too."""
    chosen = [name for name, is_set in flags.items() if is_set]
    if len(chosen) > 1 or not (chosen or tf32):
        came = " and ".join(f"--{name}" for name in chosen) or "no precision"
        do = "drop all but one" if chosen else "add --fp16"
        raise UserError(came, "one of --fp16, --fp32, --bf16, --int8, --tf32", do)
    return "tf32" if tf32 and chosen in ([], ["fp32"]) else chosen[0]


def _words(given: Mapping[str, Any]) -> tuple[str, ...]:
    """The options that are set, as they are written."""
    words = []
    for name, value in given.items():
        if value is not None and value is not False:
            words += [name] if value is True else [name, str(value)]
    return tuple(words)

"""`maskrcnn.build_engine(...)` and `maskrcnn.refit_engine(...)`: TensorRT and OpenVINO engines of exported files."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from maskrcnn import runs
from maskrcnn.api.export import CALIBRATION_IMAGES, temporary_folder, write_variant
from maskrcnn.api.progress import Progress
from maskrcnn.api.results import Result
from maskrcnn.errors import UserError
from maskrcnn.files import ONNX, OPENVINO, FileKind, Output, check_outputs

if TYPE_CHECKING:
    from maskrcnn.plugins.toolchain import Toolchain
    from maskrcnn.runtime.build.request import BuildRequest, BuiltEngine, Comparison

EnginePrecision = Literal["fp16", "fp32", "bf16", "int8", "tf32"]
_HALF = ("fp16", "bf16")
_MAX_WARNINGS = 3  # number of TensorRT's warnings to print; the result has all
BATCH, SIZE, GATE_IMAGES = "1", "coco", 16  # defaults


class Target(str, Enum):
    """Library that an engine is built for."""

    AUTO = "auto"  # TensorRT if available, else OpenVINO
    TENSORRT = "tensorrt"
    OPENVINO = "openvino"


@dataclass(frozen=True, repr=False)
class BuildResult(Result):
    """An engine, and its difference from the ONNX file that it was built from."""

    path: Path
    source: Path
    backend: str  # "tensorrt" or "openvino"
    precision: str
    size_mb: float
    difference: str  # from the ONNX file in ONNX Runtime
    warnings: list[str]  # from TensorRT
    comparison: Comparison = field(repr=False)  # the difference as values
    stamp: dict[str, str] = field(repr=False)  # machine, versions and settings of the build

    def lines(self, *, verbose: bool = False) -> list[str]:
        """The result as lines of text, with all values of the comparison if verbose."""
        stamp = self.stamp
        compared = self.comparison.summary()
        if verbose:
            compared += f"\ncompared with ONNX Runtime: {self.difference}"
        if self.backend == "openvino":
            return [
                compared,
                f"weights {stamp['weights']}, execution {stamp['execution']} on {stamp['cpu']}",
                f"{self.path} and {self.path.with_suffix('.bin').name}, from {self.source}",
            ]
        return [
            *(f"TensorRT warns: {warning}" for warning in self.warnings[:_MAX_WARNINGS]),
            compared,
            f"{stamp['precision']} on {stamp['gpu']} with TensorRT {stamp['tensorrt']}, plugins: {stamp['plugins']}",
            f"{self.path} ({self.size_mb} MB) and {self.path.name}.json, from {self.source}",
        ]


def build_engine(
    model: str | Path | None = None,
    *,
    precision: EnginePrecision = "fp16",
    target: Target | str = Target.AUTO,
    output: str | Path | None = None,
    calibration: str | Path | None = None,
    calibration_images: int = CALIBRATION_IMAGES,
    keep: Sequence[str] = (),
    tf32: bool = False,
    batch: str | int = BATCH,
    size: str = SIZE,
    plugin_library: bool = False,
    workspace: float | None = None,
    optimization_level: int | None = None,
    aux_streams: int | None = None,
    version_compatible: bool = False,
    hardware_compatible: str | None = None,
    refit: bool = False,
    strip_weights: bool = False,
    timing_cache: str | Path | None = None,
    gate_images: str | Path | None = None,
    gate_annotations: str | Path | None = None,
    gate_max_images: int = GATE_IMAGES,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> BuildResult:
    """Builds the fastest engine for this machine, and compares it with the ONNX file before keeping it.

    The options from `batch` to `timing_cache` apply to TensorRT only.

    Args:
        model: exported ONNX file in single precision, or a checkpoint, which is exported first. Default: the newest
            export.
        precision: precision of the arithmetic; "bf16" and "tf32" for TensorRT only.
        target: library to build for.
        output: engine to write, `.engine` or `.xml`. Default: next to the ONNX file, with the precision in its name.
        calibration: with int8, folder of images to compute the scales from.
        calibration_images: maximum number of calibration images.
        keep: with int8, layers that stay in floating point; see `export`.
        tf32: round the factors of float32 products to 10-bit mantissas; TensorRT only.
        batch: batch size, or several: "1,4,8" makes three profiles, "1:4:8" a range tuned for 4.
        size: image sizes: "HxW", a range "HxW:HxW:HxW", "coco", "landscape", "portrait"; separate several by commas.
        plugin_library: use the plugins of libmaskrcnn_plugins.so instead of compiling them into the engine.
        workspace: scratch memory limit per layer, GB. Default: all GPU memory.
        optimization_level: 0 (fast build) to 5. Default: TensorRT's, 3.
        aux_streams: maximum number of auxiliary streams. Default: TensorRT's choice.
        version_compatible: build an engine that later TensorRT versions load; slower.
        hardware_compatible: "same_compute_capability" or "ampere_plus": also run on these GPUs; slower.
        refit: weights can be replaced later, see `refit_engine`.
        strip_weights: write the engine without its weights; `refit_engine` puts them back.
        timing_cache: TensorRT timing cache file. Default: one for this machine in the cache folder.
        gate_images: folder of images to compare on, in addition to drawn images.
        gate_annotations: COCO annotations of these images, to compare AP as well.
        gate_max_images: maximum number of images of `gate_images` to compare on; AP uses all annotated images.
        overwrite: replace existing output files that are not engines; input files are never replaced.
        progress: receives messages and steps.

    Raises:
        UserError: if options contradict each other, the engine cannot be built here, or it differs from the ONNX file
            by more than its precision explains.
    """
    from maskrcnn.runtime.backends.tensorrt_library import Hardware, PluginForm, Weights, tensorrt_obstacle
    from maskrcnn.runtime.build.request import BuildRequest

    progress = progress or Progress()
    _check_options(precision, target, calibration, keep, hardware_compatible, refit=refit, strip_weights=strip_weights)
    target = Target(target)
    onnx = runs.newest_onnx() if model is None else _exported(Path(model), progress)
    obstacle = None if target is Target.OPENVINO else tensorrt_obstacle()
    is_openvino = target is Target.OPENVINO or (target is Target.AUTO and obstacle is not None)
    if tf32 and precision == "fp32":
        precision = "tf32"
    request = BuildRequest(
        model=onnx,
        graph=onnx.with_suffix(f".{precision}.tensorrt.onnx"),
        output=_engine_path(output, onnx, precision, ".xml" if is_openvino else ".engine"),
        precision=precision,
        calibration=_path(calibration),
        calibration_images=calibration_images,
        keep=tuple(keep),
        batch=str(batch),
        size=size,
        plugins=PluginForm.LIBRARY if plugin_library else PluginForm.AOT,
        tf32=tf32 or precision == "tf32",
        workspace_gb=workspace,
        optimization_level=optimization_level,
        aux_streams=aux_streams,
        hardware=Hardware(hardware_compatible or Hardware.NONE),
        version_compatible=version_compatible,
        weights=Weights.REFITTABLE if refit else Weights.STRIPPED if strip_weights else Weights.FIXED,
        timing_cache=_path(timing_cache),
        gate_images=_path(gate_images),
        gate_annotations=_path(gate_annotations),
        gate_max_images=gate_max_images,
        stage_of=_StageOfNode(onnx.with_suffix(f".{precision}.tensorrt.onnx")),
    )
    _check_outputs(request, overwrite=overwrite)
    if not is_openvino:
        return _build_tensorrt(request, obstacle, progress)
    gate_options = ("--gate-images", "--gate-annotations")
    words = request.tensorrt_options()
    options = " ".join(word for n, word in enumerate(words) if not {word, words[n - 1]} & {*gate_options})
    if obstacle is None and options:
        raise UserError(f"{options} for OpenVINO", "options of TensorRT only", "drop them, or use --target tensorrt")
    if obstacle is not None:
        progress.message(f"TensorRT: {obstacle.found}; building the CPU engine with OpenVINO")
        if options:
            progress.message(f"options of TensorRT only, without effect: {options}")
    return _build_openvino(request, progress)


def refit_engine(
    engine: str | Path,
    model: str | Path,
    *,
    output: str | Path,
    gate_images: str | Path | None = None,
    gate_annotations: str | Path | None = None,
    gate_max_images: int = GATE_IMAGES,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> BuildResult:
    """Puts the weights of an ONNX file into a TensorRT engine, and compares it with the file before keeping it.

    Args:
        engine: engine built with `refit` or `strip_weights`; this file is not changed.
        model: exported ONNX file in single precision.
        output: engine to write.
        gate_images, gate_annotations, gate_max_images, overwrite: as in `build_engine`.
        progress: receives messages and steps.

    Raises:
        UserError: if the engine cannot receive these weights, or the result differs from the ONNX file.
    """
    from maskrcnn.export.variants import single_precision
    from maskrcnn.runtime.backends.tensorrt_library import PluginForm, tensorrt_obstacle
    from maskrcnn.runtime.build.refit import check_refittable, refit_tensorrt_engine
    from maskrcnn.runtime.build.request import BuildRequest

    progress = progress or Progress()
    engine, onnx, output = Path(engine), Path(model), Path(output)
    if output.suffix != ".engine" or os.path.realpath(output) == os.path.realpath(engine):
        raise UserError(f"--output {output}", "another file that ends in .engine", "choose another name")
    metadata = check_refittable(engine, onnx)
    single_precision(onnx)
    if obstacle := tensorrt_obstacle():
        raise obstacle
    graph = onnx.with_suffix(f".{metadata.precision}.tensorrt.onnx")
    request = BuildRequest(
        model=onnx,
        graph=graph,
        output=output,
        precision=metadata.precision,
        plugins=PluginForm(metadata.stamp["plugins"]),
        gate_images=_path(gate_images),
        gate_annotations=_path(gate_annotations),
        gate_max_images=gate_max_images,
        stage_of=_StageOfNode(graph),
    )
    _check_outputs(request, engine, overwrite=overwrite)
    _write_graph(request, progress)
    return _result(refit_tensorrt_engine(engine, request, progress), onnx, "tensorrt")


def _exported(model: Path, progress: Progress) -> Path:
    """Returns the ONNX file of a checkpoint: the one next to it if exported from it, else a new export."""
    if model.is_dir():
        raise UserError(f"{model}: a folder", "an ONNX file, or a checkpoint", "give the path of the file")
    if model.suffix != ".safetensors":
        return model
    from maskrcnn.api.export import export
    from maskrcnn.metadata import sha256_of
    from maskrcnn.runtime.engine_files import read_model

    onnx = model.with_name(runs.ONNX)
    with suppress(UserError):  # the file is missing or not a checkpoint's export
        metadata = read_model(onnx)[1]
        if metadata.source_sha256 == sha256_of(model) and metadata.precision == "fp32":
            return onnx
    return export(model, progress=progress).path


class _StageOfNode:
    """Maps the nodes of a graph to stages of the detector; reads the file on the first call."""

    def __init__(self, graph: Path) -> None:
        self._graph = graph
        self._stages: dict[str, str] | None = None

    def __call__(self, node: str) -> str:
        if self._stages is None:
            import onnx

            from maskrcnn.export.inspection import stages_by_node

            proto = onnx.load(self._graph)
            names = (each.name for each in proto.graph.node)
            self._stages = dict(zip(names, stages_by_node(proto), strict=True))
        return self._stages.get(node, "")


def _check_options(
    precision: str,
    target: Target | str,
    calibration: str | Path | None,
    keep: Sequence[str],
    hardware_compatible: str | None,
    *,
    refit: bool,
    strip_weights: bool,
) -> None:
    from maskrcnn.runtime.backends.tensorrt_library import Hardware

    choices = {
        "precision": (precision, EnginePrecision.__args__),  # type: ignore[attr-defined]
        "--target": (target, [each.value for each in Target]),
        "--hardware-compatible": (hardware_compatible, [None, *(h.value for h in Hardware if h is not Hardware.NONE)]),
    }
    for name, (value, allowed) in choices.items():
        if value not in allowed:
            known = ", ".join(word for word in allowed if word is not None)
            raise UserError(f"{name} {value}", f"one of {known}", "choose one of these")
    if (precision == "int8") != (calibration is not None):
        found = "int8 without calibration images" if calibration is None else f"calibration images with {precision}"
        raise UserError(found, "--int8 CALIBRATION_DIR", "add a folder of images, or choose another precision")
    if keep and precision != "int8":
        raise UserError("--keep without --int8", "--int8 CALIBRATION_DIR", "drop --keep")
    if refit and strip_weights:
        raise UserError("--refit and --strip-weights", "one of them", "use --refit to replace the weights later")


def _check_outputs(request: BuildRequest, *inputs: Path, overwrite: bool) -> None:
    """Refuses outputs that would replace input files, or files that are not engines."""
    from maskrcnn.runtime.engine_files import metadata_path

    path = request.output
    description = FileKind.starting_with("the metadata of an engine", rb'\{"model": ')
    plan = FileKind("an engine of maskrcnn", lambda path: description.recognises(metadata_path(path)))
    weights = FileKind("the weights of an OpenVINO model", lambda path: OPENVINO.recognises(path.with_suffix(".xml")))
    cache = FileKind("a timing cache, .cache", lambda path: path.suffix == ".cache")  # in TensorRT's own format
    if path.suffix == ".xml":
        outputs = [Output("--output", path, OPENVINO), Output("--output", path.with_suffix(".bin"), weights)]
    else:
        outputs = [
            Output("--output", path, plan),
            Output("--output", metadata_path(path), description),
            Output("MODEL", request.graph, ONNX),  # written next to the model
            *([Output("--timing-cache", request.timing_cache, cache)] if request.timing_cache else []),
        ]
    read = (request.model, request.calibration, request.gate_images, request.gate_annotations, *inputs)
    check_outputs(outputs, read, overwrite=overwrite)


def _path(value: str | Path | None) -> Path | None:
    return None if value is None else Path(value)


def _engine_path(output: str | Path | None, onnx: Path, precision: str, suffix: str) -> Path:
    path = Path(output) if output else onnx.with_suffix(f".{precision}{suffix}")
    if path.suffix != suffix:
        raise UserError(f"--output {path}", f"a name that ends in {suffix}", f"use --output {path.with_suffix(suffix)}")
    return path


def _result(built: BuiltEngine, source: Path, backend: str) -> BuildResult:
    return BuildResult(
        path=built.path,
        source=source,
        backend=backend,
        precision=built.metadata.precision,
        size_mb=round(built.path.stat().st_size / 1e6, 1),
        difference=str(built.comparison),
        warnings=list(built.warnings),
        comparison=built.comparison,
        stamp=built.metadata.stamp,
    )


# TensorRT


def _build_tensorrt(request: BuildRequest, obstacle: UserError | None, progress: Progress) -> BuildResult:
    from maskrcnn.export.variants import single_precision

    _, metadata = single_precision(request.model)
    progress.message("profiles: " + "; ".join(map(str, request.profiles(metadata.preprocessing))))
    _write_graph(request, progress)
    if obstacle is not None:
        if request.gate_annotations is not None and request.precision in (*_HALF, "int8"):
            _report_simulated_ap(request, progress)
        raise UserError(
            f"{obstacle.found}; the graph for TensorRT's parser is written: {request.graph}",
            obstacle.expected,
            obstacle.fix,
        )
    from maskrcnn.runtime.build.tensorrt import build_tensorrt_engine

    return _result(build_tensorrt_engine(request, progress), request.model, "tensorrt")


def _write_graph(request: BuildRequest, progress: Progress) -> None:
    """Writes the graph for TensorRT's parser, lints it, and compiles the plugins: all steps that need no TensorRT.

    Raises:
        UserError: if the file is not in single precision, if the graph in another precision differs from it, or if the
            lint reports errors.
    """
    from maskrcnn.runtime.backends.tensorrt_library import PluginForm

    is_aot = request.plugins is PluginForm.AOT
    graph, precision = request.graph, request.precision
    with temporary_folder(graph, request.model) as folder:
        draft = folder / graph.name
        _, lint = write_variant(
            request.model,
            draft,
            precision="fp32" if precision == "tf32" else precision,
            # For half precision, the comparison images also determine the range of activations.
            calibration=request.calibration or (request.gate_images if precision in _HALF else None),
            calibration_images=request.calibration_images,
            keep=request.keep,
            tensorrt=True,
            aot=is_aot,
            progress=progress,
        )
        assert lint is not None, "given for TensorRT"
        if lint.errors:
            raise UserError(
                f"{len(lint.errors)} node(s) of {request.model} that TensorRT's parser rejects, see above",
                "a graph without lint errors",
                "apply the fixes of the lint report; if maskrcnn exported the file, report it",
            )
        draft.replace(graph)
    progress.message(f"{graph} ({graph.stat().st_size / 1e6:.1f} MB): graph for TensorRT's parser")
    if is_aot:
        _compile_kernels(request, progress)
    else:
        _find_library(progress)


def _compile_kernels(request: BuildRequest, progress: Progress) -> None:
    """Compiles the kernels that TensorRT will request, so that a failure has a readable error."""
    import onnx

    from maskrcnn.export.tensorrt.flavour import kernels_of
    from maskrcnn.plugins import aot_kernels, build, toolchain
    from maskrcnn.runtime.backends.tensorrt_library import OLDEST_ARCH, Hardware

    tools = toolchain.find_toolchain()
    if not (tools.nvrtc or tools.nvcc):
        missing = toolchain.NVRTC
        progress.message(f"plugin kernels not compiled: no {missing.what}; to install it: {missing.remedy}")
        return
    image, note = aot_kernels.Image.PTX, ""
    if request.hardware is Hardware.AMPERE_PLUS:
        arch = aot_kernels.architecture(tools, OLDEST_ARCH)
    elif tools.gpus:
        arch, image = aot_kernels.architecture(tools), aot_kernels.image_for(tools)
    else:  # the oldest common architecture, whose PTX runs on newer GPUs
        arch, note = aot_kernels.architecture(tools, build.COMMON_ARCHITECTURES[0]), ", as there is no GPU here"
    kernels = kernels_of(onnx.load(request.graph))
    with progress.task("compiling the plugin kernels", len(kernels)) as advance:
        for kernel in kernels:
            aot_kernels.compile_kernel(kernel, arch=arch, toolchain=tools, image=image)
            advance(1)
    compiler = aot_kernels.compiler_name(tools)
    progress.message(f"{len(kernels)} plugin kernels compiled by {compiler} for sm_{arch}{note}")


def _find_library(progress: Progress) -> None:
    """Finds the plugin library in the cache, or compiles it. Without a compiler, loading it will raise an error."""
    from maskrcnn.plugins import build, toolchain
    from maskrcnn.runtime.backends.tensorrt_library import import_tensorrt

    tools, kind = toolchain.find_toolchain(), build.Library.PLUGINS
    version = tools.tensorrt.version if tools.tensorrt else None
    with suppress(UserError):
        version = import_tensorrt().__version__  # the TensorRT that will load the library
    path = build.find_library(kind, tools.gpus[0] if tools.gpus else None, tensorrt=version)
    if path is None:
        if missing := _library_obstacle(tools, version):
            progress.message(f"plugin library: {missing}")
            return
        with progress.task(f"compiling {kind.file_name}"):
            path = build.build_library(kind, arch=(), toolchain=tools)
    progress.message(f"plugin library: {path}")


def _library_obstacle(tools: Toolchain, version: str | None) -> str:
    """Why no library for this TensorRT version can be compiled; "" if it can."""
    from maskrcnn.plugins import build

    if missing := build.obstacle(build.Library.PLUGINS, tools):
        return str(missing)
    headers = tools.tensorrt
    if headers is None or (version or "").partition(".")[0] == headers.version.partition(".")[0]:
        return ""
    return (
        f"the headers in {headers.folder} are of TensorRT {headers.version}, and {version} is installed; to compile "
        "with its headers: `maskrcnn build-plugins --form library --tensorrt-include DIR`"
    )


def _report_simulated_ap(request: BuildRequest, progress: Progress) -> None:
    """Reports the AP of the graph with every layer rounded to its precision, and the AP in single precision."""
    from maskrcnn.runtime.build.gate import gate_dataset
    from maskrcnn.runtime.detector import Detector
    from maskrcnn.runtime.evaluation.evaluate import evaluate

    dataset = gate_dataset(request)
    with temporary_folder(request.graph) as folder, progress.task(f"AP on {len(dataset.images)} images"):
        simulated = folder / "simulated.onnx"
        write_variant(
            request.model,
            simulated,
            precision=request.precision,
            calibration=request.calibration or request.gate_images,
            calibration_images=request.calibration_images,
            keep=request.keep,
            simulate=True,
            progress=Progress(),
        )
        single, half = (evaluate(Detector.load(path), dataset).summary() for path in (request.model, simulated))
    for name, value in single.items():
        text = f"{name} {half[name]:.4f} with {request.precision} rounding, {value:.4f} in single precision"
        progress.message(f"{text} (ONNX Runtime)")


# OpenVINO


def _build_openvino(request: BuildRequest, progress: Progress) -> BuildResult:
    from maskrcnn.data.images import images_in
    from maskrcnn.export.passes.quantize import feeds_from_files
    from maskrcnn.export.variants import COMPARED_IMAGES
    from maskrcnn.runtime.build.gate import average_precision, check_gate_images, gate_feeds
    from maskrcnn.runtime.build.openvino import build_openvino_engine
    from maskrcnn.runtime.engine_files import read_model
    from maskrcnn.runtime.verification.inputs import validation_batches

    onnx, path = request.model, request.output
    if request.precision in ("bf16", "tf32"):
        expected = "--fp16 (executes in bfloat16 if the CPU supports it), --fp32 or --int8"
        raise UserError(f"--{request.precision} for OpenVINO", expected, "use --fp16")
    check_gate_images(request)
    metadata = read_model(onnx)[1]
    rule = metadata.preprocessing
    batches = [feeds for _, feeds in gate_feeds(request, rule)]
    gate: dict[str, Any] = {"images": request.compared_images}
    if request.gate_annotations is not None:
        gate["average_precision"] = lambda engine: average_precision(engine, request, (), progress)
    if request.calibration is None:
        batches += validation_batches(rule.divisor, rule.channels)
        with progress.task(f"building from {onnx}"):
            built = build_openvino_engine(onnx, path, half=request.precision == "fp16", batches=batches, **gate)
        return _result(built, onnx, "openvino")
    gate["images"] = " and ".join(
        map(str, dict.fromkeys((request.calibration, request.gate_images or request.calibration)))
    )
    with temporary_folder(path) as folder:
        quantized = folder / f"{onnx.stem}.int8.onnx"
        write_variant(
            onnx,
            quantized,
            precision="int8",
            calibration=request.calibration,
            calibration_images=request.calibration_images,
            keep=request.keep,
            progress=progress,
        )
        batches += feeds_from_files(images_in(request.calibration, COMPARED_IMAGES), metadata)
        with progress.task(f"building from {quantized}"):
            built = build_openvino_engine(quantized, path, half=True, reference=onnx, batches=batches, **gate)
    return _result(built, onnx, "openvino")

"""What `maskrcnn build-engine` and `refit-engine` do, step by step: export's graph passes, then runtime's builders."""

from __future__ import annotations

import shlex
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from rich.console import Console

from maskrcnn import runs
from maskrcnn.api.export import Int8Options, temporary_folder, write_variant
from maskrcnn.errors import UserError
from maskrcnn.plugins.nvrtc import Image, architecture, compile_kernel, compiler_name, image_for
from maskrcnn.plugins.toolchain import Toolchain
from maskrcnn.runtime.backends.tensorrt_library import (
    OLDEST_ARCH,
    Hardware,
    PluginForm,
    find_gpu,
    import_tensorrt,
    tensorrt_obstacle,
)
from maskrcnn.runtime.build.gate import GateImages
from maskrcnn.runtime.build.network import BuildOptions

_PRECISIONS = ("fp16", "fp32", "bf16", "int8", "tf32")
_HALF = ("fp16", "bf16")


@dataclass(frozen=True, kw_only=True)
class TensorRtChoice:
    """What only TensorRT engines have."""

    batch: str = "1"
    size: str = "coco"
    options: BuildOptions = field(default_factory=BuildOptions)
    images: GateImages = field(default_factory=GateImages)
    timing_cache: Path | None = None
    given: tuple[str, ...] = ()  # the words of the command line that ask for all this
    given_paths: tuple[str, ...] = ()  # those that name files of this machine


@dataclass(frozen=True, kw_only=True)
class _Prepared:
    """A graph that TensorRT's parser can have."""

    reference: Path  # in single precision
    graph: Path
    precision: str

    def stage_of(self, node: str) -> str:
        """Which part of the detector a node of the graph belongs to."""
        import onnx

        from maskrcnn.export.costs import stages_by_node

        proto = onnx.load(self.graph)
        stages = dict(zip((each.name for each in proto.graph.node), stages_by_node(proto), strict=True))
        return stages.get(node, "")


def run_build_engine(
    console: Console,
    source: Path | None,
    *,
    precision: str,
    int8: Int8Options,
    target: str,
    output: Path | None,
    tensorrt: TensorRtChoice,
) -> None:
    """Builds the fastest engine for this machine, and compares it with the ONNX file.

    Args:
        console: to print to.
        source: the ONNX file in single precision; by default the newest export.
        precision: one of `_PRECISIONS`.
        int8: for "int8".
        target: "tensorrt", "openvino", or "auto" for the first of them that can be built here.
        output: the engine; by default it lies beside the ONNX file.
        tensorrt: for TensorRT.

    Raises:
        UserError: where it cannot be built, and where it departs from the ONNX file.
    """
    onnx = source or runs.newest_onnx()
    if target == "openvino":
        if tensorrt.given or tensorrt.given_paths:
            came = f"{_listed(tensorrt)} for OpenVINO"
            raise UserError(came, "options for TensorRT alone", "leave them out, or use --target tensorrt")
        _build_openvino(console, onnx, precision, int8, output)
        return
    obstacle = tensorrt_obstacle()
    if target == "auto" and obstacle is not None:
        console.print(f"TensorRT: {obstacle.found}; building the CPU engine with OpenVINO", markup=False)
        if tensorrt.given or tensorrt.given_paths:
            console.print(f"for TensorRT alone, so without effect: {_listed(tensorrt)}", markup=False)
        _build_openvino(console, onnx, precision, int8, output)
        return
    _build_tensorrt(console, onnx, precision, int8, output, tensorrt, obstacle)


def _listed(choice: TensorRtChoice) -> str:
    return " ".join([*choice.given, *choice.given_paths])


# TensorRT


def _build_tensorrt(
    console: Console,
    onnx: Path,
    precision: str,
    int8: Int8Options,
    output: Path | None,
    choice: TensorRtChoice,
    obstacle: UserError | None,
) -> None:
    from maskrcnn.export.variants import single_precision
    from maskrcnn.runtime.build.profiles import parsed_profiles

    path = _engine_path(output, onnx, precision, ".engine")
    _, metadata = single_precision(onnx)
    profiles = parsed_profiles(choice.batch, choice.size, metadata.preprocessing)
    console.print("profiles: " + "; ".join(map(str, profiles)), markup=False)
    prepared = prepare(console, onnx, precision, int8, choice)
    if obstacle is not None:
        if choice.images.annotations is not None and precision in _HALF:
            _tell_simulated_ap(console, prepared, choice.images)
        raise UserError(
            f"{obstacle.found}; the graph for TensorRT's parser is ready: {prepared.graph}",
            obstacle.expected,
            obstacle.fix,
        )
    from maskrcnn.runtime.build.request import Order
    from maskrcnn.runtime.build.tensorrt import build_tensorrt_engine

    order = Order(
        graph=prepared.graph,
        reference=onnx,
        output=path,
        precision=precision,
        profiles=profiles,
        options=choice.options,
        images=choice.images,
        command=_command(onnx, path, precision, int8, choice),
        timing_cache=choice.timing_cache,
    )
    built = _with_progress(console, prepared, lambda around: build_tensorrt_engine(order, around))
    _tell_built(console, built, path, onnx)


def run_refit_engine(console: Console, engine: Path, onnx: Path, *, output: Path, images: GateImages) -> None:
    """Puts the weights of an ONNX file into an engine that takes them, and compares the two.

    Args:
        console: to print to.
        engine: built with --refit or --strip-weights.
        onnx: the exported model, in single precision.
        output: the engine with these weights.
        images: to compare on.

    Raises:
        UserError: where that cannot be done, and where the engine departs from the ONNX file.
    """
    from maskrcnn.export.variants import single_precision
    from maskrcnn.runtime.build.refit import check_refittable, refit_tensorrt_engine
    from maskrcnn.runtime.build.request import Refit

    if output.suffix != ".engine" or output.resolve() == engine.resolve():
        raise UserError(f"--output {output}", "another file that ends in .engine", "choose another name")
    metadata = check_refittable(engine, onnx)
    single_precision(onnx)
    if obstacle := tensorrt_obstacle():
        raise obstacle
    form = PluginForm(metadata.stamp["plugins"])
    choice = TensorRtChoice(options=BuildOptions(plugins=form), images=images)
    prepared = prepare(console, onnx, metadata.precision, Int8Options(), choice)
    order = Refit(target=engine, graph=prepared.graph, reference=onnx, output=output, images=images)
    built = _with_progress(console, prepared, lambda around: refit_tensorrt_engine(order, around))
    _tell_built(console, built, output, onnx)


def prepare(console: Console, onnx: Path, precision: str, int8: Int8Options, choice: TensorRtChoice) -> _Prepared:
    """Everything that needs no TensorRT: precision pass, its effect in ONNX Runtime, TensorRT's flavour, lint, kernels.

    Raises:
        UserError: for a file that is not in single precision, and where the pass departs or the lint finds errors.
    """
    is_aot = choice.options.plugins is PluginForm.AOT
    graph = onnx.with_suffix(f".{precision}.tensorrt.onnx")
    # The images that the engine is compared on tell as well how large activations become.
    calibration = int8.calibration or (choice.images.folder if precision in _HALF else None)
    made = "fp32" if precision == "tf32" else precision
    with temporary_folder(graph, onnx) as folder:
        draft = folder / graph.name
        found = write_variant(
            console, onnx, draft, made, replace(int8, calibration=calibration), tensorrt=True, aot=is_aot
        )
        if found.errors:
            raise UserError(
                f"{len(found.errors)} node(s) of {onnx} that TensorRT's parser rejects, see above",
                "a graph without lint errors",
                "do what the lint says; for a file that maskrcnn exported, report it",
            )
        draft.replace(graph)
    console.print(f"{graph} ({graph.stat().st_size / 1e6:.1f} MB): what TensorRT's parser gets", markup=False)
    if is_aot:
        _compile_kernels(console, graph, choice.options.hardware)
    else:
        _find_library(console)
    return _Prepared(reference=onnx, graph=graph, precision=precision)


def _compile_kernels(console: Console, graph: Path, hardware: Hardware) -> None:
    """Compiles what TensorRT will ask for, so that what fails is said in words."""
    import onnx

    from maskrcnn.export.tensorrt.flavour import kernels_of
    from maskrcnn.plugins.build import COMMON_ARCHITECTURES
    from maskrcnn.plugins.toolchain import NVRTC, find_toolchain

    toolchain = find_toolchain()
    if not (toolchain.nvrtc or toolchain.nvcc):
        console.print(f"kernels of the plugins: not compiled, no {NVRTC.what}; to get it: {NVRTC.remedy}", markup=False)
        return
    image, where = Image.PTX, ""
    if hardware is Hardware.AMPERE_PLUS:
        arch = architecture(toolchain, OLDEST_ARCH)
    elif toolchain.gpus:
        arch, image = architecture(toolchain), image_for(toolchain)
    else:  # the oldest that is common: newer ones run its PTX
        arch, where = architecture(toolchain, COMMON_ARCHITECTURES[0]), ", as there is no GPU here"
    kernels = kernels_of(onnx.load(graph))
    with console.status("compiling the kernels of the plugins"):
        for kernel in kernels:
            compile_kernel(kernel, arch=arch, toolchain=toolchain, image=image)
    compiler = compiler_name(toolchain)
    console.print(f"{len(kernels)} kernels of the plugins compiled by {compiler} for sm_{arch}{where}", markup=False)


def _find_library(console: Console) -> None:
    """The plugin library of the cache, or compiled now; without a compiler the build says what it needs."""
    from maskrcnn.plugins import build
    from maskrcnn.plugins.build import Library
    from maskrcnn.plugins.toolchain import find_toolchain

    toolchain = find_toolchain()
    version = _tensorrt_version(toolchain)
    path = build.find_library(Library.PLUGINS, toolchain.gpus[0] if toolchain.gpus else None, tensorrt=version)
    if path is None and (missing := _library_obstacle(toolchain, version)):
        console.print(f"plugin library: {missing}", markup=False)
        return
    if path is None:
        with console.status(f"compiling {Library.PLUGINS.file_name}"):
            path = build.build_library(Library.PLUGINS, arch=(), toolchain=toolchain)
    console.print(f"plugin library: {path}", markup=False)


def _tensorrt_version(toolchain: Toolchain) -> str | None:
    """Of the TensorRT that is to load the library; where it is not installed, of the headers to compile against."""
    with suppress(UserError):
        return import_tensorrt().__version__
    return toolchain.tensorrt.version if toolchain.tensorrt else None


def _library_obstacle(toolchain: Toolchain, version: str | None) -> str:
    """Why no library for this version of TensorRT can be compiled; "" where it can."""
    from maskrcnn.plugins import build

    if missing := build.obstacle(build.Library.PLUGINS, toolchain):
        return str(missing)
    headers = toolchain.tensorrt
    if (version or "").partition(".")[0] == headers.version.partition(".")[0]:
        return ""
    return (
        f"the headers in {headers.folder} are of TensorRT {headers.version}, and {version} is installed; for those of "
        "that version: `maskrcnn build-plugins --form library --tensorrt-include DIR`"
    )


def _with_progress(console: Console, prepared: _Prepared, work):
    """What `work` returns, which is given TensorRT, the GPU, and a bar to tell its progress to."""
    from maskrcnn.cli.progress import EngineProgress
    from maskrcnn.runtime.backends.tensorrt import TensorRtBackend
    from maskrcnn.runtime.build.request import Surroundings

    with EngineProgress(console) as bar:
        return work(
            Surroundings(
                trt=import_tensorrt(),
                gpu=find_gpu(),
                open_engine=TensorRtBackend,
                progress=bar,
                tell=bar.tell,
                stage_of=prepared.stage_of,
            )
        )


def _tell_built(console: Console, built, path: Path, onnx: Path) -> None:
    stamp = built.metadata.stamp
    for warning in built.warnings[:3]:
        console.print(f"TensorRT warns: {warning[:300]}", markup=False)
    console.print(
        f"{stamp['precision']} on {stamp['gpu']} with TensorRT {stamp['tensorrt']}, plugins: {stamp['plugins']}",
        markup=False,
    )
    console.print(f"compared with ONNX Runtime: {stamp['compared']}", markup=False)
    size = path.stat().st_size / 1e6
    console.print(f"{path} ({size:.1f} MB) and {path.name}.json, from {onnx}", markup=False)


def _tell_simulated_ap(console: Console, prepared: _Prepared, images: GateImages) -> None:
    """AP of the graph as a device computes it that rounds after every layer, beside that of single precision."""
    from maskrcnn.export.variants import write_half
    from maskrcnn.runtime.detector import Detector
    from maskrcnn.runtime.evaluation.evaluate import evaluate

    dataset = images.dataset()
    with temporary_folder(prepared.graph) as folder, console.status(f"AP on {len(dataset.images)} images"):
        simulated = folder / "simulated.onnx"
        write_half(prepared.reference, simulated, prepared.precision, images=images.folder, simulate=True)
        found = [evaluate(Detector.load(path), dataset).summary() for path in (prepared.reference, simulated)]
    for name, value in found[0].items():
        text = f"{name} {found[1][name]:.4f} with {prepared.precision}'s rounding, {value:.4f} in single precision"
        console.print(f"{text} (ONNX Runtime)", markup=False)


def _command(onnx: Path, output: Path, precision: str, int8: Int8Options, choice: TensorRtChoice) -> str:
    """The command line that builds the engine again; of paths only their names, as they lie elsewhere then."""
    words = ["maskrcnn", "build-engine", onnx.name, f"--{precision}"]
    if int8.calibration is not None:
        words += [int8.calibration.name, *(word for name in int8.keep for word in ("--keep", name))]
        if int8.images != Int8Options().images:
            words += ["--calibration-images", str(int8.images)]
    words += ["--target", "tensorrt"]
    if output.name != _engine_path(None, onnx, precision, ".engine").name:
        words += ["--output", output.name]
    return shlex.join([*words, *choice.given])


# OpenVINO


def _build_openvino(console: Console, onnx: Path, precision: str, int8: Int8Options, output: Path | None) -> None:
    from maskrcnn.runtime.build.openvino import build_openvino_engine

    if precision in ("bf16", "tf32"):
        came, expected = f"--{precision} for OpenVINO", "--fp16, which executes in bfloat16 where the CPU has it"
        raise UserError(came, f"{expected}, --fp32 or --int8", "use --fp16")
    path = _engine_path(output, onnx, precision, ".xml")
    if int8.calibration is None:
        with console.status(f"building from {onnx}"):
            metadata, difference = build_openvino_engine(onnx, path, half=precision == "fp16")
    else:
        metadata, difference = _build_openvino_int8(console, onnx, int8, path)
    stamp = metadata.stamp
    console.print(f"weights {stamp['weights']}, execution {stamp['execution']} on {stamp['cpu']}")
    console.print(f"compared with ONNX Runtime: {difference}")
    console.print(f"{path} and {path.with_suffix('.bin').name}, from {onnx}")


def _build_openvino_int8(console: Console, onnx: Path, int8: Int8Options, path: Path):
    from maskrcnn.data.images import images_in
    from maskrcnn.export.passes.quantize import feeds_from_files
    from maskrcnn.export.variants import COMPARED_IMAGES
    from maskrcnn.runtime.build.openvino import build_openvino_engine
    from maskrcnn.runtime.onnx_file import read_model

    with temporary_folder(path) as folder:
        integers = folder / f"{onnx.stem}.int8.onnx"
        write_variant(console, onnx, integers, "int8", int8)
        paths = images_in(int8.calibration, COMPARED_IMAGES)
        batches = list(feeds_from_files(paths, read_model(onnx)[1]))
        with console.status(f"building from {integers}"):
            return build_openvino_engine(integers, path, half=True, reference=onnx, batches=batches)


def _engine_path(output: Path | None, onnx: Path, precision: str, suffix: str) -> Path:
    path = output or onnx.with_suffix(f".{precision}{suffix}")
    if path.suffix != suffix:
        raise UserError(f"--output {path}", f"a name that ends in {suffix}", f"use --output {path.with_suffix(suffix)}")
    return path

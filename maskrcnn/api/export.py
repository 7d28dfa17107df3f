"""`maskrcnn.export(...)`: one ONNX file from a checkpoint, weights of another library, or an exported file."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from maskrcnn import runs
from maskrcnn.api.progress import Progress
from maskrcnn.api.results import Result
from maskrcnn.errors import UserError, check_range
from maskrcnn.files import ONNX, Output, check_outputs, folder_beside

if TYPE_CHECKING:
    from maskrcnn.export.tensorrt.lint import LintReport
    from maskrcnn.runtime.verification.compare import Difference
    from maskrcnn.weights.torchvision import LoadedDetector

_TEMPORARY = ".export-"  # prefix of temporary folders that exist while a file is written
PRECISIONS = ("fp32", "fp16", "bf16", "int8")
Precision = Literal["fp32", "fp16", "bf16", "int8"]
CALIBRATION_IMAGES = 64


@dataclass(frozen=True, repr=False)
class ExportResult(Result):
    """The exported file, and its difference from its source."""

    path: Path
    source: Path
    precision: str
    size_mb: float
    differences: list[str]  # one line per comparison: compared with what, and the tolerance needed
    lint: LintReport | None = field(default=None, repr=False)  # with `tensorrt`: findings about TensorRT's parser


def export(
    checkpoint: str | Path | None = None,
    *,
    output: str | Path | None = None,
    precision: Precision = "fp32",
    calibration: str | Path | None = None,
    calibration_images: int = CALIBRATION_IMAGES,
    keep: Sequence[str] = (),
    simulate: bool = False,
    tensorrt: bool = False,
    aot: bool = False,
    opset: int | None = None,
    weights: str | None = None,
    model: str | None = None,
    batch_norm_epsilon: float | None = None,
    anchor_sizes: Sequence[float] | str | None = None,
    min_size: int | None = None,
    max_size: int | None = None,
    class_names: Sequence[str] | str | Path | None = None,
    settings: Sequence[str] | dict[str, Any] = (),
    detectron2_config: str | Path | None = None,
    max_unmatched: float = 0.0,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> ExportResult:
    """Writes one ONNX file, and compares it with its source before keeping it.

    Args:
        checkpoint: a `.safetensors` checkpoint, or an exported `.onnx` file to write in another precision. Default: the
            best checkpoint of the newest run.
        output: file to write. Default: `model.onnx` next to the checkpoint, with the precision in its name.
        precision: precision of the graph.
        calibration: folder of images; determines the scales of int8 and the range check of fp16.
        calibration_images: maximum number of calibration images.
        keep: with int8, layers that stay in floating point: "first", "last", "heads", "backbone", "fpn", or names.
        simulate: with fp16, bf16 and int8, write a float32 graph that instead rounds after every layer, as TensorRT
            does (int8: layers that are not quantized use fp16).
        tensorrt: write the graph for TensorRT's parser, with plugin nodes.
        aot: with `tensorrt`, use plugins whose kernels are compiled into the engine.
        opset: ONNX opset version. Default: 20.
        weights: weights instead of a checkpoint: a torchvision, Detectron2 or mmdetection file, a checkpoint, or a name
            such as "COCO_V1".
        model: architecture of torchvision `weights`. Default: inferred from the tensors, if the backbone is a ResNet.
        batch_norm_epsilon: batch norm epsilon of `weights`. Default: 0 for COCO_V1 weights, 1e-5 for others.
        anchor_sizes: anchor size of each level P2 … P6, px. Default: the model's; for weights that do not state it,
            their library's.
        min_size: shorter side of the resized images, px. Default: as for `anchor_sizes`.
        max_size: maximum longer side of the resized images, px. Default: as for `anchor_sizes`.
        class_names: names of labels 1, 2, …: a list, names separated by commas, or a text file with a name on each
            line. Default: as for `anchor_sizes`.
        settings: further fields of the model, as `["model.nms_iou=0.6"]` or nested dictionaries.
        detectron2_config: YAML configuration of Detectron2 `weights`. Default: config.yaml in their folder.
        max_unmatched: share of the compared detections, 0 to 1, that may be unmatched or differ by more than the
            tolerance, for models in which boxes tie.
        overwrite: replace `output` even if it is not an ONNX file; input files are never replaced.
        progress: receives messages.

    Raises:
        UserError: if options contradict each other, a file cannot be read or written, or the exported file differs from
            its source by more than the tolerance of its precision.
    """
    progress = progress or Progress()
    path = None if checkpoint is None else Path(checkpoint)
    variant: dict[str, Any] = {
        "precision": precision,
        "calibration": None if calibration is None else Path(calibration),
        "calibration_images": calibration_images,
        "keep": keep,
        "simulate": simulate,
        "tensorrt": tensorrt,
        "aot": aot,
    }
    changes = _model_settings(anchor_sizes, min_size, max_size, class_names, settings)
    of_weights = {
        "--model": model,
        "--batch-norm-epsilon": batch_norm_epsilon,
        "--detectron2-config": detectron2_config,
    }
    _check_options(path, weights, of_weights, changes, opset, max_unmatched, **variant)
    variant["max_unmatched"] = max_unmatched
    if output is not None:
        _check_output(Path(output), (path, weights, calibration, detectron2_config), overwrite=overwrite)
    if path is not None and path.suffix == ".onnx":
        target = Path(output) if output else _variant_name(path, precision, simulate=simulate, tensorrt=tensorrt)
        _check_output(target, (path, calibration), overwrite=overwrite)
        differences, lint = write_variant(path, target, **variant, progress=progress)
        return _result(target, path, precision, differences, lint)
    spec = weights or path or runs.newest_checkpoint()
    if weights is None and not Path(spec).exists():
        raise UserError(f"no file {spec}", "a checkpoint", "check the path, or train one: `maskrcnn train`")
    from maskrcnn.weights.torchvision import load_detector

    loaded = load_detector(
        spec, model, batch_norm_epsilon=batch_norm_epsilon, settings=changes, detectron2_config=detectron2_config
    )
    origin = loaded.path
    for line in loaded.messages():
        progress.message(line)
    if output is not None:
        target = Path(output)
    else:
        is_named = weights is not None and origin != Path(weights)
        plain = Path(f"{loaded.model.config.name}.onnx") if is_named else origin.with_name(runs.ONNX)
        target = _variant_name(plain, precision, simulate=simulate, tensorrt=tensorrt)
    _check_output(target, (origin, calibration), overwrite=overwrite)
    if precision == "fp32" and not tensorrt:
        differences = [_write_onnx(loaded, target, opset, max_unmatched, progress)]
        return _result(target, origin, precision, differences, None)
    with temporary_folder(target, origin) as folder:
        single = folder / runs.ONNX
        differences = [_write_onnx(loaded, single, opset, max_unmatched, progress)]
        more, lint = write_variant(single, target, **variant, progress=progress)
    return _result(target, origin, precision, differences + more, lint)


def _result(
    target: Path, source: Path, precision: str, differences: list[str], lint: LintReport | None
) -> ExportResult:
    return ExportResult(target, source, precision, round(target.stat().st_size / 1e6, 1), differences, lint)


def _write_onnx(
    loaded: LoadedDetector, target: Path, opset: int | None, max_unmatched: float, progress: Progress
) -> str:
    from maskrcnn.export.exporter import OPSET, export_onnx

    with progress.task(f"exporting {loaded.path}"):
        difference = export_onnx(
            loaded.model,
            target,
            source=loaded.path,
            opset=OPSET if opset is None else opset,
            assumed=loaded.assumed,
            max_unmatched=max_unmatched,
        )
    _say_compared("PyTorch", difference, progress)
    _say_tolerated(difference, max_unmatched, progress)
    return f"PyTorch: {difference}"


def _say_compared(than: str, difference: Difference, progress: Progress, images: str = "drawn images") -> None:
    """Reports an accepted comparison in one line, and in full with --verbose."""
    progress.detail(f"compared with {than}: {difference}")
    progress.message(f"{'OK: ' if difference.detections else ''}{difference.summary(than)}, on {images}")


def _say_tolerated(difference: Difference, max_unmatched: float, progress: Progress) -> None:
    if max_unmatched and difference.unmatched_share:
        progress.message(
            f"tolerated: {difference.unmatched_share:.2%} of the detections are unmatched or differ by more, "
            f"--max-unmatched {max_unmatched:g} accepts {max_unmatched:.2%}"
        )


def write_variant(
    source: Path,
    target: Path,
    *,
    precision: str,
    calibration: Path | None = None,
    calibration_images: int = CALIBRATION_IMAGES,
    keep: Sequence[str] = (),
    simulate: bool = False,
    tensorrt: bool = False,
    aot: bool = False,
    max_unmatched: float = 0.0,
    progress: Progress,
) -> tuple[list[str], LintReport | None]:
    """Writes an exported file in another precision, for TensorRT's parser, or both. Arguments as in `export`.

    Returns:
        one line per comparison, and with `tensorrt` the lint report.
    """
    from maskrcnn.export import variants
    from maskrcnn.export.passes.quantize import DEFAULT_KEEP

    differences: list[str] = []
    lint = None
    with temporary_folder(target) as folder, progress.task(f"writing {target.name}"):
        made = source
        draft = folder / target.name if tensorrt else target
        if precision in ("fp16", "bf16"):
            report, difference = variants.write_half(
                source,
                draft,
                precision,
                images=calibration,
                limit=calibration_images,
                simulate=simulate,
                max_unmatched=max_unmatched,
            )
            text = report.text()
        elif precision == "int8":
            assert calibration is not None, "checked by the callers"
            quantized, difference = variants.write_int8(
                source,
                draft,
                calibration,
                keep=tuple(keep) or DEFAULT_KEEP,
                limit=calibration_images,
                for_tensorrt=tensorrt,
                simulate=simulate,
                max_unmatched=max_unmatched,
            )
            text = quantized.text()
        if precision != "fp32":
            progress.detail(text)
            images = [*(["drawn images"] if precision != "int8" else []), *([str(calibration)] if calibration else [])]
            _say_compared("single precision", difference, progress, " and ".join(images))
            _say_tolerated(difference, max_unmatched, progress)
            differences.append(f"single precision: {difference}")
            made = draft
        if tensorrt:
            lint = variants.write_tensorrt(made, target, aot=aot)
            progress.message(lint.text())
    return differences, lint


def _check_options(
    path: Path | None,
    weights: str | None,
    of_weights: dict[str, Any],
    changes: dict[str, Any],
    opset: int | None,
    max_unmatched: float,
    *,
    precision: str,
    calibration: Path | None,
    calibration_images: int,
    keep: Sequence[str],
    simulate: bool,
    tensorrt: bool,
    aot: bool,
) -> None:
    if precision not in PRECISIONS:
        raise UserError(f"--precision {precision}", ", ".join(PRECISIONS), "choose one of these")
    check_range("calibration_images", calibration_images, 1)
    if path is not None and weights is not None:
        raise UserError(f"{path} and --weights {weights}", "only one of them", "drop one of them")
    if weights is None and (given := [name for name, value in of_weights.items() if value is not None]):
        raise UserError(
            f"{' and '.join(given)} without --weights",
            "a checkpoint or an ONNX file, whose metadata contains these settings",
            "add --weights, or drop these options",
        )
    if not 0 <= max_unmatched <= 1:
        raise UserError(f"--max-unmatched {max_unmatched:g}", "a share from 0 to 1", "use 0.01 for one percent")
    if precision == "int8" and calibration is None:
        raise UserError(
            "--precision int8 without --calibration",
            "a folder of images like those in deployment, to compute the 8-bit scales from",
            "add --calibration FOLDER",
        )
    if simulate and (precision == "fp32" or tensorrt):
        found = f"--simulate with --precision {precision}{' and --tensorrt' if tensorrt else ''}"
        raise UserError(found, "--precision fp16, bf16 or int8", "drop --simulate, or choose one of these")
    if aot and not tensorrt:
        raise UserError("--aot without --tensorrt", "--tensorrt --aot", "add --tensorrt")
    if keep and precision != "int8":
        raise UserError(f"--keep with --precision {precision}", "--precision int8", "drop --keep")
    if calibration is not None and precision == "fp32":
        raise UserError("--calibration with --precision fp32", "another --precision", "drop --calibration")
    if path is None or path.suffix != ".onnx":
        return
    if changes:
        raise UserError(
            f"settings of the model ({', '.join(changes)}) with {path}, in which they are fixed",
            "the checkpoint or the weights that it was exported from",
            "export these, or drop --anchor-sizes, --min-size, --max-size, --class-names and --set",
        )
    if opset is not None:
        raise UserError(f"--opset with {path}", "a checkpoint", "export the checkpoint with --opset")
    if precision == "fp32" and not tensorrt:
        raise UserError(
            f"{path}, which is an ONNX file in single precision already",
            "a checkpoint; or an ONNX file with another --precision or --tensorrt",
            "add --precision fp16, bf16 or int8, or export a checkpoint",
        )


def _model_settings(
    anchor_sizes: Sequence[float] | str | None,
    min_size: int | None,
    max_size: int | None,
    class_names: Sequence[str] | str | Path | None,
    settings: Sequence[str] | dict[str, Any],
) -> dict[str, Any]:
    """Model fields set by options, typed."""
    from maskrcnn.config import ModelConfig
    from maskrcnn.settings import assignments, merged, typed

    given = settings if isinstance(settings, dict) else assignments(list(settings))
    if others := sorted(set(given) - {"model"}):
        raise UserError(f"--set {others[0]}", "settings of the model", "use --set model.FIELD=VALUE")
    fields = given.get("model", {})
    if isinstance(fields, str):
        fields = {"name": fields}
    named = {"min_size_px": min_size, "max_size_px": max_size}
    if sizes := {name: size for name, size in named.items() if size is not None}:
        fields = merged(fields, {"preprocessing": sizes})
    if anchor_sizes is not None:
        fields = fields | {"anchor_sizes_px": anchor_sizes}
    if class_names is not None:
        fields = fields | {"class_names": _names(class_names)}
    changes: dict[str, Any] = typed(ModelConfig, fields, where="model.")
    return changes


def _names(given: Sequence[str] | str | Path) -> tuple[str, ...]:
    """Class names from a list, a text file with a name on each line, or names separated by commas."""
    if not isinstance(given, (str, Path)):
        return tuple(given)
    path, text = Path(given), str(given)
    if path.is_file():
        try:
            return tuple(line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip())
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(
                f"--class-names {path}: {error}", "a UTF-8 text file with a name on each line", "save it as UTF-8"
            ) from error
    if path.suffix == ".txt" or isinstance(given, Path):
        raise UserError(f"no file {path}", "a text file with a name on each line", "check --class-names")
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _variant_name(path: Path, precision: str, *, simulate: bool, tensorrt: bool) -> Path:
    """The file name of a variant of model.onnx, such as model.fp16.onnx or model.fp16.tensorrt.onnx."""
    suffix = "" if precision == "fp32" else f".{precision}{'.simulated' if simulate else ''}"
    return path.with_suffix(f"{suffix}{'.tensorrt' if tensorrt else ''}.onnx")


def _check_output(target: Path, inputs: Sequence[str | Path | None], *, overwrite: bool) -> None:
    if target.suffix != ".onnx":
        raise UserError(f"--output {target}", "a name that ends in .onnx", f"for example {target.with_suffix('.onnx')}")
    check_outputs([Output("--output", target, ONNX)], inputs, overwrite=overwrite)


@contextlib.contextmanager
def temporary_folder(beside: Path, origin: Path | None = None) -> Iterator[Path]:
    """A folder next to a file, deleted at the end; rejected files in it are moved next to the file.

    Args:
        beside: the file to be written.
        origin: path that error messages show instead of the folder's `model.onnx`.
    """
    with folder_beside(beside, prefix=_TEMPORARY) as folder:
        try:
            yield folder
        except UserError as error:
            for path in folder.glob("*.rejected.*"):
                path.replace(beside.parent / path.name)
            parts = [error.found, error.expected, error.fix]
            for old, new in ((folder / runs.ONNX, origin or beside.with_name(runs.ONNX)), (folder, beside.parent)):
                parts = [text.replace(str(old), str(new)) for text in parts]
            raise UserError(*parts) from error

"""What `maskrcnn export` does, step by step."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from maskrcnn import runs
from maskrcnn.errors import UserError
from maskrcnn.files import check_target, folder_beside

if TYPE_CHECKING:
    from maskrcnn.export.tensorrt.lint import LintReport

_TEMPORARY = ".export-"  # how a folder's name begins that is gone afterwards
_PRECISIONS = ("fp32", "fp16", "bf16", "int8")


@dataclass(frozen=True, kw_only=True)
class Source:
    """What is to be exported: a checkpoint, weights of another library, or an ONNX file of ours."""

    path: Path | None = None
    weights: str | None = None
    model: str | None = None
    batch_norm_epsilon: float | None = None


@dataclass(frozen=True, kw_only=True)
class Int8Options:
    """How 8-bit scales are found."""

    calibration: Path | None = None
    keep: Sequence[str] = ()
    images: int = 64


def run_export(
    console: Console,
    source: Source,
    *,
    output: Path | None,
    precision: str,
    int8: Int8Options,
    opset: int | None,
    simulate: bool,
    tensorrt: bool,
    aot: bool,
) -> None:
    """Writes one ONNX file and says how far it is from what it was made from."""
    _check_options(source, precision, int8, opset=opset, simulate=simulate, tensorrt=tensorrt, aot=aot)
    if source.path is not None and source.path.suffix == ".onnx":
        target = output or _variant(source.path, precision, simulate=simulate, tensorrt=tensorrt)
        _check_output(target, source.path)
        write_variant(console, source.path, target, precision, int8, simulate=simulate, tensorrt=tensorrt, aot=aot)
        return
    loaded, origin, named = _load(console, source)
    target = output or (Path(f"{loaded.config.name}.onnx") if named else origin.with_name(runs.ONNX))
    if output is None:
        target = _variant(target, precision, simulate=simulate, tensorrt=tensorrt)
    _check_output(target, origin)
    from maskrcnn.export.exporter import OPSET, export_onnx

    def export(path: Path) -> None:
        with console.status(f"exporting {origin}"):
            difference = export_onnx(loaded, path, source=origin, opset=opset or OPSET)
        console.print(f"compared with PyTorch: {difference}")

    if precision == "fp32" and not tensorrt:
        export(target)
        console.print(f"{target} ({target.stat().st_size / 1e6:.1f} MB, from {origin})")
        return
    with temporary_folder(target, origin) as folder:
        export(folder / runs.ONNX)
        write_variant(
            console, folder / runs.ONNX, target, precision, int8, simulate=simulate, tensorrt=tensorrt, aot=aot
        )


def _check_options(
    source: Source, precision: str, int8: Int8Options, *, opset: int | None, simulate: bool, tensorrt: bool, aot: bool
) -> None:
    if precision not in _PRECISIONS:
        raise UserError(f"--precision {precision}", ", ".join(_PRECISIONS), "choose one of these")
    if source.path is not None and source.weights is not None:
        raise UserError(f"{source.path} and --weights {source.weights}", "one of the two", "drop one of them")
    if source.weights is None and (source.model is not None or source.batch_norm_epsilon is not None):
        raise UserError(
            "--model or --batch-norm-epsilon without --weights",
            "a checkpoint or an ONNX file, which knows both",
            "add --weights, or leave them out",
        )
    if precision == "int8" and int8.calibration is None:
        raise UserError(
            "--precision int8 without --calibration",
            "a folder of images like those to be seen later, to take 8-bit scales from",
            "add --calibration FOLDER",
        )
    if simulate and (precision not in ("fp16", "bf16") or tensorrt):
        came = f"--simulate with --precision {precision}{' and --tensorrt' if tensorrt else ''}"
        raise UserError(came, "--precision fp16 or bf16", "drop --simulate, or choose one of these")
    if aot and not tensorrt:
        raise UserError("--aot without --tensorrt", "--tensorrt --aot", "add --tensorrt")
    if int8.keep and precision != "int8":
        raise UserError(f"--keep with --precision {precision}", "--precision int8", "drop --keep")
    if int8.calibration is not None and precision == "fp32":
        raise UserError("--calibration with --precision fp32", "another --precision", "drop --calibration")
    if source.path is None or source.path.suffix != ".onnx":
        return
    if opset is not None:
        raise UserError(f"--opset with {source.path}", "a checkpoint", "export the checkpoint with --opset")
    if precision == "fp32" and not tensorrt:
        raise UserError(
            f"{source.path}: an ONNX file already", "a checkpoint, or another --precision", "say what to make"
        )


def _load(console: Console, source: Source):
    """(model, the file it came from, whether it came by a name)."""
    from maskrcnn.weights.checkpoint import load_checkpoint
    from maskrcnn.weights.torchvision import load_detector

    if source.weights is None:
        path = source.path or runs.newest_checkpoint()
        return load_checkpoint(path), path, False
    loaded, path = load_detector(source.weights, source.model, batch_norm_epsilon=source.batch_norm_epsilon)
    config = loaded.config
    epsilon = f"batch norm epsilon {config.batch_norm_epsilon:g}"
    console.print(f"{config.name}: {config.num_classes} classes, {epsilon}")
    return loaded, path, path != Path(source.weights)


def write_variant(
    console: Console,
    source: Path,
    target: Path,
    precision: str,
    int8: Int8Options,
    *,
    simulate: bool = False,
    tensorrt: bool = False,
    aot: bool = False,
) -> LintReport | None:
    """Makes a file in another precision, for TensorRT's parser, or both, from one that was exported.

    Returns:
        with `tensorrt`, what the lint says of the file.
    """
    from maskrcnn.export import variants

    found = None
    with temporary_folder(target) as folder:
        made = source
        draft = folder / target.name if tensorrt else target
        with console.status(f"making {target.name}"):
            if precision in ("fp16", "bf16"):
                report, difference = variants.write_half(
                    source, draft, precision, images=int8.calibration, limit=int8.images, simulate=simulate
                )
            elif precision == "int8":
                keep = int8.keep or variants.DEFAULT_KEEP
                report, difference = variants.write_int8(
                    source, draft, int8.calibration, keep=keep, limit=int8.images, for_tensorrt=tensorrt
                )
            if precision != "fp32":
                console.print(report.text(), markup=False)
                console.print(f"compared with single precision: {difference}")
                made = draft
            if tensorrt:
                found = variants.write_tensorrt(made, target, aot=aot)
                console.print(found.text(), markup=False)
    if not target.parent.name.startswith(_TEMPORARY):
        console.print(f"{target} ({target.stat().st_size / 1e6:.1f} MB)")
    return found


def _variant(path: Path, precision: str, *, simulate: bool, tensorrt: bool) -> Path:
    """The name of a variant of model.onnx, as model.fp16.onnx or model.fp16.tensorrt.onnx."""
    suffix = "" if precision == "fp32" else f".{precision}{'.simulated' if simulate else ''}"
    return path.with_suffix(f"{suffix}{'.tensorrt' if tensorrt else ''}.onnx")


def _check_output(target: Path, source: Path) -> None:
    """That the target is an ONNX file's name, can be written, and is not the source."""
    if target.suffix != ".onnx":
        raise UserError(f"--output {target}", "a name that ends in .onnx", f"for example {target.with_suffix('.onnx')}")
    if target.resolve() == source.resolve():
        raise UserError(f"--output {target}, the file to make it from", "another file", "choose another name")
    check_target(target)


@contextlib.contextmanager
def temporary_folder(beside: Path, origin: Path | None = None) -> Iterator[Path]:
    """A folder beside a file, gone afterwards. What is refused in it is kept beside the file, and named there.

    Args:
        beside: the file that is being made.
        origin: what errors call the folder's `model.onnx`, which nobody will find.
    """
    with folder_beside(beside, prefix=_TEMPORARY) as folder:
        try:
            yield folder
        except UserError as error:
            for path in folder.glob("*.rejected.*"):
                path.replace(beside.parent / path.name)
            told = [error.found, error.expected, error.fix]
            for old, new in ((folder / runs.ONNX, origin or beside.with_name(runs.ONNX)), (folder, beside.parent)):
                told = [text.replace(str(old), str(new)) for text in told]
            raise UserError(*told) from error

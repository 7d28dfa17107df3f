"""`maskrcnn.inspect(...)` and `maskrcnn.lint(...)`: describe a model file, and lint it for TensorRT's parser."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from maskrcnn.errors import UserError
from maskrcnn.files import Output, check_outputs, report_kind, write_report

if TYPE_CHECKING:
    from maskrcnn.export.inspection import Inspection
    from maskrcnn.export.tensorrt.lint import LintReport


def inspect(
    file: str | Path,
    *,
    size_hw: tuple[int, int] | None = None,
    json: str | Path | None = None,
    overwrite: bool = False,
) -> Inspection:
    """Describes a model file: tensors, precision, size, operations, provenance, and where its nodes would run.

    Args:
        file: ONNX file, engine (`.xml`, `.engine`) or checkpoint (`.safetensors`).
        size_hw: (height, width) of the network's input to count operations at, px.
        json: file to write the description to.
        overwrite: replace `json` even if `inspect` did not write it; never the model.

    Returns:
        an object with `text()` and `to_dict()`.

    Raises:
        UserError: for a file that is not a model.
    """
    from maskrcnn.export.inspection import inspect as look

    _check_json(json, "inspect", file, overwrite=overwrite)
    found = look(Path(file), size_hw=size_hw)
    if json is not None:
        write_report(json, "inspect", found.to_dict())
    return found


def lint(file: str | Path, *, json: str | Path | None = None, overwrite: bool = False) -> LintReport:
    """Lists the nodes of an ONNX file that TensorRT would reject or run poorly. Does not need TensorRT.

    A file of `maskrcnn.export` is checked in its form for TensorRT, with plugin nodes; others are checked unchanged.

    Args:
        file: any ONNX file.
        json: file to write the findings to.
        overwrite: replace `json` even if `lint` did not write it; never the model.

    Returns:
        an object with `errors`, `warnings`, `text()` and `to_dict()`.

    Raises:
        UserError: if the file is not a valid ONNX file.
    """
    return lint_file(Path(file), json=json, overwrite=overwrite)[0]


def lint_file(path: Path, *, json: str | Path | None = None, overwrite: bool = False) -> tuple[LintReport, bool]:
    """The lint report of a file, and whether `maskrcnn.export` wrote the file; arguments as in `lint`."""
    import onnx

    from maskrcnn.export.passes.quantize import symmetric
    from maskrcnn.export.tensorrt.flavour import tensorrt_flavour
    from maskrcnn.export.tensorrt.lint import lint as check
    from maskrcnn.metadata import KEY

    _check_json(json, "lint", path, overwrite=overwrite)
    if not path.is_file():
        raise UserError(f"no file {path}", "an ONNX file", "check the path, or run `maskrcnn export --onnx`")
    try:
        proto = onnx.load(path)
        onnx.checker.check_model(str(path))
    except Exception as error:  # the exceptions of onnx and protobuf share no public base class
        raise UserError(f"{path}: not a valid ONNX file ({error})", "an ONNX file", "export it again") from error
    is_ours = any(entry.key == KEY for entry in proto.metadata_props)
    report = check(tensorrt_flavour(symmetric(proto)) if is_ours else proto)
    if json is not None:
        write_report(json, "lint", {"model": str(path), "flavour": is_ours, **report.to_dict()})
    return report, is_ours


def _check_json(json: str | Path | None, command: str, file: str | Path, *, overwrite: bool) -> None:
    if json is not None:
        check_outputs([Output("--json", Path(json), report_kind(command))], [file], overwrite=overwrite)

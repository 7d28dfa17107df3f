"""`maskrcnn.inspect(...)` and `maskrcnn.lint(...)`: what a model file holds, and what TensorRT's parser makes of it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from maskrcnn.errors import UserError

if TYPE_CHECKING:
    from maskrcnn.export.inspection import Inspection
    from maskrcnn.export.tensorrt.lint import LintReport


def inspect(file: str | Path, *, size_hw: tuple[int, int] | None = None) -> Inspection:
    """Describes a model file: tensors, precision, size, operations, provenance, and where its nodes would run.

    Args:
        file: ONNX file, engine (`.xml`, `.engine`) or checkpoint (`.safetensors`).
        size_hw: (height, width) of the network's input to count operations at, px.

    Returns:
        an object with `text()` and `to_dict()`.

    Raises:
        UserError: for a file that is not a model.
    """
    from maskrcnn.export.inspection import inspect as look

    return look(Path(file), size_hw=size_hw)


def lint(file: str | Path) -> LintReport:
    """Lists the nodes of an ONNX file that TensorRT's parser rejects or runs badly. Needs no TensorRT.

    A file of `maskrcnn.export` is checked in the form that TensorRT gets, with plugin nodes; others as they are.

    Args:
        file: any ONNX file.

    Returns:
        an object with `errors`, `warnings`, `text()` and `to_dict()`.

    Raises:
        UserError: if the file is not a valid ONNX file.
    """
    return lint_file(Path(file))[0]


def lint_file(path: Path) -> tuple[LintReport, bool]:
    """The lint report of a file, and whether `maskrcnn.export` wrote the file."""
    import onnx

    from maskrcnn.export.passes.quantize import symmetric
    from maskrcnn.export.tensorrt.flavour import tensorrt_flavour
    from maskrcnn.export.tensorrt.lint import lint as check
    from maskrcnn.metadata import KEY

    if not path.is_file():
        raise UserError(f"no file {path}", "an ONNX file", "check the path, or run `maskrcnn export --onnx`")
    try:
        proto = onnx.load(path)
        onnx.checker.check_model(str(path))
    except Exception as error:  # the exceptions of onnx and protobuf share no public base class
        raise UserError(f"{path}: not a valid ONNX file ({error})", "an ONNX file", "export it again") from error
    is_ours = any(entry.key == KEY for entry in proto.metadata_props)
    return check(tensorrt_flavour(symmetric(proto)) if is_ours else proto), is_ours

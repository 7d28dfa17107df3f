"""The work of `maskrcnn inspect` and `maskrcnn lint`, apart from parsing their options."""

from __future__ import annotations

import re
from pathlib import Path

from rich.console import Console

from maskrcnn.errors import UserError
from maskrcnn.files import write_json


def run_inspect(console: Console, path: Path, *, size: str | None, json: Path | None) -> None:
    """Prints what a model file is; `size` is HEIGHTxWIDTH of the network's input."""
    from maskrcnn.export.inspection import inspect

    with console.status(f"looking into {path}"):
        found = inspect(path, size_hw=None if size is None else _size_hw(size))
    console.print(found.text(), markup=False)
    if json is not None:
        write_json(json, found.to_dict())


def run_lint(console: Console, path: Path, *, json: Path | None) -> bool:
    """Prints what TensorRT's parser would object to; whether there were errors.

    A file of ours is checked as TensorRT gets it: with plugins instead of functions, 8-bit integers symmetric. Any
    other is checked as it is.
    """
    import onnx

    from maskrcnn.export.passes.quantize import symmetric
    from maskrcnn.export.tensorrt.flavour import tensorrt_flavour
    from maskrcnn.export.tensorrt.lint import lint
    from maskrcnn.metadata import KEY

    if not path.is_file():
        raise UserError(f"no file {path}", "an ONNX file", "check the path, or run `maskrcnn export --onnx`")
    try:
        proto = onnx.load(path)
        onnx.checker.check_model(str(path))
    except Exception as error:  # onnx's and protobuf's own exceptions share no public base
        raise UserError(
            f"{path}: not a valid ONNX file ({str(error)[:200]})", "an ONNX file", "export it again"
        ) from error
    is_ours = any(entry.key == KEY for entry in proto.metadata_props)
    report = lint(tensorrt_flavour(symmetric(proto)) if is_ours else proto)
    checked = "its TensorRT flavour, with plugins" if is_ours else "as it is"
    console.print(f"{path}, {checked}: {report.text()}", markup=False)
    if json is not None:
        write_json(json, {"model": str(path), "flavour": is_ours, **report.to_dict()})
    return bool(report.errors)


def _size_hw(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)[x×](\d+)", text)
    if match is None:
        raise UserError(f"--size {text}", "HEIGHTxWIDTH in pixels", "for example --size 800x1088")
    return int(match[1]), int(match[2])

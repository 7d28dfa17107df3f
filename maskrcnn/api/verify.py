"""`maskrcnn verify`: loads two models, compares them stage by stage, and writes what was found."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console

from maskrcnn.data.images import images_in, read_image
from maskrcnn.errors import UserError
from maskrcnn.files import atomic_path, check_target, report_path, write_json
from maskrcnn.runtime.backends.base import Backend
from maskrcnn.runtime.detector import load_backend
from maskrcnn.runtime.onnx_file import check_portable, read_model
from maskrcnn.runtime.verification.inputs import Batch, drawn_batches
from maskrcnn.runtime.verification.report import html_page
from maskrcnn.runtime.verification.tolerances import tolerances_named
from maskrcnn.runtime.verification.verify import check_comparable, verify


def run_verify(
    console: Console,
    first: Path,
    second: Path,
    *,
    images: Sequence[Path] = (),
    max_images: int = 16,
    size_px: int | None = None,
    tolerance: str | None = None,
    json: Path | None = None,
    report: Path | None = None,
) -> bool:
    """Compares two model files on the CPU, prints the table, and writes what was asked for.

    Args:
        console: where to print.
        first: the reference.
        second: what is compared with it.
        images: files and folders; none means drawn shapes.
        max_images: as many are compared at most.
        size_px: shorter side of the resized images.
        tolerance: "exact", "half" or "int8"; by default what the two files' precisions need.
        json: where to write the report as JSON.
        report: where to write it as HTML: a file, or a folder for `report.html`.

    Returns:
        whether no stage departs.

    Raises:
        UserError: for files that cannot be used, models that cannot be compared, and folders without images.
    """
    tolerances = tolerances_named(tolerance) if tolerance else None
    page = None if report is None else report_path(report)
    for target in (json, page):
        if target is not None:
            check_target(target)
    paths = _image_files(images, max_images)
    models = [_on_cpu(path) for path in (first, second)]
    check_comparable(*(model.metadata for model in models))
    if len(paths) > max_images:
        console.print(f"the first {max_images} images (--max-images)")
    with console.status("comparing") as status:
        found = verify(
            *models,
            _read(paths[:max_images]) if images else drawn_batches(),
            tolerances,
            size_px=size_px,
            progress=lambda name: status.update(f"compared {name}"),
        )
    for role, path, model in zip(("reference", "other"), (first, second), found.models, strict=True):
        console.print(f"{role}: {path} in {model}", markup=False)
    console.print(found.table(), markup=False)
    console.print(found.conclusion(), markup=False)
    names = (str(first), str(second))
    if json is not None:
        write_json(json, {"reference": names[0], "other": names[1], **found.to_dict()})
    if page is not None:
        with atomic_path(page) as draft:
            draft.write_text(html_page(found, names, models[0].metadata), encoding="utf-8")
        console.print(f"report → {page}")
    return found.ok


def _image_files(paths: Sequence[Path], limit: int) -> list[Path]:
    """The image files among files and folders; of a folder at most `limit`, evenly spread over the names.

    Raises:
        UserError: for a folder without images and for what does not exist.
    """
    files = []
    for path in paths:
        if path.is_dir():
            files += images_in(path, limit)
        elif path.exists():
            files.append(path)
        else:
            raise UserError(f"no file or folder {path}", "images to compare the models on", "check the path")
    return files


def _on_cpu(path: Path) -> Backend:
    """The model on the CPU, where arithmetic is what its precision says: GPUs shorten FP32 by default."""
    if path.suffix == ".safetensors":
        return load_backend(path, device="cpu")
    if path.suffix != ".onnx":
        return load_backend(path)
    proto, metadata = read_model(path)
    check_portable(proto, path)
    if metadata.precision == "bf16":  # ONNX Runtime has no kernels for it
        return load_backend(path, "openvino")
    return load_backend(path, providers=["CPUExecutionProvider"])


def _read(paths: Sequence[Path]) -> Iterator[Batch]:
    """One image after the other: a batch would change each a little."""
    for path in paths:
        yield Batch((path.name,), (read_image(path),))
